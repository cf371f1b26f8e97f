"""``proxy-fsm connect``: the server's commands and their order; no session is lost or left behind."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from proxy_fsm import EndReason
from proxy_fsm.cli.app import make_app
from proxy_fsm.cli.connect import connect
from proxy_fsm.testing import standins
from proxy_fsm.testing.scripted import install
from tests.helpers.wait import WAIT_S
from tests.helpers.x2go_server import COOKIE, NAME, FakeX2Go, row

from .program import Home, Running, command, run, started

if TYPE_CHECKING:
    from collections.abc import Iterator

FRESH = ["--command", "xterm -geometry 80x24"]


class User:
    """A user with a display, an nxproxy and a login."""

    def __init__(self, home: Home, x2go: FakeX2Go, display: str) -> None:
        server = x2go.ssh
        self.home = home
        self.x2go = x2go
        self.access = [f"{server.username}@{server.host}", "--port", str(server.port)]
        self.access += [
            "--key",
            str(home.write_key(server)),
            "--known-hosts",
            str(home.add_known_host(server, "hosts")),
        ]
        nxproxy = install(home.path / "nxproxy", standins.command("proxy"))
        self.environ = {"DISPLAY": display, "NXPROXY_BINARY": str(nxproxy)}

    def run(self, *more: str) -> Running:
        program = run(self.home, "connect", *self.access, "--log-format", "json", *more, **self.environ)
        assert COOKIE not in program.raw
        return program

    @contextmanager
    def started(self, *more: str) -> Iterator[Running]:
        with started(
            self.home, "connect", *self.access, "--log-format", "json", "-v", *more, **self.environ
        ) as program:
            yield program
            assert COOKIE not in program.raw

    def break_nxproxy(self) -> str:
        """Install an nxproxy that runs but connects to nothing; return its path."""
        broken = self.home.path / "broken"
        broken.write_text("#!/bin/sh\nexit 0\n")
        broken.chmod(0o755)
        self.environ["NXPROXY_BINARY"] = str(broken)
        return str(broken)


@pytest.fixture
def x2go() -> Iterator[FakeX2Go]:
    with FakeX2Go() as x2go:
        yield x2go


@pytest.fixture
def user(home: Home, x2go: FakeX2Go) -> Iterator[User]:
    with subprocess.Popen(standins.command("display"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield User(home, x2go, process.stdout.readline().split()[1])
        process.kill()


def released(program: Running) -> tuple[str, str]:
    """Return the session's status when it was released, and the hint."""
    (event,) = program.named("session.released")
    assert event["session"] == NAME
    return event["status"], event["hint"] or ""


def failure(program: Running, status: int = 3, name: str = "server.failed") -> str:
    """Return reason, detail and hint of the failure."""
    assert program.process.returncode == status, program.events
    assert program.errors == ""
    (event,) = program.named(name)
    assert event["level"] == "error"
    return f"{event.get('reason')}: {event['detail']} {event['hint']}"


