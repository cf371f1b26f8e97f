"""What a session is: where its agent listens, and the parsers of what an X2Go server prints about it.

Nothing that a server sends is trusted. Each value is checked on input, so the name of a `SessionInfo` can safely be
put into a path, and its fields into nxproxy's option string. The cookie appears in no repr and in no message.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field, replace
from enum import StrEnum

from proxy_fsm.errors import InvalidSession
from proxy_fsm.text import excerpt

__all__ = [
    "ListedSession",
    "SessionInfo",
    "SessionStatus",
    "parse_agent_output",
    "parse_resume_output",
    "parse_session_list",
]

#: What lists the account's sessions. The server merges Perl's warnings about an unknown locale into the list.
LIST_SCRIPT = "LC_ALL=C x2golistsessions"
#: What prints the letter of one session's status in the database; the session's name follows. Unlike the list it does
#: so for an account with a domain in its name.
STATUS_SCRIPT = 'LC_ALL=C PATH="$(x2gopath libexec):$PATH" x2gogetstatus'

#: What prints the pids of the account's programs that resume a session at this moment, to be formatted with its name.
#: The brackets keep it from finding itself.
RESUMING_SCRIPT = 'LC_ALL=C pgrep -u "$(id -u)" -f "x2goresume-sessio[n].*{}"'

_NAME_MAX = 200
_HOST_MAX = 253
_TEXT_MAX = 253
_PORT_MAX = 65_535
_DISPLAY_MAX = 65_535
_PID_MAX = 2**31 - 1
_EXCERPT_MAX = 120

# x2gostartagent deletes all other characters; the database refuses a name that begins with - or @.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*")
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9_.@-]")
_COOKIE = re.compile(r"[0-9A-Fa-f]{32}")
_HOST_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_NUMBER = re.compile(r"[0-9]{1,10}")

# x2gostartagent prints these to standard error and exits.
_REFUSALS = {
    "ACCESS DENIED": "the server says ACCESS DENIED, since the desktop's owner does not share it.",
    "LIMIT": "the server says LIMIT, since this user has as many sessions as are allowed. End one first.",
}
_AGENT_LINES = 7  # two more, Telekinesis' ports, if the server has it
_NAME_COLUMN, _SSHFS_COLUMN = 1, 13
_MIN_COLUMNS, _MAX_COLUMNS = 12, 16  # up to the user; with Telekinesis' ports
#: The name that x2gostartagent makes: user, display, time, kind with program, and depth.
GENERATED_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*-[0-9]+-[0-9]+_st[A-Za-z0-9_.@-]+")

_RESUMED_PORTS = ("gr_port", "sound_port", "fs_port")

# Perl's warning about an unknown LC_*: the server merges it into the list and removes the blanks.
_LOCALE_WARNING = re.compile(r"perl:warning:|(LANGUAGE|LANG|LC_[A-Z]+)=|aresupportedandinstalledonyoursystem\.$")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo:
    """One session as a proxy needs it: its name and cookie, and where its agent listens.

    Args:
        name: The session's name, at most 200 ASCII letters, digits and ``. _ @ -``, the first of them a letter, a
            digit or ``_``, and no ``..``: so it can be one component of a path, a word of a command and a value in
            nxproxy's option string. x2gostartagent itself deletes all other characters, such as the ``+``, ``$`` and
            backslashes of user names.
        cookie: The secret that agent and proxy share, 32 hexadecimal digits; None if there is none.
        graphics_port: The TCP port on which the agent listens, 1 to 65535.
        display: The number of the session's X display on the server, 0 to 65535; None if there is none.
        agent_host: Where the agent listens, as seen from the SSH server: a host name, an IPv4 or an IPv6
            address (without zone), at most 253 characters.
        agent_pid: The agent's process id on the server, from 1; None if it is not known.
        sound_port: The server's port for sound, 1 to 65535, or None.
        sshfs_port: The server's port for shared folders, 1 to 65535, or None.

    Raises:
        InvalidSession: A field cannot be used; the message names it, and does not contain the cookie.

    Source: x2goserver 4.1.0.3, ``x2gostartagent`` and ``sanitizer('x2gosid')`` in ``X2Go/Utils.pm``.
    """

    name: str
    cookie: str | None = field(default=None, repr=False)
    graphics_port: int
    display: int | None = None
    agent_host: str = "127.0.0.1"
    agent_pid: int | None = None
    sound_port: int | None = None
    sshfs_port: int | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_cookie(self.cookie)
        _check_int("graphics_port", self.graphics_port, 1, _PORT_MAX)
        for title, value, low, high in (
            ("display", self.display, 0, _DISPLAY_MAX),
            ("agent_pid", self.agent_pid, 1, _PID_MAX),
            ("sound_port", self.sound_port, 1, _PORT_MAX),
            ("sshfs_port", self.sshfs_port, 1, _PORT_MAX),
        ):
            if value is not None:
                _check_int(title, value, low, high)
        _check_host(self.agent_host)
        _check_free_of_cookie("name", self.name, self.cookie)
        _check_free_of_cookie("agent_host", self.agent_host, self.cookie)


class SessionStatus(StrEnum):
    """The status of a session in a server's database."""

    RUNNING = "running"
    SUSPENDED = "suspended"
    FINISHED = "finished"


