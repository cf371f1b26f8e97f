"""The end and the silence of a transport are told, once, to all who want to know; and the caller is not disturbed."""

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

from proxy_fsm import monitor
from proxy_fsm.evidence import LinkDead, LinkRestored, LinkSilent, Observation, TransportEnded, WorkerFailed
from proxy_fsm.monitor import Attachment, attach
from proxy_fsm.ssh import set_nodelay
from proxy_fsm.status import Timeouts
from proxy_fsm.testing import LoopbackSSHServer
from proxy_fsm.testing import ssh_server as embedded

from .e2e.procs import eventually
from .tunnel_helpers import LOOPBACK, SOON_S, WAIT_S, Agent, Inbox, dead_port, median_s, own_threads, since

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

QUIET = Timeouts(link_probe_s=60, link_dead_s=120)
FAST = Timeouts(link_probe_s=0.1, link_dead_s=0.5)
#: Probes often, and is patient: for what must not be told even where the machine is slow.
PATIENT = Timeouts(link_probe_s=0.1, link_dead_s=20)


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
    """Each test detaches what it attached; then no thread is left."""
    yield
    eventually(lambda: not own_threads(), WAIT_S)


@contextlib.contextmanager
def attached(
    transport: paramiko.Transport, timeouts: Timeouts, post: Callable[[Observation], None]
) -> Iterator[Attachment]:
    attachment = attach(transport, timeouts, post)
    try:
        yield attachment
    finally:
        attachment.detach()


def monitors() -> int:
    return len(own_threads("proxy_fsm-monitor"))


# ---- one for all ----


