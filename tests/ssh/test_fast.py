"""A transport for speed, and signs of life."""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
import sys
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import paramiko
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from paramiko.compress import ZlibCompressor, ZlibDecompressor
from paramiko.message import Message
from paramiko.packet import NeedRekeyException, Packetizer

from proxy_fsm.ssh import (
    ChannelOpening,
    EndWatch,
    TransportClosed,
    fast,
    fast_transport,
    packets_received,
    received_ago_s,
    set_nodelay,
    why_ended,
)
from tests.e2e.sshd import SshServer
from tests.helpers.real import needs_sshd
from tests.helpers.sockets import LOOPBACK
from tests.helpers.task import Task
from tests.helpers.wait import WAIT_S, eventually
from tests.ssh.helpers import GCM, ciphers_in_use, has_nodelay, open_to

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from proxy_fsm.testing import LoopbackSSHServer
    from tests.helpers.agent import Agent


def test_packets_received_changes_with_each_answer(transport: paramiko.Transport) -> None:
    seen = [packets_received(transport)]
    for _ in range(3):
        opening = ChannelOpening(transport, "session")
        opening.send()
        opening.wait().send_close()
        seen.append(packets_received(transport))
    assert len(set(seen)) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells when something was last received")
def test_received_ago_s_is_the_time_since_the_last_answer(
    server: LoopbackSSHServer, transport: paramiko.Transport
) -> None:
    began = time.monotonic()
    opening = ChannelOpening(transport, "session")
    opening.send()
    opening.wait().send_close()
    server.freeze()
    eventually(lambda: received_ago_s(transport) > 0.1)
    assert received_ago_s(transport) <= time.monotonic() - began


def test_received_ago_s_is_zero_where_it_cannot_be_known(transport: paramiko.Transport) -> None:
    transport.close()
    assert received_ago_s(transport) == 0
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert received_ago_s(paramiko.Transport(ours)) == 0


def test_packets_received_stays_while_the_server_is_silent(
    server: LoopbackSSHServer, transport: paramiko.Transport
) -> None:
    server.freeze()
    before = packets_received(transport)
    opening = ChannelOpening(transport, "session")
    opening.send()
    assert not opening._settled.wait(0.1)
    assert packets_received(transport) == before
    server.thaw()
    opening.wait().send_close()
    assert packets_received(transport) != before


class TestNodelay:
    def test_nodelay_is_set_on_tcp(self, server: LoopbackSSHServer) -> None:
        with contextlib.closing(server.connect_transport()) as transport:
            assert not has_nodelay(transport)
            set_nodelay(transport)
            assert has_nodelay(transport)

    def test_unix_socket_is_left_unchanged(self) -> None:
        one, other = socket.socketpair()
        with one, other:
            set_nodelay(paramiko.Transport(one))

    def test_closed_socket_is_ignored(self, transport: paramiko.Transport) -> None:
        transport.close()
        transport.sock.close()
        set_nodelay(transport)


class TestFastTransport:
    def test_fast_transport_prefers_gcm_and_keeps_all_other_ciphers(self) -> None:
        one, other = socket.socketpair()
        with one, other:
            usual = paramiko.Transport(one).get_security_options().ciphers
            fast = fast_transport(other).get_security_options().ciphers
        assert fast[:2] == (GCM, "aes256-gcm@openssh.com")
        assert sorted(fast) == sorted(usual)

    def test_client_with_a_fast_transport_uses_gcm_and_nodelay(self, server: LoopbackSSHServer) -> None:
        with server.connect(transport_factory=fast_transport) as client:
            transport = client.get_transport()
            assert transport is not None
            assert ciphers_in_use(transport) == {GCM}
            assert has_nodelay(transport)

    def test_options_are_passed_to_the_transport(self) -> None:
        one, other = socket.socketpair()
        with one, other:
            transport = fast_transport(one, disabled_algorithms={"ciphers": [GCM]})
            assert GCM not in transport.preferred_ciphers


# ---- against OpenSSH ----


