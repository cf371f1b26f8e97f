"""``proxy-fsm connect``: start a session on an X2Go server, or resume one, and attach to it."""

from __future__ import annotations

import contextlib
import shlex
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from proxy_fsm import (
    BackendError,
    ListedSession,
    Proxy,
    ServerError,
    ServerReason,
    SessionInfo,
    SessionStatus,
    check_preflight,
)
from proxy_fsm import server as x2go
from proxy_fsm.cli.choosing import choose
from proxy_fsm.cli.connecting import SSHOptions, ssh_login
from proxy_fsm.cli.output import LogFormat, Output
from proxy_fsm.cli.run import AttachOptions, attach
from proxy_fsm.cli.sampling import sampled
from proxy_fsm.cli.session_verb import list_hint
from proxy_fsm.cli.verb import UsageError, is_interactive, run_verb, to_argv

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from proxy_fsm import Backend, Timeouts
    from proxy_fsm.cli.interrupts import Interrupts

__all__ = ["SessionOptions", "connect"]

_GROUP = Group("Session", sort_key=0)
#: A server still lists a session as running for a moment after its agent has disconnected.
_RELEASE_TIMEOUT_S = 5.0
_POLL_S = 0.2


@Parameter(name="*", group=_GROUP)
@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """Properties of the session.

    Attributes:
        kind: Kind of a new session: a desktop in a window, single windows (rootless), or single windows that stay when
            the program ends (published).
        geometry: Size of the desktop, such as 800x600, or ``fullscreen``, or ``maximize``.
        link: Speed of the connection.
        pack: Image compression, such as 16m-jpeg-9.
        keyboard: Keyboard layout, such as ``de`` or ``us(intl)``; by default this machine's.
        clipboard: Direction of the clipboard: both, from the client, from the server, or none.
    """

    kind: Literal["desktop", "rootless", "published"] = "desktop"
    geometry: str = "800x600"
    link: Literal["modem", "isdn", "adsl", "wan", "lan"] = "adsl"
    pack: str = "16m-jpeg-9"
    keyboard: str | None = None
    clipboard: Literal["both", "client", "server", "none"] = "both"

    def to_server(self) -> x2go.SessionOptions:
        """Return them as the server's commands take them.

        Raises:
            UsageError: A value cannot be used.
        """
        try:
            return x2go.SessionOptions(**vars(self))
        except ValueError as error:
            raise UsageError(str(error)) from error


def connect(
    host: str,
    /,
    *,
    session: Annotated[str | None, Parameter(group=_GROUP)] = None,
    command: Annotated[str | None, Parameter(group=_GROUP)] = None,
    take_over: Annotated[bool, Parameter(group=_GROUP)] = False,
    session_options: SessionOptions = SessionOptions(),
    attach_options: AttachOptions = AttachOptions(),  # noqa: B008 - it is frozen
    ssh_options: SSHOptions = SSHOptions(),  # noqa: B008 - it is frozen
    log_format: LogFormat = LogFormat.CONSOLE,
    verbose: Annotated[bool, Parameter(name=("--verbose", "-v"))] = False,
) -> int:
    """Start a session on an X2Go server, or resume one, and attach to it as ``run`` does.

    ``proxy-fsm connect me@server --command xterm`` starts a session, ``proxy-fsm connect me@server --session NAME``
    resumes one that ``proxy-fsm sessions me@server`` lists; with neither, at a terminal, it asks which. SIGINT and
    SIGTERM suspend it, and the last event says how to resume it. This machine is checked before anything is requested
    of the server (``proxy-fsm doctor`` gives details). A new session that is never shown is terminated, since it would
    be unusable; a resumed one that is not shown is suspended again.

    With ``--log-format json`` every line on standard output is one JSON object with ``event``, ``timestamp`` and
    ``level``; otherwise events go to standard error. The exit status is that of ``run``; it is also 3 if the server
    starts or resumes no session, and 2 if it does not list the requested one.

    Args:
        host: ``[USER@]HOST``; a host or an alias of ``~/.ssh/config``, whose ProxyJump is honoured.
        session: Resume this session.
        command: Start a new session that runs this program and ends with it: a program on the server with its
            arguments, which are split at blanks, without quoting, or one of x2goruncommand's names such as XFCE4,
            MATE or TERMINAL. Not with ``--backend kdrive``, since the new session is one for nxproxy.
        take_over: If the session is shown elsewhere, suspend it first.
        session_options: Properties of the session.
        attach_options: How to attach. The server is always asked how the session ended.
        ssh_options: How to reach the server.
        log_format: How events are written.
        verbose: Write debug events too, such as each line of the proxy program.
    """
    output = Output(log_format, verbose=verbose)

    def body(interrupts: Interrupts) -> int:
        offers = session is None and command is None and not output.is_json and is_interactive()
        if not offers:
            _check_choice(session, command, take_over=take_over)
        options = session_options.to_server()
        backend, timeouts = _x2go_backend(attach_options, command), attach_options.timeouts()
        with contextlib.ExitStack() as stack:
            preflight = stack.enter_context(contextlib.ExitStack())
            try:
                preflight.enter_context(check_preflight(backend, sessions_root=attach_options.sessions_root))
            except BackendError as error:
                hint = error.hint or error.reason.hint
                output.log.error("preflight.failed", reason=str(error.reason), detail=error.detail, hint=hint)  # noqa: TRY400
                return error.reason.cli_status
            transport = stack.enter_context(ssh_login(host, ssh_options, output, interrupts))
            attempt = _SessionAttempt(
                server=x2go.X2GoServer(transport),
                output=output,
                interrupts=interrupts,
                options=options,
                backend=backend,
                timeouts=timeouts,
                sessions_root=attach_options.sessions_root,
                resume_command=_resume_command(host, ssh_options, attach_options, session_options),
                on_shown=preflight.close,
            )
            if offers:
                return attempt.resume_chosen()
            if session is not None:
                return attempt.resume(session, take_over=take_over)
            assert command is not None  # noqa: S101 - one of them is set
            return attempt.start(command)

    return run_verb(output, body)


