"""The preflight acquires step by step, posts what fails, and leaves nothing whenever it is closed."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import tempfile
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm.errors import BackendError
from proxy_fsm.evidence import (
    ChecksPassed,
    Observation,
    PreflightFinished,
    PreflightPassed,
    TunnelClosed,
    WorkerCrashed,
    WorkerFailed,
)
from proxy_fsm.reasons import EndReason
from proxy_fsm.testing.ssh_server import LoopbackSSHServer
from proxy_fsm.workers import checks, forwarder
from proxy_fsm.workers.forwarder import Forwarder
from proxy_fsm.workers.preflight import Preflight
from tests.helpers.holdings import descriptors, nothing_left_open, own_threads
from tests.helpers.inbox import Inbox
from tests.helpers.preflight import CALLS, COOKIE, SESSION, Display, FakeBackend
from tests.helpers.wait import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType

    import paramiko

    from proxy_fsm.backends import Backend
    from proxy_fsm.backends.base import ListenKind


@dataclass
class Trial:
    """A `Preflight` with all that it needs, and what it posts."""

    transport: paramiko.Transport
    root: Path
    backend: Backend
    environ: dict[str, str]
    timeout_s: float

    def __post_init__(self) -> None:
        self.inbox = Inbox()
        self.forwarder = Forwarder(
            self.transport, ("127.0.0.1", 9), max_connections=1, agent_connect_s=1, post=self.inbox.post
        )
        self.preflight = Preflight(
            SESSION,
            self.backend,
            self.forwarder,
            sessions_root=self.root,
            environ=self.environ,
            timeout_s=self.timeout_s,
            post=self.inbox.post,
        )

    @property
    def outcome(self) -> list[Observation]:
        """All observations but `ChecksPassed` and `TunnelClosed`."""
        return [each for each in self.inbox.seen if not isinstance(each, TunnelClosed | ChecksPassed)]

    def run(self) -> list[Observation]:
        self.preflight.start()
        return self.finish()

    def finish(self) -> list[Observation]:
        self.preflight.thread.join(WAIT_S)
        assert not self.preflight.thread.is_alive()
        return self.outcome

    def passed(self) -> PreflightPassed:
        passed, ended = self.run()
        assert isinstance(ended, PreflightFinished)
        assert isinstance(passed, PreflightPassed)
        return passed

    def failed(self) -> BackendError:
        failed, ended = self.run()
        assert isinstance(ended, PreflightFinished)
        assert isinstance(failed, WorkerFailed)
        return failed.error

    def close(self) -> None:
        """Release it as the engine does."""
        self.preflight.close()
        self.forwarder.close()


@pytest.fixture(scope="module")
def server() -> Iterator[LoopbackSSHServer]:
    with LoopbackSSHServer() as running:
        yield running


@pytest.fixture(scope="module")
def transport(server: LoopbackSSHServer) -> Iterator[paramiko.Transport]:
    connected = server.connect_transport()
    yield connected
    connected.close()


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A directory for sockets, whose path is short."""
    path = Path(tempfile.mkdtemp(prefix="pf-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def make(transport: paramiko.Transport, tmp_path: Path, runtime: Path) -> Iterator[Callable[..., Trial]]:
    """Make trials; at the end they are closed, and nothing may be left of them."""
    trials: list[Trial] = []
    before = descriptors()

    def make_trial(
        backend: Backend | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        root: Path = tmp_path / "sessions",
        transport: paramiko.Transport = transport,
        timeout_s: float = WAIT_S,
    ) -> Trial:
        environ = {"XDG_RUNTIME_DIR": str(runtime), **(environ or {})}
        trials.append(Trial(transport, root, backend or FakeBackend(), environ, timeout_s))
        return trials[-1]

    yield make_trial
    for trial in trials:
        trial.close()
        assert_ended_once(trial)
    assert list(runtime.iterdir()) == []
    nothing_left_open(before)
    assert not own_threads()


def assert_ended_once(trial: Trial) -> None:
    """Check that `PreflightFinished` is posted once and last."""
    ends = [number for number, each in enumerate(trial.outcome) if isinstance(each, PreflightFinished)]
    assert ends in ([], [len(trial.outcome) - 1])
    assert ends or not trial.preflight.thread.ident


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestSuccess:
    def test_passed_checks_are_posted_before_the_listener_is_bound(
        self, make: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trial = make()
        posted: list[list[type[Observation]]] = []
        bind = trial.forwarder.bind

        def bound(kind: str, directory: Path) -> str:
            posted.append(trial.inbox.kinds())
            return bind(kind, directory)

        monkeypatch.setattr(trial.forwarder, "bind", bound)
        trial.run()
        assert posted == [[ChecksPassed]]
        assert trial.inbox.kinds() == [ChecksPassed, PreflightPassed, PreflightFinished]

    def test_watch_is_set_when_the_checks_have_passed(self, make: Callable[..., Trial], runtime: Path) -> None:
        backend = FakeBackend("preflight", lambda: seen.append(trial.preflight.watch))
        backend.needs_display = True
        seen: list[object] = []
        with Display(runtime) as display:
            trial = make(backend, environ={"DISPLAY": display.name})
            trial.passed()
            assert seen == [trial.preflight.watch]
            assert seen != [None]
            trial.close()

    def test_local_end_accepts_connections_already(self, make: Callable[..., Trial]) -> None:
        address = make().passed().listen_address
        with socket.socket(socket.AF_UNIX) as proxy:
            proxy.connect(address)
        with socket.socket() as proxy:
            host, _, port = make(FakeBackend(kind="tcp")).passed().listen_address.partition(":")
            proxy.connect((host, int(port)))

    def test_launch_has_command_environment_and_directory(self, make: Callable[..., Trial], tmp_path: Path) -> None:
        environ = {"HOME": "/home/alice", "NX_ROOT": "stale", "NX_": "", "NXPROXY": "x", "OVERRIDDEN": "y"}
        trial = make(environ={**environ, "UNWANTED": "z"})
        passed = trial.passed()
        launch = passed.launch
        assert launch.command == ["/bin/true", passed.listen_address]
        assert launch.directory == tmp_path / "sessions/S-name"
        assert launch.environment == {
            "XDG_RUNTIME_DIR": trial.environ["XDG_RUNTIME_DIR"],
            "HOME": "/home/alice",
            "NXPROXY": "x",
            "NX_DISPLAY": f"cookie={COOKIE}",
            "OVERRIDDEN": "name",
        }
        assert COOKIE not in repr(passed)

    def test_backend_gets_its_context(self, make: Callable[..., Trial], tmp_path: Path) -> None:
        backend = FakeBackend()
        address = make(backend, environ={"A": "1", "NX_B": "2"}).passed().listen_address
        (context,) = backend.contexts
        assert context.session is SESSION
        assert context.executable == "/bin/true"
        assert context.listen_address == address
        assert context.sessions_root == tmp_path / "sessions"
        assert context.session_root == tmp_path / "sessions/S-name"
        assert dict(context.environ) == {"XDG_RUNTIME_DIR": context.environ["XDG_RUNTIME_DIR"], "A": "1"}

    def test_relative_paths_are_made_absolute(
        self, make: Callable[..., Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The proxy starts in another directory."""
        monkeypatch.chdir(tmp_path)
        for path, absolute in (("authority", f"{tmp_path}/authority"), ("", "")):
            launch = make(environ={"XAUTHORITY": path}).passed().launch
            assert launch.environment["XAUTHORITY"] == absolute

    def test_step_names_the_running_check(self, make: Callable[..., Trial]) -> None:
        steps: list[str] = []
        trial = make(FakeBackend("find_executable", lambda: steps.append(trial.preflight.step)))
        steps.append(trial.preflight.step)
        trial.passed()
        steps.append(trial.preflight.step)
        assert steps == ["the preflight", "the proxy program's path", "the backend's own preflight"]

    def test_nodelay_is_set_on_the_transport(self, make: Callable[..., Trial], transport: paramiko.Transport) -> None:
        connection = transport.sock
        assert isinstance(connection, socket.socket)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        make().passed()
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0

    def test_connection_to_the_x_server_stays_open(self, make: Callable[..., Trial], runtime: Path) -> None:
        with Display(runtime) as display:
            backend = FakeBackend()
            backend.needs_display = True
            trial = make(backend, environ={"DISPLAY": display.name})
            trial.passed()
            assert trial.preflight.watch is not None
            (client,) = display.clients
            with pytest.raises(BlockingIOError):
                client.recv(1, socket.MSG_DONTWAIT)
            trial.close()
            assert client.recv(1) == b""

    def test_second_close_releases_nothing(self, make: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch) -> None:
        trial = make()
        log = trial.passed().launch.log
        closed: list[int] = []
        real_close = os.close

        def close(descriptor: int) -> None:
            closed.append(descriptor)
            real_close(descriptor)

        monkeypatch.setattr(os, "close", close)
        trial.close()
        trial.close()
        assert closed.count(log) == 1


def put_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("", encoding="ascii")


def put_directory(path: Path) -> None:
    path.mkdir(parents=True)


def put_link(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.symlink_to(path.parent)


def put_dangling_link(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.symlink_to("nowhere")


def put_fifo(path: Path) -> None:
    path.parent.mkdir(parents=True)
    os.mkfifo(path)


def put_other_users_file(path: Path) -> None:
    put_file(path)
    os.chown(path, 1, 1)


def put_other_users_directory(path: Path) -> None:
    put_directory(path)
    os.chown(path, 1, 1)


OBSTACLES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "sessions root is a file": ("File exists", put_file),
    "sessions root is below a file": ("Not a directory", lambda path: put_file(path.parent)),
    "session root is a file": ("S-name is no directory, or a link to one", put_file),
    "session root is a link": ("S-name is no directory, or a link to one", put_link),
    "session root is another user's": ("S-name belongs to another user", put_other_users_directory),
    "log is a link": ("Too many levels of symbolic links", put_link),
    "log is a dangling link": ("Too many levels of symbolic links", put_dangling_link),
    "log is a directory": ("Is a directory", put_directory),
    "log is a FIFO": ("No such device or address", put_fifo),
    "log is another user's": ("session.log is no plain file of ours", put_other_users_file),
}


class TestSessionRoot:
    def test_session_root_and_log_are_private(self, make: Callable[..., Trial], tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            make().passed()
        finally:
            os.umask(before)
        assert mode(tmp_path / "sessions") == 0o700
        assert mode(tmp_path / "sessions/S-name") == 0o700
        assert mode(tmp_path / "sessions/S-name/session.log") == 0o600

    def test_permissions_of_existing_files_are_tightened(self, make: Callable[..., Trial], tmp_path: Path) -> None:
        root = tmp_path / "sessions/S-name"
        root.mkdir(parents=True)
        log = root / "session.log"
        log.write_text("earlier\n", encoding="ascii")
        for path, bits in ((tmp_path / "sessions", 0o755), (root, 0o777), (log, 0o666)):
            path.chmod(bits)
        launch = make().passed().launch
        assert (mode(root), mode(log)) == (0o700, 0o600)
        assert mode(tmp_path / "sessions") == 0o755  # the caller's own
        os.write(launch.log, b"later\n")
        assert log.read_text(encoding="ascii") == "earlier\n--- a new attempt\nlater\n"

    def test_sessions_root_may_be_a_link_or_missing(self, make: Callable[..., Trial], tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "link").symlink_to("elsewhere")
        make(root=tmp_path / "link").passed()
        assert (tmp_path / "elsewhere/S-name/session.log").is_file()
        make(root=tmp_path / "not/yet/there").passed()

    @pytest.mark.parametrize("obstacle", OBSTACLES)
    def test_unusable_session_root_is_an_error(self, make: Callable[..., Trial], tmp_path: Path, obstacle: str) -> None:
        if "another user's" in obstacle and os.geteuid() != 0:
            pytest.skip("only root can give a file to another user")
        sessions = tmp_path / ("file/below" if "below" in obstacle else "sessions")
        root = sessions / "S-name"
        problem, put = OBSTACLES[obstacle]
        put({"sessions": sessions, "session": root, "log": root / "session.log"}[obstacle.split(maxsplit=1)[0]])
        error = make(root=sessions).failed()
        assert error.reason is EndReason.LISTEN_FAILED
        assert error.detail.startswith(f"The session root {root} cannot be used: ")
        assert error.detail.endswith(f"{problem}.")
        assert error.hint is not None

    def test_log_on_a_full_disk_is_an_error(
        self, make: Callable[..., Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a full disk an empty file can still be created."""
        log, write = tmp_path / "sessions/S-name/session.log", os.write

        def full(descriptor: int, data: bytes) -> int:
            if log.exists() and os.path.samestat(os.fstat(descriptor), log.stat()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data)

        monkeypatch.setattr(os, "write", full)
        error = make().failed()
        assert error.reason is EndReason.LISTEN_FAILED
        assert error.detail == f"The session root {log.parent} cannot be used: No space left on device."
        assert error.hint is not None
        assert "not full" in error.hint

    def test_log_that_is_a_pipe_is_an_error_even_with_a_reader(
        self, make: Callable[..., Trial], tmp_path: Path
    ) -> None:
        log = tmp_path / "sessions/S-name/session.log"
        log.parent.mkdir(parents=True)
        os.mkfifo(log)
        reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
        try:
            assert make().failed().detail.endswith("session.log is no plain file of ours.")
        finally:
            os.close(reader)


class TestFailures:
    @pytest.mark.parametrize("call", CALLS)
    def test_backend_error_is_posted(self, make: Callable[..., Trial], call: str) -> None:
        error = BackendError(EndReason.PROXY_NOT_FOUND, "It is not there.", "Install it.")

        def refuse() -> None:
            raise error

        assert make(FakeBackend(call, refuse)).failed() is error

    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize("error", [RuntimeError("a bug"), SystemExit(3), OSError(28, "No space left on device")])
    def test_backend_that_crashes_is_posted(self, make: Callable[..., Trial], call: str, error: BaseException) -> None:
        def fail() -> None:
            raise error

        failed, ended = make(FakeBackend(call, fail)).run()
        assert isinstance(failed, WorkerCrashed)
        assert (failed.worker, failed.error) == ("preflight", error)
        assert isinstance(ended, PreflightFinished)

    @pytest.mark.parametrize("call", ["preflight", "environment", "command"])
    def test_traceback_of_a_crashed_backend_shows_no_secret(self, make: Callable[..., Trial], call: str) -> None:
        def fail() -> None:
            raise RuntimeError("a bug")

        failed, _ = make(FakeBackend(call, fail), environ={"PASSWORD": "very secret"}).run()
        assert isinstance(failed, WorkerCrashed)
        shown = "".join(traceback.TracebackException.from_exception(failed.error, capture_locals=True).format())
        assert "context = " in shown
        assert COOKIE not in shown
        assert "very secret" not in shown

    @pytest.mark.parametrize(
        ("display", "detail"), [(None, "DISPLAY is not set."), ("/nonexistent/x:0", "There is no X server at")]
    )
    def test_missing_x_server_is_an_error_if_the_backend_needs_one(
        self, make: Callable[..., Trial], display: str | None, detail: str
    ) -> None:
        backend = FakeBackend()
        backend.needs_display = True
        trial = make(backend, environ={} if display is None else {"DISPLAY": display})
        error = trial.failed()
        assert error.reason is EndReason.DISPLAY_UNAVAILABLE
        assert error.detail.startswith(detail)
        assert error.hint is not None
        assert trial.preflight.watch is None

    def test_missing_x_server_is_ignored_if_the_backend_needs_none(self, make: Callable[..., Trial]) -> None:
        trial = make(environ={"DISPLAY": "/nonexistent/x:0"})
        trial.passed()
        assert trial.preflight.watch is None

    def test_silent_x_server_is_an_error(self, make: Callable[..., Trial], runtime: Path) -> None:
        backend = FakeBackend()
        backend.needs_display = True
        with Display(runtime) as display:
            display.may_answer.clear()
            error = make(backend, environ={"DISPLAY": display.name}, timeout_s=0.05).failed()
        assert error.reason is EndReason.DISPLAY_UNAVAILABLE
        assert "did not answer within 0.04 s" in error.detail  # before the whole preflight times out

    def test_ended_transport_is_an_error(self, make: Callable[..., Trial], server: LoopbackSSHServer) -> None:
        ended = server.connect_transport()
        ended.close()
        ended.join(WAIT_S)
        server.wait_for(lambda: server.connections == 1)  # its end of the connection is closed too
        error = make(transport=ended).failed()
        assert error.reason is EndReason.TRANSPORT_LOST
        assert error.detail == "The SSH connection had ended before the proxy was started."

    def test_missing_socket_directory_is_an_error(
        self, make: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(**_: object) -> str:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
        error = make().failed()
        assert error.reason is EndReason.LISTEN_FAILED
        assert error.detail == (
            "The local end of the tunnel cannot be bound: "
            "no temporary directory is writable and has a path short enough for a unix socket."
        )

    def test_failed_bind_of_a_unix_socket_is_an_error(
        self, make: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(kind: str, directory: Path) -> str:
            raise OSError(24, "Too many open files", f"{kind} {directory}")

        trial = make()
        monkeypatch.setattr(trial.forwarder, "bind", refuse)
        error = trial.failed()
        assert error.reason is EndReason.LISTEN_FAILED
        assert error.detail == "The local end of the tunnel cannot be bound: Too many open files."
        assert error.hint is None  # the reason's own is used

    def test_failed_bind_of_a_port_is_an_error_with_its_own_hint(
        self, make: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The hint is about ports, not only about directories."""

        def refuse(kind: str, directory: Path) -> str:
            raise OSError(98, "Address already in use", f"{kind} {directory}")

        backend = FakeBackend()
        backend.listen_kind = "tcp"
        trial = make(backend)
        monkeypatch.setattr(trial.forwarder, "bind", refuse)
        error = trial.failed()
        assert error.reason is EndReason.LISTEN_FAILED
        assert error.hint is not None
        assert "free TCP port" in error.hint

    def test_finish_is_posted_even_without_a_thread(
        self, make: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        trial = make()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="new thread"):
                trial.preflight.start()
        assert trial.inbox.kinds() == [PreflightFinished]


class TestSocketDirectory:
    def test_socket_directory_is_private_and_in_xdg_runtime_dir(
        self, make: Callable[..., Trial], runtime: Path
    ) -> None:
        address = Path(make().passed().listen_address)
        assert address.parent.parent == runtime
        assert mode(address.parent) == 0o700

    @pytest.mark.parametrize("unusable", ["unset", "empty", "missing", "a file", "a program", "relative", "too long"])
    def test_socket_directory_is_temporary_if_xdg_runtime_dir_is_unusable(
        self, make: Callable[..., Trial], tmp_path: Path, unusable: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = tmp_path / "place"
        if unusable == "too long":
            place = tmp_path / ("x" * 100)
            place.mkdir()
        elif unusable in {"a file", "a program"}:
            place.write_text("", encoding="ascii")
            place.chmod(0o700 if unusable == "a program" else 0o600)
        elif unusable == "relative":
            (tmp_path / "run").mkdir()
            monkeypatch.chdir(tmp_path)
            place = Path("run")
        trial = make(environ={"XDG_RUNTIME_DIR": "" if unusable == "empty" else str(place)})
        if unusable == "unset":
            del trial.environ["XDG_RUNTIME_DIR"]
        address = Path(trial.passed().listen_address)
        assert address.parent.parent == Path(tempfile.gettempdir())
        assert address.is_socket()
        trial.close()
        assert not address.parent.exists()
        if place.is_dir():
            assert list(place.iterdir()) == []

    def test_socket_directory_is_in_tmp_if_all_other_paths_are_too_long(
        self, make: Callable[..., Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        long = tmp_path / ("x" * 100)
        long.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(long))
        trial = make(environ={"XDG_RUNTIME_DIR": str(long)})
        address = Path(trial.passed().listen_address)
        assert address.parent.parent == Path("/tmp")
        trial.close()
        assert not address.parent.exists()
        assert list(long.iterdir()) == []


TRACED = (
    Preflight._run,
    Preflight._check,
    Preflight._keep,
    *(check.run for check in checks.CHECKS),
    Forwarder.bind,
    forwarder.bind_listener,
)
PLACES = [
    (function.__qualname__, line)
    for function in TRACED
    for line in sorted({line for *_, line in function.__code__.co_lines() if line is not None})
]


class TestClosing:
    def test_close_before_the_start_acquires_nothing(self, make: Callable[..., Trial]) -> None:
        trial = make()
        trial.close()
        assert [type(each) for each in trial.run()] == [PreflightFinished]

    def test_close_does_not_wait_for_a_backend_that_blocks(self, make: Callable[..., Trial]) -> None:
        """For example on a network file system that hangs."""
        asked, go_on = threading.Event(), threading.Event()

        def block() -> None:
            asked.set()
            assert go_on.wait(WAIT_S)

        trial = make(FakeBackend("find_executable", block))
        trial.preflight.start()
        assert asked.wait(WAIT_S)
        trial.close()
        assert trial.outcome == []
        assert trial.preflight.thread.is_alive()
        go_on.set()
        assert [type(each) for each in trial.finish()] == [PreflightFinished]

    def test_close_interrupts_the_wait_for_the_x_server(self, make: Callable[..., Trial], runtime: Path) -> None:
        """Its connection is closed, which ends the wait."""
        backend = FakeBackend()
        backend.needs_display = True
        with Display(runtime) as display:
            display.may_answer.clear()
            trial = make(backend, environ={"DISPLAY": display.name})
            trial.preflight.start()
            assert display.asked.wait(WAIT_S)
            trial.close()
            assert isinstance(trial.finish()[-1], PreflightFinished)

    @pytest.mark.parametrize(("function", "line"), PLACES)
    @pytest.mark.parametrize("kind", ["unix", "tcp"])
    def test_close_at_any_line_leaves_nothing(
        self, make: Callable[..., Trial], runtime: Path, function: str, line: int, kind: ListenKind
    ) -> None:
        backend = FakeBackend(kind=kind)
        backend.needs_display = True
        (code,) = (each.__code__ for each in TRACED if each.__qualname__ == function)
        before = descriptors()
        reached: list[int] = []

        def trace(frame: FrameType, event: str, _: object) -> Any:
            if frame.f_code is not code:
                return None
            if event == "line" and frame.f_lineno == line and not reached:
                reached.append(line)
                closer = threading.Thread(target=trial.close, daemon=True)
                closer.start()
                closer.join(0.02 if function == "Preflight._keep" else WAIT_S)  # there it may hold the lock
                closers.append(closer)
            return trace

        closers: list[threading.Thread] = []
        with Display(runtime) as display:
            trial = make(backend, environ={"DISPLAY": display.name})
            traced_before = threading.gettrace()
            threading.settrace(trace)
            try:
                trial.preflight.start()
            finally:
                threading.settrace(traced_before)
            trial.finish()
            for closer in closers:
                closer.join(WAIT_S)
                assert not closer.is_alive()
            if not reached:
                trial.close()
            assert_ended_once(trial)
            assert trial.inbox.kinds().count(TunnelClosed) == 1
        assert list(runtime.iterdir()) == []
        nothing_left_open(before)
