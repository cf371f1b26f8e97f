"""Events: their names, their levels, and how they reach the caller's logger."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from collections.abc import Mapping

    from proxy_fsm.states import Phase, State
    from proxy_fsm.status import TransitionRecord

__all__ = ["LEVELS", "Event", "EventLog", "report_failure"]

#: Every event of a proxy, with its level.
LEVELS: Mapping[str, str] = {
    "proxy.transition": "info",
    "proxy.phase": "debug",
    "tunnel.listening": "info",
    "tunnel.connected": "info",
    "tunnel.closed": "info",
    "tunnel.refused": "warning",
    "tunnel.rejected": "warning",
    "process.spawned": "info",
    "process.exited": "info",
    "process.output": "debug",
    "process.log_failed": "warning",
    "link.silent": "warning",
    "link.restored": "info",
    "subscriber.slow": "warning",
    "subscriber.failed": "error",
    "internal.error": "error",
}

#: The logger if the program has not configured structlog: the standard library's, silent by default.
_FALLBACK = logging.getLogger("proxy_fsm")
_FALLBACK.addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class Event:
    """An event of a proxy; ``proxy_id`` and ``session`` are added when it is logged."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def level(self) -> str:
        """One of ``debug``, ``info``, ``warning`` and ``error``."""
        return LEVELS[self.name]

    @classmethod
    def of_transition(cls, record: TransitionRecord, **extra: Any) -> Event:
        """Return the event of a change of state.

        Args:
            record: The change.
            extra: More fields: the last event of a proxy also has ``hint`` and ``retryable``.
        """
        fields = {
            "trigger": str(record.trigger),
            "source": str(record.source),
            "dest": str(record.dest),
            "reason": None if record.reason is None else str(record.reason),
            "detail": record.detail,
            "elapsed_s": round(record.elapsed_s, 6),
            "sequence": record.sequence,
        }
        return cls("proxy.transition", {**fields, **extra})

    @classmethod
    def of_phase(cls, state: State, phase: Phase, previous: Phase | None, elapsed_s: float) -> Event:
        """Return the event of a change of phase.

        Args:
            state: The state.
            phase: The phase that was entered.
            previous: The phase of the same state that was left; None if the state itself was just entered.
            elapsed_s: Time spent in ``previous``, in seconds; 0 if there is none.
        """
        fields = {
            "state": str(state),
            "phase": str(phase),
            "previous": None if previous is None else str(previous),
            "elapsed_s": round(elapsed_s, 6),
        }
        return cls("proxy.phase", fields)


class EventLog:
    """Logs the events of one proxy, each with its ``proxy_id`` and ``session``.

    Args:
        logger: A structlog logger, or one of the standard library's. By default structlog's if the program has
            configured it, else ``logging.getLogger("proxy_fsm")``: unconfigured, structlog prints to standard output.
        proxy_id: Id of the engine.
        session: Name of the session.
    """

    def __init__(self, logger: Any, *, proxy_id: str, session: str) -> None:
        if logger is None:
            logger = structlog.get_logger("proxy_fsm") if structlog.is_configured() else _FALLBACK
        if isinstance(logger, logging.Logger | logging.LoggerAdapter):
            logger = _wrapped(logger)
        self._logger = logger
        self._context = {"proxy_id": proxy_id, "session": session}

    def __call__(self, level: str, event: str, **fields: Any) -> None:
        """Log an event; a failing logger is reported to the standard library's, and changes nothing else."""
        try:
            getattr(self._logger, level)(event, **self._context, **fields)
        except BaseException:  # noqa: BLE001 - a foreign logger may raise anything, SystemExit too
            report_failure(event)


def report_failure(event: str) -> None:
    """Report the exception that a logger has just raised to the standard library's logger."""
    with suppress(BaseException):  # both loggers fail: there is nowhere left to report to
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
