"""docs/faults.md matches the fault matrix and its measurements."""

from __future__ import annotations

import json
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm import EndReason

from .e2e.fault_table import JSON, MARKDOWN, PYTHON_X2GO, SIGNS, masked, merged, rendered
from .e2e.faults import CAUSES, FAULTS, STALLS, Stalled, When

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(JSON.read_text())
    return document


def test_document_is_up_to_date(measured: dict[str, Any]) -> None:
    assert MARKDOWN.read_text() == rendered(measured), "run python -m tests.e2e.fault_table"


def test_measured_rows_are_those_of_the_matrix(measured: dict[str, Any]) -> None:
    assert [row["cause"] for row in measured["rows"]] == list(CAUSES)
    assert len(set(CAUSES)) == len(CAUSES)


def test_measurements_agree_with_the_matrix(measured: dict[str, Any]) -> None:
    rows = {row["cause"]: row for row in measured["rows"]}
    for fault in FAULTS:
        row = rows[fault.cause]
        assert (row["reason"], row["retryable"], row["again"]) == (str(fault.reason), fault.retryable, fault.left.again)
        assert fault.in_detail in row["detail"]
        assert row["hint"] or fault.reason.clean


def test_measured_stalls_agree_with_their_table(measured: dict[str, Any]) -> None:
    rows = measured["stalls"]["rows"]
    assert [(row["stall"], row["reason"]) for row in rows] == [(stall.name, stall.ends) for stall in STALLS]
    assert all((row["reason"] is None) == (row["ended_s"] is None) for row in rows)


def test_each_kind_of_stall_has_each_duration() -> None:
    assert [(stall.stalled, stall.duration_s) for stall in STALLS] == list(product(Stalled, (20, 40, 60, 130)))


def test_rows_are_consistent() -> None:
    for fault in FAULTS:
        taken_over = fault.reason is EndReason.SESSION_TAKEN_OVER  # it is there, but another client's
        assert fault.retryable in {None, fault.left.again and not taken_over}
        assert (fault.when is When.RUNNING) <= (fault.strike is not None)
        assert not fault.script or fault.sign in SIGNS


def test_python_x2go_reports_belong_to_faults_of_the_matrix() -> None:
    assert set(PYTHON_X2GO) <= {fault.cause for fault in FAULTS}


def test_ports_names_and_paths_are_masked() -> None:
    text = "Forwarding to 127.0.0.1:34847, X server at :17, /run/x/proxy_fsm-482izbvv/proxy.sock and SIGSEGV of tom-51."
    result = "Forwarding to 127.0.0.1:PORT, X server at :N, …/proxy_fsm-…/proxy.sock and SIGSEGV of SESSION."
    assert masked(text, {"/run/x": "…", "tom-51": "SESSION"}) == result


def test_matrix_covers_all_reasons_but_two() -> None:
    """The document names these two."""
    missing = set(EndReason) - {fault.reason for fault in FAULTS}
    assert missing == {EndReason.STOP_TIMEOUT, EndReason.INTERNAL_ERROR}


ROWS: list[dict[str, Any]] = [{"cause": cause, "reason": "a", "cause_to_final_s": 0.25} for cause in CAUSES]


def test_runs_are_merged_by_median_and_maximum() -> None:
    slower = [{**row, "cause_to_final_s": 1.0} for row in ROWS]
    assert merged([ROWS, slower, ROWS])[0]["cause_to_final_ms"] == {"median": 250, "max": 1000}


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda rows: rows[1:], "1 rows in 2 runs"),
        (lambda rows: [{**row, "reason": "b"} for row in rows], "reason differs"),
    ],
)
def test_inconsistent_runs_are_refused(
    spoil: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        merged([ROWS, spoil(ROWS)])
