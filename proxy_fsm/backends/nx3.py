"""The backend for nxproxy, the proxy program of X2Go's NX sessions.

Source for wording and meaning of nxproxy's lines: nx-libs 3.5.99, nxcomp/src/Loop.cpp and its neighbours.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from proxy_fsm.backends.base import BackendContext, Program
from proxy_fsm.backends.option_string import MAX_STRING_BYTES, OptionStringBackend, fits
from proxy_fsm.errors import BackendError
from proxy_fsm.evidence import ChannelOpened, OutputLine
from proxy_fsm.reasons import EndReason
from proxy_fsm.x11 import DisplayError, open_display

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from proxy_fsm.backends.base import ListenKind
    from proxy_fsm.evidence import Evidence

__all__ = ["NXPROXY", "NX3Backend", "check_xauth"]

#: The program.
NXPROXY = Program(
    "nxproxy",
    "NXPROXY_BINARY",
    (r"PyHoca-GUI\nxproxy", "x2goclient", r"NX Client for Windows\bin"),
    "Install nxproxy (on Debian, Ubuntu and Fedora the package nxproxy), or name it in NXPROXY_BINARY.",
)

# How its lines begin. The level belongs to each: of what ends nxproxy with an "Error:" it warns earlier in the same
# words, and within a line it quotes names that others have chosen.
_READY = "Info: Established X server connection"
_TERMINATING = "Session: Terminating session at"
#: It prints the first before the session is established, the second after.
_CAUGHT_SIGNAL = ("Info: Aborting the procedure due to signal", "Info: Waiting the cleanup timeout")
_SIGNALLED = EndReason.PROXY_KILLED, "nxproxy was terminated from outside, by signal TERM, INT or HUP."
#: Of a unix socket, and of any other address: the tunnel's if that is TCP, and the display's.
_SOCKET_UNREACHED, _ADDRESS_UNREACHED = "Error: Connection to Unix file socket '", "Error: Connection to '"
_NEGOTIATION = (
    "Error: Failure negotiating the session in stage",
    "Error: Wrong version or invalid session authentication cookie",
    "Error: The remote NX proxy closed the connection",
)
_PEER_BROKEN = ("Error: Failure reading from the peer proxy", "Error: Connection with remote peer broken")
#: After its option ``timeout``, by default 120 s. At a quarter of that it only warns, and goes on if the agent does.
_PEER_SILENT = "Error: No data received from remote proxy"
_NO_DISPLAY = (
    "Error: Host X server DISPLAY is not set",
    "Warning: X connection failed with error",  # a warning, but the agent then ends
    "Info: Your session was closed before reaching a usable state",
)

#: How long an X server, which has accepted us a moment ago, may take to do so again.
_DISPLAY_S = 2.0


class NX3Backend(OptionStringBackend):
    """Runs ``nxproxy -S``, its options in the environment alone, where only its owner can read the cookie.

    Args:
        executable: The program; by default what ``NXPROXY_BINARY`` names, else ``nxproxy`` from PATH.
        options: Options of the NX string besides those that the engine sets, for example ``{"clipboard": "both"}``.

    Raises:
        ValueError: An option's name or value is not valid in an NX option string, or the engine sets the option.
    """

    name = "nx3"
    listen_kind: ListenKind = "unix"
    PROGRAM = NXPROXY

    def preflight(self, context: BackendContext) -> None:
        """Make sure that nxproxy will parse the options as intended, and can read the X server's cookie."""
        if not fits("connect", f"unix:{context.listen_address}"):
            raise BackendError(
                EndReason.LISTEN_FAILED,
                f"The path {context.listen_address} cannot be written into an NX option string.",
                "Set TMPDIR or XDG_RUNTIME_DIR to a short path without comma, blank, equals or per cent sign.",
            )
        if len(self._option_string(context)) > MAX_STRING_BYTES:
            raise BackendError(
                EndReason.PROXY_NOT_STARTABLE,
                f"The NX option string is longer than the {MAX_STRING_BYTES} bytes that nxproxy reads.",
                "Pass fewer options, or use a shorter session name.",
            )
        check_xauth(context.environ)

    def command(self, context: BackendContext) -> Sequence[str]:
        """With a bare ``-S`` nxproxy takes its options from the environment."""
        return [context.executable, "-S"]

    def environment(self, context: BackendContext) -> Mapping[str, str | None]:
        """Return the options, the session root, and a stand-in for the dialog that would block nxproxy."""
        return {
            "NX_DISPLAY": self._option_string(context),
            "NX_ROOT": str(context.sessions_root),
            "NX_CLIENT": shutil.which("true") or "/bin/true",
        }

    def ready(self, evidence: Evidence) -> bool:
        """The X server has accepted nxproxy, which prints its earlier lines even if it is refused afterwards."""
        return _printed(evidence.lines, _READY)

    def diagnose(self, evidence: Evidence) -> tuple[EndReason, str] | None:
        """Read the cause from nxproxy's lines, since its exit code says nothing."""
        lines: Iterable[OutputLine]
        if evidence.exited:
            lines = evidence.lines
        elif isinstance(evidence.last, OutputLine):
            lines = (evidence.last,)  # the others were examined when they were new
        else:
            return None
        if evidence.signalled:
            return None
        return self._after_ready(evidence, lines) if evidence.ready else self._before_ready(evidence, lines)

    def _option_string(self, context: BackendContext) -> str:
        # connect comes first: without it nxproxy would listen on every interface. And the cookie is in no local
        # variable, since a traceback may show those.
        return (
            f"nx/nx,connect=unix:{context.listen_address},cookie={context.session.cookie},id={context.session.name}"
            f"{self._extra_options}:{context.session.display}"
        )

    @staticmethod
    def _before_ready(evidence: Evidence, lines: Iterable[OutputLine]) -> tuple[EndReason, str] | None:
        connected = evidence.saw(ChannelOpened)  # it connects to the tunnel first, to the X server second
        if _printed(lines, *_NO_DISPLAY) or (connected and _printed(lines, _ADDRESS_UNREACHED)):
            return (
                EndReason.DISPLAY_UNAVAILABLE,
                "The X server refused nxproxy, or DISPLAY does not reach one.",
            )
        if _printed(lines, *_CAUGHT_SIGNAL):
            return _SIGNALLED
        if not connected:
            unconnected = EndReason.LISTEN_FAILED, "nxproxy could not connect to the local end of the tunnel."
            return unconnected if _printed(lines, _SOCKET_UNREACHED, _ADDRESS_UNREACHED) else None
        if _printed(lines, *_NEGOTIATION):
            return EndReason.NEGOTIATION_FAILED, (
                "The agent closed the connection during negotiation: "
                "the session cookie is wrong, or the agent has ended."
            )
        if _printed(lines, _PEER_SILENT, *_PEER_BROKEN):
            return EndReason.PEER_LOST, "nxproxy lost the agent before the session was established."
        return None

    @staticmethod
    def _after_ready(evidence: Evidence, lines: Iterable[OutputLine]) -> tuple[EndReason, str] | None:
        if _printed(lines, _PEER_SILENT):
            return EndReason.PEER_LOST, "nxproxy has not heard from the agent for too long."
        if _printed(lines, *_PEER_BROKEN):
            return EndReason.PEER_LOST, "nxproxy lost the agent, while the SSH connection lives."
        if _printed(lines, *_CAUGHT_SIGNAL):
            return _SIGNALLED
        if evidence.exited and _printed(lines, _TERMINATING):
            return EndReason.SESSION_ENDED, "The agent closed the session: it was suspended or terminated."
        return None


