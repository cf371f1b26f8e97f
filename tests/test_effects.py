"""What each effect calls of the workers, in which order and with what."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest

from proxy_fsm import effects as effects_module
from proxy_fsm.backends import CommandBackend
from proxy_fsm.effects import WorkerEffects
from proxy_fsm.events import Event
from proxy_fsm.status import Timeouts
from proxy_fsm.testing.fakes import LAUNCH, FakeTransport, fake_session
from proxy_fsm.workers.process import ProxyProcess

TIMEOUTS = Timeouts(preflight_s=1, agent_connect_s=2)
SESSION = fake_session(agent_host="127.0.0.2", graphics_port=4789)
BACKEND = CommandBackend(["/fake/viewer", "{port}"], max_connections=3)


class Thread:
    """A thread that notes how long it is waited for, and takes its time by the workers' clock."""

    def __init__(self, workers: Workers, takes_s: float = 0.0, ident: int | None = 1) -> None:
        self.ident, self.waited_s = ident, list[float]()
        self._workers, self._takes_s = workers, takes_s

    def join(self, timeout: float) -> None:
        self.waited_s.append(timeout)
        self._workers.now_s += self._takes_s


class Workers:
    """The effects of a proxy, and mocks in place of all of its workers, which note their calls in one list."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.all = Mock()
        self.transport = FakeTransport()
        self.post, self.publish = Mock(), Mock()
        self.all.Preflight.return_value = self.preflight = self.all.preflight
        self.all.Forwarder.return_value = self.forwarder = self.all.forwarder
        self.all.ProxyProcess.return_value = self.process = self.all.process
        self.all.SessionStatusQuery.return_value = self.query = self.all.query
        self.all.link_monitor.attach.return_value = self.watcher = self.all.watcher
        self.forwarder.threads.return_value = ()
        self.watcher.detach.return_value = None
        for worker in (self.preflight, self.process, self.query):
            worker.thread = Thread(self)
        self.preflight.watch = None
        for name in ("Preflight", "Forwarder", "SessionStatusQuery", "link_monitor"):
            monkeypatch.setattr(effects_module, name, getattr(self.all, name))
        monkeypatch.setattr(effects_module, "time", Mock(monotonic=lambda: self.now_s))
        self.effects = WorkerEffects(
            SESSION,
            self.transport,
            BACKEND,
            sessions_root=Path("/fake/root"),
            environ={"A": "B"},
            timeouts=TIMEOUTS,
            secrets=["secret"],
            post=self.post,
            publish=self.publish,
            make_process=self.all.ProxyProcess,
        )
        self.made = self.called()

    def called(self) -> list[Any]:
        """Return what was called since this was asked last."""
        calls = list(self.all.mock_calls)
        self.all.mock_calls.clear()
        return calls

    def calls_of(self, effect: str, *arguments: Any, **options: Any) -> list[Any]:
        """Carry an effect out, and return what that has called."""
        getattr(self.effects, effect)(*arguments, **options)
        return self.called()

    def start(self) -> None:
        """Start all workers that there are."""
        self.preflight.watch = self.all.watch
        self.effects.start_preflight()
        self.effects.start_proxy(LAUNCH)
        self.effects.query_session()
        self.called()


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    return Workers(monkeypatch)


def test_forwarder_and_preflight_are_made_with_what_they_need(workers: Workers) -> None:
    options = {"sessions_root": Path("/fake/root"), "environ": {"A": "B"}, "timeout_s": 1, "post": workers.post}
    address = ("127.0.0.2", 4789)
    assert workers.made == [
        call.Forwarder(workers.transport, address, max_connections=3, agent_connect_s=2, post=workers.post),
        call.Preflight(SESSION, BACKEND, workers.forwarder, **options),
    ]


def test_process_is_the_real_one_by_default() -> None:
    assert WorkerEffects.__init__.__kwdefaults__ == {"make_process": ProxyProcess}


def test_start_preflight_starts_it_and_watches_the_transport(workers: Workers) -> None:
    attach = call.link_monitor.attach(workers.transport, TIMEOUTS, workers.post)
    assert workers.calls_of("start_preflight") == [call.preflight.start(), attach]


@pytest.mark.parametrize("watched", [True, False])
def test_start_proxy_listens_before_the_program_runs(workers: Workers, *, watched: bool) -> None:
    workers.preflight.watch = workers.all.watch if watched else None
    options = {"environment": LAUNCH.environment, "directory": LAUNCH.directory, "log": LAUNCH.log}
    made = call.ProxyProcess(LAUNCH.command, **options, secrets=["secret"], post=workers.post)
    assert workers.calls_of("start_proxy", LAUNCH) == [
        *([call.watch.start()] if watched else []),
        call.forwarder.start(),
        made,
        call.process.start(),
    ]


@pytest.mark.parametrize(
    ("effect", "calls"),
    [
        ("terminate", [call.process.signal(signal.SIGTERM)]),
        ("kill", [call.process.signal(signal.SIGKILL)]),
        ("acknowledge", [call.process.ack_line()]),
        ("drain", [call.preflight.close(), call.forwarder.close()]),
        ("abort", [call.preflight.close(), call.forwarder.close(), call.forwarder.abort()]),
        ("cancel_query", [call.query.cancel()]),
    ],
)
def test_each_effect_calls_its_worker(workers: Workers, effect: str, calls: list[Any]) -> None:
    workers.start()
    assert workers.calls_of(effect) == calls


def test_query_is_made_anew_for_each_question(workers: Workers) -> None:
    made = call.SessionStatusQuery(workers.transport, SESSION, workers.post)
    for _ in range(2):
        assert workers.calls_of("query_session") == [made, call.query.start()]


@pytest.mark.parametrize("effect", ["terminate", "kill", "acknowledge", "cancel_query"])
def test_effect_on_a_worker_that_was_never_made_is_harmless(workers: Workers, effect: str) -> None:
    assert workers.calls_of(effect) == []


def test_process_that_could_not_be_started_is_not_signalled(workers: Workers) -> None:
    workers.process.start.side_effect = RuntimeError("can't start new thread")
    with pytest.raises(RuntimeError):
        workers.effects.start_proxy(LAUNCH)
    workers.called()
    assert workers.calls_of("kill") == []


def test_preflight_that_cannot_be_closed_leaves_no_tunnel_open(workers: Workers) -> None:
    workers.preflight.close.side_effect = OSError("of all things")
    with pytest.raises(OSError, match="of all things"):
        workers.effects.drain()
    assert workers.called() == [call.preflight.close(), call.forwarder.close()]
    with pytest.raises(OSError, match="of all things"):
        workers.effects.abort()
    assert workers.called() == [call.preflight.close(), call.forwarder.close(), call.forwarder.abort()]


def test_release_waits_a_second_for_all_threads_that_were_started(workers: Workers) -> None:
    workers.start()
    first, unstarted, slow, monitor = (
        Thread(workers, takes_s=0.25),
        Thread(workers, ident=None),
        Thread(workers, takes_s=5),
        Thread(workers),
    )
    workers.preflight.thread, workers.process.thread = Thread(workers, takes_s=0.25), slow
    workers.forwarder.threads.return_value = (first, unstarted)
    workers.watcher.detach.return_value = monitor
    assert workers.calls_of("release", wait=True) == [
        call.watcher.detach(),
        call.forwarder.threads(),
        call.watch.join(0.0),
    ]
    joined = (workers.preflight.thread, slow, workers.query.thread, first, unstarted, monitor)
    assert [thread.waited_s for thread in joined] == [[1.0], [0.75], [0.0], [0.0], [], [0.0]]


def test_release_waits_for_the_display_watch_as_long_as_is_left(workers: Workers) -> None:
    workers.start()
    workers.preflight.thread = Thread(workers, takes_s=0.25)
    assert workers.calls_of("release", wait=True)[-1] == call.watch.join(0.75)


def test_release_waits_for_no_thread_where_something_was_abandoned(workers: Workers) -> None:
    workers.start()
    assert workers.calls_of("release", wait=False) == [call.watcher.detach()]
    assert workers.preflight.thread.waited_s == []


def test_release_of_what_was_never_started_is_harmless(workers: Workers) -> None:
    workers.preflight.thread = Thread(workers, ident=None)
    assert workers.calls_of("release", wait=True) == [call.forwarder.threads()]
    assert workers.preflight.thread.waited_s == []


def test_publish_hands_on_event_and_record(workers: Workers) -> None:
    event, record = Event("link.silent"), Mock()
    workers.effects.publish(event)
    workers.effects.publish(event, record)
    assert workers.publish.mock_calls == [call(event, None), call(event, record)]


def test_answers_are_those_of_the_workers(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    effects = workers.effects
    assert effects.preflight_step() is workers.preflight.step
    assert effects.unreleased() is workers.forwarder.unreleased.return_value
    assert effects.tunnel_stats() is workers.forwarder.stats.return_value
    monkeypatch.setattr(effects_module, "why_ended", {workers.transport: "It was cut."}.get)
    assert effects.transport_end() is None
    workers.transport.end()
    assert effects.transport_end() == "It was cut."


@pytest.mark.parametrize("suspect", [True, False])
def test_display_is_in_doubt_where_its_watch_says_so(workers: Workers, *, suspect: bool) -> None:
    assert not workers.effects.display_in_doubt()
    workers.preflight.watch = Mock(suspect=suspect)
    assert workers.effects.display_in_doubt() is suspect
