"""The verbs, assembled into one app."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cyclopts import App, CycloptsError, Parameter

from proxy_fsm import EndReason, __version__
from proxy_fsm.cli.connect import connect
from proxy_fsm.cli.demo import demo
from proxy_fsm.cli.diagram import diagram
from proxy_fsm.cli.doctor import doctor
from proxy_fsm.cli.run import run
from proxy_fsm.cli.sessions import sessions
from proxy_fsm.cli.suspend import suspend
from proxy_fsm.cli.terminate import terminate
from proxy_fsm.cli.timeline import timeline
from proxy_fsm.cli.verb import ExitStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["execute", "make_app"]


def _exit_table() -> str:
    rows = [(status.value, status.meaning) for status in ExitStatus]
    rows += [(reason.cli_status, str(reason)) for reason in EndReason if not reason.clean]
    return "\n".join(["**Exit status**", "", *(f"- {number}: {meaning}" for number, meaning in rows)])


def make_app() -> App:
    """Return the app with all verbs and their options."""
    app = App(
        name="proxy-fsm",
        help="Bring remote-desktop sessions to the screen: an SSH tunnel, a proxy program, the exact status of both.",
        help_epilogue=_exit_table(),
        version=__version__,
        help_format="markdown",
        default_parameter=Parameter(negative=()),
        result_action="return_value",
        exit_on_error=False,
    )
    for verb in (demo, doctor, sessions, connect, suspend, terminate, run, diagram, timeline):
        app.command(verb)
    return app


def execute(arguments: Sequence[str]) -> int:
    """Run one verb; usage errors are printed on standard error.

    Returns:
        The exit status.
    """
    try:
        status = make_app()(list(arguments))
    except CycloptsError:
        return ExitStatus.USAGE
    return status if isinstance(status, int) else ExitStatus.CLEAN
