"""The load: targets that send, discard or echo, and a client that measures what passes through a tunnel.

Targets are processes of their own, so that they share no interpreter lock with the contender. A connection starts with
a header that requests an operation: one letter and a number of bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LOOPBACK = "127.0.0.1"
MIB = 1 << 20
BUFFER_BYTES = 256 << 10
PATIENCE_S = 10.0
WORKERS = 6
PING = bytes(64)

_HEADER = struct.Struct("!cQ")
_DOWN, _UP, _BOTH, _ECHO = b"D", b"U", b"B", b"E"
_DONE = b"!"
_ENDLESS = 1 << 62


class Stalled(Exception):  # noqa: N818 - a result about a contender, shown in the tables
    """A transfer did not complete."""


class RoundTrips(NamedTuple):
    """Times of round trips, in microseconds."""

    p50: float
    p99: float


def _send(connection: socket.socket, count: int) -> None:
    piece = memoryview(bytes(BUFFER_BYTES))
    while count > 0:
        count -= connection.send(piece[: min(count, BUFFER_BYTES)])


def _receive(connection: socket.socket, count: int) -> int:
    """Receive a number of bytes; return how many are missing at EOF."""
    buffer = bytearray(BUFFER_BYTES)
    while count > 0:
        got = connection.recv_into(buffer, min(count, BUFFER_BYTES))
        if got == 0:
            break
        count -= got
    return count


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count and (piece := connection.recv(count - len(data))):
        data += piece
    return bytes(data)


def _send_until_closed(connection: socket.socket, count: int) -> None:
    with contextlib.suppress(OSError):  # the client has disconnected
        _send(connection, count)


def _serve(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    header = _exactly(connection, _HEADER.size)
    if len(header) < _HEADER.size:
        return
    operation, count = _HEADER.unpack(header)
    if operation == _ECHO:
        while data := connection.recv(BUFFER_BYTES):
            connection.sendall(data)
        return
    to_send = count if operation in {_DOWN, _BOTH} else 0
    sender = threading.Thread(target=_send_until_closed, args=(connection, to_send))
    sender.start()
    missing = _receive(connection, count if operation in {_UP, _BOTH} else 0)
    sender.join()
    if operation in {_UP, _BOTH} and missing == 0:
        connection.sendall(_DONE)
    connection.shutdown(socket.SHUT_WR)
    connection.recv(1)  # until the client has disconnected too


def serve(count: int, workers: int) -> None:
    """Serve as the targets: `count` ports, each with worker processes that serve one connection after another."""
    listeners = [socket.create_server((LOOPBACK, 0), backlog=128) for _ in range(count)]
    for listener in listeners:
        for _ in range(workers):
            if os.fork() == 0:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        _serve(connection)
    print(*(listener.getsockname()[1] for listener in listeners), flush=True)  # noqa: T201 - read by `targets`
    sys.stdin.read()


@contextlib.contextmanager
def targets(count: int = 2, *, workers: int = WORKERS) -> Iterator[list[int]]:
    """Start targets; yield their ports."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.load", "serve", str(count), str(workers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    try:
        yield [int(word) for word in process.stdout.readline().split()]
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # all workers: they are in a process group of their own
        process.communicate()


def _open(port: int, operation: bytes, count: int) -> socket.socket:
    connection = socket.create_connection((LOOPBACK, port), PATIENCE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(_HEADER.pack(operation, count))
    return connection


@contextlib.contextmanager
def _raise_stalled(what: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise Stalled(f"{what}: nothing moved for {PATIENCE_S:.0f} s") from error
    except ConnectionError as error:
        raise Stalled(f"{what}: {error.strerror or error}") from error


def _finish(connection: socket.socket, missing: int, what: str) -> None:
    if missing:
        raise Stalled(f"{what}: {missing} bytes were lost")
    if connection.recv(1) != _DONE:
        raise Stalled(f"{what}: bytes were lost on the way up")


def download(port: int, count: int) -> float:
    """Receive a number of bytes from a target, and return the seconds it took.

    Raises:
        Stalled: The transfer did not complete.
    """
    began = time.perf_counter()
    with _raise_stalled("download"), _open(port, _DOWN, count) as connection:
        missing = _receive(connection, count)
        took_s = time.perf_counter() - began
    if missing:
        raise Stalled(f"download: {missing} bytes were lost")
    return took_s


def upload(port: int, count: int) -> float:
    """Send a number of bytes to a target until it confirms them all, and return the seconds it took.

    Raises:
        Stalled: The transfer did not complete.
    """
    began = time.perf_counter()
    with _raise_stalled("upload"), _open(port, _UP, count) as connection:
        _send(connection, count)
        _finish(connection, 0, "upload")
        return time.perf_counter() - began


def both_ways(port: int, count: int) -> float:
    """Send and receive a number of bytes each at once, and return the seconds until the last has arrived.

    Raises:
        Stalled: The transfer did not complete.
    """
    failed: list[OSError] = []

    def send() -> None:
        try:
            _send(connection, count)
        except OSError as error:
            failed.append(error)

    began = time.perf_counter()
    with _raise_stalled("both ways"), _open(port, _BOTH, count) as connection:
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        _finish(connection, _receive(connection, count), "both ways")
        took_s = time.perf_counter() - began
        sender.join(PATIENCE_S)
    if failed:
        raise Stalled(f"both ways: {failed[0]}")
    return took_s


def round_trips(port: int, count: int) -> RoundTrips:
    """Send 64 bytes and wait until they are echoed, repeatedly.

    Raises:
        Stalled: They were not echoed.
    """
    times = []
    with _raise_stalled("round trip"), _open(port, _ECHO, 0) as connection:
        for _ in range(count + count // 10):
            began = time.perf_counter()
            connection.sendall(PING)
            if len(_exactly(connection, len(PING))) < len(PING):
                raise Stalled("round trip: the connection ended")
            times.append(time.perf_counter() - began)
    times = sorted(times[count // 10 :])  # the first ones warm up
    return RoundTrips(p50=times[len(times) // 2] * 1e6, p99=times[int(len(times) * 0.99)] * 1e6)


@contextlib.contextmanager
def downloading(port: int) -> Iterator[None]:
    """Receive as fast as possible in a separate process, meanwhile."""
    command = [sys.executable, "-m", "benchmarks.load", "flood", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    try:
        if not process.stdout.readline():
            raise Stalled("bulk: nothing was received")
        yield
        if process.poll() is not None:
            raise Stalled("bulk: the transfer ended early")
    finally:
        process.kill()
        process.communicate()


def flood(port: int) -> None:
    """Receive without end; print a line once the first MiB has arrived."""
    with _open(port, _DOWN, _ENDLESS) as connection:
        _receive(connection, MIB)
        print("receiving", flush=True)  # noqa: T201 - read by `downloading`
        _receive(connection, _ENDLESS)


def connections(port: int, count: int, *, at_most_s: float = 5.0) -> float:
    """Open one connection after another, each until one byte is echoed; return how many a second.

    Raises:
        Stalled: One was not answered.
    """
    began = time.perf_counter()
    done = 0
    with _raise_stalled("connections"):
        while done < count and time.perf_counter() - began < at_most_s:
            with _open(port, _ECHO, 0) as connection:
                connection.sendall(b"?")
                if connection.recv(1) != b"?":
                    raise Stalled(f"connections: number {done + 1} was closed")
            done += 1
    return done / (time.perf_counter() - began)


def read_slowly(port: int, *, for_s: float, a_second: int = MIB) -> int:
    """Read at a limited rate from a target that sends all it can; return how many bytes arrived.

    Raises:
        Stalled: Nothing was received.
    """
    steps = 20
    received = 0
    began = time.perf_counter()
    with _raise_stalled("slow reader"), _open(port, _DOWN, _ENDLESS) as connection:
        for step in range(int(for_s * steps)):
            piece = a_second // steps
            received += piece - _receive(connection, piece)
            time.sleep(max(0.0, began + (step + 1) / steps - time.perf_counter()))
    if received == 0:
        raise Stalled("slow reader: nothing was received")
    return received


def main() -> None:
    """Run the targets, or the client of a bulk transfer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["serve", "flood"])
    parser.add_argument("numbers", type=int, nargs="+")
    arguments = parser.parse_args()
    role: Callable[..., None] = serve if arguments.role == "serve" else flood
    role(*arguments.numbers)


if __name__ == "__main__":
    main()
