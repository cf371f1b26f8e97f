"""A headless Chromium, driven by selenium."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

from tests.helpers.real import skip_or_fail

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROGRAMS = ("chromium", "chromedriver")
_SWITCHES = """
--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update
--disable-sync --window-size=1300,1000
""".split()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """One browser for all tests; skips if it is missing, or fails if it is required."""
    if missing := [name for name in _PROGRAMS if shutil.which(name) is None]:
        skip_or_fail(missing)
    options = ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for switch in (*_SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()
