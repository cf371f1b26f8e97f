"""Proxy programs whose every step is scripted by a test.

::

    script = ScriptedProxy([connect(), say("Info: Established X server connection."), wait_eof()])
    script.command          # an argument vector, for a CommandBackend: [*script.command, "{host}::{port}"]
    script.install(path)    # an executable file, to be found as nxproxy

A program is a few lines of Python in an interpreter without site-packages, started within some 15 ms. It runs one
step after the other and exits with status 0 after the last. A `Gate` lets the test decide when it continues, without
sleeping on either side. Its source contains no braces, so that it survives ``str.format``.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

__all__ = [
    "Gate",
    "ScriptedProxy",
    "Step",
    "connect",
    "die_by",
    "exit_with",
    "fork_holding_output",
    "half_close",
    "ignore",
    "install",
    "on_signal",
    "pause",
    "print_cookie",
    "record_call",
    "say",
    "send",
    "wait_bytes",
    "wait_eof",
    "wait_file",
]

_PRELUDE = """\
import os, signal, sys
connection = None
signal.signal(signal.SIGINT, signal.SIG_DFL)
def put(fd, line):  # not print(), in which a signal's steps could not print
    data = line.encode(errors="surrogateescape") + b"\\n"
    while data:
        data = data[os.write(fd, data):]
def cookie():
    return os.environ.get("NX_DISPLAY", "").partition("cookie=")[2].partition(",")[0].partition(":")[0]
def address():
    words = [word for word in sys.argv[1:] if word and word[0] != "-"]
    options = os.environ.get("NX_DISPLAY", "").rpartition(":")[0].split(",")
    if not words:
        known = dict(option.split("=", 1) for option in options if "=" in option)
        words = [known["connect"]] + [known["port"] for key in known if key == "port"]
    if len(words) == 1 and "/" not in words[0]:
        words = words[0].rsplit(":", 1)
    return words[0].removeprefix("unix:") if len(words) == 1 else (words[0].rstrip(":"), int(words[1]))
def join(place):
    import socket
    place = place or address()
    joined = socket.socket(socket.AF_UNIX if isinstance(place, str) else socket.AF_INET)
    joined.connect(place)
    return joined
def hold(seconds):
    if connection is not None:
        connection.close()
    signal.alarm(seconds)
    signal.pause()
"""

_HOLDING_S = 60
_FD = {"stdout": 1, "stderr": 2}


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a scripted program.

    Attributes:
        source: Its Python source, lines at the outermost level.
    """

    source: str


