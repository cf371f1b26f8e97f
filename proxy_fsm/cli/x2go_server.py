"""Runs an X2Go server's commands over the established connection."""

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

_ANSWER_TIMEOUT_S = 30.0
#: x2goresume-session itself waits up to 45 s for a session that is being suspended; x2gostartagent runs dozens of
#: programs, and has taken 21 s on a busy machine.
_START_TIMEOUT_S = 60.0
_MAX_ANSWER_BYTES = 1 << 20
_NOT_FOUND = 127
_SESSION_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*-[0-9]+-[0-9]+_st[A-Za-z0-9_.-]+", re.ASCII)
#: The index of the answer's line with the new session's name.
_NAME_LINE = 3
#: How long a command's thread may take, after the command's timeout, to report the outcome.
_GRACE_S = 1.0
_MAYBE_STARTED_HINT = "It may have started one anyway: see proxy-fsm sessions."


@dataclass(frozen=True)
class Answer:
    """A command's output and exit status; the repr shows no output, since it may contain a cookie."""

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
    def error_line(self) -> str:
        """The last non-empty line of its standard error, safe to print."""
        return self.error_line_with("")

    def error_line_with(self, text: str) -> str:
        """The last non-empty line of its standard error that contains a text, safe to print; empty if there is none."""
        lines = [line.strip() for line in self.errors.decode("utf-8", "replace").splitlines()]
        line = next((line for line in reversed(lines) if line and text in line), "")
        return excerpt(line)


