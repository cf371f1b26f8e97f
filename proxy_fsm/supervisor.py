"""Decides what a proxy does: one observation and the time in; triggers, effects and a deadline out.

The supervisor is the model of the lifecycle's machine. An observation makes it fire triggers; entering a state or a
phase calls an effect, which another object carries out (see `Effects`); then the change is published. It has no
thread, no clock, no I/O and no logger, so that a test is a script of observations and effects.
"""

from __future__ import annotations

import signal
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from proxy_fsm.errors import BackendError
from proxy_fsm.events import Event
from proxy_fsm.evidence import (
    ChannelOpened,
    ChecksPassed,
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
    StartOrdered,
    StopOrdered,
    TransportEnded,
    TunnelClosed,
    WorkerCrashed,
    WorkerFailed,
)
from proxy_fsm.lifecycle import Lifecycle
from proxy_fsm.reasons import EndReason, hint_for, is_retryable
from proxy_fsm.session import SessionStatus
from proxy_fsm.states import PHASES, Phase, PhaseTrigger, State, Trigger
from proxy_fsm.status import Link, ProxyStatus, Timeouts, TransitionRecord

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from transitions import EventData

    from proxy_fsm.backends import Backend
    from proxy_fsm.evidence import Launch

__all__ = ["Effects", "Now", "Supervisor"]

_TAIL_LINES = 20
_LIMITS = {(row.state, row.phase): row.limit for row in PHASES}

#: Reasons that are mere consequences if the transport has ended.
_SECONDARY = frozenset(
    {EndReason.NEGOTIATION_FAILED, EndReason.PEER_LOST, EndReason.SESSION_ENDED, EndReason.PROXY_EXITED}
)

_WAITING_FOR = {
    Phase.LAUNCHING: "the proxy program's start",
    Phase.CONNECTING: "the channel to the agent",
    Phase.NEGOTIATING: "the proxy's sign that the session is established",
    Phase.VERIFYING: "proof that the session has ended",
    Phase.TERMINATING: "the proxy program's exit",
    Phase.KILLING: "the proxy program's exit",
    Phase.DRAINING: "the tunnel's close",
    Phase.ABORTING: "the tunnel's close",
}


class Now(NamedTuple):
    """The time of an observation: of the monotonic clock in seconds, and of the calendar, aware, in UTC."""

    monotonic_s: float
    utc: datetime


class Cause(NamedTuple):
    """Why a proxy ends: the reason, one sentence for a person, and what to do."""

    reason: EndReason
    detail: str
    hint: str | None = None


_CONFIRMED = {
    SessionStatus.SUSPENDED: Cause(EndReason.SESSION_SUSPENDED, "The session was suspended on the server."),
    SessionStatus.FINISHED: Cause(EndReason.SESSION_TERMINATED, "The session was terminated on the server."),
}


class Effects(Protocol):
    """What a supervisor has done, and what it asks; nothing of it blocks."""

    def publish(self, event: Event, record: TransitionRecord | None = None) -> None:
        """Publish an event, with the record that goes to subscribers where it is a change of state; never raises."""

    def start_preflight(self) -> None:
        """Start the preflight, and watch the transport."""

    def start_proxy(self, launch: Launch) -> None:
        """Start the proxy program, and accept its connections."""

    def terminate(self) -> None:
        """Send the proxy program SIGTERM."""

    def kill(self) -> None:
        """Send the proxy program SIGKILL."""

    def drain(self) -> None:
        """Close everything, letting through what the proxy has sent."""

    def abort(self) -> None:
        """Close everything at once, whatever is still on its way."""

    def release(self) -> None:
        """Leave the transport's monitor, and wait for the threads that have posted their last observation."""

    def query_session(self) -> None:
        """Ask the server for the status of the session."""

    def cancel_query(self) -> None:
        """Want no answer to that any more."""

    def preflight_step(self) -> str:
        """Return what the preflight is waiting for, for a person."""

    def transport_end(self) -> str | None:
        """Return why the transport has ended, in a sentence; None while it is active."""

    def display_in_doubt(self) -> bool:
        """Tell whether the display watch is finding out if the X server is gone; it posts what comes of it."""

    def unreleased(self) -> tuple[str, ...]:
        """Return what is still open, for a person."""


