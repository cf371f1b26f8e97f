"""The KDrive backend: what it passes to the program, and what it concludes from the tunnel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from proxy_fsm import BackendContext, BackendError, EndReason, Evidence, InvalidSession, KDriveBackend, SessionInfo
from proxy_fsm.evidence import AgentDataReceived, AgentEof, ChannelOpened, ConnectionEnded, Observation, ProcessExited

COOKIE = "0123456789abcdef0123456789abcdef"
NAME = "alice-51-1795334442_stDxterm_dp24"


def context(scratch: Path) -> BackendContext:
    return BackendContext(
        session=SessionInfo(name=NAME, cookie=COOKIE, graphics_port=4788, display=51),
        executable="/usr/bin/x2gokdriveclient",
        listen_address="127.0.0.1:40001",
        sessions_root=Path("/home/alice/.x2go"),
        session_root=Path(f"/home/alice/.x2go/S-{NAME}"),
        environ={},
        scratch=scratch,
    )


def test_cookie_is_only_in_a_private_file(tmp_path: Path) -> None:
    backend = KDriveBackend(options={"link": "lan"})
    before = os.umask(0)
    try:
        backend.preflight(context(tmp_path))
    finally:
        os.umask(before)
    file = tmp_path / "options"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_text() == (
        f"nx/nx,connect=127.0.0.1,port=40001,cookie={COOKIE},retry=5,composite=1,clipboard=1,link=lan:51"
    )
    assert backend.command(context(tmp_path)) == ["/usr/bin/x2gokdriveclient", "-S", f"nx/nx,options={file}:51"]
    assert backend.environment(context(tmp_path)) == {"NX_ROOT": "/home/alice/.x2go"}


def test_path_that_is_invalid_in_an_option_string_is_an_error(tmp_path: Path) -> None:
    odd = tmp_path / "a,listen=4000"
    odd.mkdir()
    for place in (odd, tmp_path / "missing"):
        with pytest.raises(BackendError) as caught:
            KDriveBackend().preflight(context(place))
        assert caught.value.reason is EndReason.PROXY_NOT_STARTABLE


def test_session_needs_cookie_and_display() -> None:
    for session in (
        SessionInfo(name=NAME, graphics_port=4788, display=51),
        SessionInfo(name=NAME, graphics_port=4788, cookie=COOKIE),
    ):
        with pytest.raises(InvalidSession):
            KDriveBackend().check_session(session)


def test_program_is_the_argument_or_the_variable_or_in_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x2gokdriveclient", "other", "third"):
        (tmp_path / name).touch(mode=0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("X2GOKDRIVECLIENT_BINARY", raising=False)
    assert KDriveBackend().find_executable() == str(tmp_path / "x2gokdriveclient")
    monkeypatch.setenv("X2GOKDRIVECLIENT_BINARY", str(tmp_path / "other"))
    assert KDriveBackend().find_executable() == str(tmp_path / "other")
    assert KDriveBackend(str(tmp_path / "third")).find_executable() == str(tmp_path / "third")
    monkeypatch.setenv("X2GOKDRIVECLIENT_BINARY", "/nowhere/kdrive")
    with pytest.raises(BackendError, match="was not found") as caught:
        KDriveBackend().find_executable()
    assert "X2GOKDRIVECLIENT_BINARY" in (caught.value.hint or "")


def test_first_bytes_of_the_agent_mean_ready() -> None:
    assert not KDriveBackend().ready(Evidence(ChannelOpened(1)))
    assert KDriveBackend().ready(Evidence(ChannelOpened(1), AgentDataReceived(1)))


@pytest.mark.parametrize(
    ("seen", "ready", "reason"),
    [
        ([AgentEof(1)], False, None),
        ([AgentEof(1), ConnectionEnded(1, 0, 0, 1.0)], False, EndReason.NEGOTIATION_FAILED),
        ([AgentEof(1), ProcessExited(1, None)], False, EndReason.NEGOTIATION_FAILED),
        ([ProcessExited(0, None)], False, None),
        ([AgentEof(1), ConnectionEnded(1, 0, 9, 1.0)], True, EndReason.SESSION_ENDED),
        ([AgentEof(1), ProcessExited(0, None)], True, EndReason.SESSION_ENDED),
        ([ProcessExited(0, None)], True, EndReason.VIEWER_CLOSED),
        ([ProcessExited(1, None)], True, None),
        ([ProcessExited(None, 9)], True, None),
    ],
)
def test_reason_follows_from_the_tunnel_and_the_exit_code(
    seen: list[Observation], *, ready: bool, reason: EndReason | None
) -> None:
    evidence = Evidence(*seen)
    evidence.ready = ready
    verdict = KDriveBackend().diagnose(evidence)
    assert (None if verdict is None else verdict[0]) is reason
