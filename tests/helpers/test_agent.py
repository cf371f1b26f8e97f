"""The agent of the tests does both: let the test accept, and serve by itself."""

from __future__ import annotations

import socket

import pytest

from tests.helpers.agent import Agent, dead_port
from tests.helpers.sockets import LOOPBACK, read_all
from tests.helpers.wait import WAIT_S, eventually


def connect(port: int) -> socket.socket:
    return socket.create_connection((LOOPBACK, port), WAIT_S)


def test_what_the_test_accepts_is_closed_with_the_agent() -> None:
    with Agent() as agent:
        near = connect(agent.port)
        far = agent.accept()
        far.sendall(b"hello")
    with near:
        assert read_all(near) == b"hello"
    assert far.fileno() == -1


def test_it_serves_every_connection_until_it_disconnects() -> None:
    with Agent(serving=True, greeting=b"hello") as agent, connect(agent.port) as first, connect(agent.port) as second:
        for near in (first, second):
            assert near.recv(9) == b"hello"
            near.sendall(b"x")
        eventually(lambda: bytes(agent.received) == b"xx")
        agent.send(b"a picture")
        agent.disconnect()
        assert sorted(map(read_all, (first, second))) == [b"", b"a picture"]


def test_connections_are_refused_before_it_listens_and_after_it_has_stopped() -> None:
    with Agent(listening=False) as agent:
        with pytest.raises(ConnectionRefusedError):
            connect(agent.port)
        agent.listen()
        connect(agent.port).close()
        agent.stop_listening()
        with pytest.raises(ConnectionRefusedError):
            connect(agent.port)


def test_nobody_listens_on_a_dead_port() -> None:
    with pytest.raises(ConnectionRefusedError):
        connect(dead_port())
