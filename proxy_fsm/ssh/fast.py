"""A transport for speed: AES-GCM first, TCP_NODELAY, and packets that are sealed and opened with few copies."""

from __future__ import annotations

import os
import socket
import struct
import sys
from contextlib import suppress
from logging import DEBUG
from typing import TYPE_CHECKING, Any

import paramiko
from cryptography.exceptions import InvalidTag  # paramiko's own ciphers come from there
from paramiko import packet
from paramiko.message import Message

if TYPE_CHECKING:
    from collections.abc import Sequence
    from threading import RLock

__all__ = [
    "Messages",
    "Packetizer",
    "acknowledge",
    "fast_transport",
    "received_ago_s",
    "set_nodelay",
    "tcp_socket",
]

#: How much is read ahead.
_AHEAD_BYTES = 256 << 10

#: OpenSSH's fastest ciphers that paramiko has; both authenticate what they encrypt.
_FAST_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")

#: In an AES-GCM packet (RFC 5647, 7): the length, unencrypted; the block that padding fills; the authentication tag.
_LENGTH_BYTES = 4
_BLOCK_BYTES = 16
_TAG_BYTES = 16
#: The longest packet accepted: longer than any requested here, or that a program would request.
_LONGEST_BYTES = 64 << 20
#: The least padding of any packet (RFC 4253, 6).
_LEAST_PADDING_BYTES = 4

#: The beginning of Linux's ``struct tcp_info``; the last field is ``tcpi_last_data_recv``.
_TCP_INFO = struct.Struct("=8B12I")
#: The kernel counts in ticks, the longest of which is so long, in seconds.
_TICK_S = 0.01


class Messages(Message):
    """Several messages that a `Packetizer` sends at once; any other sender fails on them."""

    def __init__(self, pieces: Sequence[tuple[bytes, memoryview]]) -> None:
        super().__init__()
        self.pieces = pieces

    def asbytes(self) -> bytes:
        """Raise an error: these are several messages."""
        raise TypeError("Several messages cannot be serialised as one.")


