"""A hypothesis state machine over the real engine: calls and observations in any sequence, with their invariants.

Subclass it to add rules and invariants of your own, or override `make_proxy` to test your client's subscriber::

    class MyMachine(ProxyMachine):
        def make_proxy(self, **options: Any) -> FakedProxy:
            self.window = MyWindow()
            proxy = FakedProxy(backend=MyBackend(), **options)
            proxy.subscribe(self.window.on_change)
            return proxy

        @invariant()
        def the_window_shows_the_state(self) -> None:
            assert self.window.shown == str(self.proxy.state)

    TestMyMachine = MyMachine.TestCase

Needs the extra ``testing``.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from proxy_fsm.errors import InvalidTransition
from proxy_fsm.reasons import EndReason
from proxy_fsm.session import SessionStatus
from proxy_fsm.states import TRANSITIONS, State
from proxy_fsm.status import Timeouts, TransitionRecord
from proxy_fsm.testing.fakes import FakedProxy

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ProxyMachine"]

# Deadlines expire when a rule lets them: one that passed by itself could do so in the middle of a check.
_TIMEOUTS = Timeouts(
    preflight_s=600, ready_s=600, agent_connect_s=600, stop_grace_s=600, kill_s=600, drain_s=600, ask_server_s=600
)
_FAULTS = [reason for reason in EndReason if not reason.clean and reason is not EndReason.INTERNAL_ERROR]
_END_S = 5.0
_CLOSING_LINE = "Session: Terminating session at 'now'."
_ACTIVE = frozenset({State.TUNNELLING, State.SPAWNING, State.RUNNING})
_WITH_PROGRAM = frozenset({State.SPAWNING, State.RUNNING})

#: Events that end a proxy in any state, with the resulting reason.
_FATAL_EVENTS = {
    "transport_ends": EndReason.TRANSPORT_LOST,
    "link_dead": EndReason.TRANSPORT_SILENT,
    "display_lost": EndReason.DISPLAY_LOST,
    "crashes": EndReason.INTERNAL_ERROR,
}


class _Events:
    """A logger that records the transitions."""

    def __init__(self) -> None:
        self.transitions: list[dict[str, Any]] = []
        self.internal_errors: list[dict[str, Any]] = []

    def __getattr__(self, level: str) -> Any:
        def log(event: str, **fields: Any) -> None:
            if event == "proxy.transition":
                self.transitions.append(fields)
            if event == "internal.error" and "worker" not in fields:
                self.internal_errors.append(fields)

        return log


class ProxyMachine(RuleBasedStateMachine):
    """Drives a `FakedProxy` through any sequence: late, repeated and missing observations, calls, deadlines.

    Attributes:
        proxy: The proxy.
        events: The proxy's logger.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events = _Events()
        self.proxy = self.make_proxy(timeouts=_TIMEOUTS, logger=self.events, ask_server=True)
        self._published: list[TransitionRecord] = []
        self._reasons: list[EndReason] = []
        self._closing = False  # the program has announced the session's end: its reason is still being determined
        self.proxy.subscribe(self._published.append)

    def make_proxy(self, **options: Any) -> FakedProxy:
        """Return the proxy to drive; an override must pass on the options, since the checks rely on them."""
        return FakedProxy(**options)

    def teardown(self) -> None:
        """`stop` reaches a final state in time, whatever happened before and whatever does not respond."""
        proxy = self.proxy
        if proxy.state is State.IDLE:
            return
        proxy.stop()
        for _ in range(10):
            proxy.expire_deadline()
        assert proxy.wait(timeout=_END_S).is_final
        self.check()

    @initialize(state=st.sampled_from([*State, State.SPAWNING, State.RUNNING, State.RUNNING]))
    def begin(self, state: State) -> None:
        """Begin in any state, so that each is tested often."""
        self.proxy.lead_to(state)

    @rule()
    def start(self) -> None:
        """Call `start`."""
        allowed = self.proxy.state is State.IDLE
        try:
            self.proxy.start()
        except InvalidTransition:
            assert not allowed
        else:
            assert allowed
        self.proxy.settle()

    @contextmanager
    def ending(self, *reasons: EndReason, states: frozenset[State] = _ACTIVE) -> Iterator[None]:
        """Run a block that must end a proxy in one of these states, for one of these reasons."""
        before = self.proxy.state
        yield
        self.proxy.settle()
        if before in states:
            assert self.proxy.state is State.STOPPING or self.proxy.state.is_final
            assert not reasons or self._closing or self.proxy.status().reason in reasons

    @rule(threads=st.integers(1, 3))
    def stop(self, threads: int) -> None:
        """Call `stop`, from several threads at once."""
        with self.ending(EndReason.STOP_REQUESTED):
            _run_concurrently([self.proxy.stop] * threads)

    @rule(starts=st.integers(1, 3), stops=st.integers(0, 2))
    def start_and_stop(self, starts: int, stops: int) -> None:
        """Call `start` and `stop`, each on its own thread, all at once: at most one start succeeds."""
        started: list[None] = []
        allowed = self.proxy.state is State.IDLE

        def start() -> None:
            with suppress(InvalidTransition):
                self.proxy.start()
                started.append(None)

        _run_concurrently([*[start] * starts, *[self.proxy.stop] * stops])
        self.proxy.settle()
        assert len(started) <= allowed
        assert not allowed or started or stops
        assert not stops or self.proxy.state is State.STOPPING or self.proxy.state.is_final

    @rule()
    def deadline(self) -> None:
        """Make the running deadline expire."""
        with self.ending(states=frozenset({State.TUNNELLING, State.SPAWNING})):
            self.proxy.expire_deadline()

    @rule(event=st.sampled_from(sorted(_FATAL_EVENTS)), times=st.integers(1, 2))
    def fatal_event(self, event: str, times: int) -> None:
        """Post an event that no proxy survives, once or twice."""
        with self.ending(_FATAL_EVENTS[event]):
            for _ in range(times):
                getattr(self.proxy.tunnel, event)()

    @rule(
        event=st.sampled_from(
            [
                "opens",
                "preflight_ends",
                "connects",
                "agent_sends",
                "agent_sends_eof",
                "disconnects",
                "link_silent",
                "link_restored",
                "display_restored",
            ]
        ),
        times=st.integers(1, 2),
    )
    def tunnel_event(self, event: str, times: int) -> None:
        """Post an event of tunnel, transport or display, once or twice."""
        for _ in range(times):
            getattr(self.proxy.tunnel, event)()
        self.proxy.settle()

    @rule(reason=st.sampled_from(_FAULTS))
    def tunnel_fails(self, reason: EndReason) -> None:
        """Fail with any reason."""
        with self.ending(reason, states=frozenset({State.TUNNELLING, State.SPAWNING})):
            self.proxy.tunnel.fails(reason)

    @rule(status=st.sampled_from([None, *SessionStatus]))
    def server_answers(self, status: SessionStatus | None) -> None:
        """Answer a status query, whether one was sent or not."""
        self.proxy.tunnel.server_answers(status)
        self.proxy.settle()

    @rule(
        event=st.sampled_from(["starts", "prints_ready"]),
        times=st.integers(1, 2),
    )
    def process_event(self, event: str, times: int) -> None:
        """Post an event of the proxy program, once or twice."""
        for _ in range(times):
            getattr(self.proxy.process, event)()
        self.proxy.settle()

    @rule(event=st.sampled_from(["fails_to_start", "exits"]), times=st.integers(1, 2))
    def process_ends(self, event: str, times: int) -> None:
        """Make it exit, or fail to start; if its session was ending, the server is queried first."""
        with self.ending(states=frozenset() if self._closing else _WITH_PROGRAM):
            for _ in range(times):
                getattr(self.proxy.process, event)()

    @rule()
    def session_closes(self) -> None:
        """End as nxproxy does when its session is suspended or terminated."""
        self._closing = True
        self.proxy.process.prints(_CLOSING_LINE)
        self.proxy.process.exits()
        self.proxy.settle()

    @rule(number=st.sampled_from([signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM]))
    def process_killed(self, number: signal.Signals) -> None:
        """Kill the proxy program."""
        with self.ending(states=frozenset() if self._closing else _WITH_PROGRAM):
            self.proxy.process.killed_by(number)

    @rule(
        line=st.sampled_from(
            [
                _CLOSING_LINE,
                "Info: Waiting the cleanup timeout to complete.",
                "Error: Failure reading from the peer proxy.",
                "Error: Wrong version or invalid session authentication cookie.",
                "nothing of note",
            ]
        )
    )
    def process_prints(self, line: str) -> None:
        """Print one of nxproxy's lines, at any moment."""
        self._closing |= line == _CLOSING_LINE
        self.proxy.process.prints(line)
        self.proxy.settle()

    @rule(tunnel=st.booleans(), process=st.booleans())
    def set_auto_complete(self, tunnel: bool, process: bool) -> None:  # noqa: FBT001 - hypothesis passes by name
        """Choose whether tunnel and program complete requests automatically from now on."""
        self.proxy.tunnel.auto_complete, self.proxy.process.auto_complete = tunnel, process

    @rule()
    def tunnel_closes(self) -> None:
        """Close the tunnel, whether that was requested or not."""
        self.proxy.tunnel.closes()
        self.proxy.settle()

    @invariant()
    def check(self) -> None:
        """Check what must hold at every moment."""
        proxy, status = self.proxy, self.proxy.status()
        moves = {(row.trigger, row.source, row.dest) for row in TRANSITIONS if row.dest is not None}
        assert not self.events.internal_errors
        assert all((r.trigger, r.source, r.dest) in moves for r in status.history)
        path = [State.IDLE, *(r.dest for r in status.history)]
        assert [r.source for r in status.history] == path[:-1]
        assert status.state is path[-1]
        assert status.phase in (status.state.phases or {None})
        assert (status.phase_since is None) is (status.phase is None)
        assert proxy.ok() is (status.state is State.RUNNING)
        assert list(status.history) == self._published
        assert [record.sequence for record in self._published] == list(range(1, len(self._published) + 1))
        logged = [(event["trigger"], event["source"], event["dest"]) for event in self.events.transitions]
        assert logged == [(str(r.trigger), str(r.source), str(r.dest)) for r in self._published]
        self._check_cause(status.reason, status.state)
        if status.state.is_final and status.history[0].dest is State.TUNNELLING:
            assert proxy.tunnel.detached
            assert proxy.tunnel.close_requested
            abandoned = any("process" in each for each in status.abandoned)
            assert proxy.process.exited or not proxy.process.start_requested or abandoned
            assert proxy.tunnel.released or status.abandoned

    def _check_cause(self, reason: EndReason | None, state: State) -> None:
        """The first cause wins; only a program that survives SIGKILL turns a clean one into `stop_timeout`."""
        if reason is not None and (not self._reasons or self._reasons[-1] is not reason):
            self._reasons.append(reason)
        if len(self._reasons) > 1:
            first, *later = self._reasons
            assert first.clean
            assert later == [EndReason.STOP_TIMEOUT]
        assert (reason is not None) == (state is State.STOPPING or state.is_final)
        if state.is_final and reason is not None:
            assert reason.clean is (state is State.STOPPED)


def _run_concurrently(functions: list[Any]) -> None:
    callers = [threading.Thread(target=function) for function in functions]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
