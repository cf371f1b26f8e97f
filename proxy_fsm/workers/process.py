"""The proxy program: spawned without a shell, its output read line by line, its exit noticed at once, reaped.

One thread does it all: it spawns, then sleeps until there is output or the program exits. It posts
`ProcessSpawned`, an `OutputLine` per line, and `ProcessExited` last, after all output. While too many lines wait to be
handled, no more are read: a program that floods blocks on its own pipe, and our memory use stays small.
"""

from __future__ import annotations

import codecs
import errno
import os
import select
import signal
import subprocess
import sys
import threading
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from proxy_fsm.errors import BackendError
from proxy_fsm.evidence import (
    LogFailed,
    OutputLine,
    ProcessExited,
    ProcessSpawned,
    SpawnFailed,
    WorkerCrashed,
)
from proxy_fsm.reasons import EndReason
from proxy_fsm.text import REDACTED, Redactor, SecretEnvironment, printable

if sys.platform == "linux":
    import resource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from proxy_fsm.evidence import Observation

__all__ = ["LineReader", "ProxyProcess"]

#: So few that one read cannot yield too many lines, even if all of them are empty.
_READ_BYTES = 4 << 10
#: A line is cut after this many characters: a program that never ends its line must not fill our memory.
_MAX_LINE_CHARS = 8 << 10
#: How much output of a program that has exited is still read.
_FINAL_OUTPUT_BYTES = 1 << 20
#: How many lines may wait to be handled before reading pauses; at the exit, how many of the last ones are kept.
_MAX_WAITING_LINES = 1000
#: Poll interval while output is paused (back-pressure).
_PAUSE_MS = 20
#: How much one run writes to the session's log at most.
_MAX_LOG_BYTES = 16 << 20