class Packetizer(packet.Packetizer):
    """Seals and opens AES-GCM packets with few copies and few system calls; all others are left to paramiko.

    It has the same name as paramiko's, so that the private names below are those of its base: both share one state of
    the connection, whichever of them handles the next packet.
    """

    __aead_in: bool
    __aead_out: bool
    __block_engine_in: Any
    __block_engine_out: Any
    __compress_engine_in: Any
    __compress_engine_out: Any
    __dump_packets: bool
    __iv_in: bytes
    __iv_out: bytes
    __received_bytes: int
    __received_bytes_overflow: int
    __received_packets: int
    __received_packets_overflow: int
    __remainder: bytes
    __sent_bytes: int
    __sent_packets: int
    __sequence_number_in: int
    __sequence_number_out: int
    __write_lock: RLock

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._sock = sock
        self._ahead = memoryview(bytearray(_AHEAD_BYTES))
        self._start = self._end = 0

    # ---- out ----

    def send_message(self, data: Message) -> None:
        """Send a message, or several at once."""
        with self.__write_lock:
            if not self.__aead_out or self.__compress_engine_out is not None or self.__dump_packets:
                for piece in data.pieces if isinstance(data, Messages) else [(data.asbytes(),)]:
                    super().send_message(Message(b"".join(piece)))
            else:
                self._send_sealed(data.pieces if isinstance(data, Messages) else [(data.asbytes(),)])

    def _send_sealed(self, pieces: Sequence[tuple[bytes | memoryview, ...]]) -> None:
        out: list[bytes] = []
        iv = self.__iv_out
        for piece in pieces:
            length = sum(map(len, piece))
            padding = _LEAST_PADDING_BYTES + -(1 + length + _LEAST_PADDING_BYTES) % _BLOCK_BYTES
            head = (1 + length + padding).to_bytes(_LENGTH_BYTES, "big")
            plain = b"".join((bytes((padding,)), *piece, os.urandom(padding)))
            out += (head, self.__block_engine_out.encrypt(iv, plain, head))
            iv = self._inc_iv_counter(iv)  # type: ignore[attr-defined]
        self.__iv_out = iv
        self.__sequence_number_out = (self.__sequence_number_out + len(pieces)) & 0xFFFFFFFF
        self._write(out)
        self.__sent_bytes += sum(map(len, out))
        self.__sent_packets += len(pieces)
        if self.__sent_bytes >= self.REKEY_BYTES or self.__sent_packets >= self.REKEY_PACKETS:
            self._request_rekey(f"{self.__sent_packets} packets, {self.__sent_bytes} bytes sent")

    def _write(self, out: list[bytes]) -> None:
        try:
            # Not writev() on its descriptor: that may have been closed, and be in use for something else.
            sent = self._sock.sendmsg(out)
        except (TimeoutError, BlockingIOError):
            sent = 0
        except OSError as error:
            raise EOFError from error  # as paramiko does
        rest = memoryview(b"".join(out))[sent:] if sent < sum(map(len, out)) else b""
        self.write_all(rest)  # it also records when data was last sent

    # ---- in ----

    def read_message(self) -> tuple[int, Message]:
        """Return the next message's number and its content.

        Raises:
            EOFError: The connection ended.
            NeedRekeyException: Nothing was received for a while, and a rekey is due.
            paramiko.SSHException: The packet is malformed, or was changed in transit.
        """
        if not self.__aead_in or self.__compress_engine_in is not None or self.__dump_packets or self.__remainder:
            return super().read_message()
        self._fill(_LENGTH_BYTES, check_rekey=True)
        length = int.from_bytes(self._ahead[self._start : self._start + _LENGTH_BYTES], "big")
        if length % _BLOCK_BYTES or length > _LONGEST_BYTES:  # it is not verified yet: anyone on the path can change it
            raise paramiko.SSHException(f"A packet cannot be {length} bytes long.")
        count = _LENGTH_BYTES + length + _TAG_BYTES
        if count > len(self._ahead):
            return super().read_message()
        self._fill(count, check_rekey=False)
        whole = self._ahead[self._start : self._start + count]
        self._start += count
        try:
            plain = self.__block_engine_in.decrypt(self.__iv_in, whole[_LENGTH_BYTES:], whole[:_LENGTH_BYTES])
        except InvalidTag as error:
            raise paramiko.SSHException("Mismatched MAC") from error
        if length == 0 or plain[0] > length - 2:
            raise paramiko.SSHException("A packet without a message.")
        self.__iv_in = self._inc_iv_counter(self.__iv_in)  # type: ignore[attr-defined]
        message = Message(plain[2 : length - plain[0]])
        message.seqno = self.__sequence_number_in
        self.__sequence_number_in = (self.__sequence_number_in + 1) & 0xFFFFFFFF
        self._count_received(count)
        return plain[1], message

    def _count_received(self, count: int) -> None:
        self.__received_bytes += count
        self.__received_packets += 1
        if self.need_rekey():
            self.__received_bytes_overflow += count
            self.__received_packets_overflow += 1
            if (
                self.__received_bytes_overflow >= self.REKEY_BYTES_OVERFLOW_MAX
                or self.__received_packets_overflow >= self.REKEY_PACKETS_OVERFLOW_MAX
            ):
                raise paramiko.SSHException("Remote transport is ignoring rekey requests")
        elif self.__received_bytes >= self.REKEY_BYTES or self.__received_packets >= self.REKEY_PACKETS:
            self._request_rekey(f"{self.__received_packets} packets, {self.__received_bytes} bytes received")

    def _request_rekey(self, after: str) -> None:
        if not self.need_rekey():
            self._log(DEBUG, f"Rekeying (hit {after})")  # type: ignore[attr-defined]
            self.__received_bytes_overflow = self.__received_packets_overflow = 0
            self._trigger_rekey()  # type: ignore[attr-defined]

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:  # noqa: FBT001, FBT002 - paramiko's signature
        """Return exactly ``n`` bytes; wait for them as paramiko does."""
        if n <= 0:  # from a length that is too small; the MAC will show it
            return b""
        if not self.__remainder and n <= len(self._ahead):
            self._fill(n, check_rekey=check_rekey)
            return self._consume(n)
        # What is left over from the banner, and a packet longer than the buffer, are left to paramiko.
        held = self._consume(min(n, self._end - self._start))
        return held + super().read_all(n - len(held), check_rekey and not held)

    def _consume(self, count: int) -> bytes:
        self._start += count
        return bytes(self._ahead[self._start - count : self._start])

    def _fill(self, count: int, *, check_rekey: bool) -> None:
        """Read until at least this many bytes are in the buffer."""
        held = self._end - self._start
        if held >= count:
            return
        self._ahead[:held] = self._ahead[self._start : self._end]
        self._start, self._end = 0, held
        while self._end < count:
            if self.handshake_timed_out():
                raise EOFError
            try:
                got = self._sock.recv_into(self._ahead[self._end :])
            except (TimeoutError, BlockingIOError):
                self._on_read_timeout(may_rekey=check_rekey and self._end == 0)
                continue
            except OSError as error:
                if self.closed:
                    raise EOFError from error
                raise
            if got == 0:
                raise EOFError
            self._end += got

    def _on_read_timeout(self, *, may_rekey: bool) -> None:
        if self.closed:
            raise EOFError
        if may_rekey and self.need_rekey():
            raise packet.NeedRekeyException
        self._check_keepalive()  # type: ignore[attr-defined]


