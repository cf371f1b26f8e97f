"""An SSH server on 127.0.0.1, inside this process: for demos, and for tests of programs that use proxies.

It speaks real SSH (a paramiko server transport for each connection), forwards ``direct-tcpip`` channels to
loopback ports and answers ``exec`` requests from a table of functions. Faults are injected at run time::

    with LoopbackSSHServer() as server, server.connect() as client:
        server.forwarding = Forwarding.DENIED   # prohibit forwarding
        server.forwarding = Forwarding.HELD     # hold channel opens, until server.release()
        server.refuse_next(1)                   # as if nothing listened on the port
        server.freeze()                         # like a stopped sshd, until server.thaw()
        server.drop(reset=True)                 # like a killed sshd

How the faults are made: freezing and cutting act on the socket that paramiko is given (``_Link``), which needs
neither a copy of the data nor a thread in between. Holding puts the CHANNEL_OPEN message aside before paramiko
sees it, so that all other messages pass.
"""

from __future__ import annotations

import contextlib
import enum
import hmac
import ipaddress
import logging
import re
import secrets
import socket
import struct
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import paramiko
from paramiko.common import (
    AUTH_FAILED,
    AUTH_SUCCESSFUL,
    MSG_CHANNEL_REQUEST,
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_FAILED_CONNECT_FAILED,
    OPEN_FAILED_UNKNOWN_CHANNEL_TYPE,
    OPEN_SUCCEEDED,
    cMSG_DISCONNECT,
)

from proxy_fsm.ssh.framed import framed_output, script_in

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

__all__ = ["CommandHandler", "Forwarding", "LoopbackSSHServer"]

CommandHandler: TypeAlias = Callable[[str], tuple[int, bytes, bytes]]
"""Takes the whole command line; returns exit status, standard output and standard error."""

_CHUNK_BYTES = 64 * 1024
_ASSIGNMENTS = re.compile(r'^(\w+=("[^"]*"|[^"\s])* )+')
_DIAL_S = 2.0
_BY_APPLICATION = 11  # SSH_DISCONNECT_BY_APPLICATION of RFC 4253
_LOG_NAME = "proxy_fsm.testing.ssh_server"
_CONNECTION_ENDED = (OSError, EOFError, paramiko.SSHException)
"""What paramiko raises when a connection ends during a call; which of them is a race."""

# Faults are this server's purpose: without this, logging's last resort would print each of them.
logging.getLogger(_LOG_NAME).addHandler(logging.NullHandler())


class Forwarding(enum.StrEnum):
    """How the server answers requests for ``direct-tcpip`` channels."""

    ALLOWED = enum.auto()
    """Connects to the requested port if its address is a loopback one."""
    DENIED = enum.auto()
    """Refuses as administratively prohibited, as ``AllowTcpForwarding no`` does."""
    HELD = enum.auto()
    """Does not answer before `LoopbackSSHServer.release`; everything else on the connection is served."""


