"""Why a proxy ends, or a server's command fails, what to do about it, and whether to try again."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

__all__ = ["EndReason", "ServerReason", "hint_for", "is_retryable"]


class EndReason(StrEnum):
    """Why a proxy ended.

    Attributes:
        cli_status: The exit status of the command line for this reason: 0 for a clean end, else from 10 up.
        hint: What to do about it, one sentence; None if there is nothing to do.
    """

    cli_status: int
    hint: str | None

    def __new__(cls, value: str, cli_status: int, hint: str | None = None) -> Self:
        """Make a member from its row below."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.cli_status = cli_status
        member.hint = hint
        return member

    STOP_REQUESTED = "stop_requested", 0
    SESSION_ENDED = "session_ended", 0, "Ask the server whether the session is suspended and can be resumed."
    SESSION_SUSPENDED = "session_suspended", 0, "Resume the session to go on with it."
    SESSION_TERMINATED = "session_terminated", 0
    SESSION_TAKEN_OVER = (
        "session_taken_over",
        0,
        "Go on where it is shown now, or get it back on purpose: proxy-fsm connect --session NAME --take-over.",
    )
    VIEWER_CLOSED = "viewer_closed", 0
    PROXY_NOT_FOUND = "proxy_not_found", 10, "Install the proxy program, or say where it is."
    PROXY_NOT_STARTABLE = (
        "proxy_not_startable",
        11,
        "Make sure that the proxy program is an executable of this machine's kind.",
    )
    DISPLAY_UNAVAILABLE = (
        "display_unavailable",
        12,
        "Start an X server, and set DISPLAY and XAUTHORITY to reach it.",
    )
    DISPLAY_LOST = (
        "display_lost",
        13,
        "Start the X server again, then resume the session.",
    )
    NEGOTIATION_FAILED = (
        "negotiation_failed",
        14,
        "Ask the server for the session's present cookie and port; if the agent has ended, start a new session.",
    )
    AGENT_UNREACHABLE = (
        "agent_unreachable",
        15,
        "Ask the server whether the session still runs and on which port; a suspended one must be resumed first.",
    )
    FORWARDING_DENIED = (
        "forwarding_denied",
        16,
        "Ask the server's administrator to allow TCP forwarding (AllowTcpForwarding, PermitOpen, key options).",
    )
    LISTEN_FAILED = (
        "listen_failed",
        17,
        "Make sure that the sessions root and the temporary directory are yours, writable and not full.",
    )
    TRANSPORT_LOST = "transport_lost", 18, "Connect to the server again, then resume the session."
    TRANSPORT_SILENT = (
        "transport_silent",
        19,
        "Check the network and the server, connect again, then resume the session.",
    )
    PEER_LOST = (
        "peer_lost",
        20,
        "Ask the server whether the session still exists: its agent may have crashed or been killed.",
    )
    PROXY_KILLED = (
        "proxy_killed",
        21,
        "Find out what ended the proxy program (a crash, or a signal from outside), then resume the session.",
    )
    PROXY_EXITED = "proxy_exited", 22, "Read the last lines of the proxy program in the session's log."
    START_TIMEOUT = (
        "start_timeout",
        23,
        "Check the network and the server's load, or allow more time (ready_s).",
    )
    STOP_TIMEOUT = (
        "stop_timeout",
        24,
        "The proxy program survived SIGKILL: look for a stuck disk or debugger.",
    )
    INTERNAL_ERROR = "internal_error", 25, "Report this as a bug of proxy_fsm, with the traceback in the log."

    @property
    def clean(self) -> bool:
        """Whether the proxy ends in ``stopped``, not in ``failed``."""
        return self.cli_status == 0


#: What the server reported about the session; of these only a suspended one is there to be attached to again.
_REPORTED = frozenset({EndReason.SESSION_SUSPENDED, EndReason.SESSION_TERMINATED, EndReason.SESSION_TAKEN_OVER})
#: Reasons after which the session is suspended or lost, and only the server knows which.
_SERVER_KNOWS = frozenset({EndReason.SESSION_ENDED, EndReason.AGENT_UNREACHABLE, EndReason.PEER_LOST})


