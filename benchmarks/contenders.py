"""The programs that are measured: each opens tunnels over SSH in a process of its own.

Run as a script, also by interpreters without our packages, so it imports only the standard library at the top, and
the rest where it is used::

    python contenders.py NAME '{"ssh_port": 2222, "user": "…", "key": "…", "known_hosts": "…", "targets": [4000, 4001]}'

It prints one line of JSON, ``{"ports": [one per target], "version": "…"}``, once they accept connections, and runs
until EOF on its standard input. ``ssh -L`` replaces the process by OpenSSH, so that no Python is measured with it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

LOOPBACK = "127.0.0.1"
CONNECT_S = 30.0
GCM = "aes128-gcm@openssh.com"


@dataclass(frozen=True)
class Server:
    """The SSH server and user to connect as, and the ports to forward."""

    ssh_port: int
    user: str
    key: str
    known_hosts: str
    targets: list[int]


def ready(ports: list[int], version: str) -> None:
    """Report that the tunnels are open."""
    print(json.dumps({"ports": ports, "version": version}), flush=True)  # noqa: T201 - read by the harness


def wait_for_end() -> None:
    """Wait until the tunnels are no longer needed."""
    sys.stdin.read()


def connect(server: Server, **options: Any) -> Any:
    """Connect with paramiko, and return the transport."""
    paramiko: Any = importlib.import_module("paramiko")
    client = paramiko.SSHClient()
    client.load_host_keys(server.known_hosts)
    client.connect(
        LOOPBACK,
        server.ssh_port,
        server.user,
        key_filename=server.key,
        timeout=CONNECT_S,
        banner_timeout=CONNECT_S,
        allow_agent=False,
        look_for_keys=False,
        **options,
    )
    transport = client.get_transport()
    transport.of_client = client  # a garbage-collected client closes its transport
    return transport


def versions(*names: str) -> str:
    """Return the versions of some distributions."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def proxy_fsm(server: Server, *, fast: bool) -> None:
    """Forward with this package's relay, as an engine does."""
    forwarder: Any = importlib.import_module("proxy_fsm.workers.forwarder")
    ssh: Any = importlib.import_module("proxy_fsm.ssh")
    transport = connect(server, **({"transport_factory": ssh.fast_transport} if fast else {}))
    ssh.set_nodelay(transport)  # as the preflight does for every proxy
    tunnels, ports = [], []
    for target in server.targets:
        tunnel = forwarder.Forwarder(
            transport, (LOOPBACK, target), max_connections=None, agent_connect_s=8.0, post=lambda _: None
        )
        ports.append(int(tunnel.bind("tcp", Path()).rpartition(":")[2]))
        tunnel.start()
        tunnels.append(tunnel)
    ready(ports, versions("paramiko"))
    wait_for_end()


