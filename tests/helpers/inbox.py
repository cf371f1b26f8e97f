"""What stands in for the engine's inbox."""

from __future__ import annotations

import threading
from typing import TypeVar

from proxy_fsm.evidence import Observation

from .wait import WAIT_S

_Seen = TypeVar("_Seen", bound=Observation)


class Inbox:
    """Keeps the observations that are posted, and lets a test wait for them."""

    def __init__(self) -> None:
        self.seen: list[Observation] = []
        self._changed = threading.Condition()  # its lock is reentrant

    def post(self, observation: Observation) -> None:
        with self._changed:
            self.seen.append(observation)
            self._changed.notify_all()

    def all(self, kind: type[_Seen]) -> list[_Seen]:
        with self._changed:
            return [each for each in self.seen if isinstance(each, kind)]

    def kinds(self) -> list[type[Observation]]:
        with self._changed:
            return [type(each) for each in self.seen]

    def wait(self, kind: type[_Seen], count: int = 1, timeout_s: float = WAIT_S) -> _Seen:
        """Return the first (or the count-th) of a kind as soon as it is there."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.all(kind)) >= count, timeout_s), (kind, self.seen)
            return self.all(kind)[count - 1]

    def stays_without(self, kind: type[Observation], for_s: float) -> bool:
        """Return whether none of a kind comes for some time; it takes the full time only if none does."""
        with self._changed:
            return not self._changed.wait_for(lambda: self.all(kind), for_s)
