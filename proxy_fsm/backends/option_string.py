"""What nxproxy and x2gokdriveclient have in common: the option string ``nx/nx,key=value,…:DISPLAY``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

from proxy_fsm.backends.base import Backend, find_program
from proxy_fsm.errors import InvalidSession

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy_fsm.backends.base import Program
    from proxy_fsm.session import SessionInfo

__all__ = ["MAX_STRING_BYTES", "OptionStringBackend", "fits", "split_options"]

_MAX_VALUE_BYTES = 255
#: The longest option string that nxproxy reads.
MAX_STRING_BYTES = 1023
_KEY = re.compile(r"[a-z0-9_]+")
#: Printable ASCII without blank, comma and equals sign; and no per cent sign, since nxproxy decodes %2C and its like.
_VALUE = re.compile(r"[!-$&-+\--<>-~]+")
#: Set from the session and the tunnel. ``listen`` and ``accept`` would make nxproxy listen on every interface.
_OWN_OPTIONS = frozenset({"connect", "cookie", "port", "id", "root", "errors", "listen", "accept", "options"})


class OptionStringBackend(Backend):
    """A program that reads from an option string where to connect, and with which cookie.

    Args:
        executable: The program; by default `PROGRAM`.
        options: Options of the string besides those that the engine sets, for example ``{"clipboard": "both"}``.

    Raises:
        ValueError: An option's name or value is not valid in an option string, or the engine sets the option.
    """

    max_connections = 1
    needs_display = True

    #: The program, and where it is.
    PROGRAM: ClassVar[Program]
    #: What python-x2go passes too. The first connect always succeeds here, so the number of retries is small.
    DEFAULT_OPTIONS: ClassVar[Mapping[str, str]] = {"retry": "5", "composite": "1", "clipboard": "1"}

    def __init__(self, executable: str | None = None, options: Mapping[str, str] | None = None) -> None:
        self._executable = executable
        self._options = dict(self.DEFAULT_OPTIONS)
        for key, value in (options or {}).items():
            if key in _OWN_OPTIONS:
                raise ValueError(f"The NX option {key!r} is set by the engine and cannot be given.")
            if not fits(key, value):
                raise ValueError(f"The NX option {key!r} cannot be written into an NX option string.")
            self._options[key] = value

    def check_session(self, session: SessionInfo) -> None:
        """Require a cookie and a display number."""
        if session.cookie is None:
            raise InvalidSession("cookie", "an NX session needs one; it is printed by x2gostartagent.")
        if session.display is None:
            raise InvalidSession("display", "an NX session needs its display number on the server.")

    def find_executable(self) -> str:
        """Find the program."""
        return find_program(self._executable or self.PROGRAM.look_up(), hint=self.PROGRAM.hint)

    def process_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Accept what is valid in an option string and not set by the engine; return the others."""
        accepted, ignored = split_options(options)
        self._options.update(accepted)
        return ignored

    @property
    def _extra_options(self) -> str:
        """The options that do not come from the session, each after a comma."""
        return "".join(f",{key}={value}" for key, value in self._options.items())


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Split options into those that an option string can have besides the engine's own, and the others.

    Args:
        options: By their names; not modified.

    Returns:
        What is accepted, and what is ignored.
    """
    accepted = {key: value for key, value in options.items() if key not in _OWN_OPTIONS and fits(key, value)}
    return accepted, {key: value for key, value in options.items() if key not in accepted}


def fits(key: object, value: object) -> bool:
    """Return whether an option can be written into an option string."""
    return (
        isinstance(key, str)
        and isinstance(value, str)
        and _KEY.fullmatch(key) is not None
        and _VALUE.fullmatch(value) is not None
        and len(value.encode()) <= _MAX_VALUE_BYTES
    )
