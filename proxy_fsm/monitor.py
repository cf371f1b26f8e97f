"""One monitor per transport: its end, and its silence.

All proxies on a transport share it. Its one thread sleeps until the transport ends, somebody attaches or detaches,
a probe is answered, or it is time to look whether anything came. A probe is the opening of a ``session`` channel
that is closed at once: any answer, a refusal too, is a sign of life, and unlike a global request it cannot
be mistaken for the answer to a request of the caller's own.
"""

from __future__ import annotations

import threading
import time
import weakref
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from proxy_fsm.evidence import LinkDead, LinkRestored, LinkSilent, TransportEnded, WorkerFailed
from proxy_fsm.ssh import ChannelOpening, EndWatch, NotOpened, packets_received, why_ended

if TYPE_CHECKING:
    from collections.abc import Callable

    import paramiko

    from proxy_fsm.evidence import Observation
    from proxy_fsm.status import Timeouts

__all__ = ["Attachment", "attach"]

#: A sleep that lasts so much longer than it should means that this process was stopped, in seconds.
_STOPPED_S = 0.1
#: A kind of channel that no server knows: its refusal is a sign of life, and costs the caller none of its sessions, of
#: which OpenSSH allows ten by default.
_PROBE = "probe@proxy-fsm"


@dataclass(eq=False)
class Attachment:
    """One proxy's interest in a transport.

    Attributes:
        post: Takes the observations.
        probe_s: After how much silence a probe is sent, in seconds, and after how much more it is silent.
        dead_s: After how much silence the transport is given up, in seconds.
        since: From when on it counts silence (monotonic).
    """

    post: Callable[[Observation], None]
    probe_s: float
    dead_s: float
    told_silent: bool = False
    told_dead: bool = False

    since: float = field(default_factory=time.monotonic)
    _monitor: _TransportMonitor | None = None

    def quiet_since(self, heard_at: float) -> float:
        """Return from when on it counts silence (monotonic), where that was heard last."""
        return max(heard_at, self.since)

    def detach(self) -> None:
        """Want nothing more; the last one out ends the monitor."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            monitor.detach(self)


_registry_lock = threading.Lock()
_registry: weakref.WeakKeyDictionary[paramiko.Transport, _TransportMonitor] = weakref.WeakKeyDictionary()


def attach(transport: paramiko.Transport, timeouts: Timeouts, post: Callable[[Observation], None]) -> Attachment:
    """Have `TransportEnded`, `LinkSilent`, `LinkRestored` and `LinkDead` posted for a transport.

    Args:
        transport: The transport; where it has ended, that is posted at once.
        timeouts: ``link_probe_s`` and ``link_dead_s`` are used.
        post: Takes the observations, on any thread; must be short.

    Raises:
        RuntimeError: No thread can be started.
    """
    attachment = Attachment(post, timeouts.link_probe_s, timeouts.link_dead_s)
    with _registry_lock:
        monitor = _registry.get(transport)
        if monitor is None or not monitor.add(attachment):
            monitor = _TransportMonitor(transport)
            monitor.add(attachment)
            monitor.start()
            _registry[transport] = monitor  # only now: one that never ran would leave all who share it blind
        attachment._monitor = monitor  # noqa: SLF001
    return attachment


def forget_all() -> None:
    """After a fork the child has none of the parent's threads: it starts from nothing."""
    global _registry_lock, _registry  # noqa: PLW0603
    _registry_lock = threading.Lock()
    _registry = weakref.WeakKeyDictionary()


