"""The awaitables of an asyncio program, on the real engine with faked workers."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm import EndReason, InvalidTransition, ProxyFailed, ProxyStopped, State, aio
from proxy_fsm.testing import FakedProxy

from .helpers.engine import end_after

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_S = 10.0


class Subscriptions:
    """Counts the active subscriptions to a proxy."""

    def __init__(self, proxy: FakedProxy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.active = 0
        self._subscribe = proxy.subscribe
        monkeypatch.setattr(proxy, "subscribe", self._counted)

    def _counted(self, *arguments: Any, **options: Any) -> Callable[[], None]:
        unsubscribe = self._subscribe(*arguments, **options)
        self.active += 1

        def counted() -> None:
            unsubscribe()
            self.active -= 1

        return counted


def on(proxy: FakedProxy, state: State, act: Callable[[FakedProxy], object]) -> None:
    """Call a function when the proxy enters a state."""
    proxy.subscribe(lambda record: act(proxy) if record.dest is state else None)


def complete_start(proxy: FakedProxy) -> None:
    """Let the start succeed from spawning on."""
    proxy.process.starts()
    proxy.tunnel.connects()
    proxy.process.prints_ready()


@pytest.mark.parametrize("state", State)
def test_wait_for_the_current_state_returns_at_once(faked_proxy: Callable[[State], FakedProxy], state: State) -> None:
    proxy = faked_proxy(state)
    assert asyncio.run(aio.wait(proxy, state, timeout=0)) is state


def test_wait_sees_a_state_left_right_after_the_first_check(
    faked_proxy: Callable[[State], FakedProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = faked_proxy(State.SPAWNING)

    def first_check(*states: State, timeout: float | None = None) -> State:
        try:
            return FakedProxy.wait(proxy, *states, timeout=timeout)
        except TimeoutError:
            complete_start(proxy)
            proxy.process.exits(1)
            FakedProxy.wait(proxy, timeout=WAIT_S)
            raise

    monkeypatch.setattr(proxy, "wait", first_check)
    assert asyncio.run(aio.wait(proxy, State.RUNNING, timeout=WAIT_S)) is State.RUNNING


def test_wait_for_a_past_state_times_out(faked_proxy: Callable[[State], FakedProxy]) -> None:
    proxy = faked_proxy(State.RUNNING)
    with pytest.raises(TimeoutError, match=r"^The proxy was not in spawning within 0\.05 s; it is running\.$"):
        asyncio.run(aio.wait(proxy, State.SPAWNING, timeout=0.05))
    assert proxy.ok()


def test_wait_blocks_neither_thread_nor_loop(
    faked_proxy: Callable[[State], FakedProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = faked_proxy(State.SPAWNING)
    subscriptions = Subscriptions(proxy, monkeypatch)
    threads = set(threading.enumerate())

    async def client() -> State:
        waiting = [asyncio.create_task(aio.wait(proxy, State.RUNNING, timeout=WAIT_S)) for _ in range(20)]
        await asyncio.sleep(0)
        assert set(threading.enumerate()) <= threads  # one of an earlier test may end in the meantime
        complete_start(proxy)
        (state,) = set(await asyncio.gather(*waiting))
        return state

    assert asyncio.run(client()) is State.RUNNING
    assert subscriptions.active == 0


def test_transitions_yield_each_change_once_in_order(
    faked_proxy: Callable[[State], FakedProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = faked_proxy(State.SPAWNING)
    subscriptions = Subscriptions(proxy, monkeypatch)

    async def client() -> list[list[State]]:
        tasks = [asyncio.create_task(collect(replay=replay)) for replay in (True, False)]
        await asyncio.sleep(0)
        complete_start(proxy)
        await aio.wait(proxy, State.RUNNING, timeout=WAIT_S)
        proxy.process.exits(1)
        return await asyncio.wait_for(asyncio.gather(*tasks), WAIT_S)

    async def collect(*, replay: bool) -> list[State]:
        return [record.dest async for record in aio.transitions(proxy, replay=replay)]

    replayed, new = asyncio.run(client())
    rest = [State.RUNNING, State.STOPPING, State.FAILED]
    assert replayed == [State.TUNNELLING, State.SPAWNING, *rest]
    assert new == rest
    assert subscriptions.active == 0


def test_transitions_of_an_ended_proxy_are_empty_without_replay(faked_proxy: Callable[[State], FakedProxy]) -> None:
    proxy = faked_proxy(State.STOPPED)

    async def client() -> list[State]:
        return [record.dest async for record in aio.transitions(proxy, replay=False)]

    assert asyncio.run(client()) == []


def test_running_enters_when_running_and_closes_afterwards() -> None:
    proxy = FakedProxy()
    on(proxy, State.TUNNELLING, lambda proxy: proxy.tunnel.opens())
    on(proxy, State.SPAWNING, complete_start)

    async def client() -> None:
        async with aio.running(proxy) as same:
            assert same is proxy
            assert proxy.ok()
        assert proxy.state is State.STOPPED

    asyncio.run(asyncio.wait_for(client(), WAIT_S))
    assert proxy.status().reason is EndReason.STOP_REQUESTED
    with pytest.raises(InvalidTransition):
        asyncio.run(aio.running(proxy).__aenter__())


@pytest.mark.parametrize(
    ("cause", "error"),
    [
        (lambda proxy: proxy.tunnel.fails(EndReason.PROXY_NOT_FOUND), ProxyFailed),
        (lambda proxy: proxy.stop(), ProxyStopped),
    ],
    ids=["a fault", "a stop"],
)
def test_running_raises_and_releases_if_the_start_fails(
    cause: Callable[[FakedProxy], object], error: type[ProxyFailed | ProxyStopped]
) -> None:
    proxy = FakedProxy()
    on(proxy, State.TUNNELLING, cause)
    on(proxy, State.STOPPING, lambda proxy: proxy.tunnel.preflight_ends())

    async def client() -> None:
        async with aio.running(proxy):
            raise AssertionError("The block was entered.")

    with pytest.raises(error) as caught:
        asyncio.run(asyncio.wait_for(client(), WAIT_S))
    assert caught.value.status.state.is_final
    assert proxy.state.is_final


def test_cancelled_wait_unsubscribes(
    faked_proxy: Callable[[State], FakedProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = faked_proxy(State.RUNNING)
    subscriptions = Subscriptions(proxy, monkeypatch)

    async def client() -> None:
        task = asyncio.create_task(aio.wait(proxy))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(client())
    assert proxy.ok()
    assert subscriptions.active == 0


@pytest.mark.parametrize("state", [State.SPAWNING, State.RUNNING])
def test_cancelled_running_block_closes_the_proxy(state: State) -> None:
    """Both while it starts and inside the block."""
    proxy = FakedProxy()
    on(proxy, State.TUNNELLING, lambda proxy: proxy.tunnel.opens())
    if state is State.RUNNING:
        on(proxy, State.SPAWNING, complete_start)

    async def client() -> None:
        async with aio.running(proxy):
            await asyncio.Event().wait()

    async def program() -> None:
        task = asyncio.create_task(client())
        await asyncio.sleep(0)
        await aio.wait(proxy, state, timeout=WAIT_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert proxy.state is State.STOPPED

    asyncio.run(asyncio.wait_for(program(), WAIT_S))


def test_forked_child_cannot_wait(faked_proxy: Callable[[State], FakedProxy]) -> None:
    proxy = faked_proxy(State.RUNNING)
    child = os.fork()
    if child == 0:
        end_after(30)
        try:
            asyncio.run(aio.close(proxy))
            with pytest.raises(RuntimeError):
                asyncio.run(aio.wait(proxy))
        except BaseException:  # noqa: BLE001 - the exit status reports it to the parent
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert proxy.ok()


def test_close_times_out_and_shutdown_continues(faked_proxy: Callable[[State], FakedProxy]) -> None:
    proxy = faked_proxy(State.RUNNING)
    proxy.process.auto_complete = False
    with pytest.raises(TimeoutError):
        asyncio.run(aio.close(proxy, timeout=0.05))
    assert not proxy.state.is_final
    proxy.process.exits()
    asyncio.run(aio.close(proxy, timeout=WAIT_S))
    assert proxy.state is State.STOPPED
