"""The fault matrix, row by row: its reason, its times, that nothing is left, and the result of a second attempt.

The rows are in faults.py. Times are those of design.md, section 6; this machine may be shared, so the tests assert the
design's figure plus `SLACK_S`, and moments in which the whole machine stalled do not count. Measurements are appended
to the file named by the environment variable `RECORD`, if any.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm import Link, ProxyStatus, State, Timeouts
from proxy_fsm.evidence import ProcessExited
from tests.helpers.wait import eventually

from .attempt import FINAL_S, RUNNING_S, Attempt, Holdings, WatchedViewer, nothing_gained_since
from .causes import viewer
from .conftest import check_untouched
from .fault_table import RECORD, masked
from .faults import FAULTS, MISHAPS, Fault, Left, Mishap, When
from .procs import alive
from .x2go import transport_of

if TYPE_CHECKING:
    from .scene import Scene
    from .stalls import Stalls

SLACK_S = 0.4  # what a busy machine of two cores may add to any time below
STOPPING_S = 0.05  # from a fault's first sign
KILLED_S = 0.5  # until a killed process has exited

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.cause.replace(" ", "-"))
def test_fault(request: pytest.FixtureRequest, stalls: Stalls, fault: Fault) -> None:
    if fault.unshares:
        request.getfixturevalue("own_namespaces")
    scene: Scene = request.getfixturevalue("scene" if fault.needs_x2goserver else "plain_scene")
    scene.timeouts = Timeouts(**fault.limits)
    attempt = fault.make(scene)
    transports = [attempt.transport, transport_of(scene.admin)]
    before = Holdings.now(transports)
    cause_at = strike(scene, fault, attempt)
    final = attempt.wait()
    status = attempt.proxy.status()
    assert status.reason is fault.reason, status
    assert final is (State.STOPPED if fault.reason.clean else State.FAILED)
    check_user_texts(attempt, fault, status)
    times = check_times(stalls, attempt, fault, cause_at)

    check_nothing_left_on_disk(scene, attempt)
    scene.repairs.close()
    nothing_gained_since(before, transports)
    check_no_process_left(status)
    if fault.left is Left.UNTOUCHED:
        check_untouched(scene.server, scene.agent)

    again = second_attempt(scene, fault, attempt)
    assert again is fault.left.again
    record(scene, fault.cause, attempt, retryable=status.retryable, again=again, **times)


def strike(scene: Scene, fault: Fault, attempt: Attempt) -> float:
    """Start the attempt and cause the fault; return the time of the cause (monotonic)."""
    fault.start(attempt)
    if fault.when is When.RUNNING:
        attempt.proxy.wait_running(RUNNING_S)
        scene.wait_resilient(attempt)
    cause_at = attempt.started_at if fault.strike is None else time.monotonic()
    if fault.strike is not None:
        fault.strike(scene, attempt)
    return cause_at


def check_user_texts(attempt: Attempt, fault: Fault, status: ProxyStatus) -> None:
    """The detail says what happened, the hint what to do about it; both are sentences without secrets."""
    assert fault.in_detail in status.detail
    assert status.detail[0].isupper() or status.detail.startswith("nxproxy ")
    assert status.detail.endswith(".")
    assert (status.retryable, status.abandoned) == (fault.retryable, ())
    if fault.in_detail.startswith("SIG"):
        assert (status.exit_code, status.signal) == (None, signal.Signals[fault.in_detail])
    if not fault.reason.clean:
        assert status.hint is not None
    if status.hint is not None:
        assert status.hint[0].isupper()
        assert status.hint.endswith(".")
        assert len(status.hint.split()) > 4
        assert status.hint not in status.detail
        assert status.detail not in status.hint
    attempt.check_secrecy()


def check_times(stalls: Stalls, attempt: Attempt, fault: Fault, cause_at: float) -> dict[str, float]:
    """Compare the times with the design's limits; return them."""
    stopping_at, final_at = attempt.entered[State.STOPPING], attempt.final_at
    sign_at = cause_at + fault.due_s if fault.sign is None else attempt.sign_at(fault.sign)
    end_at = attempt.sign_at(ProcessExited) if fault.orderly else sign_at
    assert stalls.took_s(sign_at, stopping_at) < STOPPING_S + SLACK_S
    assert stalls.took_s(end_at, final_at) < fault.final_s + SLACK_S
    if fault.within_s is not None:
        assert stalls.took_s(cause_at, final_at) < fault.within_s + SLACK_S
    times = {"sign_to_stopping_s": stopping_at - sign_at, "cause_to_final_s": final_at - cause_at}
    return {**times, "sign_to_final_s": final_at - sign_at} if fault.script else times


