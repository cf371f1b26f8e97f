"""``proxy-fsm connect`` and ``sessions`` against a real X2Go server."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import proxy_fsm
from tests.helpers.wait import eventually

from .display import RED
from .procs import SYSTEM_PATH, alive, command_lines
from .x2go import RED_XTERM, START_ATTEMPTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    import paramiko

    from .x2go import Display, X2GoServer

EXIT_S = 60.0


class User:
    """A user with a display, a home and a key, who runs the command line."""

    def __init__(self, server: X2GoServer, display: Display, home: Path) -> None:
        self.server = server
        self.home = home
        self.written = ""
        self.environ = {
            "HOME": str(home),
            "PATH": SYSTEM_PATH,
            "PYTHONPATH": str(Path(proxy_fsm.__file__).parents[1]),
            "PYTHONWARNINGS": "error",
            **display.env,
        }

    def _command(self, verb: str, *more: str) -> list[str]:
        server = self.server
        command = [sys.executable, "-m", "proxy_fsm", verb, f"{server.user}@127.0.0.1", "-p", str(server.port)]
        command += ["-i", str(server.client_key_path), "--known-hosts", str(server.known_hosts_path)]
        return [*command, "--log-format", "json", *more]

    def run(self, verb: str, *more: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        command = self._command(verb, *more)
        ended = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=EXIT_S, check=False)
        self.written += ended.stdout + ended.stderr
        return ended

    def listed(self) -> dict[str, dict[str, Any]]:
        """Run ``sessions``; return its events by session name."""
        events = [json.loads(line) for line in self.run("sessions").stdout.splitlines()]
        return {event["session"]: event for event in events if "session" in event}

    @contextlib.contextmanager
    def connected(self, *more: str) -> Iterator[Connection]:
        """Run ``connect``; end it with `Connection.finish`."""
        with subprocess.Popen(
            self._command("connect", "-v", *more),
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            connection = Connection(process)
            try:
                yield connection
            finally:
                process.kill()
                self.written += connection.written


class Connection:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []
        self.written = ""

    def until(self, event: str, **fields: object) -> dict[str, Any] | None:
        """Read events up to and including this one; None if the output ended before."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.written += line
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == event and fields.items() <= self.events[-1].items():
                return self.events[-1]
        return None

    def finish(self) -> int:
        """Read the rest; return the exit status."""
        self.until("never")
        assert self.process.stderr is not None
        assert self.process.stderr.read() == ""
        return self.process.wait(EXIT_S)


@pytest.fixture
def user(x2go_server: X2GoServer, ssh_client: paramiko.SSHClient, display: Display, tmp_path: Path) -> Iterator[User]:
    """A user whose sessions are terminated afterwards; the database may list stale ones of an earlier run."""
    before = rows(x2go_server, ssh_client)
    yield User(x2go_server, display, tmp_path)
    for name in rows(x2go_server, ssh_client).keys() - before.keys():
        x2go_server.terminate(ssh_client, name)


def rows(server: X2GoServer, client: paramiko.SSHClient) -> dict[str, list[str]]:
    return {row.split("|")[1]: row.split("|") for row in server.list_sessions(client).splitlines()}


@contextlib.contextmanager
def started(user: User) -> Iterator[tuple[Connection, str]]:
    """Start a session; retry if two test runs claimed the same display or port in the same moment."""
    arguments = ["--command", RED_XTERM, "--link", "lan"]
    for attempt in range(START_ATTEMPTS):
        with user.connected(*arguments) as connection:
            event = connection.until("session.program_started")
            if event is not None:
                yield connection, event["session"]
                return
            assert attempt < START_ATTEMPTS - 1, connection.events
            assert connection.events[-1].get("reason") == "not_started", connection.events


def test_session_is_started_suspended_listed_resumed_taken_over_and_ended(
    x2go_server: X2GoServer, ssh_client: paramiko.SSHClient, display: Display, user: User
) -> None:
    """A single test, since each start of an agent takes seconds."""
    with started(user) as (connection, name):
        display.wait_for(RED)
        cookie, agent_pid = (rows(x2go_server, ssh_client)[name][column] for column in (6, 0))
        assert not [line for line in command_lines().values() if cookie.encode() in line]
        connection.process.send_signal(signal.SIGINT)
        assert connection.finish() == 0
    left = connection.events[-1]
    assert (left["event"], left["status"]) == ("session.released", "suspended")
    assert f"@127.0.0.1 --port {x2go_server.port} --key " in left["hint"]
    assert left["hint"].endswith(f" --link lan --session {name}")
    assert x2go_server.status(ssh_client, name) == "S"
    display.wait_without(RED)

    listed = user.listed()[name]
    assert (listed["event"], listed["status"], listed["resumable"]) == ("session.listed", "suspended", True)

    with user.connected("--session", name) as elsewhere:
        assert elsewhere.until("proxy.transition", dest="running"), elsewhere.events
        display.wait_for(RED)
        assert x2go_server.status(ssh_client, name) == "R"
        with user.connected("--session", name, "--take-over") as connection:
            assert connection.until("proxy.transition", dest="running"), connection.events
            assert elsewhere.finish() == 0
            display.wait_for(RED)
            assert x2go_server.status(ssh_client, name) == "R"
            assert not [line for line in command_lines().values() if cookie.encode() in line]
            x2go_server.terminate(ssh_client, name)
            assert connection.finish() == 0
    assert connection.events[-1]["status"] == "finished"
    eventually(lambda: not alive(int(agent_pid)), EXIT_S)
    assert cookie.lower() not in user.written.lower()


def test_new_session_that_cannot_be_shown_is_terminated(
    x2go_server: X2GoServer, ssh_client: paramiko.SSHClient, user: User, tmp_path: Path
) -> None:
    """The nxproxy of this test exits at once."""
    idle = tmp_path / "nxproxy"
    idle.write_text("#!/bin/sh\nexit 0\n")
    idle.chmod(0o755)
    user.environ["NXPROXY_BINARY"] = str(idle)
    before = rows(x2go_server, ssh_client)
    events: list[dict[str, Any]] = [{"reason": "not_started"}]
    status = 0
    for _ in range(START_ATTEMPTS):
        if events[-1].get("reason") != "not_started":
            break
        ended = user.run("connect", "--command", RED_XTERM)
        status, events = ended.returncode, [json.loads(line) for line in ended.stdout.splitlines()]
    assert status >= 10, events
    assert (events[-1]["event"], events[-1]["status"]) == ("session.released", "terminated")
    assert rows(x2go_server, ssh_client).keys() == before.keys()


def test_failed_preflight_starts_no_session(
    x2go_server: X2GoServer, ssh_client: paramiko.SSHClient, user: User
) -> None:
    user.environ["DISPLAY"] = ":59999"
    before = rows(x2go_server, ssh_client)
    ended = user.run("connect", "--command", RED_XTERM)
    assert ended.returncode == proxy_fsm.EndReason.DISPLAY_UNAVAILABLE.cli_status
    assert [json.loads(line)["event"] for line in ended.stdout.splitlines()] == ["preflight.failed"]
    assert rows(x2go_server, ssh_client).keys() == before.keys()


def test_program_missing_on_the_server_starts_no_session(
    x2go_server: X2GoServer, ssh_client: paramiko.SSHClient, user: User
) -> None:
    before = rows(x2go_server, ssh_client)
    ended = user.run("connect", "--command", "no-such-program")
    assert ended.returncode == 3
    assert "no-such-program" in json.loads(ended.stdout.splitlines()[-1])["detail"]
    assert rows(x2go_server, ssh_client).keys() == before.keys()
