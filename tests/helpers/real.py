"""What tests need of the machine beside Python: they skip where it is missing, and fail where it was promised."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from tests.e2e.procs import missing_programs

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Set to 1 where nothing may be missing.
REQUIRE = "PROXY_FSM_REQUIRE_REAL"
#: Where Debian's package python3-x2go is.
PYTHON_X2GO = Path("/usr/lib/python3/dist-packages/x2go")


def skip_or_fail(missing: Iterable[str], *, promised: bool = True) -> NoReturn:
    """Skip a test; fail it instead where nothing may be missing, unless this machine was never to have it."""
    message = f"missing for tests against the real programs: {', '.join(missing)}"
    if promised and os.environ.get(REQUIRE) == "1":
        pytest.fail(f"{message} ({REQUIRE} is 1)", pytrace=False)
    pytest.skip(f"{message} (tests/install-system-packages installs what Debian has)")


def needs_sshd() -> None:
    """Skip or fail where OpenSSH's server cannot be run."""
    if missing := [name for name in missing_programs() if name in {"sshd", "root"}]:
        skip_or_fail(missing)
