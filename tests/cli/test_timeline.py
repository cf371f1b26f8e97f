"""``proxy-fsm timeline``: draws the records of ``demo`` and ``run``, and reports where a record is broken."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from proxy_fsm import timeline

from .program import run, started

if TYPE_CHECKING:
    from .program import Home

RECORDED = Path(__file__).parents[2] / "diagrams" / "runs" / "fault.jsonl"


@pytest.mark.parametrize("ending", ["svg", "html", "mmd", "png"])
def test_output_format_follows_suffix(home: Home, ending: str) -> None:
    shutil.copy(RECORDED, home.path / "run.jsonl")
    program = run(home, "timeline", "run.jsonl", "-o", f"run.{ending}", "--log-format", "json")
    assert program.process.returncode == 0
    assert program.errors == ""
    drawn = (home.path / f"run.{ending}").read_bytes()
    assert [(each["event"], each["size_bytes"]) for each in program.events] == [("picture.drawn", len(drawn))]
    with RECORDED.open("rb") as lines:
        if ending != "png":
            picture: timeline.Format = "mermaid" if ending == "mmd" else ending  # type: ignore[assignment]
            assert drawn.decode() == timeline.draw(timeline.read(lines), picture)
        else:
            assert drawn.startswith(b"\x89PNG")


def test_record_of_a_demo_is_drawn(home: Home) -> None:
    with started(home, "demo", "--stand-ins", "--seconds", "30", "--log-format", "json") as demo:
        demo.until(lambda _: "running" in demo.states and demo.named("tunnel.stats"))
        demo.process.terminate()
        assert demo.finish() == 0
    program = run(home, "timeline", "demo-output/events.jsonl", "-o", "run.svg")
    assert program.errors == ""
    assert program.process.returncode == 0
    drawn = (home.path / "run.svg").read_text()
    assert "stopped: stop_requested" in drawn
    assert 'class="flow-from"' in drawn


def test_record_is_not_overwritten(home: Home) -> None:
    shutil.copy(RECORDED, home.path / "run.svg")
    (home.path / "link.svg").symlink_to("run.svg")
    for output in ("run.svg", "./run.svg", "link.svg"):
        program = run(home, "timeline", "run.svg", "-o", output)
        assert program.process.returncode == 2
        assert "is the record itself" in program.errors
    assert (home.path / "run.svg").read_bytes() == RECORDED.read_bytes()


@pytest.mark.parametrize("ending", ["svg", "mmd", "png"])
def test_sequence_option_draws_sequence_diagram(home: Home, ending: str) -> None:
    shutil.copy(RECORDED, home.path / "run.jsonl")
    program = run(home, "timeline", "run.jsonl", "-o", f"who.{ending}", "--sequence", "--theme", "dark")
    assert program.process.returncode == (2 if ending == "mmd" else 0)  # Mermaid takes no theme
    program = run(home, "timeline", "run.jsonl", "-o", f"who.{ending}", "--sequence")
    assert (program.process.returncode, program.errors) == (0, "")
    drawn = (home.path / f"who.{ending}").read_bytes()
    assert drawn.startswith(b"\x89PNG") or b"open channel" in drawn


def test_theme_for_html_is_usage_error(home: Home) -> None:
    shutil.copy(RECORDED, home.path / "run.jsonl")
    program = run(home, "timeline", "run.jsonl", "-o", "x.html", "--theme", "dark")
    assert program.process.returncode == 2
    assert "leave the theme out" in program.errors
    assert not (home.path / "x.html").exists()


@pytest.mark.parametrize(
    ("content", "output", "message"),
    [
        (RECORDED.read_bytes()[:700], "x.svg", "run.jsonl, line 4 is cut short: remove that line"),
        (b"nonsense\n", "x.html", "run.jsonl, line 1 is no JSON"),
        (b"", "x.png", "run.jsonl tells of no change of state"),
        (RECORDED.read_bytes(), "x.gif", "x.gif ends in none of .svg, .png, .html, .mmd"),
        (RECORDED.read_bytes(), "no/x.svg", "no/x.svg cannot be written to: No such file"),
        (None, "x.svg", "run.jsonl cannot be read: No such file"),
    ],
)
def test_undrawable_record_is_usage_error(home: Home, content: bytes | None, output: str, message: str) -> None:
    if content is not None:
        (home.path / "run.jsonl").write_bytes(content)
    program = run(home, "timeline", "run.jsonl", "-o", output)
    assert program.process.returncode == 2
    assert message in program.errors
    assert "Traceback" not in program.errors
    assert not (home.path / output).exists()
