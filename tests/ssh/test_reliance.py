"""Paramiko's internals are still what the channels rely on."""

from __future__ import annotations

import gc
import inspect
import re
import socket
import threading
import time
import weakref
from array import array
from functools import partial
from logging import DEBUG
from typing import TYPE_CHECKING, Any

import paramiko
import pytest
from paramiko.buffered_pipe import BufferedPipe
from paramiko.common import CONNECTION_FAILED_CODE
from paramiko.message import Message
from paramiko.packet import Packetizer

from proxy_fsm import ssh
from proxy_fsm.ssh import (
    ChannelRefused,
    EndWatch,
)
from tests.helpers.agent import Agent, dead_port
from tests.helpers.sockets import LOOPBACK
from tests.helpers.task import Task
from tests.helpers.wait import WAIT_S, eventually
from tests.ssh.helpers import GCM, open_probe, packets_sent

if TYPE_CHECKING:
    from collections.abc import Callable


class Answer:
    """Takes the place of an event: records the lock and the thread when the answer arrived."""

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
    assert answer.locked, "an answer is handled under this lock"
    assert transport.lock.acquire(timeout=WAIT_S)
    transport.lock.release()


def rely_on_channels_put(transport: Any, _: Agent) -> None:
    channel = paramiko.Channel(4711)
    transport._channels.put(4711, channel)
    assert transport._channels.get(4711) is channel
    assert channel in transport._channels.values()
    reference = weakref.ref(channel)
    del channel
    gc.collect()
    assert reference() is None, "the map holds its channels weakly"
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
        assert transport._next_channel() == number + 2, "it skips numbers in use"


def rely_on_channel_events(transport: Any, agent: Agent) -> None:
    answer = Answer(transport)
    probe = open_probe(transport, agent.port, answer)
    assert answer.called.wait(WAIT_S)
    with transport.lock:
        assert probe.chanid not in transport.channel_events, "it is removed when the answer has arrived"
    assert answer.thread is transport, "set() is called by the transport's own thread"


def rely_on_channels_seen(transport: Any, agent: Agent) -> None:
    probe = open_probe(transport, agent.port)
    transport._channels.delete(probe.chanid)
    agent.accept().sendall(b"for a channel that is no longer known")
    open_probe(transport, agent.port)
    assert transport.is_active(), "data for a channel that was seen before is ignored"


def rely_on_saved_exception(transport: Any, _: Agent) -> None:
    """The monitor reports why a transport ended."""
    saved: list[Any] = []
    watch = EndWatch(transport, lambda: saved.append(transport.saved_exception))
    transport.sock.shutdown(socket.SHUT_RDWR)
    transport.join(WAIT_S)
    watch.cancel()
    assert isinstance(saved[0], EOFError)


def rely_on_handler_table(transport: Any, _: Agent) -> None:
    seen: list[tuple[int, bool, threading.Thread]] = []
    original = transport._handler_table[92]  # SSH_MSG_CHANNEL_OPEN_FAILURE

    def note(message: paramiko.Message) -> None:
        seen.append((message.get_int(), transport.lock.locked(), threading.current_thread()))
        message.rewind()
        original(message)

    transport._handler_table[92] = note
    with pytest.raises(paramiko.ChannelException) as refused:
        transport.open_channel("direct-tcpip", (LOOPBACK, dead_port()), (LOOPBACK, 1), timeout=WAIT_S)
    assert refused.value.code == ChannelRefused.CONNECT_FAILED
    assert [each[1:] for each in seen] == [(False, transport)], "called once, without the lock"
    assert refused.value.text == CONNECTION_FAILED_CODE[ChannelRefused.CONNECT_FAILED]


