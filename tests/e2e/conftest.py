"""Real programs for the tests in this directory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .x2go import Display, X2GoServer, missing_programs

if TYPE_CHECKING:
    from collections.abc import Iterator

    import paramiko

    from .x2go import AgentSession

REQUIRE = "PROXY_FSM_REQUIRE_REAL"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this directory; the hook is given those of all others too."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session", autouse=True)
def real_programs() -> None:
    """Skip where programs are missing, or fail where they were promised."""
    missing = missing_programs()
    if not missing:
        return
    message = f"missing for tests against the real programs: {', '.join(missing)}"
    if os.environ.get(REQUIRE) == "1":
        pytest.fail(f"{message} ({REQUIRE} is 1)", pytrace=False)
    pytest.skip(f"{message} (tests/install-system-packages installs them)")


@pytest.fixture(scope="session")
def x2go_server(real_programs: None) -> Iterator[X2GoServer]:
    """An X2Go server for the whole run."""
    del real_programs
    with X2GoServer() as server:
        yield server


@pytest.fixture
def display(real_programs: None) -> Iterator[Display]:
    """A fresh X server."""
    del real_programs
    with Display() as display:
        yield display


@pytest.fixture
def ssh_client(x2go_server: X2GoServer) -> Iterator[paramiko.SSHClient]:
    """A fresh connection of the test user."""
    with contextlib.closing(x2go_server.connect()) as client:
        yield client


@pytest.fixture
def agent(x2go_server: X2GoServer, ssh_client: paramiko.SSHClient) -> Iterator[AgentSession]:
    """A fresh desktop session with a red xterm, in its first attempt: one connection is all it takes."""
    session = x2go_server.start_agent(ssh_client)
    yield session
    x2go_server.end(session)
