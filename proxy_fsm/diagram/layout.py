"""Charts, and other graphs, laid out by Graphviz (pygraphviz, of the extra ``diagram``)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy_fsm.diagram.chart import visited
from proxy_fsm.errors import DiagramError
from proxy_fsm.scene import Box, Group, Line, Scene, Text, width_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from proxy_fsm.diagram.chart import Arrow, Chart, PathStep
    from proxy_fsm.scene import Point

__all__ = ["Edge", "Node", "chart_scene", "graph_scene"]

_MARGIN = 14.0
_NAME_SIZE, _LABEL_SIZE, _CAPTION_SIZE = 14.0, 12.0, 11.0
_LINE = 1.35
_FRAME = 4.0
#: The weight of an arrow to the next state: the main story is a straight column.
_MAIN = 20
#: The same if states have others inside: more than Graphviz' own weight for narrow clusters.
_MAIN_NESTED = 1000

#: The left, upper corner of a box, its width and its height.
_Corners = tuple[float, float, float, float]
#: A word and its kind.
Words = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Node:
    """A box with lines in it; one of the kind ``group`` contains the nodes that are ``inside`` it."""

    lines: tuple[Words, ...]
    classes: tuple[str, ...] = ()
    data: tuple[tuple[str, str], ...] = ()
    kind: str = "box"
    framed: bool = False
    beside: str = ""
    inside: str = ""

    @property
    def text_size(self) -> float:
        """Font size of its lines."""
        return _NAME_SIZE if self.kind in {"box", "group"} else _CAPTION_SIZE

    def extent(self) -> tuple[float, float]:
        """Return its width and height; of a group, those of its lines."""
        if self.kind == "dot":
            return 12.0, 12.0
        wide, high = _extent(self.lines, self.text_size)
        room = 2 * _FRAME if self.framed else 0.0
        return wide + 24 + room, high + 14 + room


@dataclass(frozen=True, slots=True)
class Edge:
    """An arrow between two nodes; the higher its weight, the straighter and shorter it is."""

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


def chart_scene(chart: Chart, *, highlight: str | None = None, path: Sequence[PathStep] = ()) -> Scene:
    """Lay a state machine out.

    Args:
        chart: What to draw.
        highlight: A state to highlight, or a phase of it: ``state/phase``.
        path: The changes that were made.

    Raises:
        DiagramError: There is no such state, or pygraphviz is not installed.
    """
    highlight = chart.state_named(highlight)
    current = () if highlight is None else chart.around(highlight)
    behind = visited(path)
    # The names are the caller's; a prefix keeps them from colliding with those of the other nodes.
    nodes = {} if chart.initial is None else {"initial": Node((), kind="dot")}
    edges = [] if chart.initial is None else [Edge("initial", f"state {chart.initial}")]
    for place in chart.paths():
        outer = chart.around(place)[:-1]
        marks = ("visited",) * (place in behind) + ("current",) * (place in current)
        nodes[f"state {place}"] = Node(
            ((chart.name_of(place), "name"), *((words, "plain") for words in chart.inner_moves(place))),
            ("phase" if outer else "state", *marks),
            (("phase" if outer else "state", place),),
            kind="group" if chart.inside(place) else "box",
            framed=place in chart.finals,
            inside=f"state {outer[-1]}" if outer else "",
        )
    for inner in chart.phases:
        if inner.initial:
            begin = f"initial {inner.path}"
            nodes[begin] = Node((), kind="dot", beside=f"state {inner.path}", inside=f"state {inner.state}")
            edges.append(Edge(begin, f"state {inner.path}"))
    main, weight = chart.main_story(), _MAIN_NESTED if chart.phases else _MAIN
    for source, dest, arrows in chart.grouped_arrows():
        taken = [(words, "time") for words in chart.labels_taken(path, source, dest)]
        edges.append(
            Edge(
                f"state {source}",
                f"state {dest}",
                (*((chart.label(arrow), _kind(chart, arrow)) for arrow in arrows), *taken),
                ("arrow", *(["taken"] if taken else [])),
                (("from", source), ("to", dest)),
                weight=weight if (source, dest) in main else 1,
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

    by_name = {item["name"]: item for item in plan["objects"]}
    placed = {name: by_name[_graphviz_name(node, at)] for at, (name, node) in enumerate(nodes.items())}
    drawn = {int(item["at"]): item for item in plan.get("edges", ())}
    boxes = _group_boxes(nodes, edges, placed, drawn, place)
    full = max([full, *(x + wide + _MARGIN for x, _, wide, _ in boxes.values())])
    scene = Scene(full, top + high + _MARGIN + len(caption) * _CAPTION_SIZE * _LINE + 4, title)
    scene.groups.append(Group((Text(full / 2, _MARGIN + _NAME_SIZE, title, "plain", _NAME_SIZE),)))
    scene.groups.extend(
        _box_group(node, boxes[name], place(placed[name]["lp"])) for name, node in nodes.items() if node.kind == "group"
    )
    scene.groups.extend(_edge_group(edge, drawn[at], place) for at, edge in enumerate(edges))
    scene.groups.extend(
        _node_group(node, place(placed[name]["pos"])) for name, node in nodes.items() if node.kind != "group"
    )
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
    """Write a graph for the layout alone: it contains no text, so that it does not depend on fonts."""
    names = {name: _graphviz_name(node, at) for at, (name, node) in enumerate(nodes.items())}
    inside: dict[str, list[str]] = {}
    for name, node in nodes.items():
        inside.setdefault(node.inside, []).append(name)

    def within(outer: str) -> Iterator[str]:
        for name in inside.get(outer, ()):
            node = nodes[name]
            wide, high = node.extent()
            if node.kind == "group":
                yield f"subgraph {names[name]} {{ graph [margin=14 label={_room(wide - 24, high - 8)}]"
                yield from within(name)
                yield "}"
                continue
            shape = " shape=circle" if node.kind == "dot" else ""
            yield f'{names[name]} [label="" width={wide / 72:.4f} height={high / 72:.4f}{shape}]'
            if node.beside and nodes[node.beside].kind != "group":
                yield f"{{ rank=same {names[node.beside]} {names[name]} }}"

    def end(name: str, at: int, attribute: str) -> tuple[str, str]:
        """Return the node where an edge ends (of a group the first or last one inside), and where to clip it."""
        cut = f" {attribute}={names[name]}" if nodes[name].kind == "group" else ""
        while nodes[name].kind == "group":
            name = [each for each in inside[name] if nodes[each].kind != "dot"][at]
        return names[name], cut

    attributes = f"nodesep={node_gap / 72:.4f} ranksep={rank_gap / 72:.4f} compound=true"
    lines = [f"digraph {{ graph [{attributes}] node [shape=box fixedsize=true]", *within("")]
    order = {name: at for at, name in enumerate(nodes)}
    for at, edge in enumerate(edges):
        near = (-1, 0) if order[edge.source] < order[edge.dest] else (0, -1)
        (source, tail), (dest, head) = end(edge.source, near[0], "ltail"), end(edge.dest, near[1], "lhead")
        wide, high = _extent(edge.lines, _LABEL_SIZE)
        label = f" label={_room(wide + 14, high + 4)}" if edge.lines else ""
        arrow = "" if edge.headed else " dir=none"
        lines.append(f"{source} -> {dest} [at={at} weight={edge.weight}{label}{arrow}{tail}{head}]")
    return "\n".join([*lines, "}"])


def _graphviz_name(node: Node, at: int) -> str:
    return f"cluster_{at}" if node.kind == "group" else f"n{at}"


def _room(wide: float, high: float) -> str:
    """Return an empty label of a given size."""
    size = f'FIXEDSIZE="TRUE" WIDTH="{wide:.0f}" HEIGHT="{high:.0f}"'
    return f'<<TABLE BORDER="0" CELLBORDER="0" {size}><TR><TD></TD></TR></TABLE>>'


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


def _group_boxes(
    nodes: Mapping[str, Node],
    edges: Sequence[Edge],
    placed: Mapping[str, Mapping[str, str]],
    drawn: Mapping[int, Mapping[str, str]],
    place: Callable[[str], Point],
) -> dict[str, _Corners]:
    """Return the boxes of groups, widened where Graphviz ignored the labels at the right of what is inside."""

    def is_inside(name: str, group: str) -> bool:
        return nodes[name].inside == group or (bool(nodes[name].inside) and is_inside(nodes[name].inside, group))

    boxes: dict[str, _Corners] = {}
    for group in reversed([name for name, node in nodes.items() if node.kind == "group"]):  # the inner ones first
        x, y, right, top = placed[group]["bb"].split(",")
        (left, bottom), (right_x, top_y) = place(f"{x},{y}"), place(f"{right},{top}")
        ends = [right_x, *(boxes[name][0] + boxes[name][2] + 10 for name in boxes if is_inside(name, group))]
        ends += [
            place(drawn[at]["lp"])[0] + _extent(edge.lines, _LABEL_SIZE)[0] / 2 + 10
            for at, edge in enumerate(edges)
            if edge.lines and is_inside(edge.source, group) and is_inside(edge.dest, group)
        ]
        boxes[group] = (left, top_y, max(ends) - left, bottom - top_y)
    return boxes


def _node_group(node: Node, centre: Point) -> Group:
    (wide, high), (x, y) = node.extent(), centre
    return _box_group(node, (x - wide / 2, y - high / 2, wide, high), centre)


def _box_group(node: Node, box: _Corners, middle: Point) -> Group:
    """Return a node's box, and its lines centred on ``middle``."""
    x, y, wide, high = box
    radius = wide / 2 if node.kind == "dot" else 2.0 if node.kind == "note" else 8.0
    items: list[Box | Line | Text] = [Box(*box, node.kind, radius)]
    if node.framed:
        items.append(Box(x + _FRAME, y + _FRAME, wide - 2 * _FRAME, high - 2 * _FRAME, "frame", radius - 3))
    top = middle[1] - len(node.lines) * node.text_size * _LINE / 2
    items += [
        Text(middle[0], top + (at + 0.78) * node.text_size * _LINE, words, kind, node.text_size)
        for at, (words, kind) in enumerate(node.lines)
    ]
    data = dict(node.data)
    return Group(tuple(items), node.classes, node.data, data.get("state", data.get("phase", "")))
