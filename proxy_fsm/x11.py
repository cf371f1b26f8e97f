"""Checks that there is an X server and that it accepts us: a connection setup with the user's cookie.

Source: X Window System Protocol, "Connection Setup" and appendix B; Xsecurity(7); ``Xau.h`` of libXau;
``xcb_util.c`` and ``xcb_auth.c`` of libxcb.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from proxy_fsm.errors import ProxyFsmError
from proxy_fsm.text import Redactor, excerpt

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "PAUSES_AFTER_HANG_UP_S",
    "CancellableSocket",
    "Cancelled",
    "DisplayError",
    "DisplayErrorKind",
    "DisplayName",
    "connect",
    "find_authorisation",
    "open_display",
]

DisplayErrorKind = Literal["unset", "malformed", "absent", "refused", "silent", "local"]

_SOCKET_DIRECTORY = "/tmp/.X11-unix"  # noqa: S108 - where X servers listen
_TCP_BASE_PORT = 6000
_DISPLAY_MAX = 65_535 - _TCP_BASE_PORT
_COOKIE_NAME = b"MIT-MAGIC-COOKIE-1"
_XAUTHORITY_MAX_BYTES = 2**20

_FAMILY_INTERNET = 0
_FAMILY_INTERNET6 = 6
_FAMILY_LOCAL = 256
_FAMILY_WILD = 65_535

_REFUSED, _ACCEPTED, _AUTHENTICATE = 0, 1, 2

#: An X server resets when its last client disconnects, and during these 50 ms may hang up on clients that connect.
PAUSES_AFTER_HANG_UP_S = (0.01, 0.02, 0.04, 0.08, 0.16)

_DISPLAY = re.compile(
    r"(?:(?P<protocol>[a-z0-9]+)/)?(?P<host>\[[^\[\]]+\]|[^/\[\]\s]*):(?P<number>\d{1,5})(?:\.\d{1,5})?",
    re.ASCII,
)
_DISPLAY_PATH = re.compile(r"(?P<path>/.*:(?P<number>\d{1,5}))(?:\.\d{1,5})?", re.ASCII)
_LOCAL_PROTOCOLS = {"unix", "local"}
_TCP_PROTOCOLS = {"tcp", "inet", "inet6"}

# These say nothing about the X server: this process or machine is short of descriptors or memory.
_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_HANG_UPS = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)

_SET_DISPLAY = "Set DISPLAY to the X server that shall show the session, for example :0."
_HINTS: dict[DisplayErrorKind, str] = {
    "unset": _SET_DISPLAY,
    "malformed": _SET_DISPLAY,
    "absent": "Start the X server, or set DISPLAY to one that runs.",
    "refused": "Set XAUTHORITY to the file with the X server's cookie, and compare with 'xauth list'.",
    "silent": "Check whether the X server hangs, or the connection through which DISPLAY reaches it.",
    "local": "Close programs, or raise the limit of open files (see 'ulimit -n').",
}


class DisplayError(ProxyFsmError):
    """There is no X server that accepts us.

    Attributes:
        kind: ``unset`` (no DISPLAY), ``malformed`` (DISPLAY cannot be parsed), ``absent`` (no X server there),
            ``refused`` (it does not accept us), ``silent`` (it did not answer in time) or ``local`` (this process could
            not try).
        detail: One human-readable sentence: what happened.
        hint: What to do about it; by default the hint for this kind.
    """

    def __init__(self, kind: DisplayErrorKind, detail: str, hint: str | None = None) -> None:
        self.kind = kind
        self.detail = detail
        self.hint = _HINTS[kind] if hint is None else hint
        super().__init__(f"{detail} {self.hint}")

    def __reduce__(self) -> tuple[type[DisplayError], tuple[DisplayErrorKind, str, str]]:
        return type(self), (self.kind, self.detail, self.hint)


@dataclass(frozen=True, slots=True)
class DisplayName:
    """What DISPLAY refers to.

    Args:
        number: The display's number, 0 to 59535.
        host: The host to reach by TCP; None for a local socket.
        path: The local socket if DISPLAY names one (macOS); None for the usual place.
    """

    number: int
    host: str | None = None
    path: str | None = None

    @classmethod
    def parse(cls, text: str) -> DisplayName:
        """Parse a value of DISPLAY, such as ``:0``, ``host:10.0``, ``[::1]:0``, ``tcp/host:0``, ``/path:0``.

        Raises:
            DisplayError: It is none of these (``malformed``).

        Source: X(7), "Display names"; ``_xcb_parse_display`` of libxcb.
        """
        if not text.isprintable():
            raise _malformed(text)
        path = text.removeprefix("unix:")
        if path.startswith("/"):
            return cls._of_path(path)
        match = _DISPLAY.fullmatch(text)
        if match is None or int(match["number"]) > _DISPLAY_MAX:
            raise _malformed(text)
        host, protocol = match["host"].strip("[]"), match["protocol"]
        if ":" in host and _ip_address(host) is None:  # such as DECnet's host::0
            raise _malformed(text)
        if protocol not in {None, *_LOCAL_PROTOCOLS, *_TCP_PROTOCOLS}:
            raise _malformed(text)
        local = protocol in _LOCAL_PROTOCOLS or (protocol is None and host in {"", "unix"})
        return cls(number=int(match["number"]), host=None if local else host or "localhost")

    @classmethod
    def _of_path(cls, path: str) -> DisplayName:
        match = _DISPLAY_PATH.fullmatch(path)
        if match is None:
            return cls(number=0, path=path)
        return cls(number=int(match["number"]), path=match["path"])

    def __str__(self) -> str:
        if self.path is not None:
            return self.path
        host = f"[{self.host}]" if self.host and ":" in self.host else self.host or ""
        return f"{host}:{self.number}"


def find_authorisation(
    display: DisplayName, xauthority_path: Path | None, *, peer: str | None = None
) -> tuple[bytes, bytes]:
    """Find the authorisation for an X server in a file that xauth wrote.

    A file that is missing or cannot be read counts as empty; one that is truncated or malformed counts up to that
    point.

    Args:
        display: The display to be opened.
        xauthority_path: The file, or None for no file.
        peer: The address of the display's host, as text; None if it is known from ``display`` alone.

    Raises:
        OSError: This process or machine is short of descriptors or memory.

    Returns:
        Name and data of the authorisation, preferably MIT-MAGIC-COOKIE-1; both empty if there is none.

    Source: ``XauReadAuth`` and ``XauGetBestAuthByAddr`` of libXau; ``get_authptr`` of libxcb for the rule
        that a loopback address counts as local.
    """
    family, address = _family_and_address(peer or display.host)
    number = str(display.number).encode()
    matching = [
        (entry.name, entry.data)
        for entry in _read_entries(xauthority_path)
        if (entry.family == _FAMILY_WILD or (entry.family, entry.address) == (family, address))
        and entry.number in {b"", number}
    ]
    cookies = [pair for pair in matching if pair[0] == _COOKIE_NAME]
    return next(iter(cookies + matching), (b"", b""))


def open_display(environ: Mapping[str, str], *, timeout_s: float) -> socket.socket:
    """Connect to the X server of DISPLAY as a client does, and return the connection.

    Args:
        environ: Where DISPLAY, XAUTHORITY and HOME are looked up.
        timeout_s: The total time limit, in seconds; looking up a remote name may take longer.

    Returns:
        A blocking socket on which the connection setup is complete; the caller closes it.

    Raises:
        DisplayError: There is no X server that accepts us; ``kind`` says why.
    """
    return connect(environ, timeout_s, CancellableSocket())


def connect(environ: Mapping[str, str], timeout_s: float, connection: CancellableSocket) -> socket.socket:
    """Connect as `open_display` does, with a socket that another thread can cancel.

    Raises:
        Cancelled: It was cancelled.
        DisplayError: As `open_display`.
    """
    text = environ.get("DISPLAY")
    if not text:
        raise DisplayError("unset", "DISPLAY is not set.")
    display = DisplayName.parse(text)
    deadline = time.monotonic() + timeout_s
    with _as_display_error(display, timeout_s), _closing_on_error(connection):
        for pause_s in PAUSES_AFTER_HANG_UP_S:
            with contextlib.suppress(*_HANG_UPS):
                return _attempt(display, environ, deadline, connection)
            connection.close()
            time.sleep(min(pause_s, _remaining_s(deadline)))
        return _attempt(display, environ, deadline, connection)


class Cancelled(Exception):  # noqa: N818 - not an error
    """The connection attempt was cancelled."""


class CancellableSocket:
    """Holds a connection's socket, so that another thread can shut it down.

    While a thread uses the socket, only that thread closes it: a descriptor that is closed under a reader could be
    reused for another file.

    Attributes:
        lock: Guards what follows.
        sock: The socket, or None.
        cancelled: Whether `cancel` was called.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.sock: socket.socket | None = None
        self.cancelled = False
        self._users = 0

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep other threads from closing the socket in this block; if it was cancelled, close it at the end."""
        with self.lock:
            self._users += 1
        try:
            yield
        finally:
            with self.lock:
                self._users -= 1
                if self.cancelled:
                    self.close()

    @contextlib.contextmanager
    def raise_if_cancelled(self) -> Iterator[None]:
        """Raise `Cancelled` if it was cancelled; else keep other threads from cancelling it in this block."""
        with self.lock:
            if self.cancelled:
                raise Cancelled
            yield

    def set(self, sock: socket.socket) -> None:
        """Hold this socket; raise `Cancelled` if it was cancelled already."""
        with self.lock:
            self.sock = sock
            if self.cancelled:
                raise Cancelled

    def close(self) -> None:
        """Close the socket; another one can be set afterwards."""
        with self.lock:
            if self.sock is not None:
                self.sock.close()
                self.sock = None

    def cancel(self) -> None:
        """Shut the socket down, which wakes its user, and refuse any other."""
        with self.lock:
            self.cancelled = True
            if self.sock is not None:
                with contextlib.suppress(OSError):  # the server may have closed it
                    self.sock.shutdown(socket.SHUT_RDWR)
            if not self._users:
                self.close()


class _Entry(NamedTuple):
    family: int
    address: bytes
    number: bytes
    name: bytes
    data: bytes


def _attempt(
    display: DisplayName, environ: Mapping[str, str], deadline: float, connection: CancellableSocket
) -> socket.socket:
    sock = _connect(display, deadline, connection)
    peer = None if display.host is None else sock.getpeername()[0]
    name, data = find_authorisation(display, _xauthority_path(environ), peer=peer)
    setup = struct.pack("<cxHHHHxx", b"l", 11, 0, len(name), len(data)) + _padded(name) + _padded(data)
    sock.settimeout(_remaining_s(deadline))
    sock.sendall(setup)
    status, reason_bytes, length = struct.unpack("<BB4xH", _receive(sock, 8, deadline))
    if status not in {_REFUSED, _ACCEPTED, _AUTHENTICATE}:
        raise DisplayError("absent", f"What answers at {excerpt(str(display))} is no X server.")
    body = _receive(sock, length * 4, deadline)
    if status != _ACCEPTED:
        reason = _reason(body[:reason_bytes] if status == _REFUSED else body, data)
        raise DisplayError("refused", f"The X server at {excerpt(str(display))} does not let us in: {reason}.")
    sock.settimeout(None)
    return sock


def _connect(display: DisplayName, deadline: float, connection: CancellableSocket) -> socket.socket:
    failure = OSError("it has no address")
    for family, address in _addresses(display):
        sock = socket.socket(family, socket.SOCK_STREAM)
        connection.set(sock)
        sock.settimeout(_remaining_s(deadline))
        try:
            sock.connect(address)
        except OSError as error:
            if error.errno in _SHORTAGES:
                raise
            connection.close()
            failure = error
        else:
            return sock
    raise failure


def _addresses(display: DisplayName) -> Iterator[tuple[int, Any]]:
    if display.path is not None:
        yield socket.AF_UNIX, display.path
    elif display.host is None and hasattr(socket, "AF_UNIX"):
        path = f"{_SOCKET_DIRECTORY}/X{display.number}"
        if sys.platform == "linux":
            yield socket.AF_UNIX, f"\0{path}"
        yield socket.AF_UNIX, path
    else:
        host, port = display.host or "localhost", _TCP_BASE_PORT + display.number
        for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            yield family, address


@contextlib.contextmanager
def _as_display_error(display: DisplayName, timeout_s: float) -> Iterator[None]:
    where = excerpt(str(display))
    try:
        yield
    except (TimeoutError, BlockingIOError):  # the latter: its accept backlog is full
        raise DisplayError("silent", f"The X server at {where} did not answer within {timeout_s:g} s.") from None
    except _HANG_UPS:
        raise DisplayError("absent", f"The X server at {where} hung up before it answered.") from None
    except PermissionError as error:
        raise DisplayError("refused", f"The X server at {where} is closed to us: {error.strerror}.") from None
    except OSError as error:
        if error.errno in _SHORTAGES:
            raise DisplayError("local", f"The X server at {where} cannot be contacted: {error.strerror}.") from None
        raise DisplayError("absent", f"There is no X server at {where}: {error.strerror or error}.") from None
    except UnicodeError:  # it cannot be a host name
        raise _malformed(str(display)) from None


@contextlib.contextmanager
def _closing_on_error(connection: CancellableSocket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise


def _receive(sock: socket.socket, count: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < count:
        sock.settimeout(_remaining_s(deadline))
        data = sock.recv(count - len(received))
        if not data:
            raise ConnectionResetError
        received += data
    return bytes(received)


def _remaining_s(deadline: float) -> float:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    return remaining_s


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _xauthority_path(environ: Mapping[str, str]) -> Path | None:
    if path := environ.get("XAUTHORITY"):
        return Path(path)
    home = environ.get("HOME")
    return Path(home, ".Xauthority") if home else None


def _read_entries(path: Path | None) -> Iterator[_Entry]:
    try:
        if path is None or not path.is_file():  # a FIFO would block
            return
        with path.open("rb") as file:
            data = memoryview(file.read(_XAUTHORITY_MAX_BYTES))
    except ValueError:  # a NUL in the path
        return
    except OSError as error:
        if error.errno in _SHORTAGES:
            raise
        return
    with contextlib.suppress(struct.error):  # truncated
        while data:
            (family,) = struct.unpack_from(">H", data)
            data = data[2:]
            fields = []
            for _ in range(4):
                (size,) = struct.unpack_from(">H", data)
                (field,) = struct.unpack_from(f"{size}s", data, 2)
                data = data[2 + size :]
                fields.append(field)
            yield _Entry(family, *fields)


def _family_and_address(host: str | None) -> tuple[int, bytes]:
    address = _ip_address(host or "")
    if host in {None, "localhost"} or (address is not None and address.is_loopback):
        return _FAMILY_LOCAL, socket.gethostname().encode()
    if address is None:
        return _FAMILY_WILD, b""  # a name whose address is unknown: only wildcard entries match it
    family = _FAMILY_INTERNET if isinstance(address, ipaddress.IPv4Address) else _FAMILY_INTERNET6
    return family, address.packed


def _ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _malformed(text: str) -> DisplayError:
    return DisplayError("malformed", f"DISPLAY cannot be read: '{excerpt(text)}'.")


def _reason(text: bytes, secret: bytes) -> str:
    redact = Redactor([secret.hex(), secret.decode("latin-1")])
    return excerpt(redact(text.decode("latin-1")).strip("\0 \n.")) or "it gave no reason"
