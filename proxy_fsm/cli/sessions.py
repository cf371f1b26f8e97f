"""``proxy-fsm sessions``: list the sessions on an X2Go server."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxy_fsm import ListedSession, SessionStatus
from proxy_fsm.cli.connecting import SSHOptions, ssh_login
from proxy_fsm.cli.output import LogFormat, Output
from proxy_fsm.cli.verb import ExitStatus, run_verb
from proxy_fsm.cli.x2go_server import X2GoServer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy_fsm.cli.interrupts import Interrupts

__all__ = ["sessions"]

_RESUMABLE = {
    SessionStatus.RUNNING: "with --take-over",
    SessionStatus.SUSPENDED: "yes",
    SessionStatus.FINISHED: "no",
}
#: The table's width in a file or a pipe, so that no name is wrapped.
_UNWRAPPED_WIDTH = 1000


def sessions(
    host: str,
    /,
    *,
    ssh_options: SSHOptions = SSHOptions(),  # noqa: B008 - it is frozen
    log_format: LogFormat = LogFormat.CONSOLE,
) -> int:
    """List your sessions on an X2Go server, and which of them ``proxy-fsm connect HOST --session NAME`` can resume.

    Args:
        host: ``[USER@]HOST``; a host or an alias of ``~/.ssh/config``, whose ProxyJump is honoured.
        ssh_options: How to reach the server.
        log_format: ``console`` prints a table on standard output; ``json`` one event ``session.listed`` for each.
    """
    output = Output(log_format)

    def body(interrupts: Interrupts) -> int:
        with ssh_login(host, ssh_options, output, interrupts) as transport:
            listed = X2GoServer(transport, output, interrupts).sessions()
        if output.is_json:
            for session in listed:
                _log(output, session)
        else:
            _print(output, listed)
        return ExitStatus.CLEAN

    return run_verb(output, body)


def _log(output: Output, session: ListedSession) -> None:
    output.log.info(
        "session.listed",
        session=session.info.name,
        status=str(session.status),
        display=session.info.display,
        created=session.created,
        client=session.client,
        server=session.server,
        user=session.user,
        resumable=session.status is SessionStatus.SUSPENDED,
    )


def _print(output: Output, listed: Sequence[ListedSession]) -> None:
    console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else _UNWRAPPED_WIDTH)
    if not listed:
        console.print("There is no session.")
        return
    table = Table("session", "status", "display", "created", "client", "can be resumed")
    for session in listed:
        cells = (
            session.info.name,
            str(session.status),
            f":{session.info.display}",
            session.created,
            session.client,
            _RESUMABLE[session.status],
        )
        table.add_row(*(Text(output.redact(cell)) for cell in cells))
    console.print(table)
