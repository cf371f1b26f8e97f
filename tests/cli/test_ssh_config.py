"""OpenSSH's configuration is read, including ``Include`` lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from proxy_fsm.cli import ssh_config

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ssh_config, "_SYSTEM", tmp_path / "system" / "ssh_config")
    (tmp_path / "system").mkdir()
    (tmp_path / ".ssh").mkdir()
    return tmp_path / ".ssh"


def port_of(host: str) -> str | None:
    return ssh_config.read_ssh_config().lookup(host).get("port")


def test_missing_files_are_an_empty_configuration(folder: Path) -> None:
    del folder
    assert port_of("desk") is None


def test_user_file_precedes_system_file(folder: Path) -> None:
    (folder / "config").write_text("Host desk\n  Port 1\n")
    (folder.parent / "system" / "ssh_config").write_text("Host desk\n  Port 2\n  User u\nHost other\n  Port 3\n")
    assert (port_of("desk"), port_of("other")) == ("1", "3")
    assert ssh_config.read_ssh_config().lookup("desk")["user"] == "u"


def test_included_files_are_sorted_and_relative_to_ssh_folder(folder: Path) -> None:
    (folder / "config.d").mkdir()
    (folder / "config.d" / "2").write_text("Host *\n  Port 2\n")
    (folder / "config.d" / "1").write_text("Host desk\n  Port 1\n")
    (folder / "with blank").write_text("Host far\n  Port 4\n")
    (folder / "config").write_text('include "with blank" config.d/* missing ~/.ssh/none\nHost near\n  Port 3\n')
    assert [port_of(host) for host in ("far", "desk", "near")] == ["4", "1", "2"]


def test_host_block_continues_after_include(folder: Path) -> None:
    (folder / "more").write_text("User u\nHost other\n  Port 1\n")
    (folder / "config").write_text("Host desk\n  Include more\n  Port 2\n")
    assert port_of("desk") == "2"
    assert ssh_config.read_ssh_config().lookup("desk")["user"] == "u"


def test_system_file_includes_from_its_own_folder(folder: Path) -> None:
    system = folder.parent / "system"
    (system / "more").write_text("Port 7\n")
    (system / "ssh_config").write_text("Include=more\n")
    assert port_of("desk") == "7"


def test_recursive_include_terminates(folder: Path) -> None:
    (folder / "config").write_text("Include config\nPort 5\n")
    assert port_of("desk") == "5"
