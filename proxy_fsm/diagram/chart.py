"""What a state machine looks like, as data: read from proxy_fsm's own table, or from anybody's machine."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from transitions import Machine

from proxy_fsm.backends import Backend
from proxy_fsm.errors import DiagramError
from proxy_fsm.states import TRANSITIONS, State, Trigger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from proxy_fsm.status import TransitionRecord

__all__ = ["LIFECYCLE", "Arrow", "Chart", "Step", "chart_of", "visited", "way_of"]


@dataclass(frozen=True, slots=True)
class Arrow:
    """One transition: ``trigger`` in ``source`` leads to ``dest``, where ``condition`` holds (empty for always)."""

    trigger: str
    source: str
    dest: str
    condition: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One change that a running machine has made.

    Attributes:
        trigger: What led to it.
        source: The state that was left.
        dest: The state that was entered.
        elapsed_s: Time spent in ``source``, in seconds.
        number: Which change it was, from 1.
    """

    trigger: str
    source: str
    dest: str
    elapsed_s: float
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A state machine.

    Attributes:
        title: Its name.
        states: Names of its states, in order.
        initial: The state it begins in; None where nothing says.
        finals: The states that it ends in.
        triggers: Names of its triggers, in order.
        orders: Those of them that a caller gives; the others are observed.
        arrows: Its transitions.
        ignored: Pairs of trigger and state of which nothing comes.
        notes: Remarks: a state, and lines about it.
    """

    title: str
    states: tuple[str, ...]
    initial: str | None
    finals: frozenset[str]
    triggers: tuple[str, ...]
    orders: frozenset[str] = frozenset()
    arrows: tuple[Arrow, ...] = ()
    ignored: frozenset[tuple[str, str]] = frozenset()
    notes: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def state_named(self, state: str | None) -> str | None:
        """Return the name of one of its states; None for none.

        Raises:
            DiagramError: There is no such state.
        """
        if state is not None and str(state) not in self.states:
            raise DiagramError(f"{self.title} has no state {state!r}; it has {', '.join(self.states)}.")
        return None if state is None else str(state)

    def label(self, arrow: Arrow) -> str:
        """Return an arrow's trigger, in capitals where it is an order, and its condition."""
        return self._shown(arrow.trigger) + (f" [{arrow.condition}]" if arrow.condition else "")

    def taken(self, way: Iterable[Step], source: str, dest: str) -> list[str]:
        """Return what to write on the arrows between two states: each step's number, trigger and the time before it."""
        return [
            f"{step.number}. {self._shown(step.trigger)} after {step.elapsed_s:.3f} s"
            for step in way
            if (step.source, step.dest) == (source, dest)
        ]

    def _shown(self, trigger: str) -> str:
        return trigger.upper() if trigger in self.orders else trigger

    def bundles(self) -> list[tuple[str, str, list[Arrow]]]:
        """Return source, destination and the arrows between them, for each two states that have any, in order."""
        bundles: dict[tuple[str, str], list[Arrow]] = {}
        for arrow in self.arrows:
            bundles.setdefault((arrow.source, arrow.dest), []).append(arrow)
        place = {state: at for at, state in enumerate(self.states)}
        ordered = sorted(bundles, key=lambda pair: (place[pair[0]], place[pair[1]]))
        return [(source, dest, bundles[source, dest]) for source, dest in ordered]


#: The package's own triggers in their order, which says more than that of their first use.
_OWN = [str(trigger) for trigger in Trigger]
_OWN_ORDERS = frozenset(str(trigger) for trigger in Trigger if trigger.is_order)
#: The lifecycle of every proxy.
LIFECYCLE = Chart(
    title="Lifecycle",
    states=tuple(map(str, State)),
    initial=str(State.IDLE),
    finals=frozenset(str(state) for state in State if state.is_final),
    triggers=tuple(_OWN),
    orders=_OWN_ORDERS,
    arrows=tuple(
        Arrow(str(row.trigger), str(row.source), str(row.dest)) for row in TRANSITIONS if row.dest is not None
    ),
    ignored=frozenset((str(row.trigger), str(row.source)) for row in TRANSITIONS if row.dest is None),
)


def way_of(history: Iterable[TransitionRecord]) -> tuple[Step, ...]:
    """Return the steps that a proxy has made, from the records of its history."""
    return tuple(
        Step(str(record.trigger), str(record.source), str(record.dest), record.elapsed_s, record.sequence)
        for record in history
    )


def visited(way: Iterable[Step]) -> frozenset[str]:
    """Return the states that a way has touched."""
    return frozenset(state for step in way for state in (step.source, step.dest))


