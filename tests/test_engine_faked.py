"""The engine's rules, one by one, on faked workers: no socket, no program, no waiting."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm import (
    CommandBackend,
    EndReason,
    Evidence,
    InvalidTransition,
    Lifecycle,
    NX3Backend,
    State,
    Timeouts,
    Trigger,
)
from proxy_fsm import engine as engine_module
from proxy_fsm.engine import LIVE, Workers
from proxy_fsm.errors import BackendError
from proxy_fsm.evidence import (
    ConnectionEnded,
    LinkRestored,
    LinkSilent,
    LogFailed,
    Observation,
    OutputLine,
    PeerRejected,
    PreflightPassed,
    ProcessExited,
    SessionStatusReceived,
    SpawnFailed,
    TransportEnded,
    WorkerFailed,
)
from proxy_fsm.session import SessionStatus
from proxy_fsm.status import Link, TransitionRecord
from proxy_fsm.testing.fakes import READY_LINE, FakedProxy, FakeTransport, fake_session
from proxy_fsm.workers import link_monitor
from proxy_fsm.workers.forwarder import Forwarder
from proxy_fsm.workers.preflight import Preflight
from proxy_fsm.workers.process import ProxyProcess
from proxy_fsm.workers.session_query import SessionStatusQuery
from tests.helpers.recorder import Recorder
from tests.helpers.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from proxy_fsm import Transition

#: All different, and none short enough to pass by itself.
TIMEOUTS = Timeouts(
    preflight_s=1000,
    ready_s=2000,
    stop_grace_s=3000,
    kill_s=4000,
    ask_server_s=5000,
    agent_connect_s=6000,
    link_probe_s=7000,
    link_dead_s=8000,
)
#: In place of half a second, which could pass by itself.
DRAIN_S = 500.0
TERMINATING = "Session: Terminating session at 'now'."
ADDRESS = "/fake/proxy.sock"


class Call:
    """How something was called."""

    def __init__(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.name, self.arguments, self.options = name, arguments, options


class Spied(FakedProxy):
    """A faked proxy that notes how its engine calls its workers, in order."""

    def __init__(self, **options: Any) -> None:
        self.calls: list[Call] = []
        self.log = Recorder()
        options.setdefault("timeouts", TIMEOUTS)
        super().__init__(**{"logger": self.log, **options})
        engine = self._engine
        for name, worker, methods in (
            ("forwarder", engine._forwarder, ("start", "close", "abort")),
            ("preparation", engine._preparation, ("start", "close")),
        ):
            for method in methods:
                setattr(worker, method, self._spy(f"{name}.{method}", getattr(worker, method)))

    def _spy(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def spied(*arguments: Any, **options: Any) -> Any:
            self.calls.append(Call(name, arguments, options))
            return function(*arguments, **options)

        return spied

    def _make_workers(self) -> Workers:
        workers = super()._make_workers()

        def process(*arguments: Any, **options: Any) -> Any:
            made = workers.process(*arguments, **options)
            made.start = self._spy("process.start", made.start)  # type: ignore[method-assign]
            return made

        def question(*arguments: Any, **options: Any) -> Any:
            made = workers.question(*arguments, **options)
            made.start = self._spy("question.start", made.start)  # type: ignore[method-assign]
            made.cancel = self._spy("question.cancel", made.cancel)  # type: ignore[method-assign]
            return made

        return Workers(
            forwarder=self._spy("forwarder", workers.forwarder),
            preparation=self._spy("preparation", workers.preparation),
            process=self._spy("process", process),
            question=self._spy("question", question),
            attach=self._spy("attach", workers.attach),
        )

    def called(self) -> list[str]:
        """Return what was called, in order."""
        return [call.name for call in self.calls]

    def call(self, name: str) -> Call:
        """Return the one call of a name."""
        (call,) = (call for call in self.calls if call.name == name)
        return call

    def sees(self, *seen: Observation) -> None:
        """Have the engine take observations in."""
        for each in seen:
            self.tunnel._post(each)
        self.settle()

    def deadline_s(self) -> float | None:
        """Return how long the running deadline is from now, rounded to what tells them apart."""
        self.settle()
        timer = self._engine._timer
        return (
            None if timer is None else round(timer[0] - time.monotonic(), -3 if timer[0] > time.monotonic() + 9 else 0)
        )

    def ended(self) -> tuple[State, EndReason | None]:
        """Return the final state, and why."""
        return self.wait(timeout=5), self.status().reason

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the fields of a kind of events, without those that all have."""
        for event in self.log.named(name):
            assert (event["proxy_id"], event["session"]) == (self.id, "fake-51-1_stDxterm_dp24")
        return [
            {key: value for key, value in event.items() if key not in {"event", "proxy_id", "session"}}
            for event in self.log.named(name)
        ]


class Watch:
    """A display watch that says what a test says."""

    def __init__(self, *, suspect: bool = False) -> None:
        self.suspect = suspect
        self.started = False
        self.joined: list[float] = []

    def start(self) -> None:
        self.started = True

    def join(self, timeout: float) -> None:
        self.joined.append(timeout)


class Judge(NX3Backend):
    """A backend that says what a test says, and counts how often it is asked."""

    def __init__(self, verdict: tuple[EndReason, str] | None = None) -> None:
        super().__init__("/fake/nxproxy")
        self.verdict = verdict
        self.asked = 0
        self.error: Exception | None = None

    def diagnose(self, evidence: Evidence) -> tuple[EndReason, str] | None:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.verdict if evidence.said("now") else None


@pytest.fixture(autouse=True)
def forget_what_a_failed_test_left() -> Iterator[None]:
    """With these deadlines the interpreter would wait for an hour until such an engine has ended."""
    before = set(LIVE)
    yield
    for engine in set(LIVE) - before:
        engine._update(state=State.FAILED)
        engine._inbox.put(None)
        LIVE.discard(engine)


@pytest.fixture(autouse=True)
def no_draining_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_module._DRAIN_S == 0.5
    monkeypatch.setattr(engine_module, "_DRAIN_S", DRAIN_S)


def in_state(state: State, **options: Any) -> Spied:
    proxy = Spied.in_state(state, **options)
    assert isinstance(proxy, Spied)
    return proxy


def running(**options: Any) -> Spied:
    return in_state(State.RUNNING, **options)


def close_session(proxy: Spied) -> None:
    """End it as nxproxy does when its session was suspended or terminated."""
    proxy.process.says(TERMINATING)
    proxy.process.exits()
    proxy.settle()


def path(proxy: Spied) -> list[str]:
    return [str(record.trigger) for record in proxy.status().history]


