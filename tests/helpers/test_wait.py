"""Waiting ends with what was awaited, or with an error that says what was not."""

from __future__ import annotations

import pytest

from tests.helpers.wait import eventually


def test_what_was_awaited_is_returned() -> None:
    answers = iter([None, "", "found", "too late"])
    assert eventually(lambda: next(answers)) == "found"


@pytest.mark.parametrize("kind", [AssertionError, TimeoutError])
def test_the_error_says_what_was_awaited_and_the_last_result(kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        eventually(list, 0.02, what="a connection")
    assert str(caught.value) == "not within 0.02 s: a connection; the last result was []"


def test_a_time_that_is_over_is_time_for_one_look() -> None:
    assert eventually(lambda: "found", 0) == "found"
    with pytest.raises(TimeoutError, match="not within 0 s: something true; the last result was 0"):
        eventually(lambda: 0, 0)


def test_what_the_predicate_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        eventually(lambda: 1 / 0)
