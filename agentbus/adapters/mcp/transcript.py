"""Which messages of the bus a client's transcript, a file of JSON lines, shows as given to its model.

An adapter says which texts of a line were put before the main model, and where the file is. Reads, and changes nothing.
Implements [PROOF-2].
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from agentbus.adapters.mcp.inbox import NOT_HERE
from agentbus.core.ports import Shown

__all__ = ["Texts", "Transcript", "given", "instant", "lines_of", "messages", "piece", "shown"]

# Read at once: some 2 ms. A line can be longer, with an image in it; then more is read, up to the end of the line.
_PIECE_BYTES = 1 << 20
_ELEMENT = re.compile(r"<channel\b([^>]*)>(.*?)</channel>", re.DOTALL)
_ID = re.compile(r'\bmsg_id="(\d{1,20})"', re.ASCII)

# The texts in a line, parsed, that were put before the main model as they came, not as the result of a tool.
Texts = Callable[[Any], Iterable[str]]


def instant(said: Any) -> int:
    """An instant that a client has recorded, in ISO 8601, as ms since 1970 UTC; 0 if it is none."""
    try:
        return round(datetime.fromisoformat(said).timestamp() * 1_000)
    except (TypeError, ValueError, OverflowError):
        return 0


def given(line: bytes, texts: Texts) -> set[Shown]:
    """The messages that one line of a transcript shows as given to the main model. [PROOF-2]"""
    # Most lines have none, and need no parsing.
    if b"msg_id" not in line:
        return set()
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        return set()
    return {(row_id, instant(row.get("timestamp"))) for row_id in messages(texts(row))}


def messages(texts: Iterable[str]) -> set[int]:
    """The ids of the messages whose elements stand whole in `texts`."""
    found: set[int] = set()
    for text in texts:
        for words, body in _ELEMENT.findall(text):
            said = _ID.search(words)
            # A note in the place of a message that is too long is not the message.
            if said is not None and not body.endswith(NOT_HERE):
                found.add(int(said[1]))
    return found


def _find(place: str) -> Path:
    """The file at `place`, or that of the same session in another folder beside it."""
    path = Path(place)
    if path.exists():
        return path
    return next(iter(sorted(path.parent.parent.glob(f"*/{path.name}"))), path)


def piece(path: Path, offset: int) -> tuple[list[bytes], int]:
    """The whole lines of a growing file from `offset` on, about 1 MiB of them, and the offset behind them.

    Raises OSError.
    """
    with path.open("rb") as file:
        # A file that became shorter was written anew.
        start = file.seek(offset if offset <= file.seek(0, 2) else 0)
        found = file.read(_PIECE_BYTES)
        if len(found) == _PIECE_BYTES and not found.endswith(b"\n"):
            found += file.readline()
    # The last line can be half written.
    whole = found[: found.rfind(b"\n") + 1]
    return whole.splitlines(), start + len(whole)


def lines_of(path: Path) -> Iterator[bytes]:
    """All whole lines of a file, a piece at a time in memory. Raises OSError."""
    offset = 0
    while True:
        lines, after = piece(path, offset)
        if after == offset:
            return
        yield from lines
        offset = after


class Transcript:
    """The record of a live session: see Record in the ports. An adapter adds `place`."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def end(self, place: str) -> int:
        """The size of the file."""
        try:
            return _find(place).stat().st_size
        except OSError:
            return 0

    def look(self, place: str, offset: int) -> tuple[set[Shown], int]:
        """What the next lines show. A file that is not there, or cannot be read, shows nothing new."""
        try:
            lines, after = piece(_find(place), offset)
        except OSError:
            return set(), offset
        found: set[Shown] = set()
        return found.union(*(given(line, self._texts) for line in lines)), after


def shown(place: str, texts: Texts) -> set[Shown] | None:
    """All that the transcript at `place` shows; None if it cannot be read. For a session that has ended. [STATE-6]"""
    try:
        return {one for line in lines_of(_find(place)) for one in given(line, texts)}
    except OSError:
        return None
