from __future__ import annotations

import sys
import unicodedata
from difflib import get_close_matches

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentbus.core import names
from agentbus.core.errors import InvalidRequest
from agentbus.core.names import (
    MAX_NAME_CHARS,
    address,
    fit_name,
    folded,
    folder_wish,
    is_kept,
    login_name,
    normalise_name,
    numbered_name,
    session_name,
    similar,
)
from agentbus.core.upgrade import _folder_name_5

PATIENT = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=300, derandomize=True)
LETTERS = st.text(st.characters(categories=["L", "Nd", "Mn", "Mc"]), min_size=1, max_size=12)


@pytest.mark.spec("NAME-1")
@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("backend", "backend"),
        ("Bob Smith", "bob-smith"),
        ("Bob.Smith", "bob.smith"),
        ("  web\n", "web"),
        ("_", "_"),
        ("1", "1"),
        ("a" * 32, "a" * 32),
        ("Möller", "möller"),
        ("MÜLLER", "müller"),
        ("Mu\u0308ller", "müller"),
        ("Straße", "strasse"),
        ("İstanbul", "istanbul"),
        ("日本", "日本"),
        ("проект", "проект"),
        ("ΟΔΟΣ", "οδοσ"),
        ("हिन्दी", "हिन्दी"),
        ("น้ำ", "น้ำ"),
        ("한국", "한국"),
        ("שלום-2", "שלום-2"),
        ("back-日本.v2", "back-日本.v2"),
    ],
)
def test_a_name_has_one_form(raw: str, name: str) -> None:
    assert normalise_name(raw) == name
    assert normalise_name(name) == name
    assert session_name(unicodedata.normalize("NFD", raw)) == name


@pytest.mark.spec("NAME-1")
def test_two_names_are_never_one() -> None:
    assert len({normalise_name(raw) for raw in ("Möller", "Müller", "M-ller", "m.ller", "m_ller", "moller")}) == 6


@pytest.mark.spec("NAME-2", "ERR-1")
@pytest.mark.parametrize(
    ("raw", "meant"),
    [
        ("back, ci", "back"),
        ("back (online)", "back"),
        ("/x/back", "back"),
        ("/x/back/", "back"),
        ("C:\\x\\back", "back"),
        ("#1", "1"),
        ("@back", "back"),
        ("back:", "back"),
        ("back.", "back"),
        ('"back"', "back"),
        ("-x-", "x"),
        ("../etc/passwd", "passwd"),
        ("a*b", "a-b"),
        ("back\nend", "back"),
        ("ba\u200bck", "back"),
        ("\u202eback", "back"),
        ("ｂａｃｋ", "back"),
        ("𝐛𝐚𝐜𝐤", "back"),
        ("日本🎉", "日本"),
    ],
)
def test_what_is_no_name_is_refused_with_the_one_that_was_meant(raw: str, meant: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a name: did you mean") as caught:
        address(raw)
    assert f'did you mean "{meant}"?' in str(caught.value)
    assert normalise_name(meant) == meant


@pytest.mark.spec("NAME-2", "ERR-1")
@pytest.mark.parametrize("raw", ["", "   ", "---", "...", "\0", "*", "🎉", "\u3164", "\u0301"])
def test_a_name_with_nothing_left_is_refused(raw: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a name: use 1 to 32 letters and digits"):
        normalise_name(raw)


@pytest.mark.spec("NAME-2")
@pytest.mark.parametrize("raw", ["all", "Everyone", " everybody ", "@all", "all."])
def test_everybody_is_not_a_name_but_a_broadcast(raw: str) -> None:
    for asked in (address, session_name):
        with pytest.raises(InvalidRequest, match="is not a name: broadcast sends to all who are online"):
            asked(raw)


@pytest.mark.spec("NAME-2")
@pytest.mark.parametrize("length", [33, 128, 129, 100_000])
def test_a_name_that_is_too_long_is_refused(length: int) -> None:
    for letter in "xé":
        with pytest.raises(InvalidRequest, match=f"is {length:,} characters, the limit is 32") as caught:
            normalise_name(letter * length)
        assert len(str(caught.value)) < 200


def test_the_length_is_that_of_the_form() -> None:
    assert normalise_name("e\u0301" * 32) == "é" * 32
    with pytest.raises(InvalidRequest, match="is 34 characters"):
        normalise_name("ß" * 17)


@pytest.mark.spec("NAME-10")
@pytest.mark.parametrize("raw", ["bаckend", "αβγ-x", "рaypal", "Βeta", "\u00b5service", "аα"])
def test_a_mix_of_alphabets_that_look_alike_is_refused(raw: str) -> None:
    with pytest.raises(InvalidRequest, match="mixes two alphabets that look alike"):
        normalise_name(raw)


@pytest.mark.spec("NAME-10")
@pytest.mark.parametrize("raw", ["web-日本", "web-한국", "קוד-web", "api_データ", "проект-日本", "ελλάδα-2"])
def test_other_alphabets_can_stand_together(raw: str) -> None:
    assert normalise_name(raw) == raw


@pytest.mark.parametrize("raw", [None, 7, ["backend"], {"name": "x"}])
def test_a_name_is_text(raw: object) -> None:
    with pytest.raises(InvalidRequest, match="a name is text"):
        normalise_name(raw)


def test_an_unprintable_name_is_quoted_printably() -> None:
    with pytest.raises(InvalidRequest) as caught:
        normalise_name("\x1b[31m" + "\ud800" + "x" * 200)
    assert str(caught.value).isprintable()


@pytest.mark.spec("NAME-3")
@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("My Project", "my-project"),
        ("my.project", "my-project"),
        ("x" * 50, "x" * 32),
        ("", None),
        ("...", None),
        ("a" * 31 + "--b", "a" * 31),
        ("日本語", "日本語"),
        ("Müller & Söhne", "müller---söhne"),
        ("проект", "проект"),
        ("Проект-backend", "backend"),
        ("ｂａｃｋ", "back"),
        ("🎉party", "party"),
        ("🎉", "party-popper"),
    ],
)
def test_a_folder_becomes_a_name(raw: str, name: str | None) -> None:
    assert fit_name(raw) == name


