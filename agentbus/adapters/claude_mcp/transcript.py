"""Which messages of the bus the transcript of a Claude Code session shows as given to its model.

A post shows first as a `queue-operation` line: then the client has it, and the model does not. The model has it when it
stands in a `user` line, or in an attachment of type `queued_command`. A private format, as recorded with 2.1.332: what
looks different shows nothing. Reads, and changes nothing. Implements [PROOF-2].
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentbus.adapters.claude_mcp import records
from agentbus.adapters.mcp.inbox import NOT_HERE
from agentbus.core.process import Process

__all__ = ["Transcript", "given", "shown"]

# Read at once: some 2 ms. A line can be longer, with an image in it; then more is read, up to the end of the line.
_PIECE_BYTES = 1 << 20
_ELEMENT = re.compile(r"<channel\b([^>]*)>(.*?)</channel>", re.DOTALL)
_ATTRIBUTE = re.compile(r'\b(msg_id|ts)="([^"]*)"')


def given(line: bytes) -> set[tuple[int, str]]:
    """The messages that one line of a transcript shows as given to the main model, by id and `ts`. [PROOF-2]"""
    # Most lines have none, and need no parsing.
    if b"msg_id" not in line:
        return set()
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        return set()
    found: set[tuple[int, str]] = set()
    for text in _texts(row):
        for words, body in _ELEMENT.findall(text):
            said = dict(_ATTRIBUTE.findall(words))
            # A note in the place of a message that is too long is not the message.
            if said.get("msg_id", "").isdecimal() and "ts" in said and not body.endswith(NOT_HERE):
                found.add((int(said["msg_id"]), said["ts"]))
    return found


def _texts(row: Any) -> Iterator[str]:
    """The texts in a line that were put before the main model as they came, not as the result of a tool."""
    if not isinstance(row, dict) or row.get("isSidechain") is True:
        return
    content: Any = None
    if row.get("type") == "user" and isinstance(row.get("message"), dict):
        content = row["message"].get("content")
    elif row.get("type") == "attachment" and isinstance(row.get("attachment"), dict):
        attachment = row["attachment"]
        content = attachment.get("prompt") if attachment.get("type") == "queued_command" else None
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for block in content:
            if isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str):
                yield block["text"]


def _find(place: str) -> Path:
    """The file at `place`, or that of the same session in another folder beside it. See `records.transcript`."""
    path = Path(place)
    if path.exists():
        return path
    return next(iter(sorted(path.parent.parent.glob(f"*/{path.name}"))), path)


def _piece(place: str, offset: int) -> tuple[list[bytes], int]:
    """The whole lines from `offset` on, and the offset behind them. Raises OSError."""
    path = _find(place)
    size = path.stat().st_size
    if size == offset:
        return [], offset
    # A file that became shorter was written anew.
    offset = offset if offset < size else 0
    with path.open("rb") as file:
        file.seek(offset)
        piece = file.read(_PIECE_BYTES)
        if len(piece) == _PIECE_BYTES and not piece.endswith(b"\n"):
            piece += file.readline()
    # The last line can be half written.
    whole = piece[: piece.rfind(b"\n") + 1]
    return whole.splitlines(), offset + len(whole)


class Transcript:
    """The record of the live session whose agent process is `host`: see Record in the ports."""

    def __init__(self, host: Process) -> None:
        self._host = host
        self._session_id = ""
        self._place = ""

    def place(self) -> str:
        """The transcript that the registry entry leads to: another one after /clear and /resume. [PROOF-3]"""
        entry = records.entry(self._host)
        if entry is not None and entry.session_id != self._session_id:
            path = str(records.transcript(entry))
            # Places are kept one a line, and in a database that takes text only.
            if path.isprintable():
                self._session_id, self._place = entry.session_id, path
        return self._place

    def end(self, place: str) -> int:
        """The size of the file."""
        try:
            return _find(place).stat().st_size
        except OSError:
            return 0

    def look(self, place: str, offset: int) -> tuple[set[tuple[int, str]], int]:
        """What the next lines show. A file that is not there, or cannot be read, shows nothing new."""
        try:
            lines, after = _piece(place, offset)
        except OSError:
            return set(), offset
        found: set[tuple[int, str]] = set()
        return found.union(*map(given, lines)), after


def shown(place: str) -> set[tuple[int, str]] | None:
    """All that the transcript at `place` shows; None if it cannot be read. For a session that has ended. [STATE-6]"""
    found: set[tuple[int, str]] = set()
    offset = 0
    try:
        while True:
            lines, after = _piece(place, offset)
            if after == offset:
                return found
            found = found.union(*map(given, lines))
            offset = after
    except OSError:
        return None
