"""One line to stderr, which nobody has to read."""

from __future__ import annotations

import os

import pytest

from agentbus.core.stderr import Stderr


@pytest.mark.spec("LIFE-5")
def test_a_full_pipe_drops_lines_and_says_how_many() -> None:
    reader, writer = os.pipe()
    stderr = Stderr(writer)
    for _ in range(200):
        stderr.say("x" * 1_000)
    os.set_blocking(reader, False)
    shown = os.read(reader, 1 << 20).decode().splitlines()
    assert set(shown) == {"agentbus: " + "x" * 1_000}
    stderr.say("and on")
    lost = 200 - len(shown)
    assert lost > 100
    assert os.read(reader, 1 << 20).decode().splitlines() == [
        f"agentbus: {lost:,} lines were not shown here, stderr was full",
        "agentbus: and on",
    ]
    os.close(reader)
    stderr.say("to nobody")
    os.close(writer)
    stderr.say("to no descriptor")


@pytest.mark.spec("LIFE-5", "TRUST-5")
@pytest.mark.parametrize(
    ("sentence", "line"),
    [
        ("two\nlines\r\nof it", b"agentbus: two lines of it\n"),
        ("\ud800 is no text", b"agentbus: \\ud800 is no text\n"),
        ("Möller, 日本", "agentbus: Möller, 日本\n".encode()),
        ("\x1b[2J\u202e and on", b"agentbus: \\x1b[2J\\u202e and on\n"),
    ],
)
def test_a_sentence_is_one_line_in_any_locale(sentence: str, line: bytes) -> None:
    reader, writer = os.pipe()
    Stderr(writer).say(sentence)
    assert os.read(reader, 1_000) == line
    os.close(reader)
    os.close(writer)


@pytest.mark.spec("LIFE-5")
def test_a_line_is_never_longer_than_a_pipe_takes_at_once() -> None:
    reader, writer = os.pipe()
    Stderr(writer).say("ü" * 100_000)
    shown = os.read(reader, 1 << 20)
    assert len(shown) <= 4_096
    assert shown.endswith(b"...\n")
    os.close(reader)
    os.close(writer)
