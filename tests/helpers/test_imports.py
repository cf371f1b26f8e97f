"""Imports are found wherever they stand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .imports import import_graph, imports_of

if TYPE_CHECKING:
    from pathlib import Path

CODE = """
from __future__ import annotations
from typing import TYPE_CHECKING
from proxy_fsm import errors, Proxy
from proxy_fsm.workers import peer
from proxy_fsm.states import State
import os
if TYPE_CHECKING:
    from proxy_fsm.status import ProxyStatus
def later():
    from proxy_fsm.proxy import Proxy
"""


def package(directory: Path) -> Path:
    files = {"__init__": "", "states": "", "status": "", "errors": "", "proxy": CODE}
    for name, code in {**files, "workers/__init__": "", "workers/peer": ""}.items():
        file = directory / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(code, encoding="utf-8")
    return directory


def test_imports_for_type_checking_are_in_the_graph_alone(tmp_path: Path) -> None:
    graph = import_graph(package(tmp_path))
    assert graph["proxy"] == {"", "errors", "workers.peer", "states", "status", "proxy"}
    assert graph[""] == graph["workers"] == set()
    assert imports_of(tmp_path / "proxy.py") == {"errors", "Proxy", "workers", "states", "proxy"}
