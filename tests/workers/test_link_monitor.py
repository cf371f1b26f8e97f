"""The end and the silence of a transport are posted once to every watcher, and the caller is not disturbed."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import paramiko
import pytest
from paramiko.common import OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED

from proxy_fsm.evidence import LinkDead, LinkRestored, LinkSilent, Observation, TransportEnded, WorkerCrashed
from proxy_fsm.ssh import set_nodelay
from proxy_fsm.status import Timeouts
from proxy_fsm.testing import LoopbackSSHServer
from proxy_fsm.testing import ssh_server as embedded
from proxy_fsm.workers import link_monitor
from proxy_fsm.workers.link_monitor import Watcher, attach
from tests.helpers.agent import dead_port
from tests.helpers.holdings import own_threads, threads_ended
from tests.helpers.inbox import Inbox
from tests.helpers.sockets import LOOPBACK
from tests.helpers.wait import SOON_S, WAIT_S, assert_prompt, eventually, since

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

QUIET = Timeouts(link_probe_s=60, link_dead_s=120)
FAST = Timeouts(link_probe_s=0.1, link_dead_s=0.5)
#: Probes often, and never posts `LinkDead`, however slow the machine; on a slow one it may post `LinkSilent`.
PATIENT = Timeouts(link_probe_s=0.1, link_dead_s=200)


@pytest.fixture
def server() -> Iterator[LoopbackSSHServer]:
    with LoopbackSSHServer() as running:
        yield running
        running.thaw()


@pytest.fixture
def transport(server: LoopbackSSHServer) -> Iterator[paramiko.Transport]:
    with contextlib.closing(server.connect_transport()) as connected:
        set_nodelay(connected)
        yield connected


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Each test detaches its watchers; then no thread is left."""
    yield
    threads_ended()


@contextlib.contextmanager
def watching(
    transport: paramiko.Transport, timeouts: Timeouts, post: Callable[[Observation], None]
) -> Iterator[Watcher]:
    watcher = attach(transport, timeouts, post)
    try:
        yield watcher
    finally:
        detach_and_join(watcher)


def detach_and_join(watcher: Watcher) -> None:
    """Detach, and join the monitor if that ends it: then it posts nothing more."""
    thread = watcher.detach()
    if thread is not None:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def monitors() -> int:
    return len(own_threads("proxy_fsm-monitor"))


# ---- one monitor per transport ----


