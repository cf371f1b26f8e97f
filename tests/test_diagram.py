"""Pictures match the code, are the same bytes everywhere, and are readable in light and dark."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from enum import Enum
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image
from pygraphviz import AGraph  # type: ignore[import-untyped]
from transitions import Machine
from transitions.extensions import HierarchicalMachine
from transitions.extensions.nesting import NestedState

from proxy_fsm import (
    Backend,
    CommandBackend,
    EndReason,
    Lifecycle,
    NX3Backend,
    Phase,
    Proxy,
    State,
    Trigger,
    diagram,
    scene,
)
from proxy_fsm.diagram import Arrow, Chart, DiagramError, Inner, PathStep
from proxy_fsm.diagram.layout import chart_scene
from proxy_fsm.scene import Box, Text, width_of
from proxy_fsm.states import PHASES, TRANSITIONS
from proxy_fsm.testing import FakedProxy

from . import pictures
from .helpers.imports import imports_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy_fsm import Evidence

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"
PATH = (
    PathStep("start", "idle", "tunnelling", 1.25, 1),
    PathStep("tunnel_opened", "tunnelling", "spawning", 0.0123, 2),
)
CHANGES = {(str(r.source), str(r.dest), str(r.trigger)) for r in TRANSITIONS if r.dest is not None}
#: What moves a proxy inside a state. What leaves a phase and its state is drawn as the state's own arrow.
MOVES = {
    (f"{r.state}/{r.phase}", f"{r.state}/{r.dest}", str(r.trigger)) for r in PHASES if not isinstance(r.dest, State)
}


def svg_of(machine: object = diagram.LIFECYCLE, **options: Any) -> ET.Element:
    drawn = diagram.draw(machine, "svg", **options)
    assert isinstance(drawn, str)
    return ET.fromstring(drawn)  # noqa: S314 - we have written it


def png_of(machine: object = diagram.LIFECYCLE, **options: Any) -> Image.Image:
    drawn = diagram.draw(machine, "png", **options)
    assert isinstance(drawn, bytes)
    return Image.open(io.BytesIO(drawn)).convert("RGB")


def groups(root: ET.Element, kind: str) -> Iterator[ET.Element]:
    return (group for group in root.iter(f"{SVG}g") if kind in group.get("class", "").split())


def words(root: ET.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


class TestCommittedPictures:
    @pytest.mark.parametrize("name", pictures.PICTURES)
    def test_committed_picture_is_up_to_date(self, name: str) -> None:
        """``make diagrams`` updates it."""
        assert pictures.is_same((ROOT / name).read_bytes(), pictures.PICTURES[name]()), f"{name}: make diagrams"

    def test_pictures_are_written_and_checked(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        few = ("diagrams/lifecycle.mmd", "diagrams/lifecycle.md", "diagrams/lifecycle.png")
        monkeypatch.setattr(pictures, "PICTURES", {name: pictures.PICTURES[name] for name in few})
        target = ["--root", str(tmp_path)]
        assert pictures.main([*target, "--check"]) == 1
        assert not list(tmp_path.iterdir())
        assert pictures.main(target) == 0
        assert pictures.main([*target, "--check"]) == 0
        capsys.readouterr()
        (tmp_path / "diagrams/lifecycle.mmd").write_text("stale")
        Image.new("RGB", (9, 9)).save(tmp_path / "diagrams/lifecycle.png")
        assert pictures.main([*target, "--check"]) == 1
        assert re.findall(r"\S+/\S+", capsys.readouterr().out) == ["diagrams/lifecycle.mmd", "diagrams/lifecycle.png"]

    def test_different_pictures_are_not_the_same(self) -> None:
        light, dark = (diagram.draw(format="png", theme=theme) for theme in ("light", "dark"))
        here = diagram.draw(format="png", highlight="idle")
        assert isinstance(light, bytes)
        assert pictures.is_same(light, light)
        assert not pictures.is_same(light, dark)
        assert not pictures.is_same(light, here)
        assert not pictures.is_same(b"no picture", light)

    def test_readme_has_diagram_states_and_reasons_with_exit_status(self) -> None:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        assert "](diagrams/lifecycle.svg)" in readme
        rows = [line for line in readme.splitlines() if line.startswith("| `")]
        for reason in EndReason:
            assert any(f"`{reason}`" in row and f"| {reason.cli_status} |" in row for row in rows), reason
        for state in State:
            assert any(row.startswith(f"| `{state}` |") for row in rows), state

    def test_module_map_has_every_module_and_import(self) -> None:
        whole = pictures.module_map()
        assert {"lifecycle", "engine", "proxy", "cli", "diagram", "timeline"} <= set(whole)
        assert "supervisor" in whole["engine"]
        assert imports_of(pictures.PACKAGE / "journal.py") <= whole["journal"]
        few = {name: set(used) for name, used in pictures.reduced(whole).items()}

        def reached(name: str) -> set[str]:
            return few[name].union(*(reached(each) for each in few[name]))

        for name, used in whole.items():
            assert used <= reached(name), name
        assert sum(map(len, few.values())) < sum(map(len, whole.values())) / 2


class TestLifecycle:
    def test_mermaid_has_each_transition_once(self) -> None:
        drawn = [
            (source.strip(), dest.strip(), label.strip().lower())
            for line in str(diagram.draw(phases=False)).splitlines()
            if ":" in line
            for source, dest, labels in [line.replace("-->", ":").split(":")]
            for label in labels.split(",")
        ]
        assert set(drawn) == CHANGES
        assert len(drawn) == len(CHANGES)

    def test_mermaid_marks_orders_and_final_states(self) -> None:
        drawn = diagram.mermaid()
        assert "idle --> tunnelling: START" in drawn
        assert "tunnelling --> spawning: tunnel_opened" in drawn
        assert [line.split()[0] for line in drawn.splitlines() if line.endswith("--> [*]")] == ["stopped", "failed"]

    def test_table_has_every_cell(self) -> None:
        rows = [line.strip("| ").split(" | ") for line in diagram.markdown_table().splitlines()]
        assert rows[0] == ["trigger", *State]
        assert rows[2] == ["`start`", "tunnelling", "·", "·", "·", "·", "·", "·"]
        assert rows[3] == ["`stop`", "stopped", "stopping", "stopping", "stopping", "–", "–", "–"]
        assert rows.index([""]) == 2 + 8

    def test_json_has_the_whole_chart(self) -> None:
        whole = json.loads(diagram.as_json(highlight="running", path=PATH))
        assert [state["name"] for state in whole["states"]] == list(State)
        assert [state["name"] for state in whole["states"] if state["final"]] == ["stopped", "failed"]
        assert [state["name"] for state in whole["states"] if state["initial"]] == ["idle"]
        assert {t["name"] for t in whole["triggers"] if t["kind"] == "order"} == {"start", "stop"}
        rows = {(row["trigger"], row["source"], row["dest"]) for row in whole["transitions"]}
        assert rows == {(str(r.trigger), str(r.source), r.dest and str(r.dest)) for r in TRANSITIONS}
        assert whole["highlight"] == "running"
        assert whole["path"][1] == {
            "trigger": "tunnel_opened",
            "source": "tunnelling",
            "dest": "spawning",
            "elapsed_s": 0.0123,
            "number": 2,
        }

    def test_dot_parses_and_has_each_transition(self) -> None:
        flat = diagram.LIFECYCLE.without_phases()
        graph = AGraph(string=diagram.dot(flat, highlight="running", path=PATH, theme="dark"))
        assert set(graph.nodes()) == {"[*]", *State}
        drawn = {
            (source, dest, label.strip().lower())
            for source, dest in graph.edges()
            if source != "[*]"
            for label in graph.get_edge(source, dest).attr["label"].split("\\n")
            if "after" not in label.split()
        }
        assert drawn == CHANGES
        assert {n for n in graph.nodes() if graph.get_node(n).attr["peripheries"] == "2"} == {"stopped", "failed"}
        assert "2. tunnel_opened after 0.012 s" in graph.get_edge("tunnelling", "spawning").attr["label"]
        assert graph.get_node("running").attr["penwidth"] == "3"

    def test_svg_has_each_state_and_transition(self) -> None:
        root = svg_of()
        assert sorted(group.get("data-state", "") for group in groups(root, "state")) == sorted(State)
        drawn = {
            (group.get("data-from"), group.get("data-to"), (text.text or "").lower())
            for group in groups(root, "arrow-label")
            for text in group.iter(f"{SVG}text")
        }
        assert drawn == CHANGES | MOVES
        framed = {g.get("data-state") for g in groups(root, "state") if any(r.get("class") == "frame" for r in g)}
        assert framed == {"stopped", "failed"}

    def test_svg_marks_orders_in_text_and_style(self) -> None:
        kinds = {text.text: text.get("class") for text in svg_of().iter(f"{SVG}text")}
        assert (kinds["START"], kinds["tunnel_opened"]) == ("order", "observation")
        assert any("CAPITALS" in line for line in words(svg_of()))

    def test_current_state_and_way_are_shown(self) -> None:
        root = svg_of(highlight="spawning", path=PATH)
        assert [group.get("data-state") for group in groups(root, "current")] == ["spawning"]
        assert {group.get("data-state") for group in groups(root, "visited")} == {"idle", "tunnelling", "spawning"}
        assert [(g.get("data-from"), g.get("data-to")) for g in groups(root, "taken")] == [
            ("idle", "tunnelling"),
            ("tunnelling", "spawning"),
        ]
        kinds = {text.text: text.get("class") for text in root.iter(f"{SVG}text")}
        assert kinds["1. START after 1.250 s"] == kinds["2. tunnel_opened after 0.012 s"] == "time"
        drawn = diagram.mermaid(highlight="spawning", path=PATH)
        assert "idle --> tunnelling: START, 1. START after 1.250 s\n" in drawn
        assert "tunnelling --> spawning: tunnel_opened, 2. tunnel_opened after 0.012 s\n" in drawn
        assert "class spawning current" in drawn
        assert "class idle,tunnelling visited" in drawn

    def test_table_highlights_a_column(self) -> None:
        row = diagram.markdown_table(highlight="running").splitlines()[3]
        assert row == "| `stop` | stopped | stopping | stopping | **stopping** | – | – | – |"

    def test_taken_trigger_is_named_among_several(self) -> None:
        """Three lead from running to stopping: an order, and two observations, one of them a fault."""
        path = (PathStep("fault_found", "running", "stopping", 2.161, 4),)
        said = "4. fault_found after 2.161 s"
        kinds = {text.text: text.get("class") for text in svg_of(path=path).iter(f"{SVG}text")}
        assert kinds[said] == "time"
        light = scene.rules("light")
        assert light["", "time"] not in (light["", "order"], light["", "observation"])
        assert f"running --> stopping: session_ended, fault_found, STOP, {said}\n" in diagram.mermaid(path=path)
        assert said in diagram.dot(path=path)

    @pytest.mark.parametrize("picture", diagram.FORMATS)
    def test_unknown_state_is_refused(self, picture: diagram.Format) -> None:
        with pytest.raises(DiagramError, match=r"no state 'gone'; it has idle, .*failed\."):
            diagram.draw(format=picture, highlight="gone")

    def test_unknown_format_is_refused(self) -> None:
        with pytest.raises(DiagramError, match="no format 'gif'; there are mermaid, dot"):
            diagram.draw(format="gif")  # type: ignore[arg-type]


def block(drawn: str, name: str) -> list[str]:
    """Return the lines inside a composite state of Mermaid's."""
    indent, _, rest = next(line.partition("state ") for line in drawn.splitlines() if line.endswith(f"state {name} {{"))
    inside = drawn.partition(f"{indent}state {rest}\n")[2].partition(f"\n{indent}}}\n")[0]
    return [line.strip() for line in inside.splitlines()]