def _printed(lines: Iterable[OutputLine], *starts: str) -> bool:
    """Tell whether any line begins with one of these texts."""
    return any(line.text.startswith(starts) for line in lines)


def check_xauth(environ: Mapping[str, str]) -> None:
    """Make sure that nxproxy can read the X server's cookie, or that the X server requires none.

    Without xauth nxproxy presents a cookie that it has made up. Measured: an X server that requires none accepts it,
    whatever the authority file contains; one that requires a cookie refuses it, and the agent's only attempt is lost.

    Raises:
        BackendError: ``display_unavailable``.
    """
    if shutil.which("xauth", path=environ.get("PATH", os.defpath)) is not None:
        return
    try:
        open_display({"DISPLAY": environ.get("DISPLAY", "")}, timeout_s=_DISPLAY_S).close()
    except DisplayError as error:
        if error.kind != "refused":
            raise BackendError(EndReason.DISPLAY_UNAVAILABLE, error.detail, error.hint) from error
        raise BackendError(
            EndReason.DISPLAY_UNAVAILABLE,
            "The X server requires a cookie, and the program xauth, with which nxproxy reads it, was not found.",
            "Install xauth (on Debian and Ubuntu the package xauth, on Fedora xorg-x11-xauth), or add it to PATH.",
        ) from error
