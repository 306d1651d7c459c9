"""The MCP side of a session: the SDK's low-level server over our own transport.

In the shipped package, only this module and cli/demo.py import the SDK. The import takes a little more than half a
second, so this module is imported in a thread, and only for the first line that the fast path (fast_path.py) leaves.
Implements [MCP-1] to [MCP-3], [DESK-2], [TOOL-1].
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

import anyio
from mcp import types
from mcp.server.lowlevel import Server
from mcp.shared.message import ServerMessageMetadata, SessionMessage
from pydantic import ValidationError

from agentbus import __version__
from agentbus.adapters.mcp import instructions, jsonrpc, tools
from agentbus.adapters.mcp.fast_path import FastPath
from agentbus.adapters.mcp.gate import ReadyGate
from agentbus.adapters.mcp.lines import MAX_LINE_BYTES
from agentbus.adapters.mcp.toolkit import ToolContext
from agentbus.adapters.mcp.transport import Stdio
from agentbus.core.errors import DeliveryClosed
from agentbus.core.stderr import say

__all__ = ["serve_mcp"]


class _Stream:
    """What the SDK expects from a stream, besides the one method that sends or receives."""

    async def aclose(self) -> None:
        """Do nothing: the SDK does not close the transport."""

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return None


class _Settling:
    """What to do when the result of a request has been written, or when it never will be. [READ-1]"""

    def __init__(self, settled: Callable[[object], None]) -> None:
        self._settled = settled
        self._waiting: dict[int | str, Callable[[bool], Awaitable[None]]] = {}

    def add(self, request_id: int | str, settle: Callable[[bool], Awaitable[None]]) -> None:
        self._waiting[request_id] = settle

    def concerns(self, request_id: object) -> bool:
        """Whether there is anything to do for this request."""
        return request_id in self._waiting

    async def settle(self, request_id: object, *, reached: bool) -> None:
        self._settled(request_id)
        settle = self._waiting.pop(request_id, None) if isinstance(request_id, (int, str)) else None
        if settle is not None:
            await settle(reached)

    def metadata(self, request_id: int | str) -> ServerMessageMetadata:
        """Makes the SDK call back if it ends the request without a response."""

        async def unanswered() -> None:
            await self.settle(request_id, reached=False)

        return ServerMessageMetadata(on_request_unanswered=unanswered)


class _Incoming(_Stream):
    """The lines of the client as messages. A line that is not a message is answered here."""

    def __init__(self, stdio: Stdio, first: list[bytes | None], settling: _Settling) -> None:
        self._stdio = stdio
        self._first = iter(first)
        self._settling = settling

    def __aiter__(self) -> _Incoming:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def receive(self) -> SessionMessage | Exception:
        while True:
            line = next(self._first, b"")
            if line == b"":
                line = await self._stdio.next_line()
            if line is None:
                problem = f"the line is over the limit of {MAX_LINE_BYTES:,} bytes"
                await self._answer(jsonrpc.error_line(None, jsonrpc.INVALID_REQUEST, problem))
                continue
            try:
                message = types.jsonrpc_message_adapter.validate_json(line, by_name=False)
            except ValidationError as error:
                # The SDK does not get this line, so it will not work on this request.
                await self._settling.settle((jsonrpc.parse(line) or {}).get("id"), reached=False)
                await self._answer(jsonrpc.salvage(line, error.errors(include_url=False)[0]["msg"]))
                continue
            if isinstance(message, types.JSONRPCRequest):
                refused = jsonrpc.refuse(message.id, message.method, message.params)
                if refused is not None:
                    await self._answer(refused)
                    continue
                if message.method == "tools/call":
                    return SessionMessage(message, self._settling.metadata(message.id))
            return SessionMessage(message)

    async def _answer(self, line: bytes) -> None:
        try:
            await self._stdio.write(line)
        except DeliveryClosed:
            raise anyio.EndOfStream from None


class _Outgoing(_Stream):
    """The SDK's messages as lines to the client."""

    def __init__(
        self,
        stdio: Stdio,
        answered_id: int | str | None,
        settling: _Settling,
    ) -> None:
        self._stdio = stdio
        self._answered_id = answered_id
        self._settling = settling

    async def send(self, item: SessionMessage, /) -> None:
        answered = getattr(item.message, "id", None)
        if answered is not None and answered == self._answered_id:
            # The client already has the fast path's answer to this request. [DESK-2]
            self._answered_id = None
            if not isinstance(item.message, types.JSONRPCResponse):
                say(f"the handshake was refused late: {item.message}")
            return
        line = item.message.model_dump_json(by_alias=True, exclude_unset=True)
        data = line.encode() + b"\n"
        has_to_know = self._settling.concerns(answered)
        # If nobody has to know when this answer is written, it leaves in one write with the answers around it.
        if has_to_know or not self._stdio.post(data):
            try:
                await self._stdio.write(data if has_to_know else b"")
            except DeliveryClosed:
                raise anyio.BrokenResourceError from None
        await self._settling.settle(answered, reached=True)


def _make_server(context: ToolContext, gate: ReadyGate, settling: _Settling) -> Server[Any]:
    listed = types.ListToolsResult.model_validate(tools.listing(context.profile), by_name=False)

    async def list_tools(_request: Any, _params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
        return listed

    async def call_tool(request: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        done = await tools.call(context, params.name, params.arguments, dict(params.meta or {}))
        if done.settle is not None:
            settling.add(request.request_id, done.settle)
        return types.CallToolResult.model_validate(done.as_result(), by_name=False)

    async def initialized(_request: Any, _params: types.NotificationParams) -> None:
        gate.initialized()

    server: Server[Any] = Server(
        context.server_name,
        version=__version__,
        instructions=instructions.instructions(context),
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )
    server.add_notification_handler("notifications/initialized", types.NotificationParams, initialized)
    # Tracing spans are on by default. Nobody collects them here, and they would make each call slower.
    server.middleware.clear()
    return server


async def serve_mcp(
    context: ToolContext, stdio: Stdio, gate: ReadyGate, fast_path: FastPath, first: bytes | None = b""
) -> None:
    """Answer what the fast path leaves, beginning with the line `first`, until the client is gone. [DESK-2]"""
    settling = _Settling(fast_path.settled)
    server = _make_server(context, gate, settling)
    await server.run(
        _Incoming(stdio, [*fast_path.hand_over(), first], settling),
        _Outgoing(stdio, fast_path.initialize_id, settling),
        server.create_initialization_options(
            experimental_capabilities=instructions.capabilities(context.profile)["experimental"]
        ),
    )
