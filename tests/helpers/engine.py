"""What the tests of a whole engine need: a backend that runs scripts, and proxies that are closed in the end."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy_fsm import NX3Backend, Proxy, SessionInfo, State
from proxy_fsm.testing.scripted import ScriptedProxy, Step, connect, say, wait_eof

from .recorder import Recorder
from .wait import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    import paramiko

    from .agent import Agent

COOKIE = "0123456789abcdef0123456789abcdef"
READY_LINE = "Info: Established X server connection."
HEALTHY = (connect(), say(READY_LINE), wait_eof())


def let_deadline_pass(proxy: Proxy) -> None:
    """Let the deadline that is running be over now."""
    proxy._engine.call_soon(proxy._engine.expire_deadline)


def notified(proxy: Proxy) -> None:
    """Wait until each subscriber has been called with all that there is."""
    assert proxy._engine.journal.flush(WAIT_S)


def end_after(seconds: int) -> None:
    """In a forked child: see to it that it comes to an end, whatever it hangs in."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the parent's handler would swallow it
    signal.alarm(seconds)


class ScriptedBackend(NX3Backend):
    """Runs a script as nxproxy would be run; wants no X server."""

    needs_display = False

    def __init__(self, directory: Path, steps: Sequence[Step] = HEALTHY) -> None:
        super().__init__(str(ScriptedProxy(steps).install(directory / "nxproxy")))


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
