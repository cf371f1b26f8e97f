"""The proxy program is isolated, read to its last line, its exit noticed at once, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy_fsm.evidence import (
    LogFailed,
    Observation,
    OutputLine,
    ProcessExited,
    ProcessSpawned,
    SpawnFailed,
    WorkerCrashed,
)
from proxy_fsm.reasons import EndReason
from proxy_fsm.testing.scripted import (
    Gate,
    ScriptedProxy,
    Step,
    die_by,
    exit_with,
    fork_holding_output,
    on_signal,
    pause,
    print_cookie,
    record_call,
    say,
    wait_file,
)
from proxy_fsm.text import SecretEnvironment
from proxy_fsm.workers.process import LineReader, ProxyProcess
from tests.e2e.procs import alive
from tests.helpers.holdings import descriptors, nothing_left_open, own_threads
from tests.helpers.wait import WAIT_S, assert_prompt, eventually

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

COOKIE = "0123456789abcdef0123456789ABCDEF"
CUT = 8 << 10

_Seen = TypeVar("_Seen", bound=Observation)


def read(chunks: Iterable[bytes], secrets: Sequence[str] = (COOKIE,)) -> list[str]:
    """Return all lines of a `LineReader` for these chunks."""
    reader = LineReader(secrets)
    return [line for chunk in chunks for line in reader.feed(chunk)] + list(reader.finish())


def split_at(data: bytes, places: Iterable[int]) -> list[bytes]:
    """Cut data into chunks at these places."""
    edges = [0, *sorted({min(place, len(data)) for place in places}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def cut(line: str) -> list[str]:
    return [line[at : at + CUT] for at in range(0, len(line), CUT)] or [""]


class TestLineReader:
    def test_line_may_come_in_any_number_of_chunks(self) -> None:
        assert read([b"on", b"", b"e\ntw", b"o", b"\n\nthr", b"ee\n"]) == ["one", "two", "", "three"]

    def test_line_is_yielded_as_soon_as_it_is_complete(self) -> None:
        reader = LineReader()
        assert list(reader.feed(b"one\ntw")) == ["one"]
        assert list(reader.feed(b"o\n")) == ["two"]
        assert list(reader.finish()) == []

    def test_last_line_needs_no_newline(self) -> None:
        assert read([b"one\ntwo"]) == ["one", "two"]

    @pytest.mark.parametrize("chunks", [[b"one\r\ntwo\r"], [b"one\r", b"\ntwo", b"\r"]])
    def test_carriage_return_before_a_newline_is_dropped(self, chunks: list[bytes]) -> None:
        assert read(chunks) == ["one", "two"]

    def test_carriage_return_is_dropped_even_if_the_line_was_cut(self) -> None:
        for length in range(CUT, CUT + 100):
            assert "".join(read([b"x" * length + b"\r", b"\n"])) == "x" * length
            assert "".join(read([b"x" * length + b"\r", b"y\n"])) == "x" * length + "\\ry"

    def test_control_characters_are_escaped(self) -> None:
        assert read([b"\x1b]0;owned\x07 \x1b[2J\x08\x00\x7f\t10%\r20%\n"]) == [
            "\\x1b]0;owned\\x07 \\x1b[2J\\x08\\x00\\x7f\t10%\\r20%"
        ]

    def test_non_ascii_control_characters_are_escaped(self) -> None:
        assert read(["\u202e \u2028 \x85 \u200b \U000e0041".encode()]) == [
            "\\u202e \\u2028 \\x85 \\u200b \\U000e0041",
        ]

    def test_invalid_utf_8_is_shown_in_hexadecimal(self) -> None:
        assert read([b"caf\xe9 \xff\xfe \xe2\x82\n\xe2\x82"]) == ["caf\\xe9 \\xff\\xfe \\xe2\\x82", "\\xe2\\x82"]

    def test_character_may_come_in_two_chunks(self) -> None:
        data = "é€😀".encode()
        for place in range(len(data)):
            assert read(split_at(data, [place])) == ["é€😀"]

    def test_long_line_is_cut_without_loss(self) -> None:
        line = "".join(f"{number} " for number in range(10_000))
        for chunk_bytes in (len(line), 65_536, 8192, 1000):
            data = line.encode() + b"\nnext\n"
            chunks = [data[at : at + chunk_bytes] for at in range(0, len(data), chunk_bytes)]
            assert read(chunks) == [*cut(line), "next"]

    def test_line_of_maximum_length_is_not_cut(self) -> None:
        assert read([b"x" * CUT, b"\n"]) == ["x" * CUT]
        assert read([b"x" * CUT + b"y", b"\n"]) == ["x" * CUT, "y"]

    @pytest.mark.parametrize("filler", [b"x", b"\x1b", b"cookie=", b"\xff", COOKIE.encode(), b"\r"])
    def test_endless_line_does_not_fill_the_memory(self, filler: bytes) -> None:
        reader = LineReader([COOKIE])
        chunk = filler * (65_536 // len(filler))
        for _ in range(20):
            assert all(len(line) <= CUT for line in reader.feed(chunk))
            assert len(reader._buffer) < 3 * CUT

    def test_cookie_is_redacted_in_upper_and_lower_case(self) -> None:
        data = f"a {COOKIE} b {COOKIE.upper()} c {COOKIE.lower()}d\n".encode()
        assert read([data]) == ["a <hidden> b <hidden> c <hidden>d"]

    def test_all_secrets_are_redacted_and_an_empty_one_is_ignored(self) -> None:
        assert read([b"one and two: onetwo"], ["one", "", "TWO"]) == ["<hidden> and <hidden>: <hidden><hidden>"]
        assert read([b"nothing to hide"], []) == ["nothing to hide"]

    def test_secret_is_matched_literally(self) -> None:
        assert read([b"a.c abc"], ["a.c"]) == ["<hidden> abc"]

    @pytest.mark.parametrize(
        ("line", "shown"),
        [
            ("nx/nx,cookie=abc,port=1", "nx/nx,cookie=<hidden>,port=1"),
            ("COOKIE=abc def", "COOKIE=<hidden> def"),
            ("cookie=", "cookie="),
            ("cookie=, x", "cookie=, x"),
            (f"cookie={COOKIE}tail,x", "cookie=<hidden>,x"),
            ("cookie=\x1b[31mabc\x07def,x", "cookie=<hidden>,x"),
        ],
    )
    def test_any_value_called_cookie_is_redacted(self, line: str, shown: str) -> None:
        assert read([line.encode()]) == [shown]

    @pytest.mark.parametrize(
        ("prefix", "secrets"),
        [("cookie=", (COOKIE,)), ("", (COOKIE,)), ("cookie=", ())],
        ids=["both", "known", "named"],
    )
    def test_cookie_is_redacted_across_any_chunk_border_and_any_cut(
        self, prefix: str, secrets: tuple[str, ...]
    ) -> None:
        """Half of it is no better than the whole: no part of it gets through."""
        for before in range(CUT - 60, CUT + 60, 7):
            data = b"x" * before + f"{prefix}{COOKIE},y".encode() + b"z" * 100
            shown = "x" * before + f"{prefix}<hidden>,y" + "z" * 100
            for place in range(before - 2, before + 50):
                assert read(split_at(data, [place]), secrets) == cut(shown)

    def test_endless_cookie_is_redacted_to_its_end(self) -> None:
        chunks = [b"cookie=", *[b"abcd" * 5000] * 5, b",x\n"]
        assert read(chunks) == ["cookie=<hidden>,x"]

    @given(
        parts=st.lists(
            st.one_of(
                st.text("ghij-é€😀,", max_size=20),
                st.sampled_from([COOKIE, COOKIE.lower(), COOKIE.upper()]),
                st.sampled_from(["\n", "\n\n"]),
                st.integers(CUT - 50, CUT + 50).map(lambda count: "x" * count),
            ),
            max_size=12,
        ),
        places=st.lists(st.integers(0, 40_000), max_size=8),
    )
    @example(parts=["x" * (CUT - 10), COOKIE], places=[CUT + 5])
    @example(parts=["x" * CUT, COOKIE, COOKIE], places=[CUT + 31, CUT + 33])
    def test_only_the_secret_is_lost_whatever_the_chunks(self, parts: list[str], places: list[int]) -> None:
        shown = "".join("<hidden>" if part.upper() == COOKIE.upper() else part for part in parts)
        lines = shown.split("\n")
        if lines[-1] == "":
            lines.pop()
        expected = [piece for line in lines for piece in cut(line)]
        assert read(split_at("".join(parts).encode(), places)) == expected

    @given(
        parts=st.lists(
            st.one_of(
                st.binary(max_size=40),
                st.sampled_from([COOKIE.encode(), b"cookie=", b"cook", b"\r", b"\r\n", b"\n", b"\x01", b",", b"\xe2"]),
                st.integers(0, 32).map(lambda count: COOKIE[count:].encode()),
                st.integers(0, 32).map(lambda count: COOKIE[:count].encode()),
                st.integers(CUT - 50, CUT + 50).map(lambda count: b"x" * count),
            ),
            max_size=12,
        ),
        places=st.lists(st.integers(0, 40_000), max_size=8),
    )
    @example(parts=[b"\x01", COOKIE[2:].encode()], places=[])  # shown as \x01, it would make the cookie whole
    @example(parts=[b"\xab\xcd"], places=[1])
    def test_lines_are_harmless_and_do_not_depend_on_the_chunks(self, parts: list[bytes], places: list[int]) -> None:
        data = b"".join(parts)
        lines = read(split_at(data, places))
        assert lines == read([data])
        for line in lines:
            assert COOKIE.lower() not in line.lower()
            assert line.replace("\t", " ").isprintable()
            assert len(line) <= CUT

    def test_escaped_control_characters_cannot_spell_the_cookie(self) -> None:
        """The escape of a control character is hexadecimal too."""
        for secret in ("1b" + "0" * 30, "ff" + "0" * 30):
            assert read([bytes.fromhex(secret[:2]) + b"0" * 30], [secret]) == ["\\x<hidden>"]


class Run:
    """A `ProxyProcess`, and what it posts, in order."""

    def __init__(
        self,
        command: Sequence[str],
        directory: Path,
        *,
        environment: Mapping[str, str] | None = None,
        log: str | Path = "/dev/null",
        secrets: Sequence[str] = (),
    ) -> None:
        self.seen: list[Observation] = []
        self._news: SimpleQueue[Observation] = SimpleQueue()
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
        try:
            self.process = ProxyProcess(
                command,
                environment=environment or {},
                directory=directory,
                log=descriptor,
                secrets=secrets,
                post=self._post,
            )
        finally:
            os.close(descriptor)
        self._hold: tuple[type[Observation], list[Any], threading.Event] | None = None
        self.acks_lines = True

    def _post(self, observation: Observation) -> None:
        if self._hold is not None and isinstance(observation, self._hold[0]):
            self._hold[1].append(observation)
            assert self._hold[2].wait(WAIT_S)
        self._news.put(observation)
        if isinstance(observation, OutputLine) and self.acks_lines:
            self.process.ack_line()

    @contextlib.contextmanager
    def held_at(self, kind: type[_Seen]) -> Iterator[list[_Seen]]:
        """Block its thread when it posts an observation of this kind; yields the observations that it blocks on."""
        seen: list[_Seen] = []
        self._hold = kind, seen, threading.Event()
        try:
            yield seen
        finally:
            self._hold[2].set()

    def start(self) -> Run:
        self.process.start()
        return self

    def until(self, kind: type[_Seen], text: str | None = None) -> _Seen:
        """Wait for the next observation of a kind, and return it."""
        while True:
            observation = self._news.get(timeout=WAIT_S)
            self.seen.append(observation)
            if isinstance(observation, kind) and text in {None, getattr(observation, "text", None)}:
                return observation

    def finish(self) -> list[Observation]:
        """Wait until the thread has ended, and return all observations."""
        self.process.thread.join(WAIT_S)
        assert not self.process.thread.is_alive()
        while not self._news.empty():
            self.seen.append(self._news.get())
        return self.seen

    @property
    def lines(self) -> list[str]:
        return [observation.text for observation in self.seen if isinstance(observation, OutputLine)]


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """No test here leaves a descriptor, a thread or a child behind."""
    before = descriptors()
    yield
    for thread in own_threads():
        thread.join(WAIT_S)
        assert not thread.is_alive()
    nothing_left_open(before)


@pytest.fixture(params=["pidfd", "pidfd refused", "no pidfd"])
def exit_seen_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way in which the exit of a program can be noticed."""

    def refuse(pid: int) -> int:
        raise OSError(38, "Function not implemented", str(pid))

    if request.param == "pidfd refused":
        monkeypatch.setattr(os, "pidfd_open", refuse)
    elif request.param == "no pidfd":
        monkeypatch.delattr(os, "pidfd_open")
    return str(request.param)


