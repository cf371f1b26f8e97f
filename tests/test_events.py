"""Events go to the logger that the program has configured, or nowhere; a failing logger changes nothing."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from proxy_fsm.events import EventLog

from .helpers.recorder import Recorder
from .helpers.wait import WAIT_S

if TYPE_CHECKING:
    from collections.abc import Iterator


class Broken:
    """A logger that fails."""

    def info(self, event: str, **fields: Any) -> None:
        raise RuntimeError(f"no room for {event} and {len(fields)} fields")


@pytest.fixture(autouse=True)
def _structlog_as_it_was() -> Iterator[None]:
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


def make(logger: Any = None) -> EventLog:
    return EventLog(logger, proxy_id="id1", session="name")


def run(program: str) -> tuple[str, str]:
    """Run a program in its own process and return what it prints."""
    program = "from proxy_fsm.events import EventLog\n" + program
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_S, check=True)
    return done.stdout, done.stderr


ALL_LEVELS = """
log = EventLog(None, proxy_id="id1", session="name")
for level in ("debug", "info", "warning", "error"):
    log(level, "an.event", number=1)
try:
    raise RuntimeError("a bug")
except RuntimeError:
    log("error", "another.event", exc_info=True)
"""


def test_unconfigured_program_prints_nothing() -> None:
    assert run(ALL_LEVELS) == ("", "")


def test_configured_logging_gets_events_at_its_level() -> None:
    output, errors = run(
        "import logging\nlogging.basicConfig(level=logging.WARNING, format='%(name)s %(levelname)s')" + ALL_LEVELS
    )
    assert output == ""
    assert errors.splitlines() == ["proxy_fsm WARNING", "proxy_fsm ERROR", "proxy_fsm ERROR"]


def test_configured_structlog_gets_events() -> None:
    output, errors = run(
        "import structlog\nstructlog.configure(processors=[structlog.processors.JSONRenderer(sort_keys=True)])\n"
        "EventLog(None, proxy_id='id1', session='name')('info', 'an.event', number=1)"
    )
    assert output == '{"event": "an.event", "number": 1, "proxy_id": "id1", "session": "name"}\n'
    assert errors == ""


def test_package_never_configures_structlog() -> None:
    assert run("import structlog, proxy_fsm" + ALL_LEVELS + "print(structlog.is_configured())") == ("False\n", "")


def test_every_event_has_proxy_id_and_session() -> None:
    recorder = Recorder()
    make(recorder)("warning", "an.event", number=1)
    assert recorder.events == [
        {"event": "an.event", "level": "warning", "proxy_id": "id1", "session": "name", "number": 1}
    ]


def test_structlog_configured_later_does_not_redirect_events(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "proxy_fsm")
    log = make()
    structlog.configure(processors=[lambda *_: pytest.fail("not filtered for")])
    log("info", "an.event")
    assert caplog.messages == ["event='an.event' proxy_id='id1' session='name'"]


def test_stdlib_logger_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mine")
    log = make(logging.getLogger("mine"))
    log("debug", "too.fine")
    log("info", "an.event", text="100 %s {}", number=1)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("mine", "INFO")
    assert record.getMessage() == "event='an.event' proxy_id='id1' session='name' text='100 %s {}' number=1"


def test_logger_level_set_later_takes_effect(caplog: pytest.LogCaptureFixture) -> None:
    log = make(logging.getLogger("mine"))
    caplog.set_level(logging.ERROR, "mine")
    log("info", "an.event")
    caplog.set_level(logging.INFO, "mine")
    log("info", "another.event")
    assert len(caplog.records) == 1


def test_structlog_logger_is_accepted() -> None:
    received: list[Any] = []

    def keep(logger: Any, method: str, event: Any) -> Any:  # noqa: ARG001 - structlog's signature
        received.append((method, dict(event)))
        raise structlog.DropEvent

    make(structlog.wrap_logger(None, processors=[keep]).bind(mine=1))("info", "an.event", number=2)
    assert received == [
        ("info", {"event": "an.event", "mine": 1, "proxy_id": "id1", "session": "name", "number": 2}),
    ]


def test_failing_logger_is_reported_and_ignored(caplog: pytest.LogCaptureFixture) -> None:
    make(Broken())("info", "an.event", number=1)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("proxy_fsm", "ERROR")
    assert record.getMessage() == "The logger failed on the event an.event."
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "no room for an.event and 3 fields"


def test_object_that_is_no_logger_is_reported_and_ignored(caplog: pytest.LogCaptureFixture) -> None:
    make(object())("info", "an.event")
    assert caplog.messages == ["The logger failed on the event an.event."]


class FailingRepr:
    """A value without a usable repr."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_field_with_failing_repr_is_reported_and_ignored(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mine")
    make(logging.getLogger("mine"))("info", "an.event", shy=FailingRepr())
    assert caplog.messages == ["The logger failed on the event an.event."]


def test_event_below_the_level_is_not_rendered(caplog: pytest.LogCaptureFixture) -> None:
    """There is one for every line of a proxy's output."""
    caplog.set_level(logging.INFO, "mine")
    make(logging.getLogger("mine"))("debug", "an.event", shy=FailingRepr())
    assert caplog.messages == []


def test_failure_of_all_loggers_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    filtered = []

    def fail(record: logging.LogRecord) -> bool:
        filtered.append(record.getMessage())
        raise RuntimeError("this one too")

    fallback = logging.getLogger("proxy_fsm")
    monkeypatch.setattr(fallback, "filters", [fail])
    make(Broken())("info", "an.event")
    make()("error", "another.event")
    assert filtered == [
        "The logger failed on the event an.event.",
        "event='another.event' proxy_id='id1' session='name'",
        "The logger failed on the event another.event.",
    ]


@pytest.mark.parametrize("by", ["the one being handled", "one that is given"])
def test_traceback_is_rendered(caplog: pytest.LogCaptureFixture, by: str) -> None:
    log = make(logging.getLogger("mine"))
    try:
        int("no number")
    except ValueError as error:
        log("error", "internal.error", exc_info=True if by == "the one being handled" else error)
    (message,) = caplog.messages
    assert "Traceback (most recent call last)" in message
    assert "ValueError: invalid literal" in message
