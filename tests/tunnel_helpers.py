"""What the tests of ssh, forwarder and monitor have in common."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from proxy_fsm.evidence import Observation
from proxy_fsm.ssh import fast_transport

from .helpers.sockets import LOOPBACK
from .helpers.wait import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable

    import paramiko

    from .e2e.sshd import SshServer

__all__ = [
    "Inbox",
    "Task",
    "connect_fast",
]

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
