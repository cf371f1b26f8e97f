"""Pictures are what the code says, the same bytes everywhere, and readable in light and dark."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from enum import Enum
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from pygraphviz import AGraph  # type: ignore[import-untyped]
from transitions import Machine
from transitions.extensions import HierarchicalMachine

from proxy_fsm import Backend, CommandBackend, EndReason, Lifecycle, NX3Backend, Proxy, State, Trigger, diagram, scene
from proxy_fsm.diagram import Arrow, Chart, DiagramError, Step
from proxy_fsm.diagram.layout import chart_scene
from proxy_fsm.scene import Box, Text, width_of
from proxy_fsm.states import TRANSITIONS
from proxy_fsm.testing import FakedProxy

from . import pictures
from .helpers.imports import imports_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy_fsm import Evidence

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"
WAY = (Step("start", "idle", "tunnelling", 1.25, 1), Step("tunnel_opened", "tunnelling", "spawning", 0.0123, 2))
CHANGES = {(str(r.source), str(r.dest), str(r.trigger)) for r in TRANSITIONS if r.dest is not None}


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


class TestWhatIsCommitted:
    @pytest.mark.parametrize("name", pictures.PICTURES)
    def test_is_up_to_date(self, name: str) -> None:
        """``make diagrams`` brings it up to date."""
        assert pictures.is_same((ROOT / name).read_bytes(), pictures.PICTURES[name]()), f"{name}: make diagrams"

    def test_is_written_and_checked(
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

    def test_pictures_that_differ_are_told_apart(self) -> None:
        light, dark = (diagram.draw(format="png", theme=theme) for theme in ("light", "dark"))
        here = diagram.draw(format="png", highlight="idle")
        assert isinstance(light, bytes)
        assert pictures.is_same(light, light)
        assert not pictures.is_same(light, dark)
        assert not pictures.is_same(light, here)
        assert not pictures.is_same(b"no picture", light)

    def test_the_readme_shows_the_diagram_and_every_reason_with_its_exit_status(self) -> None:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        assert "](diagrams/lifecycle.svg)" in readme
        rows = [line for line in readme.splitlines() if line.startswith("| `")]
        for reason in EndReason:
            assert any(f"`{reason}`" in row and f"| {reason.cli_status} |" in row for row in rows), reason
        for state in State:
            assert any(row.startswith(f"| `{state}` |") for row in rows), state

    def test_the_module_map_has_every_module_and_reaches_every_import(self) -> None:
        whole = pictures.module_map()
        assert {"lifecycle", "engine", "proxy", "cli", "diagram", "timeline"} <= set(whole)
        assert "lifecycle" in whole["engine"]
        assert imports_of(pictures.PACKAGE / "journal.py") <= whole["journal"]
        few = {name: set(used) for name, used in pictures.reduced(whole).items()}

        def reached(name: str) -> set[str]:
            return few[name].union(*(reached(each) for each in few[name]))

        for name, used in whole.items():
            assert used <= reached(name), name
        assert sum(map(len, few.values())) < sum(map(len, whole.values())) / 2


class TestTheLifecycle:
    def test_mermaid_has_each_change_of_the_table_once_and_no_other(self) -> None:
        drawn = [
            (source.strip(), dest.strip(), label.strip().lower())
            for line in diagram.mermaid().splitlines()
            if ":" in line
            for source, dest, labels in [line.replace("-->", ":").split(":")]
            for label in labels.split(",")
        ]
        assert set(drawn) == CHANGES
        assert len(drawn) == len(CHANGES)

    def test_mermaid_tells_orders_apart_and_marks_final_states(self) -> None:
        drawn = diagram.mermaid()
        assert "idle --> tunnelling: START" in drawn
        assert "tunnelling --> spawning: tunnel_opened" in drawn
        assert [line.split()[0] for line in drawn.splitlines() if line.endswith("--> [*]")] == ["stopped", "failed"]

    def test_the_table_has_every_cell(self) -> None:
        rows = [line.strip("| ").split(" | ") for line in diagram.markdown_table().splitlines()]
        assert rows[0] == ["trigger", *State]
        assert rows[2] == ["`start`", "tunnelling", "·", "·", "·", "·", "·", "·"]
        assert rows[3] == ["`stop`", "stopped", "stopping", "stopping", "stopping", "–", "–", "–"]
        assert len(rows) == 2 + 8

    def test_json_says_all_of_it(self) -> None:
        whole = json.loads(diagram.as_json(highlight="running", way=WAY))
        assert [state["name"] for state in whole["states"]] == list(State)
        assert [state["name"] for state in whole["states"] if state["final"]] == ["stopped", "failed"]
        assert [state["name"] for state in whole["states"] if state["initial"]] == ["idle"]
        assert {t["name"] for t in whole["triggers"] if t["kind"] == "order"} == {"start", "stop"}
        rows = {(row["trigger"], row["source"], row["dest"]) for row in whole["transitions"]}
        assert rows == {(str(r.trigger), str(r.source), r.dest and str(r.dest)) for r in TRANSITIONS}
        assert whole["highlight"] == "running"
        assert whole["way"][1] == {
            "trigger": "tunnel_opened",
            "source": "tunnelling",
            "dest": "spawning",
            "elapsed_s": 0.0123,
            "number": 2,
        }

    def test_dot_is_read_by_graphviz_and_has_each_change(self) -> None:
        graph = AGraph(string=diagram.dot(highlight="running", way=WAY, theme="dark"))
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

    def test_svg_has_each_state_and_each_change(self) -> None:
        root = svg_of()
        assert [group.get("data-state") for group in groups(root, "state")] == list(State)
        drawn = {
            (group.get("data-from"), group.get("data-to"), (text.text or "").lower())
            for group in groups(root, "arrow-label")
            for text in group.iter(f"{SVG}text")
        }
        assert drawn == CHANGES
        framed = {g.get("data-state") for g in groups(root, "state") if any(r.get("class") == "frame" for r in g)}
        assert framed == {"stopped", "failed"}

    def test_svg_tells_orders_apart_in_words_and_in_looks(self) -> None:
        kinds = {text.text: text.get("class") for text in svg_of().iter(f"{SVG}text")}
        assert (kinds["START"], kinds["tunnel_opened"]) == ("order", "observation")
        assert any("CAPITALS" in line for line in words(svg_of()))

    def test_the_place_where_it_stands_and_the_way_there_are_shown(self) -> None:
        root = svg_of(highlight="spawning", way=WAY)
        assert [group.get("data-state") for group in groups(root, "current")] == ["spawning"]
        assert [group.get("data-state") for group in groups(root, "visited")] == ["idle", "tunnelling", "spawning"]
        assert [(g.get("data-from"), g.get("data-to")) for g in groups(root, "taken")] == [
            ("idle", "tunnelling"),
            ("tunnelling", "spawning"),
        ]
        kinds = {text.text: text.get("class") for text in root.iter(f"{SVG}text")}
        assert kinds["1. START after 1.250 s"] == kinds["2. tunnel_opened after 0.012 s"] == "time"
        drawn = diagram.mermaid(highlight="spawning", way=WAY)
        assert "idle --> tunnelling: START, 1. START after 1.250 s\n" in drawn
        assert "tunnelling --> spawning: tunnel_opened, 2. tunnel_opened after 0.012 s\n" in drawn
        assert "class spawning current" in drawn
        assert "class idle,tunnelling visited" in drawn

    def test_the_table_points_at_a_column(self) -> None:
        row = diagram.markdown_table(highlight="running").splitlines()[3]
        assert row == "| `stop` | stopped | stopping | stopping | **stopping** | – | – | – |"

    def test_of_several_triggers_the_one_that_was_taken_is_said(self) -> None:
        """Three lead from running to stopping: an order, and two observations, one of them a fault."""
        way = (Step("fault_found", "running", "stopping", 2.161, 4),)
        said = "4. fault_found after 2.161 s"
        kinds = {text.text: text.get("class") for text in svg_of(way=way).iter(f"{SVG}text")}
        assert kinds[said] == "time"
        light = scene.rules("light")
        assert light["", "time"] not in (light["", "order"], light["", "observation"])
        assert f"running --> stopping: session_ended, fault_found, STOP, {said}\n" in diagram.mermaid(way=way)
        assert said in diagram.dot(way=way)

    @pytest.mark.parametrize("picture", diagram.FORMATS)
    def test_a_state_that_is_not_there_is_told(self, picture: diagram.Format) -> None:
        with pytest.raises(DiagramError, match=r"no state 'gone'; it has idle, .*failed\."):
            diagram.draw(format=picture, highlight="gone")

    def test_a_format_that_is_not_there_is_told(self) -> None:
        with pytest.raises(DiagramError, match="no format 'gif'; there are mermaid, dot"):
            diagram.draw(format="gif")  # type: ignore[arg-type]


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


#: What the eye's receptors get of linear red, green and blue where one of the three kinds is missing.
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
    """Return where a colour lies in CIELAB, with the white of sRGB (D65), as it is seen."""
    rgb = linear(colour)
    rgb = [min(max(sum(a * b for a, b in zip(row, rgb, strict=True)), 0.0), 1.0) for row in VISIONS[vision]]
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    x, y, z = (
        share ** (1 / 3) if share > 0.008856 else 7.787 * share + 16 / 116
        for share in (sum(a * b for a, b in zip(row, rgb, strict=True)) / sum(row) for row in to_xyz)
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


class TestLooks:
    @pytest.mark.parametrize("vision", VISIONS)
    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_colours_can_be_told_apart_by_whoever_looks(self, theme: diagram.Theme, vision: str) -> None:
        """CIE 1976: a difference of 2.3 is just seen where two colours touch; these lie apart, and may be thin."""
        rules = scene.rules(theme)
        states = [f"is-{state}" for state in State]
        for one, other in [*combinations(states, 2), ("flow-to", "flow-from")]:
            spots = [seen(rules["", kind]["fill"], vision) for kind in (one, other)]
            assert math.dist(*spots) >= 19, (one, other)

    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_words_stand_out_from_their_ground(self, theme: diagram.Theme) -> None:
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

    def test_svg_follows_whoever_looks_unless_told(self) -> None:
        both, light, dark = (diagram.draw(format="svg", theme=theme) for theme in (None, "light", "dark"))
        assert "prefers-color-scheme: dark" in str(both)
        assert "prefers-color-scheme" not in str(light) + str(dark)
        assert light != dark

    def test_mermaid_s_theme_is_set_when_told(self) -> None:
        assert "theme" not in diagram.mermaid()
        assert diagram.mermaid(theme="dark").startswith('%%{init: {"theme": "dark"}}%%\nstateDiagram-v2\n')
        assert diagram.mermaid(theme="light").startswith('%%{init: {"theme": "default"}}%%\n')

    def test_png_is_light_or_dark_and_points_at_a_state(self) -> None:
        assert png_of().getpixel((3, 3)) == (255, 255, 255)
        assert png_of(theme="dark").getpixel((3, 3)) == (13, 17, 23)
        yellow = (255, 211, 61)
        found = [dict((c, n) for n, c in p.getcolors(1 << 20) or []) for p in (png_of(), png_of(highlight="idle"))]  # noqa: C402
        assert yellow not in found[0]
        assert found[1][yellow] > 1000

    @pytest.mark.parametrize("way", [(), WAY])
    def test_the_main_story_is_one_straight_column(self, way: tuple[Step, ...]) -> None:
        middles = {
            group.get("data-state"): float(box.get("x", 0)) + float(box.get("width", 0)) / 2
            for group in groups(svg_of(way=way), "state")
            for box in group.iter(f"{SVG}rect")
            if box.get("class") == "box"
        }
        main = [middles[str(state)] for state in State if state is not State.FAILED]
        assert main == pytest.approx([main[0]] * 6, abs=0.02)

    def test_no_label_lies_on_a_state_or_on_another_label(self) -> None:
        """Judged by the estimated widths, which are those of a wide font."""
        for thing in (diagram.LIFECYCLE, NX3Backend):
            whole = chart_scene(diagram.chart_of(thing), highlight="running", way=WAY)
            boxes = [(i.x, i.y, i.width, i.height) for g in whole.groups for i in g.items if isinstance(i, Box)]
            boxes = [box for box in boxes if box[2] > 12]
            lines = [i for g in whole.groups if "arrow-label" in g.classes for i in g.items if isinstance(i, Text)]
            spots = [(t.x - (w := width_of(t.words, t.size)) / 2, t.y - t.size * 0.75, w, t.size * 0.95) for t in lines]
            for at, one in enumerate(spots):
                assert one[0] >= 0
                assert one[0] + one[2] <= whole.width
                for other in boxes + spots[at + 1 :]:
                    apart = (
                        one[0] + one[2] <= other[0]
                        or other[0] + other[2] <= one[0]
                        or one[1] + one[3] <= other[1]
                        or other[1] + other[3] <= one[1]
                    )
                    assert apart, (lines[at].words, one, other)


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


def test_the_bytes_are_the_same_with_other_fonts_hashes_and_languages(tmp_path: Path) -> None:
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


def test_without_the_extra_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
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
    """A client's machine that is no proxy, with names that need care."""

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
    """Holds its machine, whose states are an enum's."""

    def __init__(self, begin: Colour = Colour.RED) -> None:
        self.machine = Machine(self, states=Colour, initial=begin, auto_transitions=False)
        self.machine.add_transition("next", Colour.RED, Colour.GREEN, conditions=[lambda: True])


