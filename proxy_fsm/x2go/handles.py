"""What python-x2go's programs hold on to: the process, and the tunnel."""

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
    """The proxy program as a `subprocess.Popen` shows one; the engine alone waits for it and reaps it.

    Attributes:
        args: Program and arguments.
        pid: Its process id, kept after its end.
        returncode: None while it runs, then its exit code, or a signal's number below 0; 0 where somebody else has
            taken it, as in ``subprocess``.
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
        """Name what the signals go to."""
        self._process = process

    def watching(
        self, post: Callable[[Observation], None], on_line: Callable[[str], object]
    ) -> Callable[[Observation], None]:
        """Return what takes the process's observations in and passes them on."""

        def take(seen: Observation) -> None:
            match seen:
                case ProcessSpawned(pid=pid):
                    self.pid = pid
                    self._on_spawned(self)
                case ProcessExited(exit_code=code, signal=number):
                    self.returncode = -number if number is not None else code or 0
                    self._exited.set()
                case _:
                    pass
            post(seen)
            if isinstance(seen, OutputLine):  # whatever comes of it, the engine has heard it
                on_line(seen.text)

        return take

    def poll(self) -> int | None:
        """Return ``returncode``."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended.

        Args:
            timeout: In seconds; None waits without end.

        Raises:
            subprocess.TimeoutExpired: It had not within that time.
        """
        if not self._exited.wait(timeout):
            assert timeout is not None  # noqa: S101 - without one it waits until the end
            raise subprocess.TimeoutExpired(self.args, timeout)
        assert self.returncode is not None  # noqa: S101 - set before
        return self.returncode

    def terminate(self) -> None:
        """Have the engine stop, which ends the program in order; a no-op once it has ended."""
        self._engine.stop()

    def kill(self) -> None:
        """Have the engine stop, and the program killed at once; a no-op once it has ended."""
        self._engine.stop()
        self.send_signal(signal.SIGKILL)

    def send_signal(self, sig: int) -> None:
        """Send it a signal; a no-op once it has ended."""
        if self._process is not None:
            self._process.signal(signal.Signals(sig))

    def __repr__(self) -> str:
        return f"<ProcessHandle: pid: {self.pid} returncode: {self.returncode}>"


class TunnelHandle:
    """The tunnel as python-x2go shows one."""

    def __init__(self, engine: Proxy) -> None:
        self._engine = engine

    @property
    def is_active(self) -> bool:
        """Whether the proxy program has connected, and its channel stood, and it has not all ended."""
        status = self._engine.status()
        return not status.state.is_final and status.tunnel is not None and status.tunnel.connections > 0

    @property
    def failed(self) -> bool:
        """Whether it came to an end by a fault before a channel stood."""
        status = self._engine.status()
        return status.state is State.FAILED and (status.tunnel is None or status.tunnel.connections == 0)