def openssh(server: Server, *, cipher: str | None) -> NoReturn:
    """Replace this process by ``ssh -L``."""
    ports = free_ports(len(server.targets))
    command = [shutil.which("ssh") or "ssh", "-N", "-F", "none", "-i", server.key, "-p", str(server.ssh_port)]
    command += ["-o", f"UserKnownHostsFile={server.known_hosts}", "-o", "StrictHostKeyChecking=yes"]
    command += ["-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "ExitOnForwardFailure=yes", "-n"]
    for port, target in zip(ports, server.targets, strict=True):
        command += ["-L", f"{LOOPBACK}:{port}:{LOOPBACK}:{target}"]
    if cipher is not None:
        command += ["-c", cipher]
    version = subprocess.run([command[0], "-V"], capture_output=True, text=True, check=True).stderr.strip()
    ready(ports, version)  # too early by the time ssh needs to connect: the harness waits until the ports listen
    os.execv(command[0], [*command, f"{server.user}@{LOOPBACK}"])  # noqa: S606 - it replaces this process


def free_ports(count: int) -> list[int]:
    """Return ports without a listener; another process may bind one in the meantime."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server((LOOPBACK, 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def asyncssh(server: Server, *, cipher: str | None) -> None:
    """Forward with asyncssh."""
    asyncio: Any = importlib.import_module("asyncio")
    library: Any = importlib.import_module("asyncssh")

    async def run() -> None:
        async with library.connect(
            LOOPBACK,
            server.ssh_port,
            username=server.user,
            client_keys=[server.key],
            known_hosts=server.known_hosts,
            config=None,
            **({} if cipher is None else {"encryption_algs": [cipher]}),
        ) as connection:
            listeners = [await connection.forward_local_port(LOOPBACK, 0, LOOPBACK, port) for port in server.targets]
            ready([listener.get_port() for listener in listeners], versions("asyncssh"))
            await asyncio.get_running_loop().run_in_executor(None, wait_for_end)

    asyncio.run(run())


def sshtunnel(server: Server) -> None:
    """Forward with sshtunnel."""
    library: Any = importlib.import_module("sshtunnel")
    tunnel = library.SSHTunnelForwarder(
        (LOOPBACK, server.ssh_port),
        ssh_username=server.user,
        ssh_pkey=server.key,
        ssh_config_file=None,
        allow_agent=False,
        host_pkey_directories=[],
        remote_bind_addresses=[(LOOPBACK, port) for port in server.targets],
        local_bind_addresses=[(LOOPBACK, 0) for _ in server.targets],
    )
    tunnel.start()
    ready(list(tunnel.local_bind_ports), versions("sshtunnel", "paramiko"))
    wait_for_end()
    os._exit(0)  # its own shutdown waits for connections


def python_x2go(server: Server) -> None:
    """Forward with python-x2go's forwarder."""
    forward: Any = importlib.import_module("x2go.forward")
    log: Any = importlib.import_module("x2go.log")
    gevent: Any = importlib.import_module("gevent")
    transport = connect(server)
    logger = log.X2GoLogger(loglevel=log.loglevel_ERROR)
    tunnels = [
        forward.start_forward_tunnel(
            local_host=LOOPBACK,
            local_port=0,
            remote_host=LOOPBACK,
            remote_port=port,
            ssh_transport=transport,
            logger=logger,
        )
        for port in server.targets
    ]
    ready([tunnel.server_port for tunnel in tunnels], f"python-x2go {importlib.import_module('x2go').__VERSION__}")
    gevent.get_hub().threadpool.apply(wait_for_end)
    os._exit(0)  # its threads do not end by themselves


def no_tunnel(server: Server) -> None:
    """Connect straight to the target."""
    ready(server.targets, "")
    wait_for_end()


@dataclass(frozen=True)
class Contender:
    """One way to reach the target.

    Attributes:
        name: Its name in the tables.
        serve: Opens the tunnels, in a process of its own.
        tunnels: Whether it is a tunnel at all.
    """

    name: str
    serve: Callable[[Server], None]
    tunnels: bool = True


REFERENCE = "ssh -L"
OURS = "proxy_fsm"
CONTENDERS = {
    each.name: each
    for each in (
        Contender(OURS, lambda server: proxy_fsm(server, fast=True)),
        Contender("proxy_fsm, plain transport", lambda server: proxy_fsm(server, fast=False)),
        Contender(REFERENCE, lambda server: openssh(server, cipher=None)),
        Contender("ssh -L, aes128-gcm", lambda server: openssh(server, cipher=GCM)),
        Contender("asyncssh", lambda server: asyncssh(server, cipher=None)),
        Contender("asyncssh, aes128-gcm", lambda server: asyncssh(server, cipher=GCM)),
        Contender("sshtunnel", sshtunnel),
        Contender("python-x2go", python_x2go),
        Contender("no tunnel", no_tunnel, tunnels=False),
    )
}


def wait_listening(ports: list[int], *, timeout_s: float = CONNECT_S) -> bool:
    """Wait until something listens on these ports, without connecting."""
    deadline = time.monotonic() + timeout_s
    wanted = {f"{port:04X}" for port in ports}
    while time.monotonic() < deadline:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]]
        if wanted <= {row[1].rpartition(":")[2] for row in rows if row[3] == "0A"}:
            return True
        time.sleep(0.01)
    return False


def main() -> None:
    """Run one contender."""
    sys.path.pop(0)  # this directory, whose modules must not shadow others
    name, options = sys.argv[1:]
    with contextlib.suppress(KeyboardInterrupt):
        CONTENDERS[name].serve(Server(**json.loads(options)))


if __name__ == "__main__":
    main()
