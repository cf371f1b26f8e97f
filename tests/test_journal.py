"""Each change of state is published once, in order, to logger, subscribers and waiters; none of them delays others."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
from datetime import UTC, datetime
from types import FrameType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import pytest

from proxy_fsm.events import Event, EventLog
from proxy_fsm.journal import Journal, _Delivery, _Notifier, join_notifiers
from proxy_fsm.reasons import EndReason
from proxy_fsm.states import State, Trigger
from proxy_fsm.status import TransitionRecord

from .helpers.holdings import threads_ended
from .helpers.recorder import Recorder
from .helpers.task import Task
from .helpers.wait import WAIT_S, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATH = (State.TUNNELLING, State.SPAWNING, State.RUNNING, State.STOPPING, State.STOPPED)
Sequences = list[int]


@pytest.fixture
def logger() -> Recorder:
    return Recorder()


@pytest.fixture
def journal(logger: Recorder) -> Journal:
    return make(logger)


@pytest.fixture
def _busy_threads() -> Iterator[None]:
    """Switch threads a thousand times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


MADE: list[Journal] = []


def make(logger: Any = None) -> Journal:
    MADE.append(Journal(EventLog(logger, proxy_id="id1", session="name")))
    return MADE[-1]


@pytest.fixture(autouse=True)
def _end_journals() -> Iterator[None]:
    """End each proxy, and its notifier with it."""
    yield
    for journal in MADE:
        publish(journal, record(5))
    MADE.clear()
    threads_ended()


def record(sequence: int, dest: State | None = None, reason: EndReason | None = None) -> TransitionRecord:
    """Return the record of this number, by default into the state of that number in a run without faults."""
    states = (State.IDLE, *PATH)
    return TransitionRecord(
        proxy_id="id1",
        session="name",
        trigger=Trigger.START,
        source=states[min(sequence - 1, 5)],
        dest=dest or states[min(sequence, 5)],
        reason=reason,
        detail="",
        at=datetime.now(UTC),
        elapsed_s=0.1234567,
        sequence=sequence,
    )


def publish(journal: Journal, each: TransitionRecord, **extra: Any) -> None:
    journal.publish(Event.of_transition(each, **extra), each)


def publish_range(journal: Journal, *, start: int = 1, end: int = len(PATH), flush: bool = True) -> None:
    """Publish changes, and wait until all of them were delivered."""
    for sequence in range(start, end + 1):
        publish(journal, record(sequence))
    if flush:
        assert journal.flush(WAIT_S)


def at_once(call: Callable[[], object]) -> None:
    """Call on the thread that publishes."""
    call()


def collect(received: Sequences) -> Callable[[TransitionRecord], None]:
    return lambda each: received.append(each.sequence)


