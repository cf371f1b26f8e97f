"""The engine against real programs: sshd, an X2Go server with nxagent, nxproxy, and an X server to look at.

Times are those of design.md, section 6. This machine may be shared, so what is asserted is the design's figure plus
`SLACK_S`; what was measured is recorded as a property of each test: see it with
``--junitxml=FILE -o junit_family=xunit1``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm import (
    CommandBackend,
    EndReason,
    InvalidTransition,
    Link,
    NX3Backend,
    Proxy,
    ProxyFailed,
    ProxyStopped,
    SessionInfo,
    State,
    Timeouts,
    Trigger,
    monitor,
    parse_agent_output,
    parse_session_list,
)
from proxy_fsm.evidence import LinkDead, ProcessExited, TransportEnded, WorkerRefused

from .attempt import (
    FINAL_S,
    RUNNING_S,
    Attempt,
    Holdings,
    WatchedNX3,
    files_below,
    nothing_gained_since,
)
from .procs import alive, established, send_signal
from .scene import BLUE, RED, Scene, WaitingAgents, loose_umask, opened_scene, shows, stopped
from .service import CLIENT, FLOOD, FLOODS, PAYLOAD_BYTES, Service
from .x2go import (
    LOOPBACK,
    AgentSession,
    Display,
    SshServer,
    X2GoServer,
    eventually,
    run,
    transport_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import paramiko

    from proxy_fsm.evidence import Observation

SLACK_S = 0.4  # what a busy machine of two cores may add to any time below
STOP_HEARD_S = 0.01
STOPPING_S = 0.05  # from a fault's first sign
DEAD_S = 0.1  # from there to the final state, where the proxy is dead or the transport gone
AFTER_EXIT_S = 0.02  # else from the proxy's exit
ACCEPTED_LINE = "Accepted connection"  # of an agent that a proxy has reached
BLUE_XTERM = "xterm -bg blue -geometry 60x20+10+10 -T blue-xterm -e sleep 3600"


@pytest.fixture(autouse=True)
def nothing_left(x2go_server: X2GoServer) -> Iterator[None]:
    """After each test, and all that it set up, nothing of it is left in this process."""
    del x2go_server  # it stays
    before = Holdings.now()
    yield
    nothing_gained_since(before)


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A directory whose ``run`` is for sockets; all of them are gone in the end."""
    directory = Path(tempfile.mkdtemp(prefix="pfsm-run-"))  # of a path short enough for sockets
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


@pytest.fixture(scope="module")
def waiting_agents(x2go_server: X2GoServer) -> Iterator[WaitingAgents]:
    """None before the first one is asked for."""
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
    """A session that nobody may touch: it lives, and no connection ever reached it."""
    agent = waiting_agents.current()
    with opened_scene(x2go_server, ssh_client, agent, display, runtime) as scene:
        yield scene
    assert alive(agent.pid)
    assert established(agent.graphics_port) == 0
    assert ACCEPTED_LINE not in x2go_server.agent_log(agent)


# ---- a session, from its first picture to its end ----


def test_session_is_seen_suspended_resumed_and_seen_again(scene: Scene, record_property: Any) -> None:
    """A window of it is on the display; stop() suspends it; a second engine resumes it, and sees it terminated."""
    first = scene.attempt().run()
    record_property("start_to_running_s", first.entered[State.RUNNING] - first.started_at)
    scene.shows()
    assert scene.display.windows() == [f"X2GO-{scene.agent.name}"]
    check_running(first)

    stop_at = time.monotonic()
    first.proxy.stop()
    assert first.wait() is State.STOPPED
    exited_at = first.sign_at(ProcessExited)
    record_property("stop_to_stopping_s", first.entered[State.STOPPING] - stop_at)
    record_property("stop_to_final_s", first.final_at - stop_at)
    record_property("exit_to_final_s", first.final_at - exited_at)
    assert first.entered[State.STOPPING] - stop_at < STOP_HEARD_S + SLACK_S
    assert first.final_at - exited_at < AFTER_EXIT_S + SLACK_S
    status = first.proxy.status()
    assert (status.reason, status.retryable, status.abandoned) == (EndReason.STOP_REQUESTED, True, ())
    assert (status.exit_code, status.signal) == (0, None)
    assert scene.server.wait_status(scene.admin, scene.agent.name, "S") == "S"
    assert scene.display.share_of(RED) == 0
    check_story(first)

    second = scene.attempt(scene.resumed(), resumed=True).run()
    scene.shows()
    assert scene.server.wait_status(scene.admin, scene.agent.name, "R") == "R"
    scene.server.terminate(scene.admin, scene.agent.name)
    assert second.wait() is State.STOPPED
    assert second.proxy.status().reason is EndReason.SESSION_ENDED
    eventually(lambda: not alive(scene.agent.pid), FINAL_S)
    assert first.proxy.id != second.proxy.id