#: The database's letters; there are no others. Source: ``x2gochangestatus`` and its callers, ``db_createsession`` in
#: ``X2Go/Server/DB``.
_STATUS = {"R": SessionStatus.RUNNING, "S": SessionStatus.SUSPENDED, "F": SessionStatus.FINISHED}


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedSession:
    """One row of ``x2golistsessions``.

    Args:
        info: What a proxy needs. The ports of a suspended session are its last ones; resuming assigns others.
        status: Its status in the server's database.
        server: The host name of the server that runs it.
        created: When it was created, in the server's local time and format (``YYYY-MM-DDTHH:MM:SS``).
        client: The address from which it was last used.
        used: When it was last started, resumed or suspended, in the same format as ``created``.
        user: Its owner; for a shared desktop, the user who asked for it.
    """

    info: SessionInfo
    status: SessionStatus
    server: str
    created: str
    client: str
    user: str
    used: str = ""


def parse_agent_output(text: str, *, agent_host: str = "127.0.0.1") -> SessionInfo:
    """Parse the session that ``x2gostartagent`` created.

    Lines before and after the answer, such as those that a login shell prints, are ignored.

    Args:
        text: Its standard output: display, cookie, agent pid, session name, graphics port, sound port and
            file-sharing port, one per line. If it is empty, pass the standard error instead: the exception then quotes
            what the server said.
        agent_host: As in `SessionInfo`.

    Raises:
        InvalidSession: A line is invalid (the message names the field), or the ``output`` is not a session at all, or
            more than one.

    Source: the end of ``x2gostartagent``, and its exit codes 8 (``ACCESS DENIED``) and 9 (``LIMIT``).
    """
    lines = [line.strip() for line in text.strip().split("\n")]
    starts = [number - 1 for number, line in enumerate(lines) if number and _COOKIE.fullmatch(line)]
    answers: list[SessionInfo] = []
    errors: list[InvalidSession] = []
    for start in starts:
        try:
            answers.append(_agent_answer(lines[start:], agent_host))
        except InvalidSession as error:
            errors.append(error)
    if len(answers) == 1:
        return answers[0]
    if answers:
        raise InvalidSession("output", f"it describes {len(answers)} sessions.")
    if len(errors) == 1:
        raise errors[0]
    return _agent_answer(lines, agent_host)  # which raises


def _agent_answer(lines: list[str], agent_host: str) -> SessionInfo:
    """Parse an answer that begins with the first of these lines."""
    if len(lines) < _AGENT_LINES:
        raise InvalidSession("output", _problem_of(lines))
    display, cookie, agent_pid, name, graphics_port, sound_port, sshfs_port = lines[:_AGENT_LINES]
    pid = _number("agent_pid", agent_pid, 1, _PID_MAX)
    sound, sshfs = _optional_port("sound_port", sound_port), _optional_port("sshfs_port", sshfs_port)
    return replace(
        _session_info(name, cookie, graphics_port, display, agent_host),
        agent_pid=pid,
        sound_port=sound,
        sshfs_port=sshfs,
    )


