"""The KDrive class, on stand-ins: the real x2gokdriveclient was not available."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm import EndReason
from proxy_fsm.testing.scripted import Gate, Step, exit_with, record_call, wait_eof, wait_file
from proxy_fsm.x2go import kdrive, nx3
from tests.helpers.engine import COOKIE
from tests.helpers.wait import eventually

if TYPE_CHECKING:
    from .conftest import Scene

#: Reads its options as x2gokdriveclient does.
READ_OPTIONS = Step("""\
path = sys.argv[2].removeprefix("nx/nx,options=").rpartition(":")[0]
mode = os.stat(path).st_mode & 0o777
text = open(path).read()
options = dict(word.split("=", 1) for word in text.rpartition(":")[0].split(",") if "=" in word)
""")
#: Connects to the address in the options, and sends the cookie to the agent.
CONNECT_AND_SEND = Step("""\
connection = join((options["connect"], int(options["port"])))
connection.sendall(options["cookie"].encode())
""")


def record_options(path: Path) -> Step:
    """Record the options file; before the program contacts the agent, on which the test waits."""
    return Step(f"import json; open({str(path)!r}, 'w').write(json.dumps([path, oct(mode), text]))")


@pytest.fixture
def kd(scene: Scene, x_display: str, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A scene with a display and a stand-in for x2gokdriveclient."""
    steps = (
        record_call(scene.home / "call"),
        READ_OPTIONS,
        record_options(scene.home / "options"),
        CONNECT_AND_SEND,
        wait_eof(),
    )
    monkeypatch.setenv("X2GOKDRIVECLIENT_BINARY", scene.program(steps, "x2gokdriveclient"))
    monkeypatch.setenv("DISPLAY", x_display)
    return scene


def started(scene: Scene, **changes: Any) -> Any:
    """Start a proxy and have the agent send something, as it does once it has accepted the cookie."""
    proxy = scene.make(kdrive.X2GoProxy, **changes)
    proxy.start()
    eventually(lambda: bytes(scene.agent.received) == COOKIE.encode(), what="the cookie at the agent")
    assert not proxy.ok()
    scene.agent.send(b"a picture")
    eventually(proxy.ok, what="ok")
    return proxy


def test_options_file_is_private_and_removed_with_the_proxy(kd: Scene) -> None:
    proxy = started(kd, proxy_options={"link": "lan"})
    called = json.loads((kd.home / "call").read_text())
    assert called["argv"][1] == "-S"
    assert COOKIE not in "".join(called["argv"])
    assert not [value for value in called["environ"].values() if COOKIE in value]
    path, mode, text = json.loads((kd.home / "options").read_text())
    assert called["argv"][2] == f"nx/nx,options={path}:51"
    assert mode == "0o600"
    port = proxy.engine.status().listen_address.rpartition(":")[2]
    assert text == (f"nx/nx,connect=127.0.0.1,cookie={COOKIE},port={port},retry=5,composite=1,clipboard=1,link=lan:51")
    assert Path(path).parent.stat().st_mode & 0o777 == 0o700
    proxy.stop_thread()
    assert not Path(path).parent.exists()


def test_session_closed_by_agent_has_reason_session_ended(kd: Scene) -> None:
    proxy = started(kd)
    kd.agent.disconnect()
    proxy.join(10)
    assert proxy.engine.status().reason is EndReason.SESSION_ENDED


def test_viewer_closed_by_user_has_reason_viewer_closed(kd: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    with Gate(kd.home / "gate") as gate:
        steps = (READ_OPTIONS, CONNECT_AND_SEND, wait_file(gate.path), exit_with(0))
        monkeypatch.setenv("X2GOKDRIVECLIENT_BINARY", kd.program(steps, "closing"))
        proxy = started(kd)
        gate.open()
        proxy.join(10)
    assert proxy.engine.status().reason is EndReason.VIEWER_CLOSED


def test_kdrive_class_is_no_subclass_of_nx3(kd: Scene) -> None:
    """As in python-x2go."""
    assert not isinstance(kd.make(kdrive.X2GoProxy), nx3.X2GoProxy)


def test_kdrive_class_has_python_x2go_attributes(kd: Scene) -> None:
    proxy = kd.make(kdrive.X2GoProxy)
    assert proxy.subsystem == "X2Go KDrive Client"
    assert Path(proxy.PROXY_CMD).name == "x2gokdriveclient"
    assert proxy.PROXY_MODE == "-S"
    assert "NX_CLIENT" not in proxy.PROXY_ENV
    assert proxy.PROXY_ENV["NX_ROOT"] == str(kd.home / "sessions")
    assert kdrive.X2GoProxy().PROXY_OPTIONS == []
