"""A real engine whose tunnel and proxy program do what a test says, and nothing else.

::

    proxy = FakedProxy()
    proxy.start()
    proxy.tunnel.opens()
    proxy.process.starts()
    proxy.tunnel.connects()
    proxy.process.says_ready()
    proxy.wait_running(timeout=1)
    proxy.process.is_killed(signal.SIGSEGV)
    assert proxy.wait(timeout=1) is State.FAILED

or, where only the state matters: ``FakedProxy.in_state(State.RUNNING)``. No socket is bound, no program runs, no
byte is sent. What is said may come late, twice, or never: the engine has to bear that.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paramiko

from proxy_fsm.backends import NX3Backend
from proxy_fsm.engine import Workers
from proxy_fsm.errors import BackendError
from proxy_fsm.evidence import (
    AgentDataReceived,
    AgentEof,
    ChannelOpened,
    ConnectionEnded,
    DisplayLost,
    DisplayRestored,
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
from proxy_fsm.workers.forwarder import Forwarder
from proxy_fsm.workers.link_monitor import Watcher
from proxy_fsm.workers.preflight import Launch, Preflight
from proxy_fsm.workers.process import ProxyProcess
from proxy_fsm.workers.session_query import SessionStatusQuery

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

__all__ = ["FakeProcess", "FakeTransport", "FakeTunnel", "FakedProxy"]

READY_LINE = "Info: Established X server connection."
_SETTLE_S = 5.0


class FakeTransport(paramiko.Transport):
    """A transport that is connected to nothing; alive until `end`."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        theirs.close()
        super().__init__(ours)
        ours.close()
        self._alive = True

    def is_active(self) -> bool:
        """Tell whether `end` was not called."""
        return self._alive

    def end(self) -> None:
        """Be gone from now on."""
        self._alive = False


class FakeTunnel:
    """What the preflight, the forwarder and the monitor see, said by a test.

    Attributes:
        obedient: Whether it is closed as soon as the engine wants it to be; else `closes` says when.
        closing: Whether the engine wants it closed.
        released: Whether it is.
        detached: Whether the engine has left the transport's monitor.
    """

    def __init__(self, transport: FakeTransport) -> None:
        self.obedient = True
        self.closing = False
        self.released = False
        self.detached = False
        self._transport = transport
        self._post: Callable[[Observation], None] = lambda _: None

    def opens(self) -> None:
        """Everything local is good, and the local end is bound."""
        self._post(PreflightPassed("/fake/proxy.sock"))
        self.preflight_ends()

    def preflight_ends(self) -> None:
        """The preflight's thread is gone."""
        self._post(PreflightFinished())

    def refuses(self, reason: EndReason = EndReason.AGENT_UNREACHABLE, detail: str = "It was refused.") -> None:
        """The preflight, or the opening of a channel, ends with a reason."""
        self._post(WorkerFailed(BackendError(reason, detail)))

    def breaks(self) -> None:
        """A worker's thread ends with an error that nobody expected."""
        self._post(WorkerCrashed("tunnel", ZeroDivisionError("a fake one")))

    def connects(self) -> None:
        """The proxy connected, and its channel stands."""
        self._post(ChannelOpened(1))

    def agent_speaks(self) -> None:
        """The agent's first bytes came."""
        self._post(AgentDataReceived(1))

    def agent_closes(self) -> None:
        """The agent ended its direction."""
        self._post(AgentEof(1))

    def disconnects(self) -> None:
        """The connection is gone, both ways."""
        self._post(ConnectionEnded(1, 0, 0, 0.0))

    def closes(self) -> None:
        """Everything of it is gone."""
        self.released = True
        self._post(TunnelClosed())

    def transport_ends(self) -> None:
        """The SSH connection is gone."""
        self._transport.end()
        self._post(TransportEnded("The SSH connection ended."))

    def falls_silent(self) -> None:
        """Nothing has come from the SSH server for a while."""
        self._post(LinkSilent(time.monotonic() - 1))

    def is_heard_again(self) -> None:
        """Something came from the SSH server."""
        self._post(LinkRestored(1.0))

    def stays_silent(self) -> None:
        """Nothing has come from the SSH server for too long."""
        self._post(LinkDead(45.0))

    def display_goes(self) -> None:
        """The X server is gone."""
        self._post(DisplayLost("There is no X server."))

    def display_returns(self) -> None:
        """The X server took a new connection."""
        self._post(DisplayRestored())

    def server_answers(self, status: SessionStatus | None) -> None:
        """The X2Go server said how the session stands."""
        self._post(SessionStatusReceived(status))


