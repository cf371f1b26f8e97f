"""Charts in DOT, Graphviz' language."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy_fsm.diagram.chart import LIFECYCLE, visited
from proxy_fsm.diagram.text import colours_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from proxy_fsm.diagram.chart import Chart, PathStep

__all__ = ["dot"]


def _unused(name: str, chart: Chart) -> str:
    """Return a name that no state has."""
    while name in chart.paths():
        name += "_"
    return name


def dot(
    chart: Chart = LIFECYCLE, *, highlight: str | None = None, path: Sequence[PathStep] = (), theme: str = "light"
) -> str:
    """Return the state diagram in DOT: orders in capitals, final states with a double line.

    Args:
        chart: What to draw.
        highlight: A state to highlight, or a phase of it: ``state/phase``.
        path: The changes that were made.
        theme: ``light`` or ``dark``.

    Raises:
        DiagramError: There is no such state.
    """
    drawing = _Dot(chart, colours_of(theme), chart.state_named(highlight), visited(path))
    ink, accent = drawing.colour["ink"], drawing.colour["accent"]
    graph = f'bgcolor="{drawing.colour["paper"]}" fontcolor="{ink}" fontname="sans-serif" nodesep=0.5'
    lines = [
        f"digraph {_quoted(chart.title)} {{",
        f"    graph [{graph}{' compound=true' if chart.phases else ''}]",
        f'    node [color="{ink}" fontcolor="{ink}" fontname="sans-serif" shape=box style=rounded]',
        f'    edge [color="{ink}" fontcolor="{ink}" fontname="sans-serif" fontsize=11]',
    ]
    main = chart.main_story()
    if chart.initial is not None:
        lines += [f"    {line}" for line in drawing.beginning("[*]", chart.initial)]
    lines += [f"    {line}" for state in chart.states for line in drawing.state(state)]
    for source, dest, arrows in chart.grouped_arrows():
        taken = chart.labels_taken(path, source, dest)
        labels = [f" {words} " for words in [*map(chart.label, arrows), *taken]]
        attributes = [f"label={_quoted(chr(10).join(labels))}"]
        if taken:
            attributes += [f'color="{accent}"', "penwidth=2.5"]
        if chart.phases and (source, dest) in main:
            attributes.append(
                "weight=1000"
            )  # more than Graphviz' own weight for narrow clusters: the main story is a column
        lines.append(f"    {drawing.arrow(source, dest, *attributes)}")
    for at, (state, remarks) in enumerate(chart.notes):
        name, words = _quoted(_unused(f"note {at}", chart)), _quoted("\n".join(remarks))
        lines.append(f'    {name} [label={words} shape=note style="" fontsize=10]')
        lines.append(f"    {drawing.edge((name, ''), drawing.end(state), 'arrowhead=none', 'style=dashed')}")
    return "\n".join([*lines, "}"]) + "\n"


class _Dot:
    """A chart in DOT: states are nodes, and clusters if others are inside them."""

    def __init__(self, chart: Chart, colour: Mapping[str, str], highlight: str | None, behind: frozenset[str]) -> None:
        self.chart, self.colour, self.highlight, self.behind = chart, colour, highlight, behind
        # Graphviz treats a name that begins with a percent sign as anonymous.
        self._nodes = {
            path: _quoted(_unused(f"state {at}", chart) if path.startswith("%") else path)
            for at, path in enumerate(chart.paths())
        }

    def end(self, path: str, at: int = 0) -> tuple[str, str]:
        """Return the node where an arrow ends, and the cluster at whose border it is clipped.

        Graphviz connects only nodes: for a cluster it is the first (``at`` 0) or last (-1) of those inside.
        """
        cluster = self._cluster(path) if self.chart.inside(path) else ""
        while inside := self.chart.inside(path):
            path = inside[at].path
        return self._nodes[path], cluster

    def arrow(self, source: str, dest: str, *attributes: str) -> str:
        """Return an arrow between the nearest nodes of two states."""
        order = [*self._nodes]
        near = (-1, 0) if order.index(source) < order.index(dest) else (0, -1)
        return self.edge(self.end(source, near[0]), self.end(dest, near[1]), *attributes)

    @staticmethod
    def edge(source: tuple[str, str], dest: tuple[str, str], *attributes: str) -> str:
        clipped = [f"{name}={cluster}" for name, (_, cluster) in (("ltail", source), ("lhead", dest)) if cluster]
        words = " ".join([*attributes, *clipped])
        return f"{source[0]} -> {dest[0]}" + (f" [{words}]" if words else "")

    def beginning(self, name: str, path: str, *, inside: bool = False) -> list[str]:
        """Return the dot where a machine or a state begins, and the arrow from it."""
        dot = _quoted(_unused(name, self.chart))
        attributes = f'label="" shape=circle style=filled width=0.15 fillcolor="{self.colour["ink"]}"'
        node, cluster = self.end(path)
        beside = [f"{{ rank=same {dot} {node} }}"] if inside and not cluster else []
        return [f"{dot} [{attributes}]", *beside, self.edge((dot, ""), (node, cluster))]

    def state(self, path: str) -> Iterator[str]:
        """Yield the lines of a state and of what is inside."""
        inside, name = self.chart.inside(path), self.chart.name_of(path)
        attributes = {"peripheries": "2"} if path in self.chart.finals else {}
        if not inside:
            label = {} if self._nodes[path] == _quoted(name) else {"label": _quoted(name)}
            words = _attributes(label | attributes | self._style(path))
            yield self._nodes[path] + (f" [{words}]" if words else "")
            return
        # In full, since a cluster inherits from the one around it every attribute that it does not set.
        ink = f'"{self.colour["ink"]}"'
        plain = {"style": "rounded", "color": ink, "fontcolor": ink, "penwidth": "1", "peripheries": "1"}
        label = {"label": _quoted("\n".join([name, *self.chart.inner_moves(path)]))}
        yield f"subgraph {self._cluster(path)} {{"
        yield f"    graph [{_attributes(label | plain | attributes | self._style(path))}]"
        for inner in inside:
            yield from (f"    {line}" for line in self.state(inner.path))
        for inner in inside:
            if inner.initial:
                yield from (f"    {line}" for line in self.beginning(f"[*] {inner.path}", inner.path, inside=True))
        yield "}"

    def _cluster(self, path: str) -> str:
        return f"cluster_{[*self._nodes].index(path)}"

    def _style(self, path: str) -> dict[str, str]:
        if self.highlight is not None and path in self.chart.around(self.highlight):
            ground = self.colour["current" if path == self.highlight else "marked"]
            line, ink = self.colour["current-line"], self.colour["current-ink"]
            attributes = {"style": '"rounded,filled"', "fillcolor": f'"{ground}"', "penwidth": "3"}
            return {**attributes, "color": f'"{line}"', "fontcolor": f'"{ink}"'}
        return {"color": f'"{self.colour["accent"]}"'} if path in self.behind else {}


def _attributes(attributes: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in attributes.items())


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
