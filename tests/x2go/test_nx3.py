"""The NX class, and python-x2go's own NX class on our base."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm import EndReason, State
from proxy_fsm.testing.scripted import connect, exit_with, record_call, say, wait_eof
from proxy_fsm.x2go import base, nx3
from tests.helpers.engine import COOKIE, READY_LINE
from tests.helpers.real import PYTHON_X2GO, skip_or_fail
from tests.helpers.wait import eventually

from .conftest import NAME
from .test_kdrive import CONNECT_AND_SEND, READ_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Scene


@pytest.fixture
def nx(scene: Scene, x_display: str, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A scene with a display and a stand-in for nxproxy."""
    steps = (record_call(scene.home / "call"), say("Info: starting"), connect(), say(READY_LINE), wait_eof())
    monkeypatch.setenv("NXPROXY_BINARY", scene.program(steps, "nxproxy"))
    monkeypatch.setenv("DISPLAY", x_display)
    return scene


def call(scene: Scene) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((scene.home / "call").read_text())
    return found


class TestOurClass:
    def test_cookie_is_passed_only_in_environment(self, nx: Scene) -> None:
        proxy = nx.make(nx3.X2GoProxy)
        process, ok = proxy.start_proxy()
        assert ok
        called = call(nx)
        assert called["argv"][1:] == ["-S"]
        assert COOKIE not in "".join(process.args)
        assert COOKIE.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        port = proxy.engine.status().listen_address.rpartition(":")[2]
        assert called["environ"]["NX_DISPLAY"] == (
            f"nx/nx,connect=127.0.0.1,cookie={COOKIE},port={port},id={NAME},retry=5,composite=1,clipboard=1:51"
        )
        assert called["environ"]["NX_ROOT"] == str(nx.home / "sessions")
        assert called["environ"]["NX_CLIENT"] == "/bin/true"

    def test_nx3_class_has_python_x2go_attributes(self, nx: Scene) -> None:
        proxy = nx.make(nx3.X2GoProxy)
        assert Path(proxy.PROXY_CMD) == nx.home / "nxproxy"
        assert proxy.PROXY_MODE == "-S"
        assert proxy.PROXY_OPTIONS[0] == "nx/nx"
        assert f"port={nx.agent.port}" in proxy.PROXY_OPTIONS
        assert proxy.PROXY_DISPLAY == 51
        assert proxy.subsystem == "NX Proxy"
        assert nx3.X2GoProxy().PROXY_OPTIONS == []

    def test_proxy_is_not_ok_before_session_is_established(self, nx: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NXPROXY_BINARY", nx.program((connect(), wait_eof()), "slow"))
        proxy = nx.make(nx3.X2GoProxy)
        proxy.start()
        eventually(lambda: proxy.fw_tunnel is not None and proxy.fw_tunnel.is_active, what="a channel")
        assert not proxy.ok()
        assert proxy.engine.state is State.SPAWNING

    def test_options_that_nxproxy_can_read_are_passed(self, nx: Scene) -> None:
        options = {"link": "lan", "clipboard": "both", "cookie": "stolen", "what": None}
        proxy = nx.make(nx3.X2GoProxy, proxy_options=options)
        assert proxy.start_proxy()[1]
        string = call(nx)["environ"]["NX_DISPLAY"]
        assert string.endswith(",retry=5,composite=1,link=lan,clipboard=both:51")
        assert "{'cookie': 'stolen', 'what': None}" in nx.log.text

    def test_nxproxy_output_is_written_to_both_logs(self, nx: Scene) -> None:
        proxy = nx.make(nx3.X2GoProxy)
        assert proxy.start_proxy()[1]
        proxy.stop_thread()
        for name in ("session.log", "session.err"):
            text = (nx.container / name).read_text().removeprefix("--- a new attempt\n")
            assert text == f"Info: starting\n{READY_LINE}\n"
            assert (nx.container / name).stat().st_mode & 0o777 == 0o600

    def test_missing_x_server_fails_before_anything_remote_is_touched(
        self, nx: Scene, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("DISPLAY")
        proxy = nx.make(nx3.X2GoProxy)
        assert proxy.start_proxy() == (None, False)
        assert proxy.engine.status().reason is EndReason.DISPLAY_UNAVAILABLE
        assert nx.agent.connections == []

    def test_missing_nxproxy_is_reported_with_package(self, nx: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NXPROXY_BINARY", "/nowhere/nxproxy")
        proxy = nx.make(nx3.X2GoProxy)
        assert proxy.start_proxy() == (None, False)
        assert proxy.engine.status().reason is EndReason.PROXY_NOT_FOUND
        assert "the package nxproxy" in proxy.engine.status().hint

    @pytest.mark.parametrize("lacking", ["name", "cookie", "display", "graphics_port"])
    def test_incomplete_session_is_reported_on_start(self, nx: Scene, lacking: str) -> None:
        fields = {name: value for name, value in vars(nx.info).items() if name != lacking}
        proxy = nx.make(nx3.X2GoProxy, session_info=SimpleNamespace(**fields))
        assert proxy.start_proxy() == (None, False)
        assert lacking in nx.log.text
        assert nx.agent.connections == []

    def test_option_string_too_long_for_nxproxy_is_rejected(self, nx: Scene) -> None:
        options = {f"option{number}": "x" * 200 for number in range(5)}
        proxy = nx.make(nx3.X2GoProxy, proxy_options=options)
        assert proxy.start_proxy() == (None, False)
        assert proxy.engine.status().reason is EndReason.PROXY_NOT_STARTABLE

    def test_only_resumed_session_is_retryable(self, nx: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        """A resumed agent survives a failed attempt; a new one does not."""
        monkeypatch.setenv("NXPROXY_BINARY", nx.program((connect(), wait_eof()), "brief"))
        for status, retryable in (("S", True), ("R", False)):
            info = nx.info
            info.status = status
            proxy = nx.make(nx3.X2GoProxy, session_info=info)
            nx.agent.connections.clear()
            proxy.start()
            eventually(lambda: nx.agent.connections, what="a connection to the agent")
            nx.agent.disconnect()
            proxy.join(10)
            assert proxy.engine.status().retryable is retryable


@pytest.fixture
def foreign(nx: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Load one of python-x2go's own modules with our base class; nothing else of python-x2go runs."""
    if not PYTHON_X2GO.is_dir():
        skip_or_fail(["python3-x2go"])
    for name in ("x2go", "x2go.log", "x2go.defaults", "x2go.backends", "x2go.backends.proxy"):
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    log, defaults = sys.modules["x2go.log"], sys.modules["x2go.defaults"]
    vars(log).update(loglevel_DEFAULT=56, loglevel_INFO=64, loglevel_DEBUG=128, loglevel_ERROR=8)
    vars(sys.modules["x2go"]).update(log=log, defaults=defaults, backends=sys.modules["x2go.backends"])
    vars(defaults).update(X2GOCLIENT_OS="Linux")
    monkeypatch.setitem(sys.modules, "x2go.backends.proxy.base", base)
    vars(sys.modules["x2go.backends"]).update(proxy=sys.modules["x2go.backends.proxy"])
    vars(sys.modules["x2go.backends.proxy"]).update(base=base)

    def load(name: str) -> Any:
        path = PYTHON_X2GO / "backends" / "proxy" / f"{name}.py"
        namespace: dict[str, Any] = {}
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)  # noqa: S102 - Debian's code
        return namespace["X2GoProxy"]

    yield load
    importlib.invalidate_caches()
    del nx


class TestPythonX2GoSource:
    def test_python_x2go_nx3_runs_unchanged_on_our_base(self, nx: Scene, foreign: Any) -> None:
        kind = foreign("nx3")
        assert issubclass(kind, base.X2GoProxy)
        proxy = nx.make(kind)
        assert proxy.PROXY_CMD == "/usr/bin/nxproxy"
        proxy.PROXY_CMD = str(nx.home / "nxproxy")
        process, ok = proxy.start_proxy()
        assert ok
        assert process.poll() is None
        called = call(nx)
        port = proxy.engine.status().listen_address.rpartition(":")[2]
        string = called["environ"]["NX_DISPLAY"]
        assert string.startswith("nx/nx,retry=5,composite=1,connect=127.0.0.1,clipboard=1,cookie=")
        assert string.endswith(f",port={port}:51")  # errors= is removed: the engine needs nxproxy's output
        assert called["argv"][1:] == ["-S"]
        assert called["environ"]["NX_CLIENT"] == "/bin/true"
        assert COOKIE not in nx.log.text  # though its own debug messages contain it
        assert "NX3 proxy is up and running." in nx.log.text
        proxy.stop_thread()
        assert (nx.container / "session.err").read_text().endswith(f"{READY_LINE}\n")
        assert proxy.engine.status().reason is EndReason.STOP_REQUESTED

    def test_python_x2go_nx3_reports_failure_as_usual(self, nx: Scene, foreign: Any) -> None:
        proxy = nx.make(foreign("nx3"))
        proxy.PROXY_CMD = nx.program((exit_with(1),), "broken")
        _, ok = proxy.start_proxy()
        assert not ok
        assert "Bringing up NX3 proxy failed." in nx.log.text

    def test_python_x2go_kdrive_runs_unchanged_on_our_base(self, nx: Scene, foreign: Any) -> None:
        proxy = nx.make(foreign("kdrive"))
        steps = (record_call(nx.home / "call"), READ_OPTIONS, CONNECT_AND_SEND, wait_eof())
        proxy.PROXY_CMD = nx.program(steps, "x2gokdriveclient")
        nx.container.mkdir(parents=True)
        proxy.start()
        eventually(lambda: bytes(nx.agent.received) == COOKIE.encode(), what="the cookie at the agent")
        assert not proxy.ok()
        nx.agent.send(b"a picture")
        eventually(proxy.ok, what="ok")
        assert call(nx)["argv"][1:] == ["-S", f"nx/nx,options={nx.container}/options:51"]
        assert COOKIE not in "".join(proxy.proxy.args)
