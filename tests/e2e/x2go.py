"""A real X2Go server on this machine, for tests.

Arguments of its programs (measured, x2goserver 4.1.0.3):

- `x2gostartagent GEOMETRY LINK PACK TYPE KEYBOARD-LAYOUT KEYBOARD-TYPE SET-KEYBOARD KIND COMMAND CLIPBOARD`;
  the command only becomes part of the session's name, it is not started;
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
    import socket
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
ASK_S = 0.25  # between two queries of the server: each is a login shell and several Perl programs
RESUME_S = 10.0  # a resuming agent listens within a second
USERS = 64  # how many servers may run at once on one machine
DATABASE = Path("/var/lib/x2go/x2go_sessions")
RED_XTERM = "xterm -bg red -geometry 60x20+10+10 -T red-xterm -e sleep 3600"


@dataclass(frozen=True, slots=True)
class AgentSession:
    """The output of `x2gostartagent`, parsed and raw."""

    display: int
    cookie: str = field(repr=False)
    pid: int
    name: str
    graphics_port: int
    sound_port: int
    fs_port: int
    kind: Kind
    raw: str = field(repr=False)
    log: Path | None = None  # if it is not x2goserver's agent

    @classmethod
    def parse(cls, raw: str, kind: Kind) -> AgentSession:
        """Parse the output of `x2gostartagent`."""
        display, cookie, pid, name, *ports = raw.split()
        graphics_port, sound_port, fs_port = map(int, ports[:3])
        return cls(int(display), cookie, int(pid), name, graphics_port, sound_port, fs_port, kind, raw)


@dataclass(frozen=True, slots=True)
class Ports:
    """The output of `x2goresume-session`."""

    graphics_port: int
    sound_port: int
    fs_port: int
    raw: str = field(repr=False)

    @classmethod
    def parse(cls, raw: str) -> Ports:
        """Parse the output of `x2goresume-session`, lines such as `gr_port=30001`."""
        values = dict(line.split("=", 1) for line in raw.split())
        return cls(int(values["gr_port"]), int(values["sound_port"]), int(values["fs_port"]), raw)


class X2GoServer(SshServer):
    """An SSH server with a user who may start X2Go sessions.

    Each running server has a user of its own, so that parallel servers do not end each other's sessions.
    """

    def __init__(self, *, extra_config: str = "", log_level: str = "VERBOSE", user: str = "pfsmtest") -> None:
        """Prepare; nothing runs yet. `user` gets a number if another server uses it."""
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
        self._lock = self._lock_user()
        self._make_user()
        x_sockets = Path("/tmp/.X11-unix")
        x_sockets.mkdir(exist_ok=True)
        x_sockets.chmod(0o1777)  # nxagent is not root and could not do it
        with Path("/run", "pfsm-database.lock").open("a") as lock:  # createdb would drop one just made by another run
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not DATABASE.exists():
                subprocess.run([program("x2godbadmin") or "x2godbadmin", "--createdb"], check=True)
        super().start()
        self.cleanup()

    def _lock_user(self) -> IO[str]:
        for number in range(USERS):
            self.user = f"{self._wanted_user}{number or ''}"
            lock = Path("/run", f"{self.user}.lock").open("a")  # noqa: SIM115 -- held until stop
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
            else:
                return lock
        raise RuntimeError(f"All {USERS} test users are in use.")

    def _make_user(self) -> None:
        try:
            pwd.getpwnam(self.user)
        except KeyError:
            command = [program("useradd") or "useradd", "--badname", "--create-home", "--shell", "/bin/bash"]
            subprocess.run([*command, self.user], check=True)  # a domain's user has a backslash in the name
        usermod = program("usermod") or "usermod"  # an account with "*" is not locked, yet has no password
        subprocess.run([usermod, "--password", "*", "--append", "--groups", "x2gouser", self.user], check=True)

    def stop(self) -> None:
        """End all sessions and connections, and release the user."""
        if self._lock is not None:
            self.cleanup()
        super().stop()
        if self._lock is not None:
            self._remove_session_files()
            self._forget_sessions()
            self._lock.close()
            self._lock = None

    def connect(
        self,
        user: str | None = None,
        *,
        timeout_s: float = 10.0,
        port: int | None = None,
        sock: socket.socket | None = None,
    ) -> paramiko.SSHClient:
        """Open a fresh connection, by default for the test user."""
        return super().connect(user or self.user, timeout_s=timeout_s, port=port, sock=sock)

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
        """Start an agent, wait until its graphics port listens, and run `command` in it.

        The command waits for its X server, the agent, which serves no client before a proxy is connected.

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
        """Run x2gostartagent; retry if it chose a port or a display that was already in use.

        Another test run may have claimed it in the same moment, or dead X servers may have left their lock files on
        consecutive displays, which x2gostartagent does not check (eight in a row were seen).
        """
        for _ in range(START_ATTEMPTS - 1):
            with contextlib.suppress(CommandError):
                return run(client, command)
        return run(client, command)

    def run_command(self, client: paramiko.SSHClient, session: AgentSession, command: str) -> None:
        """Run `command` in the session, which ends with it."""
        words = ["setsid", "x2goruncommand", str(session.display), str(session.pid), session.name]
        words += [str(session.sound_port), command.replace(" ", "X2GO_SPACE_CHAR"), "none", session.kind]
        run(client, f"{shlex.join(words)} >/dev/null 2>&1 </dev/null & exit")

    def list_sessions(self, client: paramiko.SSHClient) -> str:
        """Return the output of `x2golistsessions`."""
        return run(client, "x2golistsessions")

    def status(self, client: paramiko.SSHClient, name: str) -> str:
        """Return the status of one session as the server lists it: R, S, F, or "" if it is not listed."""
        rows = [line.split("|") for line in self.list_sessions(client).splitlines()]
        return next((row[4] for row in rows if row[1] == name), "")

    def wait_status(self, client: paramiko.SSHClient, name: str, *wanted: str, timeout_s: float = AGENT_S) -> str:
        """Wait until the status of a session is one of `wanted`, and return it ("-" for not listed)."""

        def now() -> str | None:
            status = self.status(client, name) or "-"
            return status if status in wanted else None

        return eventually(now, timeout_s, interval_s=ASK_S)

    def suspend(self, client: paramiko.SSHClient, name: str) -> str:
        """Suspend a session; return the server's output."""
        return run(client, shlex.join(["x2gosuspend-session", name]))

    def terminate(self, client: paramiko.SSHClient, name: str) -> str:
        """Terminate a session; return the server's output."""
        return run(client, shlex.join(["x2goterminate-session", name]))

    def resume(
        self, client: paramiko.SSHClient, session: AgentSession, *, geometry: str = "800x600", link: str = "lan"
    ) -> Ports:
        """Resume a session, wait until its new graphics port listens, and return its ports.

        The server lists it as suspended before its agent logs that, and in between it cannot be resumed. The resume is
        retried if nothing listens (seen about once in a hundred times): x2goresume-session signals the agent without
        checking the result.

        Raises:
            TimeoutError: the agent does not suspend, or after several attempts it listens on no port.
        """
        arguments = [session.name, geometry, link, "16m-jpeg-9", "us", "auto", "0", "both"]
        for _ in range(RESUME_ATTEMPTS):
            eventually(lambda: self._last_change(session).startswith(SUSPENDED_LINE), AGENT_S)
            ports = Ports.parse(run(client, shlex.join(["x2goresume-session", *arguments])))
            with contextlib.suppress(TimeoutError):
                eventually(partial(is_listening, ports.graphics_port), RESUME_S)
                return ports
        raise TimeoutError(f"The agent of {session.name} does not listen. Its last log: {self._last_change(session)}")

    def _last_change(self, session: AgentSession) -> str:
        """Return the agent's last log line about a change of its session."""
        lines = [line for line in self.agent_log(session).splitlines() if line.startswith("Session: ")]
        return lines[-1] if lines else ""

    def agent_log(self, session: AgentSession) -> str:
        """Return the log of a session's agent so far."""
        if session.log is not None:
            return session.log.read_text(errors="replace")
        home = Path(pwd.getpwnam(self.user).pw_dir)
        return (home / ".x2go" / f"C-{session.name}" / "session.log").read_text(errors="replace")

    def end(self, session: AgentSession) -> None:
        """Terminate one session over a connection of its own, and wait until its agent has exited."""
        with contextlib.closing(self.connect()) as client:
            self.terminate(client, session.name)
        with contextlib.suppress(TimeoutError):
            eventually(lambda: not alive(session.pid), 5.0)
        kill(session.pid)
        self.sessions = [each for each in self.sessions if each.name != session.name]

    def cleanup(self) -> None:
        """Terminate every session that was started here, and kill the test user's remaining processes."""
        if self.sessions:  # also those whose agent is dead: until then the database lists them as running
            with contextlib.suppress(Exception), contextlib.closing(self.connect()) as client:
                for session in self.sessions:
                    self.terminate(client, session.name)
        self.sessions.clear()
        connections = set(self.pids().sessions) if self._process is not None else set()

        def others() -> list[int]:
            return [pid for pid in processes_of(self.uid) if pid not in connections]

        def all_killed() -> bool:
            remaining = others()
            send_signal(remaining, signal.SIGKILL)
            return not remaining

        with contextlib.suppress(TimeoutError):
            eventually(lambda: not others(), 1.0)
        eventually(all_killed, AGENT_S)

    def _forget_sessions(self) -> None:
        """Remove the user's sessions from the server's database, as its cleanup service does elsewhere.

        Ended ones keep their display and ports there, and x2gostartagent skips each of them.
        """
        own = (f"{self.user.replace(chr(92), '')}-*",)
        with contextlib.closing(sqlite3.connect(DATABASE, timeout=AGENT_S)) as database, database:
            for table in ("used_ports", "sessions"):
                database.execute(f"DELETE FROM {table} WHERE session_id GLOB ?", own)  # noqa: S608 - names from above

    def _remove_session_files(self) -> None:
        own = [*Path("/tmp").glob(".X*-lock"), *Path("/tmp/.X11-unix").iterdir()]
        for path in own:  # a killed agent leaves the files of its display
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_uid == self.uid:
                    path.unlink()
        shutil.rmtree(Path("/tmp", f".x2go-{self.user}"), ignore_errors=True)
        shutil.rmtree(Path(pwd.getpwnam(self.user).pw_dir, ".x2go"), ignore_errors=True)


def kill(pid: int) -> None:
    """Kill process `pid` and wait until it has exited."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not alive(pid), AGENT_S)