class NeedsMuch(Machine):
    def __init__(self, much: int) -> None:
        super().__init__(states=[str(much)])


class SlowerLifecycle(Lifecycle):
    """A client's subclass with a transition of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.machine.add_transition("stop", "stopped", "failed")


class OwnProxy(Proxy):
    """A client's proxy."""


class OwnBackend(CommandBackend):
    """Knows what to make of exit code 7."""

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


class TestMachinesOfClients:
    def test_a_machine_of_its_own(self) -> None:
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

    def test_one_that_is_held_and_its_states_an_enum_s(self) -> None:
        for thing in (Light, Light(), Light().machine):
            chart = diagram.chart_of(thing)
            assert chart.states == ("RED", "GREEN")
            assert chart.initial == "RED"
            assert chart.finals == {"GREEN"}
            assert chart.arrows == (Arrow("next", "RED", "GREEN", "<lambda>"),)
            assert not chart.orders
        assert not any("CAPITALS" in line for line in words(svg_of(Light)))
        assert json.loads(str(diagram.draw(Light, "json")))["triggers"] == [{"name": "next", "kind": "observation"}]

    def test_one_that_begins_nowhere_has_no_beginning(self) -> None:
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

    def test_a_subclass_of_lifecycle_with_a_change_of_its_own(self) -> None:
        assert "stopped --> failed: STOP" in str(diagram.draw(SlowerLifecycle))
        assert diagram.chart_of(SlowerLifecycle).triggers == tuple(map(str, Trigger))
        assert diagram.chart_of(SlowerLifecycle).finals == {"failed"}

    def test_a_subclass_of_proxy_is_drawn_under_its_own_name(self) -> None:
        chart = diagram.chart_of(OwnProxy)
        assert (chart.title, chart.arrows) == ("OwnProxy", diagram.LIFECYCLE.arrows)

    def test_a_backend_s_own_knowledge_is_in_notes(self) -> None:
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

    def test_what_cannot_be_drawn_is_told(self) -> None:
        nested = HierarchicalMachine(states=[{"name": "a", "children": ["b"]}, "c"], initial="c")
        for thing, message in (
            (int, "int is no state machine"),
            (NeedsMuch, "NeedsMuch cannot be made without arguments.*missing 1 required.* Give it a __chart__"),
            (nested, "states within states"),
        ):
            with pytest.raises(DiagramError, match=message):
                diagram.chart_of(thing)

    def test_a_class_may_bring_its_chart(self) -> None:
        class Own:
            __chart__ = Chart(title="x", states=("a",), initial="a", finals=frozenset(), triggers=())

        assert diagram.draw(Own) == 'stateDiagram-v2\n    state "a" as state_0\n    [*] --> state_0\n'

    def test_names_that_mean_something_to_mermaid_are_only_shown(self) -> None:
        names = "scale default click href accTitle accDescr Note Class root constructor toString __proto__ END".split()
        arrows = tuple(Arrow("on", one, other) for one, other in pairwise(names))
        chart = Chart(
            title="x", states=tuple(names), initial="scale", finals=frozenset({"END"}), triggers=("on",), arrows=arrows
        )
        drawn = diagram.mermaid(chart, highlight="click", way=(Step("on", "scale", "default", 1.0, 1),)).splitlines()
        assert [line for line in drawn if line.startswith('    state "')] == [
            f'    state "{diagram.text.mermaid_text(name)}" as state_{at}' for at, name in enumerate(names)
        ]
        rest = "\n".join(line for line in drawn if not line.startswith('    state "'))
        assert not set(names) & set(re.findall(r"\w+", rest))


