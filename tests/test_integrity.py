"""Byte for byte: whatever goes in at one end comes out at the other, however it is cut, held up and ended."""

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

#: So many steps of a reader or a writer at most: a byte at a time, megabytes would take for ever.
_STEPS = 3_000
#: paramiko's own limit, and one that has keys exchanged in the middle of most examples, bytes.
_REKEY_BYTES = (1 << 29, 1 << 18)


@dataclass(frozen=True)
class Side:
    """What one end of a connection does."""

    seed: int
    size_bytes: int
    writes_bytes: tuple[int, ...]
    reads_bytes: tuple[int, ...]
    #: How long it waits before which of its first steps, seconds.
    write_stalls_s: dict[int, float]
    read_stalls_s: dict[int, float]
    #: What part of its bytes, in percent, goes only after the other end was read to its end; None for no wish.
    keeps_back: int | None = None
    content: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", random.Random(self.seed).randbytes(self.size_bytes))  # noqa: S311


@dataclass(frozen=True)
class Conversation:
    """One connection: both of its ends, and how much room their sockets have (None for the system's own idea)."""

    proxy: Side
    agent: Side
    buffer_bytes: int | None


def sides(*, may_wait: bool) -> st.SearchStrategy[Side]:
    sizes = st.integers(1, 64) | st.integers(1, 1 << 18)
    stalls = st.dictionaries(st.integers(0, 40), st.floats(0.001, 0.03), max_size=4)
    return st.builds(
        Side,
        seed=st.integers(0, 1 << 32),
        # More than a window, so that it has to be opened again; and nothing at all.
        size_bytes=st.integers(0, 100) | st.integers(0, 300_000) | st.integers(0, 6 << 20),
        writes_bytes=st.lists(sizes, min_size=1, max_size=5).map(tuple),
        reads_bytes=st.lists(sizes, min_size=1, max_size=5).map(tuple),
        write_stalls_s=stalls,
        read_stalls_s=stalls,
        keeps_back=st.integers(0, 100) if may_wait else st.none(),
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
    """Give the sizes again and again, larger where there would be too many steps."""
    least = max(1, total_bytes // _STEPS)
    return (max(least, size) for size in itertools.cycle(sizes))


def write(sock: socket.socket, side: Side, reader: Task[bytes]) -> None:
    """Send all, keep back what waits for the end of the other side, then end this direction."""
    now_bytes = side.size_bytes * (100 - (side.keeps_back or 0)) // 100
    sent = 0
    for number, size in enumerate(steps(side.writes_bytes, side.size_bytes)):
        time.sleep(side.write_stalls_s.get(number, 0.0))
        if side.keeps_back is not None and sent >= now_bytes:
            reader.result(threading.TIMEOUT_MAX)  # whether it comes on is looked at where all are
        if sent >= side.size_bytes:
            break
        until = min(sent + size, now_bytes if sent < now_bytes else side.size_bytes)
        sock.sendall(side.content[sent:until])
        sent = until
    sock.shutdown(socket.SHUT_WR)


def read(sock: socket.socket, side: Side, expected_bytes: int, got: bytearray) -> bytes:
    """Read to the end; what has come so far can be seen meanwhile."""
    for number, size in enumerate(steps(side.reads_bytes, expected_bytes)):
        time.sleep(side.read_stalls_s.get(number, 0.0))
        piece = sock.recv(size)
        if not piece:
            break
        got += piece
    return bytes(got)


def come_to_their_ends(readers: list[tuple[Task[bytes], bytearray]]) -> None:
    """Wait until all readers have ended, for as long as anything comes."""
    came, moved_at = -1, time.monotonic()
    while any(reader.running for reader, _ in readers):
        now = sum(len(got) for _, got in readers)
        if now != came:
            came, moved_at = now, time.monotonic()
        assert since(moved_at) < WAIT_S, f"nothing came for {WAIT_S:g} s after {came} bytes"
        time.sleep(0.005)


def converse(
    transport: paramiko.Transport, kind: str, conversations: list[Conversation], rekey_bytes: int = _REKEY_BYTES[0]
) -> None:
    """Hold all conversations at once, through one tunnel, and compare all that was said."""
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
        for talk in conversations:
            near = stack.enter_context(connect_local(kind, address))
            ends = (near, talk.proxy, talk.agent), (agent.accept(), talk.agent, talk.proxy)
            for sock, side, other in ends:
                if talk.buffer_bytes is not None:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, talk.buffer_bytes)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, talk.buffer_bytes)
                got = bytearray()
                reader = Task(read, sock, side, other.size_bytes, got)
                readers.append((reader, got))
                expected.append(other.content)
                writers.append(Task(write, sock, side, reader))
        come_to_their_ends(readers)
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
        assert counted == sorted((talk.proxy.size_bytes, talk.agent.size_bytes) for talk in conversations)
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
    """A transport as paramiko makes it, or ours, which reads packets in its own way."""
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


TALKS = st.lists(CONVERSATIONS, min_size=1, max_size=3)
KINDS = st.sampled_from(["unix", "tcp"])
REKEYS = st.sampled_from(_REKEY_BYTES)
#: Without shrinking: an example that stands still takes WAIT_S to fail, and would be tried again and again.
BRIEF = settings(max_examples=30, phases=[Phase.explicit, Phase.reuse, Phase.generate])


@given(talks=TALKS, kind=KINDS, rekey_bytes=REKEYS)
@BRIEF
def test_every_byte_arrives_with_paramikos_server(
    to_paramiko: paramiko.Transport, talks: list[Conversation], kind: str, rekey_bytes: int
) -> None:
    converse(to_paramiko, kind, talks, rekey_bytes)


@pytest.mark.real
@given(talks=TALKS, kind=KINDS, rekey_bytes=REKEYS)
@BRIEF
def test_every_byte_arrives_with_openssh(
    to_openssh: paramiko.Transport, talks: list[Conversation], kind: str, rekey_bytes: int
) -> None:
    converse(to_openssh, kind, talks, rekey_bytes)


def plain(size_bytes: int, *, keeps_back: int | None = None) -> Side:
    return Side(size_bytes, size_bytes, (1 << 16,), (1 << 16,), {}, {}, keeps_back)


HALF_CLOSES = pytest.mark.parametrize(
    "talk",
    [
        pytest.param(Conversation(plain(100_000), plain(5 << 20, keeps_back=100), None), id="the proxy ends first"),
        pytest.param(Conversation(plain(5 << 20, keeps_back=100), plain(100_000), None), id="the agent ends first"),
        pytest.param(Conversation(plain(0), plain(5 << 20, keeps_back=50), 1 << 16), id="the proxy only listens"),
        pytest.param(Conversation(plain(5 << 20, keeps_back=50), plain(0), 1 << 16), id="the agent only listens"),
        pytest.param(Conversation(plain(0), plain(0), None), id="nobody speaks"),
    ],
)


@HALF_CLOSES
def test_half_closes_in_either_order_with_paramikos_server(to_paramiko: paramiko.Transport, talk: Conversation) -> None:
    converse(to_paramiko, "unix", [talk])


@pytest.mark.real
@HALF_CLOSES
def test_half_closes_in_either_order_with_openssh(to_openssh: paramiko.Transport, talk: Conversation) -> None:
    converse(to_openssh, "unix", [talk])
