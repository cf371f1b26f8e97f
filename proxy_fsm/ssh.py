"""Channels that cannot harm their transport, and the signs of life of a transport.

This is the only module that knows paramiko's insides. What it touches beyond the public API, all of it checked
by `tests/test_ssh.py` so that a paramiko that changes it fails there with its name:

* ``Transport``: ``lock``, ``_channels`` (``put``, ``delete``), ``_next_channel``, ``channel_events``,
  ``channels_seen``, ``saved_exception``, ``_send_user_message``, ``_send_message``, ``clear_to_send``,
  ``clear_to_send_lock``, ``packetizer``, ``run``, ``_handler_table``
* ``Channel``: ``_set_transport``, ``_set_window``, ``_close_internal``, ``_set_closed``, ``_unlink``,
  ``_check_add_window``, ``_wait_for_send_window``, ``in_buffer``
* ``BufferedPipe``: ``_lock``, ``_cv``, ``_buffer``, ``_closed``
* ``Packetizer``: ``__sequence_number_in``, ``__remainder``, ``_check_keepalive``
* ``transport``: ``_active_threads``

Tried with paramiko 3.5.1, 4.0.0, 5.0.0, 5.0.1 and 5.1.0: in each all of it is so, and the tunnel's tests pass. In 3.4.1
too, but it has no AES-GCM, so that `fast_transport` is no faster.

Three things are done differently from ``Transport.open_channel`` and ``Channel.close``, for these reasons:

* An open is a message and, later, its answer; nothing has to wait in between, an open that nobody wants any
  more closes itself when it succeeds late, and each refusal is told to the open that it answers.
* A channel's CLOSE is sent by the thread that used the channel, when it is done, and not by whichever thread
  notices first. So data can never follow it, which OpenSSH answers by disconnecting everything
  (paramiko issues 1115 and 1705), and the transport's own thread never waits for a key exchange that only
  itself can finish (issue 822).
* The end of a transport is told by the transport: it unlinks its channels, and one of them is ours.

Two things are changed in the caller's transport, when the first channel is opened here, and stay:

* What its own thread has to send while keys are exchanged is sent when they are. In paramiko that thread waits for
  itself, for 30 s, and the transport is dead: an answer to the CLOSE of any channel is enough, the caller's own
  commands too, and so is a keepalive. Without a tunnel hardly any transport carries the 512 MiB after which paramiko
  wants fresh keys; with one it takes seconds. When keys are exchanged, and which, stays as it was. Our own channels
  wait for the keys as long as it takes: after paramiko's 30 s, which a slow link may need to bring what was under
  way, bytes would be lost.
* A refusal of an open of ours is kept from paramiko, which has one place for the last refusal: ours, a probe's too,
  would take the place of one that the caller is about to read.

Two more are done differently for speed: what comes for a channel goes straight to the socket that it is for, on the
transport's thread (`SafeChannel.deliver`), and a transport that `fast_transport` made reads ahead.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import paramiko
import paramiko.transport
from paramiko.buffered_pipe import BufferedPipe
from paramiko.common import (
    CONNECTION_FAILED_CODE,
    MSG_CHANNEL_OPEN_FAILURE,
    cMSG_CHANNEL_CLOSE,
    cMSG_CHANNEL_DATA,
    cMSG_CHANNEL_OPEN,
    cMSG_CHANNEL_WINDOW_ADJUST,
)
from paramiko.message import Message
from paramiko.packet import NeedRekeyException, Packetizer

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

__all__ = [
    "ChannelOpening",
    "ChannelRefused",
    "EndWatch",
    "NotOpened",
    "OpenAbandoned",
    "SafeChannel",
    "TransportGone",
    "fast_transport",
    "packets_received",
    "set_nodelay",
    "why_ended",
]

#: What this side is ready to take ahead of the reader, and in one message, in bytes. The window is what one channel can
#: hold in memory when its reader is slow, and it has to hold what is under way: three times OpenSSH's own.
WINDOW_BYTES = 6 << 20
PACKET_BYTES = 256 << 10

#: How much a fast transport reads at once.
_AHEAD_BYTES = 256 << 10

#: How much is handed on before its window is given back.
_PIECE_BYTES = 512 << 10

#: OpenSSH's fastest ciphers that paramiko has; both authenticate what they encrypt.
_FAST_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")


class NotOpened(Exception):  # noqa: N818 - each of its kinds is a fact or a wish, not an error of this side
    """A channel was not opened."""


class ChannelRefused(NotOpened):
    """A channel was refused, on a transport that lives.

    Attributes:
        code: The reason's number (RFC 4254, 5.1): 1 administratively prohibited, 2 connect failed, 3 unknown
            channel type, 4 resource shortage; the last also where the request could not even be sent in time.
    """

    PROHIBITED = 1
    CONNECT_FAILED = 2
    UNKNOWN_TYPE = 3
    RESOURCE_SHORTAGE = 4

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        super().__init__(text)


class TransportGone(NotOpened):
    """The transport ended before the server answered."""


class OpenAbandoned(NotOpened):
    """The open was abandoned before the server answered."""


class _LateSender:
    """Sends for a transport: what its own thread sends never waits for keys, but is sent later, by another thread.

    No lock is waited for: the garbage collector may close a channel, and so come here, while this thread holds it.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._beneath = transport._send_user_message  # noqa: SLF001
        self._late: deque[Message] = deque()
        self._at_work = threading.Lock()  # held by the thread that sends, or is about to start

    def __call__(self, message: Message) -> None:
        """Send as ``Transport._send_user_message`` does."""
        if threading.current_thread() is not self._transport:
            self._beneath(message)
        elif not self._send_now(message):
            self._late.append(message)
            self._see_to_it()

    def _send_now(self, message: Message) -> bool:
        transport = self._transport
        if not transport.is_active():
            return True  # dropped, as ever
        if self._late or not transport.clear_to_send_lock.acquire(blocking=False):  # what is late goes first
            return False
        try:
            if not transport.clear_to_send.is_set():
                return False
            transport._send_message(message)  # noqa: SLF001
            return True
        finally:
            transport.clear_to_send_lock.release()

    def _see_to_it(self) -> None:
        if self._at_work.acquire(blocking=False):
            try:
                threading.Thread(target=self._send_late, name="proxy_fsm-late", daemon=True).start()
            except RuntimeError:  # no thread can be started: it goes with the next
                self._at_work.release()

    def _send_late(self) -> None:
        try:
            while self._late:
                try:
                    with suppress(paramiko.SSHException, OSError, EOFError):  # the transport is gone
                        _send_patiently(self._transport, self._late[0])
                finally:
                    self._late.popleft()  # only now: until it is sent, nothing overtakes it
        finally:
            self._at_work.release()
        if self._late:  # it came in this very moment
            self._see_to_it()