class TestPhases:
    def test_chart_of_the_lifecycle_has_the_phases_of_each_state(self) -> None:
        for state in State:
            assert [inner.name for inner in diagram.LIFECYCLE.inside(state)] == list(state.phases)

    def test_state_begins_in_its_first_phase(self) -> None:
        first = [inner.path for inner in diagram.LIFECYCLE.phases if inner.initial]
        assert first == [f"{state}/{state.phases[0]}" for state in State if state.phases]

    def test_phase_has_the_limit_of_the_table(self) -> None:
        limits = {inner.path: inner.limit for inner in diagram.LIFECYCLE.phases}
        assert limits["stopping/draining"] == "drain_s"
        assert limits["running/established"] == ""

    def test_mermaid_nests_phases(self) -> None:
        assert block(diagram.mermaid(), "running") == [
            "[*] --> established",
            "established --> verifying: end_suspected",
            "verifying --> established: end_denied",
        ]

    def test_mermaid_has_each_phase_transition_once(self) -> None:
        drawn = [
            (f"{state}/{source}", f"{state}/{dest.strip()}", label.strip())
            for state in State
            if state.phases
            for line in block(diagram.mermaid(), str(state))
            if ":" in line
            for source, dest, labels in [line.replace(" -->", ":").split(":")]
            for label in labels.split(",")
        ]
        assert set(drawn) == MOVES
        assert len(drawn) == len(MOVES)

    def test_trigger_that_leaves_the_state_is_drawn_at_the_state_only(self) -> None:
        """PHASES says in which phase it is expected, and TRANSITIONS that it may come in any."""
        assert diagram.mermaid().count("tunnel_opened") == 1
        assert words(svg_of()).count("tunnel_opened") == 1
        assert diagram.dot().count("tunnel_opened") == 1

    def test_dot_has_a_cluster_for_each_state_with_phases(self) -> None:
        graph = AGraph(string=diagram.dot())
        clusters = {g.graph_attr["label"]: g for g in graph.subgraphs() if g.name.startswith("cluster")}
        assert list(clusters) == ["tunnelling", "spawning", "running", "stopping"]
        for state, cluster in clusters.items():
            phases = [node for node in cluster.nodes() if not node.startswith("[*]")]
            assert phases == [f"{state}/{phase}" for phase in State(state).phases]
        assert graph.get_node("running/verifying").attr["label"] == "verifying"

    def test_dot_clips_arrows_of_a_state_at_its_cluster(self) -> None:
        graph = AGraph(string=diagram.dot())
        edge = graph.get_edge("running/verifying", "stopping/terminating")
        clusters = {g.name: g.graph_attr["label"] for g in graph.subgraphs()}
        assert (clusters[edge.attr["ltail"]], clusters[edge.attr["lhead"]]) == ("running", "stopping")

    def test_svg_has_each_phase_after_its_state(self) -> None:
        shown = [
            g.get("data-phase", g.get("data-state", ""))
            for g in svg_of().iter(f"{SVG}g")
            if {"state", "phase"} & set(g.get("class", "").split())
        ]
        assert set(shown) == set(diagram.LIFECYCLE.paths())
        assert all(shown.index(inner.state) < shown.index(inner.path) for inner in diagram.LIFECYCLE.phases)

    def test_second_table_says_what_ends_each_phase(self) -> None:
        """It is ``PHASES`` itself."""
        lines = diagram.markdown_table().replace("`", "").split("\n\n")[1].splitlines()
        rows = [line.strip("| ").split(" | ") for line in lines]
        assert rows[0] == ["state", "phase", "trigger", "leads to", "limit"]
        expected = [
            [str(r.state), str(r.phase), str(r.trigger), str(r.dest), *([r.limit] if r.limit else [])] for r in PHASES
        ]
        assert [[cell for cell in row if cell] for row in rows[2:]] == expected

    def test_table_of_states_is_the_same_with_and_without_phases(self) -> None:
        whole = diagram.markdown_table()
        assert whole.split("\n\n")[0] + "\n" == diagram.draw(format="table", phases=False)

    def test_json_has_all_phases(self) -> None:
        phases = json.loads(diagram.as_json())["phases"]
        assert [(each["state"], each["name"]) for each in phases] == [(s, p) for s in State for p in s.phases]
        assert phases[8] == {
            "state": "stopping",
            "name": "killing",
            "initial": False,
            "final": False,
            "limit": "kill_s",
            "transitions": [
                {"trigger": "process_exited", "dest": "stopping/draining", "condition": None},
                {"trigger": "kill_over", "dest": "stopping/draining", "condition": None},
            ],
        }

    @pytest.mark.parametrize("picture", diagram.FORMATS)
    def test_picture_without_phases_has_only_the_states(self, picture: diagram.Format) -> None:
        flat = diagram.LIFECYCLE.without_phases()
        assert not flat.phases
        assert flat.triggers == tuple(map(str, Trigger))
        drawn = diagram.draw(format=picture, phases=False)
        assert drawn == diagram.draw(flat, picture)
        assert drawn != diagram.draw(format=picture)


