"""The files that a proxy keeps open while it runs."""

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
def failures() -> list[str]:
    return []


@pytest.fixture
def files(failures: list[str]) -> SessionFiles:
    return SessionFiles(failures.append)


def test_file_opened_after_close_is_closed_at_once(files: SessionFiles, tmp_path: Path) -> None:
    """A preflight may still be running when its proxy has ended."""
    before = descriptors()
    files.close()
    with pytest.raises(BackendError, match="had ended"):
        files.open(tmp_path / "log", tmp_path / "errors")
    nothing_left_open(before)
    files.close()


def test_failed_open_leaves_no_file_open(files: SessionFiles, tmp_path: Path) -> None:
    before = descriptors()
    (tmp_path / "errors").mkdir()
    with pytest.raises(BackendError, match="cannot be opened"):
        files.open(tmp_path / "log", tmp_path / "errors")
    nothing_left_open(before)


def test_lines_before_open_and_after_close_are_dropped(
    files: SessionFiles, tmp_path: Path, failures: list[str]
) -> None:
    files.write_errors("before")
    files.open(tmp_path / "log", tmp_path / "errors")
    files.write_errors("while")
    files.close()
    files.write_errors("after")
    assert (tmp_path / "errors").read_text(encoding="utf-8") == "while\n"
    assert failures == []


def test_errors_file_is_optional(files: SessionFiles, tmp_path: Path) -> None:
    files.open(tmp_path / "log", None)
    files.write_errors("hello")
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    files.close()


def test_errors_file_is_truncated_with_a_note(
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


def test_full_disk_is_reported_once(files: SessionFiles, tmp_path: Path, failures: list[str]) -> None:
    files.open(tmp_path / "log", tmp_path / "errors")
    assert files._errors is not None
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, files._errors.fileno())
    os.close(full)
    files.write_errors("one")
    files.write_errors("two")
    files.close()
    assert failures == [f"{tmp_path / 'errors'} cannot be written any more: No space left on device."]
