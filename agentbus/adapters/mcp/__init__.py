"""What adapters for MCP clients share: the MCP server over stdio. No adapter itself; knows no client by name."""
