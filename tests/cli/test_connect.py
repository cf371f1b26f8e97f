"""``proxy-fsm connect``: what is asked of the server and when, and that no session is lost or left behind."""

from __future__ import annotations

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

from .fake_x2go import COOKIE, NAME, FakeX2Go, row
from .program import Home, Running, run, started

if TYPE_CHECKING:
    from collections.abc import Iterator

FRESH = ["--command", "xterm -geometry 80x24"]


class User:
    """Somebody who has a display and an nxproxy, and may log in."""

    def __init__(self, home: Home, x2go: FakeX2Go, display: str) -> None:
        server = x2go.ssh
        self.home = home
        self.x2go = x2go
        self.access = [f"{server.username}@{server.host}", "--port", str(server.port)]
        self.access += ["--key", str(home.keep_key(server)), "--known-hosts", str(home.know(server, "hosts"))]
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

    def with_broken_nxproxy(self) -> str:
        """It is there, runs, and connects to nothing; returns its path."""
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


def left(program: Running) -> tuple[str, str]:
    """Return what became of the session, and what to do."""
    (event,) = program.named("session.released")
    assert event["session"] == NAME
    return event["status"], event["hint"] or ""


def failure(program: Running, status: int = 3, name: str = "server.failed") -> str:
    """Return the words of what went wrong."""
    assert program.process.returncode == status, program.events
    assert program.errors == ""
    (event,) = program.named(name)
    assert event["level"] == "error"
    return f"{event.get('reason')}: {event['detail']} {event['hint']}"


