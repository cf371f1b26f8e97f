"""A real engine whose tunnel and proxy program do only what a test scripts.

::

    proxy = FakedProxy()
    proxy.start()
    proxy.tunnel.opens()
    proxy.process.starts()
    proxy.tunnel.connects()
    proxy.process.prints_ready()
    proxy.wait_running(timeout=1)
    proxy.process.killed_by(signal.SIGSEGV)
    assert proxy.wait(timeout=1) is State.FAILED

or, if only the state matters: ``FakedProxy.in_state(State.RUNNING)``. No socket is bound, no program runs, no
byte is sent. Observations may come late, twice, or never: the engine must cope.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import paramiko

from proxy_fsm.backends import NX3Backend
from proxy_fsm.errors import BackendError
from proxy_fsm.evidence import (
    AgentDataReceived,
    AgentEof,
    ChannelOpened,
    ChecksPassed,
    ConnectionEnded,
    DisplayLost,
    DisplayRestored,
    Launch,
    LinkDead,
    LinkRestored,
    LinkSilent,
    Observation,
    OutputLine,
    PreflightFinished,
    PreflightPassed,
    ProcessExited,
    ProcessSpawned,
    SessionStatusReceived,
    SessionTakenOver,
    SpawnFailed,
    TransportEnded,
    TunnelClosed,
    WorkerCrashed,
    WorkerFailed,
)
from proxy_fsm.proxy import Proxy
from proxy_fsm.reasons import EndReason
from proxy_fsm.session import SessionInfo, SessionStatus
from proxy_fsm.states import State
from proxy_fsm.status import TransitionRecord, TunnelStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy_fsm.engine import EngineEffects
    from proxy_fsm.events import Event

__all__ = ["FakeProcess", "FakeTransport", "FakeTunnel", "FakedProxy"]

READY_LINE = "Info: Established X server connection."
LAUNCH = Launch(["/fake/nxproxy"], {}, Path(os.sep), -1)
_SETTLE_S = 5.0


class FakeTransport(paramiko.Transport):
    """A transport that is connected to nothing; active until `end` is called."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.close()
        super().__init__(ours)
        ours.close()
        self._alive = True

    def is_active(self) -> bool:
        """Return whether `end` has not been called yet."""
        return self._alive

    def end(self) -> None:
        """Become inactive."""
        self._alive = False


class FakeTunnel:
    """The observations of all workers but the proxy program's, posted by a test.

    Attributes:
        auto_complete: Whether it closes as soon as the engine requests that; otherwise the test calls `closes`.
        close_requested: Whether the engine has requested its closing.
        released: Whether it is closed.
        aborted: Whether the engine has requested its immediate closing, discarding data still in flight.
        detached: Whether the engine has detached from the transport's monitor.
        transport: The transport.
        post: Posts any observation, including those without a method here.
    """

    def __init__(self, transport: FakeTransport) -> None:
        self.auto_complete = True
        self.close_requested = False
        self.released = False
        self.aborted = False
        self.detached = False
        self.transport = transport
        self.post: Callable[[Observation], None] = lambda _: None

    def opens(self) -> None:
        """All local checks pass, and the local end is bound."""
        self.post(ChecksPassed())
        self.post(PreflightPassed("/fake/proxy.sock", LAUNCH))
        self.preflight_ends()

    def preflight_ends(self) -> None:
        """The preflight's thread has ended."""
        self.post(PreflightFinished())

    def fails(self, reason: EndReason = EndReason.AGENT_UNREACHABLE, detail: str = "It was refused.") -> None:
        """The preflight, or the opening of a channel, fails with a reason."""
        self.post(WorkerFailed(BackendError(reason, detail)))

    def crashes(self) -> None:
        """A worker's thread ends with an unexpected exception."""
        self.post(WorkerCrashed("tunnel", ZeroDivisionError("a fake one")))

    def connects(self) -> None:
        """The proxy has connected, and its channel is open."""
        self.post(ChannelOpened(1))

    def agent_sends(self) -> None:
        """The agent's first bytes have arrived."""
        self.post(AgentDataReceived(1))

    def agent_sends_eof(self) -> None:
        """The agent has half-closed the connection."""
        self.post(AgentEof(1))

    def disconnects(self) -> None:
        """The connection is closed in both directions."""
        self.post(ConnectionEnded(1, 0, 0, 0.0))

    def closes(self) -> None:
        """The tunnel has closed completely."""
        self.released = True
        self.post(TunnelClosed())

    def transport_ends(self) -> None:
        """The SSH connection has ended."""
        self.transport.end()
        self.post(TransportEnded("The SSH connection ended."))

    def link_silent(self) -> None:
        """Nothing has been received from the SSH server for a while."""
        self.post(LinkSilent(time.monotonic() - 1))

    def link_restored(self) -> None:
        """Data from the SSH server arrives again."""
        self.post(LinkRestored(1.0))

    def link_dead(self) -> None:
        """Nothing has been received from the SSH server for too long."""
        self.post(LinkDead(45.0))

    def display_lost(self) -> None:
        """The X server has died or disconnected."""
        self.post(DisplayLost("There is no X server."))

    def display_restored(self) -> None:
        """The X server has accepted a new connection."""
        self.post(DisplayRestored())

    def server_answers(self, status: SessionStatus | None) -> None:
        """The X2Go server has returned the session's status."""
        self.post(SessionStatusReceived(status))

    def taken_over(self, client: str = "192.0.2.7", used: str = "2026-11-28T10:00:00") -> None:
        """The X2Go server has said that another client has resumed the session."""
        self.post(SessionTakenOver(client, used))


