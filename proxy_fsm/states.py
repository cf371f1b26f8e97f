"""The states of a proxy, their phases and the triggers between them: pure data, no behaviour.

The rules, in prose; the two tables below are the only other place that states them:

* Orders come from the caller and are imperative (``start``, ``stop``); observations are past tense.
* ``idle`` is left once, by ``start`` or ``stop``; ``stopped`` and ``failed`` are never left.
* Resources are released in ``stopping`` and nowhere else, so every way out of ``tunnelling``, ``spawning`` and
  ``running`` leads through it.
* A late or repeated observation is ignored: nothing changes, and no event is published.
* A pair of state and trigger that the table does not list is refused with `InvalidTransition`.
* A state that takes several steps has phases. It is entered at the first phase that has work to do, and may be left
  from any phase by a trigger of `TRANSITIONS`; transitions within the state are those of `PHASES`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PHASES", "TRANSITIONS", "Phase", "PhaseTransition", "PhaseTrigger", "State", "Transition", "Trigger"]


class State(StrEnum):
    """The state of a proxy. ``str(State.RUNNING) == "running"``."""

    IDLE = "idle"
    TUNNELLING = "tunnelling"
    SPAWNING = "spawning"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        """Whether this state is never left, as ``stopped`` and ``failed`` are."""
        return self in _FINAL

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Its phases, in order; empty for ``idle``, ``stopped`` and ``failed``, which have none."""
        return tuple(dict.fromkeys(row.phase for row in PHASES if row.state is self))


_FINAL = frozenset({State.STOPPED, State.FAILED})


class Phase(StrEnum):
    """A step inside a state. ``str(Phase.CHECKING) == "checking"``."""

    CHECKING = "checking"
    BINDING = "binding"
    LAUNCHING = "launching"
    CONNECTING = "connecting"
    NEGOTIATING = "negotiating"
    ESTABLISHED = "established"
    VERIFYING = "verifying"
    TERMINATING = "terminating"
    KILLING = "killing"
    DRAINING = "draining"
    ABORTING = "aborting"


class Trigger(StrEnum):
    """What moves a proxy from state to state: the caller's orders first, then observations."""

    START = "start"
    STOP = "stop"
    TUNNEL_OPENED = "tunnel_opened"
    PROXY_READY = "proxy_ready"
    SESSION_ENDED = "session_ended"
    FAULT_FOUND = "fault_found"
    CLOSED_CLEANLY = "closed_cleanly"
    CLOSED_AFTER_FAULT = "closed_after_fault"

    @property
    def is_order(self) -> bool:
        """Whether it is the caller's order; all others are observations of the engine."""
        return self in {Trigger.START, Trigger.STOP}


class PhaseTrigger(StrEnum):
    """What moves a proxy from phase to phase within a state; all of these are observations."""

    CHECKS_PASSED = "checks_passed"
    PROCESS_STARTED = "process_started"
    CHANNEL_OPENED = "channel_opened"
    END_SUSPECTED = "end_suspected"
    END_DENIED = "end_denied"
    PROCESS_EXITED = "process_exited"
    GRACE_OVER = "grace_over"
    KILL_OVER = "kill_over"
    DRAIN_OVER = "drain_over"


class Transition(NamedTuple):
    """One cell of the table: ``trigger`` in ``source`` leads to ``dest``, or is ignored if that is None."""

    trigger: Trigger
    source: State
    dest: State | None


class PhaseTransition(NamedTuple):
    """What ends a phase: ``trigger`` in ``phase`` of ``state`` leads to ``dest``.

    Attributes:
        state: The state.
        phase: The phase.
        trigger: What ends the phase.
        dest: The next phase of the same state, or the next state.
        limit: The field of `Timeouts` that limits the phase; None if it may last forever. Consecutive phases with the
            same limit share it, counted from the first of them.
    """

    state: State
    phase: Phase
    trigger: Trigger | PhaseTrigger
    dest: Phase | State
    limit: str | None


