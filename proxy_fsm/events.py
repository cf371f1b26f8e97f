"""Sends events to the caller's logger; one that fails changes nothing."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import structlog

__all__ = ["EventLog", "report_failure"]

#: What a program that has not configured structlog gets: the standard library's logger, silent by default.
_FALLBACK = logging.getLogger("proxy_fsm")
_FALLBACK.addHandler(logging.NullHandler())


class EventLog:
    """Events of one proxy, each with its ``proxy_id`` and ``session``.

    Args:
        logger: A structlog logger, or a logger of the standard library. By default structlog's, where the program has
            configured it, else ``logging.getLogger("proxy_fsm")``: structlog unconfigured prints on standard output.
        proxy_id: Id of the engine.
        session: Name of the session.
    """

    def __init__(self, logger: Any, *, proxy_id: str, session: str) -> None:
        if logger is None:
            logger = structlog.get_logger("proxy_fsm") if structlog.is_configured() else _FALLBACK
        if isinstance(logger, logging.Logger | logging.LoggerAdapter):
            logger = _wrapped(logger)
        self._logger = logger
        self._always = {"proxy_id": proxy_id, "session": session}

    def __call__(self, level: str, event: str, **fields: Any) -> None:
        """Log an event; a logger that fails is reported to the standard library's, and changes nothing."""
        try:
            getattr(self._logger, level)(event, **self._always, **fields)
        except BaseException:  # noqa: BLE001 - a foreign logger may raise anything, SystemExit too
            report_failure(event)


def report_failure(event: str) -> None:
    """Tell the standard library's logger what another one has just raised."""
    with suppress(BaseException):  # both loggers fail: there is nobody left to tell
        _FALLBACK.exception("The logger failed on the event %s.", event)


def _wrapped(logger: logging.Logger | logging.LoggerAdapter[Any]) -> Any:
    return structlog.wrap_logger(
        logger,
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
    )
