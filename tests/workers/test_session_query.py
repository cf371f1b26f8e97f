"""The server is queried for a session's status, until that changes or the query is cancelled."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm.evidence import SessionStatusReceived, SessionTakenOver
from proxy_fsm.session import SessionInfo, SessionStatus
from proxy_fsm.testing.ssh_server import LoopbackSSHServer
from proxy_fsm.workers.session_query import SessionStatusQuery
from tests.helpers.inbox import Inbox
from tests.helpers.wait import WAIT_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    import paramiko

NAME = "alice-51-1795334442_stDxterm_dp24"
OTHER = "alice-50-1795334441_stDxterm_dp24"
SESSION = SessionInfo(name=NAME, graphics_port=30001)


def row(status: str, name: str = NAME, port: int = 30001) -> bytes:
    """One line of x2golistsessions."""
    return (
        f"4711|{name}|51|server|{status}|2026-11-22T11:38:00|0123456789abcdef0123456789abcdef|192.0.2.7|{port}|30002|"
        "2026-11-22T11:39:00|alice|60|30003|-1|-1\n"
    ).encode()


class Lister:
    """A server's x2golistsessions: gives one answer after the other, and repeats the last."""

    def __init__(self, *answers: bytes, status: int = 0) -> None:
        self.calls: list[str] = []
        self.called = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._answers = list(answers)
        self._status = status

    def __call__(self, command: str) -> tuple[int, bytes, bytes]:
        self.calls.append(command)
        self.called.set()
        assert self.may_answer.wait(WAIT_S)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return self._status, answer, b"a warning\n"


class Trial:
    """A query, and what it posts."""

    def __init__(self, transport: paramiko.Transport) -> None:
        self.inbox = Inbox()
        self.query = SessionStatusQuery(transport, SESSION, self.inbox.post)

    def start(self) -> Trial:
        self.query.start()
        return self

    def answers(self) -> list[SessionStatus | None]:
        """Wait for the thread's end; return its answers."""
        self.query.thread.join(WAIT_S)
        assert not self.query.thread.is_alive()
        return [seen.status for seen in self.inbox.seen if isinstance(seen, SessionStatusReceived)]

    def answer(self) -> SessionStatus | None:
        """Wait for the thread's end; return its one answer."""
        (status,) = self.answers()
        return status


@pytest.fixture
def server() -> Iterator[LoopbackSSHServer]:
    with LoopbackSSHServer() as running:
        yield running


@pytest.fixture
def transport(server: LoopbackSSHServer) -> Iterator[paramiko.Transport]:
    connected = server.connect_transport()
    yield connected
    connected.close()


def assert_usable(server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
    """Check that the caller's transport still works, and that no channel is left on it."""
    server.commands = {"true": lambda _: (0, b"", b"")}
    channel = transport.open_session(timeout=WAIT_S)
    channel.exec_command("true")
    assert channel.recv_exit_status() == 0
    channel.close()
    eventually(lambda: len(transport._channels) == 0)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("output", "status"),
    [
        (row("S"), SessionStatus.SUSPENDED),
        (row("F"), SessionStatus.FINISHED),
        (row("R", OTHER) + row("S") + row("F", OTHER + "x"), SessionStatus.SUSPENDED),
        (row("S") + row("X", OTHER), SessionStatus.SUSPENDED),
        (row("R", OTHER).replace(b"30001", b"none") + row("S"), SessionStatus.SUSPENDED),
        (b"perl:warning:Settinglocalefailed.\n" + row("S"), SessionStatus.SUSPENDED),
        (b"gibberish\n" + row("S"), SessionStatus.SUSPENDED),
    ],
)
def test_listed_status_is_posted(
    server: LoopbackSSHServer, transport: paramiko.Transport, output: bytes, status: SessionStatus
) -> None:
    lister = Lister(output)
    server.commands = {"x2golistsessions": lister}
    assert Trial(transport).start().answer() is status
    assert set(lister.calls) == {"x2golistsessions"}
    assert_usable(server, transport)


