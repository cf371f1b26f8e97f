"""Charts as text: Mermaid, DOT, a Markdown table, JSON. They need nothing but Python."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from proxy_fsm.diagram.chart import LIFECYCLE, visited
from proxy_fsm.scene import COLOURS
from proxy_fsm.states import State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from proxy_fsm.diagram.chart import Chart, Step

__all__ = ["as_json", "dot", "markdown_table", "mermaid", "mermaid_text", "table_rows"]

#: Names that mean nothing to Mermaid. Its keywords are too many to list, change with its version, and so does what the
#: page that shows it makes of names such as ``constructor``.
_PLAIN = frozenset(map(str, State))


def mermaid_text(text: str) -> str:
    """Return a text with all spelled out that would mean something to Mermaid, or to the page that shows it."""
    return "".join(
        char if char.isalnum() or char in " _-.,?!()[]{}'/+=…–·*" else f"#{ord(char)};"
        for char in " ".join(text.split())
    )


def mermaid(
    chart: Chart = LIFECYCLE, *, highlight: str | None = None, way: Sequence[Step] = (), theme: str | None = None
) -> str:
    """Return the state diagram in Mermaid's language: one arrow for each two states, orders in capitals.

    Args:
        chart: What to draw; what is ignored is left out.
        highlight: A state to point at.
        way: The changes that were made; each adds its number, trigger and time to its arrow.
        theme: ``light`` or ``dark``; by default whatever shows it decides.

    Raises:
        DiagramError: There is no such state.
    """
    highlight = chart.state_named(highlight)
    names = {state: _mermaid_name(chart, at) for at, state in enumerate(chart.states)}
    lines = [] if theme is None else [f'%%{{init: {{"theme": "{"dark" if theme == "dark" else "default"}"}}}}%%']
    lines.append("stateDiagram-v2")
    lines += [f'    state "{mermaid_text(state)}" as {name}' for state, name in names.items() if name != state]
    if chart.initial is not None:
        lines.append(f"    [*] --> {names[chart.initial]}")
    for source, dest, arrows in chart.bundles():
        labels = [*map(chart.label, arrows), *chart.taken(way, source, dest)]
        lines.append(f"    {names[source]} --> {names[dest]}: {', '.join(map(mermaid_text, labels))}")
    lines += [f"    {names[state]} --> [*]" for state in chart.states if state in chart.finals]
    for state, remarks in chart.notes:
        words = "<br/>".join(map(mermaid_text, remarks))
        lines += [f"    note right of {names[state]}", f"        {words}", "    end note"]
    colour = _colours(theme)
    if behind := visited(way) - {highlight}:
        lines += [
            f"    classDef visited fill:{colour['visited']},stroke:{colour['accent']},color:{colour['ink']}",
            f"    class {','.join(names[s] for s in chart.states if s in behind)} visited",
        ]
    if highlight is not None:
        looks = f"fill:{colour['current']},stroke:{colour['current-line']},stroke-width:3px"
        lines += [
            f"    classDef current {looks},color:{colour['current-ink']}",
            f"    class {names[highlight]} current",
        ]
    return "\n".join(lines) + "\n"


def _colours(theme: str | None) -> dict[str, str]:
    """Return a theme's colours; light ones read well on any ground, each with the ink that it brings."""
    return {name: dark if theme == "dark" else light for name, (light, dark) in COLOURS.items()}


def _mermaid_name(chart: Chart, at: int) -> str:
    return chart.states[at] if chart.states[at] in _PLAIN else f"state_{at}"


def _unused(name: str, chart: Chart) -> str:
    """Return a name that no state has."""
    while name in chart.states:
        name += "_"
    return name


