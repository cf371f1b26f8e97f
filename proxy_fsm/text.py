"""Makes text safe to show: secrets redacted, control characters escaped, excerpts truncated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import overload

__all__ = ["REDACTED", "Redactor", "SecretEnvironment", "Secrets", "excerpt", "printable"]

#: What replaces a secret.
REDACTED = "<hidden>"
#: A cookie has 32 hexadecimal digits; half of one is already too much to show.
_SECRET_LIKE = re.compile(r"[0-9A-Fa-f]{16,}")
#: The value of every ``cookie=``, not just of this session's.
_COOKIE_VALUE = r"(?<=cookie=)[^,\s]+"


def printable(text: str, *, keep: str = "") -> str:
    """Escape control characters and all others that cannot be printed, as Python does.

    Args:
        text: The text.
        keep: Characters that are not escaped.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text)


def excerpt(text: str, max_chars: int = 200) -> str:
    """Return the beginning of an untrusted text, safe to show: printable, without anything that looks like a secret.

    Args:
        text: The text.
        max_chars: How many characters are kept; an ellipsis marks a cut.
    """
    safe = _SECRET_LIKE.sub(REDACTED, printable(text))
    return safe if len(safe) <= max_chars else f"{safe[:max_chars]}…"


class Redactor:
    """Redacts secrets in texts, in upper or lower case, and the value of every ``cookie=``.

    Args:
        secrets: What to redact.
        cookie_values: Whether to redact the value of every ``cookie=`` too. Not for JSON: such a value ends at a comma
            or a blank, and so after the closing quotation mark.
    """

    def __init__(self, secrets: Sequence[str] = (), *, cookie_values: bool = True) -> None:
        longest_first = sorted(filter(None, secrets), key=len, reverse=True)  # one may begin with another
        words = [*([_COOKIE_VALUE] if cookie_values else []), *map(re.escape, longest_first)]
        self._patterns = [_any_case("|".join(words))] if words else []

    def add(self, secret: str) -> None:
        """Redact one more secret from now on; may be called on any thread."""
        if secret:
            self._patterns.append(_any_case(re.escape(secret)))

    def __call__(self, text: str) -> str:
        """Return the text with its secrets redacted."""
        for pattern in self._patterns:
            text = pattern.sub(REDACTED, text)
        return text

    def __repr__(self) -> str:
        return "<Redactor>"


def _any_case(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE | re.ASCII)


class Secrets(Sequence[str]):
    """A sequence of secrets whose repr shows none of them.

    Tracebacks may show local variables; the tools that render them look into lists and their subclasses, so this is
    not one.
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
    """An environment that holds secrets, whose repr shows none of it.

    Tracebacks may show local variables; rich, and structlog with it, look into dicts and their subclasses, so this is
    not one.
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
