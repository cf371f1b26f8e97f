"""Draws what happened in a run, from its recorded events.

::

    from proxy_fsm import timeline

    with open("events.jsonl", "rb") as file:
        run = timeline.read(file, "events.jsonl")
    page = timeline.draw(run, "html")

``proxy-fsm run`` and ``demo`` print such events with ``--log-format json``; so does any program whose structlog renders
JSON with ``event``, ``level`` and ``timestamp``. SVG, the HTML page and Mermaid need no extra; PNG needs the extra
``timeline``.
"""

from __future__ import annotations

from typing import Literal, get_args

from proxy_fsm import scene
from proxy_fsm.timeline.page import page
from proxy_fsm.timeline.picture import run_scene
from proxy_fsm.timeline.reading import read
from proxy_fsm.timeline.run import Event, Flow, Run, Stay, TimelineError, Track
from proxy_fsm.timeline.sequence import sequence_mermaid, sequence_scene

__all__ = [
    "FORMATS",
    "Event",
    "Flow",
    "Format",
    "Run",
    "Stay",
    "TimelineError",
    "Track",
    "View",
    "draw",
    "read",
    "sequence_mermaid",
]

Format = Literal["svg", "png", "html", "mermaid"]
View = Literal["run", "sequence"]
#: All formats that `draw` knows.
FORMATS: tuple[Format, ...] = get_args(Format)


def draw(run: Run, format: Format, *, view: View = "run", theme: scene.Theme | None = None) -> str | bytes:
    """Draw a run.

    Args:
        run: The run.
        format: ``svg`` or ``png``; ``html``: a self-contained page that replays the run; ``mermaid``: a sequence
            diagram.
        view: What SVG and PNG show. ``run``: states, events and bytes per second over time, proxies one below the
            other; ``sequence``: the messages of the first proxy. The page always shows the run, Mermaid the sequence.
        theme: For SVG and PNG, ``light`` or ``dark``. By default SVG follows the viewer's setting, and PNG is light.

    Returns:
        The picture, as bytes for PNG and else as text.

    Raises:
        DiagramError: The extra is missing.
        TimelineError: There is no such format or view, or the format does not support that view or a theme.
    """
    if view not in get_args(View):
        raise TimelineError(f"There is no view {view!r}; there are {', '.join(get_args(View))}.")
    if view == "sequence" and format == "html":
        raise TimelineError("The page has no sequence diagram: draw that as SVG, PNG or Mermaid.")
    if theme is not None and format in {"html", "mermaid"}:
        raise TimelineError("The page and the sequence diagram follow the viewer's setting: leave the theme out.")
    whole = sequence_scene if view == "sequence" else run_scene
    match format:
        case "svg":
            return scene.svg(whole(run), theme)
        case "png":
            return scene.png(whole(run), theme or "light")
        case "html":
            return page(run)
        case "mermaid":
            return sequence_mermaid(run)
    raise TimelineError(f"There is no format {format!r}; there are {', '.join(FORMATS)}.")
