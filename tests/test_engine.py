"""The engine on scripted proxies and an embedded SSH server: its rules, its threads, its limits."""

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

WAY_UP = ["tunnelling", "spawning", "running"]


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
    """A maker of proxies, and the proof that they leave nothing behind."""
    before = descriptors(), children()
    maker = Maker(transport, agent, tmp_path)
    yield maker
    maker.close()
    gc.collect()
    threads_ended()
    assert children() <= before[1]
    agent.disconnect()
    nothing_left_open(before[0])


# ---- a whole life ----


def test_a_session_comes_up_and_is_stopped(make: Maker, agent: Agent) -> None:
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
    assert [str(record.dest) for record in status.history] == [*WAY_UP, "stopping", "stopped"]
    assert status.signal == signal.SIGTERM
    assert (status.exit_code, status.retryable, status.abandoned) == (None, True, ())


def test_history_events_and_subscribers_agree_and_have_no_gap(make: Maker) -> None:
    proxy = make(resumed=True)
    told: list[TransitionRecord] = []
    proxy.subscribe(told.append)
    proxy.start()
    proxy.wait_running(timeout=5)
    proxy.close(timeout=5)
    notified(proxy)
    history = proxy.status().history
    events = make.log.named("proxy.transition")
    assert list(history) == told
    assert [record.sequence for record in history] == list(range(1, 6))
    assert [event["sequence"] for event in events] == list(range(1, 6))
    for record, event in zip(history, events, strict=True):
        assert (event["trigger"], event["source"], event["dest"]) == (record.trigger, record.source, record.dest)
        assert (event["proxy_id"], event["session"]) == (proxy.id, "alice-51-1_stDxterm_dp24")
        assert record.at.tzinfo is not None
    assert all(earlier.dest is later.source for earlier, later in itertools.pairwise(history))
    assert "retryable" not in events[0]
    assert (events[-1]["hint"], events[-1]["retryable"]) == (None, True)


def test_the_other_events_of_the_contract_are_told_with_their_fields(make: Maker) -> None:
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


def test_publication_comes_as_event_then_subscribers_then_waiters(make: Maker) -> None:
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


def test_entering_a_with_block_means_running_and_leaving_means_released(make: Maker) -> None:
    with make() as proxy:
        assert proxy.ok()
    assert proxy.state is State.STOPPED


def test_leaving_a_with_block_does_not_raise_for_a_proxy_that_failed(make: Maker) -> None:
    with make() as proxy:
        os.kill(proxy.status().pid or 0, signal.SIGKILL)
        assert proxy.wait(timeout=5) is State.FAILED
    assert proxy.status().reason is EndReason.PROXY_KILLED


def test_a_with_block_that_cannot_be_entered_releases_everything_first(make: Maker) -> None:
    proxy = make([exit_with(3)])
    with pytest.raises(ProxyFailed) as failed, proxy:
        pytest.fail("entered")
    assert failed.value.status.reason is EndReason.PROXY_EXITED
    assert failed.value.status.exit_code == 3
    assert proxy.state is State.FAILED


# ---- orders ----


def test_an_engine_that_was_stopped_before_it_started_never_starts(make: Maker, agent: Agent) -> None:
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


def test_of_many_threads_that_start_it_one_succeeds(make: Maker) -> None:
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


def test_stop_from_many_threads_in_any_state_ends_it_once(make: Maker) -> None:
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


def heard_after_s(proxy: Proxy) -> float:
    """Stop a proxy and return how long it took until it was in stopping."""
    heard = threading.Event()
    proxy.subscribe(lambda record: heard.set() if record.dest is State.STOPPING else None)
    began = time.monotonic()
    proxy.stop()
    assert heard.wait(5)
    return time.monotonic() - began


#: Within this `stop` is heard, seconds.
AT_ONCE_S = 0.01


def test_stop_is_heard_at_once_while_the_preflight_hangs(make: Maker, tmp_path: Path, agent: Agent) -> None:
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
        took_s = heard_after_s(proxy)
        gate.set()
        assert proxy.wait(timeout=5) is State.STOPPED
        assert proxy.status().abandoned == ()
        return took_s

    assert_prompt(measure, AT_ONCE_S)
    assert not agent.connections


