"""Which messages of the bus the transcript of a Claude Code session shows as given to its model.

A post shows first as a `queue-operation` line: then the client has it, and the model does not. The model has it when it
stands in a `user` line, in an attachment of type `queued_command`, or in the `content` of one of type `plugin_note`: a
note that waits for a request stands in its `heldContent`. A private format, as recorded with 2.1.332: what looks
different shows nothing. Reads, and changes nothing. Implements [PROOF-2].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from agentbus.adapters.claude_mcp import records
from agentbus.adapters.mcp import transcript
from agentbus.core.ports import Shown
from agentbus.core.process import Process

__all__ = ["Transcript", "given", "shown"]


# In which field an attachment of this type has what the model was given.
_GIVEN_IN = {"queued_command": "prompt", "plugin_note": "content"}


def given(line: bytes) -> set[Shown]:
    """The messages that one line of a transcript shows as given to the main model. [PROOF-2]"""
    return transcript.given(line, _texts)


def _texts(row: Any) -> Iterator[str]:
    """The texts in a line that were put before the main model as they came, not as the result of a tool."""
    if not isinstance(row, dict) or row.get("isSidechain") is True:
        return
    content: Any = None
    if row.get("type") == "user" and isinstance(row.get("message"), dict):
        content = row["message"].get("content")
    elif row.get("type") == "attachment" and isinstance(row.get("attachment"), dict):
        attachment = row["attachment"]
        field = _GIVEN_IN.get(str(attachment.get("type")))
        content = attachment.get(field) if field is not None else None
    if isinstance(content, str):
        yield content
    elif isinstance(content, list):
        for block in content:
            if isinstance(block, str):
                yield block
            elif isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str):
                yield block["text"]


class Transcript(transcript.Transcript):
    """The record of the live session whose agent process is `host`: see Record in the ports."""

    def __init__(self, host: Process) -> None:
        super().__init__(_texts)
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


def shown(place: str) -> set[Shown] | None:
    """All that the transcript at `place` shows; None if it cannot be read. For a session that has ended. [STATE-6]"""
    return transcript.shown(place, _texts)
