"""Every byte arrives, every EOF is passed on, every fault is posted once, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import select
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm.evidence import (
    AgentDataReceived,
    AgentEof,
    ChannelOpened,
    ConnectionEnded,
    Observation,
    PeerRejected,
    TransportEnded,
    TunnelClosed,
    WorkerCrashed,
    WorkerFailed,
)
from proxy_fsm.private_files import MAX_SOCKET_PATH_BYTES
from proxy_fsm.reasons import EndReason
from proxy_fsm.ssh import WINDOW_BYTES, ChannelOpening, ChannelRefused, SafeChannel, set_nodelay
from proxy_fsm.status import TunnelStats
from proxy_fsm.testing import Forwarding, LoopbackSSHServer
from proxy_fsm.workers import forwarder, peer
from proxy_fsm.workers.forwarder import Forwarder
from tests.helpers.agent import Agent, dead_port
from tests.helpers.holdings import descriptors, nothing_left_open, threads_ended
from tests.helpers.inbox import Inbox
from tests.helpers.sockets import LOOPBACK, connect_local, read_all, reset, same
from tests.helpers.task import Task
from tests.helpers.wait import WAIT_S, eventually, since

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import paramiko

KINDS = pytest.mark.parametrize("kind", ["unix", "tcp"])
NOBODY = 65534
NEEDS_ANOTHER_USER = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("bash") is None, reason="needs root, to be another user, and bash, to connect"
)


@pytest.fixture(scope="module")
def shared_server() -> Iterator[LoopbackSSHServer]:
    with LoopbackSSHServer() as running:
        yield running


@pytest.fixture
def server(shared_server: LoopbackSSHServer) -> Iterator[LoopbackSSHServer]:
    """The server, reset to no faults and fresh counters for each test."""
    shared_server.release()
    shared_server.refuse_next(0)
    shared_server.channels_opened = 0
    yield shared_server
    shared_server.thaw()
    shared_server.release()


@pytest.fixture
def transport(server: LoopbackSSHServer) -> Iterator[paramiko.Transport]:
    with closing(server.connect_transport()) as connected:
        set_nodelay(connected)
        yield connected


@pytest.fixture
def agent() -> Iterator[Agent]:
    with Agent() as listening:
        yield listening


class Tunnel:
    """A forwarder, what it posts, and the local connections to it."""

    def __init__(
        self,
        transport: paramiko.Transport,
        directory: Path,
        port: int,
        *,
        kind: str = "unix",
        max_connections: int | None = 1,
        agent_connect_s: float = 30,
        post: Callable[[Observation], None] | None = None,
    ) -> None:
        self.inbox = Inbox()
        self.kind = kind
        self.forwarder = Forwarder(
            transport,
            (LOOPBACK, port),
            max_connections=max_connections,
            agent_connect_s=agent_connect_s,
            post=post or self.inbox.post,
        )
        self.address = self.forwarder.bind(kind, directory)
        self._locals: list[socket.socket] = []

    def connect(self) -> socket.socket:
        local = connect_local(self.kind, self.address)
        self._locals.append(local)
        return local

    def send_until_stuck(self, sock: socket.socket, limit_bytes: int = 256 << 20) -> int:
        """Send until the tunnel is stalled, return how much was sent.

        A pause alone may be due to a slow machine: a window, or the connection, must be full too, and no data may move
        in between.
        """
        sock.settimeout(0.1)
        sent = quiet = 0
        before = None
        accepted_at = time.monotonic()
        while sent < limit_bytes and quiet < 5:
            try:
                sent += sock.send(bytes(1 << 16))
                quiet, accepted_at = 0, time.monotonic()
            except TimeoutError:
                now = self.forwarder.stats(), [len(channel.in_buffer) for channel in self._channels()]
                quiet = quiet + 1 if self._is_full() and now == before else 0
                before = now
                assert since(accepted_at) < WAIT_S, "nothing is accepted, and nothing is full"
        sock.settimeout(WAIT_S)
        return sent

    def _channels(self) -> list[SafeChannel]:
        return [each._channel for each in self.forwarder._open if each._channel is not None]

    def _is_full(self) -> bool:
        return not accepts_bytes(self.forwarder.transport) or any(
            # The server's window is used up, or most of ours is.
            channel.out_window_size == 0 or len(channel.in_buffer) > WINDOW_BYTES // 2
            for channel in self._channels()
        )

    def end(self) -> None:
        """Close, abort, and check that `TunnelClosed` is posted last, and that nothing is left."""
        threads = self.forwarder.threads()
        self.forwarder.close()
        self.forwarder.abort()
        self.inbox.wait(TunnelClosed)
        for thread in threads:
            thread.join(WAIT_S)
        for local in self._locals:
            local.close()
        self.forwarder.close()
        assert self.inbox.kinds().count(TunnelClosed) == 1
        assert self.inbox.kinds()[-1] is TunnelClosed
        assert self.forwarder.threads() == () or not any(thread.is_alive() for thread in self.forwarder.threads())
        assert self.forwarder.unreleased() == ()


@contextmanager
def tunnel(*args: Any, start: bool = True, **kwargs: Any) -> Iterator[Tunnel]:
    made = Tunnel(*args, **kwargs)
    try:
        if start:
            made.forwarder.start()
        yield made
    finally:
        made.end()


@contextmanager
def connected(
    transport: paramiko.Transport, directory: Path, agent: Agent, **kwargs: Any
) -> Iterator[tuple[Tunnel, socket.socket, socket.socket]]:
    """A tunnel with one connection: the tunnel, the proxy's end, the agent's end."""
    with tunnel(transport, directory, agent.port, **kwargs) as made:
        local = made.connect()
        peer = agent.accept()
        made.inbox.wait(ChannelOpened)
        yield made, local, peer


def accepts_bytes(transport: paramiko.Transport) -> bool:
    """Return whether the system accepts more data for the SSH connection."""
    return bool(select.select([], [transport.sock], [], 0)[1])


def pour(sock: socket.socket) -> None:
    """Send until the other end closes."""
    with suppress(OSError):
        while True:
            sock.sendall(bytes(1 << 16))


# ---- the local end ----


class TestBind:
    def test_unix_listener_is_a_socket_in_the_directory(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with tunnel(transport, tmp_path, agent.port) as made:
            assert Path(made.address).parent == tmp_path
            assert stat.S_ISSOCK(Path(made.address).stat().st_mode)

    def test_tcp_listener_is_on_the_loopback_address_alone(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with tunnel(transport, tmp_path, agent.port, kind="tcp") as made:
            host, _, port = made.address.rpartition(":")
            assert host == "127.0.0.1"
            assert int(port) > 0
            assert not list(tmp_path.iterdir())

    def test_too_long_path_is_an_error_and_not_cut(self, transport: paramiko.Transport, tmp_path: Path) -> None:
        unbound = Forwarder(transport, (LOOPBACK, 9), max_connections=1, agent_connect_s=1, post=Inbox().post)
        with tempfile.TemporaryDirectory(dir="/tmp") as short:
            fits = MAX_SOCKET_PATH_BYTES - len(os.fsencode(short)) - len("//proxy.sock")
            directory = Path(short, "d" * (fits + 1))
            directory.mkdir()
            with pytest.raises(OSError, match="path too long"):
                unbound.bind("unix", directory)
            longest = Path(short, "d" * fits)
            longest.mkdir()
            with tunnel(transport, longest, 9) as made:
                assert len(made.address) == MAX_SOCKET_PATH_BYTES
                made.connect()
        assert not list(tmp_path.iterdir())

    def test_path_length_is_counted_in_bytes(self, transport: paramiko.Transport, tmp_path: Path) -> None:
        unbound = Forwarder(transport, (LOOPBACK, 9), max_connections=1, agent_connect_s=1, post=Inbox().post)
        directory = tmp_path / ("ü" * 45)
        directory.mkdir()
        with pytest.raises(OSError, match="path too long"):
            unbound.bind("unix", directory)

    def test_missing_directory_is_an_error_and_leaves_no_descriptor(
        self, transport: paramiko.Transport, tmp_path: Path
    ) -> None:
        unbound = Forwarder(transport, (LOOPBACK, 9), max_connections=1, agent_connect_s=1, post=Inbox().post)
        before = descriptors()
        with pytest.raises(FileNotFoundError):
            unbound.bind("unix", tmp_path / "nowhere")
        nothing_left_open(before)

    @KINDS
    def test_connection_before_the_start_is_served_after_it(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent, kind: str
    ) -> None:
        with tunnel(transport, tmp_path, agent.port, kind=kind, start=False) as made:
            local = made.connect()
            local.sendall(b"early")
            made.forwarder.start()
            assert agent.accept().recv(99) == b"early"


# ---- bytes ----


def send_all(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


class TestBytes:
    def test_32_mib_each_way_at_once_arrive_unchanged(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        up, down = os.urandom(32 << 20), os.urandom(32 << 20)
        with connected(transport, tmp_path, agent) as (made, local, peer):
            writers = [Task(send_all, local, up), Task(send_all, peer, down)]
            readers = [Task(read_all, peer), Task(read_all, local)]
            received = [reader.result(50) for reader in readers]
            for writer in writers:
                writer.result()
            made.inbox.wait(ConnectionEnded)
            assert made.forwarder.stats().bytes_to_agent == made.forwarder.stats().bytes_from_agent == 32 << 20
        same(received[0], up)
        same(received[1], down)


class TestBackPressure:
    def test_proxy_that_reads_nothing_stops_the_agent_within_the_window(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with connected(transport, tmp_path, agent) as (made, local, peer):
            sent = made.send_until_stuck(peer)
            assert sent < 64 << 20, "the agent was stopped"
            channel = made.forwarder._open[0]._channel
            assert channel is not None
            assert 0 < len(channel.in_buffer) <= WINDOW_BYTES
            peer.shutdown(socket.SHUT_WR)
            assert len(read_all(local)) == sent
            local.close()
            server.wait_for(lambda: server.channels_open == 0)

    def test_agent_that_reads_nothing_stops_the_proxy(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with connected(transport, tmp_path, agent) as (made, local, peer):
            sent = made.send_until_stuck(local)
            assert sent < 64 << 20, "the proxy was stopped"
            local.shutdown(socket.SHUT_WR)
            assert len(read_all(peer)) == sent
            assert made.forwarder.stats().bytes_to_agent == sent

    def test_stalled_connection_does_not_block_another(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with connected(transport, tmp_path, agent, max_connections=2) as (made, _, peer):
            made.send_until_stuck(peer)
            other = made.connect()
            other.sendall(b"question")
            other_peer = agent.accept()
            assert other_peer.recv(99) == b"question"
            other_peer.sendall(b"answer")
            assert other.recv(99) == b"answer"


# ---- ends ----


@KINDS
class TestHalfClose:
    def test_proxys_eof_is_passed_on_and_the_agent_may_still_send(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent, kind: str
    ) -> None:
        with connected(transport, tmp_path, agent, kind=kind) as (made, local, peer):
            local.sendall(b"question")
            local.shutdown(socket.SHUT_WR)
            assert read_all(peer) == b"question"
            peer.sendall(b"answer")
            peer.shutdown(socket.SHUT_WR)
            assert read_all(local) == b"answer"
            made.inbox.wait(ConnectionEnded)

    def test_agents_eof_is_passed_on_and_the_proxy_may_still_send(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent, kind: str
    ) -> None:
        with connected(transport, tmp_path, agent, kind=kind) as (made, local, peer):
            peer.sendall(b"greeting")
            peer.shutdown(socket.SHUT_WR)
            assert read_all(local) == b"greeting"
            made.inbox.wait(AgentEof)
            local.sendall(b"farewell")
            local.close()
            assert read_all(peer) == b"farewell"
            made.inbox.wait(ConnectionEnded)

    def test_proxy_that_closes_without_data_ends_the_connection(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent, kind: str
    ) -> None:
        with connected(transport, tmp_path, agent, kind=kind) as (made, local, peer):
            local.close()
            assert read_all(peer) == b""
            peer.close()
            made.inbox.wait(ConnectionEnded)
            server.wait_for(lambda: server.channels_open == 0)


class TestAgentEnds:
    @KINDS
    def test_agents_close_is_posted_and_the_proxy_gets_eof(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent, kind: str
    ) -> None:
        with connected(transport, tmp_path, agent, kind=kind) as (made, local, peer):
            peer.close()
            assert made.inbox.wait(AgentEof).connection == 1
            assert read_all(local) == b""
            local.close()
            made.inbox.wait(ConnectionEnded)

    def test_agents_reset_is_posted_and_the_proxy_gets_eof(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with connected(transport, tmp_path, agent) as (made, local, peer):
            reset(peer)
            made.inbox.wait(AgentEof)
            assert read_all(local) == b""
            local.close()
            made.inbox.wait(ConnectionEnded)
            server.wait_for(lambda: server.channels_open == 0)
        assert transport.is_active()

    def test_proxy_that_writes_and_never_reads_notices_the_agents_reset(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        """Otherwise it would hang in its write, the down relay in its own, and neither would ever end."""
        with connected(transport, tmp_path, agent) as (made, local, peer):
            peer.sendall(bytes(3 << 20))  # more than the local socket holds, less than the window
            channel = made.forwarder._open[0]._channel
            assert channel is not None
            eventually(lambda: len(channel.in_buffer) > 1 << 20)
            reset(peer)
            with pytest.raises(BrokenPipeError):
                local.sendall(bytes(256 << 20))

    @KINDS
    def test_agents_close_in_answer_to_the_proxys_is_not_posted(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent, kind: str
    ) -> None:
        with connected(transport, tmp_path, agent, kind=kind) as (made, local, peer):
            local.close()
            assert read_all(peer) == b""
            peer.close()
            made.inbox.wait(ConnectionEnded)
            assert made.inbox.kinds() == [ChannelOpened, ConnectionEnded]


class TestProxyResets:
    def test_reset_over_tcp_ends_the_connection_and_is_not_blamed_on_the_agent(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with connected(transport, tmp_path, agent, kind="tcp") as (made, local, peer):
            reset(local)
            assert read_all(peer) == b""
            server.wait_for(lambda: server.channels_open == 0)
            made.inbox.wait(ConnectionEnded)
            assert made.inbox.kinds() == [ChannelOpened, ConnectionEnded]
        assert transport.is_active()

    def test_killed_proxy_with_bytes_unread_is_not_blamed_on_the_agent(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        """A unix socket that is closed with bytes unread is reset."""
        with connected(transport, tmp_path, agent) as (made, local, peer):
            peer.sendall(b"never read")
            eventually(lambda: made.forwarder.stats().bytes_from_agent)
            local.close()
            assert read_all(peer) == b""
            server.wait_for(lambda: server.channels_open == 0)
            made.inbox.wait(ConnectionEnded)
            assert made.inbox.kinds() == [ChannelOpened, AgentDataReceived, ConnectionEnded]

    def test_proxy_that_closes_during_a_flood_frees_everything(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with connected(transport, tmp_path, agent) as (made, local, peer):
            made.send_until_stuck(peer)
            local.close()
            made.inbox.wait(ConnectionEnded)
            server.wait_for(lambda: server.channels_open == 0)
            assert made.inbox.kinds() == [ChannelOpened, AgentDataReceived, ConnectionEnded]


def test_server_that_accepts_endless_messages_costs_no_memory(
    transport: paramiko.Transport, tmp_path: Path, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SafeChannel, "message_bytes", 1 << 50)
    with connected(transport, tmp_path, agent) as (_, local, peer):
        local.sendall(b"forwarded")
        assert peer.recv(9) == b"forwarded"


class TestTransportEnds:
    @pytest.mark.parametrize("end", ["dropped", "reset", "closed by the caller"])
    def test_connection_ends_and_the_agent_is_not_blamed(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent, end: str
    ) -> None:
        with connected(transport, tmp_path, agent) as (made, local, _):
            if end == "closed by the caller":
                transport.close()
            else:
                server.drop(reset=end == "reset")
            assert read_all(local) == b""
            made.inbox.wait(ConnectionEnded)
            assert made.inbox.kinds() == [ChannelOpened, TransportEnded, ConnectionEnded]

    def test_end_during_an_upload_is_not_blamed_on_the_agent(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        """The sender may notice the end of the transport before the transport's own thread does."""
        with connected(transport, tmp_path, agent) as (made, local, peer):
            reader = Task(lambda: [None for _ in iter(lambda: peer.recv(1 << 20), b"")])

            def upload() -> None:
                with suppress(OSError):
                    while True:
                        local.sendall(bytes(1 << 16))

            uploader = Task(upload)
            eventually(lambda: made.forwarder.stats().bytes_to_agent > 1 << 20)
            server.drop(reset=True)
            uploader.result()
            made.inbox.wait(ConnectionEnded)
            assert made.inbox.kinds() == [ChannelOpened, TransportEnded, ConnectionEnded]
            with suppress(OSError):
                reader.result()

    @pytest.mark.parametrize(
        "send",
        [
            pytest.param(lambda local, _: local.sendall(b"x"), id="data"),
            pytest.param(lambda local, _: local.shutdown(socket.SHUT_WR), id="the end of the data"),
            pytest.param(lambda _, peer: peer.sendall(bytes(2 << 20)), id="room for more"),
        ],
    )
    def test_relay_that_fails_to_send_posts_the_end(
        self,
        transport: paramiko.Transport,
        tmp_path: Path,
        agent: Agent,
        monkeypatch: pytest.MonkeyPatch,
        send: Callable[[socket.socket, socket.socket], None],
    ) -> None:
        def fail(*_: object) -> None:
            raise EOFError

        with connected(transport, tmp_path, agent) as (made, local, peer):
            monkeypatch.setattr(transport, "_send_user_message", fail)
            sender = Task(send, local, peer)
            read_all(local)
            posted = [kind for kind in made.inbox.kinds() if kind is not AgentDataReceived]
            assert posted[:2] == [ChannelOpened, TransportEnded]
            transport.close()  # so that the server stops the agent
            with suppress(OSError):
                sender.result()

    @pytest.mark.parametrize("end", ["dropped", "closed by the caller"])
    def test_pending_open_posts_nothing_of_its_own(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent, end: str
    ) -> None:
        server.forwarding = Forwarding.HELD
        with tunnel(transport, tmp_path, agent.port) as made:
            local = made.connect()
            server.wait_for(lambda: server.channels_held == 1)
            if end == "dropped":
                server.drop()
            else:
                transport.close()
            assert read_all(local) == b""
            assert made.inbox.kinds() == []
            made.forwarder.close()
            made.inbox.wait(TunnelClosed)
            assert made.inbox.kinds() == [TunnelClosed]


