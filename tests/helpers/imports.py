"""What a module imports, read from its code."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PACKAGE = "proxy_fsm"


def imports_of(file: Path) -> set[str]:
    """Return the modules of this package that a file imports when it runs, type checking apart."""
    return {module for source, names in _imports(file, annotations=False) for module in ([source] if source else names)}


def import_graph(package: Path) -> dict[str, set[str]]:
    """Return which module of a package imports which, for annotations too.

    A package is named by its directory, ``""`` is the whole one; a name that is a module counts as that module.
    """
    files = {".".join(file.relative_to(package).with_suffix("").parts): file for file in sorted(package.rglob("*.py"))}
    modules = {"" if name == "__init__" else name.removesuffix(".__init__"): file for name, file in files.items()}
    return {
        name: {
            module if (module := f"{source}.{each}".removeprefix(".")) in modules else source
            for source, names in _imports(file, annotations=True)
            for each in names
        }
        for name, file in modules.items()
    }


def _imports(file: Path, *, annotations: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield where a file imports from, below this package, and which names."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = node.body if annotations else []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            root, _, source = node.module.partition(".")
            if root == PACKAGE:
                yield source, [alias.name for alias in node.names]
