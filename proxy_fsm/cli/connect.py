"""``proxy-fsm connect``: start a session on an X2Go server, or resume one, and attach to it."""

from __future__ import annotations

import contextlib
import re
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from proxy_fsm import (
    BackendError,
    InvalidSession,
    ListedSession,
    Proxy,
    SessionInfo,
    SessionStatus,
    check_preflight,
    parse_resume_output,
)
from proxy_fsm.cli.connecting import SSHOptions, ssh_login
from proxy_fsm.cli.output import LogFormat, Output
from proxy_fsm.cli.run import AttachOptions, attach
from proxy_fsm.cli.sampling import sampled
from proxy_fsm.cli.verb import NotReachedError, UsageError, run_verb, to_argv
from proxy_fsm.cli.x2go_server import X2GoServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from proxy_fsm import Backend, Timeouts
    from proxy_fsm.cli.interrupts import Interrupts

__all__ = ["SessionOptions", "connect"]

_GROUP = Group("Session", sort_key=0)
_KINDS = {"desktop": "D", "rootless": "R", "published": "P"}
_GEOMETRY = re.compile(r"[1-9][0-9]{1,4}x[1-9][0-9]{1,4}|fullscreen", re.ASCII)
_PACK = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)
_KEYBOARD = re.compile(r"[a-z]{2,16}", re.ASCII)
_PROGRAM = re.compile(r"[A-Za-z0-9_./+-]+", re.ASCII)
_MAX_COMMAND_CHARS = 1000
#: The desktops and kinds of program that x2goruncommand looks up itself.
_GENERIC = frozenset(
    {
        *("GNOME", "UNITY", "unity", "CINNAMON", "cinnamon", "MATE", "KDE", "startkde", "XFCE4", "XFCE", "LXDE"),
        *("LXQt", "IceWM", "TRINITY", "OPENBOX", "ICEWM", "WWWBROWSER", "MAILCLIENT", "OFFICE", "TERMINAL"),
    }
)
_SUSPEND_TIMEOUT_S = 45.0
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
        geometry: Size of the desktop, such as 800x600, or ``fullscreen``.
        link: Speed of the connection.
        pack: Image compression, such as 16m-jpeg-9.
        keyboard: Keyboard layout, such as ``de``; by default this machine's.
        clipboard: Direction of the clipboard: both, from the client, from the server, or none.
    """

    kind: Literal["desktop", "rootless", "published"] = "desktop"
    geometry: str = "800x600"
    link: Literal["modem", "isdn", "adsl", "wan", "lan"] = "adsl"
    pack: str = "16m-jpeg-9"
    keyboard: str | None = None
    clipboard: Literal["both", "client", "server", "none"] = "both"

    def check(self) -> None:
        """Reject values that a server would misread.

        Raises:
            UsageError: A value cannot be used.
        """
        if not _GEOMETRY.fullmatch(self.geometry):
            raise UsageError("--geometry must be a width and a height, such as 800x600, or fullscreen.")
        if not _PACK.fullmatch(self.pack):
            raise UsageError("--pack must be lower-case letters and digits with dashes between, such as 16m-jpeg-9.")
        if self.keyboard is not None and not _KEYBOARD.fullmatch(self.keyboard):
            raise UsageError("--keyboard must be a layout of lower-case letters, such as de.")

    @property
    def letter(self) -> str:
        """The server's letter for the kind."""
        return _KINDS[self.kind]

    def to_start(self, program: str) -> list[str]:
        """Return the arguments of x2gostartagent; the program only goes into the session's name."""
        picture = [self.geometry, self.link, self.pack, "unix-kde-depth_24"]
        return [*picture, *self._keyboard, self.letter, Path(program).name, self.clipboard]

    def to_resume(self, name: str) -> list[str]:
        """Return the arguments of x2goresume-session."""
        return [name, self.geometry, self.link, self.pack, *self._keyboard, self.clipboard]

    @property
    def _keyboard(self) -> list[str]:
        """Layout, model with layout, and whether to set it."""
        return ["us", "auto", "1"] if self.keyboard is None else [self.keyboard, f"pc105/{self.keyboard}", "1"]


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
    resumes one that ``proxy-fsm sessions me@server`` lists. SIGINT and SIGTERM suspend it, and the last event says how
    to resume it. This machine is checked before anything is requested of the server (``proxy-fsm doctor`` gives
    details). A new session that is never shown is terminated, since it would be unusable; a resumed one that is not
    shown is suspended again.

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
        _check_choice(session, command, take_over=take_over)
        session_options.check()
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
                server=X2GoServer(transport, output, interrupts),
                output=output,
                interrupts=interrupts,
                options=session_options,
                backend=backend,
                timeouts=timeouts,
                sessions_root=attach_options.sessions_root,
                resume_command=_resume_command(host, ssh_options, attach_options, session_options),
                on_shown=preflight.close,
            )
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
    if not command.isprintable() or not command.isascii() or len(command) > _MAX_COMMAND_CHARS:
        raise UsageError(f"--command must be printable ASCII, and at most {_MAX_COMMAND_CHARS} characters long.")
    if not command.split() or not _PROGRAM.fullmatch(command.split()[0]) or command.startswith("-"):
        raise UsageError("--command must begin with a program's name, made of letters, digits and _ . / + -.")


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

    server: X2GoServer
    output: Output
    interrupts: Interrupts
    options: SessionOptions
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
        program = command.split(maxsplit=1)[0]
        if program not in _GENERIC and not self.server.has_program(program):
            detail = f"The server has no program {program}, so the new session would end at once."
            raise NotReachedError("server.failed", detail, "Install it there, or give another --command.")
        info = self.server.start(self.options.to_start(program))
        self._undo = self._terminate
        with self._undo_unless_shown(info):
            self.output.log.info("session.started", kind=self.options.kind, display=info.display)

            def on_running() -> None:
                listed = self.server.session(info.name, interruptible=False)
                if listed is None:
                    raise NotReachedError("server.failed", "The server does not list the session that it started.")
                self.server.run_command(listed, " ".join(command.split()), self.options.letter)
                self.output.log.info("session.program_started", command=command)

            return self._show(info, on_running, resumed=False)

    def resume(self, name: str, *, take_over: bool) -> int:
        """Resume a session; return the exit status."""
        found = self._find(name, take_over=take_over)
        with self._undo_unless_shown(found.info):
            info = self._ensure_suspended(found).info
            self._undo = self._suspend
            printed = self.server.resume(self.options.to_resume(name))
            try:
                info = parse_resume_output(printed, info)
            except InvalidSession as error:
                detail = f"The server's answer about the resumed session cannot be read: {error}"
                raise NotReachedError("server.failed", detail, reason="answer_unreadable") from error
            self.output.log.info("session.resumed", display=info.display)
            return self._show(info, lambda: None, resumed=True)

    def _find(self, name: str, *, take_over: bool) -> ListedSession:
        """Return a session that can be resumed; it may have to be suspended first."""
        listed = self.server.sessions()
        found = next((each for each in listed if each.info.name == name), None)
        if found is None or found.status is SessionStatus.FINISHED:
            raise UsageError(f"The server lists no session {name}, or it has ended.", _list_hint(listed))
        if found.status is SessionStatus.RUNNING and not take_over:
            raise UsageError(
                f"The session {name} is shown elsewhere, at {found.client or 'an unknown address'}.",
                "End it there, or suspend it with x2gosuspend-session on the server, or pass --take-over.",
            )
        return found

    def _ensure_suspended(self, found: ListedSession) -> ListedSession:
        """Suspend a running session, and wait until it is suspended."""
        if found.status is SessionStatus.SUSPENDED:
            return found
        name = found.info.name
        self.server.suspend(name)
        self.output.log.info("session.taken_over", client=found.client)

        now = self._poll(name, _SUSPEND_TIMEOUT_S, interruptible=True)
        if now is None or now.status is SessionStatus.FINISHED:
            raise NotReachedError("server.failed", f"The session {name} has ended instead of being suspended.")
        if now.status is SessionStatus.RUNNING:
            detail = f"The session {name} was not suspended within {_SUSPEND_TIMEOUT_S:g} s."
            raise NotReachedError("server.failed", detail, "Try again, or ask the server's administrator.")
        return now

    def _poll(self, name: str, within_s: float, *, interruptible: bool) -> ListedSession | None:
        """Poll a session until the server no longer lists it as running, or the time is up; return its last entry."""
        deadline = time.monotonic() + within_s
        while True:
            found = self.server.session(name, interruptible=interruptible)
            if found is None or found.status is not SessionStatus.RUNNING or time.monotonic() > deadline:
                return found
            with self.interrupts.waiting() if interruptible else contextlib.nullcontext():
                time.sleep(_POLL_S)  # the server sends no notification

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
            except NotReachedError as error:
                self.output.log.warning(
                    "session.released",
                    status="unknown",
                    detail=f"The session's status on the server is unknown: {error}",
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
        found = self._poll(name, _RELEASE_TIMEOUT_S, interruptible=False)
        return SessionStatus.FINISHED if found is None else found.status

    def _resume_line(self, info: SessionInfo) -> str:
        return shlex.join([*self.resume_command, info.name])


def _list_hint(listed: tuple[ListedSession, ...]) -> str:
    names = [f"{each.info.name} ({each.status})" for each in listed]
    return f"It lists: {', '.join(names)}." if names else "There is no session. Start one with --command."
