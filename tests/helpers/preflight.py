"""What a preflight checks, faked: a backend and an X server."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from proxy_fsm.backends import Backend, BackendContext
from proxy_fsm.session import SessionInfo

from .wait import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from proxy_fsm.backends.base import ListenKind
    from proxy_fsm.evidence import Evidence

COOKIE = "0123456789abcdef0123456789abcdef"
SESSION = SessionInfo(name="name", cookie=COOKIE, graphics_port=4788, display=51)


class FakeBackend(Backend):
    """A backend that keeps what it was asked, and does something at one of its calls."""

    def __init__(self, at: str = "", action: Callable[[], object] = lambda: None, kind: ListenKind = "unix") -> None:
        self.listen_kind = kind
        self.contexts: list[BackendContext] = []
        self._at = at
        self._action = action

    def _asked(self, what: str) -> None:
        if what == self._at:
            self._action()

    def find_executable(self) -> str:
        self._asked("find_executable")
        return "/bin/true"

    def preflight(self, context: BackendContext) -> None:
        self.contexts.append(context)
        self._asked("preflight")

    def environment(self, context: BackendContext) -> Mapping[str, str | None]:
        self._asked("environment")
        return {"NX_DISPLAY": f"cookie={COOKIE}", "OVERRIDDEN": context.session.name, "UNWANTED": None}

    def command(self, context: BackendContext) -> Sequence[str]:
        self._asked("command")
        return [context.executable, context.listen_address]

    def ready(self, evidence: Evidence) -> bool:  # noqa: ARG002
        return True


CALLS = ["find_executable", "preflight", "environment", "command"]


class Display:
    """An X server that lets everybody in, once it may answer."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "x:0"
        self.name = str(self._path)
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.asked = threading.Event()
        self.clients: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.name)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.clients.append(client)
                with suppress(ConnectionError):
                    client.recv(12, socket.MSG_WAITALL)
                    self.asked.set()
                    self.may_answer.wait(WAIT_S)
                    client.sendall(struct.pack("<BxHHH", 1, 11, 0, 4) + bytes(16))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.may_answer.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(WAIT_S)
        self._listener.close()
        self._path.unlink()
        for client in self.clients:
            client.close()
