"""Opening a display succeeds or raises an error of the right kind, in time."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_fsm import x11
from proxy_fsm.x11 import DisplayError, DisplayName, find_authorisation, open_display

from .helpers.holdings import descriptors, nothing_left_open
from .helpers.wait import WAIT_S
from .helpers.x_server import (
    ACCEPTED,
    COOKIE,
    HOSTNAME,
    INTERNET,
    INTERNET6,
    LOCAL,
    MAGIC,
    WILD,
    Client,
    FakeServer,
    RealServer,
    accept,
    authenticate,
    entry,
    environ_in,
    hang_up,
    listener_at,
    refused,
    sends,
    serving,
    short_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def x_environ(tmp_path: Path) -> dict[str, str]:
    """An environment whose DISPLAY is a socket in the test's own directory."""
    return environ_in(tmp_path)


def display_error(environ: dict[str, str], *, timeout_s: float = WAIT_S) -> DisplayError:
    with pytest.raises(DisplayError) as caught:
        open_display(environ, timeout_s=timeout_s)
    error = caught.value
    assert error.detail.isprintable()
    assert error.detail.endswith(".")
    assert COOKIE.hex() not in str(error).lower()
    assert COOKIE.decode("latin-1") not in str(error)
    return error


class TestDisplayName:
    @pytest.mark.parametrize(
        ("text", "name"),
        [
            (":0", DisplayName(0)),
            (":0.0", DisplayName(0)),
            (":51.2", DisplayName(51)),
            ("unix:0", DisplayName(0)),
            ("unix/host:3", DisplayName(3)),
            ("local/:3", DisplayName(3)),
            ("localhost:10", DisplayName(10, "localhost")),
            ("host:10.0", DisplayName(10, "host")),
            ("tcp/host:0", DisplayName(0, "host")),
            ("tcp/:0", DisplayName(0, "localhost")),
            ("inet6/[::1]:0", DisplayName(0, "::1")),
            ("[::1]:0", DisplayName(0, "::1")),
            ("::1:0.1", DisplayName(0, "::1")),
            ("host:59535", DisplayName(59535, "host")),
            (
                "/private/tmp/com.apple.launchd.x/org.xquartz:0",
                DisplayName(0, path="/private/tmp/com.apple.launchd.x/org.xquartz:0"),
            ),
            ("/tmp/x:4.1", DisplayName(4, path="/tmp/x:4")),
            ("/tmp/socket", DisplayName(0, path="/tmp/socket")),
            ("unix:/tmp/x:4", DisplayName(4, path="/tmp/x:4")),
        ],
    )
    def test_valid_display_is_parsed(self, text: str, name: DisplayName) -> None:
        assert DisplayName.parse(text) == name

    @pytest.mark.parametrize(
        "text",
        [
            *("", "0", ":", ":x", "host", "host:", ":-1", ":0.", ":0.0.0", ":59536", ":123456", "a b:0"),
            *("host::0", "[x:y]:0", "udp/host:0", "a/b/c:0", ":٣", "/tmp/\x1b:0", "h\x1b[2Jost:0", "\0:0"),
            "a\n:0",
        ],
    )
    def test_invalid_display_is_malformed(self, text: str) -> None:
        with pytest.raises(DisplayError) as caught:
            DisplayName.parse(text)
        assert caught.value.kind == "malformed"
        assert caught.value.detail.isprintable()

    @given(st.text())
    def test_any_text_is_parsed_or_malformed(self, text: str) -> None:
        with contextlib.suppress(DisplayError):
            name = DisplayName.parse(text)
            assert 0 <= name.number <= 99_999

    @pytest.mark.parametrize("text", [":0", "host:10", "[::1]:0", "/tmp/x:4"])
    def test_str_round_trips(self, text: str) -> None:
        assert str(DisplayName.parse(text)) == text


