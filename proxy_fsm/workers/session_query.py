"""Asks an X2Go server for the status of a session."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from proxy_fsm.errors import InvalidSession
from proxy_fsm.evidence import SessionStatusReceived, SessionTakenOver
from proxy_fsm.session import (
    LIST_SCRIPT,
    RESUMING_SCRIPT,
    STATUS_SCRIPT,
    SessionStatus,
    parse_session_list,
    parse_status,
)
from proxy_fsm.ssh import CommandCancelled, CommandFailed, FramedCommand, NotOpened

if TYPE_CHECKING:
    from collections.abc import Callable

    import paramiko

    from proxy_fsm.evidence import Observation
    from proxy_fsm.session import SessionInfo

__all__ = ["SessionStatusQuery"]

_PAUSE_S = 0.1
#: A client that takes a session over with two commands resumes it a moment after it has suspended it.
_SECOND_LOOK_S = 0.4
#: A server that takes longer to list the sessions is not asked a second time.
_SLOW_S = 0.4


class SessionStatusQuery:
    """Finds out how a session ended, on its own thread: suspended, terminated, or taken over by another client.

    Posts `SessionStatusReceived` or `SessionTakenOver`. A server may still list a session as running for a moment after
    its agent has disconnected, so the query is repeated until the status changes, or `cancel` is called. That the
    session is running is posted once.

    A session that is listed as running on another port than ours, or again after it was suspended, has been taken over.
    So one that is suspended is looked at again after a moment, and so are the programs that resume sessions.

    Args:
        transport: Where the commands are run.
        session: The session as this attempt knows it.
        post: Receives the answer.
    """

    def __init__(
        self, transport: paramiko.Transport, session: SessionInfo, post: Callable[[Observation], None]
    ) -> None:
        self._transport = transport
        self._session = session
        self._post = post
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._command: FramedCommand | None = None
        self.thread = threading.Thread(target=self._run, name="proxy_fsm-query", daemon=True)

    def start(self) -> None:
        """Start the query; returns at once."""
        self.thread.start()

    def cancel(self) -> None:
        """Stop asking: the thread ends as soon as it can, and posts nothing more."""
        with self._lock:
            self._cancelled.set()
            command = self._command
        if command is not None:
            command.cancel()

    def _run(self) -> None:
        answer: Observation
        running_posted = False
        began = time.monotonic()
        try:
            while _status_of(answer := self._answer()) is SessionStatus.RUNNING:
                if not running_posted:
                    self._post(answer)
                running_posted = True
                self._cancelled.wait(_PAUSE_S)
                began = time.monotonic()
            if _status_of(answer) is SessionStatus.SUSPENDED:
                answer = self._look_again(answer, is_slow=time.monotonic() - began > _SLOW_S)
        except (NotOpened, CommandFailed, InvalidSession):
            answer = SessionStatusReceived(None)  # unknown, which is an answer too
        except CommandCancelled:
            return
        if not self._cancelled.is_set():
            self._post(replace(answer, at=time.monotonic()))  # it is known only now

    def _answer(self, *, after_suspension: bool = False) -> SessionStatusReceived | SessionTakenOver:
        """Return what the server lists of the session, or else what its database has.

        Args:
            after_suspension: Whether it was suspended a moment ago.

        Raises:
            CommandCancelled: `cancel` was called.
        """
        name = self._session.name
        listed = parse_session_list(self._output_of(LIST_SCRIPT), name=name)
        if not listed:
            return SessionStatusReceived(parse_status(self._output_of(f"{STATUS_SCRIPT} {name}")))
        (found,) = listed
        elsewhere = after_suspension or found.info.graphics_port != self._session.graphics_port
        if found.status is SessionStatus.RUNNING and elsewhere:
            return SessionTakenOver(found.client, found.used)
        return SessionStatusReceived(found.status)

    def _look_again(self, suspended: Observation, *, is_slow: bool) -> Observation:
        """Find out whether another client resumes the session that has just been suspended.

        Args:
            suspended: The answer that it is suspended.
            is_slow: Whether that took so long that a second one may come too late.
        """
        if self._is_being_resumed():
            return SessionTakenOver("", "")
        if is_slow or self._cancelled.wait(_SECOND_LOOK_S):
            return suspended
        answer = self._answer(after_suspension=True)
        if _status_of(answer) is SessionStatus.SUSPENDED and self._is_being_resumed():
            return SessionTakenOver("", "")
        return answer

    def _is_being_resumed(self) -> bool:
        """Return whether the server runs a program that resumes the session; False where it cannot find out."""
        try:
            return bool(self._output_of(RESUMING_SCRIPT.format(self._session.name)).strip())
        except CommandFailed:  # pgrep found none, or is not there
            return False

    def _output_of(self, script: str) -> str:
        command = FramedCommand(self._transport, script)
        with self._lock:
            if self._cancelled.is_set():
                raise CommandCancelled("The query was cancelled.")
            self._command = command
        completed = command.run()
        if completed.exit_status != 0:
            raise CommandFailed(f"The command exited with status {completed.exit_status}.")
        return completed.output.decode(errors="replace")


def _status_of(answer: Observation) -> SessionStatus | None:
    return answer.status if isinstance(answer, SessionStatusReceived) else None
