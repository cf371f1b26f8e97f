"""SIGINT, SIGTERM and SIGHUP as a request to end, never as an exception in the middle of an operation."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Interrupted", "Interrupts"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal came while this program was waiting, and no proxy was running that could be stopped."""


class Interrupts:
    """Handles these signals, on the main thread, while entered; an ignored SIGHUP (nohup) stays ignored.

    If one came, they are ignored after the exit: the program is about to end.

    Attributes:
        received: The name of the last signal; None before the first.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._callback: Callable[[], object] | None = None
        self._waiting = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in _SIGNALS
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._callback = None
        for number, handler in self._previous.items():
            # A second Ctrl-C must not kill a program that is ending. Our own handler is not enough: the interpreter
            # removes it before it exits.
            signal.signal(number, handler if self.received is None else signal.SIG_IGN)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within this block a signal raises; it should contain the blocking call only.

        Raises:
            Interrupted: A signal comes, or came earlier.
        """
        self._waiting = True
        try:
            self.check()
            yield
        finally:
            self._waiting = False

    def check(self) -> None:
        """Raise if a signal came earlier; call this where nothing has to be undone.

        Raises:
            Interrupted: A signal came.
        """
        if self.received is not None:
            raise Interrupted(self.received)

    def on_signal(self, callback: Callable[[], object]) -> None:
        """Call this on every signal from now on; also now, if a signal came earlier.

        Args:
            callback: Must be safe in a signal handler, such as ``stop`` of a started proxy.
        """
        self._callback = callback
        if self.received is not None:
            callback()

    def _handle(self, number: int, _frame: object) -> None:
        self.received = signal.Signals(number).name
        if self._callback is not None:
            self._callback()
        if self._waiting:
            self._waiting = False
            raise Interrupted(self.received)
