"""``proxy-fsm doctor``: what is present, what is missing, and how to get it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm.cli import main
from proxy_fsm.testing import standins
from proxy_fsm.testing.scripted import Gate, install
from proxy_fsm.workers import checks
from tests.helpers.x2go_server import COOKIE

from .program import Running, run, started

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .program import Home

LACKING = 4


@contextmanager
def x_server(cookie: str = "") -> Iterator[str]:
    environ = {standins.COOKIE_VARIABLE: cookie}
    with subprocess.Popen(standins.command("display"), env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[1]
        process.kill()


@pytest.fixture
def environ(home: Home) -> Iterator[dict[str, str]]:
    """A machine with the needed programs and nothing else, in their own directory."""
    directory = programs(home)
    install(directory / "nxproxy", standins.command("proxy"))
    (directory / "xauth").symlink_to("/bin/true")
    with x_server() as display:
        yield {"DISPLAY": display, "PATH": str(directory)}


def programs(home: Home) -> Path:
    directory = home.path / "bin"
    directory.mkdir(exist_ok=True)
    return directory


def doctor(home: Home, environ: dict[str, str]) -> Running:
    program = run(home, "doctor", "--log-format", "json", **environ)
    assert program.errors == ""
    assert {event["event"] for event in program.events} == {"doctor.check"}
    return program


def check(program: Running, name: str) -> dict[str, Any]:
    (event,) = [event for event in program.events if event["check"] == name]
    assert event["result"] in {"ok", "missing", "advice"}
    assert event["level"] == ("info" if event["result"] == "ok" else "error" if event["needed"] else "warning")
    assert (event["hint"] is None) == (event["result"] == "ok")
    return event


def missing(program: Running, name: str) -> str:
    """Return detail and hint of a missing, needed item."""
    event = check(program, name)
    assert (event["result"], event["needed"]) == ("missing", True)
    assert program.process.returncode == LACKING
    return f"{event['detail']} {event['hint']}"


def missing_optional(program: Running, name: str) -> str:
    """Return detail and hint of a missing, optional item."""
    event = check(program, name)
    assert (event["result"], event["needed"]) == ("missing", False)
    return f"{event['detail']} {event['hint']}"


def test_complete_machine_is_ok(home: Home, environ: dict[str, str]) -> None:
    program = doctor(home, environ)
    assert program.process.returncode == 0
    for name in ("nxproxy", "~/.x2go", "X server", "tunnel", "xauth"):
        assert check(program, name)["result"] == "ok"
    assert "version 3.5.99.26" in check(program, "nxproxy")["detail"]
    missing_optional(program, "x2gokdriveclient")


def test_doctor_leaves_no_files(home: Home, environ: dict[str, str]) -> None:
    before = sorted(home.path.rglob("*"))
    doctor(home, environ)
    assert sorted(home.path.rglob("*")) == before


def test_console_prints_list_on_standard_output(home: Home, environ: dict[str, str]) -> None:
    del environ["DISPLAY"]
    program = run(home, "doctor", **environ)
    assert program.process.returncode == LACKING
    assert program.errors == ""
    assert program.process.stdout is not None
    lines = program.process.stdout.read().splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith("missing (needed)")]
    assert lines[place].endswith("X server: DISPLAY is not set.")
    assert "Set DISPLAY" in lines[place + 1]
    assert any(line.startswith("ok ") and "nxproxy" in line for line in lines)


def test_missing_nxproxy_is_reported_with_package(home: Home, environ: dict[str, str]) -> None:
    (programs(home) / "nxproxy").unlink()
    assert "the package nxproxy" in missing(doctor(home, environ), "nxproxy")


def test_nxproxy_binary_variable_is_honoured(home: Home, environ: dict[str, str]) -> None:
    moved = (programs(home) / "nxproxy").rename(home.path / "elsewhere")
    assert str(moved) in check(doctor(home, environ | {"NXPROXY_BINARY": str(moved)}), "nxproxy")["detail"]
    moved.chmod(0o600)
    assert "executable" in missing(doctor(home, environ | {"NXPROXY_BINARY": str(moved)}), "nxproxy")


def test_unrunnable_nxproxy_is_reported(home: Home, environ: dict[str, str]) -> None:
    """Such as one built for another architecture."""
    (programs(home) / "nxproxy").write_text("#!/nowhere/interpreter\n")
    assert "cannot be run" in missing(doctor(home, environ), "nxproxy")


def test_nxproxy_without_version_is_ok(home: Home, environ: dict[str, str]) -> None:
    (programs(home) / "nxproxy").unlink()
    (programs(home) / "nxproxy").symlink_to("/bin/true")
    assert "of unknown version" in check(doctor(home, environ), "nxproxy")["detail"]


@pytest.mark.parametrize("display", ["", "nonsense", "localhost:59999"])
def test_unusable_x_server_is_reported(home: Home, environ: dict[str, str], display: str) -> None:
    missing(doctor(home, environ | {"DISPLAY": display}), "X server")


def test_x_server_rejecting_connections_is_reported(home: Home, environ: dict[str, str]) -> None:
    with x_server(COOKIE) as display:
        assert "XAUTHORITY" in missing(doctor(home, environ | {"DISPLAY": display}), "X server")


def test_xauth_is_needed_if_x_server_requires_cookie(home: Home, environ: dict[str, str]) -> None:
    (programs(home) / "xauth").unlink()
    program = doctor(home, environ)
    missing_optional(program, "xauth")
    assert program.process.returncode == 0
    with x_server(COOKIE) as display:
        program = doctor(home, environ | {"DISPLAY": display})
        assert "xorg-x11-xauth" in missing(program, "xauth")
        assert "nxproxy's options" not in {event["check"] for event in program.events}


def test_sessions_root_should_be_private(home: Home, environ: dict[str, str]) -> None:
    root = home.path / ".x2go"
    root.mkdir(mode=0o700)
    assert check(doctor(home, environ), "~/.x2go")["result"] == "ok"
    for mode in (0o755, 0o777):
        root.chmod(mode)
        event = check(doctor(home, environ), "~/.x2go")
        assert event["result"] == "advice"
        assert f"chmod 700 {root}" in event["hint"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")
def test_sessions_root_of_another_user_gets_advice(home: Home, environ: dict[str, str]) -> None:
    """Chmod cannot fix that."""
    (home.path / ".x2go").mkdir(mode=0o777)
    os.chown(home.path / ".x2go", 1, 1)
    event = check(doctor(home, environ), "~/.x2go")
    assert event["result"] == "advice"
    assert "belongs to another user" in event["detail"]


def test_socket_directory_unfit_for_option_string_is_reported(home: Home, environ: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory(prefix="a,b-", dir="/tmp") as place:
        program = doctor(home, environ | {"XDG_RUNTIME_DIR": place})
    assert "cannot be written into an NX option string" in missing(program, "nxproxy's options")
    assert check(program, "tunnel")["result"] == check(program, "xauth")["result"] == "ok"


def test_unusable_socket_directory_is_reported(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(kind: str, directory: Path) -> object:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), f"{kind} {directory}")

    monkeypatch.setenv("HOME", str(home.path))
    monkeypatch.setattr(checks, "bind_listener", refuse)
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    (at,) = [at for at, line in enumerate(lines) if "tunnel: " in line]
    assert lines[at].startswith("missing (needed)")
    assert lines[at].endswith("The local end of the tunnel cannot be bound: Operation not permitted.")
    assert "writable and not full" in lines[at + 1]


def test_x2gokdriveclient_binary_variable_is_honoured(home: Home, environ: dict[str, str]) -> None:
    program = install(home.path / "kdrive", standins.command("proxy"))
    variable = {"X2GOKDRIVECLIENT_BINARY": str(program)}
    assert str(program) in check(doctor(home, environ | variable), "x2gokdriveclient")["detail"]
    program.chmod(0o600)
    assert "executable" in missing_optional(doctor(home, environ | variable), "x2gokdriveclient")


def test_signal_ends_doctor(home: Home, environ: dict[str, str]) -> None:
    """Between two checks; here, after a slow one."""
    with Gate(home.path / "gate") as gate, Gate(home.path / "begun") as begun:
        (programs(home) / "nxproxy").unlink()
        script = f"#!/bin/sh\necho x > {begun.path}\nread x < {gate.path}\n"
        (programs(home) / "nxproxy").write_text(script)
        (programs(home) / "nxproxy").chmod(0o700)
        with started(home, "doctor", "--log-format", "json", **environ) as program:
            with begun.path.open("rb") as waiting:
                waiting.readline()
            program.process.send_signal(signal.SIGTERM)
            os.write(gate._fd, b"go on\n")
            assert program.finish() == 0
    assert [event["event"] for event in program.events] == ["interrupted"]
    assert list(home.path.glob(".proxy_fsm-*")) == []


def test_sessions_root_that_is_a_file_is_reported(home: Home, environ: dict[str, str]) -> None:
    (home.path / ".x2go").touch()
    assert "directory" in missing(doctor(home, environ), "~/.x2go")


def test_keys_and_known_hosts_are_reported(home: Home, environ: dict[str, str]) -> None:
    missing_optional(doctor(home, environ), "SSH keys")
    for name in ("id_ed25519", "known_hosts"):
        (home.ssh / name).touch()
    program = doctor(home, environ)
    assert "id_ed25519" in check(program, "SSH keys")["detail"]
    assert str(home.ssh / "known_hosts") in check(program, "known hosts")["detail"]


def test_help_lists_exit_status(home: Home) -> None:
    program = run(home, "--help")
    assert program.process.stdout is not None
    assert "4: this machine lacks something that is needed" in program.process.stdout.read()