def script(*steps: Step) -> list[str]:
    return ScriptedProxy(steps).command


def assert_reaped(pid: int) -> None:
    with pytest.raises(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)


class TestLife:
    @pytest.mark.usefixtures("exit_seen_by")
    def test_spawn_is_posted_first_then_lines_then_exit(self, tmp_path: Path) -> None:
        run = Run(script(say("one"), say("two", "stdout"), say("three")), tmp_path).start()
        spawned, *lines, exited = run.finish()
        assert isinstance(spawned, ProcessSpawned)
        assert spawned.executable == sys.executable
        assert [type(line) for line in lines] == [OutputLine] * 3
        assert run.lines == ["one", "two", "three"]
        assert exited == ProcessExited(0, None, at=exited.at)
        assert sorted(run.seen, key=lambda observation: observation.at) == run.seen
        assert_reaped(spawned.pid)

    @pytest.mark.usefixtures("exit_seen_by")
    @pytest.mark.parametrize(
        ("end", "exit_code", "number"),
        [
            (exit_with(0), 0, None),
            (exit_with(7), 7, None),
            (exit_with(255), 255, None),
            (die_by(signal.SIGSEGV), None, signal.SIGSEGV),
            (die_by(signal.SIGKILL), None, signal.SIGKILL),
            (die_by(signal.SIGHUP), None, signal.SIGHUP),
        ],
    )
    def test_exit_code_and_signal_are_distinguished(
        self, tmp_path: Path, end: Step, exit_code: int | None, number: int | None
    ) -> None:
        exited = Run(script(end), tmp_path).start().until(ProcessExited)
        assert (exited.exit_code, exited.signal) == (exit_code, number)

    def test_program_has_no_input_and_inherits_no_descriptor(self, tmp_path: Path) -> None:
        inspect = Step(
            "put(2, os.readlink('/proc/self/fd/0'))\n"
            "for fd in sorted(map(int, os.listdir('/proc/self/fd'))):\n"
            "    if os.path.exists('/proc/self/fd/' + str(fd)): put(2, str(fd))"
        )
        ours, theirs = os.pipe()
        stdin = os.dup(0)
        try:
            os.dup2(ours, 0)  # pytest's own is /dev/null
            os.set_inheritable(theirs, True)  # noqa: FBT003 - its one parameter
            run = Run(script(inspect), tmp_path).start()
            run.finish()
        finally:
            os.dup2(stdin, 0)
            for descriptor in (ours, theirs, stdin):
                os.close(descriptor)
        assert run.lines == ["/dev/null", "0", "1", "2"]

    def test_program_has_its_own_session_directory_and_environment(self, tmp_path: Path) -> None:
        directory = tmp_path / "root"
        directory.mkdir()
        environment = {"ONE": "1", "NX_DISPLAY": "x=y", "EMPTY": "", "LC_CTYPE": "C.UTF-8"}
        command = script(record_call(tmp_path / "call"), exit_with(0))
        run = Run([*command, "an argument", "*"], directory, environment=environment).start()
        pid = run.until(ProcessSpawned).pid
        run.finish()
        call = json.loads((tmp_path / "call").read_text(encoding="utf-8"))
        assert call["sid"] == pid
        assert call["cwd"] == str(directory)
        assert call["environ"] == environment
        assert call["argv"] == ["-c", "an argument", "*"]

    def test_program_leaves_no_core_file_with_the_cookie(self, tmp_path: Path) -> None:
        """The limit does not apply to a core dump that the kernel pipes to a program."""
        with Gate(tmp_path / "gate") as gate:
            run = Run(script(wait_file(gate.path)), tmp_path).start()
            pid = run.until(ProcessSpawned).pid
            assert os.getsid(pid) == pid
            limits = Path(f"/proc/{pid}/limits").read_text(encoding="ascii")
            gate.open()
            run.finish()
        assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)

    def test_standard_output_and_error_are_merged(self, tmp_path: Path) -> None:
        run = Run(script(*[say(str(number), ("stdout", "stderr")[number % 2]) for number in range(50)]), tmp_path)
        run.start().finish()
        assert run.lines == [str(number) for number in range(50)]

    @pytest.mark.usefixtures("exit_seen_by")
    def test_program_may_close_its_output_and_keep_running(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And the thread does not spin on its EOF meanwhile."""
        real_read, empty_reads = os.read, []

        def counting_read(descriptor: int, count: int) -> bytes:
            data = real_read(descriptor, count)
            if not data and count == 4 << 10:  # not the reads of subprocess
                empty_reads.append(descriptor)
            return data

        monkeypatch.setattr(os, "read", counting_read)
        with Gate(tmp_path / "gate") as gate:
            run = Run(
                script(say("last"), Step("os.close(1)\nos.close(2)"), wait_file(gate.path), exit_with(5)), tmp_path
            ).start()
            run.until(OutputLine, "last")
            eventually(lambda: empty_reads)
            gate.open()
            assert run.until(ProcessExited).exit_code == 5
            run.finish()
        assert len(empty_reads) <= 2

    def test_last_line_of_the_output_needs_no_newline(self, tmp_path: Path) -> None:
        run = Run(script(Step("os.write(1, b'one\\ntwo')")), tmp_path).start()
        run.finish()
        assert run.lines == ["one", "two"]
        assert isinstance(run.seen[-1], ProcessExited)

    @pytest.mark.usefixtures("exit_seen_by")
    def test_all_final_output_arrives(self, tmp_path: Path) -> None:
        """It is more than a pipe holds, and the program has exited when it is read."""
        words = Step("for n in range(20000): put(1, 'word ' + str(n).zfill(5))")
        run = Run(script(words, die_by(signal.SIGKILL)), tmp_path).start()
        run.finish()
        assert run.lines == [f"word {number:05}" for number in range(20_000)]
        assert isinstance(run.seen[-1], ProcessExited)

    @pytest.mark.usefixtures("exit_seen_by")
    @pytest.mark.parametrize("limit", [1 << 20, 100_000])
    def test_output_in_the_pipe_at_the_exit_arrives_up_to_a_limit(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
    ) -> None:
        monkeypatch.setattr("proxy_fsm.workers.process._FINAL_OUTPUT_BYTES", limit)
        words = Step(
            "import fcntl\nfcntl.fcntl(1, 1031, 1 << 20)  # F_SETPIPE_SZ\n"
            "for n in range(40000): put(1, 'word ' + str(n).zfill(5))"
        )
        run = Run(script(words, exit_with(2)), tmp_path)
        with run.held_at(ProcessSpawned) as spawned:
            run.start()
            eventually(lambda: spawned and not alive(spawned[0].pid))
        run.finish()
        assert run.lines[:9000] == [f"word {number:05}" for number in range(9000)]
        assert len(run.lines) == 40_000 if limit == 1 << 20 else len(run.lines) < 40_000
        assert isinstance(run.seen[-1], ProcessExited)

    @pytest.mark.usefixtures("exit_seen_by")
    def test_child_left_behind_does_not_hide_the_exit_and_is_killed(self, tmp_path: Path) -> None:
        def measure() -> float:
            directory = Path(tempfile.mkdtemp(dir=tmp_path))
            with Gate(directory / "gate") as gate:
                run = Run(script(fork_holding_output(), wait_file(gate.path), exit_with(3)), directory).start()
                child = int(run.until(OutputLine).text.removeprefix("child "))
                gate.open()
                began = time.monotonic()
                assert run.until(ProcessExited).exit_code == 3
                took_s = time.monotonic() - began
                eventually(lambda: not alive(child))
                run.finish()
            return took_s

        assert_prompt(measure, 0.5)

    @pytest.mark.parametrize("talk", ["signal.pause()", "while True: os.write(1, b'x' * 65536)"])
    def test_child_in_a_session_of_its_own_does_not_hide_the_exit(self, tmp_path: Path, talk: str) -> None:
        """Even if it never stops writing."""
        fork = f"if os.fork() == 0:\n    os.setsid()\n    put(1, 'child ' + str(os.getpid()))\n    {talk}"

        def measure() -> float:
            run = Run(script(Step(fork), pause()), tmp_path).start()
            child = int(run.until(OutputLine).text.removeprefix("child "))
            try:
                began = time.monotonic()
                run.process.signal(signal.SIGKILL)
                assert run.until(ProcessExited).signal == signal.SIGKILL
                took_s = time.monotonic() - began
                assert alive(child) or "write" in talk  # its pipe is no longer read, which ends it
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            run.finish()
            return took_s

        assert_prompt(measure, 2)


class TestSignals:
    @pytest.mark.usefixtures("exit_seen_by")
    def test_program_that_ignores_a_signal_is_ended_by_the_next(self, tmp_path: Path) -> None:
        run = Run(script(on_signal(signal.SIGTERM, [say("caught")]), say("up"), pause()), tmp_path).start()
        run.until(OutputLine, "up")
        run.process.signal(signal.SIGTERM)
        run.until(OutputLine, "caught")
        run.process.signal(signal.SIGKILL)
        assert run.until(ProcessExited).signal == signal.SIGKILL

    def test_signal_before_the_spawn_is_sent_as_soon_as_it_runs(self, tmp_path: Path) -> None:
        run = Run(script(pause()), tmp_path)
        run.process.signal(signal.SIGTERM)
        run.process.signal(signal.SIGKILL)
        run.start()
        assert run.until(ProcessExited).signal == signal.SIGKILL
        assert isinstance(run.finish()[0], ProcessSpawned)

    def test_signal_during_the_spawn_is_sent(self, tmp_path: Path) -> None:
        for _ in range(20):
            run = Run(script(pause()), tmp_path).start()
            run.process.signal(signal.SIGKILL)
            assert run.until(ProcessExited).signal == signal.SIGKILL

    def test_signal_after_the_exit_is_not_sent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The PID could be another process's by then."""
        run = Run(script(), tmp_path).start()
        run.until(ProcessExited)
        sent = []
        monkeypatch.setattr(os, "kill", lambda *call: sent.append(call))
        monkeypatch.setattr(signal, "pidfd_send_signal", lambda *call: sent.append(call))
        run.process.signal(signal.SIGTERM)
        run.process.signal(signal.SIGKILL)
        assert sent == []

    def test_signal_before_an_exited_program_is_reaped_is_harmless(self, tmp_path: Path) -> None:
        for _ in range(20):
            run = Run(script(), tmp_path).start()
            while run.process.thread.is_alive():
                run.process.signal(signal.SIGCONT)
            assert isinstance(run.finish()[-1], ProcessExited)

    def test_signal_is_sent_by_pidfd_and_not_by_pid(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The PID could be another process's, if the program was reaped elsewhere."""

        def refuse(*call: int) -> None:
            raise AssertionError(call)

        run = Run(script(say("up"), pause()), tmp_path).start()
        run.until(OutputLine, "up")
        with monkeypatch.context() as patch:
            patch.setattr(os, "kill", refuse)
            run.process.signal(signal.SIGTERM)
        assert run.until(ProcessExited).signal == signal.SIGTERM

    def test_program_inherits_no_blocked_signal(self, tmp_path: Path) -> None:
        """And the mask of this thread is restored."""
        inspect = Step("put(1, open('/proc/self/status').read().partition('SigBlk:')[2].split()[0])")
        run = Run(script(inspect), tmp_path)
        seen: list[set[int]] = []
        real_run = run.process.thread.run

        def run_blocked() -> None:
            real_run()
            seen.append({int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])})

        run.process.thread.run = run_blocked  # type: ignore[method-assign]
        blocked = {signal.SIGTERM, signal.SIGUSR1}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            run.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        run.finish()
        assert int(run.lines[0], 16) == 0
        assert blocked <= seen[0]


