"""The backend for x2gokdriveclient, the viewer of X2Go's KDrive sessions.

**Not tested with the program itself**: no package repository that we know of offers it (November 2026). What is known
of it comes from python-x2go 0.6.1.3 (``x2go/backends/proxy/kdrive.py``), and the tests run stand-ins: it reads
nxproxy's option string, from ``options=FILE``; it connects over TCP, once; it needs an X display. What is assumed here
beyond that: the agent's first bytes mean that the session is established, and exit code 0 after them means that its
user has closed it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy_fsm.backends.base import BackendContext, Program
from proxy_fsm.backends.option_string import OptionStringBackend
from proxy_fsm.errors import BackendError
from proxy_fsm.evidence import AgentDataReceived, AgentEof, ConnectionEnded
from proxy_fsm.private_files import write_private
from proxy_fsm.reasons import EndReason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from proxy_fsm.backends.base import ListenKind
    from proxy_fsm.evidence import Evidence

__all__ = ["OPTIONS_NAME", "X2GOKDRIVECLIENT", "KDriveBackend", "write_options"]

#: The program.
X2GOKDRIVECLIENT = Program(
    "x2gokdriveclient",
    "X2GOKDRIVECLIENT_BINARY",
    (r"PyHoca-GUI\x2gokdrive", "x2goclient"),
    "Install x2gokdriveclient, which comes from the X2Go project, or name it in X2GOKDRIVECLIENT_BINARY.",
)

#: Name of the options file, in the scratch directory.
OPTIONS_NAME = "options"


class KDriveBackend(OptionStringBackend):
    """Runs ``x2gokdriveclient -S``, its options in a file that only its owner can read, removed afterwards.

    Args:
        executable: The program; by default what ``X2GOKDRIVECLIENT_BINARY`` names, else ``x2gokdriveclient`` from
            PATH.
        options: Options of the string besides those that the engine sets, for example ``{"clipboard": "both"}``.

    Raises:
        ValueError: An option's name or value is not valid in an option string, or the engine sets the option.
    """

    name = "kdrive"
    listen_kind: ListenKind = "tcp"
    PROGRAM = X2GOKDRIVECLIENT

    def preflight(self, context: BackendContext) -> None:
        """Write the options file."""
        write_options(context.scratch, self._option_string(context))

    def command(self, context: BackendContext) -> Sequence[str]:
        """Pass the path of the options file, and the display again, as python-x2go does."""
        options = context.scratch / OPTIONS_NAME
        return [context.executable, "-S", f"nx/nx,options={options}:{context.session.display}"]

    def environment(self, context: BackendContext) -> Mapping[str, str | None]:
        """Return the session root."""
        return {"NX_ROOT": str(context.sessions_root)}

    def ready(self, evidence: Evidence) -> bool:
        """The agent's first bytes have arrived: it has accepted the cookie."""
        return evidence.saw(AgentDataReceived)

    def diagnose(self, evidence: Evidence) -> tuple[EndReason, str] | None:
        """Decide by what the tunnel observed and the exit code: the program's own messages are not known."""
        agent_closed = evidence.saw(AgentEof) and (evidence.saw(ConnectionEnded) or evidence.exited is not None)
        if agent_closed and not evidence.ready:
            return EndReason.NEGOTIATION_FAILED, (
                "The agent closed the connection before it sent anything: "
                "the session cookie is wrong, or the agent has ended."
            )
        if agent_closed:
            return EndReason.SESSION_ENDED, "The agent closed the session: it was suspended or terminated."
        if evidence.ready and evidence.exited is not None and evidence.exited.exit_code == 0:
            return EndReason.VIEWER_CLOSED, "x2gokdriveclient was closed."
        return None

    def _option_string(self, context: BackendContext) -> str:
        return (
            f"nx/nx,connect=127.0.0.1,port={context.port},cookie={context.session.cookie}"
            f"{self._extra_options}:{context.session.display}"
        )


def write_options(scratch: Path, string: str) -> Path:
    """Write an option string to a file that only its owner can read, and return its path.

    Args:
        scratch: The proxy's scratch directory, which is removed when the proxy has ended.
        string: The whole string; it may contain a cookie.

    Raises:
        BackendError: The path is not valid in an option string, or the file cannot be written.
    """
    path = scratch / OPTIONS_NAME
    if not str(path).isprintable() or any(char in str(path) for char in ",=:% "):
        raise BackendError(
            EndReason.PROXY_NOT_STARTABLE,
            f"The path {path} cannot be written into an option string.",
            "Set TMPDIR or XDG_RUNTIME_DIR to a path without comma, colon, blank, equals or per cent sign.",
        )
    try:
        write_private(path, string)
    except OSError as error:
        raise BackendError(
            EndReason.PROXY_NOT_STARTABLE, f"The options file {path} cannot be written: {error.strerror}."
        ) from error
    return path
