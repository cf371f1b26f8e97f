"""An X2Go server's commands, run over the SSH connection that the client has.

::

    server = X2GoServer(client.get_transport())
    session = server.start(SessionOptions(geometry="1024x768"), "xterm")
    with Proxy(session, server.transport) as proxy:  # the session is on the screen, and empty
        server.run(session, "xterm")
        proxy.wait()

Each command is run by ``sh``, whatever the account's own shell is, between two lines with a random mark, on both
outputs. Only what is between them is read, so that nothing that a start-up file, a greeting or a site's script prints
can be taken for an answer. Standard error is never parsed: it is searched for the server's refusals, and quoted.

Source: the commands of x2goserver 4.1.0.3.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
from dataclasses import dataclass
from pathlib import PurePosixPath
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Concatenate, Literal, ParamSpec, TypeVar

import paramiko

from proxy_fsm.errors import InvalidSession, ServerError
from proxy_fsm.reasons import ServerReason
from proxy_fsm.session import (
    GENERATED_NAME,
    LIST_SCRIPT,
    STATUS_SCRIPT,
    ListedSession,
    SessionInfo,
    SessionStatus,
    parse_agent_output,
    parse_resume_output,
    parse_session_list,
    parse_status,
)
from proxy_fsm.ssh import (
    ChannelRefused,
    CommandCancelled,
    CommandFailed,
    CommandNotRun,
    FramedCommand,
    NotOpened,
    words,
)
from proxy_fsm.text import excerpt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from proxy_fsm.ssh import CompletedCommand

__all__ = ["ServerCapabilities", "SessionOptions", "X2GoServer"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_ANSWER_S = 30.0
#: x2goresume-session itself waits up to 45 s for a session that is being suspended; x2gostartagent runs dozens of
#: programs, and has taken 21 s on a busy machine.
_START_S = 60.0
_SUSPEND_S = 45.0
_POLL_S = 0.2
#: How long an abandoned start may take to name its session, before that is given up.
_LATE_S = 60.0
#: The exit statuses of a shell that does not find a program, or may not run it.
_NOT_RUN = frozenset({126, 127})
_QUOTED_CHARS = 300

_KINDS = {"desktop": "D", "rootless": "R", "published": "P"}
_GEOMETRY = re.compile(r"[1-9][0-9]{1,4}x[1-9][0-9]{1,4}|fullscreen|maximize", re.ASCII)
_PACK = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)
_KEYBOARD = re.compile(r"[a-z][a-z0-9_]{1,30}(\([a-z0-9_-]{1,30}\))?", re.ASCII)
_PROGRAM = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./+-]*", re.ASCII)
_MAX_COMMAND_CHARS = 1000
_KIND_IN_NAME = re.compile(r"-[0-9]+-[0-9]+_st([DRS])")  # a user may be called dev_stR
_ENDED_HINT = "The session {} was unusable, so it was ended."
_REFUSED_HINT = (
    "Try again when fewer commands run over this connection; if it stays so, ask the server's administrator whether the"
    " account may run commands."
)
_UNLISTED_HINT = (
    "Ask the server's administrator: x2golistsessions shows nothing to an account with a domain in its name."
)
_MAYBE_STARTED_HINT = "The server may have started one anyway: list the sessions."
#: The desktops and kinds of program that x2goruncommand looks up itself.
_GENERIC_PROGRAMS = frozenset(
    {
        *("GNOME", "UNITY", "unity", "CINNAMON", "cinnamon", "MATE", "KDE", "startkde", "XFCE4", "XFCE", "LXDE"),
        *("LXQt", "IceWM", "TRINITY", "OPENBOX", "ICEWM", "WWWBROWSER", "MAILCLIENT", "OFFICE", "TERMINAL"),
    }
)
#: A line of standard error that is worth quoting before others.
_INFORMATIVE = re.compile(
    r"\b(error|fail(ed|ure)?|denied|limit|unable|cannot|not (allowed|found|set))\b", re.IGNORECASE
)
#: The first match names the reason; a refusal begins its line.
_REFUSALS = (
    (
        re.compile(r"^LIMIT\b", re.MULTILINE),
        ServerReason.LIMIT_REACHED,
        "this account has as many sessions as are allowed",
    ),
    (re.compile(r"^ACCESS DENIED", re.MULTILINE), ServerReason.ACCESS_DENIED, "its owner does not share the desktop"),
)
#: What exit statuses of x2gostartagent mean.
_START_STATUS = {
    8: (ServerReason.ACCESS_DENIED, "its owner does not share the desktop"),
    9: (ServerReason.LIMIT_REACHED, "this account has as many sessions as are allowed"),
    10: (ServerReason.NO_RESOURCES, "it has no free display"),
    11: (ServerReason.NO_RESOURCES, "it has no free port"),
    12: (ServerReason.AGENT_FAILED, "its agent ended at once"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """Properties of a session, at its start or its resumption.

    Args:
        kind: A desktop in a window, single windows (rootless), or single windows that stay when the program ends
            (published).
        geometry: Size of the desktop in pixels, such as ``800x600``, or ``fullscreen``, or ``maximize``.
        link: Speed of the connection.
        pack: Image compression, such as ``16m-jpeg-9``.
        keyboard: Keyboard layout, with its variant if there is one, such as ``de`` or ``us(intl)``; None for that of
            the user's X server.
        clipboard: Its direction: both, from the client, from the server, or none.

    Raises:
        ValueError: A value that the server's commands would misread; the message names it.
    """

    kind: Literal["desktop", "rootless", "published"] = "desktop"
    geometry: str = "800x600"
    link: Literal["modem", "isdn", "adsl", "wan", "lan"] = "adsl"
    pack: str = "16m-jpeg-9"
    keyboard: str | None = None
    clipboard: Literal["both", "client", "server", "none"] = "both"

    def __post_init__(self) -> None:
        _check_choice("kind", self.kind, tuple(_KINDS))
        if not _GEOMETRY.fullmatch(self.geometry):
            raise ValueError("The geometry must be a width and a height, such as 800x600, fullscreen or maximize.")
        _check_choice("link", self.link, ("modem", "isdn", "adsl", "wan", "lan"))
        if not _PACK.fullmatch(self.pack):
            raise ValueError("The pack must be lower-case letters and digits with dashes between, such as 16m-jpeg-9.")
        if self.keyboard is not None and not _KEYBOARD.fullmatch(self.keyboard):
            raise ValueError("The keyboard must be a layout, such as de, or one with its variant, such as us(intl).")
        _check_choice("clipboard", self.clipboard, ("both", "client", "server", "none"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCapabilities:
    """What an X2Go server is and can.

    Args:
        versions: The version of each of its components, such as ``x2goserver`` and ``x2goserver-x2goagent``.
        features: The names of its features, such as ``X2GO_PUBLISHED_APPLICATIONS``.
    """

    versions: dict[str, str]
    features: frozenset[str]


def _cancellable(
    method: Callable[Concatenate[X2GoServer, _P], _T],
) -> Callable[Concatenate[X2GoServer, _P], _T]:
    """Have `cancel` end a method of several commands between two of them too."""

    @functools.wraps(method)
    def call(self: X2GoServer, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with self._operation():
            return method(self, *args, **kwargs)

    return call


class X2GoServer:
    """The commands of an X2Go server for the account that the transport is logged in to.

    Making one does nothing. Every method may be called on any thread, several at a time; each waits for its answer,
    30 s at most (60 s where it starts or resumes a session, 75 s where it suspends one), and then raises `ServerError`.
    `cancel` ends all that wait.

    Args:
        transport: An authenticated transport, which is not closed.

    Raises:
        TypeError: It is no transport: None is what ``SSHClient.get_transport`` returns before ``connect``.
    """

    def __init__(self, transport: paramiko.Transport) -> None:
        if not isinstance(transport, paramiko.Transport):
            raise TypeError(f"transport must be a Transport, not {type(transport).__name__}.")
        self.transport = transport
        self._changed = threading.Condition()
        self._cancellations = 0
        self._begun = threading.local()
        self._calls: set[_Call] = set()

    def cancel(self) -> None:
        """End every call in progress with `ServerError` (``cancelled``); later calls are not affected.

        A session that a cancelled `start` has begun is ended as soon as the server names it.
        """
        with self._changed:
            self._cancellations += 1
            self._changed.notify_all()
            calls = tuple(self._calls)
        for call in calls:
            call.cancel()

    def sessions(self) -> tuple[ListedSession, ...]:
        """Return the sessions that the server lists for the account, in its order, finished ones included.

        Raises:
            ServerError: The server does not list them.
        """
        return self._list(None)

    def session(self, name: str) -> ListedSession | None:
        """Return one session, or None if the server does not list it, which does not mean that it has ended.

        x2golistsessions shows an account its own sessions alone, and none to an account with a domain in its name.

        Raises:
            ServerError: The server does not list sessions.
        """
        return next(iter(self._list(_checked_name(name))), None)

    @_cancellable
    def status(self, name: str) -> SessionStatus | None:
        """Return a session's status as the server lists it, or else as its database has it; None if neither has it.

        The database has it for an account with a domain in its name too.

        Raises:
            ServerError: The server does not report it.
        """
        found = self.session(name)
        if found is not None:
            return found.status
        return parse_status(self._checked_answer("x2gogetstatus", f"{STATUS_SCRIPT} {name}").output)

    @_cancellable
    def start(self, options: SessionOptions, program: str) -> SessionInfo:
        """Start a session; its agent then waits, once, for a proxy.

        Nothing runs in it until `run` is called. A session whose answer cannot be read, or comes too late, is ended.

        Args:
            options: Its properties.
            program: What will be run in it: the name of the session contains it, and the server must have it. A name
                or a path, or one of x2goruncommand's own names, such as XFCE4, MATE or TERMINAL.

        Raises:
            ValueError: The program is not a name or a path of ASCII letters, digits and ``_ . / + -``.
            ServerError: There is no new session.
        """
        if not _PROGRAM.fullmatch(program) or not PurePosixPath(program).name.strip("."):
            raise ValueError("The program must be a name or a path, of ASCII letters, digits and _ . / + -.")
        self._require_program(program)
        script = _command("x2gostartagent", *_start_arguments(options, program))
        answer = self._answer("x2gostartagent", script, _START_S, hint=_MAYBE_STARTED_HINT, on_late=self._end_late)
        if answer.exit_status != 0:
            raise _start_refused(answer, self._end_named_in(answer))
        try:
            return parse_agent_output(answer.output)
        except InvalidSession as error:
            if answer.refusal is not None:
                raise _start_refused(answer) from error
            detail = f"The server's answer about the new session cannot be read: {error.problem}{answer.said}"
            raise ServerError(
                ServerReason.UNREADABLE_ANSWER, detail, self._end_named_in(answer), exit_status=0
            ) from error

    def run(self, session: SessionInfo, command: str, *, published: bool = False) -> None:
        """Run a program in a session that is on the screen, and return at once; the session ends with the program.

        Args:
            session: What `start` returned, or the ``info`` of a listed session.
            command: The program and its arguments, at most 1000 printable ASCII characters. The server splits it at
                blanks, without quoting, and expands wildcards.
            published: Whether the session is one of single windows that stays when the program ends: nothing that the
                server lists distinguishes it from one that does not.

        Raises:
            ValueError: The command, or the session's display or ``agent_pid``, is missing or invalid.
            ServerError: The server did not run it. Whether the program itself starts is seen in the session alone.
        """
        check_command(command)
        if session.display is None or session.agent_pid is None:
            raise ValueError("The session's display and agent_pid are needed; start() and sessions() give them.")
        found = _KIND_IN_NAME.search(session.name)
        kind = _KINDS["published"] if published else "D" if found is None else found[1]
        arguments = [str(session.display), str(session.agent_pid), session.name, str(session.sound_port or -1)]
        arguments += ["X2GO_SPACE_CHAR".join(command.split()), "none", kind]
        # Detached from the channel, which would stay open until it ends.
        script = f"setsid {words(['x2goruncommand', *arguments])} >/dev/null 2>&1 </dev/null &"
        self._checked_answer("x2goruncommand", script)

    @_cancellable
    def resume(self, name: str, options: SessionOptions, *, take_over: bool = False) -> SessionInfo:
        """Resume a suspended session; its agent then waits for a proxy, as a rule on another port than before.

        Args:
            name: Its name.
            options: Its properties from now on; the kind is ignored.
            take_over: Whether to suspend it first where it is shown elsewhere, and to resume it here.

        Raises:
            ServerError: It was not resumed: it is not listed, has ended, or is shown elsewhere, among others.
        """
        found = self.session(name)
        if found is None:
            raise _not_listed(name, self.status(name))
        if found.status is SessionStatus.FINISHED:
            raise _no_such_session(name, found.status)
        if found.status is SessionStatus.RUNNING and not take_over:
            detail = f"The session {name} is shown elsewhere, at {found.client or 'an unknown address'}."
            raise ServerError(ServerReason.SESSION_IN_USE, detail)
        # x2goresume-session itself suspends a running one first; the client that loses it can see that program.
        script = _command("x2goresume-session", *_resume_arguments(options, name))
        answer = self._checked_answer("x2goresume-session", script, _START_S)
        if "failed to resume" in answer.errors:  # with exit status 0
            raise ServerError(ServerReason.COMMAND_FAILED, f"The server did not resume the session.{answer.said}")
        try:
            return parse_resume_output(answer.output, found.info)
        except InvalidSession as error:
            detail = f"The server's answer about the resumed session cannot be read: {error.problem}{answer.said}"
            raise ServerError(ServerReason.UNREADABLE_ANSWER, detail) from error

    @_cancellable
    def suspend(self, name: str) -> None:
        """Suspend a session, and wait until the server has it as suspended; it may be suspended already.

        Raises:
            ServerError: The server has no such session, or it has ended, or it was not suspended within 45 s.
        """
        self._checked_answer("x2gosuspend-session", _command("x2gosuspend-session", _checked_name(name)))
        deadline = time.monotonic() + _SUSPEND_S
        while (status := self.status(name)) is SessionStatus.RUNNING:
            if time.monotonic() > deadline:
                detail = f"The session {name} was not suspended within {_SUSPEND_S:g} s."
                raise ServerError(ServerReason.NO_ANSWER, detail)
            self._pause()
        if status is not SessionStatus.SUSPENDED:
            raise _no_such_session(name, status)

    @_cancellable
    def terminate(self, name: str) -> None:
        """End a session, and all that runs in it; one that has ended already is no error.

        Raises:
            ServerError: The server has no such session, or could not end it.
        """
        status = self.status(name)
        if status is None:
            raise _no_such_session(name, status)
        if status is not SessionStatus.FINISHED:
            self._terminate(name)

    @_cancellable
    def capabilities(self) -> ServerCapabilities:
        """Return the server's versions and features.

        Raises:
            ServerError: It does not report them.
        """
        versions = self._checked_answer("x2goversion", "x2goversion").output.splitlines()
        features = self._checked_answer("x2gofeaturelist", "x2gofeaturelist").output.splitlines()
        pairs = (line.partition(":") for line in versions)
        return ServerCapabilities(
            versions={excerpt(name.strip()): excerpt(version.strip()) for name, colon, version in pairs if colon},
            features=frozenset(excerpt(line.strip()) for line in features if line.strip()),
        )

    # ---- one command ----

    def _list(self, name: str | None) -> tuple[ListedSession, ...]:
        answer = self._checked_answer("x2golistsessions", LIST_SCRIPT)
        try:
            return parse_session_list(answer.output, name=name)
        except InvalidSession as error:
            detail = f"The server's list of sessions cannot be read: {error.problem}{answer.said}"
            raise ServerError(ServerReason.UNREADABLE_ANSWER, detail) from error

    def _require_program(self, program: str) -> None:
        """Make sure that the server finds a program, or that x2goruncommand looks it up itself."""
        script = f"command -v {words([program])} >/dev/null"
        if program not in _GENERIC_PROGRAMS and self._answer("command", script, _ANSWER_S).exit_status != 0:
            detail = f"The server has no program {program}, so the new session would end at once."
            raise ServerError(ServerReason.PROGRAM_NOT_FOUND, detail)

    def _terminate(self, name: str) -> None:
        self._checked_answer("x2goterminate-session", _command("x2goterminate-session", name))

    def _end_named_in(self, answer: _Answer) -> str | None:
        """End the session that x2gostartagent named, if any; return a hint about the outcome."""
        names = {line for line in map(str.strip, answer.output.splitlines()) if GENERATED_NAME.fullmatch(line)}
        if not names:
            return None if answer.exit_status else _MAYBE_STARTED_HINT
        try:
            for name in names:
                self._terminate(name)
        except ServerError:
            return f"The session {', '.join(sorted(names))} may have been started anyway: list the sessions."
        return _ENDED_HINT.format(", ".join(sorted(names)))

    def _end_late(self, answer: _Answer) -> None:
        """End the session of an abandoned start; `cancel` does not cancel this."""
        X2GoServer(self.transport)._end_named_in(answer)  # noqa: SLF001 - its calls are not among this one's

    def _checked_answer(self, command: str, script: str, timeout_s: float | None = None) -> _Answer:
        """Run a command that must succeed."""
        answer = self._answer(command, script, _ANSWER_S if timeout_s is None else timeout_s)
        if answer.exit_status != 0:
            detail = f"{command} exited with status {answer.exit_status} on the server.{answer.said}"
            raise ServerError(ServerReason.COMMAND_FAILED, detail, exit_status=answer.exit_status)
        return answer

    def _answer(
        self,
        command: str,
        script: str,
        timeout_s: float,
        *,
        hint: str | None = None,
        on_late: Callable[[_Answer], None] | None = None,
    ) -> _Answer:
        """Run a command and wait for its answer.

        Args:
            command: Its name, for messages.
            script: What `sh` runs.
            timeout_s: How long to wait.
            hint: What to do where it may have had an effect though there is no answer.
            on_late: Called, on another thread, with an answer that comes after the wait has ended.
        """
        call = _Call(FramedCommand(self.transport, script), on_late)
        with self._changed:
            if self._is_cancelled():
                raise ServerError(ServerReason.CANCELLED, f"{command} was cancelled before it began.")
            self._calls.add(call)
        try:
            call.start()
            answer = call.result(timeout_s)
        except TimeoutError:
            detail = f"{command} did not end within {timeout_s:g} s on the server."
            raise ServerError(ServerReason.NO_ANSWER, detail, hint) from None
        except CommandCancelled:
            raise ServerError(ServerReason.CANCELLED, f"{command} was cancelled.", hint) from None
        except ChannelRefused as error:
            detail = f"The server opens no channel for {command}: {str(error).removesuffix('.')}."
            raise ServerError(ServerReason.NO_COMMANDS, detail, _REFUSED_HINT) from error
        except NotOpened as error:
            detail = f"{command} could not be completed: {str(error).removesuffix('.')}."
            raise ServerError(ServerReason.CONNECTION_LOST, detail, hint) from error
        except CommandNotRun as error:
            raise ServerError(ServerReason.NO_COMMANDS, str(error)) from error
        except CommandFailed as error:
            detail = f"{command} could not be completed: {error}"
            raise ServerError(ServerReason.UNREADABLE_ANSWER, detail, hint) from error
        finally:
            call.release()  # whatever ended the wait: a signal's exception, too
            with self._changed:
                self._calls.discard(call)
        if answer.exit_status in _NOT_RUN and command.startswith("x2go"):
            detail = f"The server has no {command}, so it is not an X2Go server.{answer.said}"
            raise ServerError(ServerReason.NOT_X2GO, detail, exit_status=answer.exit_status)
        return answer

    def _pause(self) -> None:
        """Wait before the next try, since the server sends no notification.

        Raises:
            ServerError: `cancel` was called.
        """
        with self._changed:
            if self._changed.wait_for(self._is_cancelled, _POLL_S):
                raise ServerError(ServerReason.CANCELLED, "The wait for the server was cancelled.")

    @contextlib.contextmanager
    def _operation(self) -> Iterator[None]:
        """Have `cancel` end whatever this thread begins within; the outermost block counts."""
        if hasattr(self._begun, "cancellations"):
            yield
            return
        self._begun.cancellations = self._cancellations
        try:
            yield
        finally:
            del self._begun.cancellations

    def _is_cancelled(self) -> bool:
        """Return whether `cancel` was called since this thread's operation began."""
        return bool(getattr(self._begun, "cancellations", self._cancellations) != self._cancellations)


