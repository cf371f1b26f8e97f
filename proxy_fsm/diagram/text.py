"""Charts as text: Mermaid, a Markdown table, JSON. They need no other package."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from proxy_fsm.diagram.chart import LIFECYCLE, visited
from proxy_fsm.scene import COLOURS
from proxy_fsm.states import Phase, State

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from proxy_fsm.diagram.chart import Arrow, Chart, Inner, PathStep

__all__ = [
    "PHASE_COLUMNS",
    "as_json",
    "colours_of",
    "markdown_table",
    "mermaid",
    "mermaid_text",
    "phase_rows",
    "table_rows",
]

#: Names that are safe in Mermaid. Its keywords are too many to list and change with its version, as does the effect of
#: names such as ``constructor`` in the page that shows it.
_PLAIN = frozenset(map(str, (*State, *Phase)))


def mermaid_text(text: str) -> str:
    """Escape all characters that are special to Mermaid, or to the page that shows it."""
    return "".join(
        char if char.isalnum() or char in " _-.,?!()[]{}'/+=…–·*" else f"#{ord(char)};"
        for char in " ".join(text.split())
    )


def mermaid(
    chart: Chart = LIFECYCLE, *, highlight: str | None = None, path: Sequence[PathStep] = (), theme: str | None = None
) -> str:
    """Return the state diagram in Mermaid: one arrow for each pair of states, orders in capitals.

    Args:
        chart: What to draw; ignored triggers are left out.
        highlight: A state to highlight, or a phase of it: ``state/phase``.
        path: The changes that were made; each adds its number, trigger and time to its arrow.
        theme: ``light`` or ``dark``; by default the viewer decides.

    Raises:
        DiagramError: There is no such state.
    """
    highlight = chart.state_named(highlight)
    names = _mermaid_names(chart)
    lines = [] if theme is None else [f'%%{{init: {{"theme": "{"dark" if theme == "dark" else "default"}"}}}}%%']
    lines.append("stateDiagram-v2")
    lines += [f"    {line}" for line in _mermaid_level(chart, "", names, _mermaid_arrows(chart, names, path))]
    for state, remarks in chart.notes:
        words = "<br/>".join(map(mermaid_text, remarks))
        lines += [f"    note right of {names[state]}", f"        {words}", "    end note"]
    colour = colours_of(theme)
    if behind := visited(path).difference(() if highlight is None else chart.around(highlight)):
        lines += [
            f"    classDef visited fill:{colour['visited']},stroke:{colour['accent']},color:{colour['ink']}",
            f"    class {','.join(names[s] for s in chart.states if s in behind)} visited",
        ]
    if highlight is not None:
        style = f"fill:{colour['current']},stroke:{colour['current-line']},stroke-width:3px"
        lines += [
            f"    classDef current {style},color:{colour['current-ink']}",
            f"    class {names[highlight]} current",
        ]
        if outer := chart.around(highlight)[:-1]:
            style = f"fill:{colour['marked']},stroke:{colour['current-line']},stroke-width:3px"
            lines += [
                f"    classDef around {style},color:{colour['current-ink']}",
                f"    class {','.join(names[state] for state in outer)} around",
            ]
    return "\n".join(lines) + "\n"


def colours_of(theme: str | None) -> dict[str, str]:
    """Return a theme's colours; the light ones are readable on any background, with their own text colour."""
    return {name: dark if theme == "dark" else light for name, (light, dark) in COLOURS.items()}


def _mermaid_names(chart: Chart) -> dict[str, str]:
    paths = chart.paths()
    own = [chart.name_of(path) for path in paths]
    return {
        path: name if name in _PLAIN and own.count(name) == 1 else f"state_{at}"
        for at, (path, name) in enumerate(zip(paths, own, strict=True))
    }


