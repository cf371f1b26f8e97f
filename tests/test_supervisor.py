"""What a supervisor decides, as scripts: observations and times in; effects, publications, status, deadline out."""

from __future__ import annotations

import itertools
import signal
from datetime import timedelta
from math import inf
from typing import TYPE_CHECKING, Any

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
from tests.helpers.script import COOKIE, LAUNCH, READY, TIMEOUTS, Judge, Script

if TYPE_CHECKING:
    from collections.abc import Callable

UP = (Phase.CHECKING, Phase.BINDING, Phase.LAUNCHING, Phase.CONNECTING, Phase.NEGOTIATING, Phase.ESTABLISHED)
#: The phases in which everything may end it; in `VERIFYING` an end is on its way already.
ENDABLE = UP
WITH_PROGRAM = UP[2:]
SPAWNED = ProcessSpawned(4711, "/fake/proxy")
PASSED = PreflightPassed("/fake/proxy.sock", LAUNCH)
EXITED = ProcessExited(0, None)
CUT = TransportEnded("It was cut.")
DEAD = LinkDead(45.04)
ENDED = ConnectionEnded(1, 2, 3, 4.123456789)
SAID = "It says so."


def established(**options: Any) -> Script:
    return Script(**options).lead_to(Phase.ESTABLISHED)


def verifying(**options: Any) -> Script:
    return Script(ask_server=True, **options).lead_to(Phase.VERIFYING)


def in_stopping(phase: Phase, **options: Any) -> Script:
    """Stop an established proxy, and lead it on to a phase of ``stopping``."""
    script = established(**options)
    script.stop()
    while script.status.phase is not phase:
        if script.status.phase is Phase.TERMINATING and phase is not Phase.KILLING:
            script.see(EXITED)
        else:
            script.pass_deadline()
    return script


def at(state: State) -> Script:
    """Lead one to a state; a final one with everything released."""
    match state:
        case State.IDLE:
            return Script()
        case State.TUNNELLING:
            return Script().lead_to(Phase.CHECKING)
        case State.SPAWNING:
            return Script().lead_to(Phase.LAUNCHING)
        case State.RUNNING:
            return established()
        case State.STOPPING:
            return in_stopping(Phase.TERMINATING)
    script = established()
    script.see(StopOrdered() if state is State.STOPPED else CUT, EXITED, TunnelClosed())
    assert script.status.state is state
    return script


# ---- the way up ----


def test_fresh_supervisor_is_idle_and_has_no_deadline() -> None:
    script = Script()
    assert script.place == (State.IDLE, None)
    assert (script.deadline_s, script.status.waiting_for, script.effects.calls) == (None, "", [])


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
    script = at(State.STOPPED)
    seen = {name: (state, phase) for name, state, phase in script.effects.seen_at_call}
    assert seen["start_preflight"] == (State.TUNNELLING, Phase.CHECKING)
    assert seen["start_proxy"] == (State.SPAWNING, Phase.LAUNCHING)
    assert seen["terminate"] == (State.STOPPING, Phase.TERMINATING)
    assert seen["drain"] == seen["release"] == (State.STOPPING, Phase.DRAINING)


def test_phases_follow_signs_that_come_out_of_order() -> None:
    script = Script().lead_to(Phase.LAUNCHING)
    assert script.see(READY) == ["process.output"]
    assert script.see(ChannelOpened(1)) == ["tunnel.connected"]
    assert script.place == (State.SPAWNING, Phase.LAUNCHING)
    rest = ["phase connecting", "phase negotiating", "state running", "phase established"]
    assert script.see(SPAWNED) == ["process.spawned", *rest]


def test_ready_sign_before_the_channel_is_kept_however_much_is_printed_since() -> None:
    script = Script().lead_to(Phase.CONNECTING)
    script.see(READY, *(OutputLine(f"line {number}") for number in range(Evidence.KEPT + 1)))
    assert script.place == (State.SPAWNING, Phase.CONNECTING)
    script.see(ChannelOpened(1))
    assert script.place == (State.RUNNING, Phase.ESTABLISHED)
    assert script.judge.evidence.ready


def test_program_that_has_exited_does_not_become_ready() -> None:
    script = Script(ask_server=True).lead_to(Phase.NEGOTIATING)
    script.judge.verdict = EndReason.SESSION_ENDED, SAID
    script.see(EXITED, READY)
    assert script.place == (State.SPAWNING, Phase.NEGOTIATING)
    script = Script().lead_to(Phase.NEGOTIATING)
    script.see(ProcessExited(1, None), READY)
    assert "proxy_ready" not in script.path


def test_listener_that_is_bound_before_the_checks_have_passed_leads_on() -> None:
    script = Script().lead_to(Phase.CHECKING)
    assert script.see(PASSED) == ["tunnel.listening", "start_proxy", "state spawning", "phase launching"]


def test_checks_that_pass_late_change_nothing() -> None:
    script = Script().lead_to(Phase.BINDING)
    assert script.see(ChecksPassed()) == []
    assert script.place == (State.TUNNELLING, Phase.BINDING)


@pytest.mark.parametrize("state", [State.SPAWNING, State.RUNNING, State.STOPPING])
def test_listener_that_is_bound_late_changes_nothing(state: State) -> None:
    script = at(state)
    address = script.status.listen_address
    assert script.see(PreflightPassed("/late", LAUNCH)) == []
    assert script.status.state is state
    assert script.status.listen_address == address == "/fake/proxy.sock"


def test_listener_that_is_bound_while_stopping_is_not_in_the_status() -> None:
    script = at(State.TUNNELLING)
    script.stop()
    assert script.see(PASSED) == []
    assert script.status.listen_address is None


LIMITS = {
    Phase.CHECKING: 100,
    Phase.BINDING: 100,
    Phase.LAUNCHING: 200,
    Phase.CONNECTING: 200,
    Phase.NEGOTIATING: 200,
    Phase.ESTABLISHED: inf,
    Phase.VERIFYING: 500,
    Phase.TERMINATING: 300,
    Phase.KILLING: 400,
    Phase.DRAINING: 600,
    Phase.ABORTING: 400,
}


def test_each_phase_has_the_limit_that_the_table_names() -> None:
    named = {row.phase: inf if row.limit is None else getattr(TIMEOUTS, row.limit) for row in PHASES}
    assert named == LIMITS


def test_phases_that_share_a_limit_do_not_restart_it() -> None:
    script, left = Script(), []
    for phase in UP:
        script = Script().lead_to(phase)
        left.append(script.deadline_s)
    assert left == [100, 99, 200, 199, 198, None]


@pytest.mark.parametrize("phase", [Phase.TERMINATING, Phase.KILLING, Phase.DRAINING, Phase.ABORTING])
def test_phases_of_stopping_have_a_limit_of_their_own(phase: Phase) -> None:
    assert in_stopping(phase).deadline_s == LIMITS[phase]


def test_verifying_has_ask_server_s() -> None:
    assert verifying().deadline_s == LIMITS[Phase.VERIFYING]


