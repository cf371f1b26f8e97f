"""Carries out a supervisor's decisions with real workers: each runs on its own thread and posts observations."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from proxy_fsm.ssh import why_ended
from proxy_fsm.workers import link_monitor
from proxy_fsm.workers.forwarder import Forwarder
from proxy_fsm.workers.preflight import Preflight
from proxy_fsm.workers.process import ProxyProcess
from proxy_fsm.workers.session_query import SessionStatusQuery

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import paramiko

    from proxy_fsm.backends import Backend
    from proxy_fsm.events import Event
    from proxy_fsm.evidence import Launch, Observation
    from proxy_fsm.session import SessionInfo
    from proxy_fsm.status import Timeouts, TransitionRecord, TunnelStats

__all__ = ["WorkerEffects"]

#: How long the threads that have posted their last observation may take to end.
_JOIN_S = 1.0


class WorkerEffects:
    """The `Effects` of a supervisor, carried out by the workers of one proxy.

    All methods are called on the owner thread, except `tunnel_stats`, which is called on any, and `publish`, which is
    called on the caller's thread if the proxy is stopped before it was started.

    Args:
        session: The session.
        transport: The caller's transport.
        backend: What differs between proxy programs.
        sessions_root: Directory for the session roots.
        environ: The environment that the proxy program inherits.
        timeouts: The time limits.
        secrets: What to redact in the proxy's output.
        post: Receives the workers' observations; may be called on any thread.
        publish: Publishes an event; for a change of state, with its record.
        make_process: Makes the process; replaceable so that a caller can observe the process.
    """

    def __init__(
        self,
        session: SessionInfo,
        transport: paramiko.Transport,
        backend: Backend,
        *,
        sessions_root: Path,
        environ: Mapping[str, str],
        timeouts: Timeouts,
        secrets: Sequence[str],
        post: Callable[[Observation], None],
        publish: Callable[[Event, TransitionRecord | None], None],
        make_process: Callable[..., ProxyProcess] = ProxyProcess,
    ) -> None:
        self._session = session
        self._transport = transport
        self._timeouts = timeouts
        self._secrets = secrets
        self._post = post
        self._publish = publish
        self._make_process = make_process
        self._forwarder = Forwarder(
            transport,
            (session.agent_host, session.graphics_port),
            max_connections=backend.max_connections,
            agent_connect_s=timeouts.agent_connect_s,
            post=post,
        )
        self._preflight = Preflight(
            session,
            backend,
            self._forwarder,
            sessions_root=sessions_root,
            environ=environ,
            timeout_s=timeouts.preflight_s,
            post=post,
        )
        self._watcher: link_monitor.Watcher | None = None
        self._process: ProxyProcess | None = None
        self._query: SessionStatusQuery | None = None

    def publish(self, event: Event, record: TransitionRecord | None = None) -> None:
        """Publish an event; for a change of state, with the record for subscribers."""
        self._publish(event, record)

    def start_preflight(self) -> None:
        """Start the preflight, and watch the transport."""
        self._preflight.start()
        self._watcher = link_monitor.attach(self._transport, self._timeouts, self._post)

    def start_proxy(self, launch: Launch) -> None:
        """Start the proxy program, accept its connections, and watch the display."""
        if self._preflight.watch is not None:
            self._preflight.watch.start()
        self._forwarder.start()
        process = self._make_process(
            launch.command,
            environment=launch.environment,
            directory=launch.directory,
            log=launch.log,
            secrets=self._secrets,
            post=self._post,
        )
        process.start()
        self._process = process

    def acknowledge(self) -> None:
        """Note that one more line of the proxy's output was handled."""
        if self._process is not None:
            self._process.ack_line()

    def terminate(self) -> None:
        """Send the proxy program SIGTERM."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send the proxy program SIGKILL."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.signal(number)

    def drain(self) -> None:
        """Close everything, but flush what the proxy has sent."""
        try:
            self._preflight.close()
        finally:
            self._forwarder.close()

    def abort(self) -> None:
        """Close everything at once, dropping what is not flushed."""
        try:
            self.drain()
        finally:
            self._forwarder.abort()

    def query_session(self) -> None:
        """Ask the server for the status of the session."""
        self._query = SessionStatusQuery(self._transport, self._session, self._post)
        self._query.start()

    def cancel_query(self) -> None:
        """Cancel that query; its answer is dropped."""
        if self._query is not None:
            self._query.cancel()

    def release(self, *, wait: bool) -> None:
        """Detach from the transport's monitor, and join the threads that have posted their last observation."""
        deadline = time.monotonic() + _JOIN_S
        monitor = None if self._watcher is None else self._watcher.detach()
        if not wait:
            return
        workers = [worker.thread for worker in (self._preflight, self._process, self._query) if worker is not None]
        for thread in (*workers, *self._forwarder.threads(), monitor):
            if thread is not None and thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        if self._preflight.watch is not None:
            self._preflight.watch.join(max(0.0, deadline - time.monotonic()))

    def preflight_step(self) -> str:
        """Return what the preflight is waiting for, human-readable."""
        return self._preflight.step

    def transport_end(self) -> str | None:
        """Return why the transport has ended, in a sentence; None while it is active."""
        return None if self._transport.is_active() else why_ended(self._transport)

    def display_in_doubt(self) -> bool:
        """Tell whether the display watch is checking if the X server is lost."""
        return self._preflight.watch is not None and self._preflight.watch.suspect

    def unreleased(self) -> tuple[str, ...]:
        """Return what is still open, human-readable."""
        return self._forwarder.unreleased()

    def tunnel_stats(self) -> TunnelStats:
        """Return what the tunnel has carried so far."""
        return self._forwarder.stats()