def check_running(attempt: Attempt) -> None:
    """What a proxy says of itself while it runs."""
    proxy, status = attempt.proxy, attempt.proxy.status()
    assert proxy.ok()
    assert (status.state, status.reason, status.waiting_for, status.link) == (State.RUNNING, None, "", Link.OK)
    assert status.pid is not None
    assert Path(f"/proc/{status.pid}/comm").read_text() == "nxproxy\n"
    assert os.getsid(status.pid) == status.pid
    assert status.tunnel is not None
    assert status.tunnel.connections == 1
    assert status.tunnel.bytes_to_agent > 0
    assert status.tunnel.bytes_from_agent > 0
    with pytest.raises(InvalidTransition):
        proxy.start()


def check_story(attempt: Attempt) -> None:
    """History, events and subscriber tell the same of a session that was stopped."""
    history = attempt.proxy.status().history
    assert [(each.trigger, each.dest) for each in history] == [
        (Trigger.START, State.TUNNELLING),
        (Trigger.TUNNEL_OPENED, State.SPAWNING),
        (Trigger.PROXY_READY, State.RUNNING),
        (Trigger.STOP, State.STOPPING),
        (Trigger.CLOSED_CLEANLY, State.STOPPED),
    ]
    assert [each.sequence for each in history] == [1, 2, 3, 4, 5]
    assert attempt.records == list(history)
    events = [(each["trigger"], each["dest"], each["sequence"]) for each in attempt.named("proxy.transition")]
    assert events == [(each.trigger, each.dest, each.sequence) for each in history]
    named = [each["event"] for each in attempt.events if each["level"] != "debug"]
    assert [name for name in named if name != "proxy.transition"] == [
        "tunnel.listening",
        "process.spawned",
        "tunnel.connected",
        *sorted(["tunnel.closed", "process.exited"], key=named.index),
    ]
    marks = {(each["proxy_id"], each["session"]) for each in attempt.events}
    assert marks == {(attempt.proxy.id, attempt.session.name)}