def parse_resume_output(text: str, session: SessionInfo) -> SessionInfo:
    """Parse the output of ``x2goresume-session``: the session has another graphics port than before.

    The command prints a port even if it could not resume the session, and reports that on standard error: check that
    too.

    Args:
        text: Its standard output: ``gr_port=30001``, ``sound_port=…`` and ``fs_port=…``, one per line; anything else is
            ignored.
        session: The session as it was before.

    Returns:
        The session with its current ports.

    Raises:
        InvalidSession: A port is invalid or repeated, or there is no ``gr_port`` at all.

    Source: the end of ``x2goresume-session``, x2goserver 4.1.0.3.
    """
    lines = [line.strip() for line in text.strip().split("\n")]
    ports: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition("=")
        if key not in _RESUMED_PORTS:
            continue
        if key in ports:
            raise InvalidSession("output", f"{key} is there twice.")
        ports[key] = value
    if "gr_port" not in ports:
        problem = "the server printed nothing" if lines == [""] else f"the first line is {_excerpt(lines[0])}"
        raise InvalidSession("output", f"there is no line gr_port=…, and {problem}. Its standard error may tell why.")
    return replace(
        session,
        graphics_port=_number("graphics_port", ports["gr_port"], 1, _PORT_MAX),
        sound_port=_optional_port("sound_port", ports.get("sound_port", "")),
        sshfs_port=_optional_port("fs_port", ports.get("fs_port", "")),
    )


def parse_session_list(
    text: str, *, name: str | None = None, agent_host: str = "127.0.0.1"
) -> tuple[ListedSession, ...]:
    """Parse the output of ``x2golistsessions`` or ``x2golistshadowsessions``.

    A row without pid, cookie and graphics port is skipped: the server has recorded the session's name but not yet, or
    never, started its agent. Lines that are no rows are ignored, such as what a login shell prints, and Perl's
    warnings about the locale, which the server merges into the list.

    Args:
        text: Its standard output, one session per line, columns separated by ``|``: agent pid, name, display, server,
            status, created, cookie, client, graphics port, sound port, last use, user, age, file-sharing port, and two
            more; an old server's row may end with the user.
        name: Return this session alone: the rows of others are not checked.
        agent_host: As in `SessionInfo`, for every session in the list.

    Returns:
        The sessions in the server's order; empty for an empty text.

    Raises:
        InvalidSession: A row is invalid, or a session has more than one; the message names the field and the line,
            counted from 1.

    Source: ``x2golistsessions``, ``db_listsessions`` in ``X2Go/Server/DB/SQLite3.pm`` and ``PostgreSQL.pm``.
    """
    sessions: dict[str, ListedSession] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        columns = _columns(line)
        if columns is None or (name is not None and columns[_NAME_COLUMN] != name):
            continue
        try:
            session = _listed_session(columns, agent_host)
        except InvalidSession as error:
            raise InvalidSession(error.field, f"line {number}: {error.problem}") from None
        if session is not None and sessions.setdefault(session.info.name, session) != session:
            raise InvalidSession("row", f"line {number}: another one has the same name.")
    return tuple(sessions.values())


def parse_status(text: str) -> SessionStatus | None:
    """Parse the output of ``x2gogetstatus``; None for a session that the database does not have."""
    return _STATUS.get(text.strip())


def _columns(line: str) -> list[str] | None:
    """Split a row into its columns; None for a line that is no row.

    A line whose second column is the name of a session counts as a row, however few columns it has, so that a session
    is not lost with a part of its row.
    """
    columns = [column.strip() for column in line.split("|")]
    if len(columns) <= _NAME_COLUMN or _LOCALE_WARNING.match(columns[0]):
        return None
    name = columns[_NAME_COLUMN]
    is_row = len(columns) >= _MIN_COLUMNS or GENERATED_NAME.fullmatch(name)
    return columns if is_row else None


def _listed_session(columns: list[str], agent_host: str) -> ListedSession | None:
    if not _MIN_COLUMNS <= len(columns) <= _MAX_COLUMNS:
        raise InvalidSession(
            "row", f"it has {len(columns)} columns, not {_MIN_COLUMNS} to {_MAX_COLUMNS}: {_excerpt(columns[0])}."
        )
    pid, name, display, server, status, created, cookie, client, graphics, sound, used, user = columns[:_MIN_COLUMNS]
    if not (pid or cookie or graphics):
        return None
    sshfs = columns[_SSHFS_COLUMN] if len(columns) > _SSHFS_COLUMN else ""
    return ListedSession(
        info=replace(
            _session_info(name, cookie, graphics, display, agent_host),
            agent_pid=_number("agent_pid", pid, 1, _PID_MAX),
            sound_port=_optional_port("sound_port", sound),
            sshfs_port=_optional_port("sshfs_port", sshfs),
        ),
        status=_status(status),
        server=_text("server", server, cookie),
        created=_text("created", created, cookie),
        client=_text("client", client, cookie),
        used=_text("used", used, cookie),
        user=_text("user", user, cookie),
    )


