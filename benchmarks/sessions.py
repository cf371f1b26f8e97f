"""Real sessions: how long start and stop take, compared with nxproxy run by hand through an open ``ssh -L``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from proxy_fsm import Proxy, SessionInfo, fast_transport, parse_agent_output

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import paramiko

    from tests.e2e.display import Display
    from tests.e2e.x2go import AgentSession, X2GoServer

_RUNNING_S = 30.0
_LISTENING_S = 10.0

Times = dict[str, list[float]]


class Missing(Exception):  # noqa: N818 - a result, shown in the tables
    """A program that real sessions need is not installed."""


def measure(count: int, say: Callable[[str], None]) -> Times:
    """Start and stop one session repeatedly, alternating both kinds; return times in milliseconds.

    Each turn attaches to the session that the server has resumed just before. Start is measured from the call until
    the session is established (``Established X server connection``); stop until everything is released, and how much
    of that follows the exit of nxproxy, whose own time differs in steps of 50 ms from one stop to the next.

    Raises:
        Missing: Programs are missing.
    """
    from tests.e2e.display import Display  # noqa: PLC0415 - only a checkout has the tests' harness
    from tests.e2e.procs import missing_programs  # noqa: PLC0415
    from tests.e2e.x2go import X2GoServer, run  # noqa: PLC0415

    missing = [*missing_programs(), *([] if shutil.which("ssh") else ["ssh"])]
    if missing:
        raise Missing(f"missing: {', '.join(missing)} (as root, tests/install-system-packages installs them)")
    kinds = ("start_ours_ms", "start_by_hand_ms", "stop_ours_ms", "stop_by_hand_ms", "stop_after_exit_ms")
    times: Times = {kind: [] for kind in kinds}
    with contextlib.ExitStack() as stack:
        server, display = stack.enter_context(X2GoServer()), stack.enter_context(Display())
        client = stack.enter_context(contextlib.closing(server.connect()))
        ours = stack.enter_context(contextlib.closing(_connect(server)))
        root = Path(stack.enter_context(TemporaryDirectory()))
        agent = server.start_agent(client)
        environ = {"PATH": os.environ["PATH"], "HOME": str(root), **display.env}
        for number in range(count):
            if number:
                agent = _resumed(server, client, agent)

            def settle(agent: AgentSession = agent) -> None:
                """Wait until the agent serves programs: earlier it does not survive the loss of its proxy."""
                run(client, f"DISPLAY=:{agent.display} xwininfo -root")

            _run_by_hand(server, agent, display, settle, times)
            agent = _resumed(server, client, agent)
            _run_ours(agent, ours, root, environ, settle, times)
            say(f"sessions: {number + 1} of {count}")
        server.end(agent)
    return times


def _connect(server: X2GoServer) -> paramiko.Transport:
    transport = fast_transport(socket.create_connection(("127.0.0.1", server.port)))
    transport.connect(server.host_key, server.user, pkey=server.client_key)
    return transport


def _resumed(server: X2GoServer, client: paramiko.SSHClient, agent: AgentSession) -> AgentSession:
    server.wait_status(client, agent.name, "S")
    return dataclasses.replace(agent, graphics_port=server.resume(client, agent).graphics_port)


def _session(agent: AgentSession) -> SessionInfo:
    return dataclasses.replace(parse_agent_output(agent.raw), graphics_port=agent.graphics_port)


def _run_ours(  # noqa: PLR0917 - all of them form the scene
    agent: AgentSession,
    transport: paramiko.Transport,
    root: Path,
    environ: Mapping[str, str],
    settle: Callable[[], None],
    times: Times,
) -> None:
    proxy = Proxy(_session(agent), transport, sessions_root=root, environ=environ, resumed=True)
    began = time.perf_counter()
    proxy.start()
    proxy.wait_running(_RUNNING_S)
    times["start_ours_ms"].append((time.perf_counter() - began) * 1000)
    settle()
    exited = _Exit(proxy.status().pid)
    began = time.perf_counter()
    proxy.close(_RUNNING_S)
    ended = time.perf_counter()
    times["stop_ours_ms"].append((ended - began) * 1000)
    times["stop_after_exit_ms"].append((ended - exited.at()) * 1000)


class _Exit:
    """Records when a process exits, without being its parent."""

    def __init__(self, pid: int | None) -> None:
        assert pid is not None  # noqa: S101 - it is running
        self._process = os.pidfd_open(pid)
        self._at = 0.0
        self._thread = threading.Thread(target=self._wait)
        self._thread.start()

    def _wait(self) -> None:
        select.select([self._process], [], [])
        self._at = time.perf_counter()

    def at(self) -> float:
        self._thread.join()
        os.close(self._process)
        return self._at


def _run_by_hand(
    server: X2GoServer, agent: AgentSession, display: Display, settle: Callable[[], None], times: Times
) -> None:
    from tests.e2e.byhand import ESTABLISHED, NxProxy  # noqa: PLC0415 - only a checkout has the tests' harness
    from tests.helpers.wait import eventually  # noqa: PLC0415

    with TemporaryDirectory() as directory:
        path = Path(directory, "tunnel")
        command = ["ssh", "-N", "-n", "-F", "none", "-i", str(server.client_key_path), "-p", str(server.port)]
        command += ["-o", f"UserKnownHostsFile={server.known_hosts_path}", "-o", "IdentitiesOnly=yes"]
        command += ["-o", "BatchMode=yes", "-L", f"{path}:127.0.0.1:{agent.graphics_port}"]
        tunnel = subprocess.Popen([*command, f"{server.user}@127.0.0.1"], stderr=subprocess.DEVNULL)
        try:
            eventually(path.exists, _LISTENING_S)
            with NxProxy(agent, path, display.env) as nxproxy:
                times["start_by_hand_ms"].append(nxproxy.wait_for(ESTABLISHED, timeout_s=_RUNNING_S).at_s * 1000)
                settle()
                began = time.perf_counter()
                nxproxy.send(signal.SIGTERM)
                nxproxy.wait_exit()
                times["stop_by_hand_ms"].append((time.perf_counter() - began) * 1000)
        finally:
            tunnel.kill()
            tunnel.wait()
