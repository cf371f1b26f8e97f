"""The base class: third-party subclasses, and how python-x2go's programs use it."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from proxy_fsm import EndReason, InvalidSession, State
from proxy_fsm.evidence import OutputLine
from proxy_fsm.testing import Forwarding
from proxy_fsm.testing.scripted import Step, connect, exit_with, ignore, print_cookie, record_call, say, wait_eof
from proxy_fsm.x2go.base import X2GoProxy
from proxy_fsm.x2go.handles import ProcessHandle
from proxy_fsm.x2go.logs import DEBUG, ERROR, INFO
from tests.helpers.engine import COOKIE
from tests.helpers.holdings import children, descriptors, nothing_left_open, threads_ended
from tests.helpers.wait import eventually

from .conftest import NAME, Session

if TYPE_CHECKING:
    from collections.abc import Callable

    from .conftest import Scene

SOON_S = 5.0


def viewer(scene: Scene, *steps: Any, **attributes: Any) -> type[X2GoProxy]:
    """Make a subclass that only sets its program."""
    program = scene.program(steps or (record_call(scene.home / "call"), connect(), wait_eof()))
    return type("Viewer", (X2GoProxy,), {"PROXY_CMD": program, "PROXY_ARGS": ["127.0.0.1", "{port}"], **attributes})


def call(scene: Scene) -> dict[str, Any]:
    """Return how the program was called."""
    found: dict[str, Any] = json.loads((scene.home / "call").read_text())
    return found


def within(limit_s: float, function: Callable[..., Any], *arguments: Any) -> Any:
    began = time.monotonic()
    result = function(*arguments)
    assert time.monotonic() - began < limit_s
    return result


class TestSubclass:
    def test_program_set_by_class_attributes_runs(self, scene: Scene) -> None:
        proxy = scene.make(viewer(scene, PROXY_ENV={"FRUIT": "pear"}))
        process, ok = proxy.start_proxy()
        assert ok is True
        assert process is proxy.proxy
        assert proxy.ok()
        assert proxy.engine.state is State.RUNNING
        called = call(scene)
        assert called["argv"][1] == "127.0.0.1"
        assert int(called["argv"][2]) > 1024
        assert called["environ"]["FRUIT"] == "pear"
        assert called["environ"]["PATH"] == os.environ["PATH"]

    def test_program_set_by_instance_attributes_runs(self, scene: Scene) -> None:
        class Viewer(X2GoProxy):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.PROXY_CMD = scene.program((record_call(scene.home / "call"), connect(), wait_eof()))
                self.PROXY_ARGS = ["127.0.0.1:{port}"]
                self.PROXY_ENV.update({"FRUIT": "plum"})

        process, ok = scene.make(Viewer).start_proxy()
        assert ok
        assert process.poll() is None
        assert call(scene)["environ"]["FRUIT"] == "plum"

    def test_each_object_has_its_own_lists(self, scene: Scene) -> None:
        kind = viewer(scene)
        scene.make(kind).PROXY_ARGS.append("--more")
        assert kind.PROXY_ARGS == ["127.0.0.1", "{port}"]
        assert scene.make(kind).PROXY_ARGS == kind.PROXY_ARGS

    def test_replaced_environment_is_added_and_removed_variables_are_unset(
        self, scene: Scene, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("UNWANTED", "1")
        monkeypatch.setenv("NX_DISPLAY", "an outer session's")
        monkeypatch.setenv("NX_CLIENT", "an outer session's")
        first = scene.make(viewer(scene))
        first.PROXY_ENV = {"FRUIT": "fig"}
        assert first.start_proxy()[1]
        environ = call(scene)["environ"]
        assert environ["FRUIT"] == "fig"
        assert environ["PATH"] == os.environ["PATH"]
        second = scene.make(viewer(scene))
        del second.PROXY_ENV["UNWANTED"]
        second.PROXY_ENV["NX_CLIENT"] = "own"
        assert second.start_proxy()[1]
        environ = call(scene)["environ"]
        assert "UNWANTED" not in environ
        assert environ["NX_CLIENT"] == "own"
        assert "NX_DISPLAY" not in environ

    def test_hook_can_remove_a_variable(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        """The inherited environment does not bring it back."""
        monkeypatch.setenv("UNWANTED", "1")

        class Viewer(viewer(scene)):  # type: ignore[misc]
            def process_proxy_options(self) -> None:
                del self.PROXY_ENV["UNWANTED"]

        assert scene.make(Viewer).start_proxy()[1]
        assert "UNWANTED" not in call(scene)["environ"]
        assert call(scene)["environ"]["PATH"] == os.environ["PATH"]

    def test_environment_replaced_by_hook_is_added(self, scene: Scene) -> None:
        class Viewer(viewer(scene)):  # type: ignore[misc]
            def process_proxy_options(self) -> None:
                self.PROXY_ENV = {"FRUIT": "fig"}

        assert scene.make(Viewer).start_proxy()[1]
        environ = call(scene)["environ"]
        assert (environ["FRUIT"], environ["PATH"]) == ("fig", os.environ["PATH"])

    def test_subclass_may_reuse_method_names_of_the_backend(self, scene: Scene) -> None:
        """A third-party class may use any name that python-x2go's base class does not have."""

        def fail(*_: Any) -> None:
            raise LookupError("not for us")

        names = ("prepare", "environment", "program", "command", "preflight", "ready", "diagnose", "close", "files")
        assert scene.make(viewer(scene, **dict.fromkeys(names, fail))).start_proxy()[1]

    def test_attributes_may_be_set_before_base_init(self, scene: Scene) -> None:
        class Viewer(X2GoProxy):
            subsystem = "Fruit Viewer"

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self.PROXY_CMD = scene.program((record_call(scene.home / "call"), connect(), wait_eof()))
                self.PROXY_ARGS = ["127.0.0.1:{port}"]
                self.PROXY_ENV = {"FRUIT": "plum"}
                super().__init__(*args, **kwargs)

        proxy = scene.make(Viewer)
        assert proxy.start_proxy()[1]
        assert call(scene)["environ"]["FRUIT"] == "plum"
        assert proxy.subsystem == "Fruit Viewer"
        assert "The Fruit Viewer is up." in scene.log.text

    def test_command_line_contains_mode_options_and_display(self, scene: Scene) -> None:
        kind = viewer(scene, PROXY_MODE="-S", PROXY_OPTIONS=["nx/nx", "port=0", "link=lan"], PROXY_DISPLAY=7)
        proxy = scene.make(kind)
        assert proxy._generate_cmdline()[-2:] == ["-S", "nx/nx,port=0,link=lan:7"]
        proxy._update_local_proxy_socket(4001)
        assert proxy._generate_cmdline()[-1] == "nx/nx,port=4001,link=lan:7"

    def test_viewer_may_open_any_number_of_connections(self, scene: Scene) -> None:
        store = Step("kept = [*globals().get('kept', []), connection]")
        proxy = scene.make(viewer(scene, connect(), store, connect(), store, connect(), wait_eof()))
        assert proxy.start_proxy()[1]
        eventually(lambda: proxy.engine.status().tunnel.connections == 3, what="three connections")

    def test_missing_program_is_reported(self, scene: Scene) -> None:
        proxy = scene.make(X2GoProxy)
        assert proxy.start_proxy() == (None, False)
        assert proxy.engine.status().reason is EndReason.PROXY_NOT_FOUND
        assert "PROXY_CMD is not set" in scene.log.text