class _TransportMonitor:
    def __init__(self, transport: paramiko.Transport) -> None:
        # Held weakly, so that the registry's key can go when the caller drops a transport that has ended.
        self._transport = weakref.ref(transport)
        self._wake: SimpleQueue[str] = SimpleQueue()
        self._attached: list[Attachment] = []
        self._ended = False
        self._lock = threading.Lock()
        self._probe: ChannelOpening | None = None
        self._thread = threading.Thread(target=self._run, name="proxy_fsm-monitor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, attachment: Attachment) -> bool:
        """Take one more in; False where this monitor has come to its end."""
        with self._lock:
            if self._ended:
                return False
            self._attached.append(attachment)
        self._wake.put("attached")
        return True

    def detach(self, attachment: Attachment) -> None:
        with self._lock:
            if attachment in self._attached:
                self._attached.remove(attachment)
            if not self._attached:
                self._ended = True
        self._wake.put("detached")
        if self._ended and self._thread is not threading.current_thread():
            self._thread.join(1)

    def _run(self) -> None:
        try:
            transport = self._transport()
            if transport is not None:
                self._watch(transport)
        except Exception as error:  # noqa: BLE001 - whatever it was, the owners have to know
            self._end_with(WorkerFailed("transport monitor", error))
        finally:
            with self._lock:  # whoever comes later needs another one
                self._ended = True

    def _watch(self, transport: paramiko.Transport) -> None:
        watch = EndWatch(transport, lambda: self._wake.put("ended"))
        try:
            self._watch_until_end(transport)
        finally:
            watch.cancel()
            probe = self._probe  # its own thread forgets it
            if probe is not None:
                probe.abandon()

    def _watch_until_end(self, transport: paramiko.Transport) -> None:
        looked_at = heard_at = time.monotonic()
        packets = packets_received(transport)
        while True:
            with self._lock:
                attached = tuple(self._attached)
                if not attached:
                    self._ended = True
                    return
            due = self._next_look(attached, heard_at, looked_at)
            try:
                why = self._wake.get(timeout=max(0.0, due - time.monotonic()))
            except Empty:
                why = "time"
                overslept_s = time.monotonic() - due
                if overslept_s > _STOPPED_S:
                    heard_at = self._leave_out(overslept_s, heard_at)
            if why == "ended":
                self._tell_end(transport)
                return
            looked_at = time.monotonic()
            if packets_received(transport) != packets:
                packets = packets_received(transport)
                self._tell_restored(looked_at - heard_at)
                heard_at = looked_at
            self._look(transport, looked_at, heard_at)

    def _leave_out(self, stopped_s: float, heard_at: float) -> float:
        """Count no silence for the time in which this process itself was stopped; return the new ``heard_at``."""
        with self._lock:
            for a in self._attached:
                a.since = min(a.since + stopped_s, time.monotonic())
        return heard_at + stopped_s

    @staticmethod
    def _next_look(attached: tuple[Attachment, ...], heard_at: float, looked_at: float) -> float:
        """Return when something is due next, if nothing is heard until then (monotonic); it may be past by now."""
        due = [a.quiet_since(heard_at) + mark for a in attached for mark in (a.probe_s, 2 * a.probe_s, a.dead_s)]
        due = [mark for mark in due if mark > looked_at]
        return min(due, default=looked_at + min(a.probe_s for a in attached))

    def _look(self, transport: paramiko.Transport, now: float, heard_at: float) -> None:
        with self._lock:
            attached = tuple(self._attached)
        if any(now - a.quiet_since(heard_at) >= a.probe_s for a in attached):
            self._send_probe(transport)
        for a in attached:
            quiet_s = now - a.quiet_since(heard_at)
            if quiet_s >= min(2 * a.probe_s, a.dead_s) and not a.told_silent:
                a.told_silent = True
                a.post(LinkSilent(heard_at))
            if quiet_s >= a.dead_s and not a.told_dead:
                a.told_dead = True
                a.post(LinkDead(quiet_s))

    def _tell_restored(self, silent_s: float) -> None:
        with self._lock:
            attached = tuple(self._attached)
        for a in attached:
            if a.told_silent:
                a.told_silent = False
                a.post(LinkRestored(silent_s))

    def _tell_end(self, transport: paramiko.Transport) -> None:
        self._end_with(TransportEnded(why_ended(transport)))

    def _end_with(self, observation: Observation) -> None:
        with self._lock:
            self._ended = True
            attached = tuple(self._attached)
        for a in attached:
            a.post(observation)

    def _send_probe(self, transport: paramiko.Transport) -> None:
        """Probe on a thread of its own, since a server that takes nothing may hold the sender for long."""
        if self._probe is not None:
            return
        probe = self._probe = ChannelOpening(transport, _PROBE)

        def run() -> None:
            try:
                probe.send()
                probe.wait().send_close()
            except NotOpened:
                pass  # a refusal is an answer; the others are told elsewhere
            finally:
                self._probe = None
                self._wake.put("answered")

        try:
            threading.Thread(target=run, name="proxy_fsm-probe", daemon=True).start()
        except RuntimeError:  # no thread can be started: a later look tries again
            self._probe = None
            with self._lock:
                for a in self._attached:
                    a.since = time.monotonic()  # a server that was not asked is not silent
