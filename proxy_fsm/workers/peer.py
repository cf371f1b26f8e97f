"""The other end of a local connection: its user (any user here can reach a TCP listener), and what it has written."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["foreign_user_of", "written_bytes"]

#: Where Linux lists the owners of this machine's TCP sockets (proc(5)).
_TCP_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))

#: sock_diag(7): its netlink family, its message, the flag of a request, an error, and the cookie that means none.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_NO_COOKIE = b"\xff" * 8
#: netlink(7): length, type, flags, sequence number, port of the sender.
_HEADER = struct.Struct("=IHHII")
#: What precedes the socket's ends in a request, and in the answer: family, protocol, extensions and padding, states;
#: family, state, timer, retransmissions.
_REQUEST = struct.Struct("=BBHI")
_ANSWER = struct.Struct("=BBBB")
#: Two ports, two addresses of 16 bytes, an interface, a cookie.
_ENDS = struct.Struct("!HH16s16sI8s")
#: What follows them in the answer: expiry, two queues, user, inode.
_OWNER = struct.Struct("=IIIII")
#: Then attributes follow, each after its length and kind; one of them, if requested, is a tcp_info.
_ATTRIBUTE = struct.Struct("=HH")
_INET_DIAG_INFO = 2
#: Another is present if a layer between program and TCP (MPTCP, TLS) buffers data of its own.
_INET_DIAG_ULP_INFO = 19
#: In a tcp_info (linux/tcp.h, Linux 4.19): the bytes not sent yet, those sent, and those of them sent again.
_NOT_SENT = struct.Struct("=144xI")
_SENT = struct.Struct("=200xQQ")
#: tcp(7): the states of an end that may still write.
_WRITING = {1, 8}  # ESTABLISHED, CLOSE_WAIT

_End = tuple[str, int]


class _Owner(NamedTuple):
    """The user who owns a socket, and its inode: 0 if no process holds it any more."""

    uid: int
    inode: int


def foreign_user_of(local: socket.socket) -> str | None:
    """Return the user at the other end of a local socket if it is not our own, else None.

    None also if the system does not tell (outside Linux): a unix socket is then protected by its directory, and a TCP
    port is open to all users of the machine.

    Raises:
        OSError: It cannot be determined, for example for lack of a descriptor.
    """
    if sys.platform != "linux":
        return None
    if local.family == socket.AF_UNIX:
        size = struct.calcsize("3i")
        _, uid, _ = struct.unpack("3i", local.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        return None if uid == os.geteuid() else f"user {uid}"
    try:
        ends = local.getpeername(), local.getsockname()
    except OSError:  # it has disconnected already
        return "user unknown"
    owner = _tcp_owner(*ends)
    return None if owner == os.geteuid() else f"user {'unknown' if owner is None else owner}"


def written_bytes(local: socket.socket) -> int | None:
    """Return how many bytes the other end of a TCP connection of this machine has written until now, received or not.

    None if it has finished writing, so that the connection ends by itself after its last byte; also if the system does
    not tell (outside Linux, or before Linux 4.19; if netlink is denied to this process; for MPTCP).
    """
    if sys.platform != "linux":
        return None
    try:
        answer = _ask(local.getpeername(), local.getsockname(), 1 << (_INET_DIAG_INFO - 1))
    except OSError:  # it has disconnected, or netlink is denied
        return None
    if answer is None or answer[1] not in _WRITING:
        return None
    attributes = dict(_attributes(answer[_ANSWER.size + _ENDS.size + _OWNER.size :]))
    info = attributes.get(_INET_DIAG_INFO, b"")
    if len(info) < _SENT.size or _INET_DIAG_ULP_INFO in attributes:
        return None
    (unsent,), (sent, resent) = _NOT_SENT.unpack_from(info), _SENT.unpack_from(info)
    return int(sent - resent + unsent)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield kind and value of each attribute of a netlink message; each begins at a multiple of 4."""
    while len(data) >= _ATTRIBUTE.size:
        size, kind = _ATTRIBUTE.unpack_from(data)
        yield kind, data[_ATTRIBUTE.size : size]
        data = data[max(_ATTRIBUTE.size, -(-size // 4) * 4) :]


def _tcp_owner(end: _End, other: _End) -> int | None:
    """Return the user id that owns one end of an IPv4 connection of this machine, or None.

    A socket that no process holds any more has inode 0, and before Linux 6.16 user 0.
    """
    try:
        owner = _owner_from_netlink(end, other)
    except OSError:  # netlink is denied to this process, as systemd's RestrictAddressFamilies may do
        owner = None
    if owner is None:
        owner = _owner_from_proc(end, other)
    return None if owner in {None, (0, 0)} else owner.uid


def _owner_from_netlink(end: _End, other: _End) -> _Owner | None:
    """Ask the kernel who owns one socket.

    Raises:
        OSError: The kernel does not answer.
    """
    answer = _ask(end, other)
    if answer is None:
        return None
    *_, uid, inode = _OWNER.unpack_from(answer, _ANSWER.size + _ENDS.size)
    return _Owner(uid, inode)


def _ask(end: _End, other: _End, extensions: int = 0) -> bytes | None:
    """Ask the kernel about one socket; an IPv6 socket that is used for IPv4 is found too.

    Source: sock_diag(7), netlink(7).

    Returns:
        The answer from its family on, or None if there is no such connection.

    Raises:
        OSError: The kernel does not answer.
    """
    (host, port), (other_host, other_port) = end, other
    ends = _ENDS.pack(port, other_port, socket.inet_aton(host), socket.inet_aton(other_host), 0, _NO_COOKIE)
    request = _REQUEST.pack(socket.AF_INET, socket.IPPROTO_TCP, extensions, 0xFFFFFFFF) + ends
    head = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
        kernel.send(head + request)
        answer = kernel.recv(1 << 16)
    _, kind, *_ = _HEADER.unpack_from(answer)
    if kind == _NLMSG_ERROR:
        (number,) = struct.unpack_from("=i", answer, _HEADER.size)
        if number == -errno.ENOENT:
            return None
        raise OSError(-number, os.strerror(-number))
    found_port, found_other_port, *_ = _ENDS.unpack_from(answer, _HEADER.size + _ANSWER.size)
    if (found_port, found_other_port) != (port, other_port):  # a socket that listens on that port
        return None
    return answer[_HEADER.size :]


def _owner_from_proc(end: _End, other: _End) -> _Owner | None:
    """Find one socket among all of the machine's, which takes longer the more there are.

    Source: proc(5), /proc/net/tcp: addresses are 32-bit words in the machine's order, in hexadecimal. A program that
    uses an IPv6 socket for IPv4 is found in /proc/net/tcp6, under ``::ffff:a.b.c.d``.
    """
    words = [(f"{struct.unpack('=I', socket.inet_aton(host))[0]:08X}", f"{port:04X}") for host, port in (end, other)]
    mapped = f"{0:016X}{struct.unpack('=I', bytes((0, 0, 255, 255)))[0]:08X}"
    wanted = ([f"{prefix}{host}:{port}" for host, port in words] for prefix in ("", mapped))
    for table, pair in zip(_TCP_TABLES, wanted, strict=False):
        with suppress(FileNotFoundError), table.open(encoding="ascii") as lines:
            for line in lines:
                fields = line.split()
                if fields[1:3] == pair:
                    return _Owner(int(fields[7]), int(fields[9]))
    return None
