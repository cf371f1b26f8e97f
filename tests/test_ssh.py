"""Channels that cannot harm their transport; and paramiko's insides are still what that is built on."""

from __future__ import annotations

import contextlib
import gc
import re
import socket
import sys
import threading
import time
import weakref
from array import array
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import paramiko
import pytest
from paramiko.buffered_pipe import BufferedPipe
from paramiko.common import CONNECTION_FAILED_CODE
from paramiko.packet import NeedRekeyException, Packetizer

from proxy_fsm import ssh
from proxy_fsm.ssh import (
    ChannelOpening,
    ChannelRefused,
    EndWatch,
    OpenAbandoned,
    SafeChannel,
    TransportGone,
    fast_transport,
    packets_received,
    set_nodelay,
)
from proxy_fsm.testing import Forwarding, LoopbackSSHServer

from .e2e.procs import eventually
from .e2e.sshd import SshServer
from .tunnel_helpers import (
    LOOPBACK,
    SOON_S,
    WAIT_S,
    Agent,
    Task,
    dead_port,
    median_s,
    needs_sshd,
    own_threads,
    read_all,
    since,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    End: TypeAlias = Callable[[LoopbackSSHServer, paramiko.Transport], None]

GCM = "aes128-gcm@openssh.com"
#: An address that the embedded server prohibits, since it is not a loopback one (RFC 5737).
FOREIGN = ("192.0.2.1", 9)


@pytest.fixture
def server() -> Iterator[LoopbackSSHServer]:
    with LoopbackSSHServer() as running:
        yield running


@pytest.fixture
def transport(server: LoopbackSSHServer) -> Iterator[paramiko.Transport]:
    with contextlib.closing(server.connect_transport()) as connected:
        set_nodelay(connected)
        yield connected


@pytest.fixture
def agent() -> Iterator[Agent]:
    with Agent() as listening:
        yield listening


def opening_to(transport: paramiko.Transport, port: int) -> ChannelOpening:
    opening = ChannelOpening(transport, "direct-tcpip", (LOOPBACK, port))
    opening.send()
    return opening


def open_to(transport: paramiko.Transport, port: int) -> SafeChannel:
    return opening_to(transport, port).wait()


def has_nodelay(transport: paramiko.Transport) -> bool:
    assert isinstance(transport.sock, socket.socket)
    return transport.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def ciphers_in_use(transport: Any) -> set[str]:
    return {transport.local_cipher, transport.remote_cipher}


def do_nothing() -> None:
    """Be called back."""


def packets_sent(transport: Any) -> int:
    return int(transport.packetizer._Packetizer__sequence_number_out)


# ---- what is relied on in paramiko ----


class Probe(paramiko.Channel):
    """A channel that notes which of its insides paramiko calls, and whether its lock was held."""

    def __init__(self, chanid: int) -> None:
        super().__init__(chanid)
        self.calls: list[tuple[str, bool]] = []
        self.closings: list[Any] = []

    def _close_internal(self) -> Any:
        self.calls.append(("_close_internal", self.lock.locked()))
        self.closings.append(super()._close_internal())  # type: ignore[misc]
        return self.closings[-1]

    def _set_closed(self) -> None:
        self.calls.append(("_set_closed", self.lock.locked()))
        super()._set_closed()  # type: ignore[misc]

    def _unlink(self) -> None:
        self.calls.append(("_unlink", self.lock.locked()))
        super()._unlink()  # type: ignore[misc]


def open_probe(transport: Any, port: int, event: Any = None) -> Probe:
    """Open a channel of our own class the way that `ChannelOpening.send` does."""
    answered = threading.Event()
    with transport.lock:
        number = transport._next_channel()
        probe = Probe(number)
        probe._set_transport(transport)  # type: ignore[attr-defined]
        probe._set_window(1 << 20, 1 << 15)  # type: ignore[attr-defined]
        transport._channels.put(number, probe)
        transport.channel_events[number] = event or answered
        transport.channels_seen[number] = True
    message = paramiko.Message()
    message.add_byte(b"\x5a")  # SSH_MSG_CHANNEL_OPEN
    message.add_string("direct-tcpip")
    for value in (number, 1 << 20, 1 << 15):
        message.add_int(value)
    message.add_string(LOOPBACK)
    message.add_int(port)
    message.add_string(LOOPBACK)
    message.add_int(0)
    transport._send_user_message(message)
    if event is None:
        assert answered.wait(WAIT_S)
    return probe


class Answer:
    """What is put in the place of an event: notes how things stood when the answer came."""

    def __init__(self, transport: Any) -> None:
        self.transport = transport
        self.called = threading.Event()
        self.locked = False
        self.thread: threading.Thread | None = None

    def set(self) -> None:
        self.locked = self.transport.lock.locked()
        self.thread = threading.current_thread()
        self.called.set()


def rely_on_lock(transport: Any, agent: Agent) -> None:
    answer = Answer(transport)
    probe = open_probe(transport, agent.port, answer)
    assert answer.called.wait(WAIT_S)
    assert probe.active
    assert answer.locked, "an answer is taken in under this lock"
    assert transport.lock.acquire(timeout=WAIT_S)
    transport.lock.release()


def rely_on_channels_put(transport: Any, _: Agent) -> None:
    channel = paramiko.Channel(4711)
    transport._channels.put(4711, channel)
    assert transport._channels.get(4711) is channel
    assert channel in transport._channels.values()
    gone = weakref.ref(channel)
    del channel
    gc.collect()
    assert gone() is None, "the map holds its channels weakly"
    assert transport._channels.get(4711) is None


def rely_on_channels_delete(transport: Any, _: Agent) -> None:
    channel = paramiko.Channel(4711)
    transport._channels.put(4711, channel)
    transport._channels.delete(4711)
    transport._channels.delete(4711)
    assert transport._channels.get(4711) is None


def rely_on_next_channel(transport: Any, _: Agent) -> None:
    with transport.lock:
        number = transport._next_channel()
        following = paramiko.Channel(number + 1)
        transport._channels.put(number + 1, following)
        assert transport._next_channel() == number + 2, "it leaves out what is in use"


def rely_on_channel_events(transport: Any, agent: Agent) -> None:
    answer = Answer(transport)
    probe = open_probe(transport, agent.port, answer)
    assert answer.called.wait(WAIT_S)
    with transport.lock:
        assert probe.chanid not in transport.channel_events, "it is let go when the answer has come"
    assert answer.thread is transport, "set() is called by the transport's own thread"


def rely_on_channels_seen(transport: Any, agent: Agent) -> None:
    probe = open_probe(transport, agent.port)
    transport._channels.delete(probe.chanid)
    agent.accept().sendall(b"for a channel that is known no more")
    open_probe(transport, agent.port)
    assert transport.is_active(), "what comes for a channel that was seen before is ignored"


def rely_on_saved_exception(transport: Any, _: Agent) -> None:
    """The monitor tells why a transport ended."""
    saved: list[Any] = []
    watch = EndWatch(transport, lambda: saved.append(transport.saved_exception))
    transport.sock.shutdown(socket.SHUT_RDWR)
    transport.join(WAIT_S)
    watch.cancel()
    assert isinstance(saved[0], EOFError)


def rely_on_handler_table(transport: Any, _: Agent) -> None:
    seen: list[tuple[int, bool, threading.Thread]] = []
    beneath = transport._handler_table[92]  # SSH_MSG_CHANNEL_OPEN_FAILURE

    def note(message: paramiko.Message) -> None:
        seen.append((message.get_int(), transport.lock.locked(), threading.current_thread()))
        message.rewind()
        beneath(message)

    transport._handler_table[92] = note
    with pytest.raises(paramiko.ChannelException) as refused:
        transport.open_channel("direct-tcpip", (LOOPBACK, dead_port()), (LOOPBACK, 1), timeout=WAIT_S)
    assert refused.value.code == ChannelRefused.CONNECT_FAILED
    assert [each[1:] for each in seen] == [(False, transport)], "called once, without the lock"
    assert refused.value.text == CONNECTION_FAILED_CODE[ChannelRefused.CONNECT_FAILED]


def rely_on_send_user_message(transport: Any, _: Agent) -> None:
    before = packets_sent(transport)
    message = paramiko.Message()
    message.add_byte(b"\x02")  # SSH_MSG_IGNORE
    message.add_string("")
    transport._send_user_message(message)
    assert packets_sent(transport) == before + 1
    transport.close()
    transport._send_user_message(message)
    assert packets_sent(transport) == before + 1, "a transport that is closed drops it without a word"

    sent: list[tuple[int, threading.Thread]] = []

    def note(message: paramiko.Message) -> None:
        sent.append((message.asbytes()[0], threading.current_thread()))

    transport._send_user_message = note
    channel: Any = paramiko.Channel(1)
    channel._set_transport(transport)
    channel._set_remote_channel(1, 1 << 20, 1 << 15)
    channel.send(b"x")
    channel._handle_close(paramiko.Message())
    assert [number for number, _ in sent] == [94, 96, 97], "channels send by what was put into the transport itself"


def rely_on_own_thread(transport: Any, agent: Agent) -> None:
    """The thread that runs a transport is the transport, and answers a CLOSE by what was put into it."""
    closers: list[threading.Thread] = []
    probe = open_probe(transport, agent.port)
    probe.shutdown_write()
    transport._send_user_message = lambda _: closers.append(threading.current_thread())
    agent.accept().close()
    eventually(lambda: closers, WAIT_S)
    assert closers == [transport]


def rely_on_send_message(transport: Any, _: Agent) -> None:
    transport.clear_to_send.clear()
    before = packets_sent(transport)
    transport._send_message(paramiko.Message(b"\x02\x00\x00\x00\x00"))  # SSH_MSG_IGNORE
    assert packets_sent(transport) == before + 1, "it sends, whatever is going on"


def rely_on_clear_to_send_lock(transport: Any, _: Agent) -> None:
    held: list[bool] = []
    send = transport._send_message

    def note(message: paramiko.Message) -> None:
        held.append(transport.clear_to_send_lock.locked())
        send(message)

    transport._send_message = note
    transport._send_user_message(paramiko.Message(b"\x02\x00\x00\x00\x00"))
    assert held == [True], "what is sent for users is sent under this lock"
    transport.clear_to_send_lock.acquire()
    exchange = Task(transport._send_kex_init)
    assert transport.clear_to_send.is_set(), "an exchange of keys begins under this lock"
    transport.clear_to_send_lock.release()
    exchange.result()
    assert transport.clear_to_send.wait(WAIT_S), "and ends with this event"


def rely_on_clear_to_send(transport: Any, _: Agent) -> None:
    assert transport.clear_to_send.is_set()
    transport.clear_to_send.clear()
    transport.clear_to_send_timeout = 0
    before = packets_sent(transport)
    with pytest.raises(paramiko.SSHException, match="Key-exchange timed out"):
        transport._send_user_message(paramiko.Message(b"\x02"))
    assert packets_sent(transport) == before, "nothing of the user's is sent while keys are exchanged"


def rely_on_packetizer(transport: Any, agent: Agent) -> None:
    packetizer = transport.packetizer
    open_probe(transport, agent.port)
    assert transport.packetizer is packetizer


def rely_on_active_threads(transport: Any, _: Agent) -> None:
    assert transport in paramiko.transport._active_threads  # type: ignore[attr-defined]
    transport.close()
    transport.join(WAIT_S)
    assert transport not in paramiko.transport._active_threads  # type: ignore[attr-defined]


def rely_on_set_transport(transport: Any, _: Agent) -> None:
    channel: Any = paramiko.Channel(1)
    channel._set_transport(transport)
    assert channel.get_transport() is transport


def rely_on_set_window(transport: Any, _: Agent) -> None:
    channel: Any = paramiko.Channel(1)
    channel._set_transport(transport)
    channel._set_window(1 << 22, 1 << 18)
    assert channel.in_window_size == 1 << 22
    assert channel.in_max_packet_size == 1 << 18
    assert 0 < channel.in_window_threshold < 1 << 22


def rely_on_close_internal(transport: Any, agent: Agent) -> None:
    by_us, by_them = open_probe(transport, agent.port), open_probe(transport, agent.port)
    by_us.close()
    assert by_us.calls[:2] == [("_close_internal", True), ("_set_closed", True)]
    eof, close = by_us.closings[0]
    assert (eof.asbytes()[0], close.asbytes()[0]) == (96, 97), "it returns the messages that are to be sent"
    agent.accept().close()
    agent.accept().close()
    by_them.shutdown_write()
    assert by_them.event.wait(WAIT_S)
    assert by_them.calls[:2] == [("_close_internal", True), ("_set_closed", True)], "the server's CLOSE calls it too"


def rely_on_set_closed(transport: Any, agent: Agent) -> None:
    probe = open_probe(transport, agent.port)
    reader = Task(probe.recv, 1)
    with probe.lock:
        probe._set_closed()
    assert reader.result() == b"", "it wakes what reads"
    assert probe.closed


def rely_on_unlink(transport: Any, agent: Agent) -> None:
    probe = open_probe(transport, agent.port)
    transport.close()
    assert ("_unlink", False) in probe.calls, "a transport unlinks each of its channels when it is closed"
    assert probe.closed
    assert transport._channels.get(probe.chanid) is None


def rely_on_sequence_number(transport: Any, agent: Agent) -> None:
    before = transport.packetizer._Packetizer__sequence_number_in
    open_probe(transport, agent.port)
    assert transport.packetizer._Packetizer__sequence_number_in > before


def rely_on_check_add_window(transport: Any, agent: Agent) -> None:
    probe: Any = open_probe(transport, agent.port)
    probe.in_window_threshold = 100
    assert probe._check_add_window(100) == 0
    assert probe._check_add_window(1) == 101, "more than the threshold is given back at once"
    probe.close()
    assert probe._check_add_window(1000) == 0, "a channel that is closed gives nothing back"


def rely_on_wait_for_send_window(transport: Any, agent: Agent) -> None:
    probe: Any = open_probe(transport, agent.port)
    with probe.lock:
        probe.out_window_size, probe.out_max_packet_size = 5000, 4096
        assert probe._wait_for_send_window(10_000) == 4096 - 64, "no more than one message holds"
        assert probe._wait_for_send_window(10_000) == 5000 - 4032, "no more than the window"
        assert probe.out_window_size == 0
        probe.eof_sent = True
        assert probe._wait_for_send_window(1) == 0


def rely_on_in_buffer(transport: Any, agent: Agent) -> None:
    fed: list[bytes] = []

    class Pipe(BufferedPipe):  # type: ignore[type-arg]  # generic in its stub alone
        def feed(self, data: bytes) -> None:
            fed.append(data)

    probe = open_probe(transport, agent.port)
    probe.in_buffer = Pipe()
    agent.accept().sendall(b"for the one who was put in its place")
    eventually(lambda: b"".join(fed) == b"for the one who was put in its place", WAIT_S)
    probe.close()
    assert probe.in_buffer.read(1) == b"", "it is closed with the channel"


def rely_on_pipe(_: Any, __: Agent) -> None:
    pipe: Any = BufferedPipe()
    pipe.feed(b"data")
    assert pipe._buffer == array("B", b"data")
    with pipe._lock:
        pipe._cv.notify_all()
        assert not pipe._closed
    pipe.close()
    assert pipe._closed


def rely_on_remainder(_: Any, __: Agent) -> None:
    near, far = socket.socketpair()
    with near, far:
        packetizer: Any = Packetizer(near)
        far.sendall(b"banner\nrest")
        assert packetizer.readline(1) == "banner"
        assert packetizer._Packetizer__remainder == b"rest"
        assert packetizer.read_all(4) == b"rest"
        assert packetizer._Packetizer__remainder == b""


def rely_on_check_keepalive(_: Any, __: Agent) -> None:
    calls: list[object] = []
    near, far = socket.socketpair()
    with near, far:
        packetizer: Any = Packetizer(near)
        packetizer.set_outbound_cipher(object(), 8, None, 0, b"")
        packetizer.set_keepalive(0.001, lambda: calls.append(None))
        time.sleep(0.01)
        packetizer._check_keepalive()
    assert calls


RELIED_ON: dict[str, Callable[[Any, Agent], None]] = {
    "Transport.lock": rely_on_lock,
    "Transport._channels.put": rely_on_channels_put,
    "Transport._channels.delete": rely_on_channels_delete,
    "Transport._next_channel": rely_on_next_channel,
    "Transport.channel_events": rely_on_channel_events,
    "Transport.channels_seen": rely_on_channels_seen,
    "Transport.saved_exception": rely_on_saved_exception,
    "Transport._send_user_message": rely_on_send_user_message,
    "Transport._send_message": rely_on_send_message,
    "Transport.clear_to_send": rely_on_clear_to_send,
    "Transport.clear_to_send_lock": rely_on_clear_to_send_lock,
    "Transport.run": rely_on_own_thread,
    "Transport._handler_table": rely_on_handler_table,
    "Transport.packetizer": rely_on_packetizer,
    "Channel._set_transport": rely_on_set_transport,
    "Channel._set_window": rely_on_set_window,
    "Channel._close_internal": rely_on_close_internal,
    "Channel._set_closed": rely_on_set_closed,
    "Channel._unlink": rely_on_unlink,
    "Channel._check_add_window": rely_on_check_add_window,
    "Channel._wait_for_send_window": rely_on_wait_for_send_window,
    "Channel.in_buffer": rely_on_in_buffer,
    **dict.fromkeys(("BufferedPipe._lock", "BufferedPipe._cv", "BufferedPipe._buffer"), rely_on_pipe),
    "BufferedPipe._closed": rely_on_pipe,
    "Packetizer.__sequence_number_in": rely_on_sequence_number,
    "Packetizer.__remainder": rely_on_remainder,
    "Packetizer._check_keepalive": rely_on_check_keepalive,
    "transport._active_threads": rely_on_active_threads,
}


@pytest.mark.parametrize("name", RELIED_ON)
def test_paramiko_still_has_what_is_relied_on(name: str, transport: paramiko.Transport, agent: Agent) -> None:
    try:
        RELIED_ON[name](transport, agent)
    except (AttributeError, TypeError, AssertionError) as error:
        pytest.fail(f"paramiko {paramiko.__version__} has changed {name}: {error}")


def test_all_that_the_docstring_lists_is_checked() -> None:
    listed = []
    for owner, attributes in re.findall(r"^\* ``(\w+)``: (.*(?:\n  .*)*)", ssh.__doc__ or "", re.MULTILINE):
        for name, methods in re.findall(r"``(\w+)``(?: \(([^)]*)\))?", attributes):
            inner = re.findall(r"``(\w+)``", methods)
            listed += [f"{owner}.{name}.{method}" for method in inner] or [f"{owner}.{name}"]
    assert sorted(listed) == sorted(RELIED_ON)


# ---- opening ----


class TestOpening:
    def test_an_open_gives_a_channel_that_carries_both_ways(self, transport: paramiko.Transport, agent: Agent) -> None:
        channel = open_to(transport, agent.port)
        assert isinstance(channel, SafeChannel)
        peer = agent.accept()
        channel.send(b"up")
        assert peer.recv(9) == b"up"
        peer.sendall(b"down")
        assert channel.recv(9) == b"down"
        channel.send_close()

    def test_a_session_channel_needs_no_destination(
        self, server: LoopbackSSHServer, transport: paramiko.Transport
    ) -> None:
        opening = ChannelOpening(transport, "session")
        opening.send()
        opening.wait().send_close()
        assert server.sessions_opened == 1

    def test_a_port_where_nothing_listens_is_refused_with_code_2(self, transport: paramiko.Transport) -> None:
        with pytest.raises(ChannelRefused, match="Connect failed") as refused:
            open_to(transport, dead_port())
        assert refused.value.code == ChannelRefused.CONNECT_FAILED == 2

    def test_prohibited_forwarding_is_refused_with_code_1(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        server.forwarding = Forwarding.DENIED
        with pytest.raises(ChannelRefused, match="Administratively prohibited") as refused:
            open_to(transport, agent.port)
        assert refused.value.code == ChannelRefused.PROHIBITED == 1

    def test_an_unknown_kind_is_refused_with_code_3(self, transport: paramiko.Transport) -> None:
        opening = ChannelOpening(transport, "nonsense")
        opening.send()
        with pytest.raises(ChannelRefused) as refused:
            opening.wait()
        assert refused.value.code == ChannelRefused.UNKNOWN_TYPE == 3

    def test_a_refusal_is_not_left_behind_for_the_caller_to_find(self, transport: paramiko.Transport) -> None:
        with pytest.raises(ChannelRefused):
            open_to(transport, dead_port())
        assert transport.saved_exception is None
        assert transport.get_exception() is None

    def test_a_refusal_does_not_take_the_place_of_one_that_the_caller_is_about_to_read(
        self, transport: paramiko.Transport
    ) -> None:
        callers = transport.saved_exception = paramiko.ChannelException(1, "the caller's")
        with pytest.raises(ChannelRefused):
            open_to(transport, dead_port())
        assert transport.get_exception() is callers

    def test_a_refused_open_leaves_no_entry(self, transport: Any) -> None:
        with pytest.raises(ChannelRefused):
            open_to(transport, dead_port())
        assert len(transport._channels) == 0
        assert not transport.channel_events

    @pytest.mark.parametrize("together", ["answered one by one", "answered in one burst"])
    def test_twenty_opens_at_once_each_get_their_own_answer(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent, together: str
    ) -> None:
        destinations = [(LOOPBACK, agent.port), (LOOPBACK, dead_port()), FOREIGN, (LOOPBACK, agent.port)] * 5
        expected: list[int | None] = [None, 2, 1, None] * 5
        ready = threading.Barrier(20)

        def attempt(destination: tuple[str, int]) -> SafeChannel | int:
            opening = ChannelOpening(transport, "direct-tcpip", destination)
            ready.wait(WAIT_S)
            opening.send()
            try:
                return opening.wait()
            except ChannelRefused as refused:
                return refused.code

        if together == "answered in one burst":
            server.forwarding = Forwarding.HELD
        tasks = [Task(attempt, destination) for destination in destinations]
        if together == "answered in one burst":
            server.wait_for(lambda: server.channels_held == 20)
            server.release()
        outcomes = [task.result() for task in tasks]
        assert [None if isinstance(each, SafeChannel) else each for each in outcomes] == expected
        for outcome in outcomes:
            if isinstance(outcome, SafeChannel):
                outcome.send_close()
        server.wait_for(lambda: server.channels_open == 0)
        assert transport.is_active()

    def test_the_channel_lives_as_long_as_its_user_holds_it(self, transport: paramiko.Transport, agent: Agent) -> None:
        channel = open_to(transport, agent.port)
        gc.collect()
        agent.accept().sendall(b"still here")
        assert channel.recv(99) == b"still here"
        channel.send_close()


class TestKeysAreExchangedForTooLong:
    def test_the_open_is_refused_and_the_transport_lives(self, transport: Any, agent: Agent) -> None:
        with keys_exchanged(transport):
            opening = opening_to(transport, agent.port)
            with pytest.raises(ChannelRefused, match="Key-exchange timed out") as refused:
                opening.wait()
        assert refused.value.code == ChannelRefused.RESOURCE_SHORTAGE == 4
        assert len(transport._channels) == 0
        assert not transport.channel_events
        open_to(transport, agent.port).send_close()

    def test_an_open_that_was_abandoned_meanwhile_leaves_no_entry_either(self, transport: Any, agent: Agent) -> None:
        opening = ChannelOpening(transport, "direct-tcpip", (LOOPBACK, agent.port))
        opening.abandon()
        with keys_exchanged(transport):
            opening.send()
        with pytest.raises(OpenAbandoned):
            opening.wait()
        assert len(transport._channels) == 0
        assert not transport.channel_events

    def test_a_transport_that_ends_meanwhile_is_gone(self, transport: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def end_and_fail(_: object) -> None:
            transport.close()
            raise paramiko.SSHException("Key-exchange timed out")

        monkeypatch.setattr(transport, "_send_user_message", end_and_fail)
        with pytest.raises(TransportGone):
            opening_to(transport, 9).wait()

    def test_a_write_that_fails_means_that_the_transport_is_gone(
        self, transport: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: object) -> None:
            raise BrokenPipeError

        monkeypatch.setattr(transport, "_send_user_message", fail)
        with pytest.raises(TransportGone):
            opening_to(transport, 9).wait()


@contextlib.contextmanager
def keys_exchanged(transport: Any) -> Iterator[None]:
    """A key exchange for which nobody has the patience."""
    patience_s, transport.clear_to_send_timeout = transport.clear_to_send_timeout, 0
    transport.clear_to_send.clear()
    try:
        yield
    finally:
        transport.clear_to_send.set()
        transport.clear_to_send_timeout = patience_s


class TestKeysAreExchanged:
    """Neither a transport nor a byte is lost, and no thread waits for itself (paramiko issue 822)."""

    @staticmethod
    def closed_by_server(transport: paramiko.Transport, agent: Agent) -> paramiko.Channel:
        """A channel of paramiko's own, as the caller's are, that the server will close when the agent does."""
        channel = transport.open_channel("direct-tcpip", (LOOPBACK, agent.port), (LOOPBACK, 1), timeout=WAIT_S)
        channel.shutdown_write()
        return channel

    def test_the_transports_own_thread_goes_on_and_answers_afterwards(
        self, server: LoopbackSSHServer, transport: Any, agent: Agent
    ) -> None:
        ours = open_to(transport, agent.port)
        peer = agent.accept()
        theirs = [self.closed_by_server(transport, agent) for _ in range(3)]
        before = packets_sent(transport)
        transport.clear_to_send.clear()
        for _ in theirs:
            agent.accept().close()
        for channel in theirs:
            eventually(lambda channel=channel: channel.closed, WAIT_S)  # type: ignore[misc]
        peer.sendall(b"it reads on")
        assert ours.recv(99) == b"it reads on"
        assert packets_sent(transport) == before, "nothing is sent while keys are exchanged"
        transport.clear_to_send.set()
        eventually(lambda: packets_sent(transport) == before + len(theirs), WAIT_S)
        ours.send_close()
        server.wait_for(lambda: server.channels_open == 0)
        eventually(lambda: not own_threads(), WAIT_S)

    def test_it_goes_on_also_while_another_thread_is_writing(self, transport: Any, agent: Agent) -> None:
        ours = open_to(transport, agent.port)
        peer = agent.accept()
        theirs = self.closed_by_server(transport, agent)
        before = packets_sent(transport)
        with transport.clear_to_send_lock:
            agent.accept().close()
            eventually(lambda: theirs.closed, WAIT_S)
            peer.sendall(b"it reads on")
            assert ours.recv(99) == b"it reads on"
        eventually(lambda: packets_sent(transport) == before + 1, WAIT_S)
        ours.send_close()

    def test_what_its_own_thread_sends_keeps_its_order(self, transport: Any, agent: Agent) -> None:
        sent: list[int] = []

        class SendsAll:
            """Called by the transport's own thread, as the answer to an open."""

            def set(self) -> None:
                transport._send_message = lambda message: sent.append(message.asbytes()[0])
                transport.clear_to_send.clear()
                for number in range(100):
                    if number == 50:
                        transport.clear_to_send.set()
                    transport._send_user_message(paramiko.Message(bytes([number])))

        open_to(transport, agent.port).send_close()
        probe = open_probe(transport, agent.port, SendsAll())
        eventually(lambda: len(sent) == 100, WAIT_S)
        assert sent == list(range(100))
        probe.close()

    def test_a_keepalive_does_not_wait_either(self, server: LoopbackSSHServer, transport: Any, agent: Agent) -> None:
        channel = open_to(transport, agent.port)
        transport.clear_to_send.clear()
        transport.set_keepalive(1)
        before = time.monotonic()
        eventually(own_threads, WAIT_S)
        assert own_threads("proxy_fsm-late")
        assert since(before) < 5
        agent.accept().sendall(b"it reads on")
        assert channel.recv(99) == b"it reads on"
        transport.set_keepalive(0)
        transport.clear_to_send.set()
        channel.send_close()
        server.wait_for(lambda: server.channels_open == 0)

    def test_our_channels_wait_longer_than_paramiko_and_lose_nothing(
        self, server: LoopbackSSHServer, transport: Any, agent: Agent
    ) -> None:
        channel = open_to(transport, agent.port)
        peer = agent.accept()
        down = bytes(range(256)) * (ssh.WINDOW_BYTES >> 9)  # so much that reading it makes room for more
        peer.sendall(down)
        eventually(lambda: len(channel.in_buffer) == len(down), WAIT_S)
        with keys_exchanged(transport):
            calls: list[float] = []
            beneath = transport._send_user_message

            def note(message: paramiko.Message) -> None:
                calls.append(time.monotonic())
                beneath(message)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(transport, "_send_user_message", note)
                uploader, reader = Task(channel.send, b"up"), Task(channel.recv, len(down))
                eventually(lambda: len(calls) > 6, WAIT_S)
                assert uploader.running
                assert reader.running
        assert uploader.result() == 2
        assert peer.recv(9) == b"up"
        assert reader.result() == down
        with keys_exchanged(transport):
            closer = Task(channel.send_close)
            closer._thread.join(0.3)
            assert closer.running
        closer.result()
        server.wait_for(lambda: server.channels_open == 0)

    def test_a_transport_that_ends_meanwhile_lets_all_go(
        self, server: LoopbackSSHServer, transport: Any, agent: Agent
    ) -> None:
        channel = open_to(transport, agent.port)
        agent.accept()
        theirs = self.closed_by_server(transport, agent)
        with keys_exchanged(transport):
            agent.accept().close()
            eventually(lambda: theirs.closed, WAIT_S)
            uploader = Task(channel.send, b"up")
            server.drop()
            with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
                uploader.result()
            eventually(lambda: not own_threads(), WAIT_S)

    def test_the_transport_is_changed_once_and_not_kept_alive(self, server: LoopbackSSHServer, agent: Agent) -> None:
        transport: Any = server.connect_transport()
        open_to(transport, agent.port).send_close()
        changed = transport._send_user_message, dict(transport._handler_table)
        open_to(transport, agent.port).send_close()
        assert (transport._send_user_message, transport._handler_table) == changed
        transport.close()
        transport.join(WAIT_S)
        gone = weakref.ref(transport)
        del transport, changed
        gc.collect()
        assert gone() is None

    def test_what_others_have_put_there_stays_in_use(self, transport: Any, agent: Agent) -> None:
        calls: list[int] = []
        beneath = transport._send_user_message

        def foreign(message: paramiko.Message) -> None:
            calls.append(message.asbytes()[0])
            beneath(message)

        transport._send_user_message = foreign
        open_to(transport, agent.port).send_close()
        assert calls == [90, 97]


class TestNoThreads:
    """A channel that opens late is closed also where no thread can be started for it."""

    @pytest.fixture(autouse=True)
    def refused(self, monkeypatch: pytest.MonkeyPatch) -> set[str]:
        """The names of threads that cannot be started."""
        names = {"proxy_fsm-discard", "proxy_fsm-late"}
        start = threading.Thread.start

        def start_unless_named(thread: threading.Thread) -> None:
            if thread.name in names:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_unless_named)
        return names

    def test_what_the_transports_own_thread_has_to_send_goes_with_the_next(
        self, server: LoopbackSSHServer, transport: Any, agent: Agent, refused: set[str]
    ) -> None:
        open_to(transport, agent.port).send_close()
        agent.accept()
        server.wait_for(lambda: server.channels_open == 0)
        first, second = (TestKeysAreExchanged.closed_by_server(transport, agent) for _ in range(2))
        before = packets_sent(transport)
        with keys_exchanged(transport):
            agent.accept().close()
            eventually(lambda: first.closed, WAIT_S)
        refused.clear()
        agent.accept().close()
        eventually(lambda: second.closed, WAIT_S)
        eventually(lambda: packets_sent(transport) == before + 2, WAIT_S)

    def test_it_is_closed_by_whoever_takes_the_answer(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        server.forwarding = Forwarding.HELD
        opening = opening_to(transport, agent.port)
        server.wait_for(lambda: server.channels_held == 1)
        opening.abandon()
        server.release()
        server.wait_for(lambda: server.channels_opened == 1 and server.channels_open == 0)
        assert transport.is_active()

    def test_while_keys_are_exchanged_it_is_left_and_nobody_waits(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        channel = open_to(transport, agent.port)
        with keys_exchanged(transport):
            began = time.monotonic()
            ssh._discard(channel)
            assert since(began) < SOON_S
        assert server.channels_open == 1
        channel.send_close()
        server.wait_for(lambda: server.channels_open == 0)


class TestAbandon:
    def test_before_the_answer_wait_raises_at_once(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        server.forwarding = Forwarding.HELD

        def measure() -> float:
            opening = opening_to(transport, agent.port)
            raised: list[float] = []

            def wait() -> None:
                with pytest.raises(OpenAbandoned):
                    opening.wait()
                raised.append(time.monotonic())

            waiter = Task(wait)
            abandoned = time.monotonic()
            opening.abandon()
            waiter.result()
            return raised[0] - abandoned

        assert median_s(measure) < SOON_S

    def test_the_channel_that_opens_late_is_closed_on_the_server(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        server.forwarding = Forwarding.HELD
        opening = opening_to(transport, agent.port)
        server.wait_for(lambda: server.channels_held == 1)
        opening.abandon()
        server.release()
        peer = agent.accept()
        server.wait_for(lambda: server.channels_opened == 1 and server.channels_open == 0)
        assert read_all(peer) == b""
        assert transport.is_active()

    def test_a_late_refusal_is_taken_in_silence(self, server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
        server.forwarding = Forwarding.HELD
        opening = opening_to(transport, dead_port())
        server.wait_for(lambda: server.channels_held == 1)
        opening.abandon()
        server.release()
        with pytest.raises(ChannelRefused):
            open_to(transport, dead_port())  # answered after the first
        with pytest.raises(OpenAbandoned):
            opening.wait()
        assert transport.saved_exception is None

    def test_after_success_but_before_wait_the_channel_is_closed(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        opening = opening_to(transport, agent.port)
        assert opening._settled.wait(WAIT_S)
        opening.abandon()
        with pytest.raises(OpenAbandoned):
            opening.wait()
        server.wait_for(lambda: server.channels_opened == 1 and server.channels_open == 0)

    def test_after_wait_it_is_too_late_and_changes_nothing(self, transport: paramiko.Transport, agent: Agent) -> None:
        opening = opening_to(transport, agent.port)
        channel = opening.wait()
        opening.abandon()
        assert not channel.closed
        channel.send_close()

    def test_before_it_was_sent_the_channel_is_closed_too(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        opening = ChannelOpening(transport, "direct-tcpip", (LOOPBACK, agent.port))
        opening.abandon()
        opening.send()
        with pytest.raises(OpenAbandoned):
            opening.wait()
        server.wait_for(lambda: server.channels_opened == 1 and server.channels_open == 0)


def end_by_drop(server: LoopbackSSHServer, _: paramiko.Transport) -> None:
    server.drop()


def end_by_reset(server: LoopbackSSHServer, _: paramiko.Transport) -> None:
    server.drop(reset=True)


def end_by_close(_: LoopbackSSHServer, transport: paramiko.Transport) -> None:
    transport.close()


ENDS = pytest.mark.parametrize("end", [end_by_drop, end_by_reset, end_by_close])


class TestTransportEnds:
    @ENDS
    def test_while_an_open_is_pending_it_is_told_at_once(self, server: LoopbackSSHServer, end: End) -> None:
        server.forwarding = Forwarding.HELD

        def measure() -> float:
            with contextlib.closing(server.connect_transport()) as transport:
                opening = opening_to(transport, 9)
                server.wait_for(lambda: server.channels_held == 1)
                told: list[float] = []

                def wait() -> None:
                    with pytest.raises(TransportGone):
                        opening.wait()
                    told.append(time.monotonic())

                waiter = Task(wait)
                began = time.monotonic()
                end(server, transport)
                waiter.result()
                server.wait_for(lambda: server.channels_held == 0)
                return told[0] - began

        assert median_s(measure) < SOON_S

    @ENDS
    def test_before_the_open_is_sent_it_is_told_by_wait(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, end: End
    ) -> None:
        end(server, transport)
        transport.join(WAIT_S)
        opening = opening_to(transport, 9)
        with pytest.raises(TransportGone):
            opening.wait()

    def test_in_the_very_moment_of_its_end_an_open_is_told(
        self, server: LoopbackSSHServer, transport: paramiko.Transport
    ) -> None:
        openings: list[ChannelOpening] = []

        def open_now() -> None:
            openings.append(opening_to(transport, 9))

        watch = EndWatch(transport, open_now)  # called when the transport has begun to unlink its channels
        server.drop()
        transport.join(WAIT_S)
        with pytest.raises(TransportGone):
            Task(openings[0].wait).result()
        watch.cancel()

    @ENDS
    def test_under_an_open_channel_it_wakes_its_user_and_says_why(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent, end: End
    ) -> None:
        channel = open_to(transport, agent.port)
        reader = Task(channel.recv, 1)
        end(server, transport)
        assert reader.result() == b""
        assert channel.ended.wait(WAIT_S)
        assert channel.transport_ended
        channel.send_close()


# ---- closing ----


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
        began = time.monotonic()
        channel.close()
        assert since(began) < SOON_S
        stuck.close()
        server.thaw()
        uploader.result()
        stuck.send_close()
        channel.send_close()
        server.wait_for(lambda: server.channels_open == 0)

    def test_close_wakes_a_reader_and_a_sender(self, transport: paramiko.Transport, agent: Agent) -> None:
        channel = open_to(transport, agent.port)
        agent.accept()  # and read nothing: the window runs dry

        def upload() -> None:
            with contextlib.suppress(OSError):
                while channel.send(bytes(1 << 18)):
                    pass

        reader, uploader = Task(channel.recv, 1), Task(upload)
        channel.close()
        assert reader.result() == b""
        uploader.result()
        channel.send_close()

    def test_its_garbage_collection_sends_nothing(self, transport: paramiko.Transport, agent: Agent) -> None:
        channel = open_to(transport, agent.port)
        before = packets_sent(transport)
        gone = weakref.ref(channel)
        del channel
        gc.collect()
        assert gone() is None
        assert packets_sent(transport) == before

    def test_send_close_sends_one_close_however_often_and_from_wherever(
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

    def test_a_close_from_the_server_leaves_ours_due_and_the_transport_alive(
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

    def test_a_close_from_the_server_makes_the_transports_thread_send_nothing(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        channel = open_to(transport, agent.port)
        channel.shutdown_write()
        before = packets_sent(transport)
        agent.accept().close()
        assert channel.ended.wait(WAIT_S)
        opening = ChannelOpening(transport, "session")
        opening.send()
        opening.wait()  # the transport's thread has finished with the close
        assert packets_sent(transport) == before + 1, "the open alone"
        channel.send_close()
        server.wait_for(lambda: server.channels_open == 0)

    @ENDS
    def test_send_close_is_harmless_after_the_end(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent, end: End
    ) -> None:
        channel = open_to(transport, agent.port)
        end(server, transport)
        channel.send_close()
        transport.join(WAIT_S)
        channel.send_close()


# ---- the end of a transport ----


class TestEndWatch:
    @ENDS
    def test_it_calls_back_once_and_at_once(self, server: LoopbackSSHServer, end: End) -> None:
        def measure() -> float:
            with contextlib.closing(server.connect_transport()) as transport:
                calls: list[float] = []
                called = threading.Event()

                def callback() -> None:
                    calls.append(time.monotonic())
                    called.set()

                watch = EndWatch(transport, callback)
                began = time.monotonic()
                end(server, transport)
                assert called.wait(WAIT_S)
                transport.join(WAIT_S)
                transport.close()
                watch.cancel()
                assert len(calls) == 1
                return calls[0] - began

        assert median_s(measure) < SOON_S

    @ENDS
    def test_after_the_end_it_calls_back_at_once(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, end: End
    ) -> None:
        end(server, transport)
        transport.join(WAIT_S)
        calls: list[str] = []
        EndWatch(transport, lambda: calls.append("ended"))
        assert calls == ["ended"]

    def test_one_made_in_the_very_moment_of_the_end_calls_back(
        self, server: LoopbackSSHServer, transport: paramiko.Transport
    ) -> None:
        """The transport has begun to unlink its channels, but is active still."""
        calls: list[str] = []
        active: list[bool] = []
        late: list[EndWatch] = []

        def at_the_end() -> None:
            active.append(transport.is_active())
            late.append(EndWatch(transport, lambda: calls.append("ended")))

        watch = EndWatch(transport, at_the_end)
        server.drop()
        transport.join(WAIT_S)
        assert active == [True]
        assert calls == ["ended"]
        watch.cancel()

    def test_it_calls_back_once_when_both_sides_end_it_together(self, server: LoopbackSSHServer) -> None:
        for _ in range(20):
            transport = server.connect_transport()
            calls: list[str] = []
            watch = EndWatch(transport, lambda calls=calls: calls.append("ended"))  # type: ignore[misc]
            dropper = Task(server.drop)
            transport.close()
            dropper.result()
            transport.join(WAIT_S)
            assert calls == ["ended"]
            watch.cancel()

    def test_it_calls_back_once_however_many_threads_tell_it(self, transport: paramiko.Transport) -> None:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for _ in range(200):
                calls: list[str] = []
                together = threading.Barrier(4)
                watch = EndWatch(transport, lambda calls=calls: calls.append("ended"))  # type: ignore[misc]

                def tell(together: threading.Barrier = together, watch: EndWatch = watch) -> None:
                    together.wait(WAIT_S)
                    watch._sentinel._unlink()

                for task in [Task(tell) for _ in range(4)]:
                    task.result()
                watch.cancel()
                assert calls == ["ended"]
        finally:
            sys.setswitchinterval(interval)

    def test_cancelled_it_does_not_call_back(self, server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
        calls: list[str] = []
        watch = EndWatch(transport, lambda: calls.append("ended"))
        watch.cancel()
        watch.cancel()
        server.drop()
        transport.join(WAIT_S)
        assert calls == []

    def test_cancelled_it_leaves_no_entry(self, transport: Any) -> None:
        before = len(transport._channels)
        watches = [EndWatch(transport, do_nothing) for _ in range(3)]
        assert len(transport._channels) == before + 3
        for watch in watches:
            watch.cancel()
        assert len(transport._channels) == before
        assert not transport.channel_events

    def test_it_disturbs_no_channel(self, transport: paramiko.Transport, agent: Agent) -> None:
        watch = EndWatch(transport, do_nothing)
        first, second = open_to(transport, agent.port), transport.open_session(timeout=WAIT_S)
        assert len({first.chanid, second.chanid, watch._sentinel.chanid}) == 3
        watch.cancel()
        first.send_close()


# ---- signs of life, and speed ----


def test_packets_received_changes_with_each_answer(transport: paramiko.Transport) -> None:
    seen = [packets_received(transport)]
    for _ in range(3):
        opening = ChannelOpening(transport, "session")
        opening.send()
        opening.wait().send_close()
        seen.append(packets_received(transport))
    assert len(set(seen)) == 4


def test_packets_received_stays_while_the_server_is_silent(
    server: LoopbackSSHServer, transport: paramiko.Transport
) -> None:
    server.freeze()
    before = packets_received(transport)
    opening = ChannelOpening(transport, "session")
    opening.send()
    assert not opening._settled.wait(0.1)
    assert packets_received(transport) == before
    server.thaw()
    opening.wait().send_close()
    assert packets_received(transport) != before


class TestNodelay:
    def test_it_is_set_on_tcp(self, server: LoopbackSSHServer) -> None:
        with contextlib.closing(server.connect_transport()) as transport:
            assert not has_nodelay(transport)
            set_nodelay(transport)
            assert has_nodelay(transport)

    def test_a_unix_socket_is_left_as_it_is(self) -> None:
        one, other = socket.socketpair()
        with one, other:
            set_nodelay(paramiko.Transport(one))

    def test_a_closed_socket_does_not_matter(self, transport: paramiko.Transport) -> None:
        transport.close()
        transport.sock.close()
        set_nodelay(transport)


class TestFastTransport:
    def test_it_prefers_gcm_and_keeps_all_other_ciphers(self) -> None:
        one, other = socket.socketpair()
        with one, other:
            usual = paramiko.Transport(one).get_security_options().ciphers
            fast = fast_transport(other).get_security_options().ciphers
        assert fast[:2] == (GCM, "aes256-gcm@openssh.com")
        assert sorted(fast) == sorted(usual)

    def test_a_client_that_is_given_it_uses_gcm_without_delay(self, server: LoopbackSSHServer) -> None:
        with server.connect(transport_factory=fast_transport) as client:
            transport = client.get_transport()
            assert transport is not None
            assert ciphers_in_use(transport) == {GCM}
            assert has_nodelay(transport)

    def test_its_options_are_passed_on(self) -> None:
        one, other = socket.socketpair()
        with one, other:
            transport = fast_transport(one, disabled_algorithms={"ciphers": [GCM]})
            assert GCM not in transport.preferred_ciphers


# ---- against OpenSSH ----


@pytest.fixture
def sshd() -> Iterator[SshServer]:
    needs_sshd()
    with SshServer() as running:
        yield running


def connect_fast(sshd: SshServer) -> paramiko.SSHClient:
    client = paramiko.SSHClient()
    client.get_host_keys().add(f"[{LOOPBACK}]:{sshd.port}", sshd.host_key.get_name(), sshd.host_key)
    client.connect(
        LOOPBACK,
        sshd.port,
        "root",
        pkey=sshd.client_key,
        allow_agent=False,
        look_for_keys=False,
        transport_factory=fast_transport,
    )
    return client


@pytest.mark.real
def test_openssh_takes_gcm_from_a_fast_transport(sshd: SshServer) -> None:
    with connect_fast(sshd) as client:
        transport = client.get_transport()
        assert transport is not None
        assert ciphers_in_use(transport) == {GCM}
        _, output, _ = client.exec_command("echo works")
        assert output.read() == b"works\n"


def test_a_pipe_that_is_gone_is_not_tried_again() -> None:
    """It fails with the kind of error that keys which come late have, too."""
    tries: list[paramiko.Message] = []

    def send(message: paramiko.Message) -> None:
        tries.append(message)
        raise paramiko.ProxyCommandFailure("ssh -W", "Broken pipe")

    with pytest.raises(paramiko.ProxyCommandFailure):
        ssh._send_patiently(SimpleNamespace(_send_user_message=send, is_active=lambda: True), paramiko.Message())
    assert len(tries) == 1


# ---- speed ----


class TestSending:
    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_what_is_sent_arrives_piece_by_piece(
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
        assert reader.result() == data
        assert max(sizes) <= channel.out_max_packet_size
        assert channel.send(b"after the end") == 0
        channel.send_close()
        with pytest.raises(OSError, match="closed"):
            channel.send(b"after the close")


class Delivery:
    """A channel whose data are delivered to one end of a pair of sockets."""

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

    def fed_directly(self) -> None:
        """Wait until what comes next goes straight on."""
        self.peer.sendall(b"first")
        assert self.exactly(5) == b"first"
        passage: Any = self.channel.in_buffer
        eventually(lambda: passage._sink, WAIT_S)

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
    """Have threads take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class TestDelivering:
    def test_what_the_socket_takes_goes_there_on_the_transports_thread(self, delivery: Delivery) -> None:
        delivery.fed_directly()
        passage: Any = delivery.channel.in_buffer
        delivery.peer.sendall(b"second")
        assert delivery.exactly(6) == b"second"
        eventually(lambda: passage._passed == 6, WAIT_S)  # the deliverer is not woken for so little
        assert delivery.channel.delivered_bytes == 11
        assert len(delivery.began) == 1

    def test_what_it_does_not_take_is_kept_in_order(self, delivery: Delivery) -> None:
        delivery.fed_directly()
        data = bytes(range(256)) * (3 << 12)  # 3 MiB: more than the pair holds, less than the window
        delivery.peer.sendall(data)
        eventually(lambda: len(delivery.channel.in_buffer) > 1 << 20, WAIT_S)
        delivery.peer.sendall(b"last")
        assert delivery.exactly(len(data) + 4) == data + b"last"
        eventually(lambda: delivery.channel.delivered_bytes == len(data) + 9, WAIT_S)

    def test_nothing_goes_straight_on_while_something_is_kept(self) -> None:
        near, far = socket.socketpair()
        with near, far:
            passage = ssh._Passage()
            passage.delivered, passage._sink = 1, near
            passage.feed(bytes(8 << 20))
            taken = passage.delivered - 1
            assert 0 < taken < 8 << 20
            far.recv(1 << 20)  # there is room again
            passage.feed(b"behind")
            kept, passed = passage.take(near)
            assert passed == taken
            while len(kept) < (8 << 20) + 6 - taken:
                piece, passed = passage.take(near)
                assert len(piece) <= ssh._PIECE_BYTES
                assert passed == 0
                kept = memoryview(bytes(kept) + piece)
            assert bytes(kept[-6:]) == b"behind"
            passage.feed(b"later")  # what was taken may not be sent yet
            assert bytes(passage.take(near)[0]) == b"later"

    def test_what_comes_after_the_end_is_not_kept(self) -> None:
        """A server that goes on sending until it hears of the end fills no memory."""
        near, far = socket.socketpair()
        with near, far:
            passage = ssh._Passage()
            passage.feed(bytes(1 << 20))
            passage.leave()
            passage.feed(bytes(1 << 20))
            assert len(passage) == 0

    def test_the_order_stays_whichever_thread_hands_it_on(self, small_switch_interval: None) -> None:
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

    def test_the_window_is_given_back_for_what_was_delivered_and_for_nothing_else(self, delivery: Delivery) -> None:
        delivery.fed_directly()
        reader = Task(lambda: sum(len(delivery.exactly(1 << 20)) for _ in range(32)))
        delivery.peer.sendall(bytes(32 << 20))  # five windows
        assert reader.result() == 32 << 20
        delivery.peer.settimeout(0.5)
        with pytest.raises(TimeoutError):
            delivery.peer.sendall(bytes(256 << 20))
        held = len(delivery.channel.in_buffer)
        assert held <= ssh.WINDOW_BYTES, "no more than the window is kept for one who reads nothing"

    def test_it_ends_with_the_servers_direction_when_all_is_delivered(self, delivery: Delivery) -> None:
        delivery.fed_directly()
        delivery.peer.sendall(bytes(3 << 20))
        delivery.peer.shutdown(socket.SHUT_WR)
        assert len(delivery.exactly(3 << 20)) == 3 << 20
        delivery.task.result()
        assert delivery.channel.delivered_bytes == (3 << 20) + 5

    def test_it_ends_when_the_channel_is_closed(self, delivery: Delivery) -> None:
        delivery.fed_directly()
        delivery.channel.close()
        delivery.task.result()

    def test_a_socket_that_was_closed_is_an_error_of_the_deliverer_and_of_nobody_else(
        self, transport: paramiko.Transport, delivery: Delivery, agent: Agent
    ) -> None:
        delivery.fed_directly()
        delivery.far.close()
        delivery.peer.sendall(b"for nobody")
        with pytest.raises(OSError, match="Broken pipe"):
            delivery.task.result()
        open_to(transport, agent.port).send_close()

    def test_nothing_is_handed_on_any_more_once_it_has_ended(self, delivery: Delivery) -> None:
        delivery.fed_directly()
        delivery.channel.close()
        delivery.task.result()
        delivery.channel.in_buffer.feed(b"late")
        delivery.far.setblocking(False)  # noqa: FBT003 - the socket module's signature
        with pytest.raises(BlockingIOError):
            delivery.far.recv(9)


class TestReadingAhead:
    @pytest.fixture
    def pair(self) -> Iterator[tuple[Any, socket.socket]]:
        near, far = socket.socketpair()
        near.settimeout(0.02)
        with near, far:
            yield ssh._ReadingAhead(near), far

    def test_it_reads_what_is_there_at_once_and_returns_what_is_asked_for(
        self, pair: tuple[Any, socket.socket]
    ) -> None:
        packetizer, far = pair
        far.sendall(b"headerbo")
        assert packetizer.read_all(6) == b"header"
        far.sendall(b"dynext")
        assert [packetizer.read_all(4), packetizer.read_all(4)] == [b"body", b"next"]

    def test_it_waits_for_what_comes_late(self, pair: tuple[Any, socket.socket]) -> None:
        packetizer, far = pair
        far.sendall(b"he")
        task = Task(packetizer.read_all, 6, True)  # noqa: FBT003 - paramiko's signature
        assert task.running
        far.sendall(b"ader")
        assert task.result() == b"header"

    def test_what_was_left_of_the_banner_comes_first(self, pair: tuple[Any, socket.socket]) -> None:
        packetizer, far = pair
        far.sendall(b"SSH-2.0-Test\r\nhea")
        assert packetizer.readline(1) == "SSH-2.0-Test"
        far.sendall(b"derbody")
        assert [packetizer.read_all(6), packetizer.read_all(4)] == [b"header", b"body"]

    def test_a_packet_longer_than_the_buffer_comes_whole(self, pair: tuple[Any, socket.socket]) -> None:
        packetizer, far = pair
        data = bytes(range(256)) * 8192
        task = Task(lambda: [packetizer.read_all(6), packetizer.read_all(len(data)), packetizer.read_all(3)])
        far.sendall(b"header" + data + b"end")
        assert task.result() == [b"header", data, b"end"]

    def test_the_end_is_the_end(self, pair: tuple[Any, socket.socket]) -> None:
        packetizer, far = pair
        far.sendall(b"hea")
        far.close()
        with pytest.raises(EOFError):
            packetizer.read_all(6)

    def test_closed_while_it_waits_it_ends(self, pair: tuple[Any, socket.socket]) -> None:
        packetizer, _ = pair
        task = Task(packetizer.read_all, 6)
        packetizer.close()
        with pytest.raises(EOFError):
            task.result()

    def test_keys_that_are_due_are_exchanged_between_packets_only(self, pair: tuple[Any, socket.socket]) -> None:
        packetizer, far = pair
        packetizer._trigger_rekey()
        with pytest.raises(NeedRekeyException):
            packetizer.read_all(6, True)  # noqa: FBT003 - paramiko's signature
        waited = threading.Event()
        packetizer._check_keepalive = waited.set
        far.sendall(b"hea")
        task = Task(packetizer.read_all, 6, True)  # noqa: FBT003 - paramiko's signature
        assert waited.wait(WAIT_S)
        far.sendall(b"der")
        assert task.result() == b"header"

    def test_a_handshake_that_takes_too_long_ends(self, pair: tuple[Any, socket.socket]) -> None:
        packetizer, _ = pair
        packetizer.start_handshake(0.01)
        with pytest.raises(EOFError):
            packetizer.read_all(6)

    def test_a_transport_over_something_else_than_a_socket_reads_as_ever(
        self, transport: paramiko.Transport, agent: Agent
    ) -> None:
        over: Any = fast_transport(open_to(transport, agent.port))
        assert type(over.packetizer) is Packetizer
        over.close()