@dataclass(frozen=True, slots=True, repr=False)
class _Answer:
    """What a framed command printed between its marks, and its exit status; no repr, since it may hold a cookie."""

    output: str
    errors: str
    exit_status: int

    @property
    def said(self) -> str:
        """A sentence that quotes the most informative line of its standard error; empty if there is none."""
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        informative = [line for line in lines if _INFORMATIVE.search(line)] or lines
        return f' It said: "{excerpt(informative[-1], _QUOTED_CHARS)}".' if informative else ""

    @property
    def refusal(self) -> tuple[ServerReason, str] | None:
        """The refusal on its standard error, if there is one."""
        return next(((reason, why) for pattern, reason, why in _REFUSALS if pattern.search(self.errors)), None)

    @classmethod
    def of(cls, completed: CompletedCommand) -> _Answer:
        """Decode what a command printed."""
        output, errors = (each.decode("utf-8", "replace") for each in (completed.output, completed.errors))
        return cls(output, errors, completed.exit_status)


class _Call:
    """One command on a thread of its own, so that the wait for it has a time limit, and can be interrupted.

    Args:
        command: The command.
        on_late: Called with an answer that `result` has not returned before `release`; without it `cancel` cancels the
            command at once.
    """

    def __init__(self, command: FramedCommand, on_late: Callable[[_Answer], None] | None) -> None:
        self._command = command
        self._on_late = on_late
        self._lock = threading.Lock()
        self._cancelled = self._completed = self._delivered = False
        self._released = threading.Event()
        self._results: SimpleQueue[_Answer | Exception] = SimpleQueue()

    def start(self) -> None:
        """Run it.

        Raises:
            ServerError: No thread can be started.
        """
        try:
            threading.Thread(target=self._run, name="proxy_fsm-command", daemon=True).start()
        except RuntimeError as error:
            self._completed = True
            detail = "The command was not run, since no thread can be started on this machine."
            raise ServerError(ServerReason.NO_RESOURCES, detail, "Try again when fewer threads are running.") from error

    def result(self, timeout_s: float) -> _Answer:
        """Wait for the answer; raises what `FramedCommand.run` raises, and `TimeoutError`."""
        try:
            result = self._results.get(timeout=timeout_s)
        except Empty:
            raise TimeoutError from None
        if isinstance(result, Exception):
            raise result
        self._delivered = True
        return result

    def release(self) -> None:
        """End the wait: an answer that `result` has not returned is late."""
        self.cancel()
        self._released.set()

    def cancel(self) -> None:
        """Have `result` raise `CommandCancelled`, unless it has an answer."""
        with self._lock:
            if self._completed or self._cancelled:
                return
            self._cancelled = True
        self._results.put(CommandCancelled("The command was cancelled."))
        if self._on_late is None:
            self._command.cancel()
            return
        timer = threading.Timer(_LATE_S, self._command.cancel)
        timer.daemon = True
        with contextlib.suppress(RuntimeError):  # no thread can be started: the command ends with the transport
            timer.start()

    def _run(self) -> None:
        result: _Answer | Exception
        try:
            result = _Answer.of(self._command.run())
        except Exception as error:  # noqa: BLE001 - raised where the result is waited for
            result = error
        with self._lock:
            self._completed = True
        self._results.put(result)
        if self._on_late is not None and isinstance(result, _Answer):
            self._released.wait()
            if not self._delivered:
                self._on_late(result)


