"""A thread whose view of the machine is another one: its own mounts, or its own network."""

from __future__ import annotations

import ctypes
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MOUNTS, NETWORK = 0x20000, 0x40000000  # CLONE_NEWNS, CLONE_NEWNET of sched.h
_libc = ctypes.CDLL(None, use_errno=True)


def is_allowed() -> bool:
    """Tell whether this kernel, or this sandbox, lets us have mounts and a network of our own."""
    try:
        apart(MOUNTS | NETWORK, lambda: None, [["mount", "--make-rprivate", "/"]])
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def apart(kind: int, function: Callable[[], object], commands: Sequence[Sequence[str]] = ()) -> None:
    """Call `function` on a thread with mounts, or a network, of its own; what it starts sees them too.

    Args:
        kind: `MOUNTS`, `NETWORK` or both; in a new network not even the loopback is up.
        function: what to call.
        commands: run before that, in the same place.

    Raises:
        OSError: this needs root, and a kernel or a sandbox that allows it.
    """

    def work() -> None:
        if _libc.unshare(kind) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        for command in commands:
            subprocess.run(command, check=True, capture_output=True)
        function()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()