def chart_of(machine: object) -> Chart:
    """Return the chart of a class or an object.

    Args:
        machine: One of these, a class or an object of it: a `Chart` itself; what has one as ``__chart__``, as `Proxy`
            and its subclasses have; a `Backend`: the lifecycle, with what is the backend's own, such as the first
            lines of its docstrings of ``ready`` and ``diagnose``; a ``transitions.Machine``, or anything that holds
            one in an attribute, as `Lifecycle` and its subclasses do. A class of the last two kinds is called without
            arguments to have its machine made. Its attribute ``orders`` may name the triggers that are orders of a
            caller; without it those named as in `Trigger` are told apart.

    Raises:
        DiagramError: It is nothing of that kind.
    """
    if isinstance(machine, Chart):
        return machine
    if isinstance(own := getattr(machine, "__chart__", None), Chart):
        return replace(own, title=_name_of(machine))
    if isinstance(machine, Backend) or (isinstance(machine, type) and issubclass(machine, Backend)):
        return _backend_chart(machine)
    found = _machine_of(_made(machine), _name_of(machine))
    return _machine_chart(found, _name_of(machine), getattr(machine, "orders", None))


def _name_of(machine: object) -> str:
    return machine.__name__ if isinstance(machine, type) else type(machine).__name__


def _made(machine: object) -> object:
    if not isinstance(machine, type):
        return machine
    try:
        return machine()
    except Exception as error:
        raise DiagramError(
            f"{machine.__name__} cannot be made without arguments, as drawing it needs: {type(error).__name__}: "
            f"{error}. Give it a __chart__, or name a machine that is made already."
        ) from error


def _machine_of(machine: object, name: str) -> Machine:
    if isinstance(machine, Machine):
        return machine
    for value in getattr(machine, "__dict__", {}).values():
        if isinstance(value, Machine):
            return value
    raise DiagramError(
        f"{name} is no state machine: neither a Proxy, a Backend, a Lifecycle nor a transitions.Machine, "
        "nor does it hold one in an attribute."
    )


def _machine_chart(machine: Machine, title: str, orders: Iterable[str] | None) -> Chart:
    states = {key: str(state.value if isinstance(state.value, str) else key) for key, state in machine.states.items()}
    if any(getattr(state, "states", None) for state in machine.states.values()):
        raise DiagramError(f"{title} has states within states, which are not drawn. GraphMachine of transitions can.")
    triggers = [
        name for name in machine.events if not (machine.auto_transitions and name.removeprefix("to_") in machine.states)
    ]
    rows = [
        (trigger, source, transition)
        for trigger in triggers
        for source, found in machine.events[trigger].transitions.items()
        for transition in found
    ]
    arrows = [
        Arrow(trigger, states[source], states[row.dest], _conditions(row))
        for trigger, source, row in rows
        if row.dest is not None
    ]
    left = {arrow.source for arrow in arrows}
    return Chart(
        title=title,
        states=tuple(states.values()),
        initial=None if machine.initial is None else states[_key(machine.initial)],
        finals=frozenset(
            name for key, name in states.items() if getattr(machine.states[key], "final", False) or name not in left
        ),
        triggers=tuple(sorted(triggers, key=_OWN.index) if set(triggers) <= set(_OWN) else triggers),
        orders=(_OWN_ORDERS if orders is None else frozenset(map(str, orders))) & frozenset(triggers),
        arrows=tuple(arrows),
        ignored=frozenset((trigger, states[source]) for trigger, source, row in rows if row.dest is None),
    )


def _key(state: Any) -> str:
    """Return the name by which transitions knows a state."""
    return state.name if isinstance(state, Enum) else str(state)


def _conditions(transition: Any) -> str:
    def name(condition: Any) -> str:
        words = condition.func if isinstance(condition.func, str) else getattr(condition.func, "__name__", "…")
        return words if condition.target else f"not {words}"

    return ", ".join(name(condition) for condition in transition.conditions)


def _backend_chart(backend: Backend | type[Backend]) -> Chart:
    count = backend.max_connections
    connections = "any number of connections" if count is None else f"{count} connection{'s' * (count != 1)}"
    preparing = [f"listens on {'a unix socket' if backend.listen_kind == 'unix' else 'TCP'}, for {connections}"]
    if backend.needs_display:
        preparing.append("needs an X server")
    notes = [(str(State.TUNNELLING), tuple(preparing))]
    for state, words, name in ((State.SPAWNING, "readiness", "ready"), (State.STOPPING, "causes", "diagnose")):
        if told := _first_line(backend, name):
            notes.append((str(state), (f"{words}: {told}",)))
    return replace(LIFECYCLE, title=f"{_name_of(backend)} ({backend.name})", notes=tuple(notes))


def _first_line(backend: Backend | type[Backend], name: str) -> str:
    """Return what a method's own docstring begins with; nothing where the backend leaves the method as it was."""
    method = getattr(backend if isinstance(backend, type) else type(backend), name)
    if method is getattr(Backend, name):
        return ""
    return inspect.cleandoc(method.__doc__ or "").partition("\n")[0]
