"""What a proxy tells about itself: reasons, records, counters and the snapshot that holds them all."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from proxy_fsm.lifecycle import State, Trigger

__all__ = [
    "EndReason",
    "Link",
    "ProxyStatus",
    "Timeouts",
    "TransitionRecord",
    "TunnelStats",
    "hint_for",
    "is_retryable",
]


class EndReason(StrEnum):
    """Why a proxy ended.

    Attributes:
        cli_status: The exit status of the command line for this reason: 0 for a clean end, else from 10 up.
        hint: What to do about it, one sentence; None where there is nothing to do.
    """

    cli_status: int
    hint: str | None

    def __new__(cls, value: str, cli_status: int, hint: str | None = None) -> Self:
        """Make a member from its row below."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.cli_status = cli_status
        member.hint = hint
        return member

    STOP_REQUESTED = "stop_requested", 0
    SESSION_ENDED = "session_ended", 0, "Ask the server whether the session is suspended and can be resumed."
    SESSION_SUSPENDED = "session_suspended", 0, "Resume the session to go on with it."
    SESSION_TERMINATED = "session_terminated", 0
    VIEWER_CLOSED = "viewer_closed", 0
    PROXY_NOT_FOUND = "proxy_not_found", 10, "Install the proxy program, or say where it is."
    PROXY_NOT_STARTABLE = (
        "proxy_not_startable",
        11,
        "Make sure that the proxy program is an executable of this machine's kind.",
    )
    DISPLAY_UNAVAILABLE = (
        "display_unavailable",
        12,
        "Start an X server, and set DISPLAY and XAUTHORITY to reach it.",
    )
    DISPLAY_LOST = (
        "display_lost",
        13,
        "Start the X server again, then resume the session.",
    )
    NEGOTIATION_FAILED = (
        "negotiation_failed",
        14,
        "Ask the server for the session's present cookie and port; an agent that is gone needs a new session.",
    )
    AGENT_UNREACHABLE = (
        "agent_unreachable",
        15,
        "Ask the server whether the session still runs and on which port; a suspended one must be resumed first.",
    )
    FORWARDING_DENIED = (
        "forwarding_denied",
        16,
        "Ask the server's administrator to allow TCP forwarding (AllowTcpForwarding, PermitOpen, key options).",
    )
    LISTEN_FAILED = (
        "listen_failed",
        17,
        "Make sure that the sessions root and the temporary directory are yours, writable and not full.",
    )
    TRANSPORT_LOST = "transport_lost", 18, "Connect to the server again, then resume the session."
    TRANSPORT_SILENT = (
        "transport_silent",
        19,
        "Check the network and the server, connect again, then resume the session.",
    )
    PEER_LOST = (
        "peer_lost",
        20,
        "Ask the server whether the session still exists: its agent may have crashed or been killed.",
    )
    PROXY_KILLED = (
        "proxy_killed",
        21,
        "Find out what ended the proxy program (a crash, or somebody's signal), then resume the session.",
    )
    PROXY_EXITED = "proxy_exited", 22, "Read the last lines of the proxy program in the session's log."
    START_TIMEOUT = (
        "start_timeout",
        23,
        "Check the network and the server's load, or allow more time (ready_s).",
    )
    STOP_TIMEOUT = (
        "stop_timeout",
        24,
        "The proxy program survived SIGKILL: look for a stuck disk or debugger.",
    )
    INTERNAL_ERROR = "internal_error", 25, "Report this as a bug of proxy_fsm, with the traceback in the log."

    @property
    def clean(self) -> bool:
        """Whether this ends in ``stopped``, not in ``failed``."""
        return self.cli_status == 0


class Link(StrEnum):
    """Whether the SSH server is heard."""

    OK = "ok"
    SILENT = "silent"


