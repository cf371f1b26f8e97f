"""``proxy-fsm sessions``: list the sessions on an X2Go server."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from proxy_fsm import ListedSession, SessionStatus
from proxy_fsm.cli.connecting import SSHOptions, ssh_login
from proxy_fsm.cli.output import LogFormat, Output
from proxy_fsm.cli.verb import ExitStatus, UsageError, run_verb
from proxy_fsm.server import X2GoServer

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
#: Wider than any table.
_ANY_WIDTH = 100_000


def sessions(
    host: str,
    /,
    *,
    format: Literal["table", "json"] = "table",
    ssh_options: SSHOptions = SSHOptions(),  # noqa: B008 - it is frozen
    log_format: LogFormat = LogFormat.CONSOLE,
) -> int:
    """List your sessions on an X2Go server, and which of them ``proxy-fsm connect HOST --session NAME`` can resume.

    Args:
        host: ``[USER@]HOST``; a host or an alias of ``~/.ssh/config``, whose ProxyJump is honoured.
        format: ``table`` prints a table on standard output, ``json`` one array of objects.
        ssh_options: How to reach the server.
        log_format: How events are written. With ``json`` there is no table, but one event ``session.listed`` for each.
    """
    output = Output(log_format)

    def body(interrupts: Interrupts) -> int:
        if output.is_json and format == "json":
            raise UsageError("--format json and --log-format json exclude each other: both write to standard output.")
        with ssh_login(host, ssh_options, output, interrupts) as transport, interrupts.waiting():
            listed = X2GoServer(transport).sessions()
        for session in listed:
            if session.info.cookie is not None:
                output.redact.add(session.info.cookie)
        if output.is_json:
            for session in listed:
                output.log.info("session.listed", **_fields(session))
        elif format == "json":
            print(output.redact(json.dumps([_fields(session) for session in listed], indent=2)))
        else:
            _print(output, listed)
        return ExitStatus.CLEAN

    return run_verb(output, body)


def _fields(session: ListedSession) -> dict[str, Any]:
    return {
        "session": session.info.name,
        "status": str(session.status),
        "display": session.info.display,
        "created": session.created,
        "client": session.client,
        "server": session.server,
        "user": session.user,
        "resumable": session.status is SessionStatus.SUSPENDED,
    }


def _print(output: Output, listed: Sequence[ListedSession]) -> None:
    """Print a table, or a paragraph for each session where the terminal is too narrow for it."""
    console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else _UNWRAPPED_WIDTH)
    if not listed:
        console.print("There is no session.")
        return
    titles = ("session", "status", "display", "created", "client", "can be resumed")
    rows = [_cells(output, session) for session in listed]
    table = Table(*titles)
    for cells in rows:
        table.add_row(*map(Text, cells))
    wanted = console.measure(table, options=console.options.update(max_width=_ANY_WIDTH)).maximum
    if wanted <= console.width:
        console.print(table)
        return
    for name, *others in rows:
        console.print(Text(name), soft_wrap=True)
        words = ", ".join(f"{title} {cell}" for title, cell in zip(titles[1:], others, strict=True) if cell)
        console.print(Padding(Text(words), (0, 0, 0, 2)))


def _cells(output: Output, session: ListedSession) -> list[str]:
    cells = (
        session.info.name,
        str(session.status),
        f":{session.info.display}",
        session.created,
        session.client,
        _RESUMABLE[session.status],
    )
    return [output.redact(cell) for cell in cells]
