"""Stand-ins for nxagent, nxproxy and an X server, for machines where these are not installed.

Each is a program, started as ``python -m proxy_fsm.testing.standins ROLE`` or, much faster since the package
is then not imported, by the command line that `command` returns:

``agent [PORT]``
    Listens on a loopback port (a free one by default) and prints ``PORT n``. Serves one connection, like an
    nxagent in its first attempt: when that is dropped or presents a wrong cookie, the agent exits. Prints
    ``RUNNING``, and at the end ``ENDED``, ``LOST`` or ``REFUSED``; the exit status is 0 only for ``ENDED``.
    SIGTERM ends the session in order.
``proxy -S``
    Does what ``nxproxy -S`` does with the string in ``NX_DISPLAY``, and prints nxproxy's messages to standard
    error; the exit status is always 0. It paints nothing and needs no display.
``display [NUMBER]``
    Accepts X11 connections on the TCP port of a display (a free one from 100 by default), prints ``DISPLAY
    name``, and does nothing with them. It refuses a wrong cookie.

The agent and the display read their cookie from the environment variable `COOKIE_VARIABLE`. Without one, the
agent refuses every connection and the display accepts any.

Agent and proxy exchange lines: ``HELLO cookie``, ``WELCOME``, then ``DRAW`` from the agent, ``INPUT`` from
the proxy and its ``ECHO``, and ``BYE`` from both for an orderly end. Standard library only, and little of it:
a proxy must start within milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time

# hmac.compare_digest is this function; importing hmac for it would add a fifth to the start-up time.
from _operator import _compare_digest as compare_digest

TYPE_CHECKING = False  # importing typing for it costs more than everything else here
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal

__all__ = ["COOKIE_VARIABLE", "command", "main"]

COOKIE_VARIABLE = "STANDIN_COOKIE"
"""The environment variable from which the agent and the display read their cookie."""

_UNIX = "unix:"
_BEAT_S = 0.04
_BYE_S = 10.0
_LINE_BYTES = 64 * 1024
_DRAWING = b"DRAW " + b"0123456789abcdef" * 64
_INPUT = b"INPUT pointer 1 1"
_BYE = b"BYE"
_BEAT = b"(beat)"
_SIGNAL = b"(signal)"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_X11_PORT = 6000
_X11_FIRST, _X11_LAST = 100, 1000
_X11_SETUP_BYTES = 12
_X11_SCREENLESS_BYTES = 32
_SETUP_DONE = b"(setup done)"


def command(role: str, *arguments: str) -> list[str]:
    """Return the command line that starts a stand-in quickly.

    Args:
        role: ``agent``, ``proxy`` or ``display``.
        arguments: The role's own arguments.
    """
    return [sys.executable, "-I", "-S", __file__, role, *arguments]


def main(arguments: list[str]) -> int:
    """Run a stand-in until it ends.

    Args:
        arguments: The role, and its own arguments.

    Returns:
        The exit status.
    """
    match arguments:
        case ["agent"]:
            return _agent(0)
        case ["agent", port]:
            return _agent(int(port))
        case ["proxy", *_]:
            return _proxy(os.environ.get("NX_DISPLAY", ""))
        case ["display"]:
            return _display(range(_X11_FIRST, _X11_LAST))
        case ["display", number]:
            return _display(range(int(number), int(number) + 1))
    _log("Usage: standins agent [PORT] | proxy -S | display [NUMBER]")
    return 2


class _Signals:
    """SIGTERM, SIGINT and SIGHUP as bytes in a pipe, so that they can be selected together with sockets."""

    def __init__(self) -> None:
        self._read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)
        signal.set_wakeup_fd(write_fd)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)

    def fileno(self) -> int:
        return self._read_fd

    def read(self) -> int:
        """Return the number of the signal that arrived."""
        return os.read(self._read_fd, 1)[0]


class _Conversation:
    """Lines to and from a peer, interleaved with signals and a steady beat.

    Attributes:
        signal: The last signal that arrived, 0 for none.
    """

    def __init__(self, connection: socket.socket, signals: _Signals) -> None:
        self.signal = 0
        self._connection = connection
        self._signals = signals
        self._events = self._watch()

    def send(self, line: bytes) -> None:
        """Send a line; a closed connection is noticed when reading."""
        with contextlib.suppress(OSError):
            self._connection.sendall(line + b"\n")

    def receive(self) -> bytes:
        """Return the peer's next line; empty after EOF or a signal."""
        for event in self._events:
            if event is _SIGNAL:
                return b""
            if event is not _BEAT:
                return event
        return b""

    def run(self, beat: bytes) -> bool:
        """Exchange lines until one side sends BYE.

        Args:
            beat: The line to send at each beat.

        Returns:
            Whether one did; False when the connection broke instead.
        """
        for event in self._events:
            if event == _BYE:
                self._send_bye()
                return True
            if event is _SIGNAL:
                self._send_bye()
                self._await_end()
                return True
            if event is _BEAT:
                self.send(beat)
            elif event.startswith(b"INPUT"):
                self.send(b"ECHO " + event)
        return False

    def _send_bye(self) -> None:
        self.send(_BYE)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def _await_end(self) -> None:
        deadline = time.monotonic() + _BYE_S
        for _ in self._events:
            if time.monotonic() > deadline:
                return

    def _watch(self) -> Iterator[bytes]:
        sources: list[socket.socket | _Signals] = [self._connection, self._signals]
        pending = b""
        next_beat = time.monotonic()
        while len(pending) < _LINE_BYTES:
            wait_s = max(0.0, next_beat - time.monotonic())
            readable, _, _ = select.select(sources, [], [], wait_s)
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + _BEAT_S
                yield _BEAT
            if self._signals in readable:
                self.signal = self._signals.read()
                yield _SIGNAL
            if self._connection in readable:
                data = _receive(self._connection)
                if not data:
                    return
                *lines, pending = (pending + data).split(b"\n")
                yield from lines


