"""The fault matrix: what can go wrong, how it is caused for real, and what a proxy then has to say. One row a fault.

`test_faults.py` runs every row; `fault_table.py` makes docs/faults.md of the rows and of what was measured.
"""

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
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from proxy_fsm import EndReason, SessionInfo, Timeouts
from proxy_fsm.evidence import LinkDead, ProcessExited, ServerAnswered, TransportEnded, WorkerRefused

from .attempt import Attempt, WatchedNX3, WatchedViewer
from .namespace import MOUNTS, NETWORK, in_namespace
from .procs import alive, eventually, program, send_signal
from .relay import Relay
from .service import CLIENT, Service
from .x2go import LOOPBACK, Display, SshServer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from proxy_fsm.evidence import Observation

    from .scene import Scene

WAIT_S = 15.0
# what some rows allow, shorter than by default so that a run takes less time
READY_S, AGENT_CONNECT_S, STOP_GRACE_S, LINK_PROBE_S, LINK_DEAD_S = 3.0, 1.0, 1.0, 0.3, 1.5
# design.md, section 6: from the first sign, or from the proxy's exit, to the final state
DEAD_S, AFTER_EXIT_S = 0.1, 0.02


class When(StrEnum):
    """When a fault strikes."""

    START = "before the start"
    NEGOTIATION = "in negotiation"
    RUNNING = "in mid-session"


@dataclass(frozen=True)
class Fault:
    """A row.

    Attributes:
        cause: Its name.
        when: When it strikes.
        reason: What it ends with.
        says: What the detail names.
        retryable: What the status says.
        again: Whether a second attempt, made for real once the cause is put right, runs.
        python_x2go: What python-x2go reports and after how long (facts.md); empty where that was not measured.
        make: Sets the scene and makes the proxy.
        start: Starts it.
        strike: Causes the fault; None where it is there already.
        listed: The session's status on the server afterwards; empty where that says nothing.
        sign: What is seen of it first; None for the cause itself.
        due_s: So long after the cause it is a fault at all, where `sign` is None.
        end: From when on the time to the final state counts: from the proxy's exit; None for the first sign.
        within_s: How long it may take from the cause to the final state, where something of ours decides that.
        touched: Whether the agent was reached, so that it may be gone.
        unshares: Whether it takes namespaces of its own: mounts, or a network.
        note: What was other than usual when it was measured.
    """

    cause: str
    reason: EndReason
    says: str
    retryable: bool | None
    again: bool
    python_x2go: str = ""
    _: dataclasses.KW_ONLY
    when: When
    make: Callable[[Scene], Attempt] = lambda scene: scene.attempt()
    start: Callable[[Attempt], None] = Attempt.start
    strike: Callable[[Scene, Attempt], object] | None = None
    listed: str = ""
    sign: type[Observation] | str | None = None
    due_s: float = 0.0
    end: type[Observation] | None = None
    within_s: float | None = None
    touched: bool = True
    unshares: bool = False
    note: str = ""

    @property
    def asks_server(self) -> bool:
        """Whether the server's list of sessions, or a resume, has a part in it."""
        return self.when is When.RUNNING and self.touched

    @property
    def final_s(self) -> float:
        """How long it may take from `end` to the final state."""
        return DEAD_S if self.end is None else AFTER_EXIT_S


@dataclass(frozen=True)
class Mishap:
    """A row of the second table: what a session survives.

    Attributes:
        cause: Its name.
        strike: Causes it.
        told: The event that tells of it.
        then: The event that tells that it is over; empty where there is none.
        make: Sets the scene and makes the proxy.
        unshares: The same.
        python_x2go: What python-x2go reports.
    """

    cause: str
    strike: Callable[[Scene, Attempt], object]
    told: str
    then: str = ""
    make: Callable[[Scene], Attempt] = lambda scene: scene.attempt()
    unshares: bool = False
    python_x2go: str = ""


# ---- programs ----


def script(scene: Scene, text: str, *, mode: int = 0o755) -> WatchedNX3:
    """Have a file of this text run in the place of nxproxy."""
    path = scene.runtime / "nxproxy"
    path.write_text(text)
    path.chmod(mode)
    return WatchedNX3(str(path))


