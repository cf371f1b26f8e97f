"""Opening channels: a request and, later, its answer; and the end of a transport, which unlinks its channels."""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Any, cast

import paramiko
import paramiko.transport
from paramiko.common import CONNECTION_FAILED_CODE, MSG_CHANNEL_OPEN_FAILURE, cMSG_CHANNEL_OPEN
from paramiko.message import Message

from proxy_fsm.ssh.channel import PACKET_BYTES, WINDOW_BYTES, SafeChannel
from proxy_fsm.ssh.errors import ChannelRefused, OpenAbandoned, TransportClosed
from proxy_fsm.ssh.fast import acknowledge, tcp_socket
from proxy_fsm.ssh.sending import DeferredSender
from proxy_fsm.text import excerpt

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ChannelOpening", "EndWatch", "packets_received", "why_ended"]

#: Of paramiko, for a server whose first lines are no SSH greeting.
_NO_GREETING = re.compile(r'Indecipherable protocol version "(?P<said>.*)"', re.DOTALL)


class _Refusals:
    """Handles refused opens: ours are passed to the open that they answer, the others to paramiko's handler."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._original = transport._handler_table[MSG_CHANNEL_OPEN_FAILURE]  # noqa: SLF001

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
            self._original(message)


class _DisconnectReader:
    """Keeps the text of the server's DISCONNECT message, which paramiko only logs."""

    def __init__(self, transport: Any) -> None:
        self._original = transport._parse_disconnect  # noqa: SLF001
        self.text = ""

    def __call__(self, message: Message) -> None:
        message.get_int()
        self.text = message.get_text()
        message.rewind()
        self._original(message)


def _read_disconnect(transport: Any) -> None:
    """Put a `_DisconnectReader` into a transport, once; call it under the transport's lock."""
    if not isinstance(transport._parse_disconnect, _DisconnectReader):  # noqa: SLF001
        transport._parse_disconnect = _DisconnectReader(transport)  # noqa: SLF001


def _install_hooks(transport: Any) -> None:
    """Put `DeferredSender` and `_Refusals` into a transport, once; call it under the transport's lock."""
    if not isinstance(transport._send_user_message, DeferredSender):  # noqa: SLF001
        transport._send_user_message = DeferredSender(transport)  # noqa: SLF001
    if not isinstance(transport._handler_table[MSG_CHANNEL_OPEN_FAILURE], _Refusals):  # noqa: SLF001
        transport._handler_table[MSG_CHANNEL_OPEN_FAILURE] = _Refusals(transport)  # noqa: SLF001


