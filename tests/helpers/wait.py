"""Waiting for what has no event of its own, and timing what must be prompt."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

#: How long a test waits for what has to come, seconds; a healthy one is far from it, even on a busy machine.
WAIT_S = 30.0
#: How long a whole program that a test runs may take, seconds: it ends one that hangs, and no slow one.
PROGRAM_S = 300.0
#: What "at once" means, seconds: nothing was polled, and nothing timed out.
SOON_S = 0.05

_T = TypeVar("_T")


class WaitTimeoutError(AssertionError, TimeoutError):
    """A failed assertion to a test, a time-out to whoever handles it."""


def eventually(
    predicate: Callable[[], _T | None],
    timeout_s: float = WAIT_S,
    *,
    what: str = "something true",
    interval_s: float = 0.005,
) -> _T:
    """Wait until `predicate` returns something true, and return that.

    Args:
        predicate: Called again and again, at least once.
        timeout_s: How long to wait.
        what: What is awaited, for the error's message.
        interval_s: The pause between two calls.

    Raises:
        WaitTimeoutError: It did not within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        if result := predicate():
            return result
        if time.monotonic() > deadline:
            raise WaitTimeoutError(f"not within {timeout_s:g} s: {what}; the last result was {result!r}")
        time.sleep(interval_s)


def assert_prompt(measure: Callable[[], float], within_s: float, tries: int = 40) -> None:
    """Make sure that something takes no longer than it should, on a machine that is shared.

    Three times in a row, somewhere in these tries: a single one may be short by chance, since who polls may just look.
    """
    took: list[float] = []
    while not (len(took) >= 3 and max(took[-3:]) < within_s):
        assert len(took) < tries, f"never three times in a row within {within_s} s: {took}"
        took.append(measure())


def since(began: float) -> float:
    """Return how long ago a moment of `time.monotonic` is, seconds."""
    return time.monotonic() - began
