"""Events are written without secrets and without terminal control codes."""

from __future__ import annotations

import io
import json
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import structlog

from proxy_fsm.cli.output import LogFormat, Output, _Sink

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("log_format", LogFormat)
def test_secret_is_hidden_in_every_field(log_format: LogFormat, capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(log_format)
    output.redact.add(SECRET)
    try:
        int(f"x{SECRET.upper()}")
    except ValueError:
        output.log.exception(SECRET, detail=f"it is {SECRET}", **{f"key-{SECRET}": [SECRET]})
    shown = "".join(capsys.readouterr())
    assert SECRET not in shown.lower()
    assert shown.count("<hidden>") >= 4


def test_exception_is_one_text_field(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        int("oh no\n\x1b[2J")
    except ValueError:
        Output(LogFormat.JSON).log.exception("bad")
    (line,) = capsys.readouterr().out.splitlines()
    event = json.loads(line)
    assert event["level"] == "error"
    assert "oh no" in event["exception"]


def test_control_codes_are_escaped_on_console(capsys: pytest.CaptureFixture[str]) -> None:
    Output(LogFormat.CONSOLE).log.info("banner", detail="a\x1b[2Jb\r\x9bc")
    shown = capsys.readouterr()
    assert "\\x1b[2J" in shown.err
    assert not set(shown.err) & {"\x1b", "\r", "\x9b"}
    assert shown.out == ""


def test_record_has_events_below_console_level(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for verbose in (True, False):
        output = Output(LogFormat.CONSOLE, verbose=verbose, console_level=40)
        output.record_to(tmp_path / "events.jsonl")
        for level in ("debug", "info", "error"):
            getattr(output.log, level)(f"one-{level}")
        output.close()
        events = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
        assert events == ["one-debug", "one-info", "one-error"]
        shown = capsys.readouterr().err
        assert "one-error" in shown
        assert "one-info" not in shown


def test_events_of_several_threads_have_the_same_order_in_all_sinks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = Output(LogFormat.JSON)
    output.record_to(tmp_path / "events.jsonl")
    other = threading.Thread(target=lambda: output.log.info("two"))
    write = _Sink.write

    def write_and_let_another_try(sink: _Sink, line: str) -> None:
        write(sink, line)
        if "one" in line and other.ident is None:
            other.start()
            other.join(0.3)

    monkeypatch.setattr(_Sink, "write", write_and_let_another_try)
    output.log.info("one")
    other.join()
    output.close()
    recorded = (tmp_path / "events.jsonl").read_text()
    assert [json.loads(line)["event"] for line in recorded.splitlines()] == ["one", "two"]
    assert capsys.readouterr().out == recorded


def test_missing_standard_streams_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    for log_format in LogFormat:
        Output(log_format).log.info("unheard")


def test_structlog_stays_unconfigured() -> None:
    Output(LogFormat.JSON)
    assert not structlog.is_configured()


def test_colours_need_terminal_without_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for coloured in (True, False):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        if not coloured:
            monkeypatch.setenv("NO_COLOR", "")
        Output(LogFormat.CONSOLE).log.info("hello")
        assert ("\x1b" in terminal.getvalue()) is coloured
