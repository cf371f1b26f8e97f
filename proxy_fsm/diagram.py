"""Draws the lifecycle from its table.

``python -m proxy_fsm.diagram DIRECTORY`` writes the committed pictures; with ``--check`` it only tells, by its exit
status, whether they are what the table says.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from proxy_fsm.lifecycle import TRANSITIONS, State, Trigger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from proxy_fsm.lifecycle import Transition

__all__ = ["PICTURES", "markdown_table", "mermaid"]


def mermaid(transitions: Sequence[Transition] = TRANSITIONS) -> str:
    """Return the state diagram in Mermaid's language: one arrow for each two states, orders in capitals.

    Args:
        transitions: The rows to draw; ignored pairs are left out.
    """
    arrows: dict[tuple[State, State], list[str]] = {}
    for row in transitions:
        if row.dest is not None:
            label = row.trigger.upper() if row.trigger.is_order else str(row.trigger)
            arrows.setdefault((row.source, row.dest), []).append(label)
    order = {state: at for at, state in enumerate(State)}
    lines = ["stateDiagram-v2", f"    [*] --> {State.IDLE}"]
    lines += [
        f"    {source} --> {dest}: {', '.join(labels)}"
        for (source, dest), labels in sorted(arrows.items(), key=lambda arrow: [order[state] for state in arrow[0]])
    ]
    lines += [f"    {state} --> [*]" for state in State if state.is_final]
    return "\n".join(lines) + "\n"


def markdown_table(transitions: Sequence[Transition] = TRANSITIONS) -> str:
    """Return the whole table in Markdown: every trigger with every state; ``–`` is ignored, ``·`` is refused."""
    cells = {(row.trigger, row.source): "–" if row.dest is None else str(row.dest) for row in transitions}
    lines = ["| trigger | " + " | ".join(State) + " |", "|---" * (len(State) + 1) + "|"]
    lines += [
        f"| `{trigger}` | " + " | ".join(cells.get((trigger, state), "·") for state in State) + " |"
        for trigger in Trigger
    ]
    return "\n".join(lines) + "\n"


#: What is committed below ``diagrams/``, by file name.
PICTURES: dict[str, Callable[[], str]] = {"lifecycle.mmd": mermaid, "lifecycle.md": markdown_table}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pictures, or check them; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m proxy_fsm.diagram", description="Draw the lifecycle.")
    parser.add_argument("directory", type=Path, help="where the pictures are")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where one is out of date")
    options = parser.parse_args(arguments)
    stale = []
    for name, draw in PICTURES.items():
        file = options.directory / name
        if not file.is_file() or file.read_text(encoding="utf-8") != draw():
            stale.append(name)
            if not options.check:
                options.directory.mkdir(parents=True, exist_ok=True)
                file.write_text(draw(), encoding="utf-8")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
