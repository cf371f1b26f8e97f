"""Short forms of the runs: the transport of OpenSSH survives what the tunnel does, and the caller notices nothing."""

from __future__ import annotations

import pytest

from tests.helpers.real import needs_sshd
from tests.soak.runs import carry, close_under_upload, probe_under_requests

pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def _sshd_is_there() -> None:
    needs_sshd()


@pytest.mark.parametrize("by_agent", [False, True], ids=["closed by the proxy", "reset by the agent"])
def test_closing_under_upload_does_not_kill_the_transport(*, by_agent: bool) -> None:
    figures = close_under_upload(200, by_agent=by_agent, every_s=0.1)
    assert figures.commands > 1


def test_keys_that_the_client_wants_fresh_kill_nothing() -> None:
    """The caller's own channels would, by themselves: a command that ends meanwhile is enough."""
    figures = carry(96 << 20, rekey_bytes=1 << 20, every_s=0)
    assert figures.rekeys_by_client > 20
    assert figures.commands > 1


def test_keys_that_the_server_wants_fresh_kill_nothing() -> None:
    figures = carry(32 << 20, config="RekeyLimit 4M", every_s=0)
    assert figures.rekeys_by_server > 5
    assert figures.rekeys_by_client == 0
    assert figures.commands > 1


def test_probes_do_not_disturb_the_caller() -> None:
    figures = probe_under_requests(36)
    assert figures.requests == 36
