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

from proxy_fsm import Proxy, SessionInfo, aio, fast_transport, parse_agent_output

if TYPE_CHECKING:
    from collections.abc import Sequence

START = "x2gostartagent 800x600 lan 16m-jpeg-9 unix-kde-depth_24 us auto 1 D xterm both"


def log_in(host: str) -> paramiko.SSHClient:
    """Connect; this blocks."""
    client = paramiko.SSHClient()
    client.load_system_host_keys()
    client.connect(host, transport_factory=fast_transport)
    return client


def start_session(client: paramiko.SSHClient) -> SessionInfo:
    """Start a desktop on the server; this blocks."""
    _, out, err = client.exec_command(START)
    return parse_agent_output(out.read().decode() or err.read().decode())


async def hold(proxy: Proxy) -> None:
    """Run one proxy until it ends, printing its progress."""
    proxy.start()
    try:
        async for record in aio.transitions(proxy):
            print(json.dumps({"session": record.session, "state": record.dest, "reason": record.reason}), flush=True)
    finally:
        await aio.close(proxy)


async def serve(host: str, count: int) -> None:
    """Hold ``count`` sessions until all have ended."""
    with await asyncio.to_thread(log_in, host) as client:
        sessions = [await asyncio.to_thread(start_session, client) for _ in range(count)]
        proxies = [Proxy(session, client.get_transport()) for session in sessions]
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop_all, proxies)
        async with asyncio.TaskGroup() as group:
            for proxy in proxies:
                group.create_task(hold(proxy))


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
