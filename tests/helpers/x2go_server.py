"""The X2Go server commands that the command line uses; the agent is a stand-in."""

from __future__ import annotations

import shlex
import subprocess
from typing import TYPE_CHECKING, Self

from proxy_fsm.testing import LoopbackSSHServer, standins

if TYPE_CHECKING:
    from collections.abc import Callable

COOKIE = "0123456789abcdef0123456789abcdef"
NAME = "alice-50-1795334442_stDxterm_dp24"


def row(name: str = NAME, status: str = "S", port: int = 30001, client: str = "192.0.2.7", cookie: str = COOKIE) -> str:
    """One line of x2golistsessions."""
    columns = ("4711", name, "50", "server", status, "2026-11-22T11:38:00", cookie, client, str(port), "30002")
    return "|".join([*columns, "2026-11-22T11:39:00", "alice", "60", "30003", "-1", "-1"])


class FakeX2Go:
    """A server with at most one session.

    Attributes:
        ssh: The SSH server, whose commands can be replaced.
        calls: The commands received, as argument lists.
        lines: The same, as they came.
        status: The session's status letter; None before there is a session.
        other_rows: Further rows of the session list.
        programs: What ``command -v`` finds.
    """

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.lines: list[str] = []
        self.status: str | None = None
        self.other_rows: list[str] = []
        self.programs = {"xterm"}
        self.port = 30001
        self.agents: list[subprocess.Popen[str]] = []
        self.commands = {
            "x2golistsessions": self._list,
            "x2gostartagent": self._start,
            "x2goresume-session": self._resume,
            "x2gosuspend-session": self._suspend,
            "x2goterminate-session": self._terminate,
            "x2gogetstatus": self._status_of,
            "command": self._find,
            "setsid": lambda _words: (0, b"", b""),
        }
        self.ssh = LoopbackSSHServer(
            commands={name: self._recorded(function) for name, function in self.commands.items()}
        )

    def __enter__(self) -> Self:
        self.ssh.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ssh.stop()
        for agent in self.agents:
            agent.kill()
            agent.communicate()

    def answer(self, command: str, exit_code: int = 0, output: str = "", errors: str = "") -> None:
        """Set a command's answer from now on."""
        function = self._recorded(lambda _words: (exit_code, output.encode(), errors.encode()))
        self.ssh.commands = {**self.ssh.commands, command: function}

    def without(self, *commands: str) -> None:
        """Remove commands."""
        self.ssh.commands = {name: each for name, each in self.ssh.commands.items() if name not in commands}

    def called(self, command: str) -> list[list[str]]:
        """Return the arguments of each call of a command."""
        return [words[1:] for words in self.calls if words[0] == command]

    @property
    def ran(self) -> list[list[str]]:
        """The arguments of each x2goruncommand call."""
        return [words[2:-4] for words in self.calls if words[:2] == ["setsid", "x2goruncommand"]]

    def start_agent(self) -> None:
        """Start an agent, which then waits for a proxy."""
        agent = subprocess.Popen(
            standins.command("agent"), env={standins.COOKIE_VARIABLE: COOKIE}, stdout=subprocess.PIPE, text=True
        )
        self.agents.append(agent)
        assert agent.stdout is not None
        self.port = int(agent.stdout.readline().split()[1])
        self.status = "R"

    def _recorded(
        self, function: Callable[[list[str]], tuple[int, bytes, bytes]]
    ) -> Callable[[str], tuple[int, bytes, bytes]]:
        def record(line: str) -> tuple[int, bytes, bytes]:
            words = shlex.split(line)
            self.calls.append(words)
            self.lines.append(line)
            return function(words)

        return record

    def _notice_end(self) -> None:
        """Have a session whose agent has been left as suspended: the agent itself reports it to the database."""
        if self.status == "R" and self.agents and self.agents[-1].poll() is not None:
            self.status = "S"

    def _list(self, _words: list[str]) -> tuple[int, bytes, bytes]:
        self._notice_end()
        own = [] if self.status is None else [row(status=self.status, port=self.port)]
        return 0, "\n".join([*own, *self.other_rows]).encode(), b""

    def _start(self, _words: list[str]) -> tuple[int, bytes, bytes]:
        self.start_agent()
        return 0, f"50\n{COOKIE}\n4711\n{NAME}\n{self.port}\n30002\n30003\n".encode(), b""

    def _resume(self, _words: list[str]) -> tuple[int, bytes, bytes]:
        self.start_agent()
        return 0, f"gr_port={self.port}\nsound_port=30002\nfs_port=30003\n".encode(), b""

    def _suspend(self, words: list[str]) -> tuple[int, bytes, bytes]:
        if words[1] == NAME and self.status is not None:
            self.status = "S"
        return 0, b"", b""

    def _terminate(self, words: list[str]) -> tuple[int, bytes, bytes]:
        if words[1] == NAME:
            self.status = None
        return 0, b"", b""

    def _status_of(self, words: list[str]) -> tuple[int, bytes, bytes]:
        self._notice_end()
        return 0, (self.status or "F" if words[1] == NAME else "").encode(), b""

    def _find(self, words: list[str]) -> tuple[int, bytes, bytes]:
        """Of ``command -v PROGRAM >/dev/null``."""
        return 0 if words[2] in self.programs else 127, b"", b""
