"""Sending during a key exchange, and without a thread to send on."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import paramiko
import pytest

from proxy_fsm import ssh
from proxy_fsm.ssh import opening as opening_module
from proxy_fsm.ssh import sending
from proxy_fsm.testing import Forwarding, LoopbackSSHServer
from tests.helpers.holdings import own_threads, threads_ended
from tests.helpers.sockets import LOOPBACK
from tests.helpers.task import Task
from tests.helpers.wait import WAIT_S, eventually
from tests.ssh.helpers import keys_exchanged, open_probe, open_to, opening_to, packets_sent

if TYPE_CHECKING:
    from tests.helpers.agent import Agent


class TestKeyExchange:
    """Neither a transport nor a byte is lost, and no thread waits for itself (paramiko issue 822)."""

    @staticmethod
    def closed_by_server(transport: paramiko.Transport, agent: Agent) -> paramiko.Channel:
        """Open a channel of paramiko's class, like the caller's; the server closes it when the agent does."""
        channel = transport.open_channel("direct-tcpip", (LOOPBACK, agent.port), (LOOPBACK, 1), timeout=WAIT_S)
        channel.shutdown_write()
        return channel

    def test_transports_own_thread_keeps_reading_and_answers_afterwards(
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
            eventually(lambda channel=channel: channel.closed)  # type: ignore[misc]
        peer.sendall(b"it keeps reading")
        assert ours.recv(99) == b"it keeps reading"
        assert packets_sent(transport) == before, "nothing is sent during the key exchange"
        transport.clear_to_send.set()
        eventually(lambda: packets_sent(transport) == before + len(theirs))
        ours.send_close()
        server.wait_for(lambda: server.channels_open == 0)
        threads_ended()

    def test_transports_own_thread_keeps_reading_while_another_writes(self, transport: Any, agent: Agent) -> None:
        ours = open_to(transport, agent.port)
        peer = agent.accept()
        theirs = self.closed_by_server(transport, agent)
        before = packets_sent(transport)
        with transport.clear_to_send_lock:
            agent.accept().close()
            eventually(lambda: theirs.closed)
            peer.sendall(b"it keeps reading")
            assert ours.recv(99) == b"it keeps reading"
        eventually(lambda: packets_sent(transport) == before + 1)
        ours.send_close()

    def test_messages_of_the_transports_own_thread_keep_their_order(self, transport: Any, agent: Agent) -> None:
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
        eventually(lambda: len(sent) == 100)
        assert sent == list(range(100))
        probe.close()

    def test_keepalive_does_not_block_the_transports_own_thread(
        self, server: LoopbackSSHServer, transport: Any, agent: Agent
    ) -> None:
        channel = open_to(transport, agent.port)
        transport.clear_to_send.clear()
        transport.set_keepalive(1)
        eventually(lambda: own_threads("proxy_fsm-deferred"))
        agent.accept().sendall(b"it keeps reading")
        assert channel.recv(99) == b"it keeps reading"
        transport.set_keepalive(0)
        transport.clear_to_send.set()
        channel.send_close()
        server.wait_for(lambda: server.channels_open == 0)

    def test_our_channels_wait_longer_than_paramiko_and_lose_nothing(
        self, server: LoopbackSSHServer, transport: Any, agent: Agent
    ) -> None:
        channel = open_to(transport, agent.port)
        peer = agent.accept()
        down = bytes(range(256)) * (ssh.WINDOW_BYTES >> 9)  # so much that reading it adjusts the window
        peer.sendall(down)
        eventually(lambda: len(channel.in_buffer) == len(down))
        with keys_exchanged(transport):
            calls: list[float] = []
            original = transport._send_user_message

            def note(message: paramiko.Message) -> None:
                calls.append(time.monotonic())
                original(message)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(transport, "_send_user_message", note)
                uploader, reader = Task(channel.send, b"up"), Task(channel.recv, len(down))
                eventually(lambda: len(calls) > 6)
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

    def test_transport_that_ends_meanwhile_releases_all_threads(
        self, server: LoopbackSSHServer, transport: Any, agent: Agent
    ) -> None:
        channel = open_to(transport, agent.port)
        agent.accept()
        theirs = self.closed_by_server(transport, agent)
        with keys_exchanged(transport):
            agent.accept().close()
            eventually(lambda: theirs.closed)
            uploader = Task(channel.send, b"up")
            server.drop()
            with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
                uploader.result()
            threads_ended()

    def test_transport_is_changed_once_and_not_kept_alive(self, server: LoopbackSSHServer, agent: Agent) -> None:
        transport: Any = server.connect_transport()
        open_to(transport, agent.port).send_close()
        changed = transport._send_user_message, dict(transport._handler_table)
        open_to(transport, agent.port).send_close()
        assert (transport._send_user_message, transport._handler_table) == changed
        transport.close()
        transport.join(WAIT_S)
        reference = weakref.ref(transport)
        del transport, changed
        gc.collect()
        assert reference() is None

    def test_foreign_send_hook_stays_in_use(self, transport: Any, agent: Agent) -> None:
        calls: list[int] = []
        original = transport._send_user_message

        def foreign(message: paramiko.Message) -> None:
            calls.append(message.asbytes()[0])
            original(message)

        transport._send_user_message = foreign
        open_to(transport, agent.port).send_close()
        assert calls == [90, 97]


class TestNoThreads:
    """A channel that opens late is closed even if no thread can be started for it."""

    @pytest.fixture(autouse=True)
    def refused(self, monkeypatch: pytest.MonkeyPatch) -> set[str]:
        """The names of threads that cannot be started."""
        names = {"proxy_fsm-discard", "proxy_fsm-deferred"}
        start = threading.Thread.start

        def start_unless_named(thread: threading.Thread) -> None:
            if thread.name in names:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_unless_named)
        return names

    def test_deferred_message_is_sent_with_the_next(
        self, server: LoopbackSSHServer, transport: Any, agent: Agent, refused: set[str]
    ) -> None:
        open_to(transport, agent.port).send_close()
        agent.accept()
        server.wait_for(lambda: server.channels_open == 0)
        first, second = (TestKeyExchange.closed_by_server(transport, agent) for _ in range(2))
        before = packets_sent(transport)
        with keys_exchanged(transport):
            agent.accept().close()
            eventually(lambda: first.closed)
        refused.clear()
        agent.accept().close()
        eventually(lambda: second.closed)
        eventually(lambda: packets_sent(transport) == before + 2)

    def test_late_channel_is_closed_on_the_thread_of_the_answer(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        server.forwarding = Forwarding.HELD
        opening = opening_to(transport, agent.port)
        server.wait_for(lambda: server.channels_held == 1)
        opening.abandon()
        server.release()
        server.wait_for(lambda: server.channels_opened == 1 and server.channels_open == 0)
        assert transport.is_active()

    def test_discard_during_a_key_exchange_does_not_wait(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        channel = open_to(transport, agent.port)
        with keys_exchanged(transport):
            Task(opening_module._discard, channel).result()
        assert server.channels_open == 1
        channel.send_close()
        server.wait_for(lambda: server.channels_open == 0)


def test_closed_pipe_is_not_retried() -> None:
    """It raises the same kind of error as a key exchange that times out."""
    tries: list[paramiko.Message] = []

    def send(message: paramiko.Message) -> None:
        tries.append(message)
        raise paramiko.ProxyCommandFailure("ssh -W", "Broken pipe")

    with pytest.raises(paramiko.ProxyCommandFailure):
        sending.send_through_rekey(SimpleNamespace(_send_user_message=send, is_active=lambda: True), paramiko.Message())
    assert len(tries) == 1
