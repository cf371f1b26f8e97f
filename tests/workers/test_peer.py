"""The other end of a TCP connection of this machine: its owner, and what it has written.

Both come from netlink, the owner also from the tables in /proc.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import struct
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm.workers import peer
from tests.helpers.sockets import LOOPBACK, reset

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the owner of a peer is not known")

Finder = Callable[[tuple[str, int], tuple[str, int]], Any]

FINDERS = pytest.mark.parametrize("find", [peer._owner_from_netlink, peer._owner_from_proc])
#: An address that no host has (RFC 5737).
ELSEWHERE = ("192.0.2.1", 9)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server((LOOPBACK, 0)) as listening:
        yield listening


@FINDERS
def test_owner_of_either_end_is_found(listener: socket.socket, find: Finder) -> None:
    with socket.create_connection(listener.getsockname()) as local, listener.accept()[0] as accepted:
        for sock in (local, accepted):
            owner = find(sock.getsockname(), sock.getpeername())
            assert owner == (os.geteuid(), os.fstat(sock.fileno()).st_ino)


@FINDERS
def test_ipv6_socket_used_for_ipv4_is_found(listener: socket.socket, find: Finder) -> None:
    if not socket.has_ipv6 or not Path("/proc/net/tcp6").exists():
        pytest.skip("needs IPv6")
    with socket.socket(socket.AF_INET6) as local:
        local.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        local.connect(("::ffff:127.0.0.1", listener.getsockname()[1]))
        with listener.accept()[0] as accepted:
            assert find(accepted.getpeername(), accepted.getsockname()).inode == os.fstat(local.fileno()).st_ino


@FINDERS
def test_closed_socket_has_no_inode(listener: socket.socket, find: Finder) -> None:
    local = socket.create_connection(listener.getsockname())
    with listener.accept()[0] as accepted:
        local.close()
        assert find(accepted.getpeername(), accepted.getsockname()).inode == 0


@FINDERS
def test_missing_socket_has_no_owner(listener: socket.socket, find: Finder) -> None:
    assert find(ELSEWHERE, listener.getsockname()) is None
    assert find(listener.getsockname(), ELSEWHERE) is None, "a listener is not a connection"


@pytest.mark.parametrize(
    ("found", "owner"),
    [((1000, 4711), 1000), ((0, 4711), 0), ((0, 0), None), ((1000, 0), 1000), (None, None)],
)
def test_orphaned_socket_has_no_owner(
    monkeypatch: pytest.MonkeyPatch, found: tuple[int, int] | None, owner: int | None
) -> None:
    """Linux before 6.16 reports 0, root's user id, which would let any user connect to root's proxies."""
    monkeypatch.setattr(peer, "_owner_from_netlink", lambda *_: None if found is None else peer._Owner(*found))
    monkeypatch.setattr(peer, "_owner_from_proc", lambda *_: None)
    assert peer._tcp_owner(ELSEWHERE, ELSEWHERE) == owner


def test_tables_are_read_if_netlink_finds_nothing(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that was built without sock_diag answers as if there were no such socket."""
    monkeypatch.setattr(peer, "_owner_from_netlink", lambda *_: None)
    with socket.create_connection(listener.getsockname()) as local, listener.accept()[0] as accepted:
        assert peer._tcp_owner(accepted.getpeername(), accepted.getsockname()) == os.geteuid()
        assert local.fileno() >= 0


def test_tables_are_read_if_netlink_is_denied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Refused:
        def __init__(self, *_: object) -> None:
            raise PermissionError

    table = tmp_path / "tcp"
    row = " 0: 0100007F:1234 0100007F:5678 05 00000000:00000000 00:00000000 00000000 {} 0 {} 1 0\n"
    monkeypatch.setattr(peer, "_TCP_TABLES", (table,))
    monkeypatch.setattr(socket, "socket", Refused)
    ends = (LOOPBACK, 0x1234), (LOOPBACK, 0x5678)
    for uid, inode, owner in ((1000, 4711, 1000), (0, 0, None)):
        table.write_text("  sl  local_address rem_address ...\n" + row.format(uid, inode))
        assert peer._tcp_owner(*ends) == owner
        assert peer._tcp_owner(*reversed(ends)) is None


def test_netlink_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel does not know the request; after such an error the tables are read."""
    monkeypatch.setattr(peer, "_SOCK_DIAG_BY_FAMILY", 9999)
    with pytest.raises(OSError, match=r"\w"):
        peer._owner_from_netlink(ELSEWHERE, ELSEWHERE)


def unread_bytes(sock: socket.socket) -> int:
    """How much was received and not read."""
    count = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, count)
    return count[0]


class TestWrittenBytes:
    def test_count_includes_data_read_waiting_and_in_flight(self, listener: socket.socket) -> None:
        with socket.create_connection(listener.getsockname()) as other, listener.accept()[0] as local:
            assert peer.written_bytes(local) == 0
            other.settimeout(0)
            written = read = 0
            for _ in range(4):
                with contextlib.suppress(BlockingIOError):
                    while True:
                        written += other.send(bytes(77_777))
                assert peer.written_bytes(local) == written
                assert read + unread_bytes(local) < written, "some of it is in flight"
                read += len(local.recv(1 << 20))

    def test_end_that_has_received_eof_may_still_write(self, listener: socket.socket) -> None:
        with socket.create_connection(listener.getsockname()) as other, listener.accept()[0] as local:
            local.shutdown(socket.SHUT_WR)
            other.sendall(b"reply")
            assert peer.written_bytes(local) == len(b"reply")

    @pytest.mark.parametrize("end", [lambda sock: sock.shutdown(socket.SHUT_WR), socket.socket.close])
    def test_end_that_has_finished_writing_is_none(
        self, listener: socket.socket, end: Callable[[socket.socket], None]
    ) -> None:
        with socket.create_connection(listener.getsockname()) as other, listener.accept()[0] as local:
            other.sendall(b"last words")
            end(other)
            assert peer.written_bytes(local) is None

    def test_end_that_was_reset_is_none(self, listener: socket.socket) -> None:
        with socket.create_connection(listener.getsockname()) as other, listener.accept()[0] as local:
            reset(other)
            with pytest.raises(ConnectionResetError):
                local.recv(1)
            assert peer.written_bytes(local) is None

    def test_netlink_error_is_none(self, listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as local:
            monkeypatch.setattr(peer, "_SOCK_DIAG_BY_FAMILY", 9999)
            assert peer.written_bytes(local) is None

    @pytest.mark.parametrize(
        "attributes",
        [
            b"",
            struct.pack("=HH204x", 208, 2),  # before Linux 4.19 a tcp_info ends before the counters
            struct.pack("=HH280x", 284, 2) + struct.pack("=HH", 4, 19),  # MPTCP has a queue of its own
            b"\0" * 7,
        ],
    )
    def test_answer_without_the_counters_is_none(
        self, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, attributes: bytes
    ) -> None:
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as local:
            ask, fixed = peer._ask, peer._ANSWER.size + peer._ENDS.size + peer._OWNER.size
            monkeypatch.setattr(peer, "_ask", lambda end, other, _: (ask(end, other) or b"")[:fixed] + attributes)
            assert peer.written_bytes(local) is None

    def test_other_platforms_are_none(self, listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as local:
            monkeypatch.setattr(sys, "platform", "darwin")
            assert peer.written_bytes(local) is None
