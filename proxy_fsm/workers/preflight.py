"""Everything local is made good before anything remote is touched.

An agent that is connected and let go in its first attempt is dead, and the session with it. So the steps below come
before the proxy program starts, on a thread of their own since each of them may block.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from proxy_fsm.backends.base import BackendContext
from proxy_fsm.errors import BackendError
from proxy_fsm.evidence import (
    DisplayLost,
    DisplayRestored,
    PreflightFinished,
    PreflightPassed,
    WorkerCrashed,
    WorkerFailed,
)
from proxy_fsm.private_files import SOCKET_NAME, make_private_directory, make_socket_directory, open_private
from proxy_fsm.reasons import EndReason
from proxy_fsm.session import SessionInfo
from proxy_fsm.ssh import set_nodelay
from proxy_fsm.status import Timeouts
from proxy_fsm.text import SecretEnvironment
from proxy_fsm.workers.display_watch import DisplayWatch
from proxy_fsm.x11 import DisplayError, open_display

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from proxy_fsm.backends.base import Backend
    from proxy_fsm.evidence import Observation
    from proxy_fsm.workers.forwarder import Forwarder

__all__ = ["Launch", "Preflight", "check_preflight"]

#: What of the time an X server may take to answer, so that its silence is told before the time is up.
_X_SERVER_SHARE = 0.8
_NO_PORT_HINT = (
    "Make sure that 127.0.0.1 has a free TCP port, and that the temporary directory is yours, writable and not full."
)
#: Before what each attempt writes into the session's log.
_START_LINE = b"--- a new attempt\n"
#: What a backend is asked with while there is no session: one like those that there are.
_PLACEHOLDER_SESSION = SessionInfo(
    name="user-50-1700000000_stDprogram_dp24", cookie="0" * 32, graphics_port=1, display=50
)


@dataclass(frozen=True, slots=True)
class Launch:
    """What the proxy program is started with."""

    command: Sequence[str]
    environment: Mapping[str, str] = field(repr=False)  # secrets are in it
    directory: Path
    log: int


class Preflight:
    """The preflight of one proxy, and what it acquired.

    Posts `PreflightPassed` when all is good, or `WorkerFailed`; and `PreflightFinished` as its last word.

    Attributes:
        step: What is being waited for, for a person.
        watch: The display watch, where the backend needs an X server.
        launch: What the proxy is started with; set before `PreflightPassed` is posted.
    """

    def __init__(
        self,
        session: SessionInfo,
        backend: Backend,
        forwarder: Forwarder,
        *,
        sessions_root: Path,
        environ: Mapping[str, str],
        timeout_s: float,
        post: Callable[[Observation], None],
    ) -> None:
        self.step = "the preflight"
        self.watch: DisplayWatch | None = None
        self.launch: Launch | None = None
        self._session = session
        self._backend = backend
        self._forwarder = forwarder
        self._sessions_root = sessions_root
        self._environ = environ
        self._timeout_s = timeout_s
        self._post = post
        self._lock = threading.Lock()
        self._held: ExitStack | None = ExitStack()
        self.thread = threading.Thread(target=self._run, name="proxy_fsm-preflight", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        try:
            self.thread.start()
        except BaseException:
            self._post(PreflightFinished())
            raise

    def close(self) -> None:
        """Release what was acquired; what is acquired after this is released at once by the one who did."""
        with self._lock:
            held, self._held = self._held, None
        if held is not None:
            held.close()

    def _run(self) -> None:
        try:
            address = self._prepare()
            self._post(PreflightPassed(address))
        except BackendError as error:
            self._post(WorkerFailed(error))
        except _ClosedError:
            pass  # the owner has gone on, and holds nothing of this
        except BaseException as error:  # noqa: BLE001 - whatever it was, sys.exit() included, the owner has to know
            self._post(WorkerCrashed("preflight", error))
        finally:
            self._post(PreflightFinished())

    def _prepare(self) -> str:
        environ = _inherited(self._environ)
        self.step = "the proxy program's path"
        executable = self._backend.find_executable()
        self.step = "the session root and its log"
        session_root, log = self._open_log()
        if self._backend.needs_display:
            self.step = "the X server"
            self._open_display(environ)
        self.step = "the SSH transport"
        if not self._forwarder.transport.is_active():
            raise BackendError(EndReason.TRANSPORT_LOST, "The SSH connection had ended before the proxy was started.")
        set_nodelay(self._forwarder.transport)
        self.step = "the local end of the tunnel"
        address, scratch = self._bind()
        self.step = "the backend's own preflight"
        context = BackendContext(
            session=self._session,
            executable=executable,
            listen_address=address,
            sessions_root=self._sessions_root,
            session_root=session_root,
            environ=environ,
            scratch=scratch,
        )
        self._backend.preflight(context)
        environment = _merged(environ, self._backend.environment(context))
        self.launch = Launch(self._backend.command(context), environment, session_root, log)
        return address

    def _keep(self, release: Callable[[], object]) -> None:
        """Have something released with the rest, or at once where that has been done already."""
        with self._lock:
            if self._held is not None:
                self._held.callback(release)
                return
        release()
        raise _ClosedError

    def _open_log(self) -> tuple[Path, int]:
        root = self._sessions_root / f"S-{self._session.name}"
        try:
            self._sessions_root.mkdir(mode=0o700, parents=True, exist_ok=True)
            make_private_directory(root)
            log = open_private(root / "session.log")
            self._keep(lambda: os.close(log))
            os.write(log, _START_LINE)  # a full disk lets a file be made, and refuses the first byte
        except OSError as error:
            raise _unusable("session root", root, error) from error
        return root, log

    def _open_display(self, environ: Mapping[str, str]) -> None:
        watch = DisplayWatch(
            environ,
            on_lost=lambda detail: self._post(DisplayLost(detail)),
            on_restored=lambda: self._post(DisplayRestored()),
            timeout_s=_X_SERVER_SHARE * self._timeout_s,
        )
        self._keep(watch.close)
        try:
            watch.open()
        except DisplayError as error:
            raise BackendError(EndReason.DISPLAY_UNAVAILABLE, error.detail, error.hint) from error
        self.watch = watch

    def _bind(self) -> tuple[str, Path]:
        try:
            directory = make_socket_directory(self._environ)
            self._keep(lambda: shutil.rmtree(directory, ignore_errors=True))
            address = self._forwarder.bind(self._backend.listen_kind, directory)
        except OSError as error:
            raise _unbound(self._backend, error) from error
        self._keep(self._forwarder.close)
        return address, directory


class _ClosedError(Exception):
    """The owner does not want it any more."""


@contextmanager
def check_preflight(
    backend: Backend,
    *,
    sessions_root: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Make sure that a session could be shown here, before a server is asked for one; nothing is left behind.

    A proxy does all of this again, as its preflight: then, though, a session would be lost. As long as this is
    entered, an X server that has no other client is not left by the last of them, which would make it start anew.

    Args:
        backend: What would run.
        sessions_root: As in `Proxy`; it is made where it is not there.
        environ: As in `Proxy`.

    Raises:
        BackendError: Something is not good.
    """
    executable = backend.find_executable()
    inherited = _inherited(os.environ if environ is None else environ)
    root = (Path.home() / ".x2go" if sessions_root is None else Path(sessions_root)).absolute()
    with ExitStack() as held:
        with ExitStack() as briefly:
            session_root = _try_sessions_root(root, briefly)
            if backend.needs_display:
                try:
                    held.enter_context(open_display(inherited, timeout_s=_X_SERVER_SHARE * Timeouts().preflight_s))
                except DisplayError as error:
                    raise BackendError(EndReason.DISPLAY_UNAVAILABLE, error.detail, error.hint) from error
            try:
                scratch = make_socket_directory(inherited)
            except OSError as error:
                raise _unbound(backend, error) from error
            briefly.callback(shutil.rmtree, scratch, ignore_errors=True)
            context = BackendContext(
                session=_PLACEHOLDER_SESSION,
                executable=executable,
                listen_address="127.0.0.1:1" if backend.listen_kind == "tcp" else str(scratch / SOCKET_NAME),
                sessions_root=root,
                session_root=session_root,
                environ=inherited,
                scratch=scratch,
            )
            backend.preflight(context)
        yield


