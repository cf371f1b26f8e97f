"""A backend says what to run and what it means; `CommandBackend` says so for any viewer."""

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
OPENED, SPOKE, CLOSED = ChannelOpened(1), AgentDataReceived(1), AgentEof(1)
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
    def test_its_port_is_that_of_a_tcp_address(self, address: str, port: int | None) -> None:
        assert context(address).port == port

    def test_its_repr_tells_no_secret(self) -> None:
        told = repr(context())
        assert "environ" not in told
        assert "very secret" not in told
        assert COOKIE not in told
        assert "/usr/bin/viewer" in told


class TestBackend:
    def test_the_least_that_a_subclass_can_be(self) -> None:
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

    def test_what_a_subclass_has_to_say_itself(self) -> None:
        backend = Backend()
        for call in (backend.find_executable, lambda: backend.command(context()), lambda: backend.ready(Evidence())):
            with pytest.raises(NotImplementedError):
                call()

    def test_options_that_it_does_not_know_come_back_as_a_copy(self) -> None:
        options = {"a": 1}
        left = Backend().process_options(options)
        assert left == options
        assert left is not options


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in PATH with some programs, which is not the present one."""
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
    def test_a_name_is_looked_up_in_path(self, programs: Path) -> None:
        assert find_program("good") == str(programs / "good")

    def test_a_path_is_taken_as_it_is(self, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        assert find_program(str(programs / "good")) == str(programs / "good")

    @pytest.mark.usefixtures("programs")
    def test_the_answer_is_absolute_since_the_program_starts_elsewhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert find_program("bin/good") == f"{tmp_path}/bin/good"
        monkeypatch.setenv("PATH", "bin")
        assert find_program("good") == f"{tmp_path}/bin/good"

    def test_a_link_stays_one(self, programs: Path) -> None:
        """A program may look at the name by which it was called."""
        assert find_program("link") == str(programs / "link")

    @pytest.mark.parametrize("program", ["missing", "plain", "directory", "dangling", "", "./missing", "/no/where"])
    @pytest.mark.usefixtures("programs")
    def test_what_is_not_there_is_told(self, program: str) -> None:
        with pytest.raises(BackendError) as caught:
            find_program(program, hint="Install it.")
        assert caught.value.reason is EndReason.PROXY_NOT_FOUND
        assert caught.value.detail == f"The proxy program {program} was not found."
        assert caught.value.hint == "Install it."

    @pytest.mark.parametrize("program", ["plain", "directory", "dangling"])
    @pytest.mark.parametrize("where", ["{}", "bin"])
    def test_what_is_there_and_no_executable_is_told_from_that(self, programs: Path, program: str, where: str) -> None:
        path = f"{where.format(programs)}/{program}"
        with pytest.raises(BackendError) as caught:
            find_program(path, hint="Install it.")
        assert caught.value.reason is EndReason.PROXY_NOT_STARTABLE
        assert caught.value.detail == f"The proxy program {path} exists, but is not an executable file."
        assert caught.value.hint == "Install it."


class TestCommandBackend:
    @pytest.mark.parametrize("command", ["vncviewer {port}", [], (), [b"vncviewer", "{port}"], ["vncviewer", 5900]])
    def test_the_command_is_a_sequence_of_strings(self, command: Any) -> None:
        with pytest.raises(ValueError, match="must be a sequence of strings"):
            CommandBackend(command)

    @pytest.mark.parametrize("command", [["viewer"], ["viewer", "{host}"], ["viewer", "{ port }"], ["{port}"]])
    def test_it_says_where_to_connect(self, command: list[str]) -> None:
        with pytest.raises(ValueError, match="must say where to connect"):
            CommandBackend(command)

    @pytest.mark.parametrize("words", [["{path}", "{port}"], ["{path}{host}"]])
    def test_it_connects_in_one_way(self, words: list[str]) -> None:
        with pytest.raises(ValueError, match="not both"):
            CommandBackend(["viewer", *words])

    @pytest.mark.parametrize("ready_when", ["ready", "", None, "a pattern that was not compiled"])
    def test_there_are_three_ways_to_be_ready(self, ready_when: Any) -> None:
        with pytest.raises(ValueError, match="ready_when must be"):
            CommandBackend(VIEWER, ready_when=ready_when)

    @pytest.mark.parametrize("count", [0, -1])
    def test_it_makes_a_connection(self, count: int) -> None:
        with pytest.raises(ValueError, match="max_connections must be"):
            CommandBackend(VIEWER, max_connections=count)

    def test_what_is_asked_for_decides_the_kind_of_socket(self) -> None:
        assert CommandBackend(["viewer", "{port}"]).listen_kind == "tcp"
        assert CommandBackend(["viewer", "{host}", "{port}"]).listen_kind == "tcp"
        assert CommandBackend(["viewer", "unix:{path}"]).listen_kind == "unix"

    def test_its_other_properties_are_as_given(self) -> None:
        backend = CommandBackend(VIEWER, max_connections=None, needs_display=True)
        assert (backend.max_connections, backend.needs_display) == (None, True)
        assert (CommandBackend(VIEWER).max_connections, CommandBackend(VIEWER).needs_display) == (1, False)

    def test_the_address_is_filled_in_and_all_else_left_as_it_is(self) -> None:
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

    def test_so_is_a_path_whatever_is_in_it(self) -> None:
        address = r"/tmp/{port} \1 \g<0>/proxy.sock"
        backend = CommandBackend(["viewer", "-unix={path}"])
        assert backend.command(context(address)) == ["/usr/bin/viewer", f"-unix={address}"]

    def test_its_program_is_looked_up(self, programs: Path) -> None:
        assert CommandBackend(["good", "{port}"]).find_executable() == str(programs / "good")
        with pytest.raises(BackendError):
            CommandBackend(["missing", "{port}"]).find_executable()

    def test_what_is_done_to_the_command_later_changes_nothing(self) -> None:
        command = ["viewer", "{port}"]
        backend = CommandBackend(command)
        command.append("more")
        assert backend.command(context()) == ["/usr/bin/viewer", "4711"]

    def test_it_puts_nothing_into_the_environment(self) -> None:
        assert CommandBackend(VIEWER).environment(context()) == {}


class TestReadiness:
    def test_by_default_it_is_ready_when_the_agent_has_spoken(self) -> None:
        backend = CommandBackend(VIEWER)
        assert not backend.ready(Evidence(ProcessSpawned(1, "x"), OPENED, OutputLine("Connected")))
        assert backend.ready(Evidence(OPENED, SPOKE, OutputLine("later")))

    def test_or_as_soon_as_it_is_connected(self) -> None:
        backend = CommandBackend(VIEWER, ready_when="connected")
        assert not backend.ready(Evidence(ProcessSpawned(1, "x")))
        assert backend.ready(Evidence(OPENED))

    def test_or_when_it_says_so(self) -> None:
        backend = CommandBackend(VIEWER, ready_when=re.compile(r"^connected to .*\d$", re.IGNORECASE))
        assert not backend.ready(Evidence(OPENED, SPOKE, OutputLine("not connected to x1")))
        assert backend.ready(Evidence(OutputLine("a"), OutputLine("Connected to x1"), OutputLine("b")))


class TestDiagnosis:
    @pytest.mark.parametrize(
        ("seen", "max_connections", "ready", "reason"),
        [
            # before it was ready, the engine judges by exit code or signal alone
            ([OPENED, CLOSED, ENDED, ProcessExited(0, None)], 1, False, None),
            ([ProcessExited(0, None)], 1, False, None),
            # the user closes the viewer
            ([OPENED, SPOKE, ENDED], 1, True, None),
            ([OPENED, SPOKE, ENDED, ProcessExited(0, None)], 1, True, EndReason.VIEWER_CLOSED),
            ([OPENED, SPOKE, ENDED, ProcessExited(1, None)], 1, True, None),
            ([OPENED, SPOKE, ENDED, ProcessExited(None, 15)], 1, True, None),
            # the agent closes the session
            ([OPENED, SPOKE, CLOSED], 1, True, None),
            ([OPENED, SPOKE, CLOSED, ENDED], 1, True, EndReason.SESSION_ENDED),
            ([OPENED, SPOKE, CLOSED, ProcessExited(0, None)], 1, True, EndReason.SESSION_ENDED),
            ([OPENED, SPOKE, CLOSED, ProcessExited(1, None)], 1, True, EndReason.SESSION_ENDED),
            # with several connections the end of one says nothing
            ([OPENED, SPOKE, CLOSED, ENDED], None, True, None),
            ([OPENED, SPOKE, CLOSED, ENDED], 2, True, None),
            ([OPENED, SPOKE, CLOSED, ENDED, ProcessExited(0, None)], None, True, EndReason.VIEWER_CLOSED),
            ([OPENED, SPOKE, CLOSED, ENDED, ProcessExited(1, None)], None, True, None),
        ],
    )
    def test_the_viewer_closed_by_its_user_is_told_from_the_session_ended_by_the_agent(
        self, seen: list[Observation], max_connections: int | None, *, ready: bool, reason: EndReason | None
    ) -> None:
        evidence = Evidence(*seen)
        evidence.ready = ready
        verdict = CommandBackend(VIEWER, max_connections=max_connections).diagnose(evidence)
        assert (verdict and verdict[0]) is reason
        assert verdict is None or verdict[1].endswith(".")
