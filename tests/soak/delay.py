"""A slow line: whatever comes in leaves after a while, in both directions."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from queue import SimpleQueue
from typing import Self

from tests.tunnel_helpers import LOOPBACK

__all__ = ["SlowLine"]


class SlowLine:
    """Listens, and carries each connection to a port of this machine; bytes take their time, and none is lost.

    Args:
        port: Where it leads.
        one_way_s: How long a byte is under way, in seconds; a round trip takes twice as long.
    """

    def __init__(self, port: int, one_way_s: float) -> None:
        self._target = port
        self._one_way_s = one_way_s
        self._listener = socket.create_server((LOOPBACK, 0))
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.port: int = self._listener.getsockname()[1]
        self._spawn(self._accept)

    def _spawn(self, function: object, *args: object) -> None:
        thread = threading.Thread(target=function, args=args, name="test-line", daemon=True)  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    def _accept(self) -> None:
        with suppress(OSError):  # it is closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection((LOOPBACK, self._target))
                self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    under_way: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
                    self._spawn(self._take, source, under_way)
                    self._spawn(self._give, sink, under_way)

    def _take(self, source: socket.socket, under_way: SimpleQueue[tuple[float, bytes]]) -> None:
        data = b"-"
        while data:
            try:
                data = source.recv(1 << 16)
            except OSError:
                data = b""
            under_way.put((time.monotonic() + self._one_way_s, data))

    @staticmethod
    def _give(sink: socket.socket, under_way: SimpleQueue[tuple[float, bytes]]) -> None:
        with suppress(OSError):  # the other end has gone
            while True:
                due, data = under_way.get()
                time.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listener, *self._ends):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(5)
