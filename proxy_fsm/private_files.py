"""What nobody else may read: files and directories that are ours, are no links, and are open to nobody else."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "MAX_SOCKET_PATH_BYTES",
    "SOCKET_NAME",
    "make_private_directory",
    "make_socket_directory",
    "open_private",
    "write_private",
]

SOCKET_NAME = "proxy.sock"
#: The longest path of a unix socket: ``sun_path`` holds 108 bytes with its end mark.
MAX_SOCKET_PATH_BYTES = 107


def make_private_directory(path: Path) -> None:
    """Make a directory, or make sure that the one that is there is ours, no link, and open to nobody else.

    Raises:
        OSError: It cannot be made so.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode):
        raise NotADirectoryError(f"{path} is no directory, or a link to one")
    if info.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user")
    path.chmod(0o700)


def open_private(path: Path) -> int:
    """Open a file for appending that is ours, no link, and readable by nobody else; it is made if it is missing.

    Raises:
        OSError: It cannot be opened so.
    """
    # O_NONBLOCK: a FIFO would wait for its reader.
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    info = os.fstat(file)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
        os.close(file)
        raise PermissionError(f"{path} is no plain file of ours")
    os.fchmod(file, 0o600)
    return file


def write_private(path: Path, text: str) -> None:
    """Write a new file that nobody else can read.

    Raises:
        OSError: It cannot be written, or something is there already.
    """
    with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)


def make_socket_directory(environ: Mapping[str, str]) -> Path:
    """Make a new directory of mode 0700 whose path leaves room for `SOCKET_NAME`.

    Args:
        environ: Where XDG_RUNTIME_DIR is looked up; a temporary directory is the second choice, /tmp the last.

    Raises:
        OSError: There is no place for it.
    """
    for parent in (environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):  # noqa: S108 - mkdtemp is safe there
        if not parent or not Path(parent).is_absolute():  # the proxy's working directory is another one
            continue
        try:
            directory = Path(tempfile.mkdtemp(prefix="proxy_fsm-", dir=parent))
        except OSError:
            continue
        if len(os.fsencode(directory / SOCKET_NAME)) <= MAX_SOCKET_PATH_BYTES:
            return directory
        directory.rmdir()
    raise OSError("no temporary directory is writable and has a path short enough for a unix socket")
