"""The embedded SSH server behaves like sshd, and injects every fault."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING

import paramiko
import pytest

from proxy_fsm.testing import Forwarding, LoopbackSSHServer
from tests.helpers.holdings import descriptors
from tests.helpers.sockets import read_all, reset, same

if TYPE_CHECKING:
    from collections.abc import Iterator

_WAIT_S = 10.0


@pytest.fixture
def server() -> Iterator[LoopbackSSHServer]:
    with LoopbackSSHServer() as running:
        yield running


@pytest.fixture
def transport(server: LoopbackSSHServer) -> Iterator[paramiko.Transport]:
    with closing(server.connect_transport()) as connected:
        yield connected


@pytest.fixture
def target() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(_WAIT_S)
        yield listener


def _open(transport: paramiko.Transport, listener: socket.socket) -> paramiko.Channel:
    return _open_port(transport, listener.getsockname()[1])


def _open_port(transport: paramiko.Transport, port: int, host: str = "127.0.0.1") -> paramiko.Channel:
    return transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 1), timeout=_WAIT_S)


def _accept(listener: socket.socket) -> socket.socket:
    accepted, _ = listener.accept()
    accepted.settimeout(_WAIT_S)
    return accepted


class TestAuthentication:
    def test_generated_key_is_accepted(self, server: LoopbackSSHServer) -> None:
        with server.connect() as client:
            transport = client.get_transport()
            assert transport is not None
            assert transport.is_authenticated()
            assert server.connections == 1

    def test_password_is_accepted(self) -> None:
        with LoopbackSSHServer(username="alice", password="wonder") as server:
            server.connect(password="wonder").close()

    @pytest.mark.parametrize(
        "credentials",
        [
            {"password": "wrong"},
            {"username": "somebody-else"},
            {"pkey": paramiko.ECDSAKey.generate()},
        ],
    )
    def test_other_credentials_are_rejected(
        self, server: LoopbackSSHServer, credentials: dict[str, str | paramiko.PKey]
    ) -> None:
        with pytest.raises(paramiko.AuthenticationException):
            server.connect(**credentials)

    def test_random_credentials_differ_between_servers(self) -> None:
        one, other = LoopbackSSHServer(), LoopbackSSHServer()
        assert one.password != other.password
        assert one.username != other.username
        assert one.host_key != other.host_key

    def test_host_key_is_pinned(self, server: LoopbackSSHServer) -> None:
        with LoopbackSSHServer() as other:
            server.port = other.port
            with pytest.raises(paramiko.BadHostKeyException):
                server.connect()
            with pytest.raises(paramiko.SSHException, match="Bad host key"):
                server.connect_transport()


class TestForwarding:
    def test_both_directions_deliver_every_byte(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, target: socket.socket
    ) -> None:
        up, down = os.urandom(6_000_000), os.urandom(6_000_000)
        channel = _open(transport, target)
        with _accept(target) as agent:
            received: dict[str, bytes] = {}

            def talk() -> None:
                agent.sendall(down)
                agent.shutdown(socket.SHUT_WR)

            def send() -> None:
                channel.sendall(up)
                channel.shutdown_write()

            def listen() -> None:
                received["up"] = read_all(agent)

            threads = [threading.Thread(target=each, daemon=True) for each in (talk, send, listen)]
            for thread in threads:
                thread.start()
            received["down"] = read_all(channel)
            for thread in threads:
                thread.join()
        same(received["up"], up)
        same(received["down"], down)
        server.wait_for(lambda: server.channels_open == 0)
        assert server.channels_opened == 1

    def test_half_close_leaves_the_other_direction_open(
        self, transport: paramiko.Transport, target: socket.socket
    ) -> None:
        channel = _open(transport, target)
        with _accept(target) as agent:
            channel.sendall(b"question")
            channel.shutdown_write()
            assert read_all(agent) == b"question"
            agent.sendall(b"answer")
            agent.shutdown(socket.SHUT_WR)
            assert read_all(channel) == b"answer"

    def test_half_close_by_the_agent_leaves_the_direction_to_it_open(
        self, transport: paramiko.Transport, target: socket.socket
    ) -> None:
        channel = _open(transport, target)
        with _accept(target) as agent:
            agent.sendall(b"greeting")
            agent.shutdown(socket.SHUT_WR)
            assert read_all(channel) == b"greeting"
            channel.sendall(b"reply")
            channel.close()
            assert read_all(agent) == b"reply"

    def test_slow_agent_blocks_the_sender_and_loses_nothing(
        self, transport: paramiko.Transport, target: socket.socket
    ) -> None:
        sent = os.urandom(16_000_000)
        channel = _open(transport, target)
        with _accept(target) as agent:
            done = threading.Event()

            def send() -> None:
                channel.sendall(sent)
                channel.shutdown_write()
                done.set()

            sender = threading.Thread(target=send, daemon=True)
            sender.start()
            assert not done.wait(0.2)  # the window, not the memory, bounds the data in flight
            received = read_all(agent)
            sender.join()
            same(received, sent)
        channel.close()

    def test_data_sent_before_a_close_arrives(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, target: socket.socket
    ) -> None:
        channel = _open(transport, target)
        with _accept(target) as agent:
            channel.sendall(bytes(1_000_000))
            channel.close()
            assert len(read_all(agent)) == 1_000_000
        server.wait_for(lambda: server.channels_open == 0)

    def test_close_after_eof_frees_the_channel_of_an_open_agent(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, target: socket.socket
    ) -> None:
        channel = _open(transport, target)
        with _accept(target):
            channel.shutdown_write()
            channel.close()
            server.wait_for(lambda: server.channels_open == 0)

    def test_reset_by_the_agent_closes_the_channel(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, target: socket.socket
    ) -> None:
        channel = _open(transport, target)
        reset(_accept(target))
        assert channel.recv(1) == b""
        channel.close()
        server.wait_for(lambda: server.channels_open == 0)

    def test_two_channels_do_not_mix(self, transport: paramiko.Transport, target: socket.socket) -> None:
        first = _open(transport, target)
        with _accept(target) as first_agent:
            second = _open(transport, target)
            with _accept(target) as second_agent:
                first.sendall(b"1")
                second.sendall(b"2")
                assert first_agent.recv(9) == b"1"
                assert second_agent.recv(9) == b"2"

    def test_port_without_a_listener_is_connect_failed(self, transport: paramiko.Transport) -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        with pytest.raises(paramiko.ChannelException) as refused:
            _open_port(transport, port)
        assert refused.value.code == 2

    @pytest.mark.parametrize("host", ["192.0.2.1", "example.org", "0.0.0.0"])  # noqa: S104 - is refused
    def test_other_machines_are_prohibited(self, transport: paramiko.Transport, host: str) -> None:
        with pytest.raises(paramiko.ChannelException) as refused:
            _open_port(transport, 22, host)
        assert refused.value.code == 1

    def test_localhost_is_loopback(self, transport: paramiko.Transport, target: socket.socket) -> None:
        _open_port(transport, target.getsockname()[1], "localhost").close()

    def test_unknown_channel_types_are_refused(self, transport: paramiko.Transport) -> None:
        with pytest.raises(paramiko.ChannelException) as refused:
            transport.open_channel("no-such-kind", timeout=_WAIT_S)
        assert refused.value.code == 3

    def test_session_channels_serve_as_probes(self, server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
        for _ in range(3):
            transport.open_session(timeout=_WAIT_S).close()
        assert server.sessions_opened == 3
        assert server.channels_opened == 0


class TestCommands:
    def test_command_is_answered_with_output_errors_and_status(self) -> None:
        commands = {"greet": lambda line: (3, f"hello {line}\n".encode(), b"careful\n")}
        with LoopbackSSHServer(commands=commands) as server, server.connect() as client:
            _, output, errors = client.exec_command("greet the world")
            assert output.read() == b"hello greet the world\n"
            assert errors.read() == b"careful\n"
            assert output.channel.recv_exit_status() == 3

    @pytest.mark.parametrize("line", ["nothing here", " "])
    def test_unknown_command_exits_with_127(self, server: LoopbackSSHServer, line: str) -> None:
        with server.connect() as client:
            _, output, errors = client.exec_command(line)
            assert output.channel.recv_exit_status() == 127
            assert b"command not found" in errors.read()

    def test_quick_commands_are_always_answered(self) -> None:
        """A command that ends at once must not overtake the reply to its own request."""
        with (
            LoopbackSSHServer(commands={"true": lambda _: (0, b"x", b"")}) as server,
            server.connect() as client,
        ):
            for _ in range(50):
                _, output, _ = client.exec_command("true")
                assert output.channel.recv_exit_status() == 0
                assert output.read() == b"x"

    def test_slow_command_blocks_nothing_else(self, target: socket.socket) -> None:
        release = threading.Event()

        def wait(_: str) -> tuple[int, bytes, bytes]:
            release.wait()
            return 0, b"", b""

        with LoopbackSSHServer(commands={"wait": wait}) as server, server.connect() as client:
            _, output, _ = client.exec_command("wait")
            transport = client.get_transport()
            assert transport is not None
            _open(transport, target).close()
            release.set()
            assert output.channel.recv_exit_status() == 0


class TestFaults:
    def test_denied_is_administratively_prohibited(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, target: socket.socket
    ) -> None:
        server.forwarding = Forwarding.DENIED
        with pytest.raises(paramiko.ChannelException) as refused:
            _open(transport, target)
        assert refused.value.code == 1
        server.forwarding = Forwarding.ALLOWED
        _open(transport, target).close()

    def test_refuse_next_refuses_the_count_and_connects_to_no_port(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, target: socket.socket
    ) -> None:
        server.refuse_next(2)
        for _ in range(2):
            with pytest.raises(paramiko.ChannelException) as refused:
                _open(transport, target)
            assert refused.value.code == 2
        target.setblocking(False)  # noqa: FBT003 - its only argument
        with pytest.raises(BlockingIOError):
            target.accept()
        _open(transport, target).close()

    @pytest.mark.parametrize(("answer", "code"), [(Forwarding.ALLOWED, None), (Forwarding.DENIED, 1)])
    def test_held_open_waits_while_everything_else_is_served(
        self,
        server: LoopbackSSHServer,
        transport: paramiko.Transport,
        target: socket.socket,
        answer: Forwarding,
        code: int | None,
    ) -> None:
        before = _open(transport, target)
        with _accept(target) as agent:
            server.forwarding = Forwarding.HELD
            outcome: list[int | None] = []

            def request_channel() -> None:
                try:
                    _open(transport, target).close()
                    outcome.append(None)
                except paramiko.ChannelException as refused:
                    outcome.append(refused.code)

            requester = threading.Thread(target=request_channel, daemon=True)
            requester.start()
            server.wait_for(lambda: server.channels_held == 1)
            before.sendall(b"still served")
            assert agent.recv(99) == b"still served"
            transport.open_session(timeout=_WAIT_S).close()
            assert outcome == []
            server.release(answer)
            requester.join()
            assert outcome == [code]

    def test_release_after_the_client_disconnected_connects_to_no_port(
        self, server: LoopbackSSHServer, target: socket.socket
    ) -> None:
        server.forwarding = Forwarding.HELD
        transport = server.connect_transport()

        def request_channel() -> None:
            with pytest.raises((paramiko.SSHException, EOFError)):
                _open(transport, target)

        requester = threading.Thread(target=request_channel, daemon=True)
        requester.start()
        server.wait_for(lambda: server.channels_held == 1)
        transport.close()
        requester.join()
        server.wait_for(lambda: server.connections == 0)
        assert server.channels_held == 0
        server.release()
        target.setblocking(False)  # noqa: FBT003
        with pytest.raises(BlockingIOError):
            target.accept()

    @pytest.mark.parametrize("reset", [False, True])
    def test_drop_cuts_the_connection_and_the_agent(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, target: socket.socket, *, reset: bool
    ) -> None:
        channel = _open(transport, target)
        with _accept(target) as agent:
            server.drop(reset=reset)
            transport.join(_WAIT_S)
            assert not transport.is_alive()
            assert channel.recv(1) == b""
            assert agent.recv(1) == b""
        error = transport.get_exception()
        assert isinstance(error, ConnectionResetError if reset else EOFError)
        server.wait_for(lambda: server.channels_open == 0 and server.connections == 0)
        server.connect_transport().close()  # it keeps listening

    def test_drop_frees_a_forward_whose_agent_does_not_read(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, target: socket.socket
    ) -> None:
        channel = _open(transport, target)
        with _accept(target):

            def send() -> None:
                with pytest.raises((OSError, EOFError)):
                    channel.sendall(bytes(32_000_000))

            sender = threading.Thread(target=send, daemon=True)
            sender.start()
            assert channel.status_event.wait(0.2) is False
            server.drop()
            sender.join()
            server.wait_for(lambda: server.channels_open == 0)

    def test_frozen_server_answers_nothing_and_loses_nothing(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, target: socket.socket
    ) -> None:
        channel = _open(transport, target)
        with _accept(target) as agent:
            server.freeze()
            channel.sendall(b"up")
            agent.sendall(b"down")
            with pytest.raises(paramiko.SSHException, match=r"[Tt]imeout"):
                transport.open_session(timeout=0.2)
            channel.settimeout(0.1)
            with pytest.raises(TimeoutError):
                channel.recv(1)
            agent.settimeout(0.1)
            with pytest.raises(TimeoutError):
                agent.recv(1)
            assert transport.is_active()
            server.thaw()
            channel.settimeout(_WAIT_S)
            agent.settimeout(_WAIT_S)
            assert channel.recv(9) == b"down"
            assert agent.recv(9) == b"up"

    def test_frozen_server_accepts_connections_without_a_banner(self, server: LoopbackSSHServer) -> None:
        server.freeze()
        with socket.create_connection((server.host, server.port), _WAIT_S) as client:
            client.settimeout(0.1)
            with pytest.raises(TimeoutError):
                client.recv(1)
            server.thaw()
            client.settimeout(_WAIT_S)
            assert client.recv(4) == b"SSH-"

    def test_drop_works_while_frozen(self, server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
        server.freeze()
        server.drop()
        transport.join(_WAIT_S)
        assert not transport.is_alive()


class TestStop:
    def test_stop_leaves_no_thread_and_no_socket(self, target: socket.socket) -> None:
        gc.collect()
        threads, before = set(threading.enumerate()), descriptors()
        server = LoopbackSSHServer(commands={"true": lambda _: (0, b"", b"")})
        server.start()
        transport = server.connect_transport()
        channels = [_open(transport, target) for _ in range(5)]
        agents = [_accept(target) for _ in range(5)]
        channels[0].shutdown_write()
        agents[1].shutdown(socket.SHUT_WR)
        session = transport.open_session(timeout=_WAIT_S)
        session.exec_command("true")
        probe = transport.open_session(timeout=_WAIT_S)
        idle = socket.create_connection((server.host, server.port))
        server.wait_for(lambda: server.connections == 2)
        server.freeze()
        server.stop()
        assert [thread for thread in threading.enumerate() if thread.name.startswith("loopback")] == []
        assert server.connections == server.channels_open == 0
        transport.close()
        transport.join(_WAIT_S)
        for channel in (*channels, session, probe):
            channel.close()
        for end in (*agents, idle):
            end.close()
        assert set(threading.enumerate()) <= threads
        assert descriptors() <= before

    def test_stop_frees_forwards_that_are_full_in_both_directions(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, target: socket.socket
    ) -> None:
        channel = _open(transport, target)
        with _accept(target) as agent:

            def fill(send: socket.socket | paramiko.Channel) -> None:
                with pytest.raises((OSError, EOFError)):
                    send.sendall(bytes(32_000_000))

            fillers = [threading.Thread(target=fill, args=(each,), daemon=True) for each in (agent, channel)]
            for filler in fillers:
                filler.start()
            assert not channel.status_event.wait(0.2)
            began = time.monotonic()
            server.stop()
            assert time.monotonic() - began < 2
            for filler in fillers:
                filler.join()

    def test_stop_is_idempotent_and_closes_the_port(self, server: LoopbackSSHServer) -> None:
        server.stop()
        server.stop()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((server.host, server.port))

    def test_started_server_cannot_be_started_again_before_stop(self, server: LoopbackSSHServer) -> None:
        with pytest.raises(RuntimeError, match="already started"):
            server.start()
        server.stop()
        server.start()
        server.connect_transport().close()

    def test_wait_for_times_out_if_the_condition_never_holds(self, server: LoopbackSSHServer) -> None:
        with pytest.raises(TimeoutError):
            server.wait_for(lambda: False, timeout_s=0.01)
