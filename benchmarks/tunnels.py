"""Interleaved rounds of measurements: every round measures each contender once."""

from __future__ import annotations

import contextlib
import functools
import getpass
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from benchmarks import load
from benchmarks.contenders import CONTENDERS, LOOPBACK, Server, wait_listening
from benchmarks.delay import delayed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.e2e.sshd import SshServer

MIB = 1 << 20
GIB = 1 << 30
_ROOT = Path(__file__).resolve().parent.parent
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
_ATTEMPTS = 3


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        transfer_bytes: Moved each way; by far slower contenders move an eighth.
        delayed_bytes: The same through the delaying relay.
        pings: Round trips without other traffic; a quarter of them during a bulk transfer.
        connections: How many are opened.
        slow_s: How long the slow reader reads, in seconds.
        round_trips_ms: Round-trip times of the delaying relay.
    """

    transfer_bytes: int = 256 * MIB
    delayed_bytes: int = 32 * MIB
    pings: int = 2000
    connections: int = 200
    slow_s: float = 2.0
    round_trips_ms: tuple[int, ...] = (20, 100)


QUICK = Sizes(8 * MIB, 2 * MIB, 100, 10, 0.5, (20,))
#: Below 40 MB/s on a machine on which the others reach hundreds.
SLOW = frozenset({"python-x2go"})


@dataclass
class Findings:
    """The results so far: by contender and measurement, one value per round, or why there is none."""

    values: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    troubles: dict[str, dict[str, str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


class Unavailable(Exception):  # noqa: N818 - a result, shown in the tables
    """A contender cannot run here."""


def interpreter(name: str) -> str:
    """Return the Python that a contender runs under.

    Raises:
        Unavailable: There is none; the message names the remedy.
    """
    if name == "python-x2go":
        python = "/usr/bin/python3"
        if subprocess.run([python, "-c", "import x2go"], capture_output=True, check=False).returncode:
            raise Unavailable("not installed: apt-get install python3-x2go")
        return python
    if name.startswith("ssh -L") and shutil.which("ssh") is None:
        raise Unavailable("not installed: apt-get install openssh-client")
    package = name.partition(",")[0]
    if package in {"asyncssh", "sshtunnel"} and importlib.util.find_spec(package) is None:
        raise Unavailable("not installed: pip install --group bench")
    return sys.executable


@dataclass(frozen=True)
class Tunnel:
    """A contender with open tunnels: its ports, one per target, and its process."""

    name: str
    ports: list[int]
    pid: int
    version: str

    def cpu_s(self) -> float:
        """Return the processor time so far of the process and its reaped children, in seconds."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / _TICKS_A_SECOND

    def memory_bytes(self, field_name: str) -> int:
        """Return ``VmRSS`` or ``VmHWM`` of the process, in bytes."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(field_name):
                return int(line.split()[1]) << 10
        raise LookupError(field_name)


@contextlib.contextmanager
def opened(name: str, server: Server) -> Iterator[Tunnel]:
    """Start a contender, and end it.

    Raises:
        Unavailable: It cannot run here.
    """
    command = [interpreter(name), str(_ROOT / "benchmarks" / "contenders.py"), name, json.dumps(asdict(server))]
    for attempt in range(_ATTEMPTS):
        # Into a file: a verbose contender would block on a pipe without a reader, and look slow.
        with tempfile.TemporaryFile() as error_file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=error_file,
                text=True,
                env={**os.environ, "PYTHONPATH": "" if name == "python-x2go" else str(_ROOT)},
            )
            try:
                assert process.stdout is not None  # noqa: S101 - it is a pipe
                line = process.stdout.readline()
                ports = json.loads(line)["ports"] if line else []
                if ports and wait_listening(ports) and process.poll() is None:
                    yield Tunnel(name, ports, process.pid, json.loads(line)["version"])
                    return
            finally:
                process.kill()
                process.communicate()
            errors = _end_of(error_file)
        # ssh needs a fixed port, which another process may have bound in the meantime.
        if "Address already in use" not in errors or attempt == _ATTEMPTS - 1:
            raise Unavailable(f"did not start: {errors}")


def _end_of(file: BinaryIO) -> str:
    """Return the last 200 bytes as text."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 200))
    return file.read().decode("utf-8", "replace").strip()


