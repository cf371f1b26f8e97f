"""What the tests of channels and transports share."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import paramiko
import pytest

from proxy_fsm.ssh import (
    ChannelOpening,
    SafeChannel,
)
from proxy_fsm.testing import LoopbackSSHServer
from tests.helpers.sockets import LOOPBACK
from tests.helpers.wait import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Iterator

End: TypeAlias = Callable[[LoopbackSSHServer, paramiko.Transport], None]

GCM = "aes128-gcm@openssh.com"
#: An address that the embedded server prohibits, since it is not a loopback one (RFC 5737).
FOREIGN = ("192.0.2.1", 9)


def opening_to(transport: paramiko.Transport, port: int) -> ChannelOpening:
    opening = ChannelOpening(transport, "direct-tcpip", (LOOPBACK, port))
    opening.send()
    return opening


def open_to(transport: paramiko.Transport, port: int) -> SafeChannel:
    return opening_to(transport, port).wait()


def has_nodelay(transport: paramiko.Transport) -> bool:
    assert isinstance(transport.sock, socket.socket)
    return transport.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def ciphers_in_use(transport: Any) -> set[str]:
    return {transport.local_cipher, transport.remote_cipher}


def do_nothing() -> None:
    """Serve as a callback."""


def packets_sent(transport: Any) -> int:
    return int(transport.packetizer._Packetizer__sequence_number_out)


class Probe(paramiko.Channel):
    """A channel that records which of its private methods paramiko calls, and whether its lock was held."""

    def __init__(self, chanid: int) -> None:
        super().__init__(chanid)
        self.calls: list[tuple[str, bool]] = []
        self.closings: list[Any] = []

    def _close_internal(self) -> Any:
        self.calls.append(("_close_internal", self.lock.locked()))
        self.closings.append(super()._close_internal())  # type: ignore[misc]
        return self.closings[-1]

    def _set_closed(self) -> None:
        self.calls.append(("_set_closed", self.lock.locked()))
        super()._set_closed()  # type: ignore[misc]

    def _unlink(self) -> None:
        self.calls.append(("_unlink", self.lock.locked()))
        super()._unlink()  # type: ignore[misc]


def open_probe(transport: Any, port: int, event: Any = None) -> Probe:
    """Open a channel of a class of our own, as `ChannelOpening.send` does."""
    answered = threading.Event()
    with transport.lock:
        number = transport._next_channel()
        probe = Probe(number)
        probe._set_transport(transport)  # type: ignore[attr-defined]
        probe._set_window(1 << 20, 1 << 15)  # type: ignore[attr-defined]
        transport._channels.put(number, probe)
        transport.channel_events[number] = event or answered
        transport.channels_seen[number] = True
    message = paramiko.Message()
    message.add_byte(b"\x5a")  # SSH_MSG_CHANNEL_OPEN
    message.add_string("direct-tcpip")
    for value in (number, 1 << 20, 1 << 15):
        message.add_int(value)
    message.add_string(LOOPBACK)
    message.add_int(port)
    message.add_string(LOOPBACK)
    message.add_int(0)
    transport._send_user_message(message)
    if event is None:
        assert answered.wait(WAIT_S)
    return probe


def end_by_drop(server: LoopbackSSHServer, _: paramiko.Transport) -> None:
    server.drop()


def end_by_reset(server: LoopbackSSHServer, _: paramiko.Transport) -> None:
    server.drop(reset=True)


def end_by_close(_: LoopbackSSHServer, transport: paramiko.Transport) -> None:
    transport.close()


ENDS = pytest.mark.parametrize("end", [end_by_drop, end_by_reset, end_by_close])


@contextlib.contextmanager
def keys_exchanged(transport: Any) -> Iterator[None]:
    """Pretend that keys are being exchanged; every send times out at once."""
    timeout_s, transport.clear_to_send_timeout = transport.clear_to_send_timeout, 0
    transport.clear_to_send.clear()
    try:
        yield
    finally:
        transport.clear_to_send.set()
        transport.clear_to_send_timeout = timeout_s