class TestOrder:
    def test_publication_order_is_event_history_subscribers_waiters(self, journal: Journal, logger: Recorder) -> None:
        order: list[str] = []
        called, release = threading.Event(), threading.Event()

        def at_event() -> None:
            order.append(f"event, with {len(journal.records)} in the history")

        def at_subscriber(_: TransitionRecord) -> None:
            order.append("subscriber")
            called.set()
            assert release.wait(WAIT_S)

        def wait() -> None:
            journal.wait(frozenset({State.TUNNELLING}), WAIT_S)
            order.append("waiter")

        logger.on_event = at_event
        journal.subscribe(at_subscriber, at_once, replay=False)
        waiter = Task(wait)
        eventually(lambda: journal._waiters.all)
        owner = Task(lambda: publish_range(journal, end=1))
        assert called.wait(WAIT_S)
        with pytest.raises(TimeoutError):  # a new waiter does not return before all subscribers were called either
            journal.wait(frozenset({State.TUNNELLING}), 0)
        assert order == ["event, with 0 in the history", "subscriber"]
        logger.on_event = lambda: None  # the slow subscriber's
        release.set()
        waiter.result()
        owner.result()
        assert order[2:] == ["waiter"]

    def test_event_without_record_reaches_the_logger_only(self, journal: Journal, logger: Recorder) -> None:
        seen: Sequences = []
        journal.subscribe(collect(seen), None, replay=True)
        journal.publish(Event("link.silent", {"silent_s": 1.5}))
        assert journal.flush(WAIT_S)
        assert logger.named("link.silent") == [
            {"event": "link.silent", "level": "warning", "proxy_id": "id1", "session": "name", "silent_s": 1.5}
        ]
        assert (seen, journal.records) == ([], [])

    def test_transition_event_has_the_contracts_fields(self, journal: Journal, logger: Recorder) -> None:
        publish(journal, record(4, reason=EndReason.PEER_LOST), hint="Mend it.", retryable=False)
        assert logger.events == [
            {
                "event": "proxy.transition",
                "level": "info",
                "proxy_id": "id1",
                "session": "name",
                "trigger": "start",
                "source": "running",
                "dest": "stopping",
                "reason": "peer_lost",
                "detail": "",
                "elapsed_s": 0.123457,
                "sequence": 4,
                "hint": "Mend it.",
                "retryable": False,
            }
        ]

    def test_event_of_a_change_without_reason_has_none(self, journal: Journal, logger: Recorder) -> None:
        publish(journal, record(1))
        assert logger.named("proxy.transition")[0]["reason"] is None

    def test_subscribers_are_called_in_order_of_subscription(self, journal: Journal) -> None:
        order: list[str] = []
        for name in "abc":
            journal.subscribe(lambda _, name=name: order.append(name), None, replay=False)  # type: ignore[misc]
        publish_range(journal, end=2)
        assert order == list("abcabc")


class TestSubscribers:
    def test_subscriber_receives_all_records_from_then_on(self, journal: Journal) -> None:
        received: Sequences = []
        publish_range(journal, end=2)
        journal.subscribe(collect(received), None, replay=False)
        publish_range(journal, start=3)
        assert received == [3, 4, 5]

    def test_replay_delivers_past_records_first(self, journal: Journal) -> None:
        received: Sequences = []
        publish_range(journal, end=2)
        journal.subscribe(collect(received), None, replay=True)
        assert journal.flush(WAIT_S)
        assert received == [1, 2]
        publish_range(journal, start=3)
        assert received == [1, 2, 3, 4, 5]

    def test_replay_with_via_is_delivered_by_catch_up(self, journal: Journal) -> None:
        received: Sequences = []
        publish_range(journal, end=2)
        journal.subscribe(collect(received), at_once, replay=True)
        assert received == []
        journal.catch_up()
        assert received == [1, 2]
        journal.catch_up()
        publish_range(journal, start=3)
        assert received == [1, 2, 3, 4, 5]

    def test_next_change_delivers_the_past_ones_too(self, journal: Journal) -> None:
        received: Sequences = []
        publish_range(journal, end=2)
        journal.subscribe(collect(received), at_once, replay=True)
        publish_range(journal, start=3, end=3)
        assert received == [1, 2, 3]

    def test_replay_with_via_after_the_last_change_is_delivered_at_once(self, journal: Journal) -> None:
        publish_range(journal)
        seen: list[tuple[int, int, bool]] = []

        def callback(each: TransitionRecord) -> None:
            seen.append((each.sequence, threading.get_ident(), journal.is_delivering()))

        journal.subscribe(callback, at_once, replay=True)
        assert seen == [(sequence, threading.get_ident(), True) for sequence in range(1, 6)]
        journal.subscribe(callback, at_once, replay=False)
        assert len(seen) == 5

    def test_replay_without_via_after_the_last_change_uses_a_new_notifier(self, journal: Journal) -> None:
        journal.subscribe(collect([]), None, replay=False)
        publish_range(journal)
        seen: list[tuple[int, str, bool]] = []

        def callback(each: TransitionRecord) -> None:
            seen.append((each.sequence, threading.current_thread().name, journal.is_delivering()))

        journal.subscribe(callback, None, replay=True)
        assert journal.flush(WAIT_S)
        assert seen == [(sequence, "proxy_fsm-notifier", True) for sequence in range(1, 6)]
        assert not journal.is_delivering()

    def test_callback_may_subscribe(self, journal: Journal) -> None:
        late: Sequences = []
        replayed: Sequences = []

        def callback(each: TransitionRecord) -> None:
            if each.sequence == 2:
                journal.subscribe(collect(late), None, replay=False)
                journal.subscribe(collect(replayed), None, replay=True)

        journal.subscribe(callback, at_once, replay=False)
        publish_range(journal)
        assert (late, replayed) == ([3, 4, 5], [1, 2, 3, 4, 5])

    def test_callback_may_subscribe_in_the_last_call(self, journal: Journal) -> None:
        first: Sequences = []
        third: Sequences = []
        nested: Sequences = []

        def callback(each: TransitionRecord) -> None:
            if each.dest.is_final:
                journal.subscribe(collect(nested), None, replay=True)

        journal.subscribe(collect(first), None, replay=False)
        journal.subscribe(callback, None, replay=False)
        journal.subscribe(collect(third), None, replay=False)
        publish_range(journal)
        assert journal.flush(WAIT_S)
        assert first == third == nested == [1, 2, 3, 4, 5]

    @pytest.mark.usefixtures("_busy_threads")
    def test_concurrent_subscribers_receive_each_record_once(self, journal: Journal) -> None:
        """Including those that subscribe while the last change is delivered."""
        subscribed: list[tuple[bool, int, Sequences]] = []
        unsubscribed: list[Sequences] = []

        def subscribe_and_unsubscribe() -> None:
            for number in range(60):
                staying: Sequences = []
                leaving: Sequences = []
                journal.subscribe(collect(staying), None, replay=number % 2 == 0)
                subscribed.append((number % 2 == 0, len(journal.records), staying))
                unsubscribed.append(leaving)
                journal.subscribe(collect(leaving), None, replay=False)()

        publish(journal, record(1, State.RUNNING))
        tasks = [Task(subscribe_and_unsubscribe) for _ in range(3)]
        for sequence in itertools.count(2):
            over = len(subscribed) > 120
            publish(journal, record(sequence, State.STOPPED if over else State.RUNNING))
            if over:
                break
        for task in tasks:
            task.result()
        assert journal.flush(WAIT_S)
        every = [each.sequence for each in journal.records]
        assert len(subscribed) == 180
        for replay, known, received in subscribed:
            assert received == every[len(every) - len(received) :]
            assert len(received) >= (len(every) if replay else len(every) - known)
        for received in unsubscribed:
            assert all(later == earlier + 1 for earlier, later in itertools.pairwise(received))