def check_nothing_left_on_disk(scene: Scene, attempt: Attempt) -> None:
    """No socket is left; the session root holds only the log and nxproxy's own files."""
    assert list((scene.runtime / "run").iterdir()) == []
    if attempt.root.is_dir():
        files = {str(path.relative_to(attempt.root)) for path in attempt.root.rglob("*") if not path.is_dir()}
        own = f"S-{attempt.session.name}"
        assert files - {"filler"} <= {f"{own}/{name}" for name in ("session.log", "stats", "errors")}


def check_no_process_left(status: ProxyStatus) -> None:
    """No process of the proxy's process session is left; our children, including zombies, are checked elsewhere."""
    if status.pid is None:
        return
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*") if session_of(int(path.name)) == status.pid]
    eventually(lambda: not any(map(alive, pids)), KILLED_S)  # orphans are reaped by init


def session_of(pid: int) -> int | None:
    """Return the process session of a process, None if it has exited."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def second_attempt(scene: Scene, fault: Fault, first: Attempt) -> bool:
    """Do what a user would do next, now that the cause is fixed; return whether the session then runs."""
    scene.reconnect()
    scene.timeouts = Timeouts(agent_connect_s=1)
    if isinstance(first.backend, WatchedViewer):
        second = viewer(scene)
    else:
        session, resumed = scene.session, False
        if fault.left is Left.DEAD:
            eventually(lambda: not alive(scene.agent.pid), FINAL_S)
        elif fault.left is not Left.UNTOUCHED:
            listed = scene.server.wait_status(scene.admin, scene.agent.name, Left.SUSPENDED, Left.TERMINATED)
            assert listed == fault.left
        if fault.left is Left.SUSPENDED:
            session, resumed = scene.resumed(), True
        root = first.root if first.root.is_dir() else scene.root
        second = scene.attempt(session, resumed=resumed, root=root)
    second.start()
    return second.proxy.wait(State.RUNNING, timeout=RUNNING_S) is State.RUNNING


@pytest.mark.parametrize("mishap", MISHAPS, ids=lambda mishap: mishap.cause.replace(" ", "-"))
def test_mishap(request: pytest.FixtureRequest, mishap: Mishap) -> None:
    """The event is published, and the session continues: it paints, and is stopped in order."""
    if mishap.unshares:
        request.getfixturevalue("own_namespaces")
    scene: Scene = request.getfixturevalue("scene")
    scene.timeouts = Timeouts(**mishap.limits)
    attempt = mishap.make(scene).run()
    scene.wait_resilient(attempt)
    cause_at = time.monotonic()
    mishap.strike(scene, attempt)
    event = attempt.named(mishap.event)[0]
    times = {"cause_to_event_s": event["at"] - cause_at}
    if mishap.recovery_event:
        recovery = attempt.named(mishap.recovery_event)[0]
        assert recovery["at"] > event["at"]
    scene.shows()
    assert attempt.proxy.ok()
    assert attempt.proxy.status().link is Link.OK
    assert attempt.proxy.status().silent_s == 0
    attempt.proxy.stop()
    assert attempt.wait() is State.STOPPED
    assert scene.server.wait_status(scene.admin, scene.agent.name, "S") == "S"
    record(scene, mishap.cause, attempt, **times)


def record(scene: Scene, cause: str, attempt: Attempt, **measured: Any) -> None:
    """Append the measurements to the record, if requested; what differs from run to run is masked."""
    if path := os.environ.get(RECORD):
        status = attempt.proxy.status()
        names = {str(scene.runtime): "…", scene.agent.name: "SESSION"}
        row = {
            "cause": cause,
            "reason": status.reason and str(status.reason),
            "detail": masked(status.detail, names),
            "hint": status.hint and masked(status.hint, names),
            **measured,
        }
        with Path(path).open("a") as file:
            file.write(json.dumps(row) + "\n")
