"""Something that goes on beside the test."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .wait import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")


class Task(Generic[_T]):
    """A function on a thread of its own; `result` returns what it returned, or raises what it raised."""

    def __init__(self, function: Callable[..., _T], *args: Any) -> None:
        self._outcome: list[_T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, args), name="test-task", daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., _T], args: tuple[Any, ...]) -> None:
        try:
            self._outcome.append(function(*args))
        except BaseException as error:  # noqa: BLE001 - it is raised again, where it is asked for
            self._error = error

    def result(self, timeout_s: float = WAIT_S) -> _T:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "it is still at work"
        if self._error is not None:
            raise self._error
        return self._outcome[0]

    @property
    def running(self) -> bool:
        return self._thread.is_alive()
