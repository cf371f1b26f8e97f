"""A channel that cannot harm its transport, and delivers received data without a detour."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import paramiko
from paramiko.buffered_pipe import BufferedPipe
from paramiko.common import cMSG_CHANNEL_CLOSE, cMSG_CHANNEL_DATA, cMSG_CHANNEL_WINDOW_ADJUST
from paramiko.message import Message

from proxy_fsm.ssh.errors import TransportClosed
from proxy_fsm.ssh.fast import Messages, Packetizer, acknowledge, tcp_socket
from proxy_fsm.ssh.sending import RekeySafeTransport

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

__all__ = ["PACKET_BYTES", "WINDOW_BYTES", "SafeChannel"]

#: The receive window of a channel, and the longest message accepted. The window limits what one channel holds in memory
#: when its reader is slow, and has to cover the data in flight: three times OpenSSH's own.
WINDOW_BYTES = 6 << 20
PACKET_BYTES = 256 << 10

#: How much of a message paramiko reserves for what is not data.
_ROOM_BYTES = 64

#: How much buffered data is delivered before the window is adjusted for it.
_PIECE_BYTES = 512 << 10

#: How many messages are sent at once at most; each is two entries of ``sendmsg``, which accepts 1,024 on Linux.
_MAX_MESSAGES = 64


class SafeChannel(paramiko.Channel):
    """A channel whose CLOSE is sent once, by `send_close`, after its user has stopped sending.

    ``close()`` and the server's CLOSE only mark it closed, which wakes its waiters and never blocks.

    Attributes:
        ended: Set once the channel is closed from either side, or its transport has ended.
        transport_ended: Whether its transport has ended.
        on_unlinked: Called when its transport ends: for a pending open, which the transport may not notify.
    """

    def __init__(self, chanid: int) -> None:
        super().__init__(chanid)
        self.ended = threading.Event()
        self.transport_ended = False
        self._max_messages = 1
        self.on_unlinked: Callable[[], None] | None = None
        self.in_buffer = ReceiveBuffer(WINDOW_BYTES)
        self._close_sent = threading.Lock()

    @property
    def delivered_bytes(self) -> int:
        """How much `deliver` has written so far."""
        return cast("ReceiveBuffer", self.in_buffer).delivered

    @property
    def message_bytes(self) -> int:
        """How much the server accepts in one message."""
        return max(1, self.out_max_packet_size - _ROOM_BYTES)

    def send(self, s: bytes | bytearray | memoryview) -> int:
        """Send as much as the server's window allows, and return how much; 0 if this side has sent EOF.

        It waits until the window is open. It sends one message, or several at once if the transport's packetizer can;
        apart from that it works as ``Channel.send`` does, with one copy instead of four.

        Raises:
            TransportClosed: The transport ended.
            OSError: The channel is closed.
        """
        data = memoryview(s)
        sent = 0
        pieces: list[tuple[bytes, memoryview]] = []
        with self.lock:
            if self.closed:
                raise OSError("The channel is closed.")
            while sent < len(data) and len(pieces) < self._max_messages and (not pieces or self.out_window_size):
                size = cast("int", self._wait_for_send_window(len(data) - sent))  # type: ignore[attr-defined]
                if size == 0:
                    break
                pieces.append(
                    (struct.pack(">cII", cMSG_CHANNEL_DATA, self.remote_chanid, size), data[sent : sent + size])
                )
                sent += size
        if pieces:
            # As in Channel.send the lock is not held here: this waits during a key exchange.
            message = Messages(pieces) if len(pieces) > 1 else Message(b"".join(pieces[0]))
            cast("Any", self.transport)._send_user_message(message)  # noqa: SLF001
        return sent

    def deliver(self, sock: socket.socket, before_first: Callable[[], None]) -> None:
        """Write everything received to a socket, until the server sends EOF or the channel is closed.

        What the socket accepts at once is written on the transport's thread, which saves a thread switch and two
        copies; the rest is buffered for the thread that calls this, which may block. Only that thread adjusts the
        window, and only for data that was written, so no more than the window is ever buffered.

        Args:
            sock: A blocking socket.
            before_first: Called once, before the first byte is written.

        Raises:
            TransportClosed: The transport ended.
            OSError: The socket cannot be written to any more.
        """
        received = cast("ReceiveBuffer", self.in_buffer)
        received.wake_after_bytes = self.in_window_threshold + 1
        try:
            while True:
                buffered, written = received.take(sock)
                if not buffered and not written:
                    return
                if buffered:  # nothing is written directly meanwhile: this thread alone counts
                    if received.delivered == 0:
                        before_first()
                    sock.sendall(buffered)
                    received.delivered += len(buffered)
                self._adjust_window(written + len(buffered))
        finally:
            received.stop()

    def _adjust_window(self, count: int) -> None:
        ack = self._check_add_window(count)  # type: ignore[attr-defined]
        if ack > 0:
            message = Message()
            message.add_byte(cMSG_CHANNEL_WINDOW_ADJUST)
            message.add_int(self.remote_chanid)
            message.add_int(ack)
            cast("Any", self.transport)._send_user_message(message)  # noqa: SLF001

    def send_close(self) -> None:
        """Send CLOSE, once; the first caller may block while the server reads nothing.

        Call it when nothing more will be sent on this channel, from the thread that sent.
        """
        self.close()
        if not self.active or not self._close_sent.acquire(blocking=False):
            return
        message = Message()
        message.add_byte(cMSG_CHANNEL_CLOSE)
        message.add_int(self.remote_chanid)
        with suppress(TransportClosed):  # it needs no CLOSE
            cast("Any", self.transport)._send_user_message(message)  # noqa: SLF001

    def _set_transport(self, transport: paramiko.Transport) -> None:
        super()._set_transport(RekeySafeTransport(transport))  # type: ignore[misc]
        cast("ReceiveBuffer", self.in_buffer).carrier = tcp_socket(transport)
        self._max_messages = _MAX_MESSAGES if isinstance(transport.packetizer, Packetizer) else 1

    def _close_internal(self) -> tuple[None, None]:
        if self.active and not self.closed:
            self._set_closed()
        return None, None

    def _set_closed(self) -> None:
        super()._set_closed()  # type: ignore[misc]
        self.ended.set()

    def _unlink(self) -> None:
        self.transport_ended = True
        super()._unlink()  # type: ignore[misc]
        # paramiko skips a channel that is already closed, and no CLOSE from the server will remove it any more.
        cast("Any", self.transport)._channels.delete(self.chanid)  # noqa: SLF001
        on_unlinked = self.on_unlinked
        if on_unlinked is not None:  # a transport closed by its owner does not set the event of a pending open
            on_unlinked()


class ReceiveBuffer(BufferedPipe):  # type: ignore[type-arg]  # generic in its stub alone
    """Data received on a channel: written straight to a socket if it accepts it, otherwise buffered in order.

    Args:
        max_bytes: How much is buffered. A server that sends more violates flow control; the buffer is closed.

    Attributes:
        delivered: How many bytes were written to the socket.
        carrier: The transport's socket, if that is TCP.
        wake_after_bytes: How many bytes may be written directly before a waiter in `take` is woken.
    """

    _buffer: array[int]
    _closed: bool

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._max_bytes = max_bytes
        self._lock = threading.RLock()  # feed() as a whole is one step
        self._cv = threading.Condition(self._lock)
        self.delivered = 0
        self.carrier: socket.socket | None = None
        self.wake_after_bytes = 0
        self._unreported = 0  # written directly since the last take()
        self._stopped = False
        self._sink: socket.socket | None = None

    def feed(self, data: bytes) -> None:
        """Accept received data, on the transport's thread; this does not block."""
        with self._lock:
            if not self._stopped:
                rest = self._write_through(data)
                if len(self._buffer) + len(rest) > self._max_bytes:
                    self.stop()
                    self.close()
                elif rest:
                    super().feed(rest)
        acknowledge(self.carrier)

    def _write_through(self, data: bytes) -> bytes:
        """Write what the socket accepts at once, and return the rest."""
        if self._sink is None:
            return data
        try:
            # Not send(): gevent's ignores the flags, and would block the transport's own thread.
            sent = self._sink.sendmsg([data], [], socket.MSG_DONTWAIT)
        except OSError:  # it is full or closed: the caller of take() will find out
            sent = 0
        self.delivered += sent
        self._unreported += sent
        if sent < len(data):
            self._sink = None
        elif self._unreported >= self.wake_after_bytes:
            self._cv.notify_all()
        return data[sent:]

    def take(self, sock: socket.socket) -> tuple[memoryview, int]:
        """Wait until the caller has something to do.

        Nothing is written directly while data is buffered, or between the return of buffered data and the next call.

        Returns:
            A piece of buffered data, which the caller writes, and how many bytes were written directly since the last
            call; nothing and 0 when no more will arrive.
        """
        with self._lock:
            while True:
                if self._buffer or self._unreported >= self.wake_after_bytes > 0 or self._closed:
                    buffered = self._buffer[:_PIECE_BYTES]
                    del self._buffer[:_PIECE_BYTES]
                    written, self._unreported = self._unreported, 0
                    return memoryview(buffered), written
                if self.delivered:  # the first bytes are not written directly
                    self._sink = sock
                self._cv.wait()

    def stop(self) -> None:
        """Write and buffer nothing any more, and discard what is buffered."""
        with self._lock:
            self._stopped, self._sink = True, None
            del self._buffer[:]
