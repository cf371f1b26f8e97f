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
#: The desktops and kinds of program that x2goruncommand itself looks up.
_GENERIC = frozenset(
    {
        *("GNOME", "UNITY", "unity", "CINNAMON", "cinnamon", "MATE", "KDE", "startkde", "XFCE4", "XFCE", "LXDE"),
        *("LXQt", "IceWM", "TRINITY", "OPENBOX", "ICEWM", "WWWBROWSER", "MAILCLIENT", "OFFICE", "TERMINAL"),
    }
)
_SUSPENDED_WITHIN_S = 45.0
#: A server lists a session as running for a moment after its agent has let go.
_SETTLED_WITHIN_S = 5.0
_PAUSE_S = 0.2


@Parameter(name="*", group=_GROUP)
@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """What a session is like.

    Attributes:
        kind: Of a new session: a desktop in a window, single windows (rootless), or single windows that stay when the
            program ends (published).
        geometry: Size of the desktop, such as 800x600, or ``fullscreen``.
        link: How fast the connection is.
        pack: How pictures are packed, such as 16m-jpeg-9.
        keyboard: Keyboard layout, such as ``de``; by default this machine's.
        clipboard: Which way the clipboard works: both, from the client, from the server, or not at all.
    """

    kind: Literal["desktop", "rootless", "published"] = "desktop"
    geometry: str = "800x600"
    link: Literal["modem", "isdn", "adsl", "wan", "lan"] = "adsl"
    pack: str = "16m-jpeg-9"
    keyboard: str | None = None
    clipboard: Literal["both", "client", "server", "none"] = "both"

    def check(self) -> None:
        """Refuse what a server would make nonsense of.

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
        """Return the arguments of x2gostartagent; the program is there only for the session's name."""
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
    to go on with it. What is needed on this machine is tried before the server is asked for anything (``proxy-fsm
    doctor`` tells more); a new session that is never shown is terminated, since nobody could use it, and one that was
    resumed and is not shown is suspended again.

    With ``--log-format json`` every line on standard output is one JSON object with ``event``, ``timestamp`` and
    ``level``; otherwise events go to standard error. The exit status is as that of ``run``: 3 also where the server
    starts or resumes no session, 2 where it does not list the one that is asked for.

    Args:
        host: ``[USER@]HOST``; a host or an alias of ``~/.ssh/config``, whose ProxyJump is honoured.
        session: Resume this session.
        command: Start a new session that runs this program, and ends with it: a program of the server's with its
            arguments, which are divided at blanks and know no quotes, or one of x2goruncommand's names such as XFCE4,
            MATE or TERMINAL. Not with ``--backend kdrive``, since the new session is one for nxproxy.
        take_over: Suspend the session first where it is shown elsewhere.
        session_options: What the session is like.
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
        with contextlib.ExitStack() as held:
            ready = held.enter_context(contextlib.ExitStack())
            try:
                ready.enter_context(check_preflight(backend, sessions_root=attach_options.sessions_root))
            except BackendError as error:
                hint = error.hint or error.reason.hint
                output.log.error("preflight.failed", reason=str(error.reason), detail=error.detail, hint=hint)  # noqa: TRY400
                return error.reason.cli_status
            transport = held.enter_context(ssh_login(host, ssh_options, output, interrupts))
            attempt = _SessionAttempt(
                server=X2GoServer(transport, output, interrupts),
                output=output,
                interrupts=interrupts,
                options=session_options,
                backend=backend,
                timeouts=timeouts,
                sessions_root=attach_options.sessions_root,
                resume_command=_resume_command(host, ssh_options, attach_options, session_options),
                on_shown=ready.close,
            )
            if session is not None:
                return attempt.resume(session, take_over=take_over)
            assert command is not None  # noqa: S101 - one of them is given
            return attempt.start(command)

    return run_verb(output, body)


