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
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from proxy_fsm.errors import InvalidTransition
from proxy_fsm.lifecycle import TRANSITIONS, State
from proxy_fsm.session import SessionStatus
from proxy_fsm.status import EndReason, Timeouts, TransitionRecord
from proxy_fsm.testing.fakes import FakedProxy

__all__ = ["ProxyMachine"]

_TIMEOUTS = Timeouts(kill_s=0.05, stop_grace_s=0.05, ask_server_s=0.05)
_FAULTS = [reason for reason in EndReason if not reason.clean and reason is not EndReason.INTERNAL_ERROR]
_END_S = 5.0


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
            proxy.pass_deadline()
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

    @rule(threads=st.integers(1, 3))
    def stop(self, threads: int) -> None:
        """Order a stop, from several threads at once."""
        callers = [threading.Thread(target=self.proxy.stop) for _ in range(threads)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        self.proxy.settle()

    @rule()
    def deadline(self) -> None:
        """Let the running deadline be over."""
        self.proxy.pass_deadline()

    @rule(
        what=st.sampled_from(
            [
                "opens",
                "preflight_ends",
                "refuses",
                "breaks",
                "connects",
                "agent_speaks",
                "agent_closes",
                "disconnects",
                "transport_ends",
                "falls_silent",
                "is_heard_again",
                "stays_silent",
                "display_goes",
                "display_returns",
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
        self.proxy.tunnel.refuses(reason)
        self.proxy.settle()

    @rule(status=st.sampled_from([None, *SessionStatus]))
    def server_answers(self, status: SessionStatus | None) -> None:
        """Answer a question, whether it was asked or not."""
        self.proxy.tunnel.server_answers(status)
        self.proxy.settle()

    @rule(
        what=st.sampled_from(["starts", "cannot_start", "says_ready", "exits"]),
        times=st.integers(1, 2),
    )
    def process_says(self, what: str, times: int) -> None:
        """Say something of the proxy program, once or twice."""
        for _ in range(times):
            getattr(self.proxy.process, what)()
        self.proxy.settle()

    @rule()
    def session_closes(self) -> None:
        """End as nxproxy does when its session is suspended or terminated."""
        self.proxy.process.says("Session: Terminating session at 'now'.")
        self.proxy.process.exits()
        self.proxy.settle()

    @rule(number=st.sampled_from([signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM]))
    def process_is_killed(self, number: signal.Signals) -> None:
        """Kill the proxy program."""
        self.proxy.process.is_killed(number)
        self.proxy.settle()

    @rule(
        line=st.sampled_from(
            [
                "Session: Terminating session at 'now'.",
                "Info: Waiting the cleanup timeout to complete.",
                "Error: Failure reading from the peer proxy.",
                "Error: Wrong version or invalid session authentication cookie.",
                "nothing of note",
            ]
        )
    )
    def process_prints(self, line: str) -> None:
        """Print a line that nxproxy knows, at any moment."""
        self.proxy.process.says(line)
        self.proxy.settle()

    @rule(tunnel=st.booleans(), process=st.booleans())
    def obey(self, tunnel: bool, process: bool) -> None:  # noqa: FBT001 - hypothesis passes by name
        """Let tunnel and program do what they are told from now on, or not."""
        self.proxy.tunnel.obedient, self.proxy.process.obedient = tunnel, process

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
        assert proxy.ok() is (status.state is State.RUNNING)
        assert list(status.history) == self._told
        assert [record.sequence for record in self._told] == list(range(1, len(self._told) + 1))
        told = [(event["trigger"], event["source"], event["dest"]) for event in self.events.transitions]
        assert told == [(str(r.trigger), str(r.source), str(r.dest)) for r in self._told]
        assert status.state is (self._told[-1].dest if self._told else State.IDLE)
        self._check_cause(status.reason, status.state)
        if status.state.is_final and status.history[0].dest is State.TUNNELLING:
            assert proxy.tunnel.detached
            assert proxy.tunnel.closing
            assert proxy.process.gone or not proxy.process.wanted or any("process" in a for a in status.abandoned)
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
