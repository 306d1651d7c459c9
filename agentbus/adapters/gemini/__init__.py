"""Gemini CLI: tools to send, and the hooks of an extension of ours to receive."""
