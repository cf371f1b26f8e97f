"""What the engine's tests stand on: an agent to reach, a backend that runs scripts, and what must be left: nothing."""

from __future__ import annotations

import signal
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy_fsm import NX3Backend, Proxy, SessionInfo, State
from proxy_fsm.testing.scripted import ScriptedProxy, Step, connect, say, wait_eof

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import paramiko

    from .helpers.agent import Agent

COOKIE = "0123456789abcdef0123456789abcdef"
READY_LINE = "Info: Established X server connection."
HEALTHY = (connect(), say(READY_LINE), wait_eof())


def let_deadline_pass(proxy: Proxy) -> None:
    """Let the deadline that is running be over now; nothing may happen meanwhile that sets another."""
    engine = proxy._engine
    timer = engine._timer
    assert timer is not None
    engine._timer = (0.0, timer[1])
    engine._inbox.put(None)


def end_after(seconds: int) -> None:
    """In a forked child: see to it that it comes to an end, whatever it hangs in."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the parent's handler would swallow it
    signal.alarm(seconds)


class ScriptedBackend(NX3Backend):
    """Runs a script as nxproxy would be run; wants no X server."""

    needs_display = False

    def __init__(self, directory: Path, steps: Sequence[Step] = HEALTHY) -> None:
        super().__init__(str(ScriptedProxy(steps).install(directory / "nxproxy")))


class Recorder:
    """A logger that keeps what it gets, and on which thread."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def __getattr__(self, level: str) -> Callable[..., None]:
        def log(event: str, **fields: Any) -> None:
            self.events.append({"event": event, "level": level, "thread": threading.get_ident(), **fields})

        return log

    def named(self, name: str) -> list[dict[str, Any]]:
        """Return the events of a name."""
        return [event for event in self.events if event["event"] == name]

    def path(self) -> list[str]:
        """Return the states that were told, in order."""
        return [event["dest"] for event in self.named("proxy.transition")]


class Maker:
    """Makes proxies and sees to it that none outlives its test."""

    def __init__(self, transport: paramiko.Transport, agent: Agent, directory: Path) -> None:
        self.transport = transport
        self.agent = agent
        self.directory = directory
        self.log = Recorder()
        self.made: list[Proxy] = []

    def session(self, **changes: Any) -> SessionInfo:
        fields = {"name": "alice-51-1_stDxterm_dp24", "cookie": COOKIE, "display": 51, "graphics_port": self.agent.port}
        return SessionInfo(**{**fields, **changes})

    def __call__(self, steps: Sequence[Step] = HEALTHY, **options: Any) -> Proxy:
        place = Path(tempfile.mkdtemp(dir=self.directory))
        options.setdefault("backend", None)
        options["backend"] = options["backend"] or ScriptedBackend(place, steps)
        options.setdefault("logger", self.log)
        options.setdefault("sessions_root", self.directory / "sessions")
        session = options.pop("session", None) or self.session()
        proxy = Proxy(session, options.pop("transport", self.transport), **options)
        self.made.append(proxy)
        return proxy

    def close(self) -> None:
        for proxy in self.made:
            if proxy.state is not State.IDLE:
                proxy.close()
        self.made.clear()
