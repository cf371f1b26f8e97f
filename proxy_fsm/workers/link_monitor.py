"""One monitor per transport: its end, and its silence.

All proxies on a transport share it. Its one thread sleeps until the transport ends, a watcher attaches or detaches,
a probe is answered, or it is time to check whether anything was received. A probe asks for a channel of a kind that
no server knows: its refusal is a sign of life, uses none of the caller's sessions, and, unlike the answer to a global
request, cannot be mistaken for the answer to a request of the caller's.
"""

from __future__ import annotations

import threading
import time
import weakref
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from proxy_fsm.evidence import LinkDead, LinkRestored, LinkSilent, TransportEnded, WorkerCrashed
from proxy_fsm.ssh import ChannelOpening, EndWatch, NotOpened, packets_received, received_ago_s, why_ended
from proxy_fsm.suspension import excused_s

if TYPE_CHECKING:
    from collections.abc import Callable

    import paramiko

    from proxy_fsm.evidence import Observation
    from proxy_fsm.status import Timeouts

__all__ = ["Watcher", "attach"]

#: A kind of channel that no server knows.
_PROBE = "probe@proxy-fsm"


@dataclass(eq=False)
class Watcher:
    """One proxy's interest in a transport; `attach` makes it.

    Attributes:
        monitor: The transport's monitor.
        post: Receives the observations.
        probe_s: After how much silence a probe is sent, in seconds, and after how much more the link counts as silent.
        dead_s: After how much silence the link counts as dead, in seconds.
        since: When it started to count silence (monotonic).
        silent_posted: Whether the current silence was posted.
        dead_posted: Whether `LinkDead` was posted, which is done once.
    """

    monitor: _TransportMonitor
    post: Callable[[Observation], None]
    probe_s: float
    dead_s: float
    since: float = field(init=False, default=0.0)
    silent_posted: bool = field(init=False, default=False)
    dead_posted: bool = field(init=False, default=False)

    def quiet_since(self, heard_at: float) -> float:
        """Return when its silence began: when something was last received, or when it attached, whichever is later."""
        return max(heard_at, self.since)

    def detach(self) -> threading.Thread | None:
        """Stop watching; the last watcher ends the monitor.

        Returns:
            The monitor's thread, to be joined, if this ends it or it has ended; else None.
        """
        return self.monitor.remove(self)


_registry_lock = threading.Lock()
_registry: weakref.WeakKeyDictionary[paramiko.Transport, _TransportMonitor] = weakref.WeakKeyDictionary()


def attach(transport: paramiko.Transport, timeouts: Timeouts, post: Callable[[Observation], None]) -> Watcher:
    """Have `TransportEnded`, `LinkSilent`, `LinkRestored` and `LinkDead` posted for a transport.

    Args:
        transport: The transport; if it has ended already, that is posted at once.
        timeouts: ``link_probe_s`` and ``link_dead_s`` are used.
        post: Receives the observations, on any thread; must be short.

    Raises:
        RuntimeError: No thread can be started.
    """

    def watcher_of(monitor: _TransportMonitor) -> Watcher:
        return Watcher(monitor, post, timeouts.link_probe_s, timeouts.link_dead_s)

    with _registry_lock:
        monitor = _registry.get(transport)
        if monitor is not None and monitor.add(watcher := watcher_of(monitor)):
            return watcher
        monitor = _TransportMonitor(transport)
        monitor.add(watcher := watcher_of(monitor))
        monitor.start()
        _registry[transport] = monitor  # only now: one that did not start would observe nothing for those that share it
        return watcher


def forget_all() -> None:
    """Reset after a fork: the child has none of the parent's threads."""
    global _registry_lock, _registry  # noqa: PLW0603
    _registry_lock = threading.Lock()
    _registry = weakref.WeakKeyDictionary()


class _Silence:
    """Decides what to post to which watcher, and when to check next; it has neither a clock nor a lock.

    All times are seconds of one clock, which never goes backwards from call to call.

    Args:
        now: When it starts to count.
    """

    def __init__(self, now: float) -> None:
        self.watchers: list[Watcher] = []
        self._heard_at = self._checked_at = now

    def add(self, watcher: Watcher, now: float) -> None:
        """Add a watcher, for which the silence before now does not count."""
        watcher.since = now
        self.watchers.append(watcher)

    def due(self) -> float:
        """Return when to check next, if nothing is received until then; that may be in the past."""
        quiet = [(a, a.quiet_since(self._heard_at)) for a in self.watchers]
        marks = [since + after for a, since in quiet for after in (a.probe_s, 2 * a.probe_s, a.dead_s)]
        marks = [mark for mark in marks if mark > self._checked_at]
        return min(marks, default=self._checked_at + min(a.probe_s for a in self.watchers))

    def heard(self, at: float) -> list[tuple[Watcher, Observation]]:
        """Note that something was received, and when; return what to post."""
        silent_s = max(0.0, at - self._heard_at)  # not what came while this process was suspended
        self._heard_at += silent_s
        relieved = [a for a in self.watchers if a.silent_posted]
        for a in relieved:
            a.silent_posted = False
        return [(a, LinkRestored(silent_s)) for a in relieved]

    def needs_probe(self, now: float) -> bool:
        """Return whether the server has to be probed."""
        return any(now - a.quiet_since(self._heard_at) >= a.probe_s for a in self.watchers)

    def check(self, now: float) -> list[tuple[Watcher, Observation]]:
        """Return what to post about the silence so far."""
        self._checked_at = now
        posts: list[tuple[Watcher, Observation]] = []
        for a in self.watchers:
            quiet_s = now - a.quiet_since(self._heard_at)
            if quiet_s >= min(2 * a.probe_s, a.dead_s) and not a.silent_posted:
                a.silent_posted = True
                posts.append((a, LinkSilent(self._heard_at)))
            if quiet_s >= a.dead_s and not a.dead_posted:
                a.dead_posted = True
                posts.append((a, LinkDead(quiet_s)))
        return posts

    def process_was_suspended(self, for_s: float, now: float) -> None:
        """Do not count the time in which this process itself was suspended."""
        self._heard_at = min(self._heard_at + for_s, now)
        for a in self.watchers:
            a.since = min(a.since + for_s, now)

    def probe_not_sent(self, now: float) -> None:
        """Count silence from now on, since a server that could not be probed is not silent."""
        for a in self.watchers:
            a.since = now


