"""Reasons, records and the snapshot."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from datetime import UTC, datetime

import pytest

from proxy_fsm import errors
from proxy_fsm.reasons import EndReason, ServerReason, hint_for, is_retryable
from proxy_fsm.states import State, Trigger
from proxy_fsm.status import Link, ProxyStatus, Timeouts, TransitionRecord, TunnelStats

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
RECORD = TransitionRecord(
    "id1", "name", Trigger.FAULT_FOUND, State.RUNNING, State.STOPPING, EndReason.PEER_LOST, "It broke.", NOW, 1.5, 4
)
STATUS = ProxyStatus(
    id="id1",
    session="name",
    state=State.FAILED,
    since=NOW,
    reason=EndReason.PEER_LOST,
    detail="It broke.",
    hint="Mend it.",
    tunnel=TunnelStats(1, 2, NOW, 1),
    output_tail=("a line",),
    abandoned=("process 1",),
    history=(RECORD,),
)

REASONS = """
stop_requested session_ended session_suspended session_terminated session_taken_over viewer_closed proxy_not_found
proxy_not_startable display_unavailable display_lost negotiation_failed agent_unreachable forwarding_denied
listen_failed transport_lost transport_silent peer_lost proxy_killed proxy_exited start_timeout stop_timeout
internal_error
""".split()
CLEAN = set(REASONS[:6])


def test_reason_names_are_the_contracts() -> None:
    assert [str(reason) for reason in EndReason] == REASONS
    assert [reason.name.lower() for reason in EndReason] == REASONS


@pytest.mark.parametrize("reason", EndReason)
def test_exit_status_of_clean_reasons_is_zero(reason: EndReason) -> None:
    assert reason.clean is (reason in CLEAN)
    assert reason.cli_status == 0 if reason.clean else reason.cli_status >= 10
    assert reason.clean or (reason.hint is not None and reason.hint.endswith("."))


def test_exit_statuses_of_faults_are_distinct() -> None:
    statuses = [reason.cli_status for reason in EndReason if not reason.clean]
    assert len(set(statuses)) == len(statuses)


def test_status_as_dict_keeps_all_fields_in_json() -> None:
    as_json = json.loads(json.dumps(STATUS.as_dict()))
    assert set(as_json) == {field.name for field in dataclasses.fields(ProxyStatus)}
    assert as_json["state"] == "failed"
    assert as_json["reason"] == "peer_lost"
    assert as_json["since"] == NOW.isoformat()
    assert as_json["tunnel"] == {
        "bytes_to_agent": 1,
        "bytes_from_agent": 2,
        "opened_at": NOW.isoformat(),
        "connections": 1,
    }
    assert as_json["history"][0]["source"] == "running"
    assert as_json["history"][0]["at"] == NOW.isoformat()


def test_idle_status_as_dict_is_json_safe() -> None:
    idle = ProxyStatus(id="i", session="s", state=State.IDLE, since=NOW, tunnel=TunnelStats(0, 0, None, 0))
    as_json = json.loads(json.dumps(idle.as_dict()))
    assert as_json["reason"] is None
    assert as_json["link"] == str(Link.OK)
    assert as_json["tunnel"]["opened_at"] is None
    assert json.loads(json.dumps(dataclasses.replace(idle, tunnel=None).as_dict()))["tunnel"] is None


def test_snapshots_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        STATUS.state = State.RUNNING  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORD.sequence = 1  # type: ignore[misc]


def test_timeout_defaults_are_the_contracts() -> None:
    assert dataclasses.asdict(Timeouts()) == {
        "preflight_s": 5,
        "ready_s": 30,
        "agent_connect_s": 8,
        "stop_grace_s": 8,
        "kill_s": 2,
        "drain_s": 0.5,
        "ask_server_s": 2,
        "link_probe_s": 15,
        "link_dead_s": 45,
    }


@pytest.mark.parametrize("value", [0, -1, 1e10, float("inf"), float("nan"), "5", None, True])
def test_timeouts_must_be_finite_numbers_above_zero(value: object) -> None:
    with pytest.raises(ValueError, match="ready_s must be a finite number"):
        Timeouts(ready_s=value)  # type: ignore[arg-type]


def test_link_dead_s_must_exceed_link_probe_s() -> None:
    with pytest.raises(ValueError, match="link_dead_s must be longer"):
        Timeouts(link_probe_s=5, link_dead_s=5)


NEVER, BRIEFLY, LONG = None, 0.05, 60.0
RETRYABLE = [
    # reason, channel opened, seconds running, resumed -> retryable
    (EndReason.PROXY_NOT_FOUND, False, NEVER, False, True),
    (EndReason.DISPLAY_UNAVAILABLE, False, NEVER, False, True),
    (EndReason.DISPLAY_UNAVAILABLE, True, NEVER, False, False),
    (EndReason.NEGOTIATION_FAILED, True, NEVER, False, False),
    (EndReason.NEGOTIATION_FAILED, True, NEVER, True, None),
    (EndReason.TRANSPORT_LOST, True, NEVER, False, False),
    (EndReason.TRANSPORT_LOST, True, BRIEFLY, False, None),
    (EndReason.TRANSPORT_LOST, True, BRIEFLY, True, True),
    (EndReason.TRANSPORT_LOST, True, LONG, False, True),
    (EndReason.PROXY_KILLED, True, LONG, False, True),
    (EndReason.DISPLAY_LOST, True, LONG, False, True),
    (EndReason.AGENT_UNREACHABLE, False, NEVER, True, None),
    (EndReason.PEER_LOST, True, LONG, False, None),
    (EndReason.SESSION_ENDED, True, LONG, False, None),
    (EndReason.SESSION_SUSPENDED, True, LONG, False, True),
    (EndReason.SESSION_TERMINATED, True, LONG, True, False),
    (EndReason.SESSION_TAKEN_OVER, True, LONG, True, False),
    (EndReason.SESSION_TAKEN_OVER, True, BRIEFLY, False, False),
    (EndReason.STOP_REQUESTED, True, LONG, False, True),
    (EndReason.STOP_REQUESTED, True, BRIEFLY, False, None),
    (EndReason.STOP_REQUESTED, True, NEVER, False, False),
    (EndReason.STOP_REQUESTED, False, NEVER, False, True),
]


HINTS = [
    # reason, channel opened, was running, resumed -> the end of the hint
    (EndReason.DISPLAY_LOST, True, True, False, "then resume the session."),
    (EndReason.DISPLAY_LOST, True, False, True, "then resume the session."),
    (EndReason.PROXY_KILLED, True, False, False, "then start a new session: this one has not survived."),
    (EndReason.TRANSPORT_LOST, False, False, False, "then try again."),
    (EndReason.TRANSPORT_SILENT, False, False, False, "then try again."),
    (EndReason.PROXY_NOT_FOUND, False, False, False, "say where it is."),
]


@pytest.mark.parametrize(("reason", "opened", "ran", "resumed", "ending"), HINTS)
def test_hint_does_not_resume_a_lost_session(
    reason: EndReason, *, opened: bool, ran: bool, resumed: bool, ending: str
) -> None:
    hint = hint_for(reason, channel_opened=opened, was_running=ran, resumed=resumed)
    assert hint is not None
    assert hint.endswith(ending)


TOLD = {EndReason.SESSION_SUSPENDED, EndReason.SESSION_TERMINATED, EndReason.SESSION_TAKEN_OVER}


@pytest.mark.parametrize("reason", [reason for reason in EndReason if reason not in TOLD], ids=str)
@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize("opened", [True, False])
def test_hint_for_a_program_without_sessions_speaks_of_none(reason: EndReason, *, opened: bool, ran: bool) -> None:
    """A VNC server cannot suspend or resume."""
    hint = hint_for(reason, channel_opened=opened, was_running=ran, resumed=False, resumable=False) or ""
    assert not re.search("suspend|resum|has not survived", hint)


def test_hint_of_a_session_taken_over_names_the_option_that_takes_it_back() -> None:
    assert "--take-over" in (EndReason.SESSION_TAKEN_OVER.hint or "")


@pytest.mark.parametrize("reason", [reason for reason in EndReason if reason.hint is not None], ids=str)
def test_hint_for_a_lost_session_is_to_start_a_new_one(reason: EndReason) -> None:
    hint = hint_for(reason, channel_opened=True, was_running=False, resumed=False)
    lost = is_retryable(reason, channel_opened=True, running_s=None, resumed=False) is False
    assert hint is not None
    assert not lost or "new session" in hint
    assert hint.endswith(".")
    assert hint.count(".") == (reason.hint or "").count(".")


@pytest.mark.parametrize(("reason", "opened", "running_s", "resumed", "retryable"), RETRYABLE)
def test_retryable_depends_on_progress_of_the_attempt(
    reason: EndReason, *, opened: bool, running_s: float | None, resumed: bool, retryable: bool | None
) -> None:
    assert is_retryable(reason, channel_opened=opened, running_s=running_s, resumed=resumed) is retryable


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidTransition("start", State.STOPPED),
        errors.InvalidTransition("closed_cleanly", State.IDLE),
        errors.InvalidSession("cookie", "it is too short."),
        errors.BackendError(EndReason.PROXY_NOT_FOUND, "It is not there.", "Install it."),
        errors.BackendError(EndReason.PROXY_NOT_FOUND, "It is not there."),
        errors.ServerError(ServerReason.LIMIT_REACHED, "There are too many.", exit_status=9),
        errors.ProxyFailed(STATUS),
        errors.ProxyStopped(dataclasses.replace(STATUS, reason=None, hint=None, detail="")),
    ],
    ids=repr,
)
def test_error_messages_are_sentences_and_errors_survive_pickle(error: errors.ProxyFsmError) -> None:
    assert str(error).endswith(".")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_proxy_failed_message_has_reason_detail_and_hint() -> None:
    assert str(errors.ProxyFailed(STATUS)) == ("The proxy of session name is failed (peer_lost): It broke. Mend it.")
    assert errors.ProxyFailed(STATUS).status is STATUS


def test_invalid_session_is_a_value_error() -> None:
    assert issubclass(errors.InvalidSession, ValueError)
