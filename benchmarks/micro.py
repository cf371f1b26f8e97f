"""What one transition costs, and one look at `ok()`."""

from __future__ import annotations

import io
import statistics
import time
import timeit

import structlog

from proxy_fsm import Lifecycle, State
from proxy_fsm.testing import FakedProxy
from proxy_fsm.testing.fakes import LAUNCH

#: Of every life that is measured: idle → tunnelling → spawning → running → stopping → stopped.
_LIFE = ("start", "tunnel_opened", "proxy_ready", "stop", "closed_cleanly")


def measure(lives: int) -> dict[str, float]:
    """Return microseconds, medians: a bare transition, one with its event, record and status, and one `ok()`.

    The event is filtered by its level, as in a program that logs warnings alone.
    """
    logger = structlog.wrap_logger(
        structlog.PrintLogger(io.StringIO()), wrapper_class=structlog.make_filtering_bound_logger("warning")
    )
    bare = [_life_us(Lifecycle()) for _ in range(lives)]
    whole = []
    for _ in range(lives):
        proxy = FakedProxy(logger=logger)
        supervisor = proxy._engine._supervisor  # noqa: SLF001 - the machine itself, with all that it publishes
        supervisor._launch = LAUNCH  # noqa: SLF001 - it comes with an observation, which costs extra
        whole.append(_life_us(supervisor))
    proxy, calls = FakedProxy.in_state(State.RUNNING, logger=logger), 100_000
    ok = [seconds / calls * 1e6 for seconds in timeit.repeat(proxy.ok, number=calls, repeat=5)]
    proxy.end()
    medians = {"transition_bare_us": bare, "transition_us": whole, "ok_us": ok}
    return {what: statistics.median(values) for what, values in medians.items()}


def _life_us(lifecycle: Lifecycle) -> float:
    """Return microseconds a transition, over one life."""
    triggers = [getattr(lifecycle, name) for name in _LIFE]
    began = time.perf_counter()
    for trigger in triggers:
        trigger()
    return (time.perf_counter() - began) * 1e6 / len(_LIFE)
