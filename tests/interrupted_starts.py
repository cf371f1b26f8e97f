"""Interrupts a start many times, at increasing delays: ``python -m tests.interrupted_starts DIRECTORY``.

It runs in its own process, since an interrupt may hit anything on the main thread: under pytest also the callbacks of
hypothesis and coverage, which only they could make safe.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path

from proxy_fsm import State
from proxy_fsm.testing import LoopbackSSHServer

from .helpers.agent import Agent
from .helpers.engine import Maker

ROUNDS = 100


class Interrupts:
    """Raises KeyboardInterrupt as for Ctrl-C, but only while armed.

    A signal may arrive late: the kernel delivers it to any thread, which may have to wait for a processor.
    """

    def __init__(self) -> None:
        self.armed = False
        signal.signal(signal.SIGALRM, self._interrupt)

    def schedule(self, delay_s: float) -> None:
        self.armed = True
        signal.setitimer(signal.ITIMER_REAL, delay_s)

    def _interrupt(self, *_: object) -> None:
        if self.armed:
            raise KeyboardInterrupt


def interrupt_starts(make: Maker) -> int:
    """Return how many interrupts hit a start; check that each proxy can be closed and is then stopped."""
    hit = 0
    interrupts = Interrupts()
    for number in range(ROUNDS):
        proxy = make()
        try:
            interrupts.schedule(0.000005 * (number + 1))
            proxy.start()
            interrupts.armed = False
        except KeyboardInterrupt:
            hit += 1
        except RuntimeError as error:  # from CPython's own locks, if it hits one of them
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            hit += 1
        interrupts.armed = False
        proxy.close(timeout=5)
        if proxy.state is not State.STOPPED or make.log.path()[-1] != "stopped":
            raise AssertionError(f"round {number}: {proxy.status()}, published: {make.log.path()}")
    return hit


def main() -> None:
    with (
        LoopbackSSHServer() as server,
        Agent(serving=True) as agent,
        contextlib.closing(server.connect_transport()) as transport,
    ):
        make = Maker(transport, agent, Path(sys.argv[1]))
        sys.stdout.write(f"{interrupt_starts(make)} of {ROUNDS} starts were interrupted\n")
        make.close()


if __name__ == "__main__":
    main()