# ---- number of connections ----


class TestMaxConnections:
    @KINDS
    def test_listener_for_one_is_closed_after_the_first(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent, kind: str
    ) -> None:
        with connected(transport, tmp_path, agent, kind=kind) as (made, local, peer):
            local.sendall(b"x")
            assert peer.recv(1) == b"x"
            with pytest.raises(ConnectionRefusedError):
                made.connect()

    def test_listener_for_three_serves_them_at_once_and_refuses_the_fourth(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with tunnel(transport, tmp_path, agent.port, max_connections=3) as made:
            pairs = [(made.connect(), agent.accept()) for _ in range(3)]
            for number, (local, _) in enumerate(pairs):
                local.sendall(bytes([number]))
            assert sorted(peer.recv(1)[0] for _, peer in pairs) == [0, 1, 2]
            made.inbox.wait(ChannelOpened, 3)
            with pytest.raises(ConnectionRefusedError):
                made.connect()
            assert sorted(opened.connection for opened in made.inbox.all(ChannelOpened)) == [1, 2, 3]

    def test_listener_without_limit_serves_any_number(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with tunnel(transport, tmp_path, agent.port, max_connections=None) as made:
            for _ in range(3):
                pairs = [(made.connect(), agent.accept()) for _ in range(10)]
                for local, peer in pairs:
                    peer.close()
                    assert read_all(local) == b""
                    local.close()
            made.inbox.wait(ConnectionEnded, 30)
            assert made.forwarder.stats().connections == 30
            assert server.channels_opened == 30
            eventually(lambda: made.forwarder.unreleased() == ())  # posted first, then forgotten

    def test_open_connections_are_named(self, transport: paramiko.Transport, tmp_path: Path, agent: Agent) -> None:
        with tunnel(transport, tmp_path, agent.port, max_connections=None) as made:
            assert made.forwarder.unreleased() == ()
            for _ in range(2):
                made.connect()
            made.inbox.wait(ChannelOpened, 2)
            assert made.forwarder.unreleased() == ("channel 1 of the tunnel", "channel 2 of the tunnel")


# ---- refusals ----


class TestRefusals:
    def test_refused_channel_is_retried_until_it_opens(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        server.refuse_next(3)
        with tunnel(transport, tmp_path, agent.port) as made:
            local = made.connect()
            local.sendall(b"patient")
            assert agent.accept().recv(99) == b"patient"
            assert made.inbox.kinds() == [ChannelOpened]
            assert made.forwarder.stats().connections == server.channels_opened == 1

    def test_port_that_starts_to_listen_meanwhile_is_reached(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path
    ) -> None:
        server.refuse_next(1)
        with Agent(listening=False) as agent, tunnel(transport, tmp_path, agent.port) as made:
            made.connect()
            eventually(lambda: server._shared.refusals == 0)
            agent.listen()
            agent.accept()
            made.inbox.wait(ChannelOpened)

    @pytest.mark.parametrize("agent_connect_s", [0.4, 0.8])
    def test_agent_is_unreachable_after_agent_connect_s(
        self, transport: paramiko.Transport, tmp_path: Path, agent_connect_s: float
    ) -> None:
        port = dead_port()
        with tunnel(transport, tmp_path, port, agent_connect_s=agent_connect_s) as made:
            began = time.monotonic()
            local = made.connect()
            refused = made.inbox.wait(WorkerFailed)
            assert refused.at - began >= agent_connect_s
            assert refused.error.reason is EndReason.AGENT_UNREACHABLE
            assert f"{LOOPBACK}:{port}" in refused.error.detail
            assert "nothing listens there" in refused.error.detail
            assert read_all(local) == b""
            made.forwarder.close()
            made.inbox.wait(TunnelClosed)
            assert made.inbox.kinds() == [WorkerFailed, TunnelClosed]

    @pytest.mark.parametrize("code", [0, ChannelRefused.RESOURCE_SHORTAGE, 77])
    def test_unspecific_refusal_is_retried_and_quoted(
        self, transport: paramiko.Transport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        tries: list[ChannelOpening] = []

        def refuse(opening: ChannelOpening) -> None:
            tries.append(opening)
            raise ChannelRefused(code, "it is tired")

        monkeypatch.setattr(ChannelOpening, "wait", refuse)
        monkeypatch.setattr(forwarder, "time", SimpleNamespace(monotonic=lambda: 0.2 * len(tries)))
        with tunnel(transport, tmp_path, 9, agent_connect_s=0.3) as made:
            made.connect()
            refused = made.inbox.wait(WorkerFailed)
            assert refused.error.reason is EndReason.AGENT_UNREACHABLE
            assert "nothing listens" not in refused.error.detail
            assert "it is tired" in refused.error.detail
            assert len(tries) == 2

    def test_prohibited_forwarding_is_posted_at_once_and_not_retried(
        self,
        *,
        server: LoopbackSSHServer,
        transport: paramiko.Transport,
        tmp_path: Path,
        agent: Agent,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Any pause before a retry would be longer than this test waits."""
        for name in ("_FIRST_PAUSE_S", "_LONGEST_PAUSE_S"):
            monkeypatch.setattr(forwarder, name, 3 * WAIT_S)
        tries: list[ChannelOpening] = []
        send = ChannelOpening.send

        def note(opening: ChannelOpening) -> None:
            tries.append(opening)
            send(opening)

        monkeypatch.setattr(ChannelOpening, "send", note)
        server.forwarding = Forwarding.DENIED
        with tunnel(transport, tmp_path, agent.port, agent_connect_s=9 * WAIT_S) as made:
            made.connect()
            refused = made.inbox.wait(WorkerFailed)
            assert refused.error.reason is EndReason.FORWARDING_DENIED
            assert f"{LOOPBACK}:{agent.port}" in refused.error.detail
            assert len(tries) == 1

    def test_connections_fail_independently(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with tunnel(transport, tmp_path, agent.port, max_connections=None, agent_connect_s=0.2) as made:
            server.refuse_next(1000)
            made.connect()
            made.inbox.wait(WorkerFailed)
            server.refuse_next(0)
            made.connect()
            assert made.inbox.wait(ChannelOpened).connection == 2


# ---- closing ----


class TestClose:
    @KINDS
    def test_close_before_the_start_is_immediate(
        self, transport: paramiko.Transport, tmp_path: Path, kind: str
    ) -> None:
        with tunnel(transport, tmp_path, 9, kind=kind, start=False) as made:
            made.forwarder.close()
            assert made.inbox.kinds() == [TunnelClosed]
            made.forwarder.start()
            assert made.forwarder.threads() == ()
            with pytest.raises(ConnectionRefusedError):
                made.connect()

    def test_close_before_bind_is_immediate(self, transport: paramiko.Transport) -> None:
        inbox = Inbox()
        unbound = Forwarder(transport, (LOOPBACK, 9), max_connections=1, agent_connect_s=1, post=inbox.post)
        unbound.close()
        assert inbox.kinds() == [TunnelClosed]

    @KINDS
    def test_listener_without_connections_is_closed_at_once(
        self, transport: paramiko.Transport, tmp_path: Path, kind: str
    ) -> None:
        with tunnel(transport, tmp_path, 9, kind=kind) as made:
            assert made.forwarder._listener is not None
            assert made.forwarder._listener.gettimeout() is None, "close() alone can wake a thread that waits in accept"
            made.forwarder.close()
            made.inbox.wait(TunnelClosed)
            assert made.inbox.kinds() == [TunnelClosed]
            with pytest.raises(ConnectionRefusedError):
                made.connect()

    def test_close_does_not_wait_for_a_pending_open_and_its_late_channel_is_closed(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        server.forwarding = Forwarding.HELD
        with tunnel(transport, tmp_path, agent.port) as made:
            local = made.connect()
            server.wait_for(lambda: server.channels_held == 1)
            made.forwarder.close()
            made.inbox.wait(TunnelClosed)
            assert read_all(local) == b""
            assert made.inbox.kinds() == [TunnelClosed]
        server.release()
        server.wait_for(lambda: server.channels_opened == 1 and server.channels_open == 0)

    def test_close_interrupts_the_pause_before_a_retry(
        self,
        server: LoopbackSSHServer,
        transport: paramiko.Transport,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for name in ("_FIRST_PAUSE_S", "_LONGEST_PAUSE_S"):
            monkeypatch.setattr(forwarder, name, 3 * WAIT_S)
        server.refuse_next(1)
        with tunnel(transport, tmp_path, dead_port(), agent_connect_s=9 * WAIT_S) as made:
            made.connect()
            eventually(lambda: server._shared.refusals == 0)
            made.forwarder.close()
            made.inbox.wait(TunnelClosed)
            assert made.inbox.kinds() == [TunnelClosed]

    @KINDS
    def test_data_sent_before_close_reaches_the_agent_then_eof(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent, kind: str
    ) -> None:
        sent = os.urandom(1 << 20)
        with connected(transport, tmp_path, agent, kind=kind) as (made, local, peer):
            local.sendall(sent)
            made.forwarder.close()
            same(read_all(peer), sent)
            peer.close()
            made.inbox.wait(TunnelClosed)
            assert made.inbox.all(ConnectionEnded)[0].bytes_to_agent == len(sent)
            assert AgentEof not in made.inbox.kinds()

    @KINDS
    @pytest.mark.parametrize("ends", ["stays", "has closed", "has ended its direction"])
    def test_data_waiting_for_a_slow_agent_is_not_lost(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent, kind: str, ends: str
    ) -> None:
        """Over TCP megabytes of it are still in the kernel, while the proxy has long continued, or exited."""
        with connected(transport, tmp_path, agent, kind=kind) as (made, local, peer):
            sent = made.send_until_stuck(local)
            if ends == "has closed":
                local.close()
            elif ends == "has ended its direction":
                local.shutdown(socket.SHUT_WR)
            made.forwarder.close()
            assert len(read_all(peer)) == sent
            peer.close()
            made.inbox.wait(TunnelClosed)
            assert made.inbox.all(ConnectionEnded)[0].bytes_to_agent == sent
            assert AgentEof not in made.inbox.kinds()

    @KINDS
    @pytest.mark.parametrize("sent", [b"", b"all of it"])
    def test_proxy_with_nothing_in_flight_is_closed_at_once(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent, kind: str, sent: bytes
    ) -> None:
        with connected(transport, tmp_path, agent, kind=kind) as (made, local, peer):
            local.sendall(sent)
            eventually(lambda: made.forwarder.stats().bytes_to_agent == len(sent))
            made.forwarder.close()
            assert read_all(peer) == sent
            made.inbox.wait(TunnelClosed)

    def test_proxy_that_keeps_writing_over_tcp_is_closed(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with connected(transport, tmp_path, agent, kind="tcp") as (made, local, peer):
            writing, reading = Task(pour, local), Task(read_all, peer)
            eventually(lambda: made.forwarder.stats().bytes_to_agent)
            made.forwarder.close()
            made.inbox.wait(TunnelClosed)
            writing.result()
            assert len(reading.result()) == made.inbox.all(ConnectionEnded)[0].bytes_to_agent

    def test_close_waits_for_the_proxy_if_the_kernel_does_not_report_data_in_flight(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("proxy_fsm.workers.peer.written_bytes", lambda _: None)
        with connected(transport, tmp_path, agent, kind="tcp") as (made, local, peer):
            sent = made.send_until_stuck(local)
            made.forwarder.close()
            reading = Task(read_all, peer)
            eventually(lambda: made.forwarder.stats().bytes_to_agent == sent)
            assert made.inbox.stays_without(TunnelClosed, 0.2)
            local.close()
            assert len(reading.result()) == sent
            made.inbox.wait(TunnelClosed)

    def test_close_ends_busy_relays(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        def drain(sock: socket.socket) -> None:
            with suppress(OSError):
                while sock.recv(1 << 16):
                    pass

        with connected(transport, tmp_path, agent) as (made, local, peer):
            tasks = [Task(pour, local), Task(pour, peer), Task(drain, local), Task(drain, peer)]
            eventually(lambda: min(made.forwarder.stats().bytes_to_agent, made.forwarder.stats().bytes_from_agent))
            made.forwarder.close()
            made.inbox.wait(TunnelClosed)
            server.wait_for(lambda: server.channels_open == 0)
            with suppress(OSError):  # the kernel may leave it blocked in its write, which is not ours to fix
                peer.shutdown(socket.SHUT_RDWR)
            for task in tasks:
                task.result()
            assert AgentEof not in made.inbox.kinds()
        assert transport.is_active()

    def test_close_with_a_stalled_agent_waits_for_abort(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with connected(transport, tmp_path, agent) as (made, local, _):
            made.send_until_stuck(local)
            made.forwarder.close()
            assert made.inbox.stays_without(TunnelClosed, 0.2)
            assert made.forwarder.unreleased() == ("channel 1 of the tunnel",)
            made.forwarder.abort()
            made.inbox.wait(TunnelClosed)

    def test_close_with_a_stalled_proxy_waits_for_abort(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with connected(transport, tmp_path, agent) as (made, _, peer):
            made.send_until_stuck(peer)
            made.forwarder.close()
            assert made.inbox.stays_without(TunnelClosed, 0.2)
            made.forwarder.abort()
            made.inbox.wait(TunnelClosed)

    def test_connections_on_a_frozen_server_are_named_and_freed_when_it_thaws(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with tunnel(transport, tmp_path, agent.port, max_connections=None) as made:
            pairs = [(made.connect(), agent.accept()) for _ in range(12)]
            made.inbox.wait(ChannelOpened, 12)
            server.freeze()
            uploads = [Task(made.send_until_stuck, local, 64 << 20) for local, _ in pairs]
            for upload in uploads:
                upload.result()
            # Their windows together exceed what the connection accepts.
            eventually(lambda: not accepts_bytes(transport))
            made.forwarder.close()
            made.forwarder.abort()  # neither waits: the server thaws below
            assert made.inbox.stays_without(TunnelClosed, 0.2)
            assert "channel " in made.forwarder.unreleased()[0]
            server.thaw()
            made.inbox.wait(TunnelClosed)
            server.wait_for(lambda: server.channels_open == 0)

    def test_abort_alone_ends_a_connection_and_does_not_blame_the_agent(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with connected(transport, tmp_path, agent) as (made, local, _):
            made.forwarder.abort()
            assert read_all(local) == b""
            made.inbox.wait(ConnectionEnded)
            assert AgentEof not in made.inbox.kinds()
            server.wait_for(lambda: server.channels_open == 0)

    def test_tunnel_closed_is_posted_last_if_several_end_at_once(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        """A thread that posts is delayed in the middle: nothing may overtake it."""
        inbox = Inbox()
        overtaken = threading.Event()

        def post(observation: Observation) -> None:
            if isinstance(observation, ConnectionEnded) and observation.connection == 1:
                overtaken.wait(0.3)
            inbox.post(observation)
            if isinstance(observation, TunnelClosed):
                overtaken.set()

        with tunnel(transport, tmp_path, agent.port, max_connections=None, post=post) as made:
            made.inbox = inbox
            for count in (1, 2):
                made.connect()
                inbox.wait(ChannelOpened, count)
            made.forwarder.close()
            made.forwarder.abort()
            inbox.wait(ConnectionEnded, 2)
            inbox.wait(TunnelClosed)
            assert inbox.kinds()[-3:] == [ConnectionEnded, ConnectionEnded, TunnelClosed]

    def test_end_of_the_transport_is_posted_before_the_proxy_can_notice(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        """Otherwise a viewer that exits at once, with code 0, would count as closed by its user."""
        inbox, may_post = Inbox(), threading.Event()

        def post(observation: Observation) -> None:
            if isinstance(observation, TransportEnded):
                may_post.wait(WAIT_S)
            inbox.post(observation)

        with tunnel(transport, tmp_path, agent.port, post=post) as made:
            made.inbox = inbox
            local = made.connect()
            inbox.wait(ChannelOpened)
            server.drop(reset=True)
            local.settimeout(0.2)
            with pytest.raises(TimeoutError):
                local.recv(1)
            may_post.set()
            local.settimeout(WAIT_S)
            assert local.recv(1) == b""
            assert inbox.wait(TransportEnded).detail.startswith("The SSH connection ended")
            assert AgentEof not in inbox.kinds()

    @KINDS
    def test_nothing_is_left_however_connections_end(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent, kind: str
    ) -> None:
        def one_round(how: int) -> None:
            with (
                tempfile.TemporaryDirectory() as directory,
                tunnel(transport, Path(directory), agent.port, kind=kind, max_connections=None) as made,
            ):
                for _ in range(3):
                    local, peer = made.connect(), agent.accept()
                    local.sendall(b"x")
                    assert peer.recv(1) == b"x"
                    (local.close, peer.close, int)[how % 3]()
                    peer.close()

        one_round(0)
        server.wait_for(lambda: server.channels_open == 0)
        threads_ended()
        before = descriptors()
        for how in range(6):
            one_round(how)
        server.wait_for(lambda: server.channels_open == 0)
        threads_ended()
        nothing_left_open(before)
        eventually(lambda: len(transport._channels) == 0)  # type: ignore[attr-defined]


class TestNoThreads:
    @pytest.mark.parametrize("name", ["proxy_fsm-up", "proxy_fsm-down"])
    def test_connection_without_a_thread_is_posted_and_closed(
        self,
        *,
        monkeypatch: pytest.MonkeyPatch,
        server: LoopbackSSHServer,
        transport: paramiko.Transport,
        tmp_path: Path,
        agent: Agent,
        name: str,
    ) -> None:
        start = threading.Thread.start

        def start_unless_named(thread: threading.Thread) -> None:
            if thread.name == name:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_unless_named)
        with tunnel(transport, tmp_path, agent.port, max_connections=None) as made:
            local = made.connect()
            failed = made.inbox.wait(WorkerCrashed)
            assert isinstance(failed.error, RuntimeError)
            assert read_all(local) == b""
            eventually(lambda: made.forwarder.unreleased() == ())
            server.wait_for(lambda: server.channels_open == 0)


class TestShortage:
    """A temporary error neither ends the listener nor has our own program rejected."""

    @pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
    def test_listener_survives_a_shortage(
        self, transport: paramiko.Transport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agent: Agent, number: int
    ) -> None:
        failures = Failures(monkeypatch, socket.socket, "accept", OSError(number, os.strerror(number)), times=3)
        with tunnel(transport, tmp_path, agent.port) as made:
            eventually(lambda: failures.left == 0)
            local = made.connect()
            made.inbox.wait(ChannelOpened)
            local.close()
            assert WorkerCrashed not in made.inbox.kinds()

    def test_listener_can_be_closed_during_a_shortage(
        self, transport: paramiko.Transport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Failures(monkeypatch, socket.socket, "accept", OSError(errno.EMFILE, "Too many open files"), times=1 << 30)
        with tunnel(transport, tmp_path, 9) as made:
            made.forwarder.close()
            made.inbox.wait(TunnelClosed)
            assert made.inbox.kinds() == [TunnelClosed]

    def test_other_error_of_the_listener_is_posted(
        self, transport: paramiko.Transport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Failures(monkeypatch, socket.socket, "accept", OSError(errno.EIO, "Input/output error"), times=1)
        with tunnel(transport, tmp_path, 9) as made:
            made.inbox.wait(WorkerCrashed)

    def test_own_program_is_not_rejected_during_a_shortage(
        self, transport: paramiko.Transport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agent: Agent
    ) -> None:
        Failures(monkeypatch, peer, "_tcp_owner", OSError(errno.EMFILE, "Too many open files"), times=2)
        with tunnel(transport, tmp_path, agent.port, kind="tcp") as made:
            made.connect()
            made.inbox.wait(ChannelOpened)
            assert PeerRejected not in made.inbox.kinds()

    def test_own_program_is_not_rejected_by_a_close_during_a_shortage(
        self, transport: paramiko.Transport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        error = OSError(errno.EMFILE, "Too many open files")
        failures = Failures(monkeypatch, peer, "_tcp_owner", error, times=1 << 30)
        with tunnel(transport, tmp_path, 9, kind="tcp") as made:
            local = made.connect()
            eventually(lambda: failures.left < 1 << 30)
            made.forwarder.close()
            made.inbox.wait(TunnelClosed)
            assert read_all(local) == b""
            assert made.inbox.kinds() == [TunnelClosed]

    def test_peer_of_an_unknown_user_is_rejected_with_the_reason(
        self, transport: paramiko.Transport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Failures(monkeypatch, peer, "_tcp_owner", PermissionError(errno.EACCES, "Permission denied"), times=1)
        with tunnel(transport, tmp_path, 9, kind="tcp") as made:
            made.connect()
            assert made.inbox.wait(PeerRejected).peer == "user unknown (Permission denied)"


class Failures:
    """Makes a function fail some times, then work; `left` is how often it will still fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: OSError, *, times: int) -> None:
        self.left = times
        function = getattr(owner, name)

        def fail(*args: Any) -> Any:
            if self.left == 0:
                return function(*args)
            self.left -= 1
            raise error

        monkeypatch.setattr(owner, name, fail)


# ---- counters and observations ----


class TestObservations:
    def test_observations_are_posted_in_order(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with connected(transport, tmp_path, agent) as (made, local, peer):
            for _ in range(3):
                peer.sendall(b"hello")
                assert local.recv(5) == b"hello"
            peer.close()
            assert read_all(local) == b""
            local.close()
            made.inbox.wait(ConnectionEnded)
            made.forwarder.close()
            made.inbox.wait(TunnelClosed)
            assert made.inbox.kinds() == [ChannelOpened, AgentDataReceived, AgentEof, ConnectionEnded, TunnelClosed]
            times = [observation.at for observation in made.inbox.seen]
            assert times == sorted(times)

    def test_agent_that_sends_nothing_posts_no_data(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with connected(transport, tmp_path, agent) as (made, local, peer):
            peer.close()
            assert read_all(local) == b""
            assert AgentDataReceived not in made.inbox.kinds()

    def test_nothing_is_counted_before_a_channel_is_open(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        server.forwarding = Forwarding.HELD
        with tunnel(transport, tmp_path, agent.port) as made:
            made.connect().sendall(b"early")
            server.wait_for(lambda: server.channels_held == 1)
            assert made.forwarder.stats() == TunnelStats(0, 0, None, 0)

    def test_counters_include_open_and_closed_connections(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        before = datetime.now(UTC)
        with tunnel(transport, tmp_path, agent.port, max_connections=None) as made:
            for number in (1, 2):
                before_it = time.monotonic()
                local, peer = made.connect(), agent.accept()
                local.sendall(b"x" * 1000 * number)
                peer.sendall(b"y" * 100 * number)
                assert len(local.recv(1 << 16)) == 100 * number
                local.shutdown(socket.SHUT_WR)
                assert len(read_all(peer)) == 1000 * number
                if number == 1:
                    peer.close()
                    ended = made.inbox.wait(ConnectionEnded)
                    assert (ended.connection, ended.bytes_to_agent, ended.bytes_from_agent) == (1, 1000, 100)
                    assert 0 <= ended.duration_s <= since(before_it)
            eventually(lambda: made.forwarder.stats().bytes_from_agent == 300)  # counted once it was written
            stats = made.forwarder.stats()
            assert (stats.bytes_to_agent, stats.bytes_from_agent, stats.connections) == (3000, 300, 2)
            assert stats.opened_at is not None
            assert before <= stats.opened_at <= datetime.now(UTC)


# ---- other users ----


def connect_as_nobody(address: str, *, say: str = "hello") -> int:
    """Connect to a TCP listener as user nobody, send something; return how many bytes were received until EOF."""
    host, _, port = address.rpartition(":")
    script = f'exec 3<>/dev/tcp/{host}/{port} || exit 9; printf "%s" "{say}" >&3; timeout {WAIT_S} cat <&3'
    done = subprocess.run(
        [shutil.which("bash") or "bash", "-c", script],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode != 9, "it could not even connect"
    return len(done.stdout)


def connect_as_nobody_and_exit(address: str) -> None:
    """Connect to a TCP listener as user nobody, and disconnect before it is accepted."""
    host, _, port = address.rpartition(":")
    subprocess.run(
        [shutil.which("bash") or "bash", "-c", f"exec 3<>/dev/tcp/{host}/{port}; printf x >&3"],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        check=True,
    )


class TestForeignUsers:
    @NEEDS_ANOTHER_USER
    def test_another_user_is_rejected_without_a_channel_and_the_listener_stays(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        with tunnel(transport, tmp_path, agent.port, kind="tcp") as made:
            for count in (1, 2):
                assert connect_as_nobody(made.address) == 0
                assert made.inbox.wait(PeerRejected, count).peer == f"user {NOBODY}"
            assert server.channels_opened == 0
            local = made.connect()
            local.sendall(b"it is me")
            assert agent.accept().recv(99) == b"it is me"
            assert made.inbox.kinds() == [PeerRejected, PeerRejected, ChannelOpened]

    @NEEDS_ANOTHER_USER
    def test_another_user_who_has_disconnected_already_is_rejected(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        """The system reports 0 (root's user id) as the owner of a socket that no process holds any more."""
        with tunnel(transport, tmp_path, agent.port, kind="tcp", start=False) as made:
            connect_as_nobody_and_exit(made.address)
            made.forwarder.start()
            assert made.inbox.wait(PeerRejected).peer in {"user unknown", f"user {NOBODY}"}
            assert server.channels_opened == 0

    @NEEDS_ANOTHER_USER
    def test_another_user_on_a_unix_socket_is_rejected(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
            directory.chmod(0o755)
            made = stack.enter_context(tunnel(transport, directory, agent.port, start=False))
            Path(made.address).chmod(0o777)
            os.seteuid(NOBODY)
            try:
                local = made.connect()  # the system records the user when the connection is made
            finally:
                os.seteuid(0)
            made.forwarder.start()
            assert made.inbox.wait(PeerRejected).peer == f"user {NOBODY}"
            assert read_all(local) == b""
            assert server.channels_opened == 0
            made.connect()
            made.inbox.wait(ChannelOpened)

    def test_own_program_may_connect_through_an_ipv6_socket(
        self, transport: paramiko.Transport, tmp_path: Path, agent: Agent
    ) -> None:
        """Java and others use one socket for both, and connect to ::ffff:127.0.0.1."""
        if not socket.has_ipv6 or not Path("/proc/net/tcp6").exists():
            pytest.skip("needs IPv6")
        with tunnel(transport, tmp_path, agent.port, kind="tcp") as made:
            port = int(made.address.rpartition(":")[2])
            with socket.socket(socket.AF_INET6) as local:
                local.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                local.settimeout(WAIT_S)
                local.connect(("::ffff:127.0.0.1", port))
                local.sendall(b"mapped")
                eventually(made.inbox.kinds)
                assert made.inbox.kinds() == [ChannelOpened]
                assert agent.accept().recv(99) == b"mapped"