class LoopbackSSHServer:
    """An SSH server on a free port of 127.0.0.1 that accepts one user, with one generated key or a password.

    Attributes:
        host: Always ``127.0.0.1``.
        port: The port, from `start` on.
        host_key: The server's key, generated for each object.
        client_key: The private key that is accepted.
        username: The user who is accepted.
        password: The password that is accepted.
        commands: What ``exec`` requests can call: first word of the command line to function. An unknown word
            gives exit status 127. What `X2GoServer` runs in ``sh`` is found by its script's first word, and framed.
        forwarding: How further requests for ``direct-tcpip`` channels are answered.
        channels_opened: How many ``direct-tcpip`` channels were opened so far.
        sessions_opened: How many ``session`` channels were opened so far.
        probes: How many channels of an unknown type were refused so far, as a proxy's probes are.
    """

    host = "127.0.0.1"

    def __init__(
        self,
        *,
        username: str | None = None,
        password: str | None = None,
        commands: Mapping[str, CommandHandler] | None = None,
    ) -> None:
        """Generate the keys; nothing listens yet.

        Args:
            username: The accepted user; a random name by default.
            password: The accepted password; a random one by default.
            commands: See the attribute. Each function runs on its own thread; `stop` waits for its return.
        """
        self.port = 0
        self.host_key = paramiko.ECDSAKey.generate()
        self.client_key = paramiko.ECDSAKey.generate()
        self.username = username if username is not None else f"user-{secrets.token_hex(4)}"
        self.password = password if password is not None else secrets.token_hex(16)
        self.commands: Mapping[str, CommandHandler] = commands if commands is not None else {}
        self.forwarding = Forwarding.ALLOWED
        self.channels_opened = 0
        self.sessions_opened = 0
        self.probes = 0
        self._listener: socket.socket | None = None
        self._frozen = False
        self._connections: list[_Connection] = []
        self._shared = _Shared()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Listen and serve; `port` is known when this returns.

        Raises:
            RuntimeError: It is already started.
        """
        if self._listener is not None:
            raise RuntimeError("This server is already started: stop it first, or make another one.")
        self._listener = socket.create_server((self.host, 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self._shared.spawn(self._accept, self._listener)

    def stop(self) -> None:
        """Stop everything that was started: no thread and no socket is left. Idempotent."""
        if self._listener is None:
            return
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        with self._shared.changed:
            listener, self._listener = self._listener, None
            connections, self._connections = self._connections, []
            self._shared.held.clear()
        for connection in connections:
            connection.cut()
            connection.join()
            connection.cut()  # a forward whose target was connected meanwhile
        self._shared.join_threads()
        listener.close()

    def connect(self, **kwargs: Any) -> paramiko.SSHClient:
        """Return a client that is connected and logged in; the host key is pinned.

        Args:
            kwargs: For `paramiko.SSHClient.connect`; by default ``username``, ``client_key``, no agent.

        Returns:
            The client. It is the caller's to close.
        """
        client = paramiko.SSHClient()
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        client.get_host_keys().add(f"[{self.host}]:{self.port}", self.host_key.get_name(), self.host_key)
        options = {
            "username": self.username,
            "pkey": None if "password" in kwargs else self.client_key,
            "allow_agent": False,
            "look_for_keys": False,
        }
        try:
            client.connect(self.host, self.port, **(options | kwargs))
        except BaseException:
            client.close()
            raise
        return client

    def connect_transport(self) -> paramiko.Transport:
        """Return a client's transport that is connected and logged in; the host key is pinned.

        Returns:
            The transport with paramiko's defaults (no ``TCP_NODELAY``). It is the caller's to close.
        """
        transport = paramiko.Transport((self.host, self.port))
        try:
            transport.connect(hostkey=self.host_key, username=self.username, pkey=self.client_key)
        except BaseException:
            transport.close()
            raise
        return transport

    @property
    def channels_open(self) -> int:
        """How many ``direct-tcpip`` channels are open, or still deliver their last data."""
        with self._shared.changed:
            return sum(connection.channels for connection in self._connections)

    @property
    def channels_held(self) -> int:
        """How many channel opens wait for `release`."""
        with self._shared.changed:
            return len(self._shared.held)

    @property
    def connections(self) -> int:
        """How many SSH connections are open."""
        with self._shared.changed:
            return sum(not connection.has_ended for connection in self._connections)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Wait until a condition on this server's counters holds; it is checked whenever one has changed.

        Args:
            condition: For instance ``lambda: server.channels_open == 0``.
            timeout_s: How long to wait, seconds.

        Raises:
            TimeoutError: It did not hold in time.
        """
        with self._shared.changed:
            if not self._shared.changed.wait_for(condition, timeout_s):
                raise TimeoutError(f"The server did not meet the condition within {timeout_s} s.")

    def refuse_next(self, count: int) -> None:
        """Answer the next ``direct-tcpip`` opens with "connect failed", as when nothing listens on the port.

        Args:
            count: How many; 0 cancels an earlier call.
        """
        with self._shared.changed:
            self._shared.refusals = count

    def release(self, forwarding: Forwarding = Forwarding.ALLOWED) -> None:
        """Answer all held opens, in the order of their arrival, and all further ones.

        Args:
            forwarding: The answer.
        """
        with self._shared.changed:
            self.forwarding = forwarding
            held, self._shared.held = self._shared.held, []
        for connection, message in held:
            connection.answer(message)

    def drop(self, *, reset: bool = False) -> None:
        """Cut all SSH connections and what they forward, at once and without SSH_MSG_DISCONNECT; keep listening.

        Args:
            reset: Whether clients see a reset (TCP RST) instead of EOF.
        """
        with self._shared.changed:
            connections = list(self._connections)
        for connection in connections:
            connection.cut(reset=reset)

    def disconnect(self, text: str) -> None:
        """Send a DISCONNECT message on all SSH connections, as a server does that gives a reason, and cut them.

        Args:
            text: The reason.
        """
        with self._shared.changed:
            connections = list(self._connections)
        for connection in connections:
            message = paramiko.Message()
            message.add_byte(cMSG_DISCONNECT)
            message.add_int(_BY_APPLICATION)
            message.add_string(text)
            message.add_string("")
            connection.send_last(message)

    def freeze(self) -> None:
        """Neither read from nor write to any SSH connection, like a stopped sshd: they stay open but unanswered.

        Data already forwarded is delivered; new connections are accepted and get no banner.
        """
        self._set_frozen(frozen=True)

    def thaw(self) -> None:
        """Continue where `freeze` stopped; nothing is lost."""
        self._set_frozen(frozen=False)

    def _set_frozen(self, *, frozen: bool) -> None:
        with self._shared.changed:
            self._frozen = frozen
            for connection in self._connections:
                connection.link.set_frozen(frozen=frozen)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                accepted, _ = listener.accept()
            except OSError:
                return
            with self._shared.changed:
                if self._listener is not listener:
                    accepted.close()
                    return
                connection = _Connection(self, self._shared, _Link(accepted, frozen=self._frozen))
                self._connections = [each for each in self._connections if not each.has_ended] + [connection]
                connection.serve()
                self._shared.changed.notify_all()


