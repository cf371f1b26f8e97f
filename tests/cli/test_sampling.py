"""What the tunnel carries is told while it carries something, and at no other time."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

import pytest

from proxy_fsm import ProxyStatus, State, TunnelStats
from proxy_fsm.cli.output import LogFormat, Output
from proxy_fsm.cli.sampling import sampled as sampled_proxy
from tests.helpers.wait import eventually

from .program import started, viewing

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from proxy_fsm import Proxy
    from proxy_fsm.testing import LoopbackSSHServer
    from tests.helpers.agent import Agent

    from .program import Home


class Counted:
    """What is asked of a proxy: its id, and a status whose tunnel has carried what a test says."""

    id = "aa"

    def __init__(self, *carried: int) -> None:
        self.carried = carried or (0, 0)
        self.looks = 0

    def status(self) -> ProxyStatus:
        self.looks += 1
        now = datetime.now(UTC)
        stats = TunnelStats(
            bytes_to_agent=self.carried[0], bytes_from_agent=self.carried[1], opened_at=now, connections=1
        )
        return ProxyStatus(id=self.id, session="desk", state=State.RUNNING, since=now, tunnel=stats)


def sampled(proxy: Counted, output: Output) -> AbstractContextManager[None]:
    return sampled_proxy(cast("Proxy", proxy), output)


class Clock:
    """Takes the place of the event that ends the sampling: each wait is a step of a test."""

    def __init__(self) -> None:
        self.pauses: list[float] = []
        self.steps = threading.Semaphore(0)
        self.taken = threading.Semaphore(0)
        self.ended = False

    def wait(self, pause_s: float) -> bool:
        self.pauses.append(pause_s)
        self.taken.release()
        self.steps.acquire()
        return self.ended

    def set(self) -> None:
        self.ended = True
        self.steps.release()

    def step(self) -> None:
        """Let one pause pass, and wait for the next one to begin."""
        assert self.taken.acquire(timeout=10)
        self.steps.release()
        assert self.taken.acquire(timeout=10)
        self.taken.release()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("proxy_fsm.cli.sampling.Event", lambda: clock)
    return clock


def test_totals_are_told_when_they_have_changed_and_looks_become_rare(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy = Counted()
    with sampled(proxy, Output(LogFormat.JSON)):
        clock.step()
        assert not capsys.readouterr().out
        proxy.carried = (10, 2000)
        clock.step()
        for _ in range(7):
            clock.step()
        proxy.carried = (11, 2000)
        clock.step()
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["event"] for each in told] == ["tunnel.stats", "tunnel.stats"]
    assert [(each["bytes_to_agent"], each["bytes_from_agent"]) for each in told] == [(10, 2000), (11, 2000)]
    assert all(each["proxy_id"] == proxy.id and each["session"] == "desk" and each["interval_s"] >= 0 for each in told)
    assert clock.pauses == [1, 2, 1, 2, 4, 8, 16, 32, 32, 32, 1]


def test_where_a_person_reads_there_are_none_and_no_thread(capsys: pytest.CaptureFixture[str]) -> None:
    proxy = Counted(1, 1)
    with sampled(proxy, Output(LogFormat.CONSOLE)):
        assert "sampling" not in {thread.name for thread in threading.enumerate()}
    assert "".join(capsys.readouterr()) == ""
    assert proxy.looks == 0


def test_a_record_gets_them_too(clock: Clock, tmp_path: Path) -> None:
    output = Output(LogFormat.CONSOLE, console_level=50)
    output.record_to(tmp_path / "events.jsonl")
    proxy = Counted(1, 1)
    with sampled(proxy, output):
        clock.step()
    output.close()
    assert json.loads((tmp_path / "events.jsonl").read_text())["event"] == "tunnel.stats"


def test_a_run_tells_them(home: Home, server: LoopbackSSHServer, agent: Agent) -> None:
    home.know(server)
    arguments = viewing(home, server, agent.port, "--key", home.keep_key(server))
    with started(home, *arguments) as program:
        told = program.until(lambda each: each["event"] == "tunnel.stats")
        assert told["bytes_from_agent"] == len(b"hello")
        assert told["interval_s"] > 0
        agent.disconnect()
        program.finish()
    assert program.states[-1] == State.STOPPED
    eventually(lambda: not home.left())
