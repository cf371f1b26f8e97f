"""``proxy-fsm run`` as users and scripts see it: events, exit status, and nothing left behind."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import paramiko
import pytest

from proxy_fsm import EndReason
from proxy_fsm.testing import Forwarding, LoopbackSSHServer, standins
from proxy_fsm.testing.scripted import install
from tests.helpers.wait import PROGRAM_S, eventually

from .program import VIEWER_COMMAND, Home, Running, command, run, run_arguments, started

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.helpers.agent import Agent

COOKIE = "0123456789abcdef0123456789abcdef"
ALL_STATES = ["tunnelling", "spawning", "running", "stopping", "stopped"]


@pytest.fixture
def access(home: Home, server: LoopbackSSHServer) -> list[str | Path]:
    """Options that give access to the server."""
    return ["--key", home.write_key(server), "--known-hosts", home.add_known_host(server, "hosts")]


class TestSessionWithViewer:
    def test_program_runs_until_session_ends(
        self, home: Home, server: LoopbackSSHServer, agent: Agent, access: list[str | Path]
    ) -> None:
        with started(home, *run_arguments(home, server, agent.port, *access)) as program:
            program.until_state("running")
            agent.disconnect()
            assert program.finish() == 0
            assert program.states == ALL_STATES
            assert program.events[-1]["reason"] == "session_ended"
            assert program.errors == ""
            assert {event["session"] for event in program.events} == {"test"}

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("times", [1, 2])
    def test_first_or_second_signal_stops_proxy_cleanly(
        self,
        *,
        home: Home,
        server: LoopbackSSHServer,
        agent: Agent,
        access: list[str | Path],
        number: signal.Signals,
        times: int,
    ) -> None:
        with started(home, *run_arguments(home, server, agent.port, *access)) as program:
            program.until_state("running")
            for _ in range(times):
                program.process.send_signal(number)
            assert program.finish() == 0
            assert program.states == ALL_STATES
            assert program.events[-1]["reason"] == "stop_requested"
            assert program.errors == ""

    def test_ctrl_c_does_not_reach_viewer(
        self, home: Home, server: LoopbackSSHServer, agent: Agent, access: list[str | Path]
    ) -> None:
        """A terminal sends it to the whole process group, which does not include the viewer."""
        with started(home, *run_arguments(home, server, agent.port, *access)) as program:
            program.until_state("running")
            os.killpg(program.process.pid, signal.SIGINT)
            assert program.finish() == 0
            assert program.events[-1]["reason"] == "stop_requested"

    def test_fault_has_its_own_exit_status(
        self, home: Home, server: LoopbackSSHServer, agent: Agent, access: list[str | Path]
    ) -> None:
        server.forwarding = Forwarding.DENIED
        program = run(home, *run_arguments(home, server, agent.port, *access))
        assert program.process.returncode == EndReason.FORWARDING_DENIED.cli_status
        assert program.states[-1] == "failed"
        assert program.events[-1]["hint"]

    def test_lost_connection_has_its_own_exit_status(
        self, home: Home, server: LoopbackSSHServer, agent: Agent, access: list[str | Path]
    ) -> None:
        with started(home, *run_arguments(home, server, agent.port, *access)) as program:
            program.until_state("running")
            server.drop(reset=True)
            assert program.finish() == EndReason.TRANSPORT_LOST.cli_status
            assert program.errors == ""

    def test_missing_viewer_has_its_own_exit_status(
        self, home: Home, server: LoopbackSSHServer, access: list[str | Path]
    ) -> None:
        program = run(home, *run_arguments(home, server, 1, *access, viewer=["/nowhere/viewer", "{path}"]))
        assert program.process.returncode == EndReason.PROXY_NOT_FOUND.cli_status

    def test_path_placeholder_selects_unix_socket(
        self, home: Home, server: LoopbackSSHServer, agent: Agent, access: list[str | Path]
    ) -> None:
        reads = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.recv(9)"
        viewer = [sys.executable, "-I", "-S", "-c", reads, "{path}"]
        program = run(home, *run_arguments(home, server, agent.port, *access, viewer=viewer))
        assert program.process.returncode == 0
        assert program.events[-1]["reason"] == "viewer_closed"

    def test_console_events_go_to_standard_error(
        self, home: Home, server: LoopbackSSHServer, agent: Agent, access: list[str | Path]
    ) -> None:
        arguments = run_arguments(home, server, agent.port, *access)
        arguments[arguments.index("json")] = "console"
        with started(home, *arguments) as program:
            assert program.process.stderr is not None
            lines: list[str] = []
            while "running" not in (lines or [""])[-1]:
                lines.append(program.process.stderr.readline())
                assert lines[-1]
            program.process.terminate()
            assert program.process.wait(PROGRAM_S) == 0
            rest = program.errors
            assert "stop_requested" in rest
            assert "\x1b" not in rest
            assert program.process.stdout is not None
            assert program.process.stdout.read() == ""

    def test_closed_standard_output_is_ignored(
        self, home: Home, server: LoopbackSSHServer, agent: Agent, access: list[str | Path]
    ) -> None:
        with started(home, *run_arguments(home, server, agent.port, *access)) as program:
            program.until_state("running")
            assert program.process.stdout is not None
            program.process.stdout.close()
            agent.disconnect()
            assert program.process.wait(PROGRAM_S) == 0
            assert program.errors == ""

    def test_verbose_option_adds_debug_events(
        self, home: Home, server: LoopbackSSHServer, agent: Agent, access: list[str | Path]
    ) -> None:
        reads = (
            "import socket,sys; s=socket.create_connection((sys.argv[1], int(sys.argv[2]))); s.recv(9); print('moo')"
        )
        viewer = [sys.executable, "-I", "-S", "-c", reads, "{host}", "{port}"]
        for more in (["-v"], []):
            program = run(home, *run_arguments(home, server, agent.port, *access, *more, viewer=viewer))
            assert [event["line"] for event in program.named("process.output")] == (["moo"] if more else [])


class TestSessionWithNxproxy:
    @pytest.fixture
    def nxproxy(self, home: Home) -> Path:
        return install(home.path / "nxproxy", standins.command("proxy"))

    @pytest.fixture
    def display(self) -> Iterator[str]:
        with subprocess.Popen(standins.command("display"), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            yield process.stdout.readline().split()[1]
            process.kill()

    @pytest.fixture
    def port(self) -> Iterator[str]:
        with subprocess.Popen(
            standins.command("agent"), env={standins.COOKIE_VARIABLE: COOKIE}, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            yield process.stdout.readline().split()[1]
            process.kill()

    def arguments(
        self, home: Home, server: LoopbackSSHServer, port: str, cookie_file: str | Path, access: list[str | Path]
    ) -> list[str | Path]:
        return [
            *("run", f"{server.username}@{server.host}", "-p", str(server.port), *access, "--log-format", "json", "-v"),
            *("--session", "test", "--graphics-port", port, "--display", "50", "--cookie-file", cookie_file),
            *("--sessions-root", home.path / "sessions"),
        ]

    def test_cookie_from_standard_input_stays_hidden(
        self,
        *,
        home: Home,
        server: LoopbackSSHServer,
        nxproxy: Path,
        display: str,
        port: str,
        access: list[str | Path],
    ) -> None:
        environ = {"DISPLAY": display, "NXPROXY_BINARY": str(nxproxy)}
        with started(home, *self.arguments(home, server, port, "-", access), **environ) as program:
            assert program.process.stdin is not None
            program.process.stdin.write(f"  {COOKIE}  \nsecond line\n")
            program.process.stdin.flush()
            program.until_state("running")
            assert home.command_lines()
            assert not [line for line in home.command_lines() if COOKIE in line]
            program.process.terminate()
            assert program.finish() == 0
            assert program.states == ALL_STATES
            assert COOKIE not in program.raw + program.errors

    def test_readable_cookie_file_is_warned_about(
        self,
        *,
        home: Home,
        server: LoopbackSSHServer,
        nxproxy: Path,
        display: str,
        port: str,
        access: list[str | Path],
    ) -> None:
        cookie_file = home.path / "cookie"
        cookie_file.write_text(COOKIE)
        cookie_file.chmod(0o644)
        environ = {"DISPLAY": display, "NXPROXY_BINARY": str(nxproxy)}
        with started(home, *self.arguments(home, server, port, cookie_file, access), **environ) as program:
            program.until_state("running")
            program.process.terminate()
            assert program.finish() == 0
        (warning,) = program.named("cookie.exposed")
        assert (warning["level"], warning["mode"]) == ("warning", "0644")

    def test_private_cookie_file_is_accepted(
        self,
        home: Home,
        server: LoopbackSSHServer,
        nxproxy: Path,
        display: str,
        access: list[str | Path],
    ) -> None:
        """Without an agent, the engine reports the reason."""
        cookie_file = home.path / "cookie"
        cookie_file.write_text(f"{COOKIE}\n")
        cookie_file.chmod(0o600)
        server.forwarding = Forwarding.DENIED
        environ = {"DISPLAY": display, "NXPROXY_BINARY": str(nxproxy)}
        program = run(home, *self.arguments(home, server, "1", cookie_file, access), **environ)
        assert program.process.returncode == EndReason.FORWARDING_DENIED.cli_status
        assert program.named("cookie.exposed") == []


class TestConnecting:
    def failure(self, program: Running) -> str:
        assert program.process.returncode == 3
        assert program.errors == ""
        (event,) = program.events
        assert (event["event"], event["level"]) == ("connect.failed", "error")
        assert event["detail"]
        assert event["hint"]
        return str(event["reason"])

    def test_unknown_host_key_is_rejected(self, home: Home, server: LoopbackSSHServer) -> None:
        program = run(home, *run_arguments(home, server, 1, "--key", home.write_key(server)))
        assert self.failure(program) == "host_key_unknown"
        assert program.events[0]["fingerprint"] == server.host_key.fingerprint
        assert not (home.ssh / "known_hosts").exists()

    def test_unknown_host_key_can_be_accepted_without_saving(
        self, home: Home, server: LoopbackSSHServer, agent: Agent
    ) -> None:
        arguments = run_arguments(home, server, agent.port, "--key", home.write_key(server), "--accept-unknown-host")
        with started(home, *arguments) as program:
            program.until_state("running")
            agent.disconnect()
            assert program.finish() == 0
        assert program.events[0]["event"] == "host_key.accepted"
        assert not (home.ssh / "known_hosts").exists()

    @pytest.mark.parametrize("other", [paramiko.ECDSAKey.generate(), paramiko.RSAKey.generate(2048)])
    def test_changed_host_key_is_always_rejected(
        self, home: Home, server: LoopbackSSHServer, other: paramiko.PKey
    ) -> None:
        own, server.host_key = server.host_key, other  # type: ignore[assignment]
        home.add_known_host(server)
        server.host_key = own
        program = run(home, *run_arguments(home, server, 1, "--key", home.write_key(server), "--accept-unknown-host"))
        assert self.failure(program) == "host_key_changed"

    def test_known_hosts_option_replaces_default_files(self, home: Home, server: LoopbackSSHServer) -> None:
        home.add_known_host(server)
        empty = home.path / "empty"
        empty.touch()
        program = run(home, *run_arguments(home, server, 1, "--key", home.write_key(server), "--known-hosts", empty))
        assert self.failure(program) == "host_key_unknown"

    def test_rejected_key_is_reported_without_prompt(self, home: Home, server: LoopbackSSHServer) -> None:
        home.add_known_host(server)
        unknown_key = home.path / "unknown-key"
        paramiko.ECDSAKey.generate().write_private_key_file(str(unknown_key))
        for program in (
            run(home, *run_arguments(home, server, 1, "--key", unknown_key)),
            run(home, *run_arguments(home, server, 1)),
        ):
            assert self.failure(program) == "not_authenticated"

    def test_key_with_passphrase_is_reported(self, home: Home, server: LoopbackSSHServer) -> None:
        home.add_known_host(server)
        locked = home.path / "locked"
        server.client_key.write_private_key_file(str(locked), password="secret")
        program = run(home, *run_arguments(home, server, 1, "--key", locked))
        assert self.failure(program) == "not_authenticated"

    def test_closed_port_is_reported(self, home: Home, server: LoopbackSSHServer) -> None:
        home.add_known_host(server)
        server.stop()
        assert self.failure(run(home, *run_arguments(home, server, 1))) == "unreachable"

    @pytest.mark.parametrize("host", ["h/../", "a..b", "x" * 64 + ".example"])
    def test_invalid_host_name_is_reported(self, home: Home, host: str) -> None:
        program = self.run_to(home, host)
        assert self.failure(program) == "name_unknown"

    def test_invalid_port_is_reported(self, home: Home) -> None:
        assert self.failure(self.run_to(home, "127.0.0.1:99999")) == "unreachable"

    @pytest.mark.parametrize("host", ["", "me@", "h:x"])
    def test_malformed_host_is_usage_error(self, home: Home, host: str) -> None:
        program = self.run_to(home, host)
        assert program.process.returncode == 2
        (event,) = program.events
        assert event["event"] == "usage.invalid"

    def run_to(self, home: Home, host: str) -> Running:
        arguments = ["run", host, "--session", "test", "--graphics-port", "1", "--log-format", "json"]
        return run(home, *arguments, "--backend", "command", "--", *VIEWER_COMMAND)

    def test_non_ssh_server_is_reported(self, home: Home, server: LoopbackSSHServer, agent: Agent) -> None:
        """Its banner is not SSH's; the program gives up after the banner timeout."""
        own, server.port = server.port, agent.port
        with started(home, *run_arguments(home, server, 1)) as program:
            eventually(lambda: agent.connections)
            agent.disconnect()
            assert program.finish() == 3
            assert program.events[0]["reason"] == "no_ssh"
            assert program.errors == ""
        server.port = own

    def test_signal_ends_wait_for_server(self, home: Home, server: LoopbackSSHServer) -> None:
        server.freeze()
        with started(home, *run_arguments(home, server, 1)) as program:
            server.wait_for(lambda: server.connections == 1)
            program.process.terminate()
            assert program.finish() == 0
            assert [event["event"] for event in program.events] == ["interrupted"]
            assert program.errors == ""
        server.thaw()

    @pytest.mark.skipif(shutil.which("setsid") is None, reason="setsid (util-linux) is missing")
    def test_password_is_asked_for_at_terminal(self, home: Home, server: LoopbackSSHServer, agent: Agent) -> None:
        home.add_known_host(server)
        ours, theirs = pty.openpty()
        arguments = command(*run_arguments(home, server, agent.port))
        with subprocess.Popen(
            ["setsid", "--ctty", *arguments],
            env=home.environ,
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
        ) as process:
            os.close(theirs)
            seen = b""
            while b"Password of" not in seen:
                seen += os.read(ours, 1024)
            eventually(home.command_lines)
            os.write(ours, f"{server.password}\n".encode())
            program = Running(process)
            program.until_state("running")
            agent.disconnect()
            assert program.finish() == 0
        os.close(ours)
        assert server.password not in program.raw