def wrapper(scene: Scene, before: str, *, how: str = "exec") -> WatchedNX3:
    """Have the real nxproxy run from within a shell script, which does something before."""
    return script(scene, f'#!/bin/bash\n{before}\n{how} {program("nxproxy")} "$@"\n')


def program_missing(scene: Scene) -> Attempt:
    return scene.attempt(backend=WatchedNX3("nxproxy-that-is-not-there"))


def program_no_executable(scene: Scene) -> Attempt:
    return scene.attempt(backend=script(scene, "no program", mode=0o644))


def program_no_program(scene: Scene) -> Attempt:
    return scene.attempt(backend=script(scene, "no program"))


def program_exits(scene: Scene) -> Attempt:
    return scene.attempt(backend=script(scene, "#!/bin/sh\necho no licence for this machine\nexit 3\n"))


def program_ignores_term(scene: Scene) -> Attempt:
    backend = wrapper(scene, "trap '' TERM", how="")
    return scene.attempt(backend=backend, timeouts=Timeouts(stop_grace_s=STOP_GRACE_S))


def program_leaves_child(scene: Scene) -> Attempt:
    return scene.attempt(backend=wrapper(scene, "sleep 3600 &"))


def program_leaves_runaway(scene: Scene) -> Attempt:
    """The child has a process session of its own: it is not ours to end, and keeps the output open."""
    note = scene.runtime / "runaway"
    attempt = scene.attempt(backend=wrapper(scene, f"setsid sleep 3600 & echo $! > {note}"))
    scene.repairs.callback(lambda: send_signal([int(note.read_text())], signal.SIGKILL))
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
    with Display() as gone:
        pass
    return scene.attempt(environ=scene.environ(DISPLAY=gone.name))


def display_dead(scene: Scene) -> Attempt:
    dead = scene.stack.enter_context(Display())
    dead.kill()
    return scene.attempt(environ=scene.environ(**dead.env))


def display_refuses(scene: Scene) -> Attempt:
    return scene.attempt(environ=scene.environ(XAUTHORITY=str(scene.runtime / "none")))


def on_another_display(scene: Scene) -> Attempt:
    other = scene.stack.enter_context(Display())
    scene.breaker = other.kill
    return scene.attempt(environ=scene.environ(**other.env))


def break_it(scene: Scene, _attempt: Attempt) -> None:
    assert scene.breaker is not None
    scene.breaker()


# ---- what is on this side ----


def root_no_directory(scene: Scene) -> Attempt:
    taken = scene.root.with_name("taken")
    taken.write_text("")
    return scene.attempt(root=taken)


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
    """The program prints more than the disk takes, as soon as it is told to."""
    fifo = scene.runtime / "fifo"
    os.mkfifo(fifo)
    flood = f"(read -r _ < {shlex.quote(str(fifo))}; yes 'so much to say' | head -c 200000; sleep 3600) &"
    return scene.attempt(backend=wrapper(scene, flood), root=small_disk(scene))


def fill_disk(scene: Scene, attempt: Attempt) -> None:
    (scene.runtime / "fifo").write_text("go\n")
    eventually(lambda: attempt.named("process.log_failed"), WAIT_S)


def start_without_writable_directory(attempt: Attempt) -> None:
    """All directories for sockets are on file systems that are read-only; the sessions root is not."""
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
    """Its network has one port, and somebody else has that."""
    only = 40000

    def with_port_taken() -> None:
        with socket.create_server((LOOPBACK, only)):
            attempt.start()
            attempt.wait()

    one_port = f"echo {only} {only} > /proc/sys/net/ipv4/ip_local_port_range"
    in_namespace(NETWORK, [["sh", "-c", one_port], ["ip", "link", "set", "lo", "up"]], with_port_taken)


# ---- agent and SSH server ----


def port_refused(scene: Scene) -> Attempt:
    """Nothing listens on the port, and nothing else can take it."""
    taken = scene.stack.enter_context(socket.socket())
    taken.bind((LOOPBACK, 0))
    session = dataclasses.replace(scene.session, graphics_port=taken.getsockname()[1])
    return scene.attempt(session, timeouts=Timeouts(agent_connect_s=AGENT_CONNECT_S))


