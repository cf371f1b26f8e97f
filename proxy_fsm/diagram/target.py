"""Imports what is to be drawn, by its name."""

from __future__ import annotations

import importlib
from functools import reduce
from typing import TYPE_CHECKING

from proxy_fsm.diagram.machines import chart_of
from proxy_fsm.errors import DiagramError

if TYPE_CHECKING:
    from proxy_fsm.diagram.chart import Chart

__all__ = ["load"]


def load(target: str) -> Chart:
    """Return the chart of ``package.module:Class`` (or ``package.module:object.attribute``); see `chart_of`.

    The module is imported: name only code that you trust.

    Raises:
        DiagramError: It is not written like that, cannot be imported, has no such attribute, or is not a machine.
    """
    module_name, colon, path = target.partition(":")
    if not colon or not all(word.isidentifier() for word in [*module_name.split("."), *path.split(".")]):
        raise DiagramError(f"{target!r} names no class: write it as package.module:Class.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise DiagramError(f"{module_name} cannot be imported: it needs {error.name}, which is missing.") from error
        raise DiagramError(
            f"There is no module {error.name}: install its package, or add its directory to PYTHONPATH."
        ) from error
    except (Exception, SystemExit) as error:  # a program that runs on import may exit
        raise DiagramError(f"{module_name} cannot be imported: {type(error).__name__}: {error}.") from error
    try:
        found = reduce(getattr, path.split("."), module)
    except AttributeError as error:
        raise DiagramError(f"The module {module_name} has no {path}: {error}.") from error
    return chart_of(found)
