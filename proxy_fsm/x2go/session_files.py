"""The files in a session's directory that an `X2GoProxy` keeps open while it runs."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack, suppress
from typing import IO, TYPE_CHECKING

from proxy_fsm.errors import BackendError
from proxy_fsm.private_files import open_private
from proxy_fsm.reasons import EndReason

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["SessionFiles"]

#: The limit for one run's lines in the errors file.
_MAX_ERRORS_BYTES = 16 << 20


class SessionFiles:
    """The log, opened twice as in python-x2go, and the errors file; private, in UTF-8 regardless of the locale.

    Args:
        on_failure: Called with a sentence once no more errors can be written.
    """

    def __init__(self, on_failure: Callable[[str], object]) -> None:
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._open_files: ExitStack | None = ExitStack()
        self._errors: IO[str] | None = None
        self._errors_path: Path | None = None
        self._errors_room_bytes = _MAX_ERRORS_BYTES

    def open(self, log: Path, errors: Path | None) -> tuple[IO[str], IO[str]]:
        """Open the files; once, and not after `close`.

        Args:
            log: The log.
            errors: The errors file; None for none.

        Returns:
            The log, for standard output and for standard error.

        Raises:
            BackendError: One cannot be opened, or the proxy has ended already; then no file stays open.
        """
        try:
            with ExitStack() as opened:
                log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                files = [opened.enter_context(_appended(path)) for path in (log, log, errors) if path is not None]
                with self._lock:
                    if self._open_files is None:
                        raise BackendError(EndReason.LISTEN_FAILED, "The proxy had ended before its log was opened.")
                    self._open_files.push(opened.pop_all())
                    self._errors, self._errors_path = None if errors is None else files[2], errors
                return files[0], files[1]
        except OSError as error:
            raise BackendError(
                EndReason.LISTEN_FAILED,
                f"The session's log in {log.parent} cannot be opened: {error.strerror or error}.",
                "Make sure that it is a directory of yours, writable and not full.",
            ) from error

    def write_errors(self, line: str) -> None:
        """Write a line to the errors file, if there is one and it is open."""
        failure = None
        with self._lock:
            if self._errors is None:
                return
            self._errors_room_bytes -= len(line.encode("utf-8", "backslashreplace")) + 1
            full = self._errors_room_bytes < 0
            if full:
                line = f"… the rest is left out: this run printed more than {_MAX_ERRORS_BYTES} bytes"
            try:
                self._errors.write(f"{line}\n")
                self._errors.flush()
            except OSError as error:
                failure = f"{self._errors_path} cannot be written any more: {error.strerror}."
            if full or failure is not None:
                self._errors = None
        if failure is not None:
            self._on_failure(failure)

    def close(self) -> None:
        """Close all files; a file that is opened later is closed at once."""
        with self._lock:  # held while closing, so that a concurrent close returns with the files closed
            open_files, self._open_files = self._open_files, None
            self._errors = None
            if open_files is not None:
                with suppress(OSError):  # the failed write was reported already
                    open_files.close()


def _appended(path: Path) -> IO[str]:
    return os.fdopen(open_private(path), "a", encoding="utf-8", errors="backslashreplace")
