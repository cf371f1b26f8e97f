"""Helpers to inspect processes, and to end the harness's own."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import signal
    from collections.abc import Iterable

PROGRAMS = (
    *("sshd", "x2gostartagent", "x2golistsessions", "nxagent", "nxproxy"),
    *("Xvfb", "xauth", "xterm", "xwd", "xwininfo", "useradd", "usermod", "ip", "mount"),
)
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ESTABLISHED, LISTENING = "01", "0A"  # states of a socket in /proc/net/tcp


def program(name: str) -> str | None:
    """Find `name` also in the sbin directories, which not every PATH contains."""
    return shutil.which(name, path=SYSTEM_PATH)


def missing_programs() -> list[str]:
    """List the programs that real sessions need and this machine lacks; "root" stands for not being root."""
    missing = [name for name in PROGRAMS if program(name) is None]
    return missing if os.geteuid() == 0 else [*missing, "root"]


def alive(pid: int) -> bool:
    """Return whether process `pid` runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):
        return False


def program_name(pid: int) -> str:
    """Return the name of the program that process `pid` runs, "" if it has exited."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def command_line(pid: int) -> str:
    """Return the command line of process `pid`, or the title it gave itself; "" if it has exited."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" "))
    except (FileNotFoundError, ProcessLookupError):
        return ""


def command_lines() -> dict[int, bytes]:
    """Return the argument vectors of all processes."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found[int(path.parent.name)] = path.read_bytes()
    return found


def descendants(pid: int) -> list[int]:
    """List the children of `pid`, their children and so on, parents first."""
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in map(int, listing.read_text().split()):
                found += [child, *descendants(child)]
    return found


def processes_of(uid: int) -> list[int]:
    """List the processes that belong to user `uid`, without zombies."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if directory.stat().st_uid == uid and alive(int(directory.name)):
                found.append(int(directory.name))
    return found


def send_signal(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to each of `pids`; those that have exited are ignored."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _sockets() -> list[list[str]]:
    lines: list[str] = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            lines += Path("/proc/net", name).read_text().splitlines()[1:]
    return [line.split() for line in lines]


def is_listening(port: int) -> bool:
    """Return whether something on this machine listens on TCP `port`, without connecting to it."""
    return any(row[3] == LISTENING and int(row[1].rpartition(":")[2], 16) == port for row in _sockets())


def established(port: int) -> int:
    """Count the local ends of connections to, or from, TCP `port`."""
    ends = [row[1:3] for row in _sockets() if row[3] == ESTABLISHED]
    return sum(any(int(end.rpartition(":")[2], 16) == port for end in both) for both in ends)


def holders(local_port: int, remote_port: int, pids: Iterable[int]) -> list[int]:
    """List those of `pids` that hold the TCP connection from `local_port` to `remote_port`."""
    inodes = {
        f"socket:[{row[9]}]"
        for row in _sockets()
        if [int(end.rpartition(":")[2], 16) for end in row[1:3]] == [local_port, remote_port]
    }
    return [pid for pid in pids if inodes & _open_files(pid)]


def _open_files(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            found.add(str(link.readlink()))
    return found
