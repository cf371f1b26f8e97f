"""Record what the real nxproxy prints, for each way in which a session can go.

Run as root, from the root of the repository: `python -m tests.data.record_nxproxy [NAME…]`. Without names all
recordings are made anew, and `tests/data/nxproxy/README.md` with them.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

from tests.e2e.byhand import ESTABLISHED, Forwarder, NxProxy
from tests.e2e.procs import missing_programs
from tests.e2e.x2go import RED_XTERM, AgentSession, Display, X2GoServer, kill
from tests.helpers.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import paramiko

DIRECTORY = Path(__file__).parent / "nxproxy"
EXIT_S = 60.0
RED = (255, 0, 0)
NO_COOKIE = "0" * 32
CONNECTED = "Connected to remote proxy"
README = """\
# What nxproxy really prints

Made by `python -m tests.data.record_nxproxy`; do not edit. All programs ran on one machine: {versions}.

nxproxy was called as `nxproxy -S`, its options in `NX_DISPLAY`, `connect=unix:PATH` in front; behind PATH was
a plain forwarder that opens a channel through OpenSSH's sshd to the agent's graphics port. No `errors=` was
given, so all that it has to say stands in its output.

- `NAME.txt`: standard output and standard error together, byte by byte; should a cookie occur, it reads
  as 32 zeros;
- `NAME.times`: what happened when, tab-separated: seconds since nxproxy was started; `line`, `action` or
  `exit`; the number of the line in `NAME.txt` (from 1), what was done, or the exit status (negative: the
  signal).

The times are those of one run. "Ready" is the line `{established}.`; "left" is how long
after the action nxproxy ended (where there was no action, after its start).

| recording | caused by | ready (s) | left (s) | exit | last lines |
|---|---|---|---|---|---|
{rows}
"""


@dataclass
class Scene:
    """What a recording has to work with."""

    server: X2GoServer
    client: paramiko.SSHClient
    display: Display
    agent: AgentSession | None = None
    cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def start_agent(self, command: str | None = None) -> AgentSession:
        """Start an agent; a client starts the command only when its proxy runs."""
        self.agent = self.server.start_agent(self.client, command=command)
        return self.agent

    def forward(self, port: int, client: paramiko.SSHClient | None = None) -> Forwarder:
        """Make a way to `port`."""
        return self.cleanup.enter_context(Forwarder(client or self.client, port))

    def proxy(
        self,
        session: AgentSession,
        forwarder: Forwarder,
        environment: Mapping[str, str] | None = None,
        cookie: str | None = None,
    ) -> NxProxy:
        """Start nxproxy."""
        proxy = NxProxy(session, forwarder.path, environment or self.display.env, cookie=cookie)
        return self.cleanup.enter_context(proxy)

    def painted(self) -> tuple[AgentSession, Forwarder, NxProxy]:
        """Bring a session so far that the xterm can be seen."""
        agent = self.start_agent(RED_XTERM)
        forwarder = self.forward(agent.graphics_port)
        proxy = self.proxy(agent, forwarder)
        proxy.wait_for(ESTABLISHED)
        eventually(lambda: self.display.share_of(RED) > 0.1, 20.0)
        return agent, forwarder, proxy

    def negotiating(self) -> tuple[AgentSession, Forwarder, NxProxy]:
        """Bring nxproxy so far that it waits for the answer of an agent that is stopped."""
        agent = self.start_agent()
        os.kill(agent.pid, signal.SIGSTOP)
        forwarder = self.forward(agent.graphics_port)
        proxy = self.proxy(agent, forwarder)
        proxy.wait_for(CONNECTED)
        eventually(lambda: forwarder.bytes_up > 0, 10.0)
        return agent, forwarder, proxy


def signalled(scene: Scene, number: signal.Signals) -> NxProxy:
    """Send nxproxy a signal in mid-session."""
    _, _, proxy = scene.painted()
    proxy.send(number)
    return proxy


def sigterm(scene: Scene) -> NxProxy:
    """Send SIGTERM in mid-session."""
    return signalled(scene, signal.SIGTERM)


def sigint(scene: Scene) -> NxProxy:
    """Send SIGINT in mid-session."""
    return signalled(scene, signal.SIGINT)


def sighup(scene: Scene) -> NxProxy:
    """Send SIGHUP in mid-session."""
    return signalled(scene, signal.SIGHUP)


def sigkill(scene: Scene) -> NxProxy:
    """Send SIGKILL in mid-session."""
    return signalled(scene, signal.SIGKILL)


def suspended(scene: Scene) -> NxProxy:
    """Suspend the session on the server (`x2gosuspend-session`)."""
    agent, _, proxy = scene.painted()
    proxy.note("action", "x2gosuspend-session called")
    scene.server.suspend(scene.client, agent.name)
    proxy.note("action", "x2gosuspend-session returned")
    return proxy


def terminated(scene: Scene) -> NxProxy:
    """Terminate the session on the server (`x2goterminate-session`)."""
    agent, _, proxy = scene.painted()
    proxy.note("action", "x2goterminate-session called")
    scene.server.terminate(scene.client, agent.name)
    proxy.note("action", "x2goterminate-session returned")
    return proxy


def resumed_suspended(scene: Scene) -> NxProxy:
    """Suspend a session that had been resumed."""
    agent, forwarder, proxy = scene.painted()
    proxy.send(signal.SIGTERM)
    proxy.wait_exit()
    scene.server.wait_status(scene.client, agent.name, "S")
    ports = scene.server.resume(scene.client, agent)
    forwarder = scene.forward(ports.graphics_port)
    proxy = scene.proxy(agent, forwarder)
    proxy.wait_for(ESTABLISHED)
    eventually(lambda: scene.display.share_of(RED) > 0.1, 20.0)
    proxy.note("action", "x2gosuspend-session called")
    scene.server.suspend(scene.client, agent.name)
    proxy.note("action", "x2gosuspend-session returned")
    return proxy


def agent_killed(scene: Scene) -> NxProxy:
    """Kill the agent in mid-session (SIGKILL)."""
    agent, _, proxy = scene.painted()
    proxy.note("action", "SIGKILL to the agent")
    kill(agent.pid)
    return proxy


def agent_killed_negotiating(scene: Scene) -> NxProxy:
    """Kill the agent, stopped before nxproxy came, once nxproxy waits for its answer."""
    agent, _, proxy = scene.negotiating()
    proxy.note("action", "SIGKILL to the agent")
    kill(agent.pid)
    return proxy


def wrong_cookie(scene: Scene) -> NxProxy:
    """Give nxproxy another session cookie than the agent has."""
    agent = scene.start_agent()
    return scene.proxy(agent, scene.forward(agent.graphics_port), cookie=token_hex(16))


def port_refused(scene: Scene) -> NxProxy:
    """Forward to a port where nothing listens: the channel is refused, and the local connection closed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    session = AgentSession(50, token_hex(16), 1, "nobody-50-1_stDxterm_dp24", port, 0, 0, "D", "")
    forwarder = scene.forward(port)
    proxy = scene.proxy(session, forwarder)
    proxy.wait_exit(EXIT_S)
    if not forwarder.refused:
        raise RuntimeError("The channel was not refused.")
    return proxy


