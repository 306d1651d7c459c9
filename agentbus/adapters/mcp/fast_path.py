"""The fast path: answers the requests that cannot wait for the MCP SDK, and leaves the rest to the SDK.

It answers two kinds of requests. The first is the handshake, while the SDK is still being imported: a client that waits
2 s for its servers has its answers within 0.2 s, and mail is pushed meanwhile. The second is a message to send: through
the SDK, a call costs 190 us before it has done anything, and 0.4 ms or more when caches are cold, while all the rest of
a delivery takes 0.6 ms.

Knows lines and tools.py, but neither the SDK nor the transport. It gives the same answers as the SDK would (a test
compares them). Everything else goes to the SDK, in order. Implements [DESK-1] to [DESK-4].
"""

from __future__ import annotations

import json
import time
from typing import Any

from agentbus.adapters.mcp import jsonrpc, tools
from agentbus.adapters.mcp.gate import ReadyGate
from agentbus.core.errors import Busy
from agentbus.core.stderr import say

__all__ = ["FastPath"]

# How long a call waits here for a busy database. After that it is left to the SDK, to wait there. A send takes 0.1 ms,
# but a writer that loses its core keeps the database for 4 to 10 ms, and a call that the SDK has brings all that come
# before its answer after it: a burst would then take the slow way to its end.
# While the SDK is being imported, a call waits longer here: the import takes longer than the process that holds the
# database, on a machine where all sessions start at once and a writer loses its core.
_BUSY_S = 0.05
_EARLY_BUSY_S = 0.25


class FastPath:
    """Answers `initialize`, `ping` and `tools/list`, and records the handshake for the SDK, which takes over."""

    def __init__(self, context: tools.ToolContext, gate: ReadyGate) -> None:
        self._context = context
        self._gate = gate
        self._handshake: list[bytes] = []
        self.initialize_id: int | str | None = None
        # Tool calls that the SDK has but has not answered yet: no later call must be done before them. [DESK-4]
        self._ahead: set[int | str] = set()
        self._busy_since = 0.0
        self._has_sdk = False

    def take(self, line: bytes) -> bytes | None:
        """The answer to `line`, with its newline; empty if there is nothing to answer; None leaves `line` to the SDK.

        Raises Busy if the caller has to call it again in the next turn of the event loop.
        """
        refused = jsonrpc.refusal(line)
        # Once the SDK has taken over, only tools are run here. Search the bytes first, so that no other line is parsed
        # twice.
        if refused is not None or (self._has_sdk and b"tools/call" not in line):
            return refused
        message = jsonrpc.parse(line)
        if message is None or message.get("jsonrpc") != "2.0":
            return None
        method, params = message.get("method"), message.get("params", {})
        if not isinstance(params, dict):
            return None
        if "id" not in message:
            return self._take_notification(line, method)
        result = self._result(line, method, params, message["id"]) if jsonrpc.is_id(message["id"]) else None
        return None if result is None else _answer(message["id"], result)

    def _call(self, params: dict[str, Any], request_id: int | str) -> dict[str, Any] | None:
        name, arguments = params.get("name"), params.get("arguments")
        # The SDK handles calls with more than these fields (a task, for example), and calls in a wrong form.
        is_plain = params.keys() <= {"name", "arguments", "_meta"} and isinstance(params.get("_meta", {}), dict)
        is_plain = is_plain and isinstance(name, str) and isinstance(arguments, dict | None)
        if is_plain and self._context.arrival is not None:
            self._context.arrival.called(params.get("_meta", {}))
        if is_plain and self.initialize_id is not None and not self._ahead:
            done = self._run(name, arguments)
            if done is not None:
                return {"content": [{"type": "text", "text": done.text}], "isError": done.is_error}
        if name != "check_messages":  # it can wait for long, and changes nothing for others
            self._ahead.add(request_id)
        return None

    def _run(self, name: Any, arguments: dict[str, Any] | None) -> tools.ToolResult | None:
        now = time.monotonic()
        try:
            done = tools.call_now(self._context, name, arguments)
        except Busy:
            self._busy_since = self._busy_since or now
            if now - self._busy_since < (_BUSY_S if self._has_sdk else _EARLY_BUSY_S):
                raise
            done = None
        except Exception as error:  # noqa: BLE001 - our own fault: only this call fails, and stderr says so
            fault = f"internal error, {type(error).__name__}: {error}"
            say(f"{name}: {fault}")
            done = tools.ToolResult(fault, is_error=True)
        self._busy_since = 0.0
        return done

    def settled(self, request_id: object) -> None:
        """The SDK is done with a request."""
        if self._ahead and isinstance(request_id, int | str):
            self._ahead.discard(request_id)

    def _result(self, line: bytes, method: object, params: dict[str, Any], request_id: int | str) -> Any:
        if method == "tools/call":
            return self._call(params, request_id)
        if self._has_sdk:
            return None
        if method == "ping":
            return {}
        is_new = self.initialize_id is None
        if method == "initialize" and is_new and _is_complete(params):
            self.initialize_id = request_id
            self._handshake.append(line)
            if self._context.arrival is not None:
                self._context.arrival.greeted(params)
            return tools.welcome(self._context, params["protocolVersion"])
        if method == "tools/list" and not is_new and "cursor" not in params:
            # The events that the gate then lets pass use the same stream as this answer, and come after it. [CHAN-1]
            self._gate.listed()
            return tools.listing(self._context.profile)
        return None

    def _take_notification(self, line: bytes, method: object) -> bytes | None:
        if self._has_sdk or method != "notifications/initialized" or self.initialize_id is None:
            return None
        self._handshake.append(line)
        self._gate.initialized()
        return b""

    def hand_over(self) -> list[bytes]:
        """Leave the rest to the SDK. Returns the lines of the handshake. [DESK-2]

        They bring the SDK to the state in which the client believes it is.
        """
        self._has_sdk = True
        return self._handshake


def _answer(request_id: int | str, result: dict[str, Any]) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "result": result}).encode() + b"\n"


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
