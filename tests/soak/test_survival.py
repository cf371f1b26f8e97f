"""Short forms of the runs: a transport to OpenSSH survives the tunnel's traffic, and the caller notices nothing."""

from __future__ import annotations

import pytest

from tests.helpers.real import needs_sshd
from tests.soak.runs import carry, close_under_upload, probe_under_requests

pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def _require_sshd() -> None:
    needs_sshd()


@pytest.mark.parametrize("by_agent", [False, True], ids=["closed by the proxy", "reset by the agent"])
def test_transport_survives_closing_under_upload(*, by_agent: bool) -> None:
    figures = close_under_upload(200, by_agent=by_agent, every_s=0.1)
    assert figures.commands > 1


def test_transport_survives_rekeying_by_the_client() -> None:
    """With paramiko's own channels it would not: a command that ends during the key exchange is enough."""
    figures = carry(96 << 20, rekey_bytes=1 << 20, every_s=0)
    assert figures.rekeys_by_client > 20
    assert figures.commands > 1


def test_transport_survives_rekeying_by_the_server() -> None:
    figures = carry(32 << 20, config="RekeyLimit 4M", every_s=0)
    assert figures.rekeys_by_server > 5
    assert figures.rekeys_by_client == 0
    assert figures.commands > 1


def test_requests_of_the_caller_survive_constant_probing() -> None:
    figures = probe_under_requests(36)
    assert figures.requests == 36