def _check_choice(session: str | None, command: str | None, *, take_over: bool) -> None:
    if (session is None) == (command is None):
        raise UsageError("Give either --command PROGRAM, for a new session, or --session NAME, to resume one.")
    if take_over and session is None:
        raise UsageError("--take-over is for --session NAME: a new session is shown nowhere else.")
    if session is not None:
        SessionInfo(name=session, graphics_port=1)  # raises if the name is invalid
    if command is None:
        return
    try:
        x2go.check_command(command)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _x2go_backend(options: AttachOptions, command: str | None) -> Backend:
    if options.backend == "command":
        raise UsageError("An X2Go session cannot be shown by a command.", "Leave --backend out, or see proxy-fsm run.")
    if options.backend == "kdrive" and command is not None:
        raise UsageError(
            "A new session is one for nxproxy, which --backend kdrive cannot show.",
            "Leave --backend out, or start the session elsewhere and resume it with --session NAME.",
        )
    return options.make_backend(())


def _resume_command(
    host: str, ssh_options: SSHOptions, attach_options: AttachOptions, session_options: SessionOptions
) -> list[str]:
    """Return the command that resumes a session with the same options; only the name at its end is missing."""
    words = [
        *to_argv(ssh_options),
        *to_argv(attach_options, without=frozenset({"ask_server"})),  # connect always asks
        *to_argv(session_options, without=frozenset({"kind"})),  # an existing session has one
    ]
    return ["proxy-fsm", "connect", host, *words, "--session"]