class X2GoServer:
    """A server's X2Go commands; each argument is quoted, each answer checked.

    Args:
        transport: The connection to the server.
        output: Hides every cookie in the answers.
        interrupts: Signals; one of them ends the wait for an interruptible command.
    """

    def __init__(self, transport: paramiko.Transport, output: Output, interrupts: Interrupts) -> None:
        self.transport = transport
        self._output = output
        self._interrupts = interrupts

    def sessions(self, *, interruptible: bool = True) -> tuple[ListedSession, ...]:
        """Return the user's sessions, in the server's order.

        Raises:
            NotReachedError: The server cannot list them.
            Interrupted: A signal came during the command.
        """
        answer = self._run_checked(["x2golistsessions"], interruptible=interruptible)
        try:
            sessions = parse_session_list(answer.text)
        except InvalidSession as error:
            raise _failure("answer_unreadable", f"The server's list of sessions cannot be read: {error}") from error
        for session in sessions:
            self._redact_cookie(session.info)
        return sessions

    def session(self, name: str, *, interruptible: bool = True) -> ListedSession | None:
        """Return one session, or None if the server does not list it."""
        return next((each for each in self.sessions(interruptible=interruptible) if each.info.name == name), None)

    def has_program(self, program: str) -> bool:
        """Return whether the server finds a program."""
        return self._run(["sh", "-c", 'command -v "$1"', "sh", program]).exit_code == 0

    def start(self, arguments: Sequence[str]) -> SessionInfo:
        """Start an agent; not interruptible, since the new session would be orphaned.

        If the answer cannot be read, or the command reports a failure, the session that the answer names is
        terminated, since it would be unusable.

        Args:
            arguments: Those of ``x2gostartagent``.

        Raises:
            NotReachedError: There is no new session.
        """
        words = ["x2gostartagent", *arguments]
        answer = self._run(words, interruptible=False, timeout_s=_START_TIMEOUT_S, hint=_MAYBE_STARTED_HINT)
        said = f" It said: {answer.error_line}" if answer.error_line else ""
        hint = None
        try:
            # A refusal, such as for too many sessions, is explained on standard error only.
            info = parse_agent_output(
                answer.text if answer.output.strip() else answer.errors.decode("utf-8", "replace")
            )
        except InvalidSession as error:
            if not answer.output.strip():
                detail = f"The server started no session: {error.problem}{said}"
            else:
                detail = f"The server's answer about the new session cannot be read: {error.problem}{said}"
                hint = self._terminate_named_in(answer.text)
            raise _failure("not_started", detail, hint, exit_code=answer.exit_code) from error
        self._redact_cookie(info)
        if answer.exit_code != 0:
            detail = f"x2gostartagent exited with status {answer.exit_code} on the server.{said}"
            hint = self._terminate_named_in(answer.text)
            raise _failure("not_started", detail, hint, exit_code=answer.exit_code)
        return info

    def resume(self, arguments: Sequence[str]) -> str:
        """Resume a session and return the server's output; not interruptible.

        Args:
            arguments: Those of ``x2goresume-session``.

        Raises:
            NotReachedError: It was not resumed.
        """
        answer = self._run_checked(["x2goresume-session", *arguments], interruptible=False, timeout_s=_START_TIMEOUT_S)
        if error_line := answer.error_line_with("failed to resume"):  # with exit status 0
            raise _failure("not_resumed", f"The server did not resume the session: {error_line}")
        return answer.text

    def suspend(self, name: str) -> None:
        """Suspend a session; not interruptible."""
        self._run_checked(["x2gosuspend-session", name], interruptible=False)

    def terminate(self, name: str) -> None:
        """Terminate a session and all that runs in it; not interruptible."""
        self._run_checked(["x2goterminate-session", name], interruptible=False)

    def run_command(self, session: ListedSession, command: str, kind: str) -> None:
        """Run a program in a session; not interruptible.

        Args:
            session: The session.
            command: The program and its arguments.
            kind: D, R or P.
        """
        words = ["setsid", "x2goruncommand", str(session.info.display), str(session.agent_pid), session.info.name]
        words += [str(session.sound_port or -1), command.replace(" ", "X2GO_SPACE_CHAR"), "none", kind]
        # In sh, whatever the user's own shell is; detached from the channel, which would stay open until it ends.
        self._run_checked(["sh", "-c", f"{shlex.join(words)} >/dev/null 2>&1 </dev/null &"], interruptible=False)

    def _terminate_named_in(self, text: str) -> str:
        """Terminate the session that an answer names; return a hint about the outcome."""
        lines = text.strip().split("\n")
        name = lines[_NAME_LINE].strip() if len(lines) > _NAME_LINE else ""
        if not _SESSION_NAME.fullmatch(name):
            return _MAYBE_STARTED_HINT
        try:
            self.terminate(name)
        except NotReachedError:
            return f"The session {name} may have been started anyway: see proxy-fsm sessions."
        return f"The session {name} was unusable, so it was terminated."

    def _redact_cookie(self, info: SessionInfo) -> None:
        if info.cookie is not None:
            self._output.redact.add(info.cookie)

    def _run_checked(
        self, words: Sequence[str], *, interruptible: bool = True, timeout_s: float = _ANSWER_TIMEOUT_S
    ) -> Answer:
        """Run a command that must succeed."""
        answer = self._run(words, interruptible=interruptible, timeout_s=timeout_s)
        if answer.exit_code != 0:
            said = f": {answer.error_line}" if answer.error_line else "."
            detail = f"{words[0]} exited with status {answer.exit_code} on the server{said}"
            raise _failure("command_failed", detail, command=words[0], exit_code=answer.exit_code)
        return answer

    def _run(
        self,
        words: Sequence[str],
        *,
        interruptible: bool = True,
        timeout_s: float = _ANSWER_TIMEOUT_S,
        hint: str | None = None,
    ) -> Answer:
        """Run a command and wait until it exits, on its own thread: a signal must not interrupt paramiko itself."""
        results: SimpleQueue[Answer | Exception] = SimpleQueue()
        opened: list[paramiko.Channel] = []

        def work() -> None:
            try:
                results.put(_exchange(self.transport, shlex.join(words), timeout_s, opened))
            except Exception as error:  # noqa: BLE001 - the main thread reports it
                results.put(error)

        threading.Thread(target=work, name="x2go-command", daemon=True).start()
        result: Answer | Exception
        try:
            with self._interrupts.waiting() if interruptible else contextlib.nullcontext():
                result = results.get(timeout=timeout_s + _GRACE_S)
        except Empty:  # paramiko waits without limit for the reply to its exec request
            result = TimeoutError()
            for channel in opened:
                with contextlib.suppress(paramiko.SSHException, OSError, EOFError):  # the connection is closed
                    channel.close()  # which ends the thread
        match result:
            case Answer(exit_code=code) if code == _NOT_FOUND and words[0].startswith("x2go"):
                raise _failure(
                    "x2goserver_missing",
                    f"The server has no {words[0]}, so it is not an X2Go server.",
                    "Install the package x2goserver there, or connect to a server that has it.",
                    command=words[0],
                )
            case Answer():
                return result
            case TimeoutError():
                detail = f"{words[0]} did not end within {timeout_s:g} s on the server."
                raise _failure("no_answer", detail, hint, command=words[0]) from result
            case paramiko.SSHException() | OSError() | EOFError():
                detail = f"{words[0]} could not be completed: {str(result) or type(result).__name__}"
                raise _failure("connection_lost", detail, hint, command=words[0]) from result
            case _:
                raise result


def _exchange(transport: paramiko.Transport, command: str, timeout_s: float, opened: list[paramiko.Channel]) -> Answer:
    deadline = time.monotonic() + timeout_s
    try:
        channel = transport.open_session(timeout=timeout_s)
    except paramiko.SSHException as error:
        if transport.is_active() and time.monotonic() >= deadline:  # paramiko has no specific exception for it
            raise TimeoutError from error
        raise
    opened.append(channel)
    try:
        if time.monotonic() >= deadline:  # the caller may have given up before it saw this channel
            raise TimeoutError
        channel.settimeout(max(0.0, deadline - time.monotonic()))
        channel.exec_command(command)
        output = _read(channel, channel.recv, deadline)
        errors = _read(channel, channel.recv_stderr, deadline)
        if not channel.status_event.wait(max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        if channel.exit_status < 0 and not transport.is_active():
            raise EOFError("the connection was closed.")
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
            raise OSError(f"the server sent more than {_MAX_ANSWER_BYTES} bytes.")


def _failure(reason: str, detail: str, hint: str | None = None, **fields: object) -> NotReachedError:
    return NotReachedError("server.failed", detail, hint, reason=reason, **fields)
