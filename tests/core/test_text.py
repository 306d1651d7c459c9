"""What others chose, made fit to be shown."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentbus.adapters.mcp.element import client_chars
from agentbus.core.text import MAX_WORD_CHARS, escaped, one_line, word

ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=400)


@pytest.mark.spec("TRUST-5")
@given(ANY_TEXT, st.integers(7, 300))
def test_a_value_is_one_printable_line_of_bounded_length(value: str, most: int) -> None:
    shown = one_line(value, most)
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    assert not any(unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp") for one in shown)
    assert client_chars(shown) <= most
    shown.encode()
    assert one_line(shown, most) == shown
    if client_chars(escaped(value)) <= most:
        assert shown == escaped(value)
    else:
        # Nothing is cut in the middle of an escape: both ends are ends of the whole, character by character.
        # A value can have dots of its own beside the cut.
        cuts = [(shown[:at], shown[at + 3 :]) for at in range(len(shown)) if shown.startswith("...", at)]
        heads = {escaped(value[:count]) for count in range(len(value) + 1)}
        assert any(head in heads and escaped(value).endswith(tail) for head, tail in cuts)


@pytest.mark.spec("TRUST-5")
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/me/Möller 日本 🎉", "/home/me/Möller 日本 🎉"),
        ("a\x1b[2Jb\nc\td\x9b\x7f", "a\\x1b[2Jb\\nc\\td\\x9b\\x7f"),
        ("\u202e\u2066\u200b\u061c\ufeff\u2028\xad", "\\u202e\\u2066\\u200b\\u061c\\ufeff\\u2028\\xad"),
        # A text that nobody sees, in variation selectors and in tag characters.
        ("x\ufe0f\U000e0101\U000e0041\u3164", "x\\ufe0f\\U000e0101\\U000e0041\\u3164"),
        ("\udcff", "\\udcff"),
        ("a\\nb", "a\\nb"),
        ("", ""),
    ],
)
def test_what_is_not_printable_is_shown_as_its_escape(value: str, shown: str) -> None:
    assert one_line(value) == escaped(value) == shown


@pytest.mark.spec("TRUST-5")
def test_what_is_too_long_is_cut_in_the_middle() -> None:
    assert one_line("/home/" + "x" * 200 + "/project", 32) == "/home/xxxxxxxxx...xxxxxx/project"
    assert one_line("\x1b" * 40, 16) == "\\x1b...\\x1b", "no escape is cut"
    assert one_line("🎉" * 40, 16) == "🎉🎉🎉...🎉🎉🎉", "each counts as two"
    assert len(word("r" * 50_000_000)) == MAX_WORD_CHARS
    assert word(None) == ""