@dataclass(kw_only=True)
class _SessionAttempt:
    """One session on one server, from its start or resumption to its end.

    Attributes:
        resume_command: The command that resumes a session; the session's name is appended to it.
        on_shown: Called once the proxy is running.
    """

    server: x2go.X2GoServer
    output: Output
    interrupts: Interrupts
    options: x2go.SessionOptions
    backend: Backend
    timeouts: Timeouts
    sessions_root: Path | None
    resume_command: Sequence[str]
    on_shown: Callable[[], None]
    _shown: bool = field(default=False, init=False)
    #: How to clean up a session that was not shown.
    _undo: Callable[[SessionInfo], None] = field(init=False)

    def __post_init__(self) -> None:
        self._undo = self._report_status

    def start(self, command: str) -> int:
        """Start a session that runs a program; return the exit status."""
        info = self._redacted(self.server.start(self.options, command.split(maxsplit=1)[0]))
        self._undo = self._terminate
        with self._undo_unless_shown(info):
            self.output.log.info("session.started", kind=self.options.kind, display=info.display)

            def on_running() -> None:
                self.server.run(info, command, published=self.options.kind == "published")
                self.output.log.info("session.program_started", command=command)

            return self._show(info, on_running, resumed=False)

    def resume_chosen(self) -> int:
        """Ask which session to resume, and resume it; return the exit status."""
        with self.interrupts.waiting():
            name, take_over = choose(self._listed(), self.output.redact)
        return self.resume(name, take_over=take_over)

    def resume(self, name: str, *, take_over: bool) -> int:
        """Resume a session; return the exit status."""
        found = self._find(name, take_over=take_over)
        with self._undo_unless_shown(found.info):
            self._undo = self._suspend
            try:
                with self.interrupts.waiting():
                    info = self.server.resume(name, self.options, take_over=take_over)
            except ServerError as error:
                if error.reason in {ServerReason.SESSION_IN_USE, ServerReason.NO_SUCH_SESSION}:
                    self._undo = self._report_status  # it is not this program's to suspend
                raise
            if found.status is SessionStatus.RUNNING:
                self.output.log.info("session.taken_over", client=found.client)
            self.output.log.info("session.resumed", display=info.display)
            return self._show(info, lambda: None, resumed=True)

    def _redacted(self, info: SessionInfo) -> SessionInfo:
        """Return what the server said about a session, whose cookie is redacted from now on."""
        if info.cookie is not None:
            self.output.redact.add(info.cookie)
        return info

    def _listed(self) -> tuple[ListedSession, ...]:
        """Return the sessions that the server lists, with their cookies redacted from now on."""
        listed = self.server.sessions()
        for each in listed:
            self._redacted(each.info)
        return listed

    def _find(self, name: str, *, take_over: bool) -> ListedSession:
        """Return a session that can be resumed; it may have to be suspended first."""
        with self.interrupts.waiting():
            found = self.server.session(name)  # whatever the rows of others are like
            if found is None or found.status is SessionStatus.FINISHED:
                hint = list_hint(self._listed())
                raise UsageError(f"The server lists no session {name}, or it has ended.", hint)
        self._redacted(found.info)
        if found.status is SessionStatus.RUNNING and not take_over:
            raise UsageError(
                f"The session {name} is shown elsewhere, at {found.client or 'an unknown address'}.",
                "End it there, or with proxy-fsm suspend, or pass --take-over.",
            )
        return found

    def _show(self, info: SessionInfo, on_running: Callable[[], None], *, resumed: bool) -> int:
        """Attach, until the session ends or a signal comes."""
        self.interrupts.check()  # a signal may have come while the server was busy
        proxy = Proxy(
            info,
            self.server.transport,
            backend=self.backend,
            sessions_root=self.sessions_root,
            timeouts=self.timeouts,
            logger=self.output.log,
            ask_server=True,
            resumed=resumed,
        )

        def shown() -> None:
            self.on_shown()
            on_running()
            self._shown = True

        try:
            with sampled(proxy, self.output):
                return attach(proxy, self.interrupts, on_running=shown)
        finally:
            proxy.close()

    @contextlib.contextmanager
    def _undo_unless_shown(self, info: SessionInfo) -> Iterator[None]:
        """On the way out, clean up a session that was never shown, and report the session's status."""
        self.output.log = self.output.log.bind(session=info.name)
        try:
            yield
        finally:
            try:
                if self._shown:
                    self._report_status(info)
                else:
                    self._undo(info)
            except ServerError as error:
                self.output.log.warning(
                    "session.released",
                    status="unknown",
                    detail=f"The session's status on the server is unknown: {error.detail}",
                    hint=f"Run proxy-fsm sessions; if the session is suspended, resume it: {self._resume_line(info)}",
                )

    def _terminate(self, info: SessionInfo) -> None:
        self.server.terminate(info.name)
        detail = "The new session was never shown and would be unusable, so it was terminated."
        self.output.log.warning("session.released", status="terminated", detail=detail, hint=None)

    def _suspend(self, info: SessionInfo) -> None:
        self.server.suspend(info.name)
        detail = "The session was resumed but not shown, so it was suspended again."
        hint = f"Resume it: {self._resume_line(info)}"
        self.output.log.warning("session.released", status="suspended", detail=detail, hint=hint)

    def _report_status(self, info: SessionInfo) -> None:
        status = self._wait_released(info.name)
        again = self._resume_line(info)
        detail, hint = {
            SessionStatus.SUSPENDED: ("The session is suspended.", f"Resume it: {again}"),
            SessionStatus.RUNNING: (
                "The server still lists the session as running.",
                f"Resume it: {again} --take-over",
            ),
            SessionStatus.FINISHED: ("The session has ended.", None),
        }[status]
        self.output.log.info("session.released", status=str(status), detail=detail, hint=hint)

    def _wait_released(self, name: str) -> SessionStatus:
        """Wait, for a short while, until the server no longer has the session as running."""
        deadline = time.monotonic() + _RELEASE_TIMEOUT_S
        while (status := self.server.status(name)) is SessionStatus.RUNNING and time.monotonic() <= deadline:
            time.sleep(_POLL_S)  # the server sends no notification
        return SessionStatus.FINISHED if status is None else status

    def _resume_line(self, info: SessionInfo) -> str:
        return shlex.join([*self.resume_command, info.name])
