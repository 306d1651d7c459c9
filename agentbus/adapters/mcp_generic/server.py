"""`agentbus serve mcp`: any MCP client. Nothing is pushed: agentbus does not know what the client would do with it.

The shortest adapter, and the one to copy from. Implements [VOID-1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from agentbus.adapters.mcp import channel, server
from agentbus.adapters.mcp.hosts import Choice, Mode, find_host
from agentbus.adapters.mcp.profile import Profile
from agentbus.adapters.mcp.registration import ByHand
from agentbus.core.adapter import Manifest, Registration
from agentbus.core.bus import PULL, Bus
from agentbus.core.config import Settings

__all__ = ["choose", "registration", "serve"]

# For a client that does not know the capability, it costs nothing. A client that shows such events needs it. [MCP-2]
PROFILE = Profile(
    experimental=channel.CAPABILITY,
    # Gemini CLI adds this one to every tool, and sends it to the server. [ARG-2]
    ignored_arguments=frozenset({"wait_for_previous"}),
    # OpenCode and others give up a call after 60 s.
    max_wait_s=50,
)


def choose(asked: str) -> Choice:
    """Pull, unless AGENTBUS_DELIVERY asks for the channel: then the user knows that the client shows its events."""
    host = find_host(lambda _arguments: False).process
    if asked == "channel":
        reason = "AGENTBUS_DELIVERY is channel"
        return Choice(host=host, mode=Mode.PUSHED, delivery=asked, reason=reason, make=channel.make)
    return Choice(host=host, mode=Mode.PULL, delivery=PULL, reason="this client shows only what a tool returns")


def serve(manifest: Manifest, settings: Settings, open_bus: Callable[..., tuple[Bus, Any]]) -> NoReturn:
    """Be a peer for the client until it is gone. Raises the same errors as `server.serve`."""
    server.serve(manifest, settings, open_bus, profile=PROFILE, choose=choose)


def registration(manifest: Manifest) -> Registration:
    """Says what to paste: agentbus does not know where the client keeps its configuration."""
    return ByHand(manifest)
