"""The documentation is checked: each Python example is run, each command line is parsed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from proxy_fsm import EndReason, State, testing
from proxy_fsm.cli.app import make_app
from proxy_fsm.cli.verb import ExitStatus
from proxy_fsm.events import LEVELS
from proxy_fsm.testing import machine, strategies

from .e2e.procs import program
from .helpers.real import skip_or_fail
from .helpers.wait import PROGRAM_S

PROJECT = Path(__file__).parents[1]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
EXAMPLE = re.compile(r"^```python\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Example(NamedTuple):
    """A program, and what it prints if the page shows it; a line "…" matches any line."""

    name: str
    source: str
    prints: str

    def __str__(self) -> str:
        return self.name


def examples_in(page: Path) -> list[Example]:
    found = EXAMPLE.findall(page.read_text(encoding="utf-8"))
    return [Example(f"{page.name}-{number}", *parts) for number, parts in enumerate(found, 1)]


WINDOW, *MODULES = examples_in(PROJECT / "docs" / "testing.md")
#: Those with python-x2go need the system's Python: tests/e2e/test_python_x2go.py runs them.
ELSEWHERE = ("testing.md", "moving-from-python-x2go.md")
PROGRAMS = [example for page in PAGES if page.name not in ELSEWHERE for example in examples_in(page)]
COMMANDS = [
    line
    for page in PAGES
    for block in SHELL.findall(page.read_text(encoding="utf-8"))
    for line in block.splitlines()
    if line.startswith("proxy-fsm")
]


def run(command: list[str], directory: Path, **environ: str) -> str:
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("example", MODULES, ids=str)
def test_examples_of_the_testing_page_pass(example: Example, tmp_path: Path) -> None:
    """Each is a test module that passes, in an interpreter of its own, as a reader would run it."""
    (tmp_path / "window.py").write_text(WINDOW.source)
    (tmp_path / "test_example.py").write_text(example.source)
    pytest_options = ["-q", "-W", "error", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    output = run([sys.executable, "-m", "pytest", *pytest_options, "test_example.py"], tmp_path)
    assert " passed" in output
    assert "skipped" not in output


def needs_gtk(directory: Path) -> None:
    """Put Debian's bindings for GTK into a directory; skips, or fails, if they or Xvfb are missing."""
    bindings = Path("/usr/lib/python3/dist-packages/gi")
    version = f"{sys.version_info[0]}{sys.version_info[1]}"
    missing = [] if any(bindings.glob(f"_gi.cpython-{version}-*.so")) else ["GTK 3 for this Python (python3-gi)"]
    missing += [name for name in ("Xvfb", "xauth") if program(name) is None]
    if missing:
        skip_or_fail(missing, promised=version == "311")  # Debian 12 has them for 3.11 only
    (directory / "gi").symlink_to(bindings)


@pytest.mark.parametrize("example", PROGRAMS, ids=str)
def test_examples_of_other_pages_print_what_the_page_says(example: Example, tmp_path: Path) -> None:
    """Each runs to its end, without a warning, and prints what the page says."""
    file = tmp_path / "example.py"
    file.write_text(example.source)
    options, warnings = [], ["-W", "error"]
    if "gi.repository" in example.source:
        needs_gtk(tmp_path)
        options = ["--window"]
        warnings += ["-W", "ignore::ImportWarning"]  # gi's own
    path = os.pathsep.join([str(PROJECT), str(tmp_path)])
    command = [sys.executable, *warnings, "-m", "tests.docs_scene", *options, str(file)]
    output = run(command, tmp_path, PYTHONPATH=path, QT_QPA_PLATFORM="offscreen").splitlines()
    expected = example.prints.splitlines()
    if expected:
        assert len(output) == len(expected), output
        assert [one if two != "…" else "…" for one, two in zip(output, expected, strict=True)] == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines_are_parsed(command: str) -> None:
    """Verb and options exist; what a command does is tested with the command line."""
    make_app().parse_args(shlex.split(command, comments=True)[1:], exit_on_error=False, print_error=False)


def test_examples_and_command_lines_are_found() -> None:
    assert len(MODULES) > 3
    assert len(PROGRAMS) > 5
    assert COMMANDS


def test_exit_statuses_are_those_of_the_command_line() -> None:
    page = (PROJECT / "docs" / "command-line.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", page, re.MULTILINE)
    assert rows == [(str(status.value), status.meaning) for status in ExitStatus]
    first, last = re.findall(r"^\| (\d+) to (\d+) \|", page, re.MULTILINE)[0]
    faults = sorted(reason.cli_status for reason in EndReason if not reason.clean)
    assert faults == [*range(int(first), int(last) + 1)]


def test_testing_names_are_documented() -> None:
    """Every public name of `proxy_fsm.testing` is mentioned in its page."""
    page = (PROJECT / "docs" / "testing.md").read_text()
    public = [*testing.__all__, *machine.__all__, *strategies.__all__]
    assert [name for name in public if name not in page] == []


def test_logging_page_has_every_event_with_its_level() -> None:
    page = (PROJECT / "docs" / "logging.md").read_text()
    documented: dict[str, str] = {}
    for names, levels in re.findall(r"^\| (`\w+\.\w+`(?:, `\w+\.\w+`)*) \| ([a-z, ]+) \|", page, re.MULTILINE):
        events = re.findall(r"`([^`]+)`", names)
        documented.update(zip(events, levels.split(", "), strict=True))
    assert documented.pop("tunnel.stats") == "info"  # of proxy-fsm, not of a proxy
    assert documented == dict(LEVELS)


def test_lifecycle_page_explains_every_phase() -> None:
    page = (PROJECT / "docs" / "lifecycle.md").read_text()
    rows = re.findall(r"^\| `(\w+/\w+)` \|", page, re.MULTILINE)
    assert rows == [f"{state}/{phase}" for state in State for phase in state.phases]
