"""`agentbus serve gemini`: what the server tells Gemini CLI, and how its sessions receive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from agentbus.adapters.gemini.frames import FRAMES
from agentbus.adapters.gemini.host import GeminiCli
from agentbus.adapters.mcp import server
from agentbus.adapters.mcp.profile import Profile
from agentbus.core.adapter import Manifest
from agentbus.core.bus import Bus
from agentbus.core.config import Settings

__all__ = ["PROFILE", "serve"]

PROFILE = Profile(
    # Gemini CLI gives up a call after 10 min; 100 s were tried.
    max_wait_s=100,
    # It adds this one to every call. [ARG-2]
    ignored_arguments=frozenset({"wait_for_previous"}),
    frames=FRAMES,
    answer_with="mcp_agentbus_send_message",
)


def serve(manifest: Manifest, settings: Settings, open_bus: Callable[..., tuple[Bus, Any]]) -> NoReturn:
    """Be a peer for Gemini CLI until it is gone. Raises the same errors as `server.serve`."""
    gemini = GeminiCli()
    server.serve(
        manifest,
        settings,
        open_bus,
        profile=PROFILE,
        choose=gemini.choose,
        conversation=gemini.conversation,
        is_main_agent=gemini.is_main_agent,
    )
