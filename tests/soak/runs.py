"""The runs: each takes its length as arguments, fails if anything was lost, and returns figures."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import paramiko
import pytest

from benchmarks.delay import delayed
from proxy_fsm.evidence import TransportEnded, TunnelClosed
from proxy_fsm.ssh import ChannelOpening, ChannelRefused
from proxy_fsm.status import Timeouts
from proxy_fsm.workers import link_monitor
from proxy_fsm.workers.forwarder import Forwarder
from tests.e2e.sshd import SshServer
from tests.helpers.agent import Agent, dead_port
from tests.helpers.holdings import threads_ended
from tests.helpers.inbox import Inbox
from tests.helpers.sockets import LOOPBACK, connect_local, reset
from tests.helpers.ssh import connect_fast
from tests.helpers.task import Task
from tests.helpers.wait import eventually, since

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

__all__ = ["Figures", "carry", "close_under_upload", "probe_under_requests"]

#: An address that the server is configured to prohibit (RFC 5737).
FOREIGN = ("192.0.2.1", 9)
#: How long the transport may stall under full load on a slow machine, seconds.
PATIENCE_S = 120.0
_UPLOADS = 4
#: A prime number of random bytes: lost, repeated or misplaced data are detected.
_PATTERN_BYTES = 1_048_573


@dataclass(frozen=True)
class Figures:
    """The work of a run: either tunnel traffic, or requests while the link is probed; the other figures stay 0."""

    name: str
    seconds: float = 0.0
    connections: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    rekeys_by_client: int = 0
    rekeys_by_server: int = 0
    commands: int = 0
    slowest_command_s: float = 0.0
    requests: int = 0
    probes: int = 0


class KeyExchanges(logging.Handler):
    """Counts, from paramiko's log, how often keys were exchanged, and how often the client started it."""

    LOGGER = logging.getLogger("paramiko.transport")

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.all = 0
        self.by_client = 0

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self.all += message.startswith("Switch to new keys")
        self.by_client += message.startswith("Rekeying (hit")

    def __enter__(self) -> Self:
        self._before = self.LOGGER.level, self.LOGGER.propagate
        self.LOGGER.setLevel(logging.DEBUG)
        self.LOGGER.propagate = False
        self.LOGGER.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.LOGGER.removeHandler(self)
        level, self.LOGGER.propagate = self._before
        self.LOGGER.setLevel(level)


class Commands:
    """The caller's own commands, one after the other, for the whole run; each answer is checked."""

    def __init__(self, transport: paramiko.Transport, every_s: float) -> None:
        self.count = 0
        self.slowest_s = 0.0
        self._transport = transport
        self._every_s = every_s
        self._stopping = threading.Event()
        self._task = Task(self._run)

    def _run(self) -> None:
        while not self._stopping.wait(self._every_s):
            began = time.monotonic()
            run_command(self._transport, self.count)
            self.slowest_s = max(self.slowest_s, since(began))
            self.count += 1

    def end(self) -> None:
        """Run the last one; raise the error of any that failed."""
        self._stopping.set()
        self._task.result(PATIENCE_S)
        run_command(self._transport, self.count)
        self.count += 1


def run_command(transport: paramiko.Transport, number: int) -> None:
    """Run a command with paramiko alone, as the caller does, and check its answer."""
    with contextlib.closing(transport.open_session(timeout=PATIENCE_S)) as channel:
        channel.settimeout(PATIENCE_S)
        channel.exec_command(f"echo answer {number}; exit {number % 100}")
        answer = channel.makefile("rb").read()
        status = channel.recv_exit_status()
    assert (answer, status) == (f"answer {number}\n".encode(), number % 100)


