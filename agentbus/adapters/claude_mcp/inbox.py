"""The inbox that Claude Code gives each session: where it is, and how a post is framed.

As recorded with 2.1.331. The delivery is in `adapters/mcp/inbox.py`. Implements [INBOX-5].
"""

from __future__ import annotations

import json
from pathlib import Path

from agentbus.adapters.mcp.inbox import Address, Inbox
from agentbus.core.config import other_program
from agentbus.core.process import Process

__all__ = ["address", "frame", "inbox"]


def address() -> Address | None:
    """Where Claude Code says that its inbox is; None if it says nothing."""
    path, token = other_program("CLAUDE_CODE_MESSAGING_SOCKET"), other_program("CLAUDE_CODE_MESSAGING_TOKEN")
    return Address(Path(path), token) if path and token else None


def inbox(at: Address, host: Process) -> Inbox:
    """The inbox at that address, of the session whose agent process is `host`."""

    return Inbox(at, host, lambda text: frame(text, at.token))


def frame(text: str, token: str) -> bytes:
    """The lines of a post. Without a token it is that of a process which the session has not started."""
    lines: list[dict[str, object]] = [{"type": "auth", "token": token}] if token else []
    lines.append({"type": "user", "message": {"role": "user", "content": text}})
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
