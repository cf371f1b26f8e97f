"""What makes text harmless: secrets hidden, control characters spelled out, excerpts cut to a length."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import overload

__all__ = ["REDACTED", "Redactor", "SecretEnvironment", "Secrets", "excerpt", "printable"]

#: What replaces a secret.
REDACTED = "<hidden>"
#: A cookie has 32 hexadecimal digits; half of one is too much already.
_SECRET_LIKE = re.compile(r"[0-9A-Fa-f]{16,}")
#: The value of every ``cookie=``, not just of this session's.
_COOKIE_VALUE = r"(?<=cookie=)[^,\s]+"


def printable(text: str, *, keep: str = "") -> str:
    """Return a text with its control characters, and whatever else cannot be shown, spelled out as in Python.

    Args:
        text: The text.
        keep: Characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text)


def excerpt(text: str, max_chars: int = 200) -> str:
    """Return the beginning of a foreign text, fit to be shown: printable, without what looks like a secret.

    Args:
        text: The text.
        max_chars: How many characters are shown; an ellipsis marks where it was cut.
    """
    harmless = _SECRET_LIKE.sub(REDACTED, printable(text))
    return harmless if len(harmless) <= max_chars else f"{harmless[:max_chars]}…"


class Redactor:
    """Hides secrets in texts, in any case of their letters, and the value of every ``cookie=``.

    Args:
        secrets: What is hidden.
        cookie_values: Whether the value of every ``cookie=`` is hidden too. Not in JSON: such a value ends at a comma
            or a blank, behind the quotation mark.
    """

    def __init__(self, secrets: Sequence[str] = (), *, cookie_values: bool = True) -> None:
        longest_first = sorted(filter(None, secrets), key=len, reverse=True)  # one may begin with another
        words = [*([_COOKIE_VALUE] if cookie_values else []), *map(re.escape, longest_first)]
        self._patterns = [_any_case("|".join(words))] if words else []

    def add(self, secret: str) -> None:
        """Hide one more secret from now on; on any thread."""
        if secret:
            self._patterns.append(_any_case(re.escape(secret)))

    def __call__(self, text: str) -> str:
        """Return the text without its secrets."""
        for pattern in self._patterns:
            text = pattern.sub(REDACTED, text)
        return text

    def __repr__(self) -> str:
        return "<Redactor>"


def _any_case(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE | re.ASCII)


class Secrets(Sequence[str]):
    """Secrets, whose repr shows none of them.

    Tracebacks may show local variables; what shows those looks into lists and their subclasses, so this is none.
    """

    def __init__(self, secrets: Sequence[str]) -> None:
        self._secrets = tuple(secrets)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._secrets[index]

    def __len__(self) -> int:
        return len(self._secrets)

    def __repr__(self) -> str:
        return REDACTED


class SecretEnvironment(Mapping[str, str]):
    """An environment with secrets in it, whose repr shows nothing.

    Tracebacks with local variables show a repr; rich, and structlog with it, look into a dict and its subclasses.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = dict(variables)

    def __getitem__(self, name: str) -> str:
        return self._variables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._variables)

    def __len__(self) -> int:
        return len(self._variables)

    def __repr__(self) -> str:
        return REDACTED
