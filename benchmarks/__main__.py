"""`python -m benchmarks`: measure everything in one run, and write the results."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks import costs, micro, sessions
from benchmarks.contenders import CONTENDERS
from benchmarks.report import Results, table, write
from benchmarks.tunnels import QUICK, Findings, Rounds, Sizes

PARTS = ("tunnels", "sessions", "costs", "micro")
_HERE = Path(__file__).parent


def say(line: str) -> None:
    """Report progress."""
    sys.stderr.write(f"{line}\n")


def environment(note: str | None = None) -> dict[str, str]:
    """Return where and when this runs, and what else a reader of the results must know."""
    git = [shutil.which("git") or "git", "-C", str(_HERE.parent), "log", "-1", "--format=%h %s", "--", "proxy_fsm"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False)
    models = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "last commit that changed proxy_fsm": commit.stdout.strip() or "unknown",
        "machine": f"{os.cpu_count()} × {next(models, 'model name : unknown').partition(':')[2].strip()}",
        "load of the machine before (1, 5, 15 minutes)": load,
        "system": f"{platform.freedesktop_os_release()['PRETTY_NAME']}, Linux {platform.release()}",
        "Python": platform.python_version(),
        "libraries": ", ".join(f"{name} {version(name)}" for name in ("paramiko", "transitions", "structlog")),
        **({"note": note} if note else {}),
    }


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="little of everything, as a smoke test")
    parser.add_argument("--rounds", type=int, default=0, help="how many rounds of the tunnels (5; quick: 1)")
    parser.add_argument("--sessions", type=int, default=0, help="how many real sessions of each kind (20; quick: 2)")
    parser.add_argument("--only", action="append", choices=PARTS, help="one part; may be repeated")
    parser.add_argument("--contender", action="append", choices=list(CONTENDERS), help="one contender; may be repeated")
    parser.add_argument("--note", help="a remark about this run for its readers, added to the table and the JSON")
    parser.add_argument("-o", "--output", type=Path, default=_HERE / "results", help="a directory")
    arguments = parser.parse_args()
    parts = arguments.only or PARTS
    results = Results(environment=environment(arguments.note))
    if "micro" in parts:
        results.micro = micro.measure(20 if arguments.quick else 300)
    if "costs" in parts:
        for count in (1, 10) if arguments.quick else (1, 10, 50, 200):
            say(f"costs: {count} proxies")
            try:
                # The memory of a single one is subject to chance: it depends on free space in the heap.
                results.costs[str(count)] = costs.measure(count, runs=1 if arguments.quick else max(1, 10 // count))
            except RuntimeError as error:
                results.costs[str(count)] = str(error)
    if "sessions" in parts:
        try:
            results.sessions = sessions.measure(arguments.sessions or (2 if arguments.quick else 20), say)
        except (sessions.Missing, TimeoutError) as error:
            results.sessions = str(error)
    if "tunnels" in parts:

        def keep(number: int, found: Findings) -> None:
            results.rounds, results.values = number, found.values
            results.troubles, results.versions = found.troubles, found.versions
            write(results, arguments.output)  # an interrupted run keeps its measurements so far

        rounds = Rounds(QUICK if arguments.quick else Sizes(), arguments.contender or list(CONTENDERS), say)
        rounds.run(arguments.rounds or (1 if arguments.quick else 5), keep)
    write(results, arguments.output)
    sys.stdout.write(table(results))


if __name__ == "__main__":
    main()
