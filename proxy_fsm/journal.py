"""Publishes what happens to a proxy: to the logger, to subscribers and to waiters, in this order."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from proxy_fsm.events import Event
from proxy_fsm.states import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy_fsm.events import EventLog
    from proxy_fsm.status import TransitionRecord

__all__ = ["Journal", "join_notifiers"]

#: A `via` that takes longer than this, in seconds, is reported as slow, since it holds up the proxy.
_SLOW_S = 0.05
#: How long a waiter lets subscribers be called first, in seconds; one that takes longer no longer delays it.
_SUBSCRIBERS_FIRST_S = 0.2
#: How long a notifier thread waits for the next record, in seconds, before it ends.
_IDLE_S = 5.0

_NOTIFIERS: set[threading.Thread] = set()

_Member = TypeVar("_Member")


def join_notifiers(deadline: float) -> None:
    """Wait until all pending records were delivered; called when the interpreter exits.

    Args:
        deadline: When to stop waiting, in seconds of the monotonic clock.
    """
    for thread in tuple(_NOTIFIERS):
        if thread.ident is not None:  # else the start of it was interrupted
            thread.join(max(0.0, deadline - time.monotonic()))


@dataclass(eq=False)
class _Subscriber:
    callback: Callable[[TransitionRecord], object]
    via: Callable[..., object] | None
    delivered: int  # how many of the journal's records it has received
    active: bool = True


class _Members(Generic[_Member]):
    """Members that threads add and remove while others go through them.

    It is a tuple that is replaced, never a list that changes: Python 3.11 crashes where one is copied by ``tuple()``,
    the collector runs in that, and another thread changes it meanwhile.

    Attributes:
        all: The members, in the order in which they were added.
    """

    def __init__(self) -> None:
        self.all: tuple[_Member, ...] = ()
        self._lock = threading.RLock()  # a signal handler may re-enter it

    def add(self, member: _Member) -> None:
        with self._lock:
            self.all = (*self.all, member)

    def remove(self, member: _Member) -> None:
        """Remove a member; does nothing if it is none."""
        with self._lock:
            self.all = tuple(each for each in self.all if each is not member)


class Journal:
    """The records of one proxy, its subscribers, and the callers that wait for a state.

    There is no lock between publisher and waiters: a waiter first registers its own queue and then reads the state, so
    that a signal handler may publish while its thread is about to wait.

    Args:
        log: Logs events.
    """

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._records: list[TransitionRecord] = []
        self._published_state = State.IDLE
        self._with_via, self._direct = _Delivery(self), _Delivery(self)
        self._notifier = _Notifier(self._direct.deliver, self._is_over)
        self._waiters = _Members[SimpleQueue[State]]()

    @property
    def records(self) -> list[TransitionRecord]:
        """All changes of state so far; append-only."""
        return self._records

    def publish(self, event: Event, record: TransitionRecord | None = None) -> None:
        """Publish an event; a change of state is published to subscribers and waiters too. Never raises.

        Args:
            event: The event.
            record: The change of state, if it is one.
        """
        self._log(event.level, event.name, **event.fields)
        if record is None:
            return
        if record not in self._records[-1:]:  # else its publication was interrupted, and is repeated
            self._records.append(record)
        try:
            self._with_via.deliver()
            if self._direct.is_due():
                self._notifier.wake()
            elif record.dest.is_final:
                self._notifier.call(self._direct.deliver)  # nothing to deliver: let the notifier see the final state
        finally:
            self._published_state = record.dest
            for waiter in self._waiters.all:
                waiter.put(record.dest)

    def subscribe(
        self,
        callback: Callable[[TransitionRecord], object],
        via: Callable[..., object] | None,
        *,
        replay: bool,
    ) -> Callable[[], None]:
        """Call back with each record from now on, or from the first; see `proxy_fsm.Proxy.subscribe`."""
        subscriber = _Subscriber(callback, via, 0 if replay else len(self._records))
        delivery = self._direct if via is None else self._with_via
        delivery.add(subscriber)
        if via is None and self._direct.is_due():
            self._notifier.wake()
        elif via is not None and self._is_over():
            self.catch_up()  # there is no longer an owner thread to do it

        def unsubscribe() -> None:
            delivery.remove(subscriber)

        return unsubscribe

    def catch_up(self) -> None:
        """Deliver past records to new subscribers with a `via`; called on the owner thread."""
        self._with_via.deliver()

    def is_delivering(self) -> bool:
        """Tell whether this thread is calling a subscriber."""
        return self._with_via.is_delivering() or self._direct.is_delivering()

    def flush(self, timeout: float) -> bool:
        """Wait until all records were delivered to subscribers without a `via`; return whether they were."""
        done = threading.Event()
        return not self._notifier.call(done.set) or done.wait(timeout)

    def wait(self, states: frozenset[State], timeout: float | None, *, delivered: bool = True) -> State:
        """Wait until one of the states, or a final one, was published.

        Args:
            states: The states.
            timeout: In seconds; None waits without end.
            delivered: Whether to wait for all but slow subscribers too.

        Raises:
            TimeoutError: None of them was published within ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + min(timeout, threading.TIMEOUT_MAX / 2)
        waiter: SimpleQueue[State] = SimpleQueue()
        self._waiters.add(waiter)
        try:
            state = self._published_state
            while state not in states and not state.is_final:
                state = waiter.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except Empty:
            wanted = ", ".join(sorted(states)) or "a final state"
            raise TimeoutError(
                f"The proxy was not in {wanted} within {timeout} s; it is {self._published_state}."
            ) from None
        finally:
            self._waiters.remove(waiter)
        if delivered and not self.is_delivering():
            self._notifier.wait_delivered(None if deadline is None else deadline - time.monotonic())
        return state

    def report(self, name: str, **fields: Any) -> None:
        """Log an event about a subscriber."""
        self.publish(Event(name, fields))

    def _is_over(self) -> bool:
        return bool(self._records) and self._records[-1].dest.is_final