def _agent(port: int) -> int:
    signals = _Signals()
    cookie = os.environ.get(COOKIE_VARIABLE, "").encode()
    with socket.create_server(("127.0.0.1", port)) as listener:
        _print(f"PORT {listener.getsockname()[1]}")
        sources: list[socket.socket | _Signals] = [listener, signals]
        readable, _, _ = select.select(sources, [], [])
        if listener not in readable:
            _print("ENDED")
            return 0
        connection, _ = listener.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        conversation = _Conversation(connection, signals)
        if not cookie or not compare_digest(conversation.receive(), b"HELLO " + cookie):
            _print("REFUSED")
            return 1
        conversation.send(b"WELCOME")
        _print("RUNNING")
        ended = conversation.run(_DRAWING)
    _print("ENDED" if ended else "LOST")
    return 0 if ended else 1


def _proxy(display: str) -> int:
    signals = _Signals()
    _log("\nNXPROXY - Version 3.5.99.26 (stand-in)\n")
    _log(f"Info: Proxy running in server mode with pid '{os.getpid()}'.")
    _session("Starting session")
    options = _parse(display)
    host = options.get("connect", "")
    connection = _connect(host, options.get("port", ""))
    if connection is not None:
        with connection:
            _log(f"Info: Connected to remote proxy on FD#{connection.fileno()}.")
            _serve(_Conversation(connection, signals), options.get("cookie", ""))
    if host.startswith(_UNIX):  # nxproxy removes the path to which it connected
        with contextlib.suppress(OSError):
            os.unlink(host.removeprefix(_UNIX))  # noqa: PTH108 - importing pathlib would double the start-up time
    _session("Session terminated")
    return 0


def _connect(host: str, port: str) -> socket.socket | None:
    path = host.removeprefix(_UNIX)
    where = f"{host}:{port}" if path == host else path
    connection = socket.socket(socket.AF_INET if path == host else socket.AF_UNIX)
    try:
        if path == host:
            _log(f"Info: Connecting to remote host '{where}'.")
            connection.connect((host, int(port)))
        else:
            connection.connect(path)
    except OSError as error:
        _log_error(f"Connection to '{where}' failed. Error is {error.errno} '{error.strerror}'.")
        connection.close()
        return None
    return connection