class Clock:
    """A clock that the engine reads and the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: self.now_s))


# ---- what it is made of ----


def test_a_fresh_engine_is_idle_and_knows_nothing_but_its_names() -> None:
    before = datetime.now(UTC)
    proxy = Spied()
    status = proxy.status()
    assert (status.id, status.session, status.state) == (proxy.id, "fake-51-1_stDxterm_dp24", State.IDLE)
    assert before <= status.since <= datetime.now(UTC)
    assert (status.tunnel, status.listen_address, status.pid, status.reason) == (None, None, None, None)
    assert (status.link, status.silent_s, status.waiting_for, status.history) == (Link.OK, 0.0, "", ())
    assert len(proxy.id) == 8
    assert int(proxy.id, 16) >= 0
    assert proxy.id != Spied().id
    assert proxy._engine._timer is None


def test_the_end_is_within_the_grace_the_last_bytes_and_twice_the_kill_time() -> None:
    proxy = Spied(timeouts=Timeouts(stop_grace_s=7, kill_s=3))
    assert proxy._engine.end_within_s == 7 + DRAIN_S + 6


def test_its_workers_are_made_with_what_they_need() -> None:
    transport, backend = FakeTransport(), CommandBackend(["/fake/viewer", "{port}"], max_connections=3)
    session = fake_session(agent_host="127.0.0.2", graphics_port=4789)
    proxy = Spied(session=session, transport=transport, backend=backend, environ={"A": "B"}, sessions_root="/fake/root")
    engine = proxy._engine
    forwarder, preparation = proxy.call("forwarder"), proxy.call("preparation")
    assert forwarder.arguments == (transport, ("127.0.0.2", 4789))
    assert forwarder.options == {"max_connections": 3, "agent_connect_s": 6000, "post": engine._inbox.put}
    assert preparation.arguments == (session, backend, engine._forwarder)
    assert {**preparation.options, "sessions_root": str(preparation.options["sessions_root"])} == {
        "sessions_root": "/fake/root",
        "environ": {"A": "B"},
        "timeout_s": 1000,
        "post": engine._inbox.put,
    }
    proxy.start()
    assert proxy.call("attach").arguments == (transport, TIMEOUTS, engine._inbox.put)
    proxy.end()


@pytest.mark.parametrize("cookie", ["0" * 32, None])
def test_the_proxy_program_gets_its_launch_and_its_secrets(cookie: str | None) -> None:
    backend = CommandBackend(["/fake/viewer", "{port}"])
    proxy = in_state(State.SPAWNING, session=fake_session(cookie=cookie), backend=backend)
    proxy.settle()
    process, launch = proxy.call("process"), proxy._engine._preparation.launch
    assert launch is not None
    assert process.arguments == (launch.command,)
    assert {**process.options, "secrets": list(process.options["secrets"])} == {
        "environment": launch.environment,
        "directory": launch.directory,
        "log": launch.log,
        "secrets": [cookie] if cookie else [],
        "post": proxy._engine._inbox.put,
    }
    proxy.end()


def test_each_worker_is_started_when_its_time_has_come() -> None:
    proxy = Spied()
    assert proxy.called() == ["forwarder", "preparation"]
    proxy.start()
    proxy.settle()
    assert proxy.called()[2:] == ["preparation.start", "attach"]
    watch = proxy._engine._preparation.watch = Watch()  # type: ignore[assignment]
    proxy.tunnel.opens()
    proxy.settle()
    assert proxy.called()[4:] == ["forwarder.start", "process", "process.start"]
    assert watch.started
    assert proxy.process.wanted
    proxy.end()


# ---- orders ----


def test_a_second_start_is_refused_with_its_name_and_the_state() -> None:
    proxy = running()
    with pytest.raises(InvalidTransition) as refused:
        proxy.start()
    assert (refused.value.trigger, refused.value.state) == ("start", State.RUNNING)
    proxy.end()


def test_the_owner_is_a_daemon_that_bears_the_id() -> None:
    proxy = in_state(State.TUNNELLING)
    owner = proxy._engine._owner
    assert owner is not None
    assert (owner.name, owner.daemon, owner.is_alive()) == (f"proxy_fsm-{proxy.id}", True, True)
    proxy.end()


def test_start_returns_when_everybody_was_told() -> None:
    proxy, told = Spied(), threading.Event()

    def on_change(_: TransitionRecord) -> None:
        threading.Event().wait(0.02)
        told.set()

    proxy.subscribe(on_change)
    proxy.start()
    assert told.is_set()
    assert proxy.state is State.TUNNELLING
    proxy.end()


@pytest.mark.parametrize("stopped", [True, False])
def test_an_owner_that_cannot_start_leaves_it_idle_or_stopped_where_that_was_ordered_meanwhile(
    monkeypatch: pytest.MonkeyPatch, *, stopped: bool
) -> None:
    proxy = Spied()

    def refuse(_: threading.Thread) -> None:
        if stopped:
            proxy.stop()
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            proxy.start()
    assert proxy.state is (State.STOPPED if stopped else State.IDLE)
    if stopped:
        with pytest.raises(InvalidTransition):
            proxy.start()
    else:
        proxy.start()
        proxy.end()


def test_an_idle_stop_is_a_clean_end_at_once_and_told_whole() -> None:
    proxy = Spied()
    proxy.stop()
    status = proxy.status()
    assert (status.state, status.reason, status.retryable) == (State.STOPPED, EndReason.STOP_REQUESTED, True)
    assert (status.detail, status.hint) == ("It was stopped before it was started.", None)
    assert (path(proxy), proxy.called()) == (["stop"], ["forwarder", "preparation"])
    (event,) = proxy.events("proxy.transition")
    assert (event["reason"], event["detail"]) == ("stop_requested", "It was stopped before it was started.")
    assert (event["hint"], event["retryable"]) == (None, True)
    proxy.stop()
    assert len(proxy.status().history) == 1
    assert proxy.wait(timeout=0) is State.STOPPED


def test_stop_ends_it_with_its_reason_and_by_its_own_trigger() -> None:
    proxy = running()
    proxy.stop()
    assert proxy.ended() == (State.STOPPED, EndReason.STOP_REQUESTED)
    assert proxy.status().detail == "It was asked to stop."
    assert path(proxy) == ["start", "tunnel_opened", "proxy_ready", "stop", "closed_cleanly"]


def test_the_workers_are_the_real_ones_by_default() -> None:
    assert Workers() == Workers(Forwarder, Preflight, ProxyProcess, SessionStatusQuery, link_monitor.attach)


def test_a_forked_childs_copy_stops_nothing_and_waits_only_for_what_is_final() -> None:
    proxy = running()
    assert proxy._engine._owner_pid == os.getpid()
    assert not proxy._engine.in_forked_child()
    proxy._engine._owner_pid = os.getpid() + 1
    assert proxy._engine.in_forked_child()
    proxy.stop()
    proxy.settle()
    assert proxy.state is State.RUNNING
    with pytest.raises(RuntimeError, match=r"^This proxy belongs to the parent process: a fork cannot wait for it\.$"):
        proxy.wait(timeout=0)
    proxy._engine._owner_pid = os.getpid()
    proxy.end()
    proxy._engine._owner_pid = os.getpid() + 1
    assert proxy.wait(timeout=0) is State.STOPPED


def test_an_idle_engine_belongs_to_nobody() -> None:
    assert not Spied()._engine.in_forked_child()


def test_waiting_on_the_owner_is_refused_whether_it_delivers_or_not() -> None:
    proxy = running()
    refused: list[str] = []

    def wait() -> None:
        with suppress(TimeoutError):
            try:
                proxy.wait(timeout=0)
            except RuntimeError as error:
                refused.append(str(error))

    proxy._engine._timer = (0.0, wait)
    proxy.settle()
    proxy.subscribe(lambda _: wait())
    proxy.end()
    message = "'wait' waits for the proxy, which waits for this subscriber: call stop() instead."
    assert refused == [message] * 3


def test_waiting_in_a_subscriber_of_an_idle_stop_is_refused_too() -> None:
    proxy = Spied()
    refused: list[type[BaseException]] = []

    def on_change(_: TransitionRecord) -> None:
        with pytest.raises(RuntimeError) as error:
            proxy.wait(timeout=0)
        refused.append(error.type)

    proxy.subscribe(on_change)
    proxy.stop()
    assert refused == [RuntimeError]


def test_wait_takes_a_timeout_and_the_states() -> None:
    proxy = running()
    assert proxy.wait(State.RUNNING, timeout=0) is State.RUNNING
    with pytest.raises(TimeoutError):
        proxy.wait(State.STOPPING, timeout=0)
    proxy.end()


def test_after_the_wait_for_its_end_the_owner_is_gone_and_it_is_live_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(set[Any]):
        def discard(self, element: Any) -> None:
            threading.Event().wait(0.02)
            super().discard(element)

    monkeypatch.setattr(engine_module, "LIVE", Slow())
    proxy = running()
    assert proxy._engine in engine_module.LIVE
    assert proxy._engine not in LIVE
    proxy.end()
    assert proxy._engine._owner is not None
    assert not proxy._engine._owner.is_alive()
    assert not engine_module.LIVE


def test_a_newcomer_is_told_what_it_missed_at_once() -> None:
    proxy, told, all_told = running(), list[TransitionRecord](), threading.Event()

    def on_change(record: TransitionRecord) -> None:
        told.append(record)
        if record.dest is State.RUNNING:
            all_told.set()

    unsubscribe = proxy.subscribe(on_change, replay=True)
    assert all_told.wait(5)
    unsubscribe()
    proxy.end()
    assert tuple(told) == proxy.status().history[:3]


def test_a_newcomer_without_replay_or_with_a_loop_is_told_so() -> None:
    proxy, told, handed = running(), list[str](), list[str]()

    def via(function: Callable[..., object], *arguments: object) -> None:
        handed.append("via")
        function(*arguments)

    proxy.subscribe(lambda record: told.append(str(record.dest)), via=via)
    proxy.end()
    assert (told, handed) == (["stopping", "stopped"], ["via", "via"])


# ---- what a change tells ----


def test_each_record_has_its_fields_and_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, before = Clock(monkeypatch), datetime.now(UTC)
    proxy = Spied()
    clock.now_s += 1
    proxy.start()
    clock.now_s += 10
    proxy.tunnel.opens()
    proxy.settle()
    clock.now_s += 100
    proxy.process.cannot_start()
    proxy.wait(timeout=5)
    history = proxy.status().history
    told = [(r.trigger, r.source, r.dest, r.reason, r.detail, r.elapsed_s, r.sequence) for r in history]
    reason, detail = EndReason.PROXY_NOT_STARTABLE, "It cannot be started."
    assert told == [
        (Trigger.START, State.IDLE, State.TUNNELLING, None, "", 1, 1),
        (Trigger.TUNNEL_OPENED, State.TUNNELLING, State.SPAWNING, None, "", 10, 2),
        (Trigger.FAULT_FOUND, State.SPAWNING, State.STOPPING, reason, detail, 100, 3),
        (Trigger.CLOSED_AFTER_FAULT, State.STOPPING, State.FAILED, reason, detail, 0, 4),
    ]
    assert {(r.proxy_id, r.session) for r in history} == {(proxy.id, "fake-51-1_stDxterm_dp24")}
    assert [before, *(r.at for r in history)] == sorted([before, *(r.at for r in history)])
    assert all(r.at.tzinfo is UTC for r in history)
    assert proxy.status().since == history[-1].at


def test_who_is_told_sees_the_new_state_with_what_it_waits_for() -> None:
    proxy, seen = Spied(), list[tuple[str, str, int]]()

    def on_change(_: TransitionRecord) -> None:
        status = proxy.status()
        seen.append((status.state, status.waiting_for, len(status.history)))

    proxy.subscribe(on_change)
    proxy.lead_to(State.RUNNING)
    proxy.end()
    assert seen == [
        ("tunnelling", "the preflight", 1),
        ("spawning", "the proxy program's start", 2),
        ("running", "", 3),
        ("stopping", "the proxy program's end", 4),
        ("stopped", "", 5),
    ]


def test_only_the_last_event_has_hint_and_retryable() -> None:
    proxy = running(resumed=True)
    proxy.process.is_killed(signal.SIGKILL)
    assert proxy.ended() == (State.FAILED, EndReason.PROXY_KILLED)
    events = proxy.events("proxy.transition")
    assert {event["level"] for event in events} == {"info"}
    assert [("hint" in event, "retryable" in event) for event in events] == [(False, False)] * 4 + [(True, True)]
    assert (events[-1]["hint"], events[-1]["retryable"]) == (EndReason.PROXY_KILLED.hint, True)
    assert proxy.status().retryable is True
    assert proxy.status().hint == EndReason.PROXY_KILLED.hint


@pytest.mark.parametrize(
    ("connected", "running_s", "resumed", "retryable"),
    [
        (False, None, False, True),
        (True, None, False, False),
        (True, None, True, True),
        (True, 0.0, False, None),
        (True, 100.0, False, True),
        (True, 0.0, True, True),
    ],
)
def test_retryable_follows_how_far_it_came(
    monkeypatch: pytest.MonkeyPatch,
    *,
    connected: bool,
    running_s: float | None,
    resumed: bool,
    retryable: bool | None,
) -> None:
    clock = Clock(monkeypatch)
    proxy = in_state(State.SPAWNING, resumed=resumed)
    proxy.process.starts()
    clock.now_s += 200
    if connected:
        proxy.tunnel.connects()
    if running_s is not None:
        proxy.process.says_ready()
        proxy.wait(State.RUNNING, timeout=5)
        clock.now_s += running_s
    assert proxy.status().retryable is None
    proxy.process.exits(3)
    assert proxy.ended() == (State.FAILED, EndReason.PROXY_EXITED)
    assert proxy.status().retryable is retryable


# ---- deadlines on the way up ----


@pytest.mark.parametrize(
    ("said", "after_s", "missing"),
    [
        ([], 1000, "what the test says"),
        (["opens"], 2000, "the proxy program's start"),
        (["opens", "starts"], 2000, "the channel to the agent"),
        (["opens", "starts", "connects"], 2000, "the proxy's sign that the session stands"),
    ],
)
def test_what_is_not_ready_in_time_is_told_with_what_is_missing(said: list[str], after_s: int, missing: str) -> None:
    proxy = in_state(State.TUNNELLING)
    for what in said:
        getattr(proxy.process if what == "starts" else proxy.tunnel, what)()
    proxy.settle()
    assert proxy.status().waiting_for == missing if said else True
    assert proxy.deadline_s() == after_s
    proxy.expire_deadline()
    proxy.tunnel.preflight_ends()
    assert proxy.ended() == (State.FAILED, EndReason.START_TIMEOUT)
    what = "ready" if said else "prepared"
    assert proxy.status().detail == f"Not {what} after {after_s} s: {missing} was still missing."


def test_running_has_no_deadline_and_a_status_that_waits_for_nothing() -> None:
    proxy = running()
    assert proxy.deadline_s() is None
    assert proxy.status().waiting_for == ""
    proxy.end()


def test_a_deadline_acts_once() -> None:
    proxy, acted = running(), list[int]()
    proxy._engine._timer = (0.0, lambda: acted.append(1))
    proxy.settle()
    assert acted == [1]
    assert proxy.deadline_s() is None
    proxy.end()


# ---- readiness ----


def test_the_sign_may_come_before_the_channel() -> None:
    proxy = in_state(State.SPAWNING)
    proxy.process.starts()
    proxy.process.says_ready()
    proxy.settle()
    assert proxy.state is State.SPAWNING
    proxy.tunnel.connects()
    assert proxy.wait(State.RUNNING, timeout=5) is State.RUNNING
    assert proxy._engine._evidence.ready
    proxy.end()


def test_what_has_exited_does_not_get_ready_any_more() -> None:
    proxy = in_state(State.SPAWNING, backend=Judge())
    proxy.process.says_ready()
    proxy.process.exits(1)
    assert proxy.ended() == (State.FAILED, EndReason.PROXY_EXITED)
    proxy = in_state(State.SPAWNING)
    proxy.process.says_ready()
    proxy.settle()
    proxy._engine._evidence.add(ProcessExited(0, None))
    proxy.tunnel.connects()
    assert proxy.ended() == (State.FAILED, EndReason.PROXY_EXITED)
    assert "proxy_ready" not in path(proxy)


def test_the_backend_is_asked_in_spawning_and_running_alone() -> None:
    backend = Judge()
    proxy = in_state(State.TUNNELLING, backend=backend)
    proxy.tunnel.is_heard_again()
    proxy.settle()
    assert backend.asked == 0
    proxy.tunnel.opens()
    proxy.process.starts()
    proxy.settle()
    assert backend.asked == 3
    proxy.process.says_ready()
    proxy.tunnel.connects()
    proxy.tunnel.agent_speaks()
    proxy.settle()
    assert (backend.asked, proxy.state) == (6, State.RUNNING)
    proxy.process.auto_complete = False
    proxy.stop()
    proxy.process.says("now")
    proxy.settle()
    assert backend.asked == 6
    proxy.end()


def test_a_verdict_ends_it_while_the_program_lives() -> None:
    proxy = running(backend=Judge((EndReason.PEER_LOST, "It says so.")))
    proxy.process.says("now")
    assert proxy.ended() == (State.FAILED, EndReason.PEER_LOST)
    assert (proxy.status().detail, proxy.status().hint) == ("It says so.", EndReason.PEER_LOST.hint)
    assert proxy.process.signals == [signal.SIGTERM]
    assert path(proxy)[-2:] == ["fault_found", "closed_after_fault"]


def test_a_verdict_comes_before_the_exit() -> None:
    proxy = running(backend=Judge((EndReason.VIEWER_CLOSED, "It was closed.")))
    proxy._engine._evidence.add(OutputLine("now"))
    proxy.process.exits(9)
    assert proxy.ended() == (State.STOPPED, EndReason.VIEWER_CLOSED)
    assert path(proxy)[-2:] == ["session_ended", "closed_cleanly"]


@pytest.mark.parametrize("hint", [None, "Do this."])
def test_a_backend_that_refuses_ends_it_with_its_reason(hint: str | None) -> None:
    backend = Judge()
    proxy = running(backend=backend)
    backend.error = BackendError(EndReason.PEER_LOST, "It is gone.", hint)
    proxy.tunnel.agent_speaks()
    assert proxy.ended() == (State.FAILED, EndReason.PEER_LOST)
    assert (proxy.status().detail, proxy.status().hint) == ("It is gone.", hint or EndReason.PEER_LOST.hint)
    assert not proxy.events("internal.error")


@pytest.mark.parametrize(
    ("lines", "code", "detail"),
    [
        ([], 3, "The proxy program ended with exit code 3 and printed nothing."),
        (["one", "two"], 0, 'The proxy program ended with exit code 0; its last line: "two".'),
        (["one", "  "], 1, 'The proxy program ended with exit code 1; its last line: "one".'),
    ],
)
def test_an_exit_is_told_with_code_and_last_line(lines: list[str], code: int, detail: str) -> None:
    proxy = in_state(State.SPAWNING)
    for line in lines:
        proxy.process.says(line)
    proxy.process.exits(code)
    assert proxy.ended() == (State.FAILED, EndReason.PROXY_EXITED)
    assert proxy.status().detail == detail


@pytest.mark.parametrize(("number", "name"), [(11, "signal SIGSEGV"), (99, "signal 99")])
def test_a_signal_is_told_by_its_name(number: int, name: str) -> None:
    proxy = running()
    proxy.process.is_killed(number)
    assert proxy.ended() == (State.FAILED, EndReason.PROXY_KILLED)
    assert proxy.status().detail == f"The proxy program was ended by {name}."
    assert (proxy.status().signal, proxy.status().exit_code) == (number, None)


# ---- causes ----


def test_what_was_prepared_too_late_changes_nothing() -> None:
    proxy = in_state(State.STOPPING)
    proxy.sees(PreflightPassed("/late"))
    assert (proxy.status().listen_address, proxy.status().tunnel) == (None, None)
    proxy.end()
    proxy = running()
    proxy.sees(PreflightPassed("/late"))
    assert proxy.status().listen_address == ADDRESS
    assert proxy.status().tunnel == proxy._engine._forwarder.stats()
    proxy.end()


@pytest.mark.parametrize("state", [State.TUNNELLING, State.SPAWNING])
@pytest.mark.parametrize("hint", [None, "Do this."])
def test_a_worker_that_refuses_before_running_ends_it(state: State, hint: str | None) -> None:
    proxy = in_state(state)
    proxy.sees(WorkerFailed(BackendError(EndReason.FORWARDING_DENIED, "It is denied.", hint)))
    proxy.tunnel.preflight_ends()
    assert proxy.ended() == (State.FAILED, EndReason.FORWARDING_DENIED)
    assert (proxy.status().detail, proxy.status().hint) == ("It is denied.", hint or EndReason.FORWARDING_DENIED.hint)
    assert proxy.events("tunnel.refused") == []


def test_a_worker_that_refuses_while_running_is_logged_alone() -> None:
    proxy = running()
    proxy.tunnel.refuses(EndReason.AGENT_UNREACHABLE, "It was refused.")
    proxy.settle()
    assert proxy.ok()
    assert proxy.events("tunnel.refused") == [
        {"level": "warning", "reason": "agent_unreachable", "detail": "It was refused."}
    ]
    assert type(proxy.events("tunnel.refused")[0]["reason"]) is str
    proxy.end()


@pytest.mark.parametrize("hint", [None, "Do this."])
def test_a_program_that_cannot_start_ends_it_and_is_not_signalled(hint: str | None) -> None:
    proxy = in_state(State.SPAWNING)
    proxy.sees(SpawnFailed(BackendError(EndReason.PROXY_NOT_FOUND, "It is not there.", hint)))
    assert proxy.ended() == (State.FAILED, EndReason.PROXY_NOT_FOUND)
    assert (proxy.status().detail, proxy.status().hint) == ("It is not there.", hint or EndReason.PROXY_NOT_FOUND.hint)
    assert proxy.process.signals == []


def test_a_program_that_cannot_start_while_stopping_frees_the_rest() -> None:
    proxy = in_state(State.SPAWNING)
    proxy.process.auto_complete = False
    proxy.stop()
    proxy.settle()
    proxy.process.cannot_start()
    assert proxy.ended() == (State.STOPPED, EndReason.STOP_REQUESTED)


@pytest.mark.parametrize("state", [State.TUNNELLING, State.SPAWNING, State.RUNNING])
def test_a_worker_that_breaks_ends_it_with_its_traceback_logged(state: State) -> None:
    proxy = in_state(state)
    proxy.tunnel.breaks()
    proxy.tunnel.preflight_ends()
    assert proxy.ended() == (State.FAILED, EndReason.INTERNAL_ERROR)
    assert proxy.status().detail == "An internal error in the tunnel: ZeroDivisionError('a fake one')."
    (event,) = proxy.events("internal.error")
    assert (event["level"], event["worker"]) == ("error", "tunnel")
    assert event["exception"] == "ZeroDivisionError: a fake one\n"


def test_an_error_of_the_engine_itself_ends_it_with_its_traceback_logged() -> None:
    backend = Judge()
    proxy = running(backend=backend)
    backend.error = ZeroDivisionError("of all things")
    proxy.tunnel.agent_speaks()
    assert proxy.ended() == (State.FAILED, EndReason.INTERNAL_ERROR)
    assert proxy.status().detail == "An internal error: ZeroDivisionError: of all things."
    assert proxy.status().hint == EndReason.INTERNAL_ERROR.hint
    (event,) = proxy.events("internal.error")
    assert event["level"] == "error"
    assert event["exception"].startswith("Traceback")
    assert event["exception"].endswith("ZeroDivisionError: of all things\n")


def test_an_error_in_the_first_step_ends_it_too() -> None:
    proxy = Spied()

    def broken() -> None:
        raise OSError("no thread")

    proxy._engine._preparation.start = broken  # type: ignore[method-assign]
    proxy.start()
    proxy.tunnel.preflight_ends()
    assert proxy.ended() == (State.FAILED, EndReason.INTERNAL_ERROR)
    assert not proxy.called().count("attach")


def test_an_error_after_the_cause_changes_nothing_of_it() -> None:
    proxy = running()
    proxy.process.auto_complete = False
    proxy.stop()
    proxy.settle()

    def broken() -> None:
        raise OSError("of all things")

    proxy._engine._timer = (0.0, broken)
    proxy.settle()  # it has woken; the deadline comes next
    eventually(lambda: proxy.events("internal.error"), what="the error is told")
    assert len(proxy.events("internal.error")) == 1
    assert proxy.status().reason is EndReason.STOP_REQUESTED
    proxy.end()


def test_a_transport_that_ends_is_told_and_the_program_is_killed_at_once() -> None:
    transport = FakeTransport()
    proxy = running(transport=transport)
    transport.end()
    proxy.sees(TransportEnded("It was cut."))
    assert proxy.ended() == (State.FAILED, EndReason.TRANSPORT_LOST)
    assert proxy.status().detail == "It was cut."
    assert proxy.process.signals == [signal.SIGKILL]


def test_a_stop_without_a_transport_kills_the_program_at_once() -> None:
    transport = FakeTransport()
    proxy = running(transport=transport)
    transport.end()
    proxy.stop()
    assert proxy.ended() == (State.STOPPED, EndReason.STOP_REQUESTED)
    assert proxy.process.signals == [signal.SIGKILL]


def test_a_link_that_stays_silent_is_told_and_the_program_is_killed_at_once() -> None:
    proxy = running()
    proxy.tunnel.stays_silent()
    assert proxy.ended() == (State.FAILED, EndReason.TRANSPORT_SILENT)
    assert proxy.status().detail == "The SSH server has not been heard for 45 s."
    assert proxy.process.signals == [signal.SIGKILL]


def test_a_display_that_goes_is_told() -> None:
    proxy = running()
    proxy.tunnel.display_goes()
    assert proxy.ended() == (State.FAILED, EndReason.DISPLAY_LOST)
    assert proxy.status().detail == "The X server has gone. There is no X server."
    assert proxy.process.signals == [signal.SIGTERM]


def test_the_first_cause_wins() -> None:
    proxy = running()
    proxy.process.auto_complete = False
    proxy.tunnel.display_goes()
    proxy.stop()
    proxy.tunnel.transport_ends()
    proxy.settle()
    assert proxy.status().reason is EndReason.DISPLAY_LOST
    proxy.process.is_killed(signal.SIGTERM)
    assert proxy.ended() == (State.FAILED, EndReason.DISPLAY_LOST)
    assert proxy.status().detail == "The X server has gone. There is no X server."


def test_an_end_of_the_session_that_is_seen_while_stopping_leaves_the_deadline() -> None:
    proxy = in_state(State.STOPPING)
    timer = proxy._engine._timer
    proxy.tunnel.refuses(EndReason.SESSION_ENDED)
    proxy.settle()
    assert timer is not None
    assert proxy._engine._timer is timer
    proxy.end()


SECOND_HAND = {EndReason.NEGOTIATION_FAILED, EndReason.PEER_LOST, EndReason.SESSION_ENDED, EndReason.PROXY_EXITED}


@pytest.mark.parametrize("reason", [reason for reason in EndReason if reason is not EndReason.STOP_REQUESTED])
def test_what_is_second_hand_gives_way_where_the_transport_has_gone(reason: EndReason) -> None:
    transport = FakeTransport()
    proxy = running(backend=Judge((reason, "It says so.")), transport=transport)
    transport.end()
    proxy.process.says("now")
    _, told = proxy.ended()
    assert told is (EndReason.TRANSPORT_LOST if reason in SECOND_HAND else reason)
    assert proxy.status().detail == ("The SSH connection ended." if reason in SECOND_HAND else "It says so.")


# ---- an end that has to be confirmed ----


def test_an_end_of_the_session_counts_at_once_where_nothing_doubts_it() -> None:
    proxy = running()
    proxy._engine._preparation.watch = Watch()  # type: ignore[assignment]
    close_session(proxy)
    assert proxy.ended() == (State.STOPPED, EndReason.SESSION_ENDED)
    assert proxy.status().detail == "The agent closed the session: it was suspended or terminated."
    assert proxy.status().retryable is None
    assert "question" not in proxy.called()
    assert path(proxy)[-2:] == ["session_ended", "closed_cleanly"]


def test_while_the_display_is_in_doubt_the_end_is_held() -> None:
    proxy = running()
    watch = proxy._engine._preparation.watch = Watch(suspect=True)  # type: ignore[assignment]
    close_session(proxy)
    assert (proxy.state, proxy.status().reason) == (State.RUNNING, None)
    assert proxy.deadline_s() == 5000
    watch.suspect = False
    proxy.tunnel.display_returns()
    assert proxy.ended() == (State.STOPPED, EndReason.SESSION_ENDED)


def test_a_display_that_proves_lost_is_the_cause_that_was_held_for() -> None:
    proxy = running()
    proxy._engine._preparation.watch = Watch(suspect=True)  # type: ignore[assignment]
    close_session(proxy)
    proxy.tunnel.display_goes()
    assert proxy.ended() == (State.FAILED, EndReason.DISPLAY_LOST)


def test_seeing_the_end_again_gives_its_confirmation_no_more_time() -> None:
    proxy = running(ask_server=True)
    close_session(proxy)
    timer = proxy._engine._timer
    proxy.tunnel.agent_speaks()
    proxy.settle()
    assert timer is not None
    assert proxy._engine._timer is timer
    proxy.end()


def test_a_doubt_that_nobody_settles_ends_with_its_time() -> None:
    proxy = running()
    proxy._engine._preparation.watch = Watch(suspect=True)  # type: ignore[assignment]
    close_session(proxy)
    proxy.expire_deadline()
    assert proxy.ended() == (State.STOPPED, EndReason.SESSION_ENDED)


def test_a_display_that_returns_without_an_end_means_nothing() -> None:
    proxy = running(ask_server=True)
    proxy.tunnel.display_returns()
    proxy.settle()
    assert proxy.ok()
    assert "question" not in proxy.called()
    proxy.end()


@pytest.mark.parametrize("other", ["a stop", "the transport", "nothing new"])
def test_any_other_cause_confirms_what_was_held_and_the_same_does_not(other: str) -> None:
    proxy = running(ask_server=True)
    close_session(proxy)
    assert proxy.state is State.RUNNING
    {"a stop": proxy.stop, "the transport": proxy.tunnel.transport_ends, "nothing new": proxy.tunnel.agent_speaks}[
        other
    ]()
    proxy.settle()
    assert proxy.status().reason is (None if other == "nothing new" else EndReason.SESSION_ENDED)
    proxy.end()
    assert proxy.status().reason is EndReason.SESSION_ENDED
    assert proxy.status().detail == "The agent closed the session: it was suspended or terminated."


@pytest.mark.parametrize(
    ("answer", "reason", "detail"),
    [
        (SessionStatus.SUSPENDED, EndReason.SESSION_SUSPENDED, "The session was suspended on the server."),
        (SessionStatus.FINISHED, EndReason.SESSION_TERMINATED, "The session was terminated on the server."),
        (
            SessionStatus.RUNNING,
            EndReason.SESSION_ENDED,
            "The agent closed the session: it was suspended or terminated.",
        ),
        (None, EndReason.SESSION_ENDED, "The agent closed the session: it was suspended or terminated."),
    ],
)
def test_the_server_is_asked_which_end_it_was(answer: SessionStatus | None, reason: EndReason, detail: str) -> None:
    proxy = running(ask_server=True)
    close_session(proxy)
    assert (proxy.state, proxy.deadline_s()) == (State.RUNNING, 5000)
    engine = proxy._engine
    assert proxy.call("question").arguments == (engine._transport, "fake-51-1_stDxterm_dp24", engine._inbox.put)
    assert proxy.called()[-2:] == ["question", "question.start"]
    proxy.tunnel.server_answers(answer)
    assert proxy.ended() == (State.STOPPED, reason)
    assert (proxy.status().detail, proxy.status().hint) == (detail, reason.hint)
    assert proxy.called().count("question.cancel") == 1


def test_the_server_is_asked_once_and_not_before_the_display_is_sure() -> None:
    proxy = running(ask_server=True)
    watch = proxy._engine._preparation.watch = Watch(suspect=True)  # type: ignore[assignment]
    close_session(proxy)
    assert "question" not in proxy.called()
    watch.suspect = False
    for _ in range(2):
        proxy.tunnel.display_returns()
        proxy.settle()
        assert proxy.called().count("question.start") == 1
    proxy.expire_deadline()
    assert proxy.ended() == (State.STOPPED, EndReason.SESSION_ENDED)


def test_an_answer_that_nobody_waits_for_means_nothing() -> None:
    proxy = running(ask_server=True)
    proxy.sees(SessionStatusReceived(SessionStatus.FINISHED))
    assert proxy.ok()
    assert proxy.events("internal.error") == []
    proxy.end()


# ---- a connection that is gone while the program stays ----


def test_a_program_that_stays_without_its_connection_has_its_grace() -> None:
    proxy = running()
    proxy.tunnel.disconnects()
    proxy.settle()
    assert (proxy.state, proxy.deadline_s()) == (State.RUNNING, 3000)
    proxy.expire_deadline()
    assert proxy.ended() == (State.STOPPED, EndReason.SESSION_ENDED)
    assert proxy.status().detail == "The connection to the agent has ended; the proxy program stayed, alone."
    assert proxy.process.signals == [signal.SIGTERM]


@pytest.mark.parametrize("max_connections", [None, 2])
def test_of_several_connections_one_may_go(max_connections: int | None) -> None:
    backend = CommandBackend(["/fake/viewer", "{port}"], ready_when="connected", max_connections=max_connections)
    proxy = in_state(State.SPAWNING, backend=backend)
    proxy.tunnel.connects()
    proxy.wait(State.RUNNING, timeout=5)
    proxy.tunnel.disconnects()
    assert (proxy.deadline_s(), proxy.state) == (None, State.RUNNING)
    proxy.end()


def test_a_connection_that_goes_before_it_was_ready_leaves_the_deadline() -> None:
    proxy = in_state(State.SPAWNING)
    proxy.tunnel.connects()
    proxy.tunnel.disconnects()
    assert (proxy.deadline_s(), proxy.state) == (2000, State.SPAWNING)
    proxy.end()


def test_a_connection_that_goes_while_an_end_is_confirmed_leaves_the_deadline() -> None:
    proxy = running(ask_server=True)
    close_session(proxy)
    proxy.tunnel.disconnects()
    assert (proxy.deadline_s(), proxy.state) == (5000, State.RUNNING)
    proxy.end()


# ---- leaving ----


def test_a_deadline_that_was_let_pass_has_acted_however_slow_the_owner_is() -> None:
    proxy = in_state(State.SPAWNING)
    proxy.process.auto_complete = False
    engine = proxy._engine
    catch_up = engine.journal.catch_up

    def slowly() -> None:
        catch_up()  # `settle` hears of it
        if engine._timer is not None and engine._timer[0] == 0:
            threading.Event().wait(0.1)

    engine.journal.catch_up = slowly  # type: ignore[method-assign]
    proxy.expire_deadline()
    assert proxy.state is State.STOPPING
    proxy.end()


def test_leaving_is_sigterm_grace_sigkill_and_its_time() -> None:
    proxy = running()
    proxy.process.auto_complete = proxy.tunnel.auto_complete = False
    proxy.stop()
    assert proxy.deadline_s() == 3000
    assert (proxy.state, proxy.status().waiting_for) == (State.STOPPING, "the proxy program's end")
    assert proxy.process.signals == [signal.SIGTERM]
    assert proxy._engine._evidence.signalled
    proxy.expire_deadline()
    assert proxy.deadline_s() == 4000
    assert proxy.process.signals == [signal.SIGTERM, signal.SIGKILL]
    assert "forwarder.close" not in proxy.called()
    proxy.process.is_killed(signal.SIGKILL)
    proxy.settle()
    assert proxy.status().waiting_for == "the tunnel's end"
    assert proxy.called()[-2:] == ["preparation.close", "forwarder.close"]
    assert proxy.state is State.STOPPING
    proxy.tunnel.closes()
    assert proxy.ended() == (State.STOPPED, EndReason.STOP_REQUESTED)
    assert proxy.status().abandoned == ()
    assert proxy._engine._timer is None
    assert proxy.tunnel.detached


def test_the_tunnel_gets_a_moment_to_drain_then_is_aborted_then_abandoned() -> None:
    proxy = running()
    proxy.tunnel.auto_complete = False
    proxy.stop()
    proxy.settle()
    assert proxy._engine._timer is not None
    assert DRAIN_S / 2 < proxy._engine._timer[0] - time.monotonic() <= DRAIN_S
    assert "forwarder.abort" not in proxy.called()
    proxy.expire_deadline()
    assert proxy.called()[-2:] == ["forwarder.abort", "forwarder.close"]
    assert (proxy.state, proxy.deadline_s()) == (State.STOPPING, 4000)
    proxy.expire_deadline()
    assert proxy.ended() == (State.STOPPED, EndReason.STOP_REQUESTED)
    assert proxy.status().abandoned == ("channel 1 of the tunnel",)
    assert proxy.called()[-2:] == ["preparation.close", "forwarder.close"]


@pytest.mark.parametrize("what", ["transport_ends", "stays_silent"])
def test_a_tunnel_without_its_transport_is_cut_at_once(what: str) -> None:
    proxy = running()
    proxy.tunnel.auto_complete = False
    getattr(proxy.tunnel, what)()
    proxy.settle()
    assert proxy.called()[-4:] == ["preparation.close", "forwarder.close", "forwarder.abort", "forwarder.close"]
    proxy.end()


def test_a_preflight_that_hangs_is_abandoned_by_the_name_of_its_step() -> None:
    proxy = in_state(State.TUNNELLING)
    proxy.stop()
    proxy.settle()
    assert (proxy.state, proxy.status().waiting_for) == (State.STOPPING, "the tunnel's end")
    assert proxy.process.signals == []
    proxy.expire_deadline()
    proxy.expire_deadline()
    assert proxy.ended() == (State.STOPPED, EndReason.STOP_REQUESTED)
    assert proxy.status().abandoned == ("the preflight, waiting for what the test says",)


def test_a_link_that_is_silent_has_the_program_killed_at_once_and_one_that_is_restored_does_not() -> None:
    proxy = running()
    proxy.process.auto_complete = False
    proxy.tunnel.falls_silent()
    proxy.settle()
    proxy.stop()
    assert proxy.deadline_s() == 4000
    assert proxy.process.signals == [signal.SIGKILL]
    assert proxy._engine._evidence.signalled
    proxy.end()
    proxy = running()
    proxy.tunnel.falls_silent()
    proxy.tunnel.is_heard_again()
    proxy.settle()
    proxy.stop()
    assert proxy.ended() == (State.STOPPED, EndReason.STOP_REQUESTED)
    assert proxy.process.signals == [signal.SIGTERM]


@pytest.mark.parametrize("what", ["falls_silent", "stays_silent", "transport_ends"])
def test_where_nothing_orderly_can_travel_any_more_the_program_is_killed_at_once_and_once(what: str) -> None:
    """Also where the engine is leaving already."""
    proxy = running()
    proxy.process.auto_complete = False
    proxy.stop()
    proxy.settle()
    assert proxy.process.signals == [signal.SIGTERM]
    for _ in range(2):
        getattr(proxy.tunnel, what)()
        proxy.settle()
    assert proxy.process.signals == [signal.SIGTERM, signal.SIGKILL]
    assert proxy.deadline_s() == 4000
    proxy.end()
    assert proxy.status().reason is EndReason.STOP_REQUESTED


def test_what_comes_while_it_does_not_leave_kills_nothing() -> None:
    proxy = running()
    proxy.tunnel.falls_silent()
    proxy.settle()
    assert proxy.process.signals == []
    proxy.end()


def test_every_line_that_was_taken_in_is_counted() -> None:
    """Otherwise a program that prints is held up for ever."""
    proxy = running()
    counted: list[None] = []
    assert proxy._engine._process is not None
    proxy._engine._process.ack_line = lambda: counted.append(None)  # type: ignore[method-assign]
    for _ in range(3):
        proxy.process.says("a line")
    proxy.settle()
    assert len(counted) == 3
    proxy.end()


def test_a_ready_sign_from_before_the_channel_is_kept_however_much_is_printed_since() -> None:
    proxy = in_state(State.SPAWNING)
    proxy.process.starts()
    proxy.process.says_ready()
    for number in range(Evidence.KEPT + 1):
        proxy.process.says(f"line {number}")
    proxy.tunnel.connects()
    proxy.wait_running(timeout=5)
    proxy.end()


def test_an_exit_status_that_somebody_else_took_is_told_as_that() -> None:
    proxy = running()
    proxy.sees(ProcessExited(None, None))
    assert proxy.ended() == (State.FAILED, EndReason.PROXY_EXITED)
    assert proxy.status().detail == "The proxy program ended; somebody else has taken its exit status."


def test_a_preflight_that_takes_too_long_says_what_was_missing_and_what_to_do() -> None:
    proxy = in_state(State.TUNNELLING)
    proxy.expire_deadline()
    proxy.tunnel.preflight_ends()
    assert proxy.ended() == (State.FAILED, EndReason.START_TIMEOUT)
    assert proxy.status().detail == "Not prepared after 1000 s: what the test says was still missing."
    assert proxy.status().hint == "Look on this machine for what it waited for, or allow more time (preflight_s)."


def test_a_question_that_cannot_be_put_leaves_what_is_likely() -> None:
    proxy = running(ask_server=True)

    class Unable(SessionStatusQuery):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    proxy._engine._workers = dataclasses.replace(proxy._engine._workers, question=Unable)
    close_session(proxy)
    assert proxy.ended() == (State.STOPPED, EndReason.SESSION_ENDED)


def test_an_error_in_ending_after_an_error_ends_all_the_same() -> None:
    """Both are logged; what is then left is given up at once."""
    proxy = running()
    lifecycle = proxy._engine._lifecycle
    changed = lifecycle._on_change
    assert changed is not None

    def breaks(row: Transition) -> None:
        if row.dest is State.STOPPING:
            raise ArithmeticError("the second")
        changed(row)

    lifecycle._on_change = breaks
    proxy._engine._note = lambda _: 1 / 0  # type: ignore[method-assign,assignment]
    began = time.monotonic()
    proxy.tunnel.agent_speaks()
    assert proxy.ended() == (State.FAILED, EndReason.INTERNAL_ERROR)
    assert time.monotonic() - began < 5
    first, second = (event["exception"] for event in proxy.log.named("internal.error"))
    assert "ZeroDivisionError" in first
    assert "the second" in second


@pytest.mark.parametrize("clean", [True, False])
def test_a_program_that_survives_sigkill_turns_a_clean_end_alone_into_stop_timeout(*, clean: bool) -> None:
    proxy = running()
    proxy.process.auto_complete = False
    if clean:
        proxy.stop()
    else:
        proxy.tunnel.display_goes()
    proxy.expire_deadline()
    proxy.expire_deadline()
    assert proxy.ended() == (State.FAILED, EndReason.STOP_TIMEOUT if clean else EndReason.DISPLAY_LOST)
    status = proxy.status()
    survived = "The proxy program (process 4711) is still there after SIGKILL."
    assert status.detail == (survived if clean else "The X server has gone. There is no X server.")
    assert status.hint == (EndReason.STOP_TIMEOUT if clean else EndReason.DISPLAY_LOST).hint
    assert status.abandoned == ("process 4711",)
    assert proxy.tunnel.released


def test_a_program_that_cannot_be_signalled_is_abandoned_in_time() -> None:
    proxy = running()
    process, sent = proxy._engine._process, list[int]()
    assert process is not None

    def refuse(number: signal.Signals) -> None:
        sent.append(number)
        if number is signal.SIGTERM:
            raise PermissionError("not ours")

    process.signal = refuse  # type: ignore[method-assign]
    proxy.stop()
    assert proxy.deadline_s() == 4000
    proxy.expire_deadline()
    assert proxy.ended() == (State.STOPPED, EndReason.STOP_REQUESTED)
    assert sent == [signal.SIGTERM, signal.SIGKILL]
    assert proxy.status().abandoned == ("process 4711", "channel 1 of the tunnel")
    assert proxy.called()[-2:] == ["preparation.close", "forwarder.close"]


def test_all_of_program_preflight_and_tunnel_have_to_be_gone() -> None:
    proxy = in_state(State.TUNNELLING)
    proxy.sees(PreflightPassed(ADDRESS))
    proxy.process.auto_complete = False
    proxy.stop()
    proxy.tunnel.closes()
    proxy.settle()
    assert proxy.state is State.STOPPING
    proxy.process.is_killed(signal.SIGTERM)
    proxy.settle()
    assert proxy.state is State.STOPPING
    proxy.tunnel.preflight_ends()
    assert proxy.ended() == (State.STOPPED, EndReason.STOP_REQUESTED)


def test_a_tunnel_that_is_gone_first_leaves_the_program_its_grace() -> None:
    proxy = running()
    proxy.process.auto_complete = False
    proxy.stop()
    proxy.tunnel.closes()
    proxy.settle()
    assert (proxy.state, proxy.status().waiting_for) == (State.STOPPING, "the proxy program's end")
    proxy.process.is_killed(signal.SIGTERM)
    assert proxy.ended() == (State.STOPPED, EndReason.STOP_REQUESTED)
    assert proxy.status().signal == signal.SIGTERM


def test_what_ends_in_running_alone_is_released_in_stopping_alone() -> None:
    proxy = running(ask_server=True)
    close_session(proxy)
    assert proxy.state is State.RUNNING
    assert "forwarder.close" not in proxy.called()
    proxy.tunnel.closes()
    proxy.settle()
    assert proxy.state is State.RUNNING
    proxy.expire_deadline()
    assert proxy.ended() == (State.STOPPED, EndReason.SESSION_ENDED)


def test_a_monitor_that_breaks_does_not_hold_the_end_up() -> None:
    proxy = running()
    attachment = proxy._engine._attachment
    assert attachment is not None

    def broken() -> None:
        raise OSError("of all things")

    attachment.detach = broken  # type: ignore[method-assign]
    proxy.stop()
    assert proxy.ended() == (State.STOPPED, EndReason.STOP_REQUESTED)
    assert len(proxy.events("internal.error")) == 1


class Thread:
    """A thread that notes how long it is waited for, and takes its time by the test's clock."""

    def __init__(self, clock: Clock, ident: int | None = 1, takes_s: float = 0.0) -> None:
        self.ident, self.joined = ident, list[float]()
        self._clock, self._takes_s = clock, takes_s

    def join(self, timeout: float) -> None:
        self.joined.append(timeout)
        self._clock.now_s += self._takes_s