class _TransportMonitor:
    """Watches one transport.

    Its thread runs `_run` and posts everything; `add` and `remove` are called on any thread. Probes run on a thread of
    their own, so a stalled server cannot block other watchers. The lock guards the counting, the watchers, and whether
    more may attach; nothing is posted under it, since a watcher may detach in its callback.
    """

    def __init__(self, transport: paramiko.Transport) -> None:
        # A weak reference, so that the registry drops a transport that has ended as soon as the caller does.
        self._transport = weakref.ref(transport)
        #: One entry per wake-up; True for the transport's end.
        self._wakeups: SimpleQueue[bool] = SimpleQueue()
        self._lock = threading.Lock()
        self._silence = _Silence(time.monotonic())
        self._closed_to_new = False
        #: The pending probe; its own thread clears it.
        self._probe: ChannelOpening | None = None
        self._thread = threading.Thread(target=self._run, name="proxy_fsm-monitor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, watcher: Watcher) -> bool:
        """Add a watcher; False if this monitor has ended, or is about to."""
        with self._lock:
            if self._closed_to_new:
                return False
            self._silence.add(watcher, time.monotonic())
        self._wake()
        return True

    def remove(self, watcher: Watcher) -> threading.Thread | None:
        """Remove a watcher; return the thread if this ends the monitor, or it has ended."""
        with self._lock:
            if watcher in self._silence.watchers:
                self._silence.watchers.remove(watcher)
            if not self._silence.watchers:
                self._closed_to_new = True
            ends = self._closed_to_new
        self._wake()
        return self._thread if ends else None

    def _wake(self, *, ended: bool = False) -> None:
        self._wakeups.put(ended)

    def _run(self) -> None:
        try:
            transport = self._transport()
            if transport is not None:
                self._watch(transport)
        except Exception as error:  # noqa: BLE001 - whatever it was, the owners have to know
            self._post_to_all(WorkerCrashed("transport monitor", error))
        finally:
            with self._lock:  # later watchers need a new monitor
                self._closed_to_new = True

    def _watch(self, transport: paramiko.Transport) -> None:
        watch = EndWatch(transport, lambda: self._wake(ended=True))
        try:
            self._watch_until_end(transport)
        finally:
            watch.cancel()
            probe = self._probe
            if probe is not None:
                probe.abandon()

    def _watch_until_end(self, transport: paramiko.Transport) -> None:
        packets = packets_received(transport)
        while (due := self._due()) is not None:
            try:
                ended = self._wakeups.get(timeout=max(0.0, due - time.monotonic()))
            except Empty:
                ended = False
            if ended:
                self._post_to_all(TransportEnded(why_ended(transport)))
                return
            now = time.monotonic()
            excused = excused_s(now - due)
            posts: list[tuple[Watcher, Observation]] = []
            with self._lock:
                if excused:
                    self._silence.process_was_suspended(excused, now)
                if (count := packets_received(transport)) != packets:
                    packets = count
                    posts += self._silence.heard(now - received_ago_s(transport))
                if self._silence.needs_probe(now) and not self._send_probe(transport):
                    self._silence.probe_not_sent(now)
                posts += self._silence.check(now)
            for watcher, observation in posts:
                watcher.post(observation)

    def _due(self) -> float | None:
        """Return when to check next; None without a watcher."""
        with self._lock:
            return self._silence.due() if self._silence.watchers else None

    def _post_to_all(self, final: Observation) -> None:
        """Accept no more watchers, and post a final observation to each."""
        with self._lock:
            self._closed_to_new = True
            watchers = tuple(self._silence.watchers)
        for watcher in watchers:
            watcher.post(final)

    def _send_probe(self, transport: paramiko.Transport) -> bool:
        """Make sure that a probe is pending; False if no thread can be started for it, which is retried later."""
        if self._probe is not None:
            return True
        probe = self._probe = ChannelOpening(transport, _PROBE)

        def run() -> None:
            try:
                probe.send()
                probe.wait().send_close()
            except NotOpened:
                pass  # a refusal is an answer; the others are posted elsewhere
            finally:
                self._probe = None
                self._wake()

        try:
            threading.Thread(target=run, name="proxy_fsm-probe", daemon=True).start()
        except RuntimeError:
            self._probe = None
            return False
        return True
