"""Claude Code, and any other MCP client over stdio: tools to send, channel events to receive."""