class TestNewSession:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_new_session_runs_program_until_signal_suspends_it(
        self, user: User, x2go: FakeX2Go, number: signal.Signals
    ) -> None:
        with user.started(*FRESH) as program:
            program.until(lambda event: event["event"] == "session.program_started")
            assert program.states[-1] == "running"
            assert not [line for line in user.home.command_lines() if COOKIE in line]
            program.process.send_signal(number)
            assert program.finish() == 0
            assert program.errors == ""
        again = shlex.join(["proxy-fsm", "connect", *user.access, "--session", NAME])
        assert released(program) == ("suspended", f"Resume it: {again}")
        assert x2go.ran == [
            ["50", "4711", NAME, "30002", "xtermX2GO_SPACE_CHAR-geometryX2GO_SPACE_CHAR80x24", "none", "D"]
        ]
        assert x2go.called("x2goterminate-session") == []
        assert {event["session"] for event in program.named("proxy.transition")} == {NAME}

    def test_unlisted_session_is_reported_as_suspended(self, user: User, x2go: FakeX2Go) -> None:
        """As for an account with a domain in its name, to which x2golistsessions shows nothing."""
        x2go.answer("x2golistsessions")
        with user.started(*FRESH) as program:
            program.until(lambda event: event["event"] == "session.program_started")
            program.process.terminate()
            assert program.finish() == 0
        assert released(program)[0] == "suspended"

    def test_published_session_stays_when_its_program_ends(self, user: User, x2go: FakeX2Go) -> None:
        with user.started(*FRESH, "--kind", "published") as program:
            program.until(lambda event: event["event"] == "session.program_started")
            program.process.terminate()
            program.finish()
        assert x2go.ran[0][-1] == "P"

    def test_new_session_logs_tunnel_stats(self, user: User) -> None:
        with user.started(*FRESH) as program:
            stats = program.until(lambda event: event["event"] == "tunnel.stats")
            assert stats["session"] == NAME
            assert stats["bytes_to_agent"] + stats["bytes_from_agent"] > 0
            program.process.terminate()
            assert program.finish() == 0

    def test_new_session_gets_the_given_options(self, user: User, x2go: FakeX2Go) -> None:
        user.break_nxproxy()
        options = ["--kind", "rootless", "--geometry", "1024x768", "--link", "isdn", "--pack", "nopack"]
        user.run("--command", "/usr/bin/xterm", *options, "--keyboard", "de", "--clipboard", "none")
        assert x2go.called("x2gostartagent") == []
        x2go.programs = {"/usr/bin/xterm"}
        user.run("--command", "/usr/bin/xterm", *options, "--keyboard", "de", "--clipboard", "none")
        assert x2go.called("x2gostartagent") == [
            ["1024x768", "isdn", "nopack", "unix-kde-depth_24", "de", "pc105/de", "1", "R", "xterm", "none"]
        ]

    def test_new_session_gets_default_options(self, user: User, x2go: FakeX2Go) -> None:
        """A desktop's name is not looked up, since x2goruncommand does that."""
        user.break_nxproxy()
        user.run("--command", "XFCE4")
        assert x2go.called("x2gostartagent") == [
            ["800x600", "adsl", "16m-jpeg-9", "unix-kde-depth_24", "us", "auto", "1", "D", "XFCE4", "both"]
        ]

    def test_shell_metacharacters_reach_the_program_unchanged(self, user: User, x2go: FakeX2Go) -> None:
        with user.started("--command", "xterm -e $(reboot);`reboot`'\"&|>x") as program:
            program.until(lambda event: event["event"] == "session.program_started")
            program.process.terminate()
            program.finish()
        space = "X2GO_SPACE_CHAR"
        (line,) = (line for line in x2go.lines if line.startswith("setsid"))
        words = line.removeprefix("setsid ").removesuffix(" >/dev/null 2>&1 </dev/null &")
        parsed = subprocess.run(["sh", "-c", f"printf '%s\n' {words}"], capture_output=True, text=True, check=True)
        assert parsed.stdout.splitlines()[5] == f"xterm{space}-e{space}$(reboot);`reboot`'\"&|>x"

    def test_new_session_never_shown_is_terminated(self, user: User, x2go: FakeX2Go) -> None:
        user.break_nxproxy()
        program = user.run(*FRESH)
        assert program.process.returncode >= EndReason.PROXY_NOT_FOUND.cli_status
        assert released(program) == ("terminated", "")
        assert x2go.called("x2goterminate-session") == [[NAME]]
        assert x2go.ran == []

    def test_new_session_without_program_is_terminated(self, user: User, x2go: FakeX2Go) -> None:
        """It would be empty, with nothing in it to end it."""
        x2go.answer("setsid", 1)
        program = user.run(*FRESH)
        assert "status 1" in failure(program)
        assert program.states[-1] == "stopped"
        assert released(program) == ("terminated", "")

    def test_new_session_requested_before_signal_is_terminated(self, user: User, x2go: FakeX2Go) -> None:
        """The program waits for the server's answer, since only that has the session's name."""
        asked, proceed = threading.Event(), threading.Event()
        start = x2go.ssh.commands["x2gostartagent"]

        def slow(line: str) -> tuple[int, bytes, bytes]:
            asked.set()
            assert proceed.wait(WAIT_S)
            return start(line)

        x2go.ssh.commands = {**x2go.ssh.commands, "x2gostartagent": slow}
        with user.started(*FRESH) as program:
            assert asked.wait(WAIT_S)
            program.process.send_signal(signal.SIGINT)
            proceed.set()
            assert program.finish() == 0
        assert x2go.called("x2goterminate-session") == [[NAME]]
        assert program.states == []

    def test_new_session_ending_with_program_is_reported(self, user: User, x2go: FakeX2Go) -> None:
        with user.started(*FRESH) as program:
            program.until(lambda event: event["event"] == "session.program_started")
            x2go.status = None  # before the agent exits: the server may be queried at once
            x2go.agents[-1].terminate()
            x2go.agents[-1].wait(WAIT_S)
            assert program.finish() == 0
        assert released(program) == ("finished", "")
        assert program.named("proxy.transition")[-1]["reason"] == "session_terminated"

    def test_new_session_with_lost_connection_gets_resume_hint(self, user: User, x2go: FakeX2Go) -> None:
        with user.started(*FRESH) as program:
            program.until(lambda event: event["event"] == "session.program_started")
            x2go.ssh.drop()
            assert program.finish() == EndReason.TRANSPORT_LOST.cli_status
            assert program.errors == ""
        status, hint = released(program)
        assert status == "unknown"
        assert f"--session {NAME}" in hint


