"""What the command line asks of an X2Go server: its commands, over the connection that stands already."""

from __future__ import annotations

import contextlib
import re
import shlex
import threading
import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import paramiko

from proxy_fsm import InvalidSession, ListedSession, SessionInfo, parse_agent_output, parse_session_list
from proxy_fsm.cli.verb import NotReachedError
from proxy_fsm.text import excerpt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from proxy_fsm.cli.interrupts import Interrupts
    from proxy_fsm.cli.output import Output

__all__ = ["Answer", "X2GoServer"]

_ANSWER_S = 30.0
#: x2goresume-session itself waits up to 45 s for a session that is being suspended; x2gostartagent runs dozens of
#: programs, and has taken 21 s on a busy machine.
_START_S = 60.0
_MAX_ANSWER_BYTES = 1 << 20
_NOT_FOUND = 127
_SESSION_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*-[0-9]+-[0-9]+_st[A-Za-z0-9_.-]+", re.ASCII)
#: An answer's line that has the new session's name.
_NAME_LINE = 3
#: Beyond its time, a command's thread gets this to tell how it went.
_GRACE_S = 1.0
_MAYBE_STARTED_HINT = "It may have started one all the same: see proxy-fsm sessions."


@dataclass(frozen=True)
class Answer:
    """What a command printed, and its exit status; the repr shows no output, since a cookie may be in it."""

    output: bytes
    errors: bytes
    exit_code: int

    def __repr__(self) -> str:
        return f"<answer, exit status {self.exit_code}>"

    @property
    def text(self) -> str:
        """Its standard output."""
        return self.output.decode("utf-8", "replace")

    @property
    def complaint(self) -> str:
        """The last line of its standard error that says something, fit to be shown."""
        return self.complaint_with("")

    def complaint_with(self, words: str) -> str:
        """The last line of its standard error that has these words in it, fit to be shown; empty where none has."""
        lines = [line.strip() for line in self.errors.decode("utf-8", "replace").splitlines()]
        line = next((line for line in reversed(lines) if line and words in line), "")
        return excerpt(line)


