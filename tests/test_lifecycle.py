"""The lifecycle against a second copy of its table, written by hand from the design."""

from __future__ import annotations

import itertools
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_fsm.errors import InvalidTransition
from proxy_fsm.lifecycle import Lifecycle
from proxy_fsm.states import TRANSITIONS, State, Transition, Trigger

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


def at(state: State) -> Lifecycle:
    """Lead a fresh machine to a state by the shortest way."""
    ways: dict[State, tuple[Trigger, ...]] = {State.IDLE: ()}
    for _ in State:
        for (trigger, source), cell in CELLS.items():
            if State(source) in ways and cell in COLUMNS and State(cell) not in ways:
                ways[State(cell)] = (*ways[State(source)], Trigger(trigger))
    lifecycle = Lifecycle()
    for trigger in ways[state]:
        assert lifecycle.fire(trigger)
    assert lifecycle.state is state
    return lifecycle


def expected(trigger: Trigger, state: State) -> State | None:
    """Return where the hand-written table leads; None where it refuses."""
    cell = CELLS[trigger, state]
    return None if cell == "·" else state if cell == "–" else State(cell)


def test_states_and_triggers_bear_the_contracts_names_in_its_order() -> None:
    assert [str(state) for state in State] == COLUMNS
    assert {str(trigger) for trigger in Trigger} == {trigger for trigger, _ in CELLS}
    assert str(State.RUNNING) == "running"
    assert {trigger for trigger in Trigger if trigger.is_order} == {Trigger.START, Trigger.STOP}


def test_only_stopped_and_failed_are_final() -> None:
    assert {state for state in State if state.is_final} == {State.STOPPED, State.FAILED}


@pytest.mark.parametrize(("trigger", "state"), list(itertools.product(Trigger, State)))
def test_every_cell_of_the_table(trigger: Trigger, state: State) -> None:
    lifecycle = at(state)
    dest = expected(trigger, state)
    if dest is None:
        with pytest.raises(InvalidTransition) as refused:
            getattr(lifecycle, trigger)()
        assert (refused.value.trigger, refused.value.state) == (trigger, state)
        assert lifecycle.state is state
    else:
        assert getattr(lifecycle, trigger)() is (dest is not state)
        assert lifecycle.state is dest


def test_the_published_table_is_the_hand_written_one() -> None:
    listed = {(row.trigger, row.source): row.dest for row in TRANSITIONS}
    assert len(listed) == len(TRANSITIONS)
    assert all(type(row) is Transition and type(row.source) is State for row in TRANSITIONS)
    by_hand = {
        (Trigger(trigger), State(state)): State(cell) if cell != "–" else None
        for (trigger, state), cell in CELLS.items()
        if cell != "·"
    }
    assert listed == by_hand


def test_an_ignored_or_refused_trigger_tells_nobody() -> None:
    told: list[object] = []
    lifecycle = Lifecycle(on_change=told.append, on_enter=dict.fromkeys(State, lambda: told.append("entered")))
    lifecycle.stop()
    told.clear()
    lifecycle.stop()
    lifecycle.tunnel_opened()
    with pytest.raises(InvalidTransition):
        lifecycle.start()
    assert told == []


def test_a_change_is_told_before_its_effect_and_with_the_new_state_set() -> None:
    told: list[object] = []

    def changed(row: Transition) -> None:
        told.append((row, lifecycle.state))

    lifecycle = Lifecycle(on_change=changed, on_enter={State.TUNNELLING: lambda: told.append("effect")})
    lifecycle.start()
    row = Transition(Trigger.START, State.IDLE, State.TUNNELLING)
    assert told == [(row, State.TUNNELLING), "effect"]


def test_an_effect_that_raises_leaves_the_new_state() -> None:
    def broken() -> None:
        raise ValueError("broken")

    lifecycle = Lifecycle(on_enter={State.TUNNELLING: broken})
    with pytest.raises(ValueError, match="broken"):
        lifecycle.start()
    assert lifecycle.state is State.TUNNELLING


@given(st.lists(st.sampled_from(Trigger), max_size=30))
def test_any_sequence_follows_the_hand_written_table(triggers: list[Trigger]) -> None:
    lifecycle, state = Lifecycle(), State.IDLE
    for trigger in triggers:
        dest = expected(trigger, state)
        if dest is None:
            with pytest.raises(InvalidTransition):
                lifecycle.fire(trigger)
        else:
            lifecycle.fire(trigger)
            state = dest
        assert lifecycle.state is state


#: The longest way that there is, from idle to a final state, and one trigger more.
COVERING = 6


@pytest.mark.no_cover  # it repeats what others cover, and would take three times as long
def test_every_sequence_up_to_the_length_that_covers_all() -> None:
    """No sequence of orders and observations leads astray, whatever was ignored or refused on the way.

    Sequences with a common beginning share it; the machine is then set back to where they part.
    """
    told: list[Transition] = []
    met: set[tuple[Trigger, State]] = set()
    lifecycle = Lifecycle(on_change=told.append)

    def fire_each(left: int) -> None:
        state, told_before = lifecycle.state, told.copy()
        for trigger in Trigger:
            met.add((trigger, state))
            dest = expected(trigger, state) or state
            with suppress(InvalidTransition):
                lifecycle.fire(trigger)
            assert lifecycle.state is dest
            assert told == [*told_before, *([(trigger, state, dest)] if dest is not state else [])]
            if left > 1:
                fire_each(left - 1)
            lifecycle._machine.set_state(state, lifecycle._model)
            told[:] = told_before

    fire_each(COVERING)
    assert met == set(itertools.product(Trigger, State))


def test_every_state_is_reached_and_a_final_state_is_reached_from_each() -> None:
    for state in State:
        at(state)
    for state in State:
        reached, fresh = {state}, {state}
        while fresh:
            fresh = {dest for t in Trigger for s in fresh if (dest := expected(t, s)) is not None} - reached
            reached |= fresh
        assert any(end.is_final for end in reached)
