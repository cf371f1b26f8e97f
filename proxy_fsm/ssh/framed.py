"""A script that `sh` runs on the server, whose output is separated from all that the account's own shell prints.

A login shell reads start-up files before it runs a command, and some print: a greeting, an error, a warning. So both
outputs are framed: a line with a random mark comes before what the script prints, and one after it.
"""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING

from proxy_fsm.ssh.command import CompletedCommand, RemoteCommand
from proxy_fsm.ssh.errors import CommandFailed, CommandNotRun
from proxy_fsm.text import excerpt

if TYPE_CHECKING:
    from collections.abc import Sequence

    import paramiko

__all__ = ["FramedCommand", "frame", "framed_output", "script_in", "unframe", "word", "words"]

_PLAIN_WORD = re.compile(r"[A-Za-z0-9_./:@%+=,-]+")
#: All others are written as ``\\0`` and three octal digits, which no login shell changes.
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9 _./:@%+=,(){}\[\]<>|&;*?#~^-]")
_FRAMED = re.compile(
    r"sh -c '\{ echo; echo (?P<mark>\w+) begin; \} >&2; .*?; \( \( (?P<script>.*) \); exit \$\? \); status=\$\?; .*'"
)
_QUOTED_CHARS = 300


def word(text: str) -> str:
    """Quote one word for a script.

    Args:
        text: Printable ASCII.

    Returns:
        The word without single quotes, exclamation marks, backslashes before a quote or line ends: what `FramedCommand`
        can pass through sh, bash, dash, zsh, csh, tcsh and fish alike.
    """
    if not text.isascii() or not text.isprintable():
        raise ValueError("A word of a remote script must be printable ASCII.")
    if _PLAIN_WORD.fullmatch(text):
        return text
    encoded = _NOT_PLAIN.sub(lambda match: f"\\0{ord(match[0]):03o}", text)
    return f'"{text}"' if encoded == text else f'"$(printf %b "{encoded}")"'


def words(texts: Sequence[str]) -> str:
    """Quote words for a script, and join them."""
    return " ".join(map(word, texts))


def frame(script: str, mark: str) -> str:
    """Return the command line that runs a script in `sh`, framed.

    The script has a shell of its own, and that has another above it. X2Go's commands note the parent of their parent,
    and end it when the session is resumed, if it is an sshd: it would be the one that serves this connection.

    Args:
        script: One line without single quotes and exclamation marks, which may end with ``&``; words are quoted by
            `word`.
        mark: Letters and digits that nothing else prints.
    """
    begin, end = f"echo; echo {mark} begin", f"echo; echo {mark} end"
    framed = (
        f"{{ {begin}; }} >&2; {begin}; ( ( {script} ); exit $? ); status=$?; {end} $status; {{ {end} $status; }} >&2"
    )
    return f"sh -c '{framed}'"


def script_in(line: str) -> tuple[str, str] | None:
    """Return the script and the mark of a command line that `frame` made; None for any other."""
    framed = _FRAMED.fullmatch(line)
    return None if framed is None else (framed["script"], framed["mark"])


def framed_output(output: bytes, mark: str, exit_status: int) -> bytes:
    """Return what a framed script that prints this prints in all."""
    return b"\n%b begin\n%b\n%b end %d\n" % (mark.encode(), output, mark.encode(), exit_status)


def unframe(output: bytes, mark: str) -> tuple[str, int | None] | None:
    """Find what a framed script printed on one of its outputs.

    Args:
        output: All that came.
        mark: As in `frame`.

    Returns:
        The text, with replacement characters for what is not UTF-8, and the exit status, None where the end is missing;
        None where even the beginning is missing.
    """
    # The last one: where an account merges both outputs, that of the other comes first.
    _, begun, rest = output.rpartition(f"\n{mark} begin\n".encode())
    if not begun:
        return None
    end = re.search(rb"\n" + mark.encode() + rb" end (\d{1,3})\n", rest)
    text = (rest if end is None else rest[: end.start()]).decode("utf-8", "replace")
    return text, None if end is None else int(end[1])


class FramedCommand:
    """One script, run once by `sh` on the server; as `RemoteCommand`.

    Args:
        transport: An authenticated transport.
        script: As in `frame`.
    """

    def __init__(self, transport: paramiko.Transport, script: str) -> None:
        self._mark = secrets.token_hex(16)
        self._command = RemoteCommand(transport, frame(script, self._mark), last_line=f"{self._mark} end ".encode())

    def run(self) -> CompletedCommand:
        """Run it, and return what it printed between the marks, and its own exit status.

        Raises:
            NotOpened: As `RemoteCommand.run`.
            CommandNotRun: The account runs other things than the script; the message quotes what it printed.
            CommandFailed: The script was cut short, or printed more than 1 MiB.
            CommandCancelled: `cancel` was called.
        """
        completed = self._command.run()
        answer = unframe(completed.output, self._mark)
        errors = unframe(completed.errors, self._mark)
        if answer is None:
            raise CommandNotRun(_instead(completed))
        text, status = answer
        if status is None:
            raise CommandFailed("The server cut the command short.")
        return CompletedCommand(text.encode(), (errors[0] if errors is not None else "").encode(), status)

    def cancel(self) -> None:
        """As `RemoteCommand.cancel`."""
        self._command.cancel()


def _instead(completed: CompletedCommand) -> str:
    """Say what an account did instead of running a script."""
    for output in (completed.output, completed.errors):
        lines = [line.strip() for line in output.decode("utf-8", "replace").splitlines()]
        if text := excerpt(" ".join(filter(None, lines)), _QUOTED_CHARS):
            return f'The account runs no commands on the server, which said instead: "{text}".'
    return f"The account runs no commands on the server, which printed nothing (exit status {completed.exit_status})."
