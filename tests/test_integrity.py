"""Every byte that is sent at one end arrives at the other, however the stream is split, stalled and closed."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from proxy_fsm.evidence import ConnectionEnded, TunnelClosed, WorkerCrashed, WorkerFailed
from proxy_fsm.ssh import set_nodelay
from proxy_fsm.testing import LoopbackSSHServer
from proxy_fsm.workers.forwarder import Forwarder

from .e2e.sshd import SshServer, transport_of
from .helpers.agent import Agent
from .helpers.holdings import threads_ended
from .helpers.inbox import Inbox
from .helpers.real import needs_sshd
from .helpers.sockets import LOOPBACK, connect_local, same
from .helpers.ssh import connect_fast
from .helpers.task import Task
from .helpers.wait import WAIT_S, since

if TYPE_CHECKING:
    from collections.abc import Iterator

    import paramiko

#: The most steps of a reader or a writer: one byte at a time, megabytes would take forever.
_STEPS = 3_000
#: paramiko's default limit, and one that causes a key exchange in the middle of most examples, in bytes.
_REKEY_BYTES = (1 << 29, 1 << 18)


@dataclass(frozen=True)
class Side:
    """The behaviour of one end of a connection."""

    seed: int
    size_bytes: int
    writes_bytes: tuple[int, ...]
    reads_bytes: tuple[int, ...]
    #: How long it stalls before certain steps, by step number, in seconds.
    write_stalls_s: dict[int, float]
    read_stalls_s: dict[int, float]
    #: How much of its data, in percent, it holds back until the other end's EOF; None to wait for nothing.
    held_back_percent: int | None = None
    content: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", random.Random(self.seed).randbytes(self.size_bytes))  # noqa: S311


@dataclass(frozen=True)
class Conversation:
    """One connection: both of its ends, and the buffer size of their sockets (None for the system's default)."""

    proxy: Side
    agent: Side
    buffer_bytes: int | None


def sides(*, may_wait: bool) -> st.SearchStrategy[Side]:
    sizes = st.integers(1, 64) | st.integers(1, 1 << 18)
    stalls = st.dictionaries(st.integers(0, 40), st.floats(0.001, 0.03), max_size=4)
    return st.builds(
        Side,
        seed=st.integers(0, 1 << 32),
        # From nothing at all to more than a window, which then has to be adjusted.
        size_bytes=st.integers(0, 100) | st.integers(0, 300_000) | st.integers(0, 6 << 20),
        writes_bytes=st.lists(sizes, min_size=1, max_size=5).map(tuple),
        reads_bytes=st.lists(sizes, min_size=1, max_size=5).map(tuple),
        write_stalls_s=stalls,
        read_stalls_s=stalls,
        held_back_percent=st.integers(0, 100) if may_wait else st.none(),
    )


CONVERSATIONS = st.builds(
    lambda agent_ends_first, waits, does_not, room: (
        Conversation(waits, does_not, room) if agent_ends_first else Conversation(does_not, waits, room)
    ),
    st.booleans(),
    sides(may_wait=True) | sides(may_wait=False),
    sides(may_wait=False),
    st.sampled_from([None, 1 << 16]),
)


def steps(sizes: tuple[int, ...], total_bytes: int) -> Iterator[int]:
    """Repeat the sizes endlessly, enlarged if there would be too many steps."""
    minimum = max(1, total_bytes // _STEPS)
    return (max(minimum, size) for size in itertools.cycle(sizes))


def write(sock: socket.socket, side: Side, reader: Task[bytes]) -> None:
    """Send everything, the part held back after the other side's EOF, then half-close the connection."""
    first_bytes = side.size_bytes * (100 - (side.held_back_percent or 0)) // 100
    sent = 0
    for number, size in enumerate(steps(side.writes_bytes, side.size_bytes)):
        time.sleep(side.write_stalls_s.get(number, 0.0))
        if side.held_back_percent is not None and sent >= first_bytes:
            reader.result(threading.TIMEOUT_MAX)  # wait_for_eof checks the progress of all readers
        if sent >= side.size_bytes:
            break
        end = min(sent + size, first_bytes if sent < first_bytes else side.size_bytes)
        sock.sendall(side.content[sent:end])
        sent = end
    sock.shutdown(socket.SHUT_WR)


def read(sock: socket.socket, side: Side, expected_bytes: int, received: bytearray) -> bytes:
    """Read to EOF; `received` shows the progress."""
    for number, size in enumerate(steps(side.reads_bytes, expected_bytes)):
        time.sleep(side.read_stalls_s.get(number, 0.0))
        data = sock.recv(size)
        if not data:
            break
        received += data
    return bytes(received)


def wait_for_eof(readers: list[tuple[Task[bytes], bytearray]]) -> None:
    """Wait until all readers have reached EOF, as long as there is progress."""
    total_bytes, progress_at = -1, time.monotonic()
    while any(reader.running for reader, _ in readers):
        now_bytes = sum(len(received) for _, received in readers)
        if now_bytes != total_bytes:
            total_bytes, progress_at = now_bytes, time.monotonic()
        assert since(progress_at) < WAIT_S, f"nothing was received for {WAIT_S:g} s after {total_bytes} bytes"
        time.sleep(0.005)


def converse(
    transport: paramiko.Transport, kind: str, conversations: list[Conversation], rekey_bytes: int = _REKEY_BYTES[0]
) -> None:
    """Run all conversations at once, through one tunnel, and compare what was sent and received."""
    transport.packetizer.REKEY_BYTES = rekey_bytes
    inbox = Inbox()
    with contextlib.ExitStack() as stack:
        agent = stack.enter_context(Agent())
        forwarder = Forwarder(
            transport,
            (LOOPBACK, agent.port),
            max_connections=len(conversations),
            agent_connect_s=WAIT_S,
            post=inbox.post,
        )
        address = forwarder.bind(kind, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        forwarder.start()
        readers: list[tuple[Task[bytes], bytearray]] = []
        expected: list[bytes] = []
        writers: list[Task[None]] = []
        for each in conversations:
            local = stack.enter_context(connect_local(kind, address))
            endpoints = (local, each.proxy, each.agent), (agent.accept(), each.agent, each.proxy)
            for sock, side, other in endpoints:
                if each.buffer_bytes is not None:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, each.buffer_bytes)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, each.buffer_bytes)
                received = bytearray()
                reader = Task(read, sock, side, other.size_bytes, received)
                readers.append((reader, received))
                expected.append(other.content)
                writers.append(Task(write, sock, side, reader))
        wait_for_eof(readers)
        for (reader, _), sent in zip(readers, expected, strict=True):
            same(reader.result(), sent)
        for writer in writers:
            writer.result()
        inbox.wait(ConnectionEnded, len(conversations))
        forwarder.close()
        inbox.wait(TunnelClosed)
        assert not inbox.all(WorkerCrashed)
        assert not inbox.all(WorkerFailed)
        counted = sorted((each.bytes_to_agent, each.bytes_from_agent) for each in inbox.all(ConnectionEnded))
        assert counted == sorted((each.proxy.size_bytes, each.agent.size_bytes) for each in conversations)
    assert transport.is_active()


@pytest.fixture(scope="module")
def to_paramiko() -> Iterator[paramiko.Transport]:
    with LoopbackSSHServer() as server, contextlib.closing(server.connect_transport()) as transport:
        set_nodelay(transport)
        yield transport
        server.wait_for(lambda: server.channels_open == 0)
    threads_ended()


@pytest.fixture(scope="module", params=["OpenSSH's defaults", "RekeyLimit 1M", "RekeyLimit 1M, fast_transport"])
def to_openssh(request: pytest.FixtureRequest) -> Iterator[paramiko.Transport]:
    """A transport as paramiko makes it, or ours, which has its own packet reader."""
    needs_sshd()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(SshServer(extra_config="RekeyLimit 1M" if "1M" in request.param else ""))
        if "fast_transport" in request.param:
            yield stack.enter_context(contextlib.closing(connect_fast(server)))
        else:
            transport = transport_of(stack.enter_context(server.connect()))
            set_nodelay(transport)
            yield transport
    threads_ended()


CONVERSATION_LISTS = st.lists(CONVERSATIONS, min_size=1, max_size=3)
KINDS = st.sampled_from(["unix", "tcp"])
REKEYS = st.sampled_from(_REKEY_BYTES)
#: Without shrinking: a stalled example takes WAIT_S to fail, and would be repeated many times.
BRIEF = settings(max_examples=30, phases=[Phase.explicit, Phase.reuse, Phase.generate])


@given(conversations=CONVERSATION_LISTS, kind=KINDS, rekey_bytes=REKEYS)
@BRIEF
def test_every_byte_arrives_through_paramikos_server(
    to_paramiko: paramiko.Transport, conversations: list[Conversation], kind: str, rekey_bytes: int
) -> None:
    converse(to_paramiko, kind, conversations, rekey_bytes)


@pytest.mark.real
@given(conversations=CONVERSATION_LISTS, kind=KINDS, rekey_bytes=REKEYS)
@BRIEF
def test_every_byte_arrives_through_openssh(
    to_openssh: paramiko.Transport, conversations: list[Conversation], kind: str, rekey_bytes: int
) -> None:
    converse(to_openssh, kind, conversations, rekey_bytes)


def plain(size_bytes: int, *, held_back_percent: int | None = None) -> Side:
    return Side(size_bytes, size_bytes, (1 << 16,), (1 << 16,), {}, {}, held_back_percent)


HALF_CLOSES = pytest.mark.parametrize(
    "conversation",
    [
        pytest.param(
            Conversation(plain(100_000), plain(5 << 20, held_back_percent=100), None), id="the proxy ends first"
        ),
        pytest.param(
            Conversation(plain(5 << 20, held_back_percent=100), plain(100_000), None), id="the agent ends first"
        ),
        pytest.param(
            Conversation(plain(0), plain(5 << 20, held_back_percent=50), 1 << 16), id="the proxy only listens"
        ),
        pytest.param(
            Conversation(plain(5 << 20, held_back_percent=50), plain(0), 1 << 16), id="the agent only listens"
        ),
        pytest.param(Conversation(plain(0), plain(0), None), id="nobody speaks"),
    ],
)


@HALF_CLOSES
def test_half_closes_in_either_order_lose_nothing_through_paramikos_server(
    to_paramiko: paramiko.Transport, conversation: Conversation
) -> None:
    converse(to_paramiko, "unix", [conversation])


@pytest.mark.real
@HALF_CLOSES
def test_half_closes_in_either_order_lose_nothing_through_openssh(
    to_openssh: paramiko.Transport, conversation: Conversation
) -> None:
    converse(to_openssh, "unix", [conversation])
