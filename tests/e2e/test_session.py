"""The engine against real programs: sshd, an X2Go server with nxagent, nxproxy, and an X server.

Times are those of design.md, section 6. This machine may be shared, so the tests assert the design's figure plus
`SLACK_S`, and moments in which the whole machine stalled do not count; measurements are recorded as properties of each
test: see them with ``--junitxml=FILE -o junit_family=xunit1``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm import (
    CommandBackend,
    EndReason,
    InvalidTransition,
    Link,
    NX3Backend,
    Proxy,
    ProxyStopped,
    SessionInfo,
    State,
    Timeouts,
    Trigger,
    parse_agent_output,
    parse_session_list,
)
from proxy_fsm.evidence import ProcessExited
from proxy_fsm.ssh import why_ended
from proxy_fsm.workers import link_monitor
from tests.helpers.wait import eventually

from .attempt import (
    FINAL_S,
    RUNNING_S,
    Attempt,
    Holdings,
    files_below,
    nothing_gained_since,
)
from .causes import kill_proxy, port_refused
from .display import BLUE, RED
from .procs import alive, established
from .scene import Scene, loose_umask, stopped
from .service import CLIENT, FLOOD, FLOODS, PAYLOAD_BYTES, Service
from .x2go import (
    ASK_S,
    Display,
    X2GoServer,
    run,
    transport_of,
)

if TYPE_CHECKING:
    import paramiko

    from .stalls import Stalls


SLACK_S = 0.4  # what a busy machine of two cores may add to any time below
STOP_HANDLED_S = 0.01
STOPPING_S = 0.05  # from a fault's first sign
DEAD_S = 0.1  # from there to the final state, if the proxy is dead or the transport lost
AFTER_EXIT_S = 0.02  # else from the proxy's exit
BLUE_XTERM = "xterm -bg blue -geometry 60x20+10+10 -T blue-xterm -e sleep 3600"


pytestmark = pytest.mark.usefixtures("nothing_left")


# ---- a session, from its first picture to its end ----


def test_session_is_shown_suspended_resumed_and_shown_again(scene: Scene, stalls: Stalls, record_property: Any) -> None:
    """Its window is on the display; stop() suspends it; a second engine attaches to the resumed session."""
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
    assert stalls.took_s(stop_at, first.entered[State.STOPPING]) < STOP_HANDLED_S + SLACK_S
    assert stalls.took_s(exited_at, first.final_at) < AFTER_EXIT_S + SLACK_S
    status = first.proxy.status()
    assert (status.reason, status.retryable, status.abandoned) == (EndReason.STOP_REQUESTED, True, ())
    assert (status.exit_code, status.signal) == (0, None)
    assert scene.server.wait_status(scene.admin, scene.agent.name, "S") == "S"
    assert scene.display.share_of(RED) == 0
    check_records(first)

    second = scene.attempt(scene.resumed(), resumed=True).run()
    scene.shows()
    assert scene.server.wait_status(scene.admin, scene.agent.name, "R") == "R"
    scene.server.terminate(scene.admin, scene.agent.name)
    assert second.wait() is State.STOPPED
    assert second.proxy.status().reason is EndReason.SESSION_ENDED
    eventually(lambda: not alive(scene.agent.pid), FINAL_S)
    assert first.proxy.id != second.proxy.id


def check_running(attempt: Attempt) -> None:
    """The status of a running proxy is complete and correct."""
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


def check_records(attempt: Attempt) -> None:
    """History, events and subscriber agree on a session that was stopped."""
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
    labels = {(each["proxy_id"], each["session"]) for each in attempt.events}
    assert labels == {(attempt.proxy.id, attempt.session.name)}


def test_cookie_is_not_readable_by_other_users(
    scene: Scene, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is in the environment of the proxy, which only its owner can read, and nowhere else on this machine."""
    caplog.set_level(0)
    cookie = scene.agent.cookie
    with loose_umask():
        attempt = scene.attempt().run()
    scene.shows()

    paths = list(Path("/proc").glob("[0-9]*/cmdline"))
    command_lines = [line for line in map(read_if_exists, paths) if line]
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


