"""The proxy program: spawned without a shell, its output read line by line, its end seen at once, reaped.

One thread does it all: it spawns, then sleeps until output comes or the program ends. It posts
`ProcessSpawned`, an `OutputLine` per line, and `ProcessExited` as the last thing, after all output.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from proxy_fsm.errors import BackendError
from proxy_fsm.evidence import (
    LogFailed,
    OutputLine,
    ProcessExited,
    ProcessSpawned,
    SpawnFailed,
    WorkerFailed,
)
from proxy_fsm.status import EndReason

if sys.platform == "linux":
    import resource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from proxy_fsm.evidence import Observation

__all__ = ["LineReader", "ProxyProcess"]

_READ_BYTES = 64 << 10
#: A line is cut after this many characters: a program that never ends its line must not fill our memory.
_MAX_LINE_CHARS = 8 << 10
_HIDDEN = "<hidden>"
#: How much output of a program that has ended is still read, in bytes.
_LAST_WORDS_BYTES = 1 << 20


class LineReader:
    """Turns what a program prints into lines that hold no secret and no control character.

    What comes out does not depend on how the bytes came in: a line is cut, a secret hidden and a character put
    together at the same places, whatever the chunks are.

    Args:
        secrets: What must not get through, in any case of its letters.
    """

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._buffer = ""
        # A value called cookie is none of a log's business, whoever it belongs to.
        words = [r"(?<=cookie=)[^,\s]+", *(re.escape(secret) for secret in secrets if secret)]
        self._hidden = re.compile("|".join(words), re.IGNORECASE | re.ASCII)
        # What is kept back is as long as a secret, or a value called cookie, that may still go on.
        self._kept_back = max(len(text) for text in (f"cookie={_HIDDEN}", *secrets))

    def feed(self, data: bytes) -> Iterator[str]:
        """Take bytes as they come; yield the lines that they complete."""
        *lines, self._buffer = (self._buffer + self._decoder.decode(data)).split("\n")
        for line in lines:
            yield from self._pieces(self._clean(line.removesuffix("\r")))
        if len(self._buffer) > _MAX_LINE_CHARS + self._kept_back:
            end = "\r" if self._buffer.endswith("\r") else ""  # it is dropped where the line ends here
            clean = self._clean(self._buffer.removesuffix("\r"))
            cut = max(0, len(clean) - self._kept_back) // _MAX_LINE_CHARS * _MAX_LINE_CHARS
            self._buffer = clean[cut:] + end
            if cut:
                yield from self._pieces(clean[:cut])

    def finish(self) -> Iterator[str]:
        """Yield what is left where the last line has no end."""
        left, self._buffer = self._buffer + self._decoder.decode(b"", final=True), ""
        if left:
            yield from self._pieces(self._clean(left.removesuffix("\r")))

    def _clean(self, line: str) -> str:
        if not line.isprintable():
            line = "".join(
                char if char.isprintable() or char == "\t" else char.encode("unicode_escape").decode() for char in line
            )
        return self._hidden.sub(_HIDDEN, line)

    @staticmethod
    def _pieces(line: str) -> Iterator[str]:
        for at in range(0, len(line) or 1, _MAX_LINE_CHARS):
            yield line[at : at + _MAX_LINE_CHARS]


class ProxyProcess:
    """One run of the proxy program.

    Args:
        command: The argument vector; its first entry is the path of the executable.
        environment: The whole environment.
        directory: Its working directory.
        log: File descriptor that the lines are written to; stays the caller's, this run has a duplicate.
        secrets: What is hidden in its output.
        post: Takes what is observed, on this run's thread.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        directory: Path,
        log: int,
        secrets: Sequence[str],
        post: Callable[[Observation], None],
    ) -> None:
        self._command = list(command)
        self._environment = environment
        self._directory = directory
        self._log: int | None = os.dup(log)
        self._lines = LineReader(secrets)
        self._post = post
        self._lock = threading.Lock()
        self._pid: int | None = None
        self._wanted: signal.Signals | None = None
        self._reaped = False
        self.thread = threading.Thread(target=self._run, name="proxy_fsm-process", daemon=True)

    def start(self) -> None:
        """Start the program; returns at once."""
        try:
            self.thread.start()
        except BaseException:
            self._close_log()
            raise

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, as soon as it runs; a no-op once it has ended."""
        with self._lock:
            self._wanted = number
            if self._pid is not None and not self._reaped:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(self._pid, number)

    def _run(self) -> None:
        try:
            self._spawn_and_serve()
        finally:
            self._close_log()

    def _spawn_and_serve(self) -> None:
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env=self._environment,
                start_new_session=True,
            )
        except OSError as error:
            self._post(SpawnFailed(self._why_not(error)))
            return
        except Exception as error:  # noqa: BLE001 - a backend's command or environment is no list of plain strings
            program = self._command[0] if self._command else "without a name"
            problem = f"The proxy program {program} cannot be started: {error}."
            self._post(SpawnFailed(BackendError(EndReason.PROXY_NOT_STARTABLE, problem)))
            return
        try:
            self._serve(process)
        except Exception as error:  # noqa: BLE001 - whatever it was, the owner has to know
            self._post(WorkerFailed("process", error))
            self._end_group(process.pid)
            self._reap(process)

    def _serve(self, process: subprocess.Popen[bytes]) -> None:
        if sys.platform == "linux":
            with suppress(ProcessLookupError, PermissionError):
                resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))  # a core would hold the cookie
        self._post(ProcessSpawned(process.pid, self._command[0]))
        with self._lock:
            self._pid = process.pid
            if self._wanted is not None:
                os.kill(process.pid, self._wanted)
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        with process.stdout as output:
            self._read_until_exit(process.pid, output.fileno())
            self._end_group(process.pid)
            self._read_last_words(output.fileno())
        self._take(self._lines.finish())
        self._close_log()
        self._reap(process)

    def _read_until_exit(self, pid: int, output: int) -> None:
        exit_fd = _exit_descriptor(pid)
        try:
            poller = select.poll()
            poller.register(output, select.POLLIN)
            poller.register(exit_fd, select.POLLIN)
            while True:
                ready = [fd for fd, _ in poller.poll()]
                if output in ready:
                    data = os.read(output, _READ_BYTES)
                    self._take(self._lines.feed(data))
                    if not data:
                        poller.unregister(output)  # it closed its output and goes on
                if exit_fd in ready:
                    return
        finally:
            os.close(exit_fd)

    def _read_last_words(self, output: int) -> None:
        os.set_blocking(output, False)
        left = _LAST_WORDS_BYTES
        with suppress(BlockingIOError):  # somebody else still holds the other end, and says nothing
            while left > 0 and (data := os.read(output, _READ_BYTES)):
                left -= len(data)
                self._take(self._lines.feed(data))

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._reaped = True
        code = process.wait()
        if code < 0:
            self._post(ProcessExited(None, -code))
        else:
            self._post(ProcessExited(code, None))

    @staticmethod
    def _end_group(pid: int) -> None:
        """End what the program has left behind in its process group, of which it is the leader."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)

    def _take(self, lines: Iterator[str]) -> None:
        for line in lines:
            self._write(line)
            self._post(OutputLine(line))

    def _write(self, line: str) -> None:
        if self._log is None:
            return
        try:
            data = line.encode() + b"\n"
            while data:
                data = data[os.write(self._log, data) :]
        except OSError as error:
            self._close_log()
            self._post(LogFailed(f"The session's log cannot be written any more: {error.strerror}."))

    def _close_log(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            os.close(log)

    def _why_not(self, error: OSError) -> BackendError:
        program = self._command[0]
        if str(error.filename) == str(self._directory):
            problem = f"its directory {self._directory} cannot be entered ({error.strerror})"
        elif error.errno == errno.ENOENT and not os.path.lexists(program):
            return BackendError(EndReason.PROXY_NOT_FOUND, f"The proxy program {program} is not there.")
        elif error.errno == errno.ENOENT:
            problem = "the interpreter or loader that it names is not there"
        else:
            problem = error.strerror or str(error)
        return BackendError(EndReason.PROXY_NOT_STARTABLE, f"The proxy program {program} cannot be started: {problem}.")


def _exit_descriptor(pid: int) -> int:
    """Return a descriptor that becomes readable when a child ends, without reaping it; the caller closes it."""
    if hasattr(os, "pidfd_open"):
        with suppress(OSError):  # a kernel, or a sandbox, that has none
            return os.pidfd_open(pid)
    ours, theirs = os.pipe()

    def wait() -> None:
        with suppress(ChildProcessError):  # it was reaped meanwhile
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        os.close(theirs)

    threading.Thread(target=wait, name="proxy_fsm-wait", daemon=True).start()
    return ours
