"""What a supervisor decides, as scripts: observations and times in; effects, publications, status, deadline out."""

from __future__ import annotations

import itertools
import signal
import traceback
from datetime import timedelta
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_fsm import evidence
from proxy_fsm.backends import CommandBackend, NX3Backend
from proxy_fsm.errors import BackendError, InvalidTransition
from proxy_fsm.evidence import (
    AgentDataReceived,
    AgentEof,
    ChannelOpened,
    ChecksPassed,
    ConnectionEnded,
    DisplayLost,
    DisplayRestored,
    Evidence,
    LinkDead,
    LinkRestored,
    LinkSilent,
    LogFailed,
    Observation,
    OutputLine,
    PeerRejected,
    PreflightFinished,
    PreflightPassed,
    ProcessExited,
    ProcessSpawned,
    SessionStatusReceived,
    SessionTakenOver,
    SpawnFailed,
    StartOrdered,
    StopOrdered,
    TransportEnded,
    TunnelClosed,
    WorkerCrashed,
    WorkerFailed,
)
from proxy_fsm.reasons import EndReason
from proxy_fsm.session import SessionStatus
from proxy_fsm.states import PHASES, TRANSITIONS, Phase, State
from proxy_fsm.status import Link
from proxy_fsm.supervisor import Supervisor
from tests.helpers.script import COOKIE, LAUNCH, READY, TIMEOUTS, Judge, Script, at

CHECKING, BINDING, LAUNCHING, CONNECTING, NEGOTIATING, ESTABLISHED, VERIFYING, *LEAVING = Phase
TERMINATING, KILLING, DRAINING, ABORTING = LEAVING
UP = (CHECKING, BINDING, LAUNCHING, CONNECTING, NEGOTIATING, ESTABLISHED)
SPAWNED = ProcessSpawned(4711, "/fake/proxy")
PASSED = PreflightPassed("/fake/proxy.sock", LAUNCH)
EXITED = ProcessExited(0, None)
SILENT = LinkSilent(0.0)
CUT = TransportEnded("It was cut.")
DEAD = LinkDead(45.04)
ENDED = ConnectionEnded(1, 2, 3, 4.123456789)
NO_DISPLAY = DisplayLost("It is not there.")
SAID = "It says so."
UNSEEN_END = "The SSH connection ended."

#: How long each phase may last, and what it waits for.
LIMITS: dict[Phase, tuple[float, str]] = {
    CHECKING: (100, "the X server"),
    BINDING: (100, "the X server"),
    LAUNCHING: (200, "the proxy program's start"),
    CONNECTING: (200, "the channel to the agent"),
    NEGOTIATING: (200, "the proxy's sign that the session is established"),
    ESTABLISHED: (inf, ""),
    VERIFYING: (500, "proof that the session has ended"),
    TERMINATING: (300, "the proxy program's exit"),
    KILLING: (400, "the proxy program's exit"),
    DRAINING: (600, "the tunnel's close"),
    ABORTING: (400, "the tunnel's close"),
}


def after(*seen: Observation, **options: Any) -> Script:
    """Return the script of an established proxy that has then seen these."""
    script = at(ESTABLISHED, **options)
    script.see(*seen)
    return script


def finished(*seen: Observation) -> Script:
    """Return the script of an established proxy that these have ended."""
    script = after(*seen)
    script.finish()
    return script


def led_to(place: Phase | State) -> Script:
    """Lead one to a phase or a final state."""
    return at(place) if isinstance(place, Phase) else finished(StopOrdered() if place is State.STOPPED else CUT)


def failed(reason: EndReason, hint: str | None = None, detail: str = SAID) -> WorkerFailed:
    return WorkerFailed(BackendError(reason, detail, hint))


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


# ---- the way up ----


def test_fresh_supervisor_is_idle_and_has_no_deadline() -> None:
    script = Script()
    assert (script.status.state, script.status.phase, script.status.waiting_for) == (State.IDLE, None, "")
    assert (script.deadline_s, script.effects.calls) == (None, [])


def test_whole_life_goes_through_its_phases_in_order() -> None:
    script = Script()
    assert script.start() == ["start_preflight", "state tunnelling", "phase checking"]
    assert script.see(ChecksPassed()) == ["phase binding"]
    assert script.see(PASSED) == ["tunnel.listening", "start_proxy", "state spawning", "phase launching"]
    assert script.see(PreflightFinished()) == []
    assert script.see(SPAWNED) == ["process.spawned", "phase connecting"]
    assert script.see(ChannelOpened(1)) == ["tunnel.connected", "phase negotiating"]
    assert script.see(READY) == ["process.output", "state running", "phase established"]
    assert script.stop() == ["terminate", "state stopping", "phase terminating"]
    assert script.see(ProcessExited(None, 15)) == ["process.exited", "drain", "phase draining"]
    assert script.see(TunnelClosed()) == ["release", "state stopped"]
    assert script.effects.launched == [LAUNCH]
    assert script.path == ["start", "tunnel_opened", "proxy_ready", "stop", "closed_cleanly"]
    assert script.end == (State.STOPPED, EndReason.STOP_REQUESTED, "It was asked to stop.")


def test_state_and_phase_are_set_before_their_effect_is_called() -> None:
    script = finished(StopOrdered())
    places = dict(zip(script.effects.calls, script.effects.places, strict=True))
    assert places["start_preflight"] == (State.TUNNELLING, CHECKING)
    assert places["start_proxy"] == (State.SPAWNING, LAUNCHING)
    assert places["terminate"] == (State.STOPPING, TERMINATING)
    assert places["drain"] == places["release"] == (State.STOPPING, DRAINING)
    for state in State:
        assert places.get(f"state {state}", (state,))[0] is state


def test_phases_follow_signs_that_come_out_of_order() -> None:
    script = at(LAUNCHING)
    assert script.see(READY, ChannelOpened(1)) == ["process.output", "tunnel.connected"]
    assert script.status.phase is LAUNCHING
    rest = ["phase connecting", "phase negotiating", "state running", "phase established"]
    assert script.see(SPAWNED) == ["process.spawned", *rest]


def test_ready_sign_before_the_channel_is_kept_however_much_is_printed_since() -> None:
    script = at(CONNECTING)
    script.see(READY, *(OutputLine(f"line {number}") for number in range(Evidence.KEPT + 1)))
    assert script.status.phase is CONNECTING
    script.see(ChannelOpened(1))
    assert script.status.phase is ESTABLISHED
    assert script.judge.evidence.ready


def test_program_that_has_exited_does_not_become_ready() -> None:
    script = at(CONNECTING)
    script.see(READY)
    script.judge.error = ZeroDivisionError()  # which keeps it from leaving for the exit
    with pytest.raises(ZeroDivisionError):
        script.see(EXITED)
    script.judge.error = None
    script.see(ChannelOpened(1))
    assert script.path == ["start", "tunnel_opened", "fault_found"]


def test_listener_that_is_bound_before_the_checks_have_passed_leads_on() -> None:
    assert at(CHECKING).see(PASSED) == ["tunnel.listening", "start_proxy", "state spawning", "phase launching"]


def test_checks_that_pass_late_change_nothing() -> None:
    script = at(BINDING)
    assert script.see(ChecksPassed()) == []
    assert script.status.phase is BINDING


