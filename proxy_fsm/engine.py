"""The engine: one owner thread that takes orders and observations from an inbox and drives the lifecycle.

::

    caller ─ orders ─┐
    tunnel           ├──► inbox ──► owner thread: lifecycle ──► effects (preflight, tunnel, process)
    process, output  │                  │
    transport, X     │                  └──► journal: history, event, subscribers, waiters
    deadlines ───────┘

Only the owner fires triggers and touches the engine's fields; what can block runs in a worker that posts an
observation when it is done. An engine that was never started has no owner thread: the first caller that stops it fires
the trigger itself.
"""

from __future__ import annotations

import _queue
import os
import secrets
import signal
import threading
import time
import traceback
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from proxy_fsm.errors import BackendError, InvalidTransition
from proxy_fsm.events import EventLog
from proxy_fsm.evidence import (
    ChannelOpened,
    ConnectionEnded,
    DisplayLost,
    DisplayRestored,
    Evidence,
    LinkDead,
    LinkRestored,
    LinkSilent,
    LogFailed,
    Observation,
    OutputLine,
    PeerRejected,
    PreflightFinished,
    PreflightPassed,
    ProcessExited,
    ProcessSpawned,
    SessionStatusReceived,
    SpawnFailed,
    StopOrdered,
    TransportEnded,
    TunnelClosed,
    WorkerCrashed,
    WorkerFailed,
)
from proxy_fsm.journal import Journal
from proxy_fsm.lifecycle import Lifecycle
from proxy_fsm.reasons import EndReason, hint_for, is_retryable
from proxy_fsm.redaction import Hidden, Redactor
from proxy_fsm.session import SessionInfo, SessionStatus
from proxy_fsm.ssh import why_ended
from proxy_fsm.states import State, Transition, Trigger
from proxy_fsm.status import Link, ProxyStatus, Timeouts, TransitionRecord
from proxy_fsm.workers import link_monitor
from proxy_fsm.workers.forwarder import Forwarder
from proxy_fsm.workers.preflight import Preflight
from proxy_fsm.workers.process import ProxyProcess
from proxy_fsm.workers.session_query import SessionStatusQuery

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import paramiko

    from proxy_fsm.backends import Backend

__all__ = ["LIVE", "Engine", "Workers", "is_patched"]

_TAIL_LINES = 20
#: How long what the proxy sent last may take to get through, once it is gone, before its channel is cut.
_DRAIN_S = 0.5
#: How long the threads that have said their last word may take to be gone.
_JOIN_S = 1.0

#: Causes that are second-hand where the transport has gone: they are then its consequence.
_TRANSPORT_FIRST = frozenset(
    {EndReason.NEGOTIATION_FAILED, EndReason.PEER_LOST, EndReason.SESSION_ENDED, EndReason.PROXY_EXITED}
)


class _Cause(NamedTuple):
    """Why an engine ends: the reason, one sentence for a person, and what to do."""

    reason: EndReason
    detail: str
    hint: str | None = None


_HOW_IT_ENDED: dict[SessionStatus | None, _Cause] = {
    SessionStatus.SUSPENDED: _Cause(EndReason.SESSION_SUSPENDED, "The session was suspended on the server."),
    SessionStatus.FINISHED: _Cause(EndReason.SESSION_TERMINATED, "The session was terminated on the server."),
}

#: Engines that hold something, for the end of the interpreter.
LIVE: set[Engine] = set()


def is_patched() -> bool:
    """Tell whether gevent had patched the standard library's queues when this module took them."""
    return SimpleQueue is not _queue.SimpleQueue


@dataclass(frozen=True, slots=True)
class Workers:
    """What an engine starts to do its work; each posts what it sees to the engine's inbox."""

    forwarder: Callable[..., Forwarder] = Forwarder
    preparation: Callable[..., Preflight] = Preflight
    process: Callable[..., ProxyProcess] = ProxyProcess
    question: Callable[..., SessionStatusQuery] = SessionStatusQuery
    attach: Callable[[paramiko.Transport, Timeouts, Callable[[Observation], None]], link_monitor.Watcher] = (
        link_monitor.attach
    )