def test_stop_is_heard_at_once_while_a_channel_open_hangs(make: Maker, server: LoopbackSSHServer) -> None:
    server.forwarding = Forwarding.HELD

    def measure() -> float:
        proxy = make()
        proxy.start()
        assert proxy.wait(State.SPAWNING, timeout=5) is State.SPAWNING
        server.wait_for(lambda: server.channels_held > 0)
        eventually(lambda: proxy.status().waiting_for == "the channel to the agent", what="it says what is missing")
        took_s = heard_after_s(proxy)
        assert proxy.wait(timeout=5) is State.STOPPED
        server.release(Forwarding.HELD)
        return took_s

    assert_prompt(measure, AT_ONCE_S)
    server.release()
    server.wait_for(lambda: server.channels_open == 0)  # what opened late closed itself


def test_stop_is_heard_at_once_while_running(make: Maker) -> None:
    def measure() -> float:
        proxy = make()
        proxy.start()
        proxy.wait_running(timeout=5)
        took_s = heard_after_s(proxy)
        assert proxy.wait(timeout=5) is State.STOPPED
        return took_s

    assert_prompt(measure, AT_ONCE_S)


@pytest.mark.parametrize("argument", ["session", "transport", "backend", "timeouts"])
def test_bad_arguments_raise_where_they_are_given(make: Maker, argument: str) -> None:
    with pytest.raises(TypeError, match=argument):
        make(HEALTHY, **{argument: "nonsense"})


def test_a_backend_refuses_a_session_that_lacks_what_it_needs(make: Maker) -> None:
    with pytest.raises(InvalidSession, match="cookie"):
        make(session=make.session(cookie=None))
    with pytest.raises(InvalidSession, match="display"):
        make(session=make.session(display=None))


# ---- waiting and subscribing ----


def test_wait_tells_the_state_it_waited_for_or_a_final_one(make: Maker, tmp_path: Path) -> None:
    with Gate(tmp_path / "gate") as gate:
        leaves_late = on_signal(signal.SIGTERM, [wait_file(gate.path), exit_with(0)])
        proxy = make([leaves_late, *HEALTHY], timeouts=Timeouts(stop_grace_s=1000))
        with pytest.raises(TimeoutError):
            proxy.wait(State.RUNNING, timeout=0.01)
        proxy.start()
        assert proxy.wait(State.RUNNING, timeout=5) is State.RUNNING
        proxy.stop()
        assert proxy.wait(State.STOPPING, timeout=5) is State.STOPPING
        assert proxy.wait(State.RUNNING, State.STOPPING, timeout=5) is State.STOPPING
        gate.open()
        assert proxy.wait(State.SPAWNING, timeout=5) is State.STOPPED


def test_a_subscriber_may_stop_it_and_may_not_wait_for_it(make: Maker) -> None:
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
    assert make.log.path() == [*WAY_UP, "stopping", "stopped"]


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_subscriber_or_a_loop_that_raises_changes_nothing(make: Maker, error: type[BaseException]) -> None:
    def broken(*_: object) -> None:
        raise error

    proxy = make()
    told: list[TransitionRecord] = []
    proxy.subscribe(broken)
    proxy.subscribe(told.append, via=broken)
    proxy.subscribe(told.append)
    with proxy:
        pass
    notified(proxy)
    assert [str(record.dest) for record in told] == [*WAY_UP, "stopping", "stopped"]
    assert len(make.log.named("subscriber.failed")) == 10


def test_records_reach_an_asyncio_loop_in_order_and_replay_comes_first(make: Maker) -> None:
    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        told: list[str] = []
        done = asyncio.Event()

        def on_change(record: TransitionRecord) -> None:
            assert asyncio.get_running_loop() is loop
            told.append(record.dest)
            if record.dest.is_final:
                done.set()

        proxy = make()
        proxy.start()
        await asyncio.to_thread(proxy.wait_running)
        proxy.subscribe(on_change, via=loop.call_soon_threadsafe, replay=True)
        proxy.stop()
        await asyncio.wait_for(done.wait(), 5)
        return told

    assert asyncio.run(main()) == [*WAY_UP, "stopping", "stopped"]


def test_replay_after_the_end_tells_everything(make: Maker) -> None:
    with make() as proxy:
        pass
    told: list[TransitionRecord] = []
    proxy.subscribe(told.append, replay=True)
    notified(proxy)
    assert tuple(told) == proxy.status().history


def test_who_unsubscribed_hears_nothing_more(make: Maker) -> None:
    proxy = make()
    told: list[TransitionRecord] = []
    unsubscribe = proxy.subscribe(told.append)
    proxy.start()
    proxy.wait_running(timeout=5)
    notified(proxy)
    unsubscribe()
    unsubscribe()
    proxy.close(timeout=5)
    assert [str(record.dest) for record in told] == WAY_UP


