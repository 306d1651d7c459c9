"""Which messages of the bus Codex's record of a thread shows as given to its model.

The rollout file of a thread has a line for everything that enters the model's context, in that order. A message is read
when a line of the model stands behind its element: then a request with it has been made. A private format, as recorded
with 0.169: what looks different shows nothing. Reads, and changes nothing. Implements [CODEX-8].
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from agentbus.adapters.mcp.transcript import instant, lines_of, piece
from agentbus.core.ports import Shown

__all__ = ["Rollout", "shown"]

_ELEMENT = re.compile(r'<channel source="agentbus"([^>]*)>')
_ATTRIBUTE = re.compile(r'\b(msg_id|part)="([^"]*)"')
# What the model writes.
_OF_MODEL = {
    "reasoning",
    "function_call",
    "custom_tool_call",
    "local_shell_call",
    "web_search_call",
    "tool_search_call",
}


class _Reading:
    """Lines, one after the other. `given` stand in the model's context, and no line of the model behind them yet."""

    def __init__(self) -> None:
        self.given: set[Shown] = set()

    def take(self, line: bytes) -> set[Shown]:
        """The messages that this line shows as read."""
        # Most lines are neither.
        if b"response_item" not in line and b"token_usage_record" not in line:
            return set()
        try:
            row: Any = json.loads(line)
            kind, payload = row["type"], row["payload"]
            if kind == "token_usage_record" or (kind == "response_item" and _is_of_model(payload)):
                read, self.given = self.given, set()
                return read
            if kind == "response_item":
                self.given |= _given(payload, instant(row.get("timestamp")))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass  # another kind of line, or a half of one
        return set()


def _is_of_model(payload: dict[str, Any]) -> bool:
    return payload.get("type") in _OF_MODEL or payload.get("role") == "assistant"


def _given(payload: dict[str, Any], at: int) -> set[Shown]:
    """The messages in an item of context that agentbus has pushed; of those in parts, the ones that are whole."""
    if payload.get("type") == "function_call_output" and payload.get("name") == "agentbus":
        text = str(payload.get("output"))
    else:
        # So before 0.160. A person can type that, too, but then the person says that it was given.
        content = payload.get("content")
        parts = [str(one.get("text")) for one in content if isinstance(one, dict)] if isinstance(content, list) else []
        text = "".join(part for part in parts if part.startswith("<external_agentbus-"))
    found: set[Shown] = set()
    for words in _ELEMENT.findall(text):
        said = dict(_ATTRIBUTE.findall(words))
        number, _, count = said.get("part", "").partition("/")
        if said.get("msg_id", "").isdecimal() and number == count:
            found.add((int(said["msg_id"]), at))
    return found


class Rollout:
    """The record of the thread whose rollout file is at `path`: see Record in the ports."""

    def __init__(self, path: str) -> None:
        # Places are kept one a line, and in a database that takes text only.
        self._path = path if path.isprintable() else ""
        self._readings: dict[str, _Reading] = {}

    def place(self) -> str:
        """The file. Codex makes it with the first turn."""
        return self._path

    def end(self, place: str) -> int:
        """The size of the file."""
        try:
            return Path(place).stat().st_size
        except OSError:
            return 0

    def look(self, place: str, offset: int) -> tuple[set[Shown], int]:
        """What the next lines show as read. A file that is not there, or cannot be read, shows nothing new."""
        if self.end(place) == offset:
            return set(), offset
        try:
            lines, after = piece(Path(place), offset)
        except OSError:
            return set(), offset
        reading = self._readings.setdefault(place, _Reading())
        found: set[Shown] = set()
        return found.union(*map(reading.take, lines)), after


def shown(place: str) -> set[Shown] | None:
    """All that the rollout at `place` shows as read; None if it cannot be read. For a session that has ended."""
    reading = _Reading()
    try:
        return {one for line in lines_of(Path(place)) for one in reading.take(line)}
    except OSError:
        return None