class TestHighlightedPhases:
    def test_svg_marks_the_phase_and_its_state(self) -> None:
        root = svg_of(highlight="stopping/draining")
        marked = [g.get("data-phase") or g.get("data-state") for g in groups(root, "current")]
        assert marked == ["stopping", "stopping/draining"]

    def test_mermaid_marks_the_phase_and_its_state(self) -> None:
        drawn = diagram.mermaid(highlight="stopping/draining", path=PATH).splitlines()
        assert "    class draining current" in drawn
        assert "    class stopping around" in drawn
        assert "    class idle,tunnelling,spawning visited" in drawn

    def test_dot_marks_the_phase_and_its_state(self) -> None:
        graph = AGraph(string=diagram.dot(highlight="stopping/draining"))
        assert graph.get_node("stopping/draining").attr["fillcolor"] == scene.COLOURS["current"][0]
        grounds = {g.graph_attr["label"]: g.graph_attr["fillcolor"] for g in graph.subgraphs()}
        assert grounds["stopping"] == scene.COLOURS["marked"][0]
        assert not grounds["running"]

    def test_table_marks_the_column_and_the_rows(self) -> None:
        table = diagram.markdown_table(highlight="running/established")
        assert "| **running** |" in table
        assert "| **running** | **established** | **`end_suspected`** | **verifying** |  |" in table
        assert "| running | verifying | `end_denied` |" in table

    def test_json_names_the_highlight(self) -> None:
        assert json.loads(diagram.as_json(highlight="stopping/draining"))["highlight"] == "stopping/draining"

    @pytest.mark.parametrize("picture", diagram.FORMATS)
    def test_unknown_phase_is_refused(self, picture: diagram.Format) -> None:
        with pytest.raises(DiagramError, match=r"'running' has no phase 'gone'; it has established, verifying\."):
            diagram.draw(format=picture, highlight="running/gone")

    def test_phase_of_a_state_that_has_none_is_refused(self) -> None:
        with pytest.raises(DiagramError, match=r"^State 'idle' has no phase 'checking'; it has none\.$"):
            diagram.draw(highlight="idle/checking")

    def test_phase_of_an_unknown_state_is_refused(self) -> None:
        with pytest.raises(DiagramError, match="no state 'gone/checking'; it has idle"):
            diagram.draw(highlight="gone/checking")

    def test_phase_highlights_its_state_if_phases_are_not_drawn(self) -> None:
        flat = diagram.draw(phases=False, highlight="stopping")
        assert diagram.draw(phases=False, highlight="stopping/draining") == flat

    def test_unknown_phase_is_refused_if_phases_are_not_drawn(self) -> None:
        with pytest.raises(DiagramError, match="no phase 'gone'"):
            diagram.draw(phases=False, highlight="stopping/gone")


