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
from typing import TYPE_CHECKING, Any, cast

from proxy_fsm.active_lifecycle import Effects, Now
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
    ProcessExited,
    ProcessSpawned,
    StartOrdered,
    StopOrdered,
    TunnelClosed,
)
from proxy_fsm.reasons import EndReason
from proxy_fsm.states import Phase, State
from proxy_fsm.status import ProxyStatus, Timeouts
from proxy_fsm.supervisor import Supervisor
from proxy_fsm.text import Redactor

if TYPE_CHECKING:
    from collections.abc import Callable
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

#: What is seen on the shortest path to each phase of a proxy that comes up.
_WAY_UP: dict[Phase, tuple[Observation, ...]] = {
    Phase.CHECKING: (StartOrdered(),),
    Phase.BINDING: (ChecksPassed(),),
    Phase.LAUNCHING: (PreflightPassed("/fake/proxy.sock", LAUNCH), PreflightFinished()),
    Phase.CONNECTING: (ProcessSpawned(4711, "/fake/proxy"),),
    Phase.NEGOTIATING: (ChannelOpened(1),),
    Phase.ESTABLISHED: (READY,),
}


class Judge(Backend):
    """A backend whose verdicts a test sets.

    Attributes:
        verdict: What `diagnose` returns from now on.
        error: What `diagnose` raises from now on, instead.
        evidence: What it was last asked about.
        asked: How often it was asked.
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
    """Carries out nothing: records each effect and each publication in one list, and returns what a test sets.

    Attributes:
        calls: Effects by their name (``release unwaited`` if no thread is waited for), changes as
            ``state running`` and ``phase draining``, other events by their name.
        places: State and phase in the status, at each of these calls.
        events: The events.
        records: The records.
        launched: What was launched.
        answers: What each query returns, by its name.
        broken: What an effect raises, by its name, after it was recorded.
    """

    def __init__(self, **answers: Any) -> None:
        self.calls: list[str] = []
        self.places: list[tuple[State, Phase | None]] = []
        self.events: list[Event] = []
        self.records: list[TransitionRecord] = []
        self.launched: list[Launch] = []
        self.answers: dict[str, Any] = {"transport_end": None, "display_in_doubt": False, "unreleased": ()}
        self.answers |= {"preflight_step": "the X server", **answers}
        self.broken: dict[str, BaseException] = {}
        self.status: Callable[[], ProxyStatus] | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not hasattr(Effects, name):
            raise AttributeError(name)
        return lambda *arguments, wait=True: self._do(name if wait else f"{name} unwaited", arguments)

    def _do(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name == "publish":
            event, *record = arguments
            self.events.append(event)
            self.records.extend(each for each in record if each is not None)
            kind, field = {"proxy.transition": ("state ", "dest"), "proxy.phase": ("phase ", "phase")}.get(
                event.name, (event.name, "")
            )
            name = f"{kind}{event.fields.get(field, '')}"
        if name == "start_proxy":
            self.launched.extend(arguments)
        if name not in self.answers:
            self.calls.append(name)
            if self.status is not None:
                self.places.append((self.status().state, self.status().phase))
        if name in self.broken:
            raise self.broken[name]
        return self.answers.get(name)


class Script:
    """A supervisor, its effects and its clock. What makes it do something returns what it did, in order.

    Args:
        backend: A `Judge` by default.
        ask_server: As for `Supervisor`.
        resumed: As for `Supervisor`.
        answers: What the effects answer: ``transport_end``, ``display_in_doubt``, ``unreleased``, ``preflight_step``.
    """

    def __init__(
        self,
        *,
        backend: Backend | None = None,
        ask_server: bool = False,
        resumed: bool = False,
        **answers: Any,
    ) -> None:
        self.now_s = _BEGAN_S
        self.effects = RecordedEffects(**answers)
        self.judge = backend if isinstance(backend, Judge) else Judge()
        self.supervisor = Supervisor(
            ProxyStatus(id="id", session="alice-51", state=State.IDLE, since=self.now.utc),
            self.now,
            backend=backend or self.judge,
            effects=cast("Effects", self.effects),
            timeouts=TIMEOUTS,
            ask_server=ask_server,
            resumed=resumed,
            redact=Redactor([COOKIE]),
        )
        self.effects.status = lambda: self.status

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
        """Let some time pass; each deadline in it expires at its moment."""
        done, until_s = len(self.effects.calls), self.now_s + seconds
        for _ in Phase:
            if (deadline := self.supervisor.deadline) is not None and deadline <= until_s:
                self.now_s = max(self.now_s, deadline)
                self.supervisor.deadline_passed(self.now)
        self.now_s = until_s
        return self.effects.calls[done:]

    def pass_deadline(self) -> list[str]:
        """Advance the clock to the current deadline, and let it expire."""
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
        """Do one step as the engine does: an exception in it is handed back as a crash."""
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
        """Lead a fresh one to a phase by the shortest path, spending 1 s in each phase on the way up."""
        for phase, seen in _WAY_UP.items():
            self.see(*seen)
            if phase is wanted:
                break
            self.pass_s(1)
        if wanted is Phase.VERIFYING:
            self.end_session()
        if wanted in State.STOPPING.phases:
            self.stop()
        for _ in range(State.STOPPING.phases.index(wanted) if wanted in State.STOPPING.phases else 0):
            if self.status.phase is not wanted:
                exits = self.status.phase is Phase.TERMINATING and wanted is not Phase.KILLING
                self.see(ProcessExited(0, None)) if exits else self.pass_deadline()
        assert self.status.phase is wanted
        return self

    def finish(self) -> list[str]:
        """Let the preflight finish, the program exit, and the tunnel close."""
        return self.see(PreflightFinished(), ProcessExited(0, None), TunnelClosed())

    def judge_now(self, reason: EndReason, detail: str = "It says so.") -> list[str]:
        """Let the backend give a verdict when it is asked about a line of output; return what followed."""
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
        """Seconds from now to the current deadline; None if there is none."""
        deadline = self.supervisor.deadline
        return None if deadline is None else deadline - self.now_s

    @property
    def end(self) -> tuple[State, EndReason | None, str]:
        return self.status.state, self.status.reason, self.status.detail

    @property
    def path(self) -> list[str]:
        """The triggers so far."""
        return [str(record.trigger) for record in self.status.history]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return all events of this name, as dicts of their level and fields."""
        return [{"level": event.level, **event.fields} for event in self.effects.events if event.name == name]


def at(phase: Phase, **options: Any) -> Script:
    """Return a script that has been led to a phase by the shortest path; options as for `Script`."""
    return Script(**{**options, "ask_server": options.get("ask_server") or phase is Phase.VERIFYING}).lead_to(phase)
