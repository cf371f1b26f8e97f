"""What is observed of a proxy: single observations, and the evidence they add up to.

An observation is a frozen fact with the time it was made; workers post observations, the engine's owner thread
handles them one by one, and a backend judges by all that were made so far.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from proxy_fsm.errors import BackendError
    from proxy_fsm.session import SessionStatus

__all__ = [
    "AgentDataReceived",
    "AgentEof",
    "ChannelOpened",
    "ChecksPassed",
    "ConnectionEnded",
    "DisplayLost",
    "DisplayRestored",
    "Evidence",
    "Launch",
    "LinkDead",
    "LinkRestored",
    "LinkSilent",
    "LogFailed",
    "Observation",
    "OutputLine",
    "PeerRejected",
    "PreflightFinished",
    "PreflightPassed",
    "ProcessExited",
    "ProcessSpawned",
    "SessionStatusReceived",
    "SessionTakenOver",
    "SpawnFailed",
    "StartOrdered",
    "StopOrdered",
    "TransportEnded",
    "TunnelClosed",
    "WorkerCrashed",
    "WorkerFailed",
]


@dataclass(frozen=True, slots=True)
class Observation:
    """A fact, and when it was observed (seconds of the monotonic clock)."""

    at: float = field(default_factory=time.monotonic, kw_only=True)


@dataclass(frozen=True, slots=True)
class StartOrdered(Observation):
    """The caller has ordered it to start."""


@dataclass(frozen=True, slots=True)
class StopOrdered(Observation):
    """The caller has ordered it to stop."""


@dataclass(frozen=True, slots=True)
class ChecksPassed(Observation):
    """All local checks passed; the next step is to bind the listener."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start the proxy program.

    Attributes:
        command: The argument vector; its first entry is the path of the executable.
        environment: The complete environment.
        directory: The working directory.
        log: Descriptor of the session's log; the preflight owns and closes it.
    """

    command: Sequence[str]
    environment: Mapping[str, str] = field(repr=False)  # it holds secrets
    directory: Path
    log: int


@dataclass(frozen=True, slots=True)
class PreflightPassed(Observation):
    """All local checks passed, the listener is bound at ``listen_address``, and this is what to launch."""

    listen_address: str
    launch: Launch


@dataclass(frozen=True, slots=True)
class WorkerFailed(Observation):
    """A worker cannot continue; the error carries reason, detail and hint."""

    error: BackendError


@dataclass(frozen=True, slots=True)
class SpawnFailed(WorkerFailed):
    """The proxy program could not be started: there is no process."""


@dataclass(frozen=True, slots=True)
class PreflightFinished(Observation):
    """The preflight's thread is done, whether it succeeded or failed."""


@dataclass(frozen=True, slots=True)
class WorkerCrashed(Observation):
    """A worker crashed: a bug in this package or in a backend."""

    worker: str
    error: BaseException


@dataclass(frozen=True, slots=True)
class ProcessSpawned(Observation):
    """The proxy program was started."""

    pid: int
    executable: str


@dataclass(frozen=True, slots=True)
class OutputLine(Observation):
    """The proxy program printed a line; it is redacted, and its control characters are escaped."""

    text: str


@dataclass(frozen=True, slots=True)
class LogFailed(Observation):
    """The session's log can no longer be written."""

    detail: str


@dataclass(frozen=True, slots=True)
class ProcessExited(Observation):
    """The proxy program ended, by itself (``exit_code``) or by a signal (its number); both None if unknown."""

    exit_code: int | None
    signal: int | None


@dataclass(frozen=True, slots=True)
class PeerRejected(Observation):
    """A connection from another local user was rejected."""

    peer: str


@dataclass(frozen=True, slots=True)
class ChannelOpened(Observation):
    """The proxy program connected, and its channel to the graphics port is open."""

    connection: int


@dataclass(frozen=True, slots=True)
class AgentDataReceived(Observation):
    """The agent's first bytes were received."""

    connection: int


