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


#: Workers per core, since most tests wait for other programs; and in total, since each may run an X2Go server with its
#: own user.
_WORKERS_PER_CORE, _MAX_WORKERS = 2, 12


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return how many workers `-n auto` starts."""
    return min(_WORKERS_PER_CORE * (os.cpu_count() or 1), _MAX_WORKERS)


def pytest_collection_finish() -> None:
    """Exclude imported modules and collected tests from garbage collection: many tests run one, 0.2 s each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _signals_end_programs() -> None:
    """Install handlers for ignored signals, so that the programs that tests start do not inherit SIG_IGN.

    SIGHUP is ignored under nohup, SIGINT and SIGQUIT in a script's background. With a handler that does nothing this
    process still ignores them, but they end a program that a test starts.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture(scope="session", autouse=True)
def _late_alarms_are_harmless() -> None:
    """Ignore a test's alarm that arrives after the test has removed its own handler: it must not end the run.

    A forked child that an alarm is to end calls `tests.helpers.engine.end_after`.
    """
    signal.signal(signal.SIGALRM, lambda *_: None)


#: How much of each failure is repeated at the very end, in characters.
_REMINDER_CHARS = 400


def pytest_unconfigure(config: pytest.Config) -> None:
    """List the failures at the very end, since often only the end of a remote run's output is kept."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    for outcome in ("failed", "error"):
        for report in reporter.stats.get(outcome, ()):
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else str(report.longrepr)
            reporter.write_line(f"{outcome}: {report.nodeid}\n    {reason[:_REMINDER_CHARS]}")
