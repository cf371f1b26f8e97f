"""Asks an X2Go server for the status of a session."""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING

import paramiko

from proxy_fsm.errors import InvalidSession
from proxy_fsm.evidence import SessionStatusReceived
from proxy_fsm.session import SessionStatus, parse_session_list
from proxy_fsm.ssh import ChannelOpening, NotOpened, SafeChannel

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy_fsm.evidence import Observation

__all__ = ["SessionStatusQuery"]

_MAX_ANSWER_BYTES = 1 << 20
_PAUSE_S = 0.1
#: A row of the list, up to the session's name.
_ROW = re.compile(r"[^|]*\|\s*(?P<name>[\w.@-]+)\s*\|", re.ASCII)


class SessionStatusQuery:
    """Finds out whether a session was suspended or terminated, on its own thread; posts `SessionStatusReceived`.

    A server may still list a session as running for a moment after its agent has disconnected, so the query is
    repeated until the status changes, or `cancel` is called. That the session is running is posted once.

    Args:
        transport: Where the command is run.
        name: The session's name.
        post: Receives the answer.
    """

    COMMAND = "x2golistsessions"

    def __init__(self, transport: paramiko.Transport, name: str, post: Callable[[Observation], None]) -> None:
        self._transport = transport
        self._name = name
        self._post = post
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._opening: ChannelOpening | None = None
        self._channel: SafeChannel | None = None
        self.thread = threading.Thread(target=self._run, name="proxy_fsm-query", daemon=True)

    def start(self) -> None:
        """Start the query; returns at once."""
        self.thread.start()

    def cancel(self) -> None:
        """Stop asking: the thread ends as soon as it can, and posts nothing more."""
        with self._lock:
            self._cancelled.set()
            opening, channel = self._opening, self._channel
        if opening is not None:
            opening.abandon()
        if channel is not None:
            channel.close()

    def _run(self) -> None:
        status: SessionStatus | None = None
        listed_before = False
        try:
            while not self._cancelled.is_set():
                listing = self._list_sessions()
                status = None if listing is None else self._status_in(listing)
                if status is not SessionStatus.RUNNING:
                    break
                if not listed_before:
                    self._post(SessionStatusReceived(status))
                listed_before = True
                self._cancelled.wait(_PAUSE_S)
        except (NotOpened, InvalidSession, paramiko.SSHException, OSError, EOFError):
            status = None  # unknown, which is an answer too
        if not self._cancelled.is_set():
            self._post(SessionStatusReceived(status))

    def _list_sessions(self) -> str | None:
        """Return the server's list; None if the command failed, or after `cancel`."""
        with self._lock:
            if self._cancelled.is_set():
                return None
            opening = self._opening = ChannelOpening(self._transport, "session")
        opening.send()
        channel = opening.wait()
        try:
            with self._lock:
                self._opening, self._channel = None, channel
            if self._cancelled.is_set():
                return None
            channel.exec_command(self.COMMAND)
            answer = b""
            while len(answer) < _MAX_ANSWER_BYTES and (data := channel.recv(1 << 16)):
                answer += data
            cut_short = channel.transport_ended or self._cancelled.is_set() or len(answer) >= _MAX_ANSWER_BYTES
            if cut_short or channel.recv_exit_status() != 0:
                return None
            return answer.decode("utf-8", "replace")
        finally:
            with self._lock:
                self._channel = None
            channel.send_close()

    def _status_in(self, listing: str) -> SessionStatus:
        """Return the listed status; a session that is not listed is finished."""
        lines = listing.split("\n")
        for listed in parse_session_list("\n".join(line for line in lines if not self._is_other_session(line))):
            if listed.info.name == self._name:
                return listed.status
        return SessionStatus.FINISHED

    def _is_other_session(self, line: str) -> bool:
        """Return whether a line is the row of another session, which may be malformed."""
        row = _ROW.match(line)
        return row is not None and row["name"] != self._name
