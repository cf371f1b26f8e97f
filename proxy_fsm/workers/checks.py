"""What must be in order on this machine before a proxy program starts: one list of checks.

An agent that is connected and then dropped in its first attempt dies, and the session with it. So an engine's
preflight runs them all, before anything remote is touched; `check_preflight` runs them before a server is asked for a
session; `run_checks` reports each, which is what ``proxy-fsm doctor`` shows.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from proxy_fsm.backends.base import BackendContext
from proxy_fsm.errors import BackendError
from proxy_fsm.evidence import DisplayLost, DisplayRestored, Launch
from proxy_fsm.private_files import make_private_directory, make_socket_directory, open_private
from proxy_fsm.reasons import EndReason
from proxy_fsm.session import SessionInfo
from proxy_fsm.ssh import set_nodelay
from proxy_fsm.status import Timeouts
from proxy_fsm.text import SecretEnvironment
from proxy_fsm.workers.display_watch import DisplayWatch
from proxy_fsm.workers.forwarder import bind_listener
from proxy_fsm.x11 import DisplayError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from proxy_fsm.backends.base import Backend
    from proxy_fsm.evidence import Observation
    from proxy_fsm.workers.forwarder import Forwarder

__all__ = [
    "BINDING_CHECKS",
    "CHECKS",
    "LOCAL_CHECKS",
    "Check",
    "CheckContext",
    "check_preflight",
    "inherited_environment",
    "run_checks",
]

#: Share of the preflight's time granted to the X server, so that its timeout is reported and not the preflight's.
_X_SERVER_SHARE = 0.8
_NO_PORT_HINT = (
    "Make sure that 127.0.0.1 has a free TCP port, and that the temporary directory is yours, writable and not full."
)
#: Written to the session's log at the start of each attempt.
_START_LINE = b"--- a new attempt\n"
#: A path that nothing can be written to: what a backend gets instead of a directory that could not be made.
_NOWHERE = Path(os.devnull)
#: Placeholder session for the dry run.
_PLACEHOLDER_SESSION = SessionInfo(
    name="user-50-1700000000_stDprogram_dp24", cookie="0" * 32, graphics_port=1, display=50
)


@dataclass(kw_only=True, eq=False)
class CheckContext:
    """What the checks work on, and what they found.

    Attributes:
        backend: What would run.
        session: The session; a placeholder in a dry run.
        sessions_root: Where the session roots are.
        environ: What the proxy program inherits; see `inherited_environment`.
        timeout_s: How long the checks may take together, in seconds.
        forwarder: Binds the local end; None in a dry run, where there is neither transport nor session: then a
            temporary session root and an unused listener are made.
        post: Receives what the display watch observes.
        keep: Registers a function that releases something.
        executable: Path of the proxy program.
        session_root: The session's own directory, mode 0700.
        log: Descriptor of the session's log.
        watch: The display watch, if the backend needs an X server.
        scratch: A directory for this proxy alone, mode 0700.
        listen_address: What the proxy connects to.
    """

    backend: Backend
    session: SessionInfo
    sessions_root: Path
    environ: SecretEnvironment
    timeout_s: float
    forwarder: Forwarder | None
    post: Callable[[Observation], None]
    keep: Callable[[Callable[[], object]], object]
    executable: str = ""
    session_root: Path = _NOWHERE
    log: int = -1
    watch: DisplayWatch | None = None
    scratch: Path = _NOWHERE
    listen_address: str = ""

    def for_backend(self) -> BackendContext:
        """Return what a backend may use of it."""
        return BackendContext(
            session=self.session,
            executable=self.executable,
            listen_address=self.listen_address,
            sessions_root=self.sessions_root,
            session_root=self.session_root,
            environ=self.environ,
            scratch=self.scratch,
        )

    def launch(self) -> Launch:
        """Return what the proxy program is started with, once all checks have passed."""
        context = self.for_backend()
        environment = SecretEnvironment(
            {
                name: value
                for name, value in {**self.environ, **self.backend.environment(context)}.items()
                if value is not None
            }
        )
        return Launch(self.backend.command(context), environment, self.session_root, self.log)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must be in order.

    Attributes:
        name: What is checked, human-readable.
        run: Checks it, and stores what it found in the context; raises `BackendError`, with reason and hint.
    """

    name: str
    run: Callable[[CheckContext], None]


def _find_program(context: CheckContext) -> None:
    context.executable = context.backend.find_executable()


def _open_log(context: CheckContext) -> None:
    root, what = context.sessions_root / f"S-{context.session.name}", "session root"
    try:
        if context.forwarder is None:
            root, what = context.sessions_root, "sessions root"
            directory = Path(tempfile.mkdtemp(prefix=".proxy_fsm-", dir=_nearest_existing(root)))
            context.keep(lambda: shutil.rmtree(directory, ignore_errors=True))
        else:
            context.sessions_root.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory = root
        make_private_directory(directory)
        log = open_private(directory / "session.log")
        context.keep(lambda: os.close(log))
        os.write(log, _START_LINE)  # on a full disk a file can be created, and the first byte fails
    except OSError as error:
        raise BackendError(
            EndReason.LISTEN_FAILED,
            f"The {what} {root} cannot be used: {error.strerror or error}.",
            "Make sure that the sessions root is a directory of yours, writable and not full.",
        ) from error
    context.session_root, context.log = directory, log