@pytest.mark.parametrize("phase", [LAUNCHING, ESTABLISHED, TERMINATING])
def test_listener_that_is_bound_late_changes_nothing(phase: Phase) -> None:
    script = at(phase)
    assert script.see(PreflightPassed("/late", LAUNCH)) == []
    assert (script.status.phase, script.status.listen_address) == (phase, "/fake/proxy.sock")


def test_listener_that_is_bound_while_stopping_is_not_in_the_status() -> None:
    script = at(CHECKING)
    script.stop()
    assert script.see(PASSED) == []
    assert script.status.listen_address is None


def test_limits_are_those_that_the_table_names() -> None:
    named = {row.phase: inf if row.limit is None else getattr(TIMEOUTS, row.limit) for row in PHASES}
    assert named == {phase: limit for phase, (limit, _) in LIMITS.items()}


def test_phases_that_share_a_limit_do_not_restart_it() -> None:
    assert [at(phase).deadline_s for phase in UP] == [100, 99, 200, 199, 198, None]


@pytest.mark.parametrize("phase", [VERIFYING, *LEAVING])
def test_phase_that_shares_no_limit_has_all_of_it(phase: Phase) -> None:
    assert at(phase).deadline_s == LIMITS[phase][0]


@pytest.mark.parametrize("phase", Phase)
def test_waiting_for_names_what_each_phase_lacks(phase: Phase) -> None:
    script = at(phase)
    assert script.status.waiting_for == LIMITS[phase][1]
    script.stop()
    script.finish()
    assert script.status.waiting_for == ""


def test_waiting_for_follows_the_preflight() -> None:
    script = at(CHECKING)
    script.effects.answers["preflight_step"] = "the listener"
    script.see(LinkRestored(1.0))
    assert script.status.waiting_for == "the listener"


@pytest.mark.parametrize("phase", UP[:-1])
def test_phase_that_reaches_its_limit_on_the_way_up_ends_in_start_timeout(phase: Phase) -> None:
    script = at(phase)
    script.pass_deadline()
    limit, missing = LIMITS[phase]
    what, name = ("prepared", "preflight_s") if phase in UP[:2] else ("ready", "ready_s")
    detail = f"Not {what} after {limit} s: {missing} was still missing."
    assert script.end == (State.STOPPING, EndReason.START_TIMEOUT, detail)
    assert script.path[-1] == "fault_found"
    assert name in str(script.status.hint)


def test_preflight_that_takes_too_long_says_what_to_do() -> None:
    script = at(CHECKING)
    script.pass_deadline()
    assert script.status.hint == "Look on this machine for what it waited for, or allow more time (preflight_s)."


def test_backend_is_asked_only_in_spawning_and_running() -> None:
    script = at(BINDING)
    script.see(LinkRestored(1.0))
    assert script.judge.asked == 0
    script.see(PASSED, SPAWNED)
    assert script.judge.asked == 2
    script.see(ChannelOpened(1), READY, AgentDataReceived(1))
    assert (script.judge.asked, script.status.state) == (5, State.RUNNING)
    script.stop()
    script.judge.verdict = EndReason.PEER_LOST, SAID
    script.see(OutputLine("more"))
    assert (script.judge.asked, script.status.reason) == (5, EndReason.STOP_REQUESTED)


# ---- orders ----


@pytest.mark.parametrize("place", [*Phase, State.STOPPED, State.FAILED])
def test_second_start_is_refused_with_its_name_and_the_state(place: Phase | State) -> None:
    script = led_to(place)
    before, calls = script.status, len(script.effects.calls)
    with pytest.raises(InvalidTransition) as refused:
        script.start()
    assert (refused.value.trigger, refused.value.state) == ("start", before.state)
    assert (script.status, len(script.effects.calls)) == (before, calls)


def test_stop_in_idle_is_a_clean_end_without_effects() -> None:
    script = Script()
    assert script.stop() == ["state stopped"]
    detail = "It was stopped before it was started."
    assert script.end == (State.STOPPED, EndReason.STOP_REQUESTED, detail)
    assert (script.status.hint, script.status.retryable) == (None, True)
    assert script.stop() == []
    assert len(script.status.history) == 1


def test_interrupted_stop_in_idle_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script()
    with monkeypatch.context() as patch:
        patch.setattr(script.supervisor, "fire", interrupt)
        with pytest.raises(KeyboardInterrupt):
            script.stop()
    assert script.stop() == ["state stopped"]


@pytest.mark.parametrize("phase", UP)
def test_stop_is_a_clean_end_from_each_phase(phase: Phase) -> None:
    script = at(phase)
    script.stop()
    assert script.end == (State.STOPPING, EndReason.STOP_REQUESTED, "It was asked to stop.")
    assert script.path[-1] == "stop"
    assert script.stop() == []
    script.finish()
    assert script.end == (State.STOPPED, EndReason.STOP_REQUESTED, "It was asked to stop.")
    assert script.path[-1] == "closed_cleanly"


# ---- how stopping is entered, and left ----


@pytest.mark.parametrize(
    ("phase", "seen", "transport_end", "entered", "effect"),
    [
        (ESTABLISHED, [], None, TERMINATING, "terminate"),
        (LAUNCHING, [], None, TERMINATING, "terminate"),
        (ESTABLISHED, [SILENT], None, KILLING, "kill"),
        (ESTABLISHED, [SILENT, LinkRestored(1.0)], None, TERMINATING, "terminate"),
        (ESTABLISHED, [], UNSEEN_END, KILLING, "kill"),
        (CHECKING, [], None, DRAINING, "drain"),
        (CHECKING, [SILENT], None, DRAINING, "drain"),
        (CHECKING, [], UNSEEN_END, DRAINING, "drain"),
    ],
)
def test_stopping_is_entered_at_the_first_phase_that_has_work(
    phase: Phase, seen: list[Observation], transport_end: str | None, entered: Phase, effect: str
) -> None:
    script = at(phase, transport_end=transport_end)
    script.see(*seen)
    assert script.stop() == [effect, "state stopping", f"phase {entered}"]
    assert script.deadline_s == LIMITS[entered][0]


@pytest.mark.parametrize("seen", [CUT, DEAD])
@pytest.mark.parametrize("phase", UP[2:])
def test_program_without_its_transport_is_killed_at_once(seen: Observation, phase: Phase) -> None:
    script = at(phase)
    assert script.see(seen) == ["kill", "state stopping", "phase killing"]
    assert script.judge.evidence.signalled
    assert script.see(EXITED) == ["process.exited", "drain", "phase draining", "abort", "phase aborting"]


@pytest.mark.parametrize("seen", [CUT, DEAD])
def test_stopping_is_entered_at_aborting_without_a_program_and_a_transport(seen: Observation) -> None:
    script = at(CHECKING)
    assert script.see(seen) == ["abort", "state stopping", "phase aborting"]
    assert script.deadline_s == LIMITS[ABORTING][0]


