"""Fixtures for the tests of programs that embed a proxy; registered with pytest by the package.

The module lies beside the package and imports it only when a fixture is used: unused, it costs nothing.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import paramiko

    from proxy_fsm.states import State
    from proxy_fsm.testing.fakes import FakedProxy
    from proxy_fsm.testing.ssh_server import LoopbackSSHServer


@pytest.fixture
def loopback_ssh_server() -> Iterator[LoopbackSSHServer]:
    """An SSH server on 127.0.0.1 with injectable faults; see `LoopbackSSHServer`."""
    from proxy_fsm.testing.ssh_server import LoopbackSSHServer  # noqa: PLC0415 - see above

    with LoopbackSSHServer() as server:
        yield server


@pytest.fixture
def loopback_transport(loopback_ssh_server: LoopbackSSHServer) -> Iterator[paramiko.Transport]:
    """A transport that is connected to `loopback_ssh_server`."""
    with closing(loopback_ssh_server.connect_transport()) as transport:
        yield transport


@pytest.fixture
def faked_proxy() -> Iterator[Callable[[State], FakedProxy]]:
    """A function that makes a `FakedProxy` in a state; all are ended with the test."""
    from proxy_fsm.testing.fakes import FakedProxy  # noqa: PLC0415 - see above

    made: list[FakedProxy] = []

    def make(state: State) -> FakedProxy:
        made.append(FakedProxy.in_state(state))
        return made[-1]

    yield make
    for proxy in made:
        proxy.end()
