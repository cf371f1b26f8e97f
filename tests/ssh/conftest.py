"""A server that speaks SSH, a transport to it, and an agent behind it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from proxy_fsm.ssh import (
    set_nodelay,
)
from proxy_fsm.testing import LoopbackSSHServer
from tests.helpers.agent import Agent

if TYPE_CHECKING:
    from collections.abc import Iterator

    import paramiko


@pytest.fixture
def server() -> Iterator[LoopbackSSHServer]:
    with LoopbackSSHServer() as running:
        yield running


@pytest.fixture
def transport(server: LoopbackSSHServer) -> Iterator[paramiko.Transport]:
    with contextlib.closing(server.connect_transport()) as connected:
        set_nodelay(connected)
        yield connected


@pytest.fixture
def agent() -> Iterator[Agent]:
    with Agent() as listening:
        yield listening
