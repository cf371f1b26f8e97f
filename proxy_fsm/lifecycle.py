"""The lifecycle of a proxy as a machine: the two tables of `proxy_fsm.states`, made to move.

Nothing here does I/O, starts a thread or logs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transitions import EventData, Machine, MachineError

from proxy_fsm.errors import InvalidTransition
from proxy_fsm.states import TRANSITIONS, State, Transition, Trigger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Lifecycle"]


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
