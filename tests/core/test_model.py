from __future__ import annotations

import pytest

from agentbus.core.errors import InvalidRequest
from agentbus.core.model import check_body, timestamp


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
