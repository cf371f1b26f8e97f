"""The output of `make soak` has the format of the table in docs/survival.md."""

from __future__ import annotations

from pathlib import Path

from tests.soak.__main__ import table
from tests.soak.runs import Figures, format_size

PAGE = Path(__file__).parents[2] / "docs" / "survival.md"
CARRIED = Figures("2 GiB each way, `RekeyLimit 64M`", 16.2, 1, 1 << 31, 1 << 31, 0, 44, 13, 0.6)
PROBED = Figures("requests while probed", seconds=93.84, commands=334, requests=1002, probes=1486)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_columns_match_the_page() -> None:
    head, rule, *_ = table([]).splitlines()
    assert f"{head}\n{rule}\n" in PAGE.read_text()


def test_missing_figures_are_blank_and_not_zero() -> None:
    _, _, carried, probed = table([CARRIED, PROBED]).splitlines()
    assert probed.endswith("| 93.8 | | | | | | 334 | | 1002 | 1486 |")
    assert cells(carried)[1:] == ["16.2", "1", "2048.0", "2048.0", "0", "44", "13", "0.6", "", ""]
    assert cells(probed)[1:] == ["93.8", "", "", "", "", "", "334", "", "1002", "1486"]


def test_page_has_the_same_blanks() -> None:
    rows = [cells(line) for line in PAGE.read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 6
    for row in rows:
        printed = cells(table([PROBED if row[0].startswith("requests") else CARRIED]).splitlines()[2])
        assert [cell == "" for cell in row] == [cell == "" for cell in printed]


def test_sizes_are_formatted_as_on_the_page() -> None:
    assert (format_size(2 << 30), format_size(96 << 20)) == ("2 GiB", "96 MiB")