class TestShared:
    def test_many_watchers_share_one_thread(self, transport: paramiko.Transport) -> None:
        watchers = [attach(transport, QUIET, Inbox().post) for _ in range(50)]
        assert monitors() == 1
        assert {watcher.detach() for watcher in watchers[1:]} == {None}
        assert monitors() == 1
        last = watchers[0].detach()
        assert last is not None, "so that it can be joined"
        last.join(WAIT_S)
        assert monitors() == 0

    def test_each_transport_has_a_monitor_of_its_own(
        self, server: LoopbackSSHServer, transport: paramiko.Transport
    ) -> None:
        with contextlib.closing(server.connect_transport()) as other, watching(transport, QUIET, Inbox().post):
            assert monitors() == 1
            with watching(other, QUIET, Inbox().post):
                assert monitors() == 2
            assert monitors() == 1

    def test_detached_watcher_gets_nothing_more(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        detached = Inbox()
        with watching(transport, QUIET, inbox.post):
            assert attach(transport, QUIET, detached.post).detach() is None
            server.drop()
            inbox.wait(TransportEnded)
        assert detached.seen == []

    def test_second_detach_is_harmless(self, transport: paramiko.Transport) -> None:
        with watching(transport, QUIET, Inbox().post):
            watcher = attach(transport, QUIET, Inbox().post)
            assert watcher.detach() is None
            assert watcher.detach() is None
            assert monitors() == 1

    def test_watcher_may_detach_in_its_callback(self, server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
        detached = threading.Event()
        watchers: list[Watcher] = []

        def post(_: Observation) -> None:
            watchers[0].detach()
            detached.set()

        watchers.append(attach(transport, QUIET, post))
        server.drop()
        assert detached.wait(WAIT_S)

    def test_watcher_may_attach_after_the_last_has_detached(
        self, server: LoopbackSSHServer, transport: paramiko.Transport
    ) -> None:
        for _ in range(20):
            detach_and_join(attach(transport, QUIET, Inbox().post))
        inbox = Inbox()
        with watching(transport, QUIET, inbox.post):
            assert monitors() == 1
            server.drop()
            inbox.wait(TransportEnded)

    def test_concurrent_attach_and_detach_loses_no_watcher(
        self, server: LoopbackSSHServer, transport: paramiko.Transport
    ) -> None:
        inboxes = [Inbox() for _ in range(8)]
        kept: list[Watcher] = []

        def attach_and_detach(inbox: Inbox) -> None:
            for _ in range(20):
                attach(transport, PATIENT, Inbox().post).detach()
            kept.append(attach(transport, PATIENT, inbox.post))

        threads = [threading.Thread(target=attach_and_detach, args=[inbox], daemon=True) for inbox in inboxes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        eventually(lambda: monitors() == 1)
        server.drop()
        for inbox in inboxes:
            inbox.wait(TransportEnded)
        for watcher in kept:
            watcher.detach()

    def test_monitor_leaves_no_channel_on_the_transport(self, server: LoopbackSSHServer, transport: Any) -> None:
        with watching(transport, PATIENT, Inbox().post):
            server.wait_for(lambda: server.probes >= 2)
        eventually(lambda: len(transport._channels) == 0)
        assert not transport.channel_events

    def test_dropped_transport_is_garbage_collected(self, server: LoopbackSSHServer, inbox: Inbox) -> None:
        transport = server.connect_transport()
        with watching(transport, QUIET, inbox.post):
            transport.close()
            inbox.wait(TransportEnded)
        transport.join(WAIT_S)
        reference = weakref.ref(transport)
        del transport
        eventually(lambda: gc.collect() >= 0 and reference() is None)

    def test_forget_all_starts_with_a_new_monitor(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        """As in a child after a fork; here the parent's thread still exists, and must not be shared."""
        with watching(transport, QUIET, Inbox().post):
            link_monitor.forget_all()
            with watching(transport, QUIET, inbox.post):
                assert monitors() == 2
                server.drop()
                inbox.wait(TransportEnded)


# ---- crashes ----


def no_thread_for(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Prevent threads of a name from starting while it is in the returned list, which gets one more for each try."""
    start = threading.Thread.start
    refused: list[str] = [name]

    def start_unless_named(thread: threading.Thread) -> None:
        if thread.name in refused:
            refused.append(name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_unless_named)
    return refused


class TestBroken:
    @pytest.fixture(autouse=True)
    def no_traceback(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        broken: list[threading.ExceptHookArgs] = []
        monkeypatch.setattr(threading, "excepthook", broken.append)
        yield
        assert broken == []

    def test_monitor_that_cannot_start_raises_and_is_replaced(
        self,
        server: LoopbackSSHServer,
        transport: paramiko.Transport,
        inbox: Inbox,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        refused = no_thread_for(monkeypatch, "proxy_fsm-monitor")
        with pytest.raises(RuntimeError):
            attach(transport, QUIET, Inbox().post)
        refused.clear()
        with watching(transport, QUIET, inbox.post):
            assert monitors() == 1
            server.drop()
            inbox.wait(TransportEnded)

    def test_probe_that_cannot_start_is_sent_later_and_silence_counts_from_then(
        self,
        server: LoopbackSSHServer,
        transport: paramiko.Transport,
        inbox: Inbox,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        refused = no_thread_for(monkeypatch, "proxy_fsm-probe")
        with watching(transport, Timeouts(link_probe_s=0.02, link_dead_s=0.1), inbox.post):
            eventually(lambda: len(refused) > 10)  # for longer than link_dead_s
            assert inbox.seen == []
            refused.clear()
            server.wait_for(lambda: server.probes >= 1)
            server.drop()
            inbox.wait(TransportEnded)

    def test_crashed_monitor_is_posted_and_replaced(
        self,
        server: LoopbackSSHServer,
        transport: paramiko.Transport,
        inbox: Inbox,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def broken(_: object) -> int:
            raise AttributeError("gone")

        first = Inbox()
        with monkeypatch.context() as patch:
            patch.setattr(link_monitor, "packets_received", broken)
            with watching(transport, QUIET, first.post):
                assert isinstance(first.wait(WorkerCrashed).error, AttributeError)
                eventually(lambda: monitors() == 0)
                patch.undo()
                with watching(transport, QUIET, inbox.post):
                    server.drop()
                    inbox.wait(TransportEnded)
        assert first.kinds() == [WorkerCrashed]


# ---- the end ----


class TestEnd:
    @pytest.mark.parametrize("end", ["dropped", "reset", "closed by the caller"])
    def test_end_is_posted_at_once(self, server: LoopbackSSHServer, end: str) -> None:
        def measure() -> float:
            inbox = Inbox()
            with contextlib.closing(server.connect_transport()) as transport, watching(transport, QUIET, inbox.post):
                eventually(lambda: len(transport._channels) == 1, interval_s=0.001)  # type: ignore[attr-defined]
                began = time.monotonic()
                if end == "closed by the caller":
                    transport.close()
                else:
                    server.drop(reset=end == "reset")
                ended = inbox.wait(TransportEnded)
                assert ended.detail.startswith("The SSH connection ended")
                assert ended.detail.endswith(".")
                return ended.at - began

        assert_prompt(measure, SOON_S)

    def test_earlier_end_is_posted_at_once(self, transport: paramiko.Transport) -> None:
        transport.close()
        transport.join(WAIT_S)

        def measure() -> float:
            inbox = Inbox()
            began = time.monotonic()
            with watching(transport, QUIET, inbox.post):
                return inbox.wait(TransportEnded).at - began

        assert_prompt(measure, SOON_S)

    def test_end_is_posted_to_a_watcher_attached_during_it(
        self, server: LoopbackSSHServer, transport: paramiko.Transport
    ) -> None:
        """The first watcher gets it while the transport is still shutting down, and attaches another."""
        inbox = Inbox()
        watchers: list[Watcher] = []

        def post(_: Observation) -> None:
            watchers.append(attach(transport, QUIET, inbox.post))

        watchers.append(attach(transport, QUIET, post))
        server.drop()
        inbox.wait(TransportEnded)
        for watcher in watchers:
            watcher.detach()

    def test_end_is_posted_once_to_each_watcher(self, server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
        inboxes = [Inbox() for _ in range(50)]
        watchers = [attach(transport, QUIET, inbox.post) for inbox in inboxes]
        server.drop()
        for inbox in inboxes:
            inbox.wait(TransportEnded)
        transport.close()
        eventually(lambda: monitors() == 0)
        assert [inbox.kinds() for inbox in inboxes] == [[TransportEnded]] * 50
        for watcher in watchers:
            watcher.detach()

    def test_reset_is_named_in_the_detail(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        with watching(transport, QUIET, inbox.post):
            server.drop(reset=True)
            assert "reset by peer" in inbox.wait(TransportEnded).detail

    def test_end_is_posted_while_the_link_is_silent(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        server.freeze()
        with watching(transport, Timeouts(link_probe_s=0.05, link_dead_s=20), inbox.post):
            inbox.wait(LinkSilent)
            transport.close()
            inbox.wait(TransportEnded)
        assert inbox.kinds() == [LinkSilent, TransportEnded]


# ---- silence ----


NO_MONITOR: Any = None
Posts = list[tuple[float, str, type[Observation]]]


class Simulation:
    """A silence on a clock that only this moves: what is posted to which watcher, and when a probe is due."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.silence = link_monitor._Silence(self.now_s)
        self.posts: Posts = []
        self.probes_due_at: list[float] = []
        self._names: dict[Watcher, str] = {}

    def add(self, probe_s: float, dead_s: float, name: str = "it") -> Watcher:
        watcher = Watcher(NO_MONITOR, lambda _: None, probe_s, dead_s)
        self._names[watcher] = name
        self.silence.add(watcher, self.now_s)
        return watcher

    def advance_to(self, after_s: float) -> Simulation:
        """Check whenever a check is due, as the monitor does, until so many seconds after the start."""
        until = 1000.0 + after_s
        while (due := self.silence.due()) <= until:
            self.now_s = max(self.now_s, due)
            self.check()
        self.now_s = until
        return self

    def check(self) -> None:
        if self.silence.needs_probe(self.now_s):
            self.probes_due_at.append(self.now_s - 1000)
        self._note(self.silence.check(self.now_s))

    def receive(self) -> Simulation:
        self._note(self.silence.heard(self.now_s))
        self.check()
        return self

    def _note(self, posts: list[tuple[Watcher, Observation]]) -> None:
        self.posts += [(self.now_s - 1000, self._names[watcher], type(observation)) for watcher, observation in posts]


@pytest.fixture
def simulation() -> Simulation:
    return Simulation()


class TestSilenceRules:
    """Times are seconds after the start."""

    def test_link_is_probed_after_probe_s_silent_after_twice_that_and_dead_after_dead_s(
        self, simulation: Simulation
    ) -> None:
        simulation.add(10, 45)
        simulation.advance_to(9.99)
        assert simulation.probes_due_at == []
        simulation.advance_to(10)
        assert simulation.probes_due_at == [10]
        assert simulation.posts == []
        assert simulation.advance_to(1000).posts == [(20, "it", LinkSilent), (45, "it", LinkDead)], (
            "each is posted once"
        )

    def test_observations_carry_their_times(self, simulation: Simulation) -> None:
        watcher = simulation.add(10, 45)
        simulation.advance_to(3).receive()
        (_, silent), (recipient, dead) = simulation.silence.check(1003 + 50)
        assert isinstance(silent, LinkSilent)
        assert silent.heard_at == 1003
        assert isinstance(dead, LinkDead)
        assert dead.silent_s == 50
        assert recipient is watcher
        ((_, restored),) = simulation.silence.heard(1003 + 60)
        assert isinstance(restored, LinkRestored)
        assert restored.silent_s == 60

    def test_dead_s_shorter_than_silence_posts_both_at_once(self, simulation: Simulation) -> None:
        simulation.add(10, 15)
        assert simulation.advance_to(100).posts == [(15, "it", LinkSilent), (15, "it", LinkDead)]

    def test_second_silence_is_posted_again(self, simulation: Simulation) -> None:
        simulation.add(10, 45)
        simulation.advance_to(25).receive().advance_to(60).receive().receive().advance_to(61)
        assert simulation.posts == [
            (20, "it", LinkSilent),
            (25, "it", LinkRestored),
            (45, "it", LinkSilent),
            (60, "it", LinkRestored),
        ]

    def test_busy_link_is_neither_probed_nor_posted(self, simulation: Simulation) -> None:
        simulation.add(10, 45)
        for second in range(1, 200):
            simulation.advance_to(second * 9.0).receive()
        assert simulation.probes_due_at == []
        assert simulation.posts == []

    def test_idle_link_is_probed_once_per_probe_s(self, simulation: Simulation) -> None:
        simulation.add(10, 45)
        for second in (10.1, 20.2, 30.3):  # when the answers arrive
            simulation.advance_to(second).receive()
        assert simulation.probes_due_at == pytest.approx([10, 20.1, 30.2])
        assert simulation.posts == []

    def test_watchers_with_different_times_are_each_served_at_their_own(self, simulation: Simulation) -> None:
        simulation.add(10, 45, "fast")
        simulation.add(30, 100, "patient")
        assert simulation.advance_to(70).receive().posts == [
            (20, "fast", LinkSilent),
            (45, "fast", LinkDead),
            (60, "patient", LinkSilent),
            (70, "fast", LinkRestored),
            (70, "patient", LinkRestored),
        ]

    def test_late_watcher_does_not_count_earlier_silence(self, simulation: Simulation) -> None:
        """An idle link that a patient watcher has not probed yet is not dead."""
        simulation.add(60, 120, "patient")
        simulation.advance_to(50).add(10, 45, "fast")
        simulation.advance_to(59)
        assert simulation.probes_due_at == []
        simulation.advance_to(60)
        assert simulation.probes_due_at == [60]
        assert simulation.posts == []

    def test_late_watcher_of_a_silent_link_counts_by_its_own_times(self, simulation: Simulation) -> None:
        simulation.add(10, 200, "first")
        simulation.advance_to(25).add(5, 15, "late")
        assert simulation.advance_to(41).receive().posts == [
            (20, "first", LinkSilent),
            (35, "late", LinkSilent),
            (40, "late", LinkDead),
            (41, "first", LinkRestored),
            (41, "late", LinkRestored),
        ]

    def test_threshold_between_a_check_and_the_next_wait_is_not_missed(self, simulation: Simulation) -> None:
        """On a slow machine a threshold may pass in between: it is due at once, and not forgotten."""
        simulation.add(10, 45)
        simulation.silence.check(1019.9)
        assert simulation.silence.due() == 1020

    def test_dead_link_is_still_checked(self, simulation: Simulation) -> None:
        simulation.add(10, 45)
        simulation.advance_to(50)
        assert simulation.silence.due() == 1055, "it may be restored, or be probed where that had failed"

    def test_suspension_of_the_process_is_not_counted(self, simulation: Simulation) -> None:
        simulation.add(10, 45, "first")
        simulation.advance_to(5).add(10, 45, "second")
        simulation.advance_to(9)
        simulation.now_s += 3600
        simulation.silence.process_was_suspended(3600, simulation.now_s)
        simulation.check()
        assert simulation.posts == []
        assert simulation.probes_due_at == []
        assert simulation.advance_to(3600 + 30).posts == [
            (3600 + 20, "first", LinkSilent),
            (3600 + 25, "second", LinkSilent),
        ]

    def test_watcher_attached_after_a_suspension_counts_from_then(self, simulation: Simulation) -> None:
        simulation.add(10, 45)
        simulation.now_s += 3600
        late = simulation.add(10, 45)
        simulation.silence.process_was_suspended(3595, simulation.now_s)
        assert late.since == simulation.now_s

    def test_server_that_could_not_be_probed_is_not_silent(self, simulation: Simulation) -> None:
        simulation.add(10, 15)
        for turn in range(1, 6):
            simulation.advance_to(turn * 10 - 0.1)
            simulation.now_s += 0.1
            simulation.silence.probe_not_sent(simulation.now_s)
            simulation.check()
        assert simulation.posts == []
        assert simulation.advance_to(65).posts == [(65, "it", LinkSilent), (65, "it", LinkDead)]


class TestSilence:
    """The same on a real link: times are checked only against their minimum."""

    def test_healthy_link_is_probed_and_not_dead(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        began = time.monotonic()
        with watching(transport, PATIENT, inbox.post):
            server.wait_for(lambda: server.probes >= 3)
            assert since(began) >= 3 * PATIENT.link_probe_s
        assert LinkDead not in inbox.kinds()

    def test_silent_link_is_posted_and_then_its_restoration(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        server.freeze()
        with watching(transport, PATIENT, inbox.post):
            silent = inbox.wait(LinkSilent)
            assert silent.at - silent.heard_at >= 2 * PATIENT.link_probe_s
            server.thaw()
            restored = inbox.wait(LinkRestored)
            assert restored.silent_s >= silent.at - silent.heard_at
        assert inbox.kinds()[:2] == [LinkSilent, LinkRestored]
        assert LinkDead not in inbox.kinds()

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells when something was last received")
    def test_silence_begins_with_the_last_bytes_and_not_when_they_are_noticed(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        """The monitor looks only when a probe could be due, here after a second."""
        with watching(transport, Timeouts(link_probe_s=1, link_dead_s=50), inbox.post):
            transport.global_request("anything", wait=True)
            heard_by = time.monotonic()
            server.freeze()
            silent = inbox.wait(LinkSilent)
        assert silent.heard_at <= heard_by + 0.02

    def test_silent_link_is_dead_after_dead_s_and_not_closed(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        server.freeze()
        began = time.monotonic()
        with watching(transport, FAST, inbox.post):
            dead = inbox.wait(LinkDead)
            assert dead.silent_s >= FAST.link_dead_s
            assert dead.at - began >= FAST.link_dead_s
            assert transport.is_active(), "it is not closed"
        assert inbox.kinds() == [LinkSilent, LinkDead]

    def test_link_with_steady_traffic_is_neither_probed_nor_posted(
        self,
        server: LoopbackSSHServer,
        transport: paramiko.Transport,
        inbox: Inbox,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        counts: list[paramiko.Transport] = []

        def another(transport: paramiko.Transport) -> int:
            counts.append(transport)
            return len(counts)

        monkeypatch.setattr(link_monitor, "packets_received", another)
        monkeypatch.setattr(link_monitor, "received_ago_s", lambda _: 0)
        with watching(transport, Timeouts(link_probe_s=0.02, link_dead_s=0.1), inbox.post):
            eventually(lambda: len(counts) > 20)
        assert inbox.seen == []
        assert server.probes == 0

    def test_refused_probe_is_a_sign_of_life(
        self,
        transport: paramiko.Transport,
        inbox: Inbox,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        refusals = threading.Semaphore(0)

        def refuse(_: object, kind: str, chanid: int) -> int:
            assert kind == link_monitor._PROBE
            del chanid
            refusals.release()
            return OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED

        monkeypatch.setattr(embedded._Interface, "check_channel_request", refuse)
        began = time.monotonic()
        with watching(transport, PATIENT, inbox.post):
            for _ in range(5):
                assert refusals.acquire(timeout=WAIT_S)
            assert since(began) >= 5 * PATIENT.link_probe_s, "the next is sent when the last answer is old"
        assert LinkDead not in inbox.kinds()
        assert transport.saved_exception is None

    @pytest.mark.parametrize("another_attaches", [False, True])
    def test_suspension_of_the_process_is_no_silence_of_the_server(
        self,
        server: LoopbackSSHServer,
        transport: paramiko.Transport,
        inbox: Inbox,
        monkeypatch: pytest.MonkeyPatch,
        *,
        another_attaches: bool,
    ) -> None:
        """Ctrl-Z for an hour: the clock has advanced, and the server had no probe to answer."""
        clock = Clock()
        monkeypatch.setattr(link_monitor, "time", clock)
        probe_s = 30.0 if another_attaches else 0.2
        with watching(transport, Timeouts(link_probe_s=probe_s, link_dead_s=300), inbox.post):
            clock.ahead_s += 3600
            if another_attaches:  # which wakes the monitor before a check is due
                with watching(transport, Timeouts(link_probe_s=0.2, link_dead_s=300), inbox.post):
                    server.wait_for(lambda: server.probes >= 2)
            else:
                server.wait_for(lambda: server.probes >= 2)
        assert LinkDead not in inbox.kinds()

    def test_answer_unread_after_a_suspension_of_the_process_is_no_silence(
        self,
        server: LoopbackSSHServer,
        transport: paramiko.Transport,
        inbox: Inbox,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The monitor's thread may run before the transport's has read what arrived meanwhile."""
        clock = Clock()
        monkeypatch.setattr(link_monitor, "time", clock)
        server.freeze()
        with watching(transport, Timeouts(link_probe_s=0.5, link_dead_s=300), inbox.post) as watcher:
            eventually(lambda: watcher.monitor._probe is not None, what="a probe is out")
            clock.ahead_s += 3600
            eventually(lambda: watcher.since > clock.monotonic() - 1, what="the suspension was noticed")
            server.thaw()
            server.wait_for(lambda: server.probes >= 2)
        assert LinkSilent not in inbox.kinds()

    def test_pending_probe_does_not_block_detach(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        server.freeze()
        with watching(transport, PATIENT, inbox.post):
            inbox.wait(LinkSilent)
        threads_ended()
        server.thaw()
        server.wait_for(lambda: server.probes == 1)

    def test_detach_during_probe_answers_is_harmless(
        self, transport: paramiko.Transport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken: list[threading.ExceptHookArgs] = []
        monkeypatch.setattr(threading, "excepthook", broken.append)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for turn in range(100):
                watcher = attach(transport, Timeouts(link_probe_s=0.001, link_dead_s=20), Inbox().post)
                threading.Event().wait(turn % 10 * 0.0005)  # at another moment each time
                watcher.detach()
        finally:
            sys.setswitchinterval(interval)
        threads_ended()
        assert broken == []


class Clock:
    """The time module as the monitor uses it, set ahead."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


# ---- the caller ----


@pytest.fixture
def probed(
    server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], int]]:
    """Probe the transport without a pause, though it is busy; yields a count of the probes answered so far."""
    monkeypatch.setattr(link_monitor, "packets_received", lambda _: 0)
    server.commands = {"say": lambda line: (7, line.encode(), b"")}
    with watching(transport, Timeouts(link_probe_s=0.001, link_dead_s=50), inbox.post):
        yield lambda: server.probes
    assert TransportEnded not in inbox.kinds()
    assert transport.is_active()


def turns(probes: Callable[[], int]) -> Iterator[int]:
    """Count to 200, and further until at least 100 probes have been answered."""
    number = 0
    while number < 200 or probes() < 100:
        yield number
        number += 1


class TestCallerIsNotDisturbed:
    def test_commands_run_as_before(self, transport: paramiko.Transport, probed: Callable[[], int]) -> None:
        for number in turns(probed):
            with transport.open_session(timeout=WAIT_S) as channel:
                channel.exec_command(f"say {number}")
                assert channel.makefile("rb").read() == f"say {number}".encode()
                assert channel.recv_exit_status() == 7

    def test_port_forwards_are_granted_as_before(
        self, transport: paramiko.Transport, probed: Callable[[], int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def grant(_: object, address: str, port: int) -> int:
            del address
            return port or 4711

        monkeypatch.setattr(embedded._Interface, "check_port_forward_request", grant)
        monkeypatch.setattr(embedded._Interface, "cancel_port_forward_request", grant, raising=False)
        for number in turns(probed):
            assert transport.request_port_forward("", 20_000 + number) == 20_000 + number
        assert transport.request_port_forward("", 0) == 4711

    def test_port_forwards_are_denied_as_before(self, transport: paramiko.Transport, probed: Callable[[], int]) -> None:
        for _ in turns(probed):
            with pytest.raises(paramiko.SSHException, match="TCP forwarding request denied"):
                transport.request_port_forward("", 0)

    def test_refused_opens_report_their_reason_as_before(
        self, transport: paramiko.Transport, probed: Callable[[], int]
    ) -> None:
        port = dead_port()
        for number in turns(probed):
            destination = (LOOPBACK, port) if number % 2 else ("192.0.2.1", 9)
            with pytest.raises(paramiko.ChannelException) as refused:
                transport.open_channel("direct-tcpip", destination, (LOOPBACK, 1), timeout=WAIT_S)
            assert refused.value.code == (2 if number % 2 else 1)
        assert transport.get_exception() is None