class TestCookie:
    @pytest.mark.parametrize("cookie", [COOKIE, COOKIE.upper()])
    def test_cookie_in_option_string_is_moved_to_environment_for_any_program(self, scene: Scene, cookie: str) -> None:
        options = ["nx/nx", "connect=127.0.0.1", "port=0", f"cookie={cookie}", "errors=elsewhere"]
        kind = viewer(scene, PROXY_ARGS=["--quiet"], PROXY_MODE="-S", PROXY_OPTIONS=options, PROXY_DISPLAY=51)
        steps = (record_call(scene.home / "call"), connect(), wait_eof())
        proxy = scene.make(kind, session_info=scene.info)
        proxy.PROXY_CMD = scene.program(steps, "my-proxy")
        process, ok = proxy.start_proxy()
        assert ok
        port = proxy.engine.status().listen_address.rpartition(":")[2]
        called = call(scene)
        assert called["argv"][1:] == ["--quiet", "-S"]
        assert called["environ"]["NX_DISPLAY"] == f"nx/nx,connect=127.0.0.1,port={port},cookie={cookie}:51"
        assert cookie not in "".join(process.args)

    @pytest.mark.parametrize("words", [["--cookie", COOKIE], [f"--at=x,{COOKIE.upper()}"], ["-C", f"nx/nx,{COOKIE}"]])
    @pytest.mark.parametrize("name", ["viewer", "nxproxy"])
    def test_cookie_in_another_argument_is_rejected(
        self, scene: Scene, x_display: str, monkeypatch: pytest.MonkeyPatch, words: list[str], name: str
    ) -> None:
        monkeypatch.setenv("DISPLAY", x_display)
        proxy = scene.make(viewer(scene, PROXY_ARGS=["{port}", *words]))
        proxy.PROXY_CMD = scene.program((record_call(scene.home / "call"), connect(), wait_eof()), name)
        assert within(SOON_S, proxy.start_proxy) == (None, False)
        status = proxy.engine.status()
        assert status.reason is EndReason.PROXY_NOT_STARTABLE
        assert "cookie" in status.detail
        assert not (scene.home / "call").exists()


