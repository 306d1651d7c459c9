"""The tags with which Gemini CLI, and the models that it runs, frame what is not a peer's text.

Source: the texts in the program of Gemini CLI 0.61.0. In what a hook brings it writes every `<` as `&lt;`, so a tag in
a peer's text frames nothing by itself; but a model may take it for one, and our own element looks like that, too.
Implements [TRUST-4].
"""

from __future__ import annotations

from agentbus.adapters.mcp.element import Frames

__all__ = ["FRAMES"]

FRAMES = Frames(
    names=(
        # What Gemini CLI tells the model by itself.
        *("hook_context", "untrusted_context", "session_context", "loaded_context", "project_context"),
        *("global_context", "extension_context", "state_snapshot", "user_input", "activated_skill"),
        # Calls of tools and their results, as some models write them.
        *("tool_call", "tool_response", "function_calls", "function_results", "invoke"),
    ),
    namespaces=("antml",),
    is_escaped=True,
)
