"""Everything that differs between MCP clients, as one value for each adapter. Implements [TOOL-1], [MCP-2]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Profile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What the server tells one client, and what that client can take."""

    # Part of the answer to `initialize`, beside the tools. The client looks for it before it takes events. [MCP-2]
    experimental: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # The `_meta` of each tool. [TOOL-1]
    tool_meta: Mapping[str, Any] = field(default_factory=dict)
    # The longest `wait_s` of check_messages, in seconds: less than the time after which a client gives up a tool call.
    max_wait_s: int = 100
    # The limits of one answer of check_messages: enough for a day's mail, not enough to flood a context.
    max_checked: int = 50
    max_checked_chars: int = 100_000
    # What the instructions add for this client: sentences, or nothing.
    more_instructions: str = ""