def wrong_cookie(scene: Scene) -> Attempt:
    return scene.attempt(dataclasses.replace(scene.session, cookie=token_hex(16)))


def agent_dead(scene: Scene) -> Attempt:
    os.kill(scene.agent.pid, signal.SIGKILL)
    eventually(lambda: not alive(scene.agent.pid), WAIT_S)
    return scene.attempt(timeouts=Timeouts(agent_connect_s=AGENT_CONNECT_S))


def agent_stopped(scene: Scene) -> Attempt:
    """It takes the connection, but says nothing."""
    os.kill(scene.agent.pid, signal.SIGSTOP)
    scene.repairs.callback(send_signal, [scene.agent.pid], signal.SIGCONT)
    return scene.attempt(timeouts=Timeouts(ready_s=READY_S))


def kill_agent_in_negotiation(scene: Scene, attempt: Attempt) -> None:
    eventually(lambda: attempt.named("tunnel.connected"), WAIT_S)
    kill_agent(scene, attempt)


def kill_agent(scene: Scene, _attempt: Attempt) -> None:
    os.kill(scene.agent.pid, signal.SIGKILL)


def asking(scene: Scene) -> Attempt:
    return scene.attempt(ask_server=True)


def suspend(scene: Scene, _attempt: Attempt) -> None:
    scene.server.suspend(scene.admin, scene.agent.name)


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
    relay = scene.stack.enter_context(Relay(scene.server.port))
    scene.client = scene.stack.enter_context(contextlib.closing(scene.server.connect(port=relay.port)))
    scene.breaker = relay.reset
    return scene.attempt()


def impatient(scene: Scene) -> Attempt:
    return scene.attempt(timeouts=Timeouts(link_probe_s=LINK_PROBE_S, link_dead_s=LINK_DEAD_S, kill_s=1))


def patient(scene: Scene) -> Attempt:
    return scene.attempt(timeouts=Timeouts(link_probe_s=LINK_PROBE_S))


def stop_server(scene: Scene, _attempt: Attempt) -> None:
    pids = scene.server.session_pids(scene.client)
    scene.repairs.callback(send_signal, pids, signal.SIGCONT)
    send_signal(pids, signal.SIGSTOP)


def stop_server_for_a_while(scene: Scene, attempt: Attempt) -> None:
    stop_server(scene, attempt)
    eventually(lambda: attempt.named("link.silent"), WAIT_S)
    scene.repairs.close()
    eventually(lambda: attempt.named("link.restored"), WAIT_S)


# ---- any viewer ----


def viewer(scene: Scene, *before: str, **options: Any) -> Attempt:
    """A script that talks to a service behind the SSH server, as a viewer would."""
    service = scene.stack.enter_context(Service())
    backend = WatchedViewer([*before, sys.executable, "-c", CLIENT, "{host}", "{port}"], **options)
    return scene.attempt(SessionInfo(name="viewer", graphics_port=service.port), backend=backend)


def window(scene: Scene) -> Attempt:
    """The same in a window."""
    return viewer(scene, "xterm", "-T", "a-viewer", "-e", needs_display=True)


def close_window(scene: Scene, _attempt: Attempt) -> None:
    scene.display.close_window("a-viewer")


# ---- the tables ----

E, EXIT = EndReason, ProcessExited
START = partial(Fault, when=When.START, touched=False)
NEGOTIATION = partial(Fault, when=When.NEGOTIATION)
RUNNING = partial(Fault, when=When.RUNNING)
YES, NO, OPEN, RUNS, CANNOT = True, False, None, True, False
# what nxproxy says
BROKEN, CAUGHT = "Failure reading from the peer proxy", "Waiting the cleanup timeout"
REFUSED = "The remote NX proxy closed the connection"

NO_REASON = "not ok, no reason; {}"
MISSING_X2GO = "`(None, False)`, no reason; 16.0 s"
NO_DISPLAY_X2GO = "`ok()` true for 5–15 s, then false, no reason"
REFUSED_X2GO, COOKIE_X2GO = NO_REASON.format("8.4 s"), NO_REASON.format("0.4 s")
KILLED_X2GO = "`ok()` false when next polled; no event, no reason"
DROPPED_X2GO = "`ok()` false, no reason; 0.2 s"
SILENT_X2GO = "`ok()` still true at 40 s"
LEFT_X2GO = "`ok()` false, cannot tell which; 1.2–1.5 s"

