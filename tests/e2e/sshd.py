"""OpenSSH's server on a port of its own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import paramiko

from tests.helpers.wait import eventually

from .procs import alive, command_line, descendants, holders, program, program_name, send_signal

if TYPE_CHECKING:
    from typing import Self

LOOPBACK = "127.0.0.1"
START_S = 10.0
STOP_S = 5.0
COMMAND_S = 30.0
PORT_ATTEMPTS = 5
CONFIG = """\
ListenAddress 127.0.0.1
PidFile none
UsePAM no
UseDNS no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PrintMotd no
PrintLastLog no
MaxStartups 1000
MaxSessions 1000
Subsystem sftp internal-sftp
"""


class SshPids(NamedTuple):
    """The processes of an sshd: the listener, and those of all connections, parents first."""

    listener: int
    sessions: tuple[int, ...]


class CommandError(Exception):
    """A command on the server ended with a status other than 0."""


class SshServer:
    """sshd on a free loopback port; users log in with a key that it generates.

    In its configuration the first value wins, so `extra_config` overrides ours.
    """

    def __init__(self, *, extra_config: str = "", log_level: str = "VERBOSE") -> None:
        """Prepare; nothing runs yet.

        Args:
            extra_config: lines for sshd_config, such as `AllowTcpForwarding no`.
            log_level: sshd's LogLevel, for `log`.
        """
        self._extra_config = extra_config
        self._log_level = log_level
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._listening = threading.Event()
        self.directory = Path()
        self.port = 0
        self.log: list[str] = []
        self.host_key: paramiko.PKey = paramiko.ECDSAKey.generate(bits=256)
        self.client_key = paramiko.ECDSAKey.generate(bits=256)

    @property
    def client_key_path(self) -> Path:
        """The private key for other clients, such as OpenSSH's."""
        return self.directory / "client_key"

    @property
    def known_hosts_path(self) -> Path:
        """The host key in the format of OpenSSH's known_hosts."""
        return self.directory / "known_hosts"

    def start(self) -> None:
        """Start sshd and wait until it listens."""
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.directory = Path(tempfile.mkdtemp(prefix="pfsm-sshd-"))
        self.directory.chmod(0o711)  # sshd reads the authorized keys as the user who logs in
        try:
            self._write_keys()
            self._listen()
        except BaseException:
            self.stop()
            raise

    def _write_keys(self) -> None:
        key = self.host_key
        if not isinstance(key, paramiko.ECDSAKey):
            raise TypeError("The host key must be the generated one.")
        key.write_private_key_file(str(self.directory / "host_key"))
        self.client_key.write_private_key_file(str(self.client_key_path))
        public = f"{self.client_key.get_name()} {self.client_key.get_base64()}\n"
        (self.directory / "authorized_keys").write_text(public)
        (self.directory / "authorized_keys").chmod(0o644)

    def _listen(self) -> None:
        if not any(self._start_on_free_port() for _ in range(PORT_ATTEMPTS)):
            raise RuntimeError("sshd did not start:\n" + "\n".join(self.log))

    def _start_on_free_port(self) -> bool:
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            self.port = probe.getsockname()[1]
        known = f"[{LOOPBACK}]:{self.port} {self.host_key.get_name()} {self.host_key.get_base64()}\n"
        self.known_hosts_path.write_text(known)
        own = f"Port {self.port}\nLogLevel {self._log_level}\nHostKey {self.directory}/host_key\n"
        own += f"AuthorizedKeysFile {self.directory}/authorized_keys\n"
        config = self.directory / "sshd_config"
        config.write_text(f"{self._extra_config}\n{own}{CONFIG}")
        self._listening.clear()
        self._process = subprocess.Popen(
            [program("sshd") or "sshd", "-D", "-e", "-f", config],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, args=[self._process], daemon=True)
        self._reader.start()
        process = self._process
        eventually(lambda: self._listening.is_set() or process.poll() is not None, START_S)
        return self._listening.is_set()

    def _read_log(self, process: subprocess.Popen[str]) -> None:
        if process.stderr is None:
            return
        with process.stderr:
            for line in process.stderr:
                self.log.append(line.rstrip())
                if line.startswith(f"Server listening on {LOOPBACK}"):
                    self._listening.set()

    def pids(self) -> SshPids:
        """Return the processes of the server, without the commands that users run."""
        if self._process is None:
            raise RuntimeError("The SSH server was not started.")
        below = [pid for pid in descendants(self._process.pid) if program_name(pid) == "sshd"]
        return SshPids(self._process.pid, tuple(below))

    def session_pids(self, client: paramiko.SSHClient) -> list[int]:
        """Return the processes that serve the connection of `client`: stop or kill them to disturb only that."""
        transport = transport_of(client)
        if not isinstance(transport.sock, socket.socket):
            raise TypeError("The client is connected through another connection.")
        port = transport.sock.getsockname()[1]
        serving = re.compile(f"sshd: {re.escape(transport.get_username() or '')}(@|$)")

        def serving_pids() -> list[int]:
            found = holders(self.port, port, self.pids().sessions)
            return found if any(serving.match(command_line(pid)) for pid in found) else []

        return eventually(serving_pids, START_S)  # just after the login an unprivileged helper is still exiting

    def connect(
        self,
        user: str = "root",
        *,
        timeout_s: float = START_S,
        port: int | None = None,
        sock: socket.socket | None = None,
    ) -> paramiko.SSHClient:
        """Open a fresh connection for `user`, through another port or socket if one is given; checks the host key."""
        port = port or self.port
        client = paramiko.SSHClient()
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        client.get_host_keys().add(f"[{LOOPBACK}]:{port}", self.host_key.get_name(), self.host_key)
        try:
            client.connect(
                LOOPBACK,
                port,
                user,
                pkey=self.client_key,
                timeout=timeout_s,
                sock=sock,
                allow_agent=False,
                look_for_keys=False,
            )
        except BaseException:
            client.close()
            raise
        return client

    def stop(self) -> None:
        """End the listener and all its connections, including stopped ones."""
        if self._process is not None:
            if self._process.poll() is None:
                send_signal([self._process.pid], signal.SIGSTOP)  # no new child while they are listed
                sessions = self.pids().sessions
                send_signal([self._process.pid, *sessions], signal.SIGKILL)
                self._process.wait(STOP_S)
                eventually(lambda: not any(map(alive, sessions)), STOP_S)
            self._process = None
        if self._reader is not None:
            self._reader.join(STOP_S)
        if self.directory != Path():
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def transport_of(client: paramiko.SSHClient) -> paramiko.Transport:
    """Return the transport of a connected client."""
    transport = client.get_transport()
    if transport is None:
        raise RuntimeError("The client is not connected.")
    return transport


def run(client: paramiko.SSHClient, command: str, *, timeout_s: float = COMMAND_S) -> str:
    """Run `command` on the server, return its standard output.

    Raises:
        CommandError: its exit status is not 0; the message contains its standard error.
        TimeoutError: it did not end within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    with contextlib.closing(transport_of(client).open_session(timeout=timeout_s)) as channel:
        channel.settimeout(timeout_s)
        channel.exec_command(command)
        channel.shutdown_write()
        output = bytearray()
        while piece := channel.recv(65536):
            output += piece
            if time.monotonic() > deadline:
                raise TimeoutError(f"{command!r} did not end within {timeout_s} s")
        errors = channel.makefile_stderr("rb").read()
        status = channel.recv_exit_status()
    if status != 0:
        raise CommandError(f"{command!r} ended with {status}: {os.fsdecode(errors)}{os.fsdecode(bytes(output))}")
    return output.decode(errors="replace")