class TestReapedByAnother:
    """The exit code is then unknown, and none is made up."""

    @pytest.mark.usefixtures("exit_seen_by")
    def test_exit_reaped_by_the_kernel_has_no_code(self, tmp_path: Path) -> None:
        before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            for end in (exit_with(7), die_by(signal.SIGKILL)):
                run = Run(script(say("up"), end), tmp_path).start()
                run.finish()
                assert [type(each) for each in run.seen] == [ProcessSpawned, OutputLine, ProcessExited]
                assert run.seen[-1] == ProcessExited(None, None, at=run.seen[-1].at)
        finally:
            signal.signal(signal.SIGCHLD, before)

    @pytest.mark.usefixtures("exit_seen_by")
    def test_exit_reaped_by_another_thread_has_no_code(self, tmp_path: Path) -> None:
        run = Run(script(exit_with(7)), tmp_path)
        run.process.signal(signal.SIGCONT)  # it is sent after the spawn was posted
        with run.held_at(ProcessSpawned) as spawned:
            run.start()
            eventually(lambda: spawned)
            os.waitpid(spawned[0].pid, 0)
        exited = run.finish()[-1]
        assert exited == ProcessExited(None, None, at=exited.at)


class TestFlood:
    """A program that prints faster than its lines are handled is blocked, and costs no memory."""

    LINES = 9_000
    #: So many fit into the pipe (64 KiB) or are read from it (some 1,400) before the program blocks.
    BEFORE_IT_BLOCKS = 6_500

    def flood(self, tmp_path: Path, *end: Step) -> Run:
        printed = tmp_path / "printed"
        words = Step(
            f"for n in range({self.LINES}):\n"
            f"    put(1, 'word ' + str(n).zfill(5))\n"
            f"    if n == {self.BEFORE_IT_BLOCKS}: open({str(printed)!r}, 'w').close()"
        )
        run = Run(script(words, *end), tmp_path)
        run.acks_lines = False
        run.start()
        eventually(lambda: printed.exists() and run.process._posted >= 1000)
        return run

    def test_no_line_is_lost_while_the_program_runs(self, tmp_path: Path) -> None:
        with Gate(tmp_path / "gate") as gate:
            run = self.flood(tmp_path, wait_file(gate.path))
            for _ in range(self.LINES):
                run.until(OutputLine)
                assert run._news.qsize() <= 1000 + (4 << 10)
                run.process.ack_line()
            gate.open()
            run.finish()
        assert run.lines == [f"word {number:05}" for number in range(self.LINES)]

    @pytest.mark.usefixtures("exit_seen_by")
    def test_exit_is_posted_even_if_no_line_is_handled(self, tmp_path: Path) -> None:
        """Its first lines and its last arrive; a line says how many are missing."""
        run = self.flood(tmp_path)
        run.process.signal(signal.SIGKILL)
        assert run.until(ProcessExited).signal == signal.SIGKILL
        (note,) = (number for number, line in enumerate(run.lines) if "left out" in line)
        first, missing, last = run.lines[:note], run.lines[note], run.lines[note + 1 :]
        assert len(first) <= 1000 + (4 << 10)
        assert len(last) == 1000
        assert first == [f"word {number:05}" for number in range(len(first))]
        count = int(missing.removeprefix("… ").removesuffix(" lines left out"))
        assert last[0] == f"word {len(first) + count:05}"
        run.finish()