WAITING_FOR = {
    Phase.CHECKING: "the X server",
    Phase.BINDING: "the X server",
    Phase.LAUNCHING: "the proxy program's start",
    Phase.CONNECTING: "the channel to the agent",
    Phase.NEGOTIATING: "the proxy's sign that the session is established",
    Phase.ESTABLISHED: "",
    Phase.VERIFYING: "proof that the session has ended",
    Phase.TERMINATING: "the proxy program's exit",
    Phase.KILLING: "the proxy program's exit",
    Phase.DRAINING: "the tunnel's close",
    Phase.ABORTING: "the tunnel's close",
}


@pytest.mark.parametrize(("phase", "missing"), WAITING_FOR.items())
def test_waiting_for_names_what_each_phase_lacks(phase: Phase, missing: str) -> None:
    script = verifying() if phase is Phase.VERIFYING else Script() if phase in UP else in_stopping(phase)
    if phase in UP:
        script.lead_to(phase)
    assert script.status.waiting_for == missing


def test_waiting_for_follows_the_preflight_and_ends_with_the_proxy() -> None:
    script = Script().lead_to(Phase.CHECKING)
    script.effects.answers["preflight_step"] = "the listener"
    script.see(LinkRestored(1.0))
    assert script.status.waiting_for == "the listener"
    assert at(State.STOPPED).status.waiting_for == ""


@pytest.mark.parametrize(
    ("phase", "detail", "hint"),
    [
        (phase, f"Not prepared after 100 s: {WAITING_FOR[phase]} was still missing.", "preflight_s")
        if phase in UP[:2]
        else (phase, f"Not ready after 200 s: {WAITING_FOR[phase]} was still missing.", "ready_s")
        for phase in UP[:-1]
    ],
)
def test_phase_that_reaches_its_limit_on_the_way_up_ends_in_start_timeout(phase: Phase, detail: str, hint: str) -> None:
    script = Script().lead_to(phase)
    script.pass_deadline()
    status = script.status
    assert (status.state, status.reason, status.detail) == (State.STOPPING, EndReason.START_TIMEOUT, detail)
    assert script.path[-1] == "fault_found"
    assert status.hint is not None
    assert hint in status.hint


def test_preflight_that_takes_too_long_says_what_to_do() -> None:
    script = at(State.TUNNELLING)
    script.pass_deadline()
    wanted = "Look on this machine for what it waited for, or allow more time (preflight_s)."
    assert script.status.hint == wanted
    assert script.status.waiting_for == "the tunnel's close"


def test_backend_is_asked_in_spawning_and_running_alone() -> None:
    script = Script().lead_to(Phase.BINDING)
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


def test_second_start_is_refused_with_its_name_and_the_state() -> None:
    for state in [state for state in State if state is not State.IDLE]:
        script = at(state)
        calls = len(script.effects.calls)
        with pytest.raises(InvalidTransition) as refused:
            script.start()
        assert (refused.value.trigger, refused.value.state) == ("start", state)
        assert script.status.state is state
        assert len(script.effects.calls) == calls


def test_stop_of_an_idle_one_is_a_clean_end_without_effects() -> None:
    script = Script()
    assert script.stop() == ["state stopped"]
    status = script.status
    assert (*script.end, status.hint, status.retryable) == (
        State.STOPPED,
        EndReason.STOP_REQUESTED,
        "It was stopped before it was started.",
        None,
        True,
    )
    assert script.stop() == []
    assert len(status.history) == 1


def test_stop_of_an_idle_one_that_is_interrupted_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script()
    with monkeypatch.context() as patch:
        patch.setattr(script.supervisor, "fire", interrupt)
        with pytest.raises(KeyboardInterrupt):
            script.stop()
    assert script.stop() == ["state stopped"]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("phase", ENDABLE)
def test_stop_is_a_clean_end_from_each_phase(phase: Phase) -> None:
    script = Script().lead_to(phase)
    script.stop()
    assert script.end == (State.STOPPING, EndReason.STOP_REQUESTED, "It was asked to stop.")
    assert script.path[-1] == "stop"
    assert script.stop() == []
    script.see(PreflightFinished(), EXITED, TunnelClosed())
    assert script.end == (State.STOPPED, EndReason.STOP_REQUESTED, "It was asked to stop.")
    assert script.path[-1] == "closed_cleanly"


# ---- how stopping is entered, and left ----

ENTRIES: list[tuple[str, Callable[[], Script], Phase, list[str]]] = [
    ("with a program", established, Phase.TERMINATING, ["terminate"]),
    ("with a program in spawning", lambda: at(State.SPAWNING), Phase.TERMINATING, ["terminate"]),
    ("with a link that is silent", lambda: after(LinkSilent(0.0)), Phase.KILLING, ["kill"]),
    (
        "with a link that is heard again",
        lambda: after(LinkSilent(0.0), LinkRestored(1.0)),
        Phase.TERMINATING,
        ["terminate"],
    ),
    ("with a transport that has ended unseen", lambda: cut(established()), Phase.KILLING, ["kill"]),
    ("without a program", lambda: at(State.TUNNELLING), Phase.DRAINING, ["drain"]),
    ("without a program, with a silent link", lambda: silent(at(State.TUNNELLING)), Phase.DRAINING, ["drain"]),
]


def after(*seen: Observation) -> Script:
    script = established()
    script.see(*seen)
    return script


def cut(script: Script) -> Script:
    script.effects.answers["transport_end"] = "The SSH connection ended."
    return script


def silent(script: Script) -> Script:
    script.see(LinkSilent(0.0))
    return script


@pytest.mark.parametrize(("_", "make", "phase", "effects"), ENTRIES)
def test_stopping_is_entered_at_the_first_phase_that_has_work(
    _: str, make: Callable[[], Script], phase: Phase, effects: list[str]
) -> None:
    script = make()
    assert script.stop() == [*effects, "state stopping", f"phase {phase}"]
    assert script.deadline_s == LIMITS[phase]


@pytest.mark.parametrize("seen", [CUT, DEAD])
@pytest.mark.parametrize("phase", WITH_PROGRAM)
def test_program_without_its_transport_is_killed_at_once(seen: Observation, phase: Phase) -> None:
    script = Script().lead_to(phase)
    assert script.see(seen) == ["kill", "state stopping", "phase killing"]
    assert script.judge.evidence.signalled
    assert script.see(EXITED) == ["process.exited", "drain", "phase draining", "abort", "phase aborting"]


@pytest.mark.parametrize("seen", [CUT, DEAD])
def test_stopping_is_entered_at_aborting_without_a_program_and_a_transport(seen: Observation) -> None:
    script = at(State.TUNNELLING)
    assert script.see(seen) == ["abort", "state stopping", "phase aborting"]
    assert script.deadline_s == LIMITS[Phase.ABORTING]


def test_program_that_could_not_be_started_is_not_signalled() -> None:
    script = at(State.SPAWNING)
    assert script.see(SpawnFailed(BackendError(EndReason.PROXY_NOT_FOUND, "It is not there."))) == [
        "drain",
        "state stopping",
        "phase draining",
    ]


@pytest.mark.parametrize("seen", [LinkSilent(0.0), CUT, DEAD])
def test_link_that_fails_while_terminating_kills_the_program_at_once_and_once(seen: Observation) -> None:
    script = in_stopping(Phase.TERMINATING)
    effects = [call for call in script.see(seen) if call != "link.silent"]
    assert effects == ["kill", "phase killing"]
    script.pass_s(1)
    assert "kill" not in script.see(seen)
    assert script.deadline_s == LIMITS[Phase.KILLING] - 1
    assert script.status.reason is EndReason.STOP_REQUESTED


