"""``proxy-fsm run`` against a real X2Go server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import proxy_fsm

from .display import RED
from .procs import SYSTEM_PATH, command_lines

if TYPE_CHECKING:
    import paramiko

    from .x2go import AgentSession, Display, X2GoServer

EXIT_S = 20.0


def arguments(server: X2GoServer, agent: AgentSession, display: Display, home: Path) -> dict[str, Any]:
    """Return the command that attaches to a session, and its environment."""
    command = [sys.executable, "-m", "proxy_fsm", "run", f"{server.user}@127.0.0.1", "-p", str(server.port)]
    command += ["-i", str(server.client_key_path), "--known-hosts", str(server.known_hosts_path)]
    command += ["--session", agent.name, "--graphics-port", str(agent.graphics_port), "--display", str(agent.display)]
    command += ["--sessions-root", str(home / "sessions"), "--ask-server", "--log-format", "json", "-v"]
    environ = {"HOME": str(home), "PATH": SYSTEM_PATH, "PYTHONPATH": str(Path(proxy_fsm.__file__).parents[1])}
    return {"args": command, "env": {**environ, **display.env, "PYTHONWARNINGS": "error"}}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_session_runs_until_a_signal_suspends_it(
    *,
    x2go_server: X2GoServer,
    ssh_client: paramiko.SSHClient,
    agent: AgentSession,
    display: Display,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    program = arguments(x2go_server, agent, display, tmp_path)
    program["args"] += ["--cookie-file", "-"]
    with subprocess.Popen(
        **program,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            process.stdin.write(f"{agent.cookie}\n")
            process.stdin.close()
            lines: list[str] = []
            while not lines or json.loads(lines[-1]).get("dest") != "running":
                lines.append(process.stdout.readline())
                assert lines[-1], process.stderr.read()
            assert not [line for line in command_lines().values() if agent.cookie.encode() in line]
            display.wait_for(RED)
            assert x2go_server.status(ssh_client, agent.name) == "R"
            process.send_signal(number)
            lines += process.stdout
            assert process.wait(EXIT_S) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()
    events = [json.loads(line) for line in lines]
    assert [event["dest"] for event in events if event["event"] == "proxy.transition"] == (
        ["tunnelling", "spawning", "running", "stopping", "stopped"]
    )
    assert events[-1]["reason"] == "stop_requested"
    assert agent.cookie not in "".join(lines)
    assert x2go_server.wait_status(ssh_client, agent.name, "S") == "S"


def test_session_suspended_by_the_server_is_reported_as_suspended(
    x2go_server: X2GoServer, ssh_client: paramiko.SSHClient, agent: AgentSession, display: Display, tmp_path: Path
) -> None:
    """The server is asked, hence `session_suspended`; the cookie comes from a file."""
    cookie_file = tmp_path / "cookie"
    cookie_file.touch(mode=0o600)
    cookie_file.write_text(agent.cookie)
    program = arguments(x2go_server, agent, display, tmp_path)
    program["args"] += ["--cookie-file", str(cookie_file)]
    with subprocess.Popen(**program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if json.loads(line).get("dest") == "running":
                    break
            x2go_server.suspend(ssh_client, agent.name)
            events = [json.loads(line) for line in process.stdout]
            assert process.wait(EXIT_S) == 0
        finally:
            process.kill()
    assert events[-1]["reason"] == "session_suspended"