class _Shared:
    """State shared by the server and its connections.

    Attributes:
        changed: Guards all counters; notified at each change.
        held: The channel opens that wait for an answer.
        refusals: How many of the next opens are refused.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.held: list[tuple[_Connection, paramiko.Message]] = []
        self.refusals = 0
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

    def take_refusal(self) -> bool:
        """Return whether this open is to be refused, and count it."""
        with self.changed:
            if self.refusals == 0:
                return False
            self.refusals -= 1
            return True

    def spawn(self, target: Callable[..., None], *args: object) -> None:
        """Run a function on a thread that `join_threads` waits for."""
        name = f"loopback-sshd-{target.__name__}"
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        with self.changed:
            self._threads.add(thread)
            thread.start()

    def join_threads(self) -> None:
        with self.changed:
            threads = list(self._threads)
        for thread in threads:
            thread.join()


class _Link(socket.socket):
    """A client's connection that can be frozen and cut while paramiko uses it.

    Frozen, it holds back every byte to and from paramiko, so that the kernel's buffers fill, as they do when a
    process is stopped.
    """

    def __init__(self, accepted: socket.socket, *, frozen: bool) -> None:
        super().__init__(fileno=accepted.detach())
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._flows = threading.Event()
        self._is_cut = False
        self.set_frozen(frozen=frozen)

    def set_frozen(self, *, frozen: bool) -> None:
        if frozen:
            self._flows.clear()
        if not frozen or self._is_cut:  # checked after clearing, so that a cut on another thread is not missed
            self._flows.set()

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        try:
            return super().recv(bufsize, flags)
        finally:
            self._flows.wait()
            if self._is_cut:
                raise EOFError

    def send(self, data: Any, flags: int = 0, /) -> int:
        self._flows.wait()
        if self._is_cut:
            raise BrokenPipeError
        return super().send(data, flags)

    def cut(self, *, reset: bool) -> None:
        """Make paramiko see EOF now; it then closes this socket itself, on its own thread."""
        self._is_cut = True
        with contextlib.suppress(OSError):  # it has already ended
            if reset:
                self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # Closing sends the reset; an earlier EOF would hide it.
            self.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
        self._flows.set()


class _Connection(paramiko.Transport):
    """The server's end of one SSH connection.

    Overrides three internals of paramiko (5.1): how an open is parsed (to hold it), where an opened channel goes
    (paramiko's queue needs a waiting thread, and may fail to wake it), and how a channel request is handled (a
    command must not end before its request is answered).

    Attributes:
        link: The socket.
        forwards: Its active forwards.
        has_ended: Whether the connection has ended, and its socket is closed.
    """

    def __init__(self, server: LoopbackSSHServer, shared: _Shared, link: _Link) -> None:
        super().__init__(link)
        self.set_log_channel(_LOG_NAME)
        self.add_server_key(server.host_key)
        self._channel_handler_table = {
            **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]  # noqa: SLF001 - see above
            MSG_CHANNEL_REQUEST: self._handle_channel_request,
        }
        self.link = link
        self.forwards: set[_Forward] = set()
        self._sessions: set[paramiko.Channel] = set()
        self.has_ended = False
        self._server = server
        self._shared = shared
        self._interface = _Interface(server, shared)

    @property
    def channels(self) -> int:
        """How many channels it forwards, or is about to forward."""
        return len(self.forwards) + len(self._interface.dialled)

    def serve(self) -> None:
        self.start_server(event=threading.Event(), server=self._interface)  # with an event it does not block

    def run(self) -> None:
        """Serve until the connection ends, then close everything."""
        super().run()
        with self._shared.changed:
            self.has_ended = True
            self._shared.held = [each for each in self._shared.held if each[0] is not self]
            channels = [*self._sessions, *(forward.channel for forward in self.forwards)]
            self._shared.changed.notify_all()
        for channel in channels:
            _close(channel)
        self._interface.close()

    def cut(self, *, reset: bool = False) -> None:
        """Cut the connection and all of its forwards."""
        self.link.cut(reset=reset)
        with self._shared.changed:
            forwards = list(self.forwards)
        for forward in forwards:
            forward.cut()

    def send_last(self, message: paramiko.Message) -> None:
        """Send a message, and end the connection."""
        with contextlib.suppress(*_CONNECTION_ENDED):
            self._send_message(message)  # type: ignore[attr-defined]
        self.cut()

    def answer(self, message: paramiko.Message) -> None:
        """Answer an open that was held."""
        if self.is_active():
            with contextlib.suppress(*_CONNECTION_ENDED):
                super()._parse_channel_open(message)  # type: ignore[misc]
        if self.has_ended:
            self._interface.close()

    def _parse_channel_open(self, message: paramiko.Message) -> None:
        kind = message.get_text()
        message.rewind()
        with self._shared.changed:
            if kind == "direct-tcpip" and self._server.forwarding is Forwarding.HELD:
                self._shared.held.append((self, message))
                self._shared.changed.notify_all()
                return
        super()._parse_channel_open(message)  # type: ignore[misc]

    def _queue_incoming_channel(self, channel: paramiko.Channel) -> None:
        with self._shared.changed:
            target = self._interface.dialled.pop(channel.get_id(), None)
            if target is None:
                self._sessions = {each for each in self._sessions if not each.closed} | {channel}
            else:
                forward = _Forward(channel, target)
                self.forwards.add(forward)
                self._shared.spawn(self._carry, forward)
        if self.has_ended:
            _close(channel)

    def _carry(self, forward: _Forward) -> None:
        forward.carry()
        with self._shared.changed:
            self.forwards.discard(forward)
            self._shared.changed.notify_all()

    def _handle_channel_request(self, channel: paramiko.Channel, message: paramiko.Message) -> None:
        channel._handle_request(message)  # type: ignore[attr-defined]  # noqa: SLF001 - see the class
        command = self._interface.commands.pop(channel.get_id(), None)
        if command is not None:
            self._shared.spawn(self._execute, channel, command)

    def _execute(self, channel: paramiko.Channel, command: str) -> None:
        script, mark = script_in(command) or (command, None)
        line = _ASSIGNMENTS.sub("", script)
        word = line.split(maxsplit=1)[0] if line.strip() else ""
        handler = self._server.commands.get(word)
        try:
            status, output, errors = (
                handler(line) if handler is not None else (127, b"", f"{word}: command not found\n".encode())
            )
            if mark is not None:
                output, errors = (framed_output(each, mark, status) for each in (output, errors))
            with contextlib.suppress(*_CONNECTION_ENDED):
                channel.sendall(output)
                channel.sendall_stderr(errors)
                channel.send_exit_status(status)
        finally:
            _close(channel)


class _Interface(paramiko.ServerInterface):
    """The server interface that paramiko requires, for one connection.

    Attributes:
        dialled: The connected sockets of channels that are about to be opened, by channel id.
        commands: The commands that are about to be run, by channel id.
    """

    def __init__(self, server: LoopbackSSHServer, shared: _Shared) -> None:
        self._server = server
        self._shared = shared
        self.dialled: dict[int, socket.socket] = {}
        self.commands: dict[int, str] = {}

    def close(self) -> None:
        """Close the sockets that were connected for channels that were never opened."""
        with self._shared.changed:
            while self.dialled:
                self.dialled.popitem()[1].close()
            self._shared.changed.notify_all()

    def get_allowed_auths(self, username: str) -> str:  # noqa: ARG002 - paramiko's signature
        return "publickey,password"

    def check_auth_password(self, username: str, password: str) -> int:
        known = _same(username, self._server.username) & _same(password, self._server.password)
        return AUTH_SUCCESSFUL if known else AUTH_FAILED

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        known = _same(username, self._server.username) & (key == self._server.client_key)
        return AUTH_SUCCESSFUL if known else AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:  # noqa: ARG002
        with self._shared.changed:
            if kind == "session":
                self._server.sessions_opened += 1
            else:
                self._server.probes += 1
            self._shared.changed.notify_all()
        return OPEN_SUCCEEDED if kind == "session" else OPEN_FAILED_UNKNOWN_CHANNEL_TYPE

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        self.commands[channel.get_id()] = command.decode(errors="replace")
        return True

    def check_channel_direct_tcpip_request(
        self,
        chanid: int,
        origin: tuple[str, int],  # noqa: ARG002
        destination: tuple[str, int],
    ) -> int:
        """Connect at once: the answer depends on whether the port listens, and on loopback that is instant."""
        if self._server.forwarding is Forwarding.DENIED or not _is_loopback(destination[0]):
            return OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED
        if self._shared.take_refusal():
            return OPEN_FAILED_CONNECT_FAILED
        try:
            target = socket.create_connection(destination, timeout=_DIAL_S)
        except OSError:
            return OPEN_FAILED_CONNECT_FAILED
        target.settimeout(None)
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._shared.changed:  # counted here, so that the count is right when the client's call returns
            self.dialled[chanid] = target
            self._server.channels_opened += 1
            self._shared.changed.notify_all()
        return OPEN_SUCCEEDED


class _Forward:
    """One ``direct-tcpip`` channel and the socket that it leads to.

    Each direction ends by itself and propagates its EOF (half-close); when both have ended, or the channel was
    closed, both ends are closed. The blocking calls provide the back-pressure.
    """

    def __init__(self, channel: paramiko.Channel, target: socket.socket) -> None:
        self.channel = channel  # paramiko closes a channel without references
        self._target = target
        self._delivered = threading.Event()

    def carry(self) -> None:
        """Relay both directions until both have ended."""
        to_client = threading.Thread(target=self._carry_to_client, name="loopback-sshd-_carry_to_client", daemon=True)
        to_client.start()
        self._carry_to_target()
        self._delivered.set()
        self.channel.recv_exit_status()  # none will arrive: this is how paramiko waits for the channel's end
        self.cut()
        to_client.join()
        self._target.close()

    def cut(self) -> None:
        """Shut down both directions of the socket; calls blocked on it return."""
        with contextlib.suppress(OSError):
            self._target.shutdown(socket.SHUT_RDWR)

    def _carry_to_target(self) -> None:
        with contextlib.suppress(*_CONNECTION_ENDED):
            while data := self.channel.recv(_CHUNK_BYTES):
                self._target.sendall(data)
            self._target.shutdown(socket.SHUT_WR)

    def _carry_to_client(self) -> None:
        with contextlib.suppress(*_CONNECTION_ENDED):
            while data := self._target.recv(_CHUNK_BYTES):
                self.channel.sendall(data)
        with contextlib.suppress(*_CONNECTION_ENDED):
            self.channel.shutdown_write()
        self._delivered.wait()
        _close(self.channel)


def _close(channel: paramiko.Channel) -> None:
    with contextlib.suppress(*_CONNECTION_ENDED):
        channel.close()


def _same(given: str, known: str) -> bool:
    return hmac.compare_digest(given.encode(), known.encode())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
