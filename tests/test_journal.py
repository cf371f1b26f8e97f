"""Each change of state is published to everybody, in order, once, and nobody delays another."""

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

LIFE = (State.TUNNELLING, State.SPAWNING, State.RUNNING, State.STOPPING, State.STOPPED)
Told = list[int]


@pytest.fixture
def logger() -> Recorder:
    return Recorder()


@pytest.fixture
def journal(logger: Recorder) -> Journal:
    return make(logger)


@pytest.fixture
def _busy_threads() -> Iterator[None]:
    """Threads take turns a thousand times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


MADE: list[Journal] = []


def make(logger: Any = None) -> Journal:
    MADE.append(Journal(EventLog(logger, proxy_id="id1", session="name")))
    return MADE[-1]


@pytest.fixture(autouse=True)
def _over() -> Iterator[None]:
    """Each proxy ends, and its notifier with it."""
    yield
    for journal in MADE:
        publish(journal, record(5))
    MADE.clear()
    threads_ended()


def record(sequence: int, dest: State | None = None, reason: EndReason | None = None) -> TransitionRecord:
    """The change of this number, by default into the state that has that place in a life without faults."""
    states = (State.IDLE, *LIFE)
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


def publish(journal: Journal, each: TransitionRecord, **last_words: Any) -> None:
    journal.publish(Event.of_transition(each, **last_words), each)


def live(journal: Journal, *, start: int = 1, end: int = len(LIFE), heard: bool = True) -> None:
    """Publish changes, and wait until all have heard of them."""
    for sequence in range(start, end + 1):
        publish(journal, record(sequence))
    if heard:
        assert journal.flush(WAIT_S)


def at_once(call: Callable[[], object]) -> None:
    """Call on the thread that publishes."""
    call()


def collect(told: Told) -> Callable[[TransitionRecord], None]:
    return lambda each: told.append(each.sequence)


class TestOrder:
    def test_history_then_event_then_subscribers_then_waiters(self, journal: Journal, logger: Recorder) -> None:
        order: list[str] = []
        called, go_on = threading.Event(), threading.Event()

        def at_event() -> None:
            order.append(f"event, with {len(journal.records)} in the history")

        def at_subscriber(_: TransitionRecord) -> None:
            order.append("subscriber")
            called.set()
            assert go_on.wait(WAIT_S)

        def wait() -> None:
            journal.wait(frozenset({State.TUNNELLING}), WAIT_S)
            order.append("waiter")

        logger.on_event = at_event
        journal.subscribe(at_subscriber, at_once, replay=False)
        waiter = Task(wait)
        eventually(lambda: journal._waiters)
        owner = Task(lambda: live(journal, end=1))
        assert called.wait(WAIT_S)
        with pytest.raises(TimeoutError):  # nor does one that comes now learn of it before all subscribers did
            journal.wait(frozenset({State.TUNNELLING}), 0)
        assert order == ["event, with 0 in the history", "subscriber"]
        logger.on_event = lambda: None  # the slow subscriber's
        go_on.set()
        waiter.result()
        owner.result()
        assert order[2:] == ["waiter"]

    def test_event_without_a_record_reaches_the_logger_alone(self, journal: Journal, logger: Recorder) -> None:
        seen: Told = []
        journal.subscribe(collect(seen), None, replay=True)
        journal.publish(Event("link.silent", {"silent_s": 1.5}))
        assert journal.flush(WAIT_S)
        assert logger.named("link.silent") == [
            {"event": "link.silent", "level": "warning", "proxy_id": "id1", "session": "name", "silent_s": 1.5}
        ]
        assert (seen, journal.records) == ([], [])

    def test_the_event_has_the_contracts_fields(self, journal: Journal, logger: Recorder) -> None:
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

    def test_a_change_without_a_reason_has_none_in_its_event(self, journal: Journal, logger: Recorder) -> None:
        publish(journal, record(1))
        assert logger.named("proxy.transition")[0]["reason"] is None

    def test_subscribers_are_told_in_the_order_in_which_they_came(self, journal: Journal) -> None:
        order: list[str] = []
        for name in "abc":
            journal.subscribe(lambda _, name=name: order.append(name), None, replay=False)  # type: ignore[misc]
        live(journal, end=2)
        assert order == list("abcabc")


class TestSubscribers:
    def test_they_are_told_all_from_their_coming_on(self, journal: Journal) -> None:
        told: Told = []
        live(journal, end=2)
        journal.subscribe(collect(told), None, replay=False)
        live(journal, start=3)
        assert told == [3, 4, 5]

    def test_with_replay_they_are_told_what_was_before_first(self, journal: Journal) -> None:
        told: Told = []
        live(journal, end=2)
        journal.subscribe(collect(told), None, replay=True)
        assert journal.flush(WAIT_S)
        assert told == [1, 2]
        live(journal, start=3)
        assert told == [1, 2, 3, 4, 5]

    def test_replay_with_a_via_is_left_to_the_owner(self, journal: Journal) -> None:
        told: Told = []
        live(journal, end=2)
        journal.subscribe(collect(told), at_once, replay=True)
        assert told == []
        journal.catch_up()
        assert told == [1, 2]
        journal.catch_up()
        live(journal, start=3)
        assert told == [1, 2, 3, 4, 5]

    def test_next_change_hands_over_the_past_ones_too(self, journal: Journal) -> None:
        told: Told = []
        live(journal, end=2)
        journal.subscribe(collect(told), at_once, replay=True)
        live(journal, start=3, end=3)
        assert told == [1, 2, 3]

    def test_replay_with_a_via_after_the_last_change_comes_at_once(self, journal: Journal) -> None:
        live(journal)
        seen: list[tuple[int, int, bool]] = []

        def callback(each: TransitionRecord) -> None:
            seen.append((each.sequence, threading.get_ident(), journal.is_delivering()))

        journal.subscribe(callback, at_once, replay=True)
        assert seen == [(sequence, threading.get_ident(), True) for sequence in range(1, 6)]
        journal.subscribe(callback, at_once, replay=False)
        assert len(seen) == 5

    def test_replay_without_a_via_after_the_last_change_comes_on_a_new_notifier(self, journal: Journal) -> None:
        journal.subscribe(collect([]), None, replay=False)
        live(journal)
        seen: list[tuple[int, str, bool]] = []

        def callback(each: TransitionRecord) -> None:
            seen.append((each.sequence, threading.current_thread().name, journal.is_delivering()))

        journal.subscribe(callback, None, replay=True)
        assert journal.flush(WAIT_S)
        assert seen == [(sequence, "proxy_fsm-notifier", True) for sequence in range(1, 6)]
        assert not journal.is_delivering()

    def test_one_may_subscribe_within_a_call(self, journal: Journal) -> None:
        late: Told = []
        replayed: Told = []

        def callback(each: TransitionRecord) -> None:
            if each.sequence == 2:
                journal.subscribe(collect(late), None, replay=False)
                journal.subscribe(collect(replayed), None, replay=True)

        journal.subscribe(callback, at_once, replay=False)
        live(journal)
        assert (late, replayed) == ([3, 4, 5], [1, 2, 3, 4, 5])

    def test_one_may_subscribe_within_the_last_call(self, journal: Journal) -> None:
        first: Told = []
        third: Told = []
        nested: Told = []

        def callback(each: TransitionRecord) -> None:
            if each.dest.is_final:
                journal.subscribe(collect(nested), None, replay=True)

        journal.subscribe(collect(first), None, replay=False)
        journal.subscribe(callback, None, replay=False)
        journal.subscribe(collect(third), None, replay=False)
        live(journal)
        assert journal.flush(WAIT_S)
        assert first == third == nested == [1, 2, 3, 4, 5]

    @pytest.mark.usefixtures("_busy_threads")
    def test_nothing_is_lost_or_told_twice_to_those_who_come_and_go_in_a_storm(self, journal: Journal) -> None:
        """Also to those who come while the last change is told."""
        comers: list[tuple[bool, int, Told]] = []
        goers: list[Told] = []

        def come_and_go() -> None:
            for number in range(60):
                staying: Told = []
                leaving: Told = []
                journal.subscribe(collect(staying), None, replay=number % 2 == 0)
                comers.append((number % 2 == 0, len(journal.records), staying))
                goers.append(leaving)
                journal.subscribe(collect(leaving), None, replay=False)()

        publish(journal, record(1, State.RUNNING))
        tasks = [Task(come_and_go) for _ in range(3)]
        for sequence in itertools.count(2):
            over = len(comers) > 120
            publish(journal, record(sequence, State.STOPPED if over else State.RUNNING))
            if over:
                break
        for task in tasks:
            task.result()
        assert journal.flush(WAIT_S)
        every = [each.sequence for each in journal.records]
        assert len(comers) == 180
        for replay, known, told in comers:
            assert told == every[len(every) - len(told) :]
            assert len(told) >= (len(every) if replay else len(every) - known)
        for told in goers:
            assert all(later == earlier + 1 for earlier, later in itertools.pairwise(told))


class TestUnsubscribing:
    def test_it_is_told_no_more(self, journal: Journal) -> None:
        told: Told = []
        unsubscribe = journal.subscribe(collect(told), None, replay=False)
        live(journal, end=2)
        unsubscribe()
        live(journal, start=3)
        assert told == [1, 2]

    def test_it_may_be_done_twice(self, journal: Journal) -> None:
        told: Told = []
        other: Told = []
        unsubscribe = journal.subscribe(collect(told), None, replay=False)
        journal.subscribe(collect(other), None, replay=False)
        unsubscribe()
        unsubscribe()
        live(journal)
        assert (told, other) == ([], [1, 2, 3, 4, 5])

    def test_it_may_be_done_within_the_call(self, journal: Journal) -> None:
        told: Told = []
        other: Told = []

        def callback(each: TransitionRecord) -> None:
            told.append(each.sequence)
            if each.sequence == 2:
                unsubscribe()
                unsubscribe_next()

        unsubscribe = journal.subscribe(callback, None, replay=False)
        unsubscribe_next = journal.subscribe(collect(other), None, replay=False)
        live(journal)
        assert (told, other) == ([1, 2], [1])

    def test_it_holds_in_the_midst_of_a_replay(self, journal: Journal) -> None:
        told: Told = []
        live(journal, end=3)

        def callback(each: TransitionRecord) -> None:
            told.append(each.sequence)
            unsubscribe()

        unsubscribe = journal.subscribe(callback, at_once, replay=True)
        live(journal, start=4)
        assert told == [1]

    def test_its_loop_is_given_no_more_either(self, journal: Journal) -> None:
        handed: list[tuple[Any, ...]] = []
        live(journal, end=3)

        def via(*call: object) -> None:
            handed.append(call)
            unsubscribe()

        unsubscribe = journal.subscribe(collect([]), via, replay=True)
        live(journal, start=4)
        assert len(handed) == 1

    def test_a_call_that_waits_in_another_loop_is_not_made(self, journal: Journal) -> None:
        told: Told = []
        waiting: list[tuple[Any, ...]] = []
        unsubscribe = journal.subscribe(collect(told), lambda *call: waiting.append(call), replay=False)
        live(journal, end=2)
        function, *arguments = waiting[0]
        function(*arguments)
        unsubscribe()
        function, *arguments = waiting[1]
        function(*arguments)
        assert told == [1]


class Shy:
    """A callback that fails, even when asked for its name."""

    def __call__(self, _: TransitionRecord) -> None:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no name either")


class TestFailures:
    @pytest.mark.parametrize("error", [RuntimeError("a bug"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
    @pytest.mark.parametrize("where", ["callback", "via", "callback by way of via"])
    def test_what_a_callback_or_a_loop_raises_is_logged_and_changes_nothing(
        self, journal: Journal, logger: Recorder, error: BaseException, where: str
    ) -> None:
        def fail(*_: object) -> None:
            raise error

        handled: list[BaseException] = []
        logger.on_event = lambda: handled.extend(filter(None, [sys.exc_info()[1]]))
        told: Told = []
        if where == "via":
            callback: Callable[[TransitionRecord], None] = collect([])
            journal.subscribe(callback, fail, replay=False)
        else:
            callback = fail
            journal.subscribe(callback, None if where == "callback" else at_once, replay=False)
        journal.subscribe(collect(told), None, replay=False)
        live(journal)
        assert told == [1, 2, 3, 4, 5]
        failures = logger.named("subscriber.failed")
        assert [failure["callback"] for failure in failures] == [repr(callback)] * 5
        assert all(failure["exc_info"] is True for failure in failures)
        assert {failure["level"] for failure in failures} == {"error"}
        assert handled == [error] * 5
        assert journal.wait(frozenset(), 0) is State.STOPPED

    def test_subscriber_with_failing_repr_is_ignored(self, journal: Journal, logger: Recorder) -> None:
        told: Told = []
        journal.subscribe(Shy(), None, replay=False)
        journal.subscribe(collect(told), None, replay=False)
        live(journal)
        assert told == [1, 2, 3, 4, 5]
        assert {failure["callback"] for failure in logger.named("subscriber.failed")} == {"a Shy"}

    def test_after_a_failure_the_thread_counts_as_delivering_no_more(self, journal: Journal) -> None:
        journal.subscribe(Shy(), None, replay=False)
        live(journal)
        assert not journal.is_delivering()

    def test_slow_via_is_logged(self, journal: Journal, logger: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = [100.0]
        monkeypatch.setattr("proxy_fsm.journal.time", SimpleNamespace(monotonic=lambda: clock[0]))

        def callback(each: TransitionRecord) -> None:
            clock[0] += 0.049 if each.sequence == 1 else 0.0515

        journal.subscribe(callback, at_once, replay=False)
        live(journal, end=2)
        (slow,) = logger.named("subscriber.slow")
        assert slow["callback"] == repr(callback)
        assert slow["elapsed_s"] == 0.0515
        assert logger.events[-1]["level"] == "warning"


class TestVia:
    def test_it_is_given_a_call_that_takes_the_record_to_the_callback(self, journal: Journal) -> None:
        told: list[TransitionRecord] = []
        handed: list[tuple[Any, ...]] = []
        journal.subscribe(told.append, lambda *call: handed.append(call), replay=False)
        first = record(1)
        publish(journal, first)
        assert told == []
        ((function, *arguments),) = handed
        function(*arguments)
        assert told == [first]

    def test_that_call_returns_none_whatever_the_callback_returns(self, journal: Journal) -> None:
        """GLib calls again what returns something true."""
        results: list[object] = []
        journal.subscribe(lambda _: True, lambda function, *rest: results.append(function(*rest)), replay=False)
        live(journal, end=1)
        assert results == [None]

    def test_it_may_hand_it_to_another_thread_where_nothing_is_delivering(self, journal: Journal) -> None:
        delivering: list[bool] = []

        def elsewhere(function: Callable[..., None], *arguments: object) -> None:
            Task(function, *arguments).result()

        journal.subscribe(lambda _: delivering.append(journal.is_delivering()), elsewhere, replay=False)
        live(journal, end=1)
        assert delivering == [False]


class TestNotifier:
    """The thread on which subscribers without a `via` are called."""

    def test_subscriber_that_blocks_delays_nobody(self, journal: Journal) -> None:
        """Neither who publishes, nor who waits, nor who has a `via`, nor the subscribers of another proxy."""
        go_on, other = threading.Event(), make(Recorder())
        slow: Told = []
        with_via: Told = []
        others: Told = []

        def block(each: TransitionRecord) -> None:
            assert go_on.wait(WAIT_S)
            slow.append(each.sequence)

        journal.subscribe(block, None, replay=False)
        journal.subscribe(collect(with_via), at_once, replay=False)
        other.subscribe(collect(others), None, replay=False)
        live(journal, heard=False)
        live(other)
        assert journal.wait(frozenset(), 0) is State.STOPPED
        assert not journal.flush(0)
        assert (slow, with_via, others) == ([], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
        go_on.set()
        assert journal.flush(WAIT_S)
        assert slow == [1, 2, 3, 4, 5]

    def test_waiter_lets_quick_subscribers_hear_first(self, journal: Journal) -> None:
        told: Told = []

        def callback(each: TransitionRecord) -> None:
            time.sleep(0.01)  # so that the order is no accident
            told.append(each.sequence)

        journal.subscribe(callback, None, replay=False)
        waiter = Task(journal.wait, frozenset({State.SPAWNING}), WAIT_S)
        eventually(lambda: journal._waiters)
        live(journal, end=2, heard=False)
        waiter.result()
        assert told == [1, 2]

    def test_waiter_waits_once_for_a_subscriber_that_blocks(self, journal: Journal) -> None:
        go_on = threading.Event()
        journal.subscribe(lambda _: go_on.wait(WAIT_S), None, replay=False)
        live(journal, end=1, heard=False)
        eventually(lambda: journal._notifier._called_at)
        began = time.monotonic()
        for _ in range(100):
            journal.wait(frozenset({State.TUNNELLING}), None)
        assert time.monotonic() - began < 10 < 100 * 0.2
        with pytest.raises(TimeoutError):
            journal.wait(frozenset({State.RUNNING}), 0)
        go_on.set()
        live(journal, start=2)

    def test_one_thread_serves_all_and_ends_with_the_proxy(self, journal: Journal) -> None:
        threads: set[threading.Thread] = set()
        for _ in range(3):
            journal.subscribe(lambda _: threads.add(threading.current_thread()), None, replay=False)
        live(journal)
        (thread,) = threads
        assert (thread.name, thread.daemon) == ("proxy_fsm-notifier", True)
        thread.join(WAIT_S)
        assert not thread.is_alive()

    def test_no_thread_is_started_where_nobody_has_to_be_called(self, journal: Journal) -> None:
        before = set(threading.enumerate())
        journal.subscribe(collect([]), None, replay=False)()
        journal.subscribe(collect([]), at_once, replay=False)
        live(journal, end=2)
        journal.subscribe(collect([]), None, replay=False)
        assert set(threading.enumerate()) <= before

    def test_thread_ends_where_all_have_unsubscribed(self, journal: Journal) -> None:
        threads: list[threading.Thread] = []
        unsubscribe = journal.subscribe(lambda _: threads.append(threading.current_thread()), None, replay=False)
        live(journal, end=1)
        unsubscribe()
        live(journal, start=2)
        threads[0].join(WAIT_S)
        assert not threads[0].is_alive()

    def test_records_are_delivered_in_place_where_no_thread_can_be_started(
        self, journal: Journal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        told: Told = []
        journal.subscribe(collect(told), None, replay=False)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        live(journal, end=2)
        assert told == [1, 2]
        monkeypatch.undo()
        live(journal, start=3)
        assert told == [1, 2, 3, 4, 5]

    def test_end_of_the_interpreter_waits_for_subscribers_until_a_deadline(self, journal: Journal) -> None:
        go_on = threading.Event()
        told: Told = []

        def block(each: TransitionRecord) -> None:
            assert go_on.wait(WAIT_S)
            told.append(each.sequence)

        journal.subscribe(block, None, replay=False)
        live(journal, heard=False)
        join_notifiers(0)
        assert told == []
        go_on.set()
        join_notifiers(time.monotonic() + WAIT_S)
        assert told == [1, 2, 3, 4, 5]


class TestWaiting:
    def test_it_returns_at_once_in_a_state_that_is_wanted(self, journal: Journal) -> None:
        assert journal.wait(frozenset({State.IDLE}), 0) is State.IDLE
        live(journal, end=3)
        assert journal.wait(frozenset({State.RUNNING, State.IDLE}), 0) is State.RUNNING

    def test_a_final_state_ends_every_wait(self, journal: Journal) -> None:
        live(journal)
        assert journal.wait(frozenset({State.RUNNING}), None) is State.STOPPED
        assert journal.wait(frozenset(), None) is State.STOPPED

    def test_a_state_that_lasts_for_a_moment_only_is_not_missed(self) -> None:
        for wanted in LIFE:
            journal = make(Recorder())
            waiter = Task(journal.wait, frozenset({wanted}), WAIT_S)
            eventually(lambda: journal._waiters)  # noqa: B023
            live(journal)
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
    def test_what_does_not_come_in_time_is_told(
        self, journal: Journal, states: set[State], wanted: str, timeout: float
    ) -> None:
        live(journal, end=2)
        with pytest.raises(TimeoutError) as caught:
            journal.wait(frozenset(states), timeout)
        assert str(caught.value) == f"The proxy was not in {wanted} within {timeout} s; it is spawning."
        assert journal._waiters == []

    def test_the_time_counts_over_all_changes(self, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = [100.0]
        monkeypatch.setattr("proxy_fsm.journal.time", SimpleNamespace(monotonic=lambda: clock[0]))
        errors: list[TimeoutError] = []

        def wait() -> None:
            with pytest.raises(TimeoutError) as caught:
                journal.wait(frozenset(), 1000)
            errors.append(caught.value)

        waiter = Task(wait)
        eventually(lambda: journal._waiters)
        clock[0] += 2000
        live(journal, end=1)
        waiter.result()
        assert str(errors[0]) == "The proxy was not in a final state within 1000 s; it is tunnelling."

    def test_any_number_of_threads_may_wait(self, journal: Journal) -> None:
        wanted = [LIFE[number % len(LIFE)] for number in range(60)]
        waiters = [Task(journal.wait, frozenset({state}), WAIT_S) for state in wanted]
        eventually(lambda: len(journal._waiters) == len(wanted))
        live(journal)
        assert [waiter.result() for waiter in waiters] == wanted
        assert journal._waiters == []

    @pytest.mark.usefixtures("_busy_threads")
    def test_threads_that_come_in_the_midst_of_changes_all_come_back(self) -> None:
        for _ in range(50):
            journal = make(Recorder())
            waiters = [Task(journal.wait, frozenset[State](), WAIT_S) for _ in range(4)]
            live(journal)
            for waiter in waiters:
                waiter.result()


class Strike:
    """A signal whose handler does something, once: before a line of a function is run, or soon."""

    def __init__(self, action: Callable[[], object], function: Any, line: int) -> None:
        self.has_struck = False
        self._action = action
        self._code = function.__code__
        self._line = line

    def _handle(self, *_: object) -> None:
        if not self.has_struck:
            self.has_struck = True
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
    def test_one_may_record_while_its_thread_waits_or_is_about_to(
        self, journal: Journal, line: int, timeout: float | None
    ) -> None:
        with Strike(lambda: live(journal, heard=False), Journal.wait, line) as strike:
            state = journal.wait(frozenset({State.RUNNING}), timeout)
        assert strike.has_struck
        assert state in {State.RUNNING, State.STOPPED}  # the latter where all was over when it looked first

    @pytest.mark.parametrize(
        ("function", "line"),
        [
            (function, line)
            for function in (Journal.subscribe, _Notifier.wake, _Delivery._next)
            for line in lines_of(function)
        ],
    )
    def test_one_may_publish_while_its_thread_subscribes(self, journal: Journal, function: Any, line: int) -> None:
        told: Told = []
        before: Told = []
        journal.subscribe(collect(before), None, replay=False)
        with Strike(lambda: live(journal, heard=False), function, line) as strike:
            journal.subscribe(collect(told), None, replay=True)
        if not strike.has_struck:
            live(journal)
        assert journal.flush(WAIT_S)
        assert told == before == [1, 2, 3, 4, 5]
