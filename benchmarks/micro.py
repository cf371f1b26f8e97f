"""The cost of one transition, and of one call of `ok()`."""

from __future__ import annotations

import io
import statistics
import time
import timeit

import structlog

from proxy_fsm import Lifecycle, State
from proxy_fsm.testing import FakedProxy
from proxy_fsm.testing.fakes import LAUNCH

#: The triggers of a measured life: idle → tunnelling → spawning → running → stopping → stopped.
_LIFE = ("start", "tunnel_opened", "proxy_ready", "stop", "closed_cleanly")


def measure(lives: int) -> dict[str, float]:
    """Return microseconds, medians: a bare transition, one with its event, record and status, and one `ok()`.

    The event is filtered by its level, as in a program that logs only warnings.
    """
    logger = structlog.wrap_logger(
        structlog.PrintLogger(io.StringIO()), wrapper_class=structlog.make_filtering_bound_logger("warning")
    )
    bare = [_life_us(Lifecycle()) for _ in range(lives)]
    full = []
    for _ in range(lives):
        proxy = FakedProxy(logger=logger)
        supervisor = proxy._engine._supervisor  # noqa: SLF001 - the machine itself, with all that it publishes
        supervisor._launch = LAUNCH  # noqa: SLF001 - normally set by an observation, which costs extra
        full.append(_life_us(supervisor))
    proxy, calls = FakedProxy.in_state(State.RUNNING, logger=logger), 100_000
    ok = [seconds / calls * 1e6 for seconds in timeit.repeat(proxy.ok, number=calls, repeat=5)]
    proxy.end()
    samples = {"transition_bare_us": bare, "transition_us": full, "ok_us": ok}
    return {name: statistics.median(values) for name, values in samples.items()}


def _life_us(lifecycle: Lifecycle) -> float:
    """Return microseconds per transition, over one life."""
    triggers = [getattr(lifecycle, name) for name in _LIFE]
    began = time.perf_counter()
    for trigger in triggers:
        trigger()
    return (time.perf_counter() - began) * 1e6 / len(_LIFE)