class FakeProcess:
    """The observations of the proxy program, posted by a test.

    Attributes:
        auto_complete: Whether a signal ends it at once; otherwise the test calls `exits` or `killed_by`.
        start_requested: Whether the engine has started it.
        signals: The signals it has received, in order.
        exited: Whether it has exited, or failed to start.
    """

    def __init__(self) -> None:
        self.auto_complete = True
        self.start_requested = False
        self.signals: list[signal.Signals] = []
        self.exited = False
        self.post: Callable[[Observation], None] = lambda _: None

    def starts(self, pid: int = 4711) -> None:
        """It is running."""
        self.post(ProcessSpawned(pid, "/fake/nxproxy"))

    def receive(self, number: signal.Signals) -> None:
        """Receive a signal from the engine."""
        self.signals.append(number)
        if self.auto_complete and not self.exited:
            self.killed_by(number)

    def fails_to_start(self, reason: EndReason = EndReason.PROXY_NOT_STARTABLE) -> None:
        """It could not be started."""
        self.exited = True
        self.post(SpawnFailed(BackendError(reason, "It cannot be started.")))

    def prints(self, line: str) -> None:
        """It has printed a line."""
        self.post(OutputLine(line))

    def prints_ready(self) -> None:
        """It has printed nxproxy's ready line."""
        self.prints(READY_LINE)

    def exits(self, code: int = 0) -> None:
        """It has exited by itself."""
        self.exited = True
        self.post(ProcessExited(code, None))

    def killed_by(self, number: int) -> None:
        """It has been killed by a signal."""
        self.exited = True
        self.post(ProcessExited(None, int(number)))