def _mermaid_arrows(chart: Chart, names: Mapping[str, str], path: Sequence[PathStep]) -> dict[str, list[str]]:
    """Return the lines of the arrows by the state that contains them; the empty name is for the outermost.

    Mermaid has no arrow from inside one state to inside another. It is drawn between the outer states, and its label
    says where it begins and ends.
    """
    labels: dict[tuple[str, str, str], list[str]] = {}
    for source, dest, arrows in chart.grouped_arrows():
        one, other = chart.around(source), chart.around(dest)
        level = next((at for at, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), len(one) - 1)
        ends = [f"from {source[len(one[level]) + 1 :]}"] if source != one[level] else []
        ends += [f"to {dest[len(other[level]) + 1 :]}"] if dest != other[level] else []
        words = labels.setdefault((one[level - 1] if level else "", one[level], other[level]), [])
        words += [" ".join([chart.label(arrow), *ends]) for arrow in arrows]
        words += chart.labels_taken(path, source, dest)
    lines: dict[str, list[str]] = {}
    for (inside, source, dest), words in labels.items():
        line = f"{names[source]} --> {names[dest]}: {', '.join(map(mermaid_text, words))}"
        lines.setdefault(inside, []).append(line)
    return lines


def _mermaid_level(
    chart: Chart, outer: str, names: Mapping[str, str], arrows: Mapping[str, list[str]]
) -> Iterator[str]:
    """Yield the lines of what is inside a state; of the outermost states for the empty name."""
    inside = chart.inside(outer)
    paths = [inner.path for inner in inside] if outer else chart.states
    begin = [inner.path for inner in inside if inner.initial]
    for path in paths:
        moves = chart.inner_moves(path)
        title = " ".join([chart.name_of(path), *([f"({', '.join(moves)})"] if moves else [])])
        if title != names[path]:
            yield f'state "{mermaid_text(title)}" as {names[path]}'
        if chart.inside(path):
            yield f"state {names[path]} {{"
            yield from (f"    {line}" for line in _mermaid_level(chart, path, names, arrows))
            yield "}"
        if len(begin) > 1 and path in begin:  # all at once: each in a region of its own
            yield f"[*] --> {names[path]}"
            yield from ["--"] if path != paths[-1] else []
    if len(begin) == 1:
        yield f"[*] --> {names[begin[0]]}"
    if not outer and chart.initial is not None:
        first = chart.around(chart.initial)[0]
        where = chart.initial[len(first) + 1 :]
        yield f"[*] --> {names[first]}" + (f": to {mermaid_text(where)}" if where else "")
    yield from arrows.get(outer, ())
    yield from (f"{names[path]} --> [*]" for path in paths if path in chart.finals)


def table_rows(chart: Chart) -> list[tuple[str, list[str]]]:
    """Return each trigger, and where it leads from each state; ``–`` is ignored, ``·`` is refused.

    Triggers of phases only are left out: they are in `phase_rows`.
    """
    cells = dict.fromkeys(chart.ignored, "–")
    for arrow in chart.arrows:
        there = cells.get((arrow.trigger, arrow.source), "–")
        words = _leads_to(arrow)
        cells[arrow.trigger, arrow.source] = words if there == "–" else f"{there}, {words}"
    of_phases = {trigger for trigger, _ in cells} - {trigger for trigger, state in cells if state in chart.states}
    return [
        (trigger, [cells.get((trigger, state), "·") for state in chart.states])
        for trigger in chart.triggers
        if trigger not in of_phases
    ]


#: The columns of `phase_rows`.
PHASE_COLUMNS = ("state", "phase", "trigger", "leads to", "limit")


def phase_rows(chart: Chart) -> list[tuple[str, str, str, str, str]]:
    """Return what ends each phase: its state, its name, the trigger, where that leads, and the phase's time limit.

    A phase without triggers of its own has one row; cells without a value are empty.
    """
    inner_at = {inner.path: inner for inner in chart.phases}
    return [
        (inner.state, inner.name, trigger, dest, inner.limit)
        for inner in (inner_at[path] for path in chart.paths() if path in inner_at)
        for trigger, dest in _ends_of(chart, inner) or [("", "")]
    ]


def _leads_to(arrow: Arrow) -> str:
    return arrow.dest + (f" [{arrow.condition}]" if arrow.condition else "")


