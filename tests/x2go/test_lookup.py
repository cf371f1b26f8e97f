"""Where a program is, on Windows too."""

from __future__ import annotations

import pytest

from proxy_fsm.x2go.lookup import look_up

FOLDERS = (r"PyHoca-GUI\nxproxy", "x2goclient")
PYHOCA = r"D:\Programs\PyHoca-GUI\nxproxy\nxproxy.exe"
X2GOCLIENT = r"D:\Programs\x2goclient\nxproxy.exe"


@pytest.mark.parametrize("windows", [False, True])
def test_the_variable_overrules_everything(*, windows: bool) -> None:
    environ = {"NXPROXY_BINARY": "/mine/nx", "ProgramFiles": r"D:\Programs"}
    found = look_up("nxproxy", "NXPROXY_BINARY", FOLDERS, environ=environ, windows=windows, exists=lambda _: True)
    assert found == "/mine/nx"


@pytest.mark.parametrize(
    ("there", "found"),
    [
        ({PYHOCA, X2GOCLIENT}, PYHOCA),
        ({X2GOCLIENT}, X2GOCLIENT),
        (set(), "nxproxy.exe"),
    ],
)
def test_on_windows_it_is_in_one_of_the_known_places_or_in_path(there: set[str], found: str) -> None:
    environ = {"ProgramFiles": r"D:\Programs", "NXPROXY_BINARY": ""}
    assert (
        look_up("nxproxy", "NXPROXY_BINARY", FOLDERS, environ=environ, windows=True, exists=there.__contains__) == found
    )


def test_without_the_variable_windows_has_the_usual_place() -> None:
    usual = r"C:\Program Files\x2goclient\nxproxy.exe"
    assert look_up("nxproxy", "V", FOLDERS, environ={}, windows=True, exists=usual.__eq__) == usual


def test_elsewhere_it_is_looked_up_in_path() -> None:
    assert look_up("nxproxy", "V", FOLDERS, environ={}, windows=False) == "nxproxy"
