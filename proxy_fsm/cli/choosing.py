"""Asks a person at a terminal which session to resume."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.prompt import Confirm, IntPrompt
from rich.text import Text

from proxy_fsm import SessionStatus
from proxy_fsm.cli.verb import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from proxy_fsm import ListedSession

__all__ = ["choose"]


def choose(listed: Sequence[ListedSession], redact: Callable[[str], str]) -> tuple[str, bool]:
    """Ask which session to resume.

    Args:
        listed: The sessions that the server lists.
        redact: Hides secrets in what is shown.

    Returns:
        The session's name, and whether to take it over from where it is shown.

    Raises:
        UsageError: There is no session to choose, or none was chosen.
    """
    sessions = [each for each in listed if each.status is not SessionStatus.FINISHED]
    if not sessions:
        raise UsageError("There is no session on the server.", "Start one with --command PROGRAM.")
    console = Console(stderr=True)
    for number, session in enumerate(sessions, start=1):
        line = f"{number}  {session.info.name}  {session.status}, created {session.created}"
        console.print(Text(redact(line)), soft_wrap=True)
    try:
        choices = [str(number) for number in range(1, len(sessions) + 1)]
        number = IntPrompt.ask("Which session", console=console, choices=choices, default=1)
        chosen = sessions[number - 1]
        take_over = chosen.status is SessionStatus.RUNNING
        client = redact(chosen.client) or "an unknown address"
        if take_over and not Confirm.ask(
            Text(f"It is shown at {client}. Take it over?"), console=console, default=False
        ):
            raise UsageError("The session was left where it is shown.")
    except EOFError as error:
        raise UsageError("No session was chosen.", "Give --session NAME, or --command PROGRAM.") from error
    return chosen.info.name, take_over