@pytest.mark.parametrize("seen", [CUT, DEAD])
def test_transport_that_fails_while_draining_aborts_at_once_and_once(seen: Observation) -> None:
    script = in_stopping(Phase.DRAINING)
    assert script.see(seen) == ["abort", "phase aborting"]
    assert script.see(seen) == []


def test_link_that_falls_silent_while_draining_leaves_it_its_time() -> None:
    script = in_stopping(Phase.DRAINING)
    assert script.see(LinkSilent(0.0)) == ["link.silent"]
    assert script.place == (State.STOPPING, Phase.DRAINING)


@pytest.mark.parametrize("phase", UP)
def test_link_that_falls_silent_ends_nothing_by_itself(phase: Phase) -> None:
    script = Script().lead_to(phase)
    assert script.see(LinkSilent(0.0)) == ["link.silent"]
    assert script.status.phase is phase


def test_each_phase_of_stopping_has_its_effect_when_the_one_before_is_over() -> None:
    script = established(unreleased=["channel 1"])
    assert script.stop() == ["terminate", "state stopping", "phase terminating"]
    assert script.judge.evidence.signalled
    assert script.pass_s(299) == []
    assert script.pass_s(1) == ["kill", "phase killing"]
    assert script.see(ProcessExited(None, 9)) == ["process.exited", "drain", "phase draining"]
    assert script.pass_s(600) == ["abort", "phase aborting"]
    assert script.pass_s(400) == ["abort", "release", "state stopped"]
    assert script.status.abandoned == ("channel 1",)
    assert script.deadline_s is None


def test_evidence_says_that_the_program_was_not_signalled_before_it_was() -> None:
    assert not established().judge.evidence.signalled


def test_process_that_exits_in_its_grace_is_not_killed() -> None:
    script = in_stopping(Phase.TERMINATING)
    script.see(EXITED)
    script.pass_s(10_000)
    assert "kill" not in script.effects.calls


def test_tunnel_that_closes_in_time_is_not_aborted() -> None:
    script = in_stopping(Phase.DRAINING)
    assert script.see(TunnelClosed()) == ["release", "state stopped"]
    assert script.status.abandoned == ()
    assert script.deadline_s is None


def test_tunnel_that_closes_while_it_is_aborted_is_not_abandoned() -> None:
    script = in_stopping(Phase.ABORTING, unreleased=["channel 1"])
    assert script.see(TunnelClosed()) == ["release", "state stopped"]
    assert script.status.abandoned == ()


def test_tunnel_that_is_closed_when_the_program_exits_ends_it_at_once() -> None:
    script = in_stopping(Phase.TERMINATING)
    assert script.see(TunnelClosed()) == []
    assert script.status.waiting_for == "the proxy program's exit"
    calls = ["process.exited", "drain", "release", "phase draining", "state stopped"]
    assert script.see(ProcessExited(None, 15)) == calls
    assert script.status.signal == signal.SIGTERM


@pytest.mark.parametrize("order", list(itertools.permutations([EXITED, TunnelClosed(), PreflightFinished()])))
def test_program_tunnel_and_preflight_all_have_to_be_gone(order: tuple[Observation, ...]) -> None:
    script = Script().lead_to(Phase.BINDING)
    script.see(PASSED, StopOrdered())
    for seen in order:
        assert script.status.state is State.STOPPING
        script.see(seen)
    assert script.end[:2] == (State.STOPPED, EndReason.STOP_REQUESTED)
    assert script.effects.calls.count("release") == 1


def test_program_that_cannot_start_while_stopping_frees_the_rest() -> None:
    script = at(State.SPAWNING)
    script.stop()
    assert script.see(SpawnFailed(BackendError(EndReason.PROXY_NOT_FOUND, "It is not there."))) == [
        "drain",
        "phase draining",
    ]
    script.see(TunnelClosed())
    assert script.end[:2] == (State.STOPPED, EndReason.STOP_REQUESTED)


def test_what_is_gone_while_running_is_released_in_stopping_alone() -> None:
    script = verifying()
    assert script.see(EXITED) == ["process.exited"]
    assert script.see(TunnelClosed()) == []
    assert script.place == (State.RUNNING, Phase.VERIFYING)
    closing = ["cancel_query", "drain", "release", "state stopping", "phase draining", "state stopped"]
    assert script.pass_deadline() == closing


def test_preflight_that_hangs_is_abandoned_by_the_name_of_its_step() -> None:
    script = at(State.TUNNELLING)
    script.stop()
    script.see(TunnelClosed())
    assert script.pass_s(10_000) == ["abort", "phase aborting", "abort", "release", "state stopped"]
    assert script.status.abandoned == ("the preflight, waiting for the X server",)


@pytest.mark.parametrize("clean", [True, False])
def test_program_that_survives_sigkill_turns_a_clean_end_alone_into_stop_timeout(*, clean: bool) -> None:
    script = established(unreleased=("channel 1",))
    script.see(StopOrdered() if clean else DisplayLost("It is not there."))
    script.pass_s(300)
    assert script.pass_deadline() == ["drain", "phase draining"]
    assert "process 4711" in script.status.abandoned
    script.pass_s(10_000)
    reason = EndReason.STOP_TIMEOUT if clean else EndReason.DISPLAY_LOST
    survived = "The proxy program (process 4711) is still there after SIGKILL."
    detail = survived if clean else "The X server has gone. It is not there."
    assert script.end == (State.FAILED, reason, detail)
    assert script.status.hint == reason.hint
    assert script.path[-1] == "closed_after_fault"
    assert script.status.abandoned == ("process 4711", "channel 1")


def test_program_that_survived_sigkill_is_not_waited_for_any_more() -> None:
    script = in_stopping(Phase.KILLING)
    script.pass_deadline()
    assert script.see(TunnelClosed()) == ["release", "state failed"]
    assert script.status.reason is EndReason.STOP_TIMEOUT


def test_stop_timeout_is_not_in_the_status_before_the_state_that_it_leads_to() -> None:
    script = in_stopping(Phase.KILLING)
    script.pass_deadline()
    assert script.end[:2] == (State.STOPPING, EndReason.STOP_REQUESTED)


# ---- causes ----


def test_transport_that_ends_is_transport_lost() -> None:
    script = after(CUT)
    assert script.end == (State.STOPPING, EndReason.TRANSPORT_LOST, "It was cut.")


def test_link_that_stays_silent_is_transport_silent() -> None:
    script = after(DEAD)
    wanted = "The SSH server has not been heard for 45 s."
    assert script.end == (State.STOPPING, EndReason.TRANSPORT_SILENT, wanted)
    assert after(LinkDead(45.06)).end[2] == "The SSH server has not been heard for 45.1 s."


def test_display_that_goes_is_display_lost() -> None:
    script = established()
    assert script.see(DisplayLost("It is not there.")) == ["terminate", "state stopping", "phase terminating"]
    assert script.end == (State.STOPPING, EndReason.DISPLAY_LOST, "The X server has gone. It is not there.")


