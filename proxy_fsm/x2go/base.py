"""python-x2go's `X2GoProxy` on top of the engine: the class that its proxy backends derive from.

Written from the API's documentation and from what python-x2go 0.6.1.3 does with the class; docs/x2go-api.md says for
every public name what it does here, what is different, and why.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from proxy_fsm.effects import WorkerEffects
from proxy_fsm.engine import is_patched
from proxy_fsm.errors import BackendError, InvalidTransition
from proxy_fsm.proxy import Proxy
from proxy_fsm.reasons import EndReason
from proxy_fsm.session import SessionInfo
from proxy_fsm.states import State
from proxy_fsm.text import Redactor
from proxy_fsm.workers.process import ProxyProcess
from proxy_fsm.x2go.backends import HookedBackend, HookedKDrive, HookedNX3, HookedViewer, Hooks
from proxy_fsm.x2go.handles import ProcessHandle, TunnelHandle
from proxy_fsm.x2go.logs import DEBUG, DEFAULT, ERROR, INFO, NOTICE, EventsToX2Go, X2GoLog
from proxy_fsm.x2go.session_files import SessionFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import IO

    import paramiko

    from proxy_fsm.backends import BackendContext
    from proxy_fsm.engine import EngineEffects
    from proxy_fsm.evidence import Observation

__all__ = ["X2GoProxy"]

#: The server refused the channel: python-x2go's session is notified of these.
_TUNNEL_REFUSED = {EndReason.AGENT_UNREACHABLE, EndReason.FORWARDING_DENIED}


class X2GoProxy(threading.Thread):
    """A proxy with the API of ``x2go.backends.proxy.base.X2GoProxy``.

    Subclasses define what to run with class or instance attributes (`PROXY_CMD`, `PROXY_ARGS`, `PROXY_ENV`, and for
    programs that take an NX option string `PROXY_MODE`, `PROXY_OPTIONS`, `PROXY_DISPLAY`), and with the hooks
    ``_update_local_proxy_socket``, `process_proxy_options` and ``_generate_cmdline``, which are called in this order in
    the engine's preflight, on its own thread, before anything remote is touched.

    Args:
        session_info: The session: ``name``, ``cookie``, ``graphics_port``, ``display``, ``local_container`` and
            ``status`` are read when it starts; status S is a session that is being resumed, which survives a failed
            attempt. With None nothing is ever started.
        ssh_transport: A connected transport; None as above.
        session_log: Name of the log file in the session's directory, for the program's output.
        session_errors: Name of a second file with the same lines, for programs that take an NX option string.
        sessions_rootdir: Parent of the sessions' directories; by default ``~/.x2go``.
        proxy_options: Options for the program; those that the class does not know are logged as ignored.
        session_instance: Its ``set_session_name`` and ``HOOK_forwarding_tunnel_setup_failed`` are called if the
            server refuses the tunnel.
        logger: python-x2go's logger, or any callable that takes a message and ``loglevel``; None for our own log.
        loglevel: The levels for our own log, as a mask of python-x2go's levels.

    Attributes:
        proxy: The program, like a `subprocess.Popen`: from its start until `stop_thread`; None otherwise.
        fw_tunnel: The tunnel, with ``is_active`` and ``failed``: from the start until `stop_thread`; None otherwise.
        session_log_stdout: The log file; open while it runs.
        session_log_stderr: The same; open while it runs.

    Raises:
        RuntimeError: gevent patched the standard library after this package was imported.
    """

    # Each object gets its own lists and dict.
    PROXY_CMD: str = ""
    PROXY_ARGS: list[str] = []  # noqa: RUF012 - as above
    PROXY_ENV: dict[str, str] = {}  # noqa: RUF012 - as above
    PROXY_MODE: str = ""
    PROXY_OPTIONS: list[str] = []  # noqa: RUF012 - as above
    PROXY_DISPLAY: Any = None

    #: Its name in messages.
    subsystem: str = "X2Go Proxy"

    session_info: Any = None
    session_log_stdout: IO[str] | None = None
    session_log_stderr: IO[str] | None = None
    fw_tunnel: TunnelHandle | None = None
    proxy: ProcessHandle | None = None

    #: The kind of program; None: derived from its name, or from `subsystem`.
    _backend_class: ClassVar[type[HookedNX3 | HookedKDrive | HookedViewer] | None] = None

    def __init__(  # noqa: PLR0917 - the API's
        self,
        session_info: Any = None,
        ssh_transport: paramiko.Transport | None = None,
        session_log: str = "session.log",
        session_errors: str = "session.err",
        sessions_rootdir: str | os.PathLike[str] | None = None,
        proxy_options: Mapping[str, Any] | None = None,
        session_instance: Any = None,
        logger: Callable[..., object] | None = None,
        loglevel: int = DEFAULT,
    ) -> None:
        _reject_late_patching()
        super().__init__()
        self.daemon = True
        self.session_info = session_info
        self.session_name: str | None = getattr(session_info, "name", None)
        self.ssh_transport = ssh_transport
        self.session_log = session_log
        self.session_errors = session_errors
        self.sessions_rootdir = str(Path.home() / ".x2go") if sessions_rootdir is None else os.fspath(sessions_rootdir)
        self.proxy_options = dict(proxy_options or {})
        self.session_instance = session_instance
        self.PROXY_ARGS, self.PROXY_OPTIONS = list(self.PROXY_ARGS), list(self.PROXY_OPTIONS)
        self.PROXY_ENV = {**_without_nx(os.environ), **self.PROXY_ENV}
        self._own_environ = self.PROXY_ENV  # while it is this dict, missing variables were removed
        self._environ_at_start: Mapping[str, str] = {}

        self._engine_lock = threading.Lock()
        self._fsm_proxy: Proxy | None = None
        self._engine_stop_requested = False
        self._run_called = False
        self._outcome_known = threading.Event()  # set when start_proxy may return
        self._hook_thread_id: int | None = None  # the thread that calls the hooks, while it does
        self.logger = X2GoLog(
            logger,
            loglevel=loglevel,
            tag=type(self).__module__,
            redact=Redactor([str(cookie)] if (cookie := getattr(session_info, "cookie", None)) else []),
            describe=self._describe,
        )
        self._events = None if logger is None else EventsToX2Go(self.logger)
        self._files = SessionFiles(lambda problem: self.logger(problem, loglevel=ERROR))

    def __del__(self) -> None:
        """Stop it, as `stop_thread` does; python-x2go calls this by name."""
        if hasattr(self, "_files"):  # else the constructor failed
            self.stop_thread()

    @property
    def engine(self) -> Proxy | None:
        """The `Proxy` behind it: its exact status, its records; made on first access, or on start.

        None without a session or a transport.

        Raises:
            AttributeError: The session has no ``name`` or no ``graphics_port``.
            InvalidSession: The session lacks what the program needs.
            TypeError: The transport is not a `paramiko.Transport`.
            ValueError: ``graphics_port`` or ``display`` is not a number.
        """
        with self._engine_lock:
            if self._fsm_proxy is None and self.session_info is not None and self.ssh_transport is not None:
                self._fsm_proxy = self._make_proxy(self.session_info, self.ssh_transport)
                if self._engine_stop_requested:
                    self._fsm_proxy.stop()
            return self._fsm_proxy

    # ---- what programs call ----

    def start_proxy(self) -> tuple[ProcessHandle | None, bool]:
        """Start it, and wait until the session is running or has ended.

        Returns:
            The process, or None if none was started, or if it was stopped meanwhile; and whether it is `ok`.

        Raises:
            RuntimeError: It was started before.
        """
        self.logger(f"Starting the {self.subsystem}.", loglevel=INFO)
        self.start()
        self._outcome_known.wait()
        return self.proxy, self.ok()

    def ok(self) -> bool:
        """Return whether the session is running and usable, now; in every state, without blocking."""
        return self._fsm_proxy is not None and self._fsm_proxy.ok()

    def run(self) -> None:
        """Run it until it ends, for whatever reason; a no-op if it was stopped, or run, before."""
        engine = None
        try:
            engine = self.engine
        except Exception as error:  # noqa: BLE001 - a session may be any object, and raise anything
            self.logger(f"The {self.subsystem} cannot be started: {error}", loglevel=ERROR)
        finally:
            if engine is None:
                self._outcome_known.set()
        if engine is not None:
            self._run_engine(engine)

    def stop_thread(self) -> None:
        """Stop it, and wait until everything is released; from any thread, in any state, any number of times.

        On a thread that the shutdown itself waits for (a subscriber of the engine, a hook of the session or of a
        subclass) it is only requested.
        """
        with self._engine_lock:
            self._engine_stop_requested = True
            engine = self._fsm_proxy
        if engine is None:
            return
        engine.stop()
        if self._hook_thread_id == threading.get_ident():
            return
        try:
            engine.wait()
        except RuntimeError:  # on a subscriber's thread, which the shutdown waits for; or in a forked child
            return
        self._close()

    # ---- what subclasses override ----

    def process_proxy_options(self) -> None:
        """Move options from ``proxy_options`` to the command line; then call this, which logs the others."""
        if self.proxy_options:
            self.logger(f"These proxy options are ignored: {self.proxy_options}", loglevel=INFO)

    def _update_local_proxy_socket(self, port: int) -> None:
        """Set the local port that the program has to connect to."""
        self.PROXY_OPTIONS = [f"port={port}" if option.startswith("port=") else option for option in self.PROXY_OPTIONS]

    def _generate_cmdline(self) -> list[str]:
        """Return the command line: `PROXY_CMD`, `PROXY_ARGS`, and mode, options and display of an X2Go program."""
        command = [self.PROXY_CMD, *self.PROXY_ARGS]
        if self.PROXY_MODE:
            command.append(self.PROXY_MODE)
        if self.PROXY_OPTIONS:
            display = "" if self.PROXY_DISPLAY is None else f":{self.PROXY_DISPLAY}"
            command.append(",".join(self.PROXY_OPTIONS) + display)
        return command

    # ---- what the backend calls, by `Hooks` ----

    def _prepare_command(self, context: BackendContext) -> list[str]:
        """Open the logs, call the hooks, and return the command line.

        Raises:
            BackendError: A file cannot be opened, or a hook failed.
        """
        self._open_logs(context)
        self._hook_thread_id = threading.get_ident()
        try:
            self._update_local_proxy_socket(context.port or 0)
            self._call_process_proxy_options()
            # python-x2go's own base returns an empty string: in a subclass too that means the default.
            line: Any = self._generate_cmdline() or X2GoProxy._generate_cmdline(self)
        except Exception as error:
            raise BackendError(
                EndReason.PROXY_NOT_STARTABLE,
                f"The class {type(self).__qualname__} failed to build its command line: {error!r}.",
                "Check its methods _update_local_proxy_socket and _generate_cmdline.",
            ) from error
        finally:
            self._hook_thread_id = None
        words = [line] if isinstance(line, str) else [str(word) for word in line]
        return [word.replace("{port}", str(context.port)) for word in words]

    def _changed_environment(self) -> dict[str, str | None]:
        """Return how `PROXY_ENV` differs from what the engine was made with; None for a removed variable.

        The rest stays as the engine passes it on: without the ``NX_*`` of an outer session, and with an absolute
        ``XAUTHORITY``.
        """
        before, now = self._environ_at_start, self.PROXY_ENV
        removed = before.keys() - now.keys() if now is self._own_environ else set()
        changed = {name: value for name, value in now.items() if name.startswith("NX_") or before.get(name) != value}
        return {**changed, **dict.fromkeys(removed)}

    # ---- inside ----

    def _make_proxy(self, info: Any, transport: paramiko.Transport) -> Proxy:
        if self.PROXY_ENV is not self._own_environ:  # a subclass replaced the dict: its variables are added
            self.PROXY_ENV = {**_without_nx(os.environ), **self.PROXY_ENV}
        self._own_environ = self.PROXY_ENV
        self._environ_at_start = dict(self.PROXY_ENV)
        display = getattr(info, "display", None)
        return _ObservedProxy(
            self._make_process,
            SessionInfo(
                name=info.name,
                cookie=getattr(info, "cookie", None) or None,
                graphics_port=int(info.graphics_port),
                display=None if display in {None, ""} else int(display),
            ),
            transport,
            backend=self._make_backend(),
            sessions_root=self.sessions_rootdir,
            environ=self._environ_at_start,
            logger=self._events,
            resumed=getattr(info, "status", None) == "S",
        )

    def _make_backend(self) -> HookedBackend:
        kind: type[HookedNX3 | HookedKDrive | HookedViewer] = HookedViewer
        name = Path(self.PROXY_CMD).name.lower()
        if self._backend_class is not None:
            kind = self._backend_class
        elif "nxproxy" in name or self.subsystem == "NX Proxy":
            kind = HookedNX3
        elif "x2gokdriveclient" in name or self.subsystem == "X2Go KDrive Client":
            kind = HookedKDrive
        return kind(Hooks(lambda: self.PROXY_CMD, self._prepare_command, self._changed_environment))

    def _make_process(self, command: Sequence[str], **options: Any) -> ProxyProcess:
        """Make the engine's process; it writes to `session_log`, and is exposed as `proxy`."""
        assert self._fsm_proxy is not None  # noqa: S101 - the engine calls this
        assert self.session_log_stdout is not None  # noqa: S101 - opened in the preflight
        handle = ProcessHandle(self._fsm_proxy, list(command), self._on_spawned)
        post: Callable[[Observation], None] = options.pop("post")
        options["log"] = self.session_log_stdout.fileno()
        process = ProxyProcess(command, post=handle.observing(post, self._files.write_errors), **options)
        handle.attach(process)
        return process

    def _on_spawned(self, handle: ProcessHandle) -> None:
        with self._engine_lock:
            if not self._engine_stop_requested:
                self.proxy = handle

    def _run_engine(self, engine: Proxy) -> None:
        """Start the engine, and wait until it has ended and the end is reported."""
        with self._engine_lock:
            if self._run_called:
                return
            self._run_called = True
            if not self._engine_stop_requested:
                self.fw_tunnel = TunnelHandle(engine)
        try:
            with suppress(InvalidTransition):  # it was stopped before, or the program started it
                engine.start()
            if engine.wait(State.RUNNING) is State.RUNNING:
                self.logger(f"The {self.subsystem} is up.", loglevel=INFO)
                self._outcome_known.set()
            engine.wait()
        finally:
            self._close()
            try:
                self._report_end(engine)
            finally:
                self._outcome_known.set()

    def _close(self) -> None:
        """Release what is held while it runs; any number of times."""
        self._files.close()
        if self._engine_stop_requested:
            self.proxy = self.fw_tunnel = None

    def _report_end(self, engine: Proxy) -> None:
        status = engine.status()
        level = ERROR if status.state is State.FAILED else NOTICE
        hint = "" if status.hint is None else f" {status.hint}"
        self.logger(f"The {self.subsystem} has ended ({status.reason}): {status.detail}{hint}", loglevel=level)
        session = self.session_instance
        if session is None or status.reason not in _TUNNEL_REFUSED:
            return
        try:
            session.set_session_name(self.session_name)
            session.HOOK_forwarding_tunnel_setup_failed(
                chain_host="127.0.0.1", chain_port=int(self.session_info.graphics_port), subsystem=self.subsystem
            )
        except Exception as error:  # noqa: BLE001 - the program's own code: log it, and keep the reason
            self.logger(f"HOOK_forwarding_tunnel_setup_failed failed: {error!r}", loglevel=ERROR)

    def _call_process_proxy_options(self) -> None:
        try:
            self.process_proxy_options()
        except Exception as error:  # noqa: BLE001 - by the API no exception of it prevents the start
            self.logger(f"process_proxy_options failed, which is ignored: {error!r}", loglevel=ERROR)

    def _open_logs(self, context: BackendContext) -> None:
        container = Path(getattr(self.session_info, "local_container", None) or context.session_root)
        log, errors = container / self.session_log, container / self.session_errors
        self.session_log_stdout, self.session_log_stderr = self._files.open(log, errors if self.PROXY_OPTIONS else None)
        self.logger(f"The {self.subsystem} writes its log to {log}.", loglevel=DEBUG)

    def _describe(self) -> dict[str, str]:
        engine = self._fsm_proxy
        return {"proxy_id": "" if engine is None else engine.id, "session": self.session_name or ""}


class _ObservedProxy(Proxy):
    """The proxy behind an `X2GoProxy`, which makes the process for it."""

    def __init__(self, make_process: Callable[..., ProxyProcess], *args: Any, **options: Any) -> None:
        self._make_process = make_process
        super().__init__(*args, **options)

    def _make_effects(self, *arguments: Any, **options: Any) -> EngineEffects:
        return WorkerEffects(*arguments, make_process=self._make_process, **options)


def _without_nx(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables of an outer NX session."""
    return {name: value for name, value in environ.items() if not name.startswith("NX_")}


def _reject_late_patching() -> None:
    """Reject gevent's patching after the import: queues imported before it would block gevent's hub.

    Raises:
        RuntimeError: gevent patched the standard library after this package was imported.
    """
    monkey: Any = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("queue") and not is_patched():
        raise RuntimeError(
            "gevent patched the standard library after proxy_fsm was imported: import x2go (or call "
            "gevent.monkey.patch_all()) before anything of proxy_fsm."
        )
