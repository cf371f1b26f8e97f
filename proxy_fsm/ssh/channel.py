"""A channel that cannot harm its transport, and hands on what comes without a detour."""

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

from proxy_fsm.ssh.errors import TransportGone
from proxy_fsm.ssh.fast import Messages, Packetizer, acknowledge, tcp_socket
from proxy_fsm.ssh.sending import RekeySafeTransport

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

__all__ = ["PACKET_BYTES", "WINDOW_BYTES", "SafeChannel"]

#: What this side is ready to take ahead of the reader, and in one message, in bytes. The window is what one channel can
#: hold in memory when its reader is slow, and it has to hold what is under way: three times OpenSSH's own.
WINDOW_BYTES = 6 << 20
PACKET_BYTES = 256 << 10

#: paramiko leaves so much of a message free for what is not data.
_ROOM_BYTES = 64

#: How much is handed on before its window is given back.
_PIECE_BYTES = 512 << 10

#: How many messages are sent in one go at most; each is two entries of ``sendmsg``, which takes 1,024 on Linux.
_MOST_MESSAGES = 64


class SafeChannel(paramiko.Channel):
    """A channel whose CLOSE is sent once, by `send_close`, after its user has stopped sending.

    ``close()`` and the server's CLOSE only mark it closed, which wakes its waiters and never blocks.

    Attributes:
        ended: Set once the channel is closed from either side, or its transport has ended.
        transport_ended: Whether the transport went away under it.
        on_unlinked: Called when its transport goes away: a pending open, which the transport may not notify.
    """

    def __init__(self, chanid: int) -> None:
        super().__init__(chanid)
        self.ended = threading.Event()
        self.transport_ended = False
        self._most_messages = 1
        self.on_unlinked: Callable[[], None] | None = None
        self.in_buffer = ReceiveBuffer(WINDOW_BYTES)
        self._close_sent = threading.Lock()

    @property
    def delivered_bytes(self) -> int:
        """How much `deliver` has handed on so far."""
        return cast("ReceiveBuffer", self.in_buffer).delivered

    @property
    def message_bytes(self) -> int:
        """How much the server accepts in one message."""
        return max(1, self.out_max_packet_size - _ROOM_BYTES)

    def send(self, s: bytes | bytearray | memoryview) -> int:
        """Send as much as the server is ready to take, and return how much; 0 where this side has ended its direction.

        It waits until the server takes anything. In one message, or in some that go out together where the transport's
        packetizer knows how; as ``Channel.send`` otherwise, with one copy instead of four.

        Raises:
            TransportGone: The transport ended.
            OSError: The channel is closed.
        """
        data = memoryview(s)
        sent = 0
        pieces: list[tuple[bytes, memoryview]] = []
        with self.lock:
            if self.closed:
                raise OSError("The channel is closed.")
            while sent < len(data) and len(pieces) < self._most_messages and (not pieces or self.out_window_size):
                size = cast("int", self._wait_for_send_window(len(data) - sent))  # type: ignore[attr-defined]
                if size == 0:
                    break
                pieces.append(
                    (struct.pack(">cII", cMSG_CHANNEL_DATA, self.remote_chanid, size), data[sent : sent + size])
                )
                sent += size
        if pieces:
            # As in Channel.send the lock is not held meanwhile: while keys are exchanged this waits.
            message = Messages(pieces) if len(pieces) > 1 else Message(b"".join(pieces[0]))
            cast("Any", self.transport)._send_user_message(message)  # noqa: SLF001
        return sent

    def deliver(self, sock: socket.socket, before_first: Callable[[], None]) -> None:
        """Hand on to a socket everything that comes, until the server ends its direction or the channel is closed.

        What the socket takes at once goes there on the transport's thread, which saves a change of threads and two
        copies; what it does not take is kept, for the thread that calls this, which may wait. The window is given back
        by that thread alone, for what was handed on, so that no more than the window is ever kept.

        Args:
            sock: A blocking socket.
            before_first: Called once, before the first byte is handed on.

        Raises:
            TransportGone: The transport ended.
            OSError: The socket takes no more.
        """
        received = cast("ReceiveBuffer", self.in_buffer)
        received.wake_after_bytes = self.in_window_threshold + 1
        try:
            while True:
                kept, passed = received.take(sock)
                if not kept and not passed:
                    return
                if kept:  # nothing goes straight on meanwhile: this thread alone counts
                    if received.delivered == 0:
                        before_first()
                    sock.sendall(kept)
                    received.delivered += len(kept)
                self._give_back(passed + len(kept))
        finally:
            received.stop()

    def _give_back(self, count: int) -> None:
        ack = self._check_add_window(count)  # type: ignore[attr-defined]
        if ack > 0:
            message = Message()
            message.add_byte(cMSG_CHANNEL_WINDOW_ADJUST)
            message.add_int(self.remote_chanid)
            message.add_int(ack)
            cast("Any", self.transport)._send_user_message(message)  # noqa: SLF001

    def send_close(self) -> None:
        """Send the CLOSE that is due, once; the first caller may block while the server takes nothing.

        Call it when nothing more will be sent on this channel, from the thread that sent.
        """
        self.close()
        if not self.active or not self._close_sent.acquire(blocking=False):
            return
        message = Message()
        message.add_byte(cMSG_CHANNEL_CLOSE)
        message.add_int(self.remote_chanid)
        with suppress(TransportGone):  # it has no use for a CLOSE
            cast("Any", self.transport)._send_user_message(message)  # noqa: SLF001

    def _set_transport(self, transport: paramiko.Transport) -> None:
        super()._set_transport(RekeySafeTransport(transport))  # type: ignore[misc]
        cast("ReceiveBuffer", self.in_buffer).carrier = tcp_socket(transport)
        self._most_messages = _MOST_MESSAGES if isinstance(transport.packetizer, Packetizer) else 1

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
        # paramiko leaves out a channel that is closed already, and no CLOSE of the server will remove it any more.
        cast("Any", self.transport)._channels.delete(self.chanid)  # noqa: SLF001
        on_unlinked = self.on_unlinked
        if on_unlinked is not None:  # a transport that is closed by its owner sets no event of a pending open
            on_unlinked()


