"""An engine under observation: its events, the times of its transitions, and the resources it leaves behind."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import structlog

from proxy_fsm import Backend, CommandBackend, Evidence, NX3Backend, Proxy, State
from tests.helpers.holdings import all_released, children, descriptors, own_threads

from .sshd import transport_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from typing import Self

    import paramiko

    from proxy_fsm import EndReason, SessionInfo, TransitionRecord
    from proxy_fsm.evidence import Observation

RUNNING_S = 15.0
FINAL_S = 15.0
RELEASE_S = 5.0


class Watched(Backend):
    """Records the evidence that a backend is given: it has the times of the first observations."""

    evidence = Evidence()  # before any observation

    def diagnose(self, evidence: Evidence) -> tuple[EndReason, str] | None:
        """Record the evidence, and diagnose as usual."""
        self.evidence = evidence
        return super().diagnose(evidence)


class WatchedNX3(Watched, NX3Backend):
    """The real backend for NX, watched."""


class WatchedViewer(Watched, CommandBackend):
    """The backend for a viewer started by a command, watched."""


class Attempt:
    """One proxy, with its events and the times at which it published its transitions (monotonic seconds)."""

    def __init__(
        self,
        session: SessionInfo,
        client: paramiko.SSHClient,
        environ: Mapping[str, str],
        root: Path,
        *,
        backend: Backend | None = None,
        **options: Any,
    ) -> None:
        """Make the proxy; nothing is acquired yet.

        Args:
            session: the session.
            client: the connection that it uses.
            environ: what the proxy program inherits.
            root: the sessions root.
            backend: by default the real one for NX, watched.
            options: for `Proxy`.
        """
        self.backend = WatchedNX3() if backend is None else backend
        self.session = session
        self.root = root
        self.transport = transport_of(client)
        self.events: list[dict[str, Any]] = []
        self.records: list[TransitionRecord] = []
        self.entered: dict[State, float] = {}
        self.started_at = 0.0
        logger = structlog.wrap_logger(
            structlog.testing.CapturingLogger(),
            processors=[structlog.processors.format_exc_info, self._record_event],
            wrapper_class=structlog.make_filtering_bound_logger(0),
        )
        self.proxy = Proxy(
            session,
            self.transport,
            backend=self.backend,
            sessions_root=root,
            environ=environ,
            logger=logger,
            **options,
        )
        self.proxy.subscribe(self._record_transition, via=lambda call: call())  # called before any waiter wakes

    def _record_event(self, _logger: object, method: str, event: Any) -> Any:
        self.events.append({"level": method, "at": time.monotonic(), **event})
        raise structlog.DropEvent

    def _record_transition(self, record: TransitionRecord) -> None:
        self.entered[record.dest] = time.monotonic()
        self.records.append(record)

    def start(self) -> None:
        """Start it, and return at once."""
        self.started_at = time.monotonic()
        self.proxy.start()

    def run(self) -> Self:
        """Start it and wait until it runs."""
        self.start()
        self.proxy.wait_running(RUNNING_S)
        return self

    def wait(self, timeout_s: float = FINAL_S) -> State:
        """Wait for its end."""
        return self.proxy.wait(timeout=timeout_s)

    @property
    def final_at(self) -> float:
        """When its final state was published."""
        return next(at for state, at in self.entered.items() if state.is_final)

    def sign_at(self, sign: type[Observation] | str) -> float:
        """Return when an observation was first made, or a line with this text first read, by a watched backend.

        Raises:
            LookupError: it never was.
        """
        if not isinstance(self.backend, Watched):
            raise TypeError("Only a watched backend records evidence.")
        evidence = self.backend.evidence
        if isinstance(sign, str):
            seen: Observation | None = next((line for line in evidence.lines if sign in line.text), None)
        else:
            seen = evidence.first(sign)
        if seen is None:
            raise LookupError(f"{sign} was not seen in {evidence.observations} and {evidence.lines}")
        return seen.at

    def named(self, event: str) -> list[dict[str, Any]]:
        """List its events of this name."""
        return [each for each in self.events if each["event"] == event]

    def everything_published(self) -> str:
        """Join all that it publishes: events, status, history, and the reprs of its parts."""
        status = self.proxy.status()
        parts = (self.proxy, self.session, self.backend, status, self.records)
        shown = [*map(repr, parts), *map(str, parts), *map(str, status.history)]
        return json.dumps([self.events, status.as_dict(), shown])

    def check_secrecy(self) -> None:
        """Make sure that nothing it published or wrote contains the cookie, and that it reported no internal error."""
        assert self.named("internal.error") == []
        assert self.named("subscriber.failed") == []
        if self.session.cookie is None:
            return
        assert self.session.cookie.lower() not in self.everything_published().lower()
        for path in files_below(self.root):
            assert self.session.cookie.encode().lower() not in path.read_bytes().lower(), path

    def close(self) -> None:
        """Close it, and check that it published no secret."""
        self.proxy.close(FINAL_S)
        self.check_secrecy()


def files_below(directory: Path) -> list[Path]:
    """List all plain files below a directory."""
    return [path for path in directory.rglob("*") if path.is_file()]


@dataclass(frozen=True)
class Holdings:
    """Resources of this process that an engine could have leaked."""

    descriptors: Counter[str]
    threads: frozenset[str]
    children: frozenset[int]
    channels: Counter[int]

    @classmethod
    def now(cls, transports: Iterable[paramiko.Transport] = ()) -> Holdings:
        """Take a snapshot."""
        return cls(
            Counter(each.partition(" ")[2] for each in descriptors()),
            frozenset(f"{each.name} ({each.ident})" for each in own_threads()),
            frozenset(children()),
            Counter(id(transport) for transport in transports for _ in cast("Any", transport)._channels.values()),
        )

    def gained_since(self, before: Holdings) -> list[object]:
        """List the resources that were not held before."""
        return [
            *(self.descriptors - before.descriptors),
            *(self.threads - before.threads),
            *(f"child {pid}" for pid in self.children - before.children),
            *(f"channel of transport {number}" for number in self.channels - before.channels),
        ]


def nothing_gained_since(before: Holdings, transports: Iterable[paramiko.Transport] = ()) -> None:
    """Wait until everything acquired since then is released; threads may take a moment to end."""
    transports = tuple(transports)
    all_released(lambda: Holdings.now(transports).gained_since(before), RELEASE_S)
