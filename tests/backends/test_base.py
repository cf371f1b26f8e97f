"""A backend defines what to run and what its output means; `CommandBackend` does so for any viewer."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from proxy_fsm.backends import Backend, BackendContext, CommandBackend
from proxy_fsm.backends.base import find_program
from proxy_fsm.errors import BackendError
from proxy_fsm.evidence import (
    AgentDataReceived,
    AgentEof,
    ChannelOpened,
    ConnectionEnded,
    Evidence,
    Observation,
    OutputLine,
    ProcessExited,
    ProcessSpawned,
)
from proxy_fsm.reasons import EndReason
from proxy_fsm.session import SessionInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

COOKIE = "0123456789abcdef0123456789abcdef"
VIEWER = ("vncviewer", "{host}::{port}")
OPENED, DATA, EOF = ChannelOpened(1), AgentDataReceived(1), AgentEof(1)
ENDED = ConnectionEnded(1, 10, 20, 0.5)


def context(address: str = "127.0.0.1:4711") -> BackendContext:
    return BackendContext(
        session=SessionInfo(name="name", graphics_port=5900, cookie=COOKIE),
        executable="/usr/bin/viewer",
        listen_address=address,
        sessions_root=Path("/root"),
        session_root=Path("/root/S-name"),
        environ={"SECRET": "very secret"},
        scratch=Path("/run/user/0/proxy_fsm-abcdefgh"),
    )


class TestBackendContext:
    @pytest.mark.parametrize(
        ("address", "port"),
        [
            ("127.0.0.1:4711", 4711),
            ("/run/user/0/proxy.sock", None),
            ("/tmp/host:99/proxy.sock", None),
            ("/tmp/127.0.0.1:99", None),
        ],
    )
    def test_port_is_that_of_a_tcp_address(self, address: str, port: int | None) -> None:
        assert context(address).port == port

    def test_repr_shows_no_secret(self) -> None:
        shown = repr(context())
        assert "environ" not in shown
        assert "very secret" not in shown
        assert COOKIE not in shown
        assert "/usr/bin/viewer" in shown


class TestBackend:
    def test_minimal_subclass_has_defaults_for_the_rest(self) -> None:
        class Least(Backend):
            def find_executable(self) -> str:
                return "/bin/true"

            def command(self, context: BackendContext) -> Sequence[str]:
                return [context.executable]

            def ready(self, evidence: Evidence) -> bool:
                return evidence.saw(ChannelOpened)

        backend = Least()
        assert (backend.name, backend.listen_kind, backend.max_connections, backend.needs_display) == (
            "proxy",
            "tcp",
            1,
            False,
        )
        backend.check_session(SessionInfo(name="name", graphics_port=1))
        backend.preflight(context())
        assert backend.find_executable() == "/bin/true"
        assert backend.command(context()) == ["/usr/bin/viewer"]
        assert backend.environment(context()) == {}
        assert backend.ready(Evidence(OPENED))
        assert backend.diagnose(Evidence(ProcessExited(0, None))) is None

    def test_abstract_methods_raise_not_implemented_error(self) -> None:
        backend = Backend()
        for call in (backend.find_executable, lambda: backend.command(context()), lambda: backend.ready(Evidence())):
            with pytest.raises(NotImplementedError):
                call()

    def test_unknown_options_are_returned_as_a_copy(self) -> None:
        options = {"a": 1}
        unknown = Backend().process_options(options)
        assert unknown == options
        assert unknown is not options


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in PATH with some programs, which is not the current one."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    for name, mode in (("good", 0o700), ("plain", 0o600)):
        (bin_directory / name).write_text("#!/bin/sh\n", encoding="ascii")
        (bin_directory / name).chmod(mode)
    (bin_directory / "directory").mkdir()
    (bin_directory / "link").symlink_to("good")
    (bin_directory / "dangling").symlink_to("nowhere")
    monkeypatch.setenv("PATH", f"/nonexistent{os.pathsep}{bin_directory}")
    monkeypatch.chdir(tmp_path)
    return bin_directory


class TestFindProgram:
    def test_name_is_looked_up_in_path(self, programs: Path) -> None:
        assert find_program("good") == str(programs / "good")

    def test_path_is_used_as_given(self, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        assert find_program(str(programs / "good")) == str(programs / "good")

    @pytest.mark.usefixtures("programs")
    def test_returned_path_is_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert find_program("bin/good") == f"{tmp_path}/bin/good"
        monkeypatch.setenv("PATH", "bin")
        assert find_program("good") == f"{tmp_path}/bin/good"

    def test_link_is_not_resolved(self, programs: Path) -> None:
        """A program may examine the name that it was called by."""
        assert find_program("link") == str(programs / "link")

    @pytest.mark.parametrize("program", ["missing", "plain", "directory", "dangling", "", "./missing", "/no/where"])
    @pytest.mark.usefixtures("programs")
    def test_missing_program_is_not_found(self, program: str) -> None:
        with pytest.raises(BackendError) as caught:
            find_program(program, hint="Install it.")
        assert caught.value.reason is EndReason.PROXY_NOT_FOUND
        assert caught.value.detail == f"The proxy program {program} was not found."
        assert caught.value.hint == "Install it."

    @pytest.mark.parametrize("program", ["plain", "directory", "dangling"])
    @pytest.mark.parametrize("where", ["{}", "bin"])
    def test_path_that_is_not_executable_is_not_startable(self, programs: Path, program: str, where: str) -> None:
        path = f"{where.format(programs)}/{program}"
        with pytest.raises(BackendError) as caught:
            find_program(path, hint="Install it.")
        assert caught.value.reason is EndReason.PROXY_NOT_STARTABLE
        assert caught.value.detail == f"The proxy program {path} exists, but is not an executable file."
        assert caught.value.hint == "Install it."


class TestCommandBackend:
    @pytest.mark.parametrize("command", ["vncviewer {port}", [], (), [b"vncviewer", "{port}"], ["vncviewer", 5900]])
    def test_command_must_be_a_sequence_of_strings(self, command: Any) -> None:
        with pytest.raises(ValueError, match="must be a sequence of strings"):
            CommandBackend(command)

    @pytest.mark.parametrize("command", [["viewer"], ["viewer", "{host}"], ["viewer", "{ port }"], ["{port}"]])
    def test_command_must_say_where_to_connect(self, command: list[str]) -> None:
        with pytest.raises(ValueError, match="must say where to connect"):
            CommandBackend(command)

    @pytest.mark.parametrize("words", [["{path}", "{port}"], ["{path}{host}"]])
    def test_command_must_not_have_both_path_and_port(self, words: list[str]) -> None:
        with pytest.raises(ValueError, match="not both"):
            CommandBackend(["viewer", *words])

    @pytest.mark.parametrize("ready_when", ["ready", "", None, "a pattern that was not compiled"])
    def test_other_ready_when_is_rejected(self, ready_when: Any) -> None:
        with pytest.raises(ValueError, match="ready_when must be"):
            CommandBackend(VIEWER, ready_when=ready_when)

    @pytest.mark.parametrize("count", [0, -1])
    def test_max_connections_below_one_is_rejected(self, count: int) -> None:
        with pytest.raises(ValueError, match="max_connections must be"):
            CommandBackend(VIEWER, max_connections=count)

    def test_placeholder_decides_the_listen_kind(self) -> None:
        assert CommandBackend(["viewer", "{port}"]).listen_kind == "tcp"
        assert CommandBackend(["viewer", "{host}", "{port}"]).listen_kind == "tcp"
        assert CommandBackend(["viewer", "unix:{path}"]).listen_kind == "unix"

    def test_other_properties_are_as_given(self) -> None:
        backend = CommandBackend(VIEWER, max_connections=None, needs_display=True)
        assert (backend.max_connections, backend.needs_display) == (None, True)
        assert (CommandBackend(VIEWER).max_connections, CommandBackend(VIEWER).needs_display) == (1, False)

    def test_address_is_filled_in_and_nothing_else_changed(self) -> None:
        words = ["{host}::{port}", "{port}{port}", "{other}", "{{port}}", "${{x}}", "{}", "{port!r}", "{0}", "%s", "{"]
        assert CommandBackend(["viewer", *words]).command(context()) == [
            "/usr/bin/viewer",
            "127.0.0.1::4711",
            "47114711",
            "{other}",
            "{4711}",
            "${{x}}",
            "{}",
            "{port!r}",
            "{0}",
            "%s",
            "{",
        ]

    def test_path_is_filled_in_whatever_it_contains(self) -> None:
        address = r"/tmp/{port} \1 \g<0>/proxy.sock"
        backend = CommandBackend(["viewer", "-unix={path}"])
        assert backend.command(context(address)) == ["/usr/bin/viewer", f"-unix={address}"]

    def test_program_is_looked_up(self, programs: Path) -> None:
        assert CommandBackend(["good", "{port}"]).find_executable() == str(programs / "good")
        with pytest.raises(BackendError):
            CommandBackend(["missing", "{port}"]).find_executable()

    def test_command_is_copied(self) -> None:
        command = ["viewer", "{port}"]
        backend = CommandBackend(command)
        command.append("more")
        assert backend.command(context()) == ["/usr/bin/viewer", "4711"]

    def test_environment_gets_no_additions(self) -> None:
        assert CommandBackend(VIEWER).environment(context()) == {}


class TestReadiness:
    def test_first_bytes_of_the_agent_are_the_default(self) -> None:
        backend = CommandBackend(VIEWER)
        assert not backend.ready(Evidence(ProcessSpawned(1, "x"), OPENED, OutputLine("Connected")))
        assert backend.ready(Evidence(OPENED, DATA, OutputLine("later")))

    def test_open_channel_is_ready_if_connected_is_enough(self) -> None:
        backend = CommandBackend(VIEWER, ready_when="connected")
        assert not backend.ready(Evidence(ProcessSpawned(1, "x")))
        assert backend.ready(Evidence(OPENED))

    def test_line_that_matches_the_pattern_is_ready(self) -> None:
        backend = CommandBackend(VIEWER, ready_when=re.compile(r"^connected to .*\d$", re.IGNORECASE))
        assert not backend.ready(Evidence(OPENED, DATA, OutputLine("not connected to x1")))
        assert backend.ready(Evidence(OutputLine("a"), OutputLine("Connected to x1"), OutputLine("b")))


class TestDiagnosis:
    @pytest.mark.parametrize(
        ("seen", "max_connections", "ready", "reason"),
        [
            # before it is ready, the engine decides by exit code or signal alone
            ([OPENED, EOF, ENDED, ProcessExited(0, None)], 1, False, None),
            ([ProcessExited(0, None)], 1, False, None),
            # the user closes the viewer
            ([OPENED, DATA, ENDED], 1, True, None),
            ([OPENED, DATA, ENDED, ProcessExited(0, None)], 1, True, EndReason.VIEWER_CLOSED),
            ([OPENED, DATA, ENDED, ProcessExited(1, None)], 1, True, None),
            ([OPENED, DATA, ENDED, ProcessExited(None, 15)], 1, True, None),
            # the agent closes the session
            ([OPENED, DATA, EOF], 1, True, None),
            ([OPENED, DATA, EOF, ENDED], 1, True, EndReason.SESSION_ENDED),
            ([OPENED, DATA, EOF, ProcessExited(0, None)], 1, True, EndReason.SESSION_ENDED),
            ([OPENED, DATA, EOF, ProcessExited(1, None)], 1, True, EndReason.SESSION_ENDED),
            # with several connections the end of one says nothing
            ([OPENED, DATA, EOF, ENDED], None, True, None),
            ([OPENED, DATA, EOF, ENDED], 2, True, None),
            ([OPENED, DATA, EOF, ENDED, ProcessExited(0, None)], None, True, EndReason.VIEWER_CLOSED),
            ([OPENED, DATA, EOF, ENDED, ProcessExited(1, None)], None, True, None),
        ],
    )
    def test_viewer_closed_by_its_user_is_distinguished_from_session_ended_by_the_agent(
        self, seen: list[Observation], max_connections: int | None, *, ready: bool, reason: EndReason | None
    ) -> None:
        evidence = Evidence(*seen)
        evidence.ready = ready
        verdict = CommandBackend(VIEWER, max_connections=max_connections).diagnose(evidence)
        assert (verdict and verdict[0]) is reason
        assert verdict is None or verdict[1].endswith(".")