class TestOptionString:
    @pytest.mark.parametrize("name", ["viewer", "nxproxy"])
    @pytest.mark.parametrize(
        "options", [[], ["connect=192.0.2.7"], ["connect=127.0.0.1", "Listen=4000"], ["connect=127.0.0.1", "accept=x"]]
    )
    def test_option_string_that_makes_nxproxy_listen_is_rejected(
        self, scene: Scene, x_display: str, monkeypatch: pytest.MonkeyPatch, options: list[str], name: str
    ) -> None:
        monkeypatch.setenv("DISPLAY", x_display)
        string = ["nx/nx", *options, "port=0", f"cookie={COOKIE}"]
        proxy = scene.make(viewer(scene, PROXY_MODE="-S", PROXY_OPTIONS=string, PROXY_DISPLAY=51))
        proxy.PROXY_CMD = scene.program((record_call(scene.home / "call"), connect(), wait_eof()), name)
        assert within(SOON_S, proxy.start_proxy) == (None, False)
        status = proxy.engine.status()
        assert status.reason is EndReason.PROXY_NOT_STARTABLE
        assert "connect=127.0.0.1" in status.hint
        assert not (scene.home / "call").exists()

    @pytest.mark.parametrize("errors", ["/home/a:b/x.err", "x.err", "/home/a:1/x:51"])
    @pytest.mark.parametrize("last", [False, True])
    def test_errors_option_is_removed_completely(self, scene: Scene, errors: str, *, last: bool) -> None:
        options = ["nx/nx", f"cookie={COOKIE}", "connect=127.0.0.1", "port=0"]
        options.insert(len(options) if last else 2, f"errors={errors}")
        proxy = scene.make(viewer(scene, PROXY_MODE="-S", PROXY_OPTIONS=options, PROXY_DISPLAY=51))
        assert proxy.start_proxy()[1]
        port = proxy.engine.status().listen_address.rpartition(":")[2]
        string = call(scene)["environ"]["NX_DISPLAY"]
        assert string == f"nx/nx,cookie={COOKIE},connect=127.0.0.1,port={port}:51"


