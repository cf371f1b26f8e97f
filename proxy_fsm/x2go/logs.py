"""Adapters between python-x2go's loggers, which are callables, and ours, which take events."""

from __future__ import annotations

import copy
import traceback
from typing import TYPE_CHECKING, Any

from proxy_fsm.events import EventLog, report_failure

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DEBUG", "DEFAULT", "ERROR", "INFO", "NOTICE", "WARN", "EventsToX2Go", "X2GoLog"]

#: python-x2go's log levels, bits of a mask, and what it shows by default. Source: ``x2go/log.py``.
ERROR, WARN, NOTICE, INFO, DEBUG = 8, 16, 32, 64, 128
DEFAULT = ERROR | WARN | NOTICE

_OUR_LEVELS = {ERROR: "error", WARN: "warning", NOTICE: "info", INFO: "info", DEBUG: "debug"}
_THEIR_LEVELS = {"error": ERROR, "warning": WARN, "info": INFO, "debug": DEBUG}


class X2GoLog:
    """The `X2GoProxy.logger`: called like python-x2go's loggers, it redacts secrets and never raises.

    Args:
        logger: python-x2go's logger, or any callable that takes a message and ``loglevel``; None for our own log.
        loglevel: The levels for our own log, as a mask; python-x2go's logger has its own mask.
        tag: The part of the program that logs; set on a copy of a logger that has tags.
        redact: Redacts secrets.
        describe: Returns the fields ``proxy_id`` and ``session`` of our own events.
    """

    def __init__(
        self,
        logger: Callable[..., object] | None,
        *,
        loglevel: int,
        tag: str,
        redact: Callable[[str], str],
        describe: Callable[[], dict[str, str]],
    ) -> None:
        self._logger = logger
        if hasattr(logger, "tag"):
            self._logger = copy.copy(logger)
            self._logger.tag = tag  # type: ignore[union-attr]
        self._mask = loglevel
        self._redact = redact
        self._describe = describe

    def __call__(self, msg: str, loglevel: int = 0, tag: str | None = None) -> None:
        """Log a message.

        Args:
            msg: The message.
            loglevel: One of python-x2go's levels.
            tag: Another tag, for loggers that have tags.
        """
        text = self._redact(str(msg))
        if self._logger is None:
            if loglevel & self._mask:
                log = EventLog(None, **self._describe())
                log(_OUR_LEVELS.get(loglevel, "info"), "x2go.message", message=text)
            return
        try:
            self._logger(text, loglevel=loglevel, **({} if tag is None else {"tag": tag}))
        except BaseException:  # noqa: BLE001 - a foreign logger may raise anything, SystemExit too
            report_failure("x2go.message")

    message = __call__

    def __getattr__(self, name: str) -> Any:
        """Any other attribute of python-x2go's logger."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._logger, name)


class EventsToX2Go:
    """A logger for the engine that writes each event as one line to python-x2go's logger.

    Args:
        log: The logger that they are written to.
    """

    def __init__(self, log: X2GoLog) -> None:
        self._log = log

    def __getattr__(self, level: str) -> Callable[..., None]:
        if level not in {*_THEIR_LEVELS, "exception"}:
            raise AttributeError(level)

        def log_event(event: str, *, exc_info: bool = False, **fields: Any) -> None:
            text = " ".join([event, *(f"{name}={value!r}" for name, value in fields.items() if value is not None)])
            if exc_info:
                text += f" {traceback.format_exc()}"
            self._log(text, loglevel=_THEIR_LEVELS.get(level, ERROR))

        return log_event
