"""What a module imports, read from its code."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def imports_of(file: Path) -> set[str]:
    """Return the modules of this package that a file imports when it runs, type checking apart."""
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("proxy_fsm"):
            parts = (node.module or "").split(".")[1:]
            found |= {".".join(parts)} if parts else {alias.name for alias in node.names}
    return found
