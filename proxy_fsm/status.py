"""What a proxy reports about itself: records, counters and the snapshot that holds them all."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proxy_fsm.reasons import EndReason
    from proxy_fsm.states import Phase, State, Trigger

__all__ = [
    "Link",
    "ProxyStatus",
    "Timeouts",
    "TransitionRecord",
    "TunnelStats",
]


class Link(StrEnum):
    """Whether the SSH server responds."""

    OK = "ok"
    SILENT = "silent"


@dataclass(frozen=True, slots=True)
class TransitionRecord:
    """One change of state.

    Attributes:
        proxy_id: Id of the engine.
        session: Name of the session.
        trigger: What caused it.
        source: The state that was left.
        dest: The state that was entered.
        reason: Why it ends, from the entry into ``stopping`` on.
        detail: One human-readable sentence; empty if there is nothing to say.
        at: When, as an aware datetime in UTC.
        elapsed_s: Seconds spent in ``source``, by the monotonic clock.
        sequence: Number of the change, from 1, without gaps.
    """

    proxy_id: str
    session: str
    trigger: Trigger
    source: State
    dest: State
    reason: EndReason | None
    detail: str
    at: datetime
    elapsed_s: float
    sequence: int

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-safe values; ``at`` in ISO 8601."""
        return _fields_as_json(self)


@dataclass(frozen=True, slots=True)
class TunnelStats:
    """What the tunnel carried.

    Attributes:
        bytes_to_agent: Bytes that the proxy sent and the transport accepted.
        bytes_from_agent: Bytes that the agent sent and the proxy accepted.
        opened_at: When the first channel was opened, aware, in UTC; None before.
        connections: Channels opened so far.
    """

    bytes_to_agent: int
    bytes_from_agent: int
    opened_at: datetime | None
    connections: int

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-safe values; ``opened_at`` in ISO 8601."""
        return _fields_as_json(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long things may take, in seconds; all finite and above zero.

    Attributes:
        preflight_s: From ``start`` until everything local is known to be good.
        ready_s: From the proxy's start until the session is ready.
        agent_connect_s: How long a refused channel is retried.
        stop_grace_s: From SIGTERM to SIGKILL; nxproxy's slowest orderly exit takes about 6 s.
        kill_s: From SIGKILL until the proxy must have exited, and how long an aborted channel may take to close.
        drain_s: How long the last bytes may take to be flushed once the proxy has exited.
        ask_server_s: How long the server may take to say how a session ended.
        link_probe_s: After how much silence the server is probed, and after how much more it counts as silent.
        link_dead_s: After how much silence the transport counts as lost.

    Raises:
        ValueError: A value is not a finite number above zero, or ``link_dead_s`` is not above ``link_probe_s``.
    """

    preflight_s: float = 5
    ready_s: float = 30
    agent_connect_s: float = 8
    stop_grace_s: float = 8
    kill_s: float = 2
    drain_s: float = 0.5
    ask_server_s: float = 2
    link_probe_s: float = 15
    link_dead_s: float = 45

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            numeric = isinstance(value, int | float) and not isinstance(value, bool)
            if not numeric or not 0 < value <= threading.TIMEOUT_MAX:
                raise ValueError(f"{field.name} must be a finite number of seconds above 0, not {value!r}.")
        if self.link_dead_s <= self.link_probe_s:
            raise ValueError("link_dead_s must be longer than link_probe_s, or no probe could be answered.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyStatus:
    """A self-consistent snapshot of a proxy, without secrets.

    Attributes:
        id: Id of the engine, as in every event and record.
        session: Name of the session.
        state: The state.
        since: When it was entered, aware, in UTC.
        phase: The step inside the state; None in ``idle``, ``stopped`` and ``failed``.
        phase_since: When that was entered, aware, in UTC; None if there is no phase.
        waiting_for: What is still missing, human-readable; empty if nothing is.
        reason: Why it ends or ended; None before.
        detail: One human-readable sentence: what happened.
        hint: What to do about it, or None.
        retryable: At the end: whether the session should still exist on the server, so that a new attempt at it (after
            a resume, if it is suspended) can succeed once the cause is fixed. None before the end, and if it cannot be
            known.
        pid: Process id of the proxy program, once it was started.
        exit_code: Its exit code, if it exited by itself.
        signal: The number of the signal that ended it, if one did.
        listen_address: What the proxy connects to: the path of a unix socket, or ``127.0.0.1:PORT``.
        tunnel: What the tunnel carried; None before it is bound.
        link: Whether the SSH server responds.
        silent_s: For how many seconds it has been silent, while ``link`` is silent; else 0.
        output_tail: The proxy's last lines, redacted.
        abandoned: What could not be released in time, human-readable; it is freed as soon as possible.
        history: All changes of state so far.
    """

    id: str
    session: str
    state: State
    since: datetime
    phase: Phase | None = None
    phase_since: datetime | None = None
    waiting_for: str = ""
    reason: EndReason | None = None
    detail: str = ""
    hint: str | None = None
    retryable: bool | None = None
    pid: int | None = None
    exit_code: int | None = None
    signal: int | None = None
    listen_address: str | None = None
    tunnel: TunnelStats | None = None
    link: Link = Link.OK
    silent_s: float = 0.0
    output_tail: tuple[str, ...] = ()
    abandoned: tuple[str, ...] = ()
    history: tuple[TransitionRecord, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-safe values: enums as their values, times in ISO 8601, tuples as lists."""
        return _fields_as_json(self)


def _fields_as_json(report: ProxyStatus | TransitionRecord | TunnelStats) -> dict[str, Any]:
    return {field.name: _as_json(getattr(report, field.name)) for field in dataclasses.fields(report)}


def _as_json(value: Any) -> Any:
    match value:
        case StrEnum():
            return str(value)
        case datetime():
            return value.isoformat()
        case tuple():
            return [_as_json(each) for each in value]
        case TransitionRecord() | TunnelStats():
            return value.as_dict()
        case _:
            return value
