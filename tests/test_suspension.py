"""The time for which this process was suspended counts against nobody."""

from __future__ import annotations

import pytest

from proxy_fsm.suspension import excused_s


@pytest.mark.parametrize(("late_s", "excused"), [(-5, 0), (0, 0), (0.1, 0), (0.2, 0.4), (1, 2), (60, 61)])
def test_suspension_is_excused_with_time_to_catch_up(late_s: float, excused: float) -> None:
    assert excused_s(late_s) == pytest.approx(excused)
