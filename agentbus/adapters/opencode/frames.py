"""The tags with which OpenCode, and the models that it runs, frame what is not a peer's text.

Source: the texts in the program of OpenCode 1.18.33. It does not escape them in a user message. Tags that are usual in
files and frame little there (`file`, `path`, `content`, `env`) are left as they are. Implements [TRUST-4].
"""

from __future__ import annotations

from agentbus.adapters.mcp.element import Frames

__all__ = ["FRAMES"]

FRAMES = Frames(
    names=(
        # What OpenCode tells the model by itself.
        *("system-reminder", "system-update", "mcp_instructions", "available_skills", "skill_files", "shell_metadata"),
        *("prior-summary", "recent-context", "task_result", "github_action_context"),
        # Calls of tools and their results, as some models write them.
        *("function_calls", "function_results", "invoke", "tool_use_error"),
    ),
    namespaces=("antml",),
)