def _check_choice(session: str | None, command: str | None, *, take_over: bool) -> None:
    if (session is None) == (command is None):
        raise UsageError("Give either --command PROGRAM, for a new session, or --session NAME, to resume one.")
    if take_over and session is None:
        raise UsageError("--take-over is for --session NAME: a new session is shown nowhere else.")
    if session is not None:
        SessionInfo(name=session, graphics_port=1)  # raises where no session can have this name
    if command is None:
        return
    if not command.isprintable() or not command.isascii() or len(command) > _MAX_COMMAND_CHARS:
        raise UsageError(f"--command must be printable ASCII, and at most {_MAX_COMMAND_CHARS} characters long.")
    if not command.split() or not _PROGRAM.fullmatch(command.split()[0]) or command.startswith("-"):
        raise UsageError("--command must begin with a program's name, out of letters, digits and _ . / + -.")


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
    """Return the command that resumes a session as this one is connected to, but for the session's name at its end."""
    words = [
        *to_argv(ssh_options),
        *to_argv(attach_options, without=frozenset({"ask_server"})),  # connect always asks
        *to_argv(session_options, without=frozenset({"kind"})),  # a session that is there has one
    ]
    return ["proxy-fsm", "connect", host, *words, "--session"]


@dataclass(kw_only=True)
class _SessionAttempt:
    """One session on one server, from its start or resumption to its end.

    Attributes:
        resume_command: The command that resumes a session, which the session's name is added to.
        on_shown: Called when the proxy runs.
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
    #: What is done about a session that was not shown.
    _undo: Callable[[SessionInfo], None] = field(init=False)

    def __post_init__(self) -> None:
        self._undo = self._tell

    def start(self, command: str) -> int:
        """Start a session that runs a program; returns the exit status."""
        program = command.split(maxsplit=1)[0]
        if program not in _GENERIC and not self.server.has_program(program):
            detail = f"The server has no program {program}, with which the new session would end at once."
            raise NotReachedError("server.failed", detail, "Install it there, or give another --command.")
        info = self.server.start(self.options.to_start(program))
        self._undo = self._terminate
        with self._undo_unless_shown(info):
            self.output.log.info("session.started", kind=self.options.kind, display=info.display)

            def once_running() -> None:
                listed = self.server.session(info.name, interruptible=False)
                if listed is None:
                    raise NotReachedError("server.failed", "The server does not list the session that it has started.")
                self.server.run_command(listed, " ".join(command.split()), self.options.letter)
                self.output.log.info("session.program_started", command=command)

            return self._show(info, once_running, resumed=False)

    def resume(self, name: str, *, take_over: bool) -> int:
        """Resume a session; returns the exit status."""
        found = self._find(name, take_over=take_over)
        with self._undo_unless_shown(found.info):
            info = self._ensure_suspended(found).info
            self._undo = self._suspend
            printed = self.server.resume(self.options.to_resume(name))
            try:
                info = parse_resume_output(printed, info)
            except InvalidSession as error:
                detail = f"What the server says of the resumed session cannot be read: {error}"
                raise NotReachedError("server.failed", detail, reason="answer_unreadable") from error
            self.output.log.info("session.resumed", display=info.display)
            return self._show(info, lambda: None, resumed=True)

    def _find(self, name: str, *, take_over: bool) -> ListedSession:
        """Return a session that can be resumed, though it may have to be suspended first."""
        listed = self.server.sessions()
        found = next((each for each in listed if each.info.name == name), None)
        if found is None or found.status is SessionStatus.FINISHED:
            raise UsageError(f"The server lists no session {name}, or it has ended.", _what_there_is(listed))
        if found.status is SessionStatus.RUNNING and not take_over:
            raise UsageError(
                f"The session {name} is shown elsewhere, at {found.client or 'an unknown address'}.",
                "End it there, or suspend it with x2gosuspend-session on the server, or pass --take-over.",
            )
        return found

    def _ensure_suspended(self, found: ListedSession) -> ListedSession:
        """Suspend a session that runs, and wait until it is."""
        if found.status is SessionStatus.SUSPENDED:
            return found
        name = found.info.name
        self.server.suspend(name)
        self.output.log.info("session.taken_over", client=found.client)

        now = self._poll(name, _SUSPENDED_WITHIN_S, interruptible=True)
        if now is None or now.status is SessionStatus.FINISHED:
            raise NotReachedError("server.failed", f"The session {name} has ended instead of being suspended.")
        if now.status is SessionStatus.RUNNING:
            detail = f"The session {name} was not suspended within {_SUSPENDED_WITHIN_S:g} s."
            raise NotReachedError("server.failed", detail, "Try again, or ask the server's administrator.")
        return now

    def _poll(self, name: str, within_s: float, *, interruptible: bool) -> ListedSession | None:
        """Ask for a session until the server does not list it as running, or the time is up; return what it lists."""
        deadline = time.monotonic() + within_s
        while True:
            found = self.server.session(name, interruptible=interruptible)
            if found is None or found.status is not SessionStatus.RUNNING or time.monotonic() > deadline:
                return found
            with self.interrupts.waiting() if interruptible else contextlib.nullcontext():
                time.sleep(_PAUSE_S)  # the server tells nobody: it must be asked

    def _show(self, info: SessionInfo, once_running: Callable[[], None], *, resumed: bool) -> int:
        """Attach, until the session ends or a signal comes."""
        self.interrupts.check()  # for one that came while the server was busy
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
            once_running()
            self._shown = True

        try:
            with sampled(proxy, self.output):
                return attach(proxy, self.interrupts, once_running=shown)
        finally:
            proxy.close()

    @contextlib.contextmanager
    def _undo_unless_shown(self, info: SessionInfo) -> Iterator[None]:
        """Whatever happens: leave no session behind that nobody has seen, and say what became of it."""
        self.output.log = self.output.log.bind(session=info.name)
        try:
            yield
        finally:
            try:
                if self._shown:
                    self._tell(info)
                else:
                    self._undo(info)
            except NotReachedError as error:
                self.output.log.warning(
                    "session.released",
                    status="unknown",
                    detail=f"The server could not be asked what became of the session: {error}",
                    hint=f"See proxy-fsm sessions; where it is suspended: {self._resuming(info)}",
                )

    def _terminate(self, info: SessionInfo) -> None:
        self.server.terminate(info.name)
        detail = "The new session was never shown, so nobody could use it: it was terminated."
        self.output.log.warning("session.released", status="terminated", detail=detail, hint=None)

    def _suspend(self, info: SessionInfo) -> None:
        self.server.suspend(info.name)
        detail = "The session was resumed and not shown: it was suspended again."
        hint = f"Go on with it: {self._resuming(info)}"
        self.output.log.warning("session.released", status="suspended", detail=detail, hint=hint)

    def _tell(self, info: SessionInfo) -> None:
        status = self._wait_settled(info.name)
        again = self._resuming(info)
        detail, hint = {
            SessionStatus.SUSPENDED: ("The session is suspended.", f"Go on with it: {again}"),
            SessionStatus.RUNNING: (
                "The server still lists the session as running.",
                f"Go on with it: {again} --take-over",
            ),
            SessionStatus.FINISHED: ("The session has ended.", None),
        }[status]
        self.output.log.info("session.released", status=str(status), detail=detail, hint=hint)

    def _wait_settled(self, name: str) -> SessionStatus:
        found = self._poll(name, _SETTLED_WITHIN_S, interruptible=False)
        return SessionStatus.FINISHED if found is None else found.status

    def _resuming(self, info: SessionInfo) -> str:
        return shlex.join([*self.resume_command, info.name])


def _what_there_is(listed: tuple[ListedSession, ...]) -> str:
    names = [f"{each.info.name} ({each.status})" for each in listed]
    return f"There is: {', '.join(names)}." if names else "There is no session. Start one with --command."
