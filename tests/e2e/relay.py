"""A hop on the way to the SSH server that can cut the connection."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING

from .sshd import LOOPBACK

if TYPE_CHECKING:
    from typing import Self

READ_BYTES = 1 << 16
RESET = struct.pack("ii", 1, 0)  # for SO_LINGER: closing then sends a reset


class Relay:
    """Relays one TCP connection to a port of this machine, on one thread, which alone uses its sockets."""

    def __init__(self, port: int) -> None:
        """Listen; `port` is the target."""
        self._to = port
        self._listener = socket.create_server((LOOPBACK, 0))
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def _run(self) -> None:
        if self._wake in select.select([self._listener, self._wake], [], [])[0]:
            return
        near, _ = self._listener.accept()
        with near, socket.create_connection((LOOPBACK, self._to)) as far:
            while True:
                ready = select.select([near, far, self._wake], [], [])[0]
                if self._wake in ready:
                    for end in (near, far):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    return
                for source, to in ((near, far), (far, near)):
                    if source in ready and not self._relayed(source, to):
                        return

    @staticmethod
    def _relayed(source: socket.socket, to: socket.socket) -> bool:
        with contextlib.suppress(OSError):
            if data := source.recv(READ_BYTES):
                to.sendall(data)
                return True
        return False

    def reset(self) -> None:
        """Cut the connection: both sides see a reset."""
        self._waker.sendall(b"!")
        self._thread.join()

    def __exit__(self, *_: object) -> None:
        self.reset()
        for each in (self._listener, self._wake, self._waker):
            each.close()