@pytest.fixture
def sshd() -> Iterator[SshServer]:
    needs_sshd()
    with SshServer() as running:
        yield running


def connect_fast(sshd: SshServer) -> paramiko.SSHClient:
    client = paramiko.SSHClient()
    client.get_host_keys().add(f"[{LOOPBACK}]:{sshd.port}", sshd.host_key.get_name(), sshd.host_key)
    client.connect(
        LOOPBACK,
        sshd.port,
        "root",
        pkey=sshd.client_key,
        allow_agent=False,
        look_for_keys=False,
        transport_factory=fast_transport,
    )
    return client


@pytest.mark.real
def test_openssh_accepts_gcm_from_a_fast_transport(sshd: SshServer) -> None:
    with connect_fast(sshd) as client:
        transport = client.get_transport()
        assert transport is not None
        assert ciphers_in_use(transport) == {GCM}
        _, output, _ = client.exec_command("echo works")
        assert output.read() == b"works\n"


class TestReadingAhead:
    @pytest.fixture
    def pair(self) -> Iterator[tuple[Any, socket.socket]]:
        near, far = socket.socketpair()
        near.settimeout(0.02)
        with near, far:
            yield fast.Packetizer(near), far

    def test_available_data_is_read_ahead_and_returned_as_requested(self, pair: tuple[Any, socket.socket]) -> None:
        packetizer, far = pair
        far.sendall(b"headerbo")
        assert packetizer.read_all(6) == b"header"
        far.sendall(b"dynext")
        assert [packetizer.read_all(4), packetizer.read_all(4)] == [b"body", b"next"]

    def test_read_waits_for_late_data(self, pair: tuple[Any, socket.socket]) -> None:
        packetizer, far = pair
        far.sendall(b"he")
        task = Task(packetizer.read_all, 6, True)  # noqa: FBT003 - paramiko's signature
        assert task.running
        far.sendall(b"ader")
        assert task.result() == b"header"

    def test_remainder_of_the_banner_is_returned_first(self, pair: tuple[Any, socket.socket]) -> None:
        packetizer, far = pair
        far.sendall(b"SSH-2.0-Test\r\nhea")
        assert packetizer.readline(1) == "SSH-2.0-Test"
        far.sendall(b"derbody")
        assert [packetizer.read_all(6), packetizer.read_all(4)] == [b"header", b"body"]

    def test_packet_longer_than_the_buffer_is_read_whole(self, pair: tuple[Any, socket.socket]) -> None:
        packetizer, far = pair
        data = bytes(range(256)) * 8192
        task = Task(lambda: [packetizer.read_all(6), packetizer.read_all(len(data)), packetizer.read_all(3)])
        far.sendall(b"header" + data + b"end")
        assert task.result() == [b"header", data, b"end"]

    def test_end_of_the_connection_raises_eof_error(self, pair: tuple[Any, socket.socket]) -> None:
        packetizer, far = pair
        far.sendall(b"hea")
        far.close()
        with pytest.raises(EOFError):
            packetizer.read_all(6)

    def test_close_during_a_read_raises_eof_error(self, pair: tuple[Any, socket.socket]) -> None:
        packetizer, _ = pair
        task = Task(packetizer.read_all, 6)
        packetizer.close()
        with pytest.raises(EOFError):
            task.result()

    def test_due_rekey_is_raised_only_between_packets(self, pair: tuple[Any, socket.socket]) -> None:
        packetizer, far = pair
        packetizer._trigger_rekey()
        with pytest.raises(NeedRekeyException):
            packetizer.read_all(6, True)  # noqa: FBT003 - paramiko's signature
        waited = threading.Event()
        packetizer._check_keepalive = waited.set
        far.sendall(b"hea")
        task = Task(packetizer.read_all, 6, True)  # noqa: FBT003 - paramiko's signature
        assert waited.wait(WAIT_S)
        far.sendall(b"der")
        assert task.result() == b"header"

    def test_handshake_timeout_raises_eof_error(self, pair: tuple[Any, socket.socket]) -> None:
        packetizer, _ = pair
        packetizer.start_handshake(0.01)
        with pytest.raises(EOFError):
            packetizer.read_all(6)

    def test_nothing_is_read_for_a_length_that_is_too_small(self, pair: tuple[Any, socket.socket]) -> None:
        packetizer, far = pair
        far.sendall(b"headerbody")
        assert [packetizer.read_all(count) for count in (6, -6, 0, 4)] == [b"header", b"", b"", b"body"]

    def test_tls_socket_keeps_paramikos_packetizer(self) -> None:
        near, far = socket.socketpair()
        with (
            far,
            ssl.create_default_context().wrap_socket(near, do_handshake_on_connect=False, server_hostname="x") as over,
        ):
            transport: Any = fast_transport(over)
            assert type(transport.packetizer) is Packetizer
            transport.close()

    def test_transport_over_a_channel_keeps_paramikos_packetizer(
        self, transport: paramiko.Transport, agent: Agent
    ) -> None:
        over: Any = fast_transport(open_to(transport, agent.port))
        assert type(over.packetizer) is Packetizer
        over.close()


