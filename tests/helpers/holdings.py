"""What this process holds, and that all of it is released."""

from __future__ import annotations

import gc
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .wait import WAIT_S, WaitTimeoutError, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Collection


def descriptors() -> set[str]:
    """Return the number and the target of each open descriptor, where the system has a list of them."""
    found = set()
    place = Path("/proc/self/fd")
    for descriptor in place.iterdir() if place.is_dir() else ():
        with suppress(OSError):  # that of the listing itself
            found.add(f"{descriptor.name} {descriptor.readlink()}")
    return found


def children() -> set[int]:
    """Return the process ids of this process's children, zombies included."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(entry.name))
    return found


def own_threads(*names: str) -> list[threading.Thread]:
    """Return the package's threads that are alive, or those of some names.

    A thread whose start was interrupted stays in CPython's list for ever, though it never ran.
    """
    return [
        thread
        for thread in threading.enumerate()
        if thread.is_alive() and (thread.name in names if names else thread.name.startswith("proxy_fsm-"))
    ]


def all_released(held: Callable[[], Collection[object]], timeout_s: float = WAIT_S) -> None:
    """Wait until nothing is held any more, or fail and name what still is."""
    left: list[object] = []

    def released() -> bool:
        left[:] = held()
        return not left

    try:
        eventually(released, timeout_s, interval_s=0.02)
    except WaitTimeoutError:
        raise AssertionError(f"not released: {left}") from None


def threads_ended() -> None:
    """Make sure that the package's threads have ended, or will soon."""
    all_released(own_threads)


def nothing_left_open(before: set[str]) -> None:
    """Make sure that each descriptor opened since is closed, or will be soon.

    What a thread of an earlier test closes meanwhile does not matter.
    """
    gc.collect()
    all_released(lambda: descriptors() - before)
