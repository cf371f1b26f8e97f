"""Runs an example unchanged, with stand-ins for the server, the agent, nxproxy and the display.

``python -m tests.docs_scene [--window] FILE [ARGUMENT…]`` executes a file as a program; with ``--window`` it gets a
real X server. Every host that it connects to is an embedded SSH server with the commands of an X2Go server. An
established session ends by itself after ``DOCS_SCENE_SESSION_S`` seconds (a moment by default), as if its user had
logged out, so that an example that waits for the end terminates.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import paramiko

from proxy_fsm.testing import LoopbackSSHServer, standins
from proxy_fsm.testing.scripted import install

from .e2e.display import Display

if TYPE_CHECKING:
    from collections.abc import Iterator

#: How long an established session lasts: longer than it takes to count as one that survives.
SESSION_S = float(os.environ.get("DOCS_SCENE_SESSION_S", "0.7"))


class Agents:
    """The agents that were started by ``x2gostartagent``, on displays from 50."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._listed: list[tuple[subprocess.Popen[bytes], str]] = []

    def start(self, _command: str) -> tuple[int, bytes, bytes]:
        """Answer ``x2gostartagent``."""
        cookie, number = token_hex(16), 50 + len(self._listed)
        agent, port = started("agent", **{standins.COOKIE_VARIABLE: cookie})
        self._stack.callback(ended, agent)
        threading.Thread(target=log_out, args=[agent], daemon=True).start()
        name = f"alice-{number}-1795334442_stDxterm_dp24"
        row = f"{agent.pid}|{name}|{number}|server|R|2026-11-22T10:00:00|{cookie}|10.0.0.1|{port}|30002|"
        self._listed.append((agent, f"{row}2026-11-22T10:00:00|alice|10|30003|-1|-1\n"))
        answer = f"{number}\n{cookie}\n{agent.pid}\n{name}\n{port}\n30002\n30003\n"
        return 0, answer.encode(), b""

    def listed(self, _command: str) -> tuple[int, bytes, bytes]:
        """Answer ``x2golistsessions``."""
        return 0, "".join(row for agent, row in self._listed if agent.poll() is None).encode(), b""

    def status(self, _command: str) -> tuple[int, bytes, bytes]:
        """Answer ``x2gogetstatus``, which is asked for those that are not listed."""
        return 0, b"F", b""


def started(role: str, **environ: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start a stand-in, and return the value in its first line."""
    process = subprocess.Popen(standins.command(role), env={**os.environ, **environ}, stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process, process.stdout.readline().decode().split()[1]


def log_out(agent: subprocess.Popen[bytes]) -> None:
    """End a session a moment after it is established."""
    assert agent.stdout is not None
    if agent.stdout.readline() == b"RUNNING\n":
        time.sleep(SESSION_S)
        agent.send_signal(signal.SIGTERM)


def ended(process: subprocess.Popen[bytes]) -> None:
    """End a stand-in."""
    process.terminate()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


@contextlib.contextmanager
def scene(*, window: bool) -> Iterator[None]:
    """Set up everything that an example relies on.

    Args:
        window: Whether it opens a window, so that a stand-in for the X server does not suffice.
    """
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pfsm-docs-")))
        (home / "bin").mkdir()
        install(home / "bin" / "nxproxy", standins.command("proxy"))
        if window:
            screen = stack.enter_context(Display()).env
        else:
            display, name = started("display")
            stack.callback(ended, display)
            screen = {"DISPLAY": name}
        agents = Agents(stack)
        commands = {
            "command": lambda _: (0, b"", b""),
            "setsid": lambda _: (0, b"", b""),
            "x2gostartagent": agents.start,
            "x2golistsessions": agents.listed,
            "x2gogetstatus": agents.status,
        }
        server = stack.enter_context(LoopbackSSHServer(username="alice", commands=commands))
        path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
        os.environ.update(screen, HOME=str(home), PATH=path, XDG_RUNTIME_DIR=str(home))
        connect = paramiko.SSHClient.connect

        def connect_here(client: paramiko.SSHClient, hostname: str, port: int = 22, **options: Any) -> None:
            if not hostname.endswith(".example"):  # an example's own server
                connect(client, hostname, port, **options)
                return
            client.get_host_keys().add(f"[{server.host}]:{server.port}", server.host_key.get_name(), server.host_key)
            connect(
                client,
                server.host,
                server.port,
                **{**options, "username": server.username, "pkey": server.client_key, "look_for_keys": False},
            )

        paramiko.SSHClient.connect = connect_here  # type: ignore[method-assign,assignment]
        yield


if __name__ == "__main__":
    window = sys.argv[1] == "--window"
    sys.argv = sys.argv[2 if window else 1 :]
    with scene(window=window):
        runpy.run_path(sys.argv[0], run_name="__main__")