def rely_on_parse_disconnect(transport: Any, _: Agent) -> None:
    """It is looked up for each message, which is positioned at the code."""
    message = Message()
    message.add_int(11)
    message.add_string("bye")
    message.rewind()
    texts: list[str] = []
    transport._log = lambda _level, text: texts.append(text)
    transport._parse_disconnect(message)
    assert texts == ["Disconnect (code 11): bye"]
    assert "self._parse_disconnect(m)" in inspect.getsource(paramiko.Transport.run)


def rely_on_send_user_message(transport: Any, _: Agent) -> None:
    before = packets_sent(transport)
    message = paramiko.Message()
    message.add_byte(b"\x02")  # SSH_MSG_IGNORE
    message.add_string("")
    transport._send_user_message(message)
    assert packets_sent(transport) == before + 1
    transport.close()
    transport._send_user_message(message)
    assert packets_sent(transport) == before + 1, "a closed transport drops it silently"

    sent: list[tuple[int, threading.Thread]] = []

    def note(message: paramiko.Message) -> None:
        sent.append((message.asbytes()[0], threading.current_thread()))

    transport._send_user_message = note
    channel: Any = paramiko.Channel(1)
    channel._set_transport(transport)
    channel._set_remote_channel(1, 1 << 20, 1 << 15)
    channel.send(b"x")
    channel._handle_close(paramiko.Message())
    assert [number for number, _ in sent] == [94, 96, 97], "channels send through what was put into the transport"


def rely_on_own_thread(transport: Any, agent: Agent) -> None:
    """The thread that runs a transport is the transport, and answers a CLOSE through what was put into it."""
    closers: list[threading.Thread] = []
    probe = open_probe(transport, agent.port)
    probe.shutdown_write()
    transport._send_user_message = lambda _: closers.append(threading.current_thread())
    agent.accept().close()
    eventually(lambda: closers)
    assert closers == [transport]


def rely_on_send_message(transport: Any, _: Agent) -> None:
    transport.clear_to_send.clear()
    before = packets_sent(transport)
    transport._send_message(paramiko.Message(b"\x02\x00\x00\x00\x00"))  # SSH_MSG_IGNORE
    assert packets_sent(transport) == before + 1, "it sends at any time"


def rely_on_clear_to_send_lock(transport: Any, _: Agent) -> None:
    held: list[bool] = []
    send = transport._send_message

    def note(message: paramiko.Message) -> None:
        held.append(transport.clear_to_send_lock.locked())
        send(message)

    transport._send_message = note
    transport._send_user_message(paramiko.Message(b"\x02\x00\x00\x00\x00"))
    assert held == [True], "user messages are sent under this lock"
    transport.clear_to_send_lock.acquire()
    exchange = Task(transport._send_kex_init)
    assert transport.clear_to_send.is_set(), "a key exchange begins under this lock"
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
    assert packets_sent(transport) == before, "no user message is sent during a key exchange"


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
    assert (eof.asbytes()[0], close.asbytes()[0]) == (96, 97), "it returns the messages to send"
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
    assert reader.result() == b"", "it wakes readers"
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
    assert probe._check_add_window(1) == 101, "the window is adjusted for more than the threshold"
    probe.close()
    assert probe._check_add_window(1000) == 0, "a closed channel does not adjust its window"


def rely_on_wait_for_send_window(transport: Any, agent: Agent) -> None:
    probe: Any = open_probe(transport, agent.port)
    with probe.lock:
        probe.out_window_size, probe.out_max_packet_size = 5000, 4096
        assert probe._wait_for_send_window(10_000) == 4096 - 64, "no more than fits into one message"
        assert probe._wait_for_send_window(10_000) == 5000 - 4032, "no more than the window allows"
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
    agent.accept().sendall(b"for the replacement")
    eventually(lambda: b"".join(fed) == b"for the replacement")
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


