"""What the documentation shows is true: each Python example in it is run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TESTING = BLOCK.findall((PROJECT / "docs" / "testing.md").read_text())
WINDOW, *MODULES = TESTING


@pytest.mark.parametrize("module", MODULES, ids=[re.findall(r"def test_\w+|Test\w+", each)[0] for each in MODULES])
def test_the_examples_of_testing_a_client(module: str, tmp_path: Path) -> None:
    """Each is a module of tests that pass, in an interpreter of its own, as a reader would run it."""
    (tmp_path / "window.py").write_text(WINDOW)
    (tmp_path / "test_example.py").write_text(module)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "error",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
    ]
    done = subprocess.run([*command, "test_example.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_every_name_for_tests_is_documented() -> None:
    """Whatever `proxy_fsm.testing` offers is named in its page."""
    from proxy_fsm import testing  # noqa: PLC0415 - only here
    from proxy_fsm.testing import machine, strategies  # noqa: PLC0415 - only here

    page = (PROJECT / "docs" / "testing.md").read_text()
    offered = [*testing.__all__, *machine.__all__, *strategies.__all__]
    assert [name for name in offered if name not in page] == []
