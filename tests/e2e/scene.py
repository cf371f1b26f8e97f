"""A session to attach to, with everything needed to display it and to check that its proxies leave nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from proxy_fsm import Timeouts, parse_agent_output
from tests.helpers.wait import eventually

from .attempt import FINAL_S, Attempt, Holdings, nothing_gained_since
from .display import RED
from .procs import send_signal
from .x2go import run, transport_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import paramiko

    from proxy_fsm import SessionInfo

    from .relay import Relay
    from .x2go import AgentSession, Display, X2GoServer

FRESH_S = 30.0
RESILIENT_S = 0.6  # a session running for so long certainly survives; before, `retryable` is None


@dataclass
class Scene:
    """A session in its first attempt, and everything needed to display it."""

    server: X2GoServer
    client: paramiko.SSHClient  # the connection that proxies use
    admin: paramiko.SSHClient  # another, to inspect the server
    agent: AgentSession
    display: Display
    runtime: Path
    stack: contextlib.ExitStack = field(repr=False)
    repairs: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)  # fix a fault's cause
    timeouts: Timeouts = field(default_factory=Timeouts)  # of its proxies
    other_display: Display | None = None  # if a fault strikes it
    relay: Relay | None = None  # likewise

    @property
    def root(self) -> Path:
        return self.runtime / "sessions"

    @property
    def session(self) -> SessionInfo:
        return parse_agent_output(self.agent.raw)

    def environ(self, **changes: str | None) -> dict[str, str]:
        """Return the environment that the proxy inherits; None removes a variable."""
        whole = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.runtime),
            "XDG_RUNTIME_DIR": str(self.runtime / "run"),
            **self.display.env,
            **changes,
        }
        return {key: value for key, value in whole.items() if value is not None}

    def attempt(
        self,
        session: SessionInfo | None = None,
        *,
        client: paramiko.SSHClient | None = None,
        environ: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Attempt:
        """Make a proxy that is closed with the scene."""
        attempt = Attempt(
            session or self.session,
            client or self.client,
            environ or self.environ(),
            options.pop("root", self.root),
            **{"timeouts": self.timeouts, **options},
        )
        self.stack.callback(attempt.close)
        return attempt

    def reconnect(self) -> None:
        """Connect again if the connection has ended."""
        transport = self.client.get_transport()
        if transport is None or not transport.is_active():
            self.client = self.stack.enter_context(contextlib.closing(self.server.connect()))

    def resumed(self) -> SessionInfo:
        """Resume the session on the server; its ports change."""
        ports = self.server.resume(self.admin, self.agent)
        return dataclasses.replace(self.session, graphics_port=ports.graphics_port)

    def wait_served(self) -> None:
        """Wait until the agent serves programs: before that, it does not survive the loss of its proxy."""
        run(self.admin, f"DISPLAY=:{self.agent.display} xwininfo -root")

    def wait_resilient(self, attempt: Attempt) -> None:
        """Wait until the session serves programs, and has run for so long that it certainly survives."""
        if attempt.session.display is not None:
            self.wait_served()
        since = attempt.proxy.status().since
        eventually(lambda: (datetime.now(UTC) - since).total_seconds() > RESILIENT_S, FINAL_S)

    def shows(self, colour: tuple[int, int, int] = RED) -> None:
        """Wait until a window of this colour is on the X display."""
        self.display.wait_for(colour)


@contextlib.contextmanager
def opened_scene(
    server: X2GoServer, client: paramiko.SSHClient, agent: AgentSession, display: Display, runtime: Path
) -> Iterator[Scene]:
    """Yield a scene. Once its proxies are closed, nothing of them may be left, on the transports either."""
    with contextlib.closing(server.connect()) as admin:
        transports = [transport_of(client), transport_of(admin)]
        before = Holdings.now(transports)
        with contextlib.ExitStack() as stack:
            scene = Scene(server, client, admin, agent, display, runtime, stack)
            stack.callback(scene.repairs.close)
            yield scene
        nothing_gained_since(before, transports)


@dataclass
class WaitingAgents:
    """Agents in their first attempt, for tests that do not connect to them.

    They are started one after another, since x2goserver ends each that is not connected to within 60 s (measured).
    """

    server: X2GoServer
    used: list[tuple[float, AgentSession]] = field(default_factory=list)

    def current(self) -> AgentSession:
        """Return an agent that has some time left."""
        if not self.used or time.monotonic() - self.used[-1][0] > FRESH_S:
            with contextlib.closing(self.server.connect()) as client:
                self.used.append((time.monotonic(), self.server.start_agent(client, command=None)))
        return self.used[-1][1]


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """Stop processes, and continue them at the end."""
    send_signal(pids, signal.SIGSTOP)
    try:
        yield
    finally:
        send_signal(pids, signal.SIGCONT)


@contextlib.contextmanager
def loose_umask() -> Iterator[None]:
    """Create files with exactly the requested mode."""
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)
