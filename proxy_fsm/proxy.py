"""The public interface of the engine, and what happens to engines when a program exits, forks, or drops a proxy."""

from __future__ import annotations

import atexit
import os
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import paramiko

from proxy_fsm import diagram as drawing
from proxy_fsm.backends import Backend, NX3Backend
from proxy_fsm.effects import WorkerEffects
from proxy_fsm.engine import RUNNING_ENGINES, Engine
from proxy_fsm.errors import ProxyFailed, ProxyStopped
from proxy_fsm.journal import join_notifiers
from proxy_fsm.session import SessionInfo
from proxy_fsm.states import State
from proxy_fsm.status import ProxyStatus, Timeouts
from proxy_fsm.workers import link_monitor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from proxy_fsm.engine import EngineEffects
    from proxy_fsm.status import TransitionRecord

__all__ = ["Proxy"]

#: How long delivery to subscribers may take when the interpreter exits after all proxies have ended.
_NOTIFY_S = 5.0


class Proxy:
    """Brings one remote-desktop session to the screen: tunnel, proxy program, and the exact status of both.

    A proxy is used once. Making one acquires nothing; it holds resources between `start` and a final state.
    All methods may be called on any thread, `stop` also in a signal handler.

    Args:
        session: The session to attach to.
        transport: A connected, authenticated transport. It belongs to the caller: it is never closed.
        backend: What to run; by default `NX3Backend`.
        sessions_root: Directory for the session roots, ``S-<session name>``, which hold the proxy's log; by default
            ``~/.x2go``.
        timeouts: The time limits.
        logger: Receives the events: a structlog logger, or one of the standard library's. By default structlog's if
            the program has configured it, else ``logging.getLogger("proxy_fsm")``.
        environ: The environment that the proxy program inherits; by default this process's.
        ask_server: Whether to ask an X2Go server how a session ended: suspended or terminated.
        resumed: Whether the session was resumed, and so survives a failed attempt (see ``ProxyStatus.retryable``).

    Raises:
        TypeError: An argument has the wrong type.
        InvalidSession: The session lacks what the backend needs.
    """

    #: The chart that `proxy_fsm.diagram` draws of it.
    __chart__: ClassVar[drawing.Chart] = drawing.LIFECYCLE

    def __init__(
        self,
        session: SessionInfo,
        transport: paramiko.Transport,
        *,
        backend: Backend | None = None,
        sessions_root: str | os.PathLike[str] | None = None,
        timeouts: Timeouts = Timeouts(),  # noqa: B008 - it is frozen
        logger: Any = None,
        environ: Mapping[str, str] | None = None,
        ask_server: bool = False,
        resumed: bool = False,
    ) -> None:
        backend = NX3Backend() if backend is None else backend
        for name, value, kind in (
            ("session", session, SessionInfo),
            ("transport", transport, paramiko.Transport),
            ("backend", backend, Backend),
            ("timeouts", timeouts, Timeouts),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, not {type(value).__name__}.")
        backend.check_session(session)
        root = Path(sessions_root) if sessions_root is not None else Path.home() / ".x2go"
        make_effects = partial(
            self._make_effects,
            session,
            transport,
            backend,
            sessions_root=root.absolute(),
            environ=dict(os.environ if environ is None else environ),
            timeouts=timeouts,
        )
        self._engine = Engine(
            session,
            backend,
            make_effects,
            timeouts=timeouts,
            logger=logger,
            ask_server=ask_server,
            resumed=resumed,
        )

    def _make_effects(self, *arguments: Any, **options: Any) -> EngineEffects:
        """Return the effects; `proxy_fsm.testing` overrides this."""
        return WorkerEffects(*arguments, **options)

    @property
    def id(self) -> str:
        """The short unique id of this engine, in every event and record."""
        return self._engine.id

    @property
    def state(self) -> State:
        """The state; takes no lock."""
        return self._engine.state

    def ok(self) -> bool:
        """Tell whether the state is ``running``; takes no lock."""
        return self._engine.state is State.RUNNING

    def status(self) -> ProxyStatus:
        """Return a snapshot of everything that is known."""
        return self._engine.status()

    def diagram(
        self, format: drawing.Format = "mermaid", *, theme: drawing.Theme | None = None, phases: bool = True
    ) -> str | bytes:
        """Draw the lifecycle with the current state and phase, and the path to them, each arrow with its time.

        Args:
            format: The output format; see `proxy_fsm.diagram.draw`.
            theme: ``light`` or ``dark``; see there.
            phases: Whether to draw the phases.

        Returns:
            The diagram, as bytes for ``png`` and as text for all other formats.

        Raises:
            DiagramError: There is no such format, or it needs the extra ``diagram``.
        """
        status = self.status()
        chart = replace(drawing.chart_of(self), title=f"{type(self).__name__} {status.id} of {status.session}")
        here = str(status.state) if status.phase is None else f"{status.state}/{status.phase}"
        path = drawing.path_from_history(status.history)
        return drawing.draw(chart, format, highlight=here, path=path, theme=theme, phases=phases)

    def start(self) -> None:
        """Start the proxy; return as soon as it has left ``idle``.

        Raises:
            InvalidTransition: It was started or stopped before.
        """
        self._engine.forbid_on_owner_thread("start")
        self._engine.start()

    def stop(self) -> None:
        """Order it to stop, in any state, on any thread, any number of times; returns at once.

        A signal handler may call it. If the proxy was not started, this very call logs the event: do not use a
        lock-taking logger if you then call it in a signal handler.
        """
        self._engine.stop()

    def wait(self, *states: State, timeout: float | None = None) -> State:
        """Wait until it is in one of these states, or in a final one, and return that state.

        Args:
            states: The states; none to wait for a final one.
            timeout: In seconds; None for no limit.

        Raises:
            TimeoutError: It reached none of them in time; the proxy continues.
            RuntimeError: Called by a subscriber, or in a forked child.
        """
        return self._engine.wait(frozenset(State(state) for state in states), timeout)

    def wait_running(self, timeout: float | None = None) -> None:
        """Wait until it is running.

        Args:
            timeout: In seconds; None for no limit.

        Raises:
            ProxyFailed: It failed; ``status`` says why.
            ProxyStopped: It was stopped, or the session ended.
            TimeoutError: None of this happened in time; the proxy continues.
            RuntimeError: Called by a subscriber, or in a forked child.
        """
        state = self.wait(State.RUNNING, timeout=timeout)
        if state is State.FAILED:
            raise ProxyFailed(self.status())
        if state is State.STOPPED:
            raise ProxyStopped(self.status())

    def close(self, timeout: float | None = None) -> None:
        """Stop it and wait until everything is released.

        Args:
            timeout: In seconds; None waits as long as its own time limits allow, which are all finite.

        Raises:
            TimeoutError: Not everything was released in time; the shutdown continues.
            RuntimeError: Called by a subscriber.
        """
        self._engine.forbid_on_owner_thread("close")
        if self._engine.in_forked_child():
            return
        self.stop()
        self.wait(timeout=timeout)

    def subscribe(
        self,
        callback: Callable[[TransitionRecord], object],
        *,
        via: Callable[..., object] | None = None,
        replay: bool = False,
    ) -> Callable[[], None]:
        """Call back with each change of state, in order, without loss.

        A slow subscriber does not delay the proxy. A caller that waits for a state returns after subscribers were
        called with it, but does not wait for a subscriber that takes longer than 0.2 s. When the interpreter exits, all
        pending records are delivered, within the time that stopping may take.

        Args:
            callback: Receives each record. An exception in it is logged and changes nothing. It may call `stop`;
                methods that wait raise RuntimeError. A callback that refers to the proxy keeps it alive: a proxy that
                is then dropped keeps running.
            via: Passes the call, a function without arguments, to another loop: ``loop.call_soon_threadsafe``,
                ``GLib.idle_add``, or the ``emit`` of a Qt ``Signal(object)`` that is connected to
                ``lambda call: call()``. It is called on the owner thread, and must return quickly. Without it the
                callback is called on a notifier thread, shared by all such subscribers of this proxy.
            replay: Whether to begin with the past changes.

        Returns:
            The function that unsubscribes.
        """
        return self._engine.subscribe(callback, via, replay=replay)

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_running()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        status = self._engine.status()
        reason = "" if status.reason is None else f" ({status.reason})"
        return f"<Proxy {self.id} of {status.session}: {status.state}{reason}>"

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is None or engine.state is State.IDLE or engine.state.is_final or engine.in_forked_child():
            return
        engine.stop()
        if not sys.is_finalizing():
            warnings.warn(
                f"A proxy was dropped while {engine.state}; it is stopped.", ResourceWarning, stacklevel=2, source=self
            )


def _stop_all() -> None:
    """Stop all proxies when the interpreter exits, within one common deadline; starts no thread."""
    engines = [engine for engine in tuple(RUNNING_ENGINES) if not engine.in_forked_child()]
    for engine in engines:
        engine.stop()
    deadline = time.monotonic() + max((engine.end_within_s for engine in engines), default=_NOTIFY_S)
    for engine in engines:
        with suppress(TimeoutError):  # this process ends first: its socket closes, and the program exits
            engine.wait(frozenset(), max(0.0, deadline - time.monotonic()))
    join_notifiers(deadline)


def _forget_all() -> None:
    """Forget all engines in a forked child: they belong to the parent."""
    RUNNING_ENGINES.clear()
    link_monitor.forget_all()


atexit.register(_stop_all)
os.register_at_fork(after_in_child=_forget_all)
