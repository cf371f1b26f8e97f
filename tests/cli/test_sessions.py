"""``proxy-fsm sessions``: a server's sessions, for people and for programs."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import pytest

from proxy_fsm.cli import sessions
from proxy_fsm.cli.output import LogFormat, Output
from proxy_fsm.server import X2GoServer
from tests.helpers.x2go_server import COOKIE, NAME, FakeX2Go, row

from .program import Running, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .program import Home


@pytest.fixture
def x2go() -> Iterator[FakeX2Go]:
    with FakeX2Go() as x2go:
        yield x2go


def listed(home: Home, x2go: FakeX2Go, log_format: str = "json", *options: str) -> Running:
    server = x2go.ssh
    access: list[str | Path] = ["--key", home.write_key(server), "--known-hosts", home.add_known_host(server, "hosts")]
    where = [f"{server.username}@{server.host}", "--port", str(server.port)]
    return run(home, "sessions", *where, *access, "--log-format", log_format, *options)


def test_each_session_is_one_event(home: Home, x2go: FakeX2Go) -> None:
    x2go.other_rows = [row(), row("bob-51", "R"), row("eve-52", "F")]
    program = listed(home, x2go)
    assert program.process.returncode == 0
    assert program.errors == ""
    events = program.named("session.listed")
    assert [(event["session"], event["status"], event["resumable"]) for event in events] == [
        (NAME, "suspended", True),
        ("bob-51", "running", False),
        ("eve-52", "finished", False),
    ]
    assert (events[0]["display"], events[0]["created"], events[0]["client"]) == (
        50,
        "2026-11-22T11:38:00",
        "192.0.2.7",
    )
    assert COOKIE not in program.raw


def test_console_prints_table_on_standard_output(home: Home, x2go: FakeX2Go) -> None:
    """Names are not wrapped, and the server's text is not interpreted as markup."""
    long = "x" * 200
    x2go.other_rows = [row(client="[red]here"), row(long, "R")]
    program = listed(home, x2go, "console")
    table = program.process.stdout.read()  # type: ignore[union-attr]  # it is there
    for text in (NAME, long, "suspended", "running", ":50", "[red]here", "--take-over"):
        assert text in table
    assert COOKIE not in table + program.errors


def test_json_is_one_array_on_standard_output(home: Home, x2go: FakeX2Go) -> None:
    x2go.other_rows = [row(), row("bob-51", "R")]
    program = listed(home, x2go, "console", "--format", "json")
    found = json.loads(program.process.stdout.read())  # type: ignore[union-attr]  # it is there
    assert [(each["session"], each["status"], each["resumable"]) for each in found] == [
        (NAME, "suspended", True),
        ("bob-51", "running", False),
    ]
    assert listed(home, x2go, "json", "--format", "json").process.returncode == 2


def test_narrow_terminal_shows_whole_names(
    x2go: FakeX2Go, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x2go.other_rows = [row(), row("b" * 150, "R")]
    with contextlib.closing(x2go.ssh.connect_transport()) as transport:
        found = X2GoServer(transport).sessions()
    monkeypatch.setattr("proxy_fsm.cli.sessions._UNWRAPPED_WIDTH", 40)
    sessions._print(Output(LogFormat.CONSOLE), found)
    lines = capsys.readouterr().out.splitlines()
    assert NAME in lines
    assert "b" * 150 in lines
    assert all(len(line) <= 40 for line in lines if "-5" not in line and "b" not in line)
    assert any("can be resumed yes" in line for line in lines)


def test_cookie_in_another_field_is_hidden(home: Home, x2go: FakeX2Go) -> None:
    """Within one row this is rejected; here it is in another session's row."""
    x2go.other_rows = [row(), row("bob-51", client=f"x{COOKIE.upper()}y", cookie="f" * 32)]
    program = listed(home, x2go)
    assert program.named("session.listed")[1]["client"] == "x<hidden>y"
    table = listed(home, x2go, "console").process.stdout.read()  # type: ignore[union-attr]  # it is there
    assert COOKIE.upper() not in table


def test_empty_list_is_ok(home: Home, x2go: FakeX2Go) -> None:
    assert listed(home, x2go).named("session.listed") == []
    program = listed(home, x2go, "console")
    assert program.process.returncode == 0
    assert program.process.stdout.read() == "There is no session.\n"  # type: ignore[union-attr]  # it is there


def failure(program: Running) -> tuple[str, str]:
    assert program.process.returncode == 3
    event = program.events[-1]
    assert (event["event"], event["level"]) == ("server.failed", "error")
    assert COOKIE not in program.raw + program.errors
    return event["reason"], f"{event['detail']} {event['hint']}"


def test_server_without_x2go_is_reported_with_package(home: Home, x2go: FakeX2Go) -> None:
    x2go.without("x2golistsessions")
    reason, words = failure(listed(home, x2go))
    assert reason == "not_x2go"
    assert "package x2goserver" in words


def test_failed_command_is_reported_with_its_error_but_without_cookie(home: Home, x2go: FakeX2Go) -> None:
    x2go.answer("x2golistsessions", 5, errors=f"oh\nno database\x1b[2J {COOKIE}\n\n")
    reason, words = failure(listed(home, x2go))
    assert reason == "command_failed"
    assert "status 5" in words
    assert "no database\\x1b[2J <hidden>" in words


def test_unreadable_list_is_reported(home: Home, x2go: FakeX2Go) -> None:
    x2go.answer("x2golistsessions", output=row().replace("|S|", "|X|"))
    assert failure(listed(home, x2go))[0] == "unreadable_answer"


def test_oversized_answer_is_an_error(home: Home, x2go: FakeX2Go) -> None:
    x2go.answer("x2golistsessions", output="\n" * (1 << 21))
    assert failure(listed(home, x2go))[0] == "unreadable_answer"


def test_lost_connection_is_reported(home: Home, x2go: FakeX2Go) -> None:
    def drop(_line: str) -> tuple[int, bytes, bytes]:
        x2go.ssh.drop()
        return 0, b"", b""

    x2go.ssh.commands = {"x2golistsessions": drop}
    assert failure(listed(home, x2go))[0] == "connection_lost"
