"""Everything that differs between MCP clients, as one value for each adapter. Implements [TOOL-1], [MCP-2],
[READ-1], [TRUST-4]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agentbus.adapters.mcp.element import CHANNEL, Frames

__all__ = ["Profile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What the server tells one client, and what that client can take."""

    # Part of the answer to `initialize`, beside the tools. The client looks for it before it takes events. [MCP-2]
    experimental: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # The key of a tool's `_meta` by which this client loads the tool at once, or shows no more of it than its name
    # until its model searches for it; "" where there is no such key. [TOOL-6]
    load_key: str = ""
    # The longest `wait_s` of check_messages, in seconds: less than the time after which a client gives up a tool call.
    max_wait_s: int = 100
    # The limits of one answer of check_messages: enough for a day's mail, not enough to flood a context. The lowest
    # limit that was measured is 50,000 characters: a longer answer is put into a file, and 2 KB of it are shown.
    max_checked: int = 50
    max_checked_chars: int = 40_000
    # The tags by which this client frames what is not a peer's text. [TRUST-4]
    frames: Frames = CHANNEL
    # The first paragraph of the instructions, for a client that may show no more than their beginning.
    lead: str = ""
    # Arguments that the client adds to every call, and that are not for us. [ARG-2]
    ignored_arguments: frozenset[str] = frozenset()
    # What the model calls to answer, where the client has a tool of that name itself.
    answer_with: str = "send_message"
