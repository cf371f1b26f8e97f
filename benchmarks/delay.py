"""A relay that delays every byte and limits nothing else: a long line on one machine.

Incoming data are read at once and queued until they are due, so the line holds as much as its two ends have in flight.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
import sys
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LOOPBACK = "127.0.0.1"
_READ_BYTES = 256 << 10


class DelayingRelay:
    """Accepts connections on a port, and relays each to another port with a delay.

    Args:
        target: The port of 127.0.0.1 to relay to.
        delay_s: The delay of each byte in each direction: half a round trip, in seconds.
    """

    def __init__(self, target: int, delay_s: float) -> None:
        self._target = target
        self._delay_s = delay_s
        self._listener = socket.create_server((LOOPBACK, 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection((LOOPBACK, self._target))
            except OSError:
                near.close()
                continue
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            done = threading.Semaphore(0)
            for source, drain in ((near, far), (far, near)):
                held: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
                threading.Thread(target=self._read, args=(source, held), daemon=True).start()
                threading.Thread(target=self._write, args=(drain, held, done), daemon=True).start()
            threading.Thread(target=self._close_when_done, args=(near, far, done), daemon=True).start()

    def _read(self, source: socket.socket, held: SimpleQueue[tuple[float, bytes]]) -> None:
        data = b"?"
        while data:
            try:
                data = source.recv(_READ_BYTES)
            except OSError:
                data = b""
            held.put((time.monotonic() + self._delay_s, data))

    @staticmethod
    def _write(drain: socket.socket, held: SimpleQueue[tuple[float, bytes]], done: threading.Semaphore) -> None:
        with contextlib.suppress(OSError):  # the peer has disconnected, which the reader notices
            while True:
                due, data = held.get()
                wait_s = due - time.monotonic()
                if wait_s > 0:
                    time.sleep(wait_s)
                if not data:
                    break
                drain.sendall(data)
            drain.shutdown(socket.SHUT_WR)
        done.release()

    @staticmethod
    def _close_when_done(near: socket.socket, far: socket.socket, done: threading.Semaphore) -> None:
        done.acquire()
        done.acquire()
        near.close()
        far.close()

    def close(self) -> None:
        """Accept no more connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextlib.contextmanager
def delayed(target: int, round_trip_s: float) -> Iterator[int]:
    """Start a delaying relay in a process of its own; yield its port."""
    command = [sys.executable, "-m", "benchmarks.delay", str(target), str(round_trip_s / 2)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    """Relay until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target", type=int)
    parser.add_argument("delay_s", type=float)
    arguments = parser.parse_args()
    print(DelayingRelay(arguments.target, arguments.delay_s).port, flush=True)  # noqa: T201 - read by `delayed`
    sys.stdin.read()


if __name__ == "__main__":
    main()
