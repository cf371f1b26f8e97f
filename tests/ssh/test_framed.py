"""A script's output is told apart from all else that an account prints, in every login shell."""

from __future__ import annotations

import os
import re
import shutil
import string
import subprocess
import sys
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy_fsm.ssh import CommandFailed, CommandNotRun, FramedCommand, TransportClosed
from proxy_fsm.ssh.framed import frame, framed_output, script_in, unframe, word, words
from tests.helpers.wait import WAIT_S

if TYPE_CHECKING:
    import paramiko

    from proxy_fsm.testing import LoopbackSSHServer

MARK = "0123456789abcdef0123456789abcdef"
PRINTABLE = string.printable[:95]
SHELLS = [shell for shell in ("sh", "bash", "dash", "zsh", "tcsh", "csh", "fish", "ksh", "mksh") if shutil.which(shell)]


class TestFrame:
    @pytest.mark.parametrize("shell", SHELLS)
    def test_each_shell_passes_every_printable_character(self, shell: str) -> None:
        script = f"printf %s {word(PRINTABLE)}; printf %s {word('on stderr')} >&2; (exit 7)"
        done = subprocess.run([shell, "-c", frame(script, MARK)], capture_output=True, check=False)
        assert unframe(done.stdout, MARK) == (PRINTABLE, 7)
        assert unframe(done.stderr, MARK) == ("on stderr", 7)
        assert done.returncode == 0

    @pytest.mark.parametrize("shell", SHELLS)
    def test_script_has_a_shell_above_its_parent(self, shell: str) -> None:
        """X2Go's commands note the parent of their parent, and later end it if it is an sshd: not this connection's."""
        above = 'import os; print(open(f"/proc/{os.getppid()}/status").read().split("PPid:")[1].split()[0])'
        line = frame(f"{word(sys.executable)} -c {word(above)}", MARK)
        with subprocess.Popen([shell, "-c", line], stdout=subprocess.PIPE) as process:
            output = process.communicate()[0]
        answer = unframe(output, MARK)
        assert answer is not None
        assert int(answer[0]) != os.getpid()

    @pytest.mark.parametrize("shell", SHELLS)
    def test_words_stay_apart(self, shell: str) -> None:
        texts = ["a", "", "b c", "-n", "$HOME", "*", "'", '"', "!", "\\", "\\n", "`id`", "$(id)", "a=b", "~", "#", ";"]
        script = f"printf %s:: {words(texts)}"
        done = subprocess.run([shell, "-c", frame(script, MARK)], capture_output=True, check=False)
        assert unframe(done.stdout, MARK) == ("".join(f"{text}::" for text in texts), 0)

    @pytest.mark.parametrize("shell", SHELLS)
    @pytest.mark.parametrize("script", ["true", "true;", "true &", "exit 0", "{ true; }"])
    def test_script_may_end_as_any_list_of_commands(self, shell: str, script: str) -> None:
        done = subprocess.run([shell, "-c", frame(script, MARK)], capture_output=True, check=False)
        assert unframe(done.stdout, MARK) == unframe(done.stderr, MARK) == ("", 0)

    @given(st.text(alphabet=PRINTABLE))
    def test_word_needs_nothing_that_a_login_shell_changes(self, text: str) -> None:
        quoted = word(text)
        assert not set(quoted) & set("'!\n")
        assert re.search(r"\\(?!0[0-7]{3})", quoted) is None

    @pytest.mark.parametrize("text", ["é", "a\nb", "\0", "\x7f"])
    def test_other_characters_are_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="printable ASCII"):
            word(text)

    def test_script_is_found_in_its_frame(self) -> None:
        assert script_in(frame('x "y" >/dev/null; z', MARK)) == ('x "y" >/dev/null; z', MARK)
        assert script_in("sh -c 'echo hello'") is None


