"""Keeps secrets out of what people read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import overload

__all__ = ["REDACTED", "Hidden", "Redactor", "SecretEnvironment"]

#: What stands where a secret was.
REDACTED = "<hidden>"


class Hidden(Sequence[str]):
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
    """An environment in which secrets are: its repr shows nothing.

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
        return "<environment>"


class Redactor:
    """Hides secrets in texts, in any case of their letters, and whatever follows ``cookie=``.

    Args:
        secrets: What is hidden.
    """

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        # A value called cookie is none of a log's business, whoever it belongs to.
        words = [r"(?<=cookie=)[^,\s]+", *(re.escape(secret) for secret in secrets if secret)]
        self._pattern = re.compile("|".join(words), re.IGNORECASE | re.ASCII)

    def __call__(self, text: str) -> str:
        """Return the text without its secrets."""
        return self._pattern.sub(REDACTED, text)

    def __repr__(self) -> str:
        return "<Redactor>"
