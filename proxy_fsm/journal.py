"""The one place through which every change of state is told: history, event, subscribers, waiters, in this order."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from proxy_fsm.states import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy_fsm.events import EventLog
    from proxy_fsm.status import TransitionRecord

__all__ = ["Journal"]

#: A subscriber that is called on the owner thread and takes longer than this holds up what is seen next.
_SLOW_S = 0.05


@dataclass(eq=False)
class _Subscriber:
    callback: Callable[[TransitionRecord], object]
    via: Callable[..., object] | None
    told: int
    active: bool = True


class Journal:
    """What happened, and who wants to know.

    There is no lock between the one who records and those who wait: a waiter puts its own queue up first and looks
    at the state then, so that a signal handler may record while its thread is about to wait.

    Args:
        log: Where events go.
    """

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._records: list[TransitionRecord] = []
        self._told_state = State.IDLE
        self._subscribers: list[_Subscriber] = []
        self._waiters: list[SimpleQueue[State]] = []
        self._delivery = threading.RLock()
        self._delivering: int | None = None

    def record(self, record: TransitionRecord, **last_words: Any) -> None:
        """Tell a change of state to everybody.

        Args:
            record: The change.
            last_words: Fields that the event has beside those of the record.
        """
        self._records.append(record)
        try:
            self._tell_log(record, last_words)
            self._deliver()
        finally:
            self._told_state = record.dest
            for waiter in tuple(self._waiters):
                waiter.put(record.dest)

    def _tell_log(self, record: TransitionRecord, last_words: dict[str, Any]) -> None:
        self._log(
            "info",
            "proxy.transition",
            trigger=str(record.trigger),
            source=str(record.source),
            dest=str(record.dest),
            reason=None if record.reason is None else str(record.reason),
            detail=record.detail,
            elapsed_s=round(record.elapsed_s, 6),
            sequence=record.sequence,
            **last_words,
        )

    def subscribe(
        self,
        callback: Callable[[TransitionRecord], object],
        via: Callable[..., object] | None,
        *,
        replay: bool,
    ) -> Callable[[], None]:
        """Have records told from now on, or from the first; see `proxy_fsm.Proxy.subscribe`."""
        subscriber = _Subscriber(callback, via, 0 if replay else len(self._records))
        self._subscribers.append(subscriber)
        if self._records and self._records[-1].dest.is_final:
            self._deliver()  # there is nobody else left to do it

        def unsubscribe() -> None:
            subscriber.active = False
            with suppress(ValueError):  # it was called before
                self._subscribers.remove(subscriber)

        return unsubscribe

    def catch_up(self) -> None:
        """Tell past records to those who subscribed since; on the owner thread."""
        self._deliver()

    def is_delivering(self) -> bool:
        """Tell whether this thread is inside a subscriber's call."""
        return self._delivering == threading.get_ident()

    def wait(self, states: frozenset[State], timeout: float | None) -> State:
        """Wait until one of the states, or a final one, was told to everybody.

        Raises:
            TimeoutError: It was not within ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + min(timeout, threading.TIMEOUT_MAX / 2)
        waiter: SimpleQueue[State] = SimpleQueue()
        self._waiters.append(waiter)
        try:
            state = self._told_state
            while state not in states and not state.is_final:
                state = waiter.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except Empty:
            wanted = ", ".join(sorted(states)) or "a final state"
            raise TimeoutError(f"The proxy was not in {wanted} within {timeout} s; it is {self._told_state}.") from None
        else:
            return state
        finally:
            self._waiters.remove(waiter)

    def _deliver(self) -> None:
        with self._delivery:
            outer, self._delivering = self._delivering, threading.get_ident()
            try:
                for subscriber in tuple(self._subscribers):
                    while subscriber.active and subscriber.told < len(self._records):
                        subscriber.told += 1
                        self._tell(subscriber, self._records[subscriber.told - 1])
            finally:
                self._delivering = outer

    def _tell(self, subscriber: _Subscriber, record: TransitionRecord) -> None:
        began = time.monotonic()
        if subscriber.via is None:
            self._call(subscriber, record)
        else:
            self._guarded(subscriber, subscriber.via, partial(self._call, subscriber, record))
        took_s = time.monotonic() - began
        if took_s > _SLOW_S:
            self._log("warning", "subscriber.slow", callback=_name(subscriber.callback), elapsed_s=round(took_s, 6))

    def _call(self, subscriber: _Subscriber, record: TransitionRecord) -> None:
        """Call back; returns None whatever the callback does, since GLib repeats what returns something true."""
        if subscriber.active:
            self._guarded(subscriber, subscriber.callback, record)

    def _guarded(self, subscriber: _Subscriber, function: Callable[..., object], *arguments: object) -> None:
        try:
            function(*arguments)
        except BaseException:  # noqa: BLE001 - a SystemExit of a subscriber must not end the owner thread either
            self._log("error", "subscriber.failed", callback=_name(subscriber.callback), exc_info=True)


def _name(callback: Callable[..., object]) -> str:
    try:
        return repr(callback)
    except Exception:  # noqa: BLE001 - it is the caller's code too
        return f"a {type(callback).__name__}"
