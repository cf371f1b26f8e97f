"""What the verbs that do something with one session of a server share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy_fsm import ServerError, ServerReason
from proxy_fsm.cli.connecting import ssh_login
from proxy_fsm.cli.output import Output
from proxy_fsm.cli.verb import ExitStatus, UsageError, run_verb
from proxy_fsm.server import X2GoServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from proxy_fsm import ListedSession
    from proxy_fsm.cli.connecting import SSHOptions
    from proxy_fsm.cli.interrupts import Interrupts
    from proxy_fsm.cli.output import LogFormat

__all__ = ["list_hint", "on_session"]


def on_session(
    host: str,
    session: str,
    act: Callable[[X2GoServer, str], None],
    *,
    done: str,
    ssh_options: SSHOptions,
    log_format: LogFormat,
) -> int:
    """Do something with one session of a server, and return the exit status.

    Args:
        host: The server.
        session: The session's name.
        act: Does it.
        done: What the session is afterwards, for the event ``session.released``.
        ssh_options: How to reach the server.
        log_format: How events are written.
    """
    output = Output(log_format)

    def body(interrupts: Interrupts) -> int:
        with ssh_login(host, ssh_options, output, interrupts) as transport:
            server = X2GoServer(transport)
            try:
                with interrupts.waiting():
                    act(server, session)
            except ServerError as error:
                if error.reason is not ServerReason.NO_SUCH_SESSION:
                    raise
                raise UsageError(error.detail, list_hint(server.sessions())) from error
        output.log.info("session.released", session=session, status=done, detail=f"The session is {done}.", hint=None)
        return ExitStatus.CLEAN

    return run_verb(output, body)


def list_hint(listed: Iterable[ListedSession]) -> str:
    """Return a sentence that names the sessions that there are."""
    names = [f"{each.info.name} ({each.status})" for each in listed]
    return f"It lists: {', '.join(names)}." if names else "There is no session. Start one with proxy-fsm connect."
