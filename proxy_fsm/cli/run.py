"""``proxy-fsm run``: attach to an existing session."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from proxy_fsm import Backend, CommandBackend, KDriveBackend, NX3Backend, Proxy, SessionInfo, State, Timeouts
from proxy_fsm.cli.connecting import SSHOptions, ssh_login
from proxy_fsm.cli.output import LogFormat, Output
from proxy_fsm.cli.sampling import sampled
from proxy_fsm.cli.verb import UsageError, run_verb

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy_fsm.cli.interrupts import Interrupts

__all__ = ["AttachOptions", "attach", "run"]

_COOKIE_LINE_BYTES = 4096
_STANDARD_INPUT = Path("-")
_SIGNAL_POLL_S = 1.0


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class AttachOptions:
    """How to attach to a session.

    Attributes:
        backend: What shows the session: nxproxy, x2gokdriveclient, or a command (any viewer), given after ``--``.
        sessions_root: Directory for the session's log; by default ``~/.x2go``.
        ready_timeout: Seconds from the proxy program's start until the session must be ready.
        ask_server: When it ends, ask the X2Go server whether the session was suspended or terminated.
    """

    backend: Literal["nx3", "kdrive", "command"] = "nx3"
    sessions_root: Path | None = None
    ready_timeout: float = 30.0
    ask_server: bool = False

    def make_backend(self, command: tuple[str, ...]) -> Backend:
        """Make the backend.

        Raises:
            UsageError: The command does not match the backend.
        """
        if self.backend != "command":
            if command:
                raise UsageError(f"A command is only for --backend command, but the backend is {self.backend}.")
            return KDriveBackend() if self.backend == "kdrive" else NX3Backend()
        try:
            return CommandBackend(command)
        except ValueError as error:
            raise UsageError(str(error), "Give the command after --, as in: -- vncviewer {host}::{port}") from error

    def timeouts(self) -> Timeouts:
        """Make the engine's timeouts.

        Raises:
            UsageError: The given one is out of range.
        """
        try:
            return Timeouts(ready_s=self.ready_timeout)
        except ValueError as error:
            raise UsageError("--ready-timeout must be a finite number of seconds above 0.") from error


def run(
    host: str,
    /,
    *command: Annotated[str, Parameter(name="COMMAND")],
    session: str,
    graphics_port: int,
    display: int | None = None,
    cookie_file: Annotated[Path | None, Parameter(allow_leading_hyphen=True)] = None,
    agent_host: str = "127.0.0.1",
    resumed: bool = False,
    attach_options: AttachOptions = AttachOptions(),
    ssh_options: SSHOptions = SSHOptions(),  # noqa: B008 - it is frozen
    log_format: LogFormat = LogFormat.CONSOLE,
    verbose: Annotated[bool, Parameter(name=("--verbose", "-v"))] = False,
) -> int:
    """Attach to an existing session until it ends; SIGINT and SIGTERM stop the proxy cleanly.

    For ``--backend command``, ``{host}`` and ``{port}`` in the command are replaced by the local end's address, or
    ``{path}`` by that of a unix socket: ``proxy-fsm run me@server --session desk --graphics-port 5901 --backend
    command -- vncviewer {host}::{port}``.

    With ``--log-format json`` every line on standard output is one JSON object with ``event``, ``timestamp`` and
    ``level``; otherwise events go to standard error. The exit status is 0 for a clean end, 2 for wrong usage, 3 if the
    server could not be reached, and from 10 up one for each reason (``proxy-fsm --help`` lists them).

    Args:
        host: ``[USER@]HOST``; a host or an alias of ``~/.ssh/config``, whose ProxyJump is honoured.
        command: The viewer, for ``--backend command``.
        session: The session's name.
        graphics_port: The port on which the agent listens.
        display: The session's display number on the server; nx3 and kdrive need it.
        cookie_file: A file whose first line is the session's cookie, ``-`` for standard input; nx3 and
            kdrive need it.
        agent_host: Where the agent listens, as seen from the server.
        resumed: The session was resumed: it survives a failed attempt, which is therefore retryable.
        attach_options: How to attach.
        ssh_options: How to reach the server.
        log_format: How events are written.
        verbose: Write debug events too, such as each line of the proxy program.
    """
    output = Output(log_format, verbose=verbose)

    def body(interrupts: Interrupts) -> int:
        backend, timeouts = attach_options.make_backend(command), attach_options.timeouts()
        info = SessionInfo(
            name=session,
            cookie=None if cookie_file is None else read_cookie(cookie_file, output, interrupts),
            graphics_port=graphics_port,
            display=display,
            agent_host=agent_host,
        )
        if info.cookie is not None:
            output.redact.add(info.cookie)
        backend.check_session(info)
        output.log = output.log.bind(session=info.name)
        with ssh_login(host, ssh_options, output, interrupts) as transport:
            proxy = Proxy(
                info,
                transport,
                backend=backend,
                sessions_root=attach_options.sessions_root,
                timeouts=timeouts,
                logger=output.log,
                ask_server=attach_options.ask_server,
                resumed=resumed,
            )
            with sampled(proxy, output):
                return attach(proxy, interrupts)

    return run_verb(output, body)


def attach(proxy: Proxy, interrupts: Interrupts, *, on_running: Callable[[], object] | None = None) -> int:
    """Start a proxy and wait until it ends; a signal stops it.

    Args:
        proxy: The proxy.
        interrupts: Receives the signals.
        on_running: Called once it is running; never if it ends before.

    Returns:
        The exit status of its reason.
    """
    proxy.start()
    interrupts.on_signal(proxy.stop)
    if on_running is not None and proxy.wait(State.RUNNING) is State.RUNNING:
        on_running()
    while not proxy.state.is_final:
        # A signal that comes just before a thread starts to wait does not wake it (CPython), so wait in steps.
        with suppress(TimeoutError):
            proxy.wait(timeout=_SIGNAL_POLL_S)
    proxy.wait()
    reason = proxy.status().reason
    assert reason is not None  # noqa: S101 - a final state has one
    return reason.cli_status


def read_cookie(path: Path, output: Output, interrupts: Interrupts) -> str:
    """Return the first line of a file, or of standard input.

    Raises:
        UsageError: It cannot be read, or its first line is empty.
    """
    info = None
    try:
        with interrupts.waiting():
            if path == _STANDARD_INPUT:
                line = sys.stdin.buffer.readline(_COOKIE_LINE_BYTES) if sys.stdin is not None else b""
            else:
                with path.open("rb") as file:
                    info, line = os.fstat(file.fileno()), file.readline(_COOKIE_LINE_BYTES)
    except OSError as error:
        raise UsageError(f"The cookie file {path} cannot be read: {error.strerror or error}.") from error
    cookie = line.decode("ascii", "replace").strip()
    if not cookie:
        raise UsageError(f"The cookie file {path} has an empty first line.")
    if info is not None and stat.S_ISREG(info.st_mode) and info.st_mode & (stat.S_IRGRP | stat.S_IROTH):
        output.log.warning(
            "cookie.exposed",
            path=str(path),
            mode=f"{stat.S_IMODE(info.st_mode):04o}",
            detail="Other users can read the cookie file, and so take over the session.",
            hint=f"chmod 600 {path}",
        )
    return cookie
