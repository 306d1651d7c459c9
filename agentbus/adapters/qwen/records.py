"""What Qwen Code records about a session: its registry record, and the transcript of its chat.

The registry is documented ("Cross-Session Protocol"); the transcript is a private format, as recorded with 0.24.4: what
looks different shows nothing. Reads, and changes nothing. Implements [QWEN-4].
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentbus.adapters.mcp import transcript
from agentbus.core.config import expanded, other_program
from agentbus.core.errors import BrokenSetup
from agentbus.core.ports import Shown
from agentbus.core.process import Process

__all__ = ["Chat", "config_folder", "session_id", "shown"]

# It becomes part of a path, so nothing else is taken for one.
_SESSION_ID = re.compile(r"[0-9a-zA-Z-]{8,64}")


def config_folder() -> Path:
    """The folder in which Qwen Code keeps settings, extensions and records. Raises BrokenSetup as `expanded` does."""
    return Path(expanded(other_program("QWEN_HOME") or "~/.qwen", "QWEN_HOME"))


def session_id(host: Process) -> str:
    """The session that the process `host` has now; "" if that cannot be told. It changes with /clear and /resume."""
    try:
        record: Any = json.loads((config_folder() / "sessions" / f"{host.pid}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        # A process with several sessions has other records; then our own session is the one that it started us for.
        record = {"pid": host.pid, "sessionId": other_program("QWEN_CODE_SESSION_ID")}
    except (OSError, ValueError, BrokenSetup):
        return ""
    if not isinstance(record, dict) or record.get("pid") != host.pid:
        return ""
    started = record.get("procStart")
    # The id of the boot, a colon, and the ticks at the start of the process: the record of an earlier one says others.
    if sys.platform == "linux" and isinstance(started, str) and started.rpartition(":")[2] != host.started:
        return ""
    found = record.get("sessionId")
    return found if isinstance(found, str) and _SESSION_ID.fullmatch(found) else ""


def texts(row: Any) -> Iterator[str]:
    """The texts in a line of a transcript that came from outside of the session and were put before its model."""
    if not isinstance(row, dict) or row.get("type") != "user" or row.get("subtype") != "notification":
        return
    message = row.get("message")
    parts = message.get("parts") if isinstance(message, dict) else None
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            # So Qwen Code writes the `<` of every tag. What a peer's text had of that is written otherwise: see frames.
            yield part["text"].replace("&lt;", "<")


class Chat(transcript.Transcript):
    """The record of the live session whose agent process is `host`: see Record in the ports."""

    def __init__(self, host: Process) -> None:
        super().__init__(texts)
        self._host = host
        self._place = ""

    def place(self) -> str:
        """The transcript of the session as it is now: another one after /clear and /resume."""
        folder, found = other_program("QWEN_CODE_PROJECT_DIR"), session_id(self._host)
        if folder and found:
            path = str(Path(folder) / "chats" / f"{found}.jsonl")
            if path.isprintable():
                self._place = path
        return self._place


def shown(place: str) -> set[Shown] | None:
    """All that the transcript at `place` shows; None if it cannot be read. For a session that has ended. [STATE-6]"""
    return transcript.shown(place, texts)