@pytest.mark.parametrize("phase", ENDABLE)
@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (CUT, EndReason.TRANSPORT_LOST),
        (DEAD, EndReason.TRANSPORT_SILENT),
        (DisplayLost("It is not there."), EndReason.DISPLAY_LOST),
        (WorkerCrashed("tunnel", ZeroDivisionError()), EndReason.INTERNAL_ERROR),
    ],
)
def test_fault_ends_it_in_each_phase(phase: Phase, seen: Observation, reason: EndReason) -> None:
    script = Script().lead_to(phase)
    script.see(seen)
    assert script.end[:2] == (State.STOPPING, reason)
    script.see(PreflightFinished(), EXITED, TunnelClosed())
    assert script.end[:2] == (State.FAILED, reason)
    assert script.path[-2:] == ["fault_found", "closed_after_fault"]


def test_first_cause_wins() -> None:
    script = after(DisplayLost("It is not there."))
    end = script.end
    assert script.see(StopOrdered()) == []
    script.see(CUT, WorkerFailed(BackendError(EndReason.LISTEN_FAILED, "It failed.")), ProcessExited(3, None))
    assert script.end == end
    script.see(TunnelClosed())
    assert script.end == (State.FAILED, *end[1:])


def test_end_of_the_session_that_is_seen_while_stopping_leaves_the_deadline() -> None:
    script = in_stopping(Phase.TERMINATING)
    script.pass_s(1)
    assert script.see(WorkerFailed(BackendError(EndReason.SESSION_ENDED, SAID))) == []
    assert script.deadline_s == LIMITS[Phase.TERMINATING] - 1


@pytest.mark.parametrize("hint", [None, "Do this."])
@pytest.mark.parametrize("state", [State.TUNNELLING, State.SPAWNING])
def test_worker_that_fails_before_running_ends_it_with_its_reason(state: State, hint: str | None) -> None:
    script = at(state)
    calls = script.see(WorkerFailed(BackendError(EndReason.FORWARDING_DENIED, "It is denied.", hint)))
    assert script.end == (State.STOPPING, EndReason.FORWARDING_DENIED, "It is denied.")
    assert script.status.hint == (hint or EndReason.FORWARDING_DENIED.hint)
    assert "tunnel.refused" not in calls


def test_worker_that_fails_while_running_is_an_event_alone() -> None:
    script = established()
    assert script.see(WorkerFailed(BackendError(EndReason.AGENT_UNREACHABLE, f"It refused {COOKIE}."))) == [
        "tunnel.refused"
    ]
    (event,) = script.events("tunnel.refused")
    assert event == {"level": "warning", "reason": "agent_unreachable", "detail": "It refused <hidden>."}
    assert type(event["reason"]) is str
    assert script.status.state is State.RUNNING


@pytest.mark.parametrize("hint", [None, "Do this."])
def test_program_that_cannot_start_ends_it_with_its_reason(hint: str | None) -> None:
    script = at(State.SPAWNING)
    script.see(SpawnFailed(BackendError(EndReason.PROXY_NOT_FOUND, "It is not there.", hint)))
    assert script.end == (State.STOPPING, EndReason.PROXY_NOT_FOUND, "It is not there.")
    assert script.status.hint == (hint or EndReason.PROXY_NOT_FOUND.hint)


def test_worker_that_breaks_is_an_internal_error_with_its_traceback() -> None:
    script = established()
    error = ZeroDivisionError(f"with {COOKIE}")
    assert script.see(WorkerCrashed("tunnel", error))[0] == "internal.error"
    wanted = "An internal error in the tunnel: ZeroDivisionError('with <hidden>')."
    assert script.end == (State.STOPPING, EndReason.INTERNAL_ERROR, wanted)
    wanted = "ZeroDivisionError: with <hidden>\n"
    assert script.events("internal.error") == [{"level": "error", "worker": "tunnel", "exception": wanted}]


def test_verdict_ends_it_while_the_program_lives() -> None:
    script = established()
    assert script.judge_now(EndReason.PEER_LOST) == ["terminate", "state stopping", "phase terminating"]
    assert script.end == (State.STOPPING, EndReason.PEER_LOST, SAID)
    assert script.status.hint == EndReason.PEER_LOST.hint


def test_verdict_comes_before_the_exit() -> None:
    script = established()
    script.judge.verdict = EndReason.VIEWER_CLOSED, "It was closed."
    script.see(ProcessExited(9, None))
    assert script.end == (State.STOPPING, EndReason.VIEWER_CLOSED, "It was closed.")
    assert script.path[-1] == "session_ended"


@pytest.mark.parametrize("hint", [None, "Do this."])
@pytest.mark.parametrize("state", [State.SPAWNING, State.RUNNING])
def test_backend_error_ends_it_with_its_reason(hint: str | None, state: State) -> None:
    script = at(state)
    script.judge.error = BackendError(EndReason.PEER_LOST, "It is gone.", hint)
    script.see(AgentDataReceived(1))
    assert script.end == (State.STOPPING, EndReason.PEER_LOST, "It is gone.")
    assert script.status.hint == (hint or EndReason.PEER_LOST.hint)
    assert script.events("internal.error") == []


def test_backend_that_crashes_ends_it_with_internal_error() -> None:
    script = established()
    script.judge.error = ZeroDivisionError("of all things")
    script.run(script.see, AgentDataReceived(1))
    assert script.end == (
        State.STOPPING,
        EndReason.INTERNAL_ERROR,
        "An internal error: ZeroDivisionError: of all things.",
    )


@pytest.mark.parametrize("reason", [EndReason.SESSION_ENDED, EndReason.VIEWER_CLOSED])
def test_clean_reason_that_the_table_refuses_is_an_internal_error(reason: EndReason) -> None:
    """A backend's preflight cannot say that the session has ended in order."""
    script = at(State.TUNNELLING)
    script.run(script.see, WorkerFailed(BackendError(reason, SAID)))
    assert script.end[:2] == (State.STOPPING, EndReason.INTERNAL_ERROR)
    assert "InvalidTransition" in script.events("internal.error")[0]["exception"]
    script.see(PreflightFinished(), TunnelClosed())
    assert script.end[:2] == (State.FAILED, EndReason.INTERNAL_ERROR)


@pytest.mark.parametrize(
    ("lines", "exited", "reason", "detail"),
    [
        (
            [],
            ProcessExited(3, None),
            EndReason.PROXY_EXITED,
            "The proxy program ended with exit code 3 and printed nothing.",
        ),
        (
            ["one", "two"],
            ProcessExited(0, None),
            EndReason.PROXY_EXITED,
            'The proxy program ended with exit code 0; its last line: "two".',
        ),
        (
            ["one", "  "],
            ProcessExited(1, None),
            EndReason.PROXY_EXITED,
            'The proxy program ended with exit code 1; its last line: "one".',
        ),
        (
            [],
            ProcessExited(None, None),
            EndReason.PROXY_EXITED,
            "The proxy program ended; somebody else has taken its exit status.",
        ),
        ([], ProcessExited(None, 11), EndReason.PROXY_KILLED, "The proxy program was ended by signal SIGSEGV."),
        ([], ProcessExited(None, 99), EndReason.PROXY_KILLED, "The proxy program was ended by signal 99."),
    ],
)
def test_exit_without_a_verdict_says_how_the_program_ended(
    lines: list[str], exited: ProcessExited, reason: EndReason, detail: str
) -> None:
    script = at(State.SPAWNING)
    script.see(*map(OutputLine, lines))
    assert script.see(exited) == ["process.exited", "drain", "state stopping", "phase draining"]
    assert script.end == (State.STOPPING, reason, detail)
    assert (script.status.exit_code, script.status.signal) == (exited.exit_code, exited.signal)


