"""The fault matrix: what can go wrong, and what a proxy must report. One row per fault, and one per stall.

`causes.py` and `stalled.py` cause each for real; `test_faults.py` and `test_stalls.py` run every row; `fault_table.py`
generates docs/faults.md from the rows and the measurements.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from enum import Enum, StrEnum
from functools import partial
from typing import TYPE_CHECKING

from proxy_fsm import EndReason, Timeouts
from proxy_fsm.evidence import (
    LinkDead,
    ProcessExited,
    SessionStatusReceived,
    SessionTakenOver,
    TransportEnded,
    WorkerFailed,
)

from . import causes, stalled
from .attempt import Attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from typing import TypeAlias

    from proxy_fsm.evidence import Observation

    from .scene import Scene

    #: Opens a session of a scene, with NX options.
    OpenedSession: TypeAlias = Callable[[Scene, Mapping[str, str]], AbstractContextManager[stalled.StalledSession]]

# design.md, section 6: from the first sign, or from the proxy's exit, to the final state
DEAD_S, AFTER_EXIT_S = 0.1, 0.02


class When(StrEnum):
    """When a fault strikes."""

    START = "before the start"
    NEGOTIATION = "in negotiation"
    RESUMING = "in the negotiation of a resumed session"
    RUNNING = "in mid-session"


class Left(StrEnum):
    """What a fault leaves of the session: the status that the server lists, where that is conclusive."""

    UNTOUCHED = "untouched"
    SUSPENDED = "S"
    TERMINATED = "-"
    DEAD = "dead"

    @property
    def again(self) -> bool:
        """Whether a second attempt, made for real once the cause is fixed, reaches `running`."""
        return self in {Left.UNTOUCHED, Left.SUSPENDED}


@dataclass(frozen=True)
class Fault:
    """A row.

    Attributes:
        cause: Its name.
        reason: The expected reason.
        in_detail: A text that the detail must contain.
        retryable: The expected `retryable` of the status.
        when: When it strikes.
        left: What it leaves of the session.
        make: Sets the scene and makes the proxy.
        start: Starts it.
        strike: Causes the fault; None if it is already present.
        script: The server's script that `strike` calls, if any: the time that it takes is not ours.
        limits: The proxy's time limits that differ from the defaults, to shorten the run.
        sign: Its first observation, or a text in the first line that shows it; None for the cause itself.
        due_s: How long after the cause it counts as a fault, if `sign` is None.
        orderly: Whether the proxy outlives the first sign; the time to the final state then counts from its exit.
        within_s: Time limit from the cause to the final state, if a configured limit determines it.
        unshares: Whether it needs namespaces of its own: mounts, or a network.
    """

    cause: str
    reason: EndReason
    in_detail: str
    retryable: bool | None
    _: KW_ONLY
    when: When
    left: Left
    make: Callable[[Scene], Attempt] = causes.healthy
    start: Callable[[Attempt], None] = Attempt.start
    strike: Callable[[Scene, Attempt], object] | None = None
    script: str = ""
    limits: Mapping[str, float] = field(default_factory=dict)
    sign: type[Observation] | str | None = None
    due_s: float = 0.0
    orderly: bool = False
    within_s: float | None = None
    unshares: bool = False

    @property
    def needs_x2goserver(self) -> bool:
        """Whether it involves the server's list of sessions, or a resume."""
        return self.when is When.RESUMING or (self.when is When.RUNNING and self.left is not Left.UNTOUCHED)

    @property
    def final_s(self) -> float:
        """Time limit to the final state: from the proxy's exit if that is orderly, else from the sign."""
        return AFTER_EXIT_S if self.orderly else DEAD_S


@dataclass(frozen=True)
class Mishap:
    """A row of the second table: what a session survives.

    Attributes:
        cause: Its name.
        strike: Causes it.
        event: The event that reports it.
        recovery_event: The event that reports its end; empty if there is none.
        make: Sets the scene and makes the proxy.
        limits: As in `Fault`.
        unshares: As in `Fault`.
    """

    cause: str
    strike: Callable[[Scene, Attempt], object]
    event: str
    recovery_event: str = ""
    _: KW_ONLY
    make: Callable[[Scene], Attempt] = causes.healthy
    limits: Mapping[str, float] = field(default_factory=dict)
    unshares: bool = False


