"""A transcript of Claude Code in a file, as a record of what a model was given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agentbus.adapters.claude_mcp.transcript import _texts
from agentbus.adapters.mcp.transcript import Transcript


class TranscriptFile(Transcript):
    """See Record in the ports: the record of a session whose transcript is `path`. The test writes its lines."""

    def __init__(self, path: Path) -> None:
        super().__init__(_texts)
        self.path = path

    def place(self) -> str:
        return str(self.path)

    def write(self, **row: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"timestamp": "2030-01-01T00:00:00.000Z", **row}) + "\n")

    def prompt(self, text: str) -> None:
        """A turn has begun with this prompt."""
        self.write(type="user", isSidechain=False, message={"role": "user", "content": text})

    def note(self, *texts: str, held: tuple[str, ...] = ()) -> None:
        """A request has carried these notes; `held` are those that wait for one."""
        attachment = {"type": "plugin_note", "plugin": "agentbus", "content": list(texts), "heldContent": list(held)}
        self.write(type="attachment", isSidechain=False, attachment=attachment)
