"""What a state machine looks like, as data: read from proxy_fsm's own table, or from anybody's machine."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from transitions import Machine
from transitions.core import listify

from proxy_fsm.backends import Backend
from proxy_fsm.errors import DiagramError
from proxy_fsm.lifecycle import Lifecycle
from proxy_fsm.states import PHASES, TRANSITIONS, PhaseTrigger, State, Trigger

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from proxy_fsm.status import TransitionRecord

__all__ = ["LIFECYCLE", "Arrow", "Chart", "Inner", "Step", "chart_of", "visited", "way_of"]


@dataclass(frozen=True, slots=True)
class Arrow:
    """One transition: ``trigger`` in ``source`` leads to ``dest``, where ``condition`` holds (empty for always).

    Both ends are paths: the name of a state, or ``state/phase``.
    """

    trigger: str
    source: str
    dest: str
    condition: str = ""


@dataclass(frozen=True, slots=True)
class Inner:
    """A state inside another one: a phase of it.

    Attributes:
        state: The path of the state that it is in.
        name: Its own name.
        initial: Whether that state begins in it; where it begins in several, it is in all of them at once.
        limit: What says how long it may last; empty where nothing does.
    """

    state: str
    name: str
    initial: bool = False
    limit: str = ""

    @property
    def path(self) -> str:
        """Its name in a chart, ``state/phase``, with one part more for each level below."""
        return f"{self.state}/{self.name}"


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
        states: Names of its states, in order, without those inside others.
        initial: The state it begins in; None where nothing says.
        finals: The states that it ends in.
        triggers: Names of its triggers, in order.
        orders: Those of them that a caller gives; the others are observed.
        arrows: Its transitions.
        ignored: Pairs of trigger and state of which nothing comes.
        notes: Remarks: a state, and lines about it.
        phases: The states inside others, in order.
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
    phases: tuple[Inner, ...] = ()

    def inside(self, state: str) -> tuple[Inner, ...]:
        """Return the phases of a state, in order."""
        return tuple(inner for inner in self.phases if inner.state == state)

    def around(self, path: str) -> tuple[str, ...]:
        """Return a state and those that it is in, the outermost first."""
        outer = {inner.path: inner.state for inner in self.phases}
        found = [path]
        while found[0] in outer:
            found.insert(0, outer[found[0]])
        return tuple(found)

    def name_of(self, path: str) -> str:
        """Return a state's own name."""
        around = self.around(path)
        return path if len(around) == 1 else path[len(around[-2]) + 1 :]

    def paths(self) -> list[str]:
        """Return the paths of all states, each followed by those inside it."""

        def below(path: str) -> Iterator[str]:
            yield path
            for inner in self.inside(path):
                yield from below(inner.path)

        return [path for state in self.states for path in below(state)]

    def state_named(self, state: str | None) -> str | None:
        """Return the path of one of its states, from ``state`` or ``state/phase``; None for none.

        Raises:
            DiagramError: There is no such state, or it has no such phase.
        """
        paths = self.paths()
        if state is None or str(state) in paths:
            return None if state is None else str(state)
        outer = str(state).rpartition("/")[0]
        while outer and outer not in paths:
            outer = outer.rpartition("/")[0]
        if not outer:
            raise DiagramError(f"{self.title} has no state {state!r}; it has {', '.join(self.states)}.")
        there = ", ".join(inner.name for inner in self.inside(outer)) or "none"
        raise DiagramError(f"State {outer!r} has no phase {str(state)[len(outer) + 1 :]!r}; it has {there}.")

    def main_story(self) -> set[tuple[str, str]]:
        """Return each state with the one that comes next in the same place."""
        places = [self.states, *([inner.path for inner in self.inside(path)] for path in self.paths())]
        return {pair for place in places for pair in pairwise(place)}

    def without_phases(self) -> Chart:
        """Return the chart of its outermost states alone; what leads into or out of a phase leads to its state."""
        if not self.phases:
            return self

        def lifted(arrow: Arrow) -> Arrow:
            return replace(arrow, source=self.around(arrow.source)[0], dest=self.around(arrow.dest)[0])

        outward = [
            lifted(arrow)
            for arrow in self.arrows
            if lifted(arrow) == arrow or lifted(arrow).source != lifted(arrow).dest
        ]
        ignored = frozenset(pair for pair in self.ignored if pair[1] in self.states)
        used = {arrow.trigger for arrow in outward} | {trigger for trigger, _ in ignored}
        return replace(
            self,
            initial=None if self.initial is None else self.around(self.initial)[0],
            finals=self.finals & frozenset(self.states),
            triggers=tuple(trigger for trigger in self.triggers if trigger in used),
            arrows=tuple(dict.fromkeys(outward)),
            ignored=ignored,
            notes=tuple(note for note in self.notes if note[0] in self.states),
            phases=(),
        )

    def label(self, arrow: Arrow) -> str:
        """Return an arrow's trigger, in capitals where it is an order, and its condition."""
        return self._shown(arrow.trigger) + (f" [{arrow.condition}]" if arrow.condition else "")

    def labels_taken(self, way: Iterable[Step], source: str, dest: str) -> list[str]:
        """Return what to write on the arrows between two states: each step's number, trigger and the time before it."""
        return [
            f"{step.number}. {self._shown(step.trigger)} after {step.elapsed_s:.3f} s"
            for step in way
            if (step.source, step.dest) == (source, dest)
        ]

    def _shown(self, trigger: str) -> str:
        return trigger.upper() if trigger in self.orders else trigger

    def grouped_arrows(self) -> list[tuple[str, str, list[Arrow]]]:
        """Return source, destination and the arrows between them, for each two states that have any, in order.

        An arrow that only repeats one of a state around its source is left out, and so are those of `inner_moves`.
        """
        said = set(self.arrows)
        groups: dict[tuple[str, str], list[Arrow]] = {}
        for arrow in self.arrows:
            repeats = any(replace(arrow, source=outer) in said for outer in self.around(arrow.source)[:-1])
            if not repeats and self._whole(arrow) is None:
                groups.setdefault((arrow.source, arrow.dest), []).append(arrow)
        place = {path: at for at, path in enumerate(self.paths())}
        ordered = sorted(groups, key=lambda pair: (place[pair[0]], place[pair[1]]))
        return [(source, dest, groups[source, dest]) for source, dest in ordered]

    def inner_moves(self, state: str) -> list[str]:
        """Return, in words, the arrows between a state and what is inside it, or back to itself.

        They have no room between two boxes, of which one is in the other.
        """
        moves = []
        for arrow in self.arrows:
            if self._whole(arrow) == state:
                begin = "" if arrow.source == state else f"{arrow.source[len(state) + 1 :]}: "
                end = self.name_of(state) if arrow.dest == state else arrow.dest[len(state) + 1 :]
                moves.append(f"{begin}{self.label(arrow)} → {end}")
        return moves

    def _whole(self, arrow: Arrow) -> str | None:
        """Return the end of an arrow that has the other one in it; None where neither has."""
        for whole, part in ((arrow.source, arrow.dest), (arrow.dest, arrow.source)):
            if self.inside(whole) and whole in self.around(part):
                return whole
        return None


