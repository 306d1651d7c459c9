"""`agentbus serve opencode`: what the server tells OpenCode, and how its sessions receive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from agentbus.adapters.mcp import server
from agentbus.adapters.mcp.profile import Profile
from agentbus.adapters.opencode.frames import FRAMES
from agentbus.adapters.opencode.host import OpenCode
from agentbus.core.adapter import Manifest
from agentbus.core.bus import Bus
from agentbus.core.config import Settings
from agentbus.core.process import Process

__all__ = ["PROFILE", "serve"]

PROFILE = Profile(
    # The entry that our plugin makes lets a call take 120 s.
    max_wait_s=100,
    frames=FRAMES,
)
# OpenCode gives up a call after 60 s, unless the entry says otherwise.
_BY_HAND = replace(PROFILE, max_wait_s=50)


def serve(manifest: Manifest, settings: Settings, open_bus: Callable[..., tuple[Bus, Any]]) -> NoReturn:
    """Be a peer for OpenCode until it is gone. Raises the same errors as `server.serve`."""
    opencode = OpenCode()

    async def is_main_agent(_host: Process, _meta: Mapping[str, Any]) -> bool | None:
        # The plugin refuses the call of a subagent before it comes here. [READ-7]
        return True if opencode.door is not None and not opencode.door.gone else None

    server.serve(
        manifest,
        settings,
        open_bus,
        profile=_BY_HAND if opencode.door is None else PROFILE,
        choose=opencode.choose,
        conversation=opencode.conversation,
        is_main_agent=is_main_agent,
    )
