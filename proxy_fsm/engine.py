"""Runs a supervisor: one owner thread passes it orders, observations and the time, one after another.

::

    caller ─ orders ─┐
    workers:         │                        decides: no thread, no clock            acts
     preflight       ├─► inbox ─► engine ──► supervisor (transitions model) ──► effects ──► workers
     forwarder       │            owner         observation + time in,            └──────► journal: event,
     process         │            thread        effects, deadline out                       subscribers, waiters
     link monitor    │
    deadlines ───────┘

Only the owner calls the supervisor; anything that can block runs in a worker, which posts an observation when it is
done. An engine that was never started has no owner thread: the first caller of `stop` calls the supervisor itself.
"""

from __future__ import annotations

import _queue
import os
import secrets
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from proxy_fsm.active_lifecycle import Effects, Now
from proxy_fsm.errors import InvalidTransition
from proxy_fsm.events import EventLog
from proxy_fsm.evidence import Observation, OutputLine, StartOrdered, StopOrdered
from proxy_fsm.journal import Journal
from proxy_fsm.states import State, Trigger
from proxy_fsm.status import Link, ProxyStatus, Timeouts
from proxy_fsm.supervisor import Supervisor
from proxy_fsm.suspension import excused_s
from proxy_fsm.text import Redactor, Secrets

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy_fsm.backends import Backend
    from proxy_fsm.events import Event
    from proxy_fsm.session import SessionInfo
    from proxy_fsm.status import TransitionRecord, TunnelStats

__all__ = ["RUNNING_ENGINES", "Engine", "EngineEffects", "is_patched"]

#: How long the owner thread may take to end after it has published a final state.
_JOIN_S = 1.0

#: The longest single wait for a deadline: a longer one would not show for how long this process was suspended.
_MAX_WAIT_S = 1.0

#: Engines whose owner thread runs, to be stopped when the interpreter exits.
RUNNING_ENGINES: set[Engine] = set()


def is_patched() -> bool:
    """Tell whether gevent had patched the standard library's queues when this module imported them."""
    return SimpleQueue is not _queue.SimpleQueue


class EngineEffects(Effects, Protocol):
    """What an engine needs of its effects, besides what its supervisor needs."""

    def acknowledge(self) -> None:
        """Note that one more line of the proxy's output was handled."""

    def tunnel_stats(self) -> TunnelStats:
        """Return what the tunnel has carried so far; may be called on any thread."""


class EffectsFactory(Protocol):
    """Makes the effects of an engine."""

    def __call__(
        self,
        *,
        secrets: Secrets,
        post: Callable[[Observation], None],
        publish: Callable[[Event, TransitionRecord | None], None],
    ) -> EngineEffects:
        """Make them.

        Args:
            secrets: What to redact in the proxy's output.
            post: Receives the workers' observations; may be called on any thread.
            publish: Publishes an event; for a change of state, with its record.
        """


