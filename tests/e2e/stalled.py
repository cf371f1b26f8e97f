"""Running sessions of which one part can be stopped and continued, for the table of stalls."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy_fsm import State
from tests.helpers.wait import eventually

from .attempt import FINAL_S, RUNNING_S, Attempt, WatchedNX3
from .namespace import Network
from .procs import alive, send_signal
from .relay import Relay
from .sshd import LOOPBACK
from .x2go import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import IO

    from .scene import Scene

ROOT = Path(__file__).parents[2]


class StalledSession(ABC):
    """A running session, and the part of it that can be stopped.

    Attributes:
        events: The proxy's events so far, with the time of each (monotonic seconds).
    """

    def __init__(self, events: list[dict[str, Any]]) -> None:
        self.events = events

    @abstractmethod
    def hold(self) -> None:
        """Stop that part."""

    @abstractmethod
    def release(self) -> None:
        """Continue it."""

    @abstractmethod
    def status(self) -> Mapping[str, Any]:
        """Return the proxy's status, as `ProxyStatus.as_dict` does."""

    @abstractmethod
    def stop(self) -> None:
        """Order the proxy to stop."""

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether it has ended, as far as can be seen while that part is stopped."""

    def named(self, event: str) -> list[dict[str, Any]]:
        """List its events of this name."""
        return [each for each in self.events if each["event"] == event]

    def warned(self) -> bool:
        """Return whether nxproxy has warned that it receives nothing."""
        return any(each["line"].startswith("Warning: No data received") for each in self.named("process.output"))

    def wait_final(self) -> Mapping[str, Any]:
        """Wait until the proxy has ended; return its status."""
        eventually(lambda: State(self.status()["state"]).is_final, FINAL_S)
        return self.status()


class Embedded(StalledSession):
    """A proxy in this process, and what stops and continues something else."""

    def __init__(self, attempt: Attempt, hold: Callable[[], None], release: Callable[[], None]) -> None:
        super().__init__(attempt.events)
        self._attempt, self._hold, self._release = attempt, hold, release

    def hold(self) -> None:
        self._hold()

    def release(self) -> None:
        self._release()

    def status(self) -> Mapping[str, Any]:
        return self._attempt.proxy.status().as_dict()

    def stop(self) -> None:
        self._attempt.proxy.stop()

    @property
    def is_over(self) -> bool:
        return self._attempt.proxy.state.is_final


class HostProgram(StalledSession):
    """A program that embeds a proxy; it can be stopped as a whole."""

    def __init__(self, scene: Scene, options: Mapping[str, str]) -> None:
        """Prepare; nothing runs yet.

        Args:
            scene: The session, and where to display it.
            options: NX options.
        """
        super().__init__([])
        self._config = {
            "known_hosts": str(scene.server.known_hosts_path),
            "connect": {
                "hostname": LOOPBACK,
                "port": scene.server.port,
                "username": scene.server.user,
                "key_filename": str(scene.server.client_key_path),
            },
            "agent_output": scene.agent.raw,
            "options": dict(options),
            "root": str(scene.root),
            "environ": scene.environ(),
            "timeouts": dataclasses.asdict(scene.timeouts),
        }
        self._cookie = scene.agent.cookie
        self._process: subprocess.Popen[str] | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[HostProgram]:
        """Start it, and end it in order."""
        command = [sys.executable, "-m", "tests.e2e.host_program"]
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            self._process = process
            assert process.stdout is not None
            reader = threading.Thread(target=self._read, args=[process.stdout], daemon=True)
            reader.start()
            try:
                self._order(json.dumps(self._config))
                eventually(lambda: self.status()["state"] == State.RUNNING, RUNNING_S)
                yield self
                assert process.stdin is not None
                process.stdin.close()
                assert process.wait(FINAL_S) == 0
            finally:
                process.kill()
                reader.join()
        assert self._cookie not in json.dumps(self.events)

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self.events.append({**json.loads(line), "at": time.monotonic()})

    def _order(self, order: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()

    def hold(self) -> None:
        assert self._process is not None
        send_signal([self._process.pid], signal.SIGSTOP)

    def release(self) -> None:
        assert self._process is not None
        send_signal([self._process.pid], signal.SIGCONT)

    def status(self) -> Mapping[str, Any]:
        seen = len(self.named("status"))
        self._order("status")
        return eventually(lambda: self.named("status")[seen:], FINAL_S)[0]

    def stop(self) -> None:
        self._order("stop")

    @property
    def is_over(self) -> bool:
        """The program cannot collect nxproxy's exit while it is stopped, but nxproxy is dead."""
        return not alive(self.named("process.spawned")[0]["pid"])


def _attempt(scene: Scene, options: Mapping[str, str]) -> Attempt:
    return scene.attempt(backend=WatchedNX3(options=dict(options))).run()


def _signalled(attempt: Attempt, pids: list[int]) -> Embedded:
    return Embedded(attempt, lambda: send_signal(pids, signal.SIGSTOP), lambda: send_signal(pids, signal.SIGCONT))


@contextlib.contextmanager
def agent(scene: Scene, options: Mapping[str, str]) -> Iterator[StalledSession]:
    """A session whose agent can be stopped."""
    yield _signalled(_attempt(scene, options), [scene.agent.pid])


@contextlib.contextmanager
def server(scene: Scene, options: Mapping[str, str]) -> Iterator[StalledSession]:
    """A session whose connection's sshd can be stopped; it has sent something just before."""
    attempt, pids = _attempt(scene, options), scene.server.session_pids(scene.client)

    def hold() -> None:
        run(scene.client, "true")
        send_signal(pids, signal.SIGSTOP)

    yield Embedded(attempt, hold, lambda: send_signal(pids, signal.SIGCONT))


@contextlib.contextmanager
def host(scene: Scene, options: Mapping[str, str]) -> Iterator[StalledSession]:
    """A session whose host program can be stopped."""
    with HostProgram(scene, options).running() as program:
        yield program


@contextlib.contextmanager
def network(scene: Scene, options: Mapping[str, str]) -> Iterator[StalledSession]:
    """A session whose packets can be dropped: the client's end of its connection is in a network of its own.

    Sockets belong to the network in which they were made. The relay's thread is not in that network, and so is not its
    connection to the server. The server has sent something just before the packets are dropped.
    """
    with (
        Network() as own,
        own.call(lambda: Relay(scene.server.port)) as relay,
        own.call(lambda: socket.create_connection((LOOPBACK, relay.port))) as connection,
        contextlib.closing(scene.server.connect(sock=connection)) as scene.client,
    ):
        attempt = _attempt(scene, options)

        def hold() -> None:
            run(scene.client, "true")
            own.set_loopback(up=False)

        yield Embedded(attempt, hold, lambda: own.set_loopback(up=True))
        attempt.close()  # before its connection
