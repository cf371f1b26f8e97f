"""Both ends of a connection."""

from __future__ import annotations

import socket
import struct
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest

from .wait import WAIT_S

if TYPE_CHECKING:
    import paramiko

LOOPBACK = "127.0.0.1"


def connect_local(kind: str, address: str) -> socket.socket:
    """Connect to a tunnel as the proxy does: to the path of a unix socket, or to ``host:port``."""
    host, _, port = address.rpartition(":")
    local = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
    try:
        local.settimeout(WAIT_S)
        local.connect(address if kind == "unix" else (host, int(port)))
    except BaseException:
        local.close()
        raise
    return local


def reset(sock: socket.socket) -> None:
    """Close a TCP socket so that its peer sees a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def read_all(source: socket.socket | paramiko.Channel) -> bytes:
    return b"".join(iter(lambda: source.recv(1 << 20), b""))


def same(got: bytes, sent: bytes) -> None:
    """Compare; name the place where they differ, and not megabytes."""
    if got == sent:
        return
    at = next((i for i, (one, other) in enumerate(zip(got, sent, strict=False)) if one != other), len(got))
    digests = sha256(got).hexdigest()[:8], sha256(sent).hexdigest()[:8]
    pytest.fail(f"{len(got)} bytes of {len(sent)} came, the first wrong one at {at}, digests {digests}")