class TestLoading:
    @pytest.fixture
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        monkeypatch.setattr(sys, "modules", dict(sys.modules))
        return tmp_path

    def test_names_a_class_of_a_module_that_can_be_imported(self, here: Path) -> None:
        (here / "client_a.py").write_text("from proxy_fsm import Proxy\nclass Mine:\n    class Inner(Proxy): pass\n")
        assert diagram.load("client_a:Mine.Inner").title == "Inner"
        path = [*sys.path]
        assert diagram.load("proxy_fsm:Proxy").title == "Proxy"
        assert sys.path == path

    @pytest.mark.parametrize("target", ["", "client", "client:", ":Class", "a b:C", "client.py:x-y", "a:b:c", "a..b:C"])
    def test_a_target_that_names_no_class_is_told(self, target: str) -> None:
        with pytest.raises(DiagramError, match=r"write it as package\.module:Class"):
            diagram.load(target)

    def test_what_cannot_be_imported_is_told(self, here: Path) -> None:
        (here / "client_b.py").write_text("import not_there_either")
        (here / "client_c.py").write_text("1 / 0")
        (here / "client_d.py").write_text("number = 1")
        (here / "client_e.py").write_text("import sys; sys.exit(3)")
        for target, message in (
            ("not_there:X", "no module not_there: install its package, or make the directory it is in known"),
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


class TestALivePicture:
    def test_its_name_hides_nothing_from_tools_that_read_annotations(self) -> None:
        assert get_type_hints(Proxy)["__chart__"] == ClassVar[Chart]

    def test_shows_where_a_proxy_stands_and_how_it_came_there(self) -> None:
        proxy = FakedProxy()
        assert "class idle current" in str(proxy.diagram())
        proxy.lead_to(State.RUNNING)
        proxy.wait_running(timeout=5)
        history = proxy.status().history
        root = ET.fromstring(str(proxy.diagram("svg")))  # noqa: S314
        assert [group.get("data-state") for group in groups(root, "current")] == ["running"]
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
        assert json.loads(str(proxy.diagram("json")))["way"][-1]["dest"] == "stopped"


NAMES = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12),
    min_size=1,
    max_size=4,
    unique=True,
)


@given(states=NAMES, triggers=NAMES)
@example(states=["state_1", "x y", "[*]", "note 0", "%", "end"], triggers=['a"b', "\\", "a\nb"])
def test_any_name_gets_through_every_format(states: list[str], triggers: list[str]) -> None:
    """A name is a client's own, and may hold what means something to a format."""
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
