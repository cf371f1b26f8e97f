"""nxproxy gets its options as intended, the cookie stays secret, and the output is understood.

Recordings of what the real nxproxy prints, and when, are in ``tests/data/nxproxy``.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import sys
import tempfile
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_fsm.backends import BackendContext, NX3Backend
from proxy_fsm.errors import BackendError, InvalidSession
from proxy_fsm.evidence import (
    AgentDataReceived,
    AgentEof,
    ChannelOpened,
    ConnectionEnded,
    DisplayLost,
    Evidence,
    Observation,
    OutputLine,
    ProcessExited,
    ProcessSpawned,
    TransportEnded,
)
from proxy_fsm.reasons import EndReason
from proxy_fsm.session import SessionInfo
from proxy_fsm.workers.process import LineReader

if TYPE_CHECKING:
    from collections.abc import Callable

RECORDINGS = Path(__file__).parents[1] / "data" / "nxproxy"
COOKIE = "0123456789abcdef0123456789abcdef"
NAME = "alice-51-1795334442_stDxterm_dp24"
ADDRESS = "/run/user/1000/proxy_fsm-abcdefgh/proxy.sock"
DEFAULTS = "retry=5,composite=1,clipboard=1"


def context(address: str = ADDRESS, *, name: str = NAME, display: int = 51) -> BackendContext:
    return BackendContext(
        session=SessionInfo(name=name, cookie=COOKIE, graphics_port=4788, display=display),
        executable="/usr/bin/nxproxy",
        listen_address=address,
        sessions_root=Path("/home/alice/.x2go"),
        session_root=Path(f"/home/alice/.x2go/S-{name}"),
        environ={"DISPLAY": ":0", "PATH": os.environ["PATH"]},
        scratch=Path("/run/user/1000/proxy_fsm-abcdefgh"),
    )


def option_string(backend: NX3Backend, address: str = ADDRESS) -> str:
    string = backend.environment(context(address))["NX_DISPLAY"]
    assert string is not None
    return string


class TestOptions:
    def test_option_string_has_session_and_defaults(self) -> None:
        assert option_string(NX3Backend()) == f"nx/nx,connect=unix:{ADDRESS},cookie={COOKIE},id={NAME},{DEFAULTS}:51"

    def test_given_options_are_added_or_replace_a_default(self) -> None:
        string = option_string(NX3Backend(options={"clipboard": "both", "link": "lan", "kbtype": "pc105/us:x"}))
        assert string == (
            f"nx/nx,connect=unix:{ADDRESS},cookie={COOKIE},id={NAME},"
            "retry=5,composite=1,clipboard=both,link=lan,kbtype=pc105/us:x:51"
        )

    def test_options_of_one_backend_do_not_affect_another(self) -> None:
        NX3Backend(options={"link": "lan"}).process_options({"pack": "none"})
        assert option_string(NX3Backend()).endswith(f",{DEFAULTS}:51")

    @pytest.mark.parametrize(
        "key", ["connect", "cookie", "port", "id", "root", "errors", "listen", "accept", "options"]
    )
    def test_option_set_by_the_engine_is_rejected(self, key: str) -> None:
        with pytest.raises(ValueError, match=f"The NX option '{key}' is set by the engine"):
            NX3Backend(options={key: "1"})

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("", "1"),
            ("Connect", "1"),
            ("a b", "1"),
            ("a=b", "1"),
            ("a,listen", "1"),
            ("a\n", "1"),
            ("é", "1"),
            ("link", ""),  # nxproxy exits with an error
            ("link", "a,listen=4000"),
            ("link", "a=b"),
            ("link", "a b"),
            ("link", "a\n"),
            ("link", "a\0"),
            ("link", "é"),
            ("link", "\x7f"),
            ("link", "a%2Clisten"),  # nxproxy decodes it
            ("link", "x" * 256),
            ("link", 1),
            ("link", None),
            (1, "lan"),
        ],
    )
    def test_invalid_option_is_rejected(self, key: Any, value: Any) -> None:
        with pytest.raises(ValueError, match="cannot be written into an NX option string"):
            NX3Backend(options={key: value})
        backend = NX3Backend()
        assert backend.process_options({key: value}) == {key: value}
        assert option_string(backend).endswith(f",{DEFAULTS}:51")

    def test_value_of_maximum_length_is_accepted(self) -> None:
        assert f",link={'x' * 255}:51" in option_string(NX3Backend(options={"link": "x" * 255}))

    def test_valid_options_of_a_client_are_accepted_and_the_others_returned(self) -> None:
        backend = NX3Backend()
        options = {"link": "adsl", "connect": "evil", "published_applications": True, "pack": "a,b", "retry": "2"}
        assert backend.process_options(options) == {
            "connect": "evil",
            "published_applications": True,
            "pack": "a,b",
        }
        assert option_string(backend).endswith(",retry=2,composite=1,clipboard=1,link=adsl:51")

    @given(
        options=st.dictionaries(
            st.one_of(st.sampled_from(["link", "pack", "connect", "listen", "a,listen"]), st.text(max_size=10)),
            st.one_of(
                st.sampled_from(["lan", "1,listen=4000", "1:99", ":", "%2Clisten%3D1", "=", ""]),
                st.text("a1,=: %-/\n\0é", max_size=10),
                st.text(max_size=10),
            ),
            max_size=5,
        ),
        given_late=st.booleans(),
    )
    def test_no_option_changes_where_nxproxy_connects_or_makes_it_listen(
        self, options: dict[str, str], *, given_late: bool
    ) -> None:
        """Parsed as nxproxy does it: the display after the last colon, then commas, then equals signs."""
        if given_late:
            backend = NX3Backend()
            rejected = backend.process_options(options)
            accepted = {key: value for key, value in options.items() if key not in rejected}
        else:
            try:
                backend = NX3Backend(options=options)
            except ValueError:
                return
            accepted = options
        string = option_string(backend)
        body, _, display = string.rpartition(":")
        head, *parts = body.split(",")
        assert (head, display) == ("nx/nx", "51")
        assert string.isascii()
        assert string.isprintable()
        assert not set(string) & set("% ")
        pairs = [part.split("=") for part in parts]
        assert all(len(pair) == 2 for pair in pairs)
        assert pairs[:3] == [["connect", f"unix:{ADDRESS}"], ["cookie", COOKIE], ["id", NAME]]
        assert {key: value for key, value in pairs[3:]} == {**NX3Backend.DEFAULT_OPTIONS, **accepted}  # noqa: C416 - lists
        assert len(pairs) == 3 + len({**NX3Backend.DEFAULT_OPTIONS, **accepted})


class TestPreflight:
    def test_readable_options_pass(self) -> None:
        NX3Backend().preflight(context())

    @pytest.mark.parametrize(
        "directory", ["/tmp/a,listen=1", "/tmp/a b", "/tmp/a=b", "/tmp/é", "/tmp/a%41", "/tmp/a\n"]
    )
    def test_socket_path_that_nxproxy_would_misread_is_an_error(self, directory: str) -> None:
        with pytest.raises(BackendError) as caught:
            NX3Backend().preflight(context(f"{directory}/proxy.sock"))
        assert caught.value.reason is EndReason.LISTEN_FAILED
        assert caught.value.hint is not None
        assert "XDG_RUNTIME_DIR" in caught.value.hint

    def test_string_that_nxproxy_would_cut_is_an_error(self) -> None:
        full = {"a": "x" * 255, "b": "x" * 255, "c": "x" * 200, "d": "x"}
        rest = 1023 - len(option_string(NX3Backend(options=full)))
        fits = full | {"d": "x" * (1 + rest)}
        NX3Backend(options=fits).preflight(context())
        with pytest.raises(BackendError) as caught:
            NX3Backend(options={**fits, "d": fits["d"] + "x"}).preflight(context())
        assert caught.value.reason is EndReason.PROXY_NOT_STARTABLE
        assert "1023 bytes" in caught.value.detail
        assert COOKIE not in str(caught.value)

    @pytest.mark.parametrize("lets_in", [True, False])
    def test_missing_xauth_needs_an_x_server_that_requires_no_cookie(self, tmp_path: Path, *, lets_in: bool) -> None:
        """Measured with nxproxy 3.5.99.26: without xauth it presents a cookie that it has made up."""
        with tempfile.TemporaryDirectory(dir="/tmp") as directory, closing(socket.socket(socket.AF_UNIX)) as listener:
            listener.bind(f"{directory}/x:0")
            listener.listen()
            setups: list[bytes] = []

            def answer() -> None:
                with closing(listener.accept()[0]) as client:
                    setups.append(client.recv(12, socket.MSG_WAITALL))
                    client.sendall(struct.pack("<BBHHH", int(lets_in), 8, 11, 0, 2) + b"No cooki")

            thread = threading.Thread(target=answer, daemon=True)
            thread.start()
            cookies = tmp_path / ".Xauthority"
            cookies.write_bytes(struct.pack(">HHHH18sH16s", 0xFFFF, 0, 0, 18, b"MIT-MAGIC-COOKIE-1", 16, b"x" * 16))
            environ = {"DISPLAY": f"{directory}/x:0", "PATH": str(tmp_path), "XAUTHORITY": str(cookies)}
            without = replace(context(), environ=environ)
            try:
                if lets_in:
                    NX3Backend().preflight(without)
                else:
                    with pytest.raises(BackendError) as caught:
                        NX3Backend().preflight(without)
                    assert caught.value.reason is EndReason.DISPLAY_UNAVAILABLE
                    assert caught.value.hint is not None
                    assert "package xauth" in caught.value.hint
            finally:
                thread.join()
        assert setups == [struct.pack("<cxHHHHxx", b"l", 11, 0, 0, 0)]  # it presented no cookie

    def test_missing_xauth_and_x_server_are_reported_as_missing_x_server(self, tmp_path: Path) -> None:
        environ = {"DISPLAY": f"{tmp_path}/x:0", "PATH": str(tmp_path)}
        with pytest.raises(BackendError, match="There is no X server at") as caught:
            NX3Backend().preflight(replace(context(), environ=environ))
        assert caught.value.reason is EndReason.DISPLAY_UNAVAILABLE

    def test_session_needs_cookie_and_display(self) -> None:
        backend = NX3Backend()
        backend.check_session(SessionInfo(name=NAME, cookie=COOKIE, graphics_port=1, display=0))
        with pytest.raises(InvalidSession) as caught:
            backend.check_session(SessionInfo(name=NAME, graphics_port=1, display=51))
        assert caught.value.field == "cookie"
        with pytest.raises(InvalidSession) as caught:
            backend.check_session(SessionInfo(name=NAME, cookie=COOKIE, graphics_port=1))
        assert caught.value.field == "display"


class TestProgram:
    @pytest.fixture
    def directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        for name in ("nxproxy", "other"):
            (tmp_path / name).write_text("#!/bin/sh\n", encoding="ascii")
            (tmp_path / name).chmod(0o700)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("NXPROXY_BINARY", raising=False)
        return tmp_path

    def test_program_is_nxproxy_from_path(self, directory: Path) -> None:
        assert NX3Backend().find_executable() == str(directory / "nxproxy")

    def test_variable_overrides_path(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NXPROXY_BINARY", str(directory / "other"))
        assert NX3Backend().find_executable() == str(directory / "other")
        monkeypatch.setenv("NXPROXY_BINARY", "")
        assert NX3Backend().find_executable() == str(directory / "nxproxy")

    def test_argument_overrides_the_variable(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("NXPROXY_BINARY", "nonsense")
        assert NX3Backend("other").find_executable() == str(directory / "other")

    @pytest.mark.usefixtures("directory")
    def test_hint_for_a_missing_program_names_the_package(self) -> None:
        with pytest.raises(BackendError) as caught:
            NX3Backend("missing").find_executable()
        assert caught.value.reason is EndReason.PROXY_NOT_FOUND
        assert caught.value.hint is not None
        assert "package nxproxy" in caught.value.hint

    def test_arguments_contain_no_secret(self) -> None:
        assert NX3Backend().command(context()) == ["/usr/bin/nxproxy", "-S"]

    def test_environment_has_options_root_and_client(self) -> None:
        environment = NX3Backend().environment(context())
        assert set(environment) == {"NX_DISPLAY", "NX_ROOT", "NX_CLIENT"}
        assert environment["NX_ROOT"] == "/home/alice/.x2go"
        assert environment["NX_CLIENT"] == shutil.which("true")

    def test_dialog_is_replaced_even_if_true_is_not_in_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        assert NX3Backend().environment(context())["NX_CLIENT"] == "/bin/true"

    def test_backend_connects_once_to_a_unix_socket_and_needs_an_x_server(self) -> None:
        backend = NX3Backend()
        assert (backend.name, backend.listen_kind, backend.max_connections, backend.needs_display) == (
            "nx3",
            "unix",
            1,
            True,
        )


CONNECTED = "Connected to remote proxy on FD#"
AGENT_CLOSED = (AgentEof(1), ConnectionEnded(1, 1000, 1000, 3.0))
TUNNEL_CLOSED = (ConnectionEnded(1, 1000, 1000, 3.0),)
EXIT = "(exit)"
#: Recording: whether the channel was opened; what else was observed at the action; whether it was ready; the verdict,
#: and the line, or the exit, at which it was reached.
EXPECTED: dict[str, tuple[bool, tuple[Observation, ...], bool, EndReason | None, str]] = {
    "agent_killed": (True, AGENT_CLOSED, True, EndReason.PEER_LOST, "Failure reading from the peer proxy"),
    "agent_killed_negotiating": (
        True,
        AGENT_CLOSED,
        False,
        EndReason.NEGOTIATION_FAILED,
        "Error: The remote NX proxy closed",
    ),
    "nobody_listens": (False, (), False, EndReason.LISTEN_FAILED, "Error: Connection to Unix file socket"),
    "port_refused": (False, (), False, None, EXIT),  # the tunnel reports it
    "resumed_suspended": (True, AGENT_CLOSED, True, EndReason.SESSION_ENDED, EXIT),
    "sighup": (True, (), True, EndReason.PROXY_KILLED, "Waiting the cleanup timeout"),
    "sigint": (True, (), True, EndReason.PROXY_KILLED, "Waiting the cleanup timeout"),
    "sigkill": (True, TUNNEL_CLOSED, True, None, EXIT),  # the signal shows it
    "sigterm": (True, (), True, EndReason.PROXY_KILLED, "Waiting the cleanup timeout"),
    "ssh_killed": (True, (TransportEnded("gone"),), True, EndReason.PEER_LOST, "Failure reading from the peer proxy"),
    "suspended": (True, AGENT_CLOSED, True, EndReason.SESSION_ENDED, EXIT),
    "terminated": (True, AGENT_CLOSED, True, EndReason.SESSION_ENDED, EXIT),
    "tunnel_cut": (True, TUNNEL_CLOSED, True, EndReason.PEER_LOST, "Failure reading from the peer proxy"),
    "tunnel_cut_negotiating": (
        True,
        TUNNEL_CLOSED,
        False,
        EndReason.NEGOTIATION_FAILED,
        "Error: The remote NX proxy closed",
    ),
    "wrong_cookie": (True, AGENT_CLOSED, False, EndReason.NEGOTIATION_FAILED, "Error: The remote NX proxy closed"),
    "x_absent": (True, (), False, EndReason.DISPLAY_UNAVAILABLE, "Error: Connection to ':0' failed"),
    "x_killed": (True, (), True, EndReason.SESSION_ENDED, EXIT),  # the display watch reports it
    "x_refused": (True, (), False, EndReason.DISPLAY_UNAVAILABLE, "X connection failed with error"),
    "x_refused_with_command": (True, (), False, EndReason.DISPLAY_UNAVAILABLE, "X connection failed with error"),
    "x_unset": (False, (), False, EndReason.DISPLAY_UNAVAILABLE, "Error: Host X server DISPLAY is not set"),
}

READY = OutputLine("Info: Established X server connection.")
CONNECTED_PEER = (ChannelOpened(1), AgentDataReceived(1))
#: Lines that nxproxy prints and survives: it warns, it retries, or it echoes what it was given (in quotes).
HARMLESS = (
    # Proxy.cpp, handlePing: the first at a quarter of its timeout, once a stall
    "Warning: No data received from remote proxy within 30 seconds.",
    "Proxy: WARNING! No data received from remote proxy on FD#5 since 30003 ms.",
    # ServerProxy.cpp, Loop.cpp: every try but the last
    "ServerProxy: WARNING! Connection to ':0' failed with error 'Connection refused'. Retrying.",
    "Loop: Connection to '127.0.0.1:40001' failed with error 'Connection refused'. Retrying.",
    "Loop: Connection to Unix socket file '/run/p.sock' failed with error 'Connection refused'. Retrying.",
    # Loop.cpp: names and values, of the options that we give, of the session root, and of those that the agent sends
    "Warning: Ignoring unknown option 'a' with value '{text}'.",
    "Warning: Ignoring unknown remote option 'a' with value '{text}'.",
    "Warning: Unrecognized session type '{text}'. Assuming agent session.",
    "Info: Using errors file '/home/{text}/S-x/errors'.",
    "Info: Using pack method '{text}' with session 'x'.",
    "Info: Forwarding X11 connections to display '{text}'.",
    "xauth:  file {text} does not exist",
)
#: What nxproxy prints at its end, and what that means before and after the session is established.
FATAL: tuple[tuple[str, EndReason | None, EndReason | None], ...] = (
    ("Error: No data received from remote proxy within 120 seconds.", EndReason.PEER_LOST, EndReason.PEER_LOST),
    ("Error: Failure reading from the peer proxy.", EndReason.PEER_LOST, EndReason.PEER_LOST),
    ("Error: Connection with remote peer broken.", EndReason.PEER_LOST, EndReason.PEER_LOST),
    ("Info: Aborting the procedure due to signal '15'.", EndReason.PROXY_KILLED, EndReason.PROXY_KILLED),
    ("Info: Waiting the cleanup timeout to complete.", EndReason.PROXY_KILLED, EndReason.PROXY_KILLED),
    ("Error: Failure negotiating the session in stage '7'.", EndReason.NEGOTIATION_FAILED, None),
    ("Error: Wrong version or invalid session authentication cookie.", EndReason.NEGOTIATION_FAILED, None),
    ("Error: The remote NX proxy closed the connection.", EndReason.NEGOTIATION_FAILED, None),
    ("Error: Host X server DISPLAY is not set.", EndReason.DISPLAY_UNAVAILABLE, None),
    ("Error: Connection to ':0' failed. Error is 111 'Connection refused'.", EndReason.DISPLAY_UNAVAILABLE, None),
    # a warning, though no session comes of it
    ("Warning: X connection failed with error 'Invalid MIT-MAGIC-COOKIE-1 key'.", EndReason.DISPLAY_UNAVAILABLE, None),
    ("Info: Your session was closed before reaching a usable state.", EndReason.DISPLAY_UNAVAILABLE, None),
)


def read(output: bytes) -> list[str]:
    reader = LineReader([COOKIE])
    return [*reader.feed(output), *reader.finish()]


def calls_of(function: Callable[[], object]) -> int:
    """Count the calls that a function makes, of Python functions and of C functions."""
    events: list[str] = []
    before = sys.getprofile()
    sys.setprofile(lambda _frame, event, _argument: events.append(event))
    try:
        function()
    finally:
        sys.setprofile(before)
    return sum(event.endswith("call") for event in events)


def replay(name: str) -> list[Observation]:
    """Return what an engine observes when nxproxy does what was recorded."""
    opened, at_action, *_ = EXPECTED[name]
    lines = read((RECORDINGS / f"{name}.txt").read_bytes())
    seen: list[Observation] = [ProcessSpawned(1, "nxproxy")]
    for row in (RECORDINGS / f"{name}.times").read_text(encoding="utf-8").splitlines():
        _, kind, what = row.split("\t")
        if kind == "line":
            text = lines[int(what) - 1]
            if opened and CONNECTED in text:
                seen.append(ChannelOpened(1))
            seen.append(OutputLine(text))
            if "Connection with remote proxy completed" in text:
                seen.append(AgentDataReceived(1))
        elif kind == "action":
            seen += [each for each in at_action if each not in seen]
        else:
            code = int(what)
            seen += [each for each in at_action if each not in seen]
            seen.append(ProcessExited(code, None) if code >= 0 else ProcessExited(None, -code))
    return seen


def judge(seen: list[Observation], *, signalled_after: int | None = None) -> tuple[Evidence, Any, str]:
    """Handle observations as the engine does; return the evidence, the first verdict, and its line."""
    backend, evidence = NX3Backend(), Evidence()
    verdict, at = None, EXIT
    for number, observation in enumerate(seen):
        evidence.add(observation)
        evidence.signalled = signalled_after is not None and number >= signalled_after
        evidence.ready = evidence.ready or (verdict is None and backend.ready(evidence))
        if verdict is None:
            verdict = backend.diagnose(evidence)
            if verdict is not None and isinstance(observation, OutputLine):
                at = observation.text
    return evidence, verdict, at


class TestDiagnosis:
    def test_every_recording_is_in_the_table(self) -> None:
        assert set(EXPECTED) == {path.stem for path in RECORDINGS.glob("*.txt")}
        assert set(EXPECTED) == {path.stem for path in RECORDINGS.glob("*.times")}

    @pytest.mark.parametrize("name", EXPECTED)
    def test_reason_is_read_from_nxproxys_output(self, name: str) -> None:
        opened, _, ready, reason, expected_at = EXPECTED[name]
        seen = replay(name)
        assert opened == any(isinstance(each, ChannelOpened) for each in seen)
        evidence, verdict, at = judge(seen)
        assert evidence.ready is ready
        assert (verdict and verdict[0]) is reason
        assert expected_at in at
        assert verdict is None or verdict[1].endswith(".")

    @pytest.mark.parametrize("name", EXPECTED)
    def test_output_after_our_own_signal_is_ignored(self, name: str) -> None:
        assert judge(replay(name), signalled_after=0)[1] is None

    def test_only_the_ready_line_means_ready(self) -> None:
        backend = NX3Backend()
        ready = OutputLine("Info: Established X server connection.")
        assert backend.ready(Evidence(ready))
        assert not backend.ready(Evidence(OutputLine("Session: Session started at 'Sun Nov 22 12:07:31 2026'.")))
        assert backend.ready(Evidence(ready, AgentDataReceived(1)))
        assert not backend.ready(
            Evidence(AgentDataReceived(1), OutputLine("Info: Using shared memory parameters 0/0K."))
        )

    @pytest.mark.parametrize(
        ("opened", "reason"), [(False, EndReason.LISTEN_FAILED), (True, EndReason.DISPLAY_UNAVAILABLE)]
    )
    def test_failed_tcp_connection_is_the_tunnel_first_and_the_display_then(
        self, *, opened: bool, reason: EndReason
    ) -> None:
        """Over TCP its messages are the same for both; over a unix socket they are not."""
        where = "localhost:6000" if opened else "127.0.0.1:40001"
        line = OutputLine(f"Error: Connection to '{where}' failed. Error is 111 'Connection refused'.")
        assert judge([*([ChannelOpened(1)] if opened else []), line])[1][0] is reason

    @pytest.mark.parametrize("opened", [True, False])
    @pytest.mark.parametrize("number", [1, 2, 15])
    def test_signal_from_outside_before_the_session_is_established(self, number: int, *, opened: bool) -> None:
        """As printed by nxproxy 3.5.99.26 on each of the three, waiting for an answer or for a connection."""
        words = f"Info: Aborting the procedure due to signal '{number}'.", "Session: Session terminated at 'x'."
        seen = [*([ChannelOpened(1)] if opened else []), *map(OutputLine, words), ProcessExited(0, None)]
        _, verdict, at = judge(seen)
        assert verdict[0] is EndReason.PROXY_KILLED
        assert "TERM, INT or HUP" in verdict[1]
        assert at == words[0]

    def test_wrong_cookie_and_exited_agent_are_both_named(self) -> None:
        for name in ("wrong_cookie", "agent_killed_negotiating"):
            verdict = judge(replay(name))[1]
            assert "cookie is wrong" in verdict[1]
            assert "agent has ended" in verdict[1]

    @pytest.mark.parametrize(("line", "before", "after"), FATAL)
    def test_fatal_line_has_its_reason(self, line: str, before: EndReason | None, after: EndReason | None) -> None:
        for seen, reason in (((), before), ((READY,), after)):
            verdict = judge([*CONNECTED_PEER, *seen, OutputLine(line)])[1]
            assert (verdict and verdict[0]) is reason

    @pytest.mark.parametrize("ready", [False, True])
    @pytest.mark.parametrize("line", HARMLESS)
    def test_warning_and_echoed_text_are_not_the_end(self, line: str, *, ready: bool) -> None:
        start = [*CONNECTED_PEER, *([READY] if ready else [])]
        for text in [fatal for fatal, _, _ in FATAL] if "{text}" in line else [""]:
            echoed = OutputLine(line.format(text=text))
            without_level = OutputLine(line.format(text=text.partition(": ")[2]))
            assert judge([*start, echoed, without_level])[1] is None
            # nor are they the cause if something else ends it later
            assert judge([*start, echoed, without_level, ProcessExited(None, 9)])[1] is None

    def test_echoed_text_does_not_mean_ready(self) -> None:
        for line in HARMLESS:
            echoed = OutputLine(line.format(text=READY.text))
            without_level = OutputLine(line.format(text=READY.text.partition(": ")[2]))
            assert not NX3Backend().ready(Evidence(*CONNECTED_PEER, echoed, without_level))

    def test_warning_of_silence_is_not_the_end(self) -> None:
        """It comes at a quarter of the timeout, and nxproxy goes on when the agent does."""
        warning = OutputLine("Warning: No data received from remote proxy within 30 seconds.")
        given_up = OutputLine("Error: No data received from remote proxy within 120 seconds.")
        assert judge([*CONNECTED_PEER, READY, warning, ProcessExited(None, 9)])[1] is None
        _, verdict, at = judge([*CONNECTED_PEER, READY, warning, given_up])
        assert verdict[0] is EndReason.PEER_LOST
        assert at == given_up.text

    def test_only_a_line_or_the_exit_is_examined(self) -> None:
        """The tunnel's observations are judged elsewhere; a verdict from older lines would take their place."""
        line = OutputLine("Error: Failure reading from the peer proxy.")
        evidence = Evidence(ChannelOpened(1), line, TransportEnded("gone"))
        assert NX3Backend().diagnose(evidence) is None
        evidence.add(ProcessExited(0, None))
        assert NX3Backend().diagnose(evidence) is not None

    def test_line_is_examined_when_new_and_again_at_the_exit(self) -> None:
        """However much is printed meanwhile, no line costs more than another."""
        fault = OutputLine("Error: Failure reading from the peer proxy.")
        evidence = Evidence(ChannelOpened(1), fault, OutputLine("Info: Something else."))
        assert NX3Backend().diagnose(evidence) is None
        evidence.add(ProcessExited(0, None))
        verdict = NX3Backend().diagnose(evidence)
        assert verdict is not None
        assert verdict[0] is EndReason.PEER_LOST

    @pytest.mark.no_cover  # it repeats what other tests cover, and would take four times as long
    @given(
        name=st.sampled_from(sorted(EXPECTED)),
        cuts=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 4000)), max_size=4),
        noise=st.lists(
            st.tuples(
                st.integers(0, 60),
                st.binary(max_size=30)
                | st.sampled_from([b"x", b"\xff", b"\x1b[", b"cookie=", b"Error: ", b"\r"]).map(
                    lambda part: part * 3000
                )
                | st.just(b"\nError: \n" * 2 * Evidence.KEPT),
            ),
            max_size=5,
        ),
        others=st.lists(
            st.tuples(
                st.integers(0, 60),
                st.sampled_from(
                    [ChannelOpened(1), *AGENT_CLOSED, DisplayLost("x"), ProcessExited(None, 11), TransportEnded("x")]
                ),
            ),
            max_size=5,
        ),
        ready=st.booleans(),
        signalled=st.booleans(),
    )
    def test_broken_output_never_raises(
        self,
        name: str,
        cuts: list[tuple[int, int]],
        noise: list[tuple[int, bytes]],
        others: list[tuple[int, Observation]],
        *,
        ready: bool,
        signalled: bool,
    ) -> None:
        output = (RECORDINGS / f"{name}.txt").read_bytes()
        for start, length in cuts:
            output = output[:start] + output[start + length :]
        for place, data in noise:
            output = output[: place * 40] + data + output[place * 40 :]
        seen: list[Observation] = [OutputLine(text) for text in read(output)]
        for place, observation in others:
            seen.insert(place, observation)
        backend, evidence = NX3Backend(), Evidence()
        evidence.ready, evidence.signalled = ready, signalled
        for observation in seen:
            evidence.add(observation)
            verdict = backend.diagnose(evidence)
            assert verdict is None or verdict[0].name in EndReason.__members__
            assert verdict is None or verdict[1].endswith(".")
            assert verdict is None or not signalled
        assert backend.ready(evidence) in {True, False}  # it reads each line by itself

    @pytest.mark.parametrize("length", [0, 9_000, 20_000])
    def test_verdict_does_not_cost_more_with_more_output(self, length: int) -> None:
        """Counted in calls and in characters, so that no clock is needed."""

        def flooded(lines: int) -> tuple[int, int]:
            backend, evidence = NX3Backend(), Evidence(ChannelOpened(1))
            for text in read((b"x" * length + b"\n") * lines):
                evidence.add(OutputLine(text))
            calls = calls_of(lambda: (backend.ready(evidence), backend.diagnose(evidence)))
            evidence.add(ProcessExited(0, None))
            calls += calls_of(lambda: (backend.ready(evidence), backend.diagnose(evidence)))
            return calls, sum(len(line.text) for line in evidence.lines)

        calls, chars = flooded(Evidence.KEPT)
        assert calls < 20 * Evidence.KEPT
        assert chars <= Evidence.KEPT * 8_192
        assert flooded(3 * Evidence.KEPT) == (calls, chars)
