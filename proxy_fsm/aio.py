"""Proxies in an asyncio program: awaitable counterparts of the methods of `Proxy` that wait.

::

    async with aio.running(Proxy(session, transport)) as proxy:  # the session is on the screen
        async for record in aio.transitions(proxy):
            print(record.source, "→", record.dest, record.detail)

None of this blocks a thread: the engine passes each change to the loop. All other methods of a `Proxy` return at once
and can be called directly: ``proxy.stop()``, ``proxy.status()``, ``proxy.ok()``.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING

from proxy_fsm.errors import ProxyFailed, ProxyStopped
from proxy_fsm.states import State

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from proxy_fsm.proxy import Proxy
    from proxy_fsm.status import TransitionRecord

__all__ = ["close", "running", "transitions", "wait", "wait_running"]


async def transitions(proxy: Proxy, *, replay: bool = True) -> AsyncGenerator[TransitionRecord, None]:
    """Yield each change of state, in order, without loss, until the final one.

    Args:
        proxy: The proxy.
        replay: Whether to begin with the past changes; if not, with those after the first step of the iteration.
    """
    loop = asyncio.get_running_loop()
    records: asyncio.Queue[TransitionRecord] = asyncio.Queue()
    skipped = 0 if replay else len(proxy.status().history)
    unsubscribe = proxy.subscribe(records.put_nowait, via=loop.call_soon_threadsafe, replay=True)
    try:
        while True:
            record = await records.get()
            if record.sequence > skipped:
                yield record
            if record.dest.is_final:
                return
    finally:
        unsubscribe()


async def wait(proxy: Proxy, *states: State, timeout: float | None = None) -> State:  # noqa: ASYNC109 - as Proxy.wait
    """Wait until a proxy is in one of these states, or in a final one, and return that state.

    Args:
        proxy: The proxy.
        states: The states; none to wait for a final one.
        timeout: In seconds; None for no limit.

    Raises:
        TimeoutError: It reached none of them in time; the proxy continues.
        RuntimeError: Called in a forked child.
    """
    current = len(proxy.status().history)  # the newest record counts, though it may not be published to waiters yet
    with suppress(TimeoutError):
        return proxy.wait(*states, timeout=0)
    wanted = frozenset(State(state) for state in states)
    try:
        async with asyncio.timeout(timeout):
            async with aclosing(transitions(proxy)) as records:
                async for record in records:
                    if record.sequence >= current and (record.dest in wanted or record.dest.is_final):
                        return record.dest
    except TimeoutError:
        names = ", ".join(sorted(wanted)) or "a final state"
        raise TimeoutError(f"The proxy was not in {names} within {timeout} s; it is {proxy.state}.") from None
    raise AssertionError("The last change always leads to a final state.")


async def wait_running(proxy: Proxy, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as Proxy.wait_running
    """Wait until a proxy is running.

    Args:
        proxy: The proxy.
        timeout: In seconds; None for no limit.

    Raises:
        ProxyFailed: It failed; ``status`` says why.
        ProxyStopped: It was stopped, or the session ended.
        TimeoutError: None of this happened in time; the proxy continues.
    """
    state = await wait(proxy, State.RUNNING, timeout=timeout)
    if state is State.FAILED:
        raise ProxyFailed(proxy.status())
    if state is State.STOPPED:
        raise ProxyStopped(proxy.status())


async def close(proxy: Proxy, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as Proxy.close
    """Stop a proxy and wait until everything is released.

    If the task is cancelled in the meantime, this returns at once; the proxy stops all the same.

    Args:
        proxy: The proxy.
        timeout: In seconds; None waits as long as its own time limits allow, which are all finite.

    Raises:
        TimeoutError: Not everything was released in time; the shutdown continues.
    """
    try:
        proxy.close(timeout=0)
    except TimeoutError:
        await wait(proxy, timeout=timeout)


@asynccontextmanager
async def running(proxy: Proxy) -> AsyncIterator[Proxy]:
    """Start a proxy, enter the block once it is running, and close it afterwards.

    Args:
        proxy: A proxy that was not started.

    Raises:
        InvalidTransition: It was started or stopped before.
        ProxyFailed: It failed before it was running; everything is released then.
        ProxyStopped: It was stopped before it was running.
    """
    proxy.start()
    try:
        await wait_running(proxy)
        yield proxy
    finally:
        await close(proxy)