def nobody_listens(scene: Scene) -> NxProxy:
    """Give nxproxy a socket path that is not there."""
    session = AgentSession(50, token_hex(16), 1, "nobody-50-1_stDxterm_dp24", 1, 0, 0, "D", "")
    forwarder = scene.forward(1)
    forwarder.path = forwarder.path.with_name("none")
    return scene.proxy(session, forwarder)


def x_absent(scene: Scene) -> NxProxy:
    """Name a display where there is no X server."""
    agent = scene.start_agent()
    scene.display.stop()
    environment = {"DISPLAY": scene.display.name, "XAUTHORITY": "/nonexistent"}
    return scene.proxy(agent, scene.forward(agent.graphics_port), environment)


def x_unset(scene: Scene) -> NxProxy:
    """Leave DISPLAY empty."""
    agent = scene.start_agent()
    return scene.proxy(agent, scene.forward(agent.graphics_port), {"DISPLAY": ""})


def x_refused_with_command(scene: Scene) -> NxProxy:
    """Give nxproxy another X cookie than the X server has; a command waits in the session."""
    return x_refused(scene, RED_XTERM)


def x_refused(scene: Scene, command: str | None = None) -> NxProxy:
    """Give nxproxy another X cookie than the X server has."""
    agent = scene.start_agent(command)
    authority = scene.display.xauthority.with_name("wrong")
    authority.touch(mode=0o600)
    command = f"add {scene.display.name} MIT-MAGIC-COOKIE-1 {token_hex(16)}\n"
    subprocess.run(["xauth", "-q", "-f", authority, "source", "-"], input=command.encode(), check=True)
    environment = {**scene.display.env, "XAUTHORITY": str(authority)}
    return scene.proxy(agent, scene.forward(agent.graphics_port), environment)


def x_killed(scene: Scene) -> NxProxy:
    """Kill the X server in mid-session (SIGKILL)."""
    _, _, proxy = scene.painted()
    proxy.note("action", "SIGKILL to the X server")
    scene.display.kill()
    return proxy


