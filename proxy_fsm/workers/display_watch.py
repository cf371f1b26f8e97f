"""The display watch: a connection to the X server, whose end shows within milliseconds that the server has exited."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from proxy_fsm.x11 import PAUSES_AFTER_HANG_UP_S, CancellableSocket, Cancelled, DisplayError, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["DisplayWatch"]

#: An X server that keeps accepting us and hanging up at once is of no use to a proxy either.
_SHORT_LIFE_S = 1.0
_MAX_SHORT_LIVES = 5


class DisplayWatch:
    """Keeps a connection to the X server, and calls back when the server is lost.

    The end of the connection alone does not prove that: a second connection is tried first. While that is
    under way `suspect` is true. Callbacks run on the watch's own thread, must be short, and must not wait
    for another thread that calls `close`; none runs after `close` has returned.

    Args:
        environ: As in `proxy_fsm.x11.open_display`.
        on_lost: Called once, with a human-readable sentence, when the X server is lost.
        timeout_s: How long one connection may take, in seconds.
        on_restored: Called whenever a suspicion proves wrong.

    Attributes:
        suspect: Whether the connection ended and it is not yet known why; stays true when the server is lost.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        on_lost: Callable[[str], None],
        *,
        timeout_s: float,
        on_restored: Callable[[], None] | None = None,
    ) -> None:
        self.suspect = False
        self._environ = dict(environ)
        self._on_lost = on_lost
        self._on_restored = on_restored
        self._timeout_s = timeout_s
        self._socket = CancellableSocket()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Connect; returns without a connection if `close` is called meanwhile.

        Raises:
            DisplayError: No X server accepts us.
            RuntimeError: It is open already.
        """
        if self._socket.sock is not None or self._thread is not None:
            raise RuntimeError("A display watch is opened once.")
        with suppress(Cancelled), self._socket.in_use():
            connect(self._environ, self._timeout_s, self._socket)

    def start(self) -> None:
        """Start watching; does nothing after `close`.

        Raises:
            RuntimeError: It is not open, or started already.
        """
        with self._socket.lock:
            if self._socket.cancelled:
                return
            if self._socket.sock is None or self._thread is not None:
                raise RuntimeError("A display watch is opened once and then started once.")
            thread = threading.Thread(target=self._run, name="proxy_fsm-display", daemon=True)
            thread.start()
            self._thread = thread

    def close(self) -> None:
        """Stop watching; callable from any thread, any number of times. The thread ends at once: see `join`."""
        self._socket.cancel()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until the watch's thread has ended.

        Args:
            timeout: In seconds; None waits without limit.

        Returns:
            Whether it has ended.
        """
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with suppress(Cancelled), self._socket.in_use():
                self._watch()
        finally:
            self._socket.close()

    def _watch(self) -> None:
        short_lives = 0
        while True:
            since = time.monotonic()
            self._read_until_end()
            short_lives = short_lives + 1 if time.monotonic() - since < _SHORT_LIFE_S else 0
            with self._socket.raise_if_cancelled():
                self.suspect = True
            try:
                self._reopen(short_lives)
            except DisplayError as error:
                with self._socket.raise_if_cancelled():
                    self._on_lost(error.detail)
                return
            with self._socket.raise_if_cancelled():
                self.suspect = False
                if self._on_restored is not None:
                    self._on_restored()

    def _read_until_end(self) -> None:
        sock = self._socket.sock
        buffer = bytearray(4096)
        with suppress(OSError):
            while sock is not None and sock.recv_into(buffer):
                pass

    def _reopen(self, short_lives: int) -> None:
        self._socket.close()
        if short_lives > _MAX_SHORT_LIVES:
            raise DisplayError("absent", "The X server accepts connections and closes them at once.")
        for pause_s in itertools.chain(PAUSES_AFTER_HANG_UP_S, itertools.repeat(PAUSES_AFTER_HANG_UP_S[-1])):
            try:
                connect(self._environ, self._timeout_s, self._socket)
            except DisplayError as error:
                if error.kind != "local":  # a local failure proves nothing: it is retried
                    raise
            else:
                return
            with self._socket.raise_if_cancelled():
                pass
            time.sleep(pause_s)
