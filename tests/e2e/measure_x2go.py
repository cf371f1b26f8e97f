"""Measures the figures for our class in docs/moving-from-python-x2go.md: ``python -m tests.e2e.measure_x2go``."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from proxy_fsm.x2go.nx3 import X2GoProxy
from tests.helpers.wait import eventually

from .procs import send_signal
from .x2go import Display, X2GoServer, transport_of

if TYPE_CHECKING:
    from collections.abc import Callable

END_S = 30.0


def silent(*_: Any, **__: Any) -> None:
    """Log nothing."""


def one(server: X2GoServer, fault: str) -> str:
    """Start a session through the API, cause a fault, and report the outcome and its time."""
    with (
        Display() as display,
        contextlib.closing(server.connect()) as admin,
        contextlib.closing(server.connect()) as client,
    ):
        agent = server.start_agent(admin)
        os.environ.update(display.env)
        if fault == "no X server":
            os.environ["DISPLAY"] = ":9999"
        root = tempfile.mkdtemp(prefix="pfsm-measure-")
        info = SimpleNamespace(
            name=agent.name,
            cookie="0" * 32 if fault == "wrong cookie" else agent.cookie,
            graphics_port=1 if fault == "port refused" else agent.graphics_port,
            display=agent.display,
            local_container=f"{root}/S-{agent.name}",
        )
        proxy = X2GoProxy(info, transport_of(client), sessions_rootdir=root, logger=silent)
        if fault == "program missing":
            proxy.PROXY_CMD = "/nowhere/nxproxy"
        began = time.monotonic()
        process, ok = proxy.start_proxy()
        started_s = time.monotonic() - began
        actions: dict[str, Callable[[], object]] = {
            "stop": proxy.stop_thread,
            "proxy killed": lambda: send_signal([process.pid] if process else [], signal.SIGKILL),
            "SSH dropped": lambda: send_signal(server.session_pids(client), signal.SIGKILL),
            "suspended": lambda: server.suspend(admin, agent.name),
            "terminated": lambda: server.terminate(admin, agent.name),
        }
        after_s = started_s
        if fault in actions:
            time.sleep(1)  # a session in use
            began = time.monotonic()
            actions[fault]()
            eventually(lambda: not proxy.ok(), END_S, interval_s=0.001)
            after_s = time.monotonic() - began
        proxy.stop_thread()
        assert proxy.engine is not None
        status = proxy.engine.status()
        server.end(agent)
        return f"{fault}: start_proxy ok={ok} in {started_s:.3f} s; {status.reason}; not ok after {after_s:.3f} s"


def main() -> None:
    """Measure them all."""
    faults = "program missing,no X server,port refused,wrong cookie,proxy killed,SSH dropped,suspended,terminated,stop"
    with X2GoServer(user="pfsmmeasure") as server:
        for fault in faults.split(","):
            print(one(server, fault), flush=True)  # noqa: T201 - a command-line tool


if __name__ == "__main__":
    main()
