"""Settings for all tests."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hypothesis import settings

if TYPE_CHECKING:
    import pytest

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

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
