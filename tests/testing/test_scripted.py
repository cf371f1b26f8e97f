"""Scripted programs run their steps, in order."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from proxy_fsm.testing.scripted import (
    Gate,
    ScriptedProxy,
    Step,
    connect,
    die_by,
    exit_with,
    fork_holding_output,
    half_close,
    ignore,
    on_signal,
    pause,
    print_cookie,
    record_call,
    say,
    send,
    wait_bytes,
    wait_eof,
    wait_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_WAIT_S = 20.0


def _start(*steps: Step, arguments: tuple[str, ...] = (), nx_display: str = "") -> subprocess.Popen[bytes]:
    command = [*ScriptedProxy(steps).command, *arguments]
    environ = {"NX_DISPLAY": nx_display}
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _run(*steps: Step) -> tuple[int, bytes, bytes]:
    with _start(*steps) as process:
        output, errors = process.communicate(timeout=_WAIT_S)
        return process.returncode, output, errors


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(_WAIT_S)
        yield listening


def test_lines_go_to_their_stream_and_exit_status_is_zero() -> None:
    text = 'it\'s {a} "line"\\{'
    assert _run(say(text), say("out", "stdout")) == (0, b"out\n", f"{text}\n".encode())


def test_source_survives_str_format() -> None:
    steps = [say("{host}"), send(b"{}"), record_call(Path("/nonexistent/{x}")), fork_holding_output()]
    source = ScriptedProxy(steps).source
    assert source.format() == source


def test_exit_status_and_fatal_signals_are_reported() -> None:
    assert _run(exit_with(7), say("never")) == (7, b"", b"")
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        assert _run(die_by(number)) == (-number, b"", b"")


@pytest.mark.parametrize("form", ["{host} {port}", "{host}:{port}", "{host}::{port}", "-S {host}:{port}"])
def test_connect_uses_the_address_of_the_arguments(listener: socket.socket, form: str) -> None:
    host, port = listener.getsockname()
    arguments = tuple(form.format(host=host, port=port).split())
    with _start(connect(), send(b"hello {}"), half_close(), wait_eof(), arguments=arguments) as process:
        peer, _ = listener.accept()
        with peer, peer.makefile("rb") as stream:
            assert stream.read() == b"hello {}"
        assert process.wait(_WAIT_S) == 0


def test_connect_uses_the_address_of_nx_display(listener: socket.socket) -> None:
    display = f"nx/nx,connect=127.0.0.1,port={listener.getsockname()[1]},cookie=abc:51"
    with _start(connect(), print_cookie(), wait_bytes(3), arguments=("-S",), nx_display=display) as process:
        peer, _ = listener.accept()
        with peer:
            peer.sendall(b"123")
            _, errors = process.communicate(timeout=_WAIT_S)
        assert errors == b"cookie=abc\n"


@pytest.mark.parametrize("given", ["nx_display", "argument", "step"])
def test_connect_accepts_a_unix_socket(tmp_path: Path, given: str) -> None:
    path = str(tmp_path / "p")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        step = connect(path) if given == "step" else connect()
        display = f"nx/nx,connect=unix:{path},cookie=abc:51" if given == "nx_display" else ""
        arguments = (path,) if given == "argument" else ()
        with _start(step, send(b"x"), arguments=arguments, nx_display=display):
            peer, _ = listening.accept()
            with peer:
                assert peer.recv(9) == b"x"


def test_gate_blocks_until_it_is_opened(tmp_path: Path) -> None:
    with Gate(tmp_path / "gate") as gate:
        with _start(say("before"), wait_file(gate.path), say("after")) as process:
            assert process.stderr is not None
            assert process.stderr.readline() == b"before\n"
            assert process.poll() is None
            gate.open()
            assert process.stderr.readline() == b"after\n"
            assert process.wait(_WAIT_S) == 0
        gate.open()  # before the program waits: kept
        assert _run(wait_file(gate.path)) == (0, b"", b"")
    assert not (tmp_path / "gate").exists()


def test_signals_can_be_ignored(tmp_path: Path) -> None:
    with (
        Gate(tmp_path / "gate") as gate,
        _start(ignore(), say("ready"), wait_file(gate.path), exit_with(3)) as process,
    ):
        assert process.stderr is not None
        assert process.stderr.readline() == b"ready\n"
        process.terminate()
        gate.open()
        assert process.wait(_WAIT_S) == 3


def test_signals_can_be_handled_by_steps() -> None:
    with _start(on_signal(signal.SIGTERM, [say("leaving"), exit_with(5)]), say("ready"), pause()) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"ready\n"
        process.terminate()
        assert process.stderr.readline() == b"leaving\n"
        assert process.wait(_WAIT_S) == 5


def test_child_keeps_the_output_open_after_the_exit() -> None:
    with _start(fork_holding_output()) as process:
        assert process.stderr is not None
        child = int(process.stderr.readline().split()[1])
        assert process.wait(_WAIT_S) == 0
        assert select.select([process.stderr], [], [], 0)[0] == []  # open, and nothing to read
        os.kill(child, signal.SIGKILL)
        assert process.stderr.read() == b""


def test_installed_program_records_its_call(tmp_path: Path) -> None:
    record = tmp_path / "call.json"
    program = ScriptedProxy([record_call(record)]).install(tmp_path / "nx proxy")
    subprocess.run([program, "-S", "two words"], env={"NAME": "it's"}, cwd=tmp_path, check=True)
    call = json.loads(record.read_text())
    assert call["argv"][1:] == ["-S", "two words"]
    assert call["cwd"] == str(tmp_path)
    assert call["environ"]["NAME"] == "it's"
    assert call["sid"] == os.getsid(0)
    assert len(call["core_limit"]) == 2