#: What a packetizer's state is under AES-GCM, before and after something was sent and received.
SEALING: dict[str, Callable[[Any, Any], bool]] = {
    "__aead_in": lambda before, after: before is True and after is True,
    "__aead_out": lambda before, after: before is True and after is True,
    "__block_engine_in": lambda before, after: before is after and callable(before.decrypt),
    "__block_engine_out": lambda before, after: before is after and callable(before.encrypt),
    "__compress_engine_in": lambda before, after: before is None and after is None,
    "__compress_engine_out": lambda before, after: before is None and after is None,
    "__dump_packets": lambda before, after: before is False and after is False,
    "__iv_in": lambda before, after: len(before) == len(after) == 12 and before < after,
    "__iv_out": lambda before, after: len(before) == len(after) == 12 and before < after,
    "__received_bytes": lambda before, after: before < after,
    "__received_bytes_overflow": lambda before, after: before == after == 0,
    "__received_packets": lambda before, after: before < after,
    "__received_packets_overflow": lambda before, after: before == after == 0,
    "__sent_bytes": lambda before, after: before < after,
    "__sent_packets": lambda before, after: before < after,
    "__sequence_number_out": lambda before, after: before < after,
}


def rely_on_sealing(name: str, transport: Any, agent: Agent) -> None:
    transport.get_security_options().ciphers = (GCM,)
    transport.renegotiate_keys()
    before = getattr(transport.packetizer, f"_Packetizer{name}")
    open_probe(transport, agent.port)
    assert SEALING[name](before, getattr(transport.packetizer, f"_Packetizer{name}"))


def rely_on_write_lock(transport: Any, agent: Agent) -> None:
    with transport.packetizer._Packetizer__write_lock:
        sender = Task(open_probe, transport, agent.port)
        assert sender.running
        with transport.packetizer._Packetizer__write_lock:
            pass  # it is reentrant
    sender.result()


def rely_on_inc_iv_counter(transport: Any, _: Agent) -> None:
    assert transport.packetizer._inc_iv_counter(b"head" + bytes(7) + b"\xff") == b"head" + bytes(6) + b"\x01\x00"


def rely_on_log(transport: Any, _: Agent) -> None:
    assert transport.packetizer._log(DEBUG, "a line") is None


def rely_on_trigger_rekey(_: Any, __: Agent) -> None:
    near, far = socket.socketpair()
    with near, far:
        packetizer: Any = Packetizer(near)
        assert not packetizer.need_rekey()
        packetizer._trigger_rekey()
        assert packetizer.need_rekey()
        for direction in (packetizer.set_outbound_cipher, packetizer.set_inbound_cipher):
            assert packetizer.need_rekey()
            direction(None, 8, None, 0, b"")
        assert not packetizer.need_rekey()


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
    "Transport._parse_disconnect": rely_on_parse_disconnect,
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
    **{f"Packetizer.{name}": partial(rely_on_sealing, name) for name in SEALING},
    "Packetizer.__write_lock": rely_on_write_lock,
    "Packetizer._inc_iv_counter": rely_on_inc_iv_counter,
    "Packetizer._log": rely_on_log,
    "Packetizer._trigger_rekey": rely_on_trigger_rekey,
    "transport._active_threads": rely_on_active_threads,
}


@pytest.mark.parametrize("name", RELIED_ON)
def test_paramiko_has_what_is_relied_on(name: str, transport: paramiko.Transport, agent: Agent) -> None:
    try:
        RELIED_ON[name](transport, agent)
    except (AttributeError, TypeError, AssertionError) as error:
        pytest.fail(f"paramiko {paramiko.__version__} has changed {name}: {error}")


def test_docstring_lists_what_is_checked() -> None:
    listed = []
    for owner, attributes in re.findall(r"^\* ``(\w+)``: (.*(?:\n  .*)*)", ssh.__doc__ or "", re.MULTILINE):
        for name, methods in re.findall(r"``(\w+)``(?: \(([^)]*)\))?", attributes):
            inner = re.findall(r"``(\w+)``", methods)
            listed += [f"{owner}.{name}.{method}" for method in inner] or [f"{owner}.{name}"]
    assert sorted(listed) == sorted(RELIED_ON)
