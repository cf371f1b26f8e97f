"""A server's output is parsed into a valid session or raises `InvalidSession`, and its cookie is never shown."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy_fsm.errors import InvalidSession
from proxy_fsm.session import (
    ListedSession,
    SessionInfo,
    SessionStatus,
    parse_agent_output,
    parse_resume_output,
    parse_session_list,
)

if TYPE_CHECKING:
    from collections.abc import Callable

COOKIE = "0123456789abcdef0123456789abcdef"
NAME = "alice-51-1795334442_stDxterm_dp24"
AGENT_LINES = ("51", COOKIE, "4711", NAME, "30001", "30002", "30003")
ROW = (
    "4711",
    NAME,
    "51",
    "server",
    "R",
    "2026-11-22T11:38:00",
    COOKIE,
    "192.0.2.7",
    "30001",
    "30002",
    "2026-11-22T11:39:00",
    "alice",
    "60",
    "30003",
    "-1",
    "-1",
)
SESSION = SessionInfo(
    name=NAME, cookie=COOKIE, graphics_port=30001, display=51, agent_pid=4711, sound_port=30002, sshfs_port=30003
)
LISTS = json.loads((Path(__file__).parent / "data" / "x2go" / "session_lists.json").read_text(encoding="utf-8"))
LOCALE_WARNING = """\
perl:warning:Settinglocalefailed.
perl:warning:Pleasecheckthatyourlocalesettings:
\tLANGUAGE=(unset),
\tLC_ALL="xx_YY.UTF-8",
\tLANG="C.UTF-8"
aresupportedandinstalledonyoursystem.
perl:warning:Fallingbacktoafallbacklocale("C.UTF-8").
"""


def row(**changes: str) -> str:
    """Return a line of x2golistsessions, with columns changed by number, as in ``c3="x"``."""
    columns = list(ROW)
    for column, value in changes.items():
        columns[int(column.removeprefix("c"))] = value
    return "|".join(columns)


def refusal(call: Callable[[], object]) -> InvalidSession:
    """Return the InvalidSession that a call raises, after checking that no part of it contains the cookie."""
    with pytest.raises(InvalidSession) as caught:
        call()
    assert_no_cookie(caught.value)
    return caught.value


def assert_no_cookie(error: InvalidSession) -> None:
    for shown in (str(error), repr(error), error.field, error.problem, repr(error.__cause__)):
        assert COOKIE not in shown.lower()
    assert error.__context__ is None or COOKIE not in repr(error.__context__).lower()


NOISE = st.text() | st.sampled_from(
    [*AGENT_LINES, "0" * 32, NAME.replace("alice", "bob"), row(), row(c4="S"), row()[:60], "|".join(ROW[6:])]
)


class TestSessionInfo:
    def test_constructor_accepts_the_contracts_arguments(self) -> None:
        info = SessionInfo(name=NAME, cookie=COOKIE, graphics_port=4788, display=51, agent_host="127.0.0.1")
        assert (info.name, info.cookie, info.graphics_port, info.display) == (NAME, COOKIE, 4788, 51)

    def test_cookie_and_display_are_optional(self) -> None:
        info = SessionInfo(name="viewer", graphics_port=5900)
        assert (info.cookie, info.display, info.agent_host) == (None, None, "127.0.0.1")

    def test_repr_hides_the_cookie(self) -> None:
        info = SessionInfo(name=NAME, cookie=COOKIE, graphics_port=4788)
        assert COOKIE not in f"{info!r} {info}"
        assert "cookie" not in repr(info)

    def test_instance_is_frozen(self) -> None:
        info = SessionInfo(name=NAME, graphics_port=4788)
        with pytest.raises(dataclasses.FrozenInstanceError):
            info.name = "other"  # type: ignore[misc]

    def test_instance_survives_pickle_copy_and_replace(self) -> None:
        info = SessionInfo(name=NAME, cookie=COOKIE, graphics_port=4788, display=51)
        assert pickle.loads(pickle.dumps(info)) == info  # noqa: S301 - our own bytes
        assert copy.copy(info) == copy.deepcopy(info) == info
        assert dataclasses.replace(info, graphics_port=4789).graphics_port == 4789

    def test_replace_validates_again(self) -> None:
        info = SessionInfo(name=NAME, cookie=COOKIE, graphics_port=4788)
        assert refusal(lambda: dataclasses.replace(info, graphics_port=0)).field == "graphics_port"

    @pytest.mark.parametrize(
        "name",
        [
            NAME,
            "alice-51-1795334442",  # before the session's type is known
            "a.b_c-d@example.org-50-1795334442_stRxterm_dp24",  # a domain user
            "alice-52-1795334442_stS0XSHADbobXSHADPP50.0_dp24",  # a shared desktop
            "alice-53-1795334442_stDTERMINAL_dp32_host.example.org",  # XDMCP
            "alice-54-1795334442_stRusrbinfirefox-esr_dp24",  # a command by its path
            "0alice-4999-999999999_stRx_dp8",
            "_" * 200,
        ],
    )
    def test_session_names_of_servers_are_accepted(self, name: str) -> None:
        assert SessionInfo(name=name, graphics_port=1).name == name

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "x" * 201,
            "../x",
            "..",
            ".x",
            "a..b",
            "-rf",
            "@x",
            "a/b",
            "a\\b",
            "a,b",
            "a=b",
            "a:b",
            "a b",
            "a\n",
            "a\0b",
            "a\x1b[2Jb",
            "a|b",
            "a;b",
            "a%2Cb",
            "a$b",
            "a+b",
            "älice",
            "a\u202eb",
            "٣",
            f"a{COOKIE.upper()}",
        ],
    )
    def test_other_names_are_refused(self, name: str) -> None:
        error = refusal(lambda: SessionInfo(name=name, cookie=COOKIE, graphics_port=1))
        assert error.field == "name"
        assert str(error).isascii()
        assert str(error).isprintable()

    @pytest.mark.parametrize(
        ("field", "value", "words"),
        [
            ("name", None, "of type NoneType"),
            ("name", b"alice", "of type bytes"),
            ("cookie", 7, "of type int"),
            ("cookie", "", "32 hexadecimal digits"),
            ("cookie", COOKIE + "0", "33 characters"),
            ("cookie", COOKIE[:-1] + "g", "32 hexadecimal digits"),
            ("cookie", COOKIE + "\n", "32 hexadecimal digits"),
            ("graphics_port", 0, "from 1 to 65535"),
            ("graphics_port", 65536, "from 1 to 65535"),
            ("graphics_port", True, "of type bool"),
            ("graphics_port", "4788", "convert it with int()"),
            ("graphics_port", 4788.0, "of type float"),
            ("graphics_port", None, "of type NoneType"),
            ("display", -1, "from 0 to 65535"),
            ("display", 65536, "from 0 to 65535"),
            ("display", False, "of type bool"),
            ("display", "51", "convert it with int()"),
            ("agent_host", None, "of type NoneType"),
            ("agent_host", COOKIE, "holds the session's cookie"),
        ],
    )
    def test_error_names_field_and_problem(self, field: str, value: object, words: str) -> None:
        fields: dict[str, Any] = {"name": NAME, "cookie": COOKIE, "graphics_port": 4788, field: value}
        error = refusal(lambda: SessionInfo(**fields))
        assert error.field == field
        assert words in error.problem

    @pytest.mark.parametrize(
        "host",
        [
            "localhost",
            "agent.example.org",
            "agent.example.org.",
            "node_1",
            "10.0.0.1",
            "::1",
            "2001:db8::7",
            "::ffff:127.0.0.1",
            "4com",
        ],
    )
    def test_host_names_and_addresses_are_accepted(self, host: str) -> None:
        assert SessionInfo(name=NAME, graphics_port=1, agent_host=host).agent_host == host

    @pytest.mark.parametrize(
        "host",
        [
            "",
            " ",
            "a b",
            "a/b",
            "a,b",
            "a\n",
            "a\0",
            "-a",
            "a-",
            "a..b",
            ".",
            "127.1",
            "256.0.0.1",
            "[::1]",
            "fe80::1%eth0",
            "host:22",
            "hôte",
            "a." * 127,
            "x" * 64,
        ],
    )
    def test_other_hosts_are_refused(self, host: str) -> None:
        assert refusal(lambda: SessionInfo(name=NAME, graphics_port=1, agent_host=host)).field == "agent_host"

    @given(name=st.text(), cookie=st.none() | st.text(), port=st.integers(), host=st.text())
    def test_accepted_fields_are_safe_in_paths_and_options(
        self, name: str, cookie: str | None, port: int, host: str
    ) -> None:
        try:
            info = SessionInfo(name=name, cookie=cookie, graphics_port=port, agent_host=host)
        except InvalidSession:
            return
        assert not set(info.name + info.agent_host) & set("/\\,= \t\n\0")
        assert info.name.isascii()
        assert info.name.isprintable()


class TestParseAgentOutput:
    @pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n-1\n-1\n", "\n30004\n30005\n"])
    def test_output_of_x2gostartagent_is_parsed(self, end: str) -> None:
        info = parse_agent_output("\n".join(AGENT_LINES) + end, agent_host="::1")
        assert info == dataclasses.replace(SESSION, agent_host="::1")

    def test_terminal_line_endings_are_accepted(self) -> None:
        assert parse_agent_output("\r\n" + "\r\n".join(AGENT_LINES) + "\r\n").display == 51

    @pytest.mark.parametrize(
        ("line", "value", "field"),
        [
            (0, "", "output"),  # the first line is blank: six remain
            (0, "x", "display"),
            (0, COOKIE, "display"),
            (0, "99999", "display"),
            (1, "", "cookie"),
            (1, COOKIE + COOKIE, "cookie"),
            (2, "", "agent_pid"),
            (2, "0", "agent_pid"),
            (2, COOKIE, "agent_pid"),
            (3, "", "name"),
            (3, "a/b", "name"),
            (3, COOKIE, "name"),
            (4, "-1", "graphics_port"),
            (4, "٣", "graphics_port"),
            (4, "99999999999", "graphics_port"),
            (5, "70000", "sound_port"),
            (6, "x", "sshfs_port"),
        ],
    )
    def test_error_names_the_invalid_field(self, line: int, value: str, field: str) -> None:
        lines = list(AGENT_LINES)
        lines[line] = value
        assert refusal(lambda: parse_agent_output("\n".join(lines))).field == field

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "printed nothing"),
            (" \n\n", "printed nothing"),
            ("ACCESS DENIED\n", "ACCESS DENIED"),
            ("LIMIT\n", "LIMIT"),
            ("bash: warning: setlocale\nLIMIT", "LIMIT"),
            ("The $USER environment variable is not set.", "'The $USER environment variable is not set.'"),
            ("a\x1b[31mb\x07", "'a\\x1b[31mb\\x07'"),
            (f"{COOKIE}\n51", "it has 2 of 7 lines, and the first is '<hidden>'"),
            (f"key={COOKIE.upper()}", "'key=<hidden>'"),
            ("x" * 1000, "x" * 120 + "…'"),
        ],
    )
    def test_error_quotes_unexpected_output(self, text: str, words: str) -> None:
        error = refusal(lambda: parse_agent_output(text))
        assert error.field == "output"
        assert words in error.problem
        assert len(str(error)) < 250

    def test_answer_is_found_among_other_lines(self) -> None:
        text = "\n".join(["Last login: today", "51", *AGENT_LINES, "4711", "Bye."])
        assert parse_agent_output(text) == SESSION

    def test_two_answers_are_refused(self) -> None:
        other = "\n".join(AGENT_LINES).replace("30001", "30011")
        assert "2 sessions" in refusal(lambda: parse_agent_output("\n".join(AGENT_LINES) + "\n" + other)).problem

    @given(st.lists(NOISE), st.lists(NOISE))
    @example([COOKIE, "51"], [])
    @example(["51", COOKIE, "4711", NAME], ["1", "2", "3"])
    @example(["51"], [COOKIE, "4711", NAME, "1", "2", "3"])
    def test_noise_around_the_answer_changes_nothing_or_is_refused(self, before: list[str], after: list[str]) -> None:
        with contextlib.suppress(InvalidSession):
            assert parse_agent_output("\n".join([*before, *AGENT_LINES, *after])) == SESSION

    def test_user_named_like_a_refusal_is_accepted(self) -> None:
        lines = "\n".join(AGENT_LINES).replace("alice", "LIMIT")
        assert parse_agent_output(lines).name.startswith("LIMIT-51")

    @given(st.text())
    @example("\n" * 7)
    def test_any_text_is_parsed_or_invalid(self, text: str) -> None:
        with contextlib.suppress(InvalidSession):
            assert isinstance(parse_agent_output(text), SessionInfo)

    @given(st.lists(st.sampled_from([*AGENT_LINES, COOKIE.upper(), f"x{COOKIE}", "", "\x1b"]), max_size=9))
    def test_cookie_is_hidden_in_any_order_of_lines(self, lines: list[str]) -> None:
        try:
            shown = repr(parse_agent_output("\n".join(lines)))
        except InvalidSession as error:
            assert_no_cookie(error)
        else:
            assert COOKIE not in shown.lower()


class TestParseResumeOutput:
    SESSION = dataclasses.replace(SESSION, agent_host="192.0.2.9")

    @pytest.mark.parametrize("end", ["\n", "\r\n", ""])
    def test_ports_are_replaced_and_the_rest_kept(self, end: str) -> None:
        text = f"gr_port=30011{end or chr(10)}sound_port=30012{end or chr(10)}fs_port=30013{end}"
        resumed = dataclasses.replace(self.SESSION, graphics_port=30011, sound_port=30012, sshfs_port=30013)
        assert parse_resume_output(text, self.SESSION) == resumed

    def test_other_lines_are_ignored(self) -> None:
        """A server with Telekinesis prints two more ports, and one without file sharing prints none for it."""
        text = "hello\ntekictrl_port=x\ngr_port=30011\nsound_port=-1\n"
        assert parse_resume_output(text, self.SESSION).graphics_port == 30011

    @pytest.mark.parametrize(
        ("text", "field"),
        [
            ("", "output"),
            ("sound_port=30012", "output"),
            ("gr_port=30011\ngr_port=30012", "output"),
            ("gr_port=", "graphics_port"),
            ("gr_port=0", "graphics_port"),
            ("gr_port=65536", "graphics_port"),
            ("gr_port=30011; reboot", "graphics_port"),
            ("gr_port=30011\nsound_port=x", "sound_port"),
            ("gr_port=30011\nfs_port=0", "fs_port"),
        ],
    )
    def test_error_names_the_invalid_field(self, text: str, field: str) -> None:
        assert refusal(lambda: parse_resume_output(text, self.SESSION)).field == field

    @given(
        st.text() | st.lists(st.sampled_from(["gr_port=1", "fs_port=2", f"gr_port={COOKIE}", COOKIE])).map("\n".join)
    )
    def test_any_text_is_parsed_or_invalid_and_hides_the_cookie(self, text: str) -> None:
        try:
            parse_resume_output(text, self.SESSION)
        except InvalidSession as error:
            assert COOKIE not in str(error)  # noqa: PT017 - it need not be raised


class TestParseSessionList:
    def test_row_is_parsed(self) -> None:
        assert parse_session_list(row() + "\n", agent_host="agent") == (
            ListedSession(
                info=dataclasses.replace(SESSION, agent_host="agent"),
                status=SessionStatus.RUNNING,
                server="server",
                created="2026-11-22T11:38:00",
                client="192.0.2.7",
                used="2026-11-22T11:39:00",
                user="alice",
            ),
        )

    @pytest.mark.parametrize("case", LISTS, ids=lambda case: case["case"].replace(" ", "-"))
    def test_lists_of_servers_are_parsed_or_refused(self, case: dict[str, Any]) -> None:
        if "error" in case:
            assert refusal(lambda: parse_session_list(case["text"])).field == case["error"]
        else:
            sessions = parse_session_list(case["text"])
            found = {each.info.name: [str(each.status), each.info.graphics_port] for each in sessions}
            assert found == case["sessions"]
        for name, (status, port) in case.get("named", case.get("sessions", {})).items():
            (session,) = parse_session_list(case["text"], name=name)
            assert (session.info.name, str(session.status), session.info.graphics_port) == (name, status, port)

    def test_order_of_the_server_is_kept(self) -> None:
        text = "\n".join(row(c1=f"{NAME}{number}", c4=letter) for number, letter in enumerate("SRFR"))
        words = [str(session.status) for session in parse_session_list(text)]
        assert words == ["suspended", "running", "finished", "running"]

    @given(st.lists(NOISE), st.lists(NOISE))
    @example([row().replace("|R|", "|S|")], [])
    @example([f"|{NAME}"], [])
    def test_noise_around_a_session_changes_nothing_or_is_refused(self, before: list[str], after: list[str]) -> None:
        with contextlib.suppress(InvalidSession):
            (session,) = parse_session_list("\n".join([*before, row(), *after]), name=NAME)
            assert (session.info, session.status) == (SESSION, SessionStatus.RUNNING)

    @pytest.mark.parametrize("text", ["", "\n", " \r\n\n"])
    def test_empty_list_has_no_sessions(self, text: str) -> None:
        assert parse_session_list(text) == ()

    def test_session_without_agent_is_skipped(self) -> None:
        begun = row(c0="", c6="", c7="", c8="", c9="", c13="", c14="", c15="")
        assert len(parse_session_list(f"{begun}\n{row()}")) == 1

    def test_perl_locale_warnings_are_skipped(self) -> None:
        assert len(parse_session_list(LOCALE_WARNING + row())) == 1

    @pytest.mark.parametrize("port", ["", "-1"])
    def test_missing_ports_are_none(self, port: str) -> None:
        (session,) = parse_session_list(row(c9=port, c13=port))
        assert (session.info.sound_port, session.info.sshfs_port) == (None, None)

    def test_domain_user_with_backslash_is_accepted(self) -> None:
        assert parse_session_list(row(c11="DOMAIN\\alice"))[0].user == "DOMAIN\\alice"

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"c0": ""}, "agent_pid"),
            ({"c0": "x"}, "agent_pid"),
            ({"c1": "a/b"}, "name"),
            ({"c1": f"x{COOKIE}"}, "name"),
            ({"c2": COOKIE}, "display"),
            ({"c3": "a\x1b"}, "server"),
            ({"c3": COOKIE}, "server"),
            ({"c4": "X"}, "status"),
            ({"c4": ""}, "status"),
            ({"c4": COOKIE}, "status"),
            ({"c5": "\x07"}, "created"),
            ({"c6": ""}, "cookie"),
            ({"c6": COOKIE + "x"}, "cookie"),
            ({"c7": "x" * 254}, "client"),
            ({"c8": ""}, "graphics_port"),
            ({"c8": "65536"}, "graphics_port"),
            ({"c9": "x"}, "sound_port"),
            ({"c11": f"a{COOKIE.upper()}"}, "user"),
            ({"c13": "0"}, "sshfs_port"),
        ],
    )
    def test_error_names_field_and_line_of_an_invalid_row(self, changes: dict[str, str], field: str) -> None:
        error = refusal(lambda: parse_session_list(f"{row()}\n\n{row(**changes)}"))
        assert error.field == field
        assert error.problem.startswith("line 3: ")

    @pytest.mark.parametrize("text", ["nonsense", "a|b", COOKIE, "|".join(ROW[6:])])
    def test_line_that_is_no_row_is_ignored(self, text: str) -> None:
        assert len(parse_session_list(f"{text}\n{row()}\n{text}")) == 1

    def test_repr_hides_the_cookie(self) -> None:
        sessions = parse_session_list(row())
        assert COOKIE not in f"{sessions!r} {sessions[0]}"

    def test_instance_survives_pickle(self) -> None:
        (session,) = parse_session_list(row())
        assert pickle.loads(pickle.dumps(session)) == session  # noqa: S301 - our own bytes

    @given(st.text() | st.lists(st.text(), min_size=14, max_size=16).map("|".join))
    @example("|" * 13)
    def test_any_list_is_parsed_or_invalid(self, text: str) -> None:
        with contextlib.suppress(InvalidSession):
            assert isinstance(parse_session_list(text), tuple)

    @given(
        st.lists(st.sampled_from([*ROW, COOKIE.upper(), f"x{COOKIE}"]), min_size=12, max_size=16)
        | st.permutations(ROW)
        | st.tuples(st.integers(0, 15), st.sampled_from([COOKIE, f"x{COOKIE}x"])).map(
            lambda change: [*ROW[: change[0]], change[1], *ROW[change[0] + 1 :]]
        )
    )
    def test_cookie_is_hidden_in_any_order_of_columns(self, columns: list[str]) -> None:
        try:
            shown = repr(parse_session_list("|".join(columns)))
        except InvalidSession as error:
            assert_no_cookie(error)
        else:
            assert COOKIE not in shown.lower()