class TestSSHConfig:
    def configure(self, home: Home, *lines: str) -> None:
        (home.ssh / "config").write_text("\n".join(lines) + "\n")

    def attach(self, home: Home, agent: Agent, **environ: str) -> Running:
        arguments = ["run", "desk", "--log-format", "json", "--session", "test", "--graphics-port", str(agent.port)]
        arguments += ["--sessions-root", str(home.path), "--backend", "command", "--", *VIEWER_COMMAND]
        with started(home, *arguments, **environ) as program:
            program.until(lambda event: event.get("dest") == "running" or event["event"] == "connect.failed")
            agent.disconnect()
            program.finish()
            assert program.errors == ""
        return program

    def host(self, name: str, server: LoopbackSSHServer, *more: str) -> list[str]:
        return [f"Host {name}", f"HostName {server.host}", f"Port {server.port}", f"User {server.username}", *more]

    def test_alias_user_port_and_key_come_from_config(
        self, home: Home, server: LoopbackSSHServer, agent: Agent
    ) -> None:
        home.add_known_host(server)
        home.write_key(server, "desk-key")
        (home.ssh / "more").write_text("\n".join(self.host("desk", server, "IdentityFile ~/.ssh/desk-key")))
        self.configure(home, "Include more", "Host *", "IdentityFile ~/.ssh/does-not-exist")
        program = self.attach(home, agent)
        assert program.process.returncode == 0
        assert (program.events[0]["port"], program.events[0]["user"]) == (server.port, server.username)

    def test_proxy_jump_is_followed(self, home: Home, server: LoopbackSSHServer, agent: Agent) -> None:
        with LoopbackSSHServer() as jump:
            for each, name in ((server, "desk-key"), (jump, "jump-key")):
                home.add_known_host(each)
                home.write_key(each, name)
            self.configure(
                home,
                *self.host("gate", jump, "IdentityFile ~/.ssh/jump-key"),
                *self.host("desk", server, "IdentityFile ~/.ssh/desk-key", "ProxyJump gate"),
            )
            program = self.attach(home, agent)
            assert program.process.returncode == 0
            assert program.events[0]["via"] == [f"{jump.host}:{jump.port}"]
            assert jump.channels_opened == 1
            assert server.channels_opened == 1
            jump.wait_for(lambda: jump.connections == 0)

    def test_unknown_jump_host_is_rejected(self, home: Home, server: LoopbackSSHServer, agent: Agent) -> None:
        with LoopbackSSHServer() as jump:
            home.add_known_host(server)
            home.write_key(jump, "jump-key")
            self.configure(
                home,
                *self.host("gate", jump, "IdentityFile ~/.ssh/jump-key"),
                *self.host("desk", server, "ProxyJump gate"),
            )
            program = self.attach(home, agent)
            assert program.process.returncode == 3
            assert program.events[0]["reason"] == "host_key_unknown"
            assert program.events[0]["port"] == jump.port
            assert (jump.channels_opened, server.connections) == (0, 0)

    def test_proxy_jump_none_disables_jump(self, home: Home, server: LoopbackSSHServer, agent: Agent) -> None:
        home.add_known_host(server)
        home.write_key(server, "desk-key")
        self.configure(
            home,
            *self.host("desk", server, "IdentityFile ~/.ssh/desk-key", "ProxyJump none"),
            "Host *",
            "ProxyJump gate",
        )
        program = self.attach(home, agent)
        assert program.events[0]["via"] == []

    def test_user_known_hosts_file_is_honoured(self, home: Home, server: LoopbackSSHServer, agent: Agent) -> None:
        key = server.host_key
        (home.ssh / "elsewhere").write_text(f"the-desk {key.get_name()} {key.get_base64()}\n")
        home.write_key(server, "desk-key")
        more = ("IdentityFile ~/.ssh/desk-key", "UserKnownHostsFile ~/.ssh/elsewhere", "HostKeyAlias the-desk")
        self.configure(home, *self.host("desk", server, *more))
        assert self.attach(home, agent).process.returncode == 0

    @pytest.mark.skipif(shutil.which("ssh-agent") is None, reason="ssh-agent (openssh-client) is missing")
    def test_keys_of_ssh_agent_are_tried(self, home: Home, server: LoopbackSSHServer, agent: Agent) -> None:
        home.add_known_host(server)
        self.configure(home, *self.host("desk", server))
        socket_path = home.path / "agent"
        key = home.write_key(server)
        environ = {**os.environ, "SSH_AUTH_SOCK": str(socket_path)}
        with subprocess.Popen(["ssh-agent", "-D", "-a", socket_path], stdout=subprocess.DEVNULL) as ssh_agent:
            # The socket exists before the agent listens on it.
            eventually(lambda: subprocess.run(["ssh-add", "-q", key], env=environ, check=False).returncode == 0)
            key.unlink()
            program = self.attach(home, agent, SSH_AUTH_SOCK=str(socket_path))
            ssh_agent.terminate()
        assert program.process.returncode == 0

    def test_unparsable_config_is_usage_error(self, home: Home, agent: Agent) -> None:
        self.configure(home, "Match nonsense", "Port 1")
        arguments = ["run", "desk", "--session", "test", "--graphics-port", str(agent.port), "--log-format", "json"]
        program = run(home, *arguments, "--backend", "command", "--", *VIEWER_COMMAND)
        assert program.process.returncode == 2
        assert "~/.ssh/config" in program.events[0]["hint"]


