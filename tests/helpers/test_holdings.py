"""What is held is seen, and what is not released is named."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.holdings import all_released, children, descriptors, nothing_left_open


def test_what_is_not_released_is_named() -> None:
    all_released(list)
    with pytest.raises(AssertionError, match=r"^not released: \['a channel'\]$"):
        all_released(lambda: {"a channel"}, 0)


def test_descriptors_are_held_until_they_are_closed() -> None:
    before = descriptors()
    ends = os.pipe()
    assert {str(end) for end in ends} <= {name.partition(" ")[0] for name in descriptors() - before}
    for end in ends:
        os.close(end)
    nothing_left_open(before)


def test_children_are_held_until_they_are_reaped() -> None:
    before = children()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process.pid in children() - before
    assert process.pid not in children()
