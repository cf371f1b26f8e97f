"""A transport for speed: AES-GCM first, no delay, and packets that are packed and unpacked with few copies."""

from __future__ import annotations

import os
import socket
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

__all__ = ["Messages", "Packetizer", "acknowledge", "fast_transport", "set_nodelay", "tcp_socket"]

#: How much is read at once.
_AHEAD_BYTES = 256 << 10

#: OpenSSH's fastest ciphers that paramiko has; both authenticate what they encrypt.
_FAST_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")

#: Of a packet under AES-GCM (RFC 5647, 7): its length, in clear; what padding rounds up to; its authentication tag.
_LENGTH_BYTES = 4
_BLOCK_BYTES = 16
_TAG_BYTES = 16
#: No packet is longer: more than any that is asked for here, and than a program would ask for.
_LONGEST_BYTES = 64 << 20
#: The least padding of any packet (RFC 4253, 6).
_LEAST_PADDING_BYTES = 4


class Messages(Message):
    """Messages that a `Packetizer` sends in one go; any other sender fails on them."""

    def __init__(self, pieces: Sequence[tuple[bytes, memoryview]]) -> None:
        super().__init__()
        self.pieces = pieces

    def asbytes(self) -> bytes:
        """Raise an error: these are several messages."""
        raise TypeError("Several messages have no bytes of one.")


class Packetizer(packet.Packetizer):
    """Packs and unpacks packets under AES-GCM with few copies and few system calls; all others are paramiko's to do.

    It bears the name of paramiko's own, so that the private names below are those of its base: there is one state of
    the connection, whichever of the two does the next packet.
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
        """Send a message, or several in one go."""
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
            self._want_keys(f"{self.__sent_packets} packets, {self.__sent_bytes} bytes sent")

    def _write(self, out: list[bytes]) -> None:
        try:
            # Not writev() on its number: it may be closed meanwhile, and the number in use for something else.
            sent = self._sock.sendmsg(out)
        except (TimeoutError, BlockingIOError):
            sent = 0
        except OSError as error:
            raise EOFError from error  # as paramiko does
        rest = memoryview(b"".join(out))[sent:] if sent < sum(map(len, out)) else b""
        self.write_all(rest)  # it also notes when something was sent last

    # ---- in ----

    def read_message(self) -> tuple[int, Message]:
        """Return the next message's number and its content.

        Raises:
            EOFError: The connection ended.
            NeedRekeyException: Nothing has come for a while, and it is time for fresh keys.
            paramiko.SSHException: The packet is not what the server has sealed.
        """
        if not self.__aead_in or self.__compress_engine_in is not None or self.__dump_packets or self.__remainder:
            return super().read_message()
        self._hold(_LENGTH_BYTES, check_rekey=True)
        length = int.from_bytes(self._ahead[self._start : self._start + _LENGTH_BYTES], "big")
        if length % _BLOCK_BYTES or length > _LONGEST_BYTES:  # it is not sealed: anybody on the way can change it
            raise paramiko.SSHException(f"A packet cannot be {length} bytes long.")
        count = _LENGTH_BYTES + length + _TAG_BYTES
        if count > len(self._ahead):
            return super().read_message()
        self._hold(count, check_rekey=False)
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
            self._want_keys(f"{self.__received_packets} packets, {self.__received_bytes} bytes received")

    def _want_keys(self, after: str) -> None:
        if not self.need_rekey():
            self._log(DEBUG, f"Rekeying (hit {after})")  # type: ignore[attr-defined]
            self.__received_bytes_overflow = self.__received_packets_overflow = 0
            self._trigger_rekey()  # type: ignore[attr-defined]

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:  # noqa: FBT001, FBT002 - paramiko's signature
        """Return exactly so many bytes; waiting for them is as in paramiko."""
        if n <= 0:  # of a length that is too small; the MAC will tell
            return b""
        if not self.__remainder and n <= len(self._ahead):
            self._hold(n, check_rekey=check_rekey)
            return self._take(n)
        # What is left of reading the banner, and a packet that is longer than the buffer, are paramiko's to read.
        held = self._take(min(n, self._end - self._start))
        return held + super().read_all(n - len(held), check_rekey and not held)

    def _take(self, count: int) -> bytes:
        self._start += count
        return bytes(self._ahead[self._start - count : self._start])

    def _hold(self, count: int, *, check_rekey: bool) -> None:
        """Read until so many bytes are held, and what comes with them."""
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
                self._nothing_came(may_rekey=check_rekey and self._end == 0)
                continue
            except OSError as error:
                if self.closed:
                    raise EOFError from error
                raise
            if got == 0:
                raise EOFError
            self._end += got

    def _nothing_came(self, *, may_rekey: bool) -> None:
        if self.closed:
            raise EOFError
        if may_rekey and self.need_rekey():
            raise packet.NeedRekeyException
        self._check_keepalive()  # type: ignore[attr-defined]


def tcp_socket(transport: paramiko.Transport) -> socket.socket | None:
    """Return the socket that a transport runs over where that is one of TCP."""
    sock = transport.sock
    if isinstance(sock, socket.socket) and sock.family in {socket.AF_INET, socket.AF_INET6}:
        return sock
    return None


def set_nodelay(transport: paramiko.Transport) -> None:
    """Have the transport send small messages at once; a no-op where it does not run over TCP.

    Source: paramiko never sets it; opening a channel then takes 40 ms instead of less than one.
    """
    sock = tcp_socket(transport)
    if sock is not None:
        with suppress(OSError):  # it is closed: others will tell
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def acknowledge(sock: socket.socket | None) -> None:
    """Have what came over a TCP socket acknowledged now, and not in up to 40 ms; a no-op outside Linux.

    Source: OpenSSH's server leaves Nagle's algorithm on where a connection carries no terminal: it holds back a small
    packet until the one before is acknowledged, and Linux delays ACKs on connections that send little back (tcp(7),
    ``TCP_QUICKACK``, which has to be set again and again). The start of an NX session then takes three times as long.
    """
    if sock is not None and sys.platform == "linux":
        with suppress(OSError):  # it is closed: others will tell
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def fast_transport(sock: Any, **kwargs: Any) -> paramiko.Transport:
    """Make a transport set up for speed: AES-GCM first, TCP_NODELAY set, packets packed and unpacked with less work.

    Pass it as ``SSHClient.connect(transport_factory=fast_transport)``. Everything that runs over the connection gains,
    and nothing else changes: it is a plain ``paramiko.Transport``, and the other ciphers stay on offer. Its packetizer
    reads ahead, which costs 256 KiB a transport; it is paramiko's own where there is no socket object (an address, a
    ``ProxyCommand``, a channel of another connection). docs/performance.md has what it gains.

    Args:
        sock: A connected socket, or what else ``paramiko.Transport`` takes.
        kwargs: Passed on to ``paramiko.Transport``.
    """
    if type(sock) is socket.socket:  # one of TLS is another kind, and wants every byte to go through it
        kwargs.setdefault("packetizer_class", Packetizer)
    transport = paramiko.Transport(sock, **kwargs)
    options = transport.get_security_options()
    fast = [cipher for cipher in _FAST_CIPHERS if cipher in options.ciphers]
    options.ciphers = (*fast, *(cipher for cipher in options.ciphers if cipher not in fast))
    set_nodelay(transport)
    return transport