class TestFailedPreflight:
    """It costs no session, since no connection to the server is made."""

    def check(self, user: User, reason: EndReason) -> None:
        program = user.run(*FRESH)
        assert failure(program, reason.cli_status, "preflight.failed").startswith(f"{reason}: ")
        assert len(program.events) == 1
        assert user.x2go.ssh.sessions_opened == 0

    def test_missing_nxproxy_fails_preflight(self, user: User) -> None:
        user.environ["NXPROXY_BINARY"] = "/nowhere/nxproxy"
        self.check(user, EndReason.PROXY_NOT_FOUND)

    def test_missing_display_fails_preflight(self, user: User) -> None:
        user.environ["DISPLAY"] = ""
        self.check(user, EndReason.DISPLAY_UNAVAILABLE)

    def test_invalid_sessions_root_fails_preflight(self, user: User) -> None:
        (user.home.path / ".x2go").write_text("no directory")
        self.check(user, EndReason.LISTEN_FAILED)

    def test_missing_xauth_fails_preflight_if_x_server_requires_cookie(self, user: User) -> None:
        user.environ["PATH"] = str(user.home.path)
        environ = {standins.COOKIE_VARIABLE: COOKIE}
        with subprocess.Popen(standins.command("display"), env=environ, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            user.environ["DISPLAY"] = process.stdout.readline().split()[1]
            self.check(user, EndReason.DISPLAY_UNAVAILABLE)
            process.kill()


@pytest.mark.parametrize("directory", [".x2go", "in a place, with=odd:letters"])
def test_preflight_leaves_no_files_and_can_be_repeated(user: User, directory: str) -> None:
    """Also with the options in a file, which is where a proxy's would be, not below the sessions root."""
    user.environ["X2GOKDRIVECLIENT_BINARY"] = user.environ["NXPROXY_BINARY"]
    user.environ["XDG_RUNTIME_DIR"] = str(user.home.ssh)
    root = user.home.path / directory
    root.mkdir()
    before = sorted(user.home.path.rglob("*"))
    for _ in range(2):
        program = user.run("--backend", "kdrive", "--session", NAME, "--sessions-root", str(root))
        assert "There is no session." in failure(program, 2, "usage.invalid")
        assert sorted(user.home.path.rglob("*")) == before


class TestServer:
    def test_server_without_x2go_is_reported_with_package(self, user: User, x2go: FakeX2Go) -> None:
        x2go.without("x2gostartagent")
        words = failure(user.run(*FRESH))
        assert words.startswith("not_x2go: ")
        assert "package x2goserver" in words

    def test_server_without_program_gets_no_session_request(self, user: User, x2go: FakeX2Go) -> None:
        assert "no program xtrem" in failure(user.run("--command", "xtrem"))
        assert x2go.called("x2gostartagent") == []

    def test_session_limit_is_reported_in_words(self, user: User, x2go: FakeX2Go) -> None:
        x2go.answer("x2gostartagent", 9, errors="LIMIT 5\n")
        words = failure(user.run(*FRESH))
        assert words.startswith("limit_reached: ")
        assert "as many sessions as are allowed" in words

    def test_session_of_unreadable_answer_is_terminated(self, user: User, x2go: FakeX2Go) -> None:
        x2go.answer("x2gostartagent", output=f"50\n{COOKIE}\n4711\n{NAME}\nno port\n30002\n30003\n")
        words = failure(user.run(*FRESH))
        assert words.startswith("unreadable_answer: ")
        assert "started no session" not in words
        assert f"{NAME} was unusable, so it was ended" in words
        assert x2go.called("x2goterminate-session") == [[NAME]]

    def test_failed_termination_after_unreadable_answer_is_reported(self, user: User, x2go: FakeX2Go) -> None:
        x2go.answer("x2gostartagent", output=f"50\n{COOKIE}\n4711\n{NAME}\n")
        x2go.answer("x2goterminate-session", 1)
        words = failure(user.run(*FRESH))
        assert f"{NAME} may have been started anyway: list the sessions." in words

    def test_nonzero_exit_status_is_a_failure_despite_valid_answer(self, user: User, x2go: FakeX2Go) -> None:
        output = f"50\n{COOKIE}\n4711\n{NAME}\n30001\n30002\n30003\n"
        x2go.answer("x2gostartagent", 1, output=output, errors="no database today\n")
        words = failure(user.run(*FRESH))
        assert words.startswith("command_failed: x2gostartagent exited with status 1")
        assert "no database today" in words
        assert x2go.called("x2goterminate-session") == [[NAME]]

    def test_answer_without_session_name_may_hide_a_started_session(self, user: User, x2go: FakeX2Go) -> None:
        x2go.answer("x2gostartagent", output="Welcome\nto\nour\nserver\n")
        words = failure(user.run(*FRESH))
        assert "started no session" not in words
        assert "may have started one anyway: list the sessions." in words
        assert x2go.called("x2goterminate-session") == []

    @pytest.mark.parametrize("name", ["-rf", "a b", "../x", "x;reboot"])
    def test_invalid_session_name_in_answer_is_rejected(self, user: User, x2go: FakeX2Go, name: str) -> None:
        x2go.answer("x2gostartagent", output=f"50\n{COOKIE}\n4711\n{name}\n30001\n30002\n30003\n")
        assert failure(user.run(*FRESH)).startswith("unreadable_answer: ")
        assert {words[0] for words in x2go.calls} == {"command", "x2gostartagent"}

    def test_connection_lost_during_start_may_hide_a_started_session(self, user: User, x2go: FakeX2Go) -> None:
        def drop(_line: str) -> tuple[int, bytes, bytes]:
            x2go.ssh.drop()
            return 0, b"", b""

        x2go.ssh.commands = {**x2go.ssh.commands, "x2gostartagent": drop}
        words = failure(user.run(*FRESH))
        assert words.startswith("connection_lost: ")
        assert "may have started one anyway" in words


class TestSuspendedSession:
    @pytest.fixture(autouse=True)
    def suspended(self, x2go: FakeX2Go) -> None:
        x2go.status = "S"

    def test_suspended_session_is_resumed_by_name(self, user: User, x2go: FakeX2Go) -> None:
        with user.started("--session", NAME, "--keyboard", "fr", "--geometry", "fullscreen") as program:
            program.until_state("running")
            program.process.terminate()
            assert program.finish() == 0
        assert released(program)[0] == "suspended"
        assert x2go.called("x2goresume-session") == [
            [NAME, "fullscreen", "adsl", "16m-jpeg-9", "fr", "pc105/fr", "1", "both"]
        ]
        assert x2go.called("x2gostartagent") == x2go.ran == []

    def test_resumed_session_not_shown_is_suspended_again(self, user: User, x2go: FakeX2Go) -> None:
        user.break_nxproxy()
        program = user.run("--session", NAME)
        assert program.process.returncode >= EndReason.PROXY_NOT_FOUND.cli_status
        status, hint = released(program)
        assert status == "suspended"
        assert f"--session {NAME}" in hint
        assert x2go.called("x2gosuspend-session") == [[NAME]]
        assert x2go.called("x2goterminate-session") == []

    def test_resume_hint_repeats_the_given_options(self, user: User) -> None:
        """All of them except the session's kind and how events are written."""
        root = str(user.home.path / "a root")
        options = ["--accept-unknown-host", "--backend", "kdrive", "--sessions-root", root, "--ready-timeout", "7.5"]
        options += ["--geometry", "1024x768", "--link", "lan", "--clipboard", "none"]
        user.environ["X2GOKDRIVECLIENT_BINARY"] = user.break_nxproxy()
        program = user.run("--session", NAME, *options, "--kind", "rootless", "--ask-server", "-v")
        words = ["connect", *user.access, *options, "--session", NAME]
        assert released(program) == ("suspended", f"Resume it: {shlex.join(['proxy-fsm', *words])}")
        verb, bound, _ = make_app().parse_args(words, exit_on_error=False)
        assert verb is connect
        assert bound.arguments["attach_options"].backend == "kdrive"
        assert bound.arguments["ssh_options"].accept_unknown_host

    def test_failed_resume_is_reported(self, user: User, x2go: FakeX2Go) -> None:
        """The command prints a port anyway, and its exit status is 0."""
        errors = f"ERROR: failed to resume session with ID {NAME}\nand more\n"
        x2go.answer("x2goresume-session", output="gr_port=30001\n", errors=errors)
        words = failure(user.run("--session", NAME))
        assert words.startswith("command_failed: ")
        assert f"failed to resume session with ID {NAME}" in words

    def test_unreadable_port_of_resumed_session_is_reported(self, user: User, x2go: FakeX2Go) -> None:
        x2go.answer("x2goresume-session", output="gr_port=x\n")
        program = user.run("--session", NAME)
        assert failure(program).startswith("unreadable_answer: ")
        assert released(program)[0] == "suspended"

    def test_session_with_another_name_is_not_resumed(self, user: User, x2go: FakeX2Go) -> None:
        x2go.other_rows = [row("bob-51", "R")]
        words = failure(user.run("--session", "alice"), 2, "usage.invalid")
        assert f"It lists: {NAME} (suspended), bob-51 (running)." in words
        assert x2go.called("x2goresume-session") == []

    def test_session_is_resumed_beside_malformed_ones(self, user: User, x2go: FakeX2Go) -> None:
        x2go.other_rows = [row("bob-51", "X")]
        with user.started("--session", NAME) as program:
            program.until_state("running")
            program.process.terminate()
            assert program.finish() == 0

    def test_session_that_another_client_resumes_first_is_left_to_it(self, user: User, x2go: FakeX2Go) -> None:
        listings = iter([row(status="S")])
        x2go.ssh.commands = {
            **x2go.ssh.commands,
            "x2golistsessions": lambda _: (0, next(listings, row(status="R")).encode(), b""),
        }
        program = user.run("--session", NAME)
        assert failure(program).startswith("session_in_use: ")
        assert released(program)[0] == "running"
        assert x2go.called("x2gosuspend-session") == x2go.called("x2goresume-session") == []

    def test_empty_session_list_is_reported(self, user: User, x2go: FakeX2Go) -> None:
        x2go.status = None
        assert "There is no session." in failure(user.run("--session", NAME), 2, "usage.invalid")


def test_person_at_a_terminal_is_offered_the_sessions(user: User, x2go: FakeX2Go) -> None:
    """Without a terminal, or with events as JSON, one of the two options is required."""
    x2go.status = "S"
    near, far = os.openpty()
    arguments = command("connect", *user.access)
    environ = user.home.environ | user.environ
    with subprocess.Popen(
        arguments, env=environ, cwd=user.home.path, stdin=far, stdout=far, stderr=far, start_new_session=True
    ) as process:
        os.close(far)
        shown = b""
        try:
            while b"running" not in shown.partition(b"Which session")[2]:
                shown += os.read(near, 4096)
                if b"Which session" in shown and shown.endswith(b": "):
                    os.write(near, b"1\n")
            process.terminate()
            with contextlib.suppress(OSError):  # the terminal's other end was closed
                while os.read(near, 4096):
                    pass
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()
            os.close(near)
    assert NAME.encode() in shown
    assert x2go.called("x2goresume-session")[0][0] == NAME


class TestSessionShownElsewhere:
    @pytest.fixture(autouse=True)
    def running(self, x2go: FakeX2Go) -> None:
        x2go.status = "R"

    def test_session_shown_elsewhere_is_not_taken_over_by_default(self, user: User, x2go: FakeX2Go) -> None:
        words = failure(user.run("--session", NAME), 2, "usage.invalid")
        assert "192.0.2.7" in words
        assert "proxy-fsm suspend" in words
        assert "--take-over" in words
        assert [words[0] for words in x2go.calls] == ["x2golistsessions"]

    def test_session_shown_elsewhere_is_taken_over_on_request(self, user: User, x2go: FakeX2Go) -> None:
        with user.started("--session", NAME, "--take-over") as program:
            program.until_state("running")
            program.process.terminate()
            assert program.finish() == 0
        assert [words[0] for words in x2go.calls][:3] == ["x2golistsessions"] * 2 + ["x2goresume-session"]
        (taken,) = program.named("session.taken_over")
        assert taken["client"] == "192.0.2.7"

    def test_session_ending_instead_of_suspending_is_reported(self, user: User, x2go: FakeX2Go) -> None:
        def end(_line: str) -> tuple[int, bytes, bytes]:
            x2go.status = None
            return 3, b"", f"session {NAME} terminated\n".encode()

        x2go.ssh.commands = {**x2go.ssh.commands, "x2goresume-session": end, "x2gosuspend-session": end}
        program = user.run("--session", NAME, "--take-over")
        assert f"session {NAME} terminated" in failure(program)
        assert released(program)[0] in {"finished", "unknown"}

    def test_signal_ends_the_wait_for_a_session_that_is_taken_over(self, user: User, x2go: FakeX2Go) -> None:
        asked, proceed = threading.Event(), threading.Event()

        def slow(_line: str) -> tuple[int, bytes, bytes]:
            asked.set()
            assert proceed.wait(WAIT_S)
            return 0, b"gr_port=30011\n", b""

        x2go.ssh.commands = {**x2go.ssh.commands, "x2goresume-session": slow}
        with user.started("--session", NAME, "--take-over") as program:
            assert asked.wait(WAIT_S)
            program.process.send_signal(signal.SIGINT)
            assert program.finish() == 0
            proceed.set()
        assert program.events[-1]["event"] == "interrupted"
        assert program.named("session.taken_over") == []
        assert x2go.called("x2gosuspend-session") == [[NAME]]
        status, hint = released(program)
        assert status == "suspended"
        assert hint.endswith(f"--session {NAME}")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--command", "xterm", "--session", NAME],
        ["--command", "xterm", "--take-over"],
        ["--session", "a b"],
        ["--session=-x/../y"],
        ["--command", ""],
        ["--command", " "],
        ["--command", "xterm\nreboot"],
        ["--command", "xterm;reboot"],
        ["--command", "$(reboot)"],
        ["--command", "é"],
        ["--command", "x" * 1001],
        *(["--command", "xterm", "--geometry", value] for value in ("", "0x0", "800", "800x600;x", "maximise")),
        *(["--command", "xterm", "--pack", value] for value in ("", "16m jpeg", "a,b", "a/b")),
        *(["--command", "xterm", "--keyboard", value] for value in ("", "d", "de/x", "DE", "de,us")),
        ["--command", "xterm", "--backend", "command"],
        ["--command", "xterm", "--backend", "kdrive"],
        ["--command", "xterm", "--ready-timeout", "0"],
    ],
)
def test_invalid_arguments_are_usage_errors(
    arguments: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxy_fsm.cli import main  # noqa: PLC0415 - a process for each would take a minute

    monkeypatch.setattr(signal, "signal", lambda *_: signal.SIG_DFL)
    assert main(["connect", "nobody@server.invalid", "--log-format", "json", *arguments]) == 2
    out, err = capfd.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    assert '"usage.invalid"' in out


def test_session_root_is_private(user: User) -> None:
    with user.started(*FRESH) as program:
        program.until_state("running")
        program.process.terminate()
        program.finish()
    root = user.home.path / ".x2go"
    assert root.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in root.iterdir()] == [f"S-{NAME}"]
    shutil.rmtree(root)
