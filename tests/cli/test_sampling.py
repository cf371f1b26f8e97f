"""Tunnel traffic is logged while bytes flow, and at no other time."""

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

from .program import run_arguments, started

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from proxy_fsm import Proxy
    from proxy_fsm.testing import LoopbackSSHServer
    from tests.helpers.agent import Agent

    from .program import Home


class FakeProxy:
    """The part of a proxy that is sampled: its id, and a status with the tunnel totals that a test sets."""

    id = "aa"

    def __init__(self, *totals: int) -> None:
        self.totals = totals or (0, 0)
        self.samples = 0

    def status(self) -> ProxyStatus:
        self.samples += 1
        now = datetime.now(UTC)
        stats = TunnelStats(
            bytes_to_agent=self.totals[0], bytes_from_agent=self.totals[1], opened_at=now, connections=1
        )
        return ProxyStatus(id=self.id, session="desk", state=State.RUNNING, since=now, tunnel=stats)


def sampled(proxy: FakeProxy, output: Output) -> AbstractContextManager[None]:
    return sampled_proxy(cast("Proxy", proxy), output)


class Clock:
    """Replaces the event that ends the sampling: each wait is one step of a test."""

    def __init__(self) -> None:
        self.pauses: list[float] = []
        self.steps = threading.Semaphore(0)
        self.waiting = threading.Semaphore(0)
        self.ended = False

    def wait(self, pause_s: float) -> bool:
        self.pauses.append(pause_s)
        self.waiting.release()
        self.steps.acquire()
        return self.ended

    def set(self) -> None:
        self.ended = True
        self.steps.release()

    def step(self) -> None:
        """Let one pause pass, and wait for the next one to begin."""
        assert self.waiting.acquire(timeout=10)
        self.steps.release()
        assert self.waiting.acquire(timeout=10)
        self.waiting.release()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("proxy_fsm.cli.sampling.Event", lambda: clock)
    return clock


def test_totals_are_logged_on_change_and_idle_interval_doubles(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy = FakeProxy()
    with sampled(proxy, Output(LogFormat.JSON)):
        clock.step()
        assert not capsys.readouterr().out
        proxy.totals = (10, 2000)
        clock.step()
        for _ in range(7):
            clock.step()
        proxy.totals = (11, 2000)
        clock.step()
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["event"] for each in events] == ["tunnel.stats", "tunnel.stats"]
    assert [(each["bytes_to_agent"], each["bytes_from_agent"]) for each in events] == [(10, 2000), (11, 2000)]
    assert all(
        each["proxy_id"] == proxy.id and each["session"] == "desk" and each["interval_s"] >= 0 for each in events
    )
    assert clock.pauses == [1, 2, 1, 2, 4, 8, 16, 32, 32, 32, 1]


def test_console_output_is_not_sampled(capsys: pytest.CaptureFixture[str]) -> None:
    proxy = FakeProxy(1, 1)
    with sampled(proxy, Output(LogFormat.CONSOLE)):
        assert "sampling" not in {thread.name for thread in threading.enumerate()}
    assert "".join(capsys.readouterr()) == ""
    assert proxy.samples == 0


def test_record_gets_tunnel_stats(clock: Clock, tmp_path: Path) -> None:
    output = Output(LogFormat.CONSOLE, console_level=50)
    output.record_to(tmp_path / "events.jsonl")
    proxy = FakeProxy(1, 1)
    with sampled(proxy, output):
        clock.step()
    output.close()
    assert json.loads((tmp_path / "events.jsonl").read_text())["event"] == "tunnel.stats"


def test_run_logs_tunnel_stats(home: Home, server: LoopbackSSHServer, agent: Agent) -> None:
    home.add_known_host(server)
    arguments = run_arguments(home, server, agent.port, "--key", home.write_key(server))
    with started(home, *arguments) as program:
        stats = program.until(lambda each: each["event"] == "tunnel.stats")
        assert stats["bytes_from_agent"] == len(b"hello")
        assert stats["interval_s"] > 0
        agent.disconnect()
        program.finish()
    assert program.states[-1] == State.STOPPED
    eventually(lambda: not home.command_lines())
