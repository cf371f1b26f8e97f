"""Real programs for the tests in this directory."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.real import skip_or_fail

from .agent import plain_agent
from .attempt import Holdings, nothing_gained_since
from .namespace import is_allowed
from .procs import alive, established
from .scene import Scene, WaitingAgents, opened_scene
from .stalls import Stalls
from .x2go import Display, X2GoServer, missing_programs

if TYPE_CHECKING:
    from collections.abc import Iterator

    import paramiko

    from .x2go import AgentSession

ACCEPTED_LINE = "Accepted connection"  # logged by an agent that a proxy has connected to


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this directory; the hook receives those of all others too."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session", autouse=True)
def real_programs() -> None:
    """Skip if programs are missing, or fail if they are required."""
    if missing := missing_programs():
        skip_or_fail(missing)


@pytest.fixture(scope="session")
def stalls() -> Iterator[Stalls]:
    """The recorder of the moments in which the whole machine stalled."""
    with Stalls() as stalls:
        yield stalls


@pytest.fixture(scope="session")
def x2go_server(real_programs: None) -> Iterator[X2GoServer]:
    """An X2Go server for the whole run."""
    del real_programs
    with X2GoServer() as server:
        yield server


@pytest.fixture(scope="module")
def own_namespaces() -> None:
    """Skip, or fail, if this machine does not allow them even to root."""
    if not is_allowed():
        skip_or_fail(["the right to mount, and to have a network of one's own (CAP_SYS_ADMIN)"])


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
    """A fresh desktop session with a red xterm, in its first attempt: it accepts only one connection."""
    session = x2go_server.start_agent(ssh_client)
    yield session
    x2go_server.end(session)


@pytest.fixture
def nothing_left(x2go_server: X2GoServer) -> Iterator[None]:
    """Check that after each test and its teardown nothing of it is left in this process."""
    del x2go_server  # it outlives the test
    before = Holdings.now()
    yield
    nothing_gained_since(before)


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A directory whose ``run`` is for sockets; at the end all of them must be removed."""
    directory = Path(tempfile.mkdtemp(prefix="pfsm-run-"))  # its path is short enough for sockets
    (directory / "run").mkdir()
    yield directory
    left = list((directory / "run").iterdir())
    shutil.rmtree(directory)
    assert left == []


@pytest.fixture
def scene(
    x2go_server: X2GoServer, ssh_client: paramiko.SSHClient, agent: AgentSession, display: Display, runtime: Path
) -> Iterator[Scene]:
    """A fresh session, in its first attempt."""
    with opened_scene(x2go_server, ssh_client, agent, display, runtime) as scene:
        yield scene


@pytest.fixture
def plain_scene(
    x2go_server: X2GoServer, ssh_client: paramiko.SSHClient, display: Display, runtime: Path
) -> Iterator[Scene]:
    """The same with an agent unknown to x2goserver, for faults that do not involve the latter."""
    with plain_agent() as agent, opened_scene(x2go_server, ssh_client, agent, display, runtime) as scene:
        yield scene


@pytest.fixture(scope="module")
def waiting_agents(x2go_server: X2GoServer) -> Iterator[WaitingAgents]:
    """Agents that no proxy connects to, the first started on demand."""
    agents = WaitingAgents(x2go_server)
    yield agents
    for _, session in agents.used:
        x2go_server.end(session)


@pytest.fixture
def untouched(
    x2go_server: X2GoServer,
    ssh_client: paramiko.SSHClient,
    waiting_agents: WaitingAgents,
    display: Display,
    runtime: Path,
) -> Iterator[Scene]:
    """A session that must stay untouched: its agent is alive, and no connection ever reached it."""
    agent = waiting_agents.current()
    with opened_scene(x2go_server, ssh_client, agent, display, runtime) as scene:
        yield scene
    check_untouched(x2go_server, agent)


def check_untouched(server: X2GoServer, agent: AgentSession) -> None:
    """Make sure that an agent is alive, and that no connection ever reached it."""
    assert alive(agent.pid)
    assert established(agent.graphics_port) == 0
    assert ACCEPTED_LINE not in server.agent_log(agent)