@dataclass(frozen=True, slots=True)
class TransitionRecord:
    """One change of state.

    Attributes:
        proxy_id: Id of the engine.
        session: Name of the session.
        trigger: What moved it.
        source: The state that was left.
        dest: The state that was entered.
        reason: Why it ends, from the entry into ``stopping`` on.
        detail: One sentence for a person; empty where there is nothing to say.
        at: When, as an aware datetime in UTC.
        elapsed_s: Seconds spent in source, by the monotonic clock.
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
        """All fields as values that JSON can hold; ``at`` in ISO 8601."""
        return _fields_as_json(self)


@dataclass(frozen=True, slots=True)
class TunnelStats:
    """What the tunnel carried.

    Attributes:
        bytes_to_agent: Bytes that the proxy sent and the transport took.
        bytes_from_agent: Bytes that the agent sent and the proxy took.
        opened_at: When the first channel was opened, aware, in UTC; None before.
        connections: Channels opened so far.
    """

    bytes_to_agent: int
    bytes_from_agent: int
    opened_at: datetime | None
    connections: int

    def as_dict(self) -> dict[str, Any]:
        """All fields as values that JSON can hold; ``opened_at`` in ISO 8601."""
        return _fields_as_json(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long things may take, in seconds; all finite and above zero.

    Attributes:
        preflight_s: From ``start`` until everything local is known to be good.
        ready_s: From the proxy's start until the session is ready.
        agent_connect_s: How long a refused channel is tried again.
        stop_grace_s: From SIGTERM to SIGKILL.
        kill_s: From SIGKILL until the proxy must be gone, and how long a channel may take to close.
        ask_server_s: How long the server may take to say how a session ended.
        link_probe_s: After how much silence the server is probed, and after how much more it counts as silent.
        link_dead_s: After how much silence the transport is given up.

    Raises:
        ValueError: A value is not a finite number above zero, or ``link_dead_s`` is not above ``link_probe_s``.
    """

    preflight_s: float = 5
    ready_s: float = 30
    agent_connect_s: float = 8
    stop_grace_s: float = 5
    kill_s: float = 2
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
    """A snapshot of a proxy, consistent in itself and holding no secret.

    Attributes:
        id: Id of the engine, as in every event and record.
        session: Name of the session.
        state: The state.
        since: When it was entered, aware, in UTC.
        waiting_for: What is still missing, for a person; empty where nothing is.
        reason: Why it ends or ended; None before.
        detail: One sentence for a person: what happened.
        hint: What to do about it, or None.
        retryable: At the end: whether the session should still stand on the server, so that a new attempt at it
            (after a resume, where it is suspended) can succeed once the cause is put right. None before the end,
            and where it cannot be known.
        pid: Process id of the proxy program, once it was started.
        exit_code: Its exit code, when it exited by itself.
        signal: The number of the signal that ended it, when one did.
        listen_address: What the proxy connects to: the path of a unix socket, or ``127.0.0.1:PORT``.
        tunnel: What the tunnel carried; None before it is bound.
        link: Whether the SSH server is heard.
        silent_s: For how many seconds it was not, while ``link`` is silent; else 0.
        output_tail: The proxy's last lines, redacted.
        abandoned: What could not be released in time, for a person; it is freed when that can be.
        history: All changes so far.
    """

    id: str
    session: str
    state: State
    since: datetime
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
        """All fields as values that JSON can hold: enums as their values, times in ISO 8601, tuples as lists."""
        return _fields_as_json(self)


def _fields_as_json(told: ProxyStatus | TransitionRecord | TunnelStats) -> dict[str, Any]:
    return {field.name: _as_json(getattr(told, field.name)) for field in dataclasses.fields(told)}


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


#: Suspended or gone: this side cannot tell.
_SERVER_KNOWS = frozenset({EndReason.SESSION_ENDED, EndReason.AGENT_UNREACHABLE, EndReason.PEER_LOST})


#: So long after the proxy's ready sign an agent in its first attempt can still die with its proxy: measured with
#: nxagent 3.5.99, which survived a loss 0.12 s after the sign in all of 4 runs, and 0.06 s after it in 2 of 4.
_SETTLING_S = 0.5


def is_retryable(reason: EndReason, *, channel_opened: bool, running_s: float | None, resumed: bool) -> bool | None:
    """Tell whether the session should have survived this attempt, so that another one can succeed.

    An agent in its first attempt gets one chance: connected and let go before the session stood, it dies. One
    that was running, or was resumed, is suspended instead; one that was never connected still waits.

    Args:
        reason: Why the attempt ended.
        channel_opened: Whether a channel to the graphics port was ever opened.
        running_s: For how many seconds it was ``running``; None where it never was.
        resumed: Whether the session had been resumed, and so been running before.

    Returns:
        True or False, or None where only the server knows.
    """
    if reason in _SERVER_KNOWS or (resumed and reason is EndReason.NEGOTIATION_FAILED):
        return None
    if reason in {EndReason.SESSION_SUSPENDED, EndReason.SESSION_TERMINATED}:
        return reason is EndReason.SESSION_SUSPENDED
    if running_s is not None and not resumed:
        return True if running_s >= _SETTLING_S else None
    return resumed or not channel_opened


def hint_for(reason: EndReason, *, channel_opened: bool, was_running: bool, resumed: bool) -> str | None:
    """Return what to do about a reason; a session that is lost is not to be resumed.

    Args:
        reason: Why the attempt ends.
        channel_opened: Whether a channel to the graphics port was ever opened.
        was_running: Whether ``running`` was reached.
        resumed: Whether the session had been resumed.
    """
    if reason.hint is None or was_running or resumed:
        return reason.hint
    if not channel_opened:
        return reason.hint.replace("then resume the session", "then try again")
    lost = "then start a new session: this one has not survived"
    hint = reason.hint.replace("then resume the session", lost)
    return hint if "new session" in hint or reason in _SERVER_KNOWS else f"{hint[:-1]}; {lost}."