@pytest.mark.parametrize("seen", [SILENT, CUT, DEAD])
def test_link_that_fails_while_terminating_kills_the_program_at_once_and_once(seen: Observation) -> None:
    script = at(TERMINATING)
    heard = ["link.silent"] if seen is SILENT else []
    assert script.see(seen) == [*heard, "kill", "phase killing"]
    script.pass_s(1)
    assert script.see(seen) == heard
    assert (script.status.phase, script.deadline_s) == (KILLING, LIMITS[KILLING][0] - 1)
    assert script.status.reason is EndReason.STOP_REQUESTED


@pytest.mark.parametrize("seen", [CUT, DEAD])
def test_transport_that_fails_while_draining_aborts_at_once_and_once(seen: Observation) -> None:
    script = at(DRAINING)
    assert script.see(seen) == ["abort", "phase aborting"]
    assert script.see(seen) == []


@pytest.mark.parametrize("phase", [*UP, DRAINING])
def test_link_that_falls_silent_ends_nothing_by_itself(phase: Phase) -> None:
    script = at(phase)
    assert script.see(SILENT) == ["link.silent"]
    assert script.status.phase is phase


def test_each_phase_of_stopping_has_its_effect_when_the_one_before_is_over() -> None:
    script = at(ESTABLISHED, unreleased=["channel 1"])
    assert not script.judge.evidence.signalled
    assert script.stop() == ["terminate", "state stopping", "phase terminating"]
    assert script.judge.evidence.signalled
    assert script.pass_s(299) == []
    assert script.pass_s(1) == ["kill", "phase killing"]
    assert script.see(ProcessExited(None, 9)) == ["process.exited", "drain", "phase draining"]
    assert script.pass_s(600) == ["abort", "phase aborting"]
    assert script.pass_s(400) == ["abort", "release unwaited", "state stopped"]
    assert script.status.abandoned == ("channel 1",)
    assert script.deadline_s is None


@pytest.mark.parametrize("phase", [DRAINING, ABORTING])
def test_tunnel_that_closes_in_time_is_not_abandoned(phase: Phase) -> None:
    script = at(phase, unreleased=["channel 1"])
    assert "kill" not in script.effects.calls
    assert script.see(TunnelClosed()) == ["release", "state stopped"]
    assert (script.status.abandoned, script.deadline_s) == ((), None)


def test_tunnel_that_is_closed_when_the_program_exits_ends_it_at_once() -> None:
    script = at(TERMINATING)
    assert script.see(TunnelClosed()) == []
    assert script.status.waiting_for == "the proxy program's exit"
    gone = ["process.exited", "drain", "release", "phase draining", "state stopped"]
    assert script.see(ProcessExited(None, 15)) == gone
    assert script.status.signal == signal.SIGTERM


@pytest.mark.parametrize("order", list(itertools.permutations([EXITED, TunnelClosed(), PreflightFinished()])))
def test_stopping_ends_only_after_program_tunnel_and_preflight_have_ended(order: tuple[Observation, ...]) -> None:
    script = at(BINDING)
    script.see(PASSED, StopOrdered())
    for seen in order:
        assert script.status.state is State.STOPPING
        script.see(seen)
    assert script.end[:2] == (State.STOPPED, EndReason.STOP_REQUESTED)
    assert script.effects.calls.count("release") == 1


@pytest.mark.parametrize("stopped", [True, False])
def test_program_that_cannot_start_is_not_signalled_and_frees_the_rest(*, stopped: bool) -> None:
    script = at(LAUNCHING)
    if stopped:
        script.stop()
    calls = script.see(SpawnFailed(BackendError(EndReason.PROXY_NOT_FOUND, SAID)))
    assert calls == (["drain", "phase draining"] if stopped else ["drain", "state stopping", "phase draining"])
    script.see(TunnelClosed())
    assert script.end[:2] == (
        (State.STOPPED, EndReason.STOP_REQUESTED) if stopped else (State.FAILED, EndReason.PROXY_NOT_FOUND)
    )


def test_aborting_ends_at_once_if_everything_has_ended_already() -> None:
    script = after(CUT, TunnelClosed())
    calls = ["process.exited", "drain", "phase draining", "abort", "release", "phase aborting", "state failed"]
    assert script.see(EXITED) == calls


def test_program_and_tunnel_that_end_in_running_are_released_only_in_stopping() -> None:
    script = at(VERIFYING)
    assert script.see(EXITED, TunnelClosed()) == ["process.exited"]
    assert script.status.phase is VERIFYING
    closing = ["cancel_query", "drain", "release", "state stopping", "phase draining", "state stopped"]
    assert script.pass_deadline() == closing


def test_preflight_that_hangs_is_abandoned_by_the_name_of_its_step() -> None:
    script = at(CHECKING)
    script.see(StopOrdered(), TunnelClosed())
    assert script.pass_s(10_000) == ["abort", "phase aborting", "abort", "release unwaited", "state stopped"]
    assert script.status.abandoned == ("the preflight, waiting for the X server",)


@pytest.mark.parametrize("clean", [True, False])
def test_program_that_survives_sigkill_turns_a_clean_end_alone_into_stop_timeout(*, clean: bool) -> None:
    script = after(StopOrdered() if clean else NO_DISPLAY, unreleased=("channel 1",))
    before = script.end
    script.pass_s(300)
    assert script.pass_deadline() == ["drain", "phase draining"]
    assert script.end == before  # it comes with the state that it leads to
    script.pass_s(10_000)
    survived = "The proxy program (process 4711) is still there after SIGKILL."
    assert script.end == (State.FAILED, *((EndReason.STOP_TIMEOUT, survived) if clean else before[1:]))
    assert script.status.hint == (EndReason.STOP_TIMEOUT if clean else EndReason.DISPLAY_LOST).hint
    assert script.path[-1] == "closed_after_fault"
    assert script.status.abandoned == ("process 4711", "channel 1")


def test_program_that_survived_sigkill_is_not_waited_for_any_more() -> None:
    script = at(KILLING)
    script.pass_deadline()
    assert script.see(TunnelClosed()) == ["release unwaited", "state failed"]
    assert script.status.reason is EndReason.STOP_TIMEOUT


# ---- causes ----


@pytest.mark.parametrize("phase", UP)
@pytest.mark.parametrize(
    ("seen", "reason", "detail"),
    [
        (CUT, EndReason.TRANSPORT_LOST, "It was cut."),
        (DEAD, EndReason.TRANSPORT_SILENT, "The SSH server has not been heard for 45 s."),
        (LinkDead(45.06), EndReason.TRANSPORT_SILENT, "The SSH server has not been heard for 45.1 s."),
        (NO_DISPLAY, EndReason.DISPLAY_LOST, "The X server no longer answers. It is not there."),
        (
            WorkerCrashed("tunnel", ZeroDivisionError(COOKIE)),
            EndReason.INTERNAL_ERROR,
            "An internal error in the tunnel: ZeroDivisionError('<hidden>').",
        ),
    ],
)
def test_fault_ends_it_in_each_phase(phase: Phase, seen: Observation, reason: EndReason, detail: str) -> None:
    script = at(phase)
    script.see(seen)
    assert script.end == (State.STOPPING, reason, detail)
    assert script.status.retryable is None
    script.finish()
    assert script.end == (State.FAILED, reason, detail)
    assert script.path[-2:] == ["fault_found", "closed_after_fault"]


