"""The table of stalls, row by row: the session continues, or ends with its reason.

The rows are in faults.py. Without the environment variable `FULL_LENGTH` only the quick ones are run, in a tenth of the
time. Measurements are appended to the file named by `RECORD`, if any.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm import EndReason, Link, State
from tests.helpers.wait import eventually

from .agent import plain_environment
from .attempt import FINAL_S
from .display import RED
from .fault_table import FULL_LENGTH, RECORD
from .faults import QUICK, QUICK_OPTIONS, QUICK_TIMEOUTS, STALLS, Stall, Stalled
from .scene import RESILIENT_S
from .x2go import RED_XTERM, SUSPENDED_LINE

if TYPE_CHECKING:
    from .scene import Scene
    from .stalled import StalledSession

IS_FULL = FULL_LENGTH in os.environ
ROWS = [stall for stall in STALLS if IS_FULL or stall.quick]
WARNED_S = 30.0  # nxproxy needs 10 s to warn, and 15 s to give up

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("stall", ROWS, ids=lambda stall: stall.name)
def test_stall(request: pytest.FixtureRequest, stall: Stall) -> None:
    """Whatever happens in it, the proxy reports no fault of its own, and blames the link for nothing but silence."""
    if stall.stalled is Stalled.NETWORK:
        request.getfixturevalue("own_namespaces")
    scene: Scene = request.getfixturevalue("plain_scene")
    scene.timeouts = scene.timeouts if IS_FULL else QUICK_TIMEOUTS
    with (
        stall.stalled.opened(scene, {} if IS_FULL else QUICK_OPTIONS) as session,
        contextlib.closing(scene.repairs),
    ):
        scene.repairs.callback(session.release)
        # until it serves programs, the agent does not survive the loss of its proxy
        subprocess.run(["xwininfo", "-root"], env=plain_environment(scene.agent), check=True, capture_output=True)
        since = datetime.fromisoformat(session.status()["since"])
        eventually(lambda: (datetime.now(UTC) - since).total_seconds() > RESILIENT_S, FINAL_S)
        session.hold()
        held_at = time.monotonic()
        wait_out(stall, session)
        scene.repairs.close()
        ended_s = None
        if stall.ends is None:
            check_alive(scene, session)
        else:
            ended_s = check_ended(stall.ends, session) - held_at
        assert not session.named("internal.error")
        if stall.stalled in {Stalled.AGENT, Stalled.HOST}:
            assert not session.named("link.silent")
        record(stall, session, ended_s)


def wait_out(stall: Stall, session: StalledSession) -> None:
    """Let the stall last for its time or, in a quick run, until what it is about has happened."""
    if IS_FULL:
        time.sleep(stall.duration_s)
    elif stall.ends is not None:
        eventually(lambda: session.is_over, WARNED_S)
    elif stall.stalled is Stalled.AGENT:
        eventually(session.warned, WARNED_S)
    else:
        time.sleep(QUICK * stall.duration_s)


def check_alive(scene: Scene, session: StalledSession) -> None:
    """The session paints, and is stopped in order, which suspends it."""
    assert session.status()["state"] == State.RUNNING, session.status()
    with subprocess.Popen(shlex.split(RED_XTERM), env=plain_environment(scene.agent)) as window:
        try:
            scene.shows(RED)
        finally:
            window.kill()
    eventually(lambda: session.status()["link"] == Link.OK, FINAL_S)
    assert session.status()["state"] == State.RUNNING
    session.stop()
    status = session.wait_final()
    assert (status["state"], status["reason"]) == (State.STOPPED, EndReason.STOP_REQUESTED)
    assert (status["exit_code"], status["abandoned"]) == (0, [])
    eventually(lambda: SUSPENDED_LINE in scene.server.agent_log(scene.agent), FINAL_S)


def check_ended(reason: EndReason, session: StalledSession) -> float:
    """The session has ended, or ends, with this reason; return when that was found (monotonic)."""
    status = session.wait_final()
    assert (status["state"], status["reason"]) == (State.FAILED, reason), status
    (found_at,) = [each["at"] for each in session.named("proxy.transition") if each["dest"] == State.STOPPING]
    return float(found_at)


def record(stall: Stall, session: StalledSession, ended_s: float | None) -> None:
    """Append the measurement to the record, if requested."""
    if path := os.environ.get(RECORD):
        row: dict[str, Any] = {"stall": stall.name, "reason": stall.ends and str(stall.ends)}
        row["ended_s"] = ended_s and round(ended_s, 1)
        row["silent"] = bool(session.named("link.silent"))
        row["warned"] = session.warned()
        with Path(path).open("a") as file:
            file.write(json.dumps(row) + "\n")