class X2GoServer:
    """The X2Go commands of a server; each word of theirs is quoted, each answer checked.

    Args:
        transport: Where they are run.
        output: Is told every cookie that comes, to hide it.
        interrupts: What may end the waiting, unless a command must be waited for.
    """

    def __init__(self, transport: paramiko.Transport, output: Output, interrupts: Interrupts) -> None:
        self.transport = transport
        self._output = output
        self._interrupts = interrupts

    def sessions(self, *, interruptible: bool = True) -> tuple[ListedSession, ...]:
        """Return the user's sessions, in the server's order.

        Raises:
            NotReachedError: The server cannot tell.
            Interrupted: A signal came meanwhile.
        """
        answer = self._run_checked(["x2golistsessions"], interruptible=interruptible)
        try:
            sessions = parse_session_list(answer.text)
        except InvalidSession as error:
            raise _failure("answer_unreadable", f"The server's list of sessions cannot be read: {error}") from error
        for session in sessions:
            self._hide(session.info)
        return sessions

    def session(self, name: str, *, interruptible: bool = True) -> ListedSession | None:
        """Return one session, None where the server does not list it."""
        return next((each for each in self.sessions(interruptible=interruptible) if each.info.name == name), None)

    def has_program(self, program: str) -> bool:
        """Tell whether the server finds a program."""
        return self._run(["sh", "-c", 'command -v "$1"', "sh", program]).exit_code == 0

    def start(self, arguments: Sequence[str]) -> SessionInfo:
        """Start an agent. A signal does not end the waiting: nobody would know what was started.

        Where the answer cannot be read, or the command says that it failed, the session that the answer names is
        terminated, since nobody could use it.

        Args:
            arguments: Those of ``x2gostartagent``.

        Raises:
            NotReachedError: There is no new session.
        """
        words = ["x2gostartagent", *arguments]
        answer = self._run(words, interruptible=False, timeout_s=_START_S, hint=_MAYBE_STARTED_HINT)
        said = f" It said: {answer.complaint}" if answer.complaint else ""
        hint = None
        try:
            # Where it refuses, such as for too many sessions, the words for it come on standard error alone.
            info = parse_agent_output(
                answer.text if answer.output.strip() else answer.errors.decode("utf-8", "replace")
            )
        except InvalidSession as error:
            if not answer.output.strip():
                detail = f"The server started no session: {error.problem}{said}"
            else:
                detail = f"What the server says of the new session cannot be read: {error.problem}{said}"
                hint = self._terminate_named_in(answer.text)
            raise _failure("not_started", detail, hint, exit_code=answer.exit_code) from error
        self._hide(info)
        if answer.exit_code != 0:
            detail = f"x2gostartagent ended with status {answer.exit_code} on the server.{said}"
            hint = self._terminate_named_in(answer.text)
            raise _failure("not_started", detail, hint, exit_code=answer.exit_code)
        return info

    def resume(self, arguments: Sequence[str]) -> str:
        """Resume a session and return what the server printed. A signal does not end the waiting.

        Args:
            arguments: Those of ``x2goresume-session``.

        Raises:
            NotReachedError: It was not resumed.
        """
        answer = self._run_checked(["x2goresume-session", *arguments], interruptible=False, timeout_s=_START_S)
        if complaint := answer.complaint_with("failed to resume"):  # and its exit status is 0
            raise _failure("not_resumed", f"The server did not resume the session: {complaint}")
        return answer.text

    def suspend(self, name: str) -> None:
        """Suspend a session; a signal does not end the waiting."""
        self._run_checked(["x2gosuspend-session", name], interruptible=False)

    def terminate(self, name: str) -> None:
        """End a session and all that runs in it; a signal does not end the waiting."""
        self._run_checked(["x2goterminate-session", name], interruptible=False)

    def run_command(self, session: ListedSession, command: str, kind: str) -> None:
        """Have a session run a program; a signal does not end the waiting.

        Args:
            session: The session.
            command: The program and its arguments.
            kind: D, R or P.
        """
        words = ["setsid", "x2goruncommand", str(session.info.display), str(session.agent_pid), session.info.name]
        words += [str(session.sound_port or -1), command.replace(" ", "X2GO_SPACE_CHAR"), "none", kind]
        # In sh, whatever the user's own shell is; and with nothing of this channel, which would wait for its end.
        self._run_checked(["sh", "-c", f"{shlex.join(words)} >/dev/null 2>&1 </dev/null &"], interruptible=False)

    def _terminate_named_in(self, text: str) -> str:
        """Terminate the session that an answer names; return what there is to know."""
        lines = text.strip().split("\n")
        name = lines[_NAME_LINE].strip() if len(lines) > _NAME_LINE else ""
        if not _SESSION_NAME.fullmatch(name):
            return _MAYBE_STARTED_HINT
        try:
            self.terminate(name)
        except NotReachedError:
            return f"The session {name} may have been started all the same: see proxy-fsm sessions."
        return f"The session {name}, which nobody could use, was terminated."

    def _hide(self, info: SessionInfo) -> None:
        if info.cookie is not None:
            self._output.redact.add(info.cookie)

    def _run_checked(self, words: Sequence[str], *, interruptible: bool = True, timeout_s: float = _ANSWER_S) -> Answer:
        """Run a command that must succeed."""
        answer = self._run(words, interruptible=interruptible, timeout_s=timeout_s)
        if answer.exit_code != 0:
            said = f": {answer.complaint}" if answer.complaint else "."
            detail = f"{words[0]} ended with status {answer.exit_code} on the server{said}"
            raise _failure("command_failed", detail, command=words[0], exit_code=answer.exit_code)
        return answer

    def _run(
        self,
        words: Sequence[str],
        *,
        interruptible: bool = True,
        timeout_s: float = _ANSWER_S,
        hint: str | None = None,
    ) -> Answer:
        """Run a command and wait for its end, on a thread of its own: a signal must not hit the middle of paramiko."""
        results: SimpleQueue[Answer | Exception] = SimpleQueue()
        opened: list[paramiko.Channel] = []

        def work() -> None:
            try:
                results.put(_exchange(self.transport, shlex.join(words), timeout_s, opened))
            except Exception as error:  # noqa: BLE001 - the main thread tells it
                results.put(error)

        threading.Thread(target=work, name="x2go-command", daemon=True).start()
        result: Answer | Exception
        try:
            with self._interrupts.waiting() if interruptible else contextlib.nullcontext():
                result = results.get(timeout=timeout_s + _GRACE_S)
        except Empty:  # paramiko waits without limit for the server's word that it runs the command
            result = TimeoutError()
            for channel in opened:
                with contextlib.suppress(paramiko.SSHException, OSError, EOFError):  # the connection has ended
                    channel.close()  # which ends the thread
        match result:
            case Answer(exit_code=code) if code == _NOT_FOUND and words[0].startswith("x2go"):
                raise _failure(
                    "x2goserver_missing",
                    f"The server has no {words[0]}, so it is no X2Go server.",
                    "Install the package x2goserver there, or connect to a server that has it.",
                    command=words[0],
                )
            case Answer():
                return result
            case TimeoutError():
                detail = f"{words[0]} did not end within {timeout_s:g} s on the server."
                raise _failure("no_answer", detail, hint, command=words[0]) from result
            case paramiko.SSHException() | OSError() | EOFError():
                detail = f"The connection did not carry {words[0]} to its end: {str(result) or type(result).__name__}"
                raise _failure("connection_lost", detail, hint, command=words[0]) from result
            case _:
                raise result


def _exchange(transport: paramiko.Transport, command: str, timeout_s: float, opened: list[paramiko.Channel]) -> Answer:
    deadline = time.monotonic() + timeout_s
    try:
        channel = transport.open_session(timeout=timeout_s)
    except paramiko.SSHException as error:
        if transport.is_active() and time.monotonic() >= deadline:  # paramiko has no exception of its own for it
            raise TimeoutError from error
        raise
    opened.append(channel)
    try:
        if time.monotonic() >= deadline:  # whoever gave up may not have seen this channel, to close it
            raise TimeoutError
        channel.settimeout(max(0.0, deadline - time.monotonic()))
        channel.exec_command(command)
        output = _read(channel, channel.recv, deadline)
        errors = _read(channel, channel.recv_stderr, deadline)
        if not channel.status_event.wait(max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        if channel.exit_status < 0 and not transport.is_active():
            raise EOFError("it has ended.")
        return Answer(output, errors, channel.exit_status)
    finally:
        channel.close()


def _read(channel: paramiko.Channel, receive: Callable[[int], bytes], deadline: float) -> bytes:
    received = bytearray()
    while True:
        channel.settimeout(max(0.0, deadline - time.monotonic()))
        piece = receive(1 << 16)
        if not piece:
            return bytes(received)
        received += piece
        if len(received) > _MAX_ANSWER_BYTES:
            raise OSError("the server sends more than anybody reads.")


def _failure(reason: str, detail: str, hint: str | None = None, **fields: object) -> NotReachedError:
    return NotReachedError("server.failed", detail, hint, reason=reason, **fields)
