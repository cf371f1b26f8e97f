"""The lifecycle of one proxy with everything that its transitions entail: effects, deadline, status and events.

Entering a state or a phase updates the status, sets the deadline, and calls an effect, which another object carries out
(see `Effects`); the change is published after that. The supervisor decides which triggers to fire.
"""

from __future__ import annotations

import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from proxy_fsm.events import Event
from proxy_fsm.evidence import ChannelOpened, Evidence, LinkDead, PreflightFinished, TransportEnded, TunnelClosed
from proxy_fsm.lifecycle import Lifecycle
from proxy_fsm.reasons import EndReason, is_retryable
from proxy_fsm.states import PHASES, Phase, PhaseTrigger, State, Trigger
from proxy_fsm.status import Link, ProxyStatus, Timeouts, TransitionRecord

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from transitions import EventData

    from proxy_fsm.evidence import Launch

__all__ = ["ActiveLifecycle", "Cause", "Effects", "Now"]

_LIMITS = {(row.state, row.phase): row.limit for row in PHASES}

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
    """The current time: of the monotonic clock, in seconds, and of the wall clock, aware, in UTC."""

    monotonic_s: float
    utc: datetime


class Cause(NamedTuple):
    """Why a proxy ends: the reason, one human-readable sentence, and what to do."""

    reason: EndReason
    detail: str
    hint: str | None = None


class Effects(Protocol):
    """What a supervisor orders and queries; only `release` blocks, for a bounded time."""

    def publish(self, event: Event, record: TransitionRecord | None = None) -> None:
        """Publish an event; for a change of state, with the record for subscribers; never raises."""

    def start_preflight(self) -> None:
        """Start the preflight, and watch the transport."""

    def start_proxy(self, launch: Launch) -> None:
        """Start the proxy program, accept its connections, and watch the display."""

    def terminate(self) -> None:
        """Send the proxy program SIGTERM."""

    def kill(self) -> None:
        """Send the proxy program SIGKILL."""

    def drain(self) -> None:
        """Close everything, but flush what the proxy has sent."""

    def abort(self) -> None:
        """Close everything at once, dropping what is not flushed."""

    def release(self, *, wait: bool) -> None:
        """Detach from the transport's monitor.

        Args:
            wait: Whether to join the workers' threads, which have posted their last observation.
        """

    def query_session(self) -> None:
        """Ask the server for the status of the session."""

    def cancel_query(self) -> None:
        """Cancel that query; its answer is dropped."""

    def preflight_step(self) -> str:
        """Return what the preflight is waiting for, human-readable."""

    def transport_end(self) -> str | None:
        """Return why the transport has ended, in a sentence; None while it is active."""

    def display_in_doubt(self) -> bool:
        """Tell whether the display watch is checking if the X server is lost; it will post the result."""

    def unreleased(self) -> tuple[str, ...]:
        """Return what is still open, human-readable."""