def test_first_cause_wins() -> None:
    script = after(NO_DISPLAY)
    end = script.end
    assert script.stop() == []
    script.see(CUT, failed(EndReason.LISTEN_FAILED), ProcessExited(3, None))
    assert script.end == end
    script.see(TunnelClosed())
    assert script.end == (State.FAILED, *end[1:])


def test_end_of_the_session_that_is_seen_while_stopping_leaves_the_deadline() -> None:
    script = at(TERMINATING)
    script.pass_s(1)
    assert script.see(failed(EndReason.SESSION_ENDED)) == []
    assert script.deadline_s == LIMITS[TERMINATING][0] - 1


@pytest.mark.parametrize("hint", [None, "Do this."])
@pytest.mark.parametrize("kind", [WorkerFailed, SpawnFailed, BackendError])
@pytest.mark.parametrize("phase", [CHECKING, CONNECTING])
def test_error_of_a_worker_or_a_backend_ends_it_with_its_reason(phase: Phase, kind: type, hint: str | None) -> None:
    script, error = at(phase), BackendError(EndReason.FORWARDING_DENIED, SAID, hint)
    if kind is BackendError:
        script = at(ESTABLISHED)
        script.judge.error = error
    script.see(AgentDataReceived(1) if kind is BackendError else kind(error))
    assert script.end == (State.STOPPING, EndReason.FORWARDING_DENIED, SAID)
    assert str(script.status.hint).startswith(str(hint or EndReason.FORWARDING_DENIED.hint)[:-1])
    assert not {"tunnel.refused", "internal.error"} & set(script.effects.calls)


def test_worker_that_fails_while_running_is_an_event_alone() -> None:
    script = at(ESTABLISHED)
    assert script.see(failed(EndReason.AGENT_UNREACHABLE, detail=f"It refused {COOKIE}.")) == ["tunnel.refused"]
    (event,) = script.events("tunnel.refused")
    assert event == {"level": "warning", "reason": "agent_unreachable", "detail": "It refused <hidden>."}
    assert type(event["reason"]) is str
    assert script.status.state is State.RUNNING


def test_worker_that_breaks_has_its_traceback_published_first() -> None:
    script = at(ESTABLISHED)
    assert script.see(WorkerCrashed("tunnel", ZeroDivisionError(COOKIE)))[0] == "internal.error"
    wanted = {"level": "error", "worker": "tunnel", "exception": "ZeroDivisionError: <hidden>\n"}
    assert script.events("internal.error") == [wanted]


def test_verdict_ends_it_while_the_program_lives() -> None:
    script = at(ESTABLISHED)
    assert script.judge_now(EndReason.PEER_LOST) == ["terminate", "state stopping", "phase terminating"]
    assert script.end == (State.STOPPING, EndReason.PEER_LOST, SAID)
    assert script.status.hint == EndReason.PEER_LOST.hint


def test_verdict_comes_before_the_exit() -> None:
    script = at(ESTABLISHED)
    script.judge.verdict = EndReason.VIEWER_CLOSED, SAID
    script.see(ProcessExited(9, None))
    assert script.end == (State.STOPPING, EndReason.VIEWER_CLOSED, SAID)
    assert script.path[-1] == "session_ended"


@pytest.mark.parametrize("reason", [EndReason.SESSION_ENDED, EndReason.VIEWER_CLOSED])
def test_clean_reason_that_the_table_refuses_is_an_internal_error(reason: EndReason) -> None:
    """A backend's preflight cannot say that the session has ended in order."""
    script = at(CHECKING)
    script.run(script.see, failed(reason))
    assert script.end[:2] == (State.STOPPING, EndReason.INTERNAL_ERROR)
    assert "InvalidTransition" in script.events("internal.error")[0]["exception"]
    script.finish()
    assert script.end[:2] == (State.FAILED, EndReason.INTERNAL_ERROR)


CODE = "The proxy program ended with exit code"


@pytest.mark.parametrize(
    ("lines", "exited", "reason", "detail"),
    [
        ([], ProcessExited(3, None), EndReason.PROXY_EXITED, f"{CODE} 3 and printed nothing."),
        (["one", "two"], ProcessExited(0, None), EndReason.PROXY_EXITED, f'{CODE} 0; its last line: "two".'),
        (["one", "  "], ProcessExited(1, None), EndReason.PROXY_EXITED, f'{CODE} 1; its last line: "one".'),
        (
            [],
            ProcessExited(None, None),
            EndReason.PROXY_EXITED,
            "The proxy program ended; its exit status was collected elsewhere.",
        ),
        ([], ProcessExited(None, 11), EndReason.PROXY_KILLED, "The proxy program was ended by signal SIGSEGV."),
        ([], ProcessExited(None, 99), EndReason.PROXY_KILLED, "The proxy program was ended by signal 99."),
    ],
)
def test_exit_without_a_verdict_says_how_the_program_ended(
    lines: list[str], exited: ProcessExited, reason: EndReason, detail: str
) -> None:
    script = at(LAUNCHING)
    script.see(*map(OutputLine, lines))
    assert script.see(exited) == ["process.exited", "drain", "state stopping", "phase draining"]
    assert script.end == (State.STOPPING, reason, detail)
    assert (script.status.exit_code, script.status.signal) == (exited.exit_code, exited.signal)


SECONDARY = {EndReason.NEGOTIATION_FAILED, EndReason.PEER_LOST, EndReason.SESSION_ENDED, EndReason.PROXY_EXITED}


@pytest.mark.parametrize("reason", [reason for reason in EndReason if reason is not EndReason.STOP_REQUESTED])
def test_secondary_reason_becomes_transport_lost_if_transport_is_dead(reason: EndReason) -> None:
    script = at(ESTABLISHED, transport_end=UNSEEN_END)
    script.judge_now(reason)
    wanted = (EndReason.TRANSPORT_LOST, UNSEEN_END) if reason in SECONDARY else (reason, SAID)
    assert script.end == (State.STOPPING, *wanted)


# ---- ends that are tentative until they are verified ----


def test_session_end_counts_at_once_where_nothing_is_to_be_asked() -> None:
    script = at(ESTABLISHED)
    assert script.end_session() == ["phase verifying", "terminate", "state stopping", "phase terminating"]
    assert script.end == (State.STOPPING, EndReason.SESSION_ENDED, SAID)
    assert script.path[-1] == "session_ended"


def test_session_end_is_held_while_the_display_is_in_doubt() -> None:
    script = at(ESTABLISHED, display_in_doubt=True)
    assert script.end_session() == ["phase verifying"]
    assert script.status.reason is None
    script.effects.answers["display_in_doubt"] = False
    script.see(DisplayRestored())
    assert script.end == (State.STOPPING, EndReason.SESSION_ENDED, SAID)


def test_lost_display_replaces_the_tentative_end() -> None:
    script = at(ESTABLISHED, display_in_doubt=True)
    script.end_session()
    script.see(NO_DISPLAY)
    assert script.end == (State.STOPPING, EndReason.DISPLAY_LOST, "The X server no longer answers. It is not there.")