class LineReader:
    """Turns what a program prints into lines that hold no secret and no control character.

    The lines do not depend on the chunks that the bytes arrive in: a line is cut, a secret redacted and a character
    decoded at the same place, wherever one chunk ends and the next begins.

    Args:
        secrets: What is redacted, whether in upper or lower case.
    """

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._buffer = ""
        self._redact = Redactor(secrets)
        # The length of the longest secret, or ``cookie=`` value, that the next chunk may continue.
        self._kept_back = max(len(text) for text in (f"cookie={REDACTED}", *secrets))

    def feed(self, data: bytes) -> Iterator[str]:
        """Accept bytes as they arrive; yield the lines that they complete."""
        *lines, self._buffer = (self._buffer + self._decoder.decode(data)).split("\n")
        for line in lines:
            yield from self._pieces(self._clean(line.removesuffix("\r")))
        if len(self._buffer) > _MAX_LINE_CHARS + self._kept_back:
            end = "\r" if self._buffer.endswith("\r") else ""  # it is dropped if the line ends here
            clean = self._clean(self._buffer.removesuffix("\r"))
            cut = max(0, len(clean) - self._kept_back) // _MAX_LINE_CHARS * _MAX_LINE_CHARS
            self._buffer = clean[cut:] + end
            if cut:
                yield from self._pieces(clean[:cut])

    def finish(self) -> Iterator[str]:
        """Yield what is left if the last line has no newline."""
        left, self._buffer = self._buffer + self._decoder.decode(b"", final=True), ""
        if left:
            yield from self._pieces(self._clean(left.removesuffix("\r")))

    def _clean(self, line: str) -> str:
        return self._redact(printable(line, keep="\t"))

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
        log: File descriptor that the lines are written to; this run uses a duplicate, the caller keeps the original.
        secrets: What is redacted in its output.
        post: Receives what is observed, on this run's thread; call `ack_line` for each `OutputLine` that was handled.
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
        self._environment = SecretEnvironment(environment)
        self._lines = LineReader(secrets)
        del environment, secrets  # a traceback may show local variables
        self._directory = directory
        self._log: int | None = os.dup(log)
        self._log_room_bytes = _MAX_LOG_BYTES
        self._post = post
        self._posted = self._acked = 0  # lines; the first is counted on this run's thread alone, the second on another
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._pending_signal: signal.Signals | None = None
        self.thread = threading.Thread(target=self._run, name="proxy_fsm-process", daemon=True)

    def start(self) -> None:
        """Start the program; returns at once."""
        try:
            self.thread.start()
        except BaseException:
            self._close_log()
            raise

    def signal(self, number: signal.Signals) -> None:
        """Send the program a signal, as soon as it runs; a no-op once it has exited."""
        with self._lock:
            self._pending_signal = number
            if self._child is not None:
                self._child.send(number)

    def ack_line(self) -> None:
        """Acknowledge one more line as handled; call it for each, always on the same thread."""
        self._acked += 1

    def _run(self) -> None:
        try:
            self._spawn_and_serve()
        finally:
            self._close_log()

    def _spawn_and_serve(self) -> None:
        try:
            with _signals_unblocked():
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
            self._post(SpawnFailed(self._spawn_error(error)))
            return
        except Exception as error:  # noqa: BLE001 - a backend's command or environment is not made of plain strings
            program = self._command[0] if self._command else "without a name"
            problem = f"The proxy program {program} cannot be started: {error}."
            self._post(SpawnFailed(BackendError(EndReason.PROXY_NOT_STARTABLE, problem)))
            return
        child = _Child(process)
        try:
            self._serve(child, process)
        except Exception as error:  # noqa: BLE001 - whatever it was, the owner has to know
            self._post(WorkerCrashed("process", error))
            child.kill_group()
        with self._lock:
            self._child = None
        self._post(child.reap())

    def _serve(self, child: _Child, process: subprocess.Popen[bytes]) -> None:
        if sys.platform == "linux":
            with suppress(ProcessLookupError, PermissionError):
                resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))  # a core dump would contain the cookie
        self._post(ProcessSpawned(process.pid, self._command[0]))
        with self._lock:
            self._child = child
            if self._pending_signal is not None:
                child.send(self._pending_signal)
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        with process.stdout as output:
            self._read_until_exit(child, output.fileno())
            child.kill_group()
            self._post_final(self._final_lines(output.fileno()))
        self._close_log()

    def _read_until_exit(self, child: _Child, output: int) -> None:
        exit_fd = child.exit_descriptor()
        poller, pausing = select.poll(), select.poll()
        for each, descriptors in ((poller, (output, exit_fd)), (pausing, (exit_fd,))):
            for descriptor in descriptors:
                each.register(descriptor, select.POLLIN)
        while True:
            ready = [fd for fd, _ in (poller.poll() if self._has_room() else pausing.poll(_PAUSE_MS))]
            if output in ready:
                data = os.read(output, _READ_BYTES)
                for line in self._lines.feed(data):
                    self._write(line)
                    self._post_line(line)
                if not data:
                    poller.unregister(output)  # it closed its output and is still running
            if exit_fd in ready:
                return

    def _final_lines(self, output: int) -> Iterator[str]:
        os.set_blocking(output, False)
        left = _FINAL_OUTPUT_BYTES
        with suppress(BlockingIOError):  # another process still has the other end open, and writes nothing
            while left > 0 and (data := os.read(output, _READ_BYTES)):
                left -= len(data)
                yield from self._lines.feed(data)
        yield from self._lines.finish()

    def _post_final(self, lines: Iterator[str]) -> None:
        """Post the remaining lines; only the last ones if room runs out: an exited program needs no back-pressure."""
        kept: deque[str] = deque(maxlen=_MAX_WAITING_LINES)
        left_out = 0
        for line in lines:
            self._write(line)
            if not kept and self._has_room():
                self._post_line(line)
                continue
            left_out += len(kept) == kept.maxlen
            kept.append(line)
        if left_out:
            self._post_line(f"… {left_out} lines left out")
        for line in kept:
            self._post_line(line)

    def _has_room(self) -> bool:
        return self._posted - self._acked < _MAX_WAITING_LINES

    def _post_line(self, line: str) -> None:
        self._posted += 1
        self._post(OutputLine(line))

    def _write(self, line: str) -> None:
        if self._log is None:
            return
        data = line.encode() + b"\n"
        self._log_room_bytes -= len(data)
        full = self._log_room_bytes < 0
        if full:
            data = f"… the rest is left out: this run printed more than {_MAX_LOG_BYTES} bytes\n".encode()
        try:
            while data:
                data = data[os.write(self._log, data) :]
        except OSError as error:
            self._close_log()
            self._post(LogFailed(f"The session's log cannot be written any more: {error.strerror}."))
        if full:
            self._close_log()

    def _close_log(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            os.close(log)

    def _spawn_error(self, error: OSError) -> BackendError:
        program = self._command[0]
        if str(error.filename) == str(self._directory):
            problem = f"its directory {self._directory} cannot be entered ({error.strerror})"
        elif error.errno == errno.ENOENT and not os.path.lexists(program):
            return BackendError(EndReason.PROXY_NOT_FOUND, f"The proxy program {program} does not exist.")
        elif error.errno == errno.ENOENT:
            problem = "the interpreter or loader that it names does not exist"
        else:
            problem = error.strerror or str(error)
        return BackendError(EndReason.PROXY_NOT_STARTABLE, f"The proxy program {program} cannot be started: {problem}.")


class _Child:
    """A program that was started: signalled, watched until it exits, and reaped.

    All by its pidfd if it has one: even if it was reaped elsewhere and its PID reused, no other process is affected.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._pid = process.pid
        self._pidfd: int | None = None
        self._exit_fd: int | None = None
        if hasattr(os, "pidfd_open"):
            with suppress(OSError):  # a kernel or sandbox without pidfds; or it was reaped already
                self._pidfd = os.pidfd_open(self._pid)

    def send(self, number: signal.Signals) -> None:
        """Send the program a signal; a no-op if it has exited."""
        with suppress(ProcessLookupError, PermissionError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            else:
                os.kill(self._pid, number)

    def kill_group(self) -> None:
        """Kill what is left of the process group that it leads."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)

    def exit_descriptor(self) -> int:
        """Return a descriptor that becomes readable when the program exits, without reaping it."""
        if self._pidfd is not None:
            return self._pidfd
        self._exit_fd, write_end = os.pipe()

        def wait() -> None:
            with suppress(ChildProcessError):  # it was reaped meanwhile
                os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
            os.close(write_end)

        threading.Thread(target=wait, name="proxy_fsm-wait", daemon=True).start()
        return self._exit_fd

    def reap(self) -> ProcessExited:
        """Wait for the program's exit, and return it; no other method may be called afterwards."""
        try:
            code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        except ChildProcessError:  # SIGCHLD is ignored, or another thread waits for any child
            self._process.wait()  # it reports such an exit as code 0
            return ProcessExited(None, None)
        finally:
            for descriptor in (self._pidfd, self._exit_fd):
                if descriptor is not None:
                    os.close(descriptor)
        self._process.returncode = code
        return ProcessExited(None, -code) if code < 0 else ProcessExited(code, None)


@contextmanager
def _signals_unblocked() -> Iterator[None]:
    """Block no signal in this thread meanwhile: a program inherits the mask, and nxproxy would not react to TERM.

    A caller that blocks signals in all its threads, to wait for them in one, may miss one in this window of some
    milliseconds: it is handled here as if it had not been blocked.
    """
    blocked = signal.pthread_sigmask(signal.SIG_SETMASK, [])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
