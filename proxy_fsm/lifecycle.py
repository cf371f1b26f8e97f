"""The lifecycle of a proxy: seven states, eight triggers, one table.

Rules, in prose; the table below is their only other statement:

* Orders come from the caller and are imperative (``start``, ``stop``); observations are past tense.
* ``idle`` is left once, by ``start`` or ``stop``; ``stopped`` and ``failed`` are never left.
* Whatever was acquired is released in ``stopping`` and nowhere else, so every way out of ``tunnelling``,
  ``spawning`` and ``running`` leads through it.
* An observation that comes late or twice is ignored: nothing changes and nothing is told to anybody.
* A pair of state and trigger that the table does not list is refused with `InvalidTransition`.

Nothing here does I/O, starts a thread or logs.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from transitions import EventData, Machine, MachineError

from proxy_fsm.errors import InvalidTransition

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["TRANSITIONS", "Lifecycle", "State", "Transition", "Trigger"]


class State(StrEnum):
    """Where a proxy stands. ``str(State.RUNNING) == "running"``."""

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


_FINAL = frozenset({State.STOPPED, State.FAILED})


class Trigger(StrEnum):
    """What moves a proxy: orders of the caller first, observations after them."""

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
        """Whether the caller gives it; all others are observations of the engine."""
        return self in {Trigger.START, Trigger.STOP}


class Transition(NamedTuple):
    """One cell of the table: ``trigger`` in ``source`` leads to ``dest``, or is ignored where that is None."""

    trigger: Trigger
    source: State
    dest: State | None


def _row(trigger: Trigger, **cells: State | None) -> tuple[Transition, ...]:
    return tuple(Transition(trigger, State(source), dest) for source, dest in cells.items())


_TOO_LATE: Mapping[str, State | None] = {"stopping": None, "stopped": None, "failed": None}

#: Every pair of state and trigger that moves or is ignored. A pair that is not here is refused.
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


class _Model:
    """What the machine writes its state on, and binds its own helpers to."""

    state: State


class Lifecycle:
    """The machine alone: a state, and one method per trigger.

    Each trigger's method returns True where the state changed and False where the table ignores the trigger.

    Args:
        on_change: Called with each change, as the table's row, once the new state is set.
        on_enter: Called after that, by the state that was entered.

    Raises:
        InvalidTransition: By each trigger's method, where the table refuses it; the state is unchanged.
    """

    def __init__(
        self,
        *,
        on_change: Callable[[Transition], None] | None = None,
        on_enter: Mapping[State, Callable[[], None]] | None = None,
    ) -> None:
        self._on_change = on_change
        self._on_enter = dict(on_enter or {})
        self._model = _Model()
        self._machine = Machine(
            self._model,
            states=[{"name": state, "on_enter": self._entered} for state in State],
            transitions=[{"trigger": str(row.trigger), "source": row.source, "dest": row.dest} for row in TRANSITIONS],
            initial=State.IDLE,
            send_event=True,
            auto_transitions=False,
            queued=False,
        )

    @property
    def state(self) -> State:
        """The state it is in."""
        return self._model.state

    def fire(self, trigger: Trigger) -> bool:
        """Fire a trigger that is held in a variable; the methods below name them one by one."""
        before = self.state
        try:
            self._machine.events[str(trigger)].trigger(self._model)
        except MachineError:
            raise InvalidTransition(str(trigger), before) from None
        return self.state is not before

    def start(self) -> bool:
        """Order: idle → tunnelling."""
        return self.fire(Trigger.START)

    def stop(self) -> bool:
        """Order: from idle straight to stopped, else to stopping."""
        return self.fire(Trigger.STOP)

    def tunnel_opened(self) -> bool:
        """Observation: everything local is good and the local end is bound."""
        return self.fire(Trigger.TUNNEL_OPENED)

    def proxy_ready(self) -> bool:
        """Observation: the session can be used."""
        return self.fire(Trigger.PROXY_READY)

    def session_ended(self) -> bool:
        """Observation: the agent or the viewer ended the session in an orderly way."""
        return self.fire(Trigger.SESSION_ENDED)

    def fault_found(self) -> bool:
        """Observation: something broke."""
        return self.fire(Trigger.FAULT_FOUND)

    def closed_cleanly(self) -> bool:
        """Observation: all is released after a clean end."""
        return self.fire(Trigger.CLOSED_CLEANLY)

    def closed_after_fault(self) -> bool:
        """Observation: all is released after a fault."""
        return self.fire(Trigger.CLOSED_AFTER_FAULT)

    def _entered(self, event: EventData) -> None:
        # transitions knows Enum members by their names, so the source has to be turned back into a member.
        source = State[event.transition.source]  # type: ignore[union-attr]  # set whenever a state is entered
        row = Transition(Trigger(event.event.name), source, self.state)
        if self._on_change is not None:
            self._on_change(row)
        effect = self._on_enter.get(self.state)
        if effect is not None:
            effect()
