"""OpenCode: tools to send, and a plugin of ours that puts messages into a session."""