class ChannelOpening:
    """One request to open a channel, and its answer.

    Args:
        transport: An authenticated transport.
        kind: ``"direct-tcpip"``, or a kind that takes no destination.
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
        """Send the request; this may block while the server reads nothing, or during a key exchange.

        It raises nothing: `wait` reports the outcome.
        """
        transport = cast("Any", self._transport)
        if not transport.is_active():
            self._settle(TransportClosed("The SSH transport is not active."))
            return
        message = Message()
        with transport.lock:
            _install_hooks(transport)
            number = transport._next_channel()  # noqa: SLF001
            channel = self._channel = SafeChannel(number)
            channel.on_unlinked = self.set
            channel._set_transport(transport)  # noqa: SLF001
            channel._set_window(WINDOW_BYTES, PACKET_BYTES)  # type: ignore[attr-defined]  # noqa: SLF001
            transport._channels.put(number, channel)  # noqa: SLF001
            # The transport calls set() on this when the answer arrives, or when it ends.
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
        except paramiko.SSHException as error:  # the key exchange timed out, and nothing was sent
            if transport.is_active():
                self._withdraw(channel)
                self._settle(ChannelRefused(ChannelRefused.RESOURCE_SHORTAGE, str(error)))
        except (OSError, EOFError) as error:
            self._settle(TransportClosed(str(error)))
        if not transport.is_active():  # it is ending, and may have unlinked its channels before this one was added
            channel._unlink()  # noqa: SLF001

    def wait(self) -> SafeChannel:
        """Wait for the answer, however long it takes, and return the channel, which then belongs to the caller.

        Raises:
            ChannelRefused: The server refused.
            TransportClosed: The transport ended.
            OpenAbandoned: `abandon` was called.
        """
        self._settled.wait()
        with self._lock:
            answer, self._answer = self._answer, None
        if answer is not None and self._channel is not None:  # without an answer the channel may still open
            self._channel.on_unlinked = None  # else each would keep the other alive, and the buffers
            self._channel = None
        if isinstance(answer, SafeChannel):
            return answer
        raise answer or OpenAbandoned("The open was abandoned.")

    def abandon(self) -> None:
        """Give up: `wait` raises at once, and a channel that opens after all is closed."""
        with self._lock:
            answer, self._answer = self._answer, None
            self._settled.set()
        if isinstance(answer, SafeChannel):
            _discard(answer)

    # Called by the transport, on its own thread.

    def set(self) -> None:
        """Receive the answer: paramiko treats this object as an event."""
        channel = self._channel
        if channel is None:
            return
        if channel.active and not channel.transport_ended:
            self._settle(channel)
            acknowledge(tcp_socket(self._transport))  # the server may have something to send already
        else:
            # It may have been registered too late to be unlinked. Its entry in `channel_events` stays: the transport is
            # iterating over them.
            cast("Any", self._transport)._channels.delete(channel.chanid)  # noqa: SLF001
            self._settle(TransportClosed("The SSH transport ended."))

    def refuse(self, code: int) -> None:
        """Receive a refusal."""
        self._settle(ChannelRefused(code, CONNECTION_FAILED_CODE.get(code, "The server refused the channel.")))

    def _withdraw(self, channel: SafeChannel) -> None:
        """Unregister an open that can get no answer."""
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
    """Close an unused channel, on its own thread since sending may block."""
    channel.on_unlinked = None  # else each would keep the other alive
    try:
        threading.Thread(target=channel.send_close, name="proxy_fsm-discard", daemon=True).start()
    except RuntimeError:
        # No thread can be started: there are too many, or the interpreter is shutting down. This may be the transport's
        # own thread, which would wait for itself during a key exchange: then the channel stays open as long as the
        # transport. Otherwise it sends, though a server that reads nothing may block it, like paramiko's own CLOSE.
        if cast("Any", channel.transport).clear_to_send.is_set():
            channel.send_close()


class EndWatch:
    """Calls back once when a transport ends, at once if it has ended already; the callback must be short.

    It costs no thread: the transport unlinks its channels when it ends, and this is one of them.
    """

    def __init__(self, transport: paramiko.Transport, callback: Callable[[], None]) -> None:
        self._transport = cast("Any", transport)
        with self._transport.lock:
            _read_disconnect(self._transport)
            number = self._transport._next_channel()  # noqa: SLF001
            self._sentinel = _Sentinel(number, callback)
            self._transport._channels.put(number, self._sentinel)  # noqa: SLF001
        # On shutdown a transport leaves this list, then unlinks its channels, then becomes inactive.
        if not transport.is_active() or transport not in cast("Any", paramiko.transport)._active_threads:  # noqa: SLF001
            self._sentinel._unlink()  # noqa: SLF001

    def cancel(self) -> None:
        """Do not call back any more."""
        self._sentinel.fired.acquire(blocking=False)
        self._transport._channels.delete(self._sentinel.chanid)  # noqa: SLF001


class _Sentinel(paramiko.Channel):
    def __init__(self, chanid: int, callback: Callable[[], None]) -> None:
        super().__init__(chanid)
        self.callback = callback
        self.fired = threading.Lock()  # acquired once, to call back or to cancel

    def _unlink(self) -> None:
        if self.fired.acquire(blocking=False):
            self.callback()


def packets_received(transport: paramiko.Transport) -> int:
    """Return a number that changes whenever a packet arrives from the server."""
    return cast("int", cast("Any", transport.packetizer)._Packetizer__sequence_number_in)  # noqa: SLF001


def why_ended(transport: paramiko.Transport) -> str:
    """Return a sentence that says that a transport ended, and why if that is known.

    That is the text of the server's DISCONNECT message, or what it said instead of an SSH greeting, or else paramiko's
    error. What a server says is cut to 200 characters and made harmless.
    """
    reader = cast("Any", transport)._parse_disconnect  # noqa: SLF001
    if isinstance(reader, _DisconnectReader) and reader.text.strip():
        return f'The SSH connection ended: the server said "{excerpt(reader.text.strip())}".'
    error = str(cast("Any", transport).saved_exception or "").removesuffix(".")
    if (said := _said_instead(error)) is not None:
        return f'The SSH connection ended: instead of an SSH greeting the server said "{said}".'
    return "The SSH connection ended" + (f": {error}." if error else ".")


def _said_instead(error: str) -> str | None:
    """Return what a server said instead of an SSH greeting, made harmless; None for another error of paramiko's."""
    found = _NO_GREETING.fullmatch(error)
    return None if found is None else excerpt(found["said"].strip())