def _command(*texts: str) -> str:
    """Return the script that runs one command, in a locale that every server has.

    Where the account's own locale is missing, as when a client passes on that of its machine, Perl's warnings get into
    what the server's scripts read from each other, and x2gostartagent finds no free display.
    """
    return f"LC_ALL=C {words(texts)}"


def _start_arguments(options: SessionOptions, program: str) -> list[str]:
    """Return the arguments of x2gostartagent; the program only goes into the session's name."""
    picture = [options.geometry, options.link, options.pack, "unix-kde-depth_24"]
    kind, name = _KINDS[options.kind], PurePosixPath(program).name
    return [*picture, *_keyboard_arguments(options), kind, name, options.clipboard]


def _resume_arguments(options: SessionOptions, name: str) -> list[str]:
    """Return the arguments of x2goresume-session."""
    return [name, options.geometry, options.link, options.pack, *_keyboard_arguments(options), options.clipboard]


def _keyboard_arguments(options: SessionOptions) -> list[str]:
    """Return layout, model with layout, and whether to set it."""
    return ["us", "auto", "1"] if options.keyboard is None else [options.keyboard, f"pc105/{options.keyboard}", "1"]


def check_command(command: str) -> None:
    """Make sure that a program can be run in a session.

    Raises:
        ValueError: It cannot; the message says why.
    """
    if not command.isprintable() or not command.isascii() or len(command) > _MAX_COMMAND_CHARS:
        raise ValueError(f"The command must be printable ASCII, and at most {_MAX_COMMAND_CHARS} characters long.")
    if not command.split() or not _PROGRAM.fullmatch(command.split(maxsplit=1)[0]):
        raise ValueError("The command must begin with a program: a name or a path, of letters, digits and _ . / + -.")


