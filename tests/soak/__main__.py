"""The long form of all runs: `make soak`."""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import time
from dataclasses import fields
from typing import TYPE_CHECKING

import pytest

from tests.e2e.procs import program
from tests.soak.runs import Figures, carry, close_under_upload, probe_under_requests

if TYPE_CHECKING:
    from collections.abc import Callable

_COLUMNS = {
    "seconds": "s",
    "connections": "connections",
    "bytes_up": "MiB up",
    "bytes_down": "MiB down",
    "rekeys_by_client": "rekeys by client",
    "rekeys_by_server": "by server",
    "commands": "commands",
    "slowest_command_s": "slowest s",
    "requests": "requests",
    "probes": "probes",
}
#: The figures of a run of requests, besides those common to all; a run with a tunnel has all the others.
_REQUEST_FIGURES = {"requests", "probes"}
_COMMON_FIGURES = {"seconds", "commands"}


def say(line: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


def cell(figures: Figures, name: str) -> str:
    if name not in _COMMON_FIGURES and (name in _REQUEST_FIGURES) != bool(figures.requests):
        return ""
    value = getattr(figures, name)
    if name.startswith("bytes_"):
        value = value / 2**20
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def table(all_figures: list[Figures]) -> str:
    """Return the figures as a table in Markdown."""
    assert {"name", *_COLUMNS} == {field.name for field in fields(Figures)}
    rows = [["run", *_COLUMNS.values()], ["---", *("---:" for _ in _COLUMNS)]]
    rows += [[each.name, *(cell(each, name) for name in _COLUMNS)] for each in all_figures]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in rows)


def main() -> int:
    """Run everything at length and print the figures; the exit status is 1 if a run failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=main.__doc__)
    parser.add_argument("--closes", type=int, default=10_000, help="connections closed, and as many reset")
    parser.add_argument("--mib", type=int, default=2048, help="MiB each way")
    parser.add_argument("--requests", type=int, default=1002, help="requests of the caller while the link is probed")
    arguments = parser.parse_args()
    size = arguments.mib << 20
    runs: dict[str, Callable[[], Figures]] = {
        "closed": lambda: close_under_upload(arguments.closes, by_agent=False, progress=say),
        "reset": lambda: close_under_upload(arguments.closes, by_agent=True, progress=say),
        "carried": lambda: carry(size, progress=say),
        "carried, the server rekeys": lambda: carry(size, config="RekeyLimit 64M", progress=say),
        "carried, commands without a pause": lambda: carry(size, rekey_bytes=16 << 20, every_s=0, progress=say),
        "probed": lambda: probe_under_requests(arguments.requests, progress=say),
    }
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("paramiko", "cryptography")]
    sshd = subprocess.run([program("sshd") or "sshd", "-V"], capture_output=True, text=True, check=False).stderr
    say(f"Python {sys.version.split()[0]}, {', '.join(versions)}, {sshd.strip()}")
    done, failed = [], False
    for name, run in runs.items():
        say(f"{name}: started")
        try:
            done.append(run())
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - the other runs follow
            failed = True
            say(f"{name}: FAILED: {error!r}")
        else:
            say(f"{name}: transport alive, every byte and every answer correct")
    say(f"done\n\n{table(done)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