@pytest.mark.parametrize("abandoned", [True, False])
def test_all_threads_that_were_started_are_waited_for_within_a_second(
    monkeypatch: pytest.MonkeyPatch, *, abandoned: bool
) -> None:
    clock = Clock(monkeypatch)
    proxy = running(ask_server=True)
    close_session(proxy)
    engine = proxy._engine
    preparation, first, unstarted = Thread(clock, takes_s=0.25), Thread(clock, takes_s=0.25), Thread(clock, ident=None)
    process, question, watcher, watch = Thread(clock, takes_s=5), Thread(clock), Thread(clock), Watch()
    assert engine._attachment is not None
    assert engine._process is not None
    assert engine._question is not None
    engine._preparation.thread = preparation  # type: ignore[assignment]
    engine._forwarder.threads = lambda: (first, unstarted)  # type: ignore[method-assign, assignment, return-value]
    engine._process.thread = process  # type: ignore[assignment]
    engine._question.thread = question  # type: ignore[assignment]
    engine._attachment.detach = lambda: watcher  # type: ignore[method-assign, assignment, return-value]
    engine._preparation.watch = watch  # type: ignore[assignment]
    if abandoned:
        engine._update(abandoned=("something",))
    proxy.stop()
    proxy.wait(timeout=5)
    joined = [thread.joined for thread in (preparation, first, unstarted, process, question, watcher, watch)]
    assert joined == ([[]] * 7 if abandoned else [[1.0], [0.75], [], [0.5], [0.0], [0.0], [0.0]])