def linear(colour: str) -> list[float]:
    """Return red, green and blue of a colour in sRGB, in amounts of light."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]


def luminance(colour: str) -> float:
    """Return the relative luminance, as WCAG 2 defines it."""
    red, green, blue = linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


#: What the eye's receptors get of linear red, green and blue if one of the three kinds is missing.
#: Source: Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency",
#: IEEE Transactions on Visualization and Computer Graphics 15(6), 2009; severity 1.0.
VISIONS = {
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}


def seen(colour: str, vision: str) -> tuple[float, float, float]:
    """Return a colour's coordinates in CIELAB, with the white of sRGB (D65), as it is seen."""
    rgb = linear(colour)
    rgb = [min(max(sum(a * b for a, b in zip(row, rgb, strict=True)), 0.0), 1.0) for row in VISIONS[vision]]
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    x, y, z = (
        share ** (1 / 3) if share > 0.008856 else 7.787 * share + 16 / 116
        for share in (sum(a * b for a, b in zip(row, rgb, strict=True)) / sum(row) for row in to_xyz)
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


class TestAppearance:
    @pytest.mark.parametrize("vision", VISIONS)
    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_colours_are_distinguishable_in_every_vision(self, theme: diagram.Theme, vision: str) -> None:
        """CIE 1976: a difference of 2.3 is just noticeable if two colours touch; these do not, and may be thin."""
        rules = scene.rules(theme)
        states = [f"is-{state}" for state in State]
        for one, other in [*combinations(states, 2), ("flow-to", "flow-from")]:
            spots = [seen(rules["", kind]["fill"], vision) for kind in (one, other)]
            assert math.dist(*spots) >= 19, (one, other)

    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_text_has_enough_contrast(self, theme: diagram.Theme) -> None:
        """WCAG 2 asks for 4.5 to 1."""
        rules = scene.rules(theme)
        grounds = {kind: style["fill"] for (owner, kind), style in rules.items() if not owner and "fill" in style}
        for word in ("name", "plain", "order", "observation", "time", "caption", "fault"):
            assert contrast(rules["", word]["fill"], grounds["paper"]) >= 4.5, word
        for box in ("box", "note", *(f"is-{state}" for state in State)):
            assert contrast(rules["", "name"]["fill"], grounds[box]) >= 4.5, box
        assert contrast(rules["current", "name"]["fill"], rules["current", "box"]["fill"]) >= 4.5
        assert contrast(rules["", "name"]["fill"], rules["visited", "box"]["fill"]) >= 4.5
        assert contrast(rules["", "fault"]["fill"], grounds["note"]) >= 4.5
        assert contrast(rules["", "line"]["stroke"], grounds["paper"]) >= 3

    def test_svg_theme_follows_the_viewer_by_default(self) -> None:
        both, light, dark = (diagram.draw(format="svg", theme=theme) for theme in (None, "light", "dark"))
        assert "prefers-color-scheme: dark" in str(both)
        assert "prefers-color-scheme" not in str(light) + str(dark)
        assert light != dark

    def test_mermaid_has_a_theme_only_if_requested(self) -> None:
        assert "theme" not in diagram.mermaid()
        assert diagram.mermaid(theme="dark").startswith('%%{init: {"theme": "dark"}}%%\nstateDiagram-v2\n')
        assert diagram.mermaid(theme="light").startswith('%%{init: {"theme": "default"}}%%\n')

    def test_png_has_themes_and_highlight(self) -> None:
        assert png_of().getpixel((3, 3)) == (255, 255, 255)
        assert png_of(theme="dark").getpixel((3, 3)) == (13, 17, 23)
        yellow = (255, 211, 61)
        found = [dict((c, n) for n, c in p.getcolors(1 << 20) or []) for p in (png_of(), png_of(highlight="idle"))]  # noqa: C402
        assert yellow not in found[0]
        assert found[1][yellow] > 1000

    @pytest.mark.parametrize("path", [(), PATH])
    def test_main_story_is_one_straight_column(self, path: tuple[PathStep, ...]) -> None:
        middles = {
            group.get("data-state"): float(box.get("x", 0)) + float(box.get("width", 0)) / 2
            for group in groups(svg_of(path=path, phases=False), "state")
            for box in group.iter(f"{SVG}rect")
            if box.get("class") == "box"
        }
        main = [middles[str(state)] for state in State if state is not State.FAILED]
        assert main == pytest.approx([main[0]] * 6, abs=0.02)

    def test_phases_are_in_the_same_column(self) -> None:
        """All eleven of them, although some transitions lead back to an earlier phase."""
        middles = [
            float(box.get("x", 0)) + float(box.get("width", 0)) / 2
            for group in groups(svg_of(), "phase")
            for box in group.iter(f"{SVG}rect")
        ]
        assert len(middles) == 11
        assert middles == pytest.approx([middles[0]] * 11, abs=0.02)

    @pytest.mark.parametrize("phases", [True, False])
    @pytest.mark.parametrize("thing", [diagram.LIFECYCLE, NX3Backend])
    def test_labels_overlap_neither_states_nor_labels(self, thing: object, phases: bool) -> None:  # noqa: FBT001
        """Judged by the estimated widths, which are those of a wide font."""
        chart = diagram.chart_of(thing)
        whole = chart_scene(chart if phases else chart.without_phases(), highlight="running", path=PATH)
        boxes = [(i.x, i.y, i.width, i.height) for g in whole.groups for i in g.items if isinstance(i, Box)]
        boxes = [box for box in boxes if box[2] > 12]
        lines = [i for g in whole.groups if "arrow-label" in g.classes for i in g.items if isinstance(i, Text)]
        spots = [(t.x - (w := width_of(t.words, t.size)) / 2, t.y - t.size * 0.75, w, t.size * 0.95) for t in lines]
        for at, one in enumerate(spots):
            assert one[0] >= 0
            assert one[0] + one[2] <= whole.width
            for other in boxes + spots[at + 1 :]:
                assert is_apart(one, other) or is_within(one, other), (lines[at].words, one, other)

    def test_boxes_of_phases_are_inside_their_state_and_no_others_overlap(self) -> None:
        boxes = {
            g.data[0][1]: (i.x, i.y, i.width, i.height)
            for g in chart_scene(diagram.chart_of(Lift)).groups
            if {"state", "phase"} & set(g.classes)
            for i in g.items
            if isinstance(i, Box)
        }
        assert len(boxes) == len(diagram.chart_of(Lift).paths())
        for one, other in combinations(boxes, 2):
            if other.startswith(f"{one}/"):
                assert is_within(boxes[other], boxes[one]), (one, other)
            else:
                assert is_apart(boxes[one], boxes[other]), (one, other)


Corners = tuple[float, float, float, float]


def is_apart(one: Corners, other: Corners) -> bool:
    """Tell whether two boxes do not overlap."""
    return any(
        one[at] + one[at + 2] <= other[at] or other[at] + other[at + 2] <= one[at]  # beside, or above
        for at in (0, 1)
    )


def is_within(one: Corners, other: Corners) -> bool:
    """Tell whether a box lies inside another one."""
    return all(other[at] <= one[at] and one[at] + one[at + 2] <= other[at] + other[at + 2] for at in (0, 1))


DRAW_ALL = """
import sys
from proxy_fsm import diagram, timeline
for picture in ("mermaid", "dot", "table", "json", "svg"):
    sys.stdout.write(diagram.draw(format=picture, highlight="running"))
with open(sys.argv[1], "rb") as lines:
    run = timeline.read(lines)
for picture in ("svg", "html", "mermaid"):
    sys.stdout.write(timeline.draw(run, picture))
"""


def test_bytes_are_the_same_with_other_fonts_hashes_and_locales(tmp_path: Path) -> None:
    """No font at all, as on a bare machine, is the hardest case: a layout that measures words changes there."""
    (tmp_path / "fonts.conf").write_text("<fontconfig></fontconfig>")
    drawn = [
        subprocess.run(
            [sys.executable, "-c", DRAW_ALL, str(ROOT / "diagrams/runs/fault.jsonl")],
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"} | more,
            capture_output=True,
            check=True,
            timeout=50,
        ).stdout
        for more in (
            {"PYTHONHASHSEED": "1"},
            {"PYTHONHASHSEED": "2", "FONTCONFIG_FILE": str(tmp_path / "fonts.conf"), "LC_ALL": "C", "TZ": "Asia/Tokyo"},
        )
    ]
    assert len(drawn[0]) > 20_000
    assert drawn[0] == drawn[1]


def test_missing_extra_is_named_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DiagramError, match=r'needs matplotlib: pip install "proxy_fsm\[timeline\]"\.'):
        diagram.draw(format="png")
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    drawn: tuple[diagram.Format, ...] = ("svg", "png")
    for picture in drawn:
        with pytest.raises(DiagramError, match=r'need pygraphviz: pip install "proxy_fsm\[diagram\]"'):
            diagram.draw(format=picture)
    assert all(diagram.draw(format=picture) for picture in diagram.FORMATS if picture not in drawn)


