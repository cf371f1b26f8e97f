"""Text that is shown contains no secret and no control character."""

from __future__ import annotations

import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy_fsm.text import REDACTED, Redactor, SecretEnvironment, Secrets, excerpt, printable

SECRET = "0123456789abcdef0123456789abcdef"


class TestPrintable:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("plain … 漢字", "plain … 漢字"),
            ("\x1b[2J", "\\x1b[2J"),
            ("a\x9bc\r\n\t", "a\\x9bc\\r\\n\\t"),
            ("\u202e\U000e0001\ud800", "\\u202e\\U000e0001\\ud800"),
        ],
    )
    def test_control_characters_are_escaped(self, text: str, shown: str) -> None:
        assert printable(text) == shown

    def test_characters_to_keep_are_not_escaped(self) -> None:
        assert printable("a\tb\n", keep="\t") == "a\tb\\n"

    @given(st.text(st.characters()))
    def test_printable_is_idempotent(self, text: str) -> None:
        assert printable(text).isprintable()
        assert printable(printable(text)) == printable(text)


class TestExcerpt:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("short", "short"),
            ("x" * 200, "x" * 200),
            ("x" * 201, "x" * 200 + "…"),
            ("\x1b[2J", "\\x1b[2J"),
            (f"key={SECRET.upper()}!", f"key={REDACTED}!"),
            ("0123456789abcdef", REDACTED),
            ("0123456789abcde", "0123456789abcde"),
        ],
    )
    def test_untrusted_text_is_made_safe_to_show(self, text: str, shown: str) -> None:
        assert excerpt(text) == shown

    @given(st.integers(0, 300), st.integers(1, 300))
    def test_truncation_leaves_no_part_of_a_secret(self, before: int, max_chars: int) -> None:
        shown = excerpt("-" * before + SECRET, max_chars)
        assert not set(shown) & set("0123456789")
        assert len(shown) <= max_chars + 1


class TestRedactor:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            (f"it is {SECRET}!", f"it is {REDACTED}!"),
            (f"it is {SECRET.upper()}!", f"it is {REDACTED}!"),
            ("nx/nx,cookie=abc,port=1", f"nx/nx,cookie={REDACTED},port=1"),
            ("COOKIE=abc\n", f"COOKIE={REDACTED}\n"),
            ("nothing of note", "nothing of note"),
        ],
    )
    def test_secrets_and_cookie_values_are_redacted(self, text: str, shown: str) -> None:
        assert Redactor([SECRET])(text) == shown

    def test_only_cookie_values_are_redacted_without_secrets(self) -> None:
        assert Redactor()(SECRET) == SECRET
        assert Redactor([""])("cookie=x") == f"cookie={REDACTED}"

    def test_cookie_values_are_kept_if_asked(self) -> None:
        assert Redactor([SECRET], cookie_values=False)(f'{{"a": "cookie=x", "b": "{SECRET}"}}') == (
            f'{{"a": "cookie=x", "b": "{REDACTED}"}}'
        )
        assert Redactor(cookie_values=False)(f"cookie={SECRET}") == f"cookie={SECRET}"

    def test_added_secret_is_redacted_from_then_on(self) -> None:
        redact = Redactor(cookie_values=False)
        redact.add("")
        assert redact("abc") == "abc"
        redact.add("B.")
        assert redact("abc ab.") == f"abc a{REDACTED}"

    def test_secret_that_begins_with_another_is_redacted_whole(self) -> None:
        assert Redactor(["abc", "abcdef"])("abcdef abc") == f"{REDACTED} {REDACTED}"

    def test_repr_shows_no_secret(self) -> None:
        assert repr(Redactor([SECRET])) == "<Redactor>"


class TestSecrets:
    def test_traceback_with_local_variables_shows_no_secret(self) -> None:
        def fails(secrets: Secrets, environment: SecretEnvironment, redact: Redactor) -> None:
            raise ValueError(len(secrets) + len(environment) + len(redact("")))

        with pytest.raises(ValueError, match="2") as failed:
            fails(Secrets([SECRET]), SecretEnvironment({"NX_DISPLAY": SECRET}), Redactor([SECRET]))
        shown = "".join(traceback.TracebackException.from_exception(failed.value, capture_locals=True).format())
        assert shown.count(REDACTED) >= 2
        assert SECRET not in shown.replace(f"SECRET = '{SECRET}'", "")

    def test_secrets_are_a_sequence_but_not_a_list(self) -> None:
        secrets = Secrets(["a", "b"])
        assert list(secrets) == ["a", "b"]
        assert secrets[0:1] == ("a",)
        assert not isinstance(secrets, list | tuple)

    def test_environment_is_a_mapping_but_not_a_dict(self) -> None:
        environment = SecretEnvironment({"A": "b"})
        assert dict(environment) == {"A": "b"}
        assert not isinstance(environment, dict)
