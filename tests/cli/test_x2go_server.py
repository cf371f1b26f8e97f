"""Commands on an X2Go server that does not answer."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

import pytest

from proxy_fsm.cli import x2go_server
from proxy_fsm.cli.interrupts import Interrupts
from proxy_fsm.cli.output import LogFormat, Output
from proxy_fsm.cli.verb import NotReachedError
from proxy_fsm.cli.x2go_server import X2GoServer
from proxy_fsm.testing import LoopbackSSHServer
from tests.helpers.holdings import own_threads
from tests.helpers.wait import eventually

if TYPE_CHECKING:
    import paramiko

TIMEOUT_S = 0.2


@pytest.mark.parametrize("interruptible", [True, False])
@pytest.mark.parametrize("unanswered", ["_parse_channel_open", "_handle_channel_request"])
def test_unanswered_command_times_out(monkeypatch: pytest.MonkeyPatch, unanswered: str, *, interruptible: bool) -> None:
    """The server answers neither the channel open nor the exec request, for which paramiko waits without limit.

    The connection stays up and is not reported as lost; the waiting thread ends too.
    """
    monkeypatch.setattr(f"proxy_fsm.testing.ssh_server._Connection.{unanswered}", lambda *_: None)
    with LoopbackSSHServer() as ssh, contextlib.closing(ssh.connect()) as client:
        transport = client.get_transport()
        assert transport is not None
        server = X2GoServer(transport, Output(LogFormat.JSON), Interrupts())
        caught: list[NotReachedError] = []

        def ask() -> None:
            with pytest.raises(NotReachedError) as error:
                server._run(["x2golistsessions"], interruptible=interruptible, timeout_s=0.2)
            caught.append(error.value)

        asking = threading.Thread(target=ask, daemon=True)
        began = time.monotonic()
        asking.start()
        asking.join(10)
        assert not asking.is_alive()
        assert time.monotonic() - began >= 0.2
        assert caught[0].fields["reason"] == "no_answer"
        assert caught[0].fields["detail"] == "x2golistsessions did not end within 0.2 s on the server."
        eventually(lambda: not own_threads("x2go-command"))
        assert transport.is_active()


def test_channel_opened_after_timeout_is_closed_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller gave up without it; and for a command that the server does not run paramiko waits for ever."""
    monkeypatch.setattr("proxy_fsm.testing.ssh_server._Connection._handle_channel_request", lambda *_: None)
    with LoopbackSSHServer() as ssh, contextlib.closing(ssh.connect()) as client:
        transport = client.get_transport()
        assert transport is not None
        opened: list[paramiko.Channel] = []
        open_session = transport.open_session

        def open_late(**_: float) -> paramiko.Channel:
            channel = open_session()
            time.sleep(TIMEOUT_S)
            return channel

        monkeypatch.setattr(transport, "open_session", open_late)

        def ask() -> None:
            with pytest.raises(TimeoutError):
                x2go_server._exchange(transport, "x2golistsessions", TIMEOUT_S, opened)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(10)
        assert not asking.is_alive()
        assert [channel.closed for channel in opened] == [True]
        assert transport.is_active()