def read_if_exists(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_session_list_and_agent_output_name_the_same_session(untouched: Scene) -> None:
    """Both real formats are parsed: the output of x2gostartagent and that of x2golistsessions."""
    listed = parse_session_list(untouched.server.list_sessions(untouched.admin))
    row = next(each for each in listed if each.info.name == untouched.agent.name)
    assert row.info == untouched.session
    assert (row.info.agent_pid, row.user) == (untouched.agent.pid, untouched.server.user)


def test_session_stopped_at_once_is_not_called_retryable(scene: Scene) -> None:
    """For some 60 ms after nxproxy's ready line an agent in its first attempt does not survive a stop."""
    attempt = scene.attempt()
    attempt.proxy.subscribe(lambda record: attempt.proxy.stop() if record.dest is State.RUNNING else None)
    attempt.start()
    assert attempt.wait() is State.STOPPED
    eventually(
        lambda: not alive(scene.agent.pid) or scene.server.status(scene.admin, scene.agent.name) == "S",
        FINAL_S,
        interval_s=ASK_S,
    )
    assert alive(scene.agent.pid) or attempt.proxy.status().retryable is not True


# ---- a lost transport ----


def test_lost_transport_is_reported_by_the_tunnel_if_the_monitor_is_late(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tunnel notices it too, and reports it before nxproxy can react: nxproxy is killed at once."""
    attempt = scene.attempt().run()
    scene.wait_served()
    stopping = threading.Event()
    attempt.proxy.subscribe(lambda record: stopping.set() if record.dest is State.STOPPING else None)

    def late(transport: paramiko.Transport) -> str:
        stopping.wait(1.0)
        return why_ended(transport)

    monkeypatch.setattr(link_monitor, "why_ended", late)
    scene.client.close()
    assert attempt.wait() is State.FAILED
    status = attempt.proxy.status()
    assert status.reason is EndReason.TRANSPORT_LOST
    assert status.signal == signal.SIGKILL


# ---- a server that hangs ----


def test_stop_during_a_hanging_channel_open(scene: Scene, stalls: Stalls, record_property: Any) -> None:
    """It is handled at once, completes in time, and a channel that opens late is closed."""
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
    record_property("stop_to_stopping_s", attempt.entered[State.STOPPING] - stop_at)
    record_property("stop_to_final_s", attempt.final_at - stop_at)
    assert stalls.took_s(stop_at, attempt.entered[State.STOPPING]) < STOP_HANDLED_S + SLACK_S
    assert stalls.took_s(attempt.sign_at(ProcessExited), attempt.final_at) < AFTER_EXIT_S + SLACK_S
    status = attempt.proxy.status()
    assert status.reason is EndReason.STOP_REQUESTED
    assert status.tunnel is not None
    assert status.tunnel.connections == 0
    assert run(scene.client, "echo alive") == "alive\n"
    nothing_gained_since(before, [transport_of(scene.client)])
    eventually(lambda: established(scene.agent.graphics_port) == 0, FINAL_S)


def test_stop_before_start_or_before_running_is_honoured(untouched: Scene) -> None:
    """A stop request is never lost."""
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


# ---- two engines on one transport ----


def test_engines_on_one_transport_do_not_disturb_each_other(scene: Scene) -> None:
    """One is killed, one finds no listener, and the session of the third keeps painting."""
    other = scene.server.start_agent(scene.admin, command=None)
    scene.stack.callback(scene.server.end, other)
    elsewhere = scene.stack.enter_context(Display())
    staying = scene.attempt(parse_agent_output(other.raw), environ=scene.environ(**elsewhere.env)).run()
    killed = scene.attempt().run()
    scene.shows()
    kill_proxy(scene, killed)
    assert killed.wait() is State.FAILED
    scene.timeouts = Timeouts(agent_connect_s=1)
    unreachable = port_refused(scene)
    unreachable.start()
    assert unreachable.wait() is State.FAILED
    assert [each.proxy.status().reason for each in (killed, unreachable)] == [
        EndReason.PROXY_KILLED,
        EndReason.AGENT_UNREACHABLE,
    ]
    assert staying.proxy.ok()
    scene.server.run_command(scene.admin, other, BLUE_XTERM)
    elsewhere.wait_for(BLUE)
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
    """A row of the table below: the last data of the service (b"" to hang up), and how the proxy then ends."""

    cause: str
    last_data: bytes
    state: State
    reason: EndReason
    exit_code: int


VIEWER_ENDS = [
    ViewerEnd("viewer closed", b"0", State.STOPPED, EndReason.VIEWER_CLOSED, 0),
    ViewerEnd("viewer fails", b"3", State.FAILED, EndReason.PROXY_EXITED, 3),
    ViewerEnd("service hangs up", b"", State.STOPPED, EndReason.SESSION_ENDED, 0),
]


@pytest.mark.parametrize("address", [TCP, UNIX], ids=["tcp", "unix"])
@pytest.mark.parametrize("end", VIEWER_ENDS, ids=lambda end: end.cause.replace(" ", "-"))
def test_any_viewer(ssh_client: paramiko.SSHClient, runtime: Path, address: tuple[str, ...], end: ViewerEnd) -> None:
    """A separate program exchanges data with a service through sshd; every byte arrives, and its end is diagnosed."""
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
            if end.last_data:
                service.send(end.last_data)
            else:
                service.hang_up()
            assert proxy.wait(timeout=FINAL_S) is end.state
        status = proxy.status()
        assert status.reason is end.reason
        assert status.tunnel is not None
        assert status.tunnel.bytes_from_agent == PAYLOAD_BYTES + len(end.last_data)
        if end.last_data:  # otherwise it may have been terminated before it exited by itself
            assert status.exit_code == end.exit_code
        nothing_gained_since(before, [transport])


def test_channels_blocked_by_a_silent_server_are_abandoned_and_freed_later(
    x2go_server: X2GoServer, ssh_client: paramiko.SSHClient, runtime: Path
) -> None:
    """A relay blocked in sending cannot be freed while the server reads nothing; the engine ends nevertheless.

    The flood begins when the server is stopped: before, it could fill the channels' windows, and then wait for those
    instead of the connection.
    """
    transport = transport_of(ssh_client)
    with Service(echo=False) as service:
        before = Holdings.now([transport])
        attempt = Attempt(
            SessionInfo(name="flood", graphics_port=service.port),
            ssh_client,
            {"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(runtime / "run")},
            runtime / "sessions",
            backend=viewer(FLOOD, TCP, ready_when="connected", max_connections=None),
            timeouts=Timeouts(link_probe_s=0.3, link_dead_s=5, kill_s=0.5),  # time to fill the buffers
        )
        pids = x2go_server.session_pids(ssh_client)
        attempt.run()
        eventually(lambda: len(attempt.named("tunnel.connected")) == FLOODS, RUNNING_S)
        with stopped(pids):
            os.kill(attempt.proxy.status().pid or 0, signal.SIGUSR1)
            assert attempt.wait() is State.FAILED
            status = attempt.proxy.status()
            assert status.reason is EndReason.TRANSPORT_SILENT
            assert any(each.startswith("channel") for each in status.abandoned)
        attempt.close()
        nothing_gained_since(before, [transport])
    assert run(ssh_client, "echo alive") == "alive\n"
