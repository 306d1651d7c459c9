"""The MCP side of a session: the SDK's low-level server over our own transport.

The only module of the shipped package, with demo.py, that imports the SDK, which takes a good half second: it is
imported in a thread when mailbox, name and socket are up already. Implements [MCP-1] to [MCP-3], [TOOL-1].
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import anyio
from mcp import types
from mcp.server.lowlevel import Server
from mcp.shared.message import SessionMessage
from pydantic import ValidationError

from agentbus import __version__
from agentbus.adapters.claude_mcp import guard, tools
from agentbus.adapters.claude_mcp.channel import ReadyGate
from agentbus.adapters.claude_mcp.lines import MAX_LINE_BYTES
from agentbus.adapters.claude_mcp.stdio import Stdio
from agentbus.errors import DeliveryClosed
from agentbus.session import Session

__all__ = ["serve_mcp"]

# What Claude Code looks for before it takes channel events from a server.
_EXPERIMENTAL: dict[str, dict[str, Any]] = {"claude/channel": {}}


class _Stream:
    """What the SDK wants of a stream besides its one method."""

    async def aclose(self) -> None:
        """Nothing: the transport is not the SDK's to close."""

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return None


class _Incoming(_Stream):
    """The lines of the client as messages; what is none is answered here."""

    def __init__(self, stdio: Stdio, listings: set[int | str]) -> None:
        self._stdio = stdio
        self._lines = stdio.lines()
        self._listings = listings

    def __aiter__(self) -> _Incoming:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def receive(self) -> SessionMessage | Exception:
        async for line in self._lines:
            if line is None:
                problem = f"the line is over the limit of {MAX_LINE_BYTES:,} bytes"
                await self._answer(guard.error_line(None, guard.INVALID_REQUEST, problem))
                continue
            try:
                message = types.jsonrpc_message_adapter.validate_json(line, by_name=False)
            except ValidationError as error:
                await self._answer(guard.salvage(line, error.errors(include_url=False)[0]["msg"]))
                continue
            if isinstance(message, types.JSONRPCRequest):
                refused = guard.refuse(message.id, message.method, message.params)
                if refused is not None:
                    await self._answer(refused)
                    continue
                if message.method == "tools/list":
                    self._listings.add(message.id)
            return SessionMessage(message)
        raise anyio.EndOfStream

    async def _answer(self, line: bytes) -> None:
        try:
            await self._stdio.write(line)
        except DeliveryClosed:
            raise anyio.EndOfStream from None


class _Outgoing(_Stream):
    """Messages of the SDK as lines to the client."""

    def __init__(self, stdio: Stdio, listings: set[int | str], gate: ReadyGate) -> None:
        self._stdio = stdio
        self._listings = listings
        self._gate = gate

    async def send(self, item: SessionMessage, /) -> None:
        line = item.message.model_dump_json(by_alias=True, exclude_unset=True)
        try:
            await self._stdio.write(line.encode() + b"\n")
        except DeliveryClosed:
            raise anyio.BrokenResourceError from None
        answered = getattr(item.message, "id", None)
        if answered in self._listings:
            self._listings.discard(answered)
            self._gate.listed()


def _tool(tool: tools.Tool) -> types.Tool:
    return types.Tool(
        name=tool.name,
        description=tool.description,
        input_schema=tool.input_schema(),
        # Shown to the model at once; deferred tools are only names until it searches for them.
        _meta={"anthropic/alwaysLoad": True},
    )


def _make_server(session: Session, gate: ReadyGate, name_note: str) -> Server[Any]:
    listed = types.ListToolsResult(tools=[_tool(tool) for tool in tools.TOOLS])

    async def list_tools(_context: Any, _params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        return listed

    async def call_tool(_context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        text, is_error = await tools.call(session, params.name, params.arguments)
        return types.CallToolResult(content=[types.TextContent(type="text", text=text)], is_error=is_error)

    async def initialized(_context: Any, _params: types.NotificationParams) -> None:
        gate.initialized()

    server: Server[Any] = Server(
        "agentbus",
        version=__version__,
        instructions=tools.instructions(session, name_note),
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )
    server.add_notification_handler("notifications/initialized", types.NotificationParams, initialized)
    # Tracing spans, on by default: nobody collects them here, and each call would pay for them.
    server.middleware.clear()
    return server


async def serve_mcp(session: Session, stdio: Stdio, gate: ReadyGate, name_note: str) -> None:
    """Speak MCP until the client is gone."""
    server = _make_server(session, gate, name_note)
    listings: set[int | str] = set()
    await server.run(
        _Incoming(stdio, listings),
        _Outgoing(stdio, listings, gate),
        server.create_initialization_options(experimental_capabilities=_EXPERIMENTAL),
    )
