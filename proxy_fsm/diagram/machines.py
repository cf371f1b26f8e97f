"""Reads the chart of a machine: of the package's own classes, or of any ``transitions.Machine``."""

from __future__ import annotations

import inspect
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from transitions import Machine
from transitions.core import listify

from proxy_fsm.backends import Backend
from proxy_fsm.diagram.chart import LIFECYCLE, Arrow, Chart, Inner
from proxy_fsm.errors import DiagramError
from proxy_fsm.lifecycle import Lifecycle
from proxy_fsm.states import State

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["chart_of"]


def chart_of(machine: object) -> Chart:
    """Return the chart of a class or an object.

    Args:
        machine: One of these, a class or an instance of it: a `Chart` itself; anything with a chart as ``__chart__``,
            such as `Proxy` and its subclasses; a `Lifecycle`; a `Backend`: the lifecycle, with notes on what is
            specific to the backend, such as the first lines of its docstrings of ``ready`` and ``diagnose``; a
            ``transitions.Machine`` or ``HierarchicalMachine``, or anything that has one in an attribute. A class of
            this last kind is instantiated without arguments. Its attribute ``orders`` may name the triggers that are
            orders of a caller; by default they are those with the names of the orders in `Trigger`.

    Raises:
        DiagramError: It is none of these.
    """
    if isinstance(machine, Chart):
        return machine
    if isinstance(own := getattr(machine, "__chart__", None), Chart):
        return replace(own, title=_name_of(machine))
    if isinstance(machine, Lifecycle) or (isinstance(machine, type) and issubclass(machine, Lifecycle)):
        return replace(LIFECYCLE, title=_name_of(machine))
    if isinstance(machine, Backend) or (isinstance(machine, type) and issubclass(machine, Backend)):
        return _backend_chart(machine)
    found = _machine_of(_instance_of(machine), _name_of(machine))
    return _machine_chart(found, _name_of(machine), getattr(machine, "orders", None))


def _name_of(machine: object) -> str:
    return machine.__name__ if isinstance(machine, type) else type(machine).__name__


def _instance_of(machine: object) -> object:
    if not isinstance(machine, type):
        return machine
    try:
        return machine()
    except Exception as error:
        raise DiagramError(
            f"{machine.__name__} cannot be instantiated without arguments, which drawing it requires: "
            f"{type(error).__name__}: {error}. Give it a __chart__, or draw an instance."
        ) from error


def _machine_of(machine: object, name: str) -> Machine:
    if isinstance(machine, Machine):
        return machine
    for value in getattr(machine, "__dict__", {}).values():
        if isinstance(value, Machine):
            return value
    raise DiagramError(
        f"{name} is no state machine: neither a Proxy, a Backend, a Lifecycle nor a transitions.Machine, "
        "nor does it have one in an attribute."
    )


def _machine_chart(machine: Machine, title: str, orders: Iterable[str] | None) -> Chart:
    separator = getattr(machine.state_cls, "separator", "/")  # a flat machine has none, and needs none
    paths, phases = _states_of(machine, separator)
    rows = [
        (trigger, prefix + source, prefix, transition)
        for scope, prefix in _scopes(machine, separator)
        for trigger, event in scope.events.items()
        if not (machine.auto_transitions and trigger.startswith("to_") and prefix + trigger[len("to_") :] in paths)
        for source, found in event.transitions.items()
        for transition in found
    ]
    if isinstance(machine.initial, list):
        raise DiagramError(f"{title} has several initial states: put them inside one state, and it can be drawn.")
    try:
        arrows = [
            Arrow(trigger, paths[source], paths[prefix + row.dest], _conditions(row))
            for trigger, source, prefix, row in rows
            if row.dest is not None
        ]
        initial = None if machine.initial is None else paths[_key(machine.initial)]
    except KeyError as error:
        raise DiagramError(f"{title} refers to the state {error}, which it does not have.") from error
    triggers = list(dict.fromkeys(trigger for trigger, *_ in rows))
    own = LIFECYCLE.triggers  # in their order, which is clearer than the order of first use
    chart = Chart(
        title=title,
        states=tuple(path for key, path in paths.items() if key in machine.states),
        initial=initial,
        finals=frozenset(),
        triggers=tuple(sorted(triggers, key=own.index) if set(triggers) <= set(own) else triggers),
        orders=(LIFECYCLE.orders if orders is None else frozenset(map(str, orders))) & frozenset(triggers),
        arrows=tuple(arrows),
        ignored=frozenset((trigger, paths[source]) for trigger, source, _, row in rows if row.dest is None),
        phases=tuple(phases),
    )
    marked = {paths[prefix + key] for scope, prefix in _scopes(machine, separator) for key in _finals_of(scope)}
    return replace(chart, finals=frozenset(marked | _dead_ends(chart)))