class FakeProcess:
    """What is seen of the proxy program, said by a test.

    Attributes:
        obedient: Whether a signal ends it at once; else `exits` and `is_killed` say when.
        wanted: Whether the engine has started it.
        signals: The signals it got, in order.
        gone: Whether it has ended.
    """

    def __init__(self) -> None:
        self.obedient = True
        self.wanted = False
        self.signals: list[signal.Signals] = []
        self.gone = False
        self._post: Callable[[Observation], None] = lambda _: None

    def starts(self, pid: int = 4711) -> None:
        """It runs."""
        self._post(ProcessSpawned(pid, "/fake/nxproxy"))

    def cannot_start(self, reason: EndReason = EndReason.PROXY_NOT_STARTABLE) -> None:
        """It could not be started."""
        self.gone = True
        self._post(SpawnFailed(BackendError(reason, "It cannot be started.")))

    def says(self, line: str) -> None:
        """It printed a line."""
        self._post(OutputLine(line))

    def says_ready(self) -> None:
        """It printed nxproxy's ready sign."""
        self.says(READY_LINE)

    def exits(self, code: int = 0) -> None:
        """It ended by itself."""
        self.gone = True
        self._post(ProcessExited(code, None))

    def is_killed(self, number: int) -> None:
        """A signal ended it."""
        self.gone = True
        self._post(ProcessExited(None, int(number)))


class FakedProxy(Proxy):
    """A `Proxy` with the real engine, whose workers are a `FakeTunnel` and a `FakeProcess`.

    Takes what `Proxy` takes; session and transport are made where none is given.

    Attributes:
        tunnel: Says what tunnel, transport and display do.
        process: Says what the proxy program does.
    """

    def __init__(self, session: SessionInfo | None = None, **options: Any) -> None:
        transport = options.pop("transport", None) or FakeTransport()
        self.tunnel = FakeTunnel(transport)
        self.process = FakeProcess()
        options.setdefault("backend", NX3Backend("/fake/nxproxy"))
        options.setdefault("environ", {})
        super().__init__(session or fake_session(), transport, **options)
        self.tunnel._post = self.process._post = self._engine._inbox.put  # noqa: SLF001 - as the real ones are given it
        self._woken = 0
        self._caught_up = threading.Semaphore(0)
        catch_up = self._engine.journal.catch_up

        def note() -> None:
            catch_up()
            self._caught_up.release()

        self._engine.journal.catch_up = note  # type: ignore[method-assign]

    def subscribe(
        self,
        callback: Callable[[TransitionRecord], object],
        *,
        via: Callable[..., object] | None = None,
        replay: bool = False,
    ) -> Callable[[], None]:
        """As `Proxy.subscribe`; it wakes the engine, which `settle` has to know."""
        self._woken += 1
        return super().subscribe(callback, via=via, replay=replay)

    @classmethod
    def in_state(cls, state: State, **options: Any) -> FakedProxy:
        """Return a proxy that has been led to a state by the shortest way.

        Args:
            state: The state.
            options: As for the class.
        """
        proxy = cls(**options)
        proxy.lead_to(state)
        return proxy

    def lead_to(self, state: State) -> None:
        """Lead an idle proxy to a state by the shortest way; whatever entering it starts has been started."""
        if state is State.IDLE:
            return
        self.start()
        if state in {State.SPAWNING, State.RUNNING}:
            self.tunnel.opens()
        if state is State.RUNNING:
            self.process.starts()
            self.tunnel.connects()
            self.process.says_ready()
        if state is State.STOPPING:
            self.tunnel.obedient = False
        if state is State.FAILED:
            self.tunnel.refuses(EndReason.PROXY_NOT_FOUND)
        if state in {State.STOPPING, State.STOPPED}:
            self.stop()
        if state in {State.STOPPING, State.STOPPED, State.FAILED}:
            self.tunnel.preflight_ends()
        self.wait(state, timeout=_SETTLE_S)
        self.settle()

    def end(self) -> None:
        """Stop it, with everything doing what it is told, and wait for its final state."""
        self.tunnel.obedient = self.process.obedient = True
        self.stop()
        if self.process.signals and not self.process.gone:
            self.process.is_killed(self.process.signals[-1])
        self.tunnel.preflight_ends()
        if self.tunnel.closing and not self.tunnel.released:
            self.tunnel.closes()
        self.wait(timeout=_SETTLE_S)

    def settle(self) -> None:
        """Wait until the engine has taken in all that was said before, and what it made its workers say.

        Raises:
            TimeoutError: It has not within 5 s.
        """
        inbox = self._engine._inbox  # noqa: SLF001 - the engine's own
        deadline = time.monotonic() + _SETTLE_S
        while self.state is not State.IDLE and not self.state.is_final:
            self._woken += 1
            inbox.put(None)
            while self._woken and not self.state.is_final:
                if self._caught_up.acquire(timeout=0.01):
                    self._woken -= 1
                elif time.monotonic() > deadline:
                    raise TimeoutError("The engine takes nothing in.")
            if inbox.empty():  # else it has made its workers say something
                return

    def pass_deadline(self) -> None:
        """Let the deadline that is running, if any, be over now."""
        self.settle()  # then the owner sleeps, and its timer can be set from here
        engine = self._engine
        timer = engine._timer  # noqa: SLF001 - time is what this makes pass
        if timer is not None:
            engine._timer = (0.0, timer[1])  # noqa: SLF001
            self._woken += 1
            engine._inbox.put(None)  # noqa: SLF001 - it comes round and looks at its timer before it takes what follows
        self.settle()

    def _make_workers(self) -> Workers:
        tunnel, process = self.tunnel, self.process

        return Workers(
            forwarder=partial(_FakeForwarder, tunnel),
            preparation=_FakePreflight,
            process=lambda *_, **__: _FakeRun(process),
            question=_FakeQuery,
            attach=lambda *_: _FakeWatcher(tunnel),
        )


