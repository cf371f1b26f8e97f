"""A supervisor without an engine: observations and times go in, effects and publications come out.

::

    script = Script().lead_to(Phase.ESTABLISHED)
    assert script.stop() == ["terminate", "state stopping", "phase terminating"]
    assert script.deadline_s == TIMEOUTS.stop_grace_s
    assert script.see(ProcessExited(0, None)) == ["process.exited", "drain", "phase draining"]
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy_fsm.active_lifecycle import Now
from proxy_fsm.backends import Backend
from proxy_fsm.evidence import (
    ChannelOpened,
    ChecksPassed,
    Evidence,
    Launch,
    Observation,
    OutputLine,
    PreflightFinished,
    PreflightPassed,
    ProcessSpawned,
    StartOrdered,
    StopOrdered,
)
from proxy_fsm.reasons import EndReason
from proxy_fsm.states import Phase, State
from proxy_fsm.status import ProxyStatus, Timeouts
from proxy_fsm.supervisor import Supervisor
from proxy_fsm.text import Redactor

if TYPE_CHECKING:
    from typing import Self

    from proxy_fsm.events import Event
    from proxy_fsm.status import TransitionRecord

#: All different, so that a deadline says which of them it is.
TIMEOUTS = Timeouts(
    preflight_s=100,
    ready_s=200,
    stop_grace_s=300,
    kill_s=400,
    ask_server_s=500,
    drain_s=600,
    agent_connect_s=700,
    link_probe_s=800,
    link_dead_s=900,
)
COOKIE = "0123456789abcdef"
READY = OutputLine("ready")
LAUNCH = Launch(["/fake/proxy"], {}, Path("/fake"), -1)
_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
_BEGAN_S = 1000.0

#: What is seen on the shortest way to each phase of a proxy that comes up.
_WAY_UP: dict[Phase, tuple[Observation, ...]] = {
    Phase.CHECKING: (StartOrdered(),),
    Phase.BINDING: (ChecksPassed(),),
    Phase.LAUNCHING: (PreflightPassed("/fake/proxy.sock", LAUNCH), PreflightFinished()),
    Phase.CONNECTING: (ProcessSpawned(4711, "/fake/proxy"),),
    Phase.NEGOTIATING: (ChannelOpened(1),),
    Phase.ESTABLISHED: (READY,),
}


class Judge(Backend):
    """A backend that says what a test says.

    Attributes:
        verdict: What it says from now on.
        error: What it raises from now on, instead.
        evidence: What it was asked about last.
        asked: How often it was.
    """

    name = "judge"

    def __init__(self, max_connections: int | None = 1) -> None:
        self.max_connections = max_connections
        self.verdict: tuple[EndReason, str] | None = None
        self.error: BaseException | None = None
        self.evidence = Evidence()
        self.asked = 0

    def ready(self, evidence: Evidence) -> bool:
        return evidence.said("ready")

    def diagnose(self, evidence: Evidence) -> tuple[EndReason, str] | None:
        self.evidence, self.asked = evidence, self.asked + 1
        if self.error is not None:
            raise self.error
        return self.verdict


class RecordedEffects:
    """Carries out nothing: notes each effect and each publication in one list, and answers what a test says.

    Attributes:
        calls: Effects by their name, changes as ``state running`` and ``phase draining``, other events by their name.
        events: The events.
        records: The records.
        broken: The effects that raise; they are noted before.
        on_call: Called with each entry of ``calls``, as it is made.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.events: list[Event] = []
        self.records: list[TransitionRecord] = []
        self.broken: dict[str, BaseException] = {}
        self.launched: list[Launch] = []
        self.seen_at_call: list[tuple[str, State, Phase | None]] = []
        self.script: Script | None = None
        self.answers: dict[str, Any] = {
            "preflight_step": "the X server",
            "transport_end": None,
            "display_in_doubt": False,
            "unreleased": (),
        }

    def _do(self, name: str) -> None:
        self.calls.append(name)
        if self.script is not None:
            self.seen_at_call.append((name, self.script.status.state, self.script.status.phase))
        if name in self.broken:
            raise self.broken[name]

    def publish(self, event: Event, record: TransitionRecord | None = None) -> None:
        self.events.append(event)
        if record is not None:
            self.records.append(record)
        kind = {"proxy.transition": "dest", "proxy.phase": "phase"}.get(event.name)
        self._do(event.name if kind is None else f"{'state' if kind == 'dest' else kind} {event.fields[kind]}")

    def start_preflight(self) -> None:
        self._do("start_preflight")

    def start_proxy(self, launch: Launch) -> None:
        self.launched.append(launch)
        self._do("start_proxy")

    def terminate(self) -> None:
        self._do("terminate")

    def kill(self) -> None:
        self._do("kill")

    def drain(self) -> None:
        self._do("drain")

    def abort(self) -> None:
        self._do("abort")

    def release(self) -> None:
        self._do("release")

    def query_session(self) -> None:
        self._do("query_session")

    def cancel_query(self) -> None:
        self._do("cancel_query")

    def preflight_step(self) -> str:
        return str(self.answers["preflight_step"])

    def transport_end(self) -> str | None:
        end = self.answers["transport_end"]
        return None if end is None else str(end)

    def display_in_doubt(self) -> bool:
        return bool(self.answers["display_in_doubt"])

    def unreleased(self) -> tuple[str, ...]:
        if "unreleased" in self.broken:
            raise self.broken["unreleased"]
        return tuple(self.answers["unreleased"])


