"""Draws state machines from the code: the lifecycle, a client's backend, any ``transitions`` machine, nested ones too.

::

    from proxy_fsm import diagram

    print(diagram.draw(diagram.LIFECYCLE, "mermaid"))
    svg = diagram.draw(MyMachine, "svg", highlight="running/verifying")

The same input gives the same bytes, on every machine with the same versions of the extra's packages. Mermaid, DOT, the
table and JSON need no extra; SVG and PNG need the extra ``diagram``. The command line has ``proxy-fsm diagram``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from proxy_fsm import scene
from proxy_fsm.diagram.chart import LIFECYCLE, Arrow, Chart, Inner, PathStep, path_from_history
from proxy_fsm.diagram.graphviz import dot
from proxy_fsm.diagram.layout import chart_scene
from proxy_fsm.diagram.machines import chart_of
from proxy_fsm.diagram.target import load
from proxy_fsm.diagram.text import PHASE_COLUMNS, as_json, markdown_table, mermaid, phase_rows, table_rows
from proxy_fsm.errors import DiagramError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "FORMATS",
    "LIFECYCLE",
    "PHASE_COLUMNS",
    "Arrow",
    "Chart",
    "DiagramError",
    "Format",
    "Inner",
    "PathStep",
    "Theme",
    "as_json",
    "chart_of",
    "dot",
    "draw",
    "load",
    "markdown_table",
    "mermaid",
    "path_from_history",
    "phase_rows",
    "table_rows",
]

Format = Literal["mermaid", "dot", "svg", "png", "table", "json"]
Theme = scene.Theme
#: All formats that `draw` knows.
FORMATS: tuple[Format, ...] = get_args(Format)


def draw(
    machine: object = LIFECYCLE,
    format: Format = "mermaid",
    *,
    highlight: str | None = None,
    path: Sequence[PathStep] = (),
    theme: Theme | None = None,
    phases: bool = True,
) -> str | bytes:
    """Draw a state machine.

    Args:
        machine: What to draw; see `chart_of` for what that may be.
        format: What to draw it as.
        highlight: A state to highlight, or a phase of it: ``state/phase``.
        path: The changes that a running machine has made (see `path_from_history`); the table does not show them.
        phases: Whether to draw what is inside the states; if not, a highlighted phase highlights its state.
        theme: ``light`` or ``dark``. By default SVG and Mermaid follow the viewer's setting, and DOT and PNG are light.

    Returns:
        The picture, as bytes for PNG and else as text.

    Raises:
        DiagramError: It is not a machine, has no such state, or the extra is missing; or there is no such format.
    """
    chart = chart_of(machine)
    highlight = chart.state_named(highlight)
    if not phases:
        highlight = None if highlight is None else chart.around(highlight)[0]
        chart = chart.without_phases()
    match format:
        case "mermaid":
            return mermaid(chart, highlight=highlight, path=path, theme=theme)
        case "dot":
            return dot(chart, highlight=highlight, path=path, theme=theme or "light")
        case "table":
            return markdown_table(chart, highlight=highlight)
        case "json":
            return as_json(chart, highlight=highlight, path=path)
        case "svg":
            return scene.svg(chart_scene(chart, highlight=highlight, path=path), theme)
        case "png":
            return scene.png(chart_scene(chart, highlight=highlight, path=path), theme or "light")
    raise DiagramError(f"There is no format {format!r}; there are {', '.join(FORMATS)}.")
