"""The programs in examples/ run unchanged, and end as documented."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.wait import PROGRAM_S

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT = Path(__file__).parents[1]
EXAMPLES = sorted((PROJECT / "examples").glob("*.py"))
STATES = ["tunnelling", "spawning", "running", "stopping", "stopped"]


@contextmanager
def started(name: str, *arguments: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """Run an example with stand-ins for all that it connects to; kill it at the end of the block."""
    command = [sys.executable, "-W", "error", "-m", "tests.docs_scene", str(PROJECT / "examples" / name), *arguments]
    program = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": "1", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield program
    finally:
        program.kill()
        program.communicate()


def test_client_shows_session_until_it_ends() -> None:
    with started("client.py", "server.example") as program:
        output, errors = program.communicate(timeout=PROGRAM_S)
    assert (program.returncode, errors) == (0, "")
    lines = output.splitlines()
    assert [line.partition(" → ")[2] for line in lines[:5]] == STATES
    assert lines[5].startswith("session_terminated: ")


def test_client_stops_cleanly_on_signal() -> None:
    with started("client.py", "server.example", DOCS_SCENE_SESSION_S="1000") as program:
        assert program.stdout is not None
        while "running" not in program.stdout.readline():
            assert program.poll() is None
        program.send_signal(signal.SIGTERM)
        output, errors = program.communicate(timeout=PROGRAM_S)
    assert (program.returncode, errors) == (0, "")
    assert output.splitlines()[-1].startswith("stop_requested: ")


def test_client_reports_missing_session() -> None:
    with started("client.py", "127.0.0.1") as program:  # nothing listens on port 22, or the login fails
        output, errors = program.communicate(timeout=PROGRAM_S)
    assert program.returncode == 1
    assert output == ""
    assert errors.startswith("There is no session: ")
    assert "Traceback" not in errors


def test_gateway_holds_several_sessions() -> None:
    with started("gateway.py", "server.example", "3") as program:
        output, errors = program.communicate(timeout=PROGRAM_S)
    assert (program.returncode, errors) == (0, "")
    changes = [json.loads(line) for line in output.splitlines()]
    names = {each["session"] for each in changes}
    assert len(names) == 3
    for name in names:
        assert [each["state"] for each in changes if each["session"] == name] == STATES
    assert {each["reason"] for each in changes if each["state"] == "stopped"} == {"session_ended"}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_example_help_describes_arguments(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(file), "--help"], capture_output=True, text=True, timeout=PROGRAM_S, check=True
    )
    assert "the server; its host key must be known" in done.stdout
