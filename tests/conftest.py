"""Settings for all tests."""

from __future__ import annotations

import gc
import os
import signal

import pytest
from hypothesis import settings

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


#: Workers per core: most tests wait for other programs. And in all: each may have an X2Go server with its own user.
_WORKERS_PER_CORE, _MOST_WORKERS = 2, 12


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """How many tests `-n auto` runs side by side."""
    return min(_WORKERS_PER_CORE * (os.cpu_count() or 1), _MOST_WORKERS)


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of every garbage collection: many tests ask for one, 0.2 s each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _signals_end_programs() -> None:
    """Under nohup SIGHUP is ignored, in the background of a script SIGINT and SIGQUIT, and so in all that is started.

    Caught here they are ignored by this process still, and end a program that a test starts.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture(scope="session", autouse=True)
def _late_alarms_are_harmless() -> None:
    """One that a test's timer sent may come when the test's own handler is gone again: it must not end the run.

    A forked child that an alarm is to end calls `tests.helpers.engine.end_after`.
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