def _send_patiently(transport: Any, message: Message) -> None:
    """Send, however long keys are exchanged; it raises, or drops the message, where the transport is gone."""
    while True:
        try:
            transport._send_user_message(message)  # noqa: SLF001
        except paramiko.ProxyCommandFailure:  # its pipe is gone: no matter of keys
            raise
        except paramiko.SSHException:  # keys were not exchanged in time, and nothing was sent
            if not transport.is_active():
                raise
        else:
            return


class _Refusals:
    """Takes the refusals of opens: ours are told to them alone, the others go where they always went."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._beneath = transport._handler_table[MSG_CHANNEL_OPEN_FAILURE]  # noqa: SLF001

    def __call__(self, message: Message) -> None:
        number = message.get_int()
        with self._transport.lock:
            opening = self._transport.channel_events.get(number)
            if isinstance(opening, ChannelOpening):
                del self._transport.channel_events[number]
                self._transport._channels.delete(number)  # noqa: SLF001
        if isinstance(opening, ChannelOpening):
            opening.refuse(message.get_int())
        else:
            message.rewind()
            self._beneath(message)


def _prepare(transport: Any) -> None:
    """Change what has to be changed in a transport, once; call it under the transport's lock."""
    if not isinstance(transport._send_user_message, _LateSender):  # noqa: SLF001
        transport._send_user_message = _LateSender(transport)  # noqa: SLF001
    if not isinstance(transport._handler_table[MSG_CHANNEL_OPEN_FAILURE], _Refusals):  # noqa: SLF001
        transport._handler_table[MSG_CHANNEL_OPEN_FAILURE] = _Refusals(transport)  # noqa: SLF001