def _lifecycle_phases() -> Iterator[Inner]:
    limits = {(row.state, row.phase): row.limit for row in PHASES}
    for state in State:
        for phase in state.phases:
            yield Inner(str(state), str(phase), phase is state.phases[0], limits[state, phase] or "")


def _lifecycle_arrows() -> Iterator[Arrow]:
    for change in TRANSITIONS:
        if change.dest is not None:
            yield Arrow(str(change.trigger), str(change.source), str(change.dest))
    for row in PHASES:
        dest = str(row.dest) if isinstance(row.dest, State) else f"{row.state}/{row.dest}"
        yield Arrow(str(row.trigger), f"{row.state}/{row.phase}", dest)


#: The package's own triggers in their order, which says more than that of their first use.
_OWN = [*map(str, Trigger), *map(str, PhaseTrigger)]
_OWN_ORDERS = frozenset(str(trigger) for trigger in Trigger if trigger.is_order)
#: The lifecycle of every proxy.
LIFECYCLE = Chart(
    title="Lifecycle",
    states=tuple(map(str, State)),
    initial=str(State.IDLE),
    finals=frozenset(str(state) for state in State if state.is_final),
    triggers=tuple(_OWN),
    orders=_OWN_ORDERS,
    arrows=tuple(_lifecycle_arrows()),
    ignored=frozenset((str(row.trigger), str(row.source)) for row in TRANSITIONS if row.dest is None),
    phases=tuple(_lifecycle_phases()),
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
            and its subclasses have; a `Lifecycle`; a `Backend`: the lifecycle, with what is the backend's own, such as
            the first lines of its docstrings of ``ready`` and ``diagnose``; a ``transitions.Machine`` or
            ``HierarchicalMachine``, or anything that holds one in an attribute. A class of this last kind is called
            without arguments to have its machine made. Its attribute ``orders`` may name the triggers that are orders
            of a caller; without it those named as in `Trigger` are told apart.

    Raises:
        DiagramError: It is nothing of that kind.
    """
    if isinstance(machine, Chart):
        return machine
    if isinstance(own := getattr(machine, "__chart__", None), Chart):
        return replace(own, title=_name_of(machine))
    if isinstance(machine, Lifecycle) or (isinstance(machine, type) and issubclass(machine, Lifecycle)):
        return replace(LIFECYCLE, title=_name_of(machine))
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
    separator = getattr(machine.state_cls, "separator", "/")  # a flat machine has none, and no need of it
    paths, phases = _states_of(machine, separator)
    rows = [
        (trigger, prefix + source, prefix, transition)
        for scope, prefix in _scopes(machine, separator)
        for trigger, event in scope.events.items()
        if not (machine.auto_transitions and trigger.startswith("to_") and prefix + trigger[len("to_") :] in paths)
        for source, found in event.transitions.items()
        for transition in found
    ]
    if isinstance(machine.initial, list):
        raise DiagramError(f"{title} begins in several states at once: put a state around them, and it can be drawn.")
    try:
        arrows = [
            Arrow(trigger, paths[source], paths[prefix + row.dest], _conditions(row))
            for trigger, source, prefix, row in rows
            if row.dest is not None
        ]
        initial = None if machine.initial is None else paths[_key(machine.initial)]
    except KeyError as error:
        raise DiagramError(f"{title} names the state {error}, which is none of its own.") from error
    triggers = list(dict.fromkeys(trigger for trigger, *_ in rows))
    chart = Chart(
        title=title,
        states=tuple(path for key, path in paths.items() if key in machine.states),
        initial=initial,
        finals=frozenset(),
        triggers=tuple(sorted(triggers, key=_OWN.index) if set(triggers) <= set(_OWN) else triggers),
        orders=(_OWN_ORDERS if orders is None else frozenset(map(str, orders))) & frozenset(triggers),
        arrows=tuple(arrows),
        ignored=frozenset((trigger, paths[source]) for trigger, source, _, row in rows if row.dest is None),
        phases=tuple(phases),
    )
    marked = {paths[prefix + key] for scope, prefix in _scopes(machine, separator) for key in _finals_of(scope)}
    return replace(chart, finals=frozenset(marked | _ends(chart)))


def _scopes(machine: Any, separator: str) -> Iterator[tuple[Any, str]]:
    """Yield the machine and each state that has states inside, and what their names begin with."""
    pending = [(machine, "")]
    while pending:
        scope, prefix = pending.pop(0)
        yield scope, prefix
        inner = [(state, f"{prefix}{key}{separator}") for key, state in scope.states.items()]
        pending = [each for each in inner if getattr(each[0], "states", None)] + pending


def _states_of(machine: Any, separator: str) -> tuple[dict[str, str], list[Inner]]:
    """Return the paths of all states, by the names that transitions has for them, and those inside others."""
    paths: dict[str, str] = {}
    phases = []
    for scope, prefix in _scopes(machine, separator):
        outer = paths.get(prefix.removesuffix(separator)) if prefix else None
        begin = [] if outer is None else [_key(each).partition(separator)[0] for each in listify(scope.initial)]
        for key, state in scope.states.items():
            name = str(state.value if isinstance(state.value, str) else key)
            paths[prefix + key] = name if outer is None else f"{outer}/{name}"
            if outer is not None:
                phases.append(Inner(outer, name, key in begin))
    return paths, phases


def _finals_of(scope: Any) -> list[str]:
    return [key for key, state in scope.states.items() if getattr(state, "final", False)]


def _ends(chart: Chart) -> set[str]:
    """Return the states that nothing leaves: neither them, nor what is in them, nor what they are in."""
    sources = {arrow.source for arrow in chart.arrows}
    left = {path for source in sources for path in chart.around(source)}
    return {path for path in chart.paths() if path not in left and sources.isdisjoint(chart.around(path))}


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
