"""Charts, and other graphs, laid out by Graphviz (pygraphviz, of the extra ``diagram``)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from proxy_fsm.diagram.chart import visited
from proxy_fsm.errors import DiagramError
from proxy_fsm.scene import Box, Group, Line, Scene, Text, width_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from proxy_fsm.diagram.chart import Arrow, Chart, Step
    from proxy_fsm.scene import Point

__all__ = ["Edge", "Node", "chart_scene", "graph_scene"]

_MARGIN = 14.0
_NAME_SIZE, _LABEL_SIZE, _CAPTION_SIZE = 14.0, 12.0, 11.0
_LINE = 1.35
_FRAME = 4.0
#: What an arrow weighs that leads to the next state: the main story is a straight column.
_MAIN = 20

#: A word and its kind.
Words = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Node:
    """A box with lines in it."""

    lines: tuple[Words, ...]
    classes: tuple[str, ...] = ()
    data: tuple[tuple[str, str], ...] = ()
    kind: str = "box"
    framed: bool = False
    beside: str = ""

    @property
    def text_size(self) -> float:
        """Of its letters."""
        return _NAME_SIZE if self.kind == "box" else _CAPTION_SIZE

    def extent(self) -> tuple[float, float]:
        """Return its width and height."""
        if self.kind == "dot":
            return 12.0, 12.0
        wide, high = _extent(self.lines, self.text_size)
        room = 2 * _FRAME if self.framed else 0.0
        return wide + 24 + room, high + 14 + room


@dataclass(frozen=True, slots=True)
class Edge:
    """An arrow between two nodes; the more it weighs, the straighter and shorter it is."""

    source: str
    dest: str
    lines: tuple[Words, ...] = ()
    classes: tuple[str, ...] = ()
    data: tuple[tuple[str, str], ...] = ()
    kind: str = "line"
    headed: bool = True
    weight: int = 1


def _extent(lines: Sequence[Words], size: float) -> tuple[float, float]:
    wide = max((width_of(words, size, bold=kind in {"name", "order", "time"}) for words, kind in lines), default=0.0)
    return wide, len(lines) * size * _LINE


def chart_scene(chart: Chart, *, highlight: str | None = None, way: Sequence[Step] = ()) -> Scene:
    """Lay a state machine out.

    Args:
        chart: What to draw.
        highlight: A state to point at.
        way: The changes that were made.

    Raises:
        DiagramError: There is no such state, or pygraphviz is not installed.
    """
    highlight = chart.state_named(highlight)
    behind = visited(way)
    # The names are the caller's; a prefix keeps them apart from those of the other nodes.
    nodes = {} if chart.initial is None else {"initial": Node((), kind="dot")}
    for state in chart.states:
        marks = ["state", *(["visited"] if state in behind else []), *(["current"] if state == highlight else [])]
        nodes[f"state {state}"] = Node(
            ((state, "name"),), tuple(marks), (("state", state),), framed=state in chart.finals
        )
    main = set(pairwise(chart.states))
    edges = [] if chart.initial is None else [Edge("initial", f"state {chart.initial}")]
    for source, dest, arrows in chart.bundles():
        taken = [(words, "time") for words in chart.taken(way, source, dest)]
        edges.append(
            Edge(
                f"state {source}",
                f"state {dest}",
                (*((chart.label(arrow), _kind(chart, arrow)) for arrow in arrows), *taken),
                ("arrow", *(["taken"] if taken else [])),
                (("from", source), ("to", dest)),
                weight=_MAIN if (source, dest) in main else 1,
            )
        )
    for at, (state, remarks) in enumerate(chart.notes):
        nodes[f"note {at}"] = Node(
            tuple((line, "plain") for remark in remarks for line in _wrapped(remark)),
            kind="note",
            beside=f"state {state}",
        )
        edges.append(Edge(f"state {state}", f"note {at}", kind="aside", headed=False))
    caption = ["double frame: a final state"]
    if chart.orders:
        caption.insert(0, "CAPITALS: ordered by the caller · italics: observed")
    return graph_scene(chart.title, nodes, edges, caption=caption)


def _kind(chart: Chart, arrow: Arrow) -> str:
    if arrow.trigger in chart.orders:
        return "order"
    return "observation" if chart.orders else "plain"


def _wrapped(remark: str, letters: int = 40) -> list[str]:
    lines = [""]
    for word in remark.split():
        if lines[-1] and len(lines[-1]) + len(word) >= letters:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def graph_scene(
    title: str,
    nodes: Mapping[str, Node],
    edges: Sequence[Edge],
    *,
    caption: Sequence[str] = (),
    node_gap: float = 30.0,
    rank_gap: float = 34.0,
) -> Scene:
    """Lay a graph out, from top to bottom.

    Raises:
        DiagramError: pygraphviz is not installed.
    """
    plan = _layout(_layout_source(nodes, edges, node_gap, rank_gap))
    wide, high = (float(value) for value in plan["bb"].split(",")[2:])
    top = _MARGIN + _NAME_SIZE * _LINE + 6
    caption_wide = max((width_of(line, _CAPTION_SIZE) for line in caption), default=0.0)
    full = max(wide, caption_wide, width_of(title, _NAME_SIZE, bold=True)) + 2 * _MARGIN
    left = (full - wide) / 2

    def place(pair: str) -> tuple[float, float]:
        x, y = (float(value) for value in pair.split(","))
        return left + x, top + high - y

    scene = Scene(full, top + high + _MARGIN + len(caption) * _CAPTION_SIZE * _LINE + 4, title)
    scene.groups.append(Group((Text(full / 2, _MARGIN + _NAME_SIZE, title, "plain", _NAME_SIZE),)))
    by_name = {item["name"]: item for item in plan["objects"]}
    drawn = {int(item["at"]): item for item in plan.get("edges", ())}
    places = {name: place(by_name[f"n{at}"]["pos"]) for at, name in enumerate(nodes)}
    scene.groups.extend(_edge_group(edge, drawn[at], place) for at, edge in enumerate(edges))
    scene.groups.extend(_node_group(node, places[name]) for name, node in nodes.items())
    scene.groups.extend(_label_group(edge, drawn[at], place) for at, edge in enumerate(edges) if edge.lines)
    base = top + high + 8
    scene.groups.append(
        Group(
            tuple(
                Text(full / 2, base + (at + 1) * _CAPTION_SIZE * _LINE, line, "caption", _CAPTION_SIZE)
                for at, line in enumerate(caption)
            )
        )
    )
    return scene


def _layout_source(nodes: Mapping[str, Node], edges: Sequence[Edge], node_gap: float, rank_gap: float) -> str:
    """Write a graph for the layout alone: it holds no text, so that no font has a say."""
    numbers = {name: at for at, name in enumerate(nodes)}
    lines = [
        f"digraph {{ graph [nodesep={node_gap / 72:.4f} ranksep={rank_gap / 72:.4f}] node [shape=box fixedsize=true]"
    ]
    for name, node in nodes.items():
        wide, high = node.extent()
        shape = " shape=circle" if node.kind == "dot" else ""
        lines.append(f'n{numbers[name]} [label="" width={wide / 72:.4f} height={high / 72:.4f}{shape}]')
    lines += [
        f"{{ rank=same n{numbers[node.beside]} n{numbers[name]} }}" for name, node in nodes.items() if node.beside
    ]
    for at, edge in enumerate(edges):
        label = ""
        if edge.lines:
            wide, high = _extent(edge.lines, _LABEL_SIZE)
            size = f'FIXEDSIZE="TRUE" WIDTH="{wide + 14:.0f}" HEIGHT="{high + 4:.0f}"'
            label = f' label=<<TABLE BORDER="0" CELLBORDER="0" {size}><TR><TD></TD></TR></TABLE>>'
        arrow = "" if edge.headed else " dir=none"
        lines.append(f"n{numbers[edge.source]} -> n{numbers[edge.dest]} [at={at} weight={edge.weight}{label}{arrow}]")
    return "\n".join([*lines, "}"])


def _layout(source: str) -> dict[str, Any]:
    try:
        from pygraphviz import AGraph  # type: ignore[import-untyped]  # noqa: PLC0415 - of the extra
    except ImportError as error:
        raise DiagramError(
            'SVG and PNG need pygraphviz: pip install "proxy_fsm[diagram]". Mermaid, DOT, table and JSON need nothing.'
        ) from error
    plan: dict[str, Any] = json.loads(AGraph(string=source).draw(format="json0", prog="dot"))
    return plan


def _edge_group(edge: Edge, drawn: Mapping[str, str], place: Callable[[str], Point]) -> Group:
    points, tip = [], None
    for pair in drawn["pos"].split():
        if pair.startswith("e,"):
            tip = place(pair[2:])
        else:
            points.append(place(pair))
    line = Line(tuple(points), edge.kind, curved=True, tip=tip if edge.headed else None)
    return Group((line,), edge.classes, edge.data)


def _label_group(edge: Edge, drawn: Mapping[str, str], place: Callable[[str], Point]) -> Group:
    x, y = place(drawn["lp"])
    top = y - len(edge.lines) * _LABEL_SIZE * _LINE / 2
    return Group(
        tuple(
            Text(x, top + (at + 0.78) * _LABEL_SIZE * _LINE, words, kind, _LABEL_SIZE)
            for at, (words, kind) in enumerate(edge.lines)
        ),
        ("arrow-label",),
        edge.data,
    )


def _node_group(node: Node, centre: Point) -> Group:
    (wide, high), (x, y) = node.extent(), centre
    radius = wide / 2 if node.kind == "dot" else 2.0 if node.kind == "note" else 8.0
    items: list[Box | Line | Text] = [Box(x - wide / 2, y - high / 2, wide, high, node.kind, radius)]
    if node.framed:
        inner = (wide - 2 * _FRAME, high - 2 * _FRAME)
        items.append(Box(x - inner[0] / 2, y - inner[1] / 2, *inner, "frame", radius - 3))
    top = y - len(node.lines) * node.text_size * _LINE / 2
    items += [
        Text(x, top + (at + 0.78) * node.text_size * _LINE, words, kind, node.text_size)
        for at, (words, kind) in enumerate(node.lines)
    ]
    return Group(tuple(items), node.classes, node.data, dict(node.data).get("state", ""))