class Doors(Machine):
    """A client's machine that is not a proxy, with names that need escaping."""

    orders: ClassVar = ("open",)

    def __init__(self) -> None:
        super().__init__(
            states=["shut", "wide open", "end"],
            transitions=[
                {
                    "trigger": "open",
                    "source": "shut",
                    "dest": "wide open",
                    "conditions": "is_unlocked",
                    "unless": "x|y",
                },
                {"trigger": "open", "source": "shut", "dest": "end"},
                {"trigger": "blown", "source": ["shut", "wide open"], "dest": "end"},
                {"trigger": "looked_at", "source": "*", "dest": None},
            ],
            initial="shut",
        )

    def is_unlocked(self) -> bool:
        return True


class Colour(Enum):
    RED = 1
    GREEN = 2


class Light:
    """Has its machine in an attribute; the states are an enum."""

    def __init__(self, begin: Colour = Colour.RED) -> None:
        self.machine = Machine(self, states=Colour, initial=begin, auto_transitions=False)
        self.machine.add_transition("next", Colour.RED, Colour.GREEN, conditions=[lambda: True])


class NeedsMuch(Machine):
    def __init__(self, much: int) -> None:
        super().__init__(states=[str(much)])


class Lift(HierarchicalMachine):
    """A client's machine with nested states, in two levels, and parallel ones."""

    orders: ClassVar = ("call", "reset")

    def __init__(self) -> None:
        moving = {
            "name": "moving",
            "initial": "up",
            "children": ["up", "down"],
            "transitions": [["turn", "up", "down"]],
        }
        doors = {
            "name": "doors",
            "initial": "shut",
            "children": ["shut", "open"],
            "transitions": [["open", "shut", "open"]],
        }
        super().__init__(
            states=[
                "idle",
                {
                    "name": "busy",
                    "initial": "waiting",
                    "children": ["waiting", moving, {"name": "stuck", "final": True}],
                    "transitions": [
                        ["go", "waiting", "moving"],
                        ["go", "moving", "="],
                        {"trigger": "jam", "source": "moving", "dest": "stuck", "conditions": "is_old"},
                        ["jam", "stuck", None],
                    ],
                },
                {"name": "arrived", "parallel": ["bell", doors]},
                "end",
            ],
            transitions=[
                ["call", "idle", "busy"],
                ["stop", "busy", "idle"],
                ["stop", "busy_waiting", "idle"],
                ["reset", "busy", "busy_waiting"],
                ["fall", "busy_moving", "busy"],
                ["arrive", "busy_moving_down", "arrived_doors_open"],
                ["leave", "arrived", "end"],
            ],
            initial="idle",
        )

    def is_old(self) -> bool:
        return True


class SlowerLifecycle(Lifecycle):
    """A client's subclass, with the same machine."""

    def __init__(self, delay_s: float) -> None:
        super().__init__()
        self.delay_s = delay_s


class OwnProxy(Proxy):
    """A client's proxy."""


class OwnBackend(CommandBackend):
    """Recognizes exit code 7."""

    max_connections = None
    needs_display = True

    def diagnose(self, evidence: Evidence) -> tuple[EndReason, str] | None:
        """
        Exit code 7 is a wrong password.

        What else it is, nobody knows.
        """  # noqa: D212 - a client's style
        if evidence.exited and evidence.exited.exit_code == 7:
            return EndReason.NEGOTIATION_FAILED, "It was the wrong password."
        return None


class SilentBackend(NX3Backend):
    def ready(self, evidence: Evidence) -> bool:
        return bool(evidence)