class TestANewSession:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_runs_its_program_until_a_signal_suspends_it(
        self, user: User, x2go: FakeX2Go, number: signal.Signals
    ) -> None:
        with user.started(*FRESH) as program:
            program.until(lambda event: event["event"] == "session.program_started")
            assert program.states[-1] == "running"
            assert not [line for line in user.home.left() if COOKIE in line]
            program.process.send_signal(number)
            assert program.finish() == 0
            assert program.errors == ""
        again = shlex.join(["proxy-fsm", "connect", *user.access, "--session", NAME])
        assert left(program) == ("suspended", f"Resume it: {again}")
        assert x2go.ran == [
            ["50", "4711", NAME, "30002", "xtermX2GO_SPACE_CHAR-geometryX2GO_SPACE_CHAR80x24", "none", "D"]
        ]
        assert x2go.called("x2goterminate-session") == []
        assert {event["session"] for event in program.named("proxy.transition")} == {NAME}

    def test_tells_what_its_tunnel_carries(self, user: User) -> None:
        with user.started(*FRESH) as program:
            told = program.until(lambda event: event["event"] == "tunnel.stats")
            assert told["session"] == NAME
            assert told["bytes_to_agent"] + told["bytes_from_agent"] > 0
            program.process.terminate()
            assert program.finish() == 0

    def test_is_asked_for_as_the_user_wishes(self, user: User, x2go: FakeX2Go) -> None:
        user.with_broken_nxproxy()
        options = ["--kind", "rootless", "--geometry", "1024x768", "--link", "isdn", "--pack", "nopack"]
        user.run("--command", "/usr/bin/xterm", *options, "--keyboard", "de", "--clipboard", "none")
        assert x2go.called("x2gostartagent") == []
        x2go.programs = {"/usr/bin/xterm"}
        user.run("--command", "/usr/bin/xterm", *options, "--keyboard", "de", "--clipboard", "none")
        assert x2go.called("x2gostartagent") == [
            ["1024x768", "isdn", "nopack", "unix-kde-depth_24", "de", "pc105/de", "1", "R", "xterm", "none"]
        ]

    def test_has_these_defaults(self, user: User, x2go: FakeX2Go) -> None:
        """And a desktop's name is not looked up: x2goruncommand does that."""
        user.with_broken_nxproxy()
        user.run("--command", "XFCE4")
        assert x2go.called("x2gostartagent") == [
            ["800x600", "adsl", "16m-jpeg-9", "unix-kde-depth_24", "us", "auto", "1", "D", "XFCE4", "both"]
        ]

    def test_what_a_shell_would_read_reaches_its_program_as_it_is(self, user: User, x2go: FakeX2Go) -> None:
        with user.started("--command", "xterm -e $(reboot);`reboot`'\"&|>x") as program:
            program.until(lambda event: event["event"] == "session.program_started")
            program.process.terminate()
            program.finish()
        space = "X2GO_SPACE_CHAR"
        assert x2go.ran[0][4] == f"xterm{space}-e{space}$(reboot);`reboot`'\"&|>x"

    def test_that_is_never_shown_is_terminated(self, user: User, x2go: FakeX2Go) -> None:
        user.with_broken_nxproxy()
        program = user.run(*FRESH)
        assert program.process.returncode >= EndReason.PROXY_NOT_FOUND.cli_status
        assert left(program) == ("terminated", "")
        assert x2go.called("x2goterminate-session") == [[NAME]]
        assert x2go.ran == []

    def test_whose_program_cannot_be_started_is_terminated(self, user: User, x2go: FakeX2Go) -> None:
        """It would be an empty one, which nobody can end from within."""
        x2go.answer("x2golistsessions", 1)
        program = user.run(*FRESH)
        assert "status 1" in failure(program)
        assert program.states[-1] == "stopped"
        assert left(program) == ("terminated", "")

    def test_that_was_asked_for_when_a_signal_came_is_terminated(self, user: User, x2go: FakeX2Go) -> None:
        """The server's answer is waited for: nobody else knows the session's name."""
        asked, go_on = threading.Event(), threading.Event()
        start = x2go.ssh.commands["x2gostartagent"]

        def slow(line: str) -> tuple[int, bytes, bytes]:
            asked.set()
            assert go_on.wait(WAIT_S)
            return start(line)

        x2go.ssh.commands = {**x2go.ssh.commands, "x2gostartagent": slow}
        with user.started(*FRESH) as program:
            assert asked.wait(WAIT_S)
            program.process.send_signal(signal.SIGINT)
            go_on.set()
            assert program.finish() == 0
        assert x2go.called("x2goterminate-session") == [[NAME]]
        assert program.states == []

    def test_that_ends_with_its_program_is_told_of(self, user: User, x2go: FakeX2Go) -> None:
        with user.started(*FRESH) as program:
            program.until(lambda event: event["event"] == "session.program_started")
            x2go.status = None  # before the agent goes: the server may be asked at once
            x2go.agents[-1].terminate()
            x2go.agents[-1].wait(WAIT_S)
            assert program.finish() == 0
        assert left(program) == ("finished", "")
        assert program.named("proxy.transition")[-1]["reason"] == "session_terminated"

    def test_whose_connection_is_lost_may_be_resumed(self, user: User, x2go: FakeX2Go) -> None:
        with user.started(*FRESH) as program:
            program.until(lambda event: event["event"] == "session.program_started")
            x2go.ssh.drop()
            assert program.finish() == EndReason.TRANSPORT_LOST.cli_status
            assert program.errors == ""
        status, hint = left(program)
        assert status == "unknown"
        assert f"--session {NAME}" in hint


