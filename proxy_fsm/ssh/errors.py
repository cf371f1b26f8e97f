"""Why a channel was not opened, can no longer send, or gave no answer to a command."""

from __future__ import annotations

__all__ = [
    "ChannelRefused",
    "CommandCancelled",
    "CommandFailed",
    "CommandNotRun",
    "NotOpened",
    "OpenAbandoned",
    "TransportClosed",
]


class NotOpened(Exception):  # noqa: N818 - a refusal, an end or a cancellation, not a failure on this side
    """A channel was not opened."""


class ChannelRefused(NotOpened):
    """A channel was refused; the transport is alive.

    Attributes:
        code: The reason's number (RFC 4254, 5.1): 1 administratively prohibited, 2 connect failed, 3 unknown
            channel type, 4 resource shortage; the last also if the request could not even be sent in time.
    """

    PROHIBITED = 1
    CONNECT_FAILED = 2
    UNKNOWN_TYPE = 3
    RESOURCE_SHORTAGE = 4

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        super().__init__(text)


class TransportClosed(NotOpened, ConnectionError):  # noqa: N818 - as its siblings
    """The transport ended before the server answered an open, or before a message was sent."""


class OpenAbandoned(NotOpened):
    """The open was abandoned before the server answered."""


class CommandFailed(Exception):  # noqa: N818 - as its siblings
    """A command gave no answer that can be used; the transport is alive."""


class CommandNotRun(CommandFailed):
    """The server does not run commands for this account."""


class CommandCancelled(Exception):  # noqa: N818 - as its siblings
    """The command was cancelled on this side."""
