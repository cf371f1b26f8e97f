"""``proxy-fsm diagram``: all formats, a client's own machine, and messages for what cannot be drawn."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm import diagram
from tests.helpers.wait import PROGRAM_S

from .program import command, run

if TYPE_CHECKING:
    from .program import Home, Running


def shown(program: Running) -> str:
    return program.process.stdout.read()  # type: ignore[union-attr]


@pytest.mark.parametrize("picture", [name for name in diagram.FORMATS if name != "png"])
def test_output_is_the_library_drawing(home: Home, picture: diagram.Format) -> None:
    program = run(home, "diagram", f"--format={picture}", "--highlight", "running", "--theme", "dark")
    assert program.errors == ""
    assert program.process.returncode == 0
    assert shown(program) == diagram.draw(format=picture, highlight="running", theme="dark")


def test_default_output_is_mermaid_of_the_lifecycle(home: Home) -> None:
    assert shown(run(home, "diagram")) == diagram.mermaid()


def test_highlight_option_marks_a_phase(home: Home) -> None:
    program = run(home, "diagram", "--highlight", "stopping/draining")
    assert shown(program) == diagram.mermaid(highlight="stopping/draining")


def test_no_phases_option_omits_phases(home: Home) -> None:
    assert shown(run(home, "diagram", "--no-phases")) == diagram.draw(phases=False)


def test_png_is_written_to_pipe_but_never_to_terminal(home: Home) -> None:
    arguments: dict[str, Any] = {"env": home.environ, "timeout": PROGRAM_S, "stderr": subprocess.PIPE}
    piped = subprocess.run(command("diagram", "-f", "png"), stdout=subprocess.PIPE, check=False, **arguments)
    assert piped.returncode == 0
    assert b"Traceback" not in piped.stderr  # matplotlib may log there that it searches for fonts
    assert piped.stdout == diagram.draw(format="png")
    ours, theirs = os.openpty()
    try:
        refused = subprocess.run(command("diagram", "-f", "png"), stdout=theirs, check=False, **arguments)
    finally:
        os.close(ours)
        os.close(theirs)
    assert refused.returncode == 2
    assert b"name a file with --output" in refused.stderr


def test_json_log_needs_output_file_for_the_picture(home: Home) -> None:
    program = run(home, "diagram", "--log-format", "json", "-o", "life.mmd")
    assert program.process.returncode == 0
    assert [(each["event"], each["path"]) for each in program.events] == [("picture.drawn", "life.mmd")]
    assert (home.path / "life.mmd").read_text() == diagram.mermaid()
    program = run(home, "diagram", "--log-format", "json")
    assert program.process.returncode == 2
    assert [each["event"] for each in program.events] == ["usage.invalid"]


def test_machine_in_working_directory_is_drawn(home: Home) -> None:
    package = home.path / "client"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "sessions.py").write_text(
        "from proxy_fsm import CommandBackend, Proxy\n"
        "class MyProxy(Proxy): pass\n"
        "class MyBackend(CommandBackend):\n"
        "    name = 'mine'\n"
    )
    whole = json.loads(shown(run(home, "diagram", "client.sessions:MyProxy", "--format=json")))
    assert whole["title"] == "MyProxy"
    assert "MyBackend (mine)" in shown(run(home, "diagram", "client.sessions:MyBackend", "-f", "svg"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--highlight", "gone"], "Lifecycle has no state 'gone'"),
        (["--highlight", "running/gone"], "State 'running' has no phase 'gone'; it has established, verifying."),
        (["client"], "write it as package.module:Class"),
        (["not_there:X"], "There is no module not_there"),
        (["broken:X"], "broken cannot be imported: SyntaxError"),
        (["json:JSONDecoder"], "JSONDecoder is no state machine"),
        (["-o", "no/where.mmd"], "no/where.mmd cannot be written to: No such file"),
    ],
)
def test_undrawable_target_is_usage_error(home: Home, arguments: list[str], message: str) -> None:
    (home.path / "broken.py").write_text("class")
    program = run(home, "diagram", *arguments)
    assert program.process.returncode == 2
    assert message in program.errors.replace("\\'", "'")
    assert "Traceback" not in program.errors
    assert shown(program) == ""