class ReceiveBuffer(BufferedPipe):  # type: ignore[type-arg]  # generic in its stub alone
    """What came for a channel: handed straight on where a socket takes it, kept in order where it does not.

    Args:
        most_bytes: How much is kept. A server that sends more violates flow control; the buffer is closed.

    Attributes:
        delivered: How many bytes were handed on.
        carrier: The TCP socket that it came over, if it is one.
        wake_after_bytes: How many bytes may be handed straight on before a waiter in `take` is woken.
    """

    _buffer: array[int]
    _closed: bool

    def __init__(self, most_bytes: int) -> None:
        super().__init__()
        self._most_bytes = most_bytes
        self._lock = threading.RLock()  # feed() as a whole is one step
        self._cv = threading.Condition(self._lock)
        self.delivered = 0
        self.carrier: socket.socket | None = None
        self.wake_after_bytes = 0
        self._unacknowledged = 0
        self._over = False
        self._sink: socket.socket | None = None

    def feed(self, data: bytes) -> None:
        """Take what came, on the transport's thread; this does not block."""
        with self._lock:
            if not self._over:
                rest = self._hand_on(data)
                if len(self._buffer) + len(rest) > self._most_bytes:
                    self.stop()
                    self.close()
                elif rest:
                    super().feed(rest)
        acknowledge(self.carrier)

    def _hand_on(self, data: bytes) -> bytes:
        """Hand on what the socket takes at once, and return what it does not."""
        if self._sink is None:
            return data
        try:
            # Not send(): gevent's heeds no flag, and would have the transport's own thread wait.
            sent = self._sink.sendmsg([data], [], socket.MSG_DONTWAIT)
        except OSError:  # it is full, or closed: then the waiter in take() will find out
            sent = 0
        self.delivered += sent
        self._unacknowledged += sent
        if sent < len(data):
            self._sink = None
        elif self._unacknowledged >= self.wake_after_bytes:
            self._cv.notify_all()
        return data[sent:]

    def take(self, sock: socket.socket) -> tuple[memoryview, int]:
        """Wait for what the caller has to do.

        Nothing is handed straight on while something is kept, or returned to be sent and no call has come since.

        Returns:
            A piece of what was kept, which the caller sends, and how many bytes were handed on to the socket since;
            nothing and 0 when no more will come.
        """
        with self._lock:
            while True:
                if self._buffer or self._unacknowledged >= self.wake_after_bytes > 0 or self._closed:
                    kept = self._buffer[:_PIECE_BYTES]
                    del self._buffer[:_PIECE_BYTES]
                    passed, self._unacknowledged = self._unacknowledged, 0
                    return memoryview(kept), passed
                if self.delivered:  # the first bytes are not handed straight on
                    self._sink = sock
                self._cv.wait()

    def stop(self) -> None:
        """Hand nothing on any more, and keep nothing."""
        with self._lock:
            self._over, self._sink = True, None
            del self._buffer[:]
