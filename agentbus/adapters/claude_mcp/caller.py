"""Who in a session of Claude Code called a tool, its main agent or a subagent: its transcripts tell. [READ-7]

A call carries the id of the tool use. The line with that id is in the transcript of the session, or in the one of a
subagent in a folder beside it. With 2.1.332 the main agent's line came up to 50 ms after the call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio

from agentbus.adapters.claude_mcp import records
from agentbus.core.process import Process

__all__ = ["is_main_agent"]

_KEY = "claudecode/toolUseId"
# How long a call waits for its line: ten times what was measured, for a busy machine. Then the caller is unknown.
_PATIENCE_S = 0.5
_POLL_S = 0.01
# The end of a transcript that is searched, in bytes. The line is one of the last, and much shorter.
_TAIL_BYTES = 1 << 20


async def is_main_agent(host: Process, meta: Mapping[str, Any]) -> bool | None:
    """Whether the main agent of the session made the call with this `_meta`; None if that cannot be told. [READ-7]"""
    wanted, entry = meta.get(_KEY), records.entry(host)
    if not isinstance(wanted, str) or not wanted or entry is None:
        return None
    main = records.transcript(entry)
    with anyio.move_on_after(_PATIENCE_S):
        while True:
            for path in (main, *sorted((main.with_suffix("") / "subagents").rglob("*.jsonl"))):
                found = _is_sidechain(path, wanted)
                if found is not None:
                    return path == main and not found
            await anyio.sleep(_POLL_S)
    return None


def _is_sidechain(path: Path, wanted: str) -> bool | None:
    """Whether the tool use `wanted` in the transcript `path` is a subagent's; None if it is not there."""
    try:
        lines = records.tail(path, _TAIL_BYTES)
    except OSError:
        return None
    for line in reversed(lines):
        if wanted.encode() in line:
            try:
                found: Any = json.loads(line)
                used = [one.get("id") for one in found["message"]["content"] if one.get("type") == "tool_use"]
                if found["type"] == "assistant" and wanted in used:
                    return found.get("isSidechain") is not False
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # another kind of line, or a half of one
    return None