class TestClientMachines:
    def test_flat_machine_is_drawn(self) -> None:
        chart = diagram.chart_of(Doors)
        assert chart.title == "Doors"
        assert chart.states == ("shut", "wide open", "end")
        assert chart.initial == "shut"
        assert chart.finals == {"end"}
        assert chart.triggers == ("open", "blown", "looked_at")
        assert chart.orders == {"open"}
        assert chart.arrows[0] == Arrow("open", "shut", "wide open", "is_unlocked, not x|y")
        assert chart.ignored == {("looked_at", state) for state in chart.states}
        drawn = diagram.draw(Doors)
        assert 'state "wide open" as state_1' in str(drawn)
        assert "state_0 --> state_1: OPEN [is_unlocked, not x#124;y]" in str(drawn)
        assert "[*] --> state_0" in str(drawn)
        assert "state_2 --> [*]" in str(drawn)
        table = str(diagram.draw(Doors, "table"))
        assert "| `open` | wide open [is_unlocked, not x\\|y], end | · | · |" in table

    def test_machine_in_an_attribute_with_enum_states_is_drawn(self) -> None:
        for thing in (Light, Light(), Light().machine):
            chart = diagram.chart_of(thing)
            assert chart.states == ("RED", "GREEN")
            assert chart.initial == "RED"
            assert chart.finals == {"GREEN"}
            assert chart.arrows == (Arrow("next", "RED", "GREEN", "<lambda>"),)
            assert not chart.orders
        assert not any("CAPITALS" in line for line in words(svg_of(Light)))
        assert json.loads(str(diagram.draw(Light, "json")))["triggers"] == [{"name": "next", "kind": "observation"}]

    def test_machine_without_initial_state_has_no_initial_dot(self) -> None:
        rows = [{"trigger": "go", "source": "a", "dest": "b"}]
        machine = Machine(None, ["a", "b"], transitions=rows, initial=None, auto_transitions=False)
        assert diagram.chart_of(machine).initial is None
        assert "[*] -->" not in str(diagram.draw(machine))
        assert set(AGraph(string=str(diagram.draw(machine, "dot"))).nodes()) == {"a", "b"}
        assert [any(each.get("class") == "dot" for each in svg_of(thing).iter()) for thing in (Light, machine)] == [
            True,
            False,
        ]
        assert [each["initial"] for each in json.loads(str(diagram.draw(machine, "json")))["states"]] == [False, False]
        assert diagram.draw(machine, "table")

    def test_lifecycle_is_drawn_as_its_table(self) -> None:
        for picture in ("mermaid", "table", "svg"):
            assert diagram.draw(Lifecycle, picture) == diagram.draw(diagram.LIFECYCLE, picture)

    def test_subclass_of_lifecycle_is_drawn_under_its_name_without_an_instance(self) -> None:
        for thing in (SlowerLifecycle, SlowerLifecycle(0.1)):
            assert diagram.chart_of(thing) == replace(diagram.LIFECYCLE, title="SlowerLifecycle")

    def test_subclass_of_lifecycle_may_define_its_chart(self) -> None:
        class Own(SlowerLifecycle):
            more = Arrow("stop", "stopped", "failed")
            __chart__ = replace(diagram.LIFECYCLE, arrows=(*diagram.LIFECYCLE.arrows, more))

        assert "stopped --> failed: STOP" in str(diagram.draw(Own))

    def test_subclass_of_proxy_is_drawn_under_its_name(self) -> None:
        chart = diagram.chart_of(OwnProxy)
        assert (chart.title, chart.arrows) == ("OwnProxy", diagram.LIFECYCLE.arrows)

    def test_backend_is_described_in_notes(self) -> None:
        notes = dict(diagram.chart_of(NX3Backend).notes)
        assert notes["tunnelling"] == ("listens on a unix socket, for 1 connection", "needs an X server")
        assert notes["spawning"][0].startswith("readiness: ")
        assert notes["stopping"] == ("causes: Read the cause from nxproxy's lines, since its exit code says nothing.",)
        assert diagram.chart_of(NX3Backend()).notes == diagram.chart_of(NX3Backend).notes
        own = dict(diagram.chart_of(OwnBackend).notes)
        assert own["tunnelling"] == ("listens on TCP, for any number of connections", "needs an X server")
        assert own["stopping"] == ("causes: Exit code 7 is a wrong password.",)
        viewer = CommandBackend(["x", "{path}"], max_connections=2)
        assert dict(diagram.chart_of(viewer).notes)["tunnelling"] == ("listens on a unix socket, for 2 connections",)
        assert {"spawning", "stopping"}.isdisjoint(dict(diagram.chart_of(Backend).notes))
        assert "note right of stopping" in str(diagram.draw(OwnBackend))
        assert "stopping: causes: Exit code 7" in str(diagram.draw(OwnBackend, "table"))
        assert "causes: Exit code 7 is a wrong password." in words(svg_of(OwnBackend))
        assert "note 0" in AGraph(string=diagram.draw(OwnBackend, "dot"))
        assert "spawning" not in dict(diagram.chart_of(SilentBackend).notes)

    def test_undrawable_objects_are_refused(self) -> None:
        together = HierarchicalMachine(states=["a", "b"], initial=["a", "b"])
        astray = Machine(None, ["a"], transitions=[["go", "a", "gone"]], initial="a")
        for thing, message in (
            (int, "int is no state machine"),
            (NeedsMuch, "NeedsMuch cannot be instantiated without arguments.*missing 1 required.* Give it a __chart__"),
            (together, "has several initial states: put them inside one state"),
            (astray, "Machine refers to the state 'gone', which it does not have"),
        ):
            with pytest.raises(DiagramError, match=message):
                diagram.chart_of(thing)

    def test_class_may_define_its_chart(self) -> None:
        class Own:
            __chart__ = Chart(title="x", states=("a",), initial="a", finals=frozenset(), triggers=())

        assert diagram.draw(Own) == 'stateDiagram-v2\n    state "a" as state_0\n    [*] --> state_0\n'

    def test_mermaid_keywords_are_only_labels(self) -> None:
        names = "scale default click href accTitle accDescr Note Class root constructor toString __proto__ END".split()
        arrows = tuple(Arrow("on", one, other) for one, other in pairwise(names))
        chart = Chart(
            title="x", states=tuple(names), initial="scale", finals=frozenset({"END"}), triggers=("on",), arrows=arrows
        )
        drawn = diagram.mermaid(
            chart, highlight="click", path=(PathStep("on", "scale", "default", 1.0, 1),)
        ).splitlines()
        assert [line for line in drawn if line.startswith('    state "')] == [
            f'    state "{diagram.text.mermaid_text(name)}" as state_{at}' for at, name in enumerate(names)
        ]
        rest = "\n".join(line for line in drawn if not line.startswith('    state "'))
        assert not set(names) & set(re.findall(r"\w+", rest))


