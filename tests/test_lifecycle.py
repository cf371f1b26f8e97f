"""Checks the lifecycle against a second copy of its tables, written by hand from the design."""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_fsm.errors import InvalidTransition
from proxy_fsm.lifecycle import Lifecycle
from proxy_fsm.states import (
    PHASES,
    TRANSITIONS,
    Phase,
    PhaseTransition,
    PhaseTrigger,
    State,
    Transition,
    Trigger,
)
from proxy_fsm.status import Timeouts

if TYPE_CHECKING:
    from transitions import EventData

COLUMNS = "idle        tunnelling  spawning    running     stopping    stopped     failed".split()
TABLE = """
start              tunnelling  ·           ·           ·           ·           ·           ·
tunnel_opened      ·           spawning    –           –           –           –           –
proxy_ready        ·           ·           running     –           –           –           –
session_ended      ·           ·           stopping    stopping    –           –           –
fault_found        ·           stopping    stopping    stopping    –           –           –
stop               stopped     stopping    stopping    stopping    –           –           –
closed_cleanly     ·           ·           ·           ·           stopped     –           –
closed_after_fault ·           ·           ·           ·           failed      –           –
"""
CELLS = {
    (trigger, state): cell
    for trigger, *cells in (line.split() for line in TABLE.strip().splitlines())
    for state, cell in zip(COLUMNS, cells, strict=True)
}


#: What ends each phase: state, phase, trigger, destination, and limit.
PHASE_TABLE = """
tunnelling  checking     checks_passed       binding      preflight_s
tunnelling  binding      tunnel_opened       spawning     preflight_s
spawning    launching    process_started     connecting   ready_s
spawning    connecting   channel_opened      negotiating  ready_s
spawning    negotiating  proxy_ready         running      ready_s
running     established  end_suspected       verifying    -
running     verifying    end_denied          established  ask_server_s
running     verifying    session_ended       stopping     ask_server_s
stopping    terminating  process_exited      draining     stop_grace_s
stopping    terminating  grace_over          killing      stop_grace_s
stopping    killing      process_exited      draining     kill_s
stopping    killing      kill_over           draining     kill_s
stopping    draining     drain_over          aborting     drain_s
stopping    draining     closed_cleanly      stopped      drain_s
stopping    draining     closed_after_fault  failed       drain_s
stopping    aborting     closed_cleanly      stopped      kill_s
stopping    aborting     closed_after_fault  failed       kill_s
"""
PHASE_ROWS = [line.split() for line in PHASE_TABLE.strip().splitlines()]
#: The phases of each state, in order.
PHASES_OF = {
    state: tuple(dict.fromkeys(phase for owner, phase, *_ in PHASE_ROWS if owner == state)) or (None,)
    for state in COLUMNS
}
#: Where a phase trigger leads within a state.
MOVES = {(trigger, state, phase): dest for state, phase, trigger, dest, _ in PHASE_ROWS if dest in PHASES_OF[state]}
PLACES = [(state, phase) for state, phases in PHASES_OF.items() for phase in phases]
ALL_TRIGGERS: list[Trigger | PhaseTrigger] = [*Trigger, *PhaseTrigger]

Place = tuple[str, str | None]


def expected(trigger: str, place: Place, skipped: frozenset[str] = frozenset()) -> Place | None:
    """Return the destination by the hand-written tables; None if they refuse the trigger.

    Args:
        trigger: The trigger.
        place: State and phase.
        skipped: Phases without work to do.
    """
    state, phase = place
    if (trigger, state) not in CELLS:
        dest = MOVES.get((trigger, state, phase or ""))
        return None if dest is None else (state, dest)
    cell = CELLS[trigger, state]
    if cell == "·":
        return None
    if cell == "–":
        return place
    phases = PHASES_OF[cell]
    return cell, next((each for each in phases if each not in skipped), phases[-1])


def place_of(lifecycle: Lifecycle) -> Place:
    return str(lifecycle.state), None if lifecycle.phase is None else str(lifecycle.phase)


def path_to(place: Place) -> tuple[Trigger | PhaseTrigger, ...]:
    """Return the shortest path to a place."""
    paths: dict[Place, tuple[Trigger | PhaseTrigger, ...]] = {("idle", None): ()}
    for _ in PLACES:
        for source, trigger in itertools.product(tuple(paths), ALL_TRIGGERS):
            dest = expected(trigger, source)
            if dest is not None and dest not in paths:
                paths[dest] = (*paths[source], trigger)
    return paths[place]


