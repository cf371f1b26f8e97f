"""A client in one file: logs in to an X2Go server, starts a desktop there and shows it.

``python examples/client.py HOST`` prints each change of state, stops the session's proxy cleanly on Ctrl-C or SIGTERM
(the session is then suspended on the server), and exits with the status of the reason.
"""

from __future__ import annotations

import argparse
import signal
import sys

import paramiko

from proxy_fsm import (
    BackendError,
    NX3Backend,
    Proxy,
    ProxyFailed,
    ProxyStopped,
    ServerError,
    SessionInfo,
    check_preflight,
    fast_transport,
)
from proxy_fsm.server import SessionOptions, X2GoServer

PROGRAM = "xterm"


def main() -> int:
    """Show a new desktop until it ends; return the exit status."""
    parser = argparse.ArgumentParser(description="Show a new desktop of an X2Go server.")
    parser.add_argument("host", help="the server; its host key must be known")
    host = parser.parse_args().host
    with paramiko.SSHClient() as client:
        client.load_system_host_keys()
        try:
            client.connect(host, transport_factory=fast_transport)
            server = X2GoServer(client.get_transport())
            with check_preflight(NX3Backend()):  # a session that this machine cannot show would be lost
                session = server.start(SessionOptions(link="lan"), PROGRAM)
        except (BackendError, OSError, paramiko.SSHException, ServerError) as error:
            sys.exit(f"There is no session: {error}")
        return show(server, session)


def show(server: X2GoServer, session: SessionInfo) -> int:
    """Show a session until it ends, printing its progress."""
    proxy = Proxy(session, server.transport, ask_server=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: proxy.stop())
    proxy.subscribe(lambda record: print(record.source, "→", record.dest), replay=True)
    try:
        with proxy:
            server.run(session, PROGRAM)
            proxy.wait()
    except (ProxyFailed, ProxyStopped):
        pass  # it did not start; its status says why
    status = proxy.status()
    print(f"{status.reason}: {status.detail}")
    if status.hint:
        print(status.hint)
    return status.reason.cli_status if status.reason else 1


if __name__ == "__main__":
    sys.exit(main())