class _Delivery:
    """Delivers to some of a journal's subscribers, in order, the records that they have not yet received."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._subscribers = _Members[_Subscriber]()
        self._lock = threading.RLock()
        self._thread: int | None = None

    def add(self, subscriber: _Subscriber) -> None:
        self._subscribers.add(subscriber)

    def remove(self, subscriber: _Subscriber) -> None:
        subscriber.active = False
        self._subscribers.remove(subscriber)

    def is_due(self) -> bool:
        return self._next() is not None

    def is_delivering(self) -> bool:
        return self._thread == threading.get_ident()

    def deliver(self) -> None:
        with self._lock:
            outer, self._thread = self._thread, threading.get_ident()
            try:
                while (subscriber := self._next()) is not None:
                    subscriber.delivered += 1
                    self._hand_over(subscriber, self._journal.records[subscriber.delivered - 1])
            finally:
                self._thread = outer

    def _next(self) -> _Subscriber | None:
        """Return the subscriber to which the oldest undelivered record is due; the earliest one, if several."""
        count = len(self._journal.records)
        due = [each for each in self._subscribers.all if each.active and each.delivered < count]
        return min(due, key=lambda each: each.delivered, default=None)

    def _hand_over(self, subscriber: _Subscriber, record: TransitionRecord) -> None:
        if subscriber.via is None:
            self._call(subscriber, record)
            return
        began = time.monotonic()
        self._guarded(subscriber, subscriber.via, partial(self._call, subscriber, record))
        took_s = time.monotonic() - began
        if took_s > _SLOW_S:
            self._journal.report("subscriber.slow", callback=_name(subscriber.callback), elapsed_s=round(took_s, 6))

    def _call(self, subscriber: _Subscriber, record: TransitionRecord) -> None:
        """Call back; always return None, since GLib repeats a function that returns a true value."""
        if subscriber.active:
            self._guarded(subscriber, subscriber.callback, record)

    def _guarded(self, subscriber: _Subscriber, function: Callable[..., object], *arguments: object) -> None:
        try:
            function(*arguments)
        except BaseException:  # noqa: BLE001 - even a subscriber's SystemExit must not end the thread
            self._journal.report("subscriber.failed", callback=_name(subscriber.callback), exc_info=True)


class _Notifier:
    """The thread that calls subscribers without a `via`, so that a slow one does not delay the proxy.

    It is started by the first record that is due to such a subscriber, and ends with the proxy. If nothing is published
    for a while it ends earlier, and the next record starts a new one: a running session keeps no idle thread.
    """

    def __init__(self, deliver: Callable[[], None], is_over: Callable[[], bool]) -> None:
        self._deliver = deliver
        self._is_over = is_over
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.RLock()  # a signal handler may re-enter it
        self._thread: threading.Thread | None = None
        self._called_at: float | None = None  # when the current call began

    def wake(self) -> None:
        """Deliver on the notifier thread, or on this thread if no new one can be started."""
        with self._lock:
            self._calls.put(self._deliver)
            try:
                self._start()
            except RuntimeError:
                pass
            else:
                return
        self._deliver()

    def call(self, function: Callable[[], None]) -> bool:
        """Call a function after all pending calls; return whether it will be called, which takes a running thread."""
        with self._lock:
            running = self._is_running()
            if running:
                self._calls.put(function)
            return running

    def wait_delivered(self, timeout_s: float | None) -> None:
        """Wait until pending records were delivered, but not for a slow subscriber.

        Args:
            timeout_s: The longest to wait, in seconds; None for no limit but that of a slow subscriber.
        """
        done = threading.Event()
        if not self.call(done.set):
            return
        now = time.monotonic()
        called_at = self._called_at
        wait_s = (now if called_at is None else called_at) + _SUBSCRIBERS_FIRST_S - now
        done.wait(max(0.0, wait_s if timeout_s is None else min(wait_s, timeout_s)))

    def _start(self) -> None:
        """Start the thread unless it runs, or unless the code that a signal handler has interrupted is starting it.

        Raises:
            RuntimeError: No thread can be started.
        """
        if self._is_running():
            return
        thread = threading.Thread(target=self._run, name="proxy_fsm-notifier", daemon=True)
        try:
            self._thread = thread
            _NOTIFIERS.add(thread)
            thread.start()
        except BaseException:
            if thread.ident is None:  # else it runs, although this was interrupted
                self._thread = None
                _NOTIFIERS.discard(thread)
            raise

    def _is_running(self) -> bool:
        """Tell whether the thread runs or will; in a forked child the parent's does not."""
        return self._thread is not None and (self._thread.ident is None or self._thread.is_alive())

    def _run(self) -> None:
        try:
            while (call := self._next_call()) is not None:
                self._called_at = time.monotonic()
                call()
                self._called_at = None
        finally:
            _NOTIFIERS.discard(threading.current_thread())

    def _next_call(self) -> Callable[[], None] | None:
        """Return the next call, or None once the thread has to end."""
        with suppress(Empty):
            return self._calls.get(timeout=0 if self._is_over() else _IDLE_S)
        with self._lock:
            with suppress(Empty):
                return self._calls.get_nowait()  # it was put at the last moment
            if self._thread is threading.current_thread():
                self._thread = None
            return None


def _name(callback: Callable[..., object]) -> str:
    try:
        return repr(callback)
    except Exception:  # noqa: BLE001 - a repr is the caller's code too
        return f"a {type(callback).__name__}"