class TestFindAuthorisation:
    def find(self, tmp_path: Path, content: bytes, display: str = ":7", peer: str | None = None) -> tuple[bytes, bytes]:
        path = tmp_path / "authority"
        path.write_bytes(content)
        return find_authorisation(DisplayName.parse(display), path, peer=peer)

    @pytest.mark.parametrize(
        ("family", "address", "number", "display"),
        [
            (LOCAL, HOSTNAME, b"7", ":7"),
            (LOCAL, HOSTNAME, b"", ":7"),
            (LOCAL, HOSTNAME, b"7", "localhost:7"),
            (LOCAL, HOSTNAME, b"7", "127.0.0.1:7"),
            (LOCAL, HOSTNAME, b"7", "[::1]:7"),
            (LOCAL, HOSTNAME, b"7", "/tmp/x:7"),
            (WILD, b"", b"", "host.example.org:7"),
            (WILD, b"other", b"7", ":7"),
            (INTERNET, bytes([192, 0, 2, 7]), b"7", "192.0.2.7:7"),
            (INTERNET, bytes([192, 0, 2, 7]), b"7", "[::ffff:192.0.2.7]:7"),
            (INTERNET6, b"\x20\x01\x0d\xb8" + bytes(11) + b"\x07", b"7", "[2001:db8::7]:7"),
        ],
    )
    def test_entry_matches(self, tmp_path: Path, family: int, address: bytes, number: bytes, display: str) -> None:
        assert self.find(tmp_path, entry(family, address, number), display) == (MAGIC, COOKIE)

    @pytest.mark.parametrize(
        ("family", "address", "number"),
        [
            (LOCAL, HOSTNAME, b"8"),
            (LOCAL, HOSTNAME, b"07"),
            (LOCAL, b"other", b"7"),
            (INTERNET, bytes([127, 0, 0, 1]), b"7"),
            (WILD, b"", b"8"),
        ],
    )
    def test_entry_does_not_match(self, tmp_path: Path, family: int, address: bytes, number: bytes) -> None:
        assert self.find(tmp_path, entry(family, address, number)) == (b"", b"")

    def test_peer_address_matches_for_a_host_name(self, tmp_path: Path) -> None:
        content = entry(INTERNET, bytes([192, 0, 2, 7]), b"7")
        assert self.find(tmp_path, content, "host:7") == (b"", b"")
        assert self.find(tmp_path, content, "host:7", peer="192.0.2.7") == (MAGIC, COOKIE)

    def test_magic_cookie_is_preferred(self, tmp_path: Path) -> None:
        other = entry(LOCAL, HOSTNAME, b"7", b"XDM-AUTHORIZATION-1", b"x")
        assert self.find(tmp_path, other) == (b"XDM-AUTHORIZATION-1", b"x")
        assert self.find(tmp_path, other + entry(WILD, b"", b"")) == (MAGIC, COOKIE)

    def test_first_matching_entry_wins(self, tmp_path: Path) -> None:
        content = entry(LOCAL, HOSTNAME, b"7", data=b"first") + entry(LOCAL, HOSTNAME, b"7", data=b"second")
        assert self.find(tmp_path, content) == (MAGIC, b"first")

    def test_truncated_file_counts_up_to_the_cut(self, tmp_path: Path) -> None:
        first, second = entry(WILD, b"", b"8"), entry(WILD, b"", b"7")
        for length in range(len(second)):
            assert self.find(tmp_path, first + second[:length]) == (b"", b"")
        assert self.find(tmp_path, second + first[:-1]) == (MAGIC, COOKIE)

    def test_missing_or_irregular_file_counts_as_empty(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        for path in (None, tmp_path / "missing", tmp_path, tmp_path / "fifo", Path("a\0b")):
            assert find_authorisation(DisplayName(7), path) == (b"", b"")

    def test_unreadable_file_counts_as_empty(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def denied(*_: object) -> None:
            raise PermissionError

        monkeypatch.setattr(Path, "open", denied)
        (tmp_path / "authority").touch()
        assert find_authorisation(DisplayName(7), tmp_path / "authority") == (b"", b"")

    @given(content=st.binary())
    def test_any_content_is_parsed(self, tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
        path = tmp_path_factory.getbasetemp() / "any-authority"
        path.write_bytes(content)
        name, data = find_authorisation(DisplayName(7), path)
        assert name in content
        assert data in content


class TestOpenDisplay:
    def test_accepted_connection_is_open_and_blocking(self, x_environ: dict[str, str]) -> None:
        with serving(x_environ, accept) as server, open_display(x_environ, timeout_s=WAIT_S) as sock:
            client = server.clients.get(timeout=WAIT_S)
            assert (client.name, client.data) == (b"", b"")
            assert sock.gettimeout() is None
            client.sock.sendall(b"event")
            assert sock.recv(5) == b"event"  # the whole answer was read, and nothing more

    @pytest.mark.parametrize("variable", ["XAUTHORITY", "HOME"])
    def test_cookie_is_sent(self, x_environ: dict[str, str], tmp_path: Path, variable: str) -> None:
        del x_environ["XAUTHORITY"]
        x_environ[variable] = str(tmp_path if variable == "HOME" else tmp_path / ".Xauthority")
        (tmp_path / ".Xauthority").write_bytes(entry(LOCAL, HOSTNAME, b"7", data=b"13 bytes long"))
        with serving(x_environ, accept) as server, open_display(x_environ, timeout_s=WAIT_S):
            client = server.clients.get(timeout=WAIT_S)
            assert (client.name, client.data) == (MAGIC, b"13 bytes long")

    def test_answer_in_pieces_is_accepted(self, x_environ: dict[str, str]) -> None:
        def dribble(_: FakeServer, client: Client) -> None:
            for byte in ACCEPTED:
                client.sock.sendall(bytes([byte]))

        with serving(x_environ, dribble), open_display(x_environ, timeout_s=WAIT_S) as sock:
            sock.settimeout(0)
            with pytest.raises(BlockingIOError):
                sock.recv(1)

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "tcp/127.0.0.1"])
    def test_host_is_reached_by_tcp(self, x_environ: dict[str, str], host: str, tmp_path: Path) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        number = listener.getsockname()[1] - 6000
        (tmp_path / "authority").write_bytes(entry(LOCAL, HOSTNAME, str(number).encode()))
        x_environ["DISPLAY"] = f"{host}:{number}.0"
        with FakeServer(listener, accept) as server, open_display(x_environ, timeout_s=WAIT_S):
            assert server.clients.get(timeout=WAIT_S).data == COOKIE

    @pytest.mark.parametrize(
        "prefix",
        [
            "",
            pytest.param(
                "\0",
                marks=pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's"),
            ),
        ],
    )
    def test_display_number_is_looked_up_in_the_usual_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
    ) -> None:
        monkeypatch.setattr(x11, "_SOCKET_DIRECTORY", str(tmp_path))
        with (
            FakeServer(listener_at(f"{prefix}{tmp_path}/X7"), accept),
            open_display({"DISPLAY": ":7"}, timeout_s=WAIT_S) as sock,
        ):
            assert sock.getpeername() in {f"{tmp_path}/X7", f"\0{tmp_path}/X7".encode()}

    def test_abstract_sockets_are_tried_on_linux_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(x11, "_SOCKET_DIRECTORY", str(tmp_path))
        monkeypatch.setattr(sys, "platform", "darwin")
        listener = listener_at(tmp_path / "X7")
        with FakeServer(listener, accept), open_display({"DISPLAY": ":7"}, timeout_s=WAIT_S) as sock:
            assert sock.getpeername() == f"{tmp_path}/X7"

    def test_display_number_means_tcp_without_unix_sockets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        number = listener.getsockname()[1] - 6000
        monkeypatch.delattr(socket, "AF_UNIX")
        with FakeServer(listener, accept), open_display({"DISPLAY": f":{number}"}, timeout_s=WAIT_S) as sock:
            assert sock.family == socket.AF_INET

    @pytest.mark.parametrize("environ", [{}, {"DISPLAY": ""}])
    def test_missing_display_is_unset(self, environ: dict[str, str]) -> None:
        error = display_error(environ)
        assert error.kind == "unset"
        assert "Set DISPLAY" in error.hint
        assert str(error) == f"{error.detail} {error.hint}"

    @pytest.mark.parametrize("text", ["nonsense", "x" * 70 + ".example:0"])
    def test_invalid_display_is_malformed(self, text: str) -> None:
        assert display_error({"DISPLAY": text}).kind == "malformed"

    def test_missing_socket_is_absent(self, x_environ: dict[str, str]) -> None:
        error = display_error(x_environ)
        assert error.kind == "absent"
        assert x_environ["DISPLAY"] in error.detail

    def test_socket_without_listener_is_absent(self, x_environ: dict[str, str]) -> None:
        listener_at(x_environ["DISPLAY"]).close()
        assert "Connection refused" in display_error(x_environ).detail

    def test_too_long_socket_path_is_absent(self) -> None:
        assert display_error({"DISPLAY": "/" + "x" * 200}).kind == "absent"

    def test_host_without_address_is_absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
        assert display_error({"DISPLAY": "host:7"}).kind == "absent"

    def test_socket_without_permission_is_refused(
        self, x_environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def denied(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(socket.socket, "connect", denied)
        error = display_error(x_environ)
        assert error.kind == "refused"
        assert "Permission denied" in error.detail

    @pytest.mark.parametrize("answer", [refused, authenticate])
    def test_refusal_quotes_its_reason_escaped(
        self, x_environ: dict[str, str], answer: Callable[[bytes], bytes]
    ) -> None:
        with serving(x_environ, sends(answer(b"\x1b[2JNo protocol\x07 specified\n"), hang_up=True)):
            error = display_error(x_environ)
        assert error.kind == "refused"
        assert "\\x1b[2JNo protocol\\x07 specified." in error.detail

    def test_refusal_without_reason_says_so(self, x_environ: dict[str, str]) -> None:
        with serving(x_environ, sends(refused(b""))):
            assert "it gave no reason" in display_error(x_environ).detail

    def test_cookie_in_a_refusal_is_redacted(self, x_environ: dict[str, str]) -> None:
        Path(x_environ["XAUTHORITY"]).write_bytes(entry(WILD, b"", b""))
        reason = b"bad %s or %s or %s" % (COOKIE, COOKIE.hex().encode(), COOKIE.hex().upper().encode())
        with serving(x_environ, sends(refused(reason))):
            assert "bad <hidden> or <hidden> or <hidden>." in display_error(x_environ).detail

    def test_long_reason_is_truncated(self, x_environ: dict[str, str]) -> None:
        with serving(x_environ, sends(authenticate(b"x" * 200_000))):
            assert len(display_error(x_environ).detail) < 500

    @pytest.mark.parametrize("answer", [b"", ACCEPTED[:1], ACCEPTED[:8], ACCEPTED[:-1]])
    def test_server_without_an_answer_is_silent(self, x_environ: dict[str, str], answer: bytes) -> None:
        with serving(x_environ, sends(answer)):
            error = display_error(x_environ, timeout_s=0.2)
        assert error.kind == "silent"
        assert "within 0.2 s" in error.detail

    def test_timeout_of_zero_is_silent(self, x_environ: dict[str, str]) -> None:
        assert display_error(x_environ, timeout_s=0).kind == "silent"

    def test_deadline_covers_all_pieces_of_an_answer(self, x_environ: dict[str, str]) -> None:
        stop = threading.Event()

        def dribble(_: FakeServer, client: Client) -> None:
            long_answer = struct.pack("<BxHHH", 1, 11, 0, 0xFFFF) + bytes(4 * 0xFFFF)
            with contextlib.suppress(OSError):
                for byte in long_answer:
                    client.sock.sendall(bytes([byte]))
                    if stop.wait(0.02):
                        return

        with serving(x_environ, dribble):
            before = time.monotonic()
            assert display_error(x_environ, timeout_s=0.3).kind == "silent"
            assert time.monotonic() - before < 10
            stop.set()

    def test_full_accept_backlog_is_silent(self, x_environ: dict[str, str]) -> None:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(x_environ["DISPLAY"])
            listener.listen(0)
            for _ in range(3):
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.settimeout(0)
                with contextlib.suppress(BlockingIOError):
                    waiting.connect(x_environ["DISPLAY"])
            assert display_error(x_environ, timeout_s=0.2).kind == "silent"

    @pytest.mark.parametrize("answer", [b"", ACCEPTED[:4], ACCEPTED[:-1], refused(b"no")[:-1]])
    def test_server_that_always_hangs_up_is_absent(self, x_environ: dict[str, str], answer: bytes) -> None:
        with serving(x_environ, sends(answer, hang_up=True)) as server:
            error = display_error(x_environ)
            assert len(server.kept) == 6
        assert error.kind == "absent"
        assert "hung up" in error.detail

    def test_server_that_resets_is_retried(self, x_environ: dict[str, str]) -> None:
        with serving(x_environ, hang_up, hang_up, accept) as server:
            open_display(x_environ, timeout_s=WAIT_S).close()
            assert len(server.kept) == 3

    def test_server_of_another_protocol_is_absent(self, x_environ: dict[str, str]) -> None:
        with serving(x_environ, sends(b"SSH-2.0-OpenSSH_9.2\r\n")):
            error = display_error(x_environ)
        assert error.kind == "absent"
        assert "no X server" in error.detail

    def test_no_descriptor_leaks(self, x_environ: dict[str, str]) -> None:
        before = descriptors()
        with serving(x_environ, hang_up, sends(refused(b"no"))):
            display_error(x_environ)
        display_error(x_environ)
        nothing_left_open(before)

    def test_display_error_survives_pickle(self) -> None:
        error = display_error({})
        again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
        assert (again.kind, again.detail, again.hint) == (error.kind, error.detail, error.hint)


class TestShortage:
    """A process without free descriptors cannot tell whether there is an X server, and must not say there is none."""

    @pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS])
    def test_shortage_on_socket_creation_is_local(
        self, x_environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        monkeypatch.setattr(socket, "socket", short_of(number))
        error = display_error(x_environ)
        assert error.kind == "local"
        assert os.strerror(number) in error.detail
        assert "no X server" not in error.detail

    def test_shortage_on_connect_is_local(self, x_environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(socket.socket, "connect", short_of(errno.ENOBUFS))
        assert display_error({**x_environ, "DISPLAY": ":59000"}).kind == "local"

    def test_shortage_on_reading_the_cookie_is_local(
        self, x_environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Path(x_environ["XAUTHORITY"]).write_bytes(entry(WILD, b"", b""))
        monkeypatch.setattr(Path, "open", short_of(errno.EMFILE))
        with serving(x_environ, sends(refused(b"no"))) as server:
            assert display_error(x_environ).kind == "local"
            server.stop()
            monkeypatch.undo()


@pytest.fixture
def real(tmp_path: Path) -> Iterator[RealServer]:
    server = RealServer(tmp_path)
    try:
        yield server
    finally:
        server.kill()


@pytest.mark.real
class TestRealServer:
    def test_connection_with_its_cookie_is_accepted(self, real: RealServer) -> None:
        with open_display(real.environ, timeout_s=WAIT_S) as sock:
            sock.settimeout(0)
            with pytest.raises(BlockingIOError):
                sock.recv(1)

    def test_connection_with_a_wrong_cookie_is_refused(self, real: RealServer, tmp_path: Path) -> None:
        wrong = tmp_path / "wrong"
        wrong.write_bytes(entry(LOCAL, HOSTNAME, b"", data=bytes(16)))
        with open_display(real.environ, timeout_s=WAIT_S):
            error = display_error(real.environ | {"XAUTHORITY": str(wrong)})
        assert error.kind == "refused"
        assert "XAUTHORITY" in error.hint

    def test_connection_after_each_reset_is_accepted(self, real: RealServer) -> None:
        for _ in range(5):
            open_display(real.environ, timeout_s=WAIT_S).close()