class Scene:
    """sshd, one transport to it that also runs a command at intervals, an agent, and our tunnel to it."""

    def __init__(self, name: str, config: str, every_s: float, progress: Callable[[str], None]) -> None:
        self.name = name
        self.agent = Agent()
        self.path = ""
        self._sshd = SshServer(extra_config=config, log_level="DEBUG1")
        self._every_s = every_s
        self._progress = progress
        self._reported_at = time.monotonic()
        self._inbox = Inbox()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.agent)
            stack.enter_context(self._sshd)
            self._keys = stack.enter_context(KeyExchanges())
            self.transport = stack.enter_context(contextlib.closing(connect_fast(self._sshd)))
            self._forwarder = Forwarder(
                self.transport,
                (LOOPBACK, self.agent.port),
                max_connections=None,
                agent_connect_s=PATIENCE_S,
                post=self._inbox.post,
            )
            self.path = self._forwarder.bind("unix", Path(stack.enter_context(tempfile.TemporaryDirectory())))
            self._forwarder.start()
            self._commands = Commands(self.transport, self._every_s)
            self._began = time.monotonic()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def connect(self) -> socket.socket:
        """Connect as the proxy does."""
        local = connect_local("unix", self.path)
        local.settimeout(None)
        return local

    def report(self, text: str, *, every_s: float = 10.0) -> None:
        """Report progress, at most once per interval."""
        if since(self._reported_at) >= every_s:
            self._reported_at = time.monotonic()
            self._progress(f"{self.name}: {text}, {since(self._began):.0f} s, {self._commands.count} commands")

    def end(self) -> Figures:
        """Check that transport, commands and channels still work, close the tunnel, and return the figures."""
        seconds = since(self._began)
        assert self.transport.is_active(), f"the transport is dead: {self._sshd.log[-5:]}"
        self._commands.end()
        opening = ChannelOpening(self.transport, "direct-tcpip", (LOOPBACK, dead_port()))
        opening.send()
        with pytest.raises(ChannelRefused):
            opening.wait()
        self._forwarder.close()
        self._forwarder.abort()
        self._inbox.wait(TunnelClosed)
        stats = self._forwarder.stats()
        eventually(lambda: self._rekeys_in_log() == self._keys.all - 1)
        return Figures(
            self.name,
            seconds=seconds,
            connections=stats.connections,
            bytes_up=stats.bytes_to_agent,
            bytes_down=stats.bytes_from_agent,
            rekeys_by_client=self._keys.by_client,
            rekeys_by_server=self._keys.all - 1 - self._keys.by_client,
            commands=self._commands.count,
            slowest_command_s=self._commands.slowest_s,
        )

    def _rekeys_in_log(self) -> int:
        return sum("SSH2_MSG_NEWKEYS received" in line for line in self._sshd.log) - 1


def no_progress(_: str) -> None:
    """Report no progress."""


# ---- closing ----


