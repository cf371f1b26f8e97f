"""The Sphinx directive ``proxy-fsm-diagram`` draws a client's own machine when its documentation is built.

With ``extensions = ["proxy_fsm.sphinx"]`` in ``conf.py`` (extra ``docs``)::

    .. proxy-fsm-diagram:: myclient.sessions:MyProxy
       :highlight: running/verifying

Without an argument it draws the lifecycle. Options: ``highlight`` (``state`` or ``state/phase``), ``no-phases`` (only
the outermost states), ``theme`` (``light`` or ``dark``; by default the picture follows the reader's), ``table`` (the
tables of states and triggers and of the phases instead of the picture), ``alt``, ``align``, ``scale`` and ``width`` as
for images. HTML gets SVG; formats that cannot show SVG, such as LaTeX, get PNG.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

from proxy_fsm import diagram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata

__all__ = ["setup"]


def _theme(argument: str) -> str:
    return directives.choice(argument, ("light", "dark"))


def _align(argument: str) -> str:
    return directives.choice(argument, ("left", "center", "right"))


class ProxyFsmDiagram(SphinxDirective):
    """Draws a state machine; see the module."""

    optional_arguments = 1
    final_argument_whitespace = False
    has_content = False
    option_spec: ClassVar[dict[str, Callable[[str], Any]] | None] = {
        "highlight": directives.unchanged_required,
        "no-phases": directives.flag,
        "theme": _theme,
        "table": directives.flag,
        "alt": directives.unchanged,
        "align": _align,
        "scale": directives.percentage,
        "width": directives.length_or_percentage_or_unitless,
    }

    def run(self) -> list[nodes.Node]:
        """Return the nodes to insert into the document."""
        try:
            chart = diagram.load(self.arguments[0]) if self.arguments else diagram.LIFECYCLE
            self._depend()
            return self._tables(chart) if "table" in self.options else [self._image(chart)]
        except diagram.DiagramError as error:
            raise self.error(str(error)) from error

    def _depend(self) -> None:
        """Rebuild the document when the drawn module changes."""
        module = sys.modules.get(self.arguments[0].partition(":")[0]) if self.arguments else diagram
        if file := getattr(module, "__file__", None):
            self.env.note_dependency(file)

    @property
    def _phases(self) -> bool:
        return "no-phases" not in self.options

    def _image(self, chart: diagram.Chart) -> nodes.image:
        vector, pixels = self._rendered(chart, "svg"), self._rendered(chart, "png")
        name = f"proxy-fsm-{hashlib.sha256(vector).hexdigest()[:16]}"
        folder = Path(self.env.doctreedir) / "proxy-fsm-diagrams"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.svg").write_bytes(vector)
        (folder / f"{name}.png").write_bytes(pixels)
        # Sphinx chooses the first file type that the builder supports.
        here = Path(self.env.doc2path(self.env.docname)).parent
        image = nodes.image(uri=f"{Path(os.path.relpath(folder, here)).as_posix()}/{name}.*")
        image["alt"] = self.options.get("alt", f"State diagram of {chart.title}")
        for option in ("align", "scale", "width"):
            if option in self.options:
                image[option] = self.options[option]
        image["classes"].append("proxy-fsm-diagram")
        self.set_source_info(image)
        return image

    def _rendered(self, chart: diagram.Chart, format: diagram.Format) -> bytes:
        highlight, theme = self.options.get("highlight"), self.options.get("theme")
        rendered = diagram.draw(chart, format, highlight=highlight, theme=theme, phases=self._phases)
        return rendered.encode() if isinstance(rendered, str) else rendered

    def _tables(self, chart: diagram.Chart) -> list[nodes.Node]:
        highlight = chart.state_named(self.options.get("highlight"))
        marked = () if highlight is None else chart.around(highlight)
        chart = chart if self._phases else chart.without_phases()
        columns = [False, *(state in marked for state in chart.states)]
        tables: list[nodes.Node] = [
            self._table(
                ("trigger", *chart.states),
                [((trigger, *cells), columns) for trigger, cells in diagram.table_rows(chart)],
                literal=0,
                marked=columns,
            )
        ]
        if chart.phases:
            rows = [(row, [f"{row[0]}/{row[1]}" in marked] * len(row)) for row in diagram.phase_rows(chart)]
            tables.append(self._table(diagram.PHASE_COLUMNS, rows, literal=2))
        return tables

    def _table(
        self,
        heads: Sequence[str],
        rows: Iterable[tuple[Sequence[str], Sequence[bool]]],
        *,
        literal: int,
        marked: Sequence[bool] = (),
    ) -> nodes.table:
        """Build a table from nodes, since the markup of the document is unknown: it may be Markdown.

        Args:
            heads: The column headings.
            rows: For each row its cells, and which of them are bold.
            literal: The column that holds triggers.
            marked: Which of the headings are bold.
        """

        def row(cells: Sequence[str], bold: Sequence[bool], code: int | None) -> nodes.row:
            shown = [
                nodes.literal("", cell) if at == code else nodes.strong("", cell) if strong else nodes.Text(cell)
                for at, (cell, strong) in enumerate(zip(cells, bold, strict=True))
            ]
            return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", each)) for each in shown))

        group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in heads), cols=len(heads))
        group += nodes.thead("", row(heads, marked or [False] * len(heads), None))
        group += nodes.tbody("", *(row(cells, bold, literal) for cells, bold in rows))
        table = nodes.table("", group, classes=["proxy-fsm-diagram"])
        self.set_source_info(table)
        return table


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the directive with Sphinx."""
    app.add_directive("proxy-fsm-diagram", ProxyFsmDiagram)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
