"""How each fault of the matrix is caused for real: functions that make a proxy in a scene, and those that strike it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from functools import partial
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from proxy_fsm import SessionInfo
from proxy_fsm.server import SessionOptions, X2GoServer
from tests.helpers.wait import eventually

from .attempt import Attempt, WatchedNX3, WatchedViewer
from .namespace import MOUNTS, NETWORK, in_namespace
from .procs import alive, program, send_signal
from .relay import Relay
from .service import CLIENT, Service
from .x2go import LOOPBACK, Display, SshServer, transport_of

if TYPE_CHECKING:
    from pathlib import Path

    from .scene import Scene

REPORTED_S = 15.0  # time limit for the report of a mishap


def healthy(scene: Scene) -> Attempt:
    return scene.attempt()


# ---- programs ----


def script(scene: Scene, text: str, *, mode: int = 0o755) -> WatchedNX3:
    """Run a file with this text in place of nxproxy."""
    path = scene.runtime / "nxproxy"
    path.write_text(text)
    path.chmod(mode)
    return WatchedNX3(str(path))


def wrapper(scene: Scene, before: str, *, how: str = "exec") -> WatchedNX3:
    """Run the real nxproxy from a shell script that does something first."""
    return script(scene, f'#!/bin/bash\n{before}\n{how} {program("nxproxy")} "$@"\n')


def program_missing(scene: Scene) -> Attempt:
    return scene.attempt(backend=WatchedNX3("nxproxy-that-is-not-there"))


def program_not_executable(scene: Scene) -> Attempt:
    return scene.attempt(backend=script(scene, "no program", mode=0o644))


def program_bad_format(scene: Scene) -> Attempt:
    return scene.attempt(backend=script(scene, "no program"))


def program_exits(scene: Scene) -> Attempt:
    return scene.attempt(backend=script(scene, "#!/bin/sh\necho no licence for this machine\nexit 3\n"))


def program_ignores_term(scene: Scene) -> Attempt:
    return scene.attempt(backend=wrapper(scene, "trap '' TERM", how=""))


def program_leaves_child(scene: Scene) -> Attempt:
    return scene.attempt(backend=wrapper(scene, "sleep 3600 &"))


def program_leaves_runaway(scene: Scene) -> Attempt:
    """The child has a process session of its own: it is not ours to kill, and keeps the output open."""
    pid_file = scene.runtime / "runaway"
    attempt = scene.attempt(backend=wrapper(scene, f"setsid sleep 3600 & echo $! > {pid_file}"))
    scene.repairs.callback(lambda: send_signal([int(pid_file.read_text())], signal.SIGKILL))
    return attempt


def signal_proxy(number: signal.Signals, _scene: Scene, attempt: Attempt) -> None:
    os.kill(attempt.proxy.status().pid or 0, number)


kill_proxy = partial(signal_proxy, signal.SIGKILL)
crash_proxy = partial(signal_proxy, signal.SIGSEGV)
terminate_proxy = partial(signal_proxy, signal.SIGTERM)


def stop_proxy(_scene: Scene, attempt: Attempt) -> None:
    attempt.proxy.stop()


# ---- the X server ----


def display_unset(scene: Scene) -> Attempt:
    return scene.attempt(environ=scene.environ(DISPLAY=None))


def display_absent(scene: Scene) -> Attempt:
    with Display() as stopped:
        pass
    return scene.attempt(environ=scene.environ(DISPLAY=stopped.name))


def display_dead(scene: Scene) -> Attempt:
    dead = scene.stack.enter_context(Display())
    dead.kill()
    return scene.attempt(environ=scene.environ(**dead.env))


def display_refuses(scene: Scene) -> Attempt:
    return scene.attempt(environ=scene.environ(XAUTHORITY=str(scene.runtime / "none")))


def on_another_display(scene: Scene) -> Attempt:
    scene.other_display = scene.stack.enter_context(Display())
    return scene.attempt(environ=scene.environ(**scene.other_display.env))


def kill_display(scene: Scene, _attempt: Attempt) -> None:
    assert scene.other_display is not None
    scene.other_display.kill()


# ---- the local machine ----


def root_not_a_directory(scene: Scene) -> Attempt:
    file = scene.root.with_name("taken")
    file.write_text("")
    return scene.attempt(root=file)


def small_disk(scene: Scene) -> Path:
    """Mount a file system with room for 64 KiB."""
    disk = scene.runtime / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "pfsm", disk], check=True)
    scene.stack.callback(partial(subprocess.run, check=True), ["umount", disk])
    return disk


def disk_full(scene: Scene) -> Attempt:
    disk = small_disk(scene)
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    scene.repairs.callback(filler.unlink, missing_ok=True)
    return scene.attempt(root=disk)


def disk_fills_up(scene: Scene) -> Attempt:
    """The program prints more than the disk can hold, as soon as it is triggered."""
    fifo = scene.runtime / "fifo"
    os.mkfifo(fifo)
    flood = f"(read -r _ < {shlex.quote(str(fifo))}; yes 'so much to say' | head -c 200000; sleep 3600) &"
    return scene.attempt(backend=wrapper(scene, flood), root=small_disk(scene))


def fill_disk(scene: Scene, attempt: Attempt) -> None:
    (scene.runtime / "fifo").write_text("go\n")
    eventually(lambda: attempt.named("process.log_failed"), REPORTED_S)


def start_without_writable_directory(attempt: Attempt) -> None:
    """All directories for sockets are on read-only file systems; the sessions root is not."""
    root = attempt.root
    root.mkdir(parents=True, exist_ok=True)
    commands = [["mount", "--make-rprivate", "/"], ["mount", "--bind", str(root), str(root)]]
    for directory in sorted({tempfile.gettempdir(), "/tmp"}):
        commands += [["mount", "--rbind", directory, directory], ["mount", "-o", "remount,bind,ro", directory]]
    in_namespace(MOUNTS, commands, attempt.start)


def comma_in_path(scene: Scene) -> Attempt:
    directory = scene.runtime / "a,b"
    directory.mkdir()
    return scene.attempt(environ=scene.environ(XDG_RUNTIME_DIR=str(directory)))


def start_without_free_port(attempt: Attempt) -> None:
    """Its network has a single port, and that is in use."""
    only = 40000

    def start_with_port_in_use() -> None:
        with socket.create_server((LOOPBACK, only)):
            attempt.start()
            attempt.wait()

    one_port = f"echo {only} {only} > /proc/sys/net/ipv4/ip_local_port_range"
    in_namespace(NETWORK, [["sh", "-c", one_port], ["ip", "link", "set", "lo", "up"]], start_with_port_in_use)


# ---- agent and SSH server ----


def port_refused(scene: Scene) -> Attempt:
    """Nothing listens on the port, and nothing else can bind it."""
    bound = scene.stack.enter_context(socket.socket())
    bound.bind((LOOPBACK, 0))
    session = dataclasses.replace(scene.session, graphics_port=bound.getsockname()[1])
    return scene.attempt(session)


def wrong_cookie(scene: Scene) -> Attempt:
    return scene.attempt(dataclasses.replace(scene.session, cookie=token_hex(16)))


def resumed(scene: Scene) -> SessionInfo:
    """Establish, suspend and resume the session: its agent then waits on a new port."""
    first = scene.attempt().run()
    scene.wait_resilient(first)
    first.proxy.stop()
    scene.server.wait_status(scene.admin, scene.agent.name, "S")
    return scene.resumed()


def resumed_wrong_cookie(scene: Scene) -> Attempt:
    return scene.attempt(dataclasses.replace(resumed(scene), cookie=token_hex(16)), resumed=True)


def resumed_agent_stopped(scene: Scene) -> Attempt:
    return agent_stopped(scene, resumed(scene), resumed=True)


def agent_dead(scene: Scene) -> Attempt:
    os.kill(scene.agent.pid, signal.SIGKILL)
    eventually(lambda: not alive(scene.agent.pid))
    return scene.attempt()


def agent_stopped(scene: Scene, session: SessionInfo | None = None, **options: Any) -> Attempt:
    """The kernel accepts the connection, but the agent sends nothing."""
    os.kill(scene.agent.pid, signal.SIGSTOP)
    scene.repairs.callback(send_signal, [scene.agent.pid], signal.SIGCONT)
    return scene.attempt(session, **options)


def start_and_connect(attempt: Attempt) -> None:
    attempt.start()
    eventually(lambda: attempt.named("tunnel.connected"))


def kill_agent(scene: Scene, _attempt: Attempt) -> None:
    os.kill(scene.agent.pid, signal.SIGKILL)


def asking(scene: Scene) -> Attempt:
    return scene.attempt(ask_server=True)


def suspend(scene: Scene, _attempt: Attempt) -> None:
    scene.server.suspend(scene.admin, scene.agent.name)


def take_over(scene: Scene, _attempt: Attempt) -> None:
    """Another client resumes the session, and leaves it again when the repairs are made."""
    X2GoServer(transport_of(scene.admin)).resume(scene.agent.name, SessionOptions(link="lan"), take_over=True)
    scene.repairs.callback(scene.server.suspend, scene.admin, scene.agent.name)


def terminate(scene: Scene, _attempt: Attempt) -> None:
    scene.server.terminate(scene.admin, scene.agent.name)


def forwarding_denied(scene: Scene) -> Attempt:
    server = scene.stack.enter_context(SshServer(extra_config="AllowTcpForwarding no"))
    client = scene.stack.enter_context(contextlib.closing(server.connect()))
    return scene.attempt(client=client)


def transport_closed(scene: Scene) -> Attempt:
    client = scene.server.connect()
    attempt = scene.attempt(client=client)
    client.close()
    return attempt


def end_connection(scene: Scene, _attempt: Attempt) -> None:
    send_signal(scene.server.session_pids(scene.client), signal.SIGTERM)


def close_connection(scene: Scene, _attempt: Attempt) -> None:
    scene.client.close()


def through_relay(scene: Scene) -> Attempt:
    scene.relay = scene.stack.enter_context(Relay(scene.server.port))
    scene.client = scene.stack.enter_context(contextlib.closing(scene.server.connect(port=scene.relay.port)))
    return scene.attempt()


def cut_connection(scene: Scene, _attempt: Attempt) -> None:
    assert scene.relay is not None
    scene.relay.reset()


def stop_server(scene: Scene, _attempt: Attempt) -> None:
    pids = scene.server.session_pids(scene.client)
    scene.repairs.callback(send_signal, pids, signal.SIGCONT)
    send_signal(pids, signal.SIGSTOP)


def stop_server_for_a_while(scene: Scene, attempt: Attempt) -> None:
    stop_server(scene, attempt)
    eventually(lambda: attempt.named("link.silent"), REPORTED_S)
    scene.repairs.close()
    eventually(lambda: attempt.named("link.restored"), REPORTED_S)


# ---- any viewer ----


def viewer(scene: Scene, *before: str, **options: Any) -> Attempt:
    """A script that connects to a service behind the SSH server, as a viewer would."""
    service = scene.stack.enter_context(Service())
    backend = WatchedViewer([*before, sys.executable, "-c", CLIENT, "{host}", "{port}"], **options)
    return scene.attempt(SessionInfo(name="viewer", graphics_port=service.port), backend=backend)


def window(scene: Scene) -> Attempt:
    """The same in a window."""
    return viewer(scene, "xterm", "-T", "a-viewer", "-e", needs_display=True)


def close_window(scene: Scene, _attempt: Attempt) -> None:
    scene.display.close_window("a-viewer")
