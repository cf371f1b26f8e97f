"""The session's local side run by hand: a plain forwarder and nxproxy, without any code of our package."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .procs import SYSTEM_PATH, program
from .sshd import LOOPBACK, transport_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    import paramiko

    from .x2go import AgentSession

ESTABLISHED = "Established X server connection"
STOP_S = 20.0
CHUNK_BYTES = 65536


class Forwarder:
    """A unix socket forwarded to a port of the server, one connection at a time."""

    def __init__(self, client: paramiko.SSHClient, port: int) -> None:
        """Prepare; nothing listens yet."""
        self._transport = transport_of(client)
        self._port = port
        self._directory = Path(tempfile.mkdtemp(prefix="pfsm-fw-"))
        self._listener = socket.socket(socket.AF_UNIX)
        self._open: list[socket.socket | paramiko.Channel] = []
        self._threads: list[threading.Thread] = []
        self.path = self._directory / "socket"
        self.refused = 0
        self.bytes_up = 0
        self.bytes_down = 0

    def start(self) -> None:
        """Listen."""
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._run(self._serve)

    def _run(self, work: object, *arguments: object) -> None:
        if not callable(work):
            raise TypeError(work)
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            try:
                channel = self._transport.open_channel(
                    "direct-tcpip", (LOOPBACK, self._port), (LOOPBACK, 0), timeout=10
                )
            except Exception:  # noqa: BLE001 -- whatever the refusal, the local end is closed
                self.refused += 1
                connection.close()
                continue
            self._open += [connection, channel]
            self._run(self._pump_up, connection, channel)
            self._run(self._pump_down, connection, channel)

    def _pump_up(self, connection: socket.socket, channel: paramiko.Channel) -> None:
        with contextlib.suppress(OSError, EOFError):
            while piece := connection.recv(CHUNK_BYTES):
                channel.sendall(piece)
                self.bytes_up += len(piece)
            channel.shutdown_write()

    def _pump_down(self, connection: socket.socket, channel: paramiko.Channel) -> None:
        with contextlib.suppress(OSError, EOFError):
            while piece := channel.recv(CHUNK_BYTES):
                connection.sendall(piece)
                self.bytes_down += len(piece)
            connection.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Close all connections at once, as when the forwarding program is killed."""
        for end in self._open:
            with contextlib.suppress(OSError, EOFError):
                if isinstance(end, socket.socket):
                    end.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
                end.close()
        self._open.clear()

    def stop(self) -> None:
        """Close everything."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join(STOP_S)
        self.cut()
        for thread in self._threads:
            thread.join(STOP_S)
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Moment(NamedTuple):
    """Something observed or done, `at_s` seconds after nxproxy was started."""

    at_s: float
    kind: str
    what: str


class NxProxy:
    """nxproxy as python-x2go calls it, its output recorded with times."""

    def __init__(
        self, session: AgentSession, path: Path, environment: Mapping[str, str], *, cookie: str | None = None
    ) -> None:
        """Prepare the call; nothing runs yet.

        Args:
            session: the agent to connect to.
            path: the socket that is forwarded to its graphics port.
            environment: DISPLAY and XAUTHORITY.
            cookie: another cookie than the session's.
        """
        self.options = (
            f"nx/nx,connect=unix:{path},cookie={cookie or session.cookie},retry=5,composite=1,"
            f"clipboard=1,id={session.name}:{session.display}"
        )
        self._environment = dict(environment)
        self._directory = Path(tempfile.mkdtemp(prefix="pfsm-nx-"))
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []
        self._started = 0.0
        self.output = b""
        self.moments: list[Moment] = []

    @property
    def pid(self) -> int:
        """The process of nxproxy."""
        if self._process is None:
            raise RuntimeError("nxproxy was not started.")
        return self._process.pid

    def start(self) -> None:
        """Start nxproxy, and return at once."""
        environment = {"PATH": SYSTEM_PATH, "HOME": str(self._directory), "NX_ROOT": str(self._directory)}
        environment |= {"NX_CLIENT": "/bin/true", "NX_DISPLAY": self.options, **self._environment}
        self._started = time.monotonic()
        process = subprocess.Popen(
            [program("nxproxy") or "nxproxy", "-S"],
            cwd=self._directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._process = process
        for work in (self._read, self._wait):
            thread = threading.Thread(target=work, args=[process], daemon=True)
            self._threads.append(thread)
            thread.start()

    def note(self, kind: str, what: str) -> None:
        """Record that something happened now."""
        with self._changed:
            self.moments.append(Moment(time.monotonic() - self._started, kind, what))
            self._changed.notify_all()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        if process.stdout is None:
            return
        with process.stdout as pipe:
            for line in iter(pipe.readline, b""):
                self.output += line
                self.note("line", line.decode(errors="replace").rstrip("\n"))

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        self.note("exit", str(process.wait()))

    def wait_for(self, text: str, *, kind: str = "line", timeout_s: float = 10.0) -> Moment:
        """Wait for a line that contains `text` (or for a moment of another kind), and return it."""

        def found() -> Moment | None:
            return next((each for each in self.moments if each.kind == kind and text in each.what), None)

        with self._changed:
            if self._changed.wait_for(found, timeout_s) and (moment := found()):
                return moment
        raise TimeoutError(f"no {kind} with {text!r} within {timeout_s} s in\n{self.output.decode()}")

    def wait_exit(self, timeout_s: float = STOP_S) -> int:
        """Wait until nxproxy has exited and all its output is read; return its exit status."""
        moment = self.wait_for("", kind="exit", timeout_s=timeout_s)
        for thread in self._threads:
            thread.join(timeout_s)
        return int(moment.what)

    def send(self, number: signal.Signals) -> None:
        """Send nxproxy a signal."""
        self.note("action", f"{number.name} to nxproxy")
        os.kill(self.pid, number)

    def stop(self) -> None:
        """End nxproxy, in order if it still runs."""
        if self._process is not None:
            if self._process.poll() is None:
                self.send(signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    self.wait_exit()
            if self._process.poll() is None:
                self.send(signal.SIGKILL)
            self.wait_exit()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