SHORT_CONNECT = f"`agent_connect_s` is {AGENT_CONNECT_S:g} s here, by default {Timeouts().agent_connect_s:g} s"
CALLED = "from the call of the server's script"
SHORT_READY = f"`ready_s` is {READY_S:g} s here, by default {Timeouts().ready_s:g} s"
SHORT_GRACE = f"`stop_grace_s` is {STOP_GRACE_S:g} s here, by default {Timeouts().stop_grace_s:g} s"
SHORT_DEAD = f"`link_dead_s` is {LINK_DEAD_S:g} s here, by default {Timeouts().link_dead_s:g} s"
# fmt: off
# cause, reason, what the detail names, retryable, whether a second attempt runs, python-x2go
FAULTS: tuple[Fault, ...] = (
    START("program missing", E.PROXY_NOT_FOUND, "was not found", YES, RUNS, MISSING_X2GO, make=program_missing),
    START("program not executable", E.PROXY_NOT_STARTABLE, "not an executable", YES, RUNS, make=program_no_executable),
    START("program is no program", E.PROXY_NOT_STARTABLE, "Exec format error", YES, RUNS, make=program_no_program),
    START("program exits at once", E.PROXY_EXITED, 'its last line: "no licence for this machine".', YES, RUNS,
          make=program_exits, sign=EXIT),
    START("DISPLAY unset", E.DISPLAY_UNAVAILABLE, "DISPLAY", YES, RUNS, NO_DISPLAY_X2GO, make=display_unset),
    START("X server absent", E.DISPLAY_UNAVAILABLE, "X server", YES, RUNS, NO_DISPLAY_X2GO, make=display_absent),
    START("X server dead", E.DISPLAY_UNAVAILABLE, "X server", YES, RUNS, NO_DISPLAY_X2GO, make=display_dead),
    START("X server refuses", E.DISPLAY_UNAVAILABLE, "X server", YES, RUNS, NO_DISPLAY_X2GO, make=display_refuses),
    START("sessions root is no directory", E.LISTEN_FAILED, "taken", YES, RUNS, make=root_no_directory),
    START("disk full", E.LISTEN_FAILED, "No space left on device", YES, RUNS, make=disk_full, unshares=True),
    START("no directory for the socket", E.LISTEN_FAILED, "no temporary directory is writable", YES, RUNS,
          start=start_without_writable_directory, unshares=True),
    START("socket's path unfit for nxproxy", E.LISTEN_FAILED, "a,b", YES, RUNS, make=comma_in_path),
    START("no free TCP port", E.LISTEN_FAILED, "Address already in use", YES, RUNS,
          make=viewer, start=start_without_free_port, unshares=True),
    START("SSH connection closed before", E.TRANSPORT_LOST, "The SSH connection", YES, RUNS, make=transport_closed),
    START("forwarding denied", E.FORWARDING_DENIED, "does not allow forwarding", YES, RUNS,
          make=forwarding_denied, sign=WorkerRefused, end=EXIT),
    START("graphics port refused", E.AGENT_UNREACHABLE, "nothing listens there", OPEN, RUNS, REFUSED_X2GO,
          make=port_refused, sign=WorkerRefused, end=EXIT, within_s=AGENT_CONNECT_S + DEAD_S, note=SHORT_CONNECT),
    START("agent killed before", E.AGENT_UNREACHABLE, "nothing listens there", OPEN, CANNOT,
          make=agent_dead, touched=True, sign=WorkerRefused, end=EXIT, within_s=AGENT_CONNECT_S + DEAD_S,
          note=SHORT_CONNECT),

    NEGOTIATION("wrong cookie", E.NEGOTIATION_FAILED, "cookie is wrong, or the agent has gone", NO, CANNOT,
                COOKIE_X2GO, make=wrong_cookie, sign=REFUSED, end=EXIT),
    NEGOTIATION("agent killed in negotiation", E.NEGOTIATION_FAILED, "the agent has gone", NO, CANNOT,
                make=agent_stopped, strike=kill_agent_in_negotiation, sign=REFUSED, end=EXIT),
    NEGOTIATION("agent silent in negotiation", E.START_TIMEOUT, "the proxy's sign that the session stands", NO, CANNOT,
                make=agent_stopped, due_s=READY_S, end=EXIT, note=SHORT_READY),

    RUNNING("agent killed", E.PEER_LOST, "lost the agent", OPEN, CANNOT,
            strike=kill_agent, sign=BROKEN, end=EXIT),
    RUNNING("session suspended", E.SESSION_ENDED, "suspended or terminated", OPEN, RUNS, LEFT_X2GO,
            strike=suspend, listed="S", sign=EXIT, note=CALLED),
    RUNNING("session terminated", E.SESSION_ENDED, "suspended or terminated", OPEN, CANNOT, LEFT_X2GO,
            strike=terminate, listed="-", sign=EXIT, note=CALLED),
    RUNNING("session suspended, server asked", E.SESSION_SUSPENDED, "was suspended", YES, RUNS, LEFT_X2GO,
            make=asking, strike=suspend, listed="S", sign=ServerAnswered, note=CALLED),
    RUNNING("session terminated, server asked", E.SESSION_TERMINATED, "was terminated", NO, CANNOT, LEFT_X2GO,
            make=asking, strike=terminate, listed="-", sign=ServerAnswered, note=CALLED),
    RUNNING("X server killed", E.DISPLAY_LOST, "The X server has gone", YES, RUNS,
            make=on_another_display, strike=break_it, listed="S", end=EXIT),
    RUNNING("proxy killed (SIGKILL)", E.PROXY_KILLED, "SIGKILL", YES, RUNS, KILLED_X2GO,
            strike=kill_proxy, listed="S"),
    RUNNING("proxy crashes (SIGSEGV)", E.PROXY_KILLED, "SIGSEGV", YES, RUNS,
            strike=crash_proxy, listed="S"),
    RUNNING("proxy told to end (SIGTERM)", E.PROXY_KILLED, "TERM, INT or HUP", YES, RUNS,
            strike=terminate_proxy, listed="S", sign=CAUGHT, end=EXIT),
    RUNNING("proxy leaves a child", E.PROXY_KILLED, "SIGKILL", YES, RUNS,
            make=program_leaves_child, strike=kill_proxy, listed="S"),
    RUNNING("proxy leaves a child of another process session", E.PROXY_KILLED, "SIGKILL", YES, RUNS,
            make=program_leaves_runaway, strike=kill_proxy, listed="S"),
    RUNNING("stopped, ignores SIGTERM", E.STOP_REQUESTED, "asked to stop", YES, RUNS,
            make=program_ignores_term, strike=stop_proxy, listed="S", end=EXIT,
            within_s=STOP_GRACE_S + DEAD_S, note=SHORT_GRACE),
    RUNNING("SSH connection closed by the server", E.TRANSPORT_LOST, "SSH connection ended", YES, RUNS, DROPPED_X2GO,
            strike=end_connection, listed="S", sign=TransportEnded),
    RUNNING("SSH connection closed by the client", E.TRANSPORT_LOST, "SSH connection ended", YES, RUNS,
            strike=close_connection, listed="S"),
    RUNNING("SSH connection cut (reset)", E.TRANSPORT_LOST, "SSH connection ended", YES, RUNS,
            make=through_relay, strike=break_it, listed="S"),
    RUNNING("SSH server silent for good", E.TRANSPORT_SILENT, "has not been heard", YES, RUNS, SILENT_X2GO,
            make=impatient, strike=stop_server, listed="S", sign=LinkDead, within_s=LINK_DEAD_S + DEAD_S,
            note=SHORT_DEAD),
    RUNNING("viewer closed by its user", E.VIEWER_CLOSED, "was closed", YES, RUNS,
            make=window, strike=close_window, sign=EXIT, touched=False),
)

# cause, how, what is told of it, and of its end
MISHAPS: tuple[Mishap, ...] = (
    Mishap("SSH server silent for a while", stop_server_for_a_while, "link.silent", "link.restored", patient),
    Mishap("disk fills up", fill_disk, "process.log_failed", make=disk_fills_up, unshares=True),
)
# fmt: on

CAUSES = (*(fault.cause for fault in FAULTS), *(mishap.cause for mishap in MISHAPS))
