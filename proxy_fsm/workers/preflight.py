"""The preflight of one proxy: everything local is set up before anything remote is touched."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

from proxy_fsm.errors import BackendError
from proxy_fsm.evidence import ChecksPassed, PreflightFinished, PreflightPassed, WorkerCrashed, WorkerFailed
from proxy_fsm.workers.checks import BINDING_CHECKS, LOCAL_CHECKS, Check, CheckContext, inherited_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from proxy_fsm.backends.base import Backend
    from proxy_fsm.evidence import Observation
    from proxy_fsm.session import SessionInfo
    from proxy_fsm.workers.display_watch import DisplayWatch
    from proxy_fsm.workers.forwarder import Forwarder

__all__ = ["Preflight"]


class Preflight:
    """Runs the checks on a thread of its own, since each may block, and holds what they acquired.

    Posts `ChecksPassed` before the local end of the tunnel is bound, then `PreflightPassed`, or `WorkerFailed` instead;
    and `PreflightFinished` last.

    Attributes:
        step: What is being waited for, human-readable.
        watch: The display watch, if the backend needs an X server; set before `ChecksPassed` is posted.
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
        self._context = CheckContext(
            backend=backend,
            session=session,
            sessions_root=sessions_root,
            environ=inherited_environment(environ),
            timeout_s=timeout_s,
            forwarder=forwarder,
            post=post,
            keep=self._keep,
        )
        self._post = post
        self._lock = threading.Lock()
        self._held: ExitStack | None = ExitStack()
        self.thread = threading.Thread(target=self._run, name="proxy_fsm-preflight", daemon=True)

    def start(self) -> None:
        """Start; returns at once."""
        try:
            self.thread.start()
        except BaseException:
            self._post(PreflightFinished())
            raise

    def close(self) -> None:
        """Release what was acquired; anything acquired later is released at once, on the thread that acquired it."""
        with self._lock:
            held, self._held = self._held, None
        if held is not None:
            held.close()

    def _run(self) -> None:
        try:
            self._check(LOCAL_CHECKS)
            self.watch = self._context.watch
            self._post(ChecksPassed())
            self._check(BINDING_CHECKS)
            self._post(PreflightPassed(self._context.listen_address, self._context.launch()))
        except BackendError as error:
            self._post(WorkerFailed(error))
        except _ClosedError:
            pass  # it was closed meanwhile, and holds nothing
        except BaseException as error:  # noqa: BLE001 - whatever it was, sys.exit() included, the owner has to know
            self._post(WorkerCrashed("preflight", error))
        finally:
            self._post(PreflightFinished())

    def _check(self, checks: tuple[Check, ...]) -> None:
        for check in checks:
            self.step = check.name
            check.run(self._context)

    def _keep(self, release: Callable[[], object]) -> None:
        """Have something released with the rest, or at once if that was released already."""
        with self._lock:
            if self._held is not None:
                self._held.callback(release)
                return
        release()
        raise _ClosedError


class _ClosedError(Exception):
    """The preflight was closed."""
