"""Secrets stay out of what people read."""

from __future__ import annotations

import traceback

import pytest

from proxy_fsm.redaction import Hidden, Redactor

SECRET = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"it is {SECRET}!", "it is <hidden>!"),
        (f"it is {SECRET.upper()}!", "it is <hidden>!"),
        ("nx/nx,cookie=abc,port=1", "nx/nx,cookie=<hidden>,port=1"),
        ("COOKIE=abc\n", "COOKIE=<hidden>\n"),
        ("nothing of note", "nothing of note"),
    ],
)
def test_secrets_and_what_is_called_a_cookie_are_hidden(text: str, told: str) -> None:
    assert Redactor([SECRET])(text) == told


def test_without_a_secret_nothing_but_a_cookie_is_hidden() -> None:
    assert Redactor()(SECRET) == SECRET
    assert Redactor([""])("cookie=x") == "cookie=<hidden>"


def test_a_traceback_with_local_variables_shows_no_secret() -> None:
    def fails(secrets: Hidden, redact: Redactor) -> None:
        raise ValueError(len(secrets) + len(redact("")))

    with pytest.raises(ValueError, match="1") as failed:
        fails(Hidden([SECRET]), Redactor([SECRET]))
    told = "".join(traceback.TracebackException.from_exception(failed.value, capture_locals=True).format())
    assert "<hidden>" in told
    assert SECRET not in told.replace(f"SECRET = '{SECRET}'", "")


def test_hidden_secrets_are_a_sequence() -> None:
    hidden = Hidden(["a", "b"])
    assert list(hidden) == ["a", "b"]
    assert hidden[0:1] == ("a",)
    assert not isinstance(hidden, list | tuple)
