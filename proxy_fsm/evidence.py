"""What is seen of a proxy while it lives: observations, and the evidence they add up to.

An observation is a frozen fact with the time it was made; workers post them, the engine's owner thread takes
them one by one, and a backend judges by all that were seen so far.
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
    """A fact, and when it was seen (seconds of the monotonic clock)."""

    at: float = field(default_factory=time.monotonic, kw_only=True)


@dataclass(frozen=True, slots=True)
class StartOrdered(Observation):
    """The caller wants it to begin."""


@dataclass(frozen=True, slots=True)
class StopOrdered(Observation):
    """The caller wants it to end."""


@dataclass(frozen=True, slots=True)
class ChecksPassed(Observation):
    """Everything local is good; what is left is to bind the local end."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What the proxy program is started with.

    Attributes:
        command: The argument vector; its first entry is the path of the executable.
        environment: The whole environment.
        directory: The working directory.
        log: Descriptor of the session's log; the preflight's, which closes it.
    """

    command: Sequence[str]
    environment: Mapping[str, str] = field(repr=False)  # secrets are in it
    directory: Path
    log: int


@dataclass(frozen=True, slots=True)
class PreflightPassed(Observation):
    """Everything local is good, the local end is bound at ``listen_address``, and this is what to launch."""

    listen_address: str
    launch: Launch


@dataclass(frozen=True, slots=True)
class WorkerFailed(Observation):
    """A worker found that it cannot go on; the error carries reason, detail and hint."""

    error: BackendError


@dataclass(frozen=True, slots=True)
class SpawnFailed(WorkerFailed):
    """The proxy program could not be started: there is no process."""


@dataclass(frozen=True, slots=True)
class PreflightFinished(Observation):
    """The preflight's thread is done, however it went."""


@dataclass(frozen=True, slots=True)
class WorkerCrashed(Observation):
    """A worker broke: a bug of ours or of a backend."""

    worker: str
    error: BaseException


@dataclass(frozen=True, slots=True)
class ProcessSpawned(Observation):
    """The proxy program runs."""

    pid: int
    executable: str


@dataclass(frozen=True, slots=True)
class OutputLine(Observation):
    """The proxy program printed a line; it is redacted and harmless."""

    text: str


@dataclass(frozen=True, slots=True)
class LogFailed(Observation):
    """The session's log cannot be written any more."""

    detail: str


@dataclass(frozen=True, slots=True)
class ProcessExited(Observation):
    """The proxy program ended, by itself (``exit_code``) or by a signal (its number); both None where nobody knows."""

    exit_code: int | None
    signal: int | None


@dataclass(frozen=True, slots=True)
class PeerRejected(Observation):
    """A connection from another local user was rejected."""

    peer: str


@dataclass(frozen=True, slots=True)
class ChannelOpened(Observation):
    """The proxy program connected, and its channel to the graphics port stands."""

    connection: int


@dataclass(frozen=True, slots=True)
class AgentDataReceived(Observation):
    """The agent's first bytes came."""

    connection: int


@dataclass(frozen=True, slots=True)
class AgentEof(Observation):
    """The agent's stream ended while the transport lives and nothing was closed from this side."""

    connection: int


@dataclass(frozen=True, slots=True)
class ConnectionEnded(Observation):
    """A connection is gone, local end and channel; what it carried, and for how many seconds it stood."""

    connection: int
    bytes_to_agent: int
    bytes_from_agent: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class TunnelClosed(Observation):
    """The listener and all connections are gone."""


@dataclass(frozen=True, slots=True)
class TransportEnded(Observation):
    """The SSH transport is gone."""

    detail: str


@dataclass(frozen=True, slots=True)
class LinkSilent(Observation):
    """Nothing came from the SSH server since ``heard_at`` (monotonic), a probe's answer included."""

    heard_at: float


@dataclass(frozen=True, slots=True)
class LinkRestored(Observation):
    """The SSH server is heard again, after so many seconds."""

    silent_s: float


@dataclass(frozen=True, slots=True)
class LinkDead(Observation):
    """The SSH server was silent for longer than is allowed."""

    silent_s: float


@dataclass(frozen=True, slots=True)
class DisplayLost(Observation):
    """The X server is gone: its connection ended and no new one could be made."""

    detail: str


@dataclass(frozen=True, slots=True)
class DisplayRestored(Observation):
    """The X server ended our connection, but took a new one."""


@dataclass(frozen=True, slots=True)
class SessionStatusReceived(Observation):
    """The X2Go server said how the session stands; None where it could not tell."""

    status: SessionStatus | None


_Seen = TypeVar("_Seen", bound=Observation)


class Evidence:
    """All that was seen of one proxy, in order.

    The first observation of each kind is always held; beside it the last ``KEPT`` of all kinds, and the last ``KEPT``
    lines of the proxy's output. Backends read it; the engine alone adds to it.

    Attributes:
        observations: What was seen last, oldest first, output lines apart.
        lines: The proxy's last lines, oldest first.
        last: The newest observation, or None.
        ready: Whether the session has become ready; the engine sets it.
        signalled: Whether we have sent the proxy a signal.
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
        """Take one more observation in."""
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
        """Tell whether anything of these kinds was ever seen."""
        return any(issubclass(kind, kinds) for kind in self._firsts)

    def said(self, *texts: str) -> bool:
        """Tell whether one of the lines that are held contains one of these texts."""
        return any(text in line.text for line in self.lines for text in texts)

    @property
    def exited(self) -> ProcessExited | None:
        """How the proxy program ended, or None while it lives."""
        return self.first(ProcessExited)