class Script:
    """A supervisor, its effects and its clock. What makes it do something returns what it did, in order.

    Args:
        backend: A `Judge` by default.
        ask_server: As for `Supervisor`.
        resumed: As for `Supervisor`.
        timeouts: As for `Supervisor`.
        answers: What the effects answer: ``transport_end``, ``display_in_doubt``, ``unreleased``, ``preflight_step``.
    """

    def __init__(
        self,
        *,
        backend: Backend | None = None,
        ask_server: bool = False,
        resumed: bool = False,
        timeouts: Timeouts = TIMEOUTS,
        **answers: Any,
    ) -> None:
        self.now_s = _BEGAN_S
        self.effects = RecordedEffects()
        self.effects.answers.update(answers)
        self.judge = backend if isinstance(backend, Judge) else Judge()
        self.supervisor = Supervisor(
            ProxyStatus(id="id", session="alice-51", state=State.IDLE, since=self.now.utc),
            self.now,
            backend=backend or self.judge,
            effects=self.effects,
            timeouts=timeouts,
            ask_server=ask_server,
            resumed=resumed,
            redact=Redactor([COOKIE]),
        )
        self.effects.script = self

    # ---- in ----

    @property
    def now(self) -> Now:
        return Now(self.now_s, _EPOCH + timedelta(seconds=self.now_s))

    def see(self, *seen: Observation) -> list[str]:
        """Hand observations in, one by one."""
        done = len(self.effects.calls)
        for each in seen:
            self.supervisor.handle(each, self.now)
        return self.effects.calls[done:]

    def start(self) -> list[str]:
        return self.see(StartOrdered())

    def stop(self) -> list[str]:
        return self.see(StopOrdered())

    def pass_s(self, seconds: float) -> list[str]:
        """Let some time pass; what reaches its limit in it is handled at that moment."""
        done, until_s = len(self.effects.calls), self.now_s + seconds
        while (deadline := self.supervisor.deadline) is not None and deadline <= until_s:
            self.now_s = max(self.now_s, deadline)
            self.supervisor.deadline_passed(self.now)
        self.now_s = until_s
        return self.effects.calls[done:]

    def pass_deadline(self) -> list[str]:
        """Let the time pass until the running deadline, and let that be over."""
        assert self.supervisor.deadline is not None
        done = len(self.effects.calls)
        self.now_s = max(self.now_s, self.supervisor.deadline)
        self.supervisor.deadline_passed(self.now)
        return self.effects.calls[done:]

    def crash(self, error: BaseException) -> list[str]:
        done = len(self.effects.calls)
        self.supervisor.crash(error, self.now)
        return self.effects.calls[done:]

    def run(self, step: Any, *arguments: Any) -> list[str]:
        """Do one step as the engine does it: what it raises is handed back in as a crash."""
        done = len(self.effects.calls)
        try:
            step(*arguments)
        except Exception as error:  # noqa: BLE001 - whatever a test lets be raised
            try:
                self.supervisor.crash(error, self.now)
            except Exception as second:  # noqa: BLE001 - the same
                self.supervisor.crash(second, self.now)
        return self.effects.calls[done:]

    def lead_to(self, wanted: Phase) -> Self:
        """Lead it from its beginning to a phase by the shortest way, 1 s for each phase."""
        for phase, seen in _WAY_UP.items():
            self.see(*seen)
            assert self.status.phase is phase
            if phase is wanted:
                break
            self.pass_s(1)
        if wanted is Phase.VERIFYING:
            self.end_session()
        assert self.status.phase is wanted
        return self

    def judge_now(self, reason: EndReason, detail: str = "It says so.") -> list[str]:
        """Let the backend have a verdict, at the next line."""
        self.judge.verdict = reason, detail
        return self.see(OutputLine("a line"))[1:]

    def end_session(self) -> list[str]:
        """Let the backend say that the session has ended."""
        return self.judge_now(EndReason.SESSION_ENDED)

    # ---- out ----

    @property
    def status(self) -> ProxyStatus:
        return self.supervisor.status

    @property
    def deadline_s(self) -> float | None:
        """How long the running deadline is from now; None where there is none."""
        deadline = self.supervisor.deadline
        return None if deadline is None else deadline - self.now_s

    @property
    def place(self) -> tuple[State, Phase | None]:
        return self.status.state, self.status.phase

    @property
    def end(self) -> tuple[State, EndReason | None, str]:
        return self.status.state, self.status.reason, self.status.detail

    @property
    def path(self) -> list[str]:
        """The triggers so far."""
        return [str(record.trigger) for record in self.status.history]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events of a name: their level and their fields."""
        return [{"level": event.level, **event.fields} for event in self.effects.events if event.name == name]
