"""The checks without a session: each is run, failures are reported, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm.backends import KDriveBackend
from proxy_fsm.errors import BackendError
from proxy_fsm.reasons import EndReason
from proxy_fsm.workers import checks
from proxy_fsm.workers.checks import CHECKS, check_preflight, run_checks
from tests.helpers.holdings import descriptors, nothing_left_open
from tests.helpers.preflight import Display, FakeBackend
from tests.helpers.wait import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy_fsm.backends.base import ListenKind


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A directory for sockets, whose path is short; nothing is left in it."""
    path = Path(tempfile.mkdtemp(prefix="pf-", dir="/tmp"))
    before = descriptors()
    yield path
    assert list(path.iterdir()) == []
    nothing_left_open(before)
    shutil.rmtree(path)


class TestCheckPreflight:
    @pytest.mark.parametrize("kind", ["unix", "tcp"])
    def test_backend_gets_the_context_of_a_real_run(self, tmp_path: Path, runtime: Path, kind: ListenKind) -> None:
        backend = FakeBackend(kind=kind)
        inherited = {"XDG_RUNTIME_DIR": str(runtime), "NX_DISPLAY": "an outer session's", "XAUTHORITY": "x"}
        with check_preflight(backend, sessions_root=tmp_path / "root", environ=inherited):
            (context,) = backend.contexts
        assert context.executable == "/bin/true"
        assert context.scratch.parent == runtime
        assert dict(context.environ) == {"XDG_RUNTIME_DIR": str(runtime), "XAUTHORITY": str(Path.cwd() / "x")}
        assert (context.port is None) == (kind == "unix")
        assert kind == "tcp" or Path(context.listen_address).parent == context.scratch
        assert context.sessions_root == tmp_path / "root"
        assert not context.session_root.exists()
        assert len(context.session.cookie or "") == 32

    def test_only_the_x_connection_is_held_while_entered(self, tmp_path: Path, runtime: Path) -> None:
        backend = FakeBackend()
        backend.needs_display = True
        with Display(runtime) as display:
            environ = {"XDG_RUNTIME_DIR": str(runtime), "DISPLAY": display.name}
            with check_preflight(backend, sessions_root=tmp_path / "root", environ=environ):
                (client,) = display.clients
                client.setblocking(False)  # noqa: FBT003 - socket's own
                with pytest.raises(BlockingIOError):
                    client.recv(1)
                assert [path.name for path in runtime.iterdir()] == [Path(display.name).name]
                assert not (tmp_path / "root").exists()
            client.settimeout(WAIT_S)
            assert client.recv(1) == b""

    def test_socket_directory_is_chosen_as_by_a_proxy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        long = tmp_path / ("x" * 100)
        long.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(long))
        backend = FakeBackend()
        with check_preflight(backend, sessions_root=tmp_path / "root", environ={"XDG_RUNTIME_DIR": str(long)}):
            assert backend.contexts[0].scratch.parent == Path("/tmp")
        assert not backend.contexts[0].scratch.exists()
        assert list(long.iterdir()) == []

    @pytest.mark.parametrize("failing", ["root", "display", "preflight"])
    def test_failed_check_is_raised_and_leaves_nothing(self, tmp_path: Path, runtime: Path, failing: str) -> None:
        def refuse() -> None:
            raise BackendError(EndReason.PROXY_NOT_STARTABLE, "Not today.")

        backend, root = FakeBackend("preflight" if failing == "preflight" else "", refuse), tmp_path / "root"
        backend.needs_display = failing == "display"
        if failing == "root":
            root.touch()
        reasons = {
            "root": EndReason.LISTEN_FAILED,
            "display": EndReason.DISPLAY_UNAVAILABLE,
            "preflight": EndReason.PROXY_NOT_STARTABLE,
        }
        with (
            pytest.raises(BackendError) as caught,
            check_preflight(backend, sessions_root=root, environ={"XDG_RUNTIME_DIR": str(runtime)}),
        ):
            raise AssertionError("A check should have failed.")
        assert caught.value.reason is reasons[failing]
        assert list(runtime.iterdir()) == []
        assert root.is_file() == (failing == "root")
        assert list(tmp_path.iterdir()) == ([root] if failing == "root" else [])

    def test_missing_socket_directory_is_raised(
        self, tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """For example if every temporary directory is full."""
        plain = tempfile.mkdtemp

        def refuse(*args: Any, **options: Any) -> Any:
            if options.get("dir") == tmp_path:
                return plain(*args, **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(tempfile, "mkdtemp", refuse)
        with (
            pytest.raises(BackendError) as caught,
            check_preflight(FakeBackend(), sessions_root=tmp_path / "root", environ={"XDG_RUNTIME_DIR": str(runtime)}),
        ):
            raise AssertionError("There is no socket directory.")
        assert caught.value.reason is EndReason.LISTEN_FAILED
        assert list(tmp_path.iterdir()) == []

    def test_defaults_are_the_users_root_and_the_process_environment(
        self, tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
        backend = FakeBackend()
        with check_preflight(backend):
            assert backend.contexts[0].sessions_root == tmp_path / ".x2go"
            assert backend.contexts[0].scratch.parent == runtime
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("there", [True, False])
    def test_session_root_is_tried_where_it_would_be_made(self, tmp_path: Path, runtime: Path, *, there: bool) -> None:
        root = tmp_path / "not/yet"
        if there:
            root.mkdir(parents=True)
        roots: list[Path] = []
        backend = FakeBackend("preflight", lambda: roots.append(backend.contexts[0].session_root))
        with check_preflight(backend, sessions_root=root, environ={"XDG_RUNTIME_DIR": str(runtime)}):
            assert [each.parent for each in roots] == [root if there else tmp_path]
            assert not roots[0].exists()

    def test_listen_address_is_bound_during_the_backends_preflight(self, tmp_path: Path, runtime: Path) -> None:
        bound: list[bool] = []
        backend = FakeBackend("preflight", lambda: bound.append(Path(backend.contexts[0].listen_address).is_socket()))
        with check_preflight(backend, sessions_root=tmp_path, environ={"XDG_RUNTIME_DIR": str(runtime)}):
            assert bound == [True]


class TestRunChecks:
    def test_every_check_is_run_in_order_whatever_fails(self, tmp_path: Path, runtime: Path) -> None:
        def refuse() -> None:
            raise BackendError(EndReason.PROXY_NOT_FOUND, "It is not there.")

        backend = FakeBackend("find_executable", refuse)
        backend.needs_display = True
        (tmp_path / "file").touch()
        environ = {"XDG_RUNTIME_DIR": str(runtime)}
        results = list(run_checks(backend, sessions_root=tmp_path / "file/root", environ=environ))
        assert [(name, error and error.reason) for name, error in results] == [
            ("the proxy program's path", EndReason.PROXY_NOT_FOUND),
            ("the session root and its log", EndReason.LISTEN_FAILED),
            ("the X server", EndReason.DISPLAY_UNAVAILABLE),
            ("the SSH transport", None),
            ("the local end of the tunnel", None),
            ("the backend's own preflight", None),
        ]
        assert len(backend.contexts) == 1
        assert list(tmp_path.iterdir()) == [tmp_path / "file"]

    def test_backend_without_a_directory_writes_nothing(
        self, tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(_: object) -> Path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(checks, "make_socket_directory", refuse)
        results = dict(run_checks(KDriveBackend("/bin/true"), sessions_root=runtime, environ={}))
        error = results["the backend's own preflight"]
        assert error is not None
        assert error.detail == "The options file /dev/null/options cannot be written: Not a directory."
        assert list(tmp_path.iterdir()) == []

    def test_created_files_are_removed_if_the_generator_is_closed(self, tmp_path: Path, runtime: Path) -> None:
        results = run_checks(FakeBackend(), sessions_root=tmp_path, environ={"XDG_RUNTIME_DIR": str(runtime)})
        for (name, error), check in zip(results, CHECKS[:5], strict=False):
            assert (name, error) == (check.name, None)
        assert list(tmp_path.iterdir()) != []
        results.close()
        assert list(tmp_path.iterdir()) == []

    def test_unexpected_error_is_raised(self, tmp_path: Path, runtime: Path) -> None:
        def fail() -> None:
            raise RuntimeError("a bug")

        backend = FakeBackend("preflight", fail)
        with pytest.raises(RuntimeError, match="a bug"):
            list(run_checks(backend, sessions_root=tmp_path, environ={"XDG_RUNTIME_DIR": str(runtime)}))
        assert list(tmp_path.iterdir()) == []
