"""A thread in its own namespaces: mounts, or a network."""

from __future__ import annotations

import ctypes
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self, TypeVar

    _T = TypeVar("_T")

MOUNTS, NETWORK = 0x20000, 0x40000000  # CLONE_NEWNS, CLONE_NEWNET of sched.h
_libc = ctypes.CDLL(None, use_errno=True)  # os.unshare, which Python has from 3.12 on


def is_allowed() -> bool:
    """Return whether this kernel, or this sandbox, allows us mount and network namespaces of our own."""
    try:
        in_namespace(MOUNTS | NETWORK, [["mount", "--make-rprivate", "/"]], lambda: None)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def in_namespace(kind: int, commands: Sequence[Sequence[str]], function: Callable[[], object]) -> None:
    """Call `function` on a thread in a namespace of its own, which the processes it starts inherit.

    Args:
        kind: `MOUNTS`, `NETWORK` or both; in a new network not even the loopback is up.
        commands: run first, in the namespace.
        function: called afterwards.

    Raises:
        OSError: not root, or not allowed by the kernel or the sandbox.
        CalledProcessError: a command failed.
    """

    def work() -> None:
        _unshare(kind)
        for command in commands:
            subprocess.run(command, check=True, capture_output=True)
        function()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def _unshare(kind: int) -> None:
    if _libc.unshare(kind) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Network:
    """A network of its own, which has only a loopback; packets are dropped while that is down.

    A thread in it makes what belongs to it. Unlike a queueing discipline that drops, which the kernel treats as
    congestion of this machine, a link that is down leaves TCP to its retransmission.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        self.call(lambda: _unshare(NETWORK))
        self.set_loopback(up=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def call(self, function: Callable[[], _T]) -> _T:
        """Call a function in this network; the sockets that it makes belong there."""
        return self._pool.submit(function).result()

    def set_loopback(self, *, up: bool) -> None:
        """Let packets through, or drop them."""
        command = ["ip", "link", "set", "lo", "up" if up else "down"]
        self.call(lambda: subprocess.run(command, check=True, capture_output=True))
