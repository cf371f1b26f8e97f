"""The benchmarks measure what they claim; speed does not matter here."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from benchmarks import __main__ as program
from benchmarks import load, micro, tunnels
from benchmarks.contenders import CONTENDERS, OURS, REFERENCE, wait_listening
from benchmarks.delay import DelayingRelay, delayed
from benchmarks.report import RELAY, Results, table, write

from .helpers.agent import Agent, dead_port
from .helpers.real import needs_sshd
from .helpers.sockets import LOOPBACK, read_all, same
from .helpers.task import Task
from .helpers.wait import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .e2e.sshd import SshServer

KIB = 1 << 10
#: Contenders that need a package, or another interpreter, which the tests do not install.
PACKAGES = {"asyncssh": "asyncssh", "asyncssh, aes128-gcm": "asyncssh", "sshtunnel": "sshtunnel"}
OUTSIDE = {"python-x2go"}


@pytest.fixture(scope="module")
def ports() -> Iterator[list[int]]:
    with load.targets(2, workers=3) as listening:
        yield listening


@pytest.fixture(scope="module")
def sshd() -> Iterator[SshServer]:
    needs_sshd()
    with tunnels.ssh_server() as running:
        yield running


class TestLoad:
    def test_transfers_move_every_byte(self, ports: list[int]) -> None:
        for transfer in (load.download, load.upload, load.both_ways):
            assert transfer(ports[0], 300 * KIB + 7) > 0

    def test_round_trips_return_ordered_percentiles(self, ports: list[int]) -> None:
        times = load.round_trips(ports[0], 20)
        assert 0 < times.p50 <= times.p99

    def test_round_trips_complete_during_a_bulk_transfer(self, ports: list[int]) -> None:
        with load.downloading(ports[1]):
            load.round_trips(ports[0], 5)

    def test_connections_are_counted_per_second(self, ports: list[int]) -> None:
        assert load.connections(ports[0], 3) > 0

    def test_slow_reader_keeps_its_rate(self, ports: list[int]) -> None:
        began = time.monotonic()
        assert load.read_slowly(ports[0], for_s=0.2, a_second=100_000) == 20_000
        assert time.monotonic() - began >= 0.2

    @pytest.mark.parametrize("transfer", [load.download, load.upload, load.both_ways])
    def test_lost_bytes_are_reported(self, transfer: object) -> None:
        def lose_bytes() -> None:
            with agent.accept() as peer:
                peer.recv(100)
                peer.shutdown(socket.SHUT_WR)
                read_all(peer)

        assert callable(transfer)
        with Agent() as agent:
            task = Task(lose_bytes)
            with pytest.raises(load.Stalled, match="lost"):
                transfer(agent.port, 1000)
            task.result()

    def test_port_without_a_listener_is_reported(self) -> None:
        with pytest.raises(load.Stalled, match="refused"):
            load.download(dead_port(), 1)


class TestDelayingRelay:
    def test_relay_delivers_every_byte_unchanged(self) -> None:
        data = os.urandom(1 << 20)
        with Agent() as agent, contextlib.closing(DelayingRelay(agent.port, 0.01)) as relay:
            near = socket.create_connection((LOOPBACK, relay.port), WAIT_S)
            far = agent.accept()
            for sender, receiver in ((near, far), (far, near)):
                task = Task(read_all, receiver)
                sender.sendall(data)
                sender.shutdown(socket.SHUT_WR)
                same(task.result(), data)
            near.close()

    def test_every_byte_is_delayed_both_ways(self) -> None:
        with (
            Agent() as agent,
            contextlib.closing(DelayingRelay(agent.port, 0.05)) as relay,
            socket.create_connection((LOOPBACK, relay.port), WAIT_S) as near,
        ):
            far = agent.accept()
            began = time.monotonic()
            near.sendall(b"there")
            assert far.recv(9) == b"there"
            assert time.monotonic() - began >= 0.05
            far.sendall(b"back")
            assert near.recv(9) == b"back"
            assert time.monotonic() - began >= 0.1

    def test_data_in_flight_do_not_delay_those_that_follow(self) -> None:
        with Agent() as agent, contextlib.closing(DelayingRelay(agent.port, 0.2)) as relay:
            with socket.create_connection((LOOPBACK, relay.port), WAIT_S) as near:
                far = agent.accept()
                arrived: list[float] = []

                def receive() -> None:
                    while far.recv(1):
                        arrived.append(time.monotonic())

                task = Task(receive)
                began = time.monotonic()
                for _ in range(10):
                    near.sendall(b"x")
                    threading.Event().wait(0.02)
                near.shutdown(socket.SHUT_WR)
                task.result()
            assert len(arrived) == 10
            assert arrived[-1] - began < 10 * 0.2, "the delays overlap, they do not add up"

    def test_relay_runs_as_a_program(self, ports: list[int]) -> None:
        with delayed(ports[0], 0.02) as port:
            assert load.round_trips(port, 5).p50 >= 20_000


class TestContenders:
    @pytest.mark.parametrize("name", [name for name in CONTENDERS if name not in OUTSIDE])
    def test_contender_carries_data(self, name: str, ports: list[int], sshd: SshServer) -> None:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            pytest.skip(f"{PACKAGES[name]} is not installed: pip install --group bench")
        server = tunnels.server_at(sshd, sshd.port, ports)
        with tunnels.opened(name, server) as tunnel:
            for transfer in (load.download, load.upload, load.both_ways):
                transfer(tunnel.ports[0], 300 * KIB)
            load.round_trips(tunnel.ports[1], 5)
            assert tunnel.cpu_s() >= 0
            assert tunnel.memory_bytes("VmRSS") > 0
            assert tunnel.memory_bytes("VmHWM") > 0  # the kernel's counts are rough: it may be slightly below VmRSS

    def test_failed_start_is_reported(self, sshd: SshServer, ports: list[int]) -> None:
        server = tunnels.server_at(sshd, dead_port(), ports)
        with pytest.raises(tunnels.Unavailable, match="did not start"), tunnels.opened(OURS, server):
            pass

    def test_verbose_contender_does_not_block(
        self, sshd: SshServer, ports: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A traceback for each connection would fill a pipe without a reader."""
        verbose = tmp_path / "benchmarks" / "contenders.py"
        verbose.parent.mkdir()
        verbose.write_text(
            "import json, sys\n"
            f"sys.stderr.write({'x' * KIB!r} * 1024)\n"
            "print(json.dumps({'ports': json.loads(sys.argv[2])['targets'], 'version': ''}), flush=True)\n"
            "sys.stdin.read()\n"
        )
        monkeypatch.setattr(tunnels, "_ROOT", tmp_path)
        with tunnels.opened(OURS, tunnels.server_at(sshd, sshd.port, ports)) as tunnel:
            assert tunnel.ports == ports

    def test_last_output_is_reported_if_a_contender_does_not_start(
        self, sshd: SshServer, ports: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failing = tmp_path / "benchmarks" / "contenders.py"
        failing.parent.mkdir()
        failing.write_text("import sys\nsys.exit('first words\\n' + '.' * 500 + ' last words')\n")
        monkeypatch.setattr(tunnels, "_ROOT", tmp_path)
        server = tunnels.server_at(sshd, sshd.port, ports)
        reported = pytest.raises(tunnels.Unavailable, match=r"^did not start: \.+ last words$")
        with reported, tunnels.opened(OURS, server):
            pass


class TestRounds:
    def test_failed_measurement_is_recorded_and_the_others_continue(self, monkeypatch: pytest.MonkeyPatch) -> None:
        needs_sshd()

        def no_upload(port: int, count: int) -> float:
            raise load.Stalled(f"upload: {port and count} bytes were lost")

        monkeypatch.setattr(load, "upload", no_upload)
        sizes = tunnels.Sizes(100 * KIB, 100 * KIB, 8, 2, 0.1, (2,))
        progress: list[str] = []
        findings = tunnels.Rounds(sizes, [OURS, "no tunnel"], progress.append).run(1)
        assert findings.troubles[OURS]["up"] == "upload: 102400 bytes were lost"
        assert "up_mb_s" not in findings.values[OURS]
        assert len(findings.values[OURS]["down_mb_s"]) == len(findings.values["no tunnel"]["rtt_p99_us"]) == 1
        assert {"down_2ms_mb_s", "slow_reader_mib", "connections_s", "down_cpu_s_gib"} <= set(findings.values[OURS])
        assert "slow_reader_mib" not in findings.values["no tunnel"]
        assert f"{OURS}: up: upload: 102400 bytes were lost" in progress

    def test_round_has_each_contender_once_and_rotates_the_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        needs_sshd()
        measured: list[tuple[int, list[str]]] = []
        monkeypatch.setattr(tunnels.Rounds, "_round", lambda _, number, names, *__: measured.append((number, names)))
        tunnels.Rounds(tunnels.QUICK, ["ssh -L", OURS, "no tunnel"], lambda _: None).run(2)
        assert measured == [(0, ["ssh -L", OURS, "no tunnel"]), (1, [OURS, "no tunnel", "ssh -L"])]


def fixed() -> Results:
    """Return made-up results."""
    return Results(
        environment={"date": "2026-11-22"},
        rounds=3,
        values={
            OURS: {"down_mb_s": [200.0, 300.0, 900.0], "rtt_p99_us": [110.0, None, 90.0], "up_mb_s": [50.0] * 3},
            REFERENCE: {"down_mb_s": [100.0, 100.0, 1000.0], "rtt_p99_us": [100.0, 5.0, 100.0], "up_mb_s": [100.0] * 3},
            "no tunnel": {"down_mb_s": [4000.0, 4000.0, 4000.0]},
        },
        troubles={"python-x2go": {"start": "not installed: apt-get install python3-x2go"}},
        versions={REFERENCE: "OpenSSH_9.2p1", "no tunnel": ""},
        sessions={
            "start_ours_ms": [101.0, 103.0, 500.0],
            "start_by_hand_ms": [90.0, 98.0, 99.0],
            "stop_ours_ms": [915.0],
            "stop_by_hand_ms": [920.0],
            "stop_after_exit_ms": [25.0],
        },
        costs={
            "1": {"threads": 6, "kib": 1024, "descriptors": 5, "wake_ups_s": 0.004, "start_ms": 50, "stop_ms": 10},
            "200": "It did not start.",
        },
        micro={"transition_bare_us": 20.0, "transition_us": 50.0, "ok_us": 0.1},
    )


class TestReport:
    def test_ratio_is_the_median_of_those_in_the_same_round(self) -> None:
        results = fixed()
        assert results.ratio(OURS, "down_mb_s") == 2.0, "not 300 to 100"
        assert results.median(OURS, "rtt_p99_us") == 100.0
        assert results.ratio(OURS, "rtt_p99_us") == 1.0
        assert results.ratio(OURS, "both_mb_s") is None

    def test_table_has_every_contender_and_the_failures(self) -> None:
        lines = table(fixed()).splitlines()
        assert "| | proxy_fsm | ssh -L | python-x2go | no tunnel |" in lines
        assert "| down, MB/s | 300 (2.00×) | 100 | failed | 4,000 (40.00×) |" in lines
        assert "- python-x2go, start: not installed: apt-get install python3-x2go" in lines
        assert "- ssh -L: OpenSSH_9.2p1" in lines
        assert not [line for line in lines if line.startswith("| connections")], "no contender has a value"

    def test_goals_are_evaluated_by_the_ratios(self) -> None:
        lines = table(fixed()).splitlines()
        assert "| down, to `ssh -L` | ≥ 1.0× | 2.00× | rounds disagree: 0.90 to 3.00 |" in lines
        assert "| up, to `ssh -L` | ≥ 1.0× | 0.50× | **not met** |" in lines
        assert "| round trip p99, to `ssh -L` | ≤ 1.0× | 1.00× | rounds disagree: 0.90 to 1.10 |" in lines
        assert "| start, longer than by hand | ≤ 10 ms | 5.0 ms | met |" in lines
        assert "| stop, after nxproxy's exit | ≤ 20 ms | 25.0 ms | **not met** |" in lines
        assert "| a proxy's memory, 1 in one process | ≤ 1,024 KiB | 1,024 KiB | met |" in lines
        assert "| a proxy's threads, 1 in one process | ≤ 5 threads | 6.0 threads | **not met** |" in lines
        assert "| a proxy, idle, 1 in one process | ≤ 0 wake-ups/s | 0.004 wake-ups/s | **not met** |" in lines
        assert "| a transition, log event included (filtered) | ≤ 60 µs | 50.0 µs | met |" in lines
        assert not [line for line in lines if "200 in one process" in line], "that measurement failed"
        assert "| down, to sshtunnel | ≥ 2.0× | – | not measured |" in lines

    def test_table_has_sessions_costs_and_small_operations(self) -> None:
        lines = table(fixed()).splitlines()
        assert "| start to running | 103 | 98 | +5 |" in lines
        assert "| of the stop, after nxproxy's exit | 25.0 | | |" in lines
        assert "| stop | 915 | 920 | -5 |" in lines
        assert "| resident memory, KiB | 1,024 | failed |" in lines
        assert "200 proxies: It did not start." in lines
        assert "| a transition with record, status and log event (filtered) | 50.0 |" in lines

    def test_missing_measurements_are_reported(self) -> None:
        text = table(Results(sessions="missing: nxagent"))
        assert "Not measured: missing: nxagent" in text
        assert text.count("Not measured") == 3

    def test_written_results_can_be_read_back(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="not installed: pip install --group bench")
        write(fixed(), tmp_path)
        assert Results.read(tmp_path / "results.json") == fixed()
        assert (tmp_path / "table.md").read_text() == table(fixed())

    def test_plots_are_reproducible(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="not installed: pip install --group bench")
        pictures = []
        for name in ("one", "two"):
            write(fixed(), tmp_path / name)
            pictures.append({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.svg")})
        assert pictures[0] == pictures[1]
        assert set(pictures[0]) == {
            *("throughput.svg", "round-trip.svg", "long-line.svg", "cost.svg", "memory.svg", "proxies.svg")
        }

    def test_note_is_in_the_table_and_in_the_json(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("matplotlib", reason="not installed: pip install --group bench")
        monkeypatch.setattr(micro, "measure", lambda _: fixed().micro)
        note = ["--note", "on a busy machine"]
        monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "micro", *note, "-o", str(tmp_path)])
        program.main()
        assert Results.read(tmp_path / "results.json").environment["note"] == "on a busy machine"
        assert "- note: on a busy machine\n" in capsys.readouterr().out
        assert "note" not in program.environment()

    def test_row_keys_are_unique(self) -> None:
        assert len({measure.key for measure in RELAY}) == len(RELAY)


def test_small_operations_take_some_time() -> None:
    values = micro.measure(3)
    assert set(values) == {"transition_bare_us", "transition_us", "ok_us"}
    assert all(value > 0 for value in values.values())


def test_wait_listening_distinguishes_open_and_dead_ports() -> None:
    with Agent() as agent:
        assert wait_listening([agent.port])
        assert not wait_listening([agent.port, dead_port()], timeout_s=0.05)
