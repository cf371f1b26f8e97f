"""Generates what is committed in ``diagrams/``, all of it from the code and from recorded runs.

``python -m tests.pictures`` writes it; with ``--check`` it only reports what is out of date, in its exit status too.
The runs in ``diagrams/runs`` were recorded with ``proxy-fsm demo --log-format json`` and the real programs; in the one
with a fault, the agent was killed with SIGKILL.
"""

from __future__ import annotations

import argparse
import io
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

import proxy_fsm
from proxy_fsm import diagram, timeline
from proxy_fsm.diagram.layout import Edge, Node, graph_scene
from proxy_fsm.scene import svg

from .helpers.imports import imports_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).parent.parent
PACKAGE = Path(proxy_fsm.__file__).parent
RUNS = ("healthy", "fault")


def module_map() -> dict[str, set[str]]:
    """Return which module imports which at run time; a package counts as one, ``proxy_fsm`` for its public names."""
    found: dict[str, set[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        module = file.relative_to(PACKAGE).with_suffix("").parts[0]
        name = {"__init__": "proxy_fsm"}.get(module, module)
        used = {imported.partition(".")[0] for imported in imports_of(file)}
        found.setdefault(name, set()).update(used)
    del found["__main__"]
    for name, used in found.items():
        public = {each for each in used if each not in found}
        found[name] = (used - public | ({"proxy_fsm"} if public else set())) - {name}
    return found


def reduced(graph: dict[str, set[str]]) -> dict[str, list[str]]:
    """Remove the edges that others imply (a transitive reduction)."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        pending = list(graph[start])
        while pending:
            name = pending.pop()
            if name not in seen:
                seen.add(name)
                pending += graph[name]
        return seen

    return {
        name: sorted(each for each in used if not any(each in reached(other) for other in used - {each}))
        for name, used in graph.items()
    }


def module_svg() -> str:
    graph = reduced(module_map())
    nodes = {name: Node(((name, "name"),)) for name in graph}
    edges = [Edge(name, each) for name, used in graph.items() for each in used]
    caption = ["An arrow: imports. Arrows that others imply are left out."]
    return svg(graph_scene("Modules of proxy_fsm", nodes, edges, caption=caption, node_gap=18, rank_gap=26))


def module_mermaid() -> str:
    graph = reduced(module_map())
    return "flowchart TD\n" + "".join(f"    {name} --> {each}\n" for name, used in graph.items() for each in used)


def run(name: str) -> timeline.Run:
    file = ROOT / "diagrams" / "runs" / f"{name}.jsonl"
    with file.open("rb") as lines:
        return timeline.read(lines, file.name)


def path() -> str | bytes:
    """Draw the path of the proxy whose agent was killed."""
    (track,) = run("fault").tracks
    changes = [event.fields for event in track.events if event.name == "proxy.transition"]
    steps = [
        diagram.PathStep(each["trigger"], each["source"], each["dest"], each["elapsed_s"], each["sequence"])
        for each in changes
    ]
    return diagram.draw(format="svg", highlight=steps[-1].dest, path=steps, phases=False)


def overview() -> str:
    """Return the README of the directory."""
    return "\n".join(
        [
            "# Pictures",
            "",
            "`make diagrams` draws all of these from the code and from the recorded runs in `runs/`; `make test` fails",
            "if one is out of date.",
            "",
            "## The lifecycle",
            "",
            "The seven states alone:",
            "",
            "![The state diagram](lifecycle.svg)",
            "",
            "And with the phases inside them:",
            "",
            "![The state diagram with phases](phases.svg)",
            "",
            "Every trigger with every state; `–` is ignored, `·` is refused. Then what ends each phase, and its time",
            "limit:",
            "",
            diagram.markdown_table(),
            "In Mermaid:",
            "",
            f"```mermaid\n{diagram.mermaid()}```",
            "",
            "## A healthy start, and its end",
            "",
            f"```mermaid\n{timeline.sequence_mermaid(run('healthy'))}```",
            "",
            "![The run over time](run-healthy.svg)",
            "",
            "## A fault: the agent was killed",
            "",
            f"```mermaid\n{timeline.sequence_mermaid(run('fault'))}```",
            "",
            "![The run over time](run-fault.svg)",
            "",
            "The path of its proxy, and [a page that replays it](run-fault.html), which opens from disk:",
            "",
            "![The lifecycle with the path from idle to failed](path.svg)",
            "",
            "## The modules",
            "",
            "![Which module imports which](modules.svg)",
            "",
        ]
    )


def phase_table() -> str:
    """Return the table of the phases alone."""
    return diagram.markdown_table().split("\n\n")[1]


def sequence_text(name: str) -> str:
    return timeline.sequence_mermaid(run(name))


def sequence_svg(name: str) -> str | bytes:
    return timeline.draw(run(name), "svg", view="sequence")


def run_svg(name: str) -> str | bytes:
    return timeline.draw(run(name), "svg")


def run_page(name: str) -> str | bytes:
    return timeline.draw(run(name), "html")


#: What is committed, by its path, in the order in which it is drawn: the page holds the lifecycle.
PICTURES: dict[str, Callable[[], str | bytes]] = {
    "diagrams/README.md": overview,
    "diagrams/lifecycle.mmd": partial(diagram.draw, phases=False),
    "diagrams/lifecycle.md": diagram.markdown_table,
    "diagrams/lifecycle.svg": partial(diagram.draw, format="svg", phases=False),
    "diagrams/lifecycle.png": partial(diagram.draw, format="png", phases=False),
    "diagrams/phases.md": phase_table,
    "diagrams/phases.mmd": diagram.mermaid,
    "diagrams/phases.svg": partial(diagram.draw, format="svg"),
    "diagrams/phases.png": partial(diagram.draw, format="png"),
    "diagrams/modules.mmd": module_mermaid,
    "diagrams/modules.svg": module_svg,
    "diagrams/path.svg": path,
    "proxy_fsm/timeline/lifecycle.svg": partial(diagram.draw, format="svg", phases=False),
    "proxy_fsm/timeline/phases.svg": partial(diagram.draw, format="svg"),
    "diagrams/run-fault.html": partial(run_page, "fault"),
}
for _name in RUNS:
    PICTURES |= {
        f"diagrams/sequence-{_name}.mmd": partial(sequence_text, _name),
        f"diagrams/sequence-{_name}.svg": partial(sequence_svg, _name),
        f"diagrams/run-{_name}.svg": partial(run_svg, _name),
    }


def is_same(committed: bytes, drawn: str | bytes) -> bool:
    """Tell whether a picture is what is committed: text to the byte, PNG by what it shows.

    PNG compression depends on the processor, and so may the last bit of a blended pixel.
    """
    if isinstance(drawn, str):
        return committed == drawn.encode()
    try:
        seen = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int) for data in (committed, drawn)]
    except OSError:
        return False
    return seen[0].shape == seen[1].shape and float((abs(seen[0] - seen[1]) > 8).mean()) < 1e-4


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pictures, or check them; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.pictures", description="Draw what is committed.")
    parser.add_argument("--root", type=Path, default=ROOT, help="where the repository is")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where one is out of date")
    options = parser.parse_args(arguments)
    stale = []
    for name, draw in PICTURES.items():
        file, drawn = options.root / name, draw()
        if file.is_file() and is_same(file.read_bytes(), drawn):
            continue
        stale.append(name)
        sys.stdout.write(f"{'out of date' if options.check else 'drawn'}: {name}\n")
        if not options.check:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(drawn.encode() if isinstance(drawn, str) else drawn)
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
