"""Settings for all tests."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture(scope="session", autouse=True)
def _late_alarms_are_harmless() -> None:
    """One that a test's timer sent may come when the test's own handler is gone again: it must not end the run.

    A forked child that an alarm is to end calls `tests.engine_helpers.end_after`.
    """
    signal.signal(signal.SIGALRM, lambda *_: None)


#: Of what went wrong, so much is said once more at the very end, characters.
_REMINDER = 400


def pytest_unconfigure(config: pytest.Config) -> None:
    """Name at the very end what failed: of a run elsewhere, often only the end of what it printed is kept."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    for outcome in ("failed", "error"):
        for report in reporter.stats.get(outcome, ()):
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else str(report.longrepr)
            reporter.write_line(f"{outcome}: {report.nodeid}\n    {reason[:_REMINDER]}")
