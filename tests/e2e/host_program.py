"""A program that embeds a proxy, for a test that stops and continues it: ``python -m tests.e2e.host_program``.

Its first line on standard input is its configuration as JSON, a cookie included; those that follow are orders: `status`
and `stop`. It prints JSON, one object a line: its proxy's events, and its status as an event of that name. It ends with
its standard input.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import paramiko
import structlog

from proxy_fsm import NX3Backend, Proxy, Timeouts, parse_agent_output


def main() -> None:
    """Run the proxy."""
    config = json.loads(sys.stdin.readline())
    logger = structlog.wrap_logger(
        structlog.PrintLogger(),
        processors=[structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(0),
    )
    client = paramiko.SSHClient()
    client.load_host_keys(config["known_hosts"])
    with contextlib.closing(client):
        client.connect(**config["connect"], allow_agent=False, look_for_keys=False)
        transport = client.get_transport()
        if transport is None:
            raise RuntimeError("It is not connected.")
        with Proxy(
            parse_agent_output(config["agent_output"]),
            transport,
            backend=NX3Backend(options=config["options"]),
            sessions_root=Path(config["root"]),
            environ=config["environ"],
            timeouts=Timeouts(**config["timeouts"]),
            logger=logger,
        ) as proxy:
            for order in map(str.strip, sys.stdin):
                if order == "stop":
                    proxy.stop()
                logger.info("status", **proxy.status().as_dict())


if __name__ == "__main__":
    main()