class TestNestedClientMachines:
    def test_states_inside_states_are_its_phases(self) -> None:
        chart = diagram.chart_of(Lift)
        assert chart.states == ("idle", "busy", "arrived", "end")
        assert chart.paths() == [
            "idle",
            "busy",
            "busy/waiting",
            "busy/moving",
            "busy/moving/up",
            "busy/moving/down",
            "busy/stuck",
            "arrived",
            "arrived/bell",
            "arrived/doors",
            "arrived/doors/shut",
            "arrived/doors/open",
            "end",
        ]

    def test_parallel_states_are_all_initial(self) -> None:
        begun = [inner.path for inner in diagram.chart_of(Lift).phases if inner.initial]
        assert begun == ["busy/waiting", "busy/moving/up", "arrived/bell", "arrived/doors", "arrived/doors/shut"]

    def test_arrows_have_full_paths(self) -> None:
        arrows = set(diagram.chart_of(Lift).arrows)
        assert {
            Arrow("turn", "busy/moving/up", "busy/moving/down"),
            Arrow("jam", "busy/moving", "busy/stuck", "is_old"),
            Arrow("arrive", "busy/moving/down", "arrived/doors/open"),
            Arrow("reset", "busy", "busy/waiting"),
        } <= arrows
        assert len(arrows) == 12
        assert diagram.chart_of(Lift).ignored == {("jam", "busy/stuck")}

    def test_auto_transitions_are_left_out(self) -> None:
        assert not [trigger for trigger in diagram.chart_of(Lift).triggers if trigger.startswith("to_")]

    def test_states_without_a_way_out_are_final(self) -> None:
        """And neither do the states that contain them; or they are marked as final."""
        assert diagram.chart_of(Lift).finals == {"busy/stuck", "end"}

    def test_mermaid_has_nested_blocks(self) -> None:
        drawn = str(diagram.draw(Lift))
        names = dict(re.findall(r'state "([^"(]+?)(?: \([^"]*\))?" as (\w+)', drawn))
        inner = block(drawn, names["moving"])
        assert f"{names['up']} --> {names['down']}: turn" in inner
        assert f"[*] --> {names['up']}" in inner
        assert set(inner) <= set(block(drawn, names["busy"]))
        assert f"{names['stuck']} --> [*]" in block(drawn, names["busy"])

    def test_mermaid_separates_parallel_states(self) -> None:
        drawn = str(diagram.draw(Lift))
        (name,) = re.findall(r'state "arrived" as (\w+)', drawn)
        regions = " ".join(block(drawn, name)).split(" -- ")
        assert [region.count('state "bell"') for region in regions] == [1, 0]
        assert all("[*] -->" in region for region in regions)

    def test_mermaid_draws_arrows_between_phases_at_their_states(self) -> None:
        """Mermaid has no arrows between them."""
        drawn = str(diagram.draw(Lift))
        (line,) = [line for line in drawn.splitlines() if ": arrive" in line]
        busy, arrived = (re.findall(rf'state "{name}[^"]*" as (\w+)', drawn)[0] for name in ("busy", "arrived"))
        assert line == f"    {busy} --> {arrived}: arrive from moving/down to doors/open"

    def test_mermaid_gives_phases_of_the_same_name_distinct_ids(self) -> None:
        chart = Chart(
            title="x",
            states=("idle", "running"),
            initial=None,
            finals=frozenset(),
            triggers=("go",),
            arrows=(Arrow("go", "idle/checking", "idle/checking"),),
            phases=(Inner("idle", "checking"), Inner("running", "checking")),
        )
        assert re.findall(r'state "checking" as (\w+)', diagram.mermaid(chart)) == ["state_1", "state_3"]

    def test_arrow_between_a_state_and_its_phase_is_in_words(self) -> None:
        chart = diagram.chart_of(Lift)
        assert chart.inner_moves("busy") == ["RESET → waiting", "moving: fall → busy"]
        assert chart.inner_moves("busy/moving") == ["go → moving"]
        assert {"RESET → waiting", "moving: fall → busy", "go → moving"} <= set(words(svg_of(Lift)))
        assert "RESET → waiting\\nmoving: fall → busy" in str(diagram.draw(Lift, "dot"))
        assert "(RESET #8594; waiting, moving#58; fall #8594; busy)" in str(diagram.draw(Lift))

    def test_transition_repeated_by_a_phase_is_drawn_once(self) -> None:
        assert words(svg_of(Lift)).count("stop") == 1
        assert "busy | waiting | `stop` | idle" in str(diagram.draw(Lift, "table"))

    def test_dot_parses_and_has_nested_clusters(self) -> None:
        graph = AGraph(string=str(diagram.draw(Lift, "dot")))
        (busy,) = [g for g in graph.subgraphs() if (g.graph_attr["label"] or "").startswith("busy")]
        assert [g.graph_attr["label"] for g in busy.subgraphs() if g.name] == ["moving\\ngo → moving"]
        assert graph.has_edge("busy/moving/down", "arrived/doors/open")

    def test_svg_connects_phases_of_two_states(self) -> None:
        ends = [(g.get("data-from"), g.get("data-to")) for g in groups(svg_of(Lift), "arrow")]
        assert ("busy/moving/down", "arrived/doors/open") in ends

    def test_nested_phase_is_highlighted_with_its_ancestors(self) -> None:
        root = svg_of(Lift, highlight="busy/moving/up")
        marked = [g.get("data-phase") or g.get("data-state") for g in groups(root, "current")]
        assert marked == ["busy", "busy/moving", "busy/moving/up"]

    def test_unknown_nested_phase_is_refused(self) -> None:
        with pytest.raises(DiagramError, match=r"^State 'busy/moving' has no phase 'left'; it has up, down\.$"):
            diagram.draw(Lift, highlight="busy/moving/left")

    def test_table_has_a_row_for_each_phase(self) -> None:
        rows = diagram.phase_rows(diagram.chart_of(Lift))
        assert rows[:3] == [
            ("busy", "waiting", "stop", "idle", ""),
            ("busy", "waiting", "go", "moving", ""),
            ("busy", "moving", "fall", "busy", ""),
        ]
        assert ("busy", "moving", "jam", "stuck [is_old]", "") in rows
        assert ("busy", "stuck", "jam", "–", "") in rows
        assert ("arrived", "bell", "", "", "") in rows

    def test_without_phases_arrows_lead_from_state_to_state(self) -> None:
        flat = diagram.chart_of(Lift).without_phases()
        assert flat.arrows == (
            Arrow("call", "idle", "busy"),
            Arrow("stop", "busy", "idle"),
            Arrow("arrive", "busy", "arrived"),
            Arrow("leave", "arrived", "end"),
        )
        assert flat.triggers == ("call", "stop", "arrive", "leave")

    def test_without_phases_leaves_a_flat_chart_unchanged(self) -> None:
        assert diagram.chart_of(Doors).without_phases() == diagram.chart_of(Doors)

    def test_states_of_nested_enums_have_their_names(self) -> None:
        class Inside(Enum):
            LEFT = 1
            RIGHT = 2

        class Outside(Enum):
            ON = Inside
            OFF = 3

        machine = HierarchicalMachine(states=Outside, initial=Outside.OFF)
        machine.add_transition("go", Outside.OFF, Inside.RIGHT)
        chart = diagram.chart_of(machine)
        assert (chart.initial, chart.arrows) == ("OFF", (Arrow("go", "OFF", "ON/RIGHT"),))

    def test_separator_of_the_machine_is_used(self) -> None:
        class Dotted(NestedState):
            separator = "."

        class Own(HierarchicalMachine):
            state_cls = Dotted

        machine = Own(
            states=["off_now", {"name": "on", "children": ["left", "right"]}],
            initial="on.left",
            transitions=[["go", "off_now", "on.right"]],
        )
        chart = diagram.chart_of(machine)
        assert (chart.initial, chart.arrows) == ("on/left", (Arrow("go", "off_now", "on/right"),))

    def test_machine_with_a_nested_initial_state_is_drawn(self) -> None:
        machine = HierarchicalMachine(states=[{"name": "on", "children": ["left", "right"]}], initial="on_right")
        assert diagram.chart_of(machine).initial == "on/right"
        assert "[*] --> state_0: to right" in str(diagram.draw(machine))
        assert AGraph(string=str(diagram.draw(machine, "dot"))).has_edge("[*]", "on/right")
        assert diagram.chart_of(machine).without_phases().initial == "on"

    def test_machine_inside_a_machine_is_drawn(self) -> None:
        inner = HierarchicalMachine(
            states=["a", "b", "done"], transitions=[["go", "a", "b"], ["go", "b", "done"]], initial="a"
        )
        outer = HierarchicalMachine(
            states=["off", {"name": "on", "children": inner, "remap": {"done": "off"}}],
            transitions=[["start", "off", "on"]],
            initial="off",
        )
        chart = diagram.chart_of(outer)
        assert chart.paths() == ["off", "on", "on/a", "on/b"]
        assert set(chart.arrows) == {
            Arrow("start", "off", "on"),
            Arrow("go", "on/a", "on/b"),
            Arrow("go", "on/b", "off"),
        }


