"""Backends that ask an `X2GoProxy` what to run, each for one kind of program.

What an X2Go program is given to know (``nx/nx,…cookie=…,port=…:DISPLAY``) does not stay in the argument vector,
where every user of the machine could read it, whoever made the command line.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

from proxy_fsm.backends.base import Backend, BackendContext, CommandBackend, find_program
from proxy_fsm.backends.kdrive import KDriveBackend, write_options
from proxy_fsm.backends.nx3 import MAX_STRING_BYTES, NX3Backend, check_xauth
from proxy_fsm.errors import BackendError
from proxy_fsm.status import EndReason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from proxy_fsm.backends.base import ListenKind

__all__ = ["HookedBackend", "HookedKDrive", "HookedNX3", "HookedViewer", "Hooks"]

#: What nxproxy says would go there, and not to where the engine and `session_errors` find it.
_ERRORS = re.compile(r",errors=[^,:]*")


class Hooks(Protocol):
    """What a backend asks for."""

    PROXY_CMD: str

    def prepare(self, context: BackendContext) -> list[str]:
        """Open the logs, have the subclass's hooks called, and return the command line."""

    def environment(self) -> dict[str, str]:
        """Return what is added to the environment that the engine was made with."""


class HookedBackend(Backend):
    """What all kinds have in common.

    Args:
        hooks: Whose hooks are called.
    """

    listen_kind: ListenKind = "tcp"

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._line: Sequence[str] = ()
        self._environment: dict[str, str] = {}

    def find_executable(self) -> str:
        """Look `PROXY_CMD` up."""
        if not self._hooks.PROXY_CMD:
            raise BackendError(EndReason.PROXY_NOT_FOUND, "PROXY_CMD is not set.", "Set PROXY_CMD in the subclass.")
        return find_program(self._hooks.PROXY_CMD)

    def preflight(self, context: BackendContext) -> None:
        """Call the hooks."""
        program, *arguments = self._hooks.prepare(context)
        self._environment = self._hooks.environment()
        self._line = [find_program(program), *self._without_secrets(arguments, context)]
        if any(_holds_cookie(word, context) for word in self._line):
            raise BackendError(
                EndReason.PROXY_NOT_STARTABLE,
                "The command line has the session's cookie in it, where every user of this machine could read it.",
                "Hand it over by PROXY_ENV or by a private file, or in an option string nx/nx,… after -S.",
            )

    def command(self, context: BackendContext) -> Sequence[str]:  # noqa: ARG002 - it was made in the preflight
        """Return the command line that the hooks have made."""
        return self._line

    def environment(self, context: BackendContext) -> Mapping[str, str]:  # noqa: ARG002 - as above
        """Return `PROXY_ENV`, as far as it is not inherited."""
        return self._environment

    def _without_secrets(self, arguments: list[str], context: BackendContext) -> list[str]:  # noqa: ARG002 - for others
        return arguments


class HookedViewer(HookedBackend, CommandBackend):
    """Any program: it is ready when it has connected, as in python-x2go, since nothing more is known of it."""

    name = "viewer"

    def __init__(self, hooks: Hooks) -> None:
        HookedBackend.__init__(self, hooks)
        CommandBackend.__init__(self, ["{port}", "{port}"], ready_when="connected", max_connections=None)

    def _without_secrets(self, arguments: list[str], context: BackendContext) -> list[str]:
        at = _find_options(arguments)
        if at is None or not _holds_cookie(arguments[at], context):
            return arguments
        return _by_environment(arguments, at, self._environment)


class HookedNX3(HookedBackend, NX3Backend):
    """nxproxy: its options go by the environment, which its owner alone can read."""

    def __init__(self, hooks: Hooks) -> None:
        HookedBackend.__init__(self, hooks)
        NX3Backend.__init__(self)

    def preflight(self, context: BackendContext) -> None:
        """See to the X server's cookie, and call the hooks."""
        check_xauth(context.environ)
        super().preflight(context)

    def _without_secrets(self, arguments: list[str], context: BackendContext) -> list[str]:  # noqa: ARG002
        at = _find_options(arguments)
        return arguments if at is None else _by_environment(arguments, at, self._environment)


class HookedKDrive(HookedBackend, KDriveBackend):
    """x2gokdriveclient: its options go by a file, which its owner alone can read, removed afterwards."""

    def __init__(self, hooks: Hooks) -> None:
        HookedBackend.__init__(self, hooks)
        KDriveBackend.__init__(self)

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


def _by_environment(arguments: list[str], at: int, environment: dict[str, str]) -> list[str]:
    """Move an option string into the environment, where nxproxy reads it; return the other arguments."""
    string = _ERRORS.sub("", arguments[at])
    if len(string.encode()) > MAX_STRING_BYTES:
        raise BackendError(
            EndReason.PROXY_NOT_STARTABLE,
            f"The NX option string is longer than the {MAX_STRING_BYTES} bytes that nxproxy reads.",
            "Pass fewer options, or use a shorter session name.",
        )
    environment["NX_DISPLAY"] = string
    return [*arguments[:at], *arguments[at + 1 :]]


def _holds_cookie(word: str, context: BackendContext) -> bool:
    cookie = context.session.cookie
    return cookie is not None and cookie.lower() in word.lower()
