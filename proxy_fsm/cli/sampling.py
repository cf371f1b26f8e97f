"""Tells what the tunnel carries while it carries something, for a later look at the run (``proxy-fsm timeline``)."""

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

#: Between two looks, in seconds: while bytes flow, and at most while they do not.
_BUSY_S, _QUIET_S = 1.0, 32.0


@contextmanager
def sampled(proxy: Proxy, output: Output) -> Iterator[None]:
    """Within, write ``tunnel.stats`` about once a second while the tunnel carries something.

    Each has the totals ``bytes_to_agent`` and ``bytes_from_agent``, and ``interval_s``, the time since the look before.
    While nothing flows nothing is written, and the looks become rare: twice as long to each next one, up to 32 s. Where
    events are read by a person alone, there are none.

    Args:
        proxy: The proxy.
        output: Takes the events.
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
    carried, looked, pause_s = (0, 0), time.monotonic(), _BUSY_S
    while not ended.wait(pause_s):
        stats = proxy.status().tunnel
        now = (0, 0) if stats is None else (stats.bytes_to_agent, stats.bytes_from_agent)
        seen = time.monotonic()
        if now != carried:
            output.log.info(
                "tunnel.stats",
                proxy_id=proxy.id,
                session=proxy.status().session,
                bytes_to_agent=now[0],
                bytes_from_agent=now[1],
                interval_s=round(seen - looked, 6),
            )
        pause_s = _BUSY_S if now != carried else min(2 * pause_s, _QUIET_S)
        carried, looked = now, seen
