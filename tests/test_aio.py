"""What an asyncio program awaits of a proxy, on the real engine with faked workers."""

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
    """How many subscriptions to a proxy there are."""

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
    """Have something happen when the proxy enters a state."""
    proxy.subscribe(lambda record: act(proxy) if record.dest is state else None)


def get_running(proxy: FakedProxy) -> None:
    """Have everything go well from spawning on."""
    proxy.process.starts()
    proxy.tunnel.connects()
    proxy.process.says_ready()


@pytest.mark.parametrize("state", State)
def test_the_state_that_it_is_in_is_waited_for_already(
    faked_proxy: Callable[[State], FakedProxy], state: State
) -> None:
    proxy = faked_proxy(state)
    assert asyncio.run(aio.wait(proxy, state, timeout=0)) is state


def test_a_state_that_is_entered_and_left_just_after_the_first_look_counts(
    faked_proxy: Callable[[State], FakedProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = faked_proxy(State.SPAWNING)

    def look(*states: State, timeout: float | None = None) -> State:
        try:
            return FakedProxy.wait(proxy, *states, timeout=timeout)
        except TimeoutError:
            get_running(proxy)
            proxy.process.exits(1)
            FakedProxy.wait(proxy, timeout=WAIT_S)
            raise

    monkeypatch.setattr(proxy, "wait", look)
    assert asyncio.run(aio.wait(proxy, State.RUNNING, timeout=WAIT_S)) is State.RUNNING


def test_a_state_that_was_left_is_waited_for_in_vain(faked_proxy: Callable[[State], FakedProxy]) -> None:
    proxy = faked_proxy(State.RUNNING)
    with pytest.raises(TimeoutError, match=r"^The proxy was not in spawning within 0\.05 s; it is running\.$"):
        asyncio.run(aio.wait(proxy, State.SPAWNING, timeout=0.05))
    assert proxy.ok()


def test_no_thread_waits_and_the_loop_goes_on(
    faked_proxy: Callable[[State], FakedProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = faked_proxy(State.SPAWNING)
    subscriptions = Subscriptions(proxy, monkeypatch)
    threads = set(threading.enumerate())

    async def client() -> State:
        waiting = [asyncio.create_task(aio.wait(proxy, State.RUNNING, timeout=WAIT_S)) for _ in range(20)]
        await asyncio.sleep(0)
        assert set(threading.enumerate()) <= threads  # one of an earlier test may end meanwhile
        get_running(proxy)
        (state,) = set(await asyncio.gather(*waiting))
        return state

    assert asyncio.run(client()) is State.RUNNING
    assert subscriptions.active == 0


def test_each_change_comes_once_in_order_and_then_the_end(
    faked_proxy: Callable[[State], FakedProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = faked_proxy(State.SPAWNING)
    subscriptions = Subscriptions(proxy, monkeypatch)

    async def client() -> list[list[State]]:
        seen = []
        for replay in (True, False):
            task = asyncio.create_task(collect(replay=replay))
            seen.append(task)
        await asyncio.sleep(0)
        get_running(proxy)
        await aio.wait(proxy, State.RUNNING, timeout=WAIT_S)
        proxy.process.exits(1)
        return await asyncio.wait_for(asyncio.gather(*seen), WAIT_S)

    async def collect(*, replay: bool) -> list[State]:
        return [record.dest async for record in aio.transitions(proxy, replay=replay)]

    everything, news = asyncio.run(client())
    rest = [State.RUNNING, State.STOPPING, State.FAILED]
    assert everything == [State.TUNNELLING, State.SPAWNING, *rest]
    assert news == rest
    assert subscriptions.active == 0


def test_nothing_new_comes_from_a_proxy_that_has_ended(faked_proxy: Callable[[State], FakedProxy]) -> None:
    proxy = faked_proxy(State.STOPPED)

    async def client() -> list[State]:
        return [record.dest async for record in aio.transitions(proxy, replay=False)]

    assert asyncio.run(client()) == []


def test_running_is_running_and_nothing_afterwards() -> None:
    proxy = FakedProxy()
    on(proxy, State.TUNNELLING, lambda proxy: proxy.tunnel.opens())
    on(proxy, State.SPAWNING, get_running)

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
    ("befalls", "error"),
    [
        (lambda proxy: proxy.tunnel.refuses(EndReason.PROXY_NOT_FOUND), ProxyFailed),
        (lambda proxy: proxy.stop(), ProxyStopped),
    ],
    ids=["a fault", "a stop"],
)
def test_what_did_not_get_running_raises_and_is_released(
    befalls: Callable[[FakedProxy], object], error: type[ProxyFailed | ProxyStopped]
) -> None:
    proxy = FakedProxy()
    on(proxy, State.TUNNELLING, befalls)
    on(proxy, State.STOPPING, lambda proxy: proxy.tunnel.preflight_ends())

    async def client() -> None:
        async with aio.running(proxy):
            raise AssertionError("It never ran.")

    with pytest.raises(error) as caught:
        asyncio.run(asyncio.wait_for(client(), WAIT_S))
    assert caught.value.status.state.is_final
    assert proxy.state.is_final


def test_a_task_that_is_cancelled_leaves_nothing_behind(
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
def test_a_task_that_is_cancelled_closes_its_proxy(state: State) -> None:
    """While it starts, and inside the block."""
    proxy = FakedProxy()
    on(proxy, State.TUNNELLING, lambda proxy: proxy.tunnel.opens())
    if state is State.RUNNING:
        on(proxy, State.SPAWNING, get_running)

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


def test_a_forked_child_waits_for_nothing(faked_proxy: Callable[[State], FakedProxy]) -> None:
    proxy = faked_proxy(State.RUNNING)
    child = os.fork()
    if child == 0:
        end_after(30)
        try:
            asyncio.run(aio.close(proxy))
            with pytest.raises(RuntimeError):
                asyncio.run(aio.wait(proxy))
        except BaseException:  # noqa: BLE001 - the parent is told by the status
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert proxy.ok()


def test_close_has_a_time_limit_and_goes_on_after_it(faked_proxy: Callable[[State], FakedProxy]) -> None:
    proxy = faked_proxy(State.RUNNING)
    proxy.process.auto_complete = False
    with pytest.raises(TimeoutError):
        asyncio.run(aio.close(proxy, timeout=0.05))
    assert not proxy.state.is_final
    proxy.process.exits()
    asyncio.run(aio.close(proxy, timeout=WAIT_S))
    assert proxy.state is State.STOPPED
