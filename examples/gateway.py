"""A service in one file: holds several sessions of an X2Go server at once, over one SSH connection, with asyncio.

``python examples/gateway.py HOST COUNT`` starts COUNT desktops, prints a line of JSON at each change of state, and
stops all of them cleanly on Ctrl-C or SIGTERM. No thread waits for any of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from typing import TYPE_CHECKING

import paramiko

from proxy_fsm import Proxy, SessionInfo, State, aio, fast_transport
from proxy_fsm.server import SessionOptions, X2GoServer

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = "xterm"


def log_in(host: str) -> paramiko.SSHClient:
    """Connect; this blocks."""
    client = paramiko.SSHClient()
    client.load_system_host_keys()
    client.connect(host, transport_factory=fast_transport)
    return client


async def hold(proxy: Proxy, server: X2GoServer, session: SessionInfo) -> None:
    """Run one proxy until it ends, printing its progress."""
    proxy.start()
    try:
        async for record in aio.transitions(proxy):
            if record.dest is State.RUNNING:
                await asyncio.to_thread(server.run, session, PROGRAM)
            print(json.dumps({"session": record.session, "state": record.dest, "reason": record.reason}), flush=True)
    finally:
        await aio.close(proxy)


async def serve(host: str, count: int) -> None:
    """Hold ``count`` sessions until all have ended."""
    with await asyncio.to_thread(log_in, host) as client:
        server = X2GoServer(client.get_transport())
        sessions = [await asyncio.to_thread(server.start, SessionOptions(link="lan"), PROGRAM) for _ in range(count)]
        proxies = [Proxy(session, server.transport) for session in sessions]
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop_all, proxies)
        async with asyncio.TaskGroup() as group:
            for proxy, session in zip(proxies, sessions, strict=True):
                group.create_task(hold(proxy, server, session))


def stop_all(proxies: Sequence[Proxy]) -> None:
    """Stop all of them; each call returns at once."""
    for proxy in proxies:
        proxy.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Hold several desktops of an X2Go server.")
    parser.add_argument("host", help="the server; its host key must be known")
    parser.add_argument("count", type=int, help="how many sessions")
    options = parser.parse_args()
    asyncio.run(serve(options.host, options.count))
