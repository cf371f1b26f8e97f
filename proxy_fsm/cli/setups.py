"""Sessions for the demo: with the real programs if all of them are installed, otherwise with stand-ins."""

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

#: What the real demo needs, and its package in Debian, Ubuntu and Fedora, or in Debian and Ubuntu.
_PROGRAMS = {"nxagent": "nxagent", "nxproxy": "nxproxy", "Xvfb": "xvfb", "xauth": "xauth"}
_GREETING = 'printf "\\n  This window is painted by an X client\\n  inside the remote session.\\n"; exec sleep 3600'
#: X clients for the remote desktop; the first installed one is started.
_PAINTERS = (
    ("xterm", "-bg", "#fdf6e3", "-fg", "#073642", "-geometry", "64x12+40+40", "-e", "sh", "-c", _GREETING),
    ("xclock", "-geometry", "240x240+40+40"),
    ("xeyes", "-geometry", "240x160+40+40"),
)
#: Of the remote desktop, which takes three quarters of the width and height; the screen around it is black.
DESKTOP_COLOUR = (0x2A, 0x6F, 0x97)
_SCREEN = "1024x768x24"
_STARTUP_TIMEOUT_S = 10.0
_EXIT_TIMEOUT_S = 5.0
_DISPLAYS = range(100, 1000)
SESSION_NAME = "demo"
_X_SOCKETS = Path("/tmp/.X11-unix")  # noqa: S108 - where X servers have their sockets


def missing_programs() -> dict[str, str]:
    """Return the programs that the real demo lacks on this machine, each with its Debian package."""
    return {program: package for program, package in _PROGRAMS.items() if shutil.which(program) is None}


@dataclass
class Setup:
    """A session that waits for its proxy, and the screen to show it on.

    Attributes:
        session: The session.
        backend: What shows it.
        environ: The environment for the proxy.
        agent: The agent's process.
        screen: The X server's framebuffer file; None without a real one.
        painter: The name of the X client in the session; empty if there is none.
    """

    session: SessionInfo
    backend: NX3Backend
    environ: Mapping[str, str]
    agent: subprocess.Popen[bytes]
    screen: Path | None = None
    painter: str = ""
    _paint: Sequence[str] = ()
    _paint_environ: Mapping[str, str] = field(default_factory=dict)
    _resources: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def paint(self) -> None:
        """Paint something in the session, which must be running: before that the agent serves no client."""
        if self.screen is None or self.session.display is None or self.session.cookie is None:
            return
        self._resources.enter_context(paint_desktop(self.session.display, self.session.cookie, DESKTOP_COLOUR))
        if self._paint:
            self._resources.enter_context(_started(self._paint, self._paint_environ))

    def is_painted(self) -> bool:
        """Return whether the remote desktop is on the user's screen."""
        return self.screen is not None and bytes(reversed(DESKTOP_COLOUR)) in self.screen.read_bytes()

    def screenshot(self) -> Screenshot | None:
        """Return a screenshot of the user's screen; None without a real one."""
        return None if self.screen is None else Screenshot.of_screen(self.screen.read_bytes())


@contextlib.contextmanager
def real_session(directory: Path, interrupts: Interrupts) -> Iterator[Setup]:
    """Start an X server and an agent; terminate them on the way out.

    Args:
        directory: For their files; it must be private.
        interrupts: Signals; one of them ends the wait.

    Raises:
        NotReachedError: One of them does not start.
    """
    cookie, screen_cookie = token_hex(16), token_hex(16)
    number = _free_display()
    server_authority, user_authority, agent_authority = (directory / name for name in ("server", "user", "agent"))
    _X_SOCKETS.mkdir(exist_ok=True)
    with contextlib.suppress(PermissionError):  # it belongs to root, as it should
        _X_SOCKETS.chmod(0o1777)
    with contextlib.ExitStack() as stack:
        _authorise(server_authority, 0, screen_cookie)  # an X server checks the cookie alone
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
            _resources=stack.enter_context(contextlib.ExitStack()),
        )


@contextlib.contextmanager
def stub_session(interrupts: Interrupts) -> Iterator[Setup]:
    """Start stand-ins for the X server and the agent; terminate them on the way out.

    Raises:
        NotReachedError: One of them does not start.
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
    """Runs the stand-in for nxproxy exactly as nxproxy is run."""

    def find_executable(self) -> str:
        return standins.command("proxy")[0]

    def command(self, context: BackendContext) -> Sequence[str]:  # noqa: ARG002 - the interface's
        return standins.command("proxy", "-S")


@contextlib.contextmanager
def _screen(directory: Path, authority: Path, interrupts: Interrupts) -> Iterator[int]:
    """Start Xvfb; yield its display number."""
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
    """Start a program in its own session, so that Ctrl-C does not reach it; terminate it on the way out."""
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
        _terminate(process)
        if display is not None:
            _remove_lock(display, process.pid)


def _terminate(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_EXIT_TIMEOUT_S)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the rest of its process group
    if process.stdout is not None:
        process.stdout.close()


def _remove_lock(display: int, pid: int) -> None:
    """Remove the lock and socket of a killed X server, which would block its display number for ever."""
    lock = Path(f"/tmp/.X{display}-lock")  # noqa: S108 - where X servers have their locks
    with contextlib.suppress(OSError, ValueError):
        if int(lock.read_text(encoding="ascii")) == pid:
            (_X_SOCKETS / f"X{display}").unlink(missing_ok=True)
            lock.unlink()


def _first_line(stream: IO[bytes], program: str, interrupts: Interrupts) -> str:
    """Read the line that a program prints once it is up."""
    deadline = time.monotonic() + _STARTUP_TIMEOUT_S
    line = b""
    while not line.endswith(b"\n"):
        with interrupts.waiting():
            readable, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        piece = os.read(stream.fileno(), 256) if readable else b""
        if not piece:
            raise NotReachedError("demo.failed", f"{program} did not start.", "Pass --keep and read its log.")
        line += piece
    return line.decode("ascii", "replace").strip()


def _authorise(path: Path, display: int, cookie: str) -> None:
    """Write an Xauthority file; the cookie goes through a pipe, since every user can read arguments."""
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
    """Find a free display number; a random one, so that two demos find different ones."""
    for number in random.sample(_DISPLAYS, len(_DISPLAYS)):
        if not (_X_SOCKETS / f"X{number}").exists() and not Path(f"/tmp/.X{number}-lock").exists():  # noqa: S108
            return number
    raise NotReachedError("demo.failed", "No display number is free.")