def test_session_on_another_port_was_taken_over(server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
    server.commands = {"x2golistsessions": Lister(row("R"), row("R", port=30011))}
    trial = Trial(transport).start()
    assert trial.answers() == [SessionStatus.RUNNING]
    taken = trial.inbox.seen[-1]
    assert isinstance(taken, SessionTakenOver)
    assert (taken.client, taken.used) == ("192.0.2.7", "2026-11-22T11:39:00")


def test_session_running_again_after_it_was_suspended_was_taken_over(
    server: LoopbackSSHServer, transport: paramiko.Transport
) -> None:
    """Also on the port that it had, which x2goresume-session keeps if it is free."""
    server.commands = {"x2golistsessions": Lister(row("R"), row("S"), row("R"))}
    trial = Trial(transport).start()
    assert trial.answers() == [SessionStatus.RUNNING]
    assert isinstance(trial.inbox.seen[-1], SessionTakenOver)


@pytest.mark.parametrize("looks", [1, 2])
def test_suspended_session_that_is_being_resumed_was_taken_over(
    server: LoopbackSSHServer, transport: paramiko.Transport, looks: int
) -> None:
    """A client that takes it over with one command, or with two."""
    found = iter([(1, b"", b"")] * (looks - 1) + [(0, b"4712\n", b"")])
    server.commands = {"x2golistsessions": Lister(row("S")), "pgrep": lambda _: next(found)}
    trial = Trial(transport).start()
    assert trial.answers() == []
    taken = trial.inbox.seen[-1]
    assert isinstance(taken, SessionTakenOver)
    assert (taken.client, taken.used) == ("", "")


def test_slow_server_is_not_asked_twice(
    server: LoopbackSSHServer, transport: paramiko.Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy_fsm.workers.session_query._SLOW_S", 0.0)
    lister = Lister(row("S"))
    server.commands = {"x2golistsessions": lister}
    assert Trial(transport).start().answer() is SessionStatus.SUSPENDED
    assert len(lister.calls) == 1


@pytest.mark.parametrize(
    "output",
    [
        b"",
        row("R", OTHER),
        row("S", NAME + "x") + row("S", NAME[:-1]),
        f"|{OTHER}|\n".encode(),
        b"gibberish\n",
        b"\xff\xfe|" * 20,
    ],
)
@pytest.mark.parametrize(
    ("recorded", "status"),
    [(b"F", SessionStatus.FINISHED), (b"S\n", SessionStatus.SUSPENDED), (b"", None), (b"X", None)],
)
def test_session_that_is_not_listed_has_its_recorded_status(
    server: LoopbackSSHServer,
    transport: paramiko.Transport,
    output: bytes,
    recorded: bytes,
    status: SessionStatus | None,
) -> None:
    """The list is empty for an account with a domain in its name, and lacks the sessions of other accounts."""
    database = Lister(recorded)
    server.commands = {"x2golistsessions": Lister(output), "x2gogetstatus": database}
    assert Trial(transport).start().answer() is status
    assert set(database.calls) == {f"x2gogetstatus {NAME}"}
    assert_usable(server, transport)


def test_query_is_repeated_while_the_session_is_listed_as_running(
    server: LoopbackSSHServer, transport: paramiko.Transport
) -> None:
    lister = Lister(row("R"), row("R"), row("S"))
    server.commands = {"x2golistsessions": lister}
    assert Trial(transport).start().answers() == [SessionStatus.RUNNING, SessionStatus.SUSPENDED]
    assert len(lister.calls) == 4
    assert_usable(server, transport)


def test_query_is_repeated_until_it_is_cancelled(server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
    lister = Lister(row("R"))
    server.commands = {"x2golistsessions": lister}
    trial = Trial(transport).start()
    eventually(lambda: len(lister.calls) >= 2)
    trial.query.cancel()
    assert trial.answers() == [SessionStatus.RUNNING]
    assert_usable(server, transport)


@pytest.mark.parametrize(
    "lister",
    [
        Lister(b""),
        Lister(row("X")),
        Lister(row("S")[:60]),
        Lister(row("R") + row("S")),
        Lister(row("S"), status=1),
        Lister(b"", status=127),
        Lister(b"x" * (6 << 20)),  # more than fits into the channel's window
        None,
    ],
    ids=[
        "no record of what is not listed",
        "unknown status",
        "a part of a row",
        "two rows",
        "exit status 1",
        "exit status 127",
        "no end",
        "no such command",
    ],
)
def test_unusable_answer_is_none(
    server: LoopbackSSHServer, transport: paramiko.Transport, lister: Lister | None
) -> None:
    server.commands = {} if lister is None else {"x2golistsessions": lister}
    assert Trial(transport).start().answer() is None
    assert_usable(server, transport)


def test_cancel_ends_the_wait_for_an_answer(server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
    lister = Lister(row("S"))
    lister.may_answer.clear()
    server.commands = {"x2golistsessions": lister}
    trial = Trial(transport).start()
    assert lister.called.wait(WAIT_S)
    assert trial.query.thread.is_alive()
    trial.query.cancel()
    assert trial.answers() == [], "though the server still has not answered"
    lister.may_answer.set()
    assert_usable(server, transport)


def test_cancel_ends_the_wait_for_a_channel(server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
    """And if the server opens the channel after all, it is closed."""
    server.commands = {"x2golistsessions": Lister(row("S"))}
    server.freeze()
    trial = Trial(transport).start()
    eventually(lambda: trial.query._command is not None)
    trial.query.cancel()
    assert trial.answers() == []
    server.thaw()
    assert_usable(server, transport)


def test_query_cancelled_before_the_start_opens_no_channel(
    server: LoopbackSSHServer, transport: paramiko.Transport
) -> None:
    trial = Trial(transport)
    trial.query.cancel()
    assert trial.start().answers() == []
    assert server.sessions_opened == 0


def test_cancel_after_the_answer_or_twice_is_harmless(server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
    server.commands = {"x2golistsessions": Lister(row("S"))}
    trial = Trial(transport).start()
    assert trial.answer() is SessionStatus.SUSPENDED
    trial.query.cancel()
    trial.query.cancel()
    assert len(trial.inbox.seen) == 1
    assert_usable(server, transport)


TRACED = (SessionStatusQuery._run, SessionStatusQuery._answer, SessionStatusQuery._output_of)
LINES = [
    (function.__qualname__, line)
    for function in TRACED
    for line in sorted({line for *_, line in function.__code__.co_lines() if line is not None})
]


@pytest.mark.parametrize(("function", "line"), LINES)
def test_cancel_at_any_line_leaves_no_channel_and_no_later_answer(
    server: LoopbackSSHServer, transport: paramiko.Transport, function: str, line: int
) -> None:
    server.commands = {"x2golistsessions": Lister(row("R"), row("S"))}
    trial = Trial(transport)
    (code,) = (each.__code__ for each in TRACED if each.__qualname__ == function)
    cancelling: list[threading.Thread] = []

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code is not code:
            return None
        if event == "line" and frame.f_lineno == line and not cancelling:
            server.freeze()  # nothing that it waits for arrives any more
            cancelling.append(threading.Thread(target=trial.query.cancel, daemon=True))
            cancelling[0].start()
            cancelling[0].join(0.05)  # it waits if the query holds the lock
        return trace

    before = threading.gettrace()
    threading.settrace(trace)
    try:
        trial.start()
    finally:
        threading.settrace(before)
    answers = trial.answers()
    for thread in cancelling:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert answers in ([], [SessionStatus.RUNNING], [SessionStatus.RUNNING, SessionStatus.SUSPENDED])
    server.thaw()
    assert_usable(server, transport)


@pytest.mark.parametrize("reset", [True, False])
def test_transport_that_ends_during_the_query_is_none(
    server: LoopbackSSHServer, transport: paramiko.Transport, *, reset: bool
) -> None:
    lister = Lister(row("S"))
    lister.may_answer.clear()
    server.commands = {"x2golistsessions": lister}
    trial = Trial(transport).start()
    assert lister.called.wait(WAIT_S)
    server.drop(reset=reset)
    assert trial.answer() is None
    lister.may_answer.set()


def test_ended_transport_is_none(transport: paramiko.Transport) -> None:
    transport.close()
    transport.join(WAIT_S)
    assert Trial(transport).start().answer() is None


def test_refused_channel_is_none(
    server: LoopbackSSHServer, transport: paramiko.Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy_fsm.testing.ssh_server._Interface.check_channel_request", lambda *_: 1)
    assert Trial(transport).start().answer() is None
    monkeypatch.undo()
    assert_usable(server, transport)