class TestUsageErrors:
    GOOD = ("run", "me@127.0.0.1", "--session", "test", "--graphics-port", "1")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--log-format", "json", "--display", "1"], "cookie"),
            (["--log-format", "json", "--cookie-file", "nowhere"], "nowhere"),
            (["--log-format", "json", "--cookie-file", "-", "--display", "1"], "empty"),
            (["--log-format", "json", "--session", "../x", "--backend", "command", "--", "v", "{port}"], "name"),
            (["--log-format", "json", "--graphics-port", "0", "--backend", "command", "--", "v", "{port}"], "port"),
            (
                ["--log-format", "json", "--agent-host", "a b", "--backend", "command", "--", "v", "{port}"],
                "agent_host",
            ),
            (["--log-format", "json", "--backend", "command"], "command"),
            (["--log-format", "json", "--backend", "command", "--", "viewer"], "{port}"),
            (["--log-format", "json", "--", "viewer", "{port}"], "--backend command"),
            (["--log-format", "json", "--ready-timeout", "0", "--backend", "command", "--", "v", "{port}"], "--ready"),
            (["--log-format", "json", "--key", "nowhere", "--backend", "command", "--", "v", "{port}"], "nowhere"),
            (["--log-format", "json", "--known-hosts", "no", "--backend", "command", "--", "v", "{port}"], "no"),
        ],
    )
    def test_usage_error_is_an_event_if_options_are_parsable(
        self, home: Home, arguments: list[str], words: str
    ) -> None:
        good = [*self.GOOD]
        for option in ("--session", "--graphics-port"):
            if option in arguments:
                del good[(at := good.index(option)) : at + 2]
        program = run(home, *good, *arguments)
        assert program.process.returncode == 2
        (event,) = program.events
        assert event["event"] == "usage.invalid"
        assert words in event["detail"]
        assert program.errors == ""

    def test_invalid_cookie_is_not_shown(self, home: Home) -> None:
        program = run(
            home, *self.GOOD, "--display", "1", "--cookie-file", "-", "--log-format", "json", stdin=f"{COOKIE}0\n"
        )
        assert program.process.returncode == 2
        assert COOKIE not in program.raw

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["run"], "HOST"),
            (["run", "host"], "--session"),
            ([*GOOD, "--backend", "vnc"], '"nx3", "kdrive"'),
            ([*GOOD, "--backend", "kdrive"], "an NX session needs one"),
            ([*GOOD, "--backend", "kdrive", "--", "viewer"], "the backend is kdrive"),
            ([*GOOD, "--port", "70000"], "--port"),
            ([*GOOD, "--nonsense"], "--nonsense"),
            (["nonsense"], "nonsense"),
        ],
    )
    def test_unparsable_options_are_reported_on_standard_error(
        self, home: Home, arguments: list[str], words: str
    ) -> None:
        program = run(home, *arguments)
        assert program.process.returncode == 2
        assert words in program.errors
        assert "Traceback" not in program.process.stdout.read()  # type: ignore[union-attr]

    def test_missing_extra_is_reported_with_install_command(self, home: Home) -> None:
        code = "import sys; sys.modules['cyclopts'] = None; from proxy_fsm.cli import main; sys.exit(main([]))"
        process = subprocess.run(
            [sys.executable, "-c", code], env=home.environ, capture_output=True, text=True, check=False
        )
        assert process.returncode == 2
        assert process.stderr == 'The command line needs its extra: pip install "proxy_fsm[cli]".\n'


def test_help_and_version(home: Home) -> None:
    for arguments, words in (
        (["--version"], "0.1.0"),
        (["--help"], "24: stop_timeout"),
        (["run", "--help"], "--accept-unknown-host"),
        (["demo", "--help"], "--stand-ins"),
    ):
        program = run(home, *arguments)
        assert program.process.returncode == 0
        assert words in program.process.stdout.read()  # type: ignore[union-attr]
