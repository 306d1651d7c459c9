"""The smallest possible MCP server on the SDK, with its stock transport. A session's memory is compared with it."""

from __future__ import annotations

from typing import Any

import anyio
from mcp import types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server


async def _list_tools(_context: Any, _params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
    schema = {"type": "object", "properties": {"to": {"type": "string"}, "text": {"type": "string"}}}
    tool = types.Tool(name="send_message", description="Does nothing.", input_schema=schema)
    return types.ListToolsResult(tools=[tool])


async def _call_tool(_context: Any, _params: types.CallToolRequestParams) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(type="text", text="done")])


async def _main() -> None:
    server: Server[Any] = Server("bare", on_list_tools=_list_tools, on_call_tool=_call_tool)
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


if __name__ == "__main__":
    anyio.run(_main)
