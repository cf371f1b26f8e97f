"""An agent started by hand: the real one, without the seconds that x2goserver's scripts take."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

from tests.helpers.wait import eventually

from .procs import SYSTEM_PATH, is_listening, program
from .x2go import LOOPBACK, AgentSession

if TYPE_CHECKING:
    from collections.abc import Iterator

AUTHORITY = "Xauthority"
START_S = 10.0
DISPLAYS = range(300, 400)  # x2goserver counts from 50


@contextlib.contextmanager
def plain_agent() -> Iterator[AgentSession]:
    """Yield an nxagent on a free display and port, in its first attempt; the server neither lists nor can resume it."""
    with contextlib.ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="pfsm-agent-", ignore_cleanup_errors=True))
        )
        yield next(filter(None, (_started_on(display, directory, stack) for display in DISPLAYS)))


def plain_environment(agent: AgentSession) -> dict[str, str]:
    """Return the environment that a program needs to run in the session of an agent started by hand."""
    if agent.log is None:
        raise ValueError("x2goserver started this agent.")
    cookies = agent.log.with_name(AUTHORITY)
    return {"PATH": SYSTEM_PATH, "DISPLAY": f":{agent.display}", "XAUTHORITY": str(cookies)}


def _started_on(display: int, directory: Path, stack: contextlib.ExitStack) -> AgentSession | None:
    """Start it on this display, None if that is in use; the stack ends it."""
    if any(path.exists() for path in _files_of(display)):
        return None
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    cookie, options, log = token_hex(16), directory / "options", directory / "log"
    options.touch(mode=0o600)
    options.write_text(f"nx/nx,accept={LOOPBACK},listen={port},cookie={cookie},link=lan,geometry=800x600:{display}")
    authority = directory / AUTHORITY  # its cookie for the user's X server; nxproxy substitutes the real one
    authority.touch(mode=0o600)
    entry = f"add :{display} MIT-MAGIC-COOKIE-1 {cookie}\n".encode()
    subprocess.run([program("xauth") or "xauth", "-q", "-f", authority, "source", "-"], input=entry, check=True)
    environment = {"PATH": SYSTEM_PATH, "HOME": str(directory), "NX_ROOT": str(directory)}
    command = [program("nxagent") or "nxagent", "-D", "-nolisten", "tcp", "-options", str(options)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "-display", f"nx/nx,options={options}:{display}", f":{display}"],
            env={**environment, "XAUTHORITY": str(authority)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    stack.callback(_end, process, display)
    eventually(lambda: is_listening(port) or process.poll() is not None, START_S)
    if process.poll() is not None:
        return None  # another test run has claimed the display, or the port, in the same moment
    name = f"plain-{display}-{int(time.time())}_stDnone_dp24"
    raw = "\n".join(map(str, (display, cookie, process.pid, name, port, port, port)))
    return AgentSession(display, cookie, process.pid, name, port, port, port, "D", raw, log)


def _files_of(display: int) -> tuple[Path, Path]:
    return Path(f"/tmp/.X{display}-lock"), Path(f"/tmp/.X11-unix/X{display}")


def _end(process: subprocess.Popen[bytes], display: int) -> None:
    """Kill it, and remove the files of its display unless another run's agent already owns them."""
    process.kill()
    process.wait(START_S)
    lock, connections = _files_of(display)
    with contextlib.suppress(FileNotFoundError):
        if int(lock.read_text()) == process.pid:
            connections.unlink(missing_ok=True)
            lock.unlink()
