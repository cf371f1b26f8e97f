"""Backends that ask an `X2GoProxy` what to run, each for one kind of program.

The option string of an X2Go program (``nx/nx,…cookie=…,port=…:DISPLAY``) is taken out of the argument vector, where
every user of the machine could read it, no matter which class built the command line.
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

#: nxproxy would write its output to that file, instead of to the engine and `session_errors`.
_ERRORS = re.compile(r",errors=[^,]*?(?=,|:[^:,]*$|$)")
_DISPLAY = re.compile(r":[^:,]*$")


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a backend calls in an `X2GoProxy`: functions, since a subclass may use any method name of its own.

    Attributes:
        program: Returns `PROXY_CMD`.
        prepare: Opens the logs, calls the subclass's hooks, and returns the command line.
        environment: Returns the changes to the environment that the engine was made with; None removes a variable.
    """

    program: Callable[[], str]
    prepare: Callable[[BackendContext], list[str]]
    environment: Callable[[], dict[str, str | None]]


class HookedBackend(Backend):
    """Base class of all kinds.

    Args:
        hooks: The hooks to call.
    """

    listen_kind: ListenKind = "tcp"
    _hint: str | None = None

    def __init__(self, hooks: Hooks) -> None:
        super().__init__()
        self._hooks = hooks
        self._command_line: Sequence[str] = ()
        self._environment: dict[str, str | None] = {}

    def find_executable(self) -> str:
        """Look up `PROXY_CMD`."""
        program = self._hooks.program()
        if not program:
            raise BackendError(EndReason.PROXY_NOT_FOUND, "PROXY_CMD is not set.", "Set PROXY_CMD in the subclass.")
        return find_program(program, hint=self._hint)

    def preflight(self, context: BackendContext) -> None:
        """Call the hooks."""
        program, *arguments = self._hooks.prepare(context)
        self._environment = self._hooks.environment()
        self._command_line = [find_program(program, hint=self._hint), *self._without_secrets(arguments, context)]
        if any(_contains_cookie(word, context) for word in self._command_line):
            raise BackendError(
                EndReason.PROXY_NOT_STARTABLE,
                "The command line contains the session's cookie, which every user of this machine could read.",
                "Pass it in PROXY_ENV or in a private file, or in an option string nx/nx,… after -S.",
            )

    def command(self, context: BackendContext) -> Sequence[str]:  # noqa: ARG002 - it was built in the preflight
        """Return the command line that the hooks built."""
        return self._command_line

    def environment(self, context: BackendContext) -> Mapping[str, str | None]:  # noqa: ARG002 - as above
        """Return how `PROXY_ENV` differs from the inherited environment."""
        return self._environment

    def _without_secrets(self, arguments: list[str], context: BackendContext) -> list[str]:
        """Return the arguments without what other users must not read."""
        raise NotImplementedError


class HookedViewer(HookedBackend):
    """Any program: it is ready once it has connected, as in python-x2go, since nothing more is known about it."""

    name = "viewer"
    max_connections = None

    def ready(self, evidence: Evidence) -> bool:
        """A channel has been opened."""
        return evidence.saw(ChannelOpened)

    def diagnose(self, evidence: Evidence) -> tuple[EndReason, str] | None:
        """If it exited by itself with status 0, its user closed it."""
        closed = evidence.ready and evidence.exited is not None and evidence.exited.exit_code == 0
        return (EndReason.VIEWER_CLOSED, "The viewer was closed.") if closed else None

    def _without_secrets(self, arguments: list[str], context: BackendContext) -> list[str]:
        index = _find_options(arguments)
        if index is None or not _contains_cookie(arguments[index], context):
            return arguments
        return _move_to_environment(arguments, index, self._environment)


class HookedNX3(HookedBackend, NX3Backend):
    """nxproxy: its options are passed in the environment, which only its owner can read."""

    _hint = NXPROXY.hint

    def preflight(self, context: BackendContext) -> None:
        """Check the access to the X server's cookie, and call the hooks."""
        check_xauth(context.environ)
        super().preflight(context)

    def _without_secrets(self, arguments: list[str], context: BackendContext) -> list[str]:  # noqa: ARG002
        index = _find_options(arguments)
        return arguments if index is None else _move_to_environment(arguments, index, self._environment)


class HookedKDrive(HookedBackend, KDriveBackend):
    """x2gokdriveclient: its options are passed in a file that only its owner can read, removed afterwards."""

    _hint = X2GOKDRIVECLIENT.hint

    def _without_secrets(self, arguments: list[str], context: BackendContext) -> list[str]:
        index = _find_options(arguments)
        if index is None or "cookie=" not in arguments[index]:
            return arguments
        path = write_options(context.scratch, _ERRORS.sub("", arguments[index]))
        display = arguments[index].rpartition(":")[2]
        return [*arguments[:index], f"nx/nx,options={path}:{display}", *arguments[index + 1 :]]


def _find_options(arguments: list[str]) -> int | None:
    """Return the index of the option string, which follows ``-S``."""
    return next(
        (
            index
            for index in range(1, len(arguments))
            if arguments[index - 1] == "-S" and arguments[index].startswith("nx/nx,")
        ),
        None,
    )


def _move_to_environment(arguments: list[str], index: int, environment: dict[str, str | None]) -> list[str]:
    """Move an option string into the environment, where nxproxy reads it; return the other arguments.

    Raises:
        BackendError: nxproxy would not read it whole, or would listen instead of connecting.
    """
    string = _ERRORS.sub("", arguments[index])
    if len(string.encode()) > MAX_STRING_BYTES:
        raise BackendError(
            EndReason.PROXY_NOT_STARTABLE,
            f"The NX option string is longer than the {MAX_STRING_BYTES} bytes that nxproxy reads.",
            "Pass fewer options, or use a shorter session name.",
        )
    if not _connects_locally_only(string):
        raise BackendError(
            EndReason.PROXY_NOT_STARTABLE,
            "This NX option string would make nxproxy listen for anyone, instead of connecting to 127.0.0.1.",
            "Put connect=127.0.0.1 into PROXY_OPTIONS itself, and neither listen= nor accept=.",
        )
    environment["NX_DISPLAY"] = string
    return [*arguments[:index], *arguments[index + 1 :]]


def _connects_locally_only(string: str) -> bool:
    """Return whether nxproxy, which ignores case in option names, would connect to this machine only."""
    pairs = [option.partition("=") for option in _DISPLAY.sub("", string).split(",")[1:]]
    options = [(name.strip().lower(), value) for name, _, value in pairs]
    targets = {value for name, value in options if name == "connect"}
    return targets == {"127.0.0.1"} and not {"listen", "accept"} & {name for name, _ in options}


def _contains_cookie(word: str, context: BackendContext) -> bool:
    cookie = context.session.cookie
    return cookie is not None and cookie.lower() in word.lower()