class Supervisor(Lifecycle):
    """Decides for one proxy; see the module.

    Args:
        status: What is published before anything has happened.
        now: The time.
        backend: Judges the evidence.
        effects: Carries out what is decided.
        timeouts: The limits of the phases.
        ask_server: Whether to ask the server how a session ended.
        resumed: Whether the session had been resumed.
        redact: Takes the secrets out of a text.

    Attributes:
        status: What is known; replaced as a whole at each change.
        deadline: When `deadline_passed` has to be called, in seconds of the monotonic clock; None for never.
        heard_at: When the SSH server was last heard before it fell silent, in the same seconds.
    """

    def __init__(
        self,
        status: ProxyStatus,
        now: Now,
        *,
        backend: Backend,
        effects: Effects,
        timeouts: Timeouts,
        ask_server: bool,
        resumed: bool,
        redact: Callable[[str], str],
    ) -> None:
        super().__init__()
        self.status = status
        self.deadline: float | None = None
        self.heard_at = now.monotonic_s
        self._backend = backend
        self._effects = effects
        self._timeouts = timeouts
        self._ask_server = ask_server
        self._resumed = resumed
        self._redact = redact
        self._evidence = Evidence()
        self._now = self._state_since = self._phase_since = now
        self._limit: str | None = None
        self._unpublished: list[tuple[Event, TransitionRecord | None]] = []
        self._launch: Launch | None = None
        #: Why it ends; published with the state that it leads to, so that no status has the one without the other.
        self._cause: Cause | None = None
        #: The cause that becomes final once it is verified.
        self._tentative: Cause | None = None
        self._process_alive = self._sign_seen = self._queried = False

    # ---- in: observations, the time, and bugs ----

    def handle(self, seen: Observation, now: Now) -> None:
        """Handle one observation.

        Raises:
            InvalidTransition: The tables refuse what follows from it: `start` twice, or a bug.
        """
        self._now = now
        self._evidence.add(seen)
        self._react(seen)
        self._ask_backend()
        self._update(waiting_for=self._waiting_for())

    def deadline_passed(self, now: Now) -> None:
        """Do what follows when the phase has reached its limit."""
        self._now = now
        self.deadline = None
        match self.phase:
            case Phase.CHECKING | Phase.BINDING:
                self._propose(
                    EndReason.START_TIMEOUT,
                    f"Not prepared after {self._timeouts.preflight_s:g} s: {self._waiting_for()} was still missing.",
                    "Look on this machine for what it waited for, or allow more time (preflight_s).",
                )
            case Phase.TERMINATING:
                self.fire(PhaseTrigger.GRACE_OVER)
            case Phase.KILLING:
                self._give_up_process()
            case Phase.DRAINING:
                self.fire(PhaseTrigger.DRAIN_OVER)
            case Phase.ABORTING:
                self._give_up()
            case _ if self._tentative is not None:
                self._commit(self._tentative)
            case Phase.ESTABLISHED:
                alone = "The connection to the agent has ended; the proxy program stayed, alone."
                self._propose(EndReason.SESSION_ENDED, alone)
            case _:
                missing = f"Not ready after {self._timeouts.ready_s:g} s: {self._waiting_for()} was still missing."
                self._propose(EndReason.START_TIMEOUT, missing)
        self._update(waiting_for=self._waiting_for())

    def crash(self, error: BaseException, now: Now) -> None:
        """End in order after a bug: of this package, or of a backend.

        Raises:
            InvalidTransition: It is idle, where nothing has to be ended.
        """
        self._now = now
        self._publish_error(error)
        if self.state is State.STOPPING:
            self.deadline = now.monotonic_s if self.deadline is None else self.deadline
            return
        bug = Cause(EndReason.INTERNAL_ERROR, f"An internal error: {type(error).__name__}: {error}.")
        if self._cause is None:
            self._commit(bug)
        else:  # it broke before it could be left for that cause
            self.fire(Trigger.FAULT_FOUND)

    # ---- what observations mean ----

    def _react(self, seen: Observation) -> None:  # noqa: C901, PLR0912, PLR0915 - one flat case per observation
        match seen:
            case StartOrdered():
                self.fire(Trigger.START)
            case StopOrdered() if self.state is State.IDLE:
                self._commit(Cause(EndReason.STOP_REQUESTED, "It was stopped before it was started."))
            case StopOrdered():
                self._propose(EndReason.STOP_REQUESTED, "It was asked to stop.")
            case ChecksPassed():
                if self.phase is Phase.CHECKING:
                    self.fire(PhaseTrigger.CHECKS_PASSED)
            case PreflightPassed(listen_address=address, launch=launch):
                if self.state is State.TUNNELLING:
                    self._launch = launch
                    self._update(listen_address=address)
                    self._publish("tunnel.listening", address=address)
                self.fire(Trigger.TUNNEL_OPENED)
            case PreflightFinished() | TunnelClosed():
                self._close_if_released()
            case ProcessSpawned(pid=pid, executable=executable):
                self._update(pid=pid)
                self._publish("process.spawned", pid=pid, executable=executable)
            case OutputLine(text=text):
                self._update(output_tail=(*self.status.output_tail, text)[-_TAIL_LINES:])
                self._publish("process.output", line=text)
            case LogFailed(detail=detail):
                self._publish("process.log_failed", detail=detail)
            case SpawnFailed(error=error):
                self._process_gone()
                self._propose(error.reason, error.detail, error.hint)
            case ProcessExited(exit_code=exit_code, signal=number):
                self._update(exit_code=exit_code, signal=number)
                self._publish("process.exited", exit_code=exit_code, signal=number)
                self._process_gone()
            case WorkerFailed(error=error) if self.state is State.RUNNING:
                self._publish("tunnel.refused", reason=str(error.reason), detail=self._redact(error.detail))
            case WorkerFailed(error=error):
                self._propose(error.reason, error.detail, error.hint)
            case WorkerCrashed(worker=worker, error=error):
                self._publish_error(error, worker=worker)
                self._propose(EndReason.INTERNAL_ERROR, f"An internal error in the {worker}: {error!r}.")
            case ChannelOpened(connection=connection):
                self._publish("tunnel.connected", connection=connection)
            case PeerRejected(peer=peer):
                self._publish("tunnel.rejected", peer=peer)
            case ConnectionEnded():
                self._connection_ended(seen)
            case TransportEnded(detail=detail):
                self._stop_waiting()
                self._propose(EndReason.TRANSPORT_LOST, detail)
            case LinkSilent(heard_at=heard_at):
                self.heard_at = heard_at
                self._update(link=Link.SILENT)
                self._publish("link.silent", silent_s=round(self._now.monotonic_s - heard_at, 3))
                self._stop_waiting()
            case LinkRestored(silent_s=silent_s):
                self._update(link=Link.OK)
                self._publish("link.restored", silent_s=round(silent_s, 3))
            case LinkDead(silent_s=silent_s):
                self._stop_waiting()
                unheard = f"The SSH server has not been heard for {round(silent_s, 1):g} s."
                self._propose(EndReason.TRANSPORT_SILENT, unheard)
            case DisplayLost(detail=detail):
                self._tentative = None  # what a proxy prints when its display goes looks like an end of the session
                self._propose(EndReason.DISPLAY_LOST, f"The X server has gone. {detail}")
            case DisplayRestored():
                self._verify()
            case SessionStatusReceived(status=status) if self._tentative is not None:
                self._session_status_received(self._tentative, status)
            case _:
                pass

    def _ask_backend(self) -> None:
        """Ask the backend what all that was seen means."""
        if self.state not in {State.SPAWNING, State.RUNNING}:
            return
        try:
            if self.state is State.SPAWNING and self._tentative is None:
                self._advance()
            verdict = self._backend.diagnose(self._evidence)
        except BackendError as error:
            self._propose(error.reason, error.detail, error.hint)
            return
        if verdict is None and self._evidence.exited is not None:
            verdict = _verdict_on_exit(self._evidence.exited, self._evidence)
        if verdict is not None:
            self._propose(*verdict)

    def _advance(self) -> None:
        """Go on to the phase whose sign was seen; the signs may come in any order."""
        # The ready line may precede the channel, and be evicted from the line buffer before the channel opens.
        self._sign_seen = self._sign_seen or self._backend.ready(self._evidence)
        if self.phase is Phase.LAUNCHING and self._evidence.saw(ProcessSpawned):
            self.fire(PhaseTrigger.PROCESS_STARTED)
        if self.phase is Phase.CONNECTING and self._evidence.saw(ChannelOpened):
            self.fire(PhaseTrigger.CHANNEL_OPENED)
        if self.phase is Phase.NEGOTIATING and self._sign_seen and self._evidence.exited is None:
            self._evidence.ready = True
            self.fire(Trigger.PROXY_READY)

    def _connection_ended(self, seen: ConnectionEnded) -> None:
        self._publish(
            "tunnel.closed",
            connection=seen.connection,
            bytes_to_agent=seen.bytes_to_agent,
            bytes_from_agent=seen.bytes_from_agent,
            duration_s=round(seen.duration_s, 6),
        )
        if self.phase is Phase.ESTABLISHED and self._backend.max_connections == 1:
            # The program should exit now, and knows best why; one that does not has outlived its only connection.
            self.deadline = self._now.monotonic_s + self._timeouts.stop_grace_s

    # ---- why it ends ----

    def _propose(self, reason: EndReason, detail: str, hint: str | None = None) -> None:
        """Propose a cause. The first one counts; what looks like the session's end is verified before it does."""
        if self._cause is not None:
            return
        if self._tentative is not None:
            if self._tentative.reason is not reason:
                self._commit(self._tentative)
            return
        if reason in _SECONDARY and (ended := self._effects.transport_end()) is not None:
            reason, detail = EndReason.TRANSPORT_LOST, ended
        if reason is not EndReason.SESSION_ENDED:
            self._commit(Cause(reason, detail, hint))
            return
        self._tentative = Cause(reason, detail)
        if self.phase is Phase.ESTABLISHED:
            self.fire(PhaseTrigger.END_SUSPECTED)
        else:
            self.deadline = self._now.monotonic_s + self._timeouts.ask_server_s
            self._verify()

    def _verify(self) -> None:
        """See whether the session has ended as it seems: the display is there, and the server says so."""
        if self._tentative is None or self._cause is not None:
            return
        if self._effects.display_in_doubt():
            return  # DisplayLost or DisplayRestored will be posted
        if not self._ask_server:
            self._commit(self._tentative)
        elif not self._queried:
            self._queried = True
            try:
                self._effects.query_session()
            except RuntimeError:  # no thread can be started: what is likely has to do
                self._commit(self._tentative)

    def _session_status_received(self, tentative: Cause, status: SessionStatus | None) -> None:
        connected = not self._evidence.saw(ProcessExited, ConnectionEnded)
        if status is SessionStatus.RUNNING and connected and self.phase is Phase.VERIFYING:
            self._tentative, self._queried = None, False
            self.fire(PhaseTrigger.END_DENIED)
        else:
            self._commit(tentative if status is None else _CONFIRMED.get(status, tentative))

    def _commit(self, cause: Cause) -> None:
        """Fix the cause and leave; it is never overwritten but by `stop_timeout`."""
        if self._cause is not None:
            return
        reason, detail, hint = cause
        hint = hint or hint_for(
            reason,
            channel_opened=self._evidence.saw(ChannelOpened),
            was_running=self._evidence.ready,
            resumed=self._resumed,
        )
        # What a backend says may hold what it was given.
        self._cause = Cause(reason, self._redact(detail), None if hint is None else self._redact(hint))
        before = self.place
        try:
            if reason is EndReason.STOP_REQUESTED:
                self.fire(Trigger.STOP)
            else:
                self.fire(Trigger.SESSION_ENDED if reason.clean else Trigger.FAULT_FOUND)
        except BaseException:
            if self.place == before:
                self._cause = None  # it is not left for this: the tables refuse that, or the call was interrupted
            raise

    # ---- effects of states and phases ----

    def on_enter_tunnelling(self, _: EventData) -> None:
        """Make sure that everything local is good."""
        self._effects.start_preflight()

    def on_enter_spawning(self, _: EventData) -> None:
        """Start the proxy program."""
        assert self._launch is not None  # noqa: S101 - it came with the observation that leads here
        self._effects.start_proxy(self._launch)
        self._process_alive = True

    def on_enter_running_verifying(self, _: EventData) -> None:
        """Find out whether the session has ended."""
        self._verify()

    def on_enter_stopping(self, _: EventData) -> None:
        """Want nothing more to be known."""
        if self._queried:
            self._effects.cancel_query()

    def on_enter_stopping_terminating(self, _: EventData) -> None:
        """Let the program leave in order, which suspends the session."""
        self._evidence.signalled = True
        self._effects.terminate()

    def on_enter_stopping_killing(self, _: EventData) -> None:
        """End the program."""
        self._evidence.signalled = True
        self._effects.kill()

    def on_enter_stopping_draining(self, _: EventData) -> None:
        """Let the last bytes through."""
        self._effects.drain()
        if self.has_work(Phase.DRAINING):
            self._close_if_released()
        else:
            self.fire(PhaseTrigger.DRAIN_OVER)

    def on_enter_stopping_aborting(self, _: EventData) -> None:
        """Let nothing through any more."""
        self._effects.abort()
        self._close_if_released()

    def has_work(self, phase: Phase) -> bool:
        """Tell whether a phase of ``stopping`` has something to do; those of the other states always have."""
        match phase:
            case Phase.TERMINATING:
                return self._process_alive and not self._is_link_down()
            case Phase.KILLING:
                return self._process_alive
            case Phase.DRAINING:
                return not self._evidence.saw(TransportEnded, LinkDead)
        return True

    def _is_link_down(self) -> bool:
        """Tell whether nothing orderly can travel any more."""
        failed = self.status.link is Link.SILENT or self._evidence.saw(TransportEnded, LinkDead)
        return failed or self._effects.transport_end() is not None

    # ---- stopping ----

    def _stop_waiting(self) -> None:
        """Where it waits for something orderly that can travel no more, go on at once."""
        if self.phase is Phase.TERMINATING:
            self.fire(PhaseTrigger.GRACE_OVER)
        elif self.phase is Phase.DRAINING and not self.has_work(Phase.DRAINING):
            self.fire(PhaseTrigger.DRAIN_OVER)

    def _process_gone(self) -> None:
        self._process_alive = False
        if self.phase in {Phase.TERMINATING, Phase.KILLING}:
            self.fire(PhaseTrigger.PROCESS_EXITED)
        else:
            self._close_if_released()

    def _give_up_process(self) -> None:
        """Go on without a program that has survived SIGKILL."""
        if self._cause is None or self._cause.reason.clean:
            detail = f"The proxy program (process {self.status.pid}) is still there after SIGKILL."
            self._cause = Cause(EndReason.STOP_TIMEOUT, detail, EndReason.STOP_TIMEOUT.hint)
        self._abandon(f"process {self.status.pid}")
        self._process_alive = False
        self.fire(PhaseTrigger.KILL_OVER)

    def _give_up(self) -> None:
        """Leave behind what cannot be released in time, and say so."""
        try:
            if not self._evidence.saw(PreflightFinished):
                self._abandon(f"the preflight, waiting for {self._effects.preflight_step()}")
            self._abandon(*self._effects.unreleased())
            self._effects.abort()
        finally:
            self._close()

    def _abandon(self, *what: str) -> None:
        self._update(abandoned=(*self.status.abandoned, *what))

    def _close_if_released(self) -> None:
        released = self._evidence.saw(PreflightFinished) and self._evidence.saw(TunnelClosed)
        if self.state is State.STOPPING and released and not self._process_alive:
            self._close()

    def _close(self) -> None:
        self.deadline = None
        try:
            self._effects.release()
        except Exception as error:  # noqa: BLE001 - nothing is left to be done about it
            self._publish_error(error)
        clean = self._cause is not None and self._cause.reason.clean
        self.fire(Trigger.CLOSED_CLEANLY if clean else Trigger.CLOSED_AFTER_FAULT)

    # ---- out: status, events, deadline ----

    def _entered(self, event: EventData) -> None:
        """Keep status, deadline and events in step with the machine, before any effect."""
        source = self._source_of(event)
        if source.state is self.state:
            self._update(**self._enter_phase(source.phase))
        else:
            self._update(**self._record(Trigger(event.event.name), source.state), **self._enter_phase(None))
        super()._entered(event)

    def _finished(self, event: EventData) -> None:  # noqa: ARG002 - as the machine calls it
        """Publish, after the effects, what the trigger has changed."""
        unpublished, self._unpublished = self._unpublished, []
        for change in unpublished:
            self._effects.publish(*change)

    def _record(self, trigger: Trigger, source: State) -> dict[str, Any]:
        """Record a change of state; return what it changes in the status."""
        reason, detail, hint = self._cause or (None, "", None)
        history = self.status.history
        record = TransitionRecord(
            proxy_id=self.status.id,
            session=self.status.session,
            trigger=trigger,
            source=source,
            dest=self.state,
            reason=reason,
            detail=detail,
            at=self._now.utc,
            elapsed_s=self._now.monotonic_s - self._state_since.monotonic_s,
            sequence=len(history) + 1,
        )
        self._state_since = self._now
        last_words: dict[str, Any] = {}
        if self.state.is_final and reason is not None:
            retryable = is_retryable(
                reason,
                channel_opened=self._evidence.saw(ChannelOpened),
                running_s=next((each.elapsed_s for each in history if each.source is State.RUNNING), None),
                resumed=self._resumed,
            )
            last_words = {"hint": hint, "retryable": retryable}
        self._unpublished.append((Event.of_transition(record, **last_words), record))
        return {
            "state": self.state,
            "since": self._now.utc,
            "reason": reason,
            "detail": detail,
            "hint": hint,
            "retryable": last_words.get("retryable"),
            "history": (*history, record),
        }

    def _enter_phase(self, previous: Phase | None) -> dict[str, Any]:
        """Set the deadline of a phase; return what it changes in the status."""
        limit = _LIMITS.get((self.state, self.phase)) if self.phase is not None else None
        if limit is None or limit != self._limit:
            self.deadline = None if limit is None else self._now.monotonic_s + getattr(self._timeouts, limit)
        self._limit = limit
        since, self._phase_since = self._phase_since, self._now
        if self.phase is not None:
            elapsed_s = 0.0 if previous is None else self._now.monotonic_s - since.monotonic_s
            self._unpublished.append((Event.of_phase(self.state, self.phase, previous, elapsed_s), None))
        return {
            "phase": self.phase,
            "phase_since": None if self.phase is None else self._now.utc,
            "waiting_for": self._waiting_for(),
        }

    def _waiting_for(self) -> str:
        if self.phase is None:
            return ""
        if self.state is State.TUNNELLING:
            return self._effects.preflight_step()
        return _WAITING_FOR.get(self.phase, "")

    def _update(self, **changes: Any) -> None:
        self.status = replace(self.status, **changes)

    def _publish_error(self, error: BaseException, **fields: Any) -> None:
        """Publish a traceback as text: renderers that show local variables would show secrets."""
        self._publish("internal.error", exception=self._redact("".join(traceback.format_exception(error))), **fields)

    def _publish(self, name: str, **fields: Any) -> None:
        self._effects.publish(Event(name, fields))


def _verdict_on_exit(exited: ProcessExited, evidence: Evidence) -> tuple[EndReason, str]:
    if exited.signal is not None:
        return EndReason.PROXY_KILLED, f"The proxy program was ended by {_signal_name(exited.signal)}."
    if exited.exit_code is None:
        return EndReason.PROXY_EXITED, "The proxy program ended; somebody else has taken its exit status."
    last = next((line.text for line in reversed(evidence.lines) if line.text.strip()), None)
    said = f'; its last line: "{last}".' if last is not None else " and printed nothing."
    return EndReason.PROXY_EXITED, f"The proxy program ended with exit code {exited.exit_code}{said}"


def _signal_name(number: int) -> str:
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:
        return f"signal {number}"