@pytest.mark.parametrize(
    ("name", "number", "numbered"),
    [
        ("web", 2, "web-2"),
        ("x" * 32, 2, "x" * 30 + "-2"),
        ("x" * 32, 100, "x" * 28 + "-100"),
        ("a-" * 16, 3, "a-" * 14 + "a-3"),
        ("a." * 15 + "ab", 3, "a." * 14 + "a-3"),
    ],
)
def test_a_numbered_name_is_a_name(name: str, number: int, numbered: str) -> None:
    assert numbered_name(name, number) == numbered
    assert normalise_name(numbered) == numbered


@pytest.mark.spec("NAME-11")
@pytest.mark.parametrize("raw", ["user", "User", "human", "SYSTEM", "assistant", "agentbus", "claude", login_name()])
def test_no_session_can_have_the_name_of_an_authority(raw: str) -> None:
    assert address(raw) == raw.lower(), "mail can be sent to it"
    with pytest.raises(InvalidRequest, match="no session can have the name"):
        session_name(raw)


@pytest.mark.spec("NAME-3", "NAME-11")
def test_a_folder_that_is_called_so_makes_no_such_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("/src/user", "/src/Claude", f"/home/{login_name()}", "/src/all", "/"):
        assert folder_wish(folder) == "agent"
    monkeypatch.setattr(names, "login_name", lambda: "agent")
    assert folder_wish("/") == "session"


# -- for every text ----------------------------------------------------------------------------------------


@pytest.mark.spec("NAME-1")
@given(LETTERS)
@PATIENT
def test_the_form_is_the_same_however_the_text_is_written(raw: str) -> None:
    try:
        name = normalise_name(raw)
    except InvalidRequest:
        return
    names._known.clear()  # what is known is not looked at again
    assert normalise_name(name) == name
    for form in ("NFC", "NFD"):
        assert normalise_name(unicodedata.normalize(form, raw)) == name
    assert normalise_name(raw.upper()) == name or folded(raw.upper()) != folded(raw)
    assert name.isprintable()
    assert not set(name) & set(" \"'<>&\\/@#,;:()")
    assert normalise_name(numbered_name(name, 12)) == numbered_name(name, 12)


@pytest.mark.spec("NAME-3")
@given(st.text(max_size=60))
@PATIENT
def test_a_folder_makes_a_name_that_is_in_its_form(raw: str) -> None:
    name = fit_name(raw)
    assert name is None or (normalise_name(name) == name and len(name) <= MAX_NAME_CHARS)
    wish = folder_wish(raw)
    assert session_name(wish) == wish
    assert not is_kept(wish)


@pytest.mark.spec("NAME-3", "NAME-14")
@given(st.text(st.characters(max_codepoint=127), max_size=60))
@PATIENT
def test_a_folder_in_ascii_makes_the_name_that_it_always_made(raw: str) -> None:
    base = raw.replace("/", "")
    assert (fit_name(base) or "agent") == _folder_name_5(f"/src/{base}") or base in ("", ".", "..")


@pytest.mark.spec("NAME-1")
def test_folding_twice_changes_nothing_for_every_character() -> None:
    assert [one for one in map(chr, range(0x110000)) if folded(folded(one)) != folded(one)] == []


@pytest.mark.spec("SEND-5")
@given(st.text("abn-ü", min_size=1, max_size=9), st.lists(st.text("abn-ü", min_size=1, max_size=9), max_size=5))
@PATIENT
def test_difflib_is_asked_about_every_name_that_it_calls_similar(asked: str, there: list[str]) -> None:
    assert similar(asked, there) == tuple(get_close_matches(asked, there, n=3, cutoff=0.6))


@pytest.mark.spec("SEND-5", "CLI-1")
def test_difflib_is_not_asked_about_names_that_have_little_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    assert similar("backnd", ["backend", "web"]) == ("backend",)
    monkeypatch.setitem(sys.modules, "difflib", None)
    assert similar("ci", ["backend", "web"]) == ()
