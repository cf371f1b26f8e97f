"""Fakes, strategies and fixtures: the base of a client's own tests."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_fsm import EndReason, Lifecycle, NX3Backend, ProxyFailed, State, Timeouts, TransitionRecord
from proxy_fsm.testing.fakes import FakedProxy
from proxy_fsm.testing.strategies import histories, sessions, statuses, transition_sequences, triggers

if TYPE_CHECKING:
    from collections.abc import Callable

    import paramiko

    from proxy_fsm import ProxyStatus, SessionInfo, Transition, Trigger


class Window:
    """A minimal client: it shows the last published state."""

    def __init__(self) -> None:
        self.shown = "idle"

    def on_change(self, record: TransitionRecord) -> None:
        self.shown = f"{record.dest} ({record.reason})" if record.reason else str(record.dest)


@pytest.mark.parametrize("state", State)
def test_engine_is_driven_to_any_state_and_ended_from_there(
    state: State, faked_proxy: Callable[[State], FakedProxy]
) -> None:
    proxy = faked_proxy(state)
    assert proxy.state is state
    assert proxy.ok() is (state is State.RUNNING)
    proxy.end()
    assert proxy.state.is_final
    assert proxy.status().abandoned == ()


def test_whole_life_is_scripted_event_by_event() -> None:
    proxy = FakedProxy()
    proxy.start()
    proxy.tunnel.opens()
    proxy.process.starts(pid=4711)
    proxy.tunnel.connects()
    proxy.process.prints_ready()
    proxy.wait_running(timeout=5)
    proxy.process.killed_by(signal.SIGSEGV)
    assert proxy.wait(timeout=5) is State.FAILED
    status = proxy.status()
    assert (status.reason, status.pid, status.signal) == (EndReason.PROXY_KILLED, 4711, signal.SIGSEGV)


def test_client_shows_every_fault() -> None:
    for reason in EndReason:
        if reason.clean or reason is EndReason.INTERNAL_ERROR:
            continue
        window, proxy = Window(), FakedProxy.in_state(State.SPAWNING)
        proxy.subscribe(window.on_change, replay=True)
        proxy.tunnel.fails(reason)
        with pytest.raises(ProxyFailed):
            proxy.wait_running(timeout=5)
        proxy.settle()
        assert window.shown == f"failed ({reason})"


def test_deadline_expires_on_request() -> None:
    proxy = FakedProxy.in_state(State.SPAWNING)
    proxy.expire_deadline()
    assert proxy.wait(timeout=5) is State.FAILED
    assert proxy.status().reason is EndReason.START_TIMEOUT


def test_unresponsive_process_and_tunnel_are_killed_and_then_abandoned() -> None:
    proxy = FakedProxy.in_state(State.RUNNING)
    proxy.process.auto_complete = proxy.tunnel.auto_complete = False
    proxy.stop()
    for _ in range(6):
        proxy.expire_deadline()
    assert proxy.wait(timeout=5) is State.FAILED
    assert proxy.process.signals == [signal.SIGTERM, signal.SIGKILL]
    assert proxy.status().reason is EndReason.STOP_TIMEOUT
    assert proxy.status().abandoned == ("process 4711", "channel 1 of the tunnel")


def test_custom_backend_diagnoses_its_lines() -> None:
    class Mine(NX3Backend):
        def diagnose(self, evidence: object) -> tuple[EndReason, str] | None:
            lines = [line.text for line in evidence.lines]  # type: ignore[attr-defined]
            return (EndReason.PEER_LOST, "It says so.") if "peer gone" in lines else None

    proxy = FakedProxy.in_state(State.RUNNING, backend=Mine("/fake/mine"), timeouts=Timeouts(kill_s=0.1))
    proxy.process.prints("peer gone")
    assert proxy.wait(timeout=5) is State.FAILED
    assert proxy.status().detail == "It says so."


@given(transition_sequences())
def test_transition_sequences_are_accepted_by_the_lifecycle(rows: tuple[Transition, ...]) -> None:
    lifecycle = Lifecycle()
    for row in rows:
        assert lifecycle.state is row.source
        assert lifecycle.fire(row.trigger)
        assert lifecycle.state is row.dest


@given(transition_sequences(complete=True), transition_sequences(complete=False))
def test_complete_sequences_end_and_others_do_not(whole: tuple[Transition, ...], part: tuple[Transition, ...]) -> None:
    assert whole[-1].dest is not None
    assert whole[-1].dest.is_final
    assert not any(row.dest is not None and row.dest.is_final for row in part)


@given(histories())
def test_histories_have_no_gap(records: tuple[TransitionRecord, ...]) -> None:
    assert [record.sequence for record in records] == list(range(1, len(records) + 1))
    for record in records:
        assert (record.reason is None) == (record.dest not in {State.STOPPING, State.STOPPED, State.FAILED})
        if record.dest.is_final and record.reason is not None:
            assert record.reason.clean is (record.dest is State.STOPPED)


@given(statuses(), sessions(), triggers())
def test_statuses_and_sessions_are_valid(status: ProxyStatus, session: SessionInfo, trigger: Trigger) -> None:
    assert status.as_dict()["state"] == str(status.state)
    assert (status.reason is not None) == (status.state in {State.STOPPING, State.STOPPED, State.FAILED})
    assert session.cookie is not None
    assert session.cookie not in repr(session)
    assert trigger in {str(each) for each in type(trigger)}


@given(st.data())
def test_strategies_can_be_drawn_from_in_a_test(data: st.DataObject) -> None:
    assert isinstance(data.draw(transition_sequences()), tuple)


def test_loopback_transport_fixture_is_authenticated(loopback_transport: paramiko.Transport) -> None:
    assert loopback_transport.is_authenticated()


def test_unused_plugin_imports_nothing() -> None:
    """It loads neither paramiko nor hypothesis nor the package."""
    code = (
        "import sys; before = set(sys.modules); import pytest_proxy_fsm; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} & {'hypothesis', 'paramiko', 'proxy_fsm'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
