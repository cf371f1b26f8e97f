"""An X2Go server's commands: each answer is read, refused with its reason, or given up in time."""

from __future__ import annotations

import contextlib
import pickle
import shlex
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from paramiko.common import OPEN_FAILED_CONNECT_FAILED

from proxy_fsm import InvalidSession, ServerError, ServerReason, SessionInfo, SessionStatus
from proxy_fsm import server as x2go
from proxy_fsm.server import ServerCapabilities, SessionOptions, X2GoServer
from proxy_fsm.ssh.framed import frame
from tests.helpers.holdings import own_threads
from tests.helpers.wait import WAIT_S, eventually
from tests.helpers.x2go_server import COOKIE, NAME, FakeX2Go, row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import paramiko

OPTIONS = SessionOptions()
OTHER = "alice-51-1795334443_stRfirefox_dp24"
ANSWER = f"50\n{COOKIE}\n4711\n{NAME}\n30001\n30002\n30003\n"


@pytest.fixture
def fake() -> Iterator[FakeX2Go]:
    with FakeX2Go() as running:
        yield running


@pytest.fixture
def transport(fake: FakeX2Go) -> Iterator[paramiko.Transport]:
    connected = fake.ssh.connect_transport()
    yield connected
    connected.close()


@pytest.fixture
def server(transport: paramiko.Transport) -> X2GoServer:
    return X2GoServer(transport)


def refusal(call: Callable[[], object]) -> ServerError:
    """Return the ServerError that a call raises, after checking that it shows no cookie."""
    with pytest.raises(ServerError) as caught:
        call()
    error = caught.value
    assert COOKIE not in f"{error} {error!r} {error.detail} {error.hint}".lower()
    assert error.detail[0].isupper() or error.detail.startswith("x2go")
    assert error.detail.endswith(".")
    return error


class Gate:
    """A command that answers when it may, and says when it was called."""

    def __init__(self, answer: Callable[[str], tuple[int, bytes, bytes]]) -> None:
        self._answer = answer
        self.called = threading.Event()
        self.opened = threading.Event()

    def __call__(self, line: str) -> tuple[int, bytes, bytes]:
        self.called.set()
        assert self.opened.wait(WAIT_S)
        return self._answer(line)


@pytest.fixture
def gate(fake: FakeX2Go) -> Iterator[Callable[[str], Gate]]:
    """A function that puts a gate before a command; at the end all are opened."""
    gates: list[Gate] = []

    def put(command: str) -> Gate:
        gates.append(Gate(fake.ssh.commands[command]))
        fake.ssh.commands = {**fake.ssh.commands, command: gates[-1]}
        return gates[-1]

    yield put
    for each in gates:
        each.opened.set()


