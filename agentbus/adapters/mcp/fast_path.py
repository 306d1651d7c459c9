"""The fast path: answers what the known clients send, and leaves the rest to the MCP SDK, which is imported for it.

The import of the SDK takes 0.35 s of CPU time and 44 MB, and a call through it costs 190 us before it has done
anything. The clients that agentbus knows send nothing that needs it: the handshake, `ping`, `tools/list`, tool calls
and cancellations.

Knows lines, tools.py and instructions.py, but neither the SDK nor the transport. It gives the same answers as the SDK
would (a test compares them). Everything else goes to the SDK, in order. Implements [DESK-1] to [DESK-4].
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from agentbus.adapters.mcp import instructions, jsonrpc, tools
from agentbus.adapters.mcp.gate import ReadyGate
from agentbus.adapters.mcp.toolkit import ONLY_WAITS, ToolContext, ToolResult
from agentbus.core.errors import Busy, DeliveryClosed

__all__ = ["FastPath"]

# How long a call waits for a busy database in its place in the stream. After that it waits in a task of its own. A send
# takes 0.1 ms, but a writer that loses its core keeps the database for 4 to 10 ms, and while one call waits in a task,
# all that come after it need tasks too: a burst would take the slow way to its end.
_BUSY_S = 0.05


class FastPath:
    """Answers plain requests by `take`, and records the handshake for the SDK.

    `start` starts a task, as a task group does, for each call that may have to wait; its answer goes to `write`.
    """

    def __init__(
        self,
        context: ToolContext,
        gate: ReadyGate,
        write: Callable[[bytes], Awaitable[int]],
        start: Callable[..., object],
    ) -> None:
        self._context = context
        self._gate = gate
        self._write = write
        self._start = start
        self._handshake: list[bytes] = []
        self.initialize_id: int | str | None = None
        # Tool calls that the SDK has but has not answered yet: no later call must be done before them. [DESK-4]
        self._ahead: set[int | str] = set()
        # The calls that run here as tasks, by the text of their id: a client may cancel 7 as "7".
        self._running: dict[str, anyio.CancelScope] = {}
        # How many of them no later call must overtake.
        self._in_order = 0
        self._busy_since = 0.0
        self._has_left = False
        self._has_sdk = False

    def take(self, line: bytes) -> bytes | None:
        """The answer to `line`, with its newline; empty if there is none yet or never; None leaves `line` to the SDK.

        Raises Busy if the caller has to call it again in the next turn of the event loop.
        """
        answer = self._take(line)
        self._has_left = self._has_left or answer is None
        return answer

    def _take(self, line: bytes) -> bytes | None:
        refused = jsonrpc.refusal(line)
        if refused is not None:
            return refused
        message = jsonrpc.parse(line)
        if message is None or message.get("jsonrpc") != "2.0":
            return None
        method, params = message.get("method"), message.get("params", {})
        if not isinstance(method, str) or not isinstance(params, dict):
            return None
        if "id" not in message:
            return self._take_notification(line, method, params)
        request_id = message["id"]
        if not jsonrpc.is_id(request_id):
            return None
        if method == "tools/call":
            return self._call(params, request_id)
        result = self._result(line, method, params, request_id)
        return None if result is None else _answer(request_id, result)

    def _result(self, line: bytes, method: str, params: dict[str, Any], request_id: int | str) -> Any:
        if not _is_plain_meta(params):
            return None
        if method == "ping":
            return {}
        is_new = self.initialize_id is None
        if method == "initialize" and is_new and not self._has_sdk and _is_complete(params):
            self.initialize_id = request_id
            self._handshake.append(line)
            if self._context.arrival is not None:
                self._context.arrival.greeted(params)
            return instructions.welcome(self._context, params["protocolVersion"])
        if method == "tools/list" and not is_new and "cursor" not in params:
            # The events that the gate then lets pass use the same stream as this answer, and come after it. [CHAN-1]
            self._gate.listed()
            return tools.listing(self._context.profile)
        return None

    def _take_notification(self, line: bytes, method: str, params: dict[str, Any]) -> bytes | None:
        if method == "notifications/cancelled" and jsonrpc.is_id(params.get("requestId")):
            scope = self._running.get(str(params["requestId"]))
            if scope is not None:
                scope.cancel()
                return b""
        if method == "notifications/initialized":
            if self.initialize_id is None or self._has_sdk:
                return None
            self._handshake.append(line)
            self._gate.initialized()
            return b""
        # The SDK would do nothing about any other that comes before it has a request.
        return None if self._has_left else b""

    # -- tools -----------------------------------------------------------------------------------------------

    def _call(self, params: dict[str, Any], request_id: int | str) -> bytes | None:
        name, arguments, meta = params.get("name"), params.get("arguments"), params.get("_meta", {})
        # The SDK handles calls with more than these fields (a task, for example), and calls in a wrong form.
        is_plain = params.keys() <= {"name", "arguments", "_meta"} and _is_plain_meta(params)
        is_plain = is_plain and isinstance(name, str) and isinstance(arguments, dict | None)
        if is_plain and self._context.arrival is not None:
            self._context.arrival.called(meta)
        is_waiting = name == "check_messages"  # it can wait for long, and changes nothing for others; see also `ask`
        if not is_plain or self.initialize_id is None or self._ahead:
            if not is_waiting:
                self._ahead.add(request_id)
            return None
        assert isinstance(name, str)
        if not self._in_order and (done := self._run_now(name, arguments)):
            return _answer(request_id, done.as_result())
        scope = self._running[str(request_id)] = anyio.CancelScope()
        self._in_order += not is_waiting
        self._start(self._run, scope, request_id, name, arguments, meta)
        return b""

    def _run_now(self, name: str, arguments: dict[str, Any] | None) -> ToolResult | None:
        now = time.monotonic()
        try:
            done = tools.call_now(self._context, name, arguments)
        except Busy:
            self._busy_since = self._busy_since or now
            if now - self._busy_since < _BUSY_S:
                raise
            done = None
        self._busy_since = 0.0
        return done

    async def _run(
        self,
        scope: anyio.CancelScope,
        request_id: int | str,
        name: str,
        arguments: dict[str, Any] | None,
        meta: dict[str, Any],
    ) -> None:
        """Run a tool and write its answer, unless the client cancels it before."""
        done = None
        is_in_order = name != "check_messages"

        def let_pass() -> None:
            nonlocal is_in_order
            self._in_order -= is_in_order
            is_in_order = False

        ONLY_WAITS.set(let_pass)
        with scope:
            done = await tools.call(self._context, name, arguments, meta)
        # From here on it cannot be cancelled: an answer is written whole, or not at all.
        if self._running.get(str(request_id)) is scope:
            del self._running[str(request_id)]
        let_pass()
        if done is None:
            return
        reached = not scope.cancel_called
        try:
            if reached:
                await self._write(_answer(request_id, done.as_result()))
        except DeliveryClosed:
            reached = False
        if done.settle is not None:
            await done.settle(reached)

    # -- the SDK ---------------------------------------------------------------------------------------------

    def settled(self, request_id: object) -> None:
        """The SDK is done with a request."""
        if self._ahead and isinstance(request_id, int | str):
            self._ahead.discard(request_id)

    def hand_over(self) -> list[bytes]:
        """Leave the rest to the SDK. Returns the lines of the handshake. [DESK-2]

        They bring the SDK to the state in which the client believes it is.
        """
        self._has_sdk = True
        return self._handshake


def _answer(request_id: int | str, result: dict[str, Any]) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "result": result}).encode() + b"\n"


def _is_plain_meta(params: dict[str, Any]) -> bool:
    """Whether the SDK would take the `_meta` of these, if there is any."""
    meta = params.get("_meta", {})
    return isinstance(meta, dict) and ("progressToken" not in meta or jsonrpc.is_id(meta["progressToken"]))


def _is_complete(params: dict[str, Any]) -> bool:
    """Whether the SDK would take these as an initialization. If it would refuse them, it has to answer itself."""
    client = params.get("clientInfo")
    return (
        isinstance(params.get("protocolVersion"), str)
        and isinstance(params.get("capabilities"), dict)
        and isinstance(client, dict)
        and isinstance(client.get("name"), str)
        and isinstance(client.get("version"), str)
    )
