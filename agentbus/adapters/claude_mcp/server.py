"""`agentbus serve claude-mcp`: what the server tells Claude Code, and how its sessions receive. Implements [MCP-2]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from agentbus.adapters.claude_mcp import records
from agentbus.adapters.claude_mcp.caller import is_main_agent
from agentbus.adapters.claude_mcp.frames import FRAMES
from agentbus.adapters.claude_mcp.host import choose, own_wish
from agentbus.adapters.mcp import channel, server
from agentbus.adapters.mcp.hosts import Choice
from agentbus.adapters.mcp.profile import Profile
from agentbus.core import process
from agentbus.core.adapter import Manifest
from agentbus.core.bus import Bus
from agentbus.core.config import Settings, other_program
from agentbus.core.process import Process

__all__ = ["PROFILE", "serve"]

PROFILE = Profile(
    # Claude Code looks for this before it takes channel events from a server.
    experimental=channel.CAPABILITY,
    # Where the entry of the server has no alwaysLoad, which stands above it.
    load_key="anthropic/alwaysLoad",
    # Claude Code's own tool, for its own sessions, is called almost like ours.
    answer_with="send_message (not SendMessage)",
    # Claude Code moves a tool call to the background after 120 s (its documentation).
    max_wait_s=100,
    frames=FRAMES,
)

_RESUMING = ("-c", "--continue", "-r", "--resume")


def conversation(host: Process) -> str:
    """The id of the conversation that Claude Code's process has now; "" without its records. [NAME-8]"""
    # Not CLAUDE_CODE_SESSION_ID: that stays as it was at the start, also after /clear and /resume.
    found = records.entry(host)
    return "" if found is None else found.session_id


def wait_until_resumed(host: Process, arguments: Callable[[Process], Sequence[str]] = process.arguments) -> None:
    """Wait a moment until a session that goes on with a conversation says with which. Blocks. [NAME-8]"""
    if any(word.partition("=")[0] in _RESUMING for word in arguments(host)):
        # `claude -p --continue` has a conversation of its own in its entry first, without a status.
        records.settled(host, lambda found: found is None or bool(found.status))


def serve(manifest: Manifest, settings: Settings, open_bus: Callable[..., tuple[Bus, Any]]) -> NoReturn:
    """Be a peer for Claude Code until it is gone. Raises the same errors as `server.serve`."""
    said = manifest.word("AGENTBUS_BYPASS")
    # Unset is not `hold`: a delivery that the user asked for is then used. [BYPASS-2]
    bypass = said if other_program("AGENTBUS_BYPASS").strip() else ""
    settings = own_wish(settings, other_program(manifest.folder_variable))

    def choice(asked: str) -> Choice:
        made = choose(asked, bypass=bypass)
        wait_until_resumed(made.host)
        return made

    server.serve(
        manifest,
        settings,
        open_bus,
        profile=PROFILE,
        choose=choice,
        conversation=conversation,
        is_main_agent=is_main_agent,
    )