class TestLoading:
    @pytest.fixture
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        monkeypatch.setattr(sys, "modules", dict(sys.modules))
        return tmp_path

    def test_target_names_a_class_of_an_importable_module(self, here: Path) -> None:
        (here / "client_a.py").write_text("from proxy_fsm import Proxy\nclass Mine:\n    class Inner(Proxy): pass\n")
        assert diagram.load("client_a:Mine.Inner").title == "Inner"
        path = [*sys.path]
        assert diagram.load("proxy_fsm:Proxy").title == "Proxy"
        assert sys.path == path

    @pytest.mark.parametrize("target", ["", "client", "client:", ":Class", "a b:C", "client.py:x-y", "a:b:c", "a..b:C"])
    def test_malformed_target_is_refused(self, target: str) -> None:
        with pytest.raises(DiagramError, match=r"write it as package\.module:Class"):
            diagram.load(target)

    def test_failed_import_is_reported(self, here: Path) -> None:
        (here / "client_b.py").write_text("import not_there_either")
        (here / "client_c.py").write_text("1 / 0")
        (here / "client_d.py").write_text("number = 1")
        (here / "client_e.py").write_text("import sys; sys.exit(3)")
        for target, message in (
            ("not_there:X", "no module not_there: install its package, or add its directory to PYTHONPATH"),
            ("client_d.below:X", "no module client_d.below"),
            ("client_b:X", "client_b cannot be imported: it needs not_there_either, which is missing"),
            ("client_c:X", "client_c cannot be imported: ZeroDivisionError: division by zero"),
            ("client_e:X", "client_e cannot be imported: SystemExit: 3"),
            ("client_d:X", "module client_d has no X"),
            ("client_d:number.y", "module client_d has no number.y"),
            ("client_d:number", "int is no state machine"),
        ):
            with pytest.raises(DiagramError, match=message):
                diagram.load(target)


class TestProxyDiagram:
    def test_chart_annotation_is_resolvable(self) -> None:
        assert get_type_hints(Proxy)["__chart__"] == ClassVar[Chart]

    def test_proxy_diagram_shows_state_and_way(self) -> None:
        proxy = FakedProxy()
        assert "class idle current" in str(proxy.diagram())
        proxy.lead_to(State.RUNNING)
        proxy.wait_running(timeout=5)
        history = proxy.status().history
        root = ET.fromstring(str(proxy.diagram("svg")))  # noqa: S314
        assert [g.get("data-state") for g in groups(root, "current") if g in [*groups(root, "state")]] == ["running"]
        assert len(list(groups(root, "taken"))) == 3
        names = [str(r.trigger).upper() if r.trigger.is_order else str(r.trigger) for r in history]
        said = {f"{r.sequence}. {name} after {r.elapsed_s:.3f} s" for r, name in zip(history, names, strict=True)}
        assert said <= set(words(root))
        assert proxy.id in (root.get("aria-label") or "")
        png = proxy.diagram("png", theme="dark")
        assert isinstance(png, bytes)
        assert Image.open(io.BytesIO(png)).convert("RGB").getpixel((3, 3)) == (13, 17, 23)
        proxy.close(timeout=10)
        assert "class stopped current" in str(proxy.diagram())
        assert json.loads(str(proxy.diagram("json")))["path"][-1]["dest"] == "stopped"

    def test_proxy_diagram_highlights_the_phase(self, monkeypatch: pytest.MonkeyPatch) -> None:
        proxy = FakedProxy()
        here = replace(proxy.status(), state=State.STOPPING, phase=Phase.DRAINING)
        monkeypatch.setattr(proxy, "status", lambda: here)
        assert json.loads(str(proxy.diagram("json")))["highlight"] == "stopping/draining"
        assert json.loads(str(proxy.diagram("json", phases=False)))["highlight"] == "stopping"


NAMES = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12),
    min_size=1,
    max_size=4,
    unique=True,
)


@given(states=NAMES, inner=NAMES, triggers=NAMES)
@example(states=["a", "a/b"], inner=["b", "%", '"', "x}"], triggers=["-->", "\n"])
def test_any_phase_name_is_safe_in_every_format(states: list[str], inner: list[str], triggers: list[str]) -> None:
    phases = tuple(Inner(states[0], name, name == inner[0]) for name in inner)
    paths = {each.path for each in phases}
    assume(not paths & set(states))
    arrows = tuple(Arrow(trigger, phases[0].path, phases[-1].path) for trigger in triggers)
    chart = Chart(
        title="x",
        states=tuple(states),
        initial=states[0],
        finals=frozenset(),
        triggers=tuple(triggers),
        arrows=(*arrows, Arrow(triggers[0], states[0], phases[0].path)),
        phases=phases,
    )
    highlight = phases[-1].path
    assert [each["name"] for each in json.loads(diagram.as_json(chart, highlight=highlight))["phases"]] == inner
    table = diagram.markdown_table(chart, highlight=highlight).split("\n\n")[1].splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {6}
    drawn = diagram.mermaid(chart, highlight=highlight)
    assert len(drawn.splitlines()) == drawn.count("\n")
    assert len(re.findall(r"^    state \w+ \{$", drawn, re.MULTILINE)) == drawn.count("\n    }\n") == 1
    assert len(AGraph(string=diagram.dot(chart, highlight=highlight)).nodes()) == len(states) - 1 + len(inner) + 2
    root = svg_of(chart, highlight=highlight)
    assert [g.get("data-phase") for g in groups(root, "phase")] == [scene.legal(each.path) for each in phases]


@given(states=NAMES, triggers=NAMES)
@example(states=["state_1", "x y", "[*]", "note 0", "%", "end"], triggers=['a"b', "\\", "a\nb"])
def test_any_name_is_safe_in_every_format(states: list[str], triggers: list[str]) -> None:
    """Names are the client's own, and may contain what is special to a format."""
    arrows = tuple(Arrow(trigger, states[0], states[-1]) for trigger in triggers)
    chart = Chart(
        title=triggers[0],
        states=tuple(states),
        initial=states[0],
        finals=frozenset(states[1:]),
        triggers=tuple(triggers),
        orders=frozenset(triggers[:1]),
        arrows=arrows,
        notes=((states[0], (triggers[-1],)),),
    )
    whole = json.loads(diagram.as_json(chart))
    assert [state["name"] for state in whole["states"]] == states
    table = diagram.markdown_table(chart).split("\n\n")[0].splitlines()
    assert len(table) == 2 + len(triggers)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {len(states) + 2}
    drawn = diagram.mermaid(chart, highlight=states[0])
    assert len(drawn.splitlines()) == drawn.count("\n")
    assert drawn.count("-->") == 1 + 1 + len(states[1:])
    assert len(set(re.findall(r"^    (\w+) --> \[\*\]$", drawn, re.MULTILINE))) == len(states[1:])
    assert len(AGraph(string=diagram.dot(chart)).nodes()) == len(states) + 2
    root = svg_of(chart)
    assert [group.get("data-state") for group in groups(root, "state")] == [scene.legal(s) for s in states]
