"""Under `gevent.monkey.patch_all()`, as in every program of python-x2go."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import proxy_fsm
from proxy_fsm.testing.scripted import Step, connect, exit_with, on_signal, wait_eof
from tests.helpers.wait import PROGRAM_S

if TYPE_CHECKING:
    from .conftest import Scene

PROGRAM = Path(__file__).with_name("gevent_program.py")
#: How long the stand-in takes to connect, and to end: so long would a hub be blocked that waits for it.
TAKES_S = 2.0
#: How long the hub may be kept from others; forking takes most of it, and a loaded machine the rest.
HUB_S = 1.0


def test_no_hub_is_blocked_nothing_runs_idle_and_nothing_is_left(scene: Scene) -> None:
    slow = Step(f"import time; time.sleep({TAKES_S})")
    program = scene.program((on_signal(signal.SIGTERM, (slow, exit_with(0))), slow, connect(), wait_eof()))
    server = scene.server
    place = ["127.0.0.1", server.port, server.username, server.password, scene.agent.port]
    command = [sys.executable, PROGRAM, *place, program, scene.home / "root", Path(proxy_fsm.__file__).parents[1]]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=PROGRAM_S)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    for each in seen["rounds"]:
        assert each["ok"]
        assert each["stop_s"] > TAKES_S / 2  # the hub had something to be blocked by
        assert each["reason"] == "stop_requested"
        assert each["waited"] == 0
    # A hub that is blocked is so in every round; one round alone may have met a moment in which the machine was busy.
    assert min(each["start_hub_s"] for each in seen["rounds"]) < HUB_S
    assert min(each["stop_hub_s"] for each in seen["rounds"]) < HUB_S
    assert seen["rounds"][0]["idle_cpu"] < 0.1
    assert set(seen["after"]["descriptors"]) <= set(seen["before"]["descriptors"])
    assert seen["after"]["native threads"] <= seen["before"]["native threads"]
    assert seen["after"]["threads"] == []
    assert seen["faults"] == {"missing": "proxy_not_found", "killed": "proxy_killed", "transport": "transport_lost"}


STALLED = """
from gevent import monkey
monkey.patch_all()
import gevent, socket
from proxy_fsm.ssh.channel import ReceiveBuffer

near, far = socket.socketpair()
passage = ReceiveBuffer(64 << 20)
passage.delivered, passage._sink = 1, near
with gevent.Timeout(20):
    passage.feed(bytes(8 << 20))
print(passage.delivered < 8 << 20 and len(passage) > 0)
"""


def test_a_viewer_that_reads_nothing_does_not_hold_up_the_transport() -> None:
    """The ``send`` of gevent waits whatever it is told: the transport's own thread would stand still."""
    told = subprocess.run(
        [sys.executable, "-c", STALLED], capture_output=True, text=True, timeout=PROGRAM_S, check=False
    )
    assert (told.stdout, told.stderr) == ("True\n", "")
