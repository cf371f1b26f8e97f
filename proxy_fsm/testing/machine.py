"""A hypothesis state machine over the real engine: orders and observations in any sequence, and what must hold.

Subclass it to add rules and invariants of your own, or override `make_proxy` to watch your client's subscriber::

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

_TIMEOUTS = Timeouts(kill_s=0.05, stop_grace_s=0.05, ask_server_s=0.05)
_FAULTS = [reason for reason in EndReason if not reason.clean and reason is not EndReason.INTERNAL_ERROR]
_END_S = 5.0
_CLOSING_LINE = "Session: Terminating session at 'now'."
_ACTIVE = frozenset({State.TUNNELLING, State.SPAWNING, State.RUNNING})
_WITH_PROGRAM = frozenset({State.SPAWNING, State.RUNNING})

#: What ends a proxy wherever it is, and the reason that this has.
_ENDS = {
    "transport_ends": EndReason.TRANSPORT_LOST,
    "link_dead": EndReason.TRANSPORT_SILENT,
    "display_lost": EndReason.DISPLAY_LOST,
    "crashes": EndReason.INTERNAL_ERROR,
}


class _Events:
    """A logger that keeps the transitions."""

    def __init__(self) -> None:
        self.transitions: list[dict[str, Any]] = []
        self.broken: list[dict[str, Any]] = []

    def __getattr__(self, level: str) -> Any:
        def log(event: str, **fields: Any) -> None:
            if event == "proxy.transition":
                self.transitions.append(fields)
            if event == "internal.error" and "worker" not in fields:
                self.broken.append(fields)

        return log


class ProxyMachine(RuleBasedStateMachine):
    """Drives a `FakedProxy` through anything: late, doubled and missing observations, orders, deadlines.

    Attributes:
        proxy: The proxy.
        events: The logger that it was given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events = _Events()
        self.proxy = self.make_proxy(timeouts=_TIMEOUTS, logger=self.events, ask_server=True)
        self._told: list[TransitionRecord] = []
        self._reasons: list[EndReason] = []
        self._closing = False  # the program has said that the session ends: why is then still being found out
        self.proxy.subscribe(self._told.append)

    def make_proxy(self, **options: Any) -> FakedProxy:
        """Return the proxy to drive; whoever overrides this passes on the options, on which the checks rely."""
        return FakedProxy(**options)

    def teardown(self) -> None:
        """`stop` reaches a final state in time, whatever happened before and whoever does not answer."""
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
        """Begin in any state, so that each is met often."""
        self.proxy.lead_to(state)

    @rule()
    def start(self) -> None:
        """Order a start."""
        may = self.proxy.state is State.IDLE
        try:
            self.proxy.start()
        except InvalidTransition:
            assert not may
        else:
            assert may
        self.proxy.settle()

    @contextmanager
    def ending(self, *reasons: EndReason, states: frozenset[State] = _ACTIVE) -> Iterator[None]:
        """Do something that has to end a proxy which is in one of these states, for one of these reasons."""
        before = self.proxy.state
        yield
        self.proxy.settle()
        if before in states:
            assert self.proxy.state is State.STOPPING or self.proxy.state.is_final
            assert not reasons or self._closing or self.proxy.status().reason in reasons

    @rule(threads=st.integers(1, 3))
    def stop(self, threads: int) -> None:
        """Order a stop, from several threads at once."""
        with self.ending(EndReason.STOP_REQUESTED):
            _at_once([self.proxy.stop] * threads)

    @rule(starts=st.integers(1, 3), stops=st.integers(0, 2))
    def start_and_stop(self, starts: int, stops: int) -> None:
        """Order starts and stops, each on a thread of its own, all at once: one start succeeds at the most."""
        began: list[None] = []
        may = self.proxy.state is State.IDLE

        def start() -> None:
            with suppress(InvalidTransition):
                self.proxy.start()
                began.append(None)

        _at_once([*[start] * starts, *[self.proxy.stop] * stops])
        self.proxy.settle()
        assert len(began) <= may
        assert not may or began or stops
        assert not stops or self.proxy.state is State.STOPPING or self.proxy.state.is_final

    @rule()
    def deadline(self) -> None:
        """Let the running deadline be over."""
        with self.ending(states=frozenset({State.TUNNELLING, State.SPAWNING})):
            self.proxy.expire_deadline()

    @rule(what=st.sampled_from(sorted(_ENDS)), times=st.integers(1, 2))
    def something_ends_it(self, what: str, times: int) -> None:
        """Say something that no proxy survives, once or twice."""
        with self.ending(_ENDS[what]):
            for _ in range(times):
                getattr(self.proxy.tunnel, what)()

    @rule(
        what=st.sampled_from(
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
    def tunnel_says(self, what: str, times: int) -> None:
        """Say something of tunnel, transport or display, once or twice."""
        for _ in range(times):
            getattr(self.proxy.tunnel, what)()
        self.proxy.settle()

    @rule(reason=st.sampled_from(_FAULTS))
    def tunnel_refuses(self, reason: EndReason) -> None:
        """Refuse with any reason."""
        with self.ending(reason, states=frozenset({State.TUNNELLING, State.SPAWNING})):
            self.proxy.tunnel.fails(reason)

    @rule(status=st.sampled_from([None, *SessionStatus]))
    def server_answers(self, status: SessionStatus | None) -> None:
        """Answer a question, whether it was asked or not."""
        self.proxy.tunnel.server_answers(status)
        self.proxy.settle()

    @rule(
        what=st.sampled_from(["starts", "prints_ready"]),
        times=st.integers(1, 2),
    )
    def process_says(self, what: str, times: int) -> None:
        """Say something of the proxy program, once or twice."""
        for _ in range(times):
            getattr(self.proxy.process, what)()
        self.proxy.settle()

    @rule(what=st.sampled_from(["fails_to_start", "exits"]), times=st.integers(1, 2))
    def process_goes(self, what: str, times: int) -> None:
        """Have it end, or never begin; where its session was ending, the server is asked first."""
        with self.ending(states=frozenset() if self._closing else _WITH_PROGRAM):
            for _ in range(times):
                getattr(self.proxy.process, what)()

    @rule()
    def session_closes(self) -> None:
        """End as nxproxy does when its session is suspended or terminated."""
        self._closing = True
        self.proxy.process.prints(_CLOSING_LINE)
        self.proxy.process.exits()
        self.proxy.settle()

    @rule(number=st.sampled_from([signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM]))
    def process_is_killed(self, number: signal.Signals) -> None:
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
        """Print a line that nxproxy knows, at any moment."""
        self._closing |= line == _CLOSING_LINE
        self.proxy.process.prints(line)
        self.proxy.settle()

    @rule(tunnel=st.booleans(), process=st.booleans())
    def obey(self, tunnel: bool, process: bool) -> None:  # noqa: FBT001 - hypothesis passes by name
        """Let tunnel and program do what they are told from now on, or not."""
        self.proxy.tunnel.auto_complete, self.proxy.process.auto_complete = tunnel, process

    @rule()
    def tunnel_closes(self) -> None:
        """Be closed, asked or not."""
        self.proxy.tunnel.closes()
        self.proxy.settle()

    @invariant()
    def check(self) -> None:
        """What must hold at every moment."""
        proxy, status = self.proxy, self.proxy.status()
        moves = {(row.trigger, row.source, row.dest) for row in TRANSITIONS if row.dest is not None}
        assert not self.events.broken
        assert all((r.trigger, r.source, r.dest) in moves for r in status.history)
        path = [State.IDLE, *(r.dest for r in status.history)]
        assert [r.source for r in status.history] == path[:-1]
        assert status.state is path[-1]
        assert status.phase in (status.state.phases or {None})
        assert (status.phase_since is None) is (status.phase is None)
        assert proxy.ok() is (status.state is State.RUNNING)
        assert list(status.history) == self._told
        assert [record.sequence for record in self._told] == list(range(1, len(self._told) + 1))
        told = [(event["trigger"], event["source"], event["dest"]) for event in self.events.transitions]
        assert told == [(str(r.trigger), str(r.source), str(r.dest)) for r in self._told]
        self._check_cause(status.reason, status.state)
        if status.state.is_final and status.history[0].dest is State.TUNNELLING:
            assert proxy.tunnel.detached
            assert proxy.tunnel.close_requested
            left = any("process" in each for each in status.abandoned)
            assert proxy.process.exited or not proxy.process.start_requested or left
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


def _at_once(functions: list[Any]) -> None:
    callers = [threading.Thread(target=function) for function in functions]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
