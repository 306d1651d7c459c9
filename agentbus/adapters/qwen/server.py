"""`agentbus serve qwen`: what the server tells Qwen Code, and how its sessions receive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from agentbus.adapters.mcp import server
from agentbus.adapters.mcp.profile import Profile
from agentbus.adapters.qwen.frames import FRAMES
from agentbus.adapters.qwen.host import choose
from agentbus.adapters.qwen.records import session_id
from agentbus.core.adapter import Manifest
from agentbus.core.bus import Bus
from agentbus.core.config import Settings

__all__ = ["PROFILE", "serve"]

PROFILE = Profile(
    max_wait_s=100,
    # The family of clients that Qwen Code comes from adds this one to every call. [ARG-2]
    ignored_arguments=frozenset({"wait_for_previous"}),
    frames=FRAMES,
    # Qwen Code has a `send_message` itself, which reaches its own sessions alone.
    answer_with="mcp__agentbus__send_message (not the other send_message)",
)


def serve(manifest: Manifest, settings: Settings, open_bus: Callable[..., tuple[Bus, Any]]) -> NoReturn:
    """Be a peer for Qwen Code until it is gone. Raises the same errors as `server.serve`."""
    server.serve(manifest, settings, open_bus, profile=PROFILE, choose=choose, conversation=session_id)
