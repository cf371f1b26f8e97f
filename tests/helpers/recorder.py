"""What stands in for a program's logger."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class Recorder:
    """A logger that keeps each event: its fields, and with them its name and its level."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        #: The threads that published events of a name.
        self.threads: defaultdict[str, set[int]] = defaultdict(set)
        #: Called after each event.
        self.on_event: Callable[[], object] = lambda: None

    def __getattr__(self, level: str) -> Callable[..., None]:
        def log(event: str, **fields: Any) -> None:
            self.threads[event].add(threading.get_ident())
            self.events.append({"event": event, "level": level, **fields})
            self.on_event()

        return log

    def named(self, name: str) -> list[dict[str, Any]]:
        """Return the events of a name."""
        return [event for event in self.events if event["event"] == name]

    def path(self) -> list[str]:
        """Return the states that were published, in order."""
        return [event["dest"] for event in self.named("proxy.transition")]