class Ends(NamedTuple):
    """Two packetizers that talk to each other under AES-GCM: ours, and paramiko's own."""

    ours: Any
    theirs: Any


def agree_on_keys(ends: Ends) -> None:
    """Give both the same keys and counters, as a key exchange does."""
    for sender, receiver, letter in ((ends.ours, ends.theirs, b"o"), (ends.theirs, ends.ours, b"t")):
        engine, nonce = AESGCM(16 * letter), 12 * letter
        sender.set_outbound_cipher(engine, 16, None, 16, None, aead=True, iv_out=nonce)
        receiver.set_inbound_cipher(engine, 16, None, 16, None, aead=True, iv_in=nonce)


class TestSealing:
    """`fast.Packetizer` and paramiko's own understand each other."""

    @pytest.fixture
    def ends(self) -> Iterator[Ends]:
        pair = socket.socketpair()
        for sock in pair:
            sock.settimeout(0.02)  # as paramiko does
        with pair[0], pair[1]:
            ends = Ends(fast.Packetizer(pair[0]), Packetizer(pair[1]))
            agree_on_keys(ends)
            yield ends

    @staticmethod
    def carried(sender: Any, receiver: Any, *contents: bytes) -> list[bytes]:
        """Send messages of type 94, and return what was received."""
        task = Task(lambda: [sender.send_message(Message(b"^" + content)) for content in contents])
        received = [receiver.read_message() for _ in contents]
        task.result()
        assert {kind for kind, _ in received} == {94}
        return [message.asbytes() for _, message in received]

    @pytest.mark.parametrize("size", [0, 1, *range(8, 26), 1000, 32_768, 300_000])
    def test_packetizers_understand_each_other(self, ends: Ends, size: int) -> None:
        data = bytes(number & 255 for number in range(size))
        for sender, receiver in ((ends.ours, ends.theirs), (ends.theirs, ends.ours)):
            assert self.carried(sender, receiver, data, b"behind") == [data, b"behind"]

    def test_paramikos_code_can_handle_any_packet_in_between(self, ends: Ends) -> None:
        for dump in (False, True, False):
            ends.ours.set_hexdump(dump)
            assert self.carried(ends.ours, ends.theirs, b"there") == [b"there"]
            assert self.carried(ends.theirs, ends.ours, b"back") == [b"back"]

    def test_compressed_packets_are_left_to_paramiko(self, ends: Ends) -> None:
        assert self.carried(ends.ours, ends.theirs, b"before") == [b"before"]
        ends.ours.set_outbound_compressor(ZlibCompressor())
        ends.theirs.set_inbound_compressor(ZlibDecompressor())
        assert self.carried(ends.ours, ends.theirs, b"after" * 100) == [b"after" * 100]
        ends.theirs.set_outbound_compressor(ZlibCompressor())
        ends.ours.set_inbound_compressor(ZlibDecompressor())
        assert self.carried(ends.theirs, ends.ours, b"back" * 100) == [b"back" * 100]

    @pytest.mark.parametrize("dump", [False, True])
    def test_messages_sent_together_arrive_one_by_one(self, ends: Ends, *, dump: bool) -> None:
        ends.ours.set_hexdump(dump)
        pieces = [(b"^", memoryview(bytes(number for _ in range(number * 1000)))) for number in range(40)]
        task = Task(ends.ours.send_message, fast.Messages(pieces))
        assert [ends.theirs.read_message()[1].asbytes() for _ in pieces] == [bytes(data) for _, data in pieces]
        task.result()

    def test_sequence_numbers_are_counted_as_in_paramiko(self, ends: Ends) -> None:
        for _ in range(3):
            ends.theirs.send_message(Message(b"^"))
        assert [ends.ours.read_message()[1].seqno for _ in range(3)] == [0, 1, 2]

    def test_messages_cannot_be_serialised_as_one(self) -> None:
        with pytest.raises(TypeError):
            fast.Messages([(b"^", memoryview(b"one")), (b"^", memoryview(b"two"))]).asbytes()

    def test_failed_send_leaves_the_connection_as_it_was(self, ends: Ends) -> None:
        broken: Any = memoryview(b"one"), "no bytes"
        with pytest.raises(TypeError):
            ends.ours.send_message(fast.Messages([(b"^", piece) for piece in broken]))
        assert self.carried(ends.ours, ends.theirs, b"after") == [b"after"]

    @pytest.mark.parametrize("length", [1, 17, 0xFFFFFFF0])
    def test_invalid_length_is_rejected(self, length: int) -> None:
        near, far = socket.socketpair()
        with near, far:
            ours: Any = fast.Packetizer(near)
            ours.set_inbound_cipher(AESGCM(bytes(16)), 16, None, 16, None, aead=True, iv_in=bytes(12))
            far.sendall(length.to_bytes(4, "big") + bytes(100))
            with pytest.raises(paramiko.SSHException, match=f"cannot be {length} bytes"):
                ours.read_message()

    @pytest.mark.parametrize("place", [4, 20, -1])
    def test_packet_changed_in_transit_is_rejected(self, place: int) -> None:
        near, far = socket.socketpair()
        wire, sink = socket.socketpair()
        with near, far, wire, sink:
            ends = Ends(fast.Packetizer(near), Packetizer(wire))
            agree_on_keys(ends)
            ends.theirs.send_message(Message(b"^" + bytes(100)))
            packet = bytearray(sink.recv(1000))
            packet[place] ^= 8
            far.sendall(packet)
            with pytest.raises(paramiko.SSHException, match="Mismatched MAC"):
                ends.ours.read_message()

    @pytest.mark.parametrize("plain", [b"", b"\x0f" + bytes(15), b"\xff" + bytes(15)])
    def test_packet_without_a_message_is_rejected(self, plain: bytes) -> None:
        near, far = socket.socketpair()
        with near, far:
            ours: Any = fast.Packetizer(near)
            engine, nonce, head = AESGCM(bytes(16)), bytes(12), len(plain).to_bytes(4, "big")
            ours.set_inbound_cipher(engine, 16, None, 16, None, aead=True, iv_in=nonce)
            far.sendall(head + engine.encrypt(nonce, plain, head))
            with pytest.raises(paramiko.SSHException, match="without a message"):
                ours.read_message()

    @pytest.mark.parametrize("limit", ["REKEY_BYTES", "REKEY_PACKETS"])
    def test_rekey_is_requested_at_paramikos_limits(self, ends: Ends, limit: str) -> None:
        for sender, receiver in ((ends.ours, ends.theirs), (ends.theirs, ends.ours)):
            for each in ends:
                setattr(each, limit, 3 if limit == "REKEY_PACKETS" else 300)  # a packet here has 100 bytes
                assert not each.need_rekey()
            for wanted in (False, False, True):
                self.carried(sender, receiver, bytes(74))
                assert [each.need_rekey() for each in ends] == [wanted, wanted]
            for each in ends:
                setattr(each, limit, 1 << 29)
            agree_on_keys(ends)

    @pytest.mark.parametrize("limit", ["REKEY_BYTES_OVERFLOW_MAX", "REKEY_PACKETS_OVERFLOW_MAX"])
    def test_server_that_ignores_rekey_requests_is_an_error(self, ends: Ends, limit: str) -> None:
        ends.ours.REKEY_PACKETS = 1
        setattr(ends.ours, limit, 2 if "PACKETS" in limit else 200)
        self.carried(ends.theirs, ends.ours, bytes(74), bytes(74))
        with pytest.raises(paramiko.SSHException, match="ignoring rekey"):
            self.carried(ends.theirs, ends.ours, bytes(74))

    def test_due_rekey_is_raised_while_nothing_arrives(self, ends: Ends) -> None:
        ends.ours._trigger_rekey()
        with pytest.raises(NeedRekeyException):
            ends.ours.read_message()

    def test_failed_write_raises_eof_error(self, ends: Ends) -> None:
        ends.theirs.close()
        with pytest.raises(EOFError):
            ends.ours.send_message(Message(b"^"))

    def test_reused_descriptor_is_not_written_to(self, ends: Ends, tmp_path: Path) -> None:
        """The socket may be closed, and its descriptor reused, just before it is written to."""

        class Closed:
            def fileno(self) -> int:
                return file.fileno()

            def sendmsg(self, *_: object) -> int:
                raise OSError(errno.EBADF, "Bad file descriptor")

        with (tmp_path / "foreign").open("wb") as file:
            ends.ours._sock = Closed()
            with pytest.raises(EOFError):
                ends.ours.send_message(Message(b"^"))
        assert (tmp_path / "foreign").read_bytes() == b""

    def test_sent_data_postpones_the_keepalive(self, ends: Ends) -> None:
        called: list[None] = []
        ends.ours.set_keepalive(60, lambda: called.append(None))
        ends.ours._Packetizer__keepalive_last -= 120
        ends.ours.send_message(Message(b"^"))
        ends.ours._check_keepalive()
        assert not called