SECONDARY = {EndReason.NEGOTIATION_FAILED, EndReason.PEER_LOST, EndReason.SESSION_ENDED, EndReason.PROXY_EXITED}


@pytest.mark.parametrize("reason", [reason for reason in EndReason if reason is not EndReason.STOP_REQUESTED])
def test_secondary_reason_becomes_transport_lost_if_transport_is_dead(reason: EndReason) -> None:
    script = cut(established())
    script.judge_now(reason)
    secondary = reason in SECONDARY
    wanted = (EndReason.TRANSPORT_LOST, "The SSH connection ended.") if secondary else (reason, SAID)
    assert script.end == (State.STOPPING, *wanted)


def test_stop_with_a_dead_transport_stays_a_stop() -> None:
    script = cut(established())
    script.stop()
    assert script.status.reason is EndReason.STOP_REQUESTED


# ---- ends that are tentative until they are verified ----


def test_session_end_counts_at_once_where_nothing_is_to_be_asked() -> None:
    script = established()
    assert script.end_session() == ["phase verifying", "terminate", "state stopping", "phase terminating"]
    assert script.end == (State.STOPPING, EndReason.SESSION_ENDED, SAID)
    assert script.path[-1] == "session_ended"


def test_session_end_is_held_while_the_display_is_in_doubt() -> None:
    script = established(display_in_doubt=True)
    assert script.end_session() == ["phase verifying"]
    assert (script.place, script.status.reason) == ((State.RUNNING, Phase.VERIFYING), None)
    script.effects.answers["display_in_doubt"] = False
    script.see(DisplayRestored())
    assert script.end == (State.STOPPING, EndReason.SESSION_ENDED, SAID)


def test_display_that_proves_lost_is_the_cause_that_was_held_for() -> None:
    script = established(display_in_doubt=True)
    script.end_session()
    script.see(DisplayLost("It is not there."))
    assert script.end == (State.STOPPING, EndReason.DISPLAY_LOST, "The X server has gone. It is not there.")


@pytest.mark.parametrize("options", [{"ask_server": True}, {"display_in_doubt": True}])
def test_unverified_session_end_is_committed_after_ask_server_s(options: dict[str, Any]) -> None:
    script = established(**options)
    script.end_session()
    assert script.pass_s(499) == []
    assert script.pass_s(1)[-2:] == ["state stopping", "phase terminating"]
    assert script.end == (State.STOPPING, EndReason.SESSION_ENDED, SAID)


def test_session_end_that_is_seen_again_gets_no_more_time() -> None:
    script = verifying()
    script.pass_s(1)
    assert script.see(AgentDataReceived(1)) == []
    assert script.deadline_s == LIMITS[Phase.VERIFYING] - 1


@pytest.mark.parametrize("seen", [StopOrdered(), CUT, DEAD])
def test_tentative_end_is_committed_by_any_other_cause(seen: Observation) -> None:
    script = verifying()
    script.see(seen)
    assert script.end == (State.STOPPING, EndReason.SESSION_ENDED, SAID)
    assert script.path[-1] == "session_ended"


def test_restored_display_means_nothing_without_a_tentative_end() -> None:
    script = established(ask_server=True)
    assert script.see(DisplayRestored()) == []
    assert script.place == (State.RUNNING, Phase.ESTABLISHED)


def test_display_that_is_restored_while_stopping_asks_nothing() -> None:
    script = established(ask_server=True, display_in_doubt=True)
    script.end_session()
    script.stop()
    script.effects.answers["display_in_doubt"] = False
    assert script.see(DisplayRestored()) == []


ANSWERS = [
    (SessionStatus.SUSPENDED, EndReason.SESSION_SUSPENDED, "The session was suspended on the server."),
    (SessionStatus.FINISHED, EndReason.SESSION_TERMINATED, "The session was terminated on the server."),
    (None, EndReason.SESSION_ENDED, SAID),
]


@pytest.mark.parametrize(("answer", "reason", "detail"), ANSWERS)
def test_server_says_which_end_it_was(answer: SessionStatus | None, reason: EndReason, detail: str) -> None:
    script = established(ask_server=True)
    assert script.end_session() == ["query_session", "phase verifying"]
    assert script.see(SessionStatusReceived(answer)) == [
        "cancel_query",
        "terminate",
        "state stopping",
        "phase terminating",
    ]
    assert script.end == (State.STOPPING, reason, detail)
    assert script.status.hint == reason.hint


def test_server_that_says_running_denies_the_end() -> None:
    script = verifying()
    script.judge.verdict = None
    assert script.see(SessionStatusReceived(SessionStatus.RUNNING)) == ["phase established"]
    assert (script.status.state, script.status.reason, script.deadline_s) == (State.RUNNING, None, None)
    assert "cancel_query" not in script.stop()


def test_server_is_asked_again_at_the_next_sign_of_an_end() -> None:
    script = verifying()
    script.judge.verdict = None
    script.see(SessionStatusReceived(SessionStatus.RUNNING))
    assert script.end_session() == ["query_session", "phase verifying"]
    assert script.deadline_s == LIMITS[Phase.VERIFYING]


@pytest.mark.parametrize("gone", [EXITED, ENDED])
def test_session_that_still_runs_has_ended_for_a_proxy_whose_connection_is_gone(gone: Observation) -> None:
    script = verifying()
    script.see(gone, SessionStatusReceived(SessionStatus.RUNNING))
    assert script.end == (State.STOPPING, EndReason.SESSION_ENDED, SAID)


def test_server_is_asked_once_and_not_before_the_display_is_sure() -> None:
    script = established(ask_server=True, display_in_doubt=True)
    assert "query_session" not in script.end_session()
    script.effects.answers["display_in_doubt"] = False
    assert script.see(DisplayRestored()) == ["query_session"]
    assert script.see(DisplayRestored()) == []


def test_query_that_cannot_be_started_leaves_the_likely_end() -> None:
    script = established(ask_server=True)
    script.effects.broken["query_session"] = RuntimeError("can't start new thread")
    script.end_session()
    assert script.end == (State.STOPPING, EndReason.SESSION_ENDED, SAID)
    assert script.events("internal.error") == []


@pytest.mark.parametrize("phase", [Phase.ESTABLISHED, Phase.TERMINATING])
def test_answer_that_was_not_asked_for_means_nothing(phase: Phase) -> None:
    script = established(ask_server=True) if phase is Phase.ESTABLISHED else in_stopping(phase)
    assert script.see(SessionStatusReceived(SessionStatus.FINISHED)) == []
    assert script.status.phase is phase


