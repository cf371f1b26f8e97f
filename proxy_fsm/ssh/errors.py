"""Why a channel was not opened, or sends no more."""

from __future__ import annotations

__all__ = ["ChannelRefused", "NotOpened", "OpenAbandoned", "TransportGone"]


class NotOpened(Exception):  # noqa: N818 - each of its kinds is a fact or a wish, not an error of this side
    """A channel was not opened."""


class ChannelRefused(NotOpened):
    """A channel was refused, on a transport that lives.

    Attributes:
        code: The reason's number (RFC 4254, 5.1): 1 administratively prohibited, 2 connect failed, 3 unknown
            channel type, 4 resource shortage; the last also where the request could not even be sent in time.
    """

    PROHIBITED = 1
    CONNECT_FAILED = 2
    UNKNOWN_TYPE = 3
    RESOURCE_SHORTAGE = 4

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        super().__init__(text)


class TransportGone(NotOpened, ConnectionError):  # noqa: N818 - as its siblings
    """The transport ended: before the server answered an open, or before what was to be sent was sent."""


class OpenAbandoned(NotOpened):
    """The open was abandoned before the server answered."""