class TestUnsubscribing:
    def test_no_record_after_unsubscribe(self, journal: Journal) -> None:
        received: Sequences = []
        unsubscribe = journal.subscribe(collect(received), None, replay=False)
        publish_range(journal, end=2)
        unsubscribe()
        publish_range(journal, start=3)
        assert received == [1, 2]

    def test_second_unsubscribe_is_a_no_op(self, journal: Journal) -> None:
        received: Sequences = []
        other: Sequences = []
        unsubscribe = journal.subscribe(collect(received), None, replay=False)
        journal.subscribe(collect(other), None, replay=False)
        unsubscribe()
        unsubscribe()
        publish_range(journal)
        assert (received, other) == ([], [1, 2, 3, 4, 5])

    def test_callback_may_unsubscribe(self, journal: Journal) -> None:
        received: Sequences = []
        other: Sequences = []

        def callback(each: TransitionRecord) -> None:
            received.append(each.sequence)
            if each.sequence == 2:
                unsubscribe()
                unsubscribe_next()

        unsubscribe = journal.subscribe(callback, None, replay=False)
        unsubscribe_next = journal.subscribe(collect(other), None, replay=False)
        publish_range(journal)
        assert (received, other) == ([1, 2], [1])

    def test_unsubscribe_ends_a_replay(self, journal: Journal) -> None:
        received: Sequences = []
        publish_range(journal, end=3)

        def callback(each: TransitionRecord) -> None:
            received.append(each.sequence)
            unsubscribe()

        unsubscribe = journal.subscribe(callback, at_once, replay=True)
        publish_range(journal, start=4)
        assert received == [1]

    def test_no_call_of_via_after_unsubscribe(self, journal: Journal) -> None:
        calls: list[tuple[Any, ...]] = []
        publish_range(journal, end=3)

        def via(*call: object) -> None:
            calls.append(call)
            unsubscribe()

        unsubscribe = journal.subscribe(collect([]), via, replay=True)
        publish_range(journal, start=4)
        assert len(calls) == 1

    def test_pending_call_in_another_loop_is_dropped_after_unsubscribe(self, journal: Journal) -> None:
        received: Sequences = []
        pending: list[tuple[Any, ...]] = []
        unsubscribe = journal.subscribe(collect(received), lambda *call: pending.append(call), replay=False)
        publish_range(journal, end=2)
        function, *arguments = pending[0]
        function(*arguments)
        unsubscribe()
        function, *arguments = pending[1]
        function(*arguments)
        assert received == [1]


