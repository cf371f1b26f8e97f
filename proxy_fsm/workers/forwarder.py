"""A local socket forwarded over SSH to the graphics port: a listener, and two relays per connection.

What ``ssh -L`` does. Data flow of a connection::

    proxy ── local socket ──► up relay ───► channel ──► agent
    proxy ◄── local socket ── down relay ◄── channel ◄── agent

Each relay is one blocking thread: a full receiver blocks the sender. EOF in one direction is passed on as EOF in that
direction. The channel is closed when both relays have ended, by the last of them.
"""

from __future__ import annotations

import errno
import itertools
import socket
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from proxy_fsm.errors import BackendError
from proxy_fsm.evidence import (
    AgentDataReceived,
    AgentEof,
    ChannelOpened,
    ConnectionEnded,
    PeerRejected,
    TransportEnded,
    TunnelClosed,
    WorkerCrashed,
    WorkerFailed,
)
from proxy_fsm.private_files import SOCKET_NAME
from proxy_fsm.reasons import EndReason
from proxy_fsm.ssh import ChannelOpening, ChannelRefused, OpenAbandoned, SafeChannel, TransportClosed, why_ended
from proxy_fsm.status import TunnelStats
from proxy_fsm.workers import peer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import paramiko

    from proxy_fsm.evidence import Observation

__all__ = ["Forwarder", "bind_listener"]

#: About how much of the proxy's data is read at once.
_READ_BYTES = 128 << 10
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.5
#: Errors of a process or machine that is short of descriptors or memory for a while.
_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_SHORTAGE_PAUSE_S = 0.1

_P = ParamSpec("_P")
_T = TypeVar("_T")


def bind_listener(kind: str, directory: Path) -> tuple[socket.socket, str]:
    """Return a listener and its address; see `Forwarder.bind`."""
    path = str(directory / SOCKET_NAME)
    listener = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
    try:
        listener.settimeout(None)  # whatever the program's default is
        listener.bind(path if kind == "unix" else ("127.0.0.1", 0))
        listener.listen(16)
    except BaseException:
        listener.close()
        raise
    return listener, path if kind == "unix" else f"127.0.0.1:{listener.getsockname()[1]}"