class Engine:
    """What runs behind a `Proxy`. It knows nothing of its proxy, so that a dropped proxy can be noticed."""

    def __init__(
        self,
        session: SessionInfo,
        transport: paramiko.Transport,
        backend: Backend,
        *,
        sessions_root: Path,
        timeouts: Timeouts,
        logger: Any,
        environ: Mapping[str, str],
        ask_server: bool,
        resumed: bool,
        workers: Workers,
    ) -> None:
        self.id = secrets.token_hex(4)
        #: How long stopping may take at the most, in seconds.
        self.end_within_s = timeouts.stop_grace_s + _DRAIN_S + 2 * timeouts.kill_s
        self._session = session
        self._transport = transport
        self._backend = backend
        self._timeouts = timeouts
        self._ask_server = ask_server
        self._resumed = resumed

        self._secrets = Hidden([session.cookie] if session.cookie else [])
        self._redact = Redactor(self._secrets)
        self.log = EventLog(logger, proxy_id=self.id, session=session.name)
        self.journal = Journal(self.log)
        #: What was seen; None only wakes the owner. Orders have a queue of their own, which is looked at first.
        self._inbox: SimpleQueue[Observation | None] = SimpleQueue()
        self._orders: SimpleQueue[StopOrdered] = SimpleQueue()
        #: Who wants to own it; the first one does: a call of `start`, or of `stop` while it is idle.
        self._claims: list[object] = []
        self._owner: threading.Thread | None = None
        self._owner_pid: int | None = None

        self._lifecycle = Lifecycle(
            on_change=self._changed,
            on_enter={
                State.TUNNELLING: self._start_preflight,
                State.SPAWNING: self._start_proxy,
                State.RUNNING: self._clear_timer,
                State.STOPPING: self._start_stopping,
            },
        )
        self._evidence = Evidence()
        self._view = ProxyStatus(id=self.id, session=session.name, state=State.IDLE, since=datetime.now(UTC))
        self._entered_at = time.monotonic()
        self._heard_at = 0.0
        self._timer: tuple[float, Callable[[], None]] | None = None
        #: Why it ends; told with the state that it leads to, so that no snapshot has the one without the other.
        self._cause: _Cause | None = None
        #: The cause that is settled as soon as it is confirmed; the first one, unless the display proves lost.
        self._likely: _Cause | None = None

        self._workers = workers
        self._forwarder = workers.forwarder(
            transport,
            (session.agent_host, session.graphics_port),
            max_connections=backend.max_connections,
            agent_connect_s=timeouts.agent_connect_s,
            post=self._inbox.put,
        )
        self._preparation = workers.preparation(
            session,
            backend,
            self._forwarder,
            sessions_root=sessions_root,
            environ=environ,
            timeout_s=timeouts.preflight_s,
            post=self._inbox.put,
        )
        self._attachment: link_monitor.Watcher | None = None
        self._process: ProxyProcess | None = None
        self._question: SessionStatusQuery | None = None
        self._process_alive = self._killed = self._sign_seen = False

    # ---- orders, on any thread ----

    @property
    def state(self) -> State:
        """The state; takes no lock."""
        return self._view.state

    def start(self) -> None:
        """Become owned by a thread of its own, and get under way."""
        claim, may_run = object(), threading.Lock()
        try:
            if not self._claim(claim):
                raise InvalidTransition(str(Trigger.START), self.state)  # noqa: TRY301 - see the end of this block
            self._owner_pid = os.getpid()
            self._owner = threading.Thread(target=self._run, args=(may_run,), name=f"proxy_fsm-{self.id}", daemon=True)
            self._owner.start()
        except BaseException:
            # Whatever it was, a Ctrl-C too: either the thread runs and owns the engine, or it never will.
            if claim in self._claims and may_run.acquire(blocking=False):
                self._owner = self._owner_pid = None
                self._claims.remove(claim)
                if not self._orders.empty():
                    self.stop()  # it was ordered meanwhile
            raise
        self.journal.wait(frozenset(State) - {State.IDLE}, None)

    def stop(self) -> None:
        """Ask it to end; a no-op in a forked child."""
        if self.in_forked_child():
            return
        claim = object()
        try:
            if self._claim(claim):
                self._settle(EndReason.STOP_REQUESTED, "It was stopped before it was started.")
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
        """Wait until one of the states, or a final one, was told to everybody."""
        self.forbid_on_owner_thread("wait")
        if self.in_forked_child() and not self.state.is_final:
            raise RuntimeError("This proxy belongs to the parent process: a fork cannot wait for it.")
        state = self.journal.wait(states, timeout)
        if state.is_final and self._owner is not None:
            self._owner.join(_JOIN_S)
        return state

    def forbid_on_owner_thread(self, what: str) -> None:
        """Raise RuntimeError where waiting would wait for itself."""
        if self.journal.is_delivering() or threading.current_thread() is self._owner:
            raise RuntimeError(f"'{what}' waits for the proxy, which waits for this subscriber: call stop() instead.")

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
        """Have each change told; returns what ends that."""
        unsubscribe = self.journal.subscribe(callback, via, replay=replay)
        self._inbox.put(None)  # the owner tells the newcomer what it missed
        return unsubscribe

    def status(self) -> ProxyStatus:
        """Return a snapshot of everything that is known."""
        view = self._view
        if self.in_forked_child():
            return view  # the tunnel's lock may have been held when the process forked
        return replace(
            view,
            tunnel=None if view.listen_address is None else self._forwarder.stats(),
            silent_s=time.monotonic() - self._heard_at if view.link is Link.SILENT else 0.0,
        )

    # ---- the owner thread ----

    def _run(self, may_run: threading.Lock) -> None:
        if not may_run.acquire(blocking=False):
            return  # the call that started this thread was interrupted, and has given the engine back
        LIVE.add(self)
        try:
            self._guarded(self._lifecycle.start)
            while not self.state.is_final:
                self._guarded(self._step)
        finally:
            LIVE.discard(self)

    def _guarded(self, step: Callable[[], object]) -> None:
        try:
            step()
        except BaseException as error:  # noqa: BLE001 - a bug of ours, or of a backend, ends the engine in order
            self._log_error(error)
            try:
                self._settle(EndReason.INTERNAL_ERROR, f"An internal error: {type(error).__name__}: {error}.")
            except InvalidTransition:
                pass  # the table refuses it in idle alone, where nothing is held
            except BaseException as second:  # noqa: BLE001 - leaving goes on, whatever breaks on the way
                self._log_error(second)
                if self._timer is None:
                    self._set_timer(0.0, self._abandon)

    def _step(self) -> None:
        """Take one thing in: orders before deadlines, deadlines before observations, of which there may be many."""
        if not self._orders.empty():
            self._take(self._orders.get())
            return
        wait_s = None if self._timer is None else self._timer[0] - time.monotonic()
        if wait_s is not None and wait_s <= 0:
            self._deadline_passed()
            return
        try:
            observation = self._inbox.get(timeout=wait_s)
        except Empty:
            return
        if observation is None:
            self.journal.catch_up()
        else:
            self._take(observation)

    def _deadline_passed(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer[1]()

    def _take(self, observation: Observation) -> None:
        self._evidence.add(observation)
        self._note(observation)
        self._act(observation)
        if self.state in {State.SPAWNING, State.RUNNING}:
            self._judge()
        self._update(waiting_for=self._waiting_for())

    def _changed(self, row: Transition) -> None:
        assert row.dest is not None  # noqa: S101 - an ignored trigger changes nothing
        now, at = time.monotonic(), datetime.now(UTC)
        reason, detail, hint = self._cause or (None, "", None)
        record = TransitionRecord(
            proxy_id=self.id,
            session=self._session.name,
            trigger=row.trigger,
            source=row.source,
            dest=row.dest,
            reason=reason,
            detail=detail,
            at=at,
            elapsed_s=now - self._entered_at,
            sequence=len(self._view.history) + 1,
        )
        self._entered_at = now
        last_words = {}
        if row.dest.is_final and reason is not None:
            retryable = is_retryable(
                reason,
                channel_opened=self._evidence.saw(ChannelOpened),
                running_s=next((r.elapsed_s for r in self._view.history if r.source is State.RUNNING), None),
                resumed=self._resumed,
            )
            last_words = {"hint": hint, "retryable": retryable}
        self._update(
            state=row.dest,
            reason=reason,
            detail=detail,
            hint=hint,
            since=at,
            waiting_for=self._waiting_for(),
            retryable=last_words.get("retryable"),
            history=(*self._view.history, record),
        )
        self.journal.record(record, **last_words)

    def _update(self, **changes: Any) -> None:
        self._view = replace(self._view, **changes)

    # ---- effects: started here, done elsewhere ----

    def _set_timer(self, after_s: float, action: Callable[[], None]) -> None:
        self._timer = (time.monotonic() + after_s, action)

    def _clear_timer(self) -> None:
        self._timer = None

    def _start_preflight(self) -> None:
        self._set_timer(self._timeouts.preflight_s, self._preflight_too_late)
        self._preparation.start()
        self._attachment = self._workers.attach(self._transport, self._timeouts, self._inbox.put)

    def _start_proxy(self) -> None:
        self._set_timer(self._timeouts.ready_s, self._ready_too_late)
        launch, watch = self._preparation.launch, self._preparation.watch
        assert launch is not None  # noqa: S101 - set before PreflightPassed is posted
        if watch is not None:
            watch.start()
        self._forwarder.start()
        self._process = self._workers.process(
            launch.command,
            environment=launch.environment,
            directory=launch.directory,
            log=launch.log,
            secrets=self._secrets,
            post=self._inbox.put,
        )
        self._process.start()
        self._process_alive = True

    def _preflight_too_late(self) -> None:
        self._end(
            EndReason.START_TIMEOUT,
            f"Not prepared after {self._timeouts.preflight_s:g} s: {self._waiting_for()} was still missing.",
            "Look on this machine for what it waited for, or allow more time (preflight_s).",
        )

    def _ready_too_late(self) -> None:
        after_s = self._timeouts.ready_s
        self._end(EndReason.START_TIMEOUT, f"Not ready after {after_s:g} s: {self._waiting_for()} was still missing.")

    def _outlived(self) -> None:
        self._end(EndReason.SESSION_ENDED, "The connection to the agent has ended; the proxy program stayed, alone.")

    # ---- what observations mean ----

    def _act(self, seen: Observation) -> None:  # noqa: C901, PLR0912 - one flat case per observation
        match seen:
            case StopOrdered():
                self._end(EndReason.STOP_REQUESTED, "It was asked to stop.")
            case PreflightPassed(listen_address=address):
                if self.state is State.TUNNELLING:
                    self._update(listen_address=address)
                self._lifecycle.fire(Trigger.TUNNEL_OPENED)
            case PreflightFinished() | TunnelClosed():
                self._finish_if_released()
            case SpawnFailed(error=error):
                self._process_gone()
                self._end(error.reason, error.detail, error.hint)
            case WorkerFailed(error=error):
                if self.state is State.RUNNING:
                    self.log("warning", "tunnel.refused", reason=str(error.reason), detail=error.detail)
                else:
                    self._end(error.reason, error.detail, error.hint)
            case WorkerCrashed(worker=worker, error=error):
                self._end(EndReason.INTERNAL_ERROR, f"An internal error in the {worker}: {error!r}.")
            case ProcessExited():
                self._process_gone()
            case OutputLine():
                if self._process is not None:
                    self._process.ack_line()
            case ConnectionEnded():
                if self.state is State.RUNNING and self._backend.max_connections == 1 and self._likely is None:
                    self._set_timer(self._timeouts.stop_grace_s, self._outlived)
            case TransportEnded(detail=detail):
                self._hurry()
                self._end(EndReason.TRANSPORT_LOST, detail)
            case LinkDead(silent_s=silent_s):
                self._hurry()
                self._end(
                    EndReason.TRANSPORT_SILENT, f"The SSH server has not been heard for {round(silent_s, 1):g} s."
                )
            case LinkSilent():
                self._hurry()
            case DisplayLost(detail=detail):
                self._likely = None  # what the proxy says when its display goes looks like an end of the session
                self._end(EndReason.DISPLAY_LOST, f"The X server has gone. {detail}")
            case DisplayRestored():
                self._confirm()
            case SessionStatusReceived(status=status) if self._likely is not None:
                self._settle(*_HOW_IT_ENDED.get(status, self._likely))
            case _:
                pass

    def _judge(self) -> None:
        """Ask the backend what all that was seen means."""
        try:
            if self.state is State.SPAWNING:
                # The sign may come before the channel, and be gone from the lines that are held when that stands.
                self._sign_seen = self._sign_seen or self._backend.ready(self._evidence)
                connected = self._evidence.saw(ChannelOpened) and self._evidence.exited is None
                if connected and self._sign_seen:
                    self._evidence.ready = True
                    self._lifecycle.fire(Trigger.PROXY_READY)
            verdict = self._backend.diagnose(self._evidence)
        except BackendError as error:
            self._end(error.reason, error.detail, error.hint)
            return
        if verdict is None and self._evidence.exited is not None:
            verdict = self._judge_exit(self._evidence.exited)
        if verdict is not None:
            self._end(*verdict)

    def _judge_exit(self, exited: ProcessExited) -> tuple[EndReason, str]:
        if exited.signal is not None:
            return EndReason.PROXY_KILLED, f"The proxy program was ended by {_signal_name(exited.signal)}."
        if exited.exit_code is None:
            return EndReason.PROXY_EXITED, "The proxy program ended; somebody else has taken its exit status."
        last = next((line.text for line in reversed(self._evidence.lines) if line.text.strip()), None)
        said = f'; its last line: "{last}".' if last is not None else " and printed nothing."
        return EndReason.PROXY_EXITED, f"The proxy program ended with exit code {exited.exit_code}{said}"

    def _end(self, reason: EndReason, detail: str, hint: str | None = None) -> None:
        """Take a cause; the first one counts."""
        if self._cause is not None:
            return
        if self._likely is not None:
            if self._likely.reason is not reason:
                self._settle(*self._likely)
            return
        if reason in _TRANSPORT_FIRST and not self._transport.is_active():
            reason, detail = EndReason.TRANSPORT_LOST, why_ended(self._transport)
        if reason is EndReason.SESSION_ENDED:
            self._likely = _Cause(reason, detail)
            self._set_timer(self._timeouts.ask_server_s, self._confirmed_by_time)
            self._confirm()
        else:
            self._settle(reason, detail, hint)

    def _confirm(self) -> None:
        """See whether the session's end is what it looks like: the display is there, and the server agrees."""
        if self._likely is None or (self._preparation.watch is not None and self._preparation.watch.suspect):
            return  # DisplayLost or DisplayRestored will come
        if not self._ask_server:
            self._settle(*self._likely)
        elif self._question is None:
            self._question = self._workers.question(self._transport, self._session.name, self._inbox.put)
            try:
                self._question.start()
            except RuntimeError:  # no thread can be started: what is likely has to do
                self._settle(*self._likely)

    def _confirmed_by_time(self) -> None:
        if self._likely is not None:
            self._settle(*self._likely)

    def _settle(self, reason: EndReason, detail: str, hint: str | None = None) -> None:
        """Fix the cause and leave: it is never overwritten but by `stop_timeout`."""
        if self._cause is not None:
            return
        hint = hint or hint_for(
            reason,
            channel_opened=self._evidence.saw(ChannelOpened),
            was_running=self._evidence.ready,
            resumed=self._resumed,
        )
        # What a backend says may hold what it was given.
        self._cause = _Cause(reason, self._redact(detail), None if hint is None else self._redact(hint))
        if reason is EndReason.STOP_REQUESTED:
            self._lifecycle.fire(Trigger.STOP)
        else:
            self._lifecycle.fire(Trigger.SESSION_ENDED if reason.clean else Trigger.FAULT_FOUND)

    # ---- stopping: the proxy first, then all the rest, each within its time ----

    def _start_stopping(self) -> None:
        self._set_timer(self._timeouts.kill_s, self._abandon)  # whatever goes wrong below, this comes to an end
        if self._question is not None:
            self._question.cancel()
        if not self._process_alive or self._process is None:
            self._release()
        elif self._evidence.saw(LinkDead) or self._view.link is Link.SILENT or not self._transport.is_active():
            self._kill()  # nothing orderly can travel any more
        else:
            self._evidence.signalled = True
            self._process.signal(signal.SIGTERM)
            self._set_timer(self._timeouts.stop_grace_s, self._kill)

    def _hurry(self) -> None:
        """Where it is leaving in order, leave at once: nothing orderly can travel any more."""
        if self.state is State.STOPPING and self._process_alive and not self._killed:
            self._kill()

    def _kill(self) -> None:
        self._set_timer(self._timeouts.kill_s, self._survived)
        self._killed = True
        if self._process is not None:
            self._evidence.signalled = True
            self._process.signal(signal.SIGKILL)

    def _survived(self) -> None:
        detail = f"The proxy program (process {self._view.pid}) is still there after SIGKILL."
        if self._cause is None or self._cause.reason.clean:
            self._cause = _Cause(EndReason.STOP_TIMEOUT, detail, EndReason.STOP_TIMEOUT.hint)
        self._update(abandoned=(*self._view.abandoned, f"process {self._view.pid}"))
        self._process_gone()

    def _process_gone(self) -> None:
        self._process_alive = False
        if self.state is State.STOPPING:
            self._release()

    def _release(self) -> None:
        self._set_timer(_DRAIN_S, self._cut)
        self._preparation.close()
        self._forwarder.close()
        if self._evidence.saw(TransportEnded, LinkDead):
            self._forwarder.abort()
        self._finish_if_released()

    def _cut(self) -> None:
        self._set_timer(self._timeouts.kill_s, self._abandon)
        self._forwarder.abort()

    def _abandon(self) -> None:
        """Go without what cannot be released in time, and say so."""
        try:
            if self._process_alive and self._process is not None:
                self._update(abandoned=(*self._view.abandoned, f"process {self._view.pid}"))
                self._process.signal(signal.SIGKILL)
            if not self._evidence.saw(PreflightFinished):
                self._update(abandoned=(*self._view.abandoned, f"the preflight, waiting for {self._preparation.step}"))
            self._update(abandoned=(*self._view.abandoned, *self._forwarder.unreleased()))
            self._preparation.close()
            self._forwarder.close()
        finally:
            self._finish()

    def _finish_if_released(self) -> None:
        released = (
            self._evidence.saw(PreflightFinished) and self._evidence.saw(TunnelClosed) and not self._process_alive
        )
        if self.state is State.STOPPING and released:
            self._finish()

    def _finish(self) -> None:
        self._clear_timer()
        try:
            monitor_thread = None if self._attachment is None else self._attachment.detach()
            if not self._view.abandoned:
                self._join_workers(monitor_thread)
        finally:
            clean = self._cause is not None and self._cause.reason.clean
            self._lifecycle.fire(Trigger.CLOSED_CLEANLY if clean else Trigger.CLOSED_AFTER_FAULT)

    def _join_workers(self, monitor_thread: threading.Thread | None) -> None:
        """Wait for threads that have said their last word, so that nothing at all is left."""
        deadline = time.monotonic() + _JOIN_S
        workers = [self._preparation.thread, *self._forwarder.threads()]
        workers += [worker.thread for worker in (self._process, self._question) if worker is not None]
        workers += [] if monitor_thread is None else [monitor_thread]
        for thread in workers:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        if self._preparation.watch is not None:
            self._preparation.watch.join(max(0.0, deadline - time.monotonic()))

    # ---- what is told ----

    def _note(self, seen: Observation) -> None:  # noqa: C901 - one flat case per observation
        """Put what was seen into the status, and into the log."""
        match seen:
            case PreflightPassed(listen_address=address) if self.state is State.TUNNELLING:
                self.log("info", "tunnel.listening", address=address)
            case ProcessSpawned(pid=pid, executable=executable):
                self._update(pid=pid)
                self.log("info", "process.spawned", pid=pid, executable=executable)
            case OutputLine(text=text):
                self._update(output_tail=(*self._view.output_tail, text)[-_TAIL_LINES:])
                self.log("debug", "process.output", line=text)
            case ProcessExited(exit_code=exit_code, signal=number):
                self._update(exit_code=exit_code, signal=number)
                self.log("info", "process.exited", exit_code=exit_code, signal=number)
            case ChannelOpened(connection=connection):
                self.log("info", "tunnel.connected", connection=connection)
            case ConnectionEnded(connection, to_agent, from_agent, duration_s):
                self.log(
                    "info",
                    "tunnel.closed",
                    connection=connection,
                    bytes_to_agent=to_agent,
                    bytes_from_agent=from_agent,
                    duration_s=round(duration_s, 6),
                )
            case PeerRejected(peer=peer):
                self.log("warning", "tunnel.rejected", peer=peer)
            case LinkSilent(heard_at=heard_at):
                self._heard_at = heard_at
                self._update(link=Link.SILENT)
                self.log("warning", "link.silent", silent_s=round(time.monotonic() - heard_at, 3))
            case LinkRestored(silent_s=silent_s):
                self._update(link=Link.OK)
                self.log("info", "link.restored", silent_s=round(silent_s, 3))
            case LogFailed(detail=detail):
                self.log("warning", "process.log_failed", detail=detail)
            case WorkerCrashed(worker=worker, error=error):
                self._log_error(error, worker=worker)
            case _:
                pass

    def _log_error(self, error: BaseException, **fields: Any) -> None:
        """Log a traceback as text: renderers that show local variables would show secrets."""
        text = "".join(traceback.format_exception(error))
        self.log("error", "internal.error", exception=self._redact(text), **fields)

    def _waiting_for(self) -> str:  # noqa: PLR0911 - one flat case per state
        evidence = self._evidence
        match self._lifecycle.state:
            case State.TUNNELLING:
                return self._preparation.step
            case State.SPAWNING if not evidence.saw(ProcessSpawned):
                return "the proxy program's start"
            case State.SPAWNING if not evidence.saw(ChannelOpened):
                return "the channel to the agent"
            case State.SPAWNING:
                return "the proxy's sign that the session stands"
            case State.STOPPING if self._process_alive:
                return "the proxy program's end"
            case State.STOPPING:
                return "the tunnel's end"
            case _:
                return ""


def _signal_name(number: int) -> str:
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:
        return f"signal {number}"