class TestSecrets:
    """A traceback with local variables shows no secret."""

    SECRET = SecretEnvironment({"NX_DISPLAY": f"cookie={COOKIE}"})

    def test_environment_is_secret(self) -> None:
        assert dict(self.SECRET) == {"NX_DISPLAY": f"cookie={COOKIE}"}
        assert len(self.SECRET) == 1
        assert repr(self.SECRET) == str(self.SECRET) == "<hidden>"
        assert not isinstance(self.SECRET, dict)  # rich would show what is in a dict

    def test_traceback_of_a_failed_creation_shows_no_secret(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            ProxyProcess(
                ["/bin/true"],
                environment=dict(self.SECRET),
                directory=tmp_path,
                log=-1,
                secrets=[COOKIE],
                post=lambda _: None,
            )
        made = caught.tb.tb_next
        assert made is not None
        shown = traceback.TracebackException(OSError, caught.value, made, capture_locals=True)
        assert "directory = " in "".join(shown.format())
        assert COOKIE not in "".join(shown.format())

    def test_traceback_of_a_crashed_run_shows_no_secret(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse() -> None:
            raise OSError("no more descriptors")

        monkeypatch.setattr("proxy_fsm.workers.process.select", types.SimpleNamespace(poll=refuse))
        run = Run(script(pause()), tmp_path, environment=self.SECRET, secrets=[COOKIE]).start()
        run.finish()
        error = run.seen[1].error  # type: ignore[attr-defined]
        shown = traceback.TracebackException.from_exception(error, capture_locals=True)
        assert COOKIE not in "".join(shown.format())


class TestSpawnFails:
    @pytest.fixture
    def programs(self, tmp_path: Path) -> Path:
        for name, content, mode in (
            ("not_executable", "#!/bin/sh\n", 0o600),
            ("no_program", "gibberish\n", 0o700),
            ("no_interpreter", "#!/nonexistent/interpreter\n", 0o700),
        ):
            (tmp_path / name).write_text(content, encoding="ascii")
            (tmp_path / name).chmod(mode)
        (tmp_path / "directory").mkdir()
        (tmp_path / "dangling").symlink_to("nowhere")
        return tmp_path

    @pytest.mark.parametrize(
        ("program", "reason", "problem"),
        [
            ("missing", EndReason.PROXY_NOT_FOUND, "does not exist."),
            ("no/such/directory", EndReason.PROXY_NOT_FOUND, "does not exist."),
            ("not_executable", EndReason.PROXY_NOT_STARTABLE, "cannot be started: Permission denied."),
            ("directory", EndReason.PROXY_NOT_STARTABLE, "cannot be started: Permission denied."),
            ("no_program", EndReason.PROXY_NOT_STARTABLE, "cannot be started: Exec format error."),
            (
                "no_interpreter",
                EndReason.PROXY_NOT_STARTABLE,
                "cannot be started: the interpreter or loader that it names does not exist.",
            ),
            (
                "dangling",
                EndReason.PROXY_NOT_STARTABLE,
                "cannot be started: the interpreter or loader that it names does not exist.",
            ),
        ],
    )
    def test_failed_spawn_is_posted_with_its_reason(
        self, programs: Path, program: str, reason: EndReason, problem: str
    ) -> None:
        path = programs / program
        (failed,) = Run([str(path)], programs).start().finish()
        assert isinstance(failed, SpawnFailed)
        assert failed.error.reason is reason
        assert failed.error.detail == f"The proxy program {path} {problem}"

    @pytest.mark.parametrize(
        ("directory", "problem"), [("missing", "No such file or directory"), ("no_program", "Not a directory")]
    )
    def test_missing_directory_is_distinguished_from_a_missing_program(
        self, programs: Path, directory: str, problem: str
    ) -> None:
        path = programs / directory
        (failed,) = Run(["/bin/true"], path).start().finish()
        assert isinstance(failed, SpawnFailed)
        assert failed.error.reason is EndReason.PROXY_NOT_STARTABLE
        assert failed.error.detail == (
            f"The proxy program /bin/true cannot be started: its directory {path} cannot be entered ({problem})."
        )

    @pytest.mark.parametrize(
        ("command", "environment", "problem"),
        [
            (["/bin/true", "a\0b"], {}, "embedded null byte"),
            (["/bin/true"], {"A": "a\0b"}, "embedded null byte"),
            (["/bin/true"], {"A=": "b"}, "illegal environment variable name"),
            (["/bin/true", 7], {}, "expected str, bytes or os.PathLike object, not int"),
            (["/bin/true"], {"A": 7}, "expected str, bytes or os.PathLike object, not int"),
            ([], {}, "list index out of range"),
        ],
    )
    def test_invalid_command_or_environment_is_posted(
        self, tmp_path: Path, command: list[str], environment: dict[str, str], problem: str
    ) -> None:
        (failed,) = Run(command, tmp_path, environment=environment).start().finish()
        assert isinstance(failed, SpawnFailed)
        assert failed.error.reason is EndReason.PROXY_NOT_STARTABLE
        program = command[0] if command else "without a name"
        assert failed.error.detail == f"The proxy program {program} cannot be started: {problem}."

    def test_too_long_argument_vector_is_posted(self, tmp_path: Path) -> None:
        (failed,) = Run(["/bin/true", "x" * (4 << 20)], tmp_path).start().finish()
        assert isinstance(failed, SpawnFailed)
        assert failed.error.detail == "The proxy program /bin/true cannot be started: Argument list too long."

    def test_signal_to_a_failed_spawn_is_not_sent(self, tmp_path: Path) -> None:
        run = Run([str(tmp_path / "missing")], tmp_path)
        run.process.signal(signal.SIGKILL)
        run.start().finish()
        run.process.signal(signal.SIGKILL)
        assert [type(observation) for observation in run.seen] == [SpawnFailed]

    def test_nothing_is_held_if_no_thread_can_be_started(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        run = Run(["/bin/true"], tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="new thread"):
                run.start()
        assert run.seen == []

    @pytest.mark.usefixtures("exit_seen_by")
    def test_program_that_cannot_be_watched_is_killed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse() -> None:
            raise OSError("no more descriptors")

        monkeypatch.setattr("proxy_fsm.workers.process.select", types.SimpleNamespace(poll=refuse))
        run = Run(script(pause()), tmp_path).start()
        spawned, failed, exited = run.finish()
        assert isinstance(spawned, ProcessSpawned)
        assert isinstance(failed, WorkerCrashed)
        assert (failed.worker, str(failed.error)) == ("process", "no more descriptors")
        assert exited == ProcessExited(None, signal.SIGKILL, at=exited.at)
        assert_reaped(spawned.pid)


class TestLog:
    def test_log_gets_the_lines_without_the_cookie(self, tmp_path: Path) -> None:
        """And so do the observations."""
        log = tmp_path / "session.log"
        log.write_text("before\n", encoding="ascii")
        environment = {"NX_DISPLAY": f"nx/nx,cookie={COOKIE},id=x:51"}
        steps = [print_cookie(), say(f"<{COOKIE.lower()}> é"), Step("os.write(1, b'\\x1b[2Jtail')")]
        run = Run(script(*steps), tmp_path, environment=environment, log=log, secrets=[COOKIE]).start()
        run.finish()
        assert run.lines == ["cookie=<hidden>", "<<hidden>> é", "\\x1b[2Jtail"]
        assert log.read_text(encoding="utf-8") == "".join(f"{line}\n" for line in ["before", *run.lines])

    def test_full_disk_is_posted_once_and_stops_nothing(self, tmp_path: Path) -> None:
        run = Run(script(say("one"), say("two"), say("three"), exit_with(4)), tmp_path, log="/dev/full").start()
        run.finish()
        assert [type(observation) for observation in run.seen] == [
            ProcessSpawned,
            LogFailed,
            OutputLine,
            OutputLine,
            OutputLine,
            ProcessExited,
        ]
        assert isinstance(run.seen[1], LogFailed)
        assert run.seen[1].detail == "The session's log cannot be written any more: No space left on device."
        assert run.lines == ["one", "two", "three"]

    def test_log_does_not_fill_the_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each run may write up to a limit, then one line that says so."""
        monkeypatch.setattr("proxy_fsm.workers.process._MAX_LOG_BYTES", 100)
        log = tmp_path / "session.log"
        log.write_text("before\n" * 100, encoding="ascii")
        run = Run(script(*[say(f"line {number:04}") for number in range(50)]), tmp_path, log=log).start()
        run.finish()
        assert len(run.lines) == 50
        assert log.read_text(encoding="utf-8").splitlines()[100:] == [
            *run.lines[:10],
            "… the rest is left out: this run printed more than 100 bytes",
        ]
        assert not [each for each in run.seen if isinstance(each, LogFailed)]