def test_answer_that_comes_late_changes_nothing() -> None:
    script = verifying()
    script.stop()
    assert script.see(SessionStatusReceived(SessionStatus.FINISHED)) == []
    assert script.end == (State.STOPPING, EndReason.SESSION_ENDED, SAID)


def test_query_is_cancelled_once_and_only_where_there_is_one() -> None:
    script = verifying()
    script.pass_s(10_000)
    script.see(EXITED)
    assert script.effects.calls.count("cancel_query") == 1
    assert "cancel_query" not in at(State.STOPPED).effects.calls


def test_session_end_in_spawning_is_tentative_too() -> None:
    script = Script(ask_server=True).lead_to(Phase.NEGOTIATING)
    assert script.end_session() == ["query_session"]
    assert script.place == (State.SPAWNING, Phase.NEGOTIATING)
    assert script.deadline_s == TIMEOUTS.ask_server_s
    script.pass_deadline()
    assert script.end == (State.STOPPING, EndReason.SESSION_ENDED, SAID)
    assert script.path[-1] == "session_ended"


@pytest.mark.parametrize("answer", SessionStatus)
def test_any_answer_ends_a_tentative_end_in_spawning(answer: SessionStatus) -> None:
    script = Script(ask_server=True).lead_to(Phase.NEGOTIATING)
    script.end_session()
    script.see(SessionStatusReceived(answer))
    assert script.status.state is State.STOPPING
    assert script.status.reason is not None
    assert script.status.reason.clean


def test_session_end_in_spawning_counts_at_once_where_nothing_is_to_be_asked() -> None:
    script = Script().lead_to(Phase.NEGOTIATING)
    assert script.end_session() == ["terminate", "state stopping", "phase terminating"]


@pytest.mark.parametrize("phase", [Phase.LAUNCHING, Phase.CONNECTING, Phase.NEGOTIATING])
def test_ready_sign_does_not_enter_running_while_an_end_is_tentative(phase: Phase) -> None:
    script = Script(ask_server=True).lead_to(phase)
    script.end_session()
    script.see(SPAWNED, ChannelOpened(1), READY)
    assert script.place == (State.SPAWNING, phase)


# ---- a program that has outlived its only connection ----


def test_program_without_its_only_connection_has_stop_grace_s() -> None:
    script = established()
    assert script.see(ENDED) == ["tunnel.closed"]
    assert (script.place, script.deadline_s) == ((State.RUNNING, Phase.ESTABLISHED), TIMEOUTS.stop_grace_s)
    assert script.pass_s(300) == ["phase verifying", "terminate", "state stopping", "phase terminating"]
    alone = "The connection to the agent has ended; the proxy program stayed, alone."
    assert script.end == (State.STOPPING, EndReason.SESSION_ENDED, alone)


def test_program_that_exits_in_that_time_says_why_itself() -> None:
    script = after(ENDED)
    script.see(ProcessExited(3, None))
    assert script.status.reason is EndReason.PROXY_EXITED


def test_end_of_a_lone_program_is_verified_with_the_server() -> None:
    script = established(ask_server=True)
    script.see(ENDED)
    assert script.pass_deadline() == ["query_session", "phase verifying"]
    script.see(SessionStatusReceived(SessionStatus.SUSPENDED))
    assert script.status.reason is EndReason.SESSION_SUSPENDED


@pytest.mark.parametrize("most", [None, 2])
def test_one_of_several_connections_may_end(most: int | None) -> None:
    script = established(backend=Judge(max_connections=most))
    script.see(ENDED)
    assert (script.place, script.deadline_s) == ((State.RUNNING, Phase.ESTABLISHED), None)


@pytest.mark.parametrize("phase", [Phase.NEGOTIATING, Phase.VERIFYING, Phase.TERMINATING])
def test_connection_that_ends_in_another_phase_leaves_the_deadline(phase: Phase) -> None:
    script = verifying() if phase is Phase.VERIFYING else Script().lead_to(Phase.NEGOTIATING)
    if phase is Phase.TERMINATING:
        script.stop()
    deadline_s = script.deadline_s
    assert script.see(ENDED) == ["tunnel.closed"]
    assert script.deadline_s == deadline_s


# ---- what is published ----


def test_each_record_has_its_fields_and_its_time() -> None:
    script = Script(resumed=True)
    script.pass_s(1)
    script.start()
    script.pass_s(10)
    script.see(PASSED, PreflightFinished())
    script.pass_s(20)
    script.see(SpawnFailed(BackendError(EndReason.PROXY_NOT_STARTABLE, "It cannot be started.")))
    script.pass_s(3)
    script.see(TunnelClosed())
    ended = ("proxy_not_startable", "It cannot be started.")
    told = [(r.trigger, r.source, r.dest, r.reason, r.detail, r.elapsed_s, r.sequence) for r in script.effects.records]
    assert told == [
        ("start", "idle", "tunnelling", None, "", 1, 1),
        ("tunnel_opened", "tunnelling", "spawning", None, "", 10, 2),
        ("fault_found", "spawning", "stopping", *ended, 20, 3),
        ("closed_after_fault", "stopping", "failed", *ended, 3, 4),
    ]
    history = script.status.history
    assert list(history) == script.effects.records
    assert {(record.proxy_id, record.session) for record in history} == {("id", "alice-51")}
    assert [(later.at - sooner.at) for sooner, later in itertools.pairwise(history)] == [
        timedelta(seconds=seconds) for seconds in (10, 20, 3)
    ]
    assert script.status.since == history[-1].at == script.now.utc
    first, *_, last = script.events("proxy.transition")
    assert first == {
        "level": "info",
        "trigger": "start",
        "source": "idle",
        "dest": "tunnelling",
        "reason": None,
        "detail": "",
        "elapsed_s": 1,
        "sequence": 1,
    }
    assert last == {
        "level": "info",
        "trigger": "closed_after_fault",
        "source": "stopping",
        "dest": "failed",
        "reason": "proxy_not_startable",
        "detail": "It cannot be started.",
        "elapsed_s": 3,
        "sequence": 4,
        "hint": EndReason.PROXY_NOT_STARTABLE.hint,
        "retryable": True,
    }


def test_each_phase_has_its_event_and_its_place_in_the_status() -> None:
    script = Script()
    script.start()
    script.pass_s(2)
    script.see(ChecksPassed())
    assert (script.status.phase, script.status.phase_since) == (Phase.BINDING, script.now.utc)
    script.pass_s(3.1234567)
    script.see(PASSED)
    phases = [
        ("tunnelling", "checking", None, 0.0),
        ("tunnelling", "binding", "checking", 2.0),
        ("spawning", "launching", None, 0.0),
    ]
    assert script.events("proxy.phase") == [
        {"level": "debug", "state": state, "phase": phase, "previous": previous, "elapsed_s": elapsed_s}
        for state, phase, previous, elapsed_s in phases
    ]
    status = at(State.STOPPED).status
    assert (status.phase, status.phase_since) == (None, None)


def test_phase_event_says_how_long_the_one_before_took() -> None:
    script = Script().lead_to(Phase.LAUNCHING)
    script.pass_s(3.1234567)
    script.see(SPAWNED)
    assert script.events("proxy.phase")[-1]["elapsed_s"] == 3.123457


