"""What all verbs share: how they exit, and that none of them exits with a traceback."""

from __future__ import annotations

import sys
from dataclasses import fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Self

from proxy_fsm import EndReason, InvalidSession, ServerError
from proxy_fsm.cli.interrupts import Interrupted, Interrupts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from proxy_fsm.cli.output import Output

__all__ = ["ExitStatus", "NotReachedError", "UsageError", "is_interactive", "run_verb", "to_argv", "write_output"]


class ExitStatus(IntEnum):
    """Exit statuses other than those of the reasons (`proxy_fsm.EndReason.cli_status`), which start at 10."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> Self:
        """Make a member from its row below."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    CLEAN = 0, "a clean end: the session ended, the viewer was closed, or SIGINT, SIGTERM or SIGHUP came"
    USAGE = 2, "wrong usage: an option, the session or the cookie file cannot be used"
    NOT_REACHED = (
        3,
        "no proxy was started: the server was not reached, refused the login or gave no session, or demo lacks things",
    )
    LACKING = 4, "this machine lacks something that is needed (doctor)"


class UsageError(Exception):
    """The user's request cannot be carried out; the message is a sentence that says why."""

    def __init__(self, detail: str, hint: str | None = None) -> None:
        self.detail = detail
        self.hint = hint
        super().__init__(detail)


class NotReachedError(Exception):
    """An attempt to reach the session failed before a proxy was started.

    Attributes:
        event: The name of the event that reports it.
        fields: Its fields: ``detail``, ``hint``, and what else is known.
    """

    def __init__(self, event: str, detail: str, hint: str | None = None, **fields: Any) -> None:
        self.event = event
        self.fields = {**fields, "detail": detail, "hint": hint}
        super().__init__(detail)


def is_interactive() -> bool:
    """Return whether a person can be asked: standard input and standard error are a terminal."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def to_argv(options: Any, *, without: frozenset[str] = frozenset()) -> list[str]:
    """Return the command-line arguments that reproduce options; defaults are omitted.

    Args:
        options: A dataclass whose fields are the options, by name.
        without: Fields to omit.
    """
    arguments = []
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in without or value == field.default:
            continue
        arguments.append(f"--{field.name.replace('_', '-')}")
        if value is not True:
            arguments.append(str(value))
    return arguments


def run_verb(output: Output, body: Callable[[Interrupts], int]) -> int:
    """Run a verb's body, and turn whatever it raises into an event and an exit status."""
    try:
        with Interrupts() as interrupts:
            return body(interrupts)
    except Interrupted as signal:
        output.log.info("interrupted", signal=str(signal))
        return ExitStatus.CLEAN
    except Exception as error:  # noqa: BLE001 - reported
        return _report(error, output)
    finally:
        output.close()


def _report(error: Exception, output: Output) -> int:
    """Write the event that reports an error; return the exit status."""
    match error:
        case UsageError(detail=detail, hint=hint):
            output.log.error("usage.invalid", detail=detail, hint=hint)
            return ExitStatus.USAGE
        case InvalidSession(field=field):
            output.log.error("usage.invalid", detail=str(error), field=field, hint=None)
            return ExitStatus.USAGE
        case NotReachedError(event=event, fields=known):
            output.log.error(event, **known)
            return ExitStatus.NOT_REACHED
        case ServerError(reason=reason, detail=detail, hint=hint, exit_status=exit_status):
            output.log.error("server.failed", reason=str(reason), exit_code=exit_status, detail=detail, hint=hint)
            return ExitStatus.NOT_REACHED
        case _:
            detail = f"An internal error: {type(error).__name__}: {error}."
            output.log.error("internal.error", exc_info=error, detail=detail, hint=EndReason.INTERNAL_ERROR.hint)
            return EndReason.INTERNAL_ERROR.cli_status


def write_output(picture: str | bytes, path: Path | None, events: Output) -> int:
    """Write a picture to a file or to standard output.

    Returns:
        The exit status.

    Raises:
        UsageError: It cannot be written.
    """
    data = picture.encode() if isinstance(picture, str) else picture
    try:
        if path is None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            path.write_bytes(data)
    except OSError as error:
        name = "Standard output" if path is None else path
        raise UsageError(f"{name} cannot be written to: {error.strerror or error}.") from error
    if path is not None:
        events.log.info("picture.drawn", path=str(path), size_bytes=len(data))
    return ExitStatus.CLEAN