class RudeAgent:
    """Accepts connections; reads and writes as fast as it can, or reads some bytes and resets."""

    def __init__(self, agent: Agent, *, reset_after_bytes: int | None) -> None:
        self.resets = 0
        self._lock = threading.Lock()
        self._listener = agent.listener
        self._listener.settimeout(None)
        self._reset_after_bytes = reset_after_bytes
        self._task = Task(self._serve)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self._listener.accept()
                if self._reset_after_bytes is None:
                    Task(self._write, peer)
                Task(self._read, peer)

    def _read(self, peer: socket.socket) -> None:
        count = 0
        with contextlib.suppress(OSError):
            while data := peer.recv(1 << 16):
                count += len(data)
                if self._reset_after_bytes is not None and count >= self._reset_after_bytes:
                    with self._lock:
                        self.resets += 1
                    reset(peer)
                    return
        peer.close()

    @staticmethod
    def _write(peer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer.sendall(bytes(1 << 12))

    def stop(self) -> None:
        """Accept no more connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._task.result()


def close_under_upload(
    count: int, *, by_agent: bool, every_s: float = 1.0, progress: Callable[[str], None] = no_progress
) -> Figures:
    """End connections while several upload, each closed by the proxy, or reset by the agent.

    Data or EOF after CLOSE makes OpenSSH disconnect the transport: paramiko's own channels cause that after a few.
    """
    name = f"{'reset by the agent' if by_agent else 'closed by the proxy'} under upload"
    with Scene(name, "", every_s, progress) as scene:
        rude = RudeAgent(scene.agent, reset_after_bytes=100_000 if by_agent else None)
        done = [0] * _UPLOADS

        def upload(which: int) -> None:
            while done[which] < count // _UPLOADS and scene.transport.is_active():
                with scene.connect() as local, contextlib.suppress(OSError):
                    # Closed with the agent's bytes unread, so that both relays fail, at different moments.
                    for turn in range(10_000 if by_agent else 8):
                        local.sendall(bytes(1 << 15))
                        if turn == 7 and done[which] % 8 == 0:
                            local.shutdown(socket.SHUT_WR)  # in some cases EOF precedes CLOSE
                            break
                done[which] += 1
                scene.report(f"{sum(done)} of {count} connections")

        tasks = [Task(upload, which) for which in range(_UPLOADS)]
        for task in tasks:
            task.result(PATIENCE_S + count)
        figures = scene.end()
        rude.stop()
        assert figures.connections >= count // _UPLOADS * _UPLOADS * 0.9, "most got as far as an open channel"
        if by_agent:
            assert rude.resets > count // 2
    threads_ended()
    return figures


# ---- carrying ----


def carry(
    size_bytes: int,
    *,
    config: str = "",
    rekey_bytes: int | None = None,
    every_s: float = 1.0,
    progress: Callable[[str], None] = no_progress,
) -> Figures:
    """Carry bytes both ways at once through one channel, compare each, while keys are exchanged.

    Args:
        size_bytes: How much goes each way.
        config: Lines for sshd, such as ``RekeyLimit 64M``: then the server starts the key exchange.
        rekey_bytes: After how much the client starts one; None leaves paramiko's 512 MiB.
        every_s: The pause between two commands of the caller, in seconds.
        progress: Called with a line of progress at intervals.
    """
    pattern = os.urandom(_PATTERN_BYTES)
    rekeying = f"the client rekeys after {format_size(rekey_bytes)}" if rekey_bytes else "OpenSSH's defaults"
    name = f"{format_size(size_bytes)} each way, {f'`{config}`' if config else rekeying}"
    if not every_s:
        name += ", commands without a pause"
    with Scene(name, config, every_s, progress) as scene:
        if rekey_bytes:
            scene.transport.packetizer.REKEY_BYTES = rekey_bytes
        local, peer = scene.connect(), scene.agent.accept()
        peer.settimeout(None)
        with local, peer:
            senders = [Task(send_pattern, pattern, sock, size_bytes) for sock in (local, peer)]
            readers = [Task(read_pattern, pattern, sock, scene) for sock in (local, peer)]
            for task in senders:
                task.result(PATIENCE_S + size_bytes / 1e6)
            assert [task.result(PATIENCE_S) for task in readers] == [size_bytes, size_bytes]
        figures = scene.end()
        assert (figures.bytes_up, figures.bytes_down) == (size_bytes, size_bytes)
    threads_ended()
    return figures


def format_size(size_bytes: int) -> str:
    """Return a size that is a whole number of MiB or GiB as text."""
    return f"{size_bytes >> 20} MiB" if size_bytes % (1 << 30) else f"{size_bytes >> 30} GiB"


def send_pattern(pattern: bytes, sock: socket.socket, size_bytes: int) -> None:
    """Send a repeated pattern up to a size, then EOF."""
    sent = 0
    while sent < size_bytes:
        at = sent % len(pattern)
        piece = memoryview(pattern)[at : at + min(1 << 18, size_bytes - sent)]
        sock.sendall(piece)
        sent += len(piece)
    sock.shutdown(socket.SHUT_WR)


def read_pattern(pattern: bytes, sock: socket.socket, scene: Scene) -> int:
    """Read to EOF, compare each byte, return their number."""
    twice = pattern + pattern[: 1 << 18]
    count = 0
    while data := sock.recv(1 << 18):
        at = count % len(pattern)
        assert data == twice[at : at + len(data)], f"wrong bytes from {count} on"
        count += len(data)
        scene.report(f"{count >> 20} MiB one way")
    return count


# ---- probing ----


@contextlib.contextmanager
def probed_without_pause(transport: paramiko.Transport) -> Iterator[Callable[[], int]]:
    """Make the monitor probe as fast as it can although the link is busy; yield a function that counts the replies."""
    answered = 0

    class Counted(ChannelOpening):
        def wait(self) -> Any:
            nonlocal answered
            try:
                return super().wait()
            finally:
                answered += 1

    inbox = Inbox()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link_monitor, "packets_received", lambda _: 0)
        patch.setattr(link_monitor, "ChannelOpening", Counted)
        attachment = link_monitor.attach(transport, Timeouts(link_probe_s=0.001, link_dead_s=3600), inbox.post)
        try:
            yield lambda: answered
        finally:
            attachment.detach()
    assert TransportEnded not in inbox.kinds()


def probe_under_requests(
    count: int,
    *,
    one_way_s: float = 0.03,
    progress: Callable[[str], None] = no_progress,
) -> Figures:
    """Send the caller's own requests over a slow line that is probed without a pause; each gets its own reply.

    They are port forwards, granted or denied, commands, and opens that are refused, for two reasons. Each kind has
    a thread of its own: paramiko itself confuses replies of the same kind that are due together.

    Args:
        count: How many requests in all.
        one_way_s: One-way delay of the line, in seconds.
        progress: Called with a line of progress at intervals.
    """
    name = f"requests while probed without a pause, {2000 * one_way_s:.0f} ms round trip, `MaxSessions 2`"
    began = reported_at = time.monotonic()
    answers, counting = 0, threading.Lock()
    with (
        SshServer(extra_config=f"PermitOpen {LOOPBACK}:*\nMaxSessions 2") as sshd,  # none for a probe
        delayed(sshd.port, 2 * one_way_s) as port,
        contextlib.closing(connect_fast(sshd, port)) as transport,
        Agent() as agent,
        KeyExchanges(),  # which also keeps the many refusals out of the log
    ):
        dead = dead_port()

        def forward(number: int) -> None:
            if number % 2:
                with pytest.raises(paramiko.SSHException, match="TCP forwarding request denied"):
                    transport.request_port_forward(LOOPBACK, agent.port)  # already in use
                return
            port = transport.request_port_forward(LOOPBACK, 0)
            assert port > 0
            transport.cancel_port_forward(LOOPBACK, port)

        def refuse(number: int) -> None:
            destination, code = ((LOOPBACK, dead), 2) if number % 2 else (FOREIGN, 1)
            with pytest.raises(paramiko.ChannelException) as refused:
                transport.open_channel("direct-tcpip", destination, (LOOPBACK, 1), timeout=PATIENCE_S)
            assert refused.value.code == code

        def repeat(function: Callable[[int], None], times: int) -> int:
            nonlocal reported_at, answers
            for number in range(times):
                function(number)
                with counting:
                    answers += 1
                    if since(reported_at) > 10:
                        reported_at = time.monotonic()
                        progress(f"{name}: {answers} of {count}, {since(began):.0f} s")
            return times

        with probed_without_pause(transport) as probes:
            kinds: list[Callable[[int], None]] = [forward, refuse, lambda number: run_command(transport, number)]
            tasks = [Task(repeat, kind, count // len(kinds)) for kind in kinds]
            requests = sum(task.result(PATIENCE_S + count) for task in tasks)
            answered = probes()
        assert transport.is_active()
        assert answered > requests // 10, "the link was probed all the time"
    threads_ended()
    commands = requests // len(kinds)
    return Figures(name, seconds=since(began), requests=requests, probes=answered, commands=commands)
