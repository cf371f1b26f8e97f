"""Runs proxies under gevent, as ``import x2go`` makes every program of python-x2go do, and measures them.

Called with the host and port of an SSH server, a user, a password, the agent's port, a proxy program, a directory and
the directory of this checkout; prints its measurements as JSON.
"""

from __future__ import annotations

import gevent.monkey  # type: ignore[import-untyped]

gevent.monkey.patch_all()

import gc  # noqa: E402 - gevent has to be first
import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402
import paramiko  # noqa: E402

HOST, PORT, USER, PASSWORD, GRAPHICS_PORT, PROGRAM, ROOT, CHECKOUT = sys.argv[1:]
sys.path.insert(0, CHECKOUT)

from proxy_fsm.x2go.base import X2GoProxy  # noqa: E402
from tests.helpers.holdings import descriptors, own_threads  # noqa: E402

IDLE_S = 2.0
#: How long the resources of the last rounds may take to be released.
RELEASED_S = 10.0


class Viewer(X2GoProxy):
    PROXY_CMD = PROGRAM
    PROXY_ARGS = ["127.0.0.1", "{port}"]  # noqa: RUF012 - as in other subclasses
    subsystem = "viewer"


class Info:
    name = "alice-51-1795334442_stDxterm_dp24"
    cookie = "0123456789abcdef0123456789abcdef"
    graphics_port = int(GRAPHICS_PORT)
    display = 51
    local_container = os.path.join(ROOT, f"S-{name}")  # noqa: PTH118


class Hub:
    """Measures how long the hub is blocked for other greenlets."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._greenlet = gevent.spawn(self._tick)

    def _tick(self) -> None:
        last = time.monotonic()
        while True:
            gevent.sleep(0.01)
            now = time.monotonic()
            self.longest_s, last = max(self.longest_s, now - last), now

    def stop(self) -> float:
        self._greenlet.kill()
        return self.longest_s


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def holdings() -> dict[str, Any]:
    gc.collect()
    return {
        "descriptors": sorted(descriptors()),
        "threads": sorted(thread.name for thread in own_threads()),
        "native threads": len(os.listdir("/proc/self/task")),  # noqa: PTH208
    }


def holds_more(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Return whether anything is held now that was not held before."""
    return bool(
        set(now["descriptors"]) - set(before["descriptors"])
        or now["threads"]
        or now["native threads"] > before["native threads"]
    )


def one_round(transport: paramiko.Transport, *, idle: bool) -> dict[str, Any]:
    """Start, stay idle, stop; each lasts long enough to show a blocked hub."""
    hub = Hub()
    proxy = Viewer(Info, transport, sessions_rootdir=ROOT, logger=lambda *_, **__: None)
    process, ok = proxy.start_proxy()
    assert process is not None
    results: dict[str, Any] = {"ok": ok, "start_hub_s": hub.stop()}
    if idle:
        before = cpu_s()
        gevent.sleep(IDLE_S)
        results["idle_cpu"] = (cpu_s() - before) / IDLE_S
    hub = Hub()
    waiter = gevent.spawn(process.wait)
    began = time.monotonic()
    proxy.stop_thread()
    results["stop_s"] = time.monotonic() - began
    results["stop_hub_s"] = hub.stop()
    assert proxy.engine is not None
    status = proxy.engine.status()
    results["reason"] = str(status.reason)
    results["history"] = [
        status.detail,
        str(status.link),
        *(f"{each.dest} {each.elapsed_s:.3f}" for each in status.history),
    ]
    results["waited"] = waiter.get(timeout=5)
    proxy.join(5)
    return results


def faults(transport: paramiko.Transport) -> dict[str, str]:
    """End proxies by faults, the last one by closing the transport."""
    reasons = {}
    for fault in ("missing", "killed", "transport"):
        proxy = Viewer(Info, transport, sessions_rootdir=ROOT, logger=lambda *_, **__: None)
        if fault == "missing":
            proxy.PROXY_CMD = "/nowhere/viewer"
        proxy.start_proxy()
        if fault == "killed":
            assert proxy.proxy is not None
            os.kill(proxy.proxy.pid, 9)
        if fault == "transport":
            transport.close()
        proxy.join(10)
        assert proxy.engine is not None
        reasons[fault] = str(proxy.engine.status().reason)
        proxy.stop_thread()
    return reasons


def main() -> None:
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.AutoAddPolicy())  # noqa: S507 - a server of the test's, on loopback
    client.connect(HOST, int(PORT), USER, PASSWORD, allow_agent=False, look_for_keys=False)
    transport = client.get_transport()
    assert transport is not None
    rounds = [one_round(transport, idle=True)]
    before = holdings()
    # The first round may still be releasing its pidfd: that must not excuse one that a later round leaks.
    # All other descriptors of ours have unique names.
    before["descriptors"] = [name for name in before["descriptors"] if "[pidfd]" not in name]
    rounds += [one_round(transport, idle=False) for _ in range(2)]
    deadline = time.monotonic() + RELEASED_S
    while holds_more(after := holdings(), before) and time.monotonic() < deadline:
        gevent.sleep(0.05)
    print(json.dumps({"rounds": rounds, "before": before, "after": after, "faults": faults(transport)}))  # noqa: T201


if __name__ == "__main__":
    main()
