"""The interface of a backend, and the backend for any viewer that a command starts."""

from __future__ import annotations

import ntpath
import os
import re
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from proxy_fsm.errors import BackendError
from proxy_fsm.evidence import AgentDataReceived, AgentEof, ChannelOpened, ConnectionEnded
from proxy_fsm.reasons import EndReason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from proxy_fsm.evidence import Evidence
    from proxy_fsm.session import SessionInfo

__all__ = ["Backend", "BackendContext", "CommandBackend", "ListenKind", "Program", "ReadyWhen", "find_program"]

ListenKind = Literal["unix", "tcp"]
ReadyWhen = Literal["first_bytes", "connected"]

_WINDOWS = os.name == "nt"


@dataclass(frozen=True, slots=True)
class BackendContext:
    """What a backend may use to build its command.

    Attributes:
        session: The session.
        executable: Path of the proxy program, as `Backend.find_executable` returned it.
        listen_address: What the proxy connects to: a unix socket's path, or ``127.0.0.1:PORT``.
        sessions_root: Where the session roots are.
        session_root: This session's own directory, mode 0700; the proxy's working directory.
        environ: The environment that the proxy inherits.
        scratch: A directory for this proxy alone, mode 0700; removed with its content when the proxy has ended.
    """

    session: SessionInfo
    executable: str
    listen_address: str
    sessions_root: Path
    session_root: Path
    environ: Mapping[str, str] = field(repr=False)
    scratch: Path

    @property
    def port(self) -> int | None:
        """The local TCP port to connect to; None for a unix socket."""
        host, _, port = self.listen_address.rpartition(":")
        return int(port) if host == "127.0.0.1" else None


