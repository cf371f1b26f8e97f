"""Runs the command line as a separate program in its own home."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from secrets import token_hex
from typing import IO, TYPE_CHECKING, Any

import proxy_fsm
from tests.helpers.wait import PROGRAM_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from proxy_fsm.testing import LoopbackSSHServer

#: Connects, and reads until the peer closes the connection.
VIEWER = "import socket,sys; s=socket.create_connection((sys.argv[1], int(sys.argv[2])))\nwhile s.recv(4096): pass"
VIEWER_COMMAND = (sys.executable, "-I", "-S", "-c", VIEWER, "{host}", "{port}")


@dataclass
class Home:
    """A home directory, and a minimal environment for it."""

    path: Path
    marker: str = field(default_factory=lambda: token_hex(8))

    @property
    def ssh(self) -> Path:
        directory = self.path / ".ssh"
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory

    @property
    def environ(self) -> dict[str, str]:
        """Contains `marker`, by which `processes` finds every process that was started."""
        return {
            "HOME": str(self.path),
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(Path(proxy_fsm.__file__).parents[1]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "error",
            "PROXY_FSM_TEST_MARKER": self.marker,
        }

    def add_known_host(self, server: LoopbackSSHServer, file: str = "known_hosts") -> Path:
        """Add a server to the known hosts."""
        key = server.host_key
        path = self.ssh / file
        with path.open("a") as known:
            known.write(f"[{server.host}]:{server.port} {key.get_name()} {key.get_base64()}\n")
        return path

    def write_key(self, server: LoopbackSSHServer, name: str = "key") -> Path:
        """Write the private key that a server accepts."""
        path = self.ssh / name
        server.client_key.write_private_key_file(str(path))
        return path

    def processes(self) -> dict[int, str]:
        """Return the command lines of the processes that were started here and still run, by pid."""
        found = {}
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.marker.encode() in (directory / "environ").read_bytes():
                    line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(directory.name)] = line
        return found

    def command_lines(self) -> list[str]:
        """Return the command lines of `processes` only."""
        return list(self.processes().values())


@dataclass
class Running:
    """A running command, and the events read from it so far."""

    process: subprocess.Popen[str]
    events: list[dict[str, Any]] = field(default_factory=list)
    raw: str = ""

    def until(self, matches: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Read events until one matches; each line of standard output must be an event."""
        while line := self._stdout.readline():
            event = self._parse(line)
            if matches(event):
                return event
        raise AssertionError(f"no such event before it exited: {self.events}")

    def until_state(self, state: str) -> dict[str, Any]:
        return self.until(lambda event: event.get("dest") == state)

    def finish(self) -> int:
        """Read the rest, and return the exit status."""
        for line in self._stdout:
            self._parse(line)
        return self.process.wait(PROGRAM_S)

    def named(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]

    @property
    def states(self) -> list[str]:
        return [event["dest"] for event in self.named("proxy.transition")]

    @property
    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    @property
    def _stdout(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def _parse(self, line: str) -> dict[str, Any]:
        self.raw += line
        event = json.loads(line)
        assert isinstance(event, dict)
        assert {"event", "timestamp", "level"} <= event.keys()
        assert event["timestamp"].endswith("Z")
        self.events.append(event)
        return event


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "proxy_fsm", *map(str, arguments)]


@contextmanager
def started(home: Home, *arguments: str | Path, **environ: str) -> Iterator[Running]:
    """Start the program, connected by pipes."""
    with subprocess.Popen(
        command(*arguments),
        env=home.environ | environ,
        cwd=home.path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield Running(process)
        finally:
            process.kill()


def run(home: Home, *arguments: str | Path, stdin: str = "", **environ: str) -> Running:
    """Run the program until it exits; read its events if they are JSON."""
    process = subprocess.run(
        command(*arguments),
        env=home.environ | environ,
        cwd=home.path,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        check=False,
        start_new_session=True,
    )
    running = Running(_Ended(process))  # type: ignore[arg-type]  # it has what `Running` uses
    if ("--log-format", "json") in pairwise(arguments):
        running.finish()
    return running


class _Ended:
    def __init__(self, process: subprocess.CompletedProcess[str]) -> None:
        self.returncode = process.returncode
        self.stdout = io.StringIO(process.stdout)
        self.stderr = io.StringIO(process.stderr)

    def wait(self, _timeout_s: float) -> int:
        return self.returncode


def run_arguments(
    home: Home, server: LoopbackSSHServer, graphics_port: int, *more: str | Path, viewer: Sequence[str] = VIEWER_COMMAND
) -> list[str | Path]:
    """Return the arguments of ``run`` that show an agent's port with a viewer."""
    return [
        *("run", f"{server.username}@{server.host}", "--port", str(server.port), "--log-format", "json"),
        *("--session", "test", "--graphics-port", str(graphics_port), "--sessions-root", home.path / "sessions"),
        *more,
        *("--backend", "command", "--", *viewer),
    ]