def test_cookie_is_in_no_place_that_others_can_read(
    scene: Scene, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is in the environment of the proxy, which its owner alone can read, and nowhere else on this side."""
    caplog.set_level(0)
    cookie = scene.agent.cookie
    with loose_umask():
        attempt = scene.attempt().run()
    scene.shows()

    shown = list(Path("/proc").glob("[0-9]*/cmdline"))
    command_lines = [line for line in map(read_if_there, shown) if line]
    assert any(line.startswith(b"/usr/bin/nxproxy\0-S\0") for line in command_lines)
    assert not any(cookie.encode() in line for line in command_lines)
    files = files_below(scene.root)
    session_root = scene.root / f"S-{scene.agent.name}"
    assert session_root / "session.log" in files
    assert not any(cookie.encode() in path.read_bytes() for path in files)
    attempt.check_secrecy()
    assert cookie not in repr(attempt.proxy)
    assert cookie not in "".join(map(repr, [NX3Backend(), attempt.backend, scene.session]))
    assert cookie not in str(attempt.proxy.status().as_dict())
    assert cookie not in caplog.text
    assert cookie not in "".join(capfd.readouterr())

    pid = attempt.proxy.status().pid
    environ = Path(f"/proc/{pid}/environ")
    assert cookie.encode() in environ.read_bytes()
    assert (environ.stat().st_mode & 0o777, environ.stat().st_uid) == (0o400, os.geteuid())

    assert session_root.stat().st_mode & 0o777 == 0o700
    assert (session_root / "session.log").stat().st_mode & 0o777 == 0o600
    listen_address = attempt.proxy.status().listen_address
    assert listen_address is not None
    assert Path(listen_address).parent.stat().st_mode & 0o777 == 0o700
    assert "Established X server connection" in (session_root / "session.log").read_text()
    assert not Path(f"/proc/{pid}/cwd").readlink().is_relative_to(Path.cwd())
    core = next(line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "core" in line)
    assert core.split()[4:6] == ["0", "0"]


def read_if_there(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_session_list_and_agent_output_name_the_same_session(untouched: Scene) -> None:
    """Both real forms are read: what x2gostartagent and what x2golistsessions print."""
    listed = parse_session_list(untouched.server.list_sessions(untouched.admin))
    row = next(each for each in listed if each.info.name == untouched.agent.name)
    assert row.info == untouched.session
    assert (row.agent_pid, row.user) == (untouched.agent.pid, untouched.server.user)


def test_server_is_asked_how_the_session_ended(scene: Scene) -> None:
    first = scene.attempt(ask_server=True).run()
    scene.settled()
    scene.server.suspend(scene.admin, scene.agent.name)
    assert first.wait() is State.STOPPED
    second = scene.attempt(scene.resumed(), ask_server=True, resumed=True).run()
    scene.server.terminate(scene.admin, scene.agent.name)
    assert second.wait() is State.STOPPED
    assert [(each.proxy.status().reason, each.proxy.status().retryable) for each in (first, second)] == [
        (EndReason.SESSION_SUSPENDED, True),
        (EndReason.SESSION_TERMINATED, False),
    ]


def test_session_that_was_stopped_at_once_is_not_called_retryable(scene: Scene) -> None:
    """For some 60 ms after nxproxy's sign of readiness an agent in its first attempt does not survive a stop."""
    attempt = scene.attempt()
    attempt.proxy.subscribe(lambda record: attempt.proxy.stop() if record.dest is State.RUNNING else None)
    attempt.start()
    assert attempt.wait() is State.STOPPED
    eventually(lambda: not alive(scene.agent.pid) or scene.server.status(scene.admin, scene.agent.name) == "S", FINAL_S)
    assert alive(scene.agent.pid) or attempt.proxy.status().retryable is not True


# ---- faults that are there from the start ----


@dataclass(frozen=True)
class StartFault:
    """A row of the table below.

    `sign`: what is seen of it first; None for the start itself. `due_s`: after how much time that is seen (0, or what
    the timeouts say). `final_s`: from there to the final state, and `exits`: from the proxy's exit instead.
    `agent_lives`: nothing has touched it, so a second engine can still start the session.
    """

    cause: str
    make: Callable[[Scene], Attempt]
    reason: EndReason
    sign: type[Observation] | str | None = None
    due_s: float = 0.0
    exits: bool = False
    retryable: bool | None = True
    agent_lives: bool = True


def program_missing(scene: Scene) -> Attempt:
    return scene.attempt(backend=WatchedNX3("nxproxy-that-is-not-there"))


def program_no_executable(scene: Scene) -> Attempt:
    program = scene.runtime / "nxproxy"
    program.write_text("no program")
    return scene.attempt(backend=WatchedNX3(str(program)))


def display_unset(scene: Scene) -> Attempt:
    return scene.attempt(environ=scene.environ(DISPLAY=None))


def display_absent(scene: Scene) -> Attempt:
    with Display() as gone:
        pass
    return scene.attempt(environ=scene.environ(DISPLAY=gone.name))


def display_dead(scene: Scene) -> Attempt:
    dead = scene.stack.enter_context(Display())
    dead.kill()
    return scene.attempt(environ=scene.environ(**dead.env))


def display_refuses(scene: Scene) -> Attempt:
    return scene.attempt(environ=scene.environ(XAUTHORITY=str(scene.runtime / "none")))


def root_no_directory(scene: Scene) -> Attempt:
    taken = scene.root.with_name("taken")
    taken.write_text("")
    return scene.attempt(root=taken)


def port_refused(scene: Scene) -> Attempt:
    """Nothing listens on the port, and nothing else can take it."""
    taken = scene.stack.enter_context(socket.socket())
    taken.bind((LOOPBACK, 0))
    session = dataclasses.replace(scene.session, graphics_port=taken.getsockname()[1])
    return scene.attempt(session, timeouts=Timeouts(agent_connect_s=AGENT_CONNECT_S))


def wrong_cookie(scene: Scene) -> Attempt:
    return scene.attempt(dataclasses.replace(scene.session, cookie=token_hex(16)))


def forwarding_denied(scene: Scene) -> Attempt:
    server = scene.stack.enter_context(SshServer(extra_config="AllowTcpForwarding no"))
    client = scene.stack.enter_context(contextlib.closing(server.connect()))
    return scene.attempt(client=client)


def transport_closed(scene: Scene) -> Attempt:
    client = scene.server.connect()
    attempt = scene.attempt(client=client)
    client.close()
    return attempt


AGENT_CONNECT_S = 1.0
NEGOTIATION_LINE = "The remote NX proxy closed the connection"
E = EndReason
# cause, how, reason; then first sign and after so many seconds, and what is other than in most rows
START_FAULTS = [
    StartFault("program missing", program_missing, E.PROXY_NOT_FOUND),
    StartFault("program no executable", program_no_executable, E.PROXY_NOT_STARTABLE),
    StartFault("DISPLAY unset", display_unset, E.DISPLAY_UNAVAILABLE),
    StartFault("X server absent", display_absent, E.DISPLAY_UNAVAILABLE),
    StartFault("X server dead", display_dead, E.DISPLAY_UNAVAILABLE),
    StartFault("X server refuses", display_refuses, E.DISPLAY_UNAVAILABLE),
    StartFault("sessions root no directory", root_no_directory, E.LISTEN_FAILED),
    StartFault("connection closed", transport_closed, E.TRANSPORT_LOST),
    StartFault("forwarding denied", forwarding_denied, E.FORWARDING_DENIED, WorkerRefused, exits=True),
    StartFault(
        "port refused", port_refused, E.AGENT_UNREACHABLE, WorkerRefused, AGENT_CONNECT_S, exits=True, retryable=None
    ),
    StartFault(
        "wrong cookie",
        wrong_cookie,
        E.NEGOTIATION_FAILED,
        NEGOTIATION_LINE,
        exits=True,
        retryable=False,
        agent_lives=False,
    ),
]


@pytest.mark.parametrize("fault", START_FAULTS, ids=lambda fault: fault.cause.replace(" ", "-"))
def test_fault_at_start(request: pytest.FixtureRequest, fault: StartFault, record_property: Any) -> None:
    """It ends with its own reason, in time; where it is on this side of the agent, that is not touched."""
    scene: Scene = request.getfixturevalue("untouched" if fault.agent_lives else "scene")
    attempt = fault.make(scene)
    attempt.start()
    with pytest.raises(ProxyFailed) as failure:
        attempt.proxy.wait_running(FINAL_S)
    status = failure.value.status
    assert (status.state, status.reason) == (State.FAILED, fault.reason)
    assert not fault.reason.clean
    assert (status.retryable, status.abandoned) == (fault.retryable, ())
    assert status.detail
    assert status.hint
    assert attempt.session.cookie is not None
    assert attempt.session.cookie not in str(failure.value)

    cause_at = attempt.started_at + fault.due_s
    sign_at = cause_at if fault.sign is None else attempt.sign_at(fault.sign)
    end_at = attempt.sign_at(ProcessExited) if fault.exits else sign_at
    record_times(record_property, attempt, cause_at, sign_at, end_at)
    assert attempt.entered[State.STOPPING] - sign_at < STOPPING_S + SLACK_S
    assert attempt.final_at - end_at < (AFTER_EXIT_S if fault.exits else DEAD_S) + SLACK_S
    if fault.due_s:
        assert cause_at <= attempt.entered[State.STOPPING] < cause_at + STOPPING_S + SLACK_S
        assert attempt.final_at < cause_at + DEAD_S + SLACK_S
    if not fault.agent_lives:
        eventually(lambda: not alive(scene.agent.pid), FINAL_S)


def test_session_starts_after_every_fault_that_did_not_touch_its_agent(scene: Scene) -> None:
    """An agent in its first attempt has one chance, and none of these takes it."""
    for fault in START_FAULTS:
        if fault.agent_lives:
            attempt = fault.make(scene)
            attempt.start()
            assert attempt.wait() is State.FAILED
            assert attempt.proxy.status().reason is fault.reason
    scene.attempt().run()
    scene.shows()


def record_times(record_property: Any, attempt: Attempt, cause_at: float, sign_at: float, end_at: float) -> None:
    """Keep what was measured."""
    stopping_at, final_at = attempt.entered[State.STOPPING], attempt.final_at
    record_property("cause_to_stopping_s", stopping_at - cause_at)
    record_property("sign_to_stopping_s", stopping_at - sign_at)
    record_property("cause_to_final_s", final_at - cause_at)
    record_property("end_to_final_s", final_at - end_at)


# ---- faults, and other ends, in mid-session ----


@dataclass(frozen=True)
class Ending:
    """A row of the table below.

    `listed`: the session's status on the server afterwards. `sign`: what is seen of it first; None for the cause
    itself. `final_s`: how long it may take from `ended_by` (None: from the cause) to the final state. `says`: what
    `detail` names.
    """

    cause: str
    inflict: Callable[[Scene, Attempt], object]
    reason: EndReason
    listed: str
    sign: type[Observation] | str | None
    ended_by: type[Observation] | None
    final_s: float
    clean: bool = False
    retryable: bool | None = True
    says: str = ""


def suspend(scene: Scene, _attempt: Attempt) -> None:
    scene.server.suspend(scene.admin, scene.agent.name)


def terminate(scene: Scene, _attempt: Attempt) -> None:
    scene.server.terminate(scene.admin, scene.agent.name)


def kill_display(scene: Scene, _attempt: Attempt) -> None:
    scene.display.kill()


def kill_agent(scene: Scene, _attempt: Attempt) -> None:
    os.kill(scene.agent.pid, signal.SIGKILL)


def kill_proxy(_scene: Scene, attempt: Attempt) -> None:
    os.kill(attempt.proxy.status().pid or 0, signal.SIGKILL)


def terminate_proxy(_scene: Scene, attempt: Attempt) -> None:
    os.kill(attempt.proxy.status().pid or 0, signal.SIGTERM)


def kill_connection(scene: Scene, _attempt: Attempt) -> None:
    send_signal(scene.server.session_pids(scene.client), signal.SIGKILL)


def close_connection(scene: Scene, _attempt: Attempt) -> None:
    scene.client.close()


CAUGHT_LINE = "Waiting the cleanup timeout"
PEER_LINE = "Failure reading from the peer proxy"
# cause, how, reason, status on the server; then first sign, what ends the proxy, final state so many seconds after
EXIT, CUT = ProcessExited, TransportEnded
ENDINGS = [
    Ending("suspended", suspend, E.SESSION_ENDED, "S", EXIT, EXIT, DEAD_S, clean=True, retryable=None),
    Ending("terminated", terminate, E.SESSION_ENDED, "-", EXIT, EXIT, DEAD_S, clean=True, retryable=None),
    Ending("X server killed", kill_display, E.DISPLAY_LOST, "S", None, EXIT, AFTER_EXIT_S),
    Ending("agent killed", kill_agent, E.PEER_LOST, "", PEER_LINE, EXIT, AFTER_EXIT_S, retryable=None),
    Ending("proxy SIGKILLed", kill_proxy, E.PROXY_KILLED, "S", None, None, DEAD_S, says="SIGKILL"),
    Ending("proxy SIGTERMed", terminate_proxy, E.PROXY_KILLED, "S", CAUGHT_LINE, EXIT, AFTER_EXIT_S, says="TERM"),
    Ending("connection dropped", kill_connection, E.TRANSPORT_LOST, "S", CUT, CUT, DEAD_S),
    Ending("connection closed", close_connection, E.TRANSPORT_LOST, "S", None, None, DEAD_S),
]


def stood_long_enough(attempt: Attempt) -> None:
    """Wait until the session has stood for so long that it certainly survives; before, `retryable` is None."""
    since = attempt.proxy.status().since
    eventually(lambda: (datetime.now(UTC) - since).total_seconds() > 0.6, FINAL_S)


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.cause.replace(" ", "-"))
def test_end_in_mid_session(scene: Scene, ending: Ending, record_property: Any) -> None:
    """It ends with its own reason, in time, and `retryable` agrees with what the server then says."""
    attempt = scene.attempt().run()
    scene.settled()
    stood_long_enough(attempt)
    cause_at = time.monotonic()
    ending.inflict(scene, attempt)
    final = attempt.wait()
    status = attempt.proxy.status()
    assert (final, status.reason) == (State.STOPPED if ending.clean else State.FAILED, ending.reason)
    assert ending.reason.clean is ending.clean
    assert (status.retryable, status.abandoned) == (ending.retryable, ())
    assert status.detail
    assert ending.says in status.detail
    if ending.says == "SIGKILL":
        assert (status.exit_code, status.signal) == (None, signal.SIGKILL)

    sign_at = cause_at if ending.sign is None else attempt.sign_at(ending.sign)
    end_at = cause_at if ending.ended_by is None else attempt.sign_at(ending.ended_by)
    record_times(record_property, attempt, cause_at, sign_at, end_at)
    assert attempt.entered[State.STOPPING] - sign_at < STOPPING_S + SLACK_S
    assert attempt.final_at - end_at < ending.final_s + SLACK_S
    if ending.listed:
        assert scene.server.wait_status(scene.admin, scene.agent.name, ending.listed)


