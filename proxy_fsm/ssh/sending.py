"""Sending while keys are exchanged: by the transport's own thread later, for our channels as patiently as it takes."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import paramiko

from proxy_fsm.ssh.errors import TransportGone

if TYPE_CHECKING:
    from paramiko.message import Message

__all__ = ["DeferredSender", "RekeySafeTransport", "send_through_rekey"]


class DeferredSender:
    """Sends for a transport: what its own thread sends never waits for keys, but is sent later, by another thread.

    No lock is waited for: the garbage collector may close a channel, and so come here, while this thread holds it.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._original = transport._send_user_message  # noqa: SLF001
        self._deferred: deque[Message] = deque()
        self._at_work = threading.Lock()  # held by the thread that sends, or is about to start

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
            return True  # dropped, as ever
        if self._deferred or not transport.clear_to_send_lock.acquire(blocking=False):  # what was deferred goes first
            return False
        try:
            if not transport.clear_to_send.is_set():
                return False
            transport._send_message(message)  # noqa: SLF001
            return True
        finally:
            transport.clear_to_send_lock.release()

    def _start_sender(self) -> None:
        if self._at_work.acquire(blocking=False):
            try:
                threading.Thread(target=self._send_deferred, name="proxy_fsm-deferred", daemon=True).start()
            except RuntimeError:  # no thread can be started: it goes with the next
                self._at_work.release()

    def _send_deferred(self) -> None:
        try:
            while self._deferred:
                try:
                    with suppress(paramiko.SSHException, OSError, EOFError):  # the transport has ended
                        send_through_rekey(self._transport, self._deferred[0])
                finally:
                    self._deferred.popleft()  # only now: until it is sent, nothing overtakes it
        finally:
            self._at_work.release()
        if self._deferred:  # it came in this very moment
            self._start_sender()


def send_through_rekey(transport: Any, message: Message) -> None:
    """Send, however long keys are exchanged; it raises, or drops the message, where the transport has ended."""
    while True:
        try:
            transport._send_user_message(message)  # noqa: SLF001
        except paramiko.ProxyCommandFailure:  # its pipe is closed: not a matter of keys
            raise
        except paramiko.SSHException:  # keys were not exchanged in time, and nothing was sent
            if not transport.is_active():
                raise
        else:
            return


class RekeySafeTransport:
    """A transport as our channels see it: it gives up no message because keys are exchanged slowly.

    Whatever paramiko raises where a message cannot be sent becomes one error, `TransportGone`.
    """

    def __init__(self, transport: paramiko.Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _send_user_message(self, message: Message) -> None:
        try:
            send_through_rekey(self._transport, message)
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise TransportGone(str(error) or "The SSH transport ended.") from error
        if not self._transport.is_active():  # then paramiko drops what it is to send, and says nothing
            raise TransportGone("The SSH transport ended.")
