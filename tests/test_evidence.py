"""Evidence keeps the observations that matter, within bounds."""

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


def test_observation_has_the_time_it_was_made() -> None:
    before = time.monotonic()
    seen = StopOrdered()
    assert before <= seen.at <= time.monotonic()
    assert OutputLine("a line", at=3.0).at == 3.0


def test_observation_is_frozen() -> None:
    line = OutputLine("a line")
    with pytest.raises(FrozenInstanceError):
        line.text = "another"  # type: ignore[misc]


def test_fresh_evidence_is_empty() -> None:
    evidence = Evidence()
    assert evidence.last is None
    assert evidence.exited is None
    assert evidence.first(Observation) is None
    assert not evidence.saw(Observation)
    assert not evidence.saw()
    assert not evidence.said("")
    assert (evidence.ready, evidence.signalled) == (False, False)


def test_last_is_the_newest_observation_of_any_kind() -> None:
    line, exited = OutputLine("a line"), ProcessExited(0, None)
    assert Evidence(exited, line).last is line
    assert Evidence(line, exited).last is exited


def test_lines_are_kept_apart_from_other_observations() -> None:
    opened, one, two = ChannelOpened(1), OutputLine("one"), OutputLine("two")
    evidence = Evidence(one, opened, two)
    assert list(evidence.observations) == [opened]
    assert list(evidence.lines) == [one, two]


def test_first_returns_the_first_observation_of_a_kind() -> None:
    one, two = ChannelOpened(1), ChannelOpened(2)
    evidence = Evidence(AgentDataReceived(1), one, two)
    assert evidence.first(ChannelOpened) is one
    assert evidence.first(ConnectionEnded) is None


def test_first_and_saw_match_subclasses() -> None:
    failed = SpawnFailed(BackendError(EndReason.PROXY_NOT_FOUND, "It is not there."))
    evidence = Evidence(ProcessSpawned(1, "x"), failed)
    assert evidence.first(WorkerFailed) is failed
    assert evidence.saw(WorkerFailed)
    assert not Evidence(WorkerFailed(failed.error)).saw(SpawnFailed)


def test_saw_matches_any_of_several_kinds() -> None:
    evidence = Evidence(AgentDataReceived(1))
    assert evidence.saw(ChannelOpened, AgentDataReceived)
    assert not evidence.saw(ChannelOpened, ConnectionEnded)


def test_said_matches_any_of_several_texts_in_any_line() -> None:
    evidence = Evidence(OutputLine("one two"), OutputLine("three"), LinkSilent(1.0))
    assert evidence.said("wo")
    assert evidence.said("four", "hree")
    assert not evidence.said("four", "two three")
    assert not evidence.said()


def test_exited_returns_the_process_exit() -> None:
    exited = ProcessExited(None, 9)
    assert Evidence(exited, OutputLine("late")).exited is exited


def test_evidence_is_bounded_and_keeps_the_first_of_each_kind() -> None:
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


def test_lines_do_not_evict_other_observations() -> None:
    evidence = Evidence(ChannelOpened(1), *(OutputLine("x") for _ in range(1000)))
    assert len(evidence.observations) == 1