def _serve(conversation: _Conversation, cookie: str) -> None:
    conversation.send(f"HELLO {cookie}".encode())
    if conversation.receive() != b"WELCOME":
        if conversation.signal:
            _log(f"Info: Aborting the procedure due to signal '{conversation.signal}'.")
            return
        _log_error("The remote NX proxy closed the connection.")
        _log_error("Failure negotiating the session in stage '7'.")
        _log_error("Wrong version or invalid session authentication cookie.")
        _session("Terminating session")
        return
    _log("Info: Connection with remote proxy completed.")
    _session("Session started")
    _log("Info: Established X server connection.")
    if not conversation.run(_INPUT):
        _log("Error: Failure reading from the peer proxy.")
        _log("Loop: PANIC! No shutdown of proxy link performed by remote proxy.")
        _log("Error: Connection with remote peer broken.")
        _log("Error: Please check the state of your network and retry.")
    _session("Terminating session")
    if conversation.signal:
        _log("Info: Waiting the cleanup timeout to complete.")


def _parse(display: str) -> dict[str, str]:
    """Return the options of ``nx/nx,key=value,…:N``."""
    pairs = (pair.partition("=") for pair in display.rpartition(":")[0].split(",")[1:])
    return {key: value.replace("%2C", ",") for key, _, value in pairs}


def _display(numbers: range) -> int:
    signals = _Signals()
    cookie = bytes.fromhex(os.environ.get(COOKIE_VARIABLE, ""))
    listener = _listen_on_display(numbers)
    clients: dict[socket.socket, bytes] = {}
    while True:
        sources: list[socket.socket | _Signals] = [signals, listener, *clients]
        for client in select.select(sources, [], [])[0]:
            if isinstance(client, _Signals):
                return 0
            if client is listener:
                clients[listener.accept()[0]] = b""
            elif not (data := _receive(client)):
                del clients[client]
                client.close()
            elif (request := clients[client]) is not _SETUP_DONE:
                clients[client] = _set_up(client, request + data, cookie)


def _set_up(client: socket.socket, request: bytes, cookie: bytes) -> bytes:
    """Answer an X11 connection setup as soon as it is complete; return what has been received of it."""
    order: Literal["little", "big"] = "little" if request[:1] == b"l" else "big"
    if len(request) < _X11_SETUP_BYTES:
        return request
    name_bytes, data_bytes = (int.from_bytes(request[at : at + 2], order) for at in (6, 8))
    start = _X11_SETUP_BYTES + name_bytes + -name_bytes % 4
    if len(request) < start + data_bytes + -data_bytes % 4:
        return request
    accepted = not cookie or compare_digest(request[start : start + data_bytes], cookie)
    reason = b"" if accepted else b"Invalid cookie"
    body = bytes(_X11_SCREENLESS_BYTES) if accepted else reason + bytes(-len(reason) % 4)
    numbers = (11, 0, len(body) // 4)
    head = bytes([accepted, len(reason)]) + b"".join(number.to_bytes(2, order) for number in numbers)
    with contextlib.suppress(OSError):
        client.sendall(head + body)
        if not accepted:
            client.shutdown(socket.SHUT_WR)
    return _SETUP_DONE


def _listen_on_display(numbers: range) -> socket.socket:
    for number in numbers:
        with contextlib.suppress(OSError):
            listener = socket.create_server(("127.0.0.1", _X11_PORT + number))
            _print(f"DISPLAY 127.0.0.1:{number}")
            return listener
    _log(f"No display from {numbers.start} to {numbers.stop - 1} is free.")
    sys.exit(1)


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(_LINE_BYTES)
    except ConnectionError:
        return b""


def _log_error(message: str) -> None:
    _log(f"Loop: PANIC! {message}\nError: {message}")


def _session(what: str) -> None:
    _log(f"Session: {what} at '{time.ctime()}'.")


def _log(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