class Forwarder:
    """Forwards a local socket over a transport.

    Args:
        transport: Where channels are opened.
        destination: Host and port of the agent, as the server knows them.
        max_connections: How many connections are accepted before the listener is closed; None for any number.
        agent_connect_s: How long a refused channel is retried, in seconds.
        post: Receives what is observed, on any thread.
    """

    def __init__(
        self,
        transport: paramiko.Transport,
        destination: tuple[str, int],
        *,
        max_connections: int | None,
        agent_connect_s: float,
        post: Callable[[Observation], None],
    ) -> None:
        self.transport = transport
        self.destination = destination
        self.agent_connect_s = agent_connect_s
        self.post = post
        self.closing = threading.Event()
        self._max_connections = max_connections
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._accepting = False
        self._open: list[_Connection] = []
        self._closed_bytes_to_agent = 0  # by connections that have ended
        self._closed_bytes_from_agent = 0
        self._connections = 0
        self._opened_at: datetime | None = None
        self._closed_posted = False

    def bind(self, kind: str, directory: Path) -> str:
        """Bind the local end, so that connections are queued from now on.

        Args:
            kind: ``"unix"`` for a socket in the directory, ``"tcp"`` for a free port on 127.0.0.1.
            directory: A directory that no other user can enter.

        Returns:
            The socket's path, or ``127.0.0.1:PORT``.

        Raises:
            OSError: It cannot be bound.
        """
        self._listener, address = bind_listener(kind, directory)
        return address

    def start(self) -> None:
        """Accept connections from now on; returns at once."""
        with self._lock:
            if self.closing.is_set():
                return
            acceptor = threading.Thread(target=self._accept, name="proxy_fsm-tunnel", daemon=True)
            acceptor.start()  # it acquires this lock before it clears _accepting
            self._acceptor, self._accepting = acceptor, True

    def close(self) -> None:
        """Accept no more connections, and close each open one once what the proxy sent has been forwarded.

        Returns at once; `TunnelClosed` is posted when all are closed. Over TCP, if the system does not report how
        much the proxy sent, it waits until the proxy closes: then `abort` has to follow.
        """
        with self._lock:
            self.closing.set()
            listener, accepting, connections = self._listener, self._accepting, tuple(self._open)
        if listener is not None:
            with suppress(OSError):  # it was closed after the last connection
                listener.shutdown(socket.SHUT_RDWR)
            if not accepting:
                listener.close()
        for connection in connections:
            connection.finish()
        self._post_if_closed()

    def abort(self) -> None:
        """After `close`: close the open connections without waiting for data in flight."""
        with self._lock:
            connections = tuple(self._open)
        for connection in connections:
            connection.abort()

    def unreleased(self) -> tuple[str, ...]:
        """Return what has not been released yet, human-readable."""
        with self._lock:
            return tuple(f"channel {connection.number} of the tunnel" for connection in self._open)

    def threads(self) -> tuple[threading.Thread, ...]:
        """Return the threads that run here."""
        with self._lock:
            acceptor = () if self._acceptor is None else (self._acceptor,)
            return (*acceptor, *(thread for connection in self._open for thread in connection.threads))

    def stats(self) -> TunnelStats:
        """Return what was forwarded so far."""
        with self._lock:
            return TunnelStats(
                bytes_to_agent=self._closed_bytes_to_agent + sum(c.bytes_to_agent for c in self._open),
                bytes_from_agent=self._closed_bytes_from_agent + sum(c.bytes_from_agent for c in self._open),
                opened_at=self._opened_at,
                connections=self._connections,
            )

    def connection_opened(self, connection: _Connection) -> None:
        """Count an opened channel, and post `ChannelOpened`."""
        with self._lock:
            self._connections += 1
            self._opened_at = self._opened_at or datetime.now(UTC)
        self.post(ChannelOpened(connection.number))

    def connection_closed(self, connection: _Connection) -> None:
        """Post `ConnectionEnded`, and forget the connection."""
        if connection.opened_at is not None:
            duration_s = time.monotonic() - connection.opened_at
            self.post(
                ConnectionEnded(connection.number, connection.bytes_to_agent, connection.bytes_from_agent, duration_s)
            )
        with self._lock:  # posted first: this may be the last connection, and nothing follows TunnelClosed
            self._open.remove(connection)
            self._closed_bytes_to_agent += connection.bytes_to_agent
            self._closed_bytes_from_agent += connection.bytes_from_agent
        self._post_if_closed()

    def _post_if_closed(self) -> None:
        with self._lock:
            if self._closed_posted or not self.closing.is_set() or self._accepting or self._open:
                return
            self._closed_posted = True
        self.post(TunnelClosed())

    def _accept(self) -> None:
        listener = self._listener
        assert listener is not None  # noqa: S101 - start() comes after bind()
        last: _Connection | None = None
        try:
            for number in itertools.count(1):
                local = self._accept_own(listener)
                connection = None if local is None else self._register(local, number)
                if connection is None:
                    return
                if number == self._max_connections:
                    last = connection
                    break
                connection.start()
        except Exception as error:  # noqa: BLE001 - whatever it was, the owner has to know
            self.post(WorkerCrashed("tunnel listener", error))
        finally:
            listener.close()
            with self._lock:
                self._accepting = False
            self._post_if_closed()
        if last is not None:
            last.run()  # the last connection allowed is served by this thread

    def _accept_own(self, listener: socket.socket) -> socket.socket | None:
        """Return the next connection of our own user; None if the listener was shut down."""
        while True:
            try:
                local, _ = self._retry_on_shortage(listener.accept)
            except ConnectionAbortedError:  # the client disconnected before accept
                continue
            except OSError:
                if self.closing.is_set():
                    return None
                raise
            try:
                user = self._retry_on_shortage(peer.foreign_user_of, local)
            except OSError as error:  # an unknown user is rejected
                user = f"user unknown ({error.strerror or error})"
            if user is None:
                return local
            local.close()
            if self.closing.is_set():
                return None
            self.post(PeerRejected(user))

    def _retry_on_shortage(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Retry a function while the machine is short of descriptors or memory, until this is closed."""
        while True:
            try:
                return function(*args, **kwargs)
            except OSError as error:
                if error.errno not in _SHORTAGES or self.closing.wait(_SHORTAGE_PAUSE_S):
                    raise

    def _register(self, local: socket.socket, number: int) -> _Connection | None:
        connection = _Connection(self, local, number)
        with self._lock:
            if not self.closing.is_set():
                self._open.append(connection)
                return connection
        local.close()
        return None


class _Connection:
    """One connection of the proxy: its local socket, its channel, its two relays."""

    def __init__(self, forwarder: Forwarder, local: socket.socket, number: int) -> None:
        self.number = number
        self.bytes_to_agent = 0
        self.opened_at: float | None = None
        self.threads: list[threading.Thread] = []
        self._forwarder = forwarder
        self._local = local
        self._channel: SafeChannel | None = None
        self._opening: ChannelOpening | None = None
        self._lock = threading.Lock()
        self._relays = 1
        self._up_done = False
        self._bytes_to_flush: int | None = None  # closed after so many, though the proxy may send more
        self._closed_here = False  # by the proxy or by us, before the agent
        self._loss_posted = False
        local.settimeout(None)  # whatever the program's default is
        if local.family == socket.AF_INET:
            local.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def bytes_from_agent(self) -> int:
        """How much was written to the local socket."""
        return 0 if self._channel is None else self._channel.delivered_bytes

    def start(self) -> None:
        """Serve the connection on a thread of its own."""
        thread = threading.Thread(target=self.run, name="proxy_fsm-up", daemon=True)
        try:
            thread.start()
        except BaseException:
            self._end_relay()
            raise
        self.threads.append(thread)

    def run(self) -> None:
        """Open the channel, relay both ways, and leave nothing behind."""
        try:
            channel = self._channel = self._open_channel()
            if channel is None:
                return
            self.opened_at = time.monotonic()
            self._forwarder.connection_opened(self)
            down = threading.Thread(target=self._down, args=(channel,), name="proxy_fsm-down", daemon=True)
            self._relays = 2
            try:
                down.start()
            except BaseException:
                self._relays = 1
                raise
            self.threads.append(down)
            self._up(channel)
        except Exception as error:  # noqa: BLE001 - whatever it was, the owner has to know
            self._forwarder.post(WorkerCrashed("tunnel", error))
        finally:
            self._end_relay()

    def finish(self) -> None:
        """Forward what the proxy has sent, then close."""
        with self._lock:
            opening, channel, up_done = self._opening, self._channel, self._up_done
        if opening is not None:
            opening.abandon()
        if channel is not None and up_done:
            channel.close()
        with self._lock, suppress(OSError):  # it is closed already
            all_received = self._local.family == socket.AF_UNIX  # over TCP some data may be in flight
            if not all_received and self._bytes_to_flush is None:
                self._bytes_to_flush = peer.written_bytes(self._local)
            if all_received or self._upload_flushed():
                self._local.shutdown(socket.SHUT_RD)  # what was received before can still be read, then EOF follows

    def _upload_flushed(self) -> bool:
        """Return whether all that the proxy had sent before `finish` has been forwarded to the agent.

        `finish` sets the target and then reads the counter, the relay counts and then reads the target: one of the two
        sees the other.
        """
        return self._bytes_to_flush is not None and self.bytes_to_agent >= self._bytes_to_flush

    def abort(self) -> None:
        """Close without waiting for data in flight."""
        self._closed_here = True
        with self._lock, suppress(OSError):  # it is closed already
            self._local.shutdown(socket.SHUT_RDWR)
        if self._channel is not None:
            self._channel.close()

    def _open_channel(self) -> SafeChannel | None:
        forwarder = self._forwarder
        began = time.monotonic()
        deadline = began + forwarder.agent_connect_s
        pause_s = _FIRST_PAUSE_S
        while True:
            opening = ChannelOpening(forwarder.transport, "direct-tcpip", forwarder.destination)
            with self._lock:
                self._opening = opening
            if forwarder.closing.is_set():
                return None
            try:
                opening.send()
                return opening.wait()
            except (TransportClosed, OpenAbandoned):
                return None  # posted by the transport's monitor, or requested by the owner
            except ChannelRefused as refused:
                error = self._error_of(refused, time.monotonic() - began, give_up=time.monotonic() >= deadline)
            finally:
                with self._lock:
                    self._opening = None
            if error is not None:
                forwarder.post(WorkerFailed(error))
                return None
            if forwarder.closing.wait(min(pause_s, max(0.0, deadline - time.monotonic()))):
                return None
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _error_of(self, refused: ChannelRefused, after_s: float, *, give_up: bool) -> BackendError | None:
        """Return the error that a refusal means; None if a retry may help."""
        target = f"{self._forwarder.destination[0]}:{self._forwarder.destination[1]}"
        if refused.code in {ChannelRefused.PROHIBITED, ChannelRefused.UNKNOWN_TYPE}:
            return BackendError(
                EndReason.FORWARDING_DENIED,
                f"The SSH server does not allow forwarding to {target} ({refused}).",
            )
        if not give_up:
            return None
        return BackendError(
            EndReason.AGENT_UNREACHABLE,
            f"The SSH server could not connect to {target} for {after_s:.1f} s: nothing listens there ({refused})."
            if refused.code == ChannelRefused.CONNECT_FAILED
            else f"No channel to {target} could be opened for {after_s:.1f} s ({refused}).",
        )

    def _up(self, channel: SafeChannel) -> None:
        try:
            # Whole messages, so that none is sent nearly empty; the server decides how long they may be.
            size = min(channel.message_bytes, _READ_BYTES)
            buffer = memoryview(bytearray(_READ_BYTES // size * size))
            while not self._upload_flushed() and (count := self._local.recv_into(buffer)):
                data = buffer[:count]
                while data:
                    sent = channel.send(data)
                    if sent == 0:
                        return  # closed by the other side
                    self.bytes_to_agent += sent
                    data = data[sent:]
            self._closed_here = True
            channel.shutdown_write()
        except TransportClosed:  # the transport's own thread may not have noticed yet
            self._closed_here = True
            self._post_if_lost(channel, lost=True)
            channel.close()  # which ends the other relay
        except OSError:
            if not channel.closed:
                self._closed_here = True
            channel.close()  # either side was reset, which ends the other relay
        finally:
            self._post_if_lost(channel)
            with self._lock:
                self._up_done = True
            self._discard_local_input()
            if self._forwarder.closing.is_set():
                channel.close()

    def _discard_local_input(self) -> None:
        """Unblock a proxy that is in the middle of a write, and does not read: discard what it writes."""
        with suppress(OSError):  # it is closed
            self._local.shutdown(socket.SHUT_RD)
            while self._local.recv(_READ_BYTES):  # a blocked writer wakes up only once there is room
                pass

    def _down(self, channel: SafeChannel) -> None:
        forwarder = self._forwarder
        try:
            channel.deliver(self._local, lambda: forwarder.post(AgentDataReceived(self.number)))
            self._post_if_lost(channel)
            if not (channel.transport_ended or self._closed_here or forwarder.closing.is_set()):
                forwarder.post(AgentEof(self.number))
            self._local.shutdown(socket.SHUT_WR)
            channel.ended.wait()
        except TransportClosed:
            self._post_if_lost(channel, lost=True)
            channel.close()
        except OSError:
            channel.close()  # the proxy closed, which ends the other relay
        finally:
            self._post_if_lost(channel)
            with suppress(OSError):  # the proxy closed first
                self._local.shutdown(socket.SHUT_RDWR)
            self._end_relay()

    def _post_if_lost(self, channel: SafeChannel, *, lost: bool = False) -> None:
        """Post once that the transport ended, before the proxy can notice it: the first cause counts."""
        with self._lock:  # held while posting, so that the other relay cannot shut the socket down first
            if (lost or channel.transport_ended) and not self._loss_posted:
                self._loss_posted = True
                self._forwarder.post(TransportEnded(why_ended(self._forwarder.transport)))

    def _end_relay(self) -> None:
        """Count a relay as ended; the last one closes the connection."""
        with self._lock:
            self._relays -= 1
            if self._relays > 0:
                return
        if self._channel is not None:
            self._channel.send_close()
        with self._lock:
            self._local.close()
        self._forwarder.connection_closed(self)
