"""`agentbus serve claude-mcp`: what Claude Code has to be told, and how its sessions receive. Implements [MCP-2]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from agentbus.adapters.claude_mcp.host import choose
from agentbus.adapters.mcp import channel, server
from agentbus.adapters.mcp.profile import Profile
from agentbus.core.adapter import Manifest
from agentbus.core.bus import Bus
from agentbus.core.config import Settings

__all__ = ["PROFILE", "serve"]

PROFILE = Profile(
    # What Claude Code looks for before it takes channel events from a server.
    experimental=channel.CAPABILITY,
    # Shown to the model at once; deferred tools are only names until it searches for them.
    tool_meta={"anthropic/alwaysLoad": True},
    # A tool call is moved to the background after 120 s (Claude Code's documentation).
    max_wait_s=100,
)


def serve(manifest: Manifest, settings: Settings, open_bus: Callable[..., tuple[Bus, Any]]) -> NoReturn:
    """Be a peer for Claude Code until it goes. Raises what `server.serve` raises."""
    server.serve(manifest, settings, open_bus, profile=PROFILE, choose=choose)