class Stalled(Enum):
    """What stalls: as the document names it, and what opens a session in which it can be stopped."""

    AGENT = "the agent", stalled.agent
    SERVER = "the SSH server (the sshd of this connection)", stalled.server
    HOST = "the host program (Ctrl-Z; nxproxy goes on)", stalled.host
    NETWORK = "the network (packets dropped)", stalled.network

    def __init__(self, title: str, opened: OpenedSession) -> None:
        self.title = title
        self.opened = opened


@dataclass(frozen=True)
class Stall:
    """A row of the third table: a stall, and what it comes to with the default time limits.

    Attributes:
        stalled: What is stopped and, unless that ends the session, continued.
        duration_s: For how long.
        ends: The reason for which the session ends; None if it continues.
        quick: Whether `make test` runs it too, with time limits of a tenth (see `QUICK`). All are run by `make faults`.
    """

    stalled: Stalled
    duration_s: int
    ends: EndReason | None = None
    _: KW_ONLY
    quick: bool = False

    @property
    def name(self) -> str:
        """Its name, for example ``agent-20``."""
        return f"{self.stalled.name.lower()}-{self.duration_s}"


E, EXIT = EndReason, ProcessExited
START = partial(Fault, when=When.START, left=Left.UNTOUCHED)
NEGOTIATION = partial(Fault, when=When.NEGOTIATION, left=Left.DEAD)
RESUMING = partial(Fault, when=When.RESUMING, left=Left.SUSPENDED)
RUNNING = partial(Fault, when=When.RUNNING, left=Left.SUSPENDED)
YES, NO, UNKNOWN = True, False, None
# The time limits for a stall of a tenth: the link's, and nxproxy's, by default 120 s. Whatever that is, nxproxy looks
# every 5 s, and does nothing in the first 10 s: it warns after 10 s, and gives up after 15 s (measured; its source is
# Proxy::handlePing in nx-libs).
QUICK = 0.1
QUICK_TIMEOUTS, QUICK_OPTIONS = Timeouts(link_probe_s=1.5, link_dead_s=4.5), {"timeout": "12"}
# nxproxy's messages
BROKEN, CAUGHT = "Failure reading from the peer proxy", "Waiting the cleanup timeout"
REFUSED = "The remote NX proxy closed the connection"
SUSPEND, TERMINATE, RESUME = "x2gosuspend-session", "x2goterminate-session", "x2goresume-session"
PROBE = {"link_probe_s": 0.3}

