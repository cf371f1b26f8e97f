"""SIGINT, SIGTERM and SIGHUP as an order to end, never as an exception in the middle of something."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Interrupted", "Interrupts"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal came while this program waited for something that no proxy is there to end."""


class Interrupts:
    """Takes these signals, on the main thread, as long as it is entered; a SIGHUP that is ignored (nohup) stays so.

    Once one has come, they are ignored afterwards: the program is about to end.

    Attributes:
        received: The name of the last signal that came; None before.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._order: Callable[[], object] | None = None
        self._waiting = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {
            number: signal.signal(number, self._take)
            for number in _SIGNALS
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._order = None
        for number, handler in self._previous.items():
            # A second Ctrl-C must not kill a program that is ending. A handler of ours would not do: the interpreter
            # removes it before it ends.
            signal.signal(number, handler if self.received is None else signal.SIG_IGN)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, a signal raises; put nothing into it but what waits.

        Raises:
            Interrupted: A signal comes, or has come before.
        """
        self._waiting = True
        try:
            self.check()
            yield
        finally:
            self._waiting = False

    def check(self) -> None:
        """Let a signal that has come before raise; put it where nothing has to be undone.

        Raises:
            Interrupted: One has come.
        """
        if self.received is not None:
            raise Interrupted(self.received)

    def on_signal(self, order: Callable[[], object]) -> None:
        """Have a signal call this from now on; at once where one has come before.

        Args:
            order: What may be called from a signal handler, such as ``stop`` of a proxy that was started.
        """
        self._order = order
        if self.received is not None:
            order()

    def _take(self, number: int, _frame: object) -> None:
        self.received = signal.Signals(number).name
        if self._order is not None:
            self._order()
        if self._waiting:
            self._waiting = False
            raise Interrupted(self.received)
