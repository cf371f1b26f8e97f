"""State machines as data to draw; and the lifecycle, from its two tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from proxy_fsm.errors import DiagramError
from proxy_fsm.states import PHASES, TRANSITIONS, PhaseTrigger, State, Trigger

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from proxy_fsm.status import TransitionRecord

__all__ = ["LIFECYCLE", "Arrow", "Chart", "Inner", "PathStep", "path_from_history", "visited"]


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
        initial: Whether that state begins in it; if it begins in several, it is in all of them at once.
        limit: The name of its time limit; empty if it has none.
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
class PathStep:
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
        initial: The state it begins in; None if it is not known.
        finals: The states that it ends in.
        triggers: Names of its triggers, in order.
        orders: Those of them that a caller fires; the others are observations.
        arrows: Its transitions.
        ignored: Pairs of trigger and state that have no effect.
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
        """Return a state and those that contain it, the outermost first."""
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
        """Return each state with the next one on the same level."""
        places = [self.states, *([inner.path for inner in self.inside(path)] for path in self.paths())]
        return {pair for place in places for pair in pairwise(place)}

    def without_phases(self) -> Chart:
        """Return the chart of its outermost states alone; arrows into or out of a phase lead to or from its state."""
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
        """Return an arrow's trigger, in capitals if it is an order, and its condition."""
        return self._shown(arrow.trigger) + (f" [{arrow.condition}]" if arrow.condition else "")

    def labels_taken(self, path: Iterable[PathStep], source: str, dest: str) -> list[str]:
        """Return what to write on the arrows between two states: each step's number, trigger and the time before it."""
        return [
            f"{step.number}. {self._shown(step.trigger)} after {step.elapsed_s:.3f} s"
            for step in path
            if (step.source, step.dest) == (source, dest)
        ]

    def _shown(self, trigger: str) -> str:
        return trigger.upper() if trigger in self.orders else trigger

    def grouped_arrows(self) -> list[tuple[str, str, list[Arrow]]]:
        """Return source, destination and the arrows between them, for each two states that have any, in order.

        An arrow that only repeats that of a state which contains its source is left out, and so are those of
        `inner_moves`.
        """
        known = set(self.arrows)
        groups: dict[tuple[str, str], list[Arrow]] = {}
        for arrow in self.arrows:
            repeats = any(replace(arrow, source=outer) in known for outer in self.around(arrow.source)[:-1])
            if not repeats and self._container(arrow) is None:
                groups.setdefault((arrow.source, arrow.dest), []).append(arrow)
        place = {path: at for at, path in enumerate(self.paths())}
        ordered = sorted(groups, key=lambda pair: (place[pair[0]], place[pair[1]]))
        return [(source, dest, groups[source, dest]) for source, dest in ordered]

    def inner_moves(self, state: str) -> list[str]:
        """Return, in words, the arrows between a state and what is inside it, or back to itself.

        There is no room to draw them where one box is inside the other.
        """
        moves = []
        for arrow in self.arrows:
            if self._container(arrow) == state:
                begin = "" if arrow.source == state else f"{arrow.source[len(state) + 1 :]}: "
                end = self.name_of(state) if arrow.dest == state else arrow.dest[len(state) + 1 :]
                moves.append(f"{begin}{self.label(arrow)} → {end}")
        return moves

    def _container(self, arrow: Arrow) -> str | None:
        """Return the end of an arrow that contains the other end; None if neither does."""
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


#: The lifecycle of every proxy.
LIFECYCLE = Chart(
    title="Lifecycle",
    states=tuple(map(str, State)),
    initial=str(State.IDLE),
    finals=frozenset(str(state) for state in State if state.is_final),
    triggers=(*map(str, Trigger), *map(str, PhaseTrigger)),
    orders=frozenset(str(trigger) for trigger in Trigger if trigger.is_order),
    arrows=tuple(_lifecycle_arrows()),
    ignored=frozenset((str(row.trigger), str(row.source)) for row in TRANSITIONS if row.dest is None),
    phases=tuple(_lifecycle_phases()),
)


def path_from_history(history: Iterable[TransitionRecord]) -> tuple[PathStep, ...]:
    """Return the steps that a proxy has made, from the records of its history."""
    return tuple(
        PathStep(str(record.trigger), str(record.source), str(record.dest), record.elapsed_s, record.sequence)
        for record in history
    )


def visited(path: Iterable[PathStep]) -> frozenset[str]:
    """Return the states along a path."""
    return frozenset(state for step in path for state in (step.source, step.dest))
