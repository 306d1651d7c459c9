"""The tags with which Qwen Code, and the models that it runs, frame what is not a peer's text.

Source: the texts in the program of Qwen Code 0.24.4. It writes the `<` of every tag in a post as `&lt;`, so a tag of a
peer's text frames nothing by itself; but a model may take it for one, and our own element looks like that, too.
Implements [TRUST-4].
"""

from __future__ import annotations

from agentbus.adapters.mcp.element import Frames

__all__ = ["FRAMES"]

FRAMES = Frames(
    names=(
        "cross_session_message",
        "system-reminder",
        "task-notification",
        # Calls of tools and their results, as some models write them.
        *("tool_call", "tool_response", "function_calls", "function_results", "invoke"),
    ),
    namespaces=("antml",),
    is_escaped=True,
)
