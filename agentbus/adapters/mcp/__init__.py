"""The MCP server over stdio that the adapters for MCP clients share. Not an adapter itself; knows no client by name."""
