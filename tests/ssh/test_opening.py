"""Opens: a request and its answer, or its abandonment; and the end of a transport."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import paramiko
import pytest

from proxy_fsm.ssh import (
    ChannelOpening,
    ChannelRefused,
    EndWatch,
    OpenAbandoned,
    SafeChannel,
    TransportClosed,
)
from proxy_fsm.testing import Forwarding, LoopbackSSHServer
from tests.helpers.agent import Agent, dead_port
from tests.helpers.sockets import LOOPBACK, read_all
from tests.helpers.task import Task
from tests.helpers.wait import WAIT_S, eventually
from tests.ssh.helpers import ENDS, FOREIGN, End, do_nothing, keys_exchanged, open_to, opening_to

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Do not collect reference cycles."""
    gc.disable()
    yield
    gc.enable()


class TestOpening:
    def test_opened_channel_carries_data_both_ways(self, transport: paramiko.Transport, agent: Agent) -> None:
        channel = open_to(transport, agent.port)
        assert isinstance(channel, SafeChannel)
        peer = agent.accept()
        channel.send(b"up")
        assert peer.recv(9) == b"up"
        peer.sendall(b"down")
        assert channel.recv(9) == b"down"
        channel.send_close()

    def test_session_channel_needs_no_destination(
        self, server: LoopbackSSHServer, transport: paramiko.Transport
    ) -> None:
        opening = ChannelOpening(transport, "session")
        opening.send()
        opening.wait().send_close()
        assert server.sessions_opened == 1

    def test_port_without_listener_is_refused_with_code_2(self, transport: paramiko.Transport) -> None:
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

    def test_unknown_kind_is_refused_with_code_3(self, transport: paramiko.Transport) -> None:
        opening = ChannelOpening(transport, "nonsense")
        opening.send()
        with pytest.raises(ChannelRefused) as refused:
            opening.wait()
        assert refused.value.code == ChannelRefused.UNKNOWN_TYPE == 3

    def test_refusal_is_not_left_for_the_caller_to_find(self, transport: paramiko.Transport) -> None:
        with pytest.raises(ChannelRefused):
            open_to(transport, dead_port())
        assert transport.saved_exception is None
        assert transport.get_exception() is None

    def test_refusal_does_not_overwrite_one_of_the_callers(self, transport: paramiko.Transport) -> None:
        callers = transport.saved_exception = paramiko.ChannelException(1, "the caller's")
        with pytest.raises(ChannelRefused):
            open_to(transport, dead_port())
        assert transport.get_exception() is callers

    def test_refused_open_leaves_no_entry(self, transport: Any) -> None:
        with pytest.raises(ChannelRefused):
            open_to(transport, dead_port())
        assert len(transport._channels) == 0
        assert not transport.channel_events

    @pytest.mark.parametrize("together", ["answered one by one", "answered in one burst"])
    def test_concurrent_opens_each_get_their_own_answer(
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

    def test_channel_lives_as_long_as_it_is_referenced(self, transport: paramiko.Transport, agent: Agent) -> None:
        channel = open_to(transport, agent.port)
        gc.collect()
        agent.accept().sendall(b"still here")
        assert channel.recv(99) == b"still here"
        channel.send_close()


class TestKeyExchangeTimesOut:
    def test_open_is_refused_and_the_transport_lives(self, transport: Any, agent: Agent) -> None:
        with keys_exchanged(transport):
            opening = opening_to(transport, agent.port)
            with pytest.raises(ChannelRefused, match="Key-exchange timed out") as refused:
                opening.wait()
        assert refused.value.code == ChannelRefused.RESOURCE_SHORTAGE == 4
        assert len(transport._channels) == 0
        assert not transport.channel_events
        open_to(transport, agent.port).send_close()

    def test_abandoned_open_leaves_no_entry(self, transport: Any, agent: Agent) -> None:
        opening = ChannelOpening(transport, "direct-tcpip", (LOOPBACK, agent.port))
        opening.abandon()
        with keys_exchanged(transport):
            opening.send()
        with pytest.raises(OpenAbandoned):
            opening.wait()
        assert len(transport._channels) == 0
        assert not transport.channel_events

    def test_transport_that_ends_meanwhile_raises_transport_closed(
        self, transport: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def end_and_fail(_: object) -> None:
            transport.close()
            raise paramiko.SSHException("Key-exchange timed out")

        monkeypatch.setattr(transport, "_send_user_message", end_and_fail)
        with pytest.raises(TransportClosed):
            opening_to(transport, 9).wait()

    def test_failed_write_raises_transport_closed(self, transport: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_: object) -> None:
            raise BrokenPipeError

        monkeypatch.setattr(transport, "_send_user_message", fail)
        with pytest.raises(TransportClosed):
            opening_to(transport, 9).wait()


class TestAbandon:
    def test_wait_raises_before_the_answer(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        server.forwarding = Forwarding.HELD
        opening = opening_to(transport, agent.port)
        server.wait_for(lambda: server.channels_held == 1)
        waiter = Task(opening.wait)
        opening.abandon()
        with pytest.raises(OpenAbandoned):
            waiter.result()
        assert server.channels_held == 1

    def test_late_channel_is_closed_on_the_server(
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

    def test_late_refusal_is_ignored(self, server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
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

    def test_channel_abandoned_before_wait_is_closed(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        opening = opening_to(transport, agent.port)
        assert opening._settled.wait(WAIT_S)
        opening.abandon()
        with pytest.raises(OpenAbandoned):
            opening.wait()
        server.wait_for(lambda: server.channels_opened == 1 and server.channels_open == 0)

    def test_abandon_after_wait_changes_nothing(self, transport: paramiko.Transport, agent: Agent) -> None:
        opening = opening_to(transport, agent.port)
        channel = opening.wait()
        opening.abandon()
        assert not channel.closed
        channel.send_close()

    def test_channel_abandoned_before_send_is_closed(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent
    ) -> None:
        opening = ChannelOpening(transport, "direct-tcpip", (LOOPBACK, agent.port))
        opening.abandon()
        opening.send()
        with pytest.raises(OpenAbandoned):
            opening.wait()
        server.wait_for(lambda: server.channels_opened == 1 and server.channels_open == 0)


class TestTransportEnds:
    @ENDS
    def test_pending_open_fails_at_once(
        self,
        *,
        server: LoopbackSSHServer,
        transport: paramiko.Transport,
        end: End,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """On the thread that ends the transport: nothing has to poll for it."""
        settlers: list[threading.Thread] = []
        settle = ChannelOpening._settle

        def note(opening: ChannelOpening, answer: SafeChannel | Exception) -> None:
            settlers.append(threading.current_thread())
            settle(opening, answer)

        monkeypatch.setattr(ChannelOpening, "_settle", note)
        server.forwarding = Forwarding.HELD
        opening = opening_to(transport, 9)
        server.wait_for(lambda: server.channels_held == 1)
        waiter = Task(opening.wait)
        end(server, transport)
        with pytest.raises(TransportClosed):
            waiter.result()
        assert settlers
        assert set(settlers) <= {transport, threading.current_thread()}
        server.wait_for(lambda: server.channels_held == 0)

    @ENDS
    def test_open_sent_after_the_end_fails_in_wait(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, end: End
    ) -> None:
        end(server, transport)
        transport.join(WAIT_S)
        opening = opening_to(transport, 9)
        with pytest.raises(TransportClosed):
            opening.wait()

    @ENDS
    def test_open_sent_after_the_end_leaves_no_entry(self, server: LoopbackSSHServer, transport: Any, end: End) -> None:
        end(server, transport)
        transport.join(WAIT_S)
        opening_to(transport, 9)
        assert len(transport._channels) == 0
        assert not transport.channel_events

    @pytest.mark.usefixtures("no_collection")
    def test_failed_open_and_its_channel_do_not_reference_each_other(
        self, server: LoopbackSSHServer, transport: paramiko.Transport
    ) -> None:
        """A reference cycle would hold the channel, and its buffers, until the next garbage collection."""
        server.forwarding = Forwarding.HELD
        opening = opening_to(transport, 9)
        server.wait_for(lambda: server.channels_held == 1)
        assert opening._channel is not None
        channel = weakref.ref(opening._channel)
        transport.close()
        with pytest.raises(TransportClosed):
            opening.wait()
        del opening
        eventually(lambda: channel() is None, WAIT_S)

    def test_channel_answered_while_the_transport_is_closing_ends_with_it(
        self, transport: paramiko.Transport, agent: Agent, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The opener sees it inactive before anything is unlinked: the channel must not be unregistered unmarked."""
        opening = ChannelOpening(transport, "direct-tcpip", (LOOPBACK, agent.port))

        def is_active() -> bool:
            if opening._channel is None:  # the check before anything is sent
                return True
            assert opening._settled.wait(WAIT_S)
            return False

        with monkeypatch.context() as patched:
            patched.setattr(transport, "is_active", is_active)
            opening.send()
        channel = opening.wait()
        transport.close()
        assert channel.ended.wait(WAIT_S)
        assert channel.transport_ended
        assert channel.recv(1) == b""

    def test_open_sent_during_the_end_fails(self, server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
        openings: list[ChannelOpening] = []

        def open_now() -> None:
            openings.append(opening_to(transport, 9))

        watch = EndWatch(transport, open_now)  # called once the transport has begun to unlink its channels
        server.drop()
        transport.join(WAIT_S)
        with pytest.raises(TransportClosed):
            Task(openings[0].wait).result()
        watch.cancel()

    @ENDS
    def test_open_channel_wakes_its_reader_and_is_marked(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, agent: Agent, end: End
    ) -> None:
        channel = open_to(transport, agent.port)
        reader = Task(channel.recv, 1)
        end(server, transport)
        assert reader.result() == b""
        assert channel.ended.wait(WAIT_S)
        assert channel.transport_ended
        channel.send_close()


class TestEndWatch:
    @ENDS
    def test_callback_runs_once_and_at_once(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, end: End
    ) -> None:
        """On the thread that ends the transport: nothing has to poll for it."""
        callers: list[threading.Thread] = []
        called = threading.Event()

        def callback() -> None:
            callers.append(threading.current_thread())
            called.set()

        watch = EndWatch(transport, callback)
        end(server, transport)
        assert called.wait(WAIT_S)
        transport.join(WAIT_S)
        transport.close()
        watch.cancel()
        assert len(callers) == 1
        assert callers[0] in {transport, threading.current_thread()}

    @ENDS
    def test_callback_runs_at_once_after_the_end(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, end: End
    ) -> None:
        end(server, transport)
        transport.join(WAIT_S)
        calls: list[str] = []
        EndWatch(transport, lambda: calls.append("ended"))
        assert calls == ["ended"]

    def test_callback_runs_for_a_watch_made_during_the_end(
        self, server: LoopbackSSHServer, transport: paramiko.Transport
    ) -> None:
        """The transport has begun to unlink its channels, but is still active."""
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

    def test_callback_runs_once_if_both_sides_close_together(self, server: LoopbackSSHServer) -> None:
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

    def test_callback_runs_once_for_concurrent_unlinks(self, transport: paramiko.Transport) -> None:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for _ in range(200):
                calls: list[str] = []
                together = threading.Barrier(4)
                watch = EndWatch(transport, lambda calls=calls: calls.append("ended"))  # type: ignore[misc]

                def unlink(together: threading.Barrier = together, watch: EndWatch = watch) -> None:
                    together.wait(WAIT_S)
                    watch._sentinel._unlink()

                for task in [Task(unlink) for _ in range(4)]:
                    task.result()
                watch.cancel()
                assert calls == ["ended"]
        finally:
            sys.setswitchinterval(interval)

    def test_cancelled_watch_does_not_call_back(self, server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
        calls: list[str] = []
        watch = EndWatch(transport, lambda: calls.append("ended"))
        watch.cancel()
        watch.cancel()
        server.drop()
        transport.join(WAIT_S)
        assert calls == []

    def test_cancelled_watch_leaves_no_entry(self, transport: Any) -> None:
        before = len(transport._channels)
        watches = [EndWatch(transport, do_nothing) for _ in range(3)]
        assert len(transport._channels) == before + 3
        for watch in watches:
            watch.cancel()
        assert len(transport._channels) == before
        assert not transport.channel_events

    def test_watch_shares_no_number_with_a_channel(self, transport: paramiko.Transport, agent: Agent) -> None:
        watch = EndWatch(transport, do_nothing)
        first, second = open_to(transport, agent.port), transport.open_session(timeout=WAIT_S)
        assert len({first.chanid, second.chanid, watch._sentinel.chanid}) == 3
        watch.cancel()
        first.send_close()
