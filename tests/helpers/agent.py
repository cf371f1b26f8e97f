"""What stands in for the agent: it listens on a graphics port."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Self

from .sockets import LOOPBACK
from .wait import WAIT_S, eventually


class Agent:
    """A listener on loopback; the test accepts the connections, or threads of its own serve them."""

    def __init__(
        self, *, listening: bool = True, serving: bool = False, greeting: bytes = b"", holding: bool = False
    ) -> None:
        """Bind the port.

        Args:
            listening: False refuses connections until `listen` is called.
            serving: Accept each connection and read it to its end; else the test calls `accept`.
            greeting: What is sent on each connection that is served.
            holding: Keep a connection open when its peer has ended it, until `disconnect` or the end.
        """
        self.listener = socket.socket()
        self.listener.bind((LOOPBACK, 0))
        self.port: int = self.listener.getsockname()[1]
        self.connections: list[socket.socket] = []
        self.received = bytearray()
        self._greeting = greeting
        self._holding = holding
        self._server = threading.Thread(target=self._serve, name="agent", daemon=True)
        self._readers: list[threading.Thread] = []
        if listening:
            self.listen()
        if serving:
            self._server.start()
        else:
            self.listener.settimeout(WAIT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_listening()
        if self._server.is_alive():
            self._server.join(WAIT_S)
        self.disconnect()
        for reader in self._readers:
            reader.join(WAIT_S)
        for connection in self.connections:
            connection.close()

    def listen(self) -> None:
        self.listener.listen(128)

    @property
    def serves(self) -> bool:
        """Whether a thread serves a connection."""
        return bool(self._readers)

    def accept(self) -> socket.socket:
        """Accept the next connection, as soon as there is one."""
        connection, _ = self.listener.accept()
        connection.settimeout(WAIT_S)
        self.connections.append(connection)
        return connection

    def send(self, data: bytes) -> None:
        """Send bytes on the newest connection, as soon as there is one."""
        eventually(lambda: self.connections, what="a connection at the agent")
        self.connections[-1].sendall(data)

    def disconnect(self) -> None:
        """End all connections, as an agent that closes its session."""
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def stop_listening(self) -> None:
        """Refuse connections from now on."""
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.connections.append(connection)  # first: what the reader sends may lead to `disconnect`
                reader = threading.Thread(target=self._read, args=(connection,), name="agent", daemon=True)
                reader.start()
                self._readers.append(reader)

    def _read(self, connection: socket.socket) -> None:
        with suppress(OSError):
            connection.sendall(self._greeting)
            while data := connection.recv(1 << 16):
                self.received += data
        if not self._holding:
            connection.close()


#: Bound, not listening, and kept: no other program gets the port, and whoever connects is refused.
_nobody = socket.socket()
_nobody.bind((LOOPBACK, 0))


def dead_port() -> int:
    """Return a port of 127.0.0.1 where nothing listens."""
    port: int = _nobody.getsockname()[1]
    return port