def _row(trigger: Trigger, **cells: State | None) -> tuple[Transition, ...]:
    return tuple(Transition(trigger, State(source), dest) for source, dest in cells.items())


_TOO_LATE: Mapping[str, State | None] = {"stopping": None, "stopped": None, "failed": None}

#: Every pair of state and trigger that is a transition or is ignored. Any other pair is refused.
TRANSITIONS: tuple[Transition, ...] = (
    *_row(Trigger.START, idle=State.TUNNELLING),
    *_row(Trigger.TUNNEL_OPENED, tunnelling=State.SPAWNING, spawning=None, running=None, **_TOO_LATE),
    *_row(Trigger.PROXY_READY, spawning=State.RUNNING, running=None, **_TOO_LATE),
    *_row(Trigger.SESSION_ENDED, spawning=State.STOPPING, running=State.STOPPING, **_TOO_LATE),
    *_row(
        Trigger.FAULT_FOUND,
        tunnelling=State.STOPPING,
        spawning=State.STOPPING,
        running=State.STOPPING,
        **_TOO_LATE,
    ),
    *_row(
        Trigger.STOP,
        idle=State.STOPPED,
        tunnelling=State.STOPPING,
        spawning=State.STOPPING,
        running=State.STOPPING,
        **_TOO_LATE,
    ),
    *_row(Trigger.CLOSED_CLEANLY, stopping=State.STOPPED, stopped=None, failed=None),
    *_row(Trigger.CLOSED_AFTER_FAULT, stopping=State.FAILED, stopped=None, failed=None),
)


def _phase(state: State, phase: Phase, limit: str | None, **ends: Phase | State) -> tuple[PhaseTransition, ...]:
    return tuple(PhaseTransition(state, phase, _trigger_named(trigger), dest, limit) for trigger, dest in ends.items())


def _trigger_named(name: str) -> Trigger | PhaseTrigger:
    return Trigger(name) if name in set(Trigger) else PhaseTrigger(name)


#: What ends each phase in the normal course of its state. A phase trigger in a phase that does not list it is refused.
PHASES: tuple[PhaseTransition, ...] = (
    *_phase(State.TUNNELLING, Phase.CHECKING, "preflight_s", checks_passed=Phase.BINDING),
    *_phase(State.TUNNELLING, Phase.BINDING, "preflight_s", tunnel_opened=State.SPAWNING),
    *_phase(State.SPAWNING, Phase.LAUNCHING, "ready_s", process_started=Phase.CONNECTING),
    *_phase(State.SPAWNING, Phase.CONNECTING, "ready_s", channel_opened=Phase.NEGOTIATING),
    *_phase(State.SPAWNING, Phase.NEGOTIATING, "ready_s", proxy_ready=State.RUNNING),
    *_phase(State.RUNNING, Phase.ESTABLISHED, None, end_suspected=Phase.VERIFYING),
    *_phase(
        State.RUNNING,
        Phase.VERIFYING,
        "ask_server_s",
        end_denied=Phase.ESTABLISHED,
        session_ended=State.STOPPING,
    ),
    *_phase(
        State.STOPPING,
        Phase.TERMINATING,
        "stop_grace_s",
        process_exited=Phase.DRAINING,
        grace_over=Phase.KILLING,
    ),
    *_phase(State.STOPPING, Phase.KILLING, "kill_s", process_exited=Phase.DRAINING, kill_over=Phase.DRAINING),
    *_phase(
        State.STOPPING,
        Phase.DRAINING,
        "drain_s",
        drain_over=Phase.ABORTING,
        closed_cleanly=State.STOPPED,
        closed_after_fault=State.FAILED,
    ),
    *_phase(State.STOPPING, Phase.ABORTING, "kill_s", closed_cleanly=State.STOPPED, closed_after_fault=State.FAILED),
)