def _check_choice(title: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"The {title} must be one of {', '.join(choices)}.")


def _checked_name(name: str) -> str:
    """Return a session's name.

    Raises:
        InvalidSession: It cannot be one.
    """
    return SessionInfo(name=name, graphics_port=1).name


def _no_such_session(name: str, status: SessionStatus | None) -> ServerError:
    detail = (
        f"The server has no session {name} for this account." if status is None else f"The session {name} has ended."
    )
    return ServerError(ServerReason.NO_SUCH_SESSION, detail)


def _not_listed(name: str, status: SessionStatus | None) -> ServerError:
    """Return the error for a session that cannot be resumed, since the list alone has what a proxy needs."""
    if status is None or status is SessionStatus.FINISHED:
        return _no_such_session(name, status)
    detail = f"The session {name} is {status}, but the server does not list it for this account."
    return ServerError(ServerReason.NO_SUCH_SESSION, detail, _UNLISTED_HINT)


def _start_refused(answer: _Answer, hint: str | None = None) -> ServerError:
    """Return the error for a session that the server did not start."""
    refusal = answer.refusal or _START_STATUS.get(answer.exit_status)
    if refusal is not None:
        reason, why = refusal
        detail = f"The server started no session: {why}.{answer.said}"
    else:
        reason = ServerReason.COMMAND_FAILED
        detail = f"x2gostartagent exited with status {answer.exit_status} on the server.{answer.said}"
    return ServerError(reason, detail, hint, exit_status=answer.exit_status)