def at(place: Place) -> Lifecycle:
    """Return a fresh machine that was led to a place by the shortest path."""
    lifecycle = Lifecycle()
    for trigger in path_to(place):
        assert lifecycle.fire(trigger)
    assert place_of(lifecycle) == place
    return lifecycle


def test_names_of_states_phases_and_triggers_are_the_contracts() -> None:
    assert [str(state) for state in State] == COLUMNS
    assert [str(phase) for phase in Phase] == [phase for _, phase in PLACES if phase is not None]
    assert {str(trigger) for trigger in Trigger} == {trigger for trigger, _ in CELLS}
    assert {str(trigger) for trigger in PhaseTrigger} == {trigger for trigger, _, _ in MOVES}
    assert str(State.RUNNING) == "running"
    assert str(Phase.CHECKING) == "checking"
    assert {trigger for trigger in Trigger if trigger.is_order} == {Trigger.START, Trigger.STOP}


def test_only_stopped_and_failed_are_final() -> None:
    assert {state for state in State if state.is_final} == {State.STOPPED, State.FAILED}


def test_phases_of_each_state_are_in_order() -> None:
    for state in State:
        assert tuple(map(str, state.phases)) == tuple(phase for phase in PHASES_OF[state] if phase is not None)


def test_transitions_match_the_hand_written_table() -> None:
    listed = {(row.trigger, row.source): row.dest for row in TRANSITIONS}
    assert len(listed) == len(TRANSITIONS)
    assert all(type(row) is Transition and type(row.source) is State for row in TRANSITIONS)
    by_hand = {
        (Trigger(trigger), State(state)): State(cell) if cell != "–" else None
        for (trigger, state), cell in CELLS.items()
        if cell != "·"
    }
    assert listed == by_hand


def test_phases_match_the_hand_written_table() -> None:
    assert all(type(row) is PhaseTransition for row in PHASES)
    assert all(type(row.trigger) in {Trigger, PhaseTrigger} for row in PHASES)
    assert all(isinstance(row.dest, Phase | State) for row in PHASES)
    assert [[*map(str, row[:4]), row.limit or "-"] for row in PHASES] == PHASE_ROWS


def test_each_limit_is_a_field_of_timeouts() -> None:
    assert all(row.limit is None or getattr(Timeouts(), row.limit) > 0 for row in PHASES)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("trigger", ALL_TRIGGERS)
def test_each_trigger_in_each_place_follows_the_tables(trigger: Trigger | PhaseTrigger, place: Place) -> None:
    lifecycle = at(place)
    dest = expected(trigger, place)
    if dest is None:
        with pytest.raises(InvalidTransition) as refused:
            getattr(lifecycle, trigger)()
        assert (refused.value.trigger, refused.value.state) == (trigger, place[0])
        assert place_of(lifecycle) == place
    else:
        assert lifecycle.fire(trigger) is (dest != place)
        assert place_of(lifecycle) == dest


class Recording(Lifecycle):
    """Records which of its callbacks were called, and in which place the machine was."""

    def __init__(self, skipped: frozenset[str] = frozenset()) -> None:
        self.calls: list[tuple[str, Place]] = []
        self._skipped = skipped
        super().__init__()

    def has_work(self, phase: Phase) -> bool:
        return phase not in self._skipped

    def _record(self, name: str) -> None:
        self.calls.append((name, place_of(self)))


def _recording_callback(name: str) -> object:
    def callback(self: Recording, event: EventData) -> None:
        assert event.model is self
        self._record(name)

    return callback


for _state, _phase in PLACES:
    for _when in ("on_enter", "on_exit"):
        for _name in {f"{_when}_{_state}", f"{_when}_{_state}_{_phase}" if _phase else f"{_when}_{_state}"}:
            setattr(Recording, _name, _recording_callback(_name))


def test_callbacks_of_states_and_phases_are_called_in_order() -> None:
    machine = Recording()
    for trigger in ("start", "checks_passed", "tunnel_opened", "proxy_ready", "end_suspected", "stop"):
        machine.calls.clear()
        getattr(machine, trigger)()
    assert machine.calls == [
        ("on_exit_running", ("running", "verifying")),
        ("on_exit_running_verifying", ("running", "verifying")),
        ("on_enter_stopping", ("stopping", "terminating")),
        ("on_enter_stopping_terminating", ("stopping", "terminating")),
    ]
    machine.calls.clear()
    machine.grace_over()
    assert [name for name, _ in machine.calls] == ["on_exit_stopping_terminating", "on_enter_stopping_killing"]
    machine.calls.clear()
    machine.closed_cleanly()
    assert [name for name, _ in machine.calls] == [
        "on_exit_stopping",
        "on_exit_stopping_killing",
        "on_enter_stopped",
    ]


