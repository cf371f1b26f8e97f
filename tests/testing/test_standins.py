"""The stand-ins behave like nxagent, nxproxy and an X server, as far as a proxy can observe."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

import pytest

from proxy_fsm.testing import standins
from proxy_fsm.testing.scripted import install

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_COOKIE = "0123456789abcdef0123456789abcdef"
_WAIT_S = 20.0
_ESTABLISHED = "Info: Established X server connection."
_NEGOTIATION = [
    "Error: The remote NX proxy closed the connection.",
    "Error: Failure negotiating the session in stage '7'.",
    "Error: Wrong version or invalid session authentication cookie.",
]


@contextmanager
def _started(command: list[str], **environ: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def _agent(cookie: str = _COOKIE) -> Iterator[tuple[subprocess.Popen[str], int]]:
    with _started(standins.command("agent"), STANDIN_COOKIE=cookie) as process:
        yield process, int(_line(process.stdout).removeprefix("PORT "))


@contextmanager
def _proxy(connect: str, cookie: str = _COOKIE) -> Iterator[subprocess.Popen[str]]:
    display = f"nx/nx,{connect},cookie={cookie},retry=5:51"
    with _started(standins.command("proxy", "-S"), NX_DISPLAY=display) as process:
        yield process


def _line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().rstrip("\n")


def _read_until(stream: IO[str] | None, wanted: str) -> list[str]:
    lines: list[str] = []
    while not lines or lines[-1] != wanted:
        assert stream is not None
        line = stream.readline()
        assert line, f"ended before {wanted!r}: {lines}"
        lines.append(line.rstrip("\n"))
    return lines


def _finish(process: subprocess.Popen[str]) -> list[str]:
    _, errors = process.communicate(timeout=_WAIT_S)
    return errors.splitlines()


def _progress(lines: list[str]) -> list[str]:
    return [re.sub(r" (at )?'.*|#\d+.*", "", line) for line in lines if line.startswith(("Session:", "Info:"))]


class TestSession:
    def test_proxy_prints_the_messages_of_nxproxy_in_their_order(self) -> None:
        with _agent() as (agent, port), _proxy(f"connect=127.0.0.1,port={port}") as proxy:
            lines = _read_until(proxy.stderr, _ESTABLISHED)
            agent.terminate()
            lines += _finish(proxy)
            assert _progress(lines) == [
                "Info: Proxy running in server mode with pid",
                "Session: Starting session",
                "Info: Connecting to remote host",
                "Info: Connected to remote proxy on FD",
                "Info: Connection with remote proxy completed.",
                "Session: Session started",
                "Info: Established X server connection.",
                "Session: Terminating session",
                "Session: Session terminated",
            ]
            assert proxy.returncode == 0
            assert agent.wait(_WAIT_S) == 0
            assert _line(agent.stdout) == "RUNNING"
            assert _line(agent.stdout) == "ENDED"

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_signal_ends_the_session_in_order(self, number: signal.Signals) -> None:
        with _agent() as (agent, port), _proxy(f"connect=127.0.0.1,port={port}") as proxy:
            _read_until(proxy.stderr, _ESTABLISHED)
            proxy.send_signal(number)
            assert _progress(_finish(proxy)) == [
                "Session: Terminating session",
                "Info: Waiting the cleanup timeout to complete.",
                "Session: Session terminated",
            ]
            assert proxy.returncode == 0
            assert agent.wait(_WAIT_S) == 0

    def test_killed_proxy_is_lost_to_the_agent(self) -> None:
        with _agent() as (agent, port), _proxy(f"connect=127.0.0.1,port={port}") as proxy:
            _read_until(proxy.stderr, _ESTABLISHED)
            proxy.kill()
            assert agent.wait(_WAIT_S) == 1
            assert _line(agent.stdout) == "RUNNING"
            assert _line(agent.stdout) == "LOST"

    def test_killed_agent_is_a_broken_peer_to_the_proxy(self) -> None:
        with _agent() as (agent, port), _proxy(f"connect=127.0.0.1,port={port}") as proxy:
            _read_until(proxy.stderr, _ESTABLISHED)
            agent.kill()
            lines = _finish(proxy)
            assert lines[0] == "Error: Failure reading from the peer proxy."
            assert "Error: Connection with remote peer broken." in lines
            assert proxy.returncode == 0

    def test_wrong_cookie_prints_the_three_lines_of_a_failed_negotiation(self) -> None:
        with _agent() as (agent, port), _proxy(f"connect=127.0.0.1,port={port}", cookie="0" * 32) as proxy:
            lines = _finish(proxy)
            assert [line for line in lines if line.startswith("Error:")] == _NEGOTIATION
            assert proxy.returncode == 0
            assert agent.wait(_WAIT_S) == 1
            assert _line(agent.stdout) == "REFUSED"

    def test_agent_without_a_cookie_refuses_every_connection(self) -> None:
        with _agent("") as (agent, port), _proxy(f"connect=127.0.0.1,port={port}", cookie="") as proxy:
            assert _ESTABLISHED not in _finish(proxy)
            assert agent.wait(_WAIT_S) == 1

    def test_agent_exits_when_its_first_connection_is_dropped(self) -> None:
        with _agent() as (agent, port):
            socket.create_connection(("127.0.0.1", port)).close()
            assert agent.wait(_WAIT_S) == 1

    def test_agent_without_a_connection_ends_cleanly(self) -> None:
        with _agent() as (agent, _):
            agent.terminate()
            assert agent.wait(_WAIT_S) == 0

    def test_data_flow_in_both_directions(self) -> None:
        with _agent() as (_, port), socket.create_connection(("127.0.0.1", port), _WAIT_S) as peer:
            peer.sendall(f"HELLO {_COOKIE}\nINPUT one\n".encode())
            with peer.makefile("rb") as lines:
                assert lines.readline() == b"WELCOME\n"
                received = {lines.readline().split()[0] for _ in range(10)}
            assert received == {b"DRAW", b"ECHO"}


class TestProxy:
    def test_proxy_connects_to_a_unix_socket_and_removes_its_path(self, tmp_path: Path) -> None:
        path = tmp_path / "p"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            with _proxy(f"connect=unix:{path}") as proxy:
                peer, _ = listener.accept()
                with peer:
                    assert peer.recv(99) == f"HELLO {_COOKIE}\n".encode()
                lines = _finish(proxy)
        assert not any("Connecting to remote host" in line for line in lines)
        assert not path.exists()

    def test_refused_connection_is_reported(self, tmp_path: Path) -> None:
        with _proxy(f"connect=unix:{tmp_path}/none") as proxy:
            lines = _finish(proxy)
            assert f"Error: Connection to '{tmp_path}/none' failed. Error is 2 'No such file or directory'." in lines
            assert proxy.returncode == 0

    def test_signal_while_negotiating_aborts(self) -> None:
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            _proxy(f"connect=127.0.0.1,port={listener.getsockname()[1]}") as proxy,
        ):
            peer, _ = listener.accept()
            with peer:
                assert peer.recv(1) == b"H"
                proxy.terminate()
                lines = _finish(proxy)
        assert "Info: Aborting the procedure due to signal '15'." in lines
        assert lines[-1].startswith("Session: Session terminated at")
        assert not any("negotiating" in line for line in lines)

    def test_cookie_is_never_printed(self) -> None:
        with _agent() as (agent, port), _proxy(f"connect=127.0.0.1,port={port}") as proxy:
            lines = _read_until(proxy.stderr, _ESTABLISHED)
            agent.terminate()
            assert _COOKIE not in "".join(lines + _finish(proxy))

    def test_proxy_can_be_installed_as_an_executable(self, tmp_path: Path) -> None:
        executable = install(tmp_path / "nxproxy", standins.command("proxy"))
        with _agent() as (_, port):
            display = f"nx/nx,connect=127.0.0.1,port={port},cookie={_COOKIE}:1"
            with _started([str(executable), "-S"], NX_DISPLAY=display) as proxy:
                _read_until(proxy.stderr, _ESTABLISHED)

    def test_standins_can_be_run_as_a_module(self) -> None:
        with _started([sys.executable, "-m", "proxy_fsm.testing.standins", "nonsense"]) as process:
            assert _finish(process)[0].startswith("Usage:")
            assert process.returncode == 2


class TestDisplay:
    @pytest.mark.parametrize("order", ["little", "big"])
    @pytest.mark.parametrize(
        ("cookie", "accepted"), [(_COOKIE, 1), ("00" * 16, 0), ("", 0)], ids=["right", "wrong", "missing"]
    )
    def test_display_accepts_only_its_cookie(self, order: str, cookie: str, accepted: int) -> None:
        command = standins.command("display")
        with _started(command, STANDIN_COOKIE=_COOKIE) as display, _x11(display) as client:
            client.sendall(_setup(order, bytes.fromhex(cookie)))
            head = client.recv(8, socket.MSG_WAITALL)
            assert head[0] == accepted
            body_bytes = 4 * int.from_bytes(head[6:8], "little" if order == "little" else "big")
            assert len(client.recv(body_bytes, socket.MSG_WAITALL)) == body_bytes
            if not accepted:
                assert client.recv(1) == b""

    def test_display_without_a_cookie_accepts_any_client_and_a_split_setup(self) -> None:
        with _started(standins.command("display")) as display, _x11(display) as client:
            setup = _setup("little", b"")
            client.sendall(setup[:5])
            client.sendall(setup[5:])
            assert client.recv(1) == b"\1"

    def test_display_closes_its_connections_on_exit(self) -> None:
        with _started(standins.command("display")) as display, _x11(display) as client:
            client.sendall(_setup("little", b""))
            assert len(client.recv(40, socket.MSG_WAITALL)) == 40
            display.terminate()
            assert client.recv(1) == b""
            assert display.wait(_WAIT_S) == 0

    def test_display_number_in_use_is_refused(self) -> None:
        with _started(standins.command("display")) as first:
            number = _line(first.stdout).rpartition(":")[2]
            with _started(standins.command("display", number)) as second:
                assert _finish(second) == [f"No display from {number} to {number} is free."]
                assert second.returncode == 1


def _x11(display: subprocess.Popen[str]) -> socket.socket:
    number = int(_line(display.stdout).removeprefix("DISPLAY 127.0.0.1:"))
    return socket.create_connection(("127.0.0.1", 6000 + number), _WAIT_S)


def _setup(order: str, cookie: bytes) -> bytes:
    name = b"MIT-MAGIC-COOKIE-1" if cookie else b""
    numbers = (11, 0, len(name), len(cookie), 0)
    packed = b"".join(number.to_bytes(2, "little" if order == "little" else "big") for number in numbers)
    return (b"l\0" if order == "little" else b"B\0") + packed + name + bytes(-len(name) % 4) + cookie
