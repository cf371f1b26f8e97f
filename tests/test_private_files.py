"""Private files are ours, not links, and not accessible to other users, whatever the umask and what existed before."""

from __future__ import annotations

import os
import stat
import tempfile
from typing import TYPE_CHECKING

import pytest

from proxy_fsm.private_files import (
    MAX_SOCKET_PATH_BYTES,
    SOCKET_NAME,
    make_private_directory,
    make_socket_directory,
    open_private,
    write_private,
)
from tests.helpers.holdings import descriptors, nothing_left_open

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(params=[0, 0o77], ids=["umask 000", "umask 077"])
def _umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_umask")
class TestModes:
    def test_new_directory_is_private(self, tmp_path: Path) -> None:
        make_private_directory(tmp_path / "new")
        assert mode(tmp_path / "new") == 0o700

    def test_permissions_of_existing_directory_are_tightened(self, tmp_path: Path) -> None:
        (tmp_path / "old").mkdir()
        (tmp_path / "old").chmod(0o777)
        (tmp_path / "old/file").touch()
        make_private_directory(tmp_path / "old")
        assert mode(tmp_path / "old") == 0o700
        assert (tmp_path / "old/file").exists()

    def test_opened_file_is_private_and_appended_to(self, tmp_path: Path) -> None:
        (tmp_path / "log").write_text("earlier\n", encoding="ascii")
        (tmp_path / "log").chmod(0o666)
        for path in (tmp_path / "log", tmp_path / "new"):
            file = open_private(path)
            os.write(file, b"later\n")
            assert not os.get_inheritable(file)
            os.close(file)
            assert mode(path) == 0o600
        assert (tmp_path / "log").read_text(encoding="ascii") == "earlier\nlater\n"

    def test_written_file_is_private(self, tmp_path: Path) -> None:
        write_private(tmp_path / "options", "a=ä")
        assert mode(tmp_path / "options") == 0o600
        assert (tmp_path / "options").read_text(encoding="utf-8") == "a=ä"

    def test_socket_directory_is_private(self) -> None:
        directory = make_socket_directory({"XDG_RUNTIME_DIR": "/tmp"})
        assert mode(directory) == 0o700
        assert list(directory.iterdir()) == []
        directory.rmdir()


class TestRefusals:
    @pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
    def test_path_that_is_no_directory_is_refused(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "it"
        path.touch() if kind == "file" else path.symlink_to(tmp_path if kind == "link" else "nowhere")
        with pytest.raises(NotADirectoryError, match="it is no directory, or a link to one"):
            make_private_directory(path)

    @needs_root
    def test_directory_of_another_user_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "theirs").mkdir(mode=0o755)
        os.chown(tmp_path / "theirs", 1, 1)
        with pytest.raises(PermissionError, match="theirs belongs to another user"):
            make_private_directory(tmp_path / "theirs")
        assert mode(tmp_path / "theirs") == 0o755

    @needs_root
    def test_file_of_another_user_is_refused_and_closed(self, tmp_path: Path) -> None:
        (tmp_path / "theirs").touch()
        os.chown(tmp_path / "theirs", 1, 1)
        before = descriptors()
        with pytest.raises(PermissionError, match="theirs is no plain file of ours"):
            open_private(tmp_path / "theirs")
        nothing_left_open(before)

    def test_fifo_is_refused_at_once(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(OSError, match="No such device"):
            open_private(tmp_path / "fifo")

    def test_link_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("target")
        with pytest.raises(OSError, match="symbolic links"):
            open_private(tmp_path / "link")
        with pytest.raises(FileExistsError):
            write_private(tmp_path / "link", "secret")
        assert not (tmp_path / "target").exists()

    def test_existing_file_is_not_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "there").touch()
        with pytest.raises(FileExistsError):
            write_private(tmp_path / "there", "secret")


class TestSocketDirectory:
    def test_directory_with_too_long_a_path_is_skipped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        long = tmp_path / ("x" * 100)
        long.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(long))
        directory = make_socket_directory({"XDG_RUNTIME_DIR": str(long)})
        assert str(directory.parent) == "/tmp"
        assert len(os.fsencode(directory / SOCKET_NAME)) <= MAX_SOCKET_PATH_BYTES
        assert list(long.iterdir()) == []
        directory.rmdir()
