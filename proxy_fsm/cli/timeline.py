"""``proxy-fsm timeline``: draw what happened in a run."""

from __future__ import annotations

import logging
from pathlib import Path  # noqa: TC003 - the command line's parser reads the annotations
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from proxy_fsm import timeline as drawing
from proxy_fsm.cli.output import LogFormat, Output
from proxy_fsm.cli.verb import UsageError, run_verb, write_output
from proxy_fsm.diagram import DiagramError, Theme

if TYPE_CHECKING:
    from proxy_fsm.cli.interrupts import Interrupts

__all__ = ["timeline"]

_FORMATS: dict[str, drawing.Format] = {".svg": "svg", ".png": "png", ".html": "html", ".mmd": "mermaid"}


def timeline(
    file: Path,
    /,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"))],
    sequence: Annotated[bool, Parameter(negative="")] = False,
    theme: Theme | None = None,
    log_format: LogFormat = LogFormat.CONSOLE,
) -> int:
    """Draw what happened in a run: states over time, events, throughput in both directions, and how it ended.

    Args:
        file: What ``run`` or ``demo`` wrote on standard output with ``--log-format json``, or a demo's events.jsonl.
            Several proxies in it are drawn one below the other.
        output: The picture's file; its suffix sets the format: ``.svg``, ``.png`` (needs the extra ``timeline``),
            ``.html``: a page that replays the run, or ``.mmd``: a sequence diagram in Mermaid's language.
        sequence: Draw the first proxy's sequence diagram instead: which party sent what to which; not for ``.html``.
        theme: For SVG and PNG; by default SVG follows the viewer's theme, and PNG is light.
        log_format: ``json`` writes events on standard output, and nothing else.
    """
    events = Output(log_format, console_level=logging.ERROR)

    def body(_interrupts: Interrupts) -> int:
        picture = _FORMATS.get(output.suffix.lower())
        if picture is None:
            raise UsageError(f"{output} ends in none of {', '.join(_FORMATS)}, which set the format.")
        if output.exists() and file.exists() and output.samefile(file):
            raise UsageError(f"{output} is the record itself and would be overwritten: name another file.")
        try:
            with file.open("rb") as lines:
                run = drawing.read(lines, str(file))
            drawn = drawing.draw(run, picture, view="sequence" if sequence else "run", theme=theme)
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from error
        except (drawing.TimelineError, DiagramError) as error:
            raise UsageError(str(error)) from error
        return write_output(drawn, output, events)

    return run_verb(events, body)