class TestShared:
    def test_many_attachments_share_one_thread(self, transport: paramiko.Transport) -> None:
        attachments = [attach(transport, QUIET, Inbox().post) for _ in range(50)]
        assert monitors() == 1
        for attachment in attachments[1:]:
            attachment.detach()
        assert monitors() == 1
        attachments[0].detach()
        assert monitors() == 0

    def test_each_transport_has_its_own(self, server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
        with contextlib.closing(server.connect_transport()) as other, attached(transport, QUIET, Inbox().post):
            assert monitors() == 1
            with attached(other, QUIET, Inbox().post):
                assert monitors() == 2
            assert monitors() == 1

    def test_one_that_is_detached_is_told_nothing_more(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        gone = Inbox()
        with attached(transport, QUIET, inbox.post):
            attach(transport, QUIET, gone.post).detach()
            server.drop()
            inbox.wait(TransportEnded)
        assert gone.seen == []

    def test_to_detach_twice_is_harmless(self, transport: paramiko.Transport) -> None:
        with attached(transport, QUIET, Inbox().post):
            attachment = attach(transport, QUIET, Inbox().post)
            attachment.detach()
            attachment.detach()
            assert monitors() == 1

    def test_one_may_detach_when_it_is_told(self, server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
        detached = threading.Event()
        attachments: list[Attachment] = []

        def post(_: Observation) -> None:
            attachments[0].detach()
            detached.set()

        attachments.append(attach(transport, QUIET, post))
        server.drop()
        assert detached.wait(WAIT_S)

    def test_after_the_last_has_left_one_may_come_again(
        self, server: LoopbackSSHServer, transport: paramiko.Transport
    ) -> None:
        for _ in range(20):
            attach(transport, QUIET, Inbox().post).detach()
        inbox = Inbox()
        with attached(transport, QUIET, inbox.post):
            assert monitors() == 1
            server.drop()
            inbox.wait(TransportEnded)

    def test_attaching_and_detaching_from_many_threads_loses_nobody(
        self, server: LoopbackSSHServer, transport: paramiko.Transport
    ) -> None:
        inboxes = [Inbox() for _ in range(8)]
        kept: list[Attachment] = []

        def come_and_go(inbox: Inbox) -> None:
            for _ in range(20):
                attach(transport, PATIENT, Inbox().post).detach()
            kept.append(attach(transport, PATIENT, inbox.post))

        threads = [threading.Thread(target=come_and_go, args=[inbox], daemon=True) for inbox in inboxes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert monitors() == 1
        server.drop()
        for inbox in inboxes:
            inbox.wait(TransportEnded)
        for attachment in kept:
            attachment.detach()

    def test_it_leaves_no_channel_on_the_transport(self, server: LoopbackSSHServer, transport: Any) -> None:
        with attached(transport, FAST, Inbox().post):
            server.wait_for(lambda: server.probes >= 2)
        eventually(lambda: len(transport._channels) == 0, WAIT_S)
        assert not transport.channel_events

    def test_a_transport_that_is_dropped_can_go(self, server: LoopbackSSHServer, inbox: Inbox) -> None:
        transport = server.connect_transport()
        with attached(transport, QUIET, inbox.post):
            transport.close()
            inbox.wait(TransportEnded)
        transport.join(WAIT_S)
        gone = weakref.ref(transport)
        del transport
        eventually(lambda: gc.collect() >= 0 and gone() is None, WAIT_S)

    def test_after_forget_all_one_starts_from_nothing(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        """As a child does after a fork; here the parent's thread is still there, and must not be shared."""
        with attached(transport, QUIET, Inbox().post):
            monitor.forget_all()
            with attached(transport, QUIET, inbox.post):
                assert monitors() == 2
                server.drop()
                inbox.wait(TransportEnded)


# ---- what breaks ----


def no_thread_for(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Have threads of a name not start while it is in the returned list, which gets one more for each try."""
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

    def test_one_that_cannot_start_is_told_and_does_not_blind_the_next(
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
        with attached(transport, QUIET, inbox.post):
            assert monitors() == 1
            server.drop()
            inbox.wait(TransportEnded)

    def test_a_probe_that_cannot_start_is_sent_later_and_silence_counts_from_then(
        self,
        server: LoopbackSSHServer,
        transport: paramiko.Transport,
        inbox: Inbox,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        refused = no_thread_for(monkeypatch, "proxy_fsm-probe")
        with attached(transport, FAST, inbox.post):
            eventually(lambda: len(refused) > 10, WAIT_S)  # for longer than link_dead_s
            refused.clear()
            server.wait_for(lambda: server.probes >= 2)
            assert inbox.seen == []
            server.drop()
            inbox.wait(TransportEnded)

    def test_one_that_breaks_is_told_and_does_not_blind_the_next(
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
            patch.setattr(monitor, "packets_received", broken)
            with attached(transport, QUIET, first.post):
                assert isinstance(first.wait(WorkerFailed).error, AttributeError)
                eventually(lambda: monitors() == 0, WAIT_S)
                patch.undo()
                with attached(transport, QUIET, inbox.post):
                    server.drop()
                    inbox.wait(TransportEnded)
        assert first.kinds() == [WorkerFailed]


# ---- the end ----


class TestEnd:
    @pytest.mark.parametrize("end", ["dropped", "reset", "closed by the caller"])
    def test_it_is_told_at_once(self, server: LoopbackSSHServer, end: str) -> None:
        def measure() -> float:
            inbox = Inbox()
            with contextlib.closing(server.connect_transport()) as transport, attached(transport, QUIET, inbox.post):
                eventually(lambda: len(transport._channels) == 1, WAIT_S, 0.001)  # type: ignore[attr-defined]
                began = time.monotonic()
                if end == "closed by the caller":
                    transport.close()
                else:
                    server.drop(reset=end == "reset")
                told = inbox.wait(TransportEnded)
                assert told.detail.startswith("The SSH connection ended")
                assert told.detail.endswith(".")
                return told.at - began

        assert median_s(measure) < SOON_S

    def test_one_that_has_ended_already_is_told_at_once(self, transport: paramiko.Transport) -> None:
        transport.close()
        transport.join(WAIT_S)

        def measure() -> float:
            inbox = Inbox()
            began = time.monotonic()
            with attached(transport, QUIET, inbox.post):
                return inbox.wait(TransportEnded).at - began

        assert median_s(measure) < SOON_S

    def test_one_that_ends_in_the_very_moment_is_told(
        self, server: LoopbackSSHServer, transport: paramiko.Transport
    ) -> None:
        """The first is told while the transport still winds up, and attaches another."""
        inbox = Inbox()
        attachments: list[Attachment] = []

        def post(_: Observation) -> None:
            attachments.append(attach(transport, QUIET, inbox.post))

        attachments.append(attach(transport, QUIET, post))
        server.drop()
        inbox.wait(TransportEnded)
        for attachment in attachments:
            attachment.detach()

    def test_it_is_told_once_to_each(self, server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
        inboxes = [Inbox() for _ in range(50)]
        attachments = [attach(transport, QUIET, inbox.post) for inbox in inboxes]
        server.drop()
        for inbox in inboxes:
            inbox.wait(TransportEnded)
        transport.close()
        eventually(lambda: monitors() == 0, WAIT_S)
        assert [inbox.kinds() for inbox in inboxes] == [[TransportEnded]] * 50
        for attachment in attachments:
            attachment.detach()

    def test_a_reset_is_named_in_the_detail(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        with attached(transport, QUIET, inbox.post):
            server.drop(reset=True)
            assert "reset by peer" in inbox.wait(TransportEnded).detail

    def test_it_is_told_also_while_the_link_is_silent(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        server.freeze()
        with attached(transport, Timeouts(link_probe_s=0.05, link_dead_s=20), inbox.post):
            inbox.wait(LinkSilent)
            transport.close()
            inbox.wait(TransportEnded)
        assert inbox.kinds() == [LinkSilent, TransportEnded]


# ---- silence ----


def test_what_falls_due_between_a_look_and_the_next_wait_is_not_slept_through() -> None:
    """On a slow machine a mark may pass in between: it is due at once, and not forgotten."""
    attachment = monitor.Attachment(lambda _: None, 0.05, 20)
    attachment.since = 0.0
    assert monitor._TransportMonitor._next_look((attachment,), 0.0, 0.0999) == 0.1


class TestSilence:
    def test_a_healthy_link_is_probed_and_nothing_is_told(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        with attached(transport, Timeouts(link_probe_s=0.5, link_dead_s=20), inbox.post):
            server.wait_for(lambda: server.probes >= 3)
        assert inbox.seen == []

    def test_a_silent_link_is_told_and_then_that_it_is_back(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        server.freeze()
        frozen = time.monotonic()
        with attached(transport, PATIENT, inbox.post):
            silent = inbox.wait(LinkSilent)
            assert silent.at - silent.heard_at >= 2 * PATIENT.link_probe_s
            assert silent.at - frozen < 2 * PATIENT.link_probe_s + 0.5
            thawed = time.monotonic()
            server.thaw()
            restored = inbox.wait(LinkRestored)
            assert restored.at - thawed < 0.5
            assert restored.silent_s == pytest.approx(restored.at - silent.heard_at, abs=0.1)
        assert inbox.kinds() == [LinkSilent, LinkRestored]

    def test_silence_is_told_again_when_it_comes_again(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        with attached(transport, PATIENT, inbox.post):
            for count in (1, 2, 3):
                server.freeze()
                inbox.wait(LinkSilent, count)
                server.thaw()
                inbox.wait(LinkRestored, count)
        assert inbox.kinds() == [LinkSilent, LinkRestored] * 3

    def test_a_link_that_stays_silent_is_dead_after_dead_s(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        server.freeze()
        began = time.monotonic()
        with attached(transport, FAST, inbox.post):
            dead = inbox.wait(LinkDead)
            assert dead.silent_s >= FAST.link_dead_s
            assert FAST.link_dead_s <= dead.at - began < FAST.link_dead_s + 0.4
            assert inbox.kinds() == [LinkSilent, LinkDead]
            assert inbox.stays_without(TransportEnded, 0.3)
            assert inbox.kinds() == [LinkSilent, LinkDead], "it is told once"
            assert transport.is_active(), "the transport is the caller's, and not closed"

    def test_dead_comes_with_silent_also_where_it_is_the_shorter(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        server.freeze()
        with attached(transport, Timeouts(link_probe_s=0.2, link_dead_s=0.25), inbox.post):
            assert inbox.wait(LinkDead).silent_s < 0.4
        assert inbox.kinds() == [LinkSilent, LinkDead]

    def test_a_busy_link_is_not_probed(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        with Agent() as agent:
            channel = transport.open_channel("direct-tcpip", (LOOPBACK, agent.port), (LOOPBACK, 1), timeout=WAIT_S)
            peer = agent.accept()
            with attached(transport, Timeouts(link_probe_s=0.4, link_dead_s=20), inbox.post):
                began = time.monotonic()
                while since(began) < 1.5:
                    peer.sendall(b"x")
                    assert channel.recv(9)
                    threading.Event().wait(0.01)  # how often the agent speaks
                assert server.probes == 0
                server.wait_for(lambda: server.probes == 1)  # then it is idle
            channel.close()
        assert inbox.seen == []

    def test_an_idle_link_is_probed_at_most_once_in_probe_s(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        with attached(transport, Timeouts(link_probe_s=0.2, link_dead_s=20), inbox.post):
            began = time.monotonic()
            server.wait_for(lambda: server.probes == 5)
            assert since(began) >= 5 * 0.2

    def test_a_refused_probe_is_a_sign_of_life(
        self,
        transport: paramiko.Transport,
        inbox: Inbox,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        refusals = threading.Semaphore(0)

        def refuse(_: object, kind: str, chanid: int) -> int:
            assert kind == monitor._PROBE
            del chanid
            refusals.release()
            return OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED

        monkeypatch.setattr(embedded._Interface, "check_channel_request", refuse)
        with attached(transport, Timeouts(link_probe_s=0.3, link_dead_s=1), inbox.post):
            for _ in range(5):
                assert refusals.acquire(timeout=WAIT_S)
        assert inbox.seen == []
        assert transport.saved_exception is None

    def test_two_with_different_times_are_each_told_at_their_own(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        patient = Inbox()
        server.freeze()
        with (
            attached(transport, FAST, inbox.post),
            attached(transport, Timeouts(link_probe_s=0.6, link_dead_s=20), patient.post),
        ):
            first, second = inbox.wait(LinkSilent), patient.wait(LinkSilent)
            assert second.at - first.at > 0.6
            inbox.wait(LinkDead)
            server.thaw()
            patient.wait(LinkRestored)
            inbox.wait(LinkRestored)
        assert inbox.kinds() == [LinkSilent, LinkDead, LinkRestored]
        assert patient.kinds() == [LinkSilent, LinkRestored]

    def test_one_that_comes_late_does_not_count_the_quiet_before_it_came(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        """An idle link that a patient one has not probed yet is no dead link."""
        other = Inbox()
        with attached(transport, QUIET, other.post):
            assert other.stays_without(Observation, 0.7)  # longer than the next one's link_dead_s
            with attached(transport, FAST, inbox.post):
                server.wait_for(lambda: server.probes >= 2)
        assert LinkDead not in inbox.kinds()
        assert inbox.seen == []

    def test_one_that_comes_late_to_a_silent_link_is_told_by_its_own_times(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        other = Inbox()
        server.freeze()
        with attached(transport, PATIENT, other.post):
            other.wait(LinkSilent)
            began = time.monotonic()
            with attached(transport, FAST, inbox.post):
                silent, dead = inbox.wait(LinkSilent), inbox.wait(LinkDead)
            assert silent.at - began >= 2 * FAST.link_probe_s
            assert dead.at - began >= FAST.link_dead_s
            server.thaw()
            other.wait(LinkRestored)

    def test_the_time_in_which_this_process_was_stopped_is_no_silence_of_the_server(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ctrl-Z for a minute: the clock has gone on, and the server had no probe to answer."""
        clock = Clock()
        monkeypatch.setattr(monitor, "time", clock)
        with attached(transport, Timeouts(link_probe_s=0.5, link_dead_s=20), inbox.post):
            assert inbox.stays_without(Observation, 0.1)  # the monitor sleeps, nothing comes
            clock.ahead_s += 60
            server.wait_for(lambda: server.probes >= 2)
        assert inbox.seen == []

    def test_a_probe_that_is_out_does_not_hold_the_leaving(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox
    ) -> None:
        server.freeze()
        with attached(transport, PATIENT, inbox.post):
            inbox.wait(LinkSilent)
            began = time.monotonic()
        assert since(began) < 0.5
        eventually(lambda: not own_threads(), WAIT_S)
        server.thaw()
        server.wait_for(lambda: server.probes == 1)

    def test_leaving_while_probes_come_back_breaks_nothing(
        self, transport: paramiko.Transport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken: list[threading.ExceptHookArgs] = []
        monkeypatch.setattr(threading, "excepthook", broken.append)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for turn in range(100):
                attachment = attach(transport, Timeouts(link_probe_s=0.001, link_dead_s=20), Inbox().post)
                threading.Event().wait(turn % 10 * 0.0005)  # another moment each time
                attachment.detach()
        finally:
            sys.setswitchinterval(interval)
        eventually(lambda: not own_threads(), WAIT_S)
        assert broken == []


class Clock:
    """The time module as the monitor uses it, and a leap ahead."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


# ---- the caller ----


@pytest.fixture
def probed(
    server: LoopbackSSHServer, transport: paramiko.Transport, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], int]]:
    """A transport that is probed without a pause, though it is busy; gives how many probes were answered so far."""
    monkeypatch.setattr(monitor, "packets_received", lambda _: 0)
    server.commands = {"say": lambda line: (7, line.encode(), b"")}
    with attached(transport, Timeouts(link_probe_s=0.001, link_dead_s=50), inbox.post):
        yield lambda: server.probes
    assert TransportEnded not in inbox.kinds()
    assert transport.is_active()


def turns(probes: Callable[[], int]) -> Iterator[int]:
    """Count to 200, and on until at least 100 probes were answered meanwhile."""
    number = 0
    while number < 200 or probes() < 100:
        yield number
        number += 1


class TestTheCallerIsNotDisturbed:
    def test_commands_run_as_ever(self, transport: paramiko.Transport, probed: Callable[[], int]) -> None:
        for number in turns(probed):
            with transport.open_session(timeout=WAIT_S) as channel:
                channel.exec_command(f"say {number}")
                assert channel.makefile("rb").read() == f"say {number}".encode()
                assert channel.recv_exit_status() == 7

    def test_port_forwards_are_granted_as_ever(
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

    def test_port_forwards_are_denied_as_ever(self, transport: paramiko.Transport, probed: Callable[[], int]) -> None:
        for _ in turns(probed):
            with pytest.raises(paramiko.SSHException, match="TCP forwarding request denied"):
                transport.request_port_forward("", 0)

    def test_refused_opens_say_why_as_ever(self, transport: paramiko.Transport, probed: Callable[[], int]) -> None:
        port = dead_port()
        for number in turns(probed):
            destination = (LOOPBACK, port) if number % 2 else ("192.0.2.1", 9)
            with pytest.raises(paramiko.ChannelException) as refused:
                transport.open_channel("direct-tcpip", destination, (LOOPBACK, 1), timeout=WAIT_S)
            assert refused.value.code == (2 if number % 2 else 1)
        assert transport.get_exception() is None
