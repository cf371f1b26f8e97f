"""The Sphinx directive ``proxy-fsm-diagram``: a client's documentation draws its own machine when it is built.

With ``extensions = ["proxy_fsm.sphinx"]`` in ``conf.py`` (extra ``docs``)::

    .. proxy-fsm-diagram:: myclient.sessions:MyProxy
       :highlight: running

Without an argument it draws the lifecycle. Options: ``highlight`` (a state), ``theme`` (``light`` or ``dark``; by
default the picture follows the reader), ``table`` (the table of states and triggers instead of the picture), ``alt``,
``align``, ``scale`` and ``width`` as for images. HTML gets SVG, and what cannot show that, such as LaTeX, gets PNG.
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
    from collections.abc import Callable, Iterable

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
        "theme": _theme,
        "table": directives.flag,
        "alt": directives.unchanged,
        "align": _align,
        "scale": directives.percentage,
        "width": directives.length_or_percentage_or_unitless,
    }

    def run(self) -> list[nodes.Node]:
        """Return what is put into the document."""
        try:
            chart = diagram.load(self.arguments[0]) if self.arguments else diagram.LIFECYCLE
            self._depend()
            return [self._table(chart) if "table" in self.options else self._image(chart)]
        except diagram.DiagramError as error:
            raise self.error(str(error)) from error

    def _depend(self) -> None:
        """Have the document built again when the module that is drawn changes."""
        module = sys.modules.get(self.arguments[0].partition(":")[0]) if self.arguments else diagram
        if file := getattr(module, "__file__", None):
            self.env.note_dependency(file)

    def _image(self, chart: diagram.Chart) -> nodes.image:
        vector, pixels = self._drawn(chart, "svg"), self._drawn(chart, "png")
        name = f"proxy-fsm-{hashlib.sha256(vector).hexdigest()[:16]}"
        folder = Path(self.env.doctreedir) / "proxy-fsm-diagrams"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.svg").write_bytes(vector)
        (folder / f"{name}.png").write_bytes(pixels)
        # Sphinx takes the first kind of file that the builder can show.
        here = Path(self.env.doc2path(self.env.docname)).parent
        image = nodes.image(uri=f"{Path(os.path.relpath(folder, here)).as_posix()}/{name}.*")
        image["alt"] = self.options.get("alt", f"State diagram of {chart.title}")
        for option in ("align", "scale", "width"):
            if option in self.options:
                image[option] = self.options[option]
        image["classes"].append("proxy-fsm-diagram")
        self.set_source_info(image)
        return image

    def _drawn(self, chart: diagram.Chart, format: diagram.Format) -> bytes:
        drawn = diagram.draw(chart, format, highlight=self.options.get("highlight"), theme=self.options.get("theme"))
        return drawn.encode() if isinstance(drawn, str) else drawn

    def _table(self, chart: diagram.Chart) -> nodes.table:
        """Build it of nodes: text would have to be of the markup of the document, which may be Markdown."""
        highlight = chart.state_named(self.options.get("highlight"))

        def row(first: nodes.Node, cells: Iterable[str]) -> nodes.row:
            shown = [
                nodes.strong("", cell) if state == highlight else nodes.Text(cell)
                for state, cell in zip(chart.states, cells, strict=True)
            ]
            return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", each)) for each in (first, *shown)))

        columns = len(chart.states) + 1
        group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in range(columns)), cols=columns)
        group += nodes.thead("", row(nodes.Text("trigger"), chart.states))
        group += nodes.tbody(
            "", *(row(nodes.literal("", trigger), cells) for trigger, cells in diagram.table_rows(chart))
        )
        table = nodes.table("", group, classes=["proxy-fsm-diagram"])
        self.set_source_info(table)
        return table


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the directive with Sphinx."""
    app.add_directive("proxy-fsm-diagram", ProxyFsmDiagram)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
