"""Reads OpenSSH's client configuration, including ``Include`` lines, which paramiko ignores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import paramiko

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["read_ssh_config"]

_SYSTEM = Path("/etc/ssh/ssh_config")
_USER = Path("~/.ssh/config")
_MAX_DEPTH = 16  # OpenSSH's own limit
_LINE = re.compile(r"\s*(?P<keyword>[A-Za-z]+)(\s*=\s*|\s+)(?P<value>.*?)\s*")
_WORD = re.compile(r'"([^"]*)"|(\S+)')
_EVERYWHERE = "Host *"


def read_ssh_config() -> paramiko.SSHConfig:
    """Read the user's file and the system's; either may be missing.

    If a file that is included inside a ``Host`` or ``Match`` block has such lines of its own, they apply to every host
    that they name.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is not text.
        paramiko.ConfigParseError: A line cannot be parsed.

    Source: ssh_config(5): the first value wins, and the user's file comes first.
    """
    config = paramiko.SSHConfig()
    for path, folder in ((_USER.expanduser(), Path("~/.ssh").expanduser()), (_SYSTEM, _SYSTEM.parent)):
        if path.is_file():
            config.parse([f"{line}\n" for line in (_EVERYWHERE, *_lines(path, folder, 0))])
    return config


def _lines(path: Path, folder: Path, depth: int) -> Iterator[str]:
    block = _EVERYWHERE
    for line in path.read_text(encoding="utf-8").splitlines():
        found = _LINE.fullmatch(line)
        keyword = found["keyword"].lower() if found else ""
        if keyword in {"host", "match"}:
            block = line
        if found is None or keyword != "include":
            yield line
            continue
        if depth < _MAX_DEPTH:
            for quoted, plain in _WORD.findall(found["value"]):
                yield from _included(quoted or plain, folder, depth)
        yield block


def _included(pattern: str, folder: Path, depth: int) -> Iterator[str]:
    full_pattern = folder / Path(pattern).expanduser()
    for path in sorted(Path(full_pattern.anchor).glob(str(full_pattern.relative_to(full_pattern.anchor)))):
        if path.is_file():
            yield from _lines(path, folder, depth + 1)