def _scopes(machine: Any, separator: str) -> Iterator[tuple[Any, str]]:
    """Yield the machine and each state that has states inside, with the prefix of their names."""
    pending = [(machine, "")]
    while pending:
        scope, prefix = pending.pop(0)
        yield scope, prefix
        inner = [(state, f"{prefix}{key}{separator}") for key, state in scope.states.items()]
        pending = [each for each in inner if getattr(each[0], "states", None)] + pending


def _states_of(machine: Any, separator: str) -> tuple[dict[str, str], list[Inner]]:
    """Return the paths of all states, by their names in ``transitions``, and the states inside others."""
    paths: dict[str, str] = {}
    phases = []
    for scope, prefix in _scopes(machine, separator):
        outer = paths.get(prefix.removesuffix(separator)) if prefix else None
        begin = [] if outer is None else [_key(each).partition(separator)[0] for each in listify(scope.initial)]
        for key, state in scope.states.items():
            name = str(state.value if isinstance(state.value, str) else key)
            paths[prefix + key] = name if outer is None else f"{outer}/{name}"
            if outer is not None:
                phases.append(Inner(outer, name, key in begin))
    return paths, phases


def _finals_of(scope: Any) -> list[str]:
    return [key for key, state in scope.states.items() if getattr(state, "final", False)]


def _dead_ends(chart: Chart) -> set[str]:
    """Return the states without an exit: of themselves, of what is inside them, or of what they are inside of."""
    sources = {arrow.source for arrow in chart.arrows}
    left = {path for source in sources for path in chart.around(source)}
    return {path for path in chart.paths() if path not in left and sources.isdisjoint(chart.around(path))}


def _key(state: Any) -> str:
    """Return a state's name in ``transitions``."""
    return state.name if isinstance(state, Enum) else str(state)


def _conditions(transition: Any) -> str:
    def name(condition: Any) -> str:
        words = condition.func if isinstance(condition.func, str) else getattr(condition.func, "__name__", "…")
        return words if condition.target else f"not {words}"

    return ", ".join(name(condition) for condition in transition.conditions)


def _backend_chart(backend: Backend | type[Backend]) -> Chart:
    count = backend.max_connections
    connections = "any number of connections" if count is None else f"{count} connection{'s' * (count != 1)}"
    preparing = [f"listens on {'a unix socket' if backend.listen_kind == 'unix' else 'TCP'}, for {connections}"]
    if backend.needs_display:
        preparing.append("needs an X server")
    notes = [(str(State.TUNNELLING), tuple(preparing))]
    for state, words, name in ((State.SPAWNING, "readiness", "ready"), (State.STOPPING, "causes", "diagnose")):
        if line := _first_line(backend, name):
            notes.append((str(state), (f"{words}: {line}",)))
    return replace(LIFECYCLE, title=f"{_name_of(backend)} ({backend.name})", notes=tuple(notes))


def _first_line(backend: Backend | type[Backend], name: str) -> str:
    """Return the first line of a method's docstring; empty if the backend does not override the method."""
    method = getattr(backend if isinstance(backend, type) else type(backend), name)
    if method is getattr(Backend, name):
        return ""
    return inspect.cleandoc(method.__doc__ or "").partition("\n")[0]
