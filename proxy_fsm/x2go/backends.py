"""Backends that ask an `X2GoProxy` what to run, each for one kind of program.

What an X2Go program is given to know (``nx/nx,…cookie=…,port=…:DISPLAY``) does not stay in the argument vector,
where every user of the machine could read it, whoever made the command line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proxy_fsm.backends.base import Backend, BackendContext, find_program
from proxy_fsm.backends.kdrive import X2GOKDRIVECLIENT, KDriveBackend, write_options
from proxy_fsm.backends.nx3 import NXPROXY, NX3Backend, check_xauth
from proxy_fsm.backends.option_string import MAX_STRING_BYTES
from proxy_fsm.errors import BackendError
from proxy_fsm.evidence import ChannelOpened
from proxy_fsm.reasons import EndReason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from proxy_fsm.backends.base import ListenKind
    from proxy_fsm.evidence import Evidence

__all__ = ["HookedBackend", "HookedKDrive", "HookedNX3", "HookedViewer", "Hooks"]

#: What nxproxy says would go there, and not to where the engine and `session_errors` find it.
_ERRORS = re.compile(r",errors=[^,]*?(?=,|:[^:,]*$|$)")
_DISPLAY = re.compile(r":[^:,]*$")


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a backend asks of an `X2GoProxy`: functions, since any name in that class could be a subclass's too.

    Attributes:
        program: Returns `PROXY_CMD`.
        prepare: Opens the logs, has the subclass's hooks called, and returns the command line.
        environment: Returns what is added to the environment that the engine was made with, None for what is taken
            out of it.
    """

    program: Callable[[], str]
    prepare: Callable[[BackendContext], list[str]]
    environment: Callable[[], dict[str, str | None]]


class HookedBackend(Backend):
    """What all kinds have in common.

    Args:
        hooks: Whose hooks are called.
    """

    listen_kind: ListenKind = "tcp"
    _hint: str | None = None

    def __init__(self, hooks: Hooks) -> None:
        super().__init__()
        self._hooks = hooks
        self._line: Sequence[str] = ()
        self._environment: dict[str, str | None] = {}

    def find_executable(self) -> str:
        """Look `PROXY_CMD` up."""
        program = self._hooks.program()
        if not program:
            raise BackendError(EndReason.PROXY_NOT_FOUND, "PROXY_CMD is not set.", "Set PROXY_CMD in the subclass.")
        return find_program(program, hint=self._hint)

    def preflight(self, context: BackendContext) -> None:
        """Call the hooks."""
        program, *arguments = self._hooks.prepare(context)
        self._environment = self._hooks.environment()
        self._line = [find_program(program, hint=self._hint), *self._without_secrets(arguments, context)]
        if any(_holds_cookie(word, context) for word in self._line):
            raise BackendError(
                EndReason.PROXY_NOT_STARTABLE,
                "The command line has the session's cookie in it, where every user of this machine could read it.",
                "Hand it over by PROXY_ENV or by a private file, or in an option string nx/nx,… after -S.",
            )

    def command(self, context: BackendContext) -> Sequence[str]:  # noqa: ARG002 - it was made in the preflight
        """Return the command line that the hooks have made."""
        return self._line

    def environment(self, context: BackendContext) -> Mapping[str, str | None]:  # noqa: ARG002 - as above
        """Return how `PROXY_ENV` differs from what is inherited."""
        return self._environment

    def _without_secrets(self, arguments: list[str], context: BackendContext) -> list[str]:
        """Return the arguments without what nobody else may read."""
        raise NotImplementedError


class HookedViewer(HookedBackend):
    """Any program: it is ready when it has connected, as in python-x2go, since nothing more is known of it."""

    name = "viewer"
    max_connections = None

    def ready(self, evidence: Evidence) -> bool:
        """A channel stands."""
        return evidence.saw(ChannelOpened)

    def diagnose(self, evidence: Evidence) -> tuple[EndReason, str] | None:
        """Its user has closed it where it ended by itself, and without a complaint."""
        closed = evidence.ready and evidence.exited is not None and evidence.exited.exit_code == 0
        return (EndReason.VIEWER_CLOSED, "The viewer was closed.") if closed else None

    def _without_secrets(self, arguments: list[str], context: BackendContext) -> list[str]:
        at = _find_options(arguments)
        if at is None or not _holds_cookie(arguments[at], context):
            return arguments
        return _by_environment(arguments, at, self._environment)


class HookedNX3(HookedBackend, NX3Backend):
    """nxproxy: its options go by the environment, which its owner alone can read."""

    _hint = NXPROXY.hint

    def preflight(self, context: BackendContext) -> None:
        """See to the X server's cookie, and call the hooks."""
        check_xauth(context.environ)
        super().preflight(context)

    def _without_secrets(self, arguments: list[str], context: BackendContext) -> list[str]:  # noqa: ARG002
        at = _find_options(arguments)
        return arguments if at is None else _by_environment(arguments, at, self._environment)


class HookedKDrive(HookedBackend, KDriveBackend):
    """x2gokdriveclient: its options go by a file, which its owner alone can read, removed afterwards."""

    _hint = X2GOKDRIVECLIENT.hint

    def _without_secrets(self, arguments: list[str], context: BackendContext) -> list[str]:
        at = _find_options(arguments)
        if at is None or "cookie=" not in arguments[at]:
            return arguments
        path = write_options(context.scratch, _ERRORS.sub("", arguments[at]))
        display = arguments[at].rpartition(":")[2]
        return [*arguments[:at], f"nx/nx,options={path}:{display}", *arguments[at + 1 :]]


def _find_options(arguments: list[str]) -> int | None:
    """Return where the option string is: after ``-S``."""
    return next(
        (at for at in range(1, len(arguments)) if arguments[at - 1] == "-S" and arguments[at].startswith("nx/nx,")),
        None,
    )


def _by_environment(arguments: list[str], at: int, environment: dict[str, str | None]) -> list[str]:
    """Move an option string into the environment, where nxproxy reads it; return the other arguments.

    Raises:
        BackendError: nxproxy would not read it whole, or would listen instead of connecting.
    """
    string = _ERRORS.sub("", arguments[at])
    if len(string.encode()) > MAX_STRING_BYTES:
        raise BackendError(
            EndReason.PROXY_NOT_STARTABLE,
            f"The NX option string is longer than the {MAX_STRING_BYTES} bytes that nxproxy reads.",
            "Pass fewer options, or use a shorter session name.",
        )
    if not _connects(string):
        raise BackendError(
            EndReason.PROXY_NOT_STARTABLE,
            "By its NX option string nxproxy would listen for anybody, instead of connecting to 127.0.0.1.",
            "Put connect=127.0.0.1 into PROXY_OPTIONS itself, and neither listen= nor accept=.",
        )
    environment["NX_DISPLAY"] = string
    return [*arguments[:at], *arguments[at + 1 :]]


def _connects(string: str) -> bool:
    """Tell whether nxproxy, to which letters of either case are the same, would connect to this machine alone."""
    pairs = [option.partition("=") for option in _DISPLAY.sub("", string).split(",")[1:]]
    options = [(name.strip().lower(), value) for name, _, value in pairs]
    where = {value for name, value in options if name == "connect"}
    return where == {"127.0.0.1"} and not {"listen", "accept"} & {name for name, _ in options}


def _holds_cookie(word: str, context: BackendContext) -> bool:
    cookie = context.session.cookie
    return cookie is not None and cookie.lower() in word.lower()
