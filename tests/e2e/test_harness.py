"""The harness itself: a session by hand, without any code of our package."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import paramiko
import pytest

from tests.helpers.real import REQUIRE
from tests.helpers.wait import WAIT_S, eventually

from . import conftest
from .byhand import ESTABLISHED, Forwarder, NxProxy
from .display import RED
from .namespace import Network
from .procs import alive, processes_of
from .x2go import LOOPBACK, CommandError, Display, SshServer, X2GoServer, kill, missing_programs, run

if TYPE_CHECKING:
    from .x2go import AgentSession

ROOT = Path(__file__).parents[2]


def test_all_programs_are_installed() -> None:
    assert missing_programs() == []


def test_missing_programs_fail_if_required(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise they skip; both messages name what is missing."""
    monkeypatch.setattr(conftest, "missing_programs", lambda: ["nxagent", "root"])
    check = conftest.real_programs.__wrapped__  # type: ignore[attr-defined]  # pytest's wrapper has no type
    monkeypatch.delenv(REQUIRE, raising=False)
    with pytest.raises(pytest.skip.Exception, match="nxagent, root"):
        check()
    monkeypatch.setenv(REQUIRE, "1")
    with pytest.raises(pytest.fail.Exception, match="nxagent, root"):
        check()


STALLED_PROGRAM = """
import sys, time
from tests.e2e.stalls import Stalls
with Stalls() as stalls:
    start = time.monotonic()
    print("ready", flush=True)
    sys.stdin.readline()
    continued = time.monotonic()
    time.sleep(0.3)
    end = time.monotonic()
print(continued - start, stalls.took_s(start, continued), stalls.took_s(continued, end), stalls.took_s(end, end))
"""


