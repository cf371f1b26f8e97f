"""The process and the tunnel, as python-x2go's programs expect them."""

from __future__ import annotations

import signal
import subprocess
import threading
from typing import TYPE_CHECKING

from proxy_fsm.evidence import OutputLine, ProcessExited, ProcessSpawned
from proxy_fsm.states import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy_fsm.evidence import Observation
    from proxy_fsm.proxy import Proxy
    from proxy_fsm.workers.process import ProxyProcess

__all__ = ["ProcessHandle", "TunnelHandle"]


class ProcessHandle:
    """The proxy program, with the API of `subprocess.Popen`; only the engine waits for it and reaps it.

    Attributes:
        args: Program and arguments.
        pid: Its process id, kept after it has exited.
        returncode: None while it runs, then its exit code, or minus the number of the signal that killed it; 0 if it
            was reaped by other code, as in ``subprocess``.
    """

    stdin = stdout = stderr = None

    def __init__(self, engine: Proxy, args: list[str], on_spawned: Callable[[ProcessHandle], object]) -> None:
        self.args = args
        self.pid = 0
        self.returncode: int | None = None
        self._process: ProxyProcess | None = None
        self._engine = engine
        self._on_spawned = on_spawned
        self._exited = threading.Event()

    def attach(self, process: ProxyProcess) -> None:
        """Set the process that signals are sent to."""
        self._process = process

    def observing(
        self, post: Callable[[Observation], None], on_line: Callable[[str], object]
    ) -> Callable[[Observation], None]:
        """Return a callback that handles the process's observations and passes them on."""

        def handle(observation: Observation) -> None:
            match observation:
                case ProcessSpawned(pid=pid):
                    self.pid = pid
                    self._on_spawned(self)
                case ProcessExited(exit_code=code, signal=number):
                    self.returncode = -number if number is not None else code or 0
                    self._exited.set()
                case _:
                    pass
            post(observation)
            if isinstance(observation, OutputLine):  # after the engine has it, so that a failure here does not matter
                on_line(observation.text)

        return handle

    def poll(self) -> int | None:
        """Return ``returncode``."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has exited.

        Args:
            timeout: In seconds; None waits without limit.

        Raises:
            subprocess.TimeoutExpired: It did not exit in time.
        """
        if not self._exited.wait(timeout):
            assert timeout is not None  # noqa: S101 - without one it waits until the exit
            raise subprocess.TimeoutExpired(self.args, timeout)
        assert self.returncode is not None  # noqa: S101 - set before
        return self.returncode

    def terminate(self) -> None:
        """Stop the engine, which ends the program cleanly; a no-op once it has exited."""
        self._engine.stop()

    def kill(self) -> None:
        """Stop the engine, and kill the program at once; a no-op once it has exited."""
        self._engine.stop()
        self.send_signal(signal.SIGKILL)

    def send_signal(self, sig: int) -> None:
        """Send it a signal; a no-op once it has exited."""
        if self._process is not None:
            self._process.signal(signal.Signals(sig))

    def __repr__(self) -> str:
        return f"<ProcessHandle: pid: {self.pid} returncode: {self.returncode}>"


class TunnelHandle:
    """The tunnel, with the API of python-x2go's."""

    def __init__(self, engine: Proxy) -> None:
        self._engine = engine

    @property
    def is_active(self) -> bool:
        """Whether the proxy program has connected and a channel was opened for it, and the session has not ended."""
        status = self._engine.status()
        return not status.state.is_final and status.tunnel is not None and status.tunnel.connections > 0

    @property
    def failed(self) -> bool:
        """Whether it failed before a channel was open."""
        status = self._engine.status()
        return status.state is State.FAILED and (status.tunnel is None or status.tunnel.connections == 0)