class FakedProxy(Proxy):
    """A `Proxy` with the real engine, whose workers are a `FakeTunnel` and a `FakeProcess`.

    Accepts the arguments of `Proxy`; session and transport are optional.

    Attributes:
        tunnel: Controls tunnel, transport and display.
        process: Controls the proxy program.
    """

    def __init__(self, session: SessionInfo | None = None, **options: Any) -> None:
        transport = options.pop("transport", None) or FakeTransport()
        self.tunnel = FakeTunnel(transport)
        self.process = FakeProcess()
        options.setdefault("backend", NX3Backend("/fake/nxproxy"))
        options.setdefault("environ", {})
        super().__init__(session or fake_session(), transport, **options)

    @classmethod
    def in_state(cls, state: State, **options: Any) -> FakedProxy:
        """Return a proxy that has been driven to a state by the shortest path.

        Args:
            state: The state.
            options: Those of the class.
        """
        proxy = cls(**options)
        proxy.lead_to(state)
        return proxy

    def lead_to(self, state: State) -> None:
        """Drive an idle proxy to a state by the shortest path; the effects of entering it have been started."""
        if state is State.IDLE:
            return
        self.start()
        if state in {State.SPAWNING, State.RUNNING}:
            self.tunnel.opens()
        if state is State.RUNNING:
            self.process.starts()
            self.tunnel.connects()
            self.process.prints_ready()
        if state is State.STOPPING:
            self.tunnel.auto_complete = False
        if state is State.FAILED:
            self.tunnel.fails(EndReason.PROXY_NOT_FOUND)
        if state in {State.STOPPING, State.STOPPED}:
            self.stop()
        if state in {State.STOPPING, State.STOPPED, State.FAILED}:
            self.tunnel.preflight_ends()
        self.wait(state, timeout=_SETTLE_S)
        self.settle()

    def end(self) -> None:
        """Stop it, with tunnel and process completing automatically, and wait for its final state."""
        self.tunnel.auto_complete = self.process.auto_complete = True
        self.stop()
        if self.process.signals and not self.process.exited:
            self.process.killed_by(self.process.signals[-1])
        self.tunnel.preflight_ends()
        if self.tunnel.close_requested and not self.tunnel.released:
            self.tunnel.closes()
        self.wait(timeout=_SETTLE_S)

    def settle(self) -> None:
        """Wait until all earlier observations, and those they caused, were handled, and subscribers were called.

        Raises:
            TimeoutError: This did not happen within 5 s.
        """
        deadline = time.monotonic() + _SETTLE_S
        caught_up: SimpleQueue[bool] = SimpleQueue()

        def ask() -> None:
            self._engine.call_soon(lambda: caught_up.put(self._engine.is_caught_up()))

        ask()
        while self.state is not State.IDLE and not self.state.is_final:  # the inbox is not read before or after
            with suppress(Empty):
                if caught_up.get(timeout=0.01):
                    break
                ask()  # handling has made the workers post something
            if time.monotonic() > deadline:
                raise TimeoutError("The engine did not handle all of its inbox.")
        if not self._engine.journal.is_delivering() and not self._engine.journal.flush(deadline - time.monotonic()):
            raise TimeoutError("A subscriber did not return.")

    def expire_deadline(self) -> None:
        """Make the running deadline, if any, expire now."""
        self._engine.call_soon(self._engine.expire_deadline)
        self.settle()

    def _make_effects(self, *_: Any, **options: Any) -> EngineEffects:
        return FakeEffects(self, post=options["post"], publish=options["publish"])


def fake_session(**changes: Any) -> SessionInfo:
    """Return a session that no server has, with some of its fields changed."""
    fields = {"name": "fake-51-1_stDxterm_dp24", "cookie": "0" * 32, "graphics_port": 4788, "display": 51}
    return SessionInfo(**{**fields, **changes})


class FakeEffects:
    """Effects without action: requests are recorded on the fakes, and the test decides the outcome."""

    def __init__(
        self,
        proxy: FakedProxy,
        *,
        post: Callable[[Observation], None],
        publish: Callable[[Event, TransitionRecord | None], None],
    ) -> None:
        self._tunnel, self._process, self._transport = proxy.tunnel, proxy.process, proxy.tunnel.transport
        self._tunnel.post = self._process.post = post
        self._publish = publish

    def publish(self, event: Event, record: TransitionRecord | None = None) -> None:
        self._publish(event, record)

    def start_preflight(self) -> None:
        pass

    def start_proxy(self, launch: Launch) -> None:  # noqa: ARG002 - as the engine calls it
        self._process.start_requested = True

    def acknowledge(self) -> None:
        pass

    def terminate(self) -> None:
        self._process.receive(signal.SIGTERM)

    def kill(self) -> None:
        self._process.receive(signal.SIGKILL)

    def drain(self) -> None:
        self._tunnel.close_requested = True
        if self._tunnel.auto_complete and not self._tunnel.released:
            self._tunnel.closes()

    def abort(self) -> None:
        self._tunnel.aborted = True
        self.drain()

    def release(self, *, wait: bool) -> None:  # noqa: ARG002 - as the engine calls it
        self._tunnel.detached = True

    def query_session(self) -> None:
        pass

    def cancel_query(self) -> None:
        pass

    def preflight_step(self) -> str:
        return "the test's next step"

    def transport_end(self) -> str | None:
        return None if self._transport.is_active() else "The SSH connection ended."

    def display_in_doubt(self) -> bool:
        return False

    def unreleased(self) -> tuple[str, ...]:
        return () if self._tunnel.released else ("channel 1 of the tunnel",)

    def tunnel_stats(self) -> TunnelStats:
        return TunnelStats(0, 0, None, 0)
