"""Evidence holds what matters of all that was seen, and no more than it can."""

from __future__ import annotations

import time
from dataclasses import FrozenInstanceError

import pytest

from proxy_fsm.errors import BackendError
from proxy_fsm.evidence import (
    AgentDataReceived,
    ChannelOpened,
    ConnectionEnded,
    Evidence,
    LinkSilent,
    Observation,
    OutputLine,
    ProcessExited,
    ProcessSpawned,
    SpawnFailed,
    StopOrdered,
    WorkerFailed,
)
from proxy_fsm.reasons import EndReason


def test_an_observation_knows_when_it_was_made() -> None:
    before = time.monotonic()
    seen = StopOrdered()
    assert before <= seen.at <= time.monotonic()
    assert OutputLine("a line", at=3.0).at == 3.0


def test_an_observation_cannot_be_changed() -> None:
    line = OutputLine("a line")
    with pytest.raises(FrozenInstanceError):
        line.text = "another"  # type: ignore[misc]


def test_at_first_nothing_was_seen() -> None:
    evidence = Evidence()
    assert evidence.last is None
    assert evidence.exited is None
    assert evidence.first(Observation) is None
    assert not evidence.saw(Observation)
    assert not evidence.saw()
    assert not evidence.said("")
    assert (evidence.ready, evidence.signalled) == (False, False)


def test_the_last_is_the_newest_of_any_kind() -> None:
    line, exited = OutputLine("a line"), ProcessExited(0, None)
    assert Evidence(exited, line).last is line
    assert Evidence(line, exited).last is exited


def test_lines_are_kept_apart() -> None:
    opened, one, two = ChannelOpened(1), OutputLine("one"), OutputLine("two")
    evidence = Evidence(one, opened, two)
    assert list(evidence.observations) == [opened]
    assert list(evidence.lines) == [one, two]


def test_the_first_of_each_kind_is_found() -> None:
    one, two = ChannelOpened(1), ChannelOpened(2)
    evidence = Evidence(AgentDataReceived(1), one, two)
    assert evidence.first(ChannelOpened) is one
    assert evidence.first(ConnectionEnded) is None


def test_a_kind_is_found_by_a_more_general_one_too() -> None:
    failed = SpawnFailed(BackendError(EndReason.PROXY_NOT_FOUND, "It is not there."))
    evidence = Evidence(ProcessSpawned(1, "x"), failed)
    assert evidence.first(WorkerFailed) is failed
    assert evidence.saw(WorkerFailed)
    assert not Evidence(WorkerFailed(failed.error)).saw(SpawnFailed)


def test_any_of_several_kinds_will_do() -> None:
    evidence = Evidence(AgentDataReceived(1))
    assert evidence.saw(ChannelOpened, AgentDataReceived)
    assert not evidence.saw(ChannelOpened, ConnectionEnded)


def test_any_of_several_texts_in_any_line_will_do() -> None:
    evidence = Evidence(OutputLine("one two"), OutputLine("three"), LinkSilent(1.0))
    assert evidence.said("wo")
    assert evidence.said("four", "hree")
    assert not evidence.said("four", "two three")
    assert not evidence.said()


def test_the_end_of_the_program_is_at_hand() -> None:
    exited = ProcessExited(None, 9)
    assert Evidence(exited, OutputLine("late")).exited is exited


def test_what_is_held_is_bounded_and_the_first_of_each_kind_is_never_lost() -> None:
    opened, first_line = ChannelOpened(1), OutputLine("first")
    evidence = Evidence(opened, first_line)
    for number in range(10 * Evidence.KEPT):
        evidence.add(LinkSilent(float(number)))
        evidence.add(OutputLine(str(number)))
    assert len(evidence.observations) == len(evidence.lines) == Evidence.KEPT == 200
    assert evidence.lines[-1].text == str(10 * Evidence.KEPT - 1)
    assert opened not in evidence.observations
    assert evidence.first(ChannelOpened) is opened
    assert evidence.saw(ChannelOpened)
    assert evidence.first(OutputLine) is first_line
    assert not evidence.said("first")


def test_many_lines_do_not_push_other_observations_out() -> None:
    evidence = Evidence(ChannelOpened(1), *(OutputLine("x") for _ in range(1000)))
    assert len(evidence.observations) == 1