def fake_session(**changes: Any) -> SessionInfo:
    """Return a session that nobody serves, with some of its fields changed."""
    fields = {"name": "fake-51-1_stDxterm_dp24", "cookie": "0" * 32, "graphics_port": 4788, "display": 51}
    return SessionInfo(**{**fields, **changes})


class _FakeWatcher(Watcher):
    def __init__(self, tunnel: FakeTunnel) -> None:
        self._tunnel = tunnel

    def detach(self) -> None:
        self._tunnel.detached = True


class _FakeForwarder(Forwarder):
    def __init__(self, tunnel: FakeTunnel, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._tunnel = tunnel

    def start(self) -> None:
        """Take nothing: the test says who connects."""

    def close(self) -> None:
        self._tunnel.closing = True
        if self._tunnel.obedient and not self._tunnel.released:
            self._tunnel.closes()

    def abort(self) -> None:
        self.close()

    def unreleased(self) -> tuple[str, ...]:
        return () if self._tunnel.released else ("channel 1 of the tunnel",)

    def threads(self) -> tuple[threading.Thread, ...]:
        return ()

    def stats(self) -> TunnelStats:
        return TunnelStats(0, 0, None, 0)


class _FakePreflight(Preflight):
    def start(self) -> None:
        self.step = "what the test says"
        self.launch = Launch(["/fake/nxproxy"], {}, Path(os.sep), -1)


class _FakeRun(ProxyProcess):
    def __init__(self, process: FakeProcess) -> None:
        self._process = process
        self.thread = threading.Thread(name="proxy_fsm-fake")  # never started

    def start(self) -> None:
        self._process.wanted = True

    def ack_line(self) -> None:
        """Need no room: the test says what is printed."""

    def signal(self, number: signal.Signals) -> None:
        self._process.signals.append(number)
        if self._process.obedient and not self._process.gone:
            self._process.is_killed(number)


class _FakeQuery(SessionStatusQuery):
    def start(self) -> None:
        """Ask nobody: the test says what is answered."""
