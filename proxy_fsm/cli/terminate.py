"""``proxy-fsm terminate``: end a session of an X2Go server."""

from __future__ import annotations

from proxy_fsm.cli.connecting import SSHOptions
from proxy_fsm.cli.output import LogFormat
from proxy_fsm.cli.session_verb import on_session
from proxy_fsm.server import X2GoServer

__all__ = ["terminate"]


def terminate(
    host: str,
    /,
    *,
    session: str,
    ssh_options: SSHOptions = SSHOptions(),  # noqa: B008 - it is frozen
    log_format: LogFormat = LogFormat.CONSOLE,
) -> int:
    """End a session on an X2Go server, with all that runs in it.

    The exit status is 2 if the server has no such session, and 3 if it could not be ended.

    Args:
        host: ``[USER@]HOST``; a host or an alias of ``~/.ssh/config``, whose ProxyJump is honoured.
        session: Its name, as ``proxy-fsm sessions`` lists it.
        ssh_options: How to reach the server.
        log_format: How events are written.
    """
    return on_session(
        host, session, X2GoServer.terminate, done="terminated", ssh_options=ssh_options, log_format=log_format
    )
