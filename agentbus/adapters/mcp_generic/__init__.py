"""The adapter for any MCP client: the tools, and check_messages to receive."""
