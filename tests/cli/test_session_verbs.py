"""``proxy-fsm suspend`` and ``proxy-fsm terminate``, and the choice of a session at a terminal."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest

from proxy_fsm import parse_session_list
from proxy_fsm.cli import choosing
from proxy_fsm.cli import verb as verb_module
from proxy_fsm.cli.verb import UsageError
from tests.helpers.wait import eventually
from tests.helpers.x2go_server import NAME, FakeX2Go, row

from .program import run, started

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .program import Home, Running


@pytest.fixture
def x2go() -> Iterator[FakeX2Go]:
    with FakeX2Go() as x2go:
        x2go.status = "R"
        yield x2go


def verb(home: Home, x2go: FakeX2Go, name: str, session: str) -> Running:
    server = x2go.ssh
    access: list[str | Path] = ["--key", home.write_key(server), "--known-hosts", home.add_known_host(server, "hosts")]
    where = [f"{server.username}@{server.host}", "--port", str(server.port)]
    return run(home, name, *where, *access, "--session", session, "--log-format", "json")


@pytest.mark.parametrize(("name", "status"), [("suspend", "suspended"), ("terminate", "terminated")])
def test_session_is_released(home: Home, x2go: FakeX2Go, name: str, status: str) -> None:
    program = verb(home, x2go, name, NAME)
    assert (program.process.returncode, program.errors) == (0, "")
    assert program.events[-1]["event"] == "session.released"
    assert (program.events[-1]["session"], program.events[-1]["status"]) == (NAME, status)
    assert x2go.called(f"x2go{name}-session") == [[NAME]]


@pytest.mark.parametrize("name", ["suspend", "terminate"])
def test_unknown_session_is_a_usage_error_that_names_the_others(home: Home, x2go: FakeX2Go, name: str) -> None:
    program = verb(home, x2go, name, "bob-51")
    assert program.process.returncode == 2
    assert program.events[-1]["event"] == "usage.invalid"
    assert f"{NAME} (running)" in program.events[-1]["hint"]


def test_signal_ends_the_wait_for_the_server(home: Home, x2go: FakeX2Go) -> None:
    x2go.answer("x2gosuspend-session")  # and the session goes on
    server = x2go.ssh
    access: list[str | Path] = ["--key", home.write_key(server), "--known-hosts", home.add_known_host(server, "hosts")]
    where = [f"{server.username}@{server.host}", "--port", str(server.port)]
    with started(home, "suspend", *where, *access, "--session", NAME, "--log-format", "json") as program:
        eventually(lambda: x2go.called("x2golistsessions"))
        program.process.terminate()
        assert program.finish() == 0
    assert program.events[-1]["event"] == "interrupted"


def test_failed_command_is_reported(home: Home, x2go: FakeX2Go) -> None:
    x2go.answer("x2goterminate-session", 1, errors="no database: error\n")
    program = verb(home, x2go, "terminate", NAME)
    assert program.process.returncode == 3
    assert "no database" in program.events[-1]["detail"]


LISTED = parse_session_list("\n".join([row("bob-51", "F"), row(), row("eve-52", "R")]))


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that a person types."""
    lines: list[str] = []

    def read(*_: object, **__: object) -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("rich.console.Console.input", read)
    return lines


@pytest.mark.parametrize(
    ("lines", "chosen"),
    [
        (["1"], (NAME, False)),
        ([""], (NAME, False)),
        (["7", "x", "1"], (NAME, False)),
        (["2", "y"], ("eve-52", True)),
    ],
)
def test_person_chooses_a_session_that_has_not_ended(
    typed: list[str], capsys: pytest.CaptureFixture[str], lines: list[str], chosen: tuple[str, bool]
) -> None:
    typed += lines
    assert choosing.choose(LISTED, str) == chosen
    shown = capsys.readouterr()
    assert shown.out == ""
    assert NAME in shown.err
    assert "bob-51" not in shown.err


@pytest.mark.parametrize(
    ("lines", "words"), [([], "No session was chosen"), (["2", "n"], "left where it is shown"), (["2"], "No session")]
)
def test_no_choice_is_a_usage_error(typed: list[str], lines: list[str], words: str) -> None:
    typed += lines
    with pytest.raises(UsageError, match=words):
        choosing.choose(LISTED, str)


def test_no_session_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="There is no session"):
        choosing.choose(LISTED[:1], str)


def test_person_is_asked_at_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert not verb_module.is_interactive()
    monkeypatch.setattr("sys.stdin", None)
    assert not verb_module.is_interactive()
