"""Which messages of the bus Gemini CLI's record of a session shows as given to its model.

A session has a file of JSON lines, whose path each hook is told. A user's line is written when a request with it is
made, and a line of the model when an answer comes; a turn that is cancelled leaves the history, which is then written
anew. So a message is read when a line of the model stands behind it. A private format, as recorded with 0.61.0: what
looks different shows nothing. Reads, and changes nothing. Implements [GEMINI-4].
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentbus.adapters.mcp.transcript import instant, lines_of, messages, piece
from agentbus.core.ports import Shown

__all__ = ["Chat", "shown"]

# How a post begins, which is a whole prompt where it begins a turn.
_HEAD = re.compile(r"agentbus \S+, not your user:")
_OPENING, _CLOSING = "<hook_context>", "</hook_context>"


def _texts(content: object) -> Iterator[str]:
    """What our hooks have brought, in the content of a user's line, as it was before Gemini CLI escaped it."""
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict):
            continue
        response = part.get("functionResponse")
        output = response.get("response") if isinstance(response, dict) else None
        text = output.get("output") if isinstance(output, dict) else part.get("text")
        if not isinstance(text, str):
            continue
        # It stands at the end. Nothing that a hook brings has a `<`, so the last opening tag is Gemini CLI's own.
        if text.endswith(_CLOSING) and _OPENING in text:
            yield text[text.rindex(_OPENING) :].replace("&lt;", "<").replace("&gt;", ">")
        elif _HEAD.match(text):
            yield text


class _Reading:
    """Lines, one after the other. `given` stand in the model's context, and no answer of the model behind them yet."""

    def __init__(self) -> None:
        self.given: set[Shown] = set()
        self.is_answered = True
        self._answer = ""

    def take(self, line: bytes) -> set[Shown]:
        """The messages that this line shows as read."""
        try:
            row: Any = json.loads(line)
            rewritten = row["$set"].get("messages") if "$set" in row else None
            if isinstance(rewritten, list):
                # What is not in it any more was cancelled, or summarised.
                left = messages(text for one in rewritten for text in _texts(one.get("content")))
                self.given = {(row_id, at) for row_id, at in self.given if row_id in left}
            elif row.get("type") == "user":
                at = instant(row.get("timestamp"))
                self.given |= {(row_id, at) for row_id in messages(_texts(row.get("content")))}
                self.is_answered = False
            elif row.get("type") == "gemini" and row.get("id") != self._answer:
                # The line of an answer is written again when it has called tools, under the same id.
                self._answer, self.is_answered = str(row.get("id")), True
                read, self.given = self.given, set()
                return read
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass  # another kind of line
        return set()


class _File:
    """One file, read on from where reading stopped. `read` are the messages that it shows as read, in that order."""

    def __init__(self, place: str, offset: int = 0) -> None:
        self._path = Path(place)
        self._offset = offset
        self.reading = _Reading()
        self.read: list[Shown] = []

    def follow(self) -> None:
        """Read the next piece, if there is one. Raises OSError."""
        if self._path.stat().st_size == self._offset:
            return
        lines, self._offset = piece(self._path, self._offset)
        for line in lines:
            self.read += sorted(self.reading.take(line))


class Chat:
    """The record of a live session: see Record in the ports. An offset counts the messages that a file has shown."""

    def __init__(self) -> None:
        self._place = ""
        self._files: dict[str, _File] = {}

    def turn_to(self, path: str) -> None:
        """The record is at `path` from now on: another one after /clear. "" if Gemini CLI keeps none."""
        # Places are kept one a line, and in a database that takes text only.
        self._place = path if path.startswith("/") and path.isprintable() else ""
        if self._place:
            # What was there before the session was first heard of shows nothing that is looked for.
            self.end(self._place)

    def place(self) -> str:
        """The file that the last hook has named."""
        return self._place

    def end(self, place: str) -> int:
        """How much was shown. Of a file that is new to this process, what is in it now is left out."""
        try:
            size = Path(place).stat().st_size
        except OSError:
            size = 0
        return len(self._files.setdefault(place, _File(place, size)).read)

    def look(self, place: str, offset: int) -> tuple[set[Shown], int]:
        """What is shown since `offset`. A file that is not there, or cannot be read, shows nothing new."""
        file = self._files.setdefault(place, _File(place))
        try:
            file.follow()
        except OSError:
            return set(), offset
        return set(file.read[offset:]), max(offset, len(file.read))

    def read(self) -> set[Shown]:
        """All that the present file has shown."""
        return self.look(self._place, 0)[0] if self._place else set()

    def is_answered(self) -> bool:
        """Whether the model has answered the last request; so also if that cannot be told."""
        self.read()
        return not self._place or self._files[self._place].reading.is_answered


def shown(place: str) -> set[Shown] | None:
    """All that the file at `place` shows as read; None if it cannot be read. For a session that has ended. [STATE-6]"""
    reading = _Reading()
    try:
        return {one for line in lines_of(Path(place)) for one in reading.take(line)}
    except OSError:
        return None
