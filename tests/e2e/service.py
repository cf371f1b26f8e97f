"""A program on the server's side, and viewers of it: what is forwarded if there is no session."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

from .x2go import LOOPBACK

if TYPE_CHECKING:
    from typing import Self

PAYLOAD_BYTES = 1_000_000
CLIENT = f"""
import socket, sys
unix = len(sys.argv) == 2
connection = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
connection.connect(sys.argv[1] if unix else (sys.argv[1], int(sys.argv[2])))
connection.sendall(bytes({PAYLOAD_BYTES}))
left = {PAYLOAD_BYTES}
while left:
    left -= len(connection.recv(left))
print("all is back", flush=True)
sys.exit(int(connection.recv(1) or b"0"))
"""
FLOODS = 8
FLOOD = f"""
import signal, socket, sys, threading
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
connections = [socket.create_connection((sys.argv[1], int(sys.argv[2]))) for _ in range({FLOODS})]
signal.sigwait([signal.SIGUSR1])
def flood(connection):
    while True:
        connection.sendall(bytes(1 << 16))
for each in connections:
    threading.Thread(target=flood, args=[each]).start()
"""


class Service:
    """A program on the server's side, on a loopback port: it echoes what it receives, or discards it."""

    def __init__(self, *, echo: bool = True) -> None:
        self._echo = echo
        self._listener = socket.create_server((LOOPBACK, 0))
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            self._threads.append(threading.Thread(target=self._serve, args=[connection], daemon=True))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                if self._echo:
                    connection.sendall(data)

    def send(self, data: bytes) -> None:
        """Send data on the first connection."""
        self._connections[0].sendall(data)

    def hang_up(self) -> None:
        """Close all connections."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        self.hang_up()
        for thread in self._threads:
            thread.join()
