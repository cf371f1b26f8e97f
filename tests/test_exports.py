"""The public names are the contract's, and imports go in one direction."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import proxy_fsm

from .helpers.imports import import_graph

PACKAGE = Path(proxy_fsm.__file__).parent

CONTRACT = """
Proxy State EndReason SessionInfo NX3Backend KDriveBackend CommandBackend ProxyStatus TransitionRecord TunnelStats
Timeouts TRANSITIONS PHASES Phase
ProxyFsmError InvalidTransition InvalidSession ProxyFailed ProxyStopped BackendError Lifecycle
Backend Link fast_transport
""".split()

#: Reading order is import order: a module imports only from earlier ones, for annotations too. Two places differ from
#: the design's list: errors carry a State, an EndReason and a ProxyStatus, which are plain data and import no errors;
#: and backends read evidence, which imports no backends.
LAYERS = """
states reasons status errors lifecycle events text private_files suspension session ssh x11 evidence backends workers
active_lifecycle supervisor effects journal engine scene diagram proxy server aio timeline x2go sphinx testing cli
""".split()


def test_names_of_the_contract_are_exported() -> None:
    assert set(CONTRACT) <= set(proxy_fsm.__all__)


def test_all_is_sorted_and_complete() -> None:
    assert list(proxy_fsm.__all__) == sorted(proxy_fsm.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert all(hasattr(proxy_fsm, name) for name in proxy_fsm.__all__)


def layer(module: str) -> int:
    return LAYERS.index(module.split(".", maxsplit=1)[0])


def test_modules_import_from_earlier_layers_only() -> None:
    for name, imported in import_graph(PACKAGE).items():
        if name in {"", "__main__"} or name.startswith("cli"):
            continue  # these use the public names only
        for each in imported:
            assert each, f"{name} imports the public names, a later layer"
            assert layer(each) <= layer(name), f"{name} imports {each}, a later layer"


def test_imports_have_no_cycle() -> None:
    TopologicalSorter(import_graph(PACKAGE)).prepare()  # raises CycleError, which names the modules


def test_command_line_imports_public_modules_only() -> None:
    allowed = {"", "private_files", "text", "server", "diagram", "testing", "timeline", "cli"}
    for file in (PACKAGE / "cli").glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "proxy_fsm":
                part = (node.module or "").partition(".")[2].split(".")[0]
                assert part in allowed, f"{file.name} imports {node.module}"
