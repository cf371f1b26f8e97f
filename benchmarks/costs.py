"""The cost of one running proxy in a process with 1, 10, 50 or 200 of them, on one transport, all idle.

Each is a normal engine, over a real sshd, with a small program in place of a viewer. That program first sends a MiB
and receives it back, so that the relay's buffers have been used.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import load
from benchmarks.contenders import Server, connect
from benchmarks.tunnels import server_at, ssh_server
from proxy_fsm import CommandBackend, Proxy, SessionInfo, fast_transport

MIB = 1 << 20
RUNNING_S = 60.0
#: Less than ``Timeouts.link_probe_s``: idle means without link probes.
IDLE_S = 5.0
_SETTLE_S = 1.0

_VIEWER = f"""
import os, socket, struct, sys, threading
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.sendall(struct.pack("!cQ", b"E", 0))
threading.Thread(target=connection.sendall, args=(bytes({MIB}),), daemon=True).start()
left = {MIB}
while left:
    left -= len(connection.recv(left))
sys.stdout.write("all is back\\n")
sys.stdout.flush()
connection.recv(1)
"""


def measure(count: int, runs: int = 1) -> dict[str, float]:
    """Measure in one or several processes, one after another; return the cost of one proxy: medians by name.

    Raises:
        RuntimeError: A process failed; the message contains its error output.
    """
    samples = []
    for _ in range(runs):
        with ssh_server() as sshd, load.targets(1, workers=count + 1) as targets:
            server = server_at(sshd, sshd.port, targets)
            command = [sys.executable, "-m", "benchmarks.costs", str(count), json.dumps(server.__dict__)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-400:])
        samples.append(json.loads(done.stdout))
    return {name: statistics.median(each[name] for each in samples) for name in samples[0]}


def _now() -> dict[str, float]:
    resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return {
        "threads": threading.active_count(),
        "kib": int(resident.split()[1]),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
    }


def _wake_ups(but: set[int]) -> int:
    """Count how often threads of this process were woken so far, excluding some of them."""
    total = 0
    for status in Path("/proc/self/task").glob("*/status"):
        if int(status.parent.name) not in but:
            lines = status.read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
    return total


def _run(count: int, server: Server) -> dict[str, float]:
    transport = connect(server, transport_factory=fast_transport)
    paramiko_thread = transport.native_id  # it wakes by itself ten times a second, with or without proxies
    with TemporaryDirectory() as directory:
        viewer = Path(directory, "viewer.py")
        viewer.write_text(_VIEWER)

        def proxy(number: int) -> Proxy:
            return Proxy(
                SessionInfo(name=f"cost-{number}", graphics_port=server.targets[0]),
                transport,
                backend=CommandBackend(
                    [sys.executable, "-S", "-E", str(viewer), "{path}"], ready_when=re.compile("all is back")
                ),
                sessions_root=Path(directory),
            )

        first = proxy(0)  # creates what proxies share
        first.start()
        first.wait_running(RUNNING_S)
        time.sleep(_SETTLE_S)
        before, proxies = _now(), [proxy(number + 1) for number in range(count)]
        began = time.perf_counter()
        for each in proxies:
            each.start()
        for each in proxies:
            each.wait_running(RUNNING_S)
        started_s = time.perf_counter() - began
        time.sleep(_SETTLE_S)
        after, excluded = _now(), {paramiko_thread, threading.get_native_id()}
        wake_ups = _wake_ups(excluded)
        time.sleep(IDLE_S)
        wake_ups = _wake_ups(excluded) - wake_ups
        began = time.perf_counter()
        for each in proxies:
            each.stop()
        for each in [*proxies, first]:
            each.close(RUNNING_S)
        stopped_s = time.perf_counter() - began
    transport.close()
    return {
        **{what: (after[what] - before[what]) / count for what in before},
        "wake_ups_s": wake_ups / IDLE_S / count,
        "start_ms": started_s * 1000 / count,
        "stop_ms": stopped_s * 1000 / count,
    }


def main() -> None:
    """Print the costs as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    parser.add_argument("server", type=json.loads)
    arguments = parser.parse_args()
    print(json.dumps(_run(arguments.count, Server(**arguments.server))))  # noqa: T201 - read by the parent process


if __name__ == "__main__":
    main()
