"""The engine's threads, on faked workers: ownership, precedence in the inbox, and waiting.

Its decisions are tested in test_supervisor.py, and the engine with real workers in test_engine.py.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from proxy_fsm import EndReason, InvalidTransition, State, Timeouts
from proxy_fsm import engine as engine_module
from proxy_fsm.engine import RUNNING_ENGINES, Engine
from proxy_fsm.evidence import AgentDataReceived, LinkRestored, LinkSilent, ProcessExited, TransportEnded
from proxy_fsm.journal import Journal
from proxy_fsm.status import Link, TransitionRecord, TunnelStats
from proxy_fsm.supervisor import Supervisor
from proxy_fsm.testing.fakes import FakedProxy, FakeEffects, fake_session
from tests.helpers.recorder import Recorder
from tests.helpers.script import Judge
from tests.helpers.task import Task
from tests.helpers.wait import WAIT_S, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Effects(FakeEffects):
    """Effects that record certain calls, and raise if a test says so."""

    def __init__(self, proxy: Proxy, **options: Any) -> None:
        super().__init__(proxy, post=options["post"], publish=options["publish"])
        self.proxy, self.secrets = proxy, list(options["secrets"])
        self.acknowledged = 0

    def start_preflight(self) -> None:
        self.proxy.preflight_begun.set()
        self.proxy.go_on.wait(self.proxy.preflight_takes_s)
        self.proxy.preflight_started.set()
        if self.proxy.broken is not None:
            raise self.proxy.broken

    def terminate(self) -> None:
        if self.proxy.broken is not None:
            raise self.proxy.broken
        super().terminate()

    def acknowledge(self) -> None:
        self.acknowledged += 1


class Proxy(FakedProxy):
    """A faked proxy with its own logger, which exposes its engine."""

    def __init__(self, **options: Any) -> None:
        self.log = Recorder()
        self.preflight_begun, self.go_on, self.preflight_started = (threading.Event() for _ in range(3))
        self.preflight_takes_s = 0.0
        self.broken: BaseException | None = None
        self.judge = options.get("backend") or Judge()
        super().__init__(**{"logger": self.log, **options})

    @property
    def engine(self) -> Engine:
        return self._engine

    def _make_effects(self, *_: Any, **options: Any) -> Effects:
        self.effects = Effects(self, **options)
        return self.effects

    def owners(self) -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == f"proxy_fsm-{self.id}"]

    def hold(self) -> threading.Event:
        """Keep the owner thread busy until the returned event is set."""
        busy, release = threading.Event(), threading.Event()
        self.engine.call_soon(busy.set)
        self.engine.call_soon(lambda: release.wait(WAIT_S))
        assert busy.wait(WAIT_S)
        return release

    def ended(self) -> tuple[State, EndReason | None]:
        return self.wait(timeout=WAIT_S), self.status().reason


class Clock:
    """The time as an engine reads it, which can be advanced."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self.readings = 0

    def monotonic(self) -> float:
        self.readings += 1
        return time.monotonic() + self.ahead_s

    def suspend(self, proxy: Proxy, *, something_wakes_it: bool) -> None:
        """Advance it by an hour while the owner thread waits, and wait until the engine has noticed."""
        proxy.settle()
        self.ahead_s += 3600
        seen = self.readings
        if something_wakes_it:
            proxy.engine.call_soon(lambda: None)
        eventually(lambda: self.readings >= seen + 3, what="the next wait")