def test_proxy_is_killed_at_once_where_its_lines_tell_first_of_the_lost_transport(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing orderly can travel any more, whoever notices first; here the transport's monitor comes late."""
    attempt = scene.attempt().run()
    scene.settled()
    stopping = threading.Event()
    attempt.proxy.subscribe(lambda record: stopping.set() if record.dest is State.STOPPING else None)
    tell_end = monitor._TransportMonitor._tell_end

    def late(self: Any, transport: paramiko.Transport) -> None:
        stopping.wait(1.0)
        tell_end(self, transport)

    monkeypatch.setattr(monitor._TransportMonitor, "_tell_end", late)
    scene.client.close()
    assert attempt.wait() is State.FAILED
    status = attempt.proxy.status()
    assert status.reason is EndReason.TRANSPORT_LOST
    assert status.signal == signal.SIGKILL


# ---- a server that hangs ----


def test_stop_during_a_hanging_channel_open(scene: Scene, record_property: Any) -> None:
    """It is heard at once, ends in time, and a channel that opens late is closed."""
    before = Holdings.now([transport_of(scene.client)])
    attempt = scene.attempt()
    with stopped(scene.server.session_pids(scene.client)):
        attempt.start()
        attempt.proxy.wait(State.SPAWNING, timeout=RUNNING_S)
        eventually(lambda: attempt.proxy.status().waiting_for == "the channel to the agent", RUNNING_S)
        eventually(lambda: "Connected to remote proxy" in " ".join(attempt.proxy.status().output_tail), RUNNING_S)
        stop_at = time.monotonic()
        attempt.proxy.stop()
        assert attempt.wait() is State.STOPPED
    record_times(record_property, attempt, stop_at, stop_at, attempt.sign_at(ProcessExited))
    assert attempt.entered[State.STOPPING] - stop_at < STOP_HEARD_S + SLACK_S
    assert attempt.final_at - attempt.sign_at(ProcessExited) < AFTER_EXIT_S + SLACK_S
    status = attempt.proxy.status()
    assert status.reason is EndReason.STOP_REQUESTED
    assert status.tunnel is not None
    assert status.tunnel.connections == 0
    assert run(scene.client, "echo alive") == "alive\n"
    nothing_gained_since(before, [transport_of(scene.client)])
    eventually(lambda: established(scene.agent.graphics_port) == 0, FINAL_S)


def test_stop_without_a_start_or_before_it_runs(untouched: Scene) -> None:
    """An order to stop is never lost."""
    idle = untouched.attempt()
    idle.proxy.stop()
    assert idle.wait() is State.STOPPED
    with pytest.raises(InvalidTransition):
        idle.proxy.start()
    early = port_refused(untouched)
    early.start()
    early.proxy.stop()
    with pytest.raises(ProxyStopped):
        early.proxy.wait_running(FINAL_S)
    assert early.proxy.status().reason is EndReason.STOP_REQUESTED


def test_link_is_silent_and_restored(scene: Scene, record_property: Any) -> None:
    """Silence is told, and so is its end; the session goes on."""
    timeouts = Timeouts(link_probe_s=0.3, link_dead_s=FINAL_S)
    attempt = scene.attempt(timeouts=timeouts).run()
    scene.settled()
    stopped_at = time.monotonic()
    with stopped(scene.server.session_pids(scene.client)):
        eventually(lambda: attempt.proxy.status().link is Link.SILENT, FINAL_S)
        first_s = attempt.proxy.status().silent_s
        eventually(lambda: attempt.proxy.status().silent_s > first_s, 1.0)
        assert first_s >= timeouts.link_probe_s
        restored_at = time.monotonic()
    eventually(lambda: attempt.proxy.status().link is Link.OK, FINAL_S)
    silent, restored = attempt.named("link.silent")[0], attempt.named("link.restored")[0]
    record_property("stopped_to_silent_s", silent["at"] - stopped_at)
    record_property("continued_to_restored_s", restored["at"] - restored_at)
    assert silent["at"] - stopped_at < 2 * timeouts.link_probe_s + SLACK_S
    assert restored["at"] - restored_at < STOPPING_S + SLACK_S
    assert restored["silent_s"] >= first_s
    assert attempt.proxy.status().silent_s == 0
    assert attempt.proxy.ok()
    attempt.proxy.stop()
    assert attempt.wait() is State.STOPPED
    assert scene.server.wait_status(scene.admin, scene.agent.name, "S") == "S"


def test_transport_that_stays_silent_is_given_up(scene: Scene, record_property: Any) -> None:
    """What the dead link holds is freed when the server goes on; the transport is the caller's and lives."""
    before = Holdings.now([transport_of(scene.client)])
    timeouts = Timeouts(link_probe_s=0.3, link_dead_s=1.5, kill_s=1)
    attempt = scene.attempt(timeouts=timeouts).run()
    scene.settled()
    cause_at = time.monotonic()
    with stopped(scene.server.session_pids(scene.client)):
        assert attempt.wait() is State.FAILED
        dead_at = attempt.sign_at(LinkDead)
        record_times(record_property, attempt, cause_at, dead_at, dead_at)
        status = attempt.proxy.status()
        assert (status.reason, status.link) == (EndReason.TRANSPORT_SILENT, Link.SILENT)
        assert (status.signal, status.retryable) == (signal.SIGKILL, True)
        assert dead_at - cause_at < timeouts.link_dead_s + SLACK_S
        assert attempt.entered[State.STOPPING] - dead_at < STOPPING_S + SLACK_S
        assert attempt.final_at - dead_at < DEAD_S + SLACK_S
        assert status.abandoned == ()
    assert run(scene.client, "echo alive") == "alive\n"
    nothing_gained_since(before, [transport_of(scene.client)])
    assert scene.server.wait_status(scene.admin, scene.agent.name, "S") == "S"


# ---- two engines on one transport ----


def test_engines_on_one_transport_do_not_disturb_each_other(scene: Scene) -> None:
    """One is killed, one finds nobody, and the third one's session goes on painting."""
    other = scene.server.start_agent(scene.admin, command=None)
    scene.stack.callback(scene.server.end, other)
    elsewhere = scene.stack.enter_context(Display())
    staying = scene.attempt(parse_agent_output(other.raw), environ=scene.environ(**elsewhere.env)).run()
    killed = scene.attempt().run()
    scene.shows()
    kill_proxy(scene, killed)
    assert killed.wait() is State.FAILED
    lost = port_refused(scene)
    lost.start()
    assert lost.wait() is State.FAILED
    assert [each.proxy.status().reason for each in (killed, lost)] == [
        EndReason.PROXY_KILLED,
        EndReason.AGENT_UNREACHABLE,
    ]
    assert staying.proxy.ok()
    scene.server.run_command(scene.admin, other, BLUE_XTERM)
    shows(elsewhere, BLUE)
    assert staying.proxy.ok()
    assert [each.dest for each in staying.records] == [State.TUNNELLING, State.SPAWNING, State.RUNNING]
    assert {each["proxy_id"] for each in staying.events} == {staying.proxy.id}


# ---- any viewer ----

TCP, UNIX = ("{host}", "{port}"), ("{path}",)


def viewer(script: str, address: tuple[str, ...], **options: Any) -> CommandBackend:
    """Run a script as the viewer."""
    return CommandBackend([sys.executable, "-c", script, *address], **options)


@dataclass(frozen=True)
class ViewerEnd:
    """A row of the table below: what the service says last (b"" to hang up), and how the proxy then ends."""

    cause: str
    said: bytes
    state: State
    reason: EndReason
    exit_code: int


VIEWER_ENDS = [
    ViewerEnd("viewer closed", b"0", State.STOPPED, E.VIEWER_CLOSED, 0),
    ViewerEnd("viewer fails", b"3", State.FAILED, E.PROXY_EXITED, 3),
    ViewerEnd("service hangs up", b"", State.STOPPED, E.SESSION_ENDED, 0),
]


@pytest.mark.parametrize("address", [TCP, UNIX], ids=["tcp", "unix"])
@pytest.mark.parametrize("end", VIEWER_ENDS, ids=lambda end: end.cause.replace(" ", "-"))
def test_any_viewer(ssh_client: paramiko.SSHClient, runtime: Path, address: tuple[str, ...], end: ViewerEnd) -> None:
    """A program of its own talks through sshd to a service; every byte arrives, and its end is told apart."""
    transport = transport_of(ssh_client)
    with Service() as service:
        before = Holdings.now([transport])
        session = SessionInfo(name="viewer", graphics_port=service.port)
        backend = viewer(CLIENT, address)
        environ = {"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(runtime / "run")}
        with Proxy(session, transport, backend=backend, sessions_root=runtime / "sessions", environ=environ) as proxy:
            eventually(lambda: proxy.status().output_tail == ("all is back",), RUNNING_S)
            tunnel = proxy.status().tunnel
            assert tunnel is not None
            assert (tunnel.bytes_to_agent, tunnel.connections) == (PAYLOAD_BYTES, 1)
            if end.said:
                service.say(end.said)
            else:
                service.hang_up()
            assert proxy.wait(timeout=FINAL_S) is end.state
        status = proxy.status()
        assert status.reason is end.reason
        assert status.tunnel is not None
        assert status.tunnel.bytes_from_agent == PAYLOAD_BYTES + len(end.said)
        if end.said:  # else it may have been told to end before it did so by itself
            assert status.exit_code == end.exit_code
        nothing_gained_since(before, [transport])


def test_what_a_silent_server_holds_is_abandoned_and_freed_later(
    x2go_server: X2GoServer, ssh_client: paramiko.SSHClient, runtime: Path
) -> None:
    """A relay that is stuck in sending cannot be freed while the server takes nothing; the engine ends all the same."""
    transport = transport_of(ssh_client)
    with Service(echo=False) as service:
        before = Holdings.now([transport])
        attempt = Attempt(
            SessionInfo(name="flood", graphics_port=service.port),
            ssh_client,
            {"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(runtime / "run")},
            runtime / "sessions",
            backend=viewer(FLOOD, TCP, ready_when="connected", max_connections=None),
            timeouts=Timeouts(link_probe_s=0.3, link_dead_s=1.5, kill_s=0.5),
        )
        pids = x2go_server.session_pids(ssh_client)
        attempt.run()
        eventually(lambda: len(attempt.named("tunnel.connected")) == FLOODS, RUNNING_S)
        with stopped(pids):
            assert attempt.wait() is State.FAILED
            status = attempt.proxy.status()
            assert status.reason is EndReason.TRANSPORT_SILENT
            assert any(left.startswith("channel") for left in status.abandoned)
        attempt.close()
        nothing_gained_since(before, [transport])
    assert run(ssh_client, "echo alive") == "alive\n"