@pytest.mark.parametrize("option", ["ask_server", "display_in_doubt"])
def test_unverified_session_end_is_committed_after_ask_server_s(option: str) -> None:
    script = at(ESTABLISHED, **{option: True})
    script.end_session()
    assert script.pass_s(499) == []
    assert script.pass_s(1)[-2:] == ["state stopping", "phase terminating"]
    assert script.end == (State.STOPPING, EndReason.SESSION_ENDED, SAID)


def test_session_end_that_is_seen_again_gets_no_more_time() -> None:
    script = at(VERIFYING)
    script.pass_s(1)
    assert script.see(AgentDataReceived(1)) == []
    assert script.deadline_s == LIMITS[VERIFYING][0] - 1


@pytest.mark.parametrize("seen", [StopOrdered(), CUT, DEAD])
def test_tentative_end_is_committed_by_any_other_cause(seen: Observation) -> None:
    script = at(VERIFYING)
    script.see(seen)
    assert script.end == (State.STOPPING, EndReason.SESSION_ENDED, SAID)
    assert script.path[-1] == "session_ended"


def test_restored_display_means_nothing_without_a_tentative_end() -> None:
    script = at(ESTABLISHED, ask_server=True)
    assert script.see(DisplayRestored()) == []
    assert script.status.phase is ESTABLISHED


def test_display_that_is_restored_while_stopping_asks_nothing() -> None:
    script = at(ESTABLISHED, ask_server=True, display_in_doubt=True)
    script.end_session()
    script.stop()
    script.effects.answers["display_in_doubt"] = False
    assert script.see(DisplayRestored()) == []


@pytest.mark.parametrize(
    ("answer", "reason", "detail"),
    [
        (SessionStatus.SUSPENDED, EndReason.SESSION_SUSPENDED, "The session was suspended on the server."),
        (SessionStatus.FINISHED, EndReason.SESSION_TERMINATED, "The session was terminated on the server."),
        (None, EndReason.SESSION_ENDED, SAID),
    ],
)
@pytest.mark.parametrize("phase", [ESTABLISHED, NEGOTIATING])
def test_server_says_which_end_it_was(
    phase: Phase, answer: SessionStatus | None, reason: EndReason, detail: str
) -> None:
    script = at(phase, ask_server=True, resumed=True)
    assert script.end_session()[0] == "query_session"
    left = ["cancel_query", "terminate", "state stopping", "phase terminating"]
    assert script.see(SessionStatusReceived(answer)) == left
    assert script.end == (State.STOPPING, reason, detail)
    assert script.status.hint == reason.hint


@pytest.mark.parametrize(
    ("client", "used", "detail"),
    [
        (
            "192.0.2.7",
            "2026-11-28T10:00:00",
            "Another client, at 192.0.2.7, has the session now, since 2026-11-28T10:00:00 (the server's time).",
        ),
        ("", "", "Another client has the session now."),
    ],
)
@pytest.mark.parametrize("phase", [ESTABLISHED, NEGOTIATING])
def test_session_that_another_client_has_was_taken_over(phase: Phase, client: str, used: str, detail: str) -> None:
    script = at(phase, ask_server=True, resumed=True)
    script.end_session()
    script.see(SessionTakenOver(client, used))
    assert script.end == (State.STOPPING, EndReason.SESSION_TAKEN_OVER, detail)
    assert script.status.hint == EndReason.SESSION_TAKEN_OVER.hint


def test_session_taken_over_after_the_end_is_known_changes_nothing() -> None:
    script = at(ESTABLISHED, ask_server=True)
    assert script.see(SessionTakenOver("192.0.2.7", "")) == []
    script.stop()
    script.see(SessionTakenOver("192.0.2.7", ""))
    assert script.end[1] is EndReason.STOP_REQUESTED


def test_server_that_says_running_denies_the_end_and_may_be_asked_again() -> None:
    script = at(VERIFYING)
    script.judge.verdict = None
    assert script.see(SessionStatusReceived(SessionStatus.RUNNING)) == ["cancel_query", "phase established"]
    assert (script.status.state, script.status.reason, script.deadline_s) == (State.RUNNING, None, None)
    assert script.judge_now(EndReason.SESSION_ENDED, "Another sign.") == ["query_session", "phase verifying"]
    assert script.deadline_s == LIMITS[VERIFYING][0]


def test_denied_end_is_not_proposed_again_until_the_connection_or_the_program_ends() -> None:
    script = at(VERIFYING)
    script.see(SessionStatusReceived(SessionStatus.RUNNING))
    assert script.end_session() == []
    assert script.status.phase is ESTABLISHED
    assert script.see(ENDED) == ["tunnel.closed", "query_session", "phase verifying"]


def test_end_that_was_denied_leaves_no_query_to_cancel() -> None:
    script = at(VERIFYING)
    script.judge.verdict = None
    script.see(SessionStatusReceived(SessionStatus.RUNNING))
    assert script.stop() == ["terminate", "state stopping", "phase terminating"]
    assert script.status.reason is EndReason.STOP_REQUESTED


@pytest.mark.parametrize("gone", [EXITED, ENDED])
def test_session_listed_as_running_is_no_denial_once_its_connection_has_ended(gone: Observation) -> None:
    """A server lists it so for a moment after its agent has disconnected: the query goes on."""
    script = at(VERIFYING)
    script.see(gone)
    assert script.see(SessionStatusReceived(SessionStatus.RUNNING)) == []
    assert script.status.phase is VERIFYING
    script.see(SessionStatusReceived(SessionStatus.SUSPENDED))
    assert script.status.reason is EndReason.SESSION_SUSPENDED


def test_server_is_queried_once_and_only_after_the_display_is_verified() -> None:
    script = at(ESTABLISHED, ask_server=True, display_in_doubt=True)
    assert script.end_session() == ["phase verifying"]
    script.effects.answers["display_in_doubt"] = False
    assert script.see(DisplayRestored()) == ["query_session"]
    assert script.see(DisplayRestored()) == []


def test_query_that_cannot_be_started_commits_the_tentative_end() -> None:
    script = at(ESTABLISHED, ask_server=True)
    script.effects.broken["query_session"] = RuntimeError("can't start new thread")
    script.end_session()
    assert script.end == (State.STOPPING, EndReason.SESSION_ENDED, SAID)
    assert script.events("internal.error") == []


@pytest.mark.parametrize("phase", [ESTABLISHED, TERMINATING])
def test_answer_that_was_not_asked_for_means_nothing(phase: Phase) -> None:
    script = at(phase, ask_server=True)
    assert script.see(SessionStatusReceived(SessionStatus.FINISHED)) == []
    assert script.status.phase is phase


def test_answer_that_comes_late_changes_nothing() -> None:
    script = at(VERIFYING)
    script.stop()
    assert script.see(SessionStatusReceived(SessionStatus.FINISHED)) == []
    script.finish()
    assert script.end == (State.STOPPED, EndReason.SESSION_ENDED, SAID)


def test_query_is_cancelled_once_and_only_where_there_is_one() -> None:
    script = at(VERIFYING)
    script.pass_s(10_000)
    assert script.effects.calls.count("cancel_query") == 1
    assert "cancel_query" not in finished(StopOrdered()).effects.calls


