"""One command on the server, through a channel of its own."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import paramiko

from proxy_fsm.ssh.errors import CommandCancelled, CommandFailed, CommandNotRun, NotOpened, TransportClosed
from proxy_fsm.ssh.opening import ChannelOpening

if TYPE_CHECKING:
    from collections.abc import Callable

    from proxy_fsm.ssh.channel import SafeChannel

__all__ = ["CompletedCommand", "RemoteCommand"]

#: How much of either output is accepted.
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, repr=False)
class CompletedCommand:
    """What a command printed, and how it ended; the repr shows no output, since that may contain a cookie.

    Attributes:
        output: Its standard output.
        errors: Its standard error.
        exit_status: Its exit status; -1 if the server reported none, as for a command ended by a signal.
    """

    output: bytes
    errors: bytes
    exit_status: int

    def __repr__(self) -> str:
        return f"<CompletedCommand, exit status {self.exit_status}>"


class RemoteCommand:
    """One command, run once: `run` on one thread, `cancel` on any other.

    It gets an empty standard input, and no terminal. It has no time limit: the caller enforces one with `cancel`.

    Args:
        transport: An authenticated transport.
        line: What the account's login shell is given.
        last_line: Each output counts as ended after a line that begins with this, even while another program still has
            it open, such as one that a start-up file has left in the background.
    """

    def __init__(self, transport: paramiko.Transport, line: str, *, last_line: bytes | None = None) -> None:
        self._transport = transport
        self._line = line
        self._last_line = last_line
        self._lock = threading.Lock()
        self._cancelled = False
        self._opening: ChannelOpening | None = None
        self._channel: SafeChannel | None = None

    def run(self) -> CompletedCommand:
        """Run it, and wait until it has ended.

        Raises:
            NotOpened: The server refused a channel (`ChannelRefused`), or the transport ended (`TransportClosed`).
            CommandNotRun: The server refused to run it.
            CommandFailed: It printed more than 1 MiB.
            CommandCancelled: `cancel` was called.
        """
        opening = ChannelOpening(self._transport, "session")
        with self._lock:
            self._check_cancelled()
            self._opening = opening
        opening.send()
        try:
            channel = opening.wait()
        except NotOpened:
            with self._lock:
                self._check_cancelled()
            raise
        try:  # from here on the channel is closed, whatever happens
            with self._lock:
                self._opening = None
                self._check_cancelled()
                self._channel = channel
            return self._exchange(channel)
        finally:
            with self._lock:
                self._channel = None
            channel.send_close()

    def cancel(self) -> None:
        """Have `run` raise `CommandCancelled`; a command that the server runs already may go on there."""
        with self._lock:
            self._cancelled = True
            opening, channel = self._opening, self._channel
        if opening is not None:
            opening.abandon()
        if channel is not None:
            channel.close()

    def _check_cancelled(self) -> None:
        if self._cancelled:
            raise CommandCancelled("The command was cancelled.")

    def _exchange(self, channel: SafeChannel) -> CompletedCommand:
        try:
            channel.exec_command(self._line)
            channel.shutdown_write()
            output, is_whole = self._read(channel.recv)
            errors, _ = self._read(channel.recv_stderr)
            if not is_whole:
                channel.status_event.wait()
        except (paramiko.SSHException, OSError, EOFError) as error:
            self._raise_end(channel)
            raise CommandNotRun("The server does not run commands for this account.") from error
        except Exception:  # paramiko raises here whatever ended the transport
            self._raise_end(channel)
            raise
        self._raise_end(channel, exited=is_whole or channel.exit_status >= 0)
        return CompletedCommand(output, errors, channel.exit_status)

    def _read(self, receive: Callable[[int], bytes]) -> tuple[bytes, bool]:
        """Read one output; return it, and whether its last line was seen."""
        received = bytearray()
        while piece := receive(1 << 16):
            received += piece
            if len(received) > _MAX_BYTES:
                raise CommandFailed(f"The command printed more than {_MAX_BYTES} bytes.")
            if self._last_line is not None and received.endswith(b"\n"):
                found = received.rfind(b"\n" + self._last_line)
                if found >= 0 and received.find(b"\n", found + 1) >= 0:
                    return bytes(received), True
        return bytes(received), False

    def _raise_end(self, channel: SafeChannel, *, exited: bool = False) -> None:
        """Raise what else ended the exchange, if anything did."""
        with self._lock:
            self._check_cancelled()
        if channel.transport_ended and not exited:
            raise TransportClosed("The SSH connection ended while the command ran.")