class ActiveLifecycle(Lifecycle):
    """The machine of one proxy, with the effects of its states and phases.

    Args:
        status: The initial status.
        now: The time.
        effects: Carries out the effects.
        timeouts: The limits of the phases.
        resumed: Whether the session was resumed.
        redact: Removes the secrets from a text.

    Attributes:
        status: What is known; replaced as a whole at each change.
        deadline: When the phase times out, in seconds of the monotonic clock; None if it does not.
    """

    def __init__(
        self,
        status: ProxyStatus,
        now: Now,
        *,
        effects: Effects,
        timeouts: Timeouts,
        resumed: bool,
        redact: Callable[[str], str],
    ) -> None:
        super().__init__()
        self.status = status
        self.deadline: float | None = None
        self._effects = effects
        self._timeouts = timeouts
        self._resumed = resumed
        self._redact = redact
        self._evidence = Evidence()
        self._now = self._state_since = self._phase_since = now
        self._limit: str | None = None
        self._unpublished: list[tuple[Event, TransitionRecord | None]] = []
        self._launch: Launch | None = None
        self._process_alive = False
        self._crashes = 0
        #: Why it ends; published together with the state that it leads to, so that no status shows one without the
        #: other.
        self._cause: Cause | None = None

    # ---- effects of states and phases ----

    def on_enter_tunnelling(self, _: EventData) -> None:
        """Check everything local, and bind the listener."""
        self._effects.start_preflight()

    def on_enter_spawning(self, _: EventData) -> None:
        """Start the proxy program."""
        assert self._launch is not None  # noqa: S101 - set by the observation that leads here
        self._effects.start_proxy(self._launch)
        self._process_alive = True

    def on_enter_stopping_terminating(self, _: EventData) -> None:
        """Ask the program to exit in order, which suspends the session."""
        self._evidence.signalled = True
        self._effects.terminate()

    def on_enter_stopping_killing(self, _: EventData) -> None:
        """Kill the program."""
        self._evidence.signalled = True
        self._effects.kill()

    def on_enter_stopping_draining(self, _: EventData) -> None:
        """Flush the last bytes."""
        self._effects.drain()
        if self.has_work(Phase.DRAINING):
            self._close_if_released()
        else:
            self.fire(PhaseTrigger.DRAIN_OVER)

    def on_enter_stopping_aborting(self, _: EventData) -> None:
        """Drop what is not flushed."""
        self._effects.abort()
        self._close_if_released()

    def has_work(self, phase: Phase) -> bool:
        """Tell whether a phase of ``stopping`` has work to do; those of the other states always have."""
        match phase:
            case Phase.TERMINATING:
                return self._process_alive and not self._is_link_down()
            case Phase.KILLING:
                return self._process_alive
            case Phase.DRAINING:
                return not self._evidence.saw(TransportEnded, LinkDead)
        return True

    def _is_link_down(self) -> bool:
        """Tell whether an orderly shutdown can no longer reach the agent."""
        if self._crashes > 1:
            return True  # it may be this question that crashes
        failed = self.status.link is Link.SILENT or self._evidence.saw(TransportEnded, LinkDead)
        return failed or self._effects.transport_end() is not None

    # ---- stopping ----

    def _stop_waiting(self) -> None:
        """Skip the rest of a phase that waits for an orderly shutdown, since the link is down."""
        if self.phase is Phase.TERMINATING:
            self.fire(PhaseTrigger.GRACE_OVER)
        elif self.phase is Phase.DRAINING and not self.has_work(Phase.DRAINING):
            self.fire(PhaseTrigger.DRAIN_OVER)

    def _process_ended(self) -> None:
        self._process_alive = False
        if self.phase in {Phase.TERMINATING, Phase.KILLING}:
            self.fire(PhaseTrigger.PROCESS_EXITED)

    def _give_up_process(self) -> None:
        """Continue without a program that has survived SIGKILL."""
        if self._cause is None or self._cause.reason.clean:
            detail = f"The proxy program (process {self.status.pid}) is still there after SIGKILL."
            self._cause = Cause(EndReason.STOP_TIMEOUT, detail, EndReason.STOP_TIMEOUT.hint)
        self._abandon(f"process {self.status.pid}")
        self._process_alive = False
        self.fire(PhaseTrigger.KILL_OVER)

    def _give_up(self) -> None:
        """Abandon what cannot be released in time, and list it in the status."""
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
            self._effects.release(wait=not self.status.abandoned)  # what was abandoned would not end
        except Exception as error:  # noqa: BLE001 - nothing is left to be done about it
            self._publish_error(error)
        clean = self._cause is not None and self._cause.reason.clean
        self.fire(Trigger.CLOSED_CLEANLY if clean else Trigger.CLOSED_AFTER_FAULT)

    # ---- outputs: status, events, deadline ----

    def _entered(self, event: EventData) -> None:
        """Update status, deadline and events after the machine has moved, before any effect."""
        source = self._source_of(event)
        if source.state is self.state:
            self._update(**self._enter_phase(source.phase))
        else:
            self._update(**self._record(Trigger(event.event.name), source.state), **self._enter_phase(None))
        super()._entered(event)

    def _handled(self, event: EventData) -> None:  # noqa: ARG002 - the machine's signature
        """Publish the changes that the trigger has caused, after the effects."""
        self.publish_changes()

    def publish_changes(self) -> None:
        """Publish what has changed; does nothing unless publishing was interrupted."""
        while self._unpublished:
            self._effects.publish(*self._unpublished[0])
            del self._unpublished[0]  # only now: what was interrupted is published again

    def _record(self, trigger: Trigger, source: State) -> dict[str, Any]:
        """Record a change of state; return the fields of the status that it changes."""
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
        final_fields: dict[str, Any] = {}
        if self.state.is_final and reason is not None:
            retryable = is_retryable(
                reason,
                channel_opened=self._evidence.saw(ChannelOpened),
                running_s=next((each.elapsed_s for each in history if each.source is State.RUNNING), None),
                resumed=self._resumed,
            )
            final_fields = {"hint": hint, "retryable": retryable}
        self._unpublished.append((Event.of_transition(record, **final_fields), record))
        return {
            "state": self.state,
            "since": self._now.utc,
            "reason": reason,
            "detail": detail,
            "hint": hint,
            "history": (*history, record),
            **final_fields,
        }

    def _enter_phase(self, previous: Phase | None) -> dict[str, Any]:
        """Set the deadline of a phase; return the fields of the status that it changes."""
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
        """Publish a traceback as text, since a renderer that shows local variables would show secrets."""
        self._publish("internal.error", exception=self._redact("".join(traceback.format_exception(error))), **fields)

    def _publish(self, name: str, **fields: Any) -> None:
        self._effects.publish(Event(name, fields))
