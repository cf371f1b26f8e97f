"""What the demo runs with: the real programs where all of them are installed, stand-ins where not."""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import IO, TYPE_CHECKING

from proxy_fsm import NX3Backend, SessionInfo
from proxy_fsm.cli.screenshot import Screenshot, paint_desktop
from proxy_fsm.cli.verb import NotReachedError
from proxy_fsm.private_files import write_private
from proxy_fsm.testing import standins

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from proxy_fsm import BackendContext
    from proxy_fsm.cli.interrupts import Interrupts

__all__ = ["DESKTOP_COLOUR", "SESSION_NAME", "Setup", "missing_programs", "real_session", "stub_session"]

#: What the real demo needs, and the package of Debian, Ubuntu and Fedora, or of Debian and Ubuntu, that has it.
_PROGRAMS = {"nxagent": "nxagent", "nxproxy": "nxproxy", "Xvfb": "xvfb", "xauth": "xauth"}
_GREETING = 'printf "\\n  This window is painted by an X client\\n  inside the remote session.\\n"; exec sleep 3600'
#: What may paint on the remote desktop: the first one that is installed.
_PAINTERS = (
    ("xterm", "-bg", "#fdf6e3", "-fg", "#073642", "-geometry", "64x12+40+40", "-e", "sh", "-c", _GREETING),
    ("xclock", "-geometry", "240x240+40+40"),
    ("xeyes", "-geometry", "240x160+40+40"),
)
#: Of the remote desktop, which takes three quarters of the width and height; the screen around it is black.
DESKTOP_COLOUR = (0x2A, 0x6F, 0x97)
_SCREEN = "1024x768x24"
_COME_UP_S = 10.0
_LEAVE_S = 5.0
_DISPLAYS = range(100, 1000)
SESSION_NAME = "demo"
_X_SOCKETS = Path("/tmp/.X11-unix")  # noqa: S108 - that is where X servers are


def missing_programs() -> dict[str, str]:
    """Return what the real demo lacks on this machine: program to Debian package."""
    return {program: package for program, package in _PROGRAMS.items() if shutil.which(program) is None}


@dataclass
class Setup:
    """A session that waits for its proxy, and where that is to paint.

    Attributes:
        session: The session.
        backend: What paints it.
        environ: The environment for the proxy.
        agent: The agent's process.
        screen: The file in which the X server keeps its screen; None where there is no real one.
        painter: The X client that paints in the session, in words; empty where there is none.
    """

    session: SessionInfo
    backend: NX3Backend
    environ: Mapping[str, str]
    agent: subprocess.Popen[bytes]
    screen: Path | None = None
    painter: str = ""
    _paint: Sequence[str] = ()
    _paint_environ: Mapping[str, str] = field(default_factory=dict)
    _held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def paint(self) -> None:
        """Have something painted in the session, which must be running: an agent serves nobody before."""
        if self.screen is None or self.session.display is None or self.session.cookie is None:
            return
        self._held.enter_context(paint_desktop(self.session.display, self.session.cookie, DESKTOP_COLOUR))
        if self._paint:
            self._held.enter_context(_started(self._paint, self._paint_environ))

    def is_painted(self) -> bool:
        """Tell whether the remote desktop is on the user's screen."""
        return self.screen is not None and bytes(reversed(DESKTOP_COLOUR)) in self.screen.read_bytes()

    def screenshot(self) -> Screenshot | None:
        """Return what the user's screen shows; None where there is no real one."""
        return None if self.screen is None else Screenshot.of_screen(self.screen.read_bytes())


@contextlib.contextmanager
def real_session(directory: Path, interrupts: Interrupts) -> Iterator[Setup]:
    """Start an X server and an agent; on the way out, end them.

    Args:
        directory: Where their files go; nobody else can read it.
        interrupts: What may end the waiting.

    Raises:
        NotReachedError: One of them does not come up.
    """
    cookie, screen_cookie = token_hex(16), token_hex(16)
    number = _free_display()
    server_authority, user_authority, agent_authority = (directory / name for name in ("server", "user", "agent"))
    _X_SOCKETS.mkdir(exist_ok=True)
    with contextlib.suppress(PermissionError):  # it belongs to root, as it should
        _X_SOCKETS.chmod(0o1777)
    with contextlib.ExitStack() as stack:
        _authorise(server_authority, 0, screen_cookie)  # an X server heeds the cookie alone
        display = stack.enter_context(_screen(directory, server_authority, interrupts))
        _authorise(user_authority, display, screen_cookie)
        _authorise(agent_authority, number, cookie)
        port = _free_port()
        options = directory / "options"
        write_private(options, f"nx/nx,accept=127.0.0.1,listen={port},cookie={cookie},link=lan:{number}\n")
        environ = os.environ | {"XAUTHORITY": str(agent_authority)}
        agent = stack.enter_context(
            _started(
                [
                    *("nxagent", "-D", "-auth", str(agent_authority), "-nolisten", "tcp"),
                    *("-options", str(options), "-display", f"nx/nx,options={options}:{number}", f":{number}"),
                ],
                environ | {"NX_ROOT": str(directory), "NX_CLIENT": shutil.which("true") or "/bin/true"},
                log=directory / "nxagent.log",
                display=number,
            )
        )
        painter = next((words for words in _PAINTERS if shutil.which(words[0])), ())
        yield Setup(
            session=SessionInfo(name=SESSION_NAME, cookie=cookie, graphics_port=port, display=number),
            backend=NX3Backend(),
            environ=os.environ | {"DISPLAY": f":{display}", "XAUTHORITY": str(user_authority)},
            agent=agent,
            screen=directory / "Xvfb_screen0",
            painter=painter[0] if painter else "",
            _paint=painter,
            _paint_environ=environ | {"DISPLAY": f":{number}"},
            _held=stack.enter_context(contextlib.ExitStack()),
        )


