"""Keeps secrets out of what people read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import overload

__all__ = ["Hidden", "Redactor"]


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
        return "<hidden>"


class Redactor:
    """Hides secrets in texts, in any case of their letters, and whatever follows ``cookie=``.

    Args:
        secrets: What is hidden.
    """

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        words = [re.escape(secret) for secret in secrets if secret]
        # A value called cookie is none of a log's business, whoever it belongs to.
        self._pattern = re.compile("|".join([*words, r"(?<=cookie=)[^,\s'\"]+"]), re.IGNORECASE)

    def __call__(self, text: str) -> str:
        """Return the text without its secrets."""
        return self._pattern.sub("<hidden>", text)

    def __repr__(self) -> str:
        return "<Redactor>"