class Engine:
    """What runs behind a `Proxy`. It holds no reference to it, so that a dropped proxy can be detected."""

    def __init__(
        self,
        session: SessionInfo,
        backend: Backend,
        make_effects: EffectsFactory,
        *,
        timeouts: Timeouts,
        logger: Any,
        ask_server: bool,
        resumed: bool,
    ) -> None:
        self.id = secrets.token_hex(4)
        #: The longest that stopping may take, in seconds.
        self.end_within_s = timeouts.stop_grace_s + timeouts.drain_s + 2 * timeouts.kill_s
        self.journal = Journal(EventLog(logger, proxy_id=self.id, session=session.name))
        #: Observations, and functions to be called on the owner thread; None only wakes it up. Orders have their own
        #: queue, which comes first.
        self._inbox: SimpleQueue[Observation | Callable[[], object] | None] = SimpleQueue()
        self._orders: SimpleQueue[StopOrdered] = SimpleQueue()
        #: Claims to own the engine, of which the first one wins: a call of `start`, or of `stop` while it is idle.
        self._claims: list[object] = []
        self._owner: threading.Thread | None = None
        self._owner_pid: int | None = None

        cookies = Secrets([session.cookie] if session.cookie else [])
        self._effects = make_effects(secrets=cookies, post=self._inbox.put, publish=self.journal.publish)
        now = _now()
        self._supervisor = Supervisor(
            ProxyStatus(id=self.id, session=session.name, state=State.IDLE, since=now.utc),
            now,
            backend=backend,
            effects=self._effects,
            timeouts=timeouts,
            ask_server=ask_server,
            resumed=resumed,
            redact=Redactor(cookies),
        )

    # ---- on any thread ----

    @property
    def state(self) -> State:
        """The state; takes no lock."""
        return self._supervisor.status.state

    def start(self) -> None:
        """Start the owner thread, and wait until the state has left ``idle``."""
        claim, start_gate = object(), threading.Lock()
        try:
            if not self._claim(claim):
                raise InvalidTransition(str(Trigger.START), self.state)  # noqa: TRY301 - handled below like the others
            self._owner_pid = os.getpid()
            name = f"proxy_fsm-{self.id}"
            self._owner = threading.Thread(target=self._run, args=(start_gate,), name=name, daemon=True)
            self._owner.start()
        except BaseException:
            # Whatever was raised, even by a Ctrl-C: either the thread runs and owns the engine, or it never will.
            if claim in self._claims and start_gate.acquire(blocking=False):
                self._owner = self._owner_pid = None
                self._claims.remove(claim)
                if not self._orders.empty():
                    self.stop()  # a stop was ordered in the meantime
            raise
        self.journal.wait(frozenset(State) - {State.IDLE}, None, delivered=False)

    def stop(self) -> None:
        """Order it to stop; a no-op in a forked child."""
        if self.in_forked_child():
            return
        claim = object()
        try:
            if self._claim(claim):
                self._supervisor.handle(StopOrdered(), _now())
                return
        except BaseException:
            if self.state is State.IDLE and claim in self._claims:
                self._claims.remove(claim)
            raise
        self._orders.put(StopOrdered())
        self._inbox.put(None)

    def _claim(self, claim: object) -> bool:
        self._claims.append(claim)
        if self._claims[0] is claim:
            return True
        self._claims.remove(claim)
        return False

    def wait(self, states: frozenset[State], timeout: float | None) -> State:
        """Wait until one of the states, or a final one, was published."""
        self.forbid_on_owner_thread("wait")
        if self.in_forked_child() and not self.state.is_final:
            raise RuntimeError("This proxy belongs to the parent process: a fork cannot wait for it.")
        state = self.journal.wait(states, timeout)
        if state.is_final and self._owner is not None:
            self._owner.join(_JOIN_S)
        return state

    def forbid_on_owner_thread(self, what: str) -> None:
        """Raise RuntimeError if a subscriber is about to wait."""
        if self.journal.is_delivering() or threading.current_thread() is self._owner:
            raise RuntimeError(f"'{what}' waits for the proxy, which a subscriber must not: call stop() instead.")

    def in_forked_child(self) -> bool:
        """Tell whether this is the copy of a running engine in a forked child."""
        return self._owner_pid is not None and self._owner_pid != os.getpid()

    def subscribe(
        self,
        callback: Callable[[TransitionRecord], object],
        via: Callable[..., object] | None,
        *,
        replay: bool,
    ) -> Callable[[], None]:
        """Call back with each change of state; return the function that unsubscribes."""
        unsubscribe = self.journal.subscribe(callback, via, replay=replay)
        if via is not None:
            self.call_soon(self.journal.catch_up)
        return unsubscribe

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call a function on the owner thread after everything in the inbox; not called after a final state."""
        self._inbox.put(function)

    def is_caught_up(self) -> bool:
        """Tell whether both queues are empty."""
        return self._orders.empty() and self._inbox.empty()

    def status(self) -> ProxyStatus:
        """Return a snapshot of everything that is known."""
        status = self._supervisor.status
        if self.in_forked_child():
            return status  # another thread may have held the tunnel's lock when the process forked
        silent = status.link is Link.SILENT
        return replace(
            status,
            tunnel=None if status.listen_address is None else self._effects.tunnel_stats(),
            silent_s=time.monotonic() - self._supervisor.heard_at if silent else 0.0,
        )

    # ---- on the owner thread ----

    def expire_deadline(self) -> None:
        """Expire the current deadline now, if there is one; for tests, which simulate time."""
        if self._supervisor.deadline is not None:
            self._supervisor.deadline_passed(_now())

    def _run(self, start_gate: threading.Lock) -> None:
        if not start_gate.acquire(blocking=False):
            return  # the call that started this thread was interrupted, and has released its claim
        RUNNING_ENGINES.add(self)
        try:
            self._guarded(lambda: self._supervisor.handle(StartOrdered(), _now()))
            while not self.state.is_final:
                self._guarded(self._step)
        finally:
            RUNNING_ENGINES.discard(self)

    def _guarded(self, step: Callable[[], object]) -> None:
        """Run one step. A bug, ours or a backend's, shuts the engine down in order, also if it is already stopping."""
        try:
            step()
        except BaseException as error:  # noqa: BLE001 - a backend may call sys.exit
            try:
                self._supervisor.crash(error, _now())
            except InvalidTransition:
                pass  # refused only in idle, where nothing is held
            except BaseException as second:  # noqa: BLE001 - the shutdown continues, whatever fails on the way
                self._supervisor.crash(second, _now())

    def _step(self) -> None:
        """Handle one item: orders before deadlines, and deadlines before observations, of which there may be many."""
        if not self._orders.empty():
            self._supervisor.handle(self._orders.get(), _now())
            return
        now, deadline = time.monotonic(), self._supervisor.deadline
        if deadline is not None and deadline <= now:
            self._supervisor.deadline_passed(_now())
            return
        until = None if deadline is None else min(deadline, now + _MAX_WAIT_S)
        try:
            item = self._inbox.get(timeout=None if until is None else until - now)
        except Empty:
            item = None
        if deadline is not None and until is not None:
            self._supervisor.deadline = deadline + excused_s(time.monotonic() - until)
        if isinstance(item, Observation):
            self._handle(item)
        elif item is not None:
            item()

    def _handle(self, observation: Observation) -> None:
        try:
            self._supervisor.handle(observation, _now())
        finally:
            if isinstance(observation, OutputLine):
                self._effects.acknowledge()


def _now() -> Now:
    return Now(time.monotonic(), datetime.now(UTC))
