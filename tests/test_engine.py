"""The engine with scripted proxies and an embedded SSH server: its rules, its threads, its limits."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm import (
    Backend,
    CommandBackend,
    EndReason,
    Evidence,
    InvalidSession,
    InvalidTransition,
    NX3Backend,
    Proxy,
    ProxyFailed,
    ProxyStopped,
    State,
    Timeouts,
    TransitionRecord,
)
from proxy_fsm.testing import Forwarding, LoopbackSSHServer
from proxy_fsm.testing.scripted import (
    Gate,
    ScriptedProxy,
    Step,
    connect,
    die_by,
    exit_with,
    fork_holding_output,
    ignore,
    on_signal,
    pause,
    print_cookie,
    say,
    send,
    wait_eof,
    wait_file,
)
from proxy_fsm.workers.forwarder import Forwarder
from proxy_fsm.workers.process import ProxyProcess
from tests.helpers.agent import Agent
from tests.helpers.engine import (
    COOKIE,
    HEALTHY,
    READY_LINE,
    Maker,
    ScriptedBackend,
    end_after,
    let_deadline_pass,
    notified,
)
from tests.helpers.holdings import children, descriptors, nothing_left_open, own_threads, threads_ended
from tests.helpers.recorder import Recorder
from tests.helpers.wait import assert_prompt, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    import paramiko

START_PATH = ["tunnelling", "spawning", "running"]


@pytest.fixture
def server() -> Iterator[LoopbackSSHServer]:
    with LoopbackSSHServer() as server:
        yield server


@pytest.fixture
def agent() -> Iterator[Agent]:
    with Agent(serving=True) as agent:
        yield agent


@pytest.fixture
def transport(server: LoopbackSSHServer) -> Iterator[paramiko.Transport]:
    with contextlib.closing(server.connect_transport()) as transport:
        yield transport


@pytest.fixture
def make(transport: paramiko.Transport, agent: Agent, tmp_path: Path) -> Iterator[Maker]:
    """Makes proxies, and checks at the end that they leave nothing behind."""
    before = descriptors(), children()
    maker = Maker(transport, agent, tmp_path)
    yield maker
    maker.close()
    gc.collect()
    threads_ended()
    assert children() <= before[1]
    agent.disconnect()
    nothing_left_open(before[0])


# ---- a whole session ----


def test_session_runs_and_stops(make: Maker, agent: Agent) -> None:
    proxy = make(resumed=True)
    assert (proxy.state, proxy.ok()) == (State.IDLE, False)
    proxy.start()
    proxy.wait_running(timeout=5)
    assert proxy.ok()
    eventually(lambda: len(agent.connections) == 1, what="the agent was reached once")
    proxy.close(timeout=5)
    assert (proxy.state, proxy.ok()) == (State.STOPPED, False)
    status = proxy.status()
    assert status.reason is EndReason.STOP_REQUESTED
    assert [str(record.dest) for record in status.history] == [*START_PATH, "stopping", "stopped"]
    assert status.signal == signal.SIGTERM
    assert (status.exit_code, status.retryable, status.abandoned) == (None, True, ())


def test_history_events_and_subscribers_agree(make: Maker) -> None:
    proxy = make(resumed=True)
    received: list[TransitionRecord] = []
    proxy.subscribe(received.append)
    proxy.start()
    proxy.wait_running(timeout=5)
    proxy.close(timeout=5)
    notified(proxy)
    history = proxy.status().history
    events = make.log.named("proxy.transition")
    assert list(history) == received
    assert [record.sequence for record in history] == list(range(1, 6))
    assert [event["sequence"] for event in events] == list(range(1, 6))
    for record, event in zip(history, events, strict=True):
        assert (event["trigger"], event["source"], event["dest"]) == (record.trigger, record.source, record.dest)
        assert (event["proxy_id"], event["session"]) == (proxy.id, "alice-51-1_stDxterm_dp24")
        assert record.at.tzinfo is not None
    assert all(earlier.dest is later.source for earlier, later in itertools.pairwise(history))
    assert "retryable" not in events[0]
    assert (events[-1]["hint"], events[-1]["retryable"]) == (None, True)


def test_other_events_of_the_contract_have_their_fields(make: Maker) -> None:
    proxy = make([connect(), send(b"12345"), say(READY_LINE), wait_eof()])
    proxy.start()
    proxy.wait_running(timeout=5)
    proxy.close(timeout=5)
    by_name = {event["event"]: event for event in make.log.events}
    assert by_name["tunnel.listening"]["address"].endswith("proxy.sock")
    assert by_name["process.spawned"]["pid"] == proxy.status().pid
    assert by_name["process.spawned"]["executable"].endswith("nxproxy")
    assert (by_name["process.exited"]["exit_code"], by_name["process.exited"]["signal"]) == (None, signal.SIGTERM)
    assert by_name["tunnel.closed"]["bytes_to_agent"] == 5
    assert by_name["tunnel.closed"]["duration_s"] > 0
    assert by_name["process.output"]["level"] == "debug"
    assert "tunnel.connected" in by_name
    assert all({"proxy_id", "session"} <= set(event) for event in make.log.events)


def test_publication_order_is_event_subscribers_waiters(make: Maker) -> None:
    order: list[str] = []
    proxy = make()

    class Logger(Recorder):
        def info(self, event: str, **fields: Any) -> None:
            if event == "proxy.transition" and fields["dest"] == "running":
                order.append(f"event while {proxy.state}")

    proxy = make(logger=Logger())
    proxy.subscribe(
        lambda record: order.append("subscriber") if record.dest is State.RUNNING else None, via=lambda call: call()
    )
    proxy.start()
    proxy.wait_running(timeout=5)
    order.append("waiter")
    assert order == ["event while running", "subscriber", "waiter"]


def test_with_block_enters_when_running_and_closes_on_exit(make: Maker) -> None:
    with make() as proxy:
        assert proxy.ok()
    assert proxy.state is State.STOPPED


def test_with_block_of_a_failed_proxy_exits_without_error(make: Maker) -> None:
    with make() as proxy:
        os.kill(proxy.status().pid or 0, signal.SIGKILL)
        assert proxy.wait(timeout=5) is State.FAILED
    assert proxy.status().reason is EndReason.PROXY_KILLED


def test_failed_entry_of_a_with_block_releases_everything(make: Maker) -> None:
    proxy = make([exit_with(3)])
    with pytest.raises(ProxyFailed) as failed, proxy:
        pytest.fail("entered")
    assert failed.value.status.reason is EndReason.PROXY_EXITED
    assert failed.value.status.exit_code == 3
    assert proxy.state is State.FAILED


# ---- orders ----


def test_start_after_stop_is_refused(make: Maker, agent: Agent) -> None:
    proxy = make()
    proxy.stop()
    assert proxy.state is State.STOPPED
    assert proxy.wait(timeout=1) is State.STOPPED
    with pytest.raises(InvalidTransition):
        proxy.start()
    with pytest.raises(ProxyStopped):
        proxy.wait_running(timeout=1)
    assert proxy.status().reason is EndReason.STOP_REQUESTED
    assert make.log.path() == ["stopped"]
    assert not agent.connections


def test_concurrent_starts_succeed_once(make: Maker) -> None:
    proxy = make()
    refusals: list[InvalidTransition] = []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        try:
            proxy.start()
        except InvalidTransition as refused:
            refusals.append(refused)

    threads = [threading.Thread(target=start, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert len(refusals) == 7
    assert proxy.state is not State.IDLE


def test_concurrent_stops_stop_once(make: Maker) -> None:
    proxy = make()
    threads = [threading.Thread(target=proxy.stop, daemon=True) for _ in range(8)]
    proxy.start()
    for thread in threads:
        thread.start()
    assert proxy.wait(timeout=5) is State.STOPPED
    for thread in threads:
        thread.join(5)
    proxy.stop()
    assert make.log.path().count("stopping") == 1


def stop_latency_s(proxy: Proxy) -> float:
    """Stop a proxy and return how long it took until it was in stopping."""
    stopping = threading.Event()
    proxy.subscribe(lambda record: stopping.set() if record.dest is State.STOPPING else None)
    began = time.monotonic()
    proxy.stop()
    assert stopping.wait(5)
    return time.monotonic() - began


#: How soon `stop` must be handled, in seconds.
AT_ONCE_S = 0.01


def test_stop_is_handled_at_once_while_the_preflight_hangs(make: Maker, tmp_path: Path, agent: Agent) -> None:
    gate = threading.Event()

    class Hanging(ScriptedBackend):
        def find_executable(self) -> str:
            gate.wait(10)
            return super().find_executable()

    def measure() -> float:
        nonlocal gate
        gate = threading.Event()
        proxy = make(backend=Hanging(Path(tempfile.mkdtemp(dir=tmp_path))))
        proxy.start()
        took_s = stop_latency_s(proxy)
        gate.set()
        assert proxy.wait(timeout=5) is State.STOPPED
        assert proxy.status().abandoned == ()
        return took_s

    assert_prompt(measure, AT_ONCE_S)
    assert not agent.connections


def test_stop_is_handled_at_once_while_a_channel_open_hangs(make: Maker, server: LoopbackSSHServer) -> None:
    server.forwarding = Forwarding.HELD

    def measure() -> float:
        proxy = make()
        proxy.start()
        assert proxy.wait(State.SPAWNING, timeout=5) is State.SPAWNING
        server.wait_for(lambda: server.channels_held > 0)
        eventually(lambda: proxy.status().waiting_for == "the channel to the agent", what="waiting_for is the channel")
        took_s = stop_latency_s(proxy)
        assert proxy.wait(timeout=5) is State.STOPPED
        server.release(Forwarding.HELD)
        return took_s

    assert_prompt(measure, AT_ONCE_S)
    server.release()
    server.wait_for(lambda: server.channels_open == 0)  # channels that opened late are closed


def test_stop_is_handled_at_once_while_running(make: Maker) -> None:
    def measure() -> float:
        proxy = make()
        proxy.start()
        proxy.wait_running(timeout=5)
        took_s = stop_latency_s(proxy)
        assert proxy.wait(timeout=5) is State.STOPPED
        return took_s

    assert_prompt(measure, AT_ONCE_S)


@pytest.mark.parametrize("argument", ["session", "transport", "backend", "timeouts"])
def test_bad_arguments_raise_in_the_constructor(make: Maker, argument: str) -> None:
    with pytest.raises(TypeError, match=argument):
        make(HEALTHY, **{argument: "nonsense"})


def test_session_without_cookie_or_display_is_refused(make: Maker) -> None:
    with pytest.raises(InvalidSession, match="cookie"):
        make(session=make.session(cookie=None))
    with pytest.raises(InvalidSession, match="display"):
        make(session=make.session(display=None))


# ---- waiting and subscribing ----


def test_wait_returns_the_awaited_or_a_final_state(make: Maker, tmp_path: Path) -> None:
    with Gate(tmp_path / "gate") as gate:
        exits_late = on_signal(signal.SIGTERM, [wait_file(gate.path), exit_with(0)])
        proxy = make([exits_late, *HEALTHY], timeouts=Timeouts(stop_grace_s=1000))
        with pytest.raises(TimeoutError):
            proxy.wait(State.RUNNING, timeout=0.01)
        proxy.start()
        assert proxy.wait(State.RUNNING, timeout=5) is State.RUNNING
        proxy.stop()
        assert proxy.wait(State.STOPPING, timeout=5) is State.STOPPING
        assert proxy.wait(State.RUNNING, State.STOPPING, timeout=5) is State.STOPPING
        gate.open()
        assert proxy.wait(State.SPAWNING, timeout=5) is State.STOPPED


def test_subscriber_may_stop_but_not_wait(make: Maker) -> None:
    proxy = make()
    refused: list[str] = []

    def on_change(record: TransitionRecord) -> None:
        if record.dest is State.RUNNING:
            for wait in (proxy.wait, proxy.wait_running, proxy.close, proxy.start):
                try:
                    wait()
                except RuntimeError as error:
                    refused.append(str(error))
            proxy.stop()

    proxy.subscribe(on_change)
    proxy.start()
    assert proxy.wait(timeout=5) is State.STOPPED
    assert len(refused) == 4
    assert all("stop()" in message for message in refused)
    assert make.log.path() == [*START_PATH, "stopping", "stopped"]


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_failing_subscriber_or_via_is_ignored(make: Maker, error: type[BaseException]) -> None:
    def broken(*_: object) -> None:
        raise error

    proxy = make()
    received: list[TransitionRecord] = []
    proxy.subscribe(broken)
    proxy.subscribe(received.append, via=broken)
    proxy.subscribe(received.append)
    with proxy:
        pass
    notified(proxy)
    assert [str(record.dest) for record in received] == [*START_PATH, "stopping", "stopped"]
    assert len(make.log.named("subscriber.failed")) == 10


def test_asyncio_subscriber_receives_records_in_order_with_replay(make: Maker) -> None:
    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        received: list[str] = []
        done = asyncio.Event()

        def on_change(record: TransitionRecord) -> None:
            assert asyncio.get_running_loop() is loop
            received.append(record.dest)
            if record.dest.is_final:
                done.set()

        proxy = make()
        proxy.start()
        await asyncio.to_thread(proxy.wait_running)
        proxy.subscribe(on_change, via=loop.call_soon_threadsafe, replay=True)
        proxy.stop()
        await asyncio.wait_for(done.wait(), 5)
        return received

    assert asyncio.run(main()) == [*START_PATH, "stopping", "stopped"]


def test_replay_after_the_end_delivers_everything(make: Maker) -> None:
    with make() as proxy:
        pass
    received: list[TransitionRecord] = []
    proxy.subscribe(received.append, replay=True)
    notified(proxy)
    assert tuple(received) == proxy.status().history


def test_unsubscribed_callback_is_not_called(make: Maker) -> None:
    proxy = make()
    received: list[TransitionRecord] = []
    unsubscribe = proxy.subscribe(received.append)
    proxy.start()
    proxy.wait_running(timeout=5)
    notified(proxy)
    unsubscribe()
    unsubscribe()
    proxy.close(timeout=5)
    assert [str(record.dest) for record in received] == START_PATH


# ---- the threading contract ----


def test_only_the_owner_thread_publishes_changes(make: Maker) -> None:
    with make():
        pass
    threads = make.log.threads["proxy.transition"]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_running_proxy_has_five_threads_at_most(make: Maker) -> None:
    with make():
        assert len({thread.name for thread in own_threads()} - {"proxy_fsm-monitor"}) <= 5


def test_signal_handler_may_stop_while_the_main_thread_waits(make: Maker) -> None:
    proxy = make()
    previous = signal.signal(signal.SIGUSR1, lambda *_: proxy.stop())
    try:
        proxy.start()
        proxy.wait_running(timeout=5)
        threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGUSR1)).start()
        assert proxy.wait(timeout=5) is State.STOPPED
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_signal_handler_may_stop_an_idle_engine_while_waiting(make: Maker) -> None:
    proxy = make()
    previous = signal.signal(signal.SIGALRM, lambda *_: proxy.stop())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert proxy.wait(timeout=5) is State.STOPPED
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_repeated_stop_signals_during_start_stop_it(make: Maker) -> None:
    for number in range(10):
        proxy = make()
        previous = signal.signal(signal.SIGALRM, lambda *_, proxy=proxy: proxy.stop())
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0001 * (number + 1), 0.0005)
            with contextlib.suppress(InvalidTransition):
                proxy.start()
            assert proxy.wait(timeout=5) is State.STOPPED
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


def test_forked_child_leaves_the_parents_proxy_running(make: Maker, agent: Agent) -> None:
    with make() as proxy:
        child = os.fork()
        if child == 0:
            end_after(30)
            status = 1
            try:
                proxy.stop()
                proxy.close()
                with pytest.raises(RuntimeError):
                    proxy.wait(timeout=0.1)
                status = 0
            finally:
                atexit._run_exitfuncs()
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert proxy.ok()
        agent.send(b"still there")
        eventually(lambda: (stats := proxy.status().tunnel) and stats.bytes_from_agent == 11, what="bytes come through")
        assert Path(proxy.status().listen_address or "").parent.is_dir()
        assert proxy.ok()


def test_dropped_running_proxy_is_stopped_with_a_warning(make: Maker) -> None:
    proxy = make()
    proxy.start()
    proxy.wait_running(timeout=5)
    pid = proxy.status().pid
    ended = threading.Event()
    proxy.subscribe(lambda record: ended.set() if record.dest.is_final else None)
    make.made.clear()
    with pytest.warns(ResourceWarning, match="dropped while running"):  # noqa: PT031 - dropping takes two statements
        del proxy
        gc.collect()
    assert ended.wait(5)
    assert pid not in children()


EXIT_SCRIPT = """
import logging, sys
from pathlib import Path
from proxy_fsm.testing import LoopbackSSHServer
from tests.helpers.engine import Maker, HEALTHY
from tests.helpers.agent import Agent
from tests.helpers.wait import eventually
logging.getLogger("paramiko").addHandler(logging.NullHandler())  # do not report the end of its server
server, agent = LoopbackSSHServer(), Agent(serving=True)
server.start()
proxy = Maker(server.connect_transport(), agent, Path(sys.argv[1]))(HEALTHY)
proxy.start()
proxy.wait_running(timeout=10)
eventually(lambda: agent.serves)  # its thread cannot be started once the interpreter exits
print(proxy.status().pid, proxy.status().listen_address, flush=True)
"""


def test_interpreter_exit_stops_running_proxies(tmp_path: Path) -> None:
    """Without close or stop: the script just ends while a proxy is running."""
    ended = subprocess.run(
        [sys.executable, "-c", EXIT_SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    pid, address = ended.stdout.split()
    assert not Path("/proc", pid).exists()
    assert not Path(address).parent.exists()


def test_dropped_idle_proxy_does_not_warn(make: Maker) -> None:
    proxy = make()
    make.made.clear()
    del proxy
    gc.collect()


def test_transport_stays_usable_by_the_caller(
    make: Maker, transport: paramiko.Transport, server: LoopbackSSHServer
) -> None:
    server.commands = {"echo": lambda command: (0, command.encode(), b"")}
    for _ in range(3):
        with make():
            pass
    assert transport.is_active()
    with contextlib.closing(transport.open_session()) as channel:
        channel.exec_command("echo hello")
        assert channel.recv(100) == b"echo hello"
    assert isinstance(transport.sock, socket.socket)
    assert transport.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_twenty_proxies_on_one_transport_run_and_stop(make: Maker, agent: Agent) -> None:
    proxies = [make(session=make.session(name=f"alice-{number}")) for number in range(20)]
    for proxy in proxies:
        proxy.start()
    for proxy in proxies:
        proxy.wait_running(timeout=20)
    eventually(lambda: len(agent.connections) == 20, what="each has its own channel")
    assert len(own_threads("proxy_fsm-monitor")) == 1
    for proxy in proxies:
        proxy.stop()
    assert {proxy.wait(timeout=20) for proxy in proxies} == {State.STOPPED}


# ---- faults, each with its reason ----


def start_and_fail(proxy: Proxy, timeout: float = 8) -> EndReason | None:
    """Start a proxy that is to fail, and return the reason."""
    proxy.start()
    assert proxy.wait(timeout=timeout) is State.FAILED
    return proxy.status().reason


def test_local_faults_open_no_channel(make: Maker, agent: Agent, tmp_path: Path) -> None:
    not_executable, not_a_program = tmp_path / "plain", tmp_path / "garbage"
    not_executable.write_text("#!/bin/sh\n")
    not_a_program.write_bytes(b"\x01\x02\x03")
    not_a_program.chmod(0o700)
    (tmp_path / "file").write_text("")

    class NoDisplay(ScriptedBackend):
        needs_display = True

    (tmp_path / "x").mkdir()
    reasons = {
        "missing": start_and_fail(make(backend=NX3Backend("/nonexistent/nxproxy"))),
        "plain": start_and_fail(make(backend=NX3Backend(str(not_executable)))),
        "no display": start_and_fail(make(backend=NoDisplay(tmp_path / "x"), environ={})),
        "root": start_and_fail(make(sessions_root=tmp_path / "file" / "root")),
    }
    assert reasons == {
        "missing": EndReason.PROXY_NOT_FOUND,
        "plain": EndReason.PROXY_NOT_STARTABLE,
        "no display": EndReason.DISPLAY_UNAVAILABLE,
        "root": EndReason.LISTEN_FAILED,
    }

    class Garbage(ScriptedBackend):
        def find_executable(self) -> str:
            return str(not_a_program)

    assert start_and_fail(make(backend=Garbage(tmp_path))) is EndReason.PROXY_NOT_STARTABLE
    assert not agent.connections
    assert all(proxy.status().retryable for proxy in make.made)
    assert "nxproxy" in (make.made[0].status().hint or "")


def test_refused_port_ends_in_agent_unreachable_after_agent_connect_s(make: Maker, agent: Agent) -> None:
    agent.stop_listening()
    proxy = make(timeouts=Timeouts(agent_connect_s=0.3))
    assert start_and_fail(proxy) is EndReason.AGENT_UNREACHABLE
    assert str(agent.port) in proxy.status().detail
    assert proxy.status().retryable is None
    stopping = proxy.status().history[2]
    assert (stopping.source, stopping.dest) == (State.SPAWNING, State.STOPPING)
    assert stopping.elapsed_s >= 0.3
    tried = re.search(r" for ([\d.]+) s: ", proxy.status().detail)
    assert tried is not None
    assert 0.3 <= float(tried[1]) < 2


def test_port_that_listens_in_time_is_reached(make: Maker, server: LoopbackSSHServer) -> None:
    server.refuse_next(2)
    with make() as proxy:
        assert proxy.ok()


def test_denied_forwarding_ends_in_forwarding_denied_at_once(
    make: Maker, server: LoopbackSSHServer, agent: Agent
) -> None:
    server.forwarding = Forwarding.DENIED
    proxy = make()
    assert start_and_fail(proxy) is EndReason.FORWARDING_DENIED
    assert not agent.connections
    assert proxy.status().retryable is True


def test_closed_transport_ends_in_transport_lost(make: Maker, transport: paramiko.Transport) -> None:
    transport.close()
    assert start_and_fail(make()) is EndReason.TRANSPORT_LOST


@pytest.mark.parametrize("cut", ["server", "reset", "caller"])
def test_lost_transport_releases_everything_at_once(
    make: Maker, transport: paramiko.Transport, server: LoopbackSSHServer, cut: str
) -> None:
    proxy = make([*HEALTHY, pause()], resumed=True)
    proxy.start()
    proxy.wait_running(timeout=5)
    {"server": server.drop, "reset": lambda: server.drop(reset=True), "caller": transport.close}[cut]()
    assert proxy.wait(timeout=5) is State.FAILED
    status = proxy.status()
    assert status.reason is EndReason.TRANSPORT_LOST
    assert (status.retryable, status.signal, status.abandoned) == (True, signal.SIGKILL, ())


def test_silent_transport_is_reported_and_restored(make: Maker, server: LoopbackSSHServer) -> None:
    proxy = make(timeouts=Timeouts(link_probe_s=0.1, link_dead_s=60))
    proxy.start()
    proxy.wait_running(timeout=5)
    server.freeze()
    eventually(lambda: proxy.status().link == "silent", what="the link is silent")
    assert proxy.status().silent_s > 0.1
    assert proxy.ok()
    server.thaw()
    eventually(lambda: (status := proxy.status()).link == "ok" and status.silent_s == 0, what="the link is restored")
    assert make.log.named("link.silent")
    assert make.log.named("link.restored")


def test_dead_transport_ends_in_transport_silent_and_is_freed_later(make: Maker, server: LoopbackSSHServer) -> None:
    proxy = make(timeouts=Timeouts(link_probe_s=0.1, link_dead_s=3, kill_s=0.5))
    proxy.start()
    proxy.wait_running(timeout=5)
    server.freeze()
    assert proxy.wait(timeout=20) is State.FAILED
    assert proxy.status().reason is EndReason.TRANSPORT_SILENT
    server.thaw()
    server.wait_for(lambda: server.channels_open == 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_killed_proxy_ends_in_proxy_killed_with_its_signal(make: Maker, number: signal.Signals) -> None:
    proxy = make([connect(), say(READY_LINE), die_by(number)])
    assert start_and_fail(proxy) is EndReason.PROXY_KILLED
    assert number.name in proxy.status().detail
    assert proxy.status().signal == number


# ---- deadlines ----


def time_out(proxy: Proxy) -> EndReason | None:
    """Expire the deadline of a proxy that is to fail by it, and return the reason."""
    let_deadline_pass(proxy)
    assert proxy.wait(timeout=20) is State.FAILED
    return proxy.status().reason


def test_hanging_preflight_ends_in_start_timeout(make: Maker, tmp_path: Path) -> None:
    entered, gate = threading.Event(), threading.Event()

    class Hanging(ScriptedBackend):
        def find_executable(self) -> str:
            entered.set()
            gate.wait(60)
            return super().find_executable()

    proxy = make(backend=Hanging(tmp_path), timeouts=Timeouts(preflight_s=1000, kill_s=0.2))
    proxy.start()
    assert entered.wait(20)
    assert time_out(proxy) is EndReason.START_TIMEOUT
    assert "the proxy program's path" in proxy.status().detail
    assert proxy.status().abandoned
    gate.set()


def test_proxy_that_never_gets_ready_ends_in_start_timeout(make: Maker, agent: Agent) -> None:
    proxy = make([connect(), wait_eof()], timeouts=Timeouts(ready_s=1000))
    proxy.start()
    eventually(lambda: "sign that the session is established" in proxy.status().waiting_for, what="connected")
    eventually(lambda: len(agent.connections) == 1, what="the agent was reached once")
    assert time_out(proxy) is EndReason.START_TIMEOUT
    assert "sign that the session is established" in proxy.status().detail
    assert len(agent.connections) == 1


def test_proxy_that_never_connects_ends_in_start_timeout(make: Maker, agent: Agent) -> None:
    proxy = make([pause()], timeouts=Timeouts(ready_s=1000))
    proxy.start()
    eventually(lambda: proxy.status().waiting_for == "the channel to the agent", what="the proxy program runs")
    assert time_out(proxy) is EndReason.START_TIMEOUT
    assert "the channel to the agent" in proxy.status().detail
    assert not agent.connections
    assert proxy.status().retryable is True


def test_proxy_that_survives_sigkill_ends_in_stop_timeout(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = make([ignore(), *HEALTHY, pause()], timeouts=Timeouts(stop_grace_s=0.1, kill_s=0.1))
    proxy.start()
    proxy.wait_running(timeout=5)
    pid = proxy.status().pid
    assert pid is not None
    monkeypatch.setattr(ProxyProcess, "signal", lambda *_: None)
    proxy.stop()
    assert proxy.wait(timeout=5) is State.FAILED
    assert proxy.status().reason is EndReason.STOP_TIMEOUT
    assert f"process {pid}" in proxy.status().abandoned
    os.kill(pid, signal.SIGKILL)


def test_child_that_keeps_the_output_open_does_not_delay_the_end(make: Maker) -> None:
    proxy = make([connect(), say(READY_LINE), fork_holding_output(), exit_with(0)])
    proxy.start()
    proxy.wait(timeout=5)
    assert proxy.status().exit_code == 0


# ---- bugs in the package and in backends ----


def test_failing_backend_ends_in_internal_error_with_traceback(make: Maker, tmp_path: Path) -> None:
    class Broken(ScriptedBackend):
        def ready(self, _: Evidence) -> bool:
            raise ZeroDivisionError("of all things")

    proxy = make(backend=Broken(tmp_path))
    assert start_and_fail(proxy) is EndReason.INTERNAL_ERROR
    assert "of all things" in proxy.status().detail
    assert "ZeroDivisionError: of all things" in make.log.named("internal.error")[0]["exception"]


def test_failing_preflight_ends_in_internal_error(make: Maker, tmp_path: Path) -> None:
    class Broken(ScriptedBackend):
        def command(self, _: Any) -> list[str]:
            raise ZeroDivisionError

    assert start_and_fail(make(backend=Broken(tmp_path))) is EndReason.INTERNAL_ERROR


def test_failed_thread_start_ends_in_internal_error(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "proxy_fsm-process":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert start_and_fail(make()) is EndReason.INTERNAL_ERROR


@pytest.mark.parametrize("error", [OSError, SystemExit, KeyboardInterrupt])
def test_logger_exception_does_not_kill_the_owner_thread(make: Maker, error: type[BaseException]) -> None:
    class Broken:
        def __getattr__(self, level: str) -> Any:
            raise error

    with make(logger=Broken()) as proxy:
        assert proxy.ok()
    assert proxy.state is State.STOPPED


def test_failed_monitor_start_does_not_affect_later_proxies(
    make: Maker, transport: paramiko.Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "proxy_fsm-monitor":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        first = make()
        assert start_and_fail(first) is EndReason.INTERNAL_ERROR
        assert first.status().abandoned == ()
    second = make()
    second.start()
    second.wait_running(timeout=5)
    transport.close()
    assert second.wait(timeout=5) is State.FAILED
    assert second.status().reason is EndReason.TRANSPORT_LOST


def test_subscription_before_a_failed_start_does_not_stop_it(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    proxy = make()
    proxy.subscribe(lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            proxy.start()
    assert proxy.state is State.IDLE


def test_ctrl_c_during_start_leaves_one_owner_or_none(tmp_path: Path) -> None:
    """Interrupts come at increasing delays; whatever they hit, the proxy can be closed, and is then stopped."""
    command = [sys.executable, "-m", "tests.interrupted_starts", str(tmp_path)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 0, done.stdout


def test_flood_of_output_does_not_delay_stop(make: Maker) -> None:
    flood = Step("import sys\nline = b'x' * 60 + b'\\n'\nwhile True: os.write(2, line * 100)")
    proxy = make([connect(), ignore(), say(READY_LINE), flood], timeouts=Timeouts(stop_grace_s=0.3))
    proxy.start()
    proxy.wait_running(timeout=5)
    assert stop_latency_s(proxy) < 2
    assert proxy.wait(timeout=5) is State.STOPPED
    assert proxy.status().signal == signal.SIGKILL


def test_transport_loss_while_stopping_skips_the_grace_period(make: Maker, transport: paramiko.Transport) -> None:
    proxy = make([ignore(), *HEALTHY, pause()], timeouts=Timeouts(stop_grace_s=60))
    proxy.start()
    proxy.wait_running(timeout=5)
    proxy.stop()
    assert proxy.wait(State.STOPPING, timeout=5) is State.STOPPING
    transport.close()
    assert proxy.wait(timeout=5) is State.STOPPED
    assert proxy.status().signal == signal.SIGKILL


def test_status_in_a_forked_child_takes_no_lock(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    with make() as proxy:
        monkeypatch.delattr(Forwarder, "stats")  # which takes a lock
        child = os.fork()
        if child == 0:
            end_after(30)
            repr(proxy)
            os._exit(0 if proxy.status().state is State.RUNNING else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- secrets ----


def test_backend_exception_is_redacted_everywhere(make: Maker, tmp_path: Path) -> None:
    class Leaking(ScriptedBackend):
        def ready(self, _: Evidence) -> bool:
            raise ValueError(f"nx/nx,cookie={COOKIE},connect={COOKIE.upper()}")

    proxy = make(backend=Leaking(tmp_path))
    assert start_and_fail(proxy) is EndReason.INTERNAL_ERROR
    output = repr(make.log.events) + json.dumps(proxy.status().as_dict()) + repr(ProxyFailed(proxy.status()))
    assert COOKIE not in output.lower()
    assert "ValueError" in output


def test_cookie_printed_by_the_proxy_is_redacted_everywhere(make: Maker, tmp_path: Path) -> None:
    proxy = make([print_cookie(), Step('put(2, "it is " + cookie().upper() + "!")'), say("\x1b[31mred\x07"), *HEALTHY])
    with proxy:
        outputs = [
            json.dumps([{k: str(v) for k, v in event.items()} for event in make.log.events]),
            json.dumps(proxy.status().as_dict()),
            repr(proxy) + repr(proxy.status()) + repr(make.session()) + str(make.session()),
            (tmp_path / "sessions" / "S-alice-51-1_stDxterm_dp24" / "session.log").read_text(),
            Path(f"/proc/{proxy.status().pid}/cmdline").read_text(),
        ]
        environment = Path(f"/proc/{proxy.status().pid}/environ")
        assert COOKIE in environment.read_text()
        assert environment.stat().st_mode & 0o077 == 0
    for text in outputs:
        assert COOKIE not in text.lower()
        assert "\x1b" not in text
    assert "<hidden>" in outputs[3]


def test_log_file_is_private(make: Maker, tmp_path: Path) -> None:
    with make():
        root = tmp_path / "sessions" / "S-alice-51-1_stDxterm_dp24"
        assert (root.stat().st_mode & 0o777, (root / "session.log").stat().st_mode & 0o777) == (0o700, 0o600)


# ---- status ----


def test_status_is_consistent_and_json_safe_in_every_state(make: Maker) -> None:
    proxy = make()
    statuses = [proxy.status()]
    proxy.subscribe(lambda _: statuses.append(proxy.status()))
    with proxy:
        statuses.append(proxy.status())
    statuses.append(proxy.status())
    for status in statuses:
        json.dumps(status.as_dict())
        assert len(status.history) == (status.history[-1].sequence if status.history else 0)
        assert not status.history or status.history[-1].dest is status.state
        assert (status.reason is None) == (status.state not in {State.STOPPING, State.STOPPED})
        assert status.retryable is None or status.state.is_final
        assert pickle.loads(pickle.dumps(status)) == status  # noqa: S301 - our own
        with pytest.raises(dataclasses.FrozenInstanceError):
            status.state = State.IDLE  # type: ignore[misc]


# ---- other viewers ----


def viewer(*steps: Any, **options: Any) -> CommandBackend:
    """A viewer that connects over TCP."""
    return CommandBackend([*ScriptedProxy(steps).command, "{host}", "{port}"], **options)


def test_viewer_is_ready_with_the_first_bytes(make: Maker, agent: Agent) -> None:
    proxy = make(backend=viewer(connect(), wait_eof(), exit_with(1), ready_when="first_bytes"))
    proxy.start()
    eventually(lambda: agent.connections, what="the viewer connected")
    assert proxy.state is State.SPAWNING
    agent.send(b"RFB 003.008\n")
    proxy.wait_running(timeout=5)
    assert (proxy.status().listen_address or "").startswith("127.0.0.1:")
    proxy.close(timeout=5)


def test_ready_viewer_that_exits_with_zero_ends_in_viewer_closed(make: Maker, tmp_path: Path) -> None:
    with Gate(tmp_path / "gate") as gate:
        proxy = make(
            backend=viewer(connect(), wait_file(gate.path), exit_with(0), ready_when="connected"),
            session=make.session(cookie=None, display=None),
        )
        with proxy:
            gate.open()
            assert proxy.wait(timeout=5) is State.STOPPED
    assert proxy.status().reason is EndReason.VIEWER_CLOSED


def test_viewer_that_exits_before_ready_ends_in_proxy_exited(make: Maker) -> None:
    assert start_and_fail(make(backend=viewer(connect(), exit_with(0)))) is EndReason.PROXY_EXITED


def test_agent_eof_ends_a_viewers_session(make: Maker, agent: Agent) -> None:
    proxy = make(backend=viewer(connect(), wait_eof(), exit_with(1), ready_when="connected"))
    with proxy:
        eventually(lambda: agent.connections, what="the viewer connected")
        agent.disconnect()
        assert proxy.wait(timeout=5) is State.STOPPED
    assert proxy.status().reason is EndReason.SESSION_ENDED


def test_viewer_that_outlives_its_connection_is_stopped(make: Maker) -> None:
    """The viewer has closed its connection but does not exit: the session is over."""
    steps = (connect(), say(READY_LINE), wait_eof(), Step("connection.close()"), pause())
    proxy = make(steps, timeouts=Timeouts(stop_grace_s=0.2))
    with proxy:
        eventually(lambda: make.agent.connections, what="the viewer connected")
        make.agent.disconnect()
        assert proxy.wait(timeout=5) is State.STOPPED
    assert proxy.status().reason is EndReason.SESSION_ENDED


def test_custom_backend_needs_only_name_and_three_methods(make: Maker) -> None:
    class Mine(Backend):
        name = "mine"

        def find_executable(self) -> str:
            return sys.executable

        def command(self, context: Any) -> list[str]:
            script = ScriptedProxy([connect(("127.0.0.1", context.port)), say("hello"), wait_eof()])
            return [context.executable, *script.command[1:]]

        def ready(self, evidence: Evidence) -> bool:
            return evidence.said("hello")

    with make(backend=Mine()) as proxy:
        assert proxy.ok()
