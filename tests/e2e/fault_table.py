"""Makes docs/faults.md of the fault matrix and of what was measured of it.

``python -m tests.e2e.fault_table`` writes it anew from docs/faults.json; with ``--measure`` the matrix is run first,
three times, and docs/faults.json is written anew too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy_fsm import Timeouts
from proxy_fsm.evidence import ProcessExited, SessionStatusReceived

from .faults import CAUSES, FAULTS, MISHAPS, Fault, When

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[2]
JSON, MARKDOWN = ROOT / "docs/faults.json", ROOT / "docs/faults.md"
RUNS = 3
TIMES = ("sign_to_stopping", "sign_to_final", "cause_to_final", "cause_to_told")
DEBIAN = ("openssh-server", "x2goserver", "nxagent", "nxproxy", "xvfb")
RECORD = "PROXY_FSM_RECORD_FAULTS"  # names the file that a run of the matrix keeps its rows in
LEAD = """\
# What can go wrong, and what a proxy then says

<!-- Made by tests/e2e/fault_table.py of tests/e2e/faults.py and docs/faults.json: do not edit. -->

Each fault below was caused for real, against sshd, x2goserver with nxagent, nxproxy and Xvfb.

- *what its user reads*: the status's `detail`, then its *hint*;
- *stopping*: from the first sign of the fault on this side until the state `stopping`;
- *final*: from the cause until the final state, with the time that nxproxy takes to exit, or the server to notice;
- *retryable → second attempt*: what the status said, and what a second attempt then did, once the cause was put right
  and a suspended session resumed; `–`: only the server knows;
- *python-x2go*: what python-x2go 0.6.1.3 reported of the same fault, and after how long; empty: not measured.

Times are the median of {runs} runs, the longest in brackets.
"""
HEAD = """\
| cause, and the reason told | what its user reads | stopping | final | retryable → second attempt | python-x2go |
|---|---|---|---|---|---|
"""
SURVIVED = """\
## What a session survives

The session goes on, paints, and is stopped in order afterwards.

| cause | event | and when it is over | told after |
|---|---|---|---|
"""
METHOD = """\
## How it was measured

`tests/e2e/test_faults.py` causes each fault, and holds the proxy to what the tables say of it and to these limits, with
400 ms more for a busy machine, and without the time in which the machine held everybody up:

- 50 ms from the first sign to `stopping`;
- 100 ms from there to the final state where the proxy is dead or the transport gone, else 20 ms from the proxy's exit.

Afterwards nothing is left:

- in the process: threads, descriptors, children, zombies, channels;
- of the proxy program: its process session;
- on disk: sockets, and in the session root all but `session.log` and nxproxy's own `stats` and `errors`.

Then a second attempt is made: `retryable` is true only where that runs, and false only where it cannot.

Some suspends and terminations take the agent and nxproxy 5 s longer than others. That is their own: it was seen with
nxproxy connected to the agent directly, too.

Measured on {date} with:

- {machine}, kept busy by other work, which the longest times show;
{versions}

That a session was suspended or terminated is told when nxproxy exits, though its line about that comes some 0.2 s
before: only then is it certain that it was not the X server that went. While the SSH server is silent, the closing of
the channel of the proxy waits for its answer in the caller's transport, and so does the last probe; the test looks for
what is left when the server goes on. `stop_timeout` and `internal_error` have no row.