def _ends_of(chart: Chart, inner: Inner) -> list[tuple[str, str]]:
    ends = [
        (arrow.trigger, _leads_to(arrow).removeprefix(f"{inner.state}/"))
        for arrow in chart.arrows
        if arrow.source == inner.path
    ]
    return ends + [(trigger, "–") for trigger in chart.triggers if (trigger, inner.path) in chart.ignored]


def markdown_table(chart: Chart = LIFECYCLE, *, highlight: str | None = None) -> str:
    """Return the whole table in Markdown: every trigger with every state; ``–`` is ignored, ``·`` is refused.

    Where states have phases, a second table says what ends each of them.

    Args:
        chart: What to draw.
        highlight: A state whose column is set in bold, or a phase, whose rows are bold too.

    Raises:
        DiagramError: There is no such state.
    """
    highlight = chart.state_named(highlight)
    marked = () if highlight is None else chart.around(highlight)

    def row(cells: Sequence[str], bold: Sequence[bool]) -> str:
        shown = [f"**{cell}**" if cell and strong else cell for cell, strong in zip(cells, bold, strict=True)]
        return f"| {' | '.join(shown)} |"

    columns = [False, *(state in marked for state in chart.states)]
    lines = [row(["trigger", *map(_cell, chart.states)], columns), "|---" * len(columns) + "|"]
    lines += [row([_code(trigger), *map(_cell, cells)], columns) for trigger, cells in table_rows(chart)]
    if chart.phases:
        count = len(PHASE_COLUMNS)
        lines += ["", row(PHASE_COLUMNS, [False] * count), "|---" * count + "|"]
        lines += [
            row(
                [*map(_cell, (state, phase)), _code(trigger), *map(_cell, more)],
                [f"{state}/{phase}" in marked] * count,
            )
            for state, phase, trigger, *more in phase_rows(chart)
        ]
    lines += [f"\n{_cell(state)}: {_cell('; '.join(remarks))}" for state, remarks in chart.notes]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")


def _code(text: str) -> str:
    return f"`{_cell(text)}`" if text else ""


def as_json(chart: Chart = LIFECYCLE, *, highlight: str | None = None, path: Sequence[PathStep] = ()) -> str:
    """Return the whole chart as JSON; a transition's ``dest`` is null if the trigger is ignored.

    Args:
        chart: What to write.
        highlight: A state to highlight, or a phase of it: ``state/phase``.
        path: The changes that were made.

    Raises:
        DiagramError: There is no such state.
    """
    highlight = chart.state_named(highlight)
    rows: list[dict[str, str | None]] = [
        {"trigger": arrow.trigger, "source": arrow.source, "dest": arrow.dest, "condition": arrow.condition or None}
        for arrow in chart.arrows
        if arrow.source in chart.states
    ]
    rows += [
        {"trigger": trigger, "source": state, "dest": None, "condition": None}
        for trigger in chart.triggers
        for state in chart.states
        if (trigger, state) in chart.ignored
    ]
    whole = {
        "title": chart.title,
        "states": [
            {"name": state, "initial": state == chart.initial, "final": state in chart.finals} for state in chart.states
        ],
        "triggers": [
            {"name": trigger, "kind": "order" if trigger in chart.orders else "observation"}
            for trigger in chart.triggers
        ],
        "transitions": rows,
        "phases": [
            {
                "state": inner.state,
                "name": inner.name,
                "initial": inner.initial,
                "final": inner.path in chart.finals,
                "limit": inner.limit or None,
                "transitions": [
                    {"trigger": arrow.trigger, "dest": arrow.dest, "condition": arrow.condition or None}
                    for arrow in chart.arrows
                    if arrow.source == inner.path
                ],
            }
            for inner in chart.phases
        ],
        "notes": {state: list(remarks) for state, remarks in chart.notes},
        "highlight": highlight,
        "path": [
            {
                "trigger": step.trigger,
                "source": step.source,
                "dest": step.dest,
                "elapsed_s": round(step.elapsed_s, 6),
                "number": step.number,
            }
            for step in path
        ],
    }
    return json.dumps(whole, ensure_ascii=False, indent=2) + "\n"