class Make(Protocol):
    def __call__(self, state: State = State.IDLE, **options: Any) -> Proxy: ...


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes proxies in any state, and stops them at the end."""
    made: list[Proxy] = []

    def proxy(state: State = State.IDLE, **options: Any) -> Proxy:
        made.append(Proxy(**options))
        made[-1].lead_to(state)
        return made[-1]

    yield proxy
    for each in made:
        each.broken = None
        each.end()


# ---- construction ----


def test_fresh_engine_is_idle_with_a_unique_id(make: Make) -> None:
    before = datetime.now(UTC)
    proxy = make()
    status = proxy.status()
    assert (status.id, status.session, status.state) == (proxy.id, fake_session().name, State.IDLE)
    assert before <= status.since <= datetime.now(UTC)
    assert (status.tunnel, status.silent_s, status.history) == (None, 0.0, ())
    assert len(proxy.id) == 8
    assert int(proxy.id, 16) >= 0
    assert proxy.id != make().id
    assert not proxy.engine.in_forked_child()


def test_end_within_s_sums_grace_drain_and_kill_limits(make: Make) -> None:
    assert make(timeouts=Timeouts(stop_grace_s=7, kill_s=3, drain_s=5)).engine.end_within_s == 7 + 5 + 6


@pytest.mark.parametrize("cookie", ["0" * 32, None])
def test_effects_receive_the_cookie_as_a_secret(make: Make, cookie: str | None) -> None:
    proxy = make(session=fake_session(cookie=cookie), backend=Judge())
    assert proxy.effects.secrets == ([cookie] if cookie else [])


def test_secret_is_redacted_in_status(make: Make) -> None:
    proxy = make(State.TUNNELLING)
    proxy.tunnel.fails(EndReason.LISTEN_FAILED, f"It holds {'0' * 32}.")
    proxy.settle()
    assert proxy.status().detail == "It holds <hidden>."


@pytest.mark.parametrize(("resumed", "retryable"), [(True, True), (False, False)])
def test_options_reach_the_supervisor(make: Make, *, resumed: bool, retryable: bool) -> None:
    proxy = make(State.SPAWNING, resumed=resumed, ask_server=True, backend=Judge())
    proxy.tunnel.connects()
    proxy.judge.verdict = EndReason.SESSION_ENDED, "It says so."
    proxy.process.starts()
    proxy.settle()
    assert proxy.state is State.SPAWNING
    proxy.stop()
    proxy.ended()
    proxy = make(State.SPAWNING, resumed=resumed)
    proxy.tunnel.connects()
    proxy.process.exits(3)
    proxy.ended()
    assert proxy.status().retryable is retryable


# ---- start and stop: ownership ----


def test_owner_thread_is_a_daemon_named_by_id(make: Make) -> None:
    (owner,) = make(State.TUNNELLING).owners()
    assert owner.daemon


def test_wait_joins_the_owner_thread(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(set[Any]):
        def discard(self, element: Any) -> None:
            threading.Event().wait(0.02)
            super().discard(element)

    monkeypatch.setattr(engine_module, "RUNNING_ENGINES", Slow())
    proxy = make(State.RUNNING)
    assert proxy.engine in engine_module.RUNNING_ENGINES
    assert proxy.engine not in RUNNING_ENGINES
    proxy.end()
    assert proxy.owners() == []
    assert not engine_module.RUNNING_ENGINES


def test_start_returns_after_preflight_start_and_publication(make: Make) -> None:
    proxy = make()
    proxy.preflight_takes_s = 0.02
    proxy.start()
    assert proxy.preflight_started.is_set()
    assert proxy.log.path() == ["tunnelling"]


@pytest.mark.parametrize("state", [State.RUNNING, State.STOPPED, State.FAILED])
def test_second_start_is_refused_and_changes_nothing(make: Make, state: State) -> None:
    proxy = make(state)
    for _ in range(2):
        with pytest.raises(InvalidTransition) as refused:
            proxy.start()
        assert (refused.value.trigger, refused.value.state) == ("start", state)
    proxy.settle()
    assert proxy.state is state


@pytest.mark.parametrize("stopped", [True, False])
def test_failed_thread_start_leaves_engine_idle_or_stopped(
    make: Make, monkeypatch: pytest.MonkeyPatch, *, stopped: bool
) -> None:
    proxy = make()

    def refuse(_: threading.Thread) -> None:
        if stopped:
            proxy.stop()
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            proxy.start()
    assert proxy.state is (State.STOPPED if stopped else State.IDLE)
    assert not proxy.engine.in_forked_child()
    if stopped:
        with pytest.raises(InvalidTransition):
            proxy.start()
    else:
        proxy.start()
        assert len(proxy.owners()) == 1


def test_owner_thread_without_its_claim_does_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread runs although the call that started it has released its claim."""
    proxy, late = make(), list[threading.Thread]()

    def interrupt(thread: threading.Thread) -> None:
        late.append(thread)
        raise KeyboardInterrupt

    start = threading.Thread.start
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            proxy.start()
    start(late[0])
    late[0].join(WAIT_S)
    assert not late[0].is_alive()
    assert (proxy.state, proxy.log.events) == (State.IDLE, [])
    proxy.start()
    assert proxy.state is State.TUNNELLING