def _try_sessions_root(root: Path, held: ExitStack) -> Path:
    """Make a session root in the sessions root, and a log in it; it goes when this is left.

    Raises:
        BackendError: It cannot be.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        session_root = Path(held.enter_context(tempfile.TemporaryDirectory(prefix=".proxy_fsm-", dir=root)))
        make_private_directory(session_root)
        with os.fdopen(open_private(session_root / "session.log"), "wb", buffering=0) as log:
            log.write(_START_LINE)
    except OSError as error:
        raise _unusable("sessions root", root, error) from error
    return session_root


def _unusable(what: str, root: Path, error: OSError) -> BackendError:
    return BackendError(
        EndReason.LISTEN_FAILED,
        f"The {what} {root} cannot be used: {error.strerror or error}.",
        "Make sure that the sessions root is a directory of yours, writable and not full.",
    )


def _unbound(backend: Backend, error: OSError) -> BackendError:
    return BackendError(
        EndReason.LISTEN_FAILED,
        f"The local end of the tunnel cannot be bound: {error.strerror or error}.",
        _NO_PORT_HINT if backend.listen_kind == "tcp" else None,
    )


def _merged(environ: Mapping[str, str], changes: Mapping[str, str | None]) -> SecretEnvironment:
    """Add what a backend adds, and take out what it has None for."""
    return SecretEnvironment({name: value for name, value in {**environ, **changes}.items() if value is not None})


def _inherited(environ: Mapping[str, str]) -> SecretEnvironment:
    """Return what the proxy inherits: nothing of an outer NX session, and all paths as they are meant here."""
    inherited = {key: value for key, value in environ.items() if not key.startswith("NX_")}
    if path := inherited.get("XAUTHORITY"):
        inherited["XAUTHORITY"] = os.path.abspath(path)  # noqa: PTH100 - symbolic links stay as they are
    return SecretEnvironment(inherited)