python-x2go was measured by hand on a machine of the same kind. `make faults` measures anew, as root on Debian, in some
minutes; names, numbers and paths that differ from run to run are masked. Two engines on one transport of which one
fails, and other viewers, are in `tests/e2e/test_session.py`.
"""
MASKS = {r"127\.0\.0\.1:\d+": "127.0.0.1:PORT", r"\bat :\d+": "at :N", r"\bproxy_fsm-\w+": "proxy_fsm-…"}
# what python-x2go 0.6.1.3 reported, and after how long
_NO_DISPLAY = "`ok()` true for 5–15 s, then false, no reason"
_LEFT = "`ok()` false, cannot tell which; 1.2–1.5 s"
PYTHON_X2GO = {
    "program missing": "`(None, False)`, no reason; 16.0 s",
    "X server absent": _NO_DISPLAY,
    "X server dead": _NO_DISPLAY,
    "X server refuses": _NO_DISPLAY,
    "graphics port refused": "not ok, no reason; 8.4 s",
    "wrong cookie": "not ok, no reason; 0.4 s",
    "session suspended": _LEFT,
    "session terminated": _LEFT,
    "session suspended, server asked": _LEFT,
    "session terminated, server asked": _LEFT,
    "proxy killed (SIGKILL)": "`ok()` false when next polled; no event, no reason",
    "SSH connection closed by the server": "`ok()` false, no reason; 0.2 s",
    "SSH server silent for good": "`ok()` still true at 40 s",
}
SIGNS: dict[object, str] = {ProcessExited: "nxproxy's exit", SessionStatusReceived: "the server's answer"}


def rendered(measured: dict[str, Any]) -> str:
    """Give docs/faults.md for the rows of the table and for what docs/faults.json holds."""
    rows = {row["cause"]: row for row in measured["rows"]}
    about = measured["measured"]
    text = LEAD.format(**about)
    for when in When:
        lines = [_line(fault, rows[fault.cause]) for fault in FAULTS if fault.when is when]
        text += f"\n## {str(when).capitalize()}\n\n{HEAD}{''.join(lines)}"
    text += f"\n{SURVIVED}"
    for mishap in MISHAPS:
        told = _time(rows[mishap.cause], "cause_to_told") + _limits(mishap.limits)
        text += _cells([mishap.cause, _code(mishap.told), _code(mishap.then) if mishap.then else "–", told])
    versions = "\n".join(f"- {each};" for each in about["versions"])
    return f"{text}\n{METHOD.format(**{**about, 'versions': versions.removesuffix(';') + '.'})}"


def _line(fault: Fault, row: dict[str, Any]) -> str:
    retryable = {True: "yes", False: "no", None: "–"}[row["retryable"]]
    final = _time(row, "cause_to_final") + _limits(fault.limits)
    if fault.script:
        after_sign = f"{_time(row, 'sign_to_final')} after {SIGNS[fault.sign]}"
        final = f"{after_sign}, {final} after {_code(fault.script)} was called"
    return _cells(
        [
            f"{fault.cause}<br>{_code(row['reason'])}",
            row["detail"] + (f" *{row['hint']}*" if row["hint"] else ""),
            _time(row, "sign_to_stopping"),
            final,
            f"{retryable} → {'runs' if row['again'] else 'cannot run'}",
            PYTHON_X2GO.get(fault.cause, ""),
        ]
    )


def _limits(limits: Mapping[str, float]) -> str:
    """Say which of the proxy's time limits were others than they are by default."""
    default = Timeouts()
    return "".join(
        f"; {_code(name)} is {s:g} s here, by default {getattr(default, name):g} s" for name, s in limits.items()
    )


def _cells(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _code(text: str) -> str:
    return f"`{text}`"


def _time(row: dict[str, Any], name: str) -> str:
    median, longest = row[f"{name}_ms"]["median"], row[f"{name}_ms"]["max"]
    return f"{median / 1000:.2f} s ({longest / 1000:.2f})" if median >= 1000 else f"{median:.0f} ms ({longest:.0f})"


def masked(text: str, names: Mapping[str, str]) -> str:
    """Mask what differs from run to run: these names, and the numbers and names that the system gives."""
    for name, shown in names.items():
        text = text.replace(name, shown)
    for pattern, shown in MASKS.items():
        text = re.sub(pattern, shown, text)
    return text


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


def measure() -> None:
    """Run the matrix several times, and write docs/faults.json."""
    with tempfile.TemporaryDirectory() as directory:
        runs = [run_once(Path(directory, f"{number}.jsonl")) for number in range(RUNS)]
    measured = {"measured": {**surroundings(), "runs": RUNS}, "rows": merged(runs)}
    JSON.write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n")


def run_once(record: Path) -> list[dict[str, Any]]:
    """Run the matrix, and return its rows."""
    environ = {**os.environ, RECORD: str(record), "PROXY_FSM_REQUIRE_REAL": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "tests/e2e/test_faults.py"]
    subprocess.run(command, cwd=ROOT, env=environ, check=True)
    return [json.loads(line) for line in record.read_text().splitlines()]


def surroundings() -> dict[str, Any]:
    """Say when, where and with what it was measured."""
    shown = [
        f"CPython {platform.python_version()}",
        f"`proxy_fsm/` as of git tree {_asked('git', 'rev-parse', '--short', 'HEAD:proxy_fsm')}",
        *(f"{name} {version(name)}" for name in ("paramiko", "transitions", "structlog")),
        *(f"{name} {_asked('dpkg-query', '--show', '--showformat=${Version}', name)}" for name in DEBIAN),
    ]
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{os.cpu_count()} cores, {platform.freedesktop_os_release()['PRETTY_NAME']}",
        "versions": shown,
    }


def _asked(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Measure where that is asked for, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run the matrix first")
    if parser.parse_args().measure:
        measure()
    MARKDOWN.write_text(rendered(json.loads(JSON.read_text())))


if __name__ == "__main__":
    main()
