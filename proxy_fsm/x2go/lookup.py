"""Where a proxy program is."""

from __future__ import annotations

import ntpath
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["look_up"]


def look_up(
    program: str,
    variable: str,
    folders: Sequence[str],
    *,
    environ: Mapping[str, str],
    windows: bool = os.name == "nt",
    exists: Callable[[str], bool] = os.path.exists,
) -> str:
    r"""Return what to start: a path, or a bare name that is looked up in PATH when it starts.

    Args:
        program: Name of the program, without ``.exe``.
        variable: The environment variable that overrules everything.
        folders: Where it is on Windows, below ``%ProgramFiles%``.
        environ: The environment.
        windows: Whether this is Windows.
        exists: Tells whether a path exists.
    """
    if environ.get(variable):
        return environ[variable]
    if not windows:
        return program
    root = environ.get("ProgramFiles", r"C:\Program Files")
    places = [ntpath.join(root, folder, f"{program}.exe") for folder in folders]
    return next(filter(exists, places), f"{program}.exe")
