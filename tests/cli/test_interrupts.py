"""A signal calls a callback if one is set, and raises only where the program waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from proxy_fsm.cli.interrupts import Interrupted, Interrupts


@pytest.fixture(autouse=True)
def restore_handlers() -> object:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signal_raises_in_waiting_block() -> None:
    """A signal just before the read does not end it (CPython), so a byte follows that does."""
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


def test_earlier_signal_raises_on_entry_of_waiting_block() -> None:
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.received == "SIGINT"
        with pytest.raises(Interrupted), interrupts.waiting():
            raise AssertionError("it waited")


def test_callback_is_called_on_every_signal() -> None:
    calls: list[int] = []
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGHUP)
        interrupts.on_signal(lambda: calls.append(1))
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)  # too late for the callback, and harmless
    assert calls == [1, 1, 1]


LAST_MOMENT = """
import os, signal
from proxy_fsm.cli.interrupts import Interrupts

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
        kill(pid, number)

late = Late()  # deleted with its module, after the interpreter has removed all handlers
with Interrupts() as interrupts:
    signal.raise_signal(signal.SIGTERM)
assert interrupts.received == "SIGTERM"
"""


def test_second_signal_during_interpreter_exit_is_harmless() -> None:
    assert subprocess.run([sys.executable, "-c", LAST_MOMENT], check=False).returncode == 0


def test_handlers_are_restored_if_no_signal_came() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_sighup_stays_ignored_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGHUP)
        assert interrupts.received is None
