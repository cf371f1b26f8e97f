"""What tests need of the machine beside Python: told where it is missing, and no excuse where it was promised."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

__all__ = ["PYTHON_X2GO", "REQUIRE", "lack"]

#: Set to 1 where nothing may be missing.
REQUIRE = "PROXY_FSM_REQUIRE_REAL"
#: Where Debian's package python3-x2go is.
PYTHON_X2GO = Path("/usr/lib/python3/dist-packages/x2go")


def lack(missing: list[str]) -> NoReturn:
    """Skip, or fail where nothing may be missing."""
    message = f"missing for tests against the real programs: {', '.join(missing)}"
    if os.environ.get(REQUIRE) == "1":
        pytest.fail(f"{message} ({REQUIRE} is 1)", pytrace=False)
    pytest.skip(f"{message} (tests/install-system-packages installs them)")