def test_phases_make_no_record() -> None:
    script = at(State.STOPPED)
    changes = [call for call in script.effects.calls if call.startswith("state ")]
    assert len(script.effects.records) == len(changes) == len(script.status.history) == 5


def test_status_that_is_seen_with_a_publication_is_the_new_one() -> None:
    script = at(State.FAILED)
    seen = [(name, f"state {state}") for name, state, _ in script.effects.seen_at_call if name.startswith("state ")]
    assert all(name == state for name, state in seen)
    assert len(seen) == 5


def test_changes_that_follow_from_each_other_are_published_in_order() -> None:
    script = established()
    script.see(TunnelClosed(), ProcessExited(1, None))
    states = [str(record.dest) for record in script.effects.records]
    assert states[-2:] == ["stopping", "failed"]
    assert [record.sequence for record in script.effects.records] == list(range(1, len(states) + 1))


def test_only_the_last_event_has_hint_and_retryable() -> None:
    script = established(resumed=True)
    script.see(ProcessExited(None, 9), TunnelClosed())
    events = script.events("proxy.transition")
    assert [("hint" in event, "retryable" in event) for event in events] == [(False, False)] * 4 + [(True, True)]
    assert (events[-1]["hint"], events[-1]["retryable"]) == (EndReason.PROXY_KILLED.hint, True)
    assert (script.status.hint, script.status.retryable) == (EndReason.PROXY_KILLED.hint, True)


def test_hint_is_in_the_status_from_stopping_on() -> None:
    script = after(CUT)
    assert script.status.hint == EndReason.TRANSPORT_LOST.hint
    assert script.status.retryable is None


@pytest.mark.parametrize(
    ("phase", "running_s", "resumed", "retryable"),
    [
        (Phase.CONNECTING, None, False, True),
        (Phase.NEGOTIATING, None, False, False),
        (Phase.NEGOTIATING, None, True, True),
        (Phase.ESTABLISHED, 0.0, False, None),
        (Phase.ESTABLISHED, 100.0, False, True),
        (Phase.ESTABLISHED, 0.0, True, True),
    ],
)
def test_retryable_follows_how_far_it_came(
    phase: Phase, *, running_s: float | None, resumed: bool, retryable: bool | None
) -> None:
    script = Script(resumed=resumed).lead_to(phase)
    script.pass_s(running_s or 0)
    script.see(ProcessExited(3, None))
    assert script.status.retryable is None
    script.pass_s(50)
    script.see(TunnelClosed())
    assert (script.status.state, script.status.retryable) == (State.FAILED, retryable)


@pytest.mark.parametrize(
    ("phase", "resumed", "words"),
    [
        (Phase.CONNECTING, False, "then try again"),
        (Phase.NEGOTIATING, False, "then start a new session"),
        (Phase.NEGOTIATING, True, "then resume the session"),
        (Phase.ESTABLISHED, False, "then resume the session"),
    ],
)
def test_hint_follows_how_far_it_came(phase: Phase, words: str, *, resumed: bool) -> None:
    script = Script(resumed=resumed).lead_to(phase)
    script.see(CUT)
    assert script.status.hint is not None
    assert words in script.status.hint


def test_detail_and_hint_are_redacted() -> None:
    script = at(State.TUNNELLING)
    script.see(WorkerFailed(BackendError(EndReason.LISTEN_FAILED, f"It holds {COOKIE}.", f"Hide {COOKIE}.")))
    assert (script.status.detail, script.status.hint) == ("It holds <hidden>.", "Hide <hidden>.")
    assert COOKIE not in str(script.status.as_dict()) + str(script.effects.events)


def test_status_holds_what_is_seen_of_the_program() -> None:
    script = at(State.SPAWNING)
    script.see(ProcessSpawned(12, "/fake/proxy"), *(OutputLine(f"line {number}") for number in range(30)))
    assert script.status.pid == 12
    assert script.status.output_tail == tuple(f"line {number}" for number in range(10, 30))
    script.see(ProcessExited(7, None))
    assert (script.status.exit_code, script.status.signal) == (7, None)


def test_status_says_since_when_the_link_is_silent() -> None:
    script = established()
    script.see(LinkSilent(heard_at=script.now_s - 1.23456))
    assert (script.status.link, script.supervisor.heard_at) == (Link.SILENT, script.now_s - 1.23456)
    script.see(LinkRestored(silent_s=4.56789))
    assert script.status.link is Link.OK
    assert script.events("link.silent") == [{"level": "warning", "silent_s": 1.235}]
    assert script.events("link.restored") == [{"level": "info", "silent_s": 4.568}]


@pytest.mark.parametrize(
    ("seen", "name", "event"),
    [
        (PeerRejected("uid 33"), "tunnel.rejected", {"level": "warning", "peer": "uid 33"}),
        (LogFailed("No space left."), "process.log_failed", {"level": "warning", "detail": "No space left."}),
        (SPAWNED, "process.spawned", {"level": "info", "pid": 4711, "executable": "/fake/proxy"}),
        (OutputLine("a line"), "process.output", {"level": "debug", "line": "a line"}),
        (ChannelOpened(2), "tunnel.connected", {"level": "info", "connection": 2}),
        (ProcessExited(None, 9), "process.exited", {"level": "info", "exit_code": None, "signal": 9}),
        (
            ENDED,
            "tunnel.closed",
            {
                "level": "info",
                "connection": 1,
                "bytes_to_agent": 2,
                "bytes_from_agent": 3,
                "duration_s": 4.123457,
            },
        ),
    ],
)
def test_each_observation_has_its_event(seen: Observation, name: str, event: dict[str, Any]) -> None:
    script = at(State.SPAWNING)
    assert script.see(seen)[0] == name
    assert script.events(name) == [event]


def test_listening_has_its_event() -> None:
    assert established().events("tunnel.listening") == [{"level": "info", "address": "/fake/proxy.sock"}]


@pytest.mark.parametrize("seen", [AgentDataReceived(1), AgentEof(1), PreflightFinished(), TunnelClosed()])
def test_observation_that_only_the_backend_reads_has_no_event(seen: Observation) -> None:
    assert established().see(seen) == []


# ---- bugs, of this package or of others ----


def test_crash_of_an_idle_one_is_refused_and_changes_nothing() -> None:
    script = Script()
    with pytest.raises(InvalidTransition):
        script.crash(ZeroDivisionError())
    assert script.place == (State.IDLE, None)
    script.start()
    script.stop()
    assert script.status.reason is EndReason.STOP_REQUESTED


@pytest.mark.parametrize("phase", [*UP, Phase.VERIFYING])
def test_crash_ends_it_with_internal_error_and_its_traceback(phase: Phase) -> None:
    script = verifying() if phase is Phase.VERIFYING else Script().lead_to(phase)
    calls = script.crash(ZeroDivisionError(f"of {COOKIE}"))
    assert calls[0] == "internal.error"
    wanted = "An internal error: ZeroDivisionError: of <hidden>."
    assert script.end == (State.STOPPING, EndReason.INTERNAL_ERROR, wanted)
    assert script.status.hint is not None
    assert script.status.hint.startswith("Report this as a bug of proxy_fsm")
    (event,) = script.events("internal.error")
    assert event == {"level": "error", "exception": "ZeroDivisionError: of <hidden>\n"}


