"""``proxy-fsm demo``: with stand-ins everywhere, and with the real programs where installed."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from proxy_fsm import EndReason
from proxy_fsm.cli import setups
from proxy_fsm.testing.scripted import install
from tests.helpers.real import skip_or_fail

from .program import Running, run, started

if TYPE_CHECKING:
    from pathlib import Path

    from .program import Home

PAPER = (0xFD, 0xF6, 0xE3)  # xterm's background in the demo
LIFE = ["tunnelling", "spawning", "running", "stopping", "stopped"]


def empty_directory(path: Path) -> str:
    path.mkdir()
    return str(path)


def check_success(program: Running, programs: str) -> None:
    assert program.process.returncode == 0
    assert program.errors == ""
    assert program.events[0]["event"] == "demo.began"
    assert program.events[0]["programs"] == programs
    assert program.states == LIFE
    end = program.events[-1]
    assert (end["event"], end["reason"]) == ("demo.ended", "stop_requested")
    assert list(end["states"]) == ["idle", *LIFE[:-1]]
    assert end["bytes_to_agent"] > 0
    assert end["bytes_from_agent"] > 0


def check_record(home: Home, program: Running) -> list[str]:
    """Check that the record has what was printed, and debug events beside it; return its lines."""
    record = (home.path / "demo-output" / "events.jsonl").read_text().splitlines()
    assert [line for line in record if json.loads(line)["level"] != "debug"] == program.raw.splitlines()
    return record


class TestWithStandIns:
    def test_demo_needs_only_python(self, home: Home) -> None:
        """PATH is empty, and the missing programs are reported."""
        program = run(
            home, "demo", "--seconds", "0.2", "--log-format", "json", PATH=empty_directory(home.path / "empty")
        )
        check_success(program, "stand-ins")
        missing = {"nxagent": "nxagent", "nxproxy": "nxproxy", "Xvfb": "xvfb", "xauth": "xauth"}
        assert program.events[0]["missing"] == missing
        record = check_record(home, program)
        phases = [event["phase"] for event in map(json.loads, record) if event["event"] == "proxy.phase"]
        assert phases[:6] == ["checking", "binding", "launching", "connecting", "negotiating", "established"]
        assert not (home.path / "demo-output" / "session.png").exists()

    def test_console_shows_progress_and_packages_to_install(self, home: Home) -> None:
        only_some = home.path / "some"
        only_some.mkdir()
        for name in ("nxproxy", "Xvfb"):
            install(only_some / name, ["false"])
        program = run(home, "demo", "--seconds", "0.2", "--output", "out", PATH=str(only_some))
        assert program.process.returncode == 0
        assert program.errors == ""
        shown = program.process.stdout.read()  # type: ignore[union-attr]
        for words in ("lacks nxagent, xauth", "apt-get install nxagent xauth", "spawning → running", "stopped: stop_r"):
            assert words in shown.replace("\n", " ")
        assert "out/sessions/S-demo/session.log" in shown
        assert "\x1b" not in shown
        assert shown.splitlines()[-1] == "See it: proxy-fsm timeline out/events.jsonl -o out/run.html"
        assert (home.path / "out/sessions/S-demo/session.log").read_text()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signal_ends_demo_and_its_programs(self, home: Home, number: signal.Signals) -> None:
        """The fixture ``home`` checks that no process is left."""
        with started(home, "demo", "--stand-ins", "--seconds", "1000", "--log-format", "json") as program:
            program.until_state("running")
            assert len(home.command_lines()) == 4
            for _ in range(2):
                os.killpg(program.process.pid, number)
            assert program.finish() == 0
            assert program.events[-1]["event"] == "demo.ended"
            assert program.errors == ""

    def test_second_demo_replaces_files_of_the_first(self, home: Home) -> None:
        run(home, "demo", "--stand-ins", "--seconds", "0", "--log-format", "json")
        program = run(home, "demo", "--stand-ins", "--seconds", "0", "--log-format", "json")
        check_success(program, "stand-ins")
        check_record(home, program)
        assert (home.path / "demo-output/sessions/S-demo/session.log").read_text().count("Starting session") == 1


class TestFailures:
    def test_broken_session_exits_with_status_of_its_reason(self, home: Home) -> None:
        with started(home, "demo", "--stand-ins", "--seconds", "1000", "--log-format", "json") as program:
            program.until_state("running")
            (agent,) = (pid for pid, line in home.processes().items() if " agent" in line)
            os.kill(agent, signal.SIGKILL)
            assert program.finish() == EndReason.PEER_LOST.cli_status
            assert (program.events[-1]["event"], program.events[-1]["reason"]) == ("demo.ended", "peer_lost")
            assert program.errors == ""

    def test_unwritable_output_is_usage_error(self, home: Home) -> None:
        (home.path / "file").touch()
        program = run(home, "demo", "--output", "file/below", "--log-format", "json")
        assert program.process.returncode == 2
        assert [event["event"] for event in program.events] == ["usage.invalid"]

    def test_seconds_out_of_range_are_usage_error(self, home: Home) -> None:
        for seconds in ("-1", "nan", "inf"):
            assert run(home, "demo", f"--seconds={seconds}").process.returncode == 2

    def test_x_server_start_failure_is_reported_and_cleaned_up(self, home: Home) -> None:
        broken = home.path / "broken"
        broken.mkdir()
        for name in setups.missing_programs() or ("nxagent", "nxproxy", "Xvfb", "xauth"):
            install(broken / name, ["/bin/true"])
        program = run(home, "demo", "--log-format", "json", PATH=str(broken))
        assert program.process.returncode == 3
        assert program.events[-1]["event"] == "demo.failed"
        assert "Xvfb" in program.events[-1]["detail"]
        assert program.errors == ""

    def test_failure_is_reported_on_console(self, home: Home) -> None:
        broken = home.path / "broken"
        broken.mkdir()
        for name in ("nxagent", "nxproxy", "Xvfb", "xauth"):
            install(broken / name, ["/bin/true"])
        program = run(home, "demo", PATH=str(broken))
        assert program.process.returncode == 3
        assert "demo.failed" in program.errors
        assert "Traceback" not in program.errors


@pytest.mark.real
class TestWithRealPrograms:
    @pytest.fixture(autouse=True)
    def real_programs(self) -> None:
        if missing := setups.missing_programs():
            skip_or_fail(missing)

    def test_screenshot_shows_remote_desktop(self, home: Home) -> None:
        program = run(home, "demo", "--log-format", "json")
        check_success(program, "real")
        with Image.open(home.path / "demo-output" / "session.png") as picture:
            assert picture.size == (1024, 768)
            colours = {colour: count for count, colour in picture.getcolors(picture.width * picture.height) or []}
        desktop = colours[setups.DESKTOP_COLOUR]
        (screenshot,) = program.named("demo.screenshot")
        if screenshot["painter"] == "xterm":
            assert colours[PAPER] > 10_000
            desktop += sum(
                count for colour, count in colours.items() if colour not in {(0, 0, 0), setups.DESKTOP_COLOUR}
            )
        assert desktop > 0.9 * 768 * 576

    def test_signal_ends_demo_and_its_programs(self, home: Home) -> None:
        with started(home, "demo", "--seconds", "1000", "--log-format", "json") as program:
            program.until_state("running")
            program.process.send_signal(signal.SIGINT)
            assert program.finish() == 0
            assert program.events[-1]["reason"] == "stop_requested"
            assert program.errors == ""

    def test_cookie_is_in_no_command_line_or_event(self, home: Home) -> None:
        with started(
            home, "demo", "--seconds", "1000", "--keep", "--log-format", "json", TMPDIR=str(home.path)
        ) as program:
            program.until_state("running")
            (options,) = home.path.glob("proxy_fsm-demo-*/options")
            cookie = options.read_text().partition("cookie=")[2][:32]
            seen = home.command_lines()
            program.process.terminate()
            assert program.finish() == 0
        assert len(seen) >= 4
        assert (
            cookie
            not in "".join(seen) + program.raw + (home.path / "demo-output/sessions/S-demo/session.log").read_text()
        )
