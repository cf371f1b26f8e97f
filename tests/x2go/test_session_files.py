"""The files that a proxy holds open while it runs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from proxy_fsm import BackendError
from proxy_fsm.x2go import session_files
from proxy_fsm.x2go.session_files import SessionFiles
from tests.helpers.holdings import descriptors, nothing_left_open

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def files(told: list[str]) -> SessionFiles:
    return SessionFiles(told.append)


def test_what_is_opened_too_late_is_closed_at_once(files: SessionFiles, tmp_path: Path) -> None:
    """A preflight may still be at work when its proxy has ended."""
    before = descriptors()
    files.close()
    with pytest.raises(BackendError, match="had ended"):
        files.open(tmp_path / "log", tmp_path / "errors")
    nothing_left_open(before)
    files.close()


def test_nothing_stays_open_where_one_cannot_be_opened(files: SessionFiles, tmp_path: Path) -> None:
    before = descriptors()
    (tmp_path / "errors").mkdir()
    with pytest.raises(BackendError, match="cannot be opened"):
        files.open(tmp_path / "log", tmp_path / "errors")
    nothing_left_open(before)


def test_lines_before_and_after_are_nobodys(files: SessionFiles, tmp_path: Path, told: list[str]) -> None:
    files.write_errors("before")
    files.open(tmp_path / "log", tmp_path / "errors")
    files.write_errors("while")
    files.close()
    files.write_errors("after")
    assert (tmp_path / "errors").read_text(encoding="utf-8") == "while\n"
    assert told == []


def test_where_no_errors_are_wanted_there_is_no_file(files: SessionFiles, tmp_path: Path) -> None:
    files.open(tmp_path / "log", None)
    files.write_errors("hello")
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    files.close()


def test_a_program_that_floods_is_cut_and_that_is_said(
    files: SessionFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_files, "_MAX_ERRORS_BYTES", 10)
    files._errors_room_bytes = 10
    files.open(tmp_path / "log", tmp_path / "errors")
    for line in ("eight…", "too much", "more"):
        files.write_errors(line)
    files.close()
    text = (tmp_path / "errors").read_text(encoding="utf-8")
    assert text == "eight…\n… the rest is left out: this run printed more than 10 bytes\n"


def test_a_disk_that_is_full_is_told_once(files: SessionFiles, tmp_path: Path, told: list[str]) -> None:
    files.open(tmp_path / "log", tmp_path / "errors")
    assert files._errors is not None
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, files._errors.fileno())
    os.close(full)
    files.write_errors("one")
    files.write_errors("two")
    files.close()
    assert told == [f"{tmp_path / 'errors'} cannot be written any more: No space left on device."]
