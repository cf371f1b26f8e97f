"""The pictures are what the table says, and the committed ones are up to date."""

from __future__ import annotations

from pathlib import Path

from proxy_fsm import diagram
from proxy_fsm.lifecycle import TRANSITIONS, State
from proxy_fsm.status import EndReason

COMMITTED = Path(__file__).parent.parent / "diagrams"


def test_committed_pictures_are_up_to_date() -> None:
    """``make diagrams`` brings them up to date."""
    for name, draw in diagram.PICTURES.items():
        assert (COMMITTED / name).read_text(encoding="utf-8") == draw(), name
    assert diagram.main([str(COMMITTED), "--check"]) == 0


def test_the_state_diagram_has_each_change_of_the_table_once_and_no_other() -> None:
    drawn = {
        (source, dest, label.strip().lower())
        for line in diagram.mermaid().splitlines()
        if ":" in line
        for source, dest, labels in [line.replace("-->", ":").strip().split(":")]
        for label in labels.split(",")
        for source, dest in [(source.strip(), dest.strip())]
    }
    assert drawn == {(str(r.source), str(r.dest), str(r.trigger)) for r in TRANSITIONS if r.dest is not None}


def test_orders_are_told_apart_and_final_states_are_marked() -> None:
    drawn = diagram.mermaid()
    assert "idle --> tunnelling: START" in drawn
    assert "tunnelling --> spawning: tunnel_opened" in drawn
    assert [line.split()[0] for line in drawn.splitlines() if line.endswith("--> [*]")] == ["stopped", "failed"]


def test_the_table_has_every_cell() -> None:
    rows = [line.strip("| ").split(" | ") for line in diagram.markdown_table().splitlines()]
    assert rows[0] == ["trigger", *State]
    assert rows[2] == ["`start`", "tunnelling", "·", "·", "·", "·", "·", "·"]
    assert rows[3] == ["`stop`", "stopped", "stopping", "stopping", "stopping", "–", "–", "–"]
    assert len(rows) == 2 + 8


def test_main_writes_and_checks(tmp_path: Path) -> None:
    target = tmp_path / "pictures"
    assert diagram.main([str(target), "--check"]) == 1
    assert not target.exists()
    assert diagram.main([str(target)]) == 0
    assert diagram.main([str(target), "--check"]) == 0
    (target / "lifecycle.mmd").write_text("stale")
    assert diagram.main([str(target), "--check"]) == 1


def test_the_readme_shows_the_diagram_and_every_reason_with_its_exit_status() -> None:
    readme = (COMMITTED.parent / "README.md").read_text(encoding="utf-8")
    assert f"```mermaid\n{diagram.mermaid()}```" in readme
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    for reason in EndReason:
        assert any(f"`{reason}`" in row and f"| {reason.cli_status} |" in row for row in rows), reason
    for state in State:
        assert any(row.startswith(f"| `{state}` |") for row in rows), state