def dot(
    chart: Chart = LIFECYCLE, *, highlight: str | None = None, way: Sequence[Step] = (), theme: str = "light"
) -> str:
    """Return the state diagram in Graphviz' language: orders in capitals, final states with a double line.

    Args:
        chart: What to draw.
        highlight: A state to point at.
        way: The changes that were made.
        theme: ``light`` or ``dark``.

    Raises:
        DiagramError: There is no such state.
    """
    highlight = chart.state_named(highlight)
    colour = _colours(theme)
    ink, accent = colour["ink"], colour["accent"]
    behind = visited(way)
    begin = _quoted(_unused("[*]", chart))
    # Graphviz takes a name that begins with a percent sign for none.
    names = {
        state: _quoted(_unused(f"state {at}", chart) if state.startswith("%") else state)
        for at, state in enumerate(chart.states)
    }
    lines = [
        f"digraph {_quoted(chart.title)} {{",
        f'    graph [bgcolor="{colour["paper"]}" fontcolor="{ink}" fontname="sans-serif" nodesep=0.5]',
        f'    node [color="{ink}" fontcolor="{ink}" fontname="sans-serif" shape=box style=rounded]',
        f'    edge [color="{ink}" fontcolor="{ink}" fontname="sans-serif" fontsize=11]',
    ]
    if chart.initial is not None:
        lines.append(f'    {begin} [label="" shape=circle style=filled width=0.15 fillcolor="{ink}"]')
        lines.append(f"    {begin} -> {names[chart.initial]}")
    for state in chart.states:
        looks = [f"label={_quoted(state)}"] if state.startswith("%") else []
        looks += ["peripheries=2"] if state in chart.finals else []
        if state == highlight:
            looks += ['style="rounded,filled"', f'fillcolor="{colour["current"]}"', "penwidth=3"]
            looks += [f'color="{colour["current-line"]}"', f'fontcolor="{colour["current-ink"]}"']
        elif state in behind:
            looks.append(f'color="{accent}"')
        lines.append(f"    {names[state]}{' [' + ' '.join(looks) + ']' if looks else ''}")
    for source, dest, arrows in chart.bundles():
        taken = chart.taken(way, source, dest)
        labels = [f" {words} " for words in [*map(chart.label, arrows), *taken]]
        looks = [f"label={_quoted(chr(10).join(labels))}"]
        if taken:
            looks += [f'color="{accent}"', "penwidth=2.5"]
        lines.append(f"    {names[source]} -> {names[dest]} [{' '.join(looks)}]")
    for at, (state, remarks) in enumerate(chart.notes):
        name, words = _quoted(_unused(f"note {at}", chart)), _quoted("\n".join(remarks))
        lines.append(f'    {name} [label={words} shape=note style="" fontsize=10]')
        lines.append(f"    {name} -> {names[state]} [arrowhead=none style=dashed]")
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def table_rows(chart: Chart) -> list[tuple[str, list[str]]]:
    """Return each trigger, and what comes of it in each state; ``–`` is ignored, ``·`` is refused."""
    cells = dict.fromkeys(chart.ignored, "–")
    for arrow in chart.arrows:
        there = cells.get((arrow.trigger, arrow.source), "–")
        words = arrow.dest + (f" [{arrow.condition}]" if arrow.condition else "")
        cells[arrow.trigger, arrow.source] = words if there == "–" else f"{there}, {words}"
    return [(trigger, [cells.get((trigger, state), "·") for state in chart.states]) for trigger in chart.triggers]


def markdown_table(chart: Chart = LIFECYCLE, *, highlight: str | None = None) -> str:
    """Return the whole table in Markdown: every trigger with every state; ``–`` is ignored, ``·`` is refused.

    Args:
        chart: What to draw.
        highlight: A state whose column is to be bold.

    Raises:
        DiagramError: There is no such state.
    """
    highlight = chart.state_named(highlight)

    def shown(state: str, words: str) -> str:
        return f"**{words}**" if state == highlight else words

    lines = ["| trigger | " + " | ".join(shown(state, _cell(state)) for state in chart.states) + " |"]
    lines.append("|---" * (len(chart.states) + 1) + "|")
    lines += [
        f"| `{_cell(trigger)}` | "
        + " | ".join(shown(state, _cell(words)) for state, words in zip(chart.states, cells, strict=True))
        + " |"
        for trigger, cells in table_rows(chart)
    ]
    lines += [f"\n{_cell(state)}: {_cell('; '.join(remarks))}" for state, remarks in chart.notes]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")


def as_json(chart: Chart = LIFECYCLE, *, highlight: str | None = None, way: Sequence[Step] = ()) -> str:
    """Return all of it as JSON; a transition's ``dest`` is null where the trigger is ignored.

    Args:
        chart: What to write.
        highlight: A state to point at.
        way: The changes that were made.

    Raises:
        DiagramError: There is no such state.
    """
    highlight = chart.state_named(highlight)
    rows: list[dict[str, str | None]] = [
        {"trigger": arrow.trigger, "source": arrow.source, "dest": arrow.dest, "condition": arrow.condition or None}
        for arrow in chart.arrows
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
        "notes": {state: list(remarks) for state, remarks in chart.notes},
        "highlight": highlight,
        "way": [
            {
                "trigger": step.trigger,
                "source": step.source,
                "dest": step.dest,
                "elapsed_s": round(step.elapsed_s, 6),
                "number": step.number,
            }
            for step in way
        ],
    }
    return json.dumps(whole, ensure_ascii=False, indent=2) + "\n"