# fmt: off
# cause, reason, text in the detail, retryable
FAULTS: tuple[Fault, ...] = (
    START("program missing", E.PROXY_NOT_FOUND, "was not found", YES, make=causes.program_missing),
    START("program not executable", E.PROXY_NOT_STARTABLE, "not an executable", YES,
          make=causes.program_not_executable),
    START("program of unknown format", E.PROXY_NOT_STARTABLE, "Exec format error", YES, make=causes.program_bad_format),
    START("program exits at once", E.PROXY_EXITED, 'its last line: "no licence for this machine".', YES,
          make=causes.program_exits, sign=EXIT),
    START("DISPLAY unset", E.DISPLAY_UNAVAILABLE, "DISPLAY", YES, make=causes.display_unset),
    START("X server absent", E.DISPLAY_UNAVAILABLE, "X server", YES, make=causes.display_absent),
    START("X server dead", E.DISPLAY_UNAVAILABLE, "X server", YES, make=causes.display_dead),
    START("X server refuses", E.DISPLAY_UNAVAILABLE, "X server", YES, make=causes.display_refuses),
    START("sessions root is not a directory", E.LISTEN_FAILED, "taken", YES, make=causes.root_not_a_directory),
    START("disk full", E.LISTEN_FAILED, "No space left on device", YES, make=causes.disk_full, unshares=True),
    START("no directory for the socket", E.LISTEN_FAILED, "no temporary directory is writable", YES,
          start=causes.start_without_writable_directory, unshares=True),
    START("socket's path unfit for nxproxy", E.LISTEN_FAILED, "a,b", YES, make=causes.comma_in_path),
    START("no free TCP port", E.LISTEN_FAILED, "Address already in use", YES,
          make=causes.viewer, start=causes.start_without_free_port, unshares=True),
    START("SSH connection already closed", E.TRANSPORT_LOST, "The SSH connection", YES, make=causes.transport_closed),
    START("forwarding denied", E.FORWARDING_DENIED, "does not allow forwarding", YES,
          make=causes.forwarding_denied, sign=WorkerFailed, orderly=True),
    START("graphics port refused", E.AGENT_UNREACHABLE, "nothing listens there", UNKNOWN,
          make=causes.port_refused, limits={"agent_connect_s": 1}, sign=WorkerFailed, orderly=True,
          within_s=1 + DEAD_S),
    START("agent already dead", E.AGENT_UNREACHABLE, "nothing listens there", UNKNOWN,
          make=causes.agent_dead, limits={"agent_connect_s": 1}, left=Left.DEAD, sign=WorkerFailed, orderly=True,
          within_s=1 + DEAD_S),

    NEGOTIATION("wrong cookie", E.NEGOTIATION_FAILED, "cookie is wrong, or the agent has ended", NO,
                make=causes.wrong_cookie, sign=REFUSED, orderly=True),
    NEGOTIATION("agent killed in negotiation", E.NEGOTIATION_FAILED, "the agent has ended", NO,
                make=causes.agent_stopped, start=causes.start_and_connect, strike=causes.kill_agent, sign=REFUSED,
                orderly=True),
    NEGOTIATION("agent silent in negotiation", E.START_TIMEOUT, "sign that the session is established", NO,
                make=causes.agent_stopped, limits={"ready_s": 3}, due_s=3, orderly=True),
    NEGOTIATION("proxy killed in negotiation", E.PROXY_KILLED, "SIGKILL", NO,
                make=causes.agent_stopped, start=causes.start_and_connect, strike=causes.kill_proxy),

    RESUMING("wrong cookie, resumed", E.NEGOTIATION_FAILED, "cookie is wrong, or the agent has ended", UNKNOWN,
             make=causes.resumed_wrong_cookie, sign=REFUSED, orderly=True),
    RESUMING("agent killed in negotiation, resumed", E.NEGOTIATION_FAILED, "the agent has ended", UNKNOWN,
             make=causes.resumed_agent_stopped, start=causes.start_and_connect, strike=causes.kill_agent,
             left=Left.DEAD, sign=REFUSED, orderly=True),
    RESUMING("agent silent in negotiation, resumed", E.START_TIMEOUT, "sign that the session is established", YES,
             make=causes.resumed_agent_stopped, limits={"ready_s": 3}, due_s=3, orderly=True),
    RESUMING("proxy killed in negotiation, resumed", E.PROXY_KILLED, "SIGKILL", YES,
             make=causes.resumed_agent_stopped, start=causes.start_and_connect, strike=causes.kill_proxy),

    RUNNING("agent killed", E.PEER_LOST, "lost the agent", UNKNOWN,
            strike=causes.kill_agent, left=Left.DEAD, sign=BROKEN, orderly=True),
    RUNNING("session suspended", E.SESSION_ENDED, "suspended or terminated", UNKNOWN,
            strike=causes.suspend, script=SUSPEND, sign=EXIT),
    RUNNING("session terminated", E.SESSION_ENDED, "suspended or terminated", UNKNOWN,
            strike=causes.terminate, script=TERMINATE, left=Left.TERMINATED, sign=EXIT),
    RUNNING("session suspended, server asked", E.SESSION_SUSPENDED, "was suspended", YES,
            make=causes.asking, strike=causes.suspend, script=SUSPEND, sign=SessionStatusReceived),
    RUNNING("session terminated, server asked", E.SESSION_TERMINATED, "was terminated", NO,
            make=causes.asking, strike=causes.terminate, script=TERMINATE, left=Left.TERMINATED,
            sign=SessionStatusReceived),
    RUNNING("taken over by another client", E.SESSION_TAKEN_OVER, "Another client has the session now", NO,
            make=causes.asking, strike=causes.take_over, script=RESUME, sign=SessionTakenOver),
    RUNNING("X server killed", E.DISPLAY_LOST, "The X server no longer answers", YES,
            make=causes.on_another_display, strike=causes.kill_display, orderly=True),
    RUNNING("proxy killed (SIGKILL)", E.PROXY_KILLED, "SIGKILL", YES, strike=causes.kill_proxy),
    RUNNING("proxy crashes (SIGSEGV)", E.PROXY_KILLED, "SIGSEGV", YES, strike=causes.crash_proxy),
    RUNNING("proxy terminated (SIGTERM)", E.PROXY_KILLED, "TERM, INT or HUP", YES,
            strike=causes.terminate_proxy, sign=CAUGHT, orderly=True),
    RUNNING("proxy leaves a child", E.PROXY_KILLED, "SIGKILL", YES,
            make=causes.program_leaves_child, strike=causes.kill_proxy),
    RUNNING("proxy leaves a child in another process session", E.PROXY_KILLED, "SIGKILL", YES,
            make=causes.program_leaves_runaway, strike=causes.kill_proxy),
    RUNNING("stopped, ignores SIGTERM", E.STOP_REQUESTED, "asked to stop", YES,
            make=causes.program_ignores_term, strike=causes.stop_proxy, limits={"stop_grace_s": 1}, orderly=True,
            within_s=1 + DEAD_S),
    RUNNING("SSH connection closed by the server", E.TRANSPORT_LOST, "SSH connection ended", YES,
            strike=causes.end_connection, sign=TransportEnded),
    RUNNING("SSH connection closed by the client", E.TRANSPORT_LOST, "SSH connection ended", YES,
            strike=causes.close_connection),
    RUNNING("SSH connection cut (reset)", E.TRANSPORT_LOST, "SSH connection ended", YES,
            make=causes.through_relay, strike=causes.cut_connection),
    RUNNING("SSH server silent for good", E.TRANSPORT_SILENT, "has not been heard", YES,
            strike=causes.stop_server, limits={**PROBE, "link_dead_s": 1.5, "kill_s": 1}, sign=LinkDead,
            within_s=1.5 + DEAD_S),
    RUNNING("viewer closed by its user", E.VIEWER_CLOSED, "was closed", YES,
            make=causes.window, strike=causes.close_window, left=Left.UNTOUCHED, sign=EXIT),
)

