"""Writes the command line's events, as lines for people or as JSON."""

from __future__ import annotations

import logging
import os
import sys
import threading
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import structlog

from proxy_fsm.text import Redactor, printable

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence
    from pathlib import Path

__all__ = ["LogFormat", "Output"]

#: Fields of every event; the console, which shows one session, leaves them out.
_CONSTANT_FIELDS = ("proxy_id", "session")


class LogFormat(StrEnum):
    """How events are written."""

    CONSOLE = "console"
    JSON = "json"


class Output:
    """The logger of one verb; structlog's global configuration stays untouched.

    Args:
        log_format: ``json``: one object a line on standard output; ``console``: lines for people on standard error.
        verbose: Whether debug events are written too; a record has them always.
        console_level: The lowest level on the console, of those that are written at all.

    Attributes:
        log: The structlog logger.
        is_json: Whether standard output is for JSON alone.
        redact: Hides the secrets that were added to it, in every event; call it for text that bypasses the log.
    """

    def __init__(self, log_format: LogFormat, *, verbose: bool = False, console_level: int = logging.DEBUG) -> None:
        # Without a handler, the standard library prints paramiko's errors itself, with tracebacks.
        logging.getLogger("paramiko").addHandler(logging.NullHandler())
        self.is_json = log_format is LogFormat.JSON
        self._lock = threading.Lock()
        self.redact = Redactor(cookie_values=False)
        self._record: TextIO | None = None
        level = logging.DEBUG if verbose else logging.INFO
        self._sinks = [
            _Sink(sys.stdout, _JSON, level)
            if self.is_json
            else _Sink(sys.stderr, _for_console(sys.stderr), max(level, console_level))
        ]
        self.log: Any = structlog.wrap_logger(
            structlog.ReturnLogger(),
            wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                self._write,
            ],
        )

    def record_to(self, path: Path) -> None:
        """Also write all events to a file, as JSON.

        Raises:
            OSError: It cannot be written.
        """
        self._record = path.open("w", encoding="utf-8")
        self._sinks.append(_Sink(self._record, _JSON))

    @property
    def is_recorded(self) -> bool:
        """Whether events are written as JSON, for later processing."""
        return self.is_json or self._record is not None

    def close(self) -> None:
        """Close the record file."""
        if self._record is not None:
            self._record.close()

    def _write(self, _logger: Any, method: str, event: MutableMapping[str, Any]) -> NoReturn:
        with self._lock:  # so that all sinks have the events in the same order
            for sink in self._sinks:
                if logging.getLevelNamesMapping()[event["level"].upper()] < sink.level:
                    continue
                sink.write(self.redact(sink.render(method, event)))
        raise structlog.DropEvent


class _Sink:
    """A file, and how events are rendered for it; a missing file or a closed pipe is ignored."""

    def __init__(self, file: TextIO | None, processors: Sequence[Any], level: int = logging.DEBUG) -> None:
        self.level = level
        self._file = file
        self._processors = processors

    def render(self, method: str, event: MutableMapping[str, Any]) -> str:
        rendered: Any = dict(event)
        for process in self._processors:
            rendered = process(None, method, rendered)
        return str(rendered)

    def write(self, line: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError:
            # The interpreter would retry writing the rest of the buffer at exit, and report the error.
            null_fd = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null_fd, self._file.fileno())
            os.close(null_fd)


_JSON = (structlog.processors.format_exc_info, structlog.processors.JSONRenderer())


def _for_console(file: TextIO | None) -> Sequence[Any]:
    renderer = structlog.dev.ConsoleRenderer(
        colors=file is not None and file.isatty() and "NO_COLOR" not in os.environ,
        sort_keys=False,
        # The default one, rich's, shows local variables: a cookie may be among them.
        exception_formatter=structlog.dev.plain_traceback,
    )
    return [_tidy_for_console, renderer]


def _tidy_for_console(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    """Leave out empty and constant fields, and escape terminal control characters."""
    return {
        key: printable(value) if isinstance(value, str) else value
        for key, value in event.items()
        if key not in _CONSTANT_FIELDS and value is not None and value not in ("", [])
    }