def test_ignored_or_refused_trigger_calls_no_callback() -> None:
    machine = Recording()
    machine.stop()
    machine.calls.clear()
    machine.stop()
    machine.tunnel_opened()
    with pytest.raises(InvalidTransition):
        machine.start()
    with pytest.raises(InvalidTransition):
        machine.drain_over()
    assert machine.calls == []


def test_trigger_fired_by_callback_is_handled_after_it() -> None:
    order: list[str] = []

    class Eager(Lifecycle):
        def on_enter_tunnelling(self, _: EventData) -> None:
            assert self.fire(Trigger.STOP) is False
            order.append(f"tunnelling {self.state}")

        def on_enter_stopping(self, _: EventData) -> None:
            order.append("stopping")

    Eager().start()
    assert order == ["tunnelling tunnelling", "stopping"]


def test_failing_callback_keeps_the_new_state_and_drops_its_triggers() -> None:
    class Broken(Lifecycle):
        def on_enter_tunnelling(self, _: EventData) -> None:
            self.stop()
            raise ValueError("broken")

    lifecycle = Broken()
    with pytest.raises(ValueError, match="broken"):
        lifecycle.start()
    assert lifecycle.state is State.TUNNELLING
    assert lifecycle.phase is Phase.CHECKING
    lifecycle.stop()
    assert place_of(lifecycle) == ("stopping", "terminating")


@pytest.mark.parametrize("state", [state for state in State if state.phases])
def test_state_is_entered_at_its_first_phase_with_work(state: State) -> None:
    index = {"tunnelling": 0, "spawning": 1, "running": 2, "stopping": 3}[state]
    triggers = (Trigger.START, Trigger.TUNNEL_OPENED, Trigger.PROXY_READY, Trigger.STOP)[: index + 1]
    phases = state.phases
    for count in range(len(phases) + 1):
        machine = Recording(frozenset(map(str, phases[:count])))
        for trigger in triggers:
            machine.fire(trigger)
        assert machine.phase is phases[min(count, len(phases) - 1)]


@given(st.lists(st.sampled_from(ALL_TRIGGERS), max_size=40), st.frozensets(st.sampled_from([*map(str, Phase)])))
def test_any_trigger_sequence_follows_the_hand_written_tables(
    triggers: list[Trigger | PhaseTrigger], skipped: frozenset[str]
) -> None:
    lifecycle, place = Recording(skipped), PLACES[0]
    for trigger in triggers:
        dest = expected(trigger, place, skipped)
        if dest is None:
            with pytest.raises(InvalidTransition):
                lifecycle.fire(trigger)
        else:
            lifecycle.fire(trigger)
            place = dest
        assert place_of(lifecycle) == place


@pytest.mark.no_cover  # other tests cover the same lines, and it would take three times as long
def test_every_path_through_the_machine_follows_the_tables() -> None:
    """Every trigger is fired in each place, on each path to it, whatever was ignored or refused before.

    A path visits no place more than twice, so that the number of paths is finite.
    """
    tried: set[tuple[str, Place]] = set()
    paths = 0

    def follow(path: tuple[Place, ...]) -> None:
        nonlocal paths
        here = path[-1]
        for trigger in ALL_TRIGGERS:
            lifecycle._move_to(here)
            tried.add((trigger, here))
            dest = expected(trigger, here)
            with suppress(InvalidTransition):
                lifecycle.fire(trigger)
            assert place_of(lifecycle) == (dest or here)
            if dest is not None and dest != here and path.count(dest) < 2:
                paths += 1
                follow((*path, dest))

    class Movable(Lifecycle):
        def _move_to(self, place: Place) -> None:
            self.machine.set_state("_".join(part for part in place if part is not None), self)

    lifecycle = Movable()
    follow((PLACES[0],))
    assert tried == set(itertools.product(ALL_TRIGGERS, PLACES))
    assert paths > 100


def test_final_state_is_reachable_from_each_place() -> None:
    for place in PLACES:
        at(place)
        reached, fresh = {place}, {place}
        while fresh:
            fresh = {dest for t in ALL_TRIGGERS for p in fresh if (dest := expected(t, p)) is not None} - reached
            reached |= fresh
        assert any(State(state).is_final for state, _ in reached)
