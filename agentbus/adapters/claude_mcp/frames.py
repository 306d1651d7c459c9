"""The tags with which Claude Code frames what is not a peer's text. It does not escape them in a peer's text.

Source: the texts in the program of Claude Code 2.1.332, and what its models are trained to take for calls of tools.
A few names are there to be on the safe side: no text with them was found. Knows nothing else. Implements [TRUST-4].
"""

from __future__ import annotations

from agentbus.adapters.mcp.element import Frames

__all__ = ["FRAMES"]

FRAMES = Frames(
    names=(
        # What the harness tells the model by itself.
        *("system-reminder", "system-note", "mcp-server-note", "task-notification", "fork-boilerplate"),
        *("new-diagnostics", "persisted-output", "truncated-output", "interrupted-output", "total_tokens"),
        *("user-prompt-submit-hook", "session-start-hook", "cc-memory", "memory_updates", "autonomous-loop"),
        # What comes from another session, a subagent or a page, in a frame that says so.
        *("cross-session-message", "teammate-message", "agent-message", "subagent_hand_back", "artifact-room-event"),
        # What the user has typed, pasted, selected or run.
        *("command-name", "command-message", "command-args", "user-memory-input", "pasted_content", "ide_selection"),
        *("ide_opened_file", "ide_diagnostics", "bash-input", "bash-stdout", "bash-stderr"),
        *("local-command-stdout", "local-command-stderr", "local-command-caveat"),
        # Calls of tools and their results. `parameter` alone frames nothing, and is common in configuration files.
        *("function_calls", "function_results", "invoke", "tool_use_error", "sandbox_violations"),
    ),
    # Of the model's own calls: any tag with this prefix.
    namespaces=("antml",),
)