@dataclass(frozen=True, slots=True)
class AgentEof(Observation):
    """The agent's stream ended while the transport was active and this side had closed nothing."""

    connection: int


@dataclass(frozen=True, slots=True)
class ConnectionEnded(Observation):
    """A connection is closed, local socket and channel; what it carried, and for how many seconds it was open."""

    connection: int
    bytes_to_agent: int
    bytes_from_agent: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class TunnelClosed(Observation):
    """The listener and all connections are closed."""


@dataclass(frozen=True, slots=True)
class TransportEnded(Observation):
    """The SSH transport has ended."""

    detail: str


@dataclass(frozen=True, slots=True)
class LinkSilent(Observation):
    """Nothing was received from the SSH server since ``heard_at`` (monotonic), not even a probe's answer."""

    heard_at: float


@dataclass(frozen=True, slots=True)
class LinkRestored(Observation):
    """The SSH server responds again, after ``silent_s`` seconds."""

    silent_s: float


@dataclass(frozen=True, slots=True)
class LinkDead(Observation):
    """The SSH server was silent for longer than allowed."""

    silent_s: float


@dataclass(frozen=True, slots=True)
class DisplayLost(Observation):
    """The X server is lost: our connection to it ended, and no new one could be made."""

    detail: str


@dataclass(frozen=True, slots=True)
class DisplayRestored(Observation):
    """The X server ended our connection, but accepted a new one."""


@dataclass(frozen=True, slots=True)
class SessionStatusReceived(Observation):
    """The X2Go server reported the session's status; None if it could not."""

    status: SessionStatus | None


@dataclass(frozen=True, slots=True)
class SessionTakenOver(Observation):
    """The X2Go server reported that another client has resumed the session, or is about to.

    Attributes:
        client: That client's address; empty if it is not known yet.
        used: When it resumed the session, in the server's time and format; empty if it is not known yet.
    """

    client: str
    used: str


_Seen = TypeVar("_Seen", bound=Observation)


class Evidence:
    """All observations of one proxy, in order.

    The first observation of each kind is always kept, as are the last ``KEPT`` of all kinds and the last ``KEPT`` lines
    of the proxy's output. Backends read it; only the supervisor adds to it.

    Attributes:
        observations: The latest observations, oldest first, without output lines.
        lines: The proxy's last lines, oldest first.
        last: The newest observation, or None.
        ready: Whether the session has become ready; set by the supervisor.
        signalled: Whether we have sent the proxy a signal; set by the supervisor.
    """

    KEPT = 200

    def __init__(self, *observations: Observation) -> None:
        self.observations: deque[Observation] = deque(maxlen=self.KEPT)
        self.lines: deque[OutputLine] = deque(maxlen=self.KEPT)
        self._firsts: dict[type[Observation], Observation] = {}
        self.last: Observation | None = None
        self.ready = False
        self.signalled = False
        for observation in observations:
            self.add(observation)

    def add(self, observation: Observation) -> None:
        """Add an observation."""
        if isinstance(observation, OutputLine):
            self.lines.append(observation)
        else:
            self.observations.append(observation)
        self._firsts.setdefault(type(observation), observation)
        self.last = observation

    def first(self, kind: type[_Seen]) -> _Seen | None:
        """Return the first observation of a kind, or None."""
        return next((seen for seen in self._firsts.values() if isinstance(seen, kind)), None)

    def saw(self, *kinds: type[Observation]) -> bool:
        """Tell whether any observation of these kinds was ever made."""
        return any(issubclass(kind, kinds) for kind in self._firsts)

    def said(self, *texts: str) -> bool:
        """Tell whether any of the kept lines contains one of these texts."""
        return any(text in line.text for line in self.lines for text in texts)

    @property
    def exited(self) -> ProcessExited | None:
        """How the proxy program ended, or None while it is alive."""
        return self.first(ProcessExited)
