"""Decides what a proxy does: one observation and the time in; triggers, effects and a deadline out.

The supervisor is the model of the lifecycle's machine. It fires triggers in response to observations; the effects of
the transitions are in `proxy_fsm.active_lifecycle`. It has no thread, no clock, no I/O and no logger, so that a test is
a script of observations and effects.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from proxy_fsm.active_lifecycle import ActiveLifecycle, Cause, Effects, Now
from proxy_fsm.errors import BackendError
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
    SessionTakenOver,
    SpawnFailed,
    StartOrdered,
    StopOrdered,
    TransportEnded,
    TunnelClosed,
    WorkerCrashed,
    WorkerFailed,
)
from proxy_fsm.reasons import EndReason, hint_for
from proxy_fsm.session import SessionStatus
from proxy_fsm.states import Phase, PhaseTrigger, State, Trigger
from proxy_fsm.status import Link, ProxyStatus, Timeouts

if TYPE_CHECKING:
    from collections.abc import Callable

    from transitions import EventData

    from proxy_fsm.backends import Backend

__all__ = ["Supervisor"]

#: How many of the proxy's last lines the status shows.
_TAIL_LINES = 20

#: Reasons that are mere consequences if the transport has ended.
_SECONDARY = frozenset(
    {EndReason.NEGOTIATION_FAILED, EndReason.PEER_LOST, EndReason.SESSION_ENDED, EndReason.PROXY_EXITED}
)

#: What a tentative end becomes if the server confirms it.
_CONFIRMED = {
    SessionStatus.SUSPENDED: Cause(EndReason.SESSION_SUSPENDED, "The session was suspended on the server."),
    SessionStatus.FINISHED: Cause(EndReason.SESSION_TERMINATED, "The session was terminated on the server."),
}


class Supervisor(ActiveLifecycle):
    """Makes the decisions for one proxy; see the module.

    Args:
        status: The initial status.
        now: The time.
        backend: Judges the evidence.
        effects: Carries out the decisions.
        timeouts: The limits of the phases.
        ask_server: Whether to ask the server how a session ended.
        resumed: Whether the session was resumed.
        redact: Removes the secrets from a text.

    Attributes:
        heard_at: When the SSH server last responded before it fell silent, in seconds of the monotonic clock.
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
        super().__init__(status, now, effects=effects, timeouts=timeouts, resumed=resumed, redact=redact)
        self.heard_at = now.monotonic_s
        self._backend = backend
        self._ask_server = ask_server
        #: The cause that becomes final once it is verified.
        self._tentative: Cause | None = None
        #: The apparent end that the server has denied: it is not proposed again until a connection or the process ends.
        self._denied: tuple[EndReason, str] | None = None
        #: Whether the backend has ever seen its ready sign, and whether the server was asked about the tentative end.
        self._sign_seen = self._queried = False

    # ---- inputs: observations, the time, and bugs ----

    def handle(self, seen: Observation, now: Now) -> None:
        """Handle one observation.

        Raises:
            InvalidTransition: The tables refuse the trigger that follows from it, as for a second ``start``, or a bug.
        """
        self._now = now
        self._evidence.add(seen)
        self._react(seen)
        self._ask_backend()
        self._update(waiting_for=self._waiting_for())

    def deadline_passed(self, now: Now) -> None:
        """Handle the timeout of the current phase."""
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

    def crash(self, error: BaseException, now: Now) -> None:
        """Shut down in order after a bug in this package or in a backend.

        Raises:
            InvalidTransition: It is idle, and there is nothing to shut down.
        """
        self._now = now
        self._crashes += 1
        self._publish_error(error)
        if self.state is State.STOPPING:
            self.publish_changes()
            self.deadline = now.monotonic_s if self.deadline is None else self.deadline
        elif self._cause is None:
            bug = f"An internal error: {type(error).__name__}: {error}."
            self._commit(Cause(EndReason.INTERNAL_ERROR, bug))
        else:  # it crashed before the state could be left for that cause
            self.fire(Trigger.FAULT_FOUND)

    # ---- reactions to observations ----

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
                self._process_ended()
                self._propose(error.reason, error.detail, error.hint)
            case ProcessExited(exit_code=exit_code, signal=number):
                self._update(exit_code=exit_code, signal=number)
                self._publish("process.exited", exit_code=exit_code, signal=number)
                self._process_ended()
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
                self._tentative = None  # the proxy's output looks like the session's end if the display is lost
                self._propose(EndReason.DISPLAY_LOST, f"The X server no longer answers. {detail}")
            case DisplayRestored():
                self._verify()
            case SessionStatusReceived(status=status) if self._tentative is not None:
                self._session_status_received(self._tentative, status)
            case SessionTakenOver(client=client, used=used) if self._tentative is not None:
                by = f", at {client}," if client else ""
                since = f", since {used} (the server's time)" if used else ""
                self._commit(Cause(EndReason.SESSION_TAKEN_OVER, f"Another client{by} has the session now{since}."))
            case _:
                pass

    def _ask_backend(self) -> None:
        """Ask the backend whether the session is ready, and for its verdict on the evidence."""
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
        """Advance through the phases whose signs were seen; the signs may come in any order."""
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
        if self.phase is Phase.ESTABLISHED:
            self._expect_exit()

    def _expect_exit(self) -> None:
        """Give a program whose only connection has ended time to exit: its exit tells the cause best."""
        if self._backend.max_connections == 1:
            self.deadline = self._now.monotonic_s + self._timeouts.stop_grace_s

    # ---- effects of states and phases ----

    def on_enter_running_established(self, _: EventData) -> None:
        """Expect the program's exit, if its only connection has ended before the ready sign was handled."""
        if self._evidence.saw(ConnectionEnded):
            self._expect_exit()

    def on_enter_running_verifying(self, _: EventData) -> None:
        """Find out whether the session has ended."""
        self._verify()

    def on_enter_stopping(self, _: EventData) -> None:
        """Cancel a pending query: its answer no longer matters."""
        if self._queried:
            self._effects.cancel_query()

    # ---- cause of the end ----

    def _propose(self, reason: EndReason, detail: str, hint: str | None = None) -> None:
        """Propose a cause. The first one counts; an apparent end of the session is verified first."""
        if self._cause is not None or (self._denied == (reason, detail) and self._is_connected()):
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
        self._tentative = Cause(reason, detail, hint)
        if self.phase is Phase.ESTABLISHED:
            self.fire(PhaseTrigger.END_SUSPECTED)
        else:
            self.deadline = self._now.monotonic_s + self._timeouts.ask_server_s
            self._verify()

    def _verify(self) -> None:
        """Verify that the session has ended: the display is still there and, if asked, the server confirms it."""
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
            except RuntimeError:  # no thread can be started: accept the tentative cause
                self._commit(self._tentative)

    def _session_status_received(self, tentative: Cause, status: SessionStatus | None) -> None:
        if status is not SessionStatus.RUNNING:
            self._commit(tentative if status is None else _CONFIRMED.get(status, tentative))
        elif self.phase is Phase.VERIFYING and self._is_connected():
            self._denied = tentative.reason, tentative.detail
            self._tentative, self._queried = None, False
            self._effects.cancel_query()
            self.fire(PhaseTrigger.END_DENIED)
        # Otherwise the server still lists a session that has just ended; the query goes on.

    def _is_connected(self) -> bool:
        return not self._evidence.saw(ProcessExited, ConnectionEnded)

    def _commit(self, cause: Cause) -> None:
        """Make a cause final and leave the state; only `stop_timeout` ever overwrites it."""
        if self._cause is not None:
            return
        reason, detail, hint = cause
        hint = hint or hint_for(
            reason,
            channel_opened=self._evidence.saw(ChannelOpened),
            was_running=self._evidence.ready,
            resumed=self._resumed,
            resumable=self._backend.resumable,
        )
        # A backend's text may contain the secrets that it was given.
        self._cause = Cause(reason, self._redact(detail), None if hint is None else self._redact(hint))
        before = self.place
        try:
            if reason is EndReason.STOP_REQUESTED:
                self.fire(Trigger.STOP)
            else:
                self.fire(Trigger.SESSION_ENDED if reason.clean else Trigger.FAULT_FOUND)
        except BaseException:
            if self.place == before or self.status.state is State.IDLE:
                self._cause = None  # the state was not left: the tables refused it, or the call was interrupted
                self.machine.set_state(before, self)
            raise


def _verdict_on_exit(exited: ProcessExited, evidence: Evidence) -> tuple[EndReason, str]:
    if exited.signal is not None:
        return EndReason.PROXY_KILLED, f"The proxy program was ended by {_signal_name(exited.signal)}."
    if exited.exit_code is None:
        return EndReason.PROXY_EXITED, "The proxy program ended; its exit status was collected elsewhere."
    last = next((line.text for line in reversed(evidence.lines) if line.text.strip()), None)
    output = f'; its last line: "{last}".' if last is not None else " and printed nothing."
    return EndReason.PROXY_EXITED, f"The proxy program ended with exit code {exited.exit_code}{output}"


def _signal_name(number: int) -> str:
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:
        return f"signal {number}"
