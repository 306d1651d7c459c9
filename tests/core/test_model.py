from __future__ import annotations

import pytest

from agentbus.core.errors import InvalidRequest
from agentbus.core.model import check_body, fit_name, normalise_name, numbered_name, timestamp


@pytest.mark.spec("NAME-1")
@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("backend", "backend"),
        ("Bob Smith", "bob-smith"),
        ("bob smith", "bob-smith"),
        ("Bob.Smith", "bob-smith"),
        ("  web\n", "web"),
        ("../etc/passwd", "etc-passwd"),
        ("a*b", "a-b"),
        ("-x-", "x"),
        ("_", "_"),
        ("a" * 32, "a" * 32),
        ("Ünïcode", "n-code"),
    ],
)
def test_a_name_has_one_form(raw: str, name: str) -> None:
    assert normalise_name(raw) == name
    assert normalise_name(name) == name


@pytest.mark.spec("NAME-2", "ERR-1")
@pytest.mark.parametrize("raw", ["", "   ", "---", "...", "\0", "日本", "*"])
def test_a_name_with_nothing_left_is_refused(raw: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a name: use 1 to 32 of a-z, 0-9, _ and -"):
        normalise_name(raw)


@pytest.mark.spec("NAME-2")
@pytest.mark.parametrize("length", [33, 128, 129, 100_000])
def test_a_name_that_is_too_long_is_refused(length: int) -> None:
    with pytest.raises(InvalidRequest, match=f"is {length:,} characters, the limit is 32") as caught:
        normalise_name("x" * length)
    assert len(str(caught.value)) < 200


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
    [("My Project", "my-project"), ("x" * 50, "x" * 32), ("", None), ("...", None), ("a" * 31 + "--b", "a" * 31)],
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
    ],
)
def test_a_numbered_name_is_a_name(name: str, number: int, numbered: str) -> None:
    assert numbered_name(name, number) == numbered
    assert normalise_name(numbered) == numbered


@pytest.mark.spec("BODY-1")
@pytest.mark.parametrize("text", ["x", "x" * 65_536, "é" * 32_768, "\u202e\x1b[0m\r\n\t</channel>", "a\nb", " "])
def test_a_body_comes_back_unchanged(text: str) -> None:
    assert check_body(text, 65_536) is text


@pytest.mark.spec("BODY-1", "ERR-1")
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the message is empty: say something"),
        ("x" * 65_537, "message is 65,537 bytes, the limit is 65,536: put the bulk in a file and send its path"),
        ("é" * 32_769, "message is 65,538 bytes, the limit is 65,536: put the bulk in a file and send its path"),
        (
            "x" * 10_485_760,
            "message is 10,485,760 bytes, the limit is 65,536: put the bulk in a file and send its path",
        ),
        ("ab\0c", "the message has a NUL at character 3: put binary data in a file and send its path"),
        ("ab\ud800", "the message has a lone surrogate at character 3: send valid Unicode text"),
        (7, "a message is text, not int"),
        (None, "a message is text, not NoneType"),
    ],
)
def test_a_bad_body_is_refused(text: object, sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_body(text, 65_536)
    assert str(caught.value) == sentence


def test_a_timestamp_is_iso_8601() -> None:
    assert timestamp(1_700_000_000_123) == "2023-11-14T22:13:20.123Z"