def tcp_socket(transport: paramiko.Transport) -> socket.socket | None:
    """Return the socket that a transport runs over if it is TCP, else None."""
    sock = transport.sock
    if isinstance(sock, socket.socket) and sock.family in {socket.AF_INET, socket.AF_INET6}:
        return sock
    return None


def received_ago_s(transport: paramiko.Transport) -> float:
    """Return how long ago the last bytes arrived, in seconds; 0 where that cannot be known.

    Source: ``tcpi_last_data_recv`` of Linux's ``struct tcp_info`` (linux/tcp.h), in milliseconds.
    """
    sock = tcp_socket(transport)
    if sock is None or sys.platform != "linux":
        return 0.0
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    except OSError:  # it is closed, which is reported elsewhere
        return 0.0
    ago_ms: int = _TCP_INFO.unpack(info)[-1]
    return max(0.0, ago_ms / 1000 - _TICK_S)


def set_nodelay(transport: paramiko.Transport) -> None:
    """Have the transport send small messages at once; a no-op if it does not run over TCP.

    Source: paramiko never sets it; opening a channel then takes 40 ms instead of less than one.
    """
    sock = tcp_socket(transport)
    if sock is not None:
        with suppress(OSError):  # it is closed, which is reported elsewhere
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def acknowledge(sock: socket.socket | None) -> None:
    """Acknowledge what was received over TCP now, and not in up to 40 ms; a no-op outside Linux.

    Source: OpenSSH's server leaves Nagle's algorithm on if a connection has no terminal: it holds back a small packet
    until the previous one is acknowledged, and Linux delays ACKs on connections that send little back (tcp(7),
    ``TCP_QUICKACK``, which has to be set again each time). The start of an NX session then takes three times as long.
    """
    if sock is not None and sys.platform == "linux":
        with suppress(OSError):  # it is closed, which is reported elsewhere
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def fast_transport(sock: Any, **kwargs: Any) -> paramiko.Transport:
    """Make a transport set up for speed: AES-GCM first, TCP_NODELAY set, packets sealed and opened with less work.

    Pass it as ``SSHClient.connect(transport_factory=fast_transport)``. Everything that runs over the connection gets
    faster, and nothing else changes: it is a plain ``paramiko.Transport``, and the other ciphers are still offered. Its
    packetizer reads ahead, which costs 256 KiB per transport; it is paramiko's own if there is no socket object (an
    address, a ``ProxyCommand``, a channel of another connection). docs/performance.md has the measurements.

    Args:
        sock: A connected socket, or anything else that ``paramiko.Transport`` accepts.
        kwargs: Passed on to ``paramiko.Transport``.
    """
    if type(sock) is socket.socket:  # not a TLS socket, a subclass that every byte has to go through
        kwargs.setdefault("packetizer_class", Packetizer)
    transport = paramiko.Transport(sock, **kwargs)
    options = transport.get_security_options()
    fast = [cipher for cipher in _FAST_CIPHERS if cipher in options.ciphers]
    options.ciphers = (*fast, *(cipher for cipher in options.ciphers if cipher not in fast))
    set_nodelay(transport)
    return transport
