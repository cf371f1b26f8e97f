"""A command: what ends it, and what is left of it."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from proxy_fsm.ssh import CommandCancelled, TransportClosed
from proxy_fsm.ssh.command import RemoteCommand
from proxy_fsm.ssh.opening import ChannelOpening
from tests.helpers.wait import eventually

if TYPE_CHECKING:
    import paramiko

    from proxy_fsm.ssh import SafeChannel
    from proxy_fsm.testing import LoopbackSSHServer


def test_channel_that_opens_during_cancel_is_closed(
    server: LoopbackSSHServer, transport: paramiko.Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = RemoteCommand(transport, "true")
    wait = ChannelOpening.wait

    def wait_and_cancel(opening: ChannelOpening) -> SafeChannel:
        channel = wait(opening)
        command.cancel()
        return channel

    monkeypatch.setattr(ChannelOpening, "wait", wait_and_cancel)
    with pytest.raises(CommandCancelled):
        command.run()
    eventually(lambda: all(channel.closed for channel in server._connections[0]._sessions))
    assert server.sessions_opened == 1
    assert transport.is_active()


def test_output_that_stays_open_ends_with_its_last_line(transport: paramiko.Transport) -> None:
    """A start-up file may leave a program in the background that has the outputs open."""
    pieces = [b"hello\nEND", b" 0", b"\n"]

    def receive(_size: int) -> bytes:
        return pieces.pop(0)  # a further call would raise

    command = RemoteCommand(transport, "true", last_line=b"END ")
    assert command._read(receive) == (b"hello\nEND 0\n", True)


def test_transport_that_ends_by_an_unknown_error_is_closed(
    server: LoopbackSSHServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a malformed packet: what paramiko raises then need not be one of its own errors."""

    def malformed(*_: object) -> None:
        raise struct.error

    def break_transport(connection: paramiko.Transport, *_: object) -> None:
        monkeypatch.setattr(transport.packetizer, "read_message", malformed)
        connection.send_ignore()

    monkeypatch.setattr("proxy_fsm.testing.ssh_server._Connection._handle_channel_request", break_transport)
    transport = server.connect_transport()
    with pytest.raises(TransportClosed):
        RemoteCommand(transport, "true").run()