def test_session_end_in_spawning_is_tentative_too() -> None:
    script = at(NEGOTIATING, ask_server=True)
    assert script.end_session() == ["query_session"]
    assert (script.status.phase, script.deadline_s) == (NEGOTIATING, TIMEOUTS.ask_server_s)
    script.pass_deadline()
    assert script.end == (State.STOPPING, EndReason.SESSION_ENDED, SAID)
    assert script.path[-1] == "session_ended"


def test_hint_of_an_apparent_end_is_kept() -> None:
    script = at(NEGOTIATING)
    script.see(failed(EndReason.SESSION_ENDED, "Do it."))
    assert (script.status.reason, script.status.hint) == (EndReason.SESSION_ENDED, "Do it.")


def test_session_listed_as_running_is_no_denial_in_spawning() -> None:
    script = at(NEGOTIATING, ask_server=True)
    script.end_session()
    assert script.see(SessionStatusReceived(SessionStatus.RUNNING)) == []
    script.pass_deadline()
    assert script.end == (State.STOPPING, EndReason.SESSION_ENDED, SAID)


def test_program_that_is_ready_after_its_only_connection_has_ended_is_given_the_grace_to_exit() -> None:
    script = at(NEGOTIATING)
    script.see(ENDED, OutputLine("ready"))
    assert (script.status.phase, script.deadline_s) == (ESTABLISHED, TIMEOUTS.stop_grace_s)


@pytest.mark.parametrize("phase", UP)
def test_stop_succeeds_even_if_the_transport_cannot_be_queried(phase: Phase) -> None:
    """The question comes before the state changes: it must not keep the proxy where it is."""
    script = at(phase)
    script.effects.broken["transport_end"] = OSError("no idea")
    script.run(script.supervisor.handle, StopOrdered(), script.now)
    assert script.status.state is State.STOPPING
    script.finish()
    assert script.status.state.is_final


def test_stop_in_idle_that_is_interrupted_within_the_machine_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    script = Script()
    with monkeypatch.context() as patch:
        patch.setattr(Supervisor, "_record", interrupted)  # the machine is in its next place already
        with pytest.raises(KeyboardInterrupt):
            script.stop()
    assert script.stop() == ["state stopped"]
    assert script.end[:2] == (State.STOPPED, EndReason.STOP_REQUESTED)