class Caller:
    """A call on a thread of its own, and the error that it raises."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self.error: ServerError | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except ServerError as error:
            self.error = error

    def reason(self) -> ServerReason | None:
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        return None if self.error is None else self.error.reason


class TestSessions:
    def test_sessions_are_listed_in_order(self, fake: FakeX2Go, server: X2GoServer) -> None:
        fake.status = "S"
        fake.other_rows = [row(OTHER, "R")]
        assert [(each.info.name, each.status) for each in server.sessions()] == [
            (NAME, SessionStatus.SUSPENDED),
            (OTHER, SessionStatus.RUNNING),
        ]

    def test_one_session_is_found_among_malformed_ones(self, fake: FakeX2Go, server: X2GoServer) -> None:
        fake.status = "S"
        fake.other_rows = [row(OTHER, "X")]
        found = server.session(NAME)
        assert found is not None
        assert found.info.agent_pid == 4711
        assert server.session("bob-1") is None
        assert refusal(server.sessions).reason is ServerReason.UNREADABLE_ANSWER

    def test_name_that_is_none_is_refused(self, fake: FakeX2Go, server: X2GoServer) -> None:
        for call in (server.session, server.suspend, server.terminate, lambda name: server.resume(name, OPTIONS)):
            with pytest.raises(InvalidSession):
                call("a;reboot")
        assert fake.calls == []

    def test_capabilities_are_versions_and_features(self, fake: FakeX2Go, server: X2GoServer) -> None:
        fake.answer("x2goversion", output="x2goserver: 4.1.0.3\nnonsense\nx2goserver-x2goagent: 3.5.99.26\n")
        fake.answer("x2gofeaturelist", output="X2GO_LIST_DESKTOPS\n\nX2GO_SET_KEYBOARD\n")
        assert server.capabilities() == ServerCapabilities(
            versions={"x2goserver": "4.1.0.3", "x2goserver-x2goagent": "3.5.99.26"},
            features=frozenset({"X2GO_LIST_DESKTOPS", "X2GO_SET_KEYBOARD"}),
        )


class TestStart:
    def test_answer_has_all_that_a_proxy_and_a_program_need(self, fake: FakeX2Go, server: X2GoServer) -> None:
        session = server.start(SessionOptions(keyboard="us(intl)", geometry="maximize"), "/usr/bin/xterm")
        assert session == SessionInfo(
            name=NAME,
            cookie=COOKIE,
            graphics_port=fake.port,
            display=50,
            agent_pid=4711,
            sound_port=30002,
            sshfs_port=30003,
        )
        (arguments,) = fake.called("x2gostartagent")
        assert (arguments[0], arguments[4:7], arguments[8]) == (
            "maximize",
            ["us(intl)", "pc105/us(intl)", "1"],
            "xterm",
        )
        server.run(session, "xterm -e top")
        assert fake.ran == [["50", "4711", NAME, "30002", "xtermX2GO_SPACE_CHAR-eX2GO_SPACE_CHARtop", "none", "D"]]
        assert fake.called("x2golistsessions") == []

    @pytest.fixture(autouse=True)
    def xterm_by_path(self, fake: FakeX2Go) -> None:
        fake.programs = {"xterm", "/usr/bin/xterm"}

    @pytest.mark.parametrize(
        ("exit_status", "errors", "reason", "words"),
        [
            (9, "LIMIT 2\n", ServerReason.LIMIT_REACHED, "as many sessions as are allowed"),
            (9, "perl: warning: Setting locale failed.\n" * 7 + "LIMIT 2\n", ServerReason.LIMIT_REACHED, '"LIMIT 2"'),
            (9, "", ServerReason.LIMIT_REACHED, "as many sessions as are allowed"),
            (8, "ACCESS DENIED\n", ServerReason.ACCESS_DENIED, "does not share"),
            (10, "Unable to find free display port\n", ServerReason.NO_RESOURCES, "no free display"),
            (11, "Unable to find free port\n", ServerReason.NO_RESOURCES, "no free port"),
            (12, "Failed to start X2Go Agent\n", ServerReason.AGENT_FAILED, "ended at once"),
            (2, 'The super-user "root" is not allowed\n', ServerReason.COMMAND_FAILED, "super-user"),
            (0, "LIMIT 2\n", ServerReason.LIMIT_REACHED, "as many sessions as are allowed"),
            (0, "", ServerReason.UNREADABLE_ANSWER, "printed nothing"),
            (127, "sh: x2gostartagent: not found\n", ServerReason.NOT_X2GO, "is not an X2Go server"),
        ],
    )
    def test_refusal_has_its_reason(
        self,
        fake: FakeX2Go,
        server: X2GoServer,
        *,
        exit_status: int,
        errors: str,
        reason: ServerReason,
        words: str,
    ) -> None:
        fake.answer("x2gostartagent", exit_status, errors=errors)
        error = refusal(lambda: server.start(OPTIONS, "xterm"))
        assert (error.reason, error.exit_status) == (reason, exit_status)
        assert words in error.detail
        assert fake.called("x2goterminate-session") == []

    def test_program_that_the_server_lacks_costs_no_session(self, fake: FakeX2Go, server: X2GoServer) -> None:
        assert refusal(lambda: server.start(OPTIONS, "nosuch")).reason is ServerReason.PROGRAM_NOT_FOUND
        assert fake.called("x2gostartagent") == []

    @pytest.mark.parametrize("program", ["", "-x", "a b", "a;b", "..", "/", "$HOME", "é"])
    def test_program_that_is_no_name_is_refused(self, fake: FakeX2Go, server: X2GoServer, program: str) -> None:
        with pytest.raises(ValueError, match="program"):
            server.start(OPTIONS, program)
        assert fake.calls == []

    @pytest.mark.parametrize("answer", [ANSWER.replace("30001", "no port"), ANSWER + ANSWER.replace("50\n", "51\n", 1)])
    def test_session_of_an_unreadable_answer_is_ended(self, fake: FakeX2Go, server: X2GoServer, answer: str) -> None:
        fake.answer("x2gostartagent", output=answer)
        error = refusal(lambda: server.start(OPTIONS, "xterm"))
        assert error.reason is ServerReason.UNREADABLE_ANSWER
        assert f"{NAME} was unusable" in error.hint
        assert fake.called("x2goterminate-session") == [[NAME]]

    def test_cancelled_start_ends_the_session_when_its_name_comes(
        self, fake: FakeX2Go, server: X2GoServer, gate: Callable[[str], Gate]
    ) -> None:
        slow = gate("x2gostartagent")
        caller = Caller(lambda: server.start(OPTIONS, "xterm"))
        assert slow.called.wait(WAIT_S)
        server.cancel()
        assert caller.reason() is ServerReason.CANCELLED
        slow.opened.set()
        eventually(lambda: fake.called("x2goterminate-session") == [[NAME]])
        eventually(lambda: not own_threads("proxy_fsm-command"))

    def test_start_that_takes_too_long_ends_the_session_when_its_name_comes(
        self, fake: FakeX2Go, server: X2GoServer, gate: Callable[[str], Gate], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(x2go, "_START_S", 0.1)
        slow = gate("x2gostartagent")
        error = refusal(lambda: server.start(OPTIONS, "xterm"))
        assert error.reason is ServerReason.NO_ANSWER
        assert "may have started one" in error.hint
        slow.opened.set()
        eventually(lambda: fake.called("x2goterminate-session") == [[NAME]])

    def test_second_cancel_does_not_keep_the_session_of_a_cancelled_start(
        self, fake: FakeX2Go, server: X2GoServer, gate: Callable[[str], Gate], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slow = gate("x2gostartagent")
        caller = Caller(lambda: server.start(OPTIONS, "xterm"))
        assert slow.called.wait(WAIT_S)
        server.cancel()
        assert caller.reason() is ServerReason.CANCELLED
        start = x2go._Call.start

        def start_and_cancel(call: x2go._Call) -> None:
            server.cancel()
            start(call)

        monkeypatch.setattr(x2go._Call, "start", start_and_cancel)
        slow.opened.set()
        eventually(lambda: fake.called("x2goterminate-session") == [[NAME]])

    @pytest.mark.parametrize("ends", [TimeoutError, KeyboardInterrupt])
    def test_answer_that_comes_while_the_wait_ends_is_not_lost(
        self, fake: FakeX2Go, server: X2GoServer, monkeypatch: pytest.MonkeyPatch, ends: type[BaseException]
    ) -> None:
        result = x2go._Call.result

        def ended(call: x2go._Call, timeout_s: float) -> object:
            if call._on_late is None:
                return result(call, timeout_s)
            eventually(lambda: call._completed)
            raise ends

        monkeypatch.setattr(x2go._Call, "result", ended)
        with pytest.raises((ServerError, KeyboardInterrupt)):
            server.start(OPTIONS, "xterm")
        eventually(lambda: fake.called("x2goterminate-session") == [[NAME]])
        eventually(lambda: not own_threads("proxy_fsm-command"))

    def test_start_that_never_answers_is_given_up(
        self,
        server: X2GoServer,
        transport: paramiko.Transport,
        gate: Callable[[str], Gate],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(x2go, "_START_S", 0.1)
        monkeypatch.setattr(x2go, "_LATE_S", 0.1)
        gate("x2gostartagent")
        assert refusal(lambda: server.start(OPTIONS, "xterm")).reason is ServerReason.NO_ANSWER
        eventually(lambda: not own_threads("proxy_fsm-command"))
        assert transport.is_active()


class TestRun:
    @pytest.mark.parametrize("command", ["", " ", "a\nb", "é", "-x", "x" * 1001, ";reboot", "$(reboot)"])
    def test_command_that_cannot_be_run_is_refused(self, fake: FakeX2Go, server: X2GoServer, command: str) -> None:
        session = SessionInfo(name=NAME, graphics_port=1, display=50, agent_pid=4711)
        with pytest.raises(ValueError, match="command"):
            server.run(session, command)
        assert fake.calls == []

    def test_session_without_agent_is_refused(self, server: X2GoServer) -> None:
        with pytest.raises(ValueError, match="agent_pid"):
            server.run(SessionInfo(name=NAME, graphics_port=1, display=50), "xterm")

    def test_kind_is_that_of_the_name(self, fake: FakeX2Go, server: X2GoServer) -> None:
        server.run(SessionInfo(name=OTHER, graphics_port=1, display=51, agent_pid=1), "firefox")
        server.run(SessionInfo(name=OTHER, graphics_port=1, display=51, agent_pid=1), "firefox", published=True)
        assert [each[-1] for each in fake.ran] == ["R", "P"]
        assert fake.ran[0] == ["51", "1", OTHER, "-1", "firefox", "none", "R"]

    def test_kind_is_not_that_in_the_name_of_a_user(self, fake: FakeX2Go, server: X2GoServer) -> None:
        name = "dev_stR-50-1795334442_stDxterm_dp24"
        server.run(SessionInfo(name=name, graphics_port=1, display=50, agent_pid=4711), "xterm")
        assert fake.ran[0][-1] == "D"

    def test_script_is_one_that_sh_can_read_in_its_frame(self, fake: FakeX2Go, server: X2GoServer) -> None:
        server.run(SessionInfo(name=NAME, graphics_port=1, display=50, agent_pid=4711), "xterm -e 'a b'")
        subprocess.run(["sh", "-n", "-c", shlex.split(frame(fake.lines[-1], "mark"))[2]], check=True)


class TestResume:
    def test_suspended_session_gets_its_new_ports(self, fake: FakeX2Go, server: X2GoServer) -> None:
        fake.status = "S"
        session = server.resume(NAME, SessionOptions(geometry="fullscreen", link="lan"))
        assert (session.graphics_port, session.sound_port, session.cookie) == (fake.port, 30002, COOKIE)
        assert fake.called("x2goresume-session") == [
            [NAME, "fullscreen", "lan", "16m-jpeg-9", "us", "auto", "1", "both"]
        ]

    def test_session_shown_elsewhere_is_left_alone(self, fake: FakeX2Go, server: X2GoServer) -> None:
        fake.status = "R"
        error = refusal(lambda: server.resume(NAME, OPTIONS))
        assert error.reason is ServerReason.SESSION_IN_USE
        assert "192.0.2.7" in error.detail
        assert {words[0] for words in fake.calls} == {"x2golistsessions"}

    def test_session_shown_elsewhere_is_taken_over_on_request(self, fake: FakeX2Go, server: X2GoServer) -> None:
        """By x2goresume-session alone, which suspends it first: the client that loses it can see that program."""
        fake.status = "R"
        assert server.resume(NAME, OPTIONS, take_over=True).graphics_port == fake.port
        assert [words[0] for words in fake.calls] == ["x2golistsessions", "x2goresume-session"]

    def test_failed_resume_is_an_error_despite_its_exit_status(self, fake: FakeX2Go, server: X2GoServer) -> None:
        fake.status = "S"
        errors = f"ERROR: failed to resume session with ID {NAME}\nand more\n"
        fake.answer("x2goresume-session", output="gr_port=30001\n", errors=errors)
        error = refusal(lambda: server.resume(NAME, OPTIONS))
        assert error.reason is ServerReason.COMMAND_FAILED
        assert "failed to resume" in error.detail

    @pytest.mark.parametrize("status", [None, "F"])
    def test_session_that_is_not_there_is_no_such_session(
        self, fake: FakeX2Go, server: X2GoServer, status: str | None
    ) -> None:
        fake.status = status
        assert refusal(lambda: server.resume(NAME, OPTIONS)).reason is ServerReason.NO_SUCH_SESSION

    def test_unlisted_session_is_not_reported_as_ended(self, fake: FakeX2Go, server: X2GoServer) -> None:
        fake.answer("x2golistsessions")
        fake.status = "S"
        assert server.status(NAME) is SessionStatus.SUSPENDED
        error = refusal(lambda: server.resume(NAME, OPTIONS))
        assert error.reason is ServerReason.NO_SUCH_SESSION
        assert "is suspended, but the server does not list it" in error.detail


class TestSuspendAndTerminate:
    def test_suspend_waits_until_the_session_is_suspended(self, fake: FakeX2Go, server: X2GoServer) -> None:
        listings = iter([row(status="R"), row(status="R"), row(status="S")])
        fake.ssh.commands = {
            **fake.ssh.commands,
            "x2golistsessions": lambda _: (0, next(listings).encode(), b""),
        }
        server.suspend(NAME)
        assert next(listings, None) is None

    def test_unlisted_session_is_suspended_and_ended_by_the_database(self, fake: FakeX2Go, server: X2GoServer) -> None:
        """As for an account with a domain in its name, to which x2golistsessions shows nothing."""
        fake.answer("x2golistsessions")
        fake.status = "R"
        server.suspend(NAME)
        server.terminate(NAME)
        assert fake.called("x2goterminate-session") == [[NAME]]

    def test_unknown_session_is_neither_suspended_nor_ended(self, fake: FakeX2Go, server: X2GoServer) -> None:
        assert refusal(lambda: server.suspend(OTHER)).reason is ServerReason.NO_SUCH_SESSION
        assert refusal(lambda: server.terminate(OTHER)).reason is ServerReason.NO_SUCH_SESSION
        assert fake.called("x2goterminate-session") == []

    def test_session_that_has_ended_is_no_error_for_terminate_alone(self, fake: FakeX2Go, server: X2GoServer) -> None:
        server.terminate(NAME)
        assert fake.called("x2goterminate-session") == []
        fake.answer("x2gosuspend-session")
        assert refusal(lambda: server.suspend(NAME)).reason is ServerReason.NO_SUCH_SESSION

    def test_cancel_ends_the_wait_for_suspension(self, fake: FakeX2Go, server: X2GoServer) -> None:
        fake.status = "R"
        fake.answer("x2gosuspend-session")
        caller = Caller(lambda: server.suspend(NAME))
        eventually(lambda: len(fake.called("x2golistsessions")) > 1)
        server.cancel()
        assert caller.reason() is ServerReason.CANCELLED

    def test_suspension_that_does_not_happen_is_reported(
        self, fake: FakeX2Go, server: X2GoServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(x2go, "_SUSPEND_S", 0.0)
        fake.status = "R"
        fake.answer("x2gosuspend-session")
        assert refusal(lambda: server.suspend(NAME)).reason is ServerReason.NO_ANSWER


class TestAnswer:
    @pytest.mark.parametrize("unanswered", ["_parse_channel_open", "_handle_channel_request"])
    def test_unanswered_request_has_a_time_limit(
        self, fake: FakeX2Go, monkeypatch: pytest.MonkeyPatch, unanswered: str
    ) -> None:
        """The server answers neither the channel open nor the exec request, for which paramiko waits without limit."""
        monkeypatch.setattr(x2go, "_ANSWER_S", 0.2)
        monkeypatch.setattr(f"proxy_fsm.testing.ssh_server._Connection.{unanswered}", lambda *_: None)
        transport = fake.ssh.connect_transport()
        began = time.monotonic()
        error = refusal(X2GoServer(transport).sessions)
        assert time.monotonic() - began >= 0.2
        assert error.reason is ServerReason.NO_ANSWER
        eventually(lambda: not own_threads("proxy_fsm-command"))
        assert transport.is_active()
        transport.close()

    def test_cancel_ends_all_calls_and_no_later_one(self, server: X2GoServer, gate: Callable[[str], Gate]) -> None:
        slow = gate("x2golistsessions")
        callers = [Caller(server.sessions) for _ in range(3)]
        eventually(lambda: len(server._calls) == 3)
        assert slow.called.wait(WAIT_S)
        server.cancel()
        assert [caller.reason() for caller in callers] == [ServerReason.CANCELLED] * 3
        eventually(lambda: not own_threads("proxy_fsm-command"))
        slow.opened.set()
        assert server.sessions() == ()

    def test_cancel_between_two_commands_ends_the_call(
        self, fake: FakeX2Go, server: X2GoServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        require = X2GoServer._require_program

        def require_and_cancel(of: X2GoServer, program: str) -> None:
            require(of, program)
            server.cancel()

        monkeypatch.setattr(X2GoServer, "_require_program", require_and_cancel)
        assert refusal(lambda: server.start(OPTIONS, "xterm")).reason is ServerReason.CANCELLED
        assert fake.called("x2gostartagent") == []
        assert server.sessions() == ()

    def test_refused_channel_is_no_lost_connection(
        self, server: X2GoServer, transport: paramiko.Transport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As by sshd's MaxSessions, which is 0 for an account that may forward alone."""
        refused = OPEN_FAILED_CONNECT_FAILED
        monkeypatch.setattr("proxy_fsm.testing.ssh_server._Interface.check_channel_request", lambda *_: refused)
        assert refusal(server.sessions).reason is ServerReason.NO_COMMANDS
        assert transport.is_active()

    def test_lost_connection_is_reported(self, fake: FakeX2Go, server: X2GoServer) -> None:
        def drop(_line: str) -> tuple[int, bytes, bytes]:
            fake.ssh.drop()
            return 0, b"", b""

        fake.ssh.commands = {"x2golistsessions": drop}
        assert refusal(server.sessions).reason is ServerReason.CONNECTION_LOST
        assert refusal(server.sessions).reason is ServerReason.CONNECTION_LOST

    def test_failed_command_is_quoted_without_cookies(self, fake: FakeX2Go, server: X2GoServer) -> None:
        fake.answer("x2golistsessions", 5, errors=f"oh\nno database: error\x1b[2J {COOKIE}\nbye\n")
        error = refusal(server.sessions)
        assert (error.reason, error.exit_status) == (ServerReason.COMMAND_FAILED, 5)
        assert '"no database: error\\x1b[2J <hidden>"' in error.detail

    def test_error_survives_pickle(self) -> None:
        error = ServerError(ServerReason.NO_ANSWER, "It did not answer.", exit_status=3)
        copied = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
        assert (copied.reason, copied.detail, copied.hint, copied.exit_status) == (
            error.reason,
            error.detail,
            error.hint,
            3,
        )

    def test_thread_that_cannot_be_started_is_reported(
        self, server: X2GoServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        assert "no thread can be started" in refusal(server.sessions).detail
        assert server._calls == set()

    def test_cancel_without_a_thread_for_the_time_limit_cancels_all(
        self, fake: FakeX2Go, server: X2GoServer, gate: Callable[[str], Gate], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slow = gate("x2gostartagent")
        callers = [Caller(lambda: server.start(OPTIONS, "xterm")) for _ in range(2)]
        eventually(lambda: sum(call._on_late is not None for call in tuple(server._calls)) == 2)

        def refuse(_timer: threading.Timer) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Timer, "start", refuse)
        server.cancel()
        assert [caller.reason() for caller in callers] == [ServerReason.CANCELLED] * 2
        slow.opened.set()
        eventually(lambda: len(fake.called("x2goterminate-session")) == 2)

    def test_signal_that_ends_the_wait_leaves_no_thread(
        self, server: X2GoServer, gate: Callable[[str], Gate], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slow = gate("x2golistsessions")

        def interrupted(*_: object) -> None:
            assert slow.called.wait(WAIT_S)
            raise KeyboardInterrupt

        monkeypatch.setattr(x2go._Call, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            server.sessions()
        eventually(lambda: not own_threads("proxy_fsm-command"))


class TestSessionOptions:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *(("geometry", value) for value in ("800x600", "99999x99999", "fullscreen", "maximize")),
            *(("keyboard", value) for value in ("de", "us(intl)", "ch(fr_nodeadkeys)", "latam", "br(abnt2)")),
            *(("pack", value) for value in ("16m-jpeg-9", "nopack", "adaptive")),
        ],
    )
    def test_value_of_the_servers_commands_is_accepted(self, field: str, value: str) -> None:
        assert getattr(SessionOptions(**{field: value}), field) == value  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "options",
        [
            *({"geometry": value} for value in ("", "0x0", "800", "800x600;x", "maximise")),
            *({"pack": value} for value in ("", "16m jpeg", "a,b", "a/b")),
            *({"keyboard": value} for value in ("", "d", "de/x", "DE", "de,us", "us(", "us(intl)x", "us()")),
            {"kind": "shadow"},
            {"link": "fast"},
            {"clipboard": "yes"},
        ],
    )
    def test_other_value_is_refused(self, options: dict[str, Any]) -> None:
        (name,) = options
        with contextlib.suppress(KeyError), pytest.raises(ValueError, match=f"The {name} must be"):
            SessionOptions(**options)