def test_running_owner_thread_keeps_its_claim_if_start_is_interrupted(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, start = make(), threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        assert proxy.preflight_started.wait(WAIT_S)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            proxy.start()
    with pytest.raises(InvalidTransition):
        proxy.start()
    assert len(proxy.owners()) == 1
    proxy.stop()
    proxy.tunnel.preflight_ends()
    assert proxy.ended() == (State.STOPPED, EndReason.STOP_REQUESTED)


def test_stop_in_idle_is_published_by_its_caller(make: Make) -> None:
    proxy = make()
    proxy.stop()
    assert proxy.log.threads["proxy.transition"] == {threading.get_ident()}
    assert proxy.engine.is_caught_up()
    proxy.stop()
    assert proxy.log.path() == ["stopped"]
    assert proxy.wait(timeout=0) is State.STOPPED


def test_stop_of_an_idle_engine_that_is_interrupted_when_it_is_done_has_stopped_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, handle = make(), Supervisor.handle

    def interrupted(*arguments: Any) -> None:
        handle(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Supervisor, "handle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            proxy.stop()
    assert proxy.state is State.STOPPED
    with pytest.raises(InvalidTransition):
        proxy.start()


def test_interrupted_stop_in_idle_can_be_repeated(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = make()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Supervisor, "fire", interrupt)
        with pytest.raises(KeyboardInterrupt):
            proxy.stop()
    proxy.stop()
    assert proxy.state is State.STOPPED


def test_stop_in_idle_that_is_interrupted_while_it_publishes_is_published_all_the_same(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, publish, interrupts = make(), Journal.publish, [KeyboardInterrupt()]

    def interrupted(*arguments: Any) -> None:
        if interrupts:
            raise interrupts.pop()
        publish(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(proxy.effects, "_publish", partial(interrupted, proxy.engine.journal))
        with pytest.raises(KeyboardInterrupt):
            proxy.stop()
    assert proxy.wait(timeout=WAIT_S) is State.STOPPED


def test_start_does_not_wait_for_a_slow_subscriber(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy_fsm.journal._SUBSCRIBERS_FIRST_S", 1000)
    proxy, go_on = make(), threading.Event()
    proxy.subscribe(lambda _: go_on.wait(WAIT_S))
    Task(proxy.start).result()
    assert not go_on.is_set()
    go_on.set()


def test_forked_child_cannot_stop_or_wait_before_a_final_state(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, child = make(State.RUNNING), os.getpid() + 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: child)
        assert proxy.engine.in_forked_child()
        proxy.stop()
        with pytest.raises(RuntimeError, match=r"^This proxy belongs to the parent process: a fork cannot wait for it"):
            proxy.wait(timeout=0)
        assert proxy.status().tunnel is None
    proxy.settle()
    assert proxy.ok()
    assert proxy.status().tunnel == TunnelStats(0, 0, None, 0)
    proxy.end()
    monkeypatch.setattr(os, "getpid", lambda: child)
    assert proxy.wait(timeout=0) is State.STOPPED


# ---- the owner's steps ----


def test_order_precedes_earlier_observations(make: Make) -> None:
    proxy = make(State.RUNNING)
    release = proxy.hold()
    proxy.tunnel.display_lost()
    proxy.stop()
    release.set()
    assert proxy.ended() == (State.STOPPED, EndReason.STOP_REQUESTED)


@pytest.mark.parametrize(("stopped", "reason"), [(True, EndReason.STOP_REQUESTED), (False, EndReason.START_TIMEOUT)])
def test_order_precedes_deadline_and_deadline_precedes_observations(
    make: Make, reason: EndReason, *, stopped: bool
) -> None:
    proxy = make(timeouts=Timeouts(preflight_s=0.02))
    proxy.preflight_takes_s = WAIT_S
    start = threading.Thread(target=proxy.start)
    start.start()
    assert proxy.preflight_begun.wait(WAIT_S)
    over_at = time.monotonic() + 0.02
    proxy.tunnel.display_lost()
    if stopped:
        proxy.stop()
    eventually(lambda: time.monotonic() > over_at, what="the deadline is over")
    proxy.go_on.set()
    start.join(WAIT_S)
    proxy.tunnel.preflight_ends()
    proxy.wait(timeout=WAIT_S)
    assert proxy.status().reason is reason


def test_deadline_passes_without_observations(make: Make) -> None:
    proxy = make(timeouts=Timeouts(preflight_s=0.02, drain_s=0.02, kill_s=0.02))
    proxy.start()
    assert proxy.ended() == (State.FAILED, EndReason.START_TIMEOUT)
    assert 0.02 <= proxy.status().history[1].elapsed_s < 5
    assert proxy.log.named("internal.error") == []


@pytest.mark.parametrize("something_wakes_it", [True, False])
def test_suspension_of_the_process_is_not_counted_against_a_deadline(
    make: Make, monkeypatch: pytest.MonkeyPatch, *, something_wakes_it: bool
) -> None:
    """Ctrl-Z for an hour: the clock has advanced, and what the workers have posted meanwhile is still unread."""
    clock = Clock()
    monkeypatch.setattr(engine_module, "time", clock)
    proxy = make(timeouts=Timeouts(preflight_s=1000, ready_s=1000, stop_grace_s=1000))
    proxy.start()
    clock.suspend(proxy, something_wakes_it=something_wakes_it)
    proxy.tunnel.opens()
    proxy.settle()
    clock.suspend(proxy, something_wakes_it=something_wakes_it)
    proxy.process.starts()
    proxy.tunnel.connects()
    proxy.process.prints_ready()
    proxy.wait_running(timeout=WAIT_S)
    proxy.process.auto_complete = False
    proxy.stop()
    proxy.settle()
    clock.suspend(proxy, something_wakes_it=something_wakes_it)
    assert proxy.process.signals == [signal.SIGTERM]
    proxy.process.exits()
    assert proxy.ended() == (State.STOPPED, EndReason.STOP_REQUESTED)


def test_expire_deadline_without_a_deadline_is_a_no_op(make: Make) -> None:
    proxy = make(State.RUNNING)
    proxy.expire_deadline()
    assert proxy.ok()


def test_call_soon_runs_on_the_owner_thread_after_the_inbox(make: Make) -> None:
    proxy, seen = make(State.RUNNING), list[tuple[int | None, Link]]()
    release = proxy.hold()
    proxy.tunnel.link_silent()
    proxy.engine.call_soon(lambda: seen.append((threading.get_ident(), proxy.status().link)))
    assert not proxy.engine.is_caught_up()
    release.set()
    proxy.settle()
    assert proxy.engine.is_caught_up()
    assert seen == [(proxy.owners()[0].ident, Link.SILENT)]


@pytest.mark.parametrize("error", [None, ZeroDivisionError("of all things")])
def test_every_handled_line_is_acknowledged(make: Make, error: Exception | None) -> None:
    """Otherwise a program that prints would block forever."""
    proxy = make(State.SPAWNING, backend=Judge())
    proxy.process.auto_complete = False
    proxy.judge.error = error
    for _ in range(3):
        proxy.process.prints("a line")
    proxy.tunnel.agent_sends()
    proxy.settle()
    assert proxy.effects.acknowledged == 3


def test_status_has_the_duration_of_silence(make: Make) -> None:
    proxy = make(State.RUNNING)
    proxy.tunnel.post(LinkSilent(heard_at=time.monotonic() - 1000))
    proxy.settle()
    assert proxy.status().link is Link.SILENT
    assert 1000 <= proxy.status().silent_s < 1000 + WAIT_S
    proxy.tunnel.post(LinkRestored(silent_s=1000))
    proxy.settle()
    assert (proxy.status().link, proxy.status().silent_s) == (Link.OK, 0.0)


def test_records_have_the_time_they_were_made(make: Make) -> None:
    before = datetime.now(UTC)
    proxy = make(State.RUNNING)
    times = [before, *(record.at for record in proxy.status().history), datetime.now(UTC)]
    assert times == sorted(times)
    assert all(0 < record.elapsed_s < WAIT_S for record in proxy.status().history)


# ---- bugs ----


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_backend_bug_ends_in_internal_error_with_traceback(make: Make, error: type[BaseException]) -> None:
    proxy = running(make, Judge())
    proxy.judge.error = error("of all things")
    proxy.tunnel.post(AgentDataReceived(1))
    assert proxy.ended() == (State.FAILED, EndReason.INTERNAL_ERROR)
    (event,) = proxy.log.named("internal.error")
    assert event["exception"].startswith("Traceback")
    assert event["exception"].endswith(f"{error.__name__}: of all things\n")


def running(make: Make, backend: Judge) -> Proxy:
    proxy = make(State.SPAWNING, backend=backend)
    proxy.process.starts()
    proxy.tunnel.connects()
    proxy.process.prints("ready")
    proxy.wait_running(timeout=WAIT_S)
    return proxy


def test_bug_in_the_first_step_ends_in_internal_error(make: Make) -> None:
    proxy = make()
    proxy.broken = OSError("no thread")
    proxy.start()
    proxy.tunnel.preflight_ends()
    assert proxy.ended() == (State.FAILED, EndReason.INTERNAL_ERROR)


def test_second_bug_does_not_end_the_owner_thread(make: Make) -> None:
    proxy = running(make, Judge())
    proxy.broken = PermissionError("not ours")
    proxy.judge.error = ZeroDivisionError("of all things")
    proxy.tunnel.post(AgentDataReceived(1))
    proxy.wait(State.STOPPING, timeout=WAIT_S)
    proxy.settle()
    assert len(proxy.log.named("internal.error")) == 2
    proxy.expire_deadline()
    assert proxy.ended() == (State.FAILED, EndReason.INTERNAL_ERROR)
    assert proxy.process.signals == [signal.SIGKILL]


def test_bug_in_call_soon_ends_in_internal_error(make: Make) -> None:
    proxy = make(State.RUNNING)
    proxy.engine.call_soon(lambda: 1 / 0)
    assert proxy.ended() == (State.FAILED, EndReason.INTERNAL_ERROR)


# ---- waiting ----


def wait_recording_refusals(proxy: Proxy, refused: list[str]) -> Callable[..., None]:
    def wait(*_: object) -> None:
        with suppress(TimeoutError):
            try:
                proxy.wait(timeout=0)
            except RuntimeError as error:
                refused.append(str(error))

    return wait


REFUSED = "'wait' waits for the proxy, which a subscriber must not: call stop() instead."


def test_wait_on_the_owner_thread_is_refused(make: Make) -> None:
    proxy, refused = make(State.RUNNING), list[str]()
    proxy.engine.call_soon(wait_recording_refusals(proxy, refused))
    proxy.settle()
    assert refused == [REFUSED]


@pytest.mark.parametrize("via", [None, lambda function: function()])
def test_subscriber_may_stop_but_not_wait(make: Make, via: Callable[..., object] | None) -> None:
    proxy, refused = make(State.RUNNING), list[str]()
    proxy.subscribe(wait_recording_refusals(proxy, refused), via=via)
    proxy.subscribe(lambda _: proxy.stop(), via=via, replay=True)
    assert proxy.ended() == (State.STOPPED, EndReason.STOP_REQUESTED)
    eventually(lambda: len(refused) == 2, what="both changes were delivered")
    assert refused == [REFUSED] * 2


def test_subscriber_of_a_stop_in_idle_may_not_wait(make: Make) -> None:
    proxy, refused = make(), list[str]()
    proxy.subscribe(wait_recording_refusals(proxy, refused), via=lambda function: function())
    proxy.stop()
    assert refused == [REFUSED]


def test_wait_accepts_states_and_timeout(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = make(State.RUNNING)
    monkeypatch.delattr(threading.Thread, "join")  # its owner thread is waited for at its end alone
    assert proxy.wait(State.RUNNING, timeout=0) is State.RUNNING
    with pytest.raises(TimeoutError):
        proxy.wait(State.STOPPING, timeout=0)
    monkeypatch.undo()


@pytest.mark.parametrize("via", [None, lambda function: function()])
@pytest.mark.parametrize("replay", [True, False])
def test_late_subscriber_receives_past_records_with_replay(
    make: Make, via: Callable[..., object] | None, *, replay: bool
) -> None:
    proxy, received = make(State.RUNNING), list[TransitionRecord]()
    proxy.subscribe(received.append, via=via, replay=replay)
    proxy.subscribe(lambda _: pytest.fail("It was unsubscribed."), via=via)()
    proxy.settle()
    assert tuple(received) == (proxy.status().history if replay else ())
    proxy.end()
    eventually(lambda: tuple(received) == proxy.status().history[0 if replay else 3 :], what="all was delivered")
    assert proxy.log.named("subscriber.failed") == []


def test_blocking_subscriber_delays_nothing(make: Make) -> None:
    """Neither the preflight, nor `stop`, SIGTERM and the end, nor another subscriber, nor another proxy is delayed."""
    proxy, other = make(), make(State.RUNNING)
    entered, wake, received = threading.Event(), threading.Event(), list[str]()

    def sleep(_: TransitionRecord) -> None:
        entered.set()
        wake.wait(WAIT_S)

    proxy.subscribe(sleep)
    proxy.subscribe(lambda record: received.append(str(record.dest)), via=lambda function: function())
    try:
        proxy.start()
        assert entered.wait(WAIT_S)
        assert proxy.preflight_started.is_set()
        proxy.tunnel.opens()
        proxy.process.starts()
        proxy.tunnel.connects()
        proxy.process.prints_ready()
        proxy.wait_running(timeout=WAIT_S)
        proxy.stop()
        assert proxy.ended() == (State.STOPPED, EndReason.STOP_REQUESTED)
        assert proxy.process.signals == [signal.SIGTERM]
        assert received == ["tunnelling", "spawning", "running", "stopping", "stopped"]
        other.end()
        assert other.state is State.STOPPED
        assert not wake.is_set()
    finally:
        wake.set()


def test_observations_after_a_final_state_are_ignored(make: Make) -> None:
    proxy = make(State.STOPPED)
    history = proxy.status().history
    for seen in (TransportEnded("It was cut."), ProcessExited(0, None)):
        proxy.tunnel.post(seen)
    proxy.stop()
    proxy.settle()
    assert proxy.status().history == history
