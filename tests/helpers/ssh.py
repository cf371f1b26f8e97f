"""A login to a real SSH server."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from proxy_fsm.ssh import fast_transport

from .sockets import LOOPBACK

if TYPE_CHECKING:
    import paramiko

    from tests.e2e.sshd import SshServer

#: How long a login may take, with whatever else is going on, seconds.
LOGIN_S = 120.0


def connect_fast(sshd: SshServer, port: int | None = None) -> paramiko.Transport:
    """Log in over a `fast_transport`; through another port where one is given, as that of a slow line."""
    transport = fast_transport(socket.create_connection((LOOPBACK, port or sshd.port)))
    try:
        transport.start_client(timeout=LOGIN_S)
        assert transport.get_remote_server_key() == sshd.host_key
        transport.auth_publickey("root", sshd.client_key)
    except BaseException:
        transport.close()
        raise
    return transport
