"""Records when the whole machine stalled: a shared one does now and then, for a second, and no program is to blame.

A thread that only sleeps records when it woke late. Times that are compared with a limit exclude those moments.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self

STEP_S = 0.01
LATE_S = 0.05  # a longer delay is not mere scheduling


class Stalls:
    """Records stalls while it is entered; there is one for a whole run of the tests."""

    def __init__(self) -> None:
        self._stalls: list[tuple[float, float]] = []
        self._due = float("inf")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tests-stalls", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.is_set():
            self._due = time.monotonic() + STEP_S
            self._end.wait(STEP_S)
            now = time.monotonic()
            if now - self._due > LATE_S:
                self._stalls.append((self._due, now))

    def took_s(self, start: float, end: float) -> float:
        """Return the time from one moment to another (monotonic seconds), without the stalls in between."""
        now = time.monotonic()
        current = [(self._due, now)] if now - self._due > LATE_S else []  # the thread has not woken yet
        return end - start - sum(max(0.0, min(to, end) - max(since, start)) for since, to in [*self._stalls, *current])
