"""Fixtures for running proxies: an SSH server, an agent, and a display, all of them stand-ins."""

from __future__ import annotations

import contextlib
import os
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import pytest

from proxy_fsm.testing import LoopbackSSHServer, standins
from proxy_fsm.testing.scripted import ScriptedProxy
from tests.helpers.agent import Agent
from tests.helpers.engine import COOKIE, HEALTHY

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    import paramiko

    from proxy_fsm.testing.scripted import Step
    from proxy_fsm.x2go.base import X2GoProxy

NAME = "alice-51-1795334442_stDxterm_dp24"


@dataclass
class Info:
    """What python-x2go knows about a session."""

    graphics_port: Any
    local_container: str
    name: str = NAME
    cookie: str = COOKIE
    display: Any = 51
    status: str = "R"


@dataclass
class Session:
    """python-x2go's session as its proxy sees it; records the calls."""

    calls: list[Any] = field(default_factory=list)

    def set_session_name(self, name: str) -> None:
        self.calls.append(name)

    def HOOK_forwarding_tunnel_setup_failed(self, **fields: Any) -> None:  # noqa: N802 - python-x2go's name
        self.calls.append(fields)


class Log:
    """A logger like python-x2go's."""

    tag = "theirs"

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []
        self.tags: set[str] = set()

    def __call__(self, msg: str, loglevel: int = 0, tag: str | None = None) -> None:
        self.tags.add(tag or self.tag)
        self.lines.append((loglevel, msg))

    def get_loglevel(self) -> int:
        return 56

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)


@dataclass
class Scene:
    """All that a proxy needs; it stops the proxies that it made on exit."""

    server: LoopbackSSHServer
    client: paramiko.SSHClient
    agent: Agent
    home: Path
    log: Log = field(default_factory=Log)
    made: list[X2GoProxy] = field(default_factory=list)

    @property
    def container(self) -> Path:
        return self.home / "sessions" / f"S-{NAME}"

    @property
    def info(self) -> Info:
        return Info(self.agent.port, str(self.container))

    @property
    def transport(self) -> Any:
        return self.client.get_transport()

    def program(self, steps: Sequence[Step] = HEALTHY, name: str = "viewer") -> str:
        """Install a program that performs these steps, and return its path."""
        return str(ScriptedProxy(steps).install(self.home / name))

    def make(self, kind: type[X2GoProxy], **changes: Any) -> Any:
        """Make a proxy; typed Any, since tests access undeclared attributes."""
        options = {
            "session_info": self.info,
            "ssh_transport": self.transport,
            "sessions_rootdir": str(self.home / "sessions"),
            "logger": self.log,
        }
        proxy = kind(**{**options, **changes})
        self.made.append(proxy)
        return proxy

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for proxy in self.made:
            proxy.stop_thread()


@pytest.fixture(scope="session")
def x_display() -> Iterator[str]:
    """An X server that accepts every client."""
    command = standins.command("display")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[1]
        process.terminate()


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    for name in ("NXPROXY_BINARY", "X2GOKDRIVECLIENT_BINARY", "XAUTHORITY", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with (
        LoopbackSSHServer() as server,
        contextlib.closing(server.connect()) as client,
        Agent(serving=True) as agent,
        Scene(server, client, agent, tmp_path) as scene,
    ):
        yield scene