class _Patient:
    """A transport as our channels see it: it gives up no message because keys are exchanged slowly."""

    def __init__(self, transport: paramiko.Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _send_user_message(self, message: Message) -> None:
        _send_patiently(self._transport, message)


class SafeChannel(paramiko.Channel):
    """A channel whose CLOSE is sent once, by `send_close`, after its user has stopped sending.

    ``close()`` and the server's CLOSE only mark it closed, which wakes whoever waits on it and never blocks.

    Attributes:
        ended: Set once the channel is closed from either side, or its transport is gone.
        transport_ended: Whether the transport went away under it.
    """

    def __init__(self, chanid: int) -> None:
        super().__init__(chanid)
        self.ended = threading.Event()
        self.transport_ended = False
        self.opening: ChannelOpening | None = None
        self.in_buffer = _Passage()
        self._close_sent = threading.Lock()

    @property
    def delivered_bytes(self) -> int:
        """How much `deliver` has handed on so far."""
        return cast("_Passage", self.in_buffer).delivered

    def send(self, s: bytes | bytearray | memoryview) -> int:
        """Send as much as one message may hold, and return how much; 0 where this side has ended its direction.

        As ``Channel.send``, with one copy instead of four.

        Raises:
            OSError: The channel is closed.
            EOFError: The transport is gone.
            paramiko.SSHException: Keys were not exchanged in time.
        """
        with self.lock:
            if self.closed:
                raise OSError("The channel is closed.")
            size = cast("int", self._wait_for_send_window(len(s)))  # type: ignore[attr-defined]
            if size == 0:
                return 0
            head = struct.pack(">cII", cMSG_CHANNEL_DATA, self.remote_chanid, size)
        # As in Channel.send the lock is not held meanwhile: while keys are exchanged this waits.
        cast("Any", self.transport)._send_user_message(Message(b"".join((head, s[:size]))))  # noqa: SLF001
        return size

    def deliver(self, sock: socket.socket, before_first: Callable[[], None]) -> None:
        """Hand on to a socket everything that comes, until the server ends its direction or the channel is closed.

        What the socket takes at once goes there on the transport's thread, which saves a change of threads and two
        copies; what it does not take is kept, for the thread that calls this, which may wait. The window is given back
        by that thread alone, for what was handed on, so that no more than the window is ever kept.

        Args:
            sock: A blocking socket.
            before_first: Called once, before the first byte is handed on.

        Raises:
            OSError: The socket takes no more, or the transport is gone.
            EOFError: The transport is gone.
            paramiko.SSHException: Keys were not exchanged in time.
        """
        passage = cast("_Passage", self.in_buffer)
        passage.due = self.in_window_threshold + 1
        try:
            while True:
                kept, passed = passage.take(sock)
                if not kept and not passed:
                    return
                if kept and passage.delivered == 0:
                    before_first()
                sock.sendall(kept)
                passage.delivered += len(kept)
                self._give_back(passed + len(kept))
        finally:
            passage.leave()

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
        # A transport that is gone, or goes meanwhile, has no use for a CLOSE.
        with suppress(paramiko.SSHException, OSError, EOFError):
            cast("Any", self.transport)._send_user_message(message)  # noqa: SLF001

    def _set_transport(self, transport: paramiko.Transport) -> None:
        super()._set_transport(_Patient(transport))  # type: ignore[misc]

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
        if self.opening is not None:
            self.opening.set()


class _Passage(BufferedPipe):  # type: ignore[type-arg]  # generic in its stub alone
    """What came for a channel: handed straight on where a socket takes it, kept in order where it does not.

    Attributes:
        delivered: How many bytes were handed on.
        due: How many bytes may be handed straight on before whoever waits in `take` is told.
    """

    _buffer: array[int]
    _closed: bool

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()  # feed() as a whole is one step
        self._cv = threading.Condition(self._lock)
        self.delivered = 0
        self.due = 0
        self._passed = 0
        self._over = False
        self._sink: socket.socket | None = None

    def feed(self, data: bytes) -> None:
        """Take what came, on the transport's thread; this does not block."""
        with self._lock:
            if self._over:
                return
            if self._sink is not None:
                try:
                    # Not send(): gevent's heeds no flag, and would have the transport's own thread wait.
                    sent = self._sink.sendmsg([data], [], socket.MSG_DONTWAIT)
                except OSError:  # it is full, or closed: then whoever waits in take() will find out
                    sent = 0
                self.delivered += sent
                self._passed += sent
                if sent == len(data):
                    if self._passed >= self.due:
                        self._cv.notify_all()
                    return
                data, self._sink = data[sent:], None
            super().feed(data)

    def take(self, sock: socket.socket) -> tuple[memoryview, int]:
        """Wait for what the caller has to do.

        Nothing is handed straight on while something is kept, or returned to be sent and no call has come since.

        Returns:
            A piece of what was kept, which the caller sends, and how many bytes were handed on to the socket since;
            nothing and 0 when no more will come.
        """
        with self._lock:
            while True:
                if self._buffer or self._passed >= self.due > 0 or self._closed:
                    kept = self._buffer[:_PIECE_BYTES]
                    del self._buffer[:_PIECE_BYTES]
                    passed, self._passed = self._passed, 0
                    return memoryview(kept), passed
                if self.delivered:  # the first bytes are not handed straight on
                    self._sink = sock
                self._cv.wait()

    def leave(self) -> None:
        """Hand nothing on any more, and keep nothing."""
        with self._lock:
            self._over, self._sink = True, None
            del self._buffer[:]


class ChannelOpening:
    """One request to open a channel, and its answer.

    Args:
        transport: An authenticated transport.
        kind: ``"direct-tcpip"``, or whatever takes no destination.
        destination: Host and port as the server knows them, for ``"direct-tcpip"``.
    """

    def __init__(self, transport: paramiko.Transport, kind: str, destination: tuple[str, int] | None = None) -> None:
        self._transport = transport
        self._kind = kind
        self._destination = destination
        self._lock = threading.Lock()
        self._settled = threading.Event()
        self._answer: SafeChannel | Exception | None = None
        self._channel: SafeChannel | None = None

    def send(self) -> None:
        """Send the request; this may block while the server takes nothing, or keys are exchanged.

        It raises nothing: `wait` tells how it went.
        """
        transport = cast("Any", self._transport)
        message = Message()
        with transport.lock:
            _prepare(transport)
            number = transport._next_channel()  # noqa: SLF001
            channel = self._channel = SafeChannel(number)
            channel.opening = self
            channel._set_transport(transport)  # noqa: SLF001
            channel._set_window(WINDOW_BYTES, PACKET_BYTES)  # type: ignore[attr-defined]  # noqa: SLF001
            transport._channels.put(number, channel)  # noqa: SLF001
            # The transport calls set() on this when the answer has come, or when it ends.
            transport.channel_events[number] = self
            transport.channels_seen[number] = True
        message.add_byte(cMSG_CHANNEL_OPEN)
        message.add_string(self._kind)
        message.add_int(number)
        message.add_int(WINDOW_BYTES)
        message.add_int(PACKET_BYTES)
        if self._destination is not None:
            message.add_string(self._destination[0])
            message.add_int(self._destination[1])
            message.add_string("127.0.0.1")
            message.add_int(0)
        try:
            transport._send_user_message(message)  # noqa: SLF001
        except paramiko.SSHException as error:  # keys were not exchanged in time, and nothing was sent
            if transport.is_active():
                self._withdraw(channel)
                self._settle(ChannelRefused(ChannelRefused.RESOURCE_SHORTAGE, str(error)))
        except (OSError, EOFError) as error:
            self._settle(TransportGone(str(error)))
        if not transport.is_active():
            self._settle(TransportGone("The SSH transport is not active."))

    def wait(self) -> SafeChannel:
        """Wait for the answer, however long it takes, and return the channel, which is the caller's from then on.

        Raises:
            ChannelRefused: The server refused.
            TransportGone: The transport ended.
            OpenAbandoned: `abandon` was called meanwhile.
        """
        self._settled.wait()
        with self._lock:
            answer, self._answer = self._answer, None
        if isinstance(answer, SafeChannel):
            answer.opening = self._channel = None  # else each would keep the other, and what the channel keeps
            return answer
        raise answer or OpenAbandoned("The open was abandoned.")

    def abandon(self) -> None:
        """Give the open up: `wait` raises at once, and a channel that opens after all is closed."""
        with self._lock:
            answer, self._answer = self._answer, None
            self._settled.set()
        if isinstance(answer, SafeChannel):
            _discard(answer)

    def set(self) -> None:
        """Take the answer, on the transport's thread: paramiko takes this object for an event."""
        channel = self._channel
        if channel is None:
            return
        if channel.active and not channel.transport_ended:
            self._settle(channel)
        else:
            self._settle(TransportGone("The SSH transport ended."))

    def refuse(self, code: int) -> None:
        """Take a refusal, on the transport's thread."""
        self._settle(ChannelRefused(code, CONNECTION_FAILED_CODE.get(code, "The server refused the channel.")))

    def _withdraw(self, channel: SafeChannel) -> None:
        """Take back what was registered for an answer that cannot come."""
        transport = cast("Any", self._transport)
        with transport.lock:
            transport.channel_events.pop(channel.chanid, None)
            transport._channels.delete(channel.chanid)  # noqa: SLF001

    def _settle(self, answer: SafeChannel | Exception) -> None:
        with self._lock:
            if not self._settled.is_set():
                self._answer = answer
                self._settled.set()
                return
        if isinstance(answer, SafeChannel):
            _discard(answer)


def _discard(channel: SafeChannel) -> None:
    """Close a channel that nobody uses, on a thread of its own since sending may block."""
    try:
        threading.Thread(target=channel.send_close, name="proxy_fsm-discard", daemon=True).start()
    except RuntimeError:
        # No thread can be started: there are too many, or the interpreter ends. This one may be the transport's own,
        # which would wait for itself while keys are exchanged; then the channel stays open, as long as the transport.
        # Otherwise it sends, though it may have to wait for a server that takes nothing, as paramiko's own CLOSE does.
        if cast("Any", channel.transport).clear_to_send.is_set():
            channel.send_close()


class EndWatch:
    """Calls back once when a transport ends, at once where it has ended; the call must be short.

    It costs no thread: the transport unlinks its channels when it ends, and this is one of them.
    """

    def __init__(self, transport: paramiko.Transport, callback: Callable[[], None]) -> None:
        self._transport = cast("Any", transport)
        with self._transport.lock:
            number = self._transport._next_channel()  # noqa: SLF001
            self._sentinel = _Sentinel(number, callback)
            self._transport._channels.put(number, self._sentinel)  # noqa: SLF001
        # A transport that winds up leaves this list, then unlinks its channels, then is no more active.
        if not transport.is_active() or transport not in cast("Any", paramiko.transport)._active_threads:  # noqa: SLF001
            self._sentinel._unlink()  # noqa: SLF001

    def cancel(self) -> None:
        """Call back no more."""
        self._sentinel.due.acquire(blocking=False)
        self._transport._channels.delete(self._sentinel.chanid)  # noqa: SLF001


class _Sentinel(paramiko.Channel):
    def __init__(self, chanid: int, callback: Callable[[], None]) -> None:
        super().__init__(chanid)
        self.callback = callback
        self.due = threading.Lock()  # taken by the one who calls back, or by who cancels it

    def _unlink(self) -> None:
        if self.due.acquire(blocking=False):
            self.callback()


def packets_received(transport: paramiko.Transport) -> int:
    """Return a number that changes whenever a packet has come from the server."""
    return cast("int", cast("Any", transport.packetizer)._Packetizer__sequence_number_in)  # noqa: SLF001


def why_ended(transport: paramiko.Transport) -> str:
    """Say that a transport ended, in a sentence, with paramiko's error where there was one."""
    error = cast("Any", transport).saved_exception
    return "The SSH connection ended" + (f": {error}." if error and str(error) else ".")


def set_nodelay(transport: paramiko.Transport) -> None:
    """Have the transport send small messages at once; a no-op where it does not run over TCP.

    Source: paramiko never sets it; opening a channel then takes 40 ms instead of less than one.
    """
    sock = transport.sock
    if isinstance(sock, socket.socket) and sock.family in {socket.AF_INET, socket.AF_INET6}:
        with suppress(OSError):  # it is closed: others will tell
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class _ReadingAhead(Packetizer):
    """Reads from the socket as much as there is, where paramiko's own asks for each header and each body by itself."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._sock = sock
        self._ahead = memoryview(bytearray(_AHEAD_BYTES))
        self._start = self._end = 0

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:  # noqa: FBT001, FBT002 - paramiko's signature
        """Return exactly so many bytes; waiting for them is as in paramiko."""
        held = self._end - self._start
        # What is left of reading the banner, and a packet that is longer than the buffer, are paramiko's to read.
        theirs = n > len(self._ahead) or self._Packetizer__remainder  # type: ignore[attr-defined]
        if held < n and not theirs:
            self._fill(n, check_rekey=check_rekey)
            held = n
        data = bytes(self._ahead[self._start : self._start + min(n, held)])
        self._start += len(data)
        return data if len(data) == n else data + super().read_all(n - len(data), check_rekey and not data)

    def _fill(self, count: int, *, check_rekey: bool) -> None:
        """Read until so many bytes are there, and what comes with them."""
        held = self._end - self._start
        self._ahead[:held] = self._ahead[self._start : self._end]
        self._start, self._end = 0, held
        while self._end < count:
            if self.handshake_timed_out():
                raise EOFError
            try:
                got = self._sock.recv_into(self._ahead[self._end :])
            except (TimeoutError, BlockingIOError):
                self._nothing_came(may_rekey=check_rekey and self._end == 0)
                continue
            except OSError as error:
                if self.closed:
                    raise EOFError from error
                raise
            if got == 0:
                raise EOFError
            self._end += got

    def _nothing_came(self, *, may_rekey: bool) -> None:
        if self.closed:
            raise EOFError
        if may_rekey and self.need_rekey():
            raise NeedRekeyException
        self._check_keepalive()  # type: ignore[attr-defined]


def fast_transport(sock: Any, **kwargs: Any) -> paramiko.Transport:
    """Make a transport set up for speed: AES-GCM first, TCP_NODELAY set, and reading ahead.

    Pass it as ``SSHClient.connect(transport_factory=fast_transport)``. Everything that runs over the connection gains,
    and nothing else changes: it is a plain ``paramiko.Transport``, and the other ciphers stay on offer. Reading ahead
    costs 256 KiB a transport; it is left out where the transport does not run over a socket (a ``ProxyCommand``, a
    channel of another connection). benchmarks/README.md has what it gains.

    Args:
        sock: A connected socket, or what else ``paramiko.Transport`` takes.
        kwargs: Passed on to ``paramiko.Transport``.
    """
    if isinstance(sock, socket.socket):
        kwargs.setdefault("packetizer_class", _ReadingAhead)
    transport = paramiko.Transport(sock, **kwargs)
    options = transport.get_security_options()
    fast = [cipher for cipher in _FAST_CIPHERS if cipher in options.ciphers]
    options.ciphers = (*fast, *(cipher for cipher in options.ciphers if cipher not in fast))
    set_nodelay(transport)
    return transport
