"""What the tests of ssh, forwarder and monitor have in common."""

from __future__ import annotations

import gc
import os
import socket
import struct
import threading
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import pytest

from proxy_fsm.evidence import Observation
from proxy_fsm.ssh import fast_transport

from .e2e.procs import missing_programs, program
from .helpers.wait import WAIT_S, eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    import paramiko

    from .e2e.sshd import SshServer

__all__ = [
    "LOOPBACK",
    "Agent",
    "Inbox",
    "Task",
    "connect_fast",
    "connect_local",
    "dead_port",
    "descriptors",
    "needs_sshd",
    "nothing_left_open",
    "own_threads",
    "read_all",
    "reset",
    "same",
]

LOOPBACK = "127.0.0.1"
#: How long a login may take, with whatever else is going on, seconds.
LOGIN_S = 120.0

_T = TypeVar("_T")
_Seen = TypeVar("_Seen", bound=Observation)


class Inbox:
    """Takes observations, and lets a test wait for them."""

    def __init__(self) -> None:
        self.seen: list[Observation] = []
        self._changed = threading.Condition()  # its lock is reentrant

    def post(self, observation: Observation) -> None:
        with self._changed:
            self.seen.append(observation)
            self._changed.notify_all()

    def all(self, kind: type[_Seen]) -> list[_Seen]:
        with self._changed:
            return [each for each in self.seen if isinstance(each, kind)]

    def kinds(self) -> list[type[Observation]]:
        with self._changed:
            return [type(each) for each in self.seen]

    def wait(self, kind: type[_Seen], count: int = 1, timeout_s: float = WAIT_S) -> _Seen:
        """Return the first (or the count-th) of a kind as soon as it is there."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.all(kind)) >= count, timeout_s), (kind, self.seen)
            return self.all(kind)[count - 1]

    def stays_without(self, kind: type[Observation], for_s: float) -> bool:
        """Tell whether none of a kind comes for some time; the clock runs the full time only if none does."""
        with self._changed:
            return not self._changed.wait_for(lambda: self.all(kind), for_s)


class Task(Generic[_T]):
    """A function on a thread of its own; `result` returns what it returned, or raises what it raised."""

    def __init__(self, function: Callable[..., _T], *args: Any) -> None:
        self._outcome: list[_T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, args), name="test-task", daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., _T], args: tuple[Any, ...]) -> None:
        try:
            self._outcome.append(function(*args))
        except BaseException as error:  # noqa: BLE001 - it is raised again, where it is asked for
            self._error = error

    def result(self, timeout_s: float = WAIT_S) -> _T:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "it is still at work"
        if self._error is not None:
            raise self._error
        return self._outcome[0]

    @property
    def running(self) -> bool:
        return self._thread.is_alive()


class Agent:
    """What listens on the graphics port."""

    def __init__(self, *, listening: bool = True) -> None:
        self.listener = socket.socket()
        self.listener.settimeout(WAIT_S)
        self.listener.bind((LOOPBACK, 0))
        self.port: int = self.listener.getsockname()[1]
        self._accepted: list[socket.socket] = []
        if listening:
            self.listen()

    def listen(self) -> None:
        self.listener.listen(128)

    def accept(self) -> socket.socket:
        accepted, _ = self.listener.accept()
        accepted.settimeout(WAIT_S)
        self._accepted.append(accepted)
        return accepted

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self.listener, *self._accepted):
            sock.close()


def connect_local(kind: str, address: str) -> socket.socket:
    """Come to a tunnel as the proxy does: to the path of a unix socket, or to ``host:port``."""
    host, _, port = address.rpartition(":")
    local = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
    try:
        local.settimeout(WAIT_S)
        local.connect(address if kind == "unix" else (host, int(port)))
    except BaseException:
        local.close()
        raise
    return local


def connect_fast(sshd: SshServer, port: int | None = None) -> paramiko.Transport:
    """Log in over a `fast_transport`; through another port where one is given, as that of a slow line."""
    transport = fast_transport(socket.create_connection((LOOPBACK, port or sshd.port)))
    try:
        transport.start_client(timeout=LOGIN_S)
        assert transport.get_remote_server_key() == sshd.host_key
        transport.auth_publickey("root", sshd.client_key)
    except BaseException:
        transport.close()
        raise
    return transport


def dead_port() -> int:
    """Return a port of 127.0.0.1 where nothing listens."""
    with Agent(listening=False) as nobody:
        return nobody.port


def reset(sock: socket.socket) -> None:
    """Close a TCP socket so that its peer sees a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(1 << 20), b""))


def same(got: bytes, sent: bytes) -> None:
    """Compare; name the place where they differ, and not megabytes."""
    if got == sent:
        return
    at = next((i for i, (one, other) in enumerate(zip(got, sent, strict=False)) if one != other), len(got))
    digests = sha256(got).hexdigest()[:8], sha256(sent).hexdigest()[:8]
    pytest.fail(f"{len(got)} bytes of {len(sent)} came, the first wrong one at {at}, digests {digests}")


def own_threads(*names: str) -> list[threading.Thread]:
    """List the package's threads that are alive, or those of some names.

    A thread whose start was interrupted stays in CPython's list for ever, though it never ran.
    """
    return [
        thread
        for thread in threading.enumerate()
        if thread.is_alive() and (thread.name in names if names else thread.name.startswith("proxy_fsm-"))
    ]


def descriptors() -> set[str]:
    """Name what this process holds open, where the system tells it."""
    found = set()
    place = Path("/proc/self/fd")
    for descriptor in place.iterdir() if place.is_dir() else ():
        with suppress(OSError):
            found.add(f"{descriptor.name} {descriptor.readlink()}")
    return {name for name in found if "/proc/" not in name}


def nothing_left_open(before: set[str]) -> None:
    """Make sure that whatever was opened since is closed, or will be soon.

    What a thread of an earlier test closes meanwhile is no matter.
    """
    gc.collect()
    with suppress(TimeoutError):
        eventually(lambda: descriptors() <= before)
    left = descriptors() - before
    assert not left, f"left open: {left}"


def needs_sshd() -> None:
    """Skip where OpenSSH's server cannot be run, or fail where it was promised."""
    missing = [name for name in ("sshd", "root") if name in missing_programs() and program(name) is None]
    if not missing:
        return
    message = f"missing for tests against OpenSSH: {', '.join(missing)}"
    if os.environ.get("PROXY_FSM_REQUIRE_REAL") == "1":
        pytest.fail(f"{message} (PROXY_FSM_REQUIRE_REAL is 1)", pytrace=False)
    pytest.skip(message)
