"""X servers: a fake one that does with each connection what it is told, and Xvfb."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import shutil
import socket
import struct
import subprocess
import threading
from typing import TYPE_CHECKING, Self

import pytest

from .real import skip_or_fail
from .wait import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MAGIC = b"MIT-MAGIC-COOKIE-1"
COOKIE = bytes(range(16))
HOSTNAME = socket.gethostname().encode()
LOCAL, INTERNET, INTERNET6, WILD = 256, 0, 6, 0xFFFF


def entry(family: int, address: bytes, number: bytes, name: bytes = MAGIC, data: bytes = COOKIE) -> bytes:
    """One entry of an Xauthority file."""
    fields = (address, number, name, data)
    return struct.pack(">H", family) + b"".join(struct.pack(">H", len(part)) + part for part in fields)


def refused(reason: bytes) -> bytes:
    padded = reason + bytes(-len(reason) % 4)
    return struct.pack("<BBHHH", 0, len(reason), 11, 0, len(padded) // 4) + padded


def authenticate(reason: bytes) -> bytes:
    padded = reason + bytes(-len(reason) % 4)
    return struct.pack("<B5xH", 2, len(padded) // 4) + padded


ACCEPTED = struct.pack("<BxHHH", 1, 11, 0, 4) + bytes(16)


class Client:
    """One connection to the `FakeServer`, after its set-up was read."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        name_bytes, data_bytes = struct.unpack("<cxHHHHxx", self._read(12))[3:]
        self.name = self._read(name_bytes + -name_bytes % 4)[:name_bytes]
        self.data = self._read(data_bytes + -data_bytes % 4)[:data_bytes]

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                raise ConnectionResetError("it hung up before its set-up was through")
            data += more
        return data


class FakeServer:
    """An X server that does with each connection what it is told; the clients it holds are in `clients`."""

    def __init__(self, listener: socket.socket, *answers: Callable[[FakeServer, Client], None]) -> None:
        self.listener = listener
        self.answers = list(answers)
        self.clients: queue.SimpleQueue[Client] = queue.SimpleQueue()
        self.kept: list[Client] = []
        self.thread = threading.Thread(target=self.serve, name="fake-x", daemon=True)

    def serve(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            try:
                client = Client(sock)
            except OSError:
                sock.close()
                continue
            self.kept.append(client)
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            with contextlib.suppress(OSError):  # the client may have left
                answer(self, client)
            self.clients.put(client)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.thread.join(WAIT_S)
        for client in self.kept:
            client.sock.close()


def sends(answer: bytes, *, hang_up: bool = False) -> Callable[[FakeServer, Client], None]:
    def act(_: FakeServer, client: Client) -> None:
        if answer:
            client.sock.sendall(answer)
        if hang_up:
            client.sock.shutdown(socket.SHUT_RDWR)

    return act


def accept(server: FakeServer, client: Client) -> None:
    sends(ACCEPTED)(server, client)


silent = sends(b"")
hang_up = sends(b"", hang_up=True)


def listener_at(path: Path | str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def environ_in(directory: Path) -> dict[str, str]:
    """An environment whose DISPLAY is a socket in this directory."""
    return {"DISPLAY": f"{directory}/server:7", "XAUTHORITY": f"{directory}/authority"}


def serving(place: dict[str, str], *answers: Callable[[FakeServer, Client], None]) -> FakeServer:
    return FakeServer(listener_at(place["DISPLAY"]), *answers)


def short_of(number: int, note: Callable[[], None] = lambda: None) -> Callable[..., None]:
    """What fails for want of something."""

    def fail(*_: object, **__: object) -> None:
        note()
        raise OSError(number, os.strerror(number))

    return fail


class RealServer:
    """An Xvfb with a cookie, on a display number of its own choice."""

    def __init__(self, directory: Path) -> None:
        self.authority = directory / "authority"
        self.authority.write_bytes(entry(LOCAL, HOSTNAME, b""))
        reader, writer = os.pipe()
        command = [xvfb(), "-displayfd", str(writer), "-auth", str(self.authority)]
        command += ["-screen", "0", "64x64x8", "-nolisten", "tcp"]
        with (directory / "xvfb.log").open("wb") as log:
            self.process = subprocess.Popen(command, pass_fds=[writer], stdout=log, stderr=log)
        os.close(writer)
        with os.fdopen(reader, "rb") as ready:
            readable, _, _ = select.select([ready], [], [], WAIT_S)
            line = ready.readline() if readable else b""
        if not line:
            self.kill()
            pytest.fail(f"Xvfb did not start: {(directory / 'xvfb.log').read_text()}")
        self.environ = {"DISPLAY": f":{int(line)}", "XAUTHORITY": str(self.authority)}

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT_S)


def xvfb() -> str:
    path = shutil.which("Xvfb")
    if path is None:
        skip_or_fail(["Xvfb"])
    return path