def test_publication_that_is_interrupted_is_repeated() -> None:
    script = at(ESTABLISHED)
    script.effects.broken["state stopping"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        script.stop()
    script.effects.broken.clear()
    assert script.crash(KeyboardInterrupt()) == ["internal.error", "state stopping", "phase terminating"]


def test_session_end_in_spawning_counts_at_once_where_nothing_is_to_be_asked() -> None:
    assert at(NEGOTIATING).end_session() == ["terminate", "state stopping", "phase terminating"]


@pytest.mark.parametrize("phase", [LAUNCHING, CONNECTING, NEGOTIATING])
def test_ready_sign_does_not_enter_running_while_an_end_is_tentative(phase: Phase) -> None:
    script = at(phase, ask_server=True)
    script.end_session()
    script.see(SPAWNED, ChannelOpened(1), READY)
    assert script.status.phase is phase


# ---- a program that has outlived its only connection ----


def test_program_without_its_only_connection_has_stop_grace_s() -> None:
    script = at(ESTABLISHED)
    assert script.see(ENDED) == ["tunnel.closed"]
    assert (script.status.phase, script.deadline_s) == (ESTABLISHED, TIMEOUTS.stop_grace_s)
    assert script.pass_s(300) == ["phase verifying", "terminate", "state stopping", "phase terminating"]
    alone = "The connection to the agent has ended; the proxy program stayed, alone."
    assert script.end == (State.STOPPING, EndReason.SESSION_ENDED, alone)


def test_program_that_exits_in_that_time_says_why_itself() -> None:
    assert after(ENDED, ProcessExited(3, None)).status.reason is EndReason.PROXY_EXITED


def test_end_of_a_lone_program_is_verified_with_the_server() -> None:
    script = after(ENDED, ask_server=True)
    assert script.pass_deadline() == ["query_session", "phase verifying"]
    script.see(SessionStatusReceived(SessionStatus.SUSPENDED))
    assert script.status.reason is EndReason.SESSION_SUSPENDED


@pytest.mark.parametrize("most", [None, 2])
def test_one_of_several_connections_may_end(most: int | None) -> None:
    script = after(ENDED, backend=Judge(max_connections=most))
    assert (script.status.phase, script.deadline_s) == (ESTABLISHED, None)


@pytest.mark.parametrize("phase", [NEGOTIATING, VERIFYING, TERMINATING])
def test_connection_that_ends_in_another_phase_leaves_the_deadline(phase: Phase) -> None:
    script = at(phase)
    deadline_s = script.deadline_s
    assert script.see(ENDED) == ["tunnel.closed"]
    assert script.deadline_s == deadline_s


# ---- what is published ----


def test_each_record_has_its_fields_and_its_time() -> None:
    script = Script()
    for seconds, seen in [
        (1, StartOrdered()),
        (10, PASSED),
        (20, SpawnFailed(BackendError(EndReason.PROXY_NOT_STARTABLE, SAID))),
        (3, PreflightFinished()),
        (0, TunnelClosed()),
    ]:
        script.pass_s(seconds)
        script.see(seen)
    records, ended = script.effects.records, (EndReason.PROXY_NOT_STARTABLE, SAID)
    assert [(r.trigger, r.source, r.dest, r.reason, r.detail, r.elapsed_s, r.sequence) for r in records] == [
        ("start", "idle", "tunnelling", None, "", 1, 1),
        ("tunnel_opened", "tunnelling", "spawning", None, "", 10, 2),
        ("fault_found", "spawning", "stopping", *ended, 20, 3),
        ("closed_after_fault", "stopping", "failed", *ended, 3, 4),
    ]
    assert list(script.status.history) == records
    assert {(record.proxy_id, record.session) for record in records} == {("id", "alice-51")}
    times = [later.at - sooner.at for sooner, later in itertools.pairwise(records)]
    assert times == [timedelta(seconds=seconds) for seconds in (10, 20, 3)]
    assert script.status.since == records[-1].at == script.now.utc
    first, *_, last = script.events("proxy.transition")
    names = ("level", "trigger", "source", "dest", "reason", "detail", "elapsed_s", "sequence", "hint", "retryable")
    assert first == dict(zip(names[:8], ("info", "start", "idle", "tunnelling", None, "", 1, 1), strict=True))
    words = ("info", "closed_after_fault", "stopping", "failed", "proxy_not_startable", SAID, 3, 4)
    assert last == dict(zip(names, (*words, EndReason.PROXY_NOT_STARTABLE.hint, True), strict=True))


def test_each_phase_has_its_event_and_its_place_in_the_status() -> None:
    script = at(BINDING)
    assert (script.status.phase, script.status.phase_since) == (BINDING, script.now.utc)
    script.pass_s(3.1234567)
    script.see(PASSED)
    script.pass_s(2)
    script.see(SPAWNED)
    phases = [
        ("tunnelling", "checking", None, 0.0),
        ("tunnelling", "binding", "checking", 1.0),
        ("spawning", "launching", None, 0.0),
        ("spawning", "connecting", "launching", 2.0),
    ]
    names = ("level", "state", "phase", "previous", "elapsed_s")
    assert script.events("proxy.phase") == [dict(zip(names, ("debug", *phase), strict=True)) for phase in phases]
    assert (finished(CUT).status.phase, finished(CUT).status.phase_since) == (None, None)


def test_seconds_in_a_phase_are_rounded_to_microseconds() -> None:
    script = at(LAUNCHING)
    script.pass_s(3.1234567)
    script.see(SPAWNED)
    assert script.events("proxy.phase")[-1]["elapsed_s"] == 3.123457


def test_changes_that_follow_from_each_other_make_a_record_each_in_order() -> None:
    script = after(TunnelClosed(), ProcessExited(1, None))
    assert [str(record.dest) for record in script.effects.records][-2:] == ["stopping", "failed"]
    assert [record.sequence for record in script.effects.records] == [1, 2, 3, 4, 5]
    assert [call for call in script.effects.calls if "state " in call] == [
        f"state {record.dest}" for record in script.effects.records
    ]


def test_only_the_last_event_has_hint_and_retryable() -> None:
    events = finished(ProcessExited(None, 9)).events("proxy.transition")
    assert [("hint" in event, "retryable" in event) for event in events] == [(False, False)] * 4 + [(True, True)]


def test_hint_is_in_the_status_from_stopping_on() -> None:
    assert after(CUT).status.hint == finished(CUT).status.hint == EndReason.TRANSPORT_LOST.hint


@pytest.mark.parametrize(
    ("phase", "running_s", "resumed", "retryable", "hint"),
    [
        (CONNECTING, 0, False, True, "then try again"),
        (NEGOTIATING, 0, False, False, "then start a new session"),
        (NEGOTIATING, 0, True, True, "then resume the session"),
        (ESTABLISHED, 0, False, None, "then resume the session"),
        (ESTABLISHED, 100, False, True, "then resume the session"),
        (ESTABLISHED, 0, True, True, "then resume the session"),
    ],
)
def test_hint_and_retryable_follow_how_far_it_came(
    phase: Phase, running_s: float, hint: str, *, resumed: bool, retryable: bool | None
) -> None:
    script = at(phase, resumed=resumed)
    script.pass_s(running_s)
    script.see(CUT)
    assert hint in str(script.status.hint)
    script.pass_s(50)
    script.finish()
    assert (script.status.state, script.status.retryable) == (State.FAILED, retryable)


def test_detail_and_hint_are_redacted() -> None:
    script = at(CHECKING)
    script.see(failed(EndReason.LISTEN_FAILED, f"Hide {COOKIE}.", f"It holds {COOKIE}."))
    assert (script.status.detail, script.status.hint) == ("It holds <hidden>.", "Hide <hidden>.")
    assert COOKIE not in str(script.status.as_dict()) + str(script.effects.events)


def test_status_holds_what_is_seen_of_the_program() -> None:
    script = at(LAUNCHING)
    script.see(ProcessSpawned(12, "/fake/proxy"), *(OutputLine(f"line {number}") for number in range(30)))
    assert script.status.pid == 12
    assert script.status.output_tail == tuple(f"line {number}" for number in range(10, 30))


def test_status_says_since_when_the_link_is_silent() -> None:
    script = at(ESTABLISHED)
    heard_at = script.now_s - 1.23456
    script.see(LinkSilent(heard_at))
    assert (script.status.link, script.supervisor.heard_at) == (Link.SILENT, heard_at)
    script.see(LinkRestored(silent_s=4.56789))
    assert script.status.link is Link.OK
    assert script.events("link.silent") == [{"level": "warning", "silent_s": 1.235}]
    assert script.events("link.restored") == [{"level": "info", "silent_s": 4.568}]


CLOSED = {"connection": 1, "bytes_to_agent": 2, "bytes_from_agent": 3, "duration_s": 4.123457}


@pytest.mark.parametrize(
    ("seen", "name", "level", "fields"),
    [
        (PeerRejected("uid 33"), "tunnel.rejected", "warning", {"peer": "uid 33"}),
        (LogFailed("No space left."), "process.log_failed", "warning", {"detail": "No space left."}),
        (SPAWNED, "process.spawned", "info", {"pid": 4711, "executable": "/fake/proxy"}),
        (OutputLine("a line"), "process.output", "debug", {"line": "a line"}),
        (ChannelOpened(2), "tunnel.connected", "info", {"connection": 2}),
        (ProcessExited(None, 9), "process.exited", "info", {"exit_code": None, "signal": 9}),
        (ENDED, "tunnel.closed", "info", CLOSED),
    ],
)
def test_each_observation_has_its_event(seen: Observation, name: str, level: str, fields: dict[str, Any]) -> None:
    script = at(LAUNCHING)
    assert script.see(seen)[0] == name
    assert script.events(name) == [{"level": level, **fields}]
    assert script.events("tunnel.listening") == [{"level": "info", "address": "/fake/proxy.sock"}]


@pytest.mark.parametrize("seen", [AgentDataReceived(1), AgentEof(1), PreflightFinished(), TunnelClosed()])
def test_observation_that_only_the_backend_reads_has_no_event(seen: Observation) -> None:
    assert at(ESTABLISHED).see(seen) == []


# ---- bugs, of this package or of others ----


def test_crash_of_an_idle_one_is_refused_and_changes_nothing() -> None:
    script = Script()
    with pytest.raises(InvalidTransition):
        script.crash(ZeroDivisionError())
    assert script.status.state is State.IDLE
    script.see(StartOrdered(), StopOrdered())
    assert script.status.reason is EndReason.STOP_REQUESTED


@pytest.mark.parametrize("phase", [*UP, VERIFYING])
def test_crash_ends_it_with_internal_error_and_its_traceback(phase: Phase) -> None:
    script = at(phase)
    assert script.crash(ZeroDivisionError(COOKIE))[0] == "internal.error"
    detail = "An internal error: ZeroDivisionError: <hidden>."
    assert script.end == (State.STOPPING, EndReason.INTERNAL_ERROR, detail)
    assert str(script.status.hint).startswith("Report this as a bug of proxy_fsm")
    assert script.events("internal.error") == [{"level": "error", "exception": "ZeroDivisionError: <hidden>\n"}]


@pytest.mark.parametrize("place", [*LEAVING, State.STOPPED, State.FAILED])
def test_crash_while_stopping_or_after_it_is_published_and_changes_nothing(place: Phase | State) -> None:
    script = led_to(place)
    script.pass_s(1)
    before = script.status, script.deadline_s
    assert script.crash(ZeroDivisionError()) == ["internal.error"]
    assert (script.status, script.deadline_s) == before


#: The effects that are tried broken; those which break on the way into `stopping`, before there is another cause.
EFFECTS = ["start_preflight", "start_proxy", "query_session", "terminate", "kill", "drain", "abort", "release unwaited"]
EFFECTS_BEFORE = EFFECTS[:3]


@pytest.mark.parametrize("effect", [*EFFECTS, "cancel_query", "unreleased"])
def test_effect_that_raises_does_not_keep_it_from_ending_by_its_deadlines(effect: str) -> None:
    script = Script(ask_server=True)
    script.effects.broken[effect] = PermissionError("not ours")
    for seen in (StartOrdered(), PASSED, SPAWNED, ChannelOpened(1), READY):
        if script.status.state is not State.STOPPING:
            script.run(script.see, seen)
    if script.status.state is State.RUNNING:
        script.run(script.end_session)
    script.run(script.stop)
    for _ in LEAVING:
        if not script.status.state.is_final:
            script.run(script.pass_deadline)
    assert script.events("internal.error")
    assert list(script.status.history) == script.effects.records
    # The program is never seen to exit: that turns a clean end into a fault.
    wanted = EndReason.INTERNAL_ERROR if effect in EFFECTS_BEFORE else EndReason.STOP_TIMEOUT
    assert script.end[:2] == (State.FAILED, wanted)


def test_program_that_cannot_be_sent_sigterm_is_killed_after_its_grace() -> None:
    script = at(ESTABLISHED)
    script.effects.broken["terminate"] = PermissionError("not ours")
    assert script.run(script.stop) == ["terminate", "state stopping", "phase terminating", "internal.error"]
    assert script.pass_s(300) == ["kill", "phase killing"]


def test_release_that_fails_does_not_prevent_the_final_state() -> None:
    script = at(DRAINING)
    script.effects.broken["release"] = OSError("of all things")
    assert script.see(TunnelClosed()) == ["release", "internal.error", "state stopped"]
    assert script.end[:2] == (State.STOPPED, EndReason.STOP_REQUESTED)


def test_end_is_reached_even_if_unreleased_cannot_be_listed() -> None:
    script = at(ABORTING)
    script.effects.broken["unreleased"] = OSError("of all things")
    assert script.run(script.pass_deadline) == ["release", "state stopped", "internal.error"]


def test_error_after_an_error_is_published_too() -> None:
    script = at(ESTABLISHED)
    script.judge.error = ZeroDivisionError("the first")
    script.effects.broken["terminate"] = ArithmeticError("the second")
    script.run(script.see, AgentDataReceived(1))
    first, second = (event["exception"] for event in script.events("internal.error"))
    assert first == "".join(traceback.format_exception(script.judge.error))
    assert "the second" in second
    assert script.end == (State.STOPPING, EndReason.INTERNAL_ERROR, "An internal error: ZeroDivisionError: the first.")


# ---- the package's own backends ----


def test_nxproxy_that_says_that_its_session_ends_has_ended_when_it_exits() -> None:
    script = Script(backend=NX3Backend("/fake/nxproxy"))
    script.see(StartOrdered(), PASSED, PreflightFinished(), SPAWNED, ChannelOpened(1))
    script.see(OutputLine("Info: Established X server connection."))
    script.see(OutputLine("Session: Terminating session at 'now'."))
    assert script.status.state is State.RUNNING
    script.see(EXITED, TunnelClosed())
    detail = "The agent closed the session: it was suspended or terminated."
    assert script.end == (State.STOPPED, EndReason.SESSION_ENDED, detail)
    assert script.status.retryable is None


def test_viewer_of_several_connections_is_ready_with_the_first() -> None:
    backend = CommandBackend(["/fake/viewer", "{port}"], ready_when="connected", max_connections=2)
    script = Script(backend=backend)
    script.see(StartOrdered(), PASSED, SPAWNED)
    assert script.see(ChannelOpened(1))[-2:] == ["state running", "phase established"]


# ---- anything, in any order ----

_ERRORS = [BackendError(reason, SAID) for reason in EndReason if not reason.clean]
_SEEN: list[list[Observation]] = [
    [StopOrdered()],
    [ChecksPassed()],
    [PASSED],
    [PreflightFinished()],
    [SPAWNED],
    [READY, OutputLine("a line")],
    [LogFailed("No space left.")],
    [EXITED, ProcessExited(1, None), ProcessExited(None, 9), ProcessExited(None, None)],
    [PeerRejected("uid 33")],
    [ChannelOpened(1)],
    [AgentDataReceived(1)],
    [AgentEof(1)],
    [ENDED],
    [TunnelClosed()],
    [CUT],
    [LinkSilent(0.0)],
    [LinkRestored(1.0)],
    [DEAD],
    [DisplayLost("It is not there.")],
    [DisplayRestored()],
    [WorkerCrashed("tunnel", ZeroDivisionError())],
    [SessionStatusReceived(status) for status in (None, *SessionStatus)],
    [SessionTakenOver("192.0.2.7", "2026-11-28T10:00:00")],
    [WorkerFailed(error) for error in _ERRORS],
    [SpawnFailed(error) for error in _ERRORS],
]
_OBSERVATIONS = st.sampled_from(_SEEN).flatmap(st.sampled_from)
_VERDICTS = st.sampled_from([None, None, (EndReason.SESSION_ENDED, SAID), (EndReason.PEER_LOST, SAID)])
_STEPS = st.lists(st.one_of(_OBSERVATIONS, _OBSERVATIONS, st.just("deadline"), _VERDICTS, st.booleans()), max_size=40)
_MOVES = {(row.trigger, row.source, row.dest) for row in TRANSITIONS if row.dest is not None}


def test_every_kind_of_observation_is_tried() -> None:
    classes = [each for name in evidence.__all__ if isinstance(each := getattr(evidence, name), type)]
    kinds = {each for each in classes if issubclass(each, Observation)}
    assert {type(each) for same in _SEEN for each in same} == kinds - {Observation, StartOrdered}


def check(script: Script, *, crashed: bool) -> None:
    """What must hold at every moment."""
    status, history = script.status, script.status.history
    assert all((record.trigger, record.source, record.dest) in _MOVES for record in history)
    assert [State.IDLE, *(record.dest for record in history)] == [*(record.source for record in history), status.state]
    assert list(history) == script.effects.records
    assert status.phase in (status.state.phases or {None})
    limited = status.phase is not None and LIMITS[status.phase][0] < inf
    assert (script.deadline_s is not None) is limited or status.phase is ESTABLISHED
    assert (status.reason is not None) is (status.state is State.STOPPING or status.state.is_final)
    assert not status.state.is_final or status.reason is None or status.reason.clean is (status.state is State.STOPPED)
    released = "release unwaited" if status.abandoned else "release"
    assert [call for call in script.effects.calls if "release" in call] == [released] * status.state.is_final
    assert crashed or "internal.error" not in script.effects.calls


@given(phase=st.sampled_from([*UP, VERIFYING]), steps=_STEPS, dead=st.booleans(), ask_server=st.booleans())
def test_any_sequence_keeps_to_the_tables_and_ends(
    phase: Phase, steps: list[Any], *, dead: bool, ask_server: bool
) -> None:
    script, crashed = at(phase, ask_server=ask_server), False
    script.effects.answers["transport_end"] = UNSEEN_END if dead else None
    for step in steps:
        final = script.status.state.is_final
        match step:
            case Observation():
                crashed |= isinstance(step, WorkerCrashed)
                script.see(step)
            case "deadline":
                script.pass_s(1000)
            case bool(doubt):
                script.effects.answers["display_in_doubt"] = doubt
            case verdict:
                script.judge.verdict = verdict
        check(script, crashed=crashed)
        assert not final or script.status.state.is_final
    script.stop()
    script.pass_s(10_000)
    check(script, crashed=crashed)
    assert script.status.state.is_final