def _nearest_existing(path: Path) -> Path:
    """Return a path if it exists, else its nearest parent that does."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def _open_display(context: CheckContext) -> None:
    if not context.backend.needs_display:
        return
    watch = DisplayWatch(
        context.environ,
        on_lost=lambda detail: context.post(DisplayLost(detail)),
        on_restored=lambda: context.post(DisplayRestored()),
        timeout_s=_X_SERVER_SHARE * context.timeout_s,
    )
    context.keep(watch.close)
    try:
        watch.open()
    except DisplayError as error:
        raise BackendError(EndReason.DISPLAY_UNAVAILABLE, error.detail, error.hint) from error
    context.watch = watch


def _check_transport(context: CheckContext) -> None:
    if context.forwarder is None:
        return
    if not context.forwarder.transport.is_active():
        raise BackendError(EndReason.TRANSPORT_LOST, "The SSH connection had ended before the proxy was started.")
    set_nodelay(context.forwarder.transport)


def _bind(context: CheckContext) -> None:
    kind = context.backend.listen_kind
    try:
        scratch = make_socket_directory(context.environ)
        context.keep(lambda: shutil.rmtree(scratch, ignore_errors=True))
        if context.forwarder is None:
            listener, address = bind_listener(kind, scratch)
            release = listener.close
        else:
            address = context.forwarder.bind(kind, scratch)
            release = context.forwarder.close
    except OSError as error:
        raise BackendError(
            EndReason.LISTEN_FAILED,
            f"The local end of the tunnel cannot be bound: {error.strerror or error}.",
            _NO_PORT_HINT if kind == "tcp" else None,
        ) from error
    context.keep(release)
    context.scratch, context.listen_address = scratch, address


def _ask_backend(context: CheckContext) -> None:
    context.backend.preflight(context.for_backend())


_DISPLAY = Check("the X server", _open_display)
#: What is checked before the local end is bound, in this order.
LOCAL_CHECKS = (
    Check("the proxy program's path", _find_program),
    Check("the session root and its log", _open_log),
    _DISPLAY,
    Check("the SSH transport", _check_transport),
)
#: What comes after them: a backend's own preflight needs the local end's address.
BINDING_CHECKS = (
    Check("the local end of the tunnel", _bind),
    Check("the backend's own preflight", _ask_backend),
)
#: All of them, in order.
CHECKS = LOCAL_CHECKS + BINDING_CHECKS


def inherited_environment(environ: Mapping[str, str]) -> SecretEnvironment:
    """Return the environment that the proxy inherits: without that of an outer NX session, and with absolute paths."""
    variables = {key: value for key, value in environ.items() if not key.startswith("NX_")}
    if path := variables.get("XAUTHORITY"):
        variables["XAUTHORITY"] = os.path.abspath(path)  # noqa: PTH100 - symbolic links are kept
    return SecretEnvironment(variables)


@contextmanager
def check_preflight(
    backend: Backend,
    *,
    sessions_root: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Make sure that a session could be shown here, before a server is asked for one; nothing is left behind.

    A proxy repeats all of this as its preflight, but there a failure loses a session. Holds one X connection open while
    it is entered, since an X server resets when its last client disconnects.

    Args:
        backend: What would run.
        sessions_root: As in `Proxy`.
        environ: As in `Proxy`.

    Raises:
        BackendError: A check failed.
    """
    with ExitStack() as held:
        with ExitStack() as briefly:
            context = _dry_run_context(backend, sessions_root, environ, briefly)
            for check in CHECKS:
                context.keep = (held if check is _DISPLAY else briefly).callback
                check.run(context)
        yield


def run_checks(
    backend: Backend,
    *,
    sessions_root: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Generator[tuple[str, BackendError | None]]:
    """Run every check of `check_preflight`, whatever fails; yield each one's name, and its error or None.

    Each takes some seconds at most. Nothing is left behind.

    Args:
        backend: What would run.
        sessions_root: As in `Proxy`.
        environ: As in `Proxy`.
    """
    with ExitStack() as held:
        context = _dry_run_context(backend, sessions_root, environ, held)
        for check in CHECKS:
            problem = None
            try:
                check.run(context)
            except BackendError as error:
                problem = error
            yield check.name, problem


def _dry_run_context(
    backend: Backend,
    sessions_root: str | os.PathLike[str] | None,
    environ: Mapping[str, str] | None,
    held: ExitStack,
) -> CheckContext:
    return CheckContext(
        backend=backend,
        session=_PLACEHOLDER_SESSION,
        sessions_root=(Path.home() / ".x2go" if sessions_root is None else Path(sessions_root)).absolute(),
        environ=inherited_environment(os.environ if environ is None else environ),
        timeout_s=Timeouts().preflight_s,
        forwarder=None,
        post=lambda _: None,  # the watch is not started
        keep=held.callback,
    )
