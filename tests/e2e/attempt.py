"""An engine under a test's eyes: what it told, when it changed, and what is left of it."""

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
GONE_S = 5.0


class Watched(Backend):
    """Keeps the evidence that a backend is shown: it has the times of the first signs."""

    evidence = Evidence()  # before anything was seen

    def diagnose(self, evidence: Evidence) -> tuple[EndReason, str] | None:
        """Keep the evidence, and judge as ever."""
        self.evidence = evidence
        return super().diagnose(evidence)


class WatchedNX3(Watched, NX3Backend):
    """The real backend for NX, watched."""


class WatchedViewer(Watched, CommandBackend):
    """That for a viewer which a command starts, watched."""


class Attempt:
    """One proxy, with its events and the times at which it told of its changes (monotonic seconds)."""

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
            client: the connection that it goes over.
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
            processors=[structlog.processors.format_exc_info, self._take_event],
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
        self.proxy.subscribe(self._take_record, via=lambda call: call())  # whoever waits comes after it

    def _take_event(self, _logger: object, method: str, event: Any) -> Any:
        self.events.append({"level": method, "at": time.monotonic(), **event})
        raise structlog.DropEvent

    def _take_record(self, record: TransitionRecord) -> None:
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
        """When its final state was told."""
        return next(at for state, at in self.entered.items() if state.is_final)

    def sign_at(self, sign: type[Observation] | str) -> float:
        """Tell when something was first observed, or a line with this text first read, by a watched backend.

        Raises:
            LookupError: it never was.
        """
        if not isinstance(self.backend, Watched):
            raise TypeError("Only a watched backend keeps evidence.")
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

    def told(self) -> str:
        """Join all that it tells: events, status, history, and how its parts present themselves."""
        status = self.proxy.status()
        parts = (self.proxy, self.session, self.backend, status, self.records)
        shown = [*map(repr, parts), *map(str, parts), *map(str, status.history)]
        return json.dumps([self.events, status.as_dict(), shown])

    def check_secrecy(self) -> None:
        """Make sure that nothing it told or wrote holds the cookie, and that it found no bug of its own."""
        assert self.named("internal.error") == []
        assert self.named("subscriber.failed") == []
        if self.session.cookie is None:
            return
        assert self.session.cookie.lower() not in self.told().lower()
        for path in files_below(self.root):
            assert self.session.cookie.encode().lower() not in path.read_bytes().lower(), path

    def close(self) -> None:
        """End it, and check that it told no secret."""
        self.proxy.close(FINAL_S)
        self.check_secrecy()


def files_below(directory: Path) -> list[Path]:
    """List all plain files below a directory."""
    return [path for path in directory.rglob("*") if path.is_file()]


@dataclass(frozen=True)
class Holdings:
    """What this process holds that an engine could have left behind."""

    descriptors: Counter[str]
    threads: frozenset[str]
    children: frozenset[int]
    channels: Counter[int]

    @classmethod
    def now(cls, transports: Iterable[paramiko.Transport] = ()) -> Holdings:
        """Look at it."""
        return cls(
            Counter(each.partition(" ")[2] for each in descriptors()),
            frozenset(f"{each.name} ({each.ident})" for each in own_threads()),
            frozenset(children()),
            Counter(id(transport) for transport in transports for _ in cast("Any", transport)._channels.values()),
        )

    def gained_since(self, before: Holdings) -> list[object]:
        """List what there is now and was not before."""
        return [
            *(self.descriptors - before.descriptors),
            *(self.threads - before.threads),
            *(f"child {pid}" for pid in self.children - before.children),
            *(f"channel of transport {number}" for number in self.channels - before.channels),
        ]


def nothing_gained_since(before: Holdings, transports: Iterable[paramiko.Transport] = ()) -> None:
    """Wait until everything that came since then is gone; threads may take a moment to end."""
    transports = tuple(transports)
    all_released(lambda: Holdings.now(transports).gained_since(before), GONE_S)