class TestWhatIsMissingHere:
    """Costs no session, since the server is not even connected to."""

    def refused(self, user: User, reason: EndReason) -> None:
        program = user.run(*FRESH)
        assert failure(program, reason.cli_status, "preflight.failed").startswith(f"{reason}: ")
        assert len(program.events) == 1
        assert user.x2go.ssh.sessions_opened == 0

    def test_nxproxy(self, user: User) -> None:
        user.environ["NXPROXY_BINARY"] = "/nowhere/nxproxy"
        self.refused(user, EndReason.PROXY_NOT_FOUND)

    def test_a_display(self, user: User) -> None:
        user.environ["DISPLAY"] = ""
        self.refused(user, EndReason.DISPLAY_UNAVAILABLE)

    def test_a_sessions_root(self, user: User) -> None:
        (user.home.path / ".x2go").write_text("no directory")
        self.refused(user, EndReason.LISTEN_FAILED)

    def test_xauth_where_the_x_server_wants_a_cookie(self, user: User) -> None:
        user.environ["PATH"] = str(user.home.path)
        environ = {standins.COOKIE_VARIABLE: COOKIE}
        with subprocess.Popen(standins.command("display"), env=environ, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            user.environ["DISPLAY"] = process.stdout.readline().split()[1]
            self.refused(user, EndReason.DISPLAY_UNAVAILABLE)
            process.kill()


@pytest.mark.parametrize("directory", [".x2go", "in a place, with=odd:letters"])
def test_what_is_tried_here_leaves_nothing_and_can_be_tried_again(user: User, directory: str) -> None:
    """Also where the program's options are in a file; it is where a proxy's would be, not below the sessions root."""
    user.environ["X2GOKDRIVECLIENT_BINARY"] = user.environ["NXPROXY_BINARY"]
    user.environ["XDG_RUNTIME_DIR"] = str(user.home.ssh)
    root = user.home.path / directory
    root.mkdir()
    before = sorted(user.home.path.rglob("*"))
    for _ in range(2):
        program = user.run("--backend", "kdrive", "--session", NAME, "--sessions-root", str(root))
        assert "There is no session." in failure(program, 2, "usage.invalid")
        assert sorted(user.home.path.rglob("*")) == before


class TestAServer:
    def test_without_x2go_is_told_with_its_package(self, user: User, x2go: FakeX2Go) -> None:
        x2go.without("x2gostartagent")
        words = failure(user.run(*FRESH))
        assert words.startswith("x2goserver_missing: ")
        assert "package x2goserver" in words

    def test_without_the_program_is_asked_for_no_session(self, user: User, x2go: FakeX2Go) -> None:
        assert "no program xtrem" in failure(user.run("--command", "xtrem"))
        assert x2go.called("x2gostartagent") == []

    def test_that_allows_no_more_sessions_is_told_in_words(self, user: User, x2go: FakeX2Go) -> None:
        x2go.answer("x2gostartagent", 9, errors="LIMIT 5\n")
        words = failure(user.run(*FRESH))
        assert words.startswith("not_started: ")
        assert "as many sessions as are allowed" in words

    def test_whose_answer_cannot_be_read_but_for_the_name_keeps_no_session(self, user: User, x2go: FakeX2Go) -> None:
        x2go.answer("x2gostartagent", output=f"50\n{COOKIE}\n4711\n{NAME}\nno port\n30002\n30003\n")
        words = failure(user.run(*FRESH))
        assert words.startswith("not_started: ")
        assert "started no session" not in words
        assert f"{NAME} was unusable, so it was terminated" in words
        assert x2go.called("x2goterminate-session") == [[NAME]]

    def test_that_does_not_terminate_that_session_either_is_told_of(self, user: User, x2go: FakeX2Go) -> None:
        x2go.answer("x2gostartagent", output=f"50\n{COOKIE}\n4711\n{NAME}\n")
        x2go.answer("x2goterminate-session", 1)
        words = failure(user.run(*FRESH))
        assert f"{NAME} may have been started" in words
        assert "proxy-fsm sessions" in words

    def test_that_says_that_it_failed_is_believed_whatever_else_it_says(self, user: User, x2go: FakeX2Go) -> None:
        output = f"50\n{COOKIE}\n4711\n{NAME}\n30001\n30002\n30003\n"
        x2go.answer("x2gostartagent", 1, output=output, errors="no database today\n")
        words = failure(user.run(*FRESH))
        assert words.startswith("not_started: x2gostartagent exited with status 1")
        assert "no database today" in words
        assert x2go.called("x2goterminate-session") == [[NAME]]

    def test_that_says_anything_else_may_have_started_one(self, user: User, x2go: FakeX2Go) -> None:
        x2go.answer("x2gostartagent", output="Welcome\nto\nour\nserver\n")
        words = failure(user.run(*FRESH))
        assert "started no session" not in words
        assert "may have started one anyway: see proxy-fsm sessions" in words
        assert x2go.called("x2goterminate-session") == []

    @pytest.mark.parametrize("name", ["-rf", "a b", "../x", "x;reboot"])
    def test_that_names_a_session_as_none_can_be_named_is_not_believed(
        self, user: User, x2go: FakeX2Go, name: str
    ) -> None:
        x2go.answer("x2gostartagent", output=f"50\n{COOKIE}\n4711\n{name}\n30001\n30002\n30003\n")
        assert failure(user.run(*FRESH)).startswith("not_started: ")
        assert {words[0] for words in x2go.calls} == {"sh", "x2gostartagent"}

    def test_that_goes_while_it_is_asked_may_have_started_one(self, user: User, x2go: FakeX2Go) -> None:
        def drop(_line: str) -> tuple[int, bytes, bytes]:
            x2go.ssh.drop()
            return 0, b"", b""

        x2go.ssh.commands = {**x2go.ssh.commands, "x2gostartagent": drop}
        words = failure(user.run(*FRESH))
        assert words.startswith("connection_lost: ")
        assert "proxy-fsm sessions" in words


class TestASuspendedSession:
    @pytest.fixture(autouse=True)
    def suspended(self, x2go: FakeX2Go) -> None:
        x2go.status = "S"

    def test_is_resumed_by_its_name(self, user: User, x2go: FakeX2Go) -> None:
        with user.started("--session", NAME, "--keyboard", "fr", "--geometry", "fullscreen") as program:
            program.until_state("running")
            program.process.terminate()
            assert program.finish() == 0
        assert left(program)[0] == "suspended"
        assert x2go.called("x2goresume-session") == [
            [NAME, "fullscreen", "adsl", "16m-jpeg-9", "fr", "pc105/fr", "1", "both"]
        ]
        assert x2go.called("x2gostartagent") == x2go.ran == []

    def test_that_is_not_shown_is_suspended_again(self, user: User, x2go: FakeX2Go) -> None:
        user.with_broken_nxproxy()
        program = user.run("--session", NAME)
        assert program.process.returncode >= EndReason.PROXY_NOT_FOUND.cli_status
        status, hint = left(program)
        assert status == "suspended"
        assert f"--session {NAME}" in hint
        assert x2go.called("x2gosuspend-session") == [[NAME]]
        assert x2go.called("x2goterminate-session") == []

    def test_is_gone_on_with_as_it_was_connected_to(self, user: User) -> None:
        """With everything that was said but for the session's kind and how events are written."""
        root = str(user.home.path / "a root")
        said = ["--accept-unknown-host", "--backend", "kdrive", "--sessions-root", root, "--ready-timeout", "7.5"]
        said += ["--geometry", "1024x768", "--link", "lan", "--clipboard", "none"]
        user.environ["X2GOKDRIVECLIENT_BINARY"] = user.with_broken_nxproxy()
        program = user.run("--session", NAME, *said, "--kind", "rootless", "--ask-server", "-v")
        words = ["connect", *user.access, *said, "--session", NAME]
        assert left(program) == ("suspended", f"Resume it: {shlex.join(['proxy-fsm', *words])}")
        verb, bound, _ = make_app().parse_args(words, exit_on_error=False)
        assert verb is connect
        assert bound.arguments["attach_options"].backend == "kdrive"
        assert bound.arguments["ssh_options"].accept_unknown_host

    def test_that_the_server_does_not_resume_is_told(self, user: User, x2go: FakeX2Go) -> None:
        """It prints a port all the same, and its status is 0."""
        errors = f"ERROR: failed to resume session with ID {NAME}\nand more\n"
        x2go.answer("x2goresume-session", output="gr_port=30001\n", errors=errors)
        words = failure(user.run("--session", NAME))
        assert words.startswith("not_resumed: ")
        assert f"failed to resume session with ID {NAME}" in words

    def test_whose_port_cannot_be_read_is_told(self, user: User, x2go: FakeX2Go) -> None:
        x2go.answer("x2goresume-session", output="gr_port=x\n")
        program = user.run("--session", NAME)
        assert failure(program).startswith("answer_unreadable: ")
        assert left(program)[0] == "suspended"

    def test_another_one_is_not_taken_for_it(self, user: User, x2go: FakeX2Go) -> None:
        x2go.other_rows = [row("bob-51", "R")]
        words = failure(user.run("--session", "alice"), 2, "usage.invalid")
        assert f"It lists: {NAME} (suspended), bob-51 (running)." in words
        assert x2go.called("x2goresume-session") == []

    def test_where_there_is_none_that_is_said(self, user: User, x2go: FakeX2Go) -> None:
        x2go.status = None
        assert "There is no session." in failure(user.run("--session", NAME), 2, "usage.invalid")


class TestASessionThatIsShownElsewhere:
    @pytest.fixture(autouse=True)
    def running(self, x2go: FakeX2Go) -> None:
        x2go.status = "R"

    def test_is_not_taken_over_unasked(self, user: User, x2go: FakeX2Go) -> None:
        words = failure(user.run("--session", NAME), 2, "usage.invalid")
        assert "192.0.2.7" in words
        assert "x2gosuspend-session" in words
        assert "--take-over" in words
        assert [words[0] for words in x2go.calls] == ["x2golistsessions"]

    def test_is_suspended_before_it_is_resumed(self, user: User, x2go: FakeX2Go) -> None:
        """Which takes a while: the server lists it as running until its agent has let go."""
        x2go.answer("x2gosuspend-session")
        listings = iter([row(status="R"), row(status="R"), row(status="R"), row(status="S")])

        def listing(line: str) -> tuple[int, bytes, bytes]:
            x2go.calls.append([line])
            return 0, next(listings, row(status="S")).encode(), b""

        x2go.ssh.commands = {**x2go.ssh.commands, "x2golistsessions": listing}
        with user.started("--session", NAME, "--take-over") as program:
            program.until_state("running")
            program.process.terminate()
            assert program.finish() == 0
        names = [words[0] for words in x2go.calls]
        asked = ["x2golistsessions", "x2gosuspend-session", *["x2golistsessions"] * 3, "x2goresume-session"]
        assert names[: len(asked)] == asked
        assert program.named("session.taken_over")

    def test_that_ends_instead_is_told(self, user: User, x2go: FakeX2Go) -> None:
        def end(_line: str) -> tuple[int, bytes, bytes]:
            x2go.status = None
            return 0, b"", b""

        x2go.ssh.commands = {**x2go.ssh.commands, "x2gosuspend-session": end}
        program = user.run("--session", NAME, "--take-over")
        assert "ended instead" in failure(program)
        assert left(program) == ("finished", "")

    def test_a_signal_ends_the_waiting(self, user: User, x2go: FakeX2Go) -> None:
        x2go.answer("x2gosuspend-session")
        with user.started("--session", NAME, "--take-over") as program:
            program.until(lambda event: event["event"] == "session.taken_over")
            program.process.send_signal(signal.SIGINT)
            x2go.status = "S"
            assert program.finish() == 0
        assert program.events[-1]["event"] == "interrupted"
        assert x2go.called("x2goresume-session") == []
        status, hint = left(program)
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
def test_what_cannot_be_done_is_wrong_usage(
    arguments: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxy_fsm.cli import main  # noqa: PLC0415 - a program each would take a minute

    monkeypatch.setattr(signal, "signal", lambda *_: signal.SIG_DFL)
    assert main(["connect", "nobody@server.invalid", "--log-format", "json", *arguments]) == 2
    out, err = capfd.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    assert '"usage.invalid"' in out


def test_the_session_root_is_private(user: User) -> None:
    with user.started(*FRESH) as program:
        program.until_state("running")
        program.process.terminate()
        program.finish()
    root = user.home.path / ".x2go"
    assert root.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in root.iterdir()] == [f"S-{NAME}"]
    shutil.rmtree(root)