# ---- what is told of what is seen ----


def test_the_status_notes_what_is_seen_of_the_program() -> None:
    proxy = in_state(State.SPAWNING)
    proxy.process.starts(pid=12)
    proxy.settle()
    assert proxy.status().pid == 12
    assert proxy.status().listen_address == ADDRESS
    for number in range(30):
        proxy.process.says(f"line {number}")
    proxy.settle()
    assert proxy.status().output_tail == tuple(f"line {number}" for number in range(10, 30))
    proxy.process.exits(7)
    assert proxy.ended() == (State.FAILED, EndReason.PROXY_EXITED)
    assert (proxy.status().exit_code, proxy.status().signal) == (7, None)


def test_the_status_tells_for_how_long_the_link_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = running()
    clock = Clock(monkeypatch)
    proxy.sees(LinkSilent(heard_at=998.7654321))
    clock.now_s = 1002.7654321
    status = proxy.status()
    assert (status.link, status.silent_s) == (Link.SILENT, 4.0)
    proxy.sees(LinkRestored(silent_s=4.56789))
    status = proxy.status()
    assert (status.link, status.silent_s) == (Link.OK, 0.0)
    assert proxy.events("link.silent") == [{"level": "warning", "silent_s": 1.235}]
    assert proxy.events("link.restored") == [{"level": "info", "silent_s": 4.568}]
    assert proxy.ok()
    proxy.end()