#: For how long after the proxy's ready line an agent in its first attempt can still die with its proxy: measured with
#: nxagent 3.5.99, which survived a loss 0.12 s after that line in all of 4 runs, and 0.06 s after it in 2 of 4.
_AGENT_FRAGILE_S = 0.5


def is_retryable(reason: EndReason, *, channel_opened: bool, running_s: float | None, resumed: bool) -> bool | None:
    """Tell whether the session should have survived this attempt, so that another one can succeed.

    A fresh agent gets one chance: if it is connected and then dropped before the session is established, it exits.
    One that was running, or was resumed, is suspended instead; one that was never connected still waits.

    Args:
        reason: Why the attempt ended.
        channel_opened: Whether a channel to the graphics port was ever opened.
        running_s: For how many seconds it was ``running``; None if it never was.
        resumed: Whether the session was resumed, and so had been running before.

    Returns:
        True or False, or None if only the server knows.
    """
    if reason in _SERVER_KNOWS or (resumed and reason is EndReason.NEGOTIATION_FAILED):
        return None
    if reason in _REPORTED:
        return reason is EndReason.SESSION_SUSPENDED
    if running_s is not None and not resumed:
        return True if running_s >= _AGENT_FRAGILE_S else None
    return resumed or not channel_opened


#: Where there is nothing that could be suspended or resumed.
_PLAIN_HINTS = {
    EndReason.SESSION_ENDED: "Find out on the server why it closed the connection, then try again.",
    EndReason.AGENT_UNREACHABLE: "Make sure that the service runs on the server, and on this port.",
    EndReason.PEER_LOST: "Make sure that the service still runs on the server, then try again.",
}


def hint_for(
    reason: EndReason, *, channel_opened: bool, was_running: bool, resumed: bool, resumable: bool = True
) -> str | None:
    """Return what to do about a reason; the hint does not say to resume a session that is lost.

    Args:
        reason: Why the attempt ends.
        channel_opened: Whether a channel to the graphics port was ever opened.
        was_running: Whether ``running`` was reached.
        resumed: Whether the session was resumed.
        resumable: Whether there is a session at all, which can be suspended and resumed.
    """
    if not resumable and reason in _PLAIN_HINTS:
        return _PLAIN_HINTS[reason]
    if reason.hint is None or (resumable and (was_running or resumed)):
        return reason.hint
    if not (channel_opened and resumable):
        return reason.hint.replace("then resume the session", "then try again")
    lost = "then start a new session: this one has not survived"
    hint = reason.hint.replace("then resume the session", lost)
    return hint if "new session" in hint or reason in _SERVER_KNOWS else f"{hint[:-1]}; {lost}."


class ServerReason(StrEnum):
    """Why an X2Go server did not do what it was asked for.

    Attributes:
        hint: What to do about it, one sentence.
    """

    hint: str

    def __new__(cls, value: str, hint: str) -> Self:
        """Make a member from its row below."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.hint = hint
        return member

    NO_COMMANDS = "no_commands", "Use an account with a login shell, or ask the server's administrator for one."
    NOT_X2GO = "not_x2go", "Install the package x2goserver there, or connect to a server that has it."
    LIMIT_REACHED = "limit_reached", "End one of the account's sessions, or ask the server's administrator."
    ACCESS_DENIED = "access_denied", "Ask the owner of the desktop to share it, then try again."
    NO_RESOURCES = "no_resources", "Try again later, or ask the server's administrator: no display or port is free."
    AGENT_FAILED = "agent_failed", "Ask the server's administrator: the log of the session is on the server."
    PROGRAM_NOT_FOUND = "program_not_found", "Install the program there, or start another one."
    NO_SUCH_SESSION = "no_such_session", "List the sessions, and choose one of them, or start a new one."
    SESSION_IN_USE = "session_in_use", "End it there, or take it over."
    COMMAND_FAILED = "command_failed", "Ask the server's administrator: the command works with a healthy X2Go server."
    UNREADABLE_ANSWER = (
        "unreadable_answer",
        "Report it with the server's version: its answer is not the documented one.",
    )
    NO_ANSWER = "no_answer", "Try again; if it stays so, look at the load of the server."
    CONNECTION_LOST = "connection_lost", "Connect again."
    CANCELLED = "cancelled", "Call it again; nothing else has changed."