class TestHooks:
    def test_hooks_are_called_in_order_before_program_starts(self, scene: Scene) -> None:
        calls: list[Any] = []

        class Viewer(viewer(scene)):  # type: ignore[misc]
            def _update_local_proxy_socket(self, port: int) -> None:
                calls.append(port)

            def process_proxy_options(self) -> None:
                calls.append(("options", self.proxy_options.pop("fruit")))
                self.PROXY_ENV["FRUIT"] = "lime"
                super().process_proxy_options()

            def _generate_cmdline(self) -> list[str]:
                calls.append("command line")
                return [self.PROXY_CMD, f"127.0.0.1:{calls[0]}"]

        given = {"fruit": "pear", "vegetable": "leek"}
        assert scene.make(Viewer, proxy_options=given).start_proxy()[1]
        assert calls[1:] == [("options", "pear"), "command line"]
        assert call(scene)["argv"][1] == f"127.0.0.1:{calls[0]}"
        assert call(scene)["environ"]["FRUIT"] == "lime"
        assert (INFO, "These proxy options are ignored: {'vegetable': 'leek'}") in scene.log.lines
        assert given == {"fruit": "pear", "vegetable": "leek"}

    def test_error_in_process_proxy_options_does_not_prevent_start(self, scene: Scene) -> None:
        class Viewer(viewer(scene)):  # type: ignore[misc]
            def process_proxy_options(self) -> None:
                raise LookupError("no such option")

        assert scene.make(Viewer).start_proxy()[1]
        assert [line for level, line in scene.log.lines if level == ERROR and "no such option" in line]

    @pytest.mark.parametrize("hook", ["_update_local_proxy_socket", "_generate_cmdline"])
    def test_failing_command_line_hook_is_reported(self, scene: Scene, hook: str) -> None:
        def fail(*_: Any) -> None:
            raise LookupError("not today")

        proxy = scene.make(viewer(scene, **{hook: fail}))
        assert within(SOON_S, proxy.start_proxy) == (None, False)
        assert proxy.engine.status().reason is EndReason.PROXY_NOT_STARTABLE
        assert "not today" in proxy.engine.status().detail

    @pytest.mark.parametrize("nothing", ["", None, []])
    def test_empty_command_line_means_the_default(self, scene: Scene, nothing: Any) -> None:
        assert scene.make(viewer(scene, _generate_cmdline=lambda _: nothing)).start_proxy()[1]

    def test_command_line_of_one_string_is_a_program(self, scene: Scene) -> None:
        program = scene.program((exit_with(3),), "other")
        proxy = scene.make(viewer(scene, _generate_cmdline=lambda _: program))
        process, ok = proxy.start_proxy()
        assert not ok
        assert process.returncode == 3
        assert proxy.engine.status().reason is EndReason.PROXY_EXITED

    def test_session_hooks_are_called_if_tunnel_is_refused(self, scene: Scene) -> None:
        scene.server.forwarding = Forwarding.DENIED
        session = Session()
        proxy = scene.make(viewer(scene), session_instance=session)
        proxy.subsystem = "Some Proxy"
        process, ok = within(SOON_S, proxy.start_proxy)
        assert not ok
        assert process.wait(SOON_S) is not None
        fields = {"chain_host": "127.0.0.1", "chain_port": scene.agent.port, "subsystem": "Some Proxy"}
        assert session.calls == [NAME, fields]
        assert proxy.fw_tunnel.failed
        assert not proxy.fw_tunnel.is_active

    def test_session_hooks_are_called_if_agent_does_not_listen(self, scene: Scene) -> None:
        scene.agent.stop_listening()
        session = Session()
        proxy = scene.make(viewer(scene), session_instance=session)
        process, ok = proxy.start_proxy()
        assert (process is not None, ok) == (True, False)
        assert len(session.calls) == 2
        assert proxy.engine.status().reason is EndReason.AGENT_UNREACHABLE

    def test_session_hooks_may_fail_or_stop_the_proxy(self, scene: Scene) -> None:
        scene.server.forwarding = Forwarding.DENIED

        class FailingSession(Session):
            def HOOK_forwarding_tunnel_setup_failed(self, **_: Any) -> None:  # noqa: N802
                proxy.stop_thread()
                raise LookupError("what a hook raises")

        proxy = scene.make(viewer(scene), session_instance=FailingSession())
        assert within(SOON_S, proxy.start_proxy) == (None, False)
        assert "what a hook raises" in scene.log.text

    def test_session_hooks_are_not_called_for_other_faults(self, scene: Scene) -> None:
        session = Session()
        proxy = scene.make(viewer(scene, PROXY_CMD="/nowhere/viewer"), session_instance=session)
        assert within(SOON_S, proxy.start_proxy) == (None, False)
        assert proxy.engine.status().reason is EndReason.PROXY_NOT_FOUND
        assert session.calls == []