# cause, how, event, recovery event
MISHAPS: tuple[Mishap, ...] = (
    Mishap("SSH server silent for a while", causes.stop_server_for_a_while, "link.silent", "link.restored",
           limits=PROBE),
    Mishap("disk fills up", causes.fill_disk, "process.log_failed", make=causes.disk_fills_up, unshares=True),
)

STALLS: tuple[Stall, ...] = (
    Stall(Stalled.AGENT, 20),
    Stall(Stalled.AGENT, 40, quick=True),
    Stall(Stalled.AGENT, 60),
    Stall(Stalled.AGENT, 130, E.PEER_LOST),
    Stall(Stalled.SERVER, 20),
    Stall(Stalled.SERVER, 40),  # a tenth of its margin is half a second
    Stall(Stalled.SERVER, 60, E.TRANSPORT_SILENT),
    Stall(Stalled.SERVER, 130, E.TRANSPORT_SILENT),
    Stall(Stalled.HOST, 20),
    Stall(Stalled.HOST, 40),
    Stall(Stalled.HOST, 60, quick=True),
    Stall(Stalled.HOST, 130, E.PEER_LOST, quick=True),
    Stall(Stalled.NETWORK, 20, quick=True),
    Stall(Stalled.NETWORK, 40, E.TRANSPORT_SILENT),  # TCP tries again after 51 s or more
    Stall(Stalled.NETWORK, 60, E.TRANSPORT_SILENT, quick=True),
    Stall(Stalled.NETWORK, 130, E.TRANSPORT_SILENT),
)
# fmt: on

CAUSES = (*(fault.cause for fault in FAULTS), *(mishap.cause for mishap in MISHAPS))
