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
#: How long the stand-in takes to connect, and to exit: a hub that waited for it would be blocked for so long.
TAKES_S = 2.0
#: How long the hub may be blocked; forking takes most of it, and a loaded machine the rest.
HUB_S = 1.0


def test_hub_is_not_blocked_idle_cpu_is_low_and_nothing_is_leaked(scene: Scene) -> None:
    slow = Step(f"import time; time.sleep({TAKES_S})")
    program = scene.program((on_signal(signal.SIGTERM, (slow, exit_with(0))), slow, connect(), wait_eof()))
    server = scene.server
    access = ["127.0.0.1", server.port, server.username, server.password, scene.agent.port]
    command = [sys.executable, PROGRAM, *access, program, scene.home / "root", Path(proxy_fsm.__file__).parents[1]]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=PROGRAM_S)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for each in results["rounds"]:
        assert each["ok"]
        assert each["stop_s"] > TAKES_S / 2  # long enough to block the hub
        assert each["reason"] == "stop_requested"
        assert each["waited"] == 0, results
    # A blocked hub shows in every round; in a single round the machine may just have been busy.
    assert min(each["start_hub_s"] for each in results["rounds"]) < HUB_S
    assert min(each["stop_hub_s"] for each in results["rounds"]) < HUB_S
    assert results["rounds"][0]["idle_cpu"] < 0.1
    assert set(results["after"]["descriptors"]) <= set(results["before"]["descriptors"])
    assert results["after"]["native threads"] <= results["before"]["native threads"]
    assert results["after"]["threads"] == []
    assert results["faults"] == {"missing": "proxy_not_found", "killed": "proxy_killed", "transport": "transport_lost"}


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


def test_stalled_viewer_does_not_block_the_transport() -> None:
    """Gevent's ``send`` blocks regardless of its flags: the transport's own thread would stall."""
    done = subprocess.run(
        [sys.executable, "-c", STALLED], capture_output=True, text=True, timeout=PROGRAM_S, check=False
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