def test_each_thing_seen_has_its_event() -> None:
    proxy = running()
    proxy.sees(PeerRejected("uid 33"), LogFailed("No space left."), ConnectionEnded(1, 2, 3, 4.123456789))
    proxy.process.is_killed(9)
    proxy.wait(timeout=5)
    assert proxy.events("tunnel.listening") == [{"level": "info", "address": ADDRESS}]
    assert proxy.events("process.spawned") == [{"level": "info", "pid": 4711, "executable": "/fake/nxproxy"}]
    assert proxy.events("process.output") == [{"level": "debug", "line": READY_LINE}]
    assert proxy.events("process.exited") == [{"level": "info", "exit_code": None, "signal": 9}]
    assert proxy.events("tunnel.connected") == [{"level": "info", "connection": 1}]
    assert proxy.events("tunnel.rejected") == [{"level": "warning", "peer": "uid 33"}]
    assert proxy.events("process.log_failed") == [{"level": "warning", "detail": "No space left."}]
    assert proxy.events("tunnel.closed") == [
        {"level": "info", "connection": 1, "bytes_to_agent": 2, "bytes_from_agent": 3, "duration_s": 4.123457}
    ]
    assert proxy.events("internal.error") == []


# ---- the machine beneath ----


def test_the_machine_takes_the_tables_triggers_alone() -> None:
    lifecycle = Lifecycle()
    assert set(lifecycle._machine.events) == {str(trigger) for trigger in Trigger}
    assert not hasattr(lifecycle._model, "to_running")


