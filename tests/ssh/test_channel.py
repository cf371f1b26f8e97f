"""Channels: closing, sending, delivering."""

from __future__ import annotations

import contextlib
import gc
import socket
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm import ssh
from proxy_fsm.ssh import (
    ChannelOpening,
    SafeChannel,
    TransportClosed,
    fast_transport,
)
from proxy_fsm.ssh import channel as channel_module
from proxy_fsm.ssh import opening as opening_module
from proxy_fsm.ssh.channel import ReceiveBuffer
from proxy_fsm.ssh.fast import Messages, acknowledge
from tests.helpers.sockets import read_all, same
from tests.helpers.task import Task
from tests.helpers.wait import WAIT_S, eventually
from tests.ssh.helpers import ENDS, End, do_nothing, open_to, packets_sent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import paramiko

    from proxy_fsm.testing import LoopbackSSHServer
    from tests.helpers.agent import Agent


class TestClosing:
    def test_close_sends_nothing(self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent) -> None:
        channel = open_to(transport, agent.port)
        before = packets_sent(transport)
        channel.close()
        assert packets_sent(transport) == before
        assert channel.closed
        assert channel.ended.is_set()
        assert server.channels_open == 1
        channel.send_close()
        server.wait_for(lambda: server.channels_open == 0)

    def test_close_does_not_block_on_a_server_that_takes_nothing(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        channel, stuck = open_to(transport, agent.port), open_to(transport, agent.port)
        server.freeze()

        def upload() -> None:
            with contextlib.suppress(OSError):
                while stuck.send(bytes(1 << 18)):
                    pass

        uploader = Task(upload)
        Task(channel.close).result()
        stuck.close()
        server.thaw()
        uploader.result()
        stuck.send_close()
        channel.send_close()
        server.wait_for(lambda: server.channels_open == 0)

    def test_close_wakes_a_reader_and_a_sender(self, transport: paramiko.Transport, agent: Agent) -> None:
        channel = open_to(transport, agent.port)
        agent.accept()  # and read nothing: the window is used up

        def upload() -> None:
            with contextlib.suppress(OSError):
                while channel.send(bytes(1 << 18)):
                    pass

        reader, uploader = Task(channel.recv, 1), Task(upload)
        channel.close()
        assert reader.result() == b""
        uploader.result()
        channel.send_close()

    def test_garbage_collection_sends_nothing(self, transport: paramiko.Transport, agent: Agent) -> None:
        channel = open_to(transport, agent.port)
        before = packets_sent(transport)
        reference = weakref.ref(channel)
        with transport.lock:
            pass  # the transport's own thread, which holds it and the channel, has handled the answer
        del channel
        gc.collect()
        eventually(lambda: reference() is None, WAIT_S)  # that thread may be about to return
        assert packets_sent(transport) == before

    def test_concurrent_send_close_sends_one_close(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        channel = open_to(transport, agent.port)
        before = packets_sent(transport)
        together = threading.Barrier(8)

        def close() -> None:
            together.wait(WAIT_S)
            channel.send_close()

        for task in [Task(close) for _ in range(8)]:
            task.result()
        channel.send_close()
        assert packets_sent(transport) == before + 1
        server.wait_for(lambda: server.channels_open == 0)

    def test_close_from_the_server_leaves_ours_to_send_and_the_transport_alive(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        channel = open_to(transport, agent.port)
        channel.shutdown_write()
        agent.accept().close()
        assert channel.ended.wait(WAIT_S)
        assert not channel.transport_ended
        before = packets_sent(transport)
        channel.send_close()
        assert packets_sent(transport) == before + 1
        server.wait_for(lambda: server.channels_open == 0)
        open_to(transport, agent.port).send_close()
        assert transport.is_active()

    def test_close_from_the_server_sends_nothing_on_the_transports_thread(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        channel = open_to(transport, agent.port)
        channel.shutdown_write()
        before = packets_sent(transport)
        agent.accept().close()
        assert channel.ended.wait(WAIT_S)
        opening = ChannelOpening(transport, "session")
        opening.send()
        opening.wait()  # the transport's thread has handled the close
        assert packets_sent(transport) == before + 1, "the open alone"
        channel.send_close()
        server.wait_for(lambda: server.channels_open == 0)

    @ENDS
    def test_send_close_after_the_transports_end_is_harmless(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent, end: End
    ) -> None:
        channel = open_to(transport, agent.port)
        end(server, transport)
        channel.send_close()
        transport.join(WAIT_S)
        channel.send_close()

    @ENDS
    def test_closed_channel_has_no_entry_once_its_transport_ends(
        self, *, server: LoopbackSSHServer, transport: Any, agent: Agent, end: End
    ) -> None:
        """Even while something references it, such as paramiko's exception, whose traceback has the last channel."""
        channel = open_to(transport, agent.port)
        channel.close()  # the server's CLOSE, which would remove the entry, never comes
        assert transport._channels.get(channel.chanid) is channel
        end(server, transport)
        transport.join(WAIT_S)
        assert channel.transport_ended
        assert len(transport._channels) == 0


class TestSending:
    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_sent_data_arrives_whole_in_messages_of_limited_size(
        self, transport: paramiko.Transport, agent: Agent, kind: Callable[[bytes], Any]
    ) -> None:
        channel, peer = open_to(transport, agent.port), agent.accept()
        data = bytes(range(256)) * 4096
        reader = Task(read_all, peer)
        left, sizes = kind(data), []
        while left:
            sizes.append(channel.send(left))
            left = left[sizes[-1] :]
        channel.shutdown_write()
        same(reader.result(), data)
        assert max(sizes) <= channel.out_max_packet_size
        assert channel.send(b"after the end") == 0
        channel.send_close()
        with pytest.raises(OSError, match="closed"):
            channel.send(b"after the close")


class Delivery:
    """A channel whose data is delivered to one end of a pair of sockets."""

    def __init__(self, transport: paramiko.Transport, agent: Agent) -> None:
        self.channel = open_to(transport, agent.port)
        self.peer = agent.accept()
        self.near, self.far = socket.socketpair()
        self.far.settimeout(WAIT_S)
        self.began: list[threading.Thread] = []
        self.task = Task(self.channel.deliver, self.near, lambda: self.began.append(threading.current_thread()))

    def exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            data += self.far.recv(count - len(data))
        return bytes(data)

    def wait_for_direct_writes(self) -> None:
        """Wait until whatever arrives next is written directly."""
        self.peer.sendall(b"first")
        assert self.exactly(5) == b"first"
        received: Any = self.channel.in_buffer
        eventually(lambda: received._sink, WAIT_S)

    def end(self) -> None:
        self.far.close()
        self.channel.send_close()
        with contextlib.suppress(OSError):
            self.task.result()
        self.near.close()


@pytest.fixture
def delivery(transport: paramiko.Transport, agent: Agent) -> Iterator[Delivery]:
    made = Delivery(transport, agent)
    yield made
    made.end()


@pytest.fixture
def small_switch_interval() -> Iterator[None]:
    """Have threads switch as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_long_send_over_a_fast_transport_is_one_call(
    server: LoopbackSSHServer, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server.connect(transport_factory=fast_transport) as client:
        transport: Any = client.get_transport()
        channel = open_to(transport, agent.port)
        calls: list[object] = []
        send = transport.packetizer.send_message

        def note(message: object) -> None:
            calls.append(message)
            send(message)

        monkeypatch.setattr(transport.packetizer, "send_message", note)
        size = 3 * channel.message_bytes
        assert channel.send(bytes(size)) == size
        assert [len(call.pieces) for call in calls if isinstance(call, Messages)] == [3]
        channel.send_close()


def test_dropped_message_is_not_counted_as_sent(
    transport: paramiko.Transport, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paramiko drops a message silently if its transport has ended before it is sent."""
    channel = open_to(transport, agent.port)
    with monkeypatch.context() as patch:
        patch.setattr(transport, "active", False)
        with pytest.raises(TransportClosed):
            channel.send(b"dropped")
    channel.send_close()


class FakeTCPSocket:
    """Stands in for a TCP socket, and counts how often an acknowledgement was requested."""

    def __init__(self) -> None:
        self.times = 0

    def setsockopt(self, *option: int) -> None:
        assert option == (socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self.times += 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has TCP_QUICKACK")
class TestAcknowledging:
    """A server that sends small packets waits for each acknowledgement, up to 40 ms."""

    def test_received_data_is_acknowledged_after_it_was_written(self) -> None:
        near, far = socket.socketpair()
        carrier: Any = FakeTCPSocket()
        with near, far:
            received = ReceiveBuffer(64 << 20)
            received.carrier = carrier
            received.feed(b"kept")
            assert carrier.times == 1
            received.delivered, received._sink = 1, near
            received.feed(b"written")
            assert carrier.times == 2
            received.stop()
            received.feed(b"too late")
            assert carrier.times == 3

    def test_channel_over_tcp_has_the_transports_socket_as_carrier(
        self, transport: paramiko.Transport, agent: Agent
    ) -> None:
        channel: Any = open_to(transport, agent.port)
        assert channel.in_buffer.carrier is transport.sock

    def test_answer_to_an_open_is_acknowledged(
        self, transport: paramiko.Transport, agent: Agent, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        acknowledged: list[object] = []
        monkeypatch.setattr(opening_module, "acknowledge", acknowledged.append)
        open_to(transport, agent.port)
        assert acknowledged == [transport.sock]

    def test_closed_socket_is_ignored(self) -> None:
        near, far = socket.socketpair()
        far.close()
        near.close()
        acknowledge(near)


class TestDelivering:
    def test_accepted_data_is_written_on_the_transports_thread(self, delivery: Delivery) -> None:
        delivery.wait_for_direct_writes()
        received: Any = delivery.channel.in_buffer
        delivery.peer.sendall(b"second")
        assert delivery.exactly(6) == b"second"
        eventually(lambda: received._unreported == 6, WAIT_S)  # the deliverer is not woken for so little
        assert delivery.channel.delivered_bytes == 11
        assert len(delivery.began) == 1

    def test_data_that_the_socket_does_not_accept_is_buffered_in_order(self, delivery: Delivery) -> None:
        delivery.wait_for_direct_writes()
        data = bytes(range(256)) * (3 << 12)  # 3 MiB: more than the pair of sockets holds, less than the window
        delivery.peer.sendall(data)
        eventually(lambda: len(delivery.channel.in_buffer) > 1 << 20, WAIT_S)
        delivery.peer.sendall(b"last")
        assert delivery.exactly(len(data) + 4) == data + b"last"
        eventually(lambda: delivery.channel.delivered_bytes == len(data) + 9, WAIT_S)

    def test_nothing_is_written_directly_while_data_is_buffered(self) -> None:
        near, far = socket.socketpair()
        with near, far:
            received = ReceiveBuffer(64 << 20)
            received.delivered, received._sink = 1, near
            received.feed(bytes(8 << 20))
            direct = received.delivered - 1
            assert 0 < direct < 8 << 20
            far.recv(1 << 20)  # there is room again
            received.feed(b"behind")
            buffered, written = received.take(near)
            assert written == direct
            while len(buffered) < (8 << 20) + 6 - direct:
                piece, written = received.take(near)
                assert len(piece) <= channel_module._PIECE_BYTES
                assert written == 0
                buffered = memoryview(bytes(buffered) + piece)
            assert bytes(buffered[-6:]) == b"behind"
            received.feed(b"later")  # what was returned may not be written yet
            assert bytes(received.take(near)[0]) == b"later"

    def test_data_after_stop_is_not_buffered(self) -> None:
        """A server that keeps sending until it learns of the end fills no memory."""
        near, far = socket.socketpair()
        with near, far:
            received = ReceiveBuffer(64 << 20)
            received.feed(bytes(1 << 20))
            received.stop()
            received.feed(bytes(1 << 20))
            assert len(received) == 0

    def test_server_that_ignores_the_window_fills_no_memory(self) -> None:
        near, far = socket.socketpair()
        with near, far:
            received = ReceiveBuffer(1000)
            received.feed(bytes(1000))
            assert len(received) == 1000
            received.feed(b"x")
            assert len(received) == 0
            buffered, written = received.take(near)
            assert (bytes(buffered), written) == (b"", 0), "nothing more arrives"

    def test_order_is_kept_whichever_thread_writes(self, small_switch_interval: None) -> None:
        del small_switch_interval
        count, channel = 20_000, SafeChannel(1)
        near, far = socket.socketpair()
        with near, far:
            channel.in_buffer.feed(b"first")
            deliverer = Task(channel.deliver, near, do_nothing)
            reader = Task(read_all, far)
            for number in range(count):
                channel.in_buffer.feed(number.to_bytes(4))
            channel.in_buffer.close()
            deliverer.result()
            near.shutdown(socket.SHUT_WR)
            assert reader.result() == b"first" + b"".join(number.to_bytes(4) for number in range(count))

    def test_window_is_adjusted_only_for_delivered_data(self, delivery: Delivery) -> None:
        delivery.wait_for_direct_writes()
        reader = Task(lambda: sum(len(delivery.exactly(1 << 20)) for _ in range(32)))
        delivery.peer.sendall(bytes(32 << 20))  # five windows
        assert reader.result() == 32 << 20
        delivery.peer.settimeout(0.5)
        with pytest.raises(TimeoutError):
            delivery.peer.sendall(bytes(256 << 20))
        held = len(delivery.channel.in_buffer)
        assert held <= ssh.WINDOW_BYTES, "no more than the window is buffered for a reader that has stopped"

    def test_delivery_ends_with_the_servers_eof_after_all_data(self, delivery: Delivery) -> None:
        delivery.wait_for_direct_writes()
        delivery.peer.sendall(bytes(3 << 20))
        delivery.peer.shutdown(socket.SHUT_WR)
        assert len(delivery.exactly(3 << 20)) == 3 << 20
        delivery.task.result()
        assert delivery.channel.delivered_bytes == (3 << 20) + 5

    def test_delivery_ends_when_the_channel_is_closed(self, delivery: Delivery) -> None:
        delivery.wait_for_direct_writes()
        delivery.channel.close()
        delivery.task.result()

    def test_closed_local_socket_fails_the_delivery_alone(
        self, transport: paramiko.Transport, delivery: Delivery, agent: Agent
    ) -> None:
        delivery.wait_for_direct_writes()
        delivery.far.close()
        delivery.peer.sendall(b"for nobody")
        with pytest.raises(OSError, match="Broken pipe"):
            delivery.task.result()
        open_to(transport, agent.port).send_close()

    def test_nothing_is_written_after_the_delivery_has_ended(self, delivery: Delivery) -> None:
        delivery.wait_for_direct_writes()
        delivery.channel.close()
        delivery.task.result()
        delivery.channel.in_buffer.feed(b"late")
        delivery.far.setblocking(False)  # noqa: FBT003 - the socket module's signature
        with pytest.raises(BlockingIOError):
            delivery.far.recv(9)
