"""A client in one file: logs in to an X2Go server, starts a desktop there and shows it.

``python examples/client.py HOST`` prints each change of state, stops the session's proxy cleanly on Ctrl-C or SIGTERM
(the session is then suspended on the server), and exits with the status of the reason.
"""

from __future__ import annotations

import argparse
import signal
import sys

import paramiko

from proxy_fsm import InvalidSession, Proxy, ProxyFailed, ProxyStopped, fast_transport, parse_agent_output

#: Size, link, packing, type and colours, keyboard (layout, model, whether to set it), desktop, name, clipboard.
START = "x2gostartagent 800x600 lan 16m-jpeg-9 unix-kde-depth_24 us auto 1 D xterm both"


def main() -> int:
    """Show a new desktop until it ends; return the exit status."""
    parser = argparse.ArgumentParser(description="Show a new desktop of an X2Go server.")
    parser.add_argument("host", help="the server; its host key must be known")
    host = parser.parse_args().host
    with paramiko.SSHClient() as client:
        client.load_system_host_keys()
        try:
            client.connect(host, transport_factory=fast_transport)
            _, out, err = client.exec_command(START)
            session = parse_agent_output(out.read().decode() or err.read().decode())
        except (OSError, paramiko.SSHException, InvalidSession) as error:
            sys.exit(f"{host} gave no session: {error}")
        return show(Proxy(session, client.get_transport()))


def show(proxy: Proxy) -> int:
    """Run a proxy until it ends, printing its progress."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: proxy.stop())
    proxy.subscribe(lambda record: print(record.source, "→", record.dest), replay=True)
    try:
        with proxy:
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