class Backend:
    """One kind of proxy program. It has no thread, and does I/O only in `find_executable` and `preflight`.

    Subclass it, and set or override what differs. An engine calls in this order: `check_session` when it is created;
    `find_executable`, `preflight`, `command` and `environment` in its preflight; `ready` and `diagnose` after each
    observation. A `BackendError` raised by any of them ends the engine with its reason. `process_options` is called by
    the program that has options to pass on, before it creates the engine, which never calls it.

    Attributes:
        name: A short name for events and messages.
        listen_kind: ``"unix"`` or ``"tcp"``: how the program can connect.
        max_connections: How many connections it makes; None for any number.
        resumable: Whether a session outlives its proxy, and can be suspended and resumed; hints speak of that.
        needs_display: Whether it cannot run without an X server, which is then checked before it starts.
    """

    name: str = "proxy"
    listen_kind: ListenKind = "tcp"
    max_connections: int | None = 1
    resumable: bool = True
    needs_display: bool = False

    def check_session(self, session: SessionInfo) -> None:
        """Reject a session that lacks what this backend needs.

        Raises:
            InvalidSession: A field is missing or unsuitable.
        """

    def find_executable(self) -> str:
        """Return the path of the program.

        Raises:
            BackendError: ``proxy_not_found`` or ``proxy_not_startable``.
        """
        raise NotImplementedError

    def preflight(self, context: BackendContext) -> None:
        """Check what else must be in order before the program starts; may block, within ``preflight_s``.

        Raises:
            BackendError: A check failed.
        """

    def command(self, context: BackendContext) -> Sequence[str]:
        """Return the argument vector. Every user of this machine can read it: put no secret in it."""
        raise NotImplementedError

    def environment(self, context: BackendContext) -> Mapping[str, str | None]:  # noqa: ARG002 - for subclasses
        """Return what is added to the inherited environment, None for what is removed; it may contain secrets."""
        return {}

    def ready(self, evidence: Evidence) -> bool:
        """Return whether the session can be used."""
        raise NotImplementedError

    def diagnose(self, evidence: Evidence) -> tuple[EndReason, str] | None:  # noqa: ARG002 - for subclasses
        """Return why the session ends, as soon as that is known: a reason, and one human-readable sentence.

        Called after each observation, and a last time when the program has exited. If it then returns None, the engine
        decides by exit code or signal alone.
        """
        return None

    def process_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Accept the options that this backend knows; return the others."""
        return dict(options)


@dataclass(frozen=True, slots=True)
class Program:
    """A program, and where to look for it.

    Attributes:
        name: Its name, without ``.exe``.
        variable: The environment variable that overrides everything.
        folders: Where it is on Windows, below ``%ProgramFiles%``. The engine does not run there: these are kept for a
            future port.
        hint: How to get it.
    """

    name: str
    variable: str
    folders: tuple[str, ...]
    hint: str

    def look_up(
        self,
        environ: Mapping[str, str] | None = None,
        *,
        windows: bool = _WINDOWS,
        exists: Callable[[str], bool] = os.path.exists,
    ) -> str:
        """Return what to start: a path, or a bare name that is looked up in PATH when it starts.

        Args:
            environ: The environment; by default this process's.
            windows: Whether this is Windows.
            exists: Returns whether a path exists.
        """
        environ = os.environ if environ is None else environ
        if environ.get(self.variable):
            return environ[self.variable]
        if not windows:
            return self.name
        root = environ.get("ProgramFiles", r"C:\Program Files")
        places = [ntpath.join(root, folder, f"{self.name}.exe") for folder in self.folders]
        return next(filter(exists, places), f"{self.name}.exe")


def find_program(program: str, *, hint: str | None = None) -> str:
    """Return the absolute path of a program: looked up in PATH, or as given if it names a directory.

    Raises:
        BackendError: ``proxy_not_found``, or ``proxy_not_startable`` if it exists and cannot be executed.
    """
    found = shutil.which(program)
    if found is not None:
        return os.path.abspath(found)  # noqa: PTH100 - symbolic links are kept
    if os.path.dirname(program) and os.path.lexists(program):  # noqa: PTH120 - only the string is examined
        raise BackendError(
            EndReason.PROXY_NOT_STARTABLE,
            f"The proxy program {program} exists, but is not an executable file.",
            hint,
        )
    raise BackendError(EndReason.PROXY_NOT_FOUND, f"The proxy program {program} was not found.", hint)


class CommandBackend(Backend):
    """Any viewer that a command starts: VNC, RDP, SPICE, ….

    Args:
        command: Program and arguments. ``{host}`` and ``{port}`` are replaced by the local end's address, or
            ``{path}`` by that of a unix socket.
        ready_when: ``"first_bytes"``: the agent's first bytes have arrived; ``"connected"``: the channel is open; or a
            pattern that is searched for in each line of the viewer's output. Beware of the last: many programs buffer
            their output if it goes to a pipe.
        max_connections: How many connections the viewer makes; None for any number.
        needs_display: Whether the viewer needs an X server, which is then checked first.

    Raises:
        ValueError: The command is empty, names neither ``{port}`` nor ``{path}`` or both, or a value is out of range.
    """

    name = "command"
    resumable = False
    _PLACEHOLDER: ClassVar[re.Pattern[str]] = re.compile(r"\{(host|port|path)\}")

    def __init__(
        self,
        command: Sequence[str],
        *,
        ready_when: ReadyWhen | re.Pattern[str] = "first_bytes",
        max_connections: int | None = 1,
        needs_display: bool = False,
    ) -> None:
        if isinstance(command, str) or not command or not all(isinstance(word, str) for word in command):
            raise ValueError("The command must be a sequence of strings: the program, then its arguments.")
        if not isinstance(ready_when, re.Pattern) and ready_when not in {"first_bytes", "connected"}:
            raise ValueError("ready_when must be 'first_bytes', 'connected' or a compiled pattern.")
        if max_connections is not None and max_connections < 1:
            raise ValueError("max_connections must be at least 1, or None for any number.")
        used = {name for word in command[1:] for name in self._PLACEHOLDER.findall(word)}
        if "path" in used and used != {"path"}:
            raise ValueError("The command can have {path}, or {host} and {port}, but not both.")
        if not used & {"path", "port"}:
            raise ValueError("The command must say where to connect: put {port} (and {host}), or {path}, in it.")
        self._command = tuple(command)
        self._ready_when = ready_when
        self.listen_kind: ListenKind = "unix" if "path" in used else "tcp"
        self.max_connections = max_connections
        self.needs_display = needs_display

    def find_executable(self) -> str:
        """Look up the first word of the command."""
        return find_program(self._command[0])

    def command(self, context: BackendContext) -> Sequence[str]:
        """Fill in the local end's address."""
        values = {"host": "127.0.0.1", "port": str(context.port), "path": context.listen_address}
        return [
            context.executable,
            *(self._PLACEHOLDER.sub(lambda found: values[found[1]], word) for word in self._command[1:]),
        ]

    def ready(self, evidence: Evidence) -> bool:
        """Return whether the condition of ``ready_when`` is met."""
        if self._ready_when == "first_bytes":
            return evidence.saw(AgentDataReceived)
        if self._ready_when == "connected":
            return evidence.saw(ChannelOpened)
        pattern = self._ready_when
        return any(pattern.search(line.text) for line in evidence.lines)

    def diagnose(self, evidence: Evidence) -> tuple[EndReason, str] | None:
        """Distinguish a viewer that its user closed from a session that the agent ended."""
        if not evidence.ready:
            return None
        agent_closed = self.max_connections == 1 and evidence.saw(AgentEof)
        if agent_closed and (evidence.saw(ConnectionEnded) or evidence.exited):
            return EndReason.SESSION_ENDED, "The other side closed the connection."
        if evidence.exited and evidence.exited.exit_code == 0:
            return EndReason.VIEWER_CLOSED, "The viewer was closed."
        return None
