"""An agent that is started by hand: the real one, without the seconds that x2goserver's scripts take."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

from .procs import SYSTEM_PATH, eventually, is_listening, program
from .x2go import LOOPBACK, AgentSession

if TYPE_CHECKING:
    from typing import Self

START_S = 10.0
DISPLAYS = range(300, 400)  # x2goserver counts from 50


class PlainAgent:
    """nxagent on a free display and port, in its first attempt. The server does not list it, nor can it resume it."""

    def __init__(self) -> None:
        self._directory = Path()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="pfsm-agent-"))
        try:
            self.session = next(filter(None, map(self._started_on, DISPLAYS)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def _started_on(self, display: int) -> AgentSession | None:
        if any(path.exists() for path in self._files_of(display)):
            return None
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port = probe.getsockname()[1]
        cookie, options, log = token_hex(16), self._directory / "options", self._directory / "log"
        options.touch(mode=0o600)
        options.write_text(f"nx/nx,accept={LOOPBACK},listen={port},cookie={cookie},link=lan,geometry=800x600:{display}")
        authority = self._directory / "Xauthority"  # what it shows to the user's X server; nxproxy puts the real one in
        authority.touch(mode=0o600)
        entry = f"add :{display} MIT-MAGIC-COOKIE-1 {cookie}\n".encode()
        subprocess.run([program("xauth") or "xauth", "-q", "-f", authority, "source", "-"], input=entry, check=True)
        environment = {"PATH": SYSTEM_PATH, "HOME": str(self._directory), "NX_ROOT": str(self._directory)}
        command = [program("nxagent") or "nxagent", "-D", "-nolisten", "tcp", "-options", str(options)]
        with log.open("wb") as output:
            process = self._process = subprocess.Popen(
                [*command, "-display", f"nx/nx,options={options}:{display}", f":{display}"],
                env={**environment, "XAUTHORITY": str(authority)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        eventually(lambda: is_listening(port) or process.poll() is not None, START_S)
        if process.poll() is not None:
            return None  # another test run has taken the display, or the port, in the same moment
        name = f"plain-{display}-{int(time.time())}_stDnone_dp24"
        raw = "\n".join(map(str, (display, cookie, process.pid, name, port, port, port)))
        return AgentSession(display, cookie, process.pid, name, port, port, port, "D", raw, log)

    @staticmethod
    def _files_of(display: int) -> tuple[Path, Path]:
        return Path(f"/tmp/.X{display}-lock"), Path(f"/tmp/.X11-unix/X{display}")

    def __exit__(self, *_: object) -> None:
        process = self._process
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait(START_S)
            for path in self._files_of(self.session.display):
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
        shutil.rmtree(self._directory, ignore_errors=True)