# ---- the threading contract ----


def test_only_the_owner_thread_tells_changes(make: Maker) -> None:
    with make():
        pass
    threads = make.log.threads["proxy.transition"]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_a_running_proxy_has_five_threads_at_most(make: Maker) -> None:
    with make():
        assert len({thread.name for thread in own_threads()} - {"proxy_fsm-monitor"}) <= 5


def test_stop_works_from_a_signal_handler_while_the_main_thread_waits(make: Maker) -> None:
    proxy = make()
    previous = signal.signal(signal.SIGUSR1, lambda *_: proxy.stop())
    try:
        proxy.start()
        proxy.wait_running(timeout=5)
        threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGUSR1)).start()
        assert proxy.wait(timeout=5) is State.STOPPED
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_stop_works_from_a_signal_handler_on_an_idle_engine_that_is_waited_for(make: Maker) -> None:
    proxy = make()
    previous = signal.signal(signal.SIGALRM, lambda *_: proxy.stop())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert proxy.wait(timeout=5) is State.STOPPED
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_a_storm_of_signals_that_stop_it_while_it_starts_does_not_harm(make: Maker) -> None:
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


def test_a_forked_child_owns_nothing_and_ends_nothing(make: Maker, agent: Agent) -> None:
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


def test_a_dropped_running_proxy_is_ended_with_a_warning(make: Maker) -> None:
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
logging.getLogger("paramiko").addHandler(logging.NullHandler())  # its server's end is none of our business here
server, agent = LoopbackSSHServer(), Agent(serving=True)
server.start()
proxy = Maker(server.connect_transport(), agent, Path(sys.argv[1]))(HEALTHY)
proxy.start()
proxy.wait_running(timeout=10)
print(proxy.status().pid, proxy.status().listen_address, flush=True)
"""


def test_the_interpreters_end_ends_the_proxies(tmp_path: Path) -> None:
    """No close, no stop: the script just ends, with a proxy running."""
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


def test_an_idle_proxy_that_is_dropped_says_nothing(make: Maker) -> None:
    proxy = make()
    make.made.clear()
    del proxy
    gc.collect()


def test_the_transport_stays_the_callers(make: Maker, transport: paramiko.Transport, server: LoopbackSSHServer) -> None:
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


def test_twenty_proxies_on_one_transport_all_run_and_all_stop(make: Maker, agent: Agent) -> None:
    proxies = [make(session=make.session(name=f"alice-{number}")) for number in range(20)]
    for proxy in proxies:
        proxy.start()
    for proxy in proxies:
        proxy.wait_running(timeout=20)
    eventually(lambda: len(agent.connections) == 20, what="each has a channel of its own")
    assert len(own_threads("proxy_fsm-monitor")) == 1
    for proxy in proxies:
        proxy.stop()
    assert {proxy.wait(timeout=20) for proxy in proxies} == {State.STOPPED}


# ---- faults, each with its reason ----


def fault(proxy: Proxy, timeout: float = 8) -> EndReason | None:
    """Start a proxy that is to fail and return why it did."""
    proxy.start()
    assert proxy.wait(timeout=timeout) is State.FAILED
    return proxy.status().reason


def test_local_faults_never_touch_the_graphics_port(make: Maker, agent: Agent, tmp_path: Path) -> None:
    not_executable, not_a_program = tmp_path / "plain", tmp_path / "garbage"
    not_executable.write_text("#!/bin/sh\n")
    not_a_program.write_bytes(b"\x01\x02\x03")
    not_a_program.chmod(0o700)
    (tmp_path / "file").write_text("")

    class NoDisplay(ScriptedBackend):
        needs_display = True

    (tmp_path / "x").mkdir()
    reasons = {
        "missing": fault(make(backend=NX3Backend("/nonexistent/nxproxy"))),
        "plain": fault(make(backend=NX3Backend(str(not_executable)))),
        "no display": fault(make(backend=NoDisplay(tmp_path / "x"), environ={})),
        "root": fault(make(sessions_root=tmp_path / "file" / "root")),
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

    assert fault(make(backend=Garbage(tmp_path))) is EndReason.PROXY_NOT_STARTABLE
    assert not agent.connections
    assert all(proxy.status().retryable for proxy in make.made)
    assert "nxproxy" in (make.made[0].status().hint or "")


def test_a_refused_port_is_told_after_agent_connect_s(make: Maker, agent: Agent) -> None:
    agent.stop_listening()
    proxy = make(timeouts=Timeouts(agent_connect_s=0.3))
    assert fault(proxy) is EndReason.AGENT_UNREACHABLE
    assert str(agent.port) in proxy.status().detail
    assert proxy.status().retryable is None
    stopping = proxy.status().history[2]
    assert (stopping.source, stopping.dest) == (State.SPAWNING, State.STOPPING)
    assert stopping.elapsed_s >= 0.3
    tried = re.search(r" for ([\d.]+) s: ", proxy.status().detail)
    assert tried is not None
    assert 0.3 <= float(tried[1]) < 2


def test_a_port_that_begins_to_listen_in_time_is_reached(make: Maker, server: LoopbackSSHServer) -> None:
    server.refuse_next(2)
    with make() as proxy:
        assert proxy.ok()


def test_denied_forwarding_is_told_at_once(make: Maker, server: LoopbackSSHServer, agent: Agent) -> None:
    server.forwarding = Forwarding.DENIED
    proxy = make()
    assert fault(proxy) is EndReason.FORWARDING_DENIED
    assert not agent.connections
    assert proxy.status().retryable is True


def test_a_transport_that_had_ended_is_told(make: Maker, transport: paramiko.Transport) -> None:
    transport.close()
    assert fault(make()) is EndReason.TRANSPORT_LOST


@pytest.mark.parametrize("cut", ["server", "reset", "caller"])
def test_a_lost_transport_is_told_and_all_is_released_at_once(
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


def test_a_silent_transport_is_told_restored_and_given_up(make: Maker, server: LoopbackSSHServer) -> None:
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


def test_a_transport_that_stays_silent_is_given_up_and_freed_later(make: Maker, server: LoopbackSSHServer) -> None:
    proxy = make(timeouts=Timeouts(link_probe_s=0.1, link_dead_s=3, kill_s=0.5))
    proxy.start()
    proxy.wait_running(timeout=5)
    server.freeze()
    assert proxy.wait(timeout=20) is State.FAILED
    assert proxy.status().reason is EndReason.TRANSPORT_SILENT
    server.thaw()
    server.wait_for(lambda: server.channels_open == 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_proxy_is_told_with_its_signal(make: Maker, number: signal.Signals) -> None:
    proxy = make([connect(), say(READY_LINE), die_by(number)])
    assert fault(proxy) is EndReason.PROXY_KILLED
    assert number.name in proxy.status().detail
    assert proxy.status().signal == number


# ---- deadlines ----


def late(proxy: Proxy) -> EndReason | None:
    """Let the deadline of a proxy that is to fail by it pass and return why it failed."""
    let_deadline_pass(proxy)
    assert proxy.wait(timeout=20) is State.FAILED
    return proxy.status().reason


def test_a_preflight_that_hangs_ends_in_start_timeout(make: Maker, tmp_path: Path) -> None:
    entered, gate = threading.Event(), threading.Event()

    class Hanging(ScriptedBackend):
        def find_executable(self) -> str:
            entered.set()
            gate.wait(60)
            return super().find_executable()

    proxy = make(backend=Hanging(tmp_path), timeouts=Timeouts(preflight_s=1000, kill_s=0.2))
    proxy.start()
    assert entered.wait(20)
    assert late(proxy) is EndReason.START_TIMEOUT
    assert "the proxy program's path" in proxy.status().detail
    assert proxy.status().abandoned
    gate.set()


def test_a_proxy_that_never_gets_ready_ends_in_start_timeout(make: Maker, agent: Agent) -> None:
    proxy = make([connect(), wait_eof()], timeouts=Timeouts(ready_s=1000))
    proxy.start()
    eventually(lambda: "sign that the session is established" in proxy.status().waiting_for, what="connected")
    eventually(lambda: len(agent.connections) == 1, what="the agent was reached once")
    assert late(proxy) is EndReason.START_TIMEOUT
    assert "sign that the session is established" in proxy.status().detail
    assert len(agent.connections) == 1


def test_a_proxy_that_never_connects_ends_in_start_timeout(make: Maker, agent: Agent) -> None:
    proxy = make([pause()], timeouts=Timeouts(ready_s=1000))
    proxy.start()
    eventually(lambda: proxy.status().waiting_for == "the channel to the agent", what="the proxy program runs")
    assert late(proxy) is EndReason.START_TIMEOUT
    assert "the channel to the agent" in proxy.status().detail
    assert not agent.connections
    assert proxy.status().retryable is True


def test_a_proxy_that_survives_sigkill_turns_a_clean_stop_into_stop_timeout(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_child_that_keeps_the_output_open_does_not_hold_the_end_up(make: Maker) -> None:
    proxy = make([connect(), say(READY_LINE), fork_holding_output(), exit_with(0)])
    proxy.start()
    proxy.wait(timeout=5)
    assert proxy.status().exit_code == 0


# ---- bugs of ours, and of backends ----


def test_a_backend_that_breaks_ends_in_internal_error_with_its_traceback_logged(make: Maker, tmp_path: Path) -> None:
    class Broken(ScriptedBackend):
        def ready(self, _: Evidence) -> bool:
            raise ZeroDivisionError("of all things")

    proxy = make(backend=Broken(tmp_path))
    assert fault(proxy) is EndReason.INTERNAL_ERROR
    assert "of all things" in proxy.status().detail
    assert "ZeroDivisionError: of all things" in make.log.named("internal.error")[0]["exception"]


def test_a_preflight_that_breaks_ends_in_internal_error(make: Maker, tmp_path: Path) -> None:
    class Broken(ScriptedBackend):
        def command(self, _: Any) -> list[str]:
            raise ZeroDivisionError

    assert fault(make(backend=Broken(tmp_path))) is EndReason.INTERNAL_ERROR


def test_threads_that_cannot_be_started_end_in_internal_error(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "proxy_fsm-process":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert fault(make()) is EndReason.INTERNAL_ERROR


@pytest.mark.parametrize("error", [OSError, SystemExit, KeyboardInterrupt])
def test_nothing_that_a_logger_raises_kills_the_owner(make: Maker, error: type[BaseException]) -> None:
    class Broken:
        def __getattr__(self, level: str) -> Any:
            raise error

    with make(logger=Broken()) as proxy:
        assert proxy.ok()
    assert proxy.state is State.STOPPED


def test_a_monitor_that_cannot_be_started_blinds_nobody(
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
        assert fault(first) is EndReason.INTERNAL_ERROR
        assert first.status().abandoned == ()
    second = make()
    second.start()
    second.wait_running(timeout=5)
    transport.close()
    assert second.wait(timeout=5) is State.FAILED
    assert second.status().reason is EndReason.TRANSPORT_LOST


def test_who_subscribed_before_a_start_that_failed_has_not_stopped_it(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    proxy = make()
    proxy.subscribe(lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            proxy.start()
    assert proxy.state is State.IDLE


def test_a_ctrl_c_at_any_moment_of_start_leaves_one_owner_or_none(tmp_path: Path) -> None:
    """Interrupts come closer and closer; whatever they hit, the proxy can be closed, and is then stopped."""
    command = [sys.executable, "-m", "tests.interrupted_starts", str(tmp_path)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 0, done.stdout


def test_a_flood_of_output_does_not_hold_up_a_stop(make: Maker) -> None:
    flood = Step("import sys\nline = b'x' * 60 + b'\\n'\nwhile True: os.write(2, line * 100)")
    proxy = make([connect(), ignore(), say(READY_LINE), flood], timeouts=Timeouts(stop_grace_s=0.3))
    proxy.start()
    proxy.wait_running(timeout=5)
    assert heard_after_s(proxy) < 2
    assert proxy.wait(timeout=5) is State.STOPPED
    assert proxy.status().signal == signal.SIGKILL


def test_a_transport_that_ends_while_it_is_stopping_shortens_the_grace(
    make: Maker, transport: paramiko.Transport
) -> None:
    proxy = make([ignore(), *HEALTHY, pause()], timeouts=Timeouts(stop_grace_s=60))
    proxy.start()
    proxy.wait_running(timeout=5)
    proxy.stop()
    assert proxy.wait(State.STOPPING, timeout=5) is State.STOPPING
    transport.close()
    assert proxy.wait(timeout=5) is State.STOPPED
    assert proxy.status().signal == signal.SIGKILL


def test_a_status_in_a_forked_child_takes_no_lock(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    with make() as proxy:
        monkeypatch.delattr(Forwarder, "stats")  # which takes one
        child = os.fork()
        if child == 0:
            end_after(30)
            repr(proxy)
            os._exit(0 if proxy.status().state is State.RUNNING else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- secrets ----


def test_what_a_backend_raises_is_redacted_everywhere(make: Maker, tmp_path: Path) -> None:
    class Leaking(ScriptedBackend):
        def ready(self, _: Evidence) -> bool:
            raise ValueError(f"nx/nx,cookie={COOKIE},connect={COOKIE.upper()}")

    proxy = make(backend=Leaking(tmp_path))
    assert fault(proxy) is EndReason.INTERNAL_ERROR
    told = repr(make.log.events) + json.dumps(proxy.status().as_dict()) + repr(ProxyFailed(proxy.status()))
    assert COOKIE not in told.lower()
    assert "ValueError" in told


def test_what_the_proxy_prints_of_the_cookie_reaches_nobody(make: Maker, tmp_path: Path) -> None:
    proxy = make([print_cookie(), Step('put(2, "it is " + cookie().upper() + "!")'), say("\x1b[31mred\x07"), *HEALTHY])
    with proxy:
        told = [
            json.dumps([{k: str(v) for k, v in event.items()} for event in make.log.events]),
            json.dumps(proxy.status().as_dict()),
            repr(proxy) + repr(proxy.status()) + repr(make.session()) + str(make.session()),
            (tmp_path / "sessions" / "S-alice-51-1_stDxterm_dp24" / "session.log").read_text(),
            Path(f"/proc/{proxy.status().pid}/cmdline").read_text(),
        ]
        environment = Path(f"/proc/{proxy.status().pid}/environ")
        assert COOKIE in environment.read_text()
        assert environment.stat().st_mode & 0o077 == 0
    for text in told:
        assert COOKIE not in text.lower()
        assert "\x1b" not in text
    assert "<hidden>" in told[3]


def test_the_log_is_private(make: Maker, tmp_path: Path) -> None:
    with make():
        root = tmp_path / "sessions" / "S-alice-51-1_stDxterm_dp24"
        assert (root.stat().st_mode & 0o777, (root / "session.log").stat().st_mode & 0o777) == (0o700, 0o600)


# ---- status ----


def test_a_status_is_whole_and_json_safe_at_every_moment(make: Maker) -> None:
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


def test_a_viewer_is_ready_with_the_first_bytes_and_closed_by_its_user(make: Maker, agent: Agent) -> None:
    proxy = make(backend=viewer(connect(), wait_eof(), exit_with(1), ready_when="first_bytes"))
    proxy.start()
    eventually(lambda: agent.connections, what="the viewer connected")
    assert proxy.state is State.SPAWNING
    agent.send(b"RFB 003.008\n")
    proxy.wait_running(timeout=5)
    assert (proxy.status().listen_address or "").startswith("127.0.0.1:")
    proxy.close(timeout=5)


def test_a_viewer_that_exits_with_zero_after_it_was_ready_was_closed(make: Maker, tmp_path: Path) -> None:
    with Gate(tmp_path / "gate") as gate:
        proxy = make(
            backend=viewer(connect(), wait_file(gate.path), exit_with(0), ready_when="connected"),
            session=make.session(cookie=None, display=None),
        )
        with proxy:
            gate.open()
            assert proxy.wait(timeout=5) is State.STOPPED
    assert proxy.status().reason is EndReason.VIEWER_CLOSED


def test_a_viewer_that_exits_before_it_was_ready_has_failed(make: Maker) -> None:
    assert fault(make(backend=viewer(connect(), exit_with(0)))) is EndReason.PROXY_EXITED


def test_an_agent_that_closes_ends_a_viewers_session(make: Maker, agent: Agent) -> None:
    proxy = make(backend=viewer(connect(), wait_eof(), exit_with(1), ready_when="connected"))
    with proxy:
        eventually(lambda: agent.connections, what="the viewer connected")
        agent.disconnect()
        assert proxy.wait(timeout=5) is State.STOPPED
    assert proxy.status().reason is EndReason.SESSION_ENDED


def test_a_viewer_with_a_connection_gone_is_not_running_for_long(make: Maker) -> None:
    """The viewer let its connection go and stays: nothing runs any more."""
    steps = (connect(), say(READY_LINE), wait_eof(), Step("connection.close()"), pause())
    proxy = make(steps, timeouts=Timeouts(stop_grace_s=0.2))
    with proxy:
        eventually(lambda: make.agent.connections, what="the viewer connected")
        make.agent.disconnect()
        assert proxy.wait(timeout=5) is State.STOPPED
    assert proxy.status().reason is EndReason.SESSION_ENDED


def test_a_custom_backend_needs_but_four_methods(make: Maker) -> None:
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