class TestUnframe:
    @given(st.binary(), st.binary(), st.binary(), st.integers(0, 255))
    @example(b"no end of line", b"", b"", 0)
    @example(b"\n" + MARK[:-1].encode(), b"\n", b"\n" + MARK[1:].encode(), 1)
    def test_noise_around_changes_nothing(self, before: bytes, output: bytes, after: bytes, status: int) -> None:
        """A mark is random: what else is printed does not contain it."""
        framed = before + framed_output(output, MARK, status) + after
        assert unframe(framed, MARK) == (output.decode("utf-8", "replace"), status)

    @given(st.binary(), st.binary(), st.integers(0, 255), st.data())
    def test_output_that_was_cut_is_never_taken_for_whole(
        self, before: bytes, output: bytes, status: int, data: st.DataObject
    ) -> None:
        framed = before + framed_output(output, MARK, status)
        cut = framed[: data.draw(st.integers(0, len(framed) - 1))]
        answer = unframe(cut, MARK)
        assert answer is None or answer[1] is None

    def test_account_that_merges_its_outputs_changes_nothing(self) -> None:
        line = f"exec 2>&1; {frame('echo answer', MARK)}"
        done = subprocess.run(["sh", "-c", line], capture_output=True, check=False)
        assert unframe(done.stdout, MARK) == ("answer\n", 0)

    def test_command_that_a_shell_echoes_is_no_mark(self) -> None:
        """As with ``set -x`` in a start-up file."""
        noise = f"+ {frame('true', MARK)}\n".encode()
        assert unframe(noise + framed_output(b"x", MARK, 0), MARK) == ("x", 0)
        assert unframe(noise, MARK) is None


class TestFramedCommand:
    def test_output_between_the_marks_is_returned(
        self, server: LoopbackSSHServer, transport: paramiko.Transport
    ) -> None:
        server.commands = {"greet": lambda line: (3, line.encode(), b"careful")}
        completed = FramedCommand(transport, "LANG=C greet you").run()
        assert (completed.output, completed.errors, completed.exit_status) == (b"greet you", b"careful", 3)
        assert "greet" not in repr(completed)

    @pytest.mark.parametrize(
        ("output", "errors", "quoted"),
        [
            (b"This account is currently not available.\n", b"", '"This account is currently not available."'),
            (b"", b"sorry,\n not you\x1b[2J\n", '"sorry, not you\\x1b[2J"'),
            (b"", b"", "printed nothing (exit status 1)"),
            (b"x" * 1000, b"", "x" * 300 + "…"),
        ],
    )
    def test_account_that_runs_other_things_is_quoted(
        self,
        server: LoopbackSSHServer,
        transport: paramiko.Transport,
        monkeypatch: pytest.MonkeyPatch,
        *,
        output: bytes,
        errors: bytes,
        quoted: str,
    ) -> None:
        """As nologin, a forced command, and an account for sftp alone do."""
        monkeypatch.setattr("proxy_fsm.testing.ssh_server.script_in", lambda _: None)
        server.commands = {"sh": lambda _: (1, output, errors)}
        with pytest.raises(CommandNotRun) as caught:
            FramedCommand(transport, "true").run()
        assert quoted in str(caught.value)

    def test_refused_command_is_not_run(self, transport: paramiko.Transport, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("proxy_fsm.testing.ssh_server._Interface.check_channel_exec_request", lambda *_: False)
        with pytest.raises(CommandNotRun, match="does not run commands"):
            FramedCommand(transport, "true").run()
        assert transport.is_active()

    def test_answer_is_returned_though_another_program_has_the_outputs_open(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As one that a start-up file has left in the background: then no end of the outputs follows the last mark."""
        monkeypatch.setattr("proxy_fsm.testing.ssh_server._close", lambda _: None)
        server.commands = {"greet": lambda _: (0, b"hello", b"")}
        answers: SimpleQueue[bytes] = SimpleQueue()
        command = FramedCommand(transport, "greet")
        threading.Thread(target=lambda: answers.put(command.run().output), daemon=True).start()
        assert answers.get(timeout=WAIT_S) == b"hello"

    def test_script_that_is_cut_short_is_an_error(
        self, server: LoopbackSSHServer, transport: paramiko.Transport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("proxy_fsm.testing.ssh_server.framed_output", lambda *args: framed_output(*args)[:-3])
        server.commands = {"true": lambda _: (0, b"", b"")}
        with pytest.raises(CommandFailed, match="cut the command short"):
            FramedCommand(transport, "true").run()

    def test_transport_that_ends_is_reported(self, server: LoopbackSSHServer, transport: paramiko.Transport) -> None:
        def drop(_line: str) -> tuple[int, bytes, bytes]:
            server.drop()
            return 0, b"", b""

        server.commands = {"true": drop}
        with pytest.raises(TransportClosed):
            FramedCommand(transport, "true").run()
