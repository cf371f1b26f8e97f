"""``proxy-fsm diagram``: draw a state machine."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path  # noqa: TC003 - the command line's parser reads the annotations
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from proxy_fsm import diagram as drawing
from proxy_fsm.cli.output import LogFormat, Output
from proxy_fsm.cli.verb import UsageError, run_verb, write_output

if TYPE_CHECKING:
    from proxy_fsm.cli.interrupts import Interrupts

__all__ = ["diagram"]


def diagram(
    target: str | None = None,
    /,
    *,
    format: Annotated[drawing.Format, Parameter(name=("--format", "-f"))] = "mermaid",
    highlight: str | None = None,
    theme: drawing.Theme | None = None,
    no_phases: bool = False,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    log_format: LogFormat = LogFormat.CONSOLE,
) -> int:
    """Draw the lifecycle, or a state machine of your own.

    Args:
        target: ``package.module:Class``: a subclass of Proxy, Lifecycle or Backend, or an object that holds a
            ``transitions.Machine`` or ``HierarchicalMachine``. It is imported, also from the working directory. By
            default the lifecycle.
        format: The output format; SVG and PNG need the extra ``diagram``.
        highlight: A state to highlight, or a phase of it: ``state/phase``.
        theme: By default SVG and Mermaid follow the viewer's theme; DOT and PNG are light.
        no_phases: Draw the states alone, without the phases inside them.
        output: The file to write; by default standard output.
        log_format: ``json`` writes events on standard output, and nothing else; ``--output`` is then required.
    """
    events = Output(log_format, console_level=logging.ERROR)

    def body(_interrupts: Interrupts) -> int:
        if output is None and (events.is_json or (format == "png" and sys.stdout.isatty())):
            raise UsageError("This picture cannot go to standard output: name a file with --output.")
        here = os.getcwd()  # noqa: PTH109 - a string, as sys.path wants it
        if here not in sys.path and "" not in sys.path:
            sys.path.insert(0, here)
        try:
            chart = drawing.LIFECYCLE if target is None else drawing.load(target)
            picture = drawing.draw(chart, format, highlight=highlight, theme=theme, phases=not no_phases)
        except drawing.DiagramError as error:
            raise UsageError(str(error)) from error
        return write_output(picture, output, events)

    return run_verb(events, body)
