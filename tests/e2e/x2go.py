"""A real X2Go server on this machine, for tests.

What its programs take (measured, x2goserver 4.1.0.3):

- `x2gostartagent GEOMETRY LINK PACK TYPE KEYBOARD-LAYOUT KEYBOARD-TYPE SET-KEYBOARD KIND COMMAND CLIPBOARD`;
  the command is only a part of the session's name, it is not started;
- `x2goruncommand DISPLAY AGENT-PID NAME SOUND-PORT COMMAND SOUND-SYSTEM KIND` starts it, and ends the session
  when it ends; blanks in the command are written `X2GO_SPACE_CHAR`;
- `x2goresume-session NAME GEOMETRY LINK PACK KEYBOARD-LAYOUT KEYBOARD-TYPE SET-KEYBOARD CLIPBOARD`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import shlex
import shutil
import signal
import sqlite3
import subprocess
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from tests.helpers.wait import eventually

from .display import Display
from .procs import alive, is_listening, missing_programs, processes_of, program, send_signal
from .sshd import LOOPBACK, CommandError, SshPids, SshServer, run, transport_of

if TYPE_CHECKING:
    from typing import IO

    import paramiko

__all__ = [
    "ASK_S",
    "LOOPBACK",
    "AgentSession",
    "CommandError",
    "Display",
    "Kind",
    "Ports",
    "SshPids",
    "SshServer",
    "X2GoServer",
    "missing_programs",
    "run",
    "transport_of",
]

Kind: TypeAlias = Literal["D", "R", "P"]  # desktop, rootless, published applications
AGENT_S = 20.0
START_ATTEMPTS = 10
RESUME_ATTEMPTS = 3
SUSPENDED_LINE = "Session: Session suspended at"
ASK_S = 0.25  # between two questions to the server: each is a login shell and several Perl programs
RESUME_S = 10.0  # an agent that resumes listens within a second
USERS = 64  # how many servers there may be at once on one machine
DATABASE = Path("/var/lib/x2go/x2go_sessions")
RED_XTERM = "xterm -bg red -geometry 60x20+10+10 -T red-xterm -e sleep 3600"


@dataclass(frozen=True, slots=True)
class AgentSession:
    """What `x2gostartagent` printed, line by line, and the whole of it."""

    display: int
    cookie: str = field(repr=False)
    pid: int
    name: str
    graphics_port: int
    sound_port: int
    fs_port: int
    kind: Kind
    raw: str = field(repr=False)
    log: Path | None = None  # where it is not x2goserver's agent

    @classmethod
    def parse(cls, raw: str, kind: Kind) -> AgentSession:
        """Read the output of `x2gostartagent`."""
        display, cookie, pid, name, *ports = raw.split()
        graphics_port, sound_port, fs_port = map(int, ports[:3])
        return cls(int(display), cookie, int(pid), name, graphics_port, sound_port, fs_port, kind, raw)


@dataclass(frozen=True, slots=True)
class Ports:
    """What `x2goresume-session` printed."""

    graphics_port: int
    sound_port: int
    fs_port: int
    raw: str = field(repr=False)

    @classmethod
    def parse(cls, raw: str) -> Ports:
        """Read the output of `x2goresume-session`, lines such as `gr_port=30001`."""
        values = dict(line.split("=", 1) for line in raw.split())
        return cls(int(values["gr_port"]), int(values["sound_port"]), int(values["fs_port"]), raw)


class X2GoServer(SshServer):
    """An SSH server with a user who may start X2Go sessions.

    Each running server has a user of its own, so that servers side by side do not end each other's sessions.
    """

    def __init__(self, *, extra_config: str = "", log_level: str = "VERBOSE", user: str = "pfsmtest") -> None:
        """Take down the wishes; `user` gets a number when another server has it."""
        super().__init__(extra_config=extra_config, log_level=log_level)
        self._wanted_user = user
        self._lock: IO[str] | None = None
        self.user = ""
        self.sessions: list[AgentSession] = []

    @property
    def uid(self) -> int:
        """The number of the test user."""
        return pwd.getpwnam(self.user).pw_uid

    def start(self) -> None:
        """Prepare user and database, and start the SSH server."""
        self._lock = self._take_user()
        self._make_user()
        x_sockets = Path("/tmp/.X11-unix")
        x_sockets.mkdir(exist_ok=True)
        x_sockets.chmod(0o1777)  # nxagent, who is not root, could not make it so
        with Path("/run", "pfsm-database.lock").open("a") as lock:  # it would remove one that another run has just made
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not DATABASE.exists():
                subprocess.run([program("x2godbadmin") or "x2godbadmin", "--createdb"], check=True)
        super().start()
        self.cleanup()

    def _take_user(self) -> IO[str]:
        for number in range(USERS):
            self.user = f"{self._wanted_user}{number or ''}"
            lock = Path("/run", f"{self.user}.lock").open("a")  # noqa: SIM115 -- held until stop
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
            else:
                return lock
        raise RuntimeError(f"All {USERS} test users are taken.")

    def _make_user(self) -> None:
        try:
            pwd.getpwnam(self.user)
        except KeyError:
            command = [program("useradd") or "useradd", "--create-home", "--shell", "/bin/bash", self.user]
            subprocess.run(command, check=True)
        usermod = program("usermod") or "usermod"  # an account with "*" is not locked, yet has no password
        subprocess.run([usermod, "--password", "*", "--append", "--groups", "x2gouser", self.user], check=True)

    def stop(self) -> None:
        """End all sessions and connections, and give the user back."""
        if self._lock is not None:
            self.cleanup()
        super().stop()
        if self._lock is not None:
            self._remove_session_files()
            self._forget_sessions()
            self._lock.close()
            self._lock = None

    def connect(
        self, user: str | None = None, *, timeout_s: float = 10.0, port: int | None = None
    ) -> paramiko.SSHClient:
        """Open a fresh connection, for the test user when no other is named."""
        return super().connect(user or self.user, timeout_s=timeout_s, port=port)

    def start_agent(
        self,
        client: paramiko.SSHClient,
        kind: Kind = "D",
        command: str | None = RED_XTERM,
        *,
        geometry: str = "800x600",
        link: str = "lan",
        pack: str = "16m-jpeg-9",
        clipboard: str = "both",
    ) -> AgentSession:
        """Start an agent, wait until its graphics port listens, and have it run `command`.

        The command waits for its X server, the agent, which serves nobody before a proxy is there.

        Args:
            client: a connection of the test user.
            kind: D for a desktop in a window, R for single windows, P for published applications.
            command: what to run in the session; None runs nothing.
            geometry: size of the desktop in pixels.
            link: speed of the connection, modem to lan.
            pack: how pictures are compressed.
            clipboard: both, client, server or none.
        """
        name = Path(shlex.split(command)[0]).name if command else "none"
        arguments = [geometry, link, pack, "unix-kde-depth_24", "us", "auto", "0", kind, name, clipboard]
        session = AgentSession.parse(self._started(client, shlex.join(["x2gostartagent", *arguments])), kind)
        self.sessions.append(session)
        eventually(lambda: is_listening(session.graphics_port), AGENT_S)
        if command:
            self.run_command(client, session, command)
        return session

    def _started(self, client: paramiko.SSHClient, command: str) -> str:
        """Run x2gostartagent, again where it chose a port or a display that it did not get.

        Another test run may have taken it in the same moment, or somebody's dead X servers have left their locks on
        displays in a row: x2gostartagent does not see those (eight were met).
        """
        for _ in range(START_ATTEMPTS - 1):
            with contextlib.suppress(CommandError):
                return run(client, command)
        return run(client, command)

    def run_command(self, client: paramiko.SSHClient, session: AgentSession, command: str) -> None:
        """Have the session run `command`; the session ends with it."""
        words = ["setsid", "x2goruncommand", str(session.display), str(session.pid), session.name]
        words += [str(session.sound_port), command.replace(" ", "X2GO_SPACE_CHAR"), "none", session.kind]
        run(client, f"{shlex.join(words)} >/dev/null 2>&1 </dev/null & exit")

    def list_sessions(self, client: paramiko.SSHClient) -> str:
        """Give what `x2golistsessions` prints."""
        return run(client, "x2golistsessions")

    def status(self, client: paramiko.SSHClient, name: str) -> str:
        """Give the status of one session as the server lists it: R, S, F, or "" when it does not list it."""
        rows = [line.split("|") for line in self.list_sessions(client).splitlines()]
        return next((row[4] for row in rows if row[1] == name), "")

    def wait_status(self, client: paramiko.SSHClient, name: str, *wanted: str, timeout_s: float = AGENT_S) -> str:
        """Wait until the status of a session is one of `wanted`, and return it ("-" for not listed)."""

        def now() -> str | None:
            status = self.status(client, name) or "-"
            return status if status in wanted else None

        return eventually(now, timeout_s, interval_s=ASK_S)

    def suspend(self, client: paramiko.SSHClient, name: str) -> str:
        """Suspend a session, return what the server printed."""
        return run(client, shlex.join(["x2gosuspend-session", name]))

    def terminate(self, client: paramiko.SSHClient, name: str) -> str:
        """Terminate a session, return what the server printed."""
        return run(client, shlex.join(["x2goterminate-session", name]))

    def resume(
        self, client: paramiko.SSHClient, session: AgentSession, *, geometry: str = "800x600", link: str = "lan"
    ) -> Ports:
        """Resume a session, wait until its new graphics port listens, and return its ports.

        The server lists it as suspended before its agent says so, and in between it cannot be resumed. It is asked for
        again where nothing listens (seen once in some hundred times): x2goresume-session sends the agent a signal, and
        does not look what comes of it.

        Raises:
            TimeoutError: the agent does not suspend, or after several attempts it listens nowhere.
        """
        arguments = [session.name, geometry, link, "16m-jpeg-9", "us", "auto", "0", "both"]
        for _ in range(RESUME_ATTEMPTS):
            eventually(lambda: self._last_said(session).startswith(SUSPENDED_LINE), AGENT_S)
            ports = Ports.parse(run(client, shlex.join(["x2goresume-session", *arguments])))
            with contextlib.suppress(TimeoutError):
                eventually(partial(is_listening, ports.graphics_port), RESUME_S)
                return ports
        raise TimeoutError(f"The agent of {session.name} listens nowhere. Last it said: {self._last_said(session)}")

    def _last_said(self, session: AgentSession) -> str:
        """Give what the agent last logged of its session's changes."""
        lines = [line for line in self.agent_log(session).splitlines() if line.startswith("Session: ")]
        return lines[-1] if lines else ""

    def agent_log(self, session: AgentSession) -> str:
        """Give what the agent of a session has logged so far."""
        if session.log is not None:
            return session.log.read_text(errors="replace")
        home = Path(pwd.getpwnam(self.user).pw_dir)
        return (home / ".x2go" / f"C-{session.name}" / "session.log").read_text(errors="replace")

    def end(self, session: AgentSession) -> None:
        """Terminate one session over a connection of its own, and wait until its agent is gone."""
        with contextlib.closing(self.connect()) as client:
            self.terminate(client, session.name)
        with contextlib.suppress(TimeoutError):
            eventually(lambda: not alive(session.pid), 5.0)
        kill(session.pid)
        self.sessions = [each for each in self.sessions if each.name != session.name]

    def cleanup(self) -> None:
        """Terminate every session that was started here, and kill what then remains of the test user's."""
        if self.sessions:  # those whose agent is dead too: until then the database says that they run
            with contextlib.suppress(Exception), contextlib.closing(self.connect()) as client:
                for session in self.sessions:
                    self.terminate(client, session.name)
        self.sessions.clear()
        connections = set(self.pids().sessions) if self._process is not None else set()

        def others() -> list[int]:
            return [pid for pid in processes_of(self.uid) if pid not in connections]

        def gone() -> bool:
            left = others()
            send_signal(left, signal.SIGKILL)
            return not left

        with contextlib.suppress(TimeoutError):
            eventually(lambda: not others(), 1.0)
        eventually(gone, AGENT_S)

    def _forget_sessions(self) -> None:
        """Remove the user's sessions from the server's database, as its cleaning service does elsewhere.

        Ended ones keep their display and ports there, and x2gostartagent steps over each of them.
        """
        own = (f"{self.user}-*",)
        with contextlib.closing(sqlite3.connect(DATABASE, timeout=AGENT_S)) as database, database:
            for table in ("used_ports", "sessions"):
                database.execute(f"DELETE FROM {table} WHERE session_id GLOB ?", own)  # noqa: S608 - ours, from above

    def _remove_session_files(self) -> None:
        own = [*Path("/tmp").glob(".X*-lock"), *Path("/tmp/.X11-unix").iterdir()]
        for path in own:  # a killed agent leaves its display taken
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_uid == self.uid:
                    path.unlink()
        shutil.rmtree(Path("/tmp", f".x2go-{self.user}"), ignore_errors=True)
        shutil.rmtree(Path(pwd.getpwnam(self.user).pw_dir, ".x2go"), ignore_errors=True)


def kill(pid: int) -> None:
    """Kill process `pid` and wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not alive(pid), AGENT_S)
