"""A signal is an order where something can take it, and an exception only where this program waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from proxy_fsm.cli.interrupts import Interrupted, Interrupts


@pytest.fixture(autouse=True)
def handlers_as_before() -> object:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_it_raises_in_what_waits() -> None:
    """A signal that comes just before the read does not end it (CPython), so it finds something there after that."""
    read_fd, write_fd = os.pipe()

    def send() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.write(write_fd, b"x")

    sender = threading.Thread(target=send)
    with Interrupts() as interrupts:
        sender.start()
        with pytest.raises(Interrupted, match="SIGTERM"), interrupts.waiting():
            os.read(read_fd, 1)
    sender.join()
    os.close(read_fd)
    os.close(write_fd)


def test_one_that_came_before_raises_as_soon_as_something_waits() -> None:
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.received == "SIGINT"
        with pytest.raises(Interrupted), interrupts.waiting():
            raise AssertionError("it waited")


def test_it_is_an_order_where_one_is_set_however_often_it_comes() -> None:
    orders: list[int] = []
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGHUP)
        interrupts.on_signal(lambda: orders.append(1))
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # too late for an order, and harmless
    assert orders == [1, 1, 1]


LAST_MOMENT = """
import os, signal
from proxy_fsm.cli.interrupts import Interrupts

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
        kill(pid, number)

late = Late()  # deleted with its module, after the interpreter has taken all handlers away
with Interrupts() as interrupts:
    signal.raise_signal(signal.SIGTERM)
assert interrupts.received == "SIGTERM"
"""


def test_second_signal_while_the_interpreter_ends_is_harmless() -> None:
    assert subprocess.run([sys.executable, "-c", LAST_MOMENT], check=False).returncode == 0


def test_handlers_come_back_where_no_signal_came() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_under_nohup_a_hangup_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGHUP)
        assert interrupts.received is None