def _problem_of(lines: list[str]) -> str:
    for word, problem in _REFUSALS.items():
        if any(line.startswith(word) for line in lines):
            return problem
    if lines == [""]:
        return "the server printed nothing. Its standard error may tell why."
    return f"it has {len(lines)} of {_AGENT_LINES} lines, and the first is {_excerpt(lines[0])}."


def _session_info(name: str, cookie: str, graphics_port: str, display: str, agent_host: str) -> SessionInfo:
    return SessionInfo(
        name=name,
        cookie=cookie,
        graphics_port=_number("graphics_port", graphics_port, 1, _PORT_MAX),
        display=_number("display", display, 0, _DISPLAY_MAX),
        agent_host=agent_host,
    )


def _number(title: str, text: str, low: int, high: int) -> int:
    # Match a pattern first: int()'s own error would quote the text, which may be a cookie in the wrong line.
    if not _NUMBER.fullmatch(text):
        raise InvalidSession(title, f"{_excerpt(text)} is not a number.")
    number = int(text)
    _check_int(title, number, low, high)
    return number


def _status(letter: str) -> SessionStatus:
    if letter not in _STATUS:
        raise InvalidSession("status", f"{_excerpt(letter)} is none of {', '.join(_STATUS)}.")
    return _STATUS[letter]


def _text(title: str, text: str, cookie: str) -> str:
    if not text.isprintable() or len(text) > _TEXT_MAX:
        raise InvalidSession(title, f"it must be printable and at most {_TEXT_MAX} characters long.")
    _check_free_of_cookie(title, text, cookie)
    return text


def _optional_port(title: str, text: str) -> int | None:
    return None if text in {"", "-1"} else _number(title, text, 1, _PORT_MAX)


def _excerpt(text: str) -> str:
    """Quote a server's text, safe to be shown."""
    return f"'{excerpt(text, _EXCERPT_MAX)}'"


def _check_str(title: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidSession(title, f"it must be a string, and it is of type {type(value).__name__}.")


def _check_int(title: str, value: object, low: int, high: int) -> None:
    if isinstance(value, str):
        raise InvalidSession(title, "it must be an integer, and it is a string: convert it with int() first.")
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidSession(title, f"it must be an integer, and it is of type {type(value).__name__}.")
    if not low <= value <= high:
        raise InvalidSession(title, f"it must be from {low} to {high}.")


def _check_name(value: str) -> None:
    _check_str("name", value)
    if not value:
        raise InvalidSession("name", "it is empty.")
    if len(value) > _NAME_MAX:
        raise InvalidSession("name", f"it has {len(value)} characters, and {_NAME_MAX} are allowed.")
    if bad := _NOT_IN_NAME.search(value):
        raise InvalidSession("name", f"it holds {bad[0]!a}, and only ASCII letters, digits and . _ @ - are allowed.")
    if not _NAME.fullmatch(value):
        raise InvalidSession("name", f"it begins with {value[0]!a}; a letter, a digit or _ must come first.")
    if ".." in value:
        raise InvalidSession("name", "it holds '..', which could lead out of a directory.")


def _check_cookie(value: str | None) -> None:
    if value is None:
        return
    _check_str("cookie", value)
    if not _COOKIE.fullmatch(value):
        raise InvalidSession("cookie", f"it must be 32 hexadecimal digits, and it is {len(value)} characters long.")


def _check_host(value: str) -> None:
    _check_str("agent_host", value)
    if not 0 < len(value) <= _HOST_MAX or not _is_host(value):
        raise InvalidSession(
            "agent_host", f"it must be a host name or an IP address of at most {_HOST_MAX} characters."
        )


def _is_host(value: str) -> bool:
    if ":" in value or value.replace(".", "").isdecimal():
        try:
            ipaddress.ip_address(value)
        except ValueError:
            return False
        return "%" not in value  # a zone can be any text, and its number differs between machines
    return all(_HOST_LABEL.fullmatch(label) for label in value.removesuffix(".").split("."))


def _check_free_of_cookie(title: str, value: str, cookie: str | None) -> None:
    # A server could put the cookie into a field that is shown.
    if cookie is not None and cookie.lower() in value.lower():
        raise InvalidSession(title, "it holds the session's cookie.")