def test_rejected_packet_ends_the_transport_and_is_named_as_the_reason(server: LoopbackSSHServer, agent: Agent) -> None:
    """If paramiko's own code read it, the reason would be empty."""
    with server.connect(transport_factory=fast_transport) as client:
        transport: Any = client.get_transport()
        transport.packetizer._Packetizer__iv_in = bytes(12)
        with pytest.raises(TransportClosed):
            open_to(transport, agent.port)
        eventually(lambda: not transport.is_active())
        assert "Mismatched MAC" in why_ended(transport)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (None, "The SSH connection ended."),
        (EOFError(), "The SSH connection ended."),
        (
            ConnectionResetError(104, "Connection reset by peer"),
            "The SSH connection ended: [Errno 104] Connection reset by peer.",
        ),
        (paramiko.SSHException("A packet without a message."), "The SSH connection ended: A packet without a message."),
        (
            paramiko.SSHException('Indecipherable protocol version "Not allowed\x1b[2J at this time"'),
            'The SSH connection ended: instead of an SSH greeting the server said "Not allowed\\x1b[2J at this time".',
        ),
    ],
)
def test_reason_of_an_end_has_one_full_stop(error: Exception | None, sentence: str) -> None:
    transport: Any = SimpleNamespace(saved_exception=error, _parse_disconnect=None)
    assert why_ended(transport) == sentence


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("The system is going down for maintenance.", '"The system is going down for maintenance.".'),
        ("bye\x1b[2J", '"bye\\x1b[2J".'),
        ("x" * 1000, "x" * 200 + '…".'),
        ("  ", "ended."),
    ],
)
def test_reason_of_the_server_is_quoted(server: LoopbackSSHServer, text: str, quoted: str) -> None:
    transport = server.connect_transport()
    ended = threading.Event()
    watch = EndWatch(transport, ended.set)
    server.disconnect(text)
    assert ended.wait(WAIT_S)
    watch.cancel()
    assert why_ended(transport).endswith(quoted)