class TestAttributes:
    def test_attributes_before_during_and_after_a_session(self, scene: Scene) -> None:
        proxy = scene.make(viewer(scene))
        assert (proxy.proxy, proxy.fw_tunnel, proxy.session_log_stdout) == (None, None, None)
        assert proxy.ok() is False
        assert proxy.session_name == NAME
        assert proxy.subsystem == "X2Go Proxy"
        assert proxy.start_proxy()[1]
        assert proxy.is_alive()
        assert proxy.daemon
        assert proxy.fw_tunnel.is_active
        assert not proxy.fw_tunnel.failed
        logs = (proxy.session_log_stdout, proxy.session_log_stderr)
        assert not any(log.closed for log in logs)
        process, tunnel = proxy.proxy, proxy.fw_tunnel
        proxy.stop_thread()
        assert (proxy.proxy, proxy.fw_tunnel, proxy.ok()) == (None, None, False)
        assert all(log.closed for log in logs)
        assert process.poll() == -signal.SIGTERM
        assert not tunnel.is_active
        assert not tunnel.failed
        proxy.join(SOON_S)
        assert not proxy.is_alive()

    def test_attributes_after_session_ended_by_agent(self, scene: Scene) -> None:
        proxy = scene.make(viewer(scene))
        process, ok = proxy.start_proxy()
        assert ok
        eventually(lambda: scene.agent.connections, what="the agent accepts, on its own thread")
        scene.agent.disconnect()
        proxy.join(SOON_S)
        assert proxy.ok() is False
        assert proxy.proxy is process
        assert process.poll() == 0
        assert not proxy.fw_tunnel.is_active
        assert proxy.session_log_stdout.closed
        assert proxy.engine.status().reason is EndReason.VIEWER_CLOSED

    def test_logs_are_private_and_in_session_directory(self, scene: Scene) -> None:
        info = scene.info
        info.local_container = str(scene.home / "else" / "where")
        kind = viewer(scene, say("one line"), print_cookie(), connect(), wait_eof(), PROXY_OPTIONS=["nx/nx"])
        before = os.umask(0)
        try:
            proxy = scene.make(kind, session_info=info, session_log="a.log", session_errors="a.err")
            assert proxy.start_proxy()[1]
        finally:
            os.umask(before)
        proxy.stop_thread()
        for name in ("a.log", "a.err"):
            file = Path(info.local_container, name)
            assert file.read_text().startswith("one line\n")
            assert COOKIE not in file.read_text()
            assert file.stat().st_mode & 0o777 == 0o600
        assert Path(info.local_container).stat().st_mode & 0o777 == 0o700

    def test_logs_are_utf_8_regardless_of_locale(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file opened without an encoding uses the locale's: here, one that has no ellipsis."""
        plain = os.fdopen
        monkeypatch.setattr(os, "fdopen", lambda *args, **options: plain(*args, **{"encoding": "latin-1", **options}))
        steps = (say("… 漢字"), connect(), wait_eof())
        options = ["nx/nx", "connect=127.0.0.1", "port=0"]
        proxy = scene.make(viewer(scene, *steps, PROXY_MODE="-S", PROXY_OPTIONS=options, PROXY_DISPLAY=51))
        assert proxy.start_proxy()[1]
        proxy.stop_thread()
        assert proxy.engine.status().reason is EndReason.STOP_REQUESTED
        assert (scene.container / "session.err").read_text(encoding="utf-8") == "… 漢字\n"

    def test_unopenable_log_is_reported(self, scene: Scene) -> None:
        (scene.container / "session.log").mkdir(parents=True)
        proxy = scene.make(viewer(scene))
        assert within(SOON_S, proxy.start_proxy) == (None, False)
        assert proxy.engine.status().reason is EndReason.LISTEN_FAILED

    def test_default_root_is_below_home(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(scene.home))
        assert viewer(scene)().sessions_rootdir == str(scene.home / ".x2go")


class TestProcessHandle:
    def test_process_can_be_waited_for_while_engine_reaps_it(self, scene: Scene) -> None:
        others = children()
        process, _ = scene.make(viewer(scene)).start_proxy()
        codes: list[int] = []
        waiting = [threading.Thread(target=lambda: codes.append(process.wait())) for _ in range(5)]
        for thread in waiting:
            thread.start()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
        os.kill(process.pid, signal.SIGKILL)
        for thread in waiting:
            thread.join(SOON_S)
        assert codes == [-signal.SIGKILL] * 5
        assert process.wait() == process.poll() == process.returncode == -signal.SIGKILL
        assert children() <= others

    def test_process_that_exits_by_itself_has_its_exit_code(self, scene: Scene) -> None:
        process, ok = scene.make(viewer(scene, exit_with(7))).start_proxy()
        assert (process.wait(SOON_S), ok) == (7, False)

    @pytest.mark.parametrize("order", ["terminate", "kill"])
    def test_terminate_and_kill_stop_the_engine(self, scene: Scene, order: str) -> None:
        proxy = scene.make(viewer(scene))
        process, _ = proxy.start_proxy()
        getattr(process, order)()
        assert process.wait(SOON_S) == -(signal.SIGTERM if order == "terminate" else signal.SIGKILL)
        proxy.join(SOON_S)
        assert proxy.engine.status().reason is EndReason.STOP_REQUESTED
        getattr(process, order)()  # a no-op now

    def test_engine_gets_output_line_before_errors_file(self) -> None:
        """A failure of the file does not affect the session."""
        posted: list[Any] = []

        def fail(_line: str) -> None:
            raise LookupError("no file today")

        observe = ProcessHandle(cast("Any", None), [], lambda _: None).observing(posted.append, fail)
        line = OutputLine("hello")
        with pytest.raises(LookupError):
            observe(line)
        assert posted == [line]

    def test_kill_ends_process_that_ignores_sigterm_at_once(self, scene: Scene) -> None:
        process, _ = scene.make(viewer(scene, ignore(), connect(), wait_eof())).start_proxy()
        process.kill()
        assert process.wait(SOON_S / 2) == -signal.SIGKILL

    def test_send_signal_delivers_any_signal(self, scene: Scene) -> None:
        proxy = scene.make(viewer(scene))
        process, _ = proxy.start_proxy()
        process.send_signal(signal.SIGHUP)
        assert process.wait(SOON_S) == -signal.SIGHUP
        proxy.join(SOON_S)
        assert proxy.engine.status().reason is EndReason.PROXY_KILLED
        assert str(process.pid) in repr(process)


class TestStartAndStop:
    def test_missing_program_fails_at_once(self, scene: Scene) -> None:
        """python-x2go needs 16 s for that."""
        proxy = scene.make(viewer(scene, PROXY_CMD="/nowhere/viewer"))
        assert within(2.0, proxy.start_proxy) == (None, False)
        assert proxy.fw_tunnel.failed
        assert [line for level, line in scene.log.lines if level == ERROR and "proxy_not_found" in line]

    def test_proxy_can_be_started_as_a_thread(self, scene: Scene) -> None:
        proxy = scene.make(viewer(scene))
        proxy.start()
        eventually(proxy.ok, what="ok")
        with pytest.raises(RuntimeError):
            proxy.start_proxy()
        proxy.stop_thread()
        proxy.join(SOON_S)

    def test_proxy_can_be_run_by_another_thread(self, scene: Scene) -> None:
        proxy = scene.make(viewer(scene))
        thread = threading.Thread(target=proxy.run)
        thread.start()
        eventually(proxy.ok, what="ok")
        proxy.run()  # it is already running
        assert proxy.ok()
        proxy.stop_thread()
        thread.join(SOON_S)
        assert not thread.is_alive()
        proxy.run()  # it runs only once
        assert not proxy.ok()

    @pytest.mark.parametrize("missing", ["session_info", "ssh_transport"])
    def test_proxy_without_session_or_transport_does_nothing(self, scene: Scene, missing: str) -> None:
        proxy = scene.make(viewer(scene), **{missing: None})
        assert proxy.run() is None
        assert proxy.engine is None
        assert within(SOON_S, proxy.start_proxy) == (None, False)
        proxy.stop_thread()

    def test_invalid_session_is_reported(self, scene: Scene) -> None:
        info = scene.info
        info.graphics_port = ""
        proxy = scene.make(viewer(scene), session_info=info)
        assert within(SOON_S, proxy.start_proxy) == (None, False)
        assert [line for level, line in scene.log.lines if level == ERROR]
        info.graphics_port, info.name = 4788, "../escape"
        with pytest.raises(InvalidSession):
            _ = scene.make(viewer(scene), session_info=info).engine

    @pytest.mark.parametrize("change", [{"graphics_port": float("inf")}, {"cookie": 7}, {"graphics_port": None}])
    def test_session_with_wrong_types_is_reported(self, scene: Scene, change: dict[str, Any]) -> None:
        info = scene.info
        for name, value in change.items():
            setattr(info, name, value)
        proxy = scene.make(viewer(scene), session_info=info)
        assert within(SOON_S, proxy.start_proxy) == (None, False)
        assert [line for level, line in scene.log.lines if level == ERROR and "cannot be started" in line]

    @pytest.mark.parametrize("lacking", ["name", "graphics_port"])
    def test_incomplete_session_is_reported(self, scene: Scene, lacking: str) -> None:
        fields = {name: value for name, value in vars(scene.info).items() if name != lacking}
        proxy = scene.make(viewer(scene), session_info=SimpleNamespace(**fields))
        assert within(SOON_S, proxy.start_proxy) == (None, False)
        assert [line for level, line in scene.log.lines if level == ERROR and lacking in line]

    @pytest.mark.parametrize("hook", ["_update_local_proxy_socket", "process_proxy_options", "_generate_cmdline"])
    def test_hook_may_stop_the_proxy(self, scene: Scene, hook: str) -> None:
        """The shutdown waits for the hook, so the hook must not wait for the shutdown."""
        took_s: list[float] = []

        def stop(proxy: X2GoProxy, *_: Any) -> None:
            began = time.monotonic()
            proxy.stop_thread()
            took_s.append(time.monotonic() - began)

        proxy = scene.make(viewer(scene, **{hook: stop}))
        assert within(SOON_S, proxy.start_proxy) == (None, False)
        assert proxy.engine.status().reason is EndReason.STOP_REQUESTED
        within(SOON_S, proxy.stop_thread)
        assert took_s[0] < 1.5

    def test_stop_before_start_is_remembered(self, scene: Scene) -> None:
        proxy = scene.make(viewer(scene))
        proxy.stop_thread()
        assert within(SOON_S, proxy.start_proxy) == (None, False)
        assert proxy.engine.status().reason is EndReason.STOP_REQUESTED
        assert proxy.fw_tunnel is None
        assert not (scene.home / "call").exists()

    def test_proxy_can_be_stopped_by_many_threads(self, scene: Scene) -> None:
        proxy = scene.make(viewer(scene))
        proxy.start_proxy()
        stoppers = [threading.Thread(target=proxy.stop_thread) for _ in range(10)]
        for thread in stoppers:
            thread.start()
        proxy.__del__()
        for thread in stoppers:
            thread.join(SOON_S)
        assert not any(thread.is_alive() for thread in stoppers)
        proxy.stop_thread()
        assert proxy.engine.state is State.STOPPED
        assert proxy.proxy is None

    def test_proxy_can_be_stopped_while_starting(self, scene: Scene) -> None:
        scene.server.forwarding = Forwarding.HELD
        proxy = scene.make(viewer(scene))
        proxy.start()
        eventually(lambda: scene.server.channels_held, what="a held channel")
        within(SOON_S, proxy.stop_thread)
        assert proxy.engine.status().reason is EndReason.STOP_REQUESTED
        scene.server.release()

    def test_engine_subscriber_may_stop_the_proxy(self, scene: Scene) -> None:
        proxy = scene.make(viewer(scene))
        path = []

        def on_change(record: Any) -> None:
            path.append(record.dest)
            if record.dest is State.RUNNING:
                proxy.stop_thread()

        proxy.engine.subscribe(on_change)
        proxy.start_proxy()
        within(SOON_S, proxy.stop_thread)
        assert path == ["tunnelling", "spawning", "running", "stopping", "stopped"]

    def test_engine_may_be_started_by_the_program(self, scene: Scene) -> None:
        proxy = scene.make(viewer(scene))
        proxy.engine.start()
        proxy.engine.wait_running(SOON_S)
        assert proxy.start_proxy()[1]

    def test_logs_are_closed_if_only_the_engine_was_started(self, scene: Scene) -> None:
        proxy = scene.make(viewer(scene))
        proxy.engine.start()
        proxy.engine.wait_running(SOON_S)
        assert not proxy.session_log_stdout.closed
        proxy.stop_thread()
        assert proxy.session_log_stdout.closed
        assert (proxy.proxy, proxy.fw_tunnel) == (None, None)

    def test_many_proxies_leak_nothing(self, scene: Scene) -> None:
        kind = viewer(scene)
        scene.make(kind).start_proxy()
        scene.made.pop().stop_thread()
        others, before = children(), descriptors()
        for _ in range(5):
            scene.make(kind)
            assert scene.made[-1].start_proxy()[1]
            scene.made[-1].stop_thread()
            scene.made[-1].join(SOON_S)
            assert not scene.made.pop().is_alive()
        gc.collect()
        threads_ended()
        assert children() <= others
        nothing_left_open(before)

    def test_lost_connection_ends_proxy_with_its_reason(self, scene: Scene) -> None:
        proxy = scene.make(viewer(scene))
        assert proxy.start_proxy()[1]
        scene.server.drop()
        proxy.join(SOON_S)
        assert proxy.ok() is False
        assert proxy.engine.status().reason is EndReason.TRANSPORT_LOST
        assert [line for level, line in scene.log.lines if level == ERROR and "transport_lost" in line]


class TestLoggers:
    def test_given_logger_gets_all_messages_tagged_without_cookie(self, scene: Scene) -> None:
        proxy = scene.make(viewer(scene, say("hello"), connect(), wait_eof()))
        proxy.logger(f"the cookie is {COOKIE}", loglevel=DEBUG)
        assert proxy.start_proxy()[1]
        proxy.stop_thread()
        assert scene.log.tag == "theirs"
        assert (DEBUG, "the cookie is <hidden>") in scene.log.lines
        assert COOKIE not in scene.log.text
        assert "dest='running'" in scene.log.text
        assert "line='hello'" in scene.log.text
        assert proxy.logger.get_loglevel() == 56
        proxy.logger.message("tagged", loglevel=INFO, tag="another")
        assert "another" in scene.log.tags

    def test_plain_function_is_accepted_as_logger(self, scene: Scene) -> None:
        lines = []
        proxy = scene.make(viewer(scene), logger=lambda text, loglevel: lines.append((loglevel, text)))
        assert proxy.start_proxy()[1]
        assert lines

    @pytest.mark.parametrize("error", [LookupError, SystemExit])
    def test_failing_logger_is_ignored(
        self, scene: Scene, caplog: pytest.LogCaptureFixture, error: type[BaseException]
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error("no log today")

        assert scene.make(viewer(scene), logger=fail).start_proxy()[1]
        assert "no log today" in caplog.text

    def test_our_log_is_used_with_mask_by_default(self, scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG, "proxy_fsm")
        proxy = scene.make(viewer(scene), logger=None)
        proxy.logger("shown", loglevel=ERROR)
        proxy.logger("not shown", loglevel=DEBUG)
        assert proxy.start_proxy()[1]
        proxy.logger(f"an {COOKIE}", loglevel=ERROR)
        proxy.stop_thread()
        assert "event='x2go.message'" in caplog.text
        assert "message='shown'" in caplog.text
        assert "not shown" not in caplog.text
        assert "event='proxy.transition'" in caplog.text
        assert f"proxy_id='{proxy.engine.id}'" in caplog.text
        assert COOKIE not in caplog.text
        assert not hasattr(proxy.logger, "get_loglevel")


def test_import_before_gevent_patches_is_rejected() -> None:
    """Unpatched queues would block the hub for ever."""
    code = (
        "from proxy_fsm.x2go.base import X2GoProxy\n"
        "import gevent.monkey; gevent.monkey.patch_all()\n"
        "try: X2GoProxy()\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "import x2go" in done.stdout