def test_what_an_effect_fires_is_done_when_it_returns() -> None:
    seen: list[object] = []

    def effect() -> None:
        seen.extend((lifecycle.closed_cleanly(), lifecycle.state))

    lifecycle = Lifecycle(on_enter={State.STOPPING: effect})
    lifecycle.start()
    assert lifecycle.stop()
    assert seen == [True, State.STOPPED]
    assert lifecycle.state is State.STOPPED


# ---- faults on the way out of a fault ----


def test_an_error_on_the_way_out_of_an_error_does_not_end_the_owner() -> None:
    backend = Judge()
    proxy = running(backend=backend)
    process = proxy._engine._process
    assert process is not None

    def refuse(number: signal.Signals) -> None:
        if number is signal.SIGTERM:
            raise PermissionError("not ours")

    process.signal = refuse  # type: ignore[method-assign]
    backend.error = ZeroDivisionError("of all things")
    proxy.tunnel.agent_speaks()
    proxy.wait(State.STOPPING, timeout=5)
    owner = proxy._engine._owner
    assert owner is not None
    owner.join(0.2)
    assert owner.is_alive()
    proxy.expire_deadline()
    assert proxy.ended() == (State.FAILED, EndReason.INTERNAL_ERROR)


@pytest.mark.parametrize("what", ["signal", "unreleased", "forwarder.close", "preparation.close"])
def test_what_cannot_be_released_at_all_does_not_hold_the_end_up(what: str) -> None:
    proxy = running()
    engine = proxy._engine

    def refuse(*_: object) -> None:
        raise PermissionError("not ours")

    worker, method = {
        "signal": (engine._process, "signal"),
        "unreleased": (engine._forwarder, "unreleased"),
        "forwarder.close": (engine._forwarder, "close"),
        "preparation.close": (engine._preparation, "close"),
    }[what]
    setattr(worker, method, refuse)
    proxy.tunnel.auto_complete = False
    proxy.stop()
    for _ in range(5):
        proxy.expire_deadline()
    assert proxy.wait(timeout=5) is State.STOPPED