def tunnel_cut(scene: Scene) -> NxProxy:
    """Close nxproxy's connection in mid-session, as when the forwarder dies."""
    _, forwarder, proxy = scene.painted()
    proxy.note("action", "connection closed by the forwarder")
    forwarder.cut()
    return proxy


def tunnel_cut_negotiating(scene: Scene) -> NxProxy:
    """Close nxproxy's connection while it waits for the answer of a stopped agent."""
    _, forwarder, proxy = scene.negotiating()
    proxy.note("action", "connection closed by the forwarder")
    forwarder.cut()
    return proxy


def ssh_killed(scene: Scene) -> NxProxy:
    """Kill the server's end of the SSH connection in mid-session (SIGKILL to its processes)."""
    _, _, proxy = scene.painted()
    proxy.note("action", "SIGKILL to the connection's sshd")
    for pid in scene.server.session_pids(scene.client):
        kill(pid)
    return proxy


SCENARIOS: tuple[Callable[[Scene], NxProxy], ...] = (
    *(sigterm, sigint, sighup, sigkill, suspended, terminated, resumed_suspended),
    *(agent_killed, agent_killed_negotiating, wrong_cookie, port_refused, nobody_listens),
    *(
        x_absent,
        x_unset,
        x_refused,
        x_refused_with_command,
        x_killed,
        tunnel_cut,
        tunnel_cut_negotiating,
        ssh_killed,
    ),
)


def record(server: X2GoServer, scenario: Callable[[Scene], NxProxy]) -> None:
    """Make one recording."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(contextlib.closing(server.connect()))
        scene = Scene(server, client, stack.enter_context(Display()))
        stack.callback(server.cleanup)
        stack.enter_context(scene.cleanup)
        proxy = scenario(scene)
        proxy.wait_exit(EXIT_S)
        output = proxy.output
        for cookie in {scene.agent.cookie if scene.agent else NO_COOKIE, *cookies_of(proxy)}:
            output = output.replace(cookie.encode(), NO_COOKIE.encode())
        (DIRECTORY / f"{scenario.__name__}.txt").write_bytes(output)
        (DIRECTORY / f"{scenario.__name__}.times").write_text(times_of(proxy))


def cookies_of(proxy: NxProxy) -> list[str]:
    """Give the cookies that nxproxy was given."""
    return re.findall(r"cookie=([0-9a-f]+)", proxy.options)


def times_of(proxy: NxProxy) -> str:
    """Give what happened when, in the form of the `.times` files."""
    rows, number = [], 0
    for moment in sorted(proxy.moments):
        number += moment.kind == "line"
        what = str(number) if moment.kind == "line" else moment.what
        rows.append(f"{moment.at_s:.6f}\t{moment.kind}\t{what}\n")
    return "".join(rows)


def row_of(scenario: Callable[[Scene], NxProxy]) -> str:
    """Describe one recording for the README."""
    lines = (DIRECTORY / f"{scenario.__name__}.txt").read_text(errors="replace").splitlines()
    times = (DIRECTORY / f"{scenario.__name__}.times").read_text().splitlines()
    ready, acted, left, status = "-", 0.0, 0.0, ""
    for at, kind, what in (row.split("\t") for row in times):
        if kind == "line" and ESTABLISHED in lines[int(what) - 1]:
            ready = f"{float(at):.3f}"
        elif kind == "action" and not what.endswith("returned"):
            acted = float(at)
        elif kind == "exit":
            left, status = float(at) - acted, what
    plain = [line for line in lines if line and not line.startswith("Session: ")]
    last = "; ".join(f"`{line}`" for line in plain[-2:])
    caused = (scenario.__doc__ or "").removesuffix(".")
    return f"| `{scenario.__name__}` | {caused} | {ready} | {left:.3f} | {status} | {last} |"


def versions() -> str:
    """Tell the versions of the programs that took part."""
    packages = ["nxproxy", "nxagent", "x2goserver", "openssh-server", "xvfb"]
    command = ["dpkg-query", "--show", "--showformat=${Package} ${Version}, ", *packages]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.removesuffix(", ")


def main(names: list[str]) -> None:
    """Record the scenarios of these names, or all of them."""
    if missing := missing_programs():
        raise SystemExit(f"missing: {', '.join(missing)}")
    DIRECTORY.mkdir(exist_ok=True)
    with X2GoServer() as server:
        for scenario in SCENARIOS:
            if not names or scenario.__name__ in names:
                sys.stdout.write(f"{scenario.__name__}\n")
                record(server, scenario)
    rows = "\n".join(row_of(scenario) for scenario in SCENARIOS)
    text = README.format(versions=versions(), established=ESTABLISHED, rows=rows)
    (DIRECTORY / "README.md").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
