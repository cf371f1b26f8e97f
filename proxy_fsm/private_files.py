"""Private files and directories: owned by this user, not links, and not accessible to any other user."""

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
#: The longest path of a unix socket: ``sun_path`` holds 108 bytes including the terminating NUL.
MAX_SOCKET_PATH_BYTES = 107


def make_private_directory(path: Path) -> None:
    """Make a directory of mode 0700; an existing one must be ours and not a link, and gets that mode.

    Raises:
        OSError: That is not possible.
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
    """Open a file of mode 0600 for appending; an existing one must be ours and a plain file, and gets that mode.

    Raises:
        OSError: That is not possible.
    """
    # O_NONBLOCK: opening a FIFO would wait for a reader.
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    info = os.fstat(file)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
        os.close(file)
        raise PermissionError(f"{path} is no plain file of ours")
    os.fchmod(file, 0o600)
    return file


def write_private(path: Path, text: str) -> None:
    """Write a new file that only its owner can read.

    Raises:
        OSError: It cannot be written, or the path exists already.
    """
    with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)


def make_socket_directory(environ: Mapping[str, str]) -> Path:
    """Make a new directory of mode 0700 whose path leaves room for `SOCKET_NAME`.

    Args:
        environ: Where XDG_RUNTIME_DIR is looked up; the temporary directory is the second choice, /tmp the last.

    Raises:
        OSError: None of them can be used.
    """
    for parent in (environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):  # noqa: S108 - mkdtemp is safe there
        if not parent or not Path(parent).is_absolute():  # the proxy has another working directory
            continue
        try:
            directory = Path(tempfile.mkdtemp(prefix="proxy_fsm-", dir=parent))
        except OSError:
            continue
        if len(os.fsencode(directory / SOCKET_NAME)) <= MAX_SOCKET_PATH_BYTES:
            return directory
        directory.rmdir()
    raise OSError("no temporary directory is writable and has a path short enough for a unix socket")