def test_stalled_time_does_not_count() -> None:
    command = [sys.executable, "-c", STALLED_PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        program.send_signal(signal.SIGCONT)
        whole, stalled, slept, nothing = map(float, program.communicate("continue\n")[0].split())
    assert whole > 0.5
    assert stalled < whole - 0.4
    assert slept > 0.2, "only one thread waited"
    assert nothing == 0


def test_session_by_hand(
    x2go_server: X2GoServer, ssh_client: paramiko.SSHClient, agent: AgentSession, display: Display
) -> None:
    """An orderly exit of nxproxy suspends the session; it resumes with what was painted, and terminates."""
    assert x2go_server.status(ssh_client, agent.name) == "R"
    with (
        Forwarder(ssh_client, agent.graphics_port) as forwarder,
        NxProxy(agent, forwarder.path, display.env) as proxy,
    ):
        proxy.wait_for(ESTABLISHED)
        display.wait_for(RED)
        assert display.windows() == [f"X2GO-{agent.name}"]
        proxy.send(signal.SIGTERM)
        assert proxy.wait_exit() == 0
    assert x2go_server.wait_status(ssh_client, agent.name, "S") == "S"
    assert display.share_of(RED) == 0

    ports = x2go_server.resume(ssh_client, agent)
    with (
        Forwarder(ssh_client, ports.graphics_port) as forwarder,
        NxProxy(agent, forwarder.path, display.env) as proxy,
    ):
        proxy.wait_for(ESTABLISHED)
        display.wait_for(RED)
        assert x2go_server.wait_status(ssh_client, agent.name, "R") == "R"
        x2go_server.terminate(ssh_client, agent.name)
        assert proxy.wait_exit() == 0
    assert x2go_server.status(ssh_client, agent.name) == ""
    eventually(lambda: not alive(agent.pid))


def test_rootless_session_by_hand(x2go_server: X2GoServer, ssh_client: paramiko.SSHClient, display: Display) -> None:
    """A rootless session shows its windows without a desktop around them."""
    session = x2go_server.start_agent(ssh_client, "R")
    with (
        Forwarder(ssh_client, session.graphics_port) as forwarder,
        NxProxy(session, forwarder.path, display.env) as proxy,
    ):
        proxy.wait_for(ESTABLISHED)
        display.wait_for(RED)
        assert "red-xterm" in display.windows()
        x2go_server.suspend(ssh_client, session.name)
        assert proxy.wait_exit() == 0
    assert x2go_server.status(ssh_client, session.name) == "S"
    x2go_server.end(session)
    assert not alive(session.pid)


@pytest.mark.usefixtures("own_namespaces")
def test_packets_are_dropped_while_the_loopback_of_a_network_is_down() -> None:
    """TCP sends them again afterwards."""
    with (
        Network() as network,
        network.call(lambda: socket.create_server((LOOPBACK, 0))) as listener,
        network.call(lambda: socket.create_connection(listener.getsockname())) as sender,
        listener.accept()[0] as receiver,
    ):
        receiver.settimeout(0.3)
        network.set_loopback(up=False)
        sender.sendall(b"late")
        with pytest.raises(TimeoutError):
            receiver.recv(4)
        network.set_loopback(up=True)
        receiver.settimeout(WAIT_S)
        assert receiver.recv(4) == b"late"


def test_cleanup_leaves_no_process_of_the_user() -> None:
    """Agents and commands are killed, and so is the server's listener."""
    with X2GoServer(user="pfsmclean") as server, contextlib.closing(server.connect()) as client:  # a user of its own
        session = server.start_agent(client)
        server.cleanup()
        assert not alive(session.pid)
        assert run(client, "echo here") == "here\n"
        uid, listener = server.uid, server.pids().listener
    assert processes_of(uid) == []
    assert not alive(listener)


def test_two_servers_have_different_users(x2go_server: X2GoServer) -> None:
    with X2GoServer() as other:
        assert other.user != x2go_server.user


def test_one_connection_can_be_stopped_and_killed_alone() -> None:
    with (
        SshServer() as server,
        contextlib.closing(server.connect()) as victim,
        contextlib.closing(server.connect()) as bystander,
    ):
        pids = server.session_pids(victim)
        assert set(pids) < set(server.pids().sessions)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises((paramiko.SSHException, TimeoutError)):
            run(victim, "true", timeout_s=0.3)
        assert run(bystander, "echo alive") == "alive\n"
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert run(victim, "echo again") == "again\n"
        for pid in pids:
            kill(pid)
        transport = victim.get_transport()
        assert transport is not None
        eventually(lambda: not transport.is_active())
        assert run(bystander, "echo alive") == "alive\n"


def test_extra_configuration_wins() -> None:
    with (
        SshServer(extra_config="AllowTcpForwarding no") as server,
        contextlib.closing(server.connect()) as client,
    ):
        transport = client.get_transport()
        assert transport is not None
        with pytest.raises(paramiko.ChannelException) as refusal:
            transport.open_channel("direct-tcpip", ("127.0.0.1", server.port), ("127.0.0.1", 0))
    assert refusal.value.code == 1  # administratively prohibited


def test_host_key_is_checked() -> None:
    with SshServer() as server:
        server.host_key = paramiko.ECDSAKey.generate(bits=256)
        with pytest.raises(paramiko.BadHostKeyException):
            server.connect()


def test_failed_command_reports_status_and_standard_error() -> None:
    with (
        SshServer() as server,
        contextlib.closing(server.connect()) as client,
        pytest.raises(CommandError, match="3: oh no"),
    ):
        run(client, "echo oh no >&2; exit 3")


def test_openssh_client_logs_in(x2go_server: X2GoServer) -> None:
    command = ["ssh", "-F", "none", "-p", str(x2go_server.port), "-i", str(x2go_server.client_key_path)]
    command += ["-o", f"UserKnownHostsFile={x2go_server.known_hosts_path}", "-o", "BatchMode=yes"]
    answer = subprocess.run(
        [*command, f"{x2go_server.user}@127.0.0.1", "id", "-un"], check=True, capture_output=True, text=True
    )
    assert answer.stdout == f"{x2go_server.user}\n"


def test_display_refuses_clients_without_the_cookie(display: Display, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "DISPLAY": display.name}
    for authority, status in ((display.xauthority, 0), (tmp_path / "none", 1)):
        client = subprocess.run(
            ["xwininfo", "-root"],
            env={**environment, "XAUTHORITY": str(authority)},
            check=False,
            capture_output=True,
        )
        assert client.returncode == status


def test_displays_are_separate_and_black(display: Display) -> None:
    with Display(size=(321, 123)) as other:
        assert other.name != display.name
        assert other.screenshot().size == (321, 123)
        assert other.share_of((0, 0, 0)) == 1
        assert other.windows() == []
    assert not socket_exists(other)
    assert display.screenshot().size == (1024, 768)


def test_killed_display_leaves_its_socket_behind() -> None:
    """As after a crash; stop() removes it."""
    with Display() as display:
        pid = display.pid
        display.kill()
        assert not alive(pid)
        assert socket_exists(display)
    assert not socket_exists(display)


def socket_exists(display: Display) -> bool:
    """Return whether the socket of an X server exists."""
    return display.socket_path.exists()