@pytest.mark.parametrize("phase", [Phase.TERMINATING, Phase.KILLING, Phase.DRAINING, Phase.ABORTING])
def test_crash_while_stopping_is_published_and_changes_nothing(phase: Phase) -> None:
    script = in_stopping(phase)
    script.pass_s(1)
    before = script.status
    assert script.crash(ZeroDivisionError()) == ["internal.error"]
    assert script.status == before
    assert script.deadline_s == LIMITS[phase] - 1


@pytest.mark.parametrize("state", [State.STOPPED, State.FAILED])
def test_crash_in_a_final_state_is_published_and_changes_nothing(state: State) -> None:
    script = at(state)
    before = script.status
    assert script.crash(ZeroDivisionError()) == ["internal.error"]
    assert script.status == before
    assert script.deadline_s is None


#: Every effect, and what is done until it is called.
BREAKABLE: list[tuple[str, Callable[[Script], object]]] = [
    ("start_preflight", lambda script: script.run(script.start)),
    ("start_proxy", lambda script: script.lead_to(Phase.BINDING)),
    ("terminate", lambda script: script.lead_to(Phase.ESTABLISHED)),
    ("kill", lambda script: script.lead_to(Phase.ESTABLISHED)),
    ("drain", lambda script: script.lead_to(Phase.ESTABLISHED)),
    ("abort", lambda script: script.lead_to(Phase.ESTABLISHED)),
    ("release", lambda script: script.lead_to(Phase.ESTABLISHED)),
    ("unreleased", lambda script: script.lead_to(Phase.ESTABLISHED)),
    ("query_session", lambda script: script.lead_to(Phase.ESTABLISHED)),
    ("cancel_query", lambda script: script.lead_to(Phase.ESTABLISHED)),
]


@pytest.mark.parametrize(("effect", "begin"), BREAKABLE)
def test_effect_that_raises_does_not_keep_it_from_ending_by_its_deadlines(
    effect: str, begin: Callable[[Script], object]
) -> None:
    script = Script(ask_server=True)
    script.effects.broken[effect] = PermissionError("not ours")
    begin(script)
    if script.status.state is State.TUNNELLING:
        script.run(script.see, PASSED)
    if script.status.state is State.RUNNING:
        script.run(script.end_session)
    script.run(script.stop)
    while not script.status.state.is_final:
        assert script.deadline_s is not None
        script.run(script.pass_deadline)
    assert script.events("internal.error")
    assert list(script.status.history) == script.effects.records
    internal = effect in {"start_preflight", "start_proxy", "query_session"}
    # The program is never seen to exit: that turns a clean end into a fault.
    wanted = EndReason.INTERNAL_ERROR if internal else EndReason.STOP_TIMEOUT
    assert script.end[:2] == (State.FAILED, wanted)


def test_program_that_cannot_be_sent_sigterm_is_killed_after_its_grace() -> None:
    script = established(unreleased=("channel 1",))
    script.effects.broken["terminate"] = PermissionError("not ours")
    assert script.run(script.stop) == ["terminate", "state stopping", "phase terminating", "internal.error"]
    assert script.pass_s(300) == ["kill", "phase killing"]


def test_watcher_that_cannot_be_detached_does_not_hold_the_end_up() -> None:
    script = in_stopping(Phase.DRAINING)
    script.effects.broken["release"] = OSError("of all things")
    script.run(script.see, TunnelClosed())
    assert script.end[:2] == (State.STOPPED, EndReason.STOP_REQUESTED)
    assert script.effects.calls.count("release") == len(script.events("internal.error")) == 1


def test_what_cannot_be_listed_is_given_up_all_the_same() -> None:
    script = in_stopping(Phase.ABORTING)
    script.effects.broken["unreleased"] = OSError("of all things")
    script.run(script.pass_deadline)
    assert script.end[:2] == (State.STOPPED, EndReason.STOP_REQUESTED)
    assert "release" in script.effects.calls


def test_error_after_an_error_is_published_too() -> None:
    script = established()
    script.judge.error = ZeroDivisionError("the first")
    script.effects.broken["terminate"] = ArithmeticError("the second")
    script.run(script.see, AgentDataReceived(1))
    first, second = (event["exception"] for event in script.events("internal.error"))
    assert "the first" in first
    assert "the second" in second
    assert script.place == (State.STOPPING, Phase.TERMINATING)
    assert script.status.reason is EndReason.INTERNAL_ERROR


# ---- the package's own backends ----


def test_nxproxy_that_says_that_its_session_ends_has_ended_when_it_exits() -> None:
    script = Script(backend=NX3Backend("/fake/nxproxy"))
    script.see(StartOrdered(), PASSED, PreflightFinished(), SPAWNED, ChannelOpened(1))
    script.see(OutputLine("Info: Established X server connection."))
    assert script.status.state is State.RUNNING
    script.see(OutputLine("Session: Terminating session at 'now'."))
    assert script.status.state is State.RUNNING
    script.see(EXITED, TunnelClosed())
    wanted = "The agent closed the session: it was suspended or terminated."
    assert script.end == (State.STOPPED, EndReason.SESSION_ENDED, wanted)
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


def check(script: Script) -> None:
    """What must hold at every moment."""
    status = script.status
    history = status.history
    assert all((record.trigger, record.source, record.dest) in _MOVES for record in history)
    assert [State.IDLE, *(record.dest for record in history)] == [*(record.source for record in history), status.state]
    assert list(history) == script.effects.records
    assert status.phase in status.state.phases or status.phase is None
    assert (status.phase is None) == (not status.state.phases)
    if status.phase is not None and LIMITS[status.phase] < inf:
        assert script.deadline_s is not None
    if status.state.is_final:
        assert script.deadline_s is None
    ending = status.state is State.STOPPING or status.state.is_final
    assert (status.reason is not None) == ending
    if status.state.is_final:
        assert status.reason is not None
        assert status.reason.clean == (status.state is State.STOPPED)
    assert script.effects.calls.count("release") == (status.state.is_final and history[0].dest is not State.STOPPED)


@given(
    phase=st.sampled_from([*UP, Phase.VERIFYING]),
    steps=_STEPS,
    ask_server=st.booleans(),
    transport_dead=st.booleans(),
)
def test_any_sequence_keeps_to_the_tables_and_ends(
    phase: Phase, steps: list[Any], *, ask_server: bool, transport_dead: bool
) -> None:
    script = Script(ask_server=ask_server or phase is Phase.VERIFYING).lead_to(phase)
    if transport_dead:
        cut(script)
    crashed = False
    for step in steps:
        final = script.status.state.is_final
        match step:
            case Observation():
                crashed |= isinstance(step, WorkerCrashed)
                script.see(step)
            case "deadline":
                if script.deadline_s is not None:
                    script.pass_deadline()
            case bool(doubt):
                script.effects.answers["display_in_doubt"] = doubt
            case verdict:
                script.judge.verdict = verdict
        check(script)
        assert crashed or "internal.error" not in script.effects.calls
        assert not final or script.status.state.is_final
    script.stop()
    for _ in range(5):
        if script.deadline_s is not None:
            script.pass_deadline()
        check(script)
    assert script.status.state.is_final
