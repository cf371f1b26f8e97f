"""The lifecycle as a machine: the tables of `proxy_fsm.states`, run by ``transitions``.

One flat machine holds states and phases: its places are the states without phases, and the phases of the others. A
row of `TRANSITIONS` applies in every phase of its source, and leads to the first phase of its destination that has
work to do. Nested states would express the same at five times the cost per transition (measured: 41 µs, not 8).

Nothing here does I/O, starts a thread or logs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from transitions import EventData, Machine, MachineError

from proxy_fsm.errors import InvalidTransition
from proxy_fsm.states import PHASES, TRANSITIONS, Phase, PhaseTrigger, State, Trigger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Lifecycle", "Place"]


class Place(NamedTuple):
    """A place of the machine: a state, and its phase if the state has phases."""

    state: State
    phase: Phase | None

    @property
    def name(self) -> str:
        """The name in the machine, such as ``stopped`` or ``stopping_draining``."""
        return str(self.state) if self.phase is None else f"{self.state}_{self.phase}"


def _places(state: State) -> tuple[Place, ...]:
    return tuple(Place(state, phase) for phase in state.phases or (None,))


_PLACES = {place.name: place for state in State for place in _places(state)}


class Lifecycle:
    """The bare machine: a state, a phase, and one method per trigger, such as ``Lifecycle().start()``.

    A subclass adds callbacks by defining methods with the names that ``transitions`` uses, each of which receives its
    ``EventData``: ``on_enter_running`` and ``on_exit_running`` for a state, ``on_enter_stopping_draining`` and
    ``on_exit_stopping_draining`` for a phase. The state's callback runs before the phase's, on exit too. A trigger that
    a callback fires is handled after all callbacks have returned. What a trigger returns means nothing: see `fire`.

    Attributes:
        place: Name of the current place; set by the machine.
        machine: The machine, of which this is the model.

    Raises:
        InvalidTransition: From each trigger, if the tables refuse it; state and phase are unchanged.
    """

    place: str
    trigger: Callable[[str], bool]

    start: Callable[[], bool]
    stop: Callable[[], bool]
    tunnel_opened: Callable[[], bool]
    proxy_ready: Callable[[], bool]
    session_ended: Callable[[], bool]
    fault_found: Callable[[], bool]
    closed_cleanly: Callable[[], bool]
    closed_after_fault: Callable[[], bool]

    checks_passed: Callable[[], bool]
    process_started: Callable[[], bool]
    channel_opened: Callable[[], bool]
    end_suspected: Callable[[], bool]
    end_denied: Callable[[], bool]
    process_exited: Callable[[], bool]
    grace_over: Callable[[], bool]
    kill_over: Callable[[], bool]
    drain_over: Callable[[], bool]

    def __init__(self) -> None:
        self.machine = Machine(
            self,
            model_attribute="place",
            states=[{"name": name, "on_enter": "_entered", "on_exit": "_exited"} for name in _PLACES],
            transitions=list(self._rows()),
            initial=str(State.IDLE),
            send_event=True,
            auto_transitions=False,
            queued=True,
            on_exception="_failed",
            after_state_change="_handled",
        )

    @property
    def state(self) -> State:
        """The current state."""
        return _PLACES[self.place].state

    @property
    def phase(self) -> Phase | None:
        """The current phase; None if the state has none."""
        return _PLACES[self.place].phase

    def fire(self, trigger: Trigger | PhaseTrigger) -> bool:
        """Fire a trigger given as a value.

        Returns:
            Whether state or phase changed; also False if a callback fired it, since it is then handled later.
        """
        before = self.place
        self.trigger(trigger)
        return self.place != before

    def has_work(self, phase: Phase) -> bool:  # noqa: ARG002 - a subclass uses it
        """Tell whether a phase has work to do: a state is entered at its first phase that has.

        Not called for a state's last phase, which is entered if no other has work.
        """
        return True

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Yield both tables as the rows of one flat machine."""
        for row in TRANSITIONS:
            for source in _places(row.source):
                for dest in (None,) if row.dest is None else _places(row.dest):
                    yield {
                        "trigger": str(row.trigger),
                        "source": source.name,
                        "dest": None if dest is None else dest.name,
                        "conditions": [] if dest is None else self._entry_conditions(dest),
                    }
        for ends in PHASES:
            if isinstance(ends.dest, Phase):
                source, dest = Place(ends.state, ends.phase), Place(ends.state, ends.dest)
                yield {"trigger": str(ends.trigger), "source": source.name, "dest": dest.name}

    def _entry_conditions(self, dest: Place) -> list[Callable[[EventData], bool]]:
        phase = dest.phase
        if phase is None or phase is dest.state.phases[-1]:
            return []
        return [lambda _: self.has_work(phase)]

    def _entered(self, event: EventData) -> None:
        """Call the state's callback if the state itself was entered; ``transitions`` then calls the phase's."""
        if self.phase is not None and self._source_of(event).state is not self.state:
            self._call(f"on_enter_{self.state}", event)

    def _exited(self, event: EventData) -> None:
        """Call the state's callback if the state itself is left; ``transitions`` then calls the phase's."""
        source, dest = _PLACES[self.place], _PLACES[event.transition.dest]  # type: ignore[union-attr,index]
        if source.phase is not None and dest.state is not source.state:
            self._call(f"on_exit_{source.state}", event)

    def _call(self, name: str, event: EventData) -> None:
        if (callback := getattr(self, name, None)) is not None:
            callback(event)

    def _failed(self, event: EventData) -> None:
        """Re-raise a callback's error, or raise `InvalidTransition` if the tables refuse the trigger."""
        self._handled(event)
        if isinstance(event.error, MachineError):
            raise InvalidTransition(event.event.name, self.state) from None
        raise event.error  # type: ignore[misc]  # always set when this is called

    def _handled(self, event: EventData) -> None:
        """Called after the callbacks of each trigger, also if one of them raised."""

    @staticmethod
    def _source_of(event: EventData) -> Place:
        return _PLACES[event.transition.source]  # type: ignore[union-attr]  # set when a place is entered
