"""A home and a server for the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from proxy_fsm.testing import LoopbackSSHServer
from tests.helpers.agent import Agent

from .program import Home

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """A home; at the end, no process from it may still be running."""
    home = Home(tmp_path)
    yield home
    assert home.command_lines() == []


@pytest.fixture
def server() -> Iterator[LoopbackSSHServer]:
    with LoopbackSSHServer() as server:
        yield server


@pytest.fixture
def agent() -> Iterator[Agent]:
    with Agent(serving=True, greeting=b"hello", holding=True) as agent:
        yield agent
