"""Logs the tunnel's traffic while there is any, for later analysis of the run (``proxy-fsm timeline``)."""

from __future__ import annotations

import time
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from proxy_fsm import Proxy
    from proxy_fsm.cli.output import Output

__all__ = ["sampled"]

#: The sampling interval while bytes flow, and its maximum while they do not.
_BUSY_S, _IDLE_S = 1.0, 32.0


@contextmanager
def sampled(proxy: Proxy, output: Output) -> Iterator[None]:
    """Within this block, log ``tunnel.stats`` about once a second while bytes flow through the tunnel.

    Each has the totals ``bytes_to_agent`` and ``bytes_from_agent``, and ``interval_s``, the time since the previous
    sample. While nothing flows nothing is logged, and the sampling interval doubles each time, up to 32 s. If events go
    to the console only, nothing is sampled.

    Args:
        proxy: The proxy.
        output: Receives the events.
    """
    if not output.is_recorded:
        yield
        return
    ended = Event()
    sampler = Thread(target=_sample, args=(proxy, output, ended), name="sampling", daemon=True)
    sampler.start()
    try:
        yield
    finally:
        ended.set()
        sampler.join()


def _sample(proxy: Proxy, output: Output, ended: Event) -> None:
    totals, sampled_at, pause_s = (0, 0), time.monotonic(), _BUSY_S
    while not ended.wait(pause_s):
        stats = proxy.status().tunnel
        new_totals = (0, 0) if stats is None else (stats.bytes_to_agent, stats.bytes_from_agent)
        now = time.monotonic()
        if new_totals != totals:
            output.log.info(
                "tunnel.stats",
                proxy_id=proxy.id,
                session=proxy.status().session,
                bytes_to_agent=new_totals[0],
                bytes_from_agent=new_totals[1],
                interval_s=round(now - sampled_at, 6),
            )
        pause_s = _BUSY_S if new_totals != totals else min(2 * pause_s, _IDLE_S)
        totals, sampled_at = new_totals, now
