"""A run as data: proxies, their states over time, their events, and what their tunnels carried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy_fsm.errors import ProxyFsmError
from proxy_fsm.text import printable

if TYPE_CHECKING:
    from datetime import datetime

    from proxy_fsm.reasons import EndReason
    from proxy_fsm.states import Phase, State

__all__ = ["Event", "Flow", "Run", "Stay", "TimelineError", "Track"]

#: Fields of every event that are shown elsewhere or add nothing.
_COMMON = frozenset({"event", "level", "timestamp", "proxy_id", "session"})


class TimelineError(ProxyFsmError, ValueError):
    """The record cannot be read; the message is a sentence with the number of the line.

    Attributes:
        line: The number of the line, from 1; None if it concerns the whole record.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        self.line = line
        super().__init__(message)

    def __reduce__(self) -> tuple[type[TimelineError], tuple[str, int | None]]:
        return type(self), (str(self), self.line)


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the record.

    Attributes:
        at_s: When, in seconds since the run's beginning.
        name: The event's name.
        level: Its level.
        fields: Its other fields.
        line: The number of its line.
    """

    at_s: float
    name: str
    level: str
    fields: dict[str, Any]
    line: int

    @property
    def words(self) -> str:
        """Its content, human-readable, on one line, with control characters escaped."""
        fields = self.fields
        if self.name == "proxy.transition" and {"source", "dest", "trigger"} <= fields.keys():
            words = f"{fields['source']} → {fields['dest']} ({fields['trigger']})"
            detail = fields.get("detail")
            return printable(f"{words}: {detail}" if detail else words)
        if self.name == "proxy.phase" and {"state", "phase"} <= fields.keys():
            previous = fields.get("previous")
            return printable(f"{fields['state']}: " + (f"{previous} → " if previous else "") + str(fields["phase"]))
        filled = {
            name: value for name, value in fields.items() if name not in _COMMON and value not in (None, "", [], {})
        }
        return printable(", ".join(f"{name} {value}" for name, value in filled.items()))


@dataclass(frozen=True, slots=True)
class Stay:
    """A state, or a phase of one, from its beginning to its end.

    Attributes:
        state: The state.
        begin_s: When it was entered, in seconds since the run's beginning.
        end_s: When it was left; for the last one, the end of the run.
        phase: The phase; None for the state as a whole.
    """

    state: State
    begin_s: float
    end_s: float
    phase: Phase | None = None


@dataclass(frozen=True, slots=True)
class Flow:
    """What the tunnel carried for a while: an average between two samples, no more exact than they are.

    Attributes:
        begin_s: The earlier sample, in seconds since the run's beginning.
        end_s: The later one.
        to_agent: Bytes per second to the agent.
        from_agent: Bytes per second from it.
    """

    begin_s: float
    end_s: float
    to_agent: float
    from_agent: float


@dataclass(frozen=True, slots=True)
class Track:
    """One proxy of a run.

    Attributes:
        proxy_id: Its id.
        session: Its session's name.
        stays: Its states, in order.
        events: Its events, in order.
        flows: What its tunnel carried, in order, without overlaps: simultaneous connections are summed.
        reason: Why it ended; None if the record ends before that.
        detail: One sentence about that.
        hint: What to do about it.
        phases: The phases of its states, in order, as far as they were recorded.
    """

    proxy_id: str
    session: str
    stays: tuple[Stay, ...]
    events: tuple[Event, ...]
    flows: tuple[Flow, ...]
    reason: EndReason | None
    detail: str
    hint: str
    phases: tuple[Stay, ...] = ()

    @property
    def state(self) -> State:
        """The last one."""
        return self.stays[-1].state

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        if self.reason is None:
            return f"still {self.state} where the record ends"
        return f"{self.state}: {self.reason}" + (f" – {self.detail}" if self.detail else "")


@dataclass(frozen=True, slots=True)
class Run:
    """All that a record contains.

    Attributes:
        began: When it began.
        duration_s: How long it took, in seconds.
        tracks: Its proxies, in the order of their first change of state.
        events: Those events that belong to no proxy.
    """

    began: datetime
    duration_s: float
    tracks: tuple[Track, ...]
    events: tuple[Event, ...]

    @property
    def title(self) -> str:
        """The names of its sessions."""
        names = list(dict.fromkeys(printable(track.session) for track in self.tracks))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""  # noqa: PLR2004
        return f"Session{'s' * (len(names) > 1)} {', '.join(names[:3])}{more}"