@contextlib.contextmanager
def stub_session(interrupts: Interrupts) -> Iterator[Setup]:
    """Start stand-ins for the X server and the agent; on the way out, end them.

    Raises:
        NotReachedError: One of them does not come up.
    """
    cookie = token_hex(16)
    with contextlib.ExitStack() as stack:

        def start(role: str, **environ: str) -> tuple[subprocess.Popen[bytes], str]:
            process = stack.enter_context(_started(standins.command(role), os.environ | environ, is_read=True))
            assert process.stdout is not None  # noqa: S101 - it is a pipe
            return process, _first_line(process.stdout, role, interrupts).partition(" ")[2]

        _, display = start("display")
        agent, port = start("agent", **{standins.COOKIE_VARIABLE: cookie})
        yield Setup(
            session=SessionInfo(name=SESSION_NAME, cookie=cookie, graphics_port=int(port), display=50),
            backend=_StandInBackend(),
            environ={**os.environ, "DISPLAY": display},
            agent=agent,
        )


class _StandInBackend(NX3Backend):
    """Runs the stand-in for nxproxy, just as nxproxy is run."""

    def find_executable(self) -> str:
        return standins.command("proxy")[0]

    def command(self, context: BackendContext) -> Sequence[str]:  # noqa: ARG002 - the interface's
        return standins.command("proxy", "-S")


@contextlib.contextmanager
def _screen(directory: Path, authority: Path, interrupts: Interrupts) -> Iterator[int]:
    """Start Xvfb; yields the number of its display."""
    read_fd, write_fd = os.pipe()
    with contextlib.ExitStack() as stack:
        answer = stack.enter_context(os.fdopen(read_fd, "rb", buffering=0))
        with os.fdopen(write_fd, "wb", buffering=0):
            server = _started(
                [
                    *("Xvfb", "-displayfd", str(write_fd), "-screen", "0", _SCREEN, "-fbdir", str(directory)),
                    *("-auth", str(authority), "-nolisten", "tcp", "-noreset"),
                ],
                os.environ,
                log=directory / "Xvfb.log",
                pass_fds=(write_fd,),
            )
            stack.enter_context(server)
        yield int(_first_line(answer, "Xvfb", interrupts))


@contextlib.contextmanager
def _started(
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    log: Path | None = None,
    is_read: bool = False,
    pass_fds: Sequence[int] = (),
    display: int | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program in a session of its own, so that a Ctrl-C does not reach it; on the way out, end it."""
    with contextlib.ExitStack() as stack:
        sink: IO[bytes] | int = subprocess.DEVNULL if log is None else stack.enter_context(log.open("wb"))
        try:
            process = subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if is_read else sink,
                stderr=sink,
                start_new_session=True,
                pass_fds=pass_fds,
            )
        except OSError as error:
            raise NotReachedError(
                "demo.failed", f"{command[0]} cannot be started: {error.strerror or error}."
            ) from error
    try:
        yield process
    finally:
        _end(process)
        if display is not None:
            _free(display, process.pid)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LEAVE_S)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it left behind
    if process.stdout is not None:
        process.stdout.close()


def _free(display: int, pid: int) -> None:
    """Remove what an X server that had to be killed leaves behind: with that, its number is taken for ever."""
    lock = Path(f"/tmp/.X{display}-lock")  # noqa: S108 - that is where X servers are
    with contextlib.suppress(OSError, ValueError):
        if int(lock.read_text(encoding="ascii")) == pid:
            (_X_SOCKETS / f"X{display}").unlink(missing_ok=True)
            lock.unlink()


def _first_line(stream: IO[bytes], program: str, interrupts: Interrupts) -> str:
    """Read what a program says when it is up."""
    deadline = time.monotonic() + _COME_UP_S
    line = b""
    while not line.endswith(b"\n"):
        with interrupts.waiting():
            readable, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        piece = os.read(stream.fileno(), 256) if readable else b""
        if not piece:
            raise NotReachedError("demo.failed", f"{program} did not come up.", "Look at its log: pass --keep.")
        line += piece
    return line.decode("ascii", "replace").strip()


def _authorise(path: Path, display: int, cookie: str) -> None:
    """Write an Xauthority file; the cookie goes through a pipe, since everybody can read arguments."""
    request = f"add :{display} MIT-MAGIC-COOKIE-1 {cookie}\n".encode("ascii")
    try:
        write_private(path, "")
        subprocess.run(["xauth", "-q", "-f", str(path), "source", "-"], input=request, check=True, capture_output=True)  # noqa: S607 - the one in PATH
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotReachedError("demo.failed", f"xauth could not write {path}: {error}.") from error


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _free_display() -> int:
    """Find a display number that no X server has; a random one, so that two demos find different ones."""
    for number in random.sample(_DISPLAYS, len(_DISPLAYS)):
        if not (_X_SOCKETS / f"X{number}").exists() and not Path(f"/tmp/.X{number}-lock").exists():  # noqa: S108
            return number
    raise NotReachedError("demo.failed", "No display number is free.")
