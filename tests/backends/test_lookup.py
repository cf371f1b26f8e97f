"""Where to look for a program, on Windows too."""

from __future__ import annotations

import pytest

from proxy_fsm.backends.base import Program
from proxy_fsm.backends.kdrive import X2GOKDRIVECLIENT
from proxy_fsm.backends.nx3 import NXPROXY

PROGRAM = Program("nxproxy", "NXPROXY_BINARY", (r"PyHoca-GUI\nxproxy", "x2goclient"), "Get it.")
PYHOCA = r"D:\Programs\PyHoca-GUI\nxproxy\nxproxy.exe"
X2GOCLIENT = r"D:\Programs\x2goclient\nxproxy.exe"


@pytest.mark.parametrize("windows", [False, True])
def test_variable_overrides_everything(*, windows: bool) -> None:
    environ = {"NXPROXY_BINARY": "/mine/nx", "ProgramFiles": r"D:\Programs"}
    assert PROGRAM.look_up(environ, windows=windows, exists=lambda _: True) == "/mine/nx"


@pytest.mark.parametrize(
    ("there", "found"),
    [
        ({PYHOCA, X2GOCLIENT}, PYHOCA),
        ({X2GOCLIENT}, X2GOCLIENT),
        (set(), "nxproxy.exe"),
    ],
)
def test_windows_has_known_folders_then_path(there: set[str], found: str) -> None:
    environ = {"ProgramFiles": r"D:\Programs", "NXPROXY_BINARY": ""}
    assert PROGRAM.look_up(environ, windows=True, exists=there.__contains__) == found


def test_windows_without_program_files_has_the_usual_folder() -> None:
    usual = r"C:\Program Files\x2goclient\nxproxy.exe"
    assert PROGRAM.look_up({}, windows=True, exists=usual.__eq__) == usual


def test_other_systems_have_path() -> None:
    assert PROGRAM.look_up({}, windows=False) == "nxproxy"


def test_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NXPROXY_BINARY", "/mine/nx")
    assert PROGRAM.look_up() == "/mine/nx"


@pytest.mark.parametrize("program", [NXPROXY, X2GOKDRIVECLIENT])
def test_hint_names_the_package_and_the_variable(program: Program) -> None:
    assert f"Install {program.name}" in program.hint
    assert program.variable in program.hint