class ScriptedProxy:
    """A program that runs the given steps.

    Attributes:
        source: The program, as Python source.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.source = _PRELUDE + "".join(f"{step.source}\n" for step in steps)

    @property
    def command(self) -> list[str]:
        """The argument vector that runs it; arguments appended by a backend are taken as the address."""
        return [sys.executable, "-I", "-S", "-c", self.source]

    def install(self, path: Path) -> Path:
        """Write it as an executable file.

        Args:
            path: The file to write.

        Returns:
            The path.
        """
        return install(path, self.command)


class Gate:
    """A gate that a scripted program waits at with `wait_file`, and that a test opens.

    Attributes:
        path: The FIFO that connects the two.
    """

    def __init__(self, path: Path) -> None:
        """Make the gate, closed.

        Args:
            path: Where to make the FIFO.
        """
        self.path = path
        os.mkfifo(path, 0o600)
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # opened both ways, the FIFO keeps what is written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)
        self.path.unlink()

    def open(self) -> None:
        """Let one program, waiting now or later, pass once."""
        os.write(self._fd, b"!")


def install(path: Path, command: Sequence[str]) -> Path:
    """Write an executable file that runs a command line, with its own arguments appended.

    Args:
        path: The file to write.
        command: The command line, as of `ScriptedProxy.command` or ``standins.command``.

    Returns:
        The path.
    """
    path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', encoding="utf-8")
    path.chmod(0o700)
    return path


def say(text: str, stream: Literal["stdout", "stderr"] = "stderr") -> Step:
    """Print a line, at once.

    Args:
        text: The line, without its line ending.
        stream: Where to print it.
    """
    return Step(f"put({_FD[stream]}, {_literal(text)})")


def print_cookie(stream: Literal["stdout", "stderr"] = "stderr") -> Step:
    """Print the cookie of ``NX_DISPLAY``, as a peer can make nxproxy do.

    Args:
        stream: Where to print it.
    """
    return Step(f'put({_FD[stream]}, "cookie=" + cookie())')


def record_call(path: Path) -> Step:
    """Write how the program was called, as JSON: ``argv``, ``cwd``, ``environ``, ``sid``, ``core_limit``.

    Args:
        path: The file to write; it appears atomically.
    """
    partial = path.with_name(f"{path.name}.partial")
    return Step(
        "import json, resource\n"
        f"with open({_literal(str(partial))}, 'w') as record:\n"
        "    json.dump(dict(argv=sys.argv, cwd=os.getcwd(), environ=dict(os.environ), sid=os.getsid(0),\n"
        "        core_limit=resource.getrlimit(resource.RLIMIT_CORE)), record)\n"
        f"os.rename({_literal(str(partial))}, {_literal(str(path))})"
    )


def connect(address: str | tuple[str, int] | None = None) -> Step:
    """Connect to the agent, or to what stands in for it.

    Args:
        address: A path or a host and port. By default that of the program's arguments (``HOST PORT``,
            ``HOST:PORT``, ``HOST::PORT`` or a path), or, without any, that of ``NX_DISPLAY``.
    """
    return Step(f"connection = join({_literal(address)})")


def send(data: bytes) -> Step:
    """Send bytes over the connection.

    Args:
        data: The bytes.
    """
    return Step(f"connection.sendall({_literal(data)})")


def wait_bytes(count: int) -> Step:
    """Wait until a number of bytes has arrived over the connection.

    Args:
        count: How many; they are read and discarded.
    """
    return Step(f"connection.recv({count}, 256)  # MSG_WAITALL")


def half_close() -> Step:
    """Send EOF over the connection, and keep reading."""
    return Step("connection.shutdown(1)  # SHUT_WR")


def wait_eof() -> Step:
    """Read and discard everything until EOF."""
    return Step("while connection.recv(65536): pass")


def wait_file(path: Path) -> Step:
    """Wait at a `Gate`, or at any other FIFO until something is written into it.

    Args:
        path: The FIFO's path.
    """
    return Step(f"with open({_literal(str(path))}, 'rb', 0) as gate: gate.read(1)")


def ignore(*signals: signal.Signals) -> Step:
    """Ignore signals from here on.

    Args:
        signals: Which; by default SIGTERM.
    """
    numbers = signals or (signal.SIGTERM,)
    return Step("\n".join(f"signal.signal({number:d}, signal.SIG_IGN)" for number in numbers))


def on_signal(number: signal.Signals, steps: Sequence[Step]) -> Step:
    """Run other steps when a signal arrives, interrupting the current one.

    Args:
        number: The signal.
        steps: What to do; afterwards the program continues where it was, unless they end it.
    """
    name = f"handle_{number:d}"
    body = "".join(f"    {line}\n" for step in steps for line in step.source.splitlines())
    return Step(f"def {name}(*_):\n    global connection\n{body}signal.signal({number:d}, {name})")


def fork_holding_output() -> Step:
    """Start an idle child that keeps standard output and error open, and print ``child PID``.

    It exits by itself after a minute; a test kills it when done with it.
    """
    return Step(f'child = os.fork()\nif child == 0: hold({_HOLDING_S})\nput(2, "child " + str(child))')


def pause() -> Step:
    """Wait until killed by a signal, or ended by `on_signal`."""
    return Step("while True: signal.pause()")


def exit_with(status: int) -> Step:
    """Exit at once.

    Args:
        status: The exit status.
    """
    return Step(f"os._exit({status})")


def die_by(number: signal.Signals) -> Step:
    """Die by a signal.

    Args:
        number: The signal; SIGSEGV for a crash.
    """
    return Step(f"os.kill(os.getpid(), {number:d})")


def _literal(value: object) -> str:
    r"""Return Python source for a value, its braces written ``\x7b`` and ``\x7d``."""
    return repr(value).replace("{", r"\x7b").replace("}", r"\x7d")
