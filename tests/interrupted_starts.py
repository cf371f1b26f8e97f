"""Interrupts a start again and again, closer and closer: ``python -m tests.interrupted_starts DIRECTORY``.

A process of its own, since an interrupt may hit whatever runs at that moment on its main thread: beneath pytest also
hypothesis's and coverage's callbacks, which nobody but they could make safe.
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
    """Does once what Python does when Ctrl-C is pressed, but only while it is armed.

    A signal may come late: the kernel gives it to any thread, which may have to wait for a processor.
    """

    def __init__(self) -> None:
        self.armed = False
        signal.signal(signal.SIGALRM, self._interrupt)

    def come_in(self, delay_s: float) -> None:
        self.armed = True
        signal.setitimer(signal.ITIMER_REAL, delay_s)

    def _interrupt(self, *_: object) -> None:
        if self.armed:
            raise KeyboardInterrupt


def interrupt_starts(make: Maker) -> int:
    """Return how many interrupts hit a start; each of the proxies can be closed, and is then stopped."""
    hit = 0
    interrupts = Interrupts()
    for number in range(ROUNDS):
        proxy = make()
        try:
            interrupts.come_in(0.000005 * (number + 1))
            proxy.start()
            interrupts.armed = False
        except KeyboardInterrupt:
            hit += 1
        except RuntimeError as error:  # CPython's own locks, where it hits them in the middle
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            hit += 1
        interrupts.armed = False
        proxy.close(timeout=5)
        if proxy.state is not State.STOPPED or make.log.path()[-1] != "stopped":
            raise AssertionError(f"round {number}: {proxy.status()}, told: {make.log.path()}")
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
