"""Sending during a key exchange: later, by another thread, for the transport's own; retried for our channels."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import paramiko

from proxy_fsm.ssh.errors import TransportClosed

if TYPE_CHECKING:
    from paramiko.message import Message

__all__ = ["DeferredSender", "RekeySafeTransport", "send_through_rekey"]


class DeferredSender:
    """Sends for a transport, whose own thread never waits for a key exchange: another thread then sends for it, later.

    It never waits for a lock: the garbage collector may close a channel, and so call this, while this thread holds it.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._original = transport._send_user_message  # noqa: SLF001
        self._deferred: deque[Message] = deque()
        self._sending = threading.Lock()  # held by the thread that sends, or is about to start

    def __call__(self, message: Message) -> None:
        """Send as ``Transport._send_user_message`` does."""
        if threading.current_thread() is not self._transport:
            self._original(message)
        elif not self._send_now(message):
            self._deferred.append(message)
            self._start_sender()

    def _send_now(self, message: Message) -> bool:
        transport = self._transport
        if not transport.is_active():
            return True  # dropped, as paramiko does
        if self._deferred or not transport.clear_to_send_lock.acquire(blocking=False):  # deferred first
            return False
        try:
            if not transport.clear_to_send.is_set():
                return False
            transport._send_message(message)  # noqa: SLF001
            return True
        finally:
            transport.clear_to_send_lock.release()

    def _start_sender(self) -> None:
        if self._sending.acquire(blocking=False):
            try:
                threading.Thread(target=self._send_deferred, name="proxy_fsm-deferred", daemon=True).start()
            except RuntimeError:  # no thread can be started: it is sent with the next message
                self._sending.release()

    def _send_deferred(self) -> None:
        try:
            while self._deferred:
                try:
                    with suppress(paramiko.SSHException, OSError, EOFError):  # the transport has ended
                        send_through_rekey(self._transport, self._deferred[0])
                finally:
                    self._deferred.popleft()  # only now: until it is sent, nothing overtakes it
        finally:
            self._sending.release()
        if self._deferred:  # one was added just before the release
            self._start_sender()


def send_through_rekey(transport: Any, message: Message) -> None:
    """Send, however long a key exchange takes; raise, or drop the message, if the transport has ended."""
    while True:
        try:
            transport._send_user_message(message)  # noqa: SLF001
        except paramiko.ProxyCommandFailure:  # its pipe is closed, which no key exchange explains
            raise
        except paramiko.SSHException:  # the key exchange timed out, and nothing was sent
            if not transport.is_active():
                raise
        else:
            return


class RekeySafeTransport:
    """A transport as our channels see it: it gives up no message because of a slow key exchange.

    Whatever paramiko raises when a message cannot be sent becomes one error, `TransportClosed`.
    """

    def __init__(self, transport: paramiko.Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _send_user_message(self, message: Message) -> None:
        try:
            send_through_rekey(self._transport, message)
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise TransportClosed(str(error) or "The SSH transport ended.") from error
        if not self._transport.is_active():  # then paramiko drops the message silently
            raise TransportClosed("The SSH transport ended.")