class FailingRepr:
    """A callback that fails, as does its repr."""

    def __call__(self, _: TransitionRecord) -> None:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no name either")


class TestFailures:
    @pytest.mark.parametrize("error", [RuntimeError("a bug"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
    @pytest.mark.parametrize("where", ["callback", "via", "callback by way of via"])
    def test_exception_in_callback_or_via_is_logged_and_ignored(
        self, journal: Journal, logger: Recorder, error: BaseException, where: str
    ) -> None:
        def fail(*_: object) -> None:
            raise error

        handled: list[BaseException] = []
        logger.on_event = lambda: handled.extend(filter(None, [sys.exc_info()[1]]))
        received: Sequences = []
        if where == "via":
            callback: Callable[[TransitionRecord], None] = collect([])
            journal.subscribe(callback, fail, replay=False)
        else:
            callback = fail
            journal.subscribe(callback, None if where == "callback" else at_once, replay=False)
        journal.subscribe(collect(received), None, replay=False)
        publish_range(journal)
        assert received == [1, 2, 3, 4, 5]
        failures = logger.named("subscriber.failed")
        assert [failure["callback"] for failure in failures] == [repr(callback)] * 5
        assert all(failure["exc_info"] is True for failure in failures)
        assert {failure["level"] for failure in failures} == {"error"}
        assert handled == [error] * 5
        assert journal.wait(frozenset(), 0) is State.STOPPED

    def test_subscriber_with_failing_repr_is_ignored(self, journal: Journal, logger: Recorder) -> None:
        received: Sequences = []
        journal.subscribe(FailingRepr(), None, replay=False)
        journal.subscribe(collect(received), None, replay=False)
        publish_range(journal)
        assert received == [1, 2, 3, 4, 5]
        assert {failure["callback"] for failure in logger.named("subscriber.failed")} == {"a FailingRepr"}

    def test_thread_is_not_delivering_after_a_failure(self, journal: Journal) -> None:
        journal.subscribe(FailingRepr(), None, replay=False)
        publish_range(journal)
        assert not journal.is_delivering()

    def test_slow_via_is_logged(self, journal: Journal, logger: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = [100.0]
        monkeypatch.setattr("proxy_fsm.journal.time", SimpleNamespace(monotonic=lambda: clock[0]))

        def callback(each: TransitionRecord) -> None:
            clock[0] += 0.049 if each.sequence == 1 else 0.0515

        journal.subscribe(callback, at_once, replay=False)
        publish_range(journal, end=2)
        (slow,) = logger.named("subscriber.slow")
        assert slow["callback"] == repr(callback)
        assert slow["elapsed_s"] == 0.0515
        assert logger.events[-1]["level"] == "warning"


class TestVia:
    def test_via_receives_a_call_that_delivers_the_record(self, journal: Journal) -> None:
        received: list[TransitionRecord] = []
        calls: list[tuple[Any, ...]] = []
        journal.subscribe(received.append, lambda *call: calls.append(call), replay=False)
        first = record(1)
        publish(journal, first)
        assert received == []
        ((function, *arguments),) = calls
        function(*arguments)
        assert received == [first]

    def test_call_given_to_via_returns_none(self, journal: Journal) -> None:
        """GLib repeats a function that returns a true value."""
        results: list[object] = []
        journal.subscribe(lambda _: True, lambda function, *rest: results.append(function(*rest)), replay=False)
        publish_range(journal, end=1)
        assert results == [None]

    def test_thread_that_via_uses_is_not_delivering(self, journal: Journal) -> None:
        delivering: list[bool] = []

        def elsewhere(function: Callable[..., None], *arguments: object) -> None:
            Task(function, *arguments).result()

        journal.subscribe(lambda _: delivering.append(journal.is_delivering()), elsewhere, replay=False)
        publish_range(journal, end=1)
        assert delivering == [False]


class TestNotifier:
    """The thread that calls subscribers without a `via`."""

    def test_thread_of_the_parent_is_replaced_in_a_forked_child(self, journal: Journal) -> None:
        """There, the parent's thread has ended without a word."""
        publish_range(journal)
        journal._notifier._thread = ended = threading.Thread(target=int)
        ended.start()
        ended.join()
        received: Sequences = []
        journal.subscribe(collect(received), None, replay=True)
        assert journal.flush(WAIT_S)
        assert received == [1, 2, 3, 4, 5]

    def test_repeated_publication_of_a_record_is_delivered_once(self, journal: Journal) -> None:
        received: Sequences = []
        journal.subscribe(collect(received), None, replay=False)
        first = record(1)
        publish(journal, first)
        publish(journal, first)
        assert journal.flush(WAIT_S)
        assert received == [1]

    def test_idle_thread_ends_and_the_next_record_starts_another(
        self, journal: Journal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("proxy_fsm.journal._IDLE_S", 0.01)
        received: Sequences = []
        journal.subscribe(collect(received), None, replay=False)
        for sequence in (1, 2):
            publish_range(journal, start=sequence, end=sequence)
            threads_ended()
        assert received == [1, 2]

    @pytest.mark.parametrize("started", [False, True])
    def test_interrupted_start_of_the_thread_loses_nothing(
        self, journal: Journal, monkeypatch: pytest.MonkeyPatch, *, started: bool
    ) -> None:
        start = threading.Thread.start

        def interrupted(thread: threading.Thread) -> None:
            if started:
                start(thread)
            raise KeyboardInterrupt

        received: Sequences = []
        publish_range(journal, end=1)
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            journal.subscribe(collect(received), None, replay=True)
        monkeypatch.undo()
        join_notifiers(0)  # which meets no thread that was never started
        publish_range(journal, start=2)
        assert received == [1, 2, 3, 4, 5]

    def test_subscriber_is_called_without_the_lock_if_no_thread_can_be_started(
        self, journal: Journal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        free: list[bool] = []

        def callback(_: TransitionRecord) -> None:
            monkeypatch.undo()
            free.append(Task(journal.flush, WAIT_S).result())

        unsubscribe = journal.subscribe(callback, None, replay=False)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        publish(journal, record(1))
        unsubscribe()
        assert free == [True]

    def test_blocking_subscriber_delays_nothing(self, journal: Journal) -> None:
        """Neither the publisher, nor waiters, nor subscribers with a `via`, nor those of another proxy."""
        release, other = threading.Event(), make(Recorder())
        slow: Sequences = []
        with_via: Sequences = []
        others: Sequences = []

        def block(each: TransitionRecord) -> None:
            assert release.wait(WAIT_S)
            slow.append(each.sequence)

        journal.subscribe(block, None, replay=False)
        journal.subscribe(collect(with_via), at_once, replay=False)
        other.subscribe(collect(others), None, replay=False)
        publish_range(journal, flush=False)
        publish_range(other)
        assert journal.wait(frozenset(), 0) is State.STOPPED
        assert not journal.flush(0)
        assert (slow, with_via, others) == ([], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
        release.set()
        assert journal.flush(WAIT_S)
        assert slow == [1, 2, 3, 4, 5]

    def test_waiter_returns_after_quick_subscribers(self, journal: Journal) -> None:
        received: Sequences = []

        def callback(each: TransitionRecord) -> None:
            time.sleep(0.01)  # so that the order does not arise by chance
            received.append(each.sequence)

        journal.subscribe(callback, None, replay=False)
        waiter = Task(journal.wait, frozenset({State.SPAWNING}), WAIT_S)
        eventually(lambda: journal._waiters.all)
        publish_range(journal, end=2, flush=False)
        waiter.result()
        assert received == [1, 2]

    def test_waiter_waits_only_once_for_a_blocking_subscriber(self, journal: Journal) -> None:
        release = threading.Event()
        journal.subscribe(lambda _: release.wait(WAIT_S), None, replay=False)
        publish_range(journal, end=1, flush=False)
        eventually(lambda: journal._notifier._called_at)
        began = time.monotonic()
        for _ in range(100):
            journal.wait(frozenset({State.TUNNELLING}), None)
        assert time.monotonic() - began < 10 < 100 * 0.2
        with pytest.raises(TimeoutError):
            journal.wait(frozenset({State.RUNNING}), 0)
        release.set()
        publish_range(journal, start=2)

    def test_one_notifier_serves_all_and_ends_with_the_proxy(self, journal: Journal) -> None:
        threads: set[threading.Thread] = set()
        for _ in range(3):
            journal.subscribe(lambda _: threads.add(threading.current_thread()), None, replay=False)
        publish_range(journal)
        (thread,) = threads
        assert (thread.name, thread.daemon) == ("proxy_fsm-notifier", True)
        thread.join(WAIT_S)
        assert not thread.is_alive()

    def test_no_notifier_is_started_without_need(self, journal: Journal) -> None:
        before = set(threading.enumerate())
        journal.subscribe(collect([]), None, replay=False)()
        journal.subscribe(collect([]), at_once, replay=False)
        publish_range(journal, end=2)
        journal.subscribe(collect([]), None, replay=False)
        assert set(threading.enumerate()) <= before

    def test_notifier_ends_if_all_have_unsubscribed(self, journal: Journal) -> None:
        threads: list[threading.Thread] = []
        unsubscribe = journal.subscribe(lambda _: threads.append(threading.current_thread()), None, replay=False)
        publish_range(journal, end=1)
        unsubscribe()
        publish_range(journal, start=2)
        threads[0].join(WAIT_S)
        assert not threads[0].is_alive()

    def test_records_are_delivered_in_place_if_no_thread_can_start(
        self, journal: Journal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        received: Sequences = []
        journal.subscribe(collect(received), None, replay=False)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        publish_range(journal, end=2)
        assert received == [1, 2]
        monkeypatch.undo()
        publish_range(journal, start=3)
        assert received == [1, 2, 3, 4, 5]

    def test_join_notifiers_waits_until_its_deadline(self, journal: Journal) -> None:
        release = threading.Event()
        received: Sequences = []

        def block(each: TransitionRecord) -> None:
            assert release.wait(WAIT_S)
            received.append(each.sequence)

        journal.subscribe(block, None, replay=False)
        publish_range(journal, flush=False)
        join_notifiers(0)
        assert received == []
        release.set()
        join_notifiers(time.monotonic() + WAIT_S)
        assert received == [1, 2, 3, 4, 5]


class TestWaiting:
    def test_wait_for_the_current_state_returns_at_once(self, journal: Journal) -> None:
        assert journal.wait(frozenset({State.IDLE}), 0) is State.IDLE
        publish_range(journal, end=3)
        assert journal.wait(frozenset({State.RUNNING, State.IDLE}), 0) is State.RUNNING

    def test_final_state_ends_every_wait(self, journal: Journal) -> None:
        publish_range(journal)
        assert journal.wait(frozenset({State.RUNNING}), None) is State.STOPPED
        assert journal.wait(frozenset(), None) is State.STOPPED

    def test_brief_state_is_not_missed(self) -> None:
        for wanted in PATH:
            journal = make(Recorder())
            waiter = Task(journal.wait, frozenset({wanted}), WAIT_S)
            eventually(lambda: journal._waiters.all)  # noqa: B023
            publish_range(journal)
            assert waiter.result() is wanted

    @pytest.mark.parametrize(
        ("states", "wanted"),
        [
            ({State.RUNNING}, "running"),
            ({State.STOPPING, State.RUNNING}, "running, stopping"),
            (set[State](), "a final state"),
        ],
    )
    @pytest.mark.parametrize("timeout", [0, 0.01, -1])
    def test_timeout_error_names_states_and_time(
        self, journal: Journal, states: set[State], wanted: str, timeout: float
    ) -> None:
        publish_range(journal, end=2)
        with pytest.raises(TimeoutError) as caught:
            journal.wait(frozenset(states), timeout)
        assert str(caught.value) == f"The proxy was not in {wanted} within {timeout} s; it is spawning."
        assert journal._waiters.all == ()

    def test_timeout_covers_all_changes(self, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = [100.0]
        monkeypatch.setattr("proxy_fsm.journal.time", SimpleNamespace(monotonic=lambda: clock[0]))
        errors: list[TimeoutError] = []

        def wait() -> None:
            with pytest.raises(TimeoutError) as caught:
                journal.wait(frozenset(), 1000)
            errors.append(caught.value)

        waiter = Task(wait)
        eventually(lambda: journal._waiters.all)
        clock[0] += 2000
        publish_range(journal, end=1)
        waiter.result()
        assert str(errors[0]) == "The proxy was not in a final state within 1000 s; it is tunnelling."

    def test_many_threads_may_wait(self, journal: Journal) -> None:
        wanted = [PATH[number % len(PATH)] for number in range(60)]
        waiters = [Task(journal.wait, frozenset({state}), WAIT_S) for state in wanted]
        eventually(lambda: len(journal._waiters.all) == len(wanted))
        publish_range(journal)
        assert [waiter.result() for waiter in waiters] == wanted
        assert journal._waiters.all == ()

    @pytest.mark.usefixtures("_busy_threads")
    def test_wait_during_changes_always_returns(self) -> None:
        for _ in range(50):
            journal = make(Recorder())
            waiters = [Task(journal.wait, frozenset[State](), WAIT_S) for _ in range(4)]
            publish_range(journal)
            for waiter in waiters:
                waiter.result()


class SignalAtLine:
    """Raises a signal whose handler acts once: before a line of a function runs, or else after 0.05 s."""

    def __init__(self, action: Callable[[], object], function: Any, line: int) -> None:
        self.handled = False
        self._action = action
        self._code = function.__code__
        self._line = line

    def _handle(self, *_: object) -> None:
        if not self.handled:
            self.handled = True
            self._action()

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code is not self._code:
            return None
        if event == "line" and frame.f_lineno == self._line:
            signal.raise_signal(signal.SIGALRM)
        return self._trace

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGALRM, self._handle), sys.gettrace()
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before[1])
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before[0])


def lines_of(function: Any) -> list[int]:
    return sorted({line for _, _, line in function.__code__.co_lines() if line is not None})


class TestSignalHandlers:
    @pytest.mark.parametrize("timeout", [None, WAIT_S])
    @pytest.mark.parametrize("line", lines_of(Journal.wait))
    def test_signal_handler_may_publish_while_its_thread_waits(
        self, journal: Journal, line: int, timeout: float | None
    ) -> None:
        with SignalAtLine(lambda: publish_range(journal, flush=False), Journal.wait, line) as interrupt:
            state = journal.wait(frozenset({State.RUNNING}), timeout)
        assert interrupt.handled
        assert state in {State.RUNNING, State.STOPPED}  # the latter if all was published before the first check

    @pytest.mark.parametrize(
        ("function", "line"),
        [
            (function, line)
            for function in (Journal.subscribe, _Notifier.wake, _Delivery._next)
            for line in lines_of(function)
        ],
    )
    def test_signal_handler_may_publish_while_its_thread_subscribes(
        self, journal: Journal, function: Any, line: int
    ) -> None:
        received: Sequences = []
        before: Sequences = []
        journal.subscribe(collect(before), None, replay=False)
        with SignalAtLine(lambda: publish_range(journal, flush=False), function, line) as interrupt:
            journal.subscribe(collect(received), None, replay=True)
        if not interrupt.handled:
            publish_range(journal)
        assert journal.flush(WAIT_S)
        assert received == before == [1, 2, 3, 4, 5]
