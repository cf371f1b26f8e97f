"""Makes docs/faults.md of the fault matrix and of what was measured of it.

``python -m tests.e2e.fault_table`` writes it anew from docs/faults.json; with ``--measure`` the matrix is run first,
three times, and docs/faults.json is written anew too; ``--merge`` does that from runs that were recorded before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .faults import CAUSES, FAULTS, MISHAPS, Fault, When

ROOT = Path(__file__).parents[2]
JSON, MARKDOWN = ROOT / "docs/faults.json", ROOT / "docs/faults.md"
RUNS = 3
TIMES = ("sign_to_stopping", "cause_to_stopping", "cause_to_final", "cause_to_told")
DEBIAN = ("openssh-server", "x2goserver", "nxagent", "nxproxy", "xvfb")
NOT_MEASURED = "not measured"
INTRO = """\
# What can go wrong, and what a proxy then says

<!-- Made by tests/e2e/fault_table.py of tests/e2e/faults.py and docs/faults.json: do not edit. -->

Each fault below is caused for real, against sshd, x2goserver with nxagent, nxproxy and Xvfb, by
`tests/e2e/test_faults.py`. It holds each row to its reason, detail and hint, to the times of the design (50 ms from
the first sign to `stopping`; to the final state 100 ms where the proxy is dead or the transport gone, else 20 ms from
the proxy's exit; 400 ms more are allowed to a busy machine), and to this: afterwards nothing is left in the process
(threads, descriptors, children, zombies, channels), of the proxy program (its process session) and on disk (sockets;
in the session root all but `session.log` and nxproxy's own `stats` and `errors`). Then the cause is put right, a
suspended session is resumed, and a second attempt is made: `retryable` is true only where that runs, false only where
it cannot, and `–` where only the server knows.

Times are the median of {runs} runs, with the longest in brackets. *Stopping* counts from the first sign of the fault
on this side, *final* from the cause itself: it holds the time that nxproxy takes to exit, or the server to notice.
The column python-x2go says what python-x2go 0.6.1.3 reported of the same fault, and after how long, measured by hand on
a machine of the same kind.

Measured on {date} with `proxy_fsm/` as of tree `{tree}` (`git rev-parse HEAD:proxy_fsm`): {machine}; {versions}.
Other work kept the machine busy meanwhile, which the longest times show. To repeat it, as root on Debian: `make
faults` (some minutes). What two engines on one transport do when one of them fails, and any viewer, is in
`tests/e2e/test_session.py`.
"""
HEAD = """\
| cause | reason | what its user reads | stopping | final | retryable → a second attempt | python-x2go |
|---|---|---|---|---|---|---|
"""
SURVIVED = """\
## What a session survives

The session goes on, paints, and is stopped in order afterwards.

| cause | event | and when it is over | told after | python-x2go |
|---|---|---|---|---|
"""


def rendered(measured: dict[str, Any]) -> str:
    """Give docs/faults.md for the rows of the table and for what docs/faults.json holds."""
    rows = {row["cause"]: row for row in measured["rows"]}
    text = INTRO.format(**measured["measured"])
    for when in When:
        lines = [_line(fault, rows[fault.cause]) for fault in FAULTS if fault.when is when]
        text += f"\n## {str(when).capitalize()}\n\n{HEAD}{''.join(lines)}"
    text += f"\n{SURVIVED}"
    for mishap in MISHAPS:
        cells = [mishap.cause, _code(mishap.told), _code(mishap.then) if mishap.then else "–"]
        text += _cells([*cells, _time(rows[mishap.cause], "cause_to_told"), mishap.python_x2go or NOT_MEASURED])
    return text


def _line(fault: Fault, row: dict[str, Any]) -> str:
    retryable = {True: "yes", False: "no", None: "–"}[row["retryable"]]
    final = _time(row, "cause_to_final") + (f"; {fault.note}" if fault.note else "")
    return _cells(
        [
            fault.cause,
            _code(row["reason"]),
            row["detail"] + (f" *{row['hint']}*" if row["hint"] else ""),
            _time(row, "sign_to_stopping"),
            final,
            f"{retryable} → {'runs' if row['again'] else 'cannot run'}",
            fault.python_x2go or NOT_MEASURED,
        ]
    )


def _cells(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _code(text: str) -> str:
    return f"`{text}`"


def _time(row: dict[str, Any], name: str) -> str:
    median, longest = row[f"{name}_ms"]["median"], row[f"{name}_ms"]["max"]
    return f"{median / 1000:.2f} s ({longest / 1000:.2f})" if median >= 1000 else f"{median:.0f} ms ({longest:.0f})"


def merged(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Merge the rows of several runs; what was said is that of the last one.

    Raises:
        ValueError: They differ in what must not, or a row is missing.
    """
    result = []
    for cause in CAUSES:
        rows = [row for run in runs for row in run if row["cause"] == cause]
        if len(rows) != len(runs):
            raise ValueError(f"{cause}: {len(rows)} rows in {len(runs)} runs")
        for key in ("reason", "retryable", "again"):
            if len({row.get(key) for row in rows}) != 1:
                raise ValueError(f"{cause}: {key} differs: {[row.get(key) for row in rows]}")
        whole = {key: value for key, value in rows[-1].items() if not key.endswith("_s")}
        for name in TIMES:
            if values := [row[f"{name}_s"] * 1000 for row in rows if f"{name}_s" in row]:
                whole[f"{name}_ms"] = {"median": round(statistics.median(values), 1), "max": round(max(values), 1)}
        result.append(whole)
    return result


def run_once(record: Path) -> None:
    """Run the matrix, and keep its rows."""
    environ = {**os.environ, "PROXY_FSM_RECORD_FAULTS": str(record), "PROXY_FSM_REQUIRE_REAL": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "tests/e2e/test_faults.py"]
    subprocess.run(command, cwd=ROOT, env=environ, check=True)


def recorded(record: Path) -> list[dict[str, Any]]:
    """Read the rows of a run."""
    return [json.loads(line) for line in record.read_text().splitlines()]


def merge(records: list[Path]) -> None:
    """Write docs/faults.json."""
    measured = {
        "measured": {**surroundings(), "runs": len(records)},
        "rows": merged([recorded(record) for record in records]),
    }
    JSON.write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n")


def surroundings() -> dict[str, Any]:
    """Say when, where and with what it was measured."""
    shown = [
        f"CPython {platform.python_version()}",
        *(f"{name} {version(name)}" for name in ("paramiko", "transitions", "structlog")),
        *(f"{name} {_asked('dpkg-query', '--show', '--showformat=${Version}', name)}" for name in DEBIAN),
    ]
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "tree": _asked("git", "rev-parse", "--short", "HEAD:proxy_fsm"),
        "machine": f"{os.cpu_count()} cores, {platform.freedesktop_os_release()['PRETTY_NAME']}",
        "versions": ", ".join(shown),
    }


def _asked(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Measure where that is asked for, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run the matrix first")
    parser.add_argument("--merge", nargs="+", type=Path, default=[], help="take these records of runs instead")
    wanted = parser.parse_args()
    if wanted.merge:
        merge(wanted.merge)
    elif wanted.measure:
        with tempfile.TemporaryDirectory() as directory:
            records = [Path(directory, f"{number}.jsonl") for number in range(RUNS)]
            for record in records:
                run_once(record)
            merge(records)
    MARKDOWN.write_text(rendered(json.loads(JSON.read_text())))


if __name__ == "__main__":
    main()