@contextlib.contextmanager
def ssh_server() -> Iterator[SshServer]:
    """Run a real sshd for the measurements."""
    from tests.e2e.sshd import SshServer  # noqa: PLC0415 - only a checkout has the tests' harness

    with SshServer(log_level="INFO") as server:
        yield server


def server_at(sshd: SshServer, port: int, targets: list[int]) -> Server:
    """Return how to reach an sshd through a port, which may be that of a relay."""
    known_hosts = sshd.directory / f"known_hosts-{port}"
    host_key = sshd.host_key
    known_hosts.write_text(f"[{LOOPBACK}]:{port} {host_key.get_name()} {host_key.get_base64()}\n")
    return Server(port, getpass.getuser(), str(sshd.client_key_path), str(known_hosts), targets)


class Rounds:
    """Measures contenders, round by round.

    Args:
        sizes: How much.
        contenders: Which, by name.
        say: Called with a line of progress.
    """

    def __init__(self, sizes: Sizes, contenders: list[str], say: Callable[[str], None]) -> None:
        self.findings = Findings()
        self._sizes = sizes
        self._contenders = contenders
        self._say = say

    def run(self, rounds: int, after_each: Callable[[int, Findings], None] = lambda *_: None) -> Findings:
        """Measure a number of rounds; after each, call `after_each` with its number and the findings so far."""
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            sshd = stack.enter_context(ssh_server())
            targets = stack.enter_context(load.targets())
            near = server_at(sshd, sshd.port, targets)
            far = {
                ms: server_at(sshd, stack.enter_context(delayed(sshd.port, ms / 1000)), targets)
                for ms in self._sizes.round_trips_ms
            }
            for number in range(rounds):
                turn = number % len(self._contenders)
                self._round(number, [*self._contenders[turn:], *self._contenders[:turn]], near, far)
                self._say(f"round {number + 1} of {rounds}, {time.monotonic() - began:.0f} s")
                after_each(number + 1, self.findings)
        return self.findings

    def _round(self, number: int, names: list[str], near: Server, far: dict[int, Server]) -> None:
        """Take each measurement of all contenders before the next one, so that all meet the same conditions."""
        steps = [self._throughput, self._both_ways, self._round_trips, self._round_trips_beside, self._connections]
        self._steps(number, names, near, steps)
        tunnels = [name for name in names if CONTENDERS[name].tunnels]
        for name in tunnels:
            self._steps(number, [name], near, [self._memory])
        for ms, server in far.items():
            self._steps(number, tunnels, server, [functools.partial(self._far, ms=ms)])

    def _steps(self, number: int, names: list[str], server: Server, steps: Sequence[Callable[..., None]]) -> None:
        """Run measurement steps on some contenders, with the tunnels of all of them open."""
        with contextlib.ExitStack() as stack:
            tunnels: dict[str, Tunnel] = {}
            for name in names:
                if name not in SLOW:
                    with self._recorded_trouble(name, "start"):
                        tunnels[name] = stack.enter_context(opened(name, server))
            for step in steps:
                for name in names:
                    if name in tunnels:
                        self.findings.versions[name] = tunnels[name].version
                        step(tunnels[name], number)
                    elif name in SLOW:  # one connection disturbs the next: every step has a process of its own
                        with self._recorded_trouble(name, "start"), opened(name, server) as tunnel:
                            self.findings.versions[name] = tunnel.version
                            step(tunnel, number)

    @contextlib.contextmanager
    def _recorded_trouble(self, name: str, what: str) -> Iterator[None]:
        """Record why a measurement failed, and continue."""
        try:
            yield
        except (Unavailable, load.Stalled, OSError) as error:
            self.findings.troubles.setdefault(name, {})[what] = str(error)
            self._say(f"{name}: {what}: {error}")

    def _record(self, name: str, what: str, number: int, value: float) -> None:
        values = self.findings.values.setdefault(name, {}).setdefault(what, [])
        values.extend([None] * (number + 1 - len(values)))
        values[number] = value

    def _size(self, name: str, size: int) -> int:
        return size // 8 if name in SLOW else size

    def _throughput(self, tunnel: Tunnel, number: int) -> None:
        name, port = tunnel.name, tunnel.ports[0]
        size = self._size(name, self._sizes.transfer_bytes)
        transfers: dict[str, Callable[[int, int], float]] = {"down": load.download, "up": load.upload}
        for what, transfer in transfers.items():
            with self._recorded_trouble(name, what):
                before_s = tunnel.cpu_s()
                self._record(name, f"{what}_mb_s", number, size / transfer(port, size) / 1e6)
                if CONTENDERS[name].tunnels:
                    self._record(name, f"{what}_cpu_s_gib", number, (tunnel.cpu_s() - before_s) * GIB / size)

    def _both_ways(self, tunnel: Tunnel, number: int) -> None:
        size = self._size(tunnel.name, self._sizes.transfer_bytes)
        with self._recorded_trouble(tunnel.name, "both"):
            self._record(tunnel.name, "both_mb_s", number, 2 * size / load.both_ways(tunnel.ports[0], size) / 1e6)

    def _round_trips(self, tunnel: Tunnel, number: int) -> None:
        with self._recorded_trouble(tunnel.name, "rtt"):
            times = load.round_trips(tunnel.ports[0], self._sizes.pings)
            self._record(tunnel.name, "rtt_p50_us", number, times.p50)
            self._record(tunnel.name, "rtt_p99_us", number, times.p99)

    def _round_trips_beside(self, tunnel: Tunnel, number: int) -> None:
        with self._recorded_trouble(tunnel.name, "rtt_bulk"), load.downloading(tunnel.ports[1]):
            times = load.round_trips(tunnel.ports[0], self._sizes.pings // 4)
            self._record(tunnel.name, "rtt_bulk_p50_us", number, times.p50)
            self._record(tunnel.name, "rtt_bulk_p99_us", number, times.p99)

    def _connections(self, tunnel: Tunnel, number: int) -> None:
        with self._recorded_trouble(tunnel.name, "connections"):
            rate = load.connections(tunnel.ports[0], self._sizes.connections)
            self._record(tunnel.name, "connections_s", number, rate)

    def _memory(self, tunnel: Tunnel, number: int) -> None:
        with self._recorded_trouble(tunnel.name, "slow_reader"):
            load.round_trips(tunnel.ports[1], 20)
            before = tunnel.memory_bytes("VmRSS")
            load.read_slowly(tunnel.ports[0], for_s=self._sizes.slow_s)
            peak = tunnel.memory_bytes("VmHWM")
            self._record(tunnel.name, "peak_mib", number, peak / MIB)
            self._record(tunnel.name, "slow_reader_mib", number, (peak - before) / MIB)

    def _far(self, tunnel: Tunnel, number: int, *, ms: int) -> None:
        name, port = tunnel.name, tunnel.ports[0]
        size = self._size(name, self._sizes.delayed_bytes)
        with self._recorded_trouble(name, f"down_{ms}ms_mb_s"):
            self._record(name, f"down_{ms}ms_mb_s", number, size / load.download(port, size) / 1e6)
        with self._recorded_trouble(name, f"up_{ms}ms_mb_s"):
            self._record(name, f"up_{ms}ms_mb_s", number, size / load.upload(port, size) / 1e6)
        with self._recorded_trouble(name, f"rtt_{ms}ms"):
            times = load.round_trips(tunnel.ports[1], 20)
            self._record(name, f"rtt_{ms}ms_p50_us", number, times.p50)
