"""The front desk: answers the handshake from plain data while the MCP SDK is still being imported behind it.

A client that waits 2 s for its servers gets its answers within 0.2 s, and mail is pushed meanwhile. Knows lines and
the plain data of tools.py; knows neither the SDK nor the transport. What it answers it answers as the SDK would
(tests/test_desk.py compares them); everything else waits for the SDK, in order. Implements [DESK-1] to [DESK-3].
"""

from __future__ import annotations

import json
from typing import Any

from agentbus.adapters.claude_mcp import guard, tools
from agentbus.adapters.claude_mcp.channel import ReadyGate

__all__ = ["Desk"]


class Desk:
    """Answers `initialize`, `ping` and `tools/list`, and records the handshake for whoever takes over."""

    def __init__(self, seat: tools.Seat, gate: ReadyGate) -> None:
        self._seat = seat
        self._gate = gate
        self._handshake: list[bytes] = []
        self.initialize_id: int | str | None = None

    def take(self, line: bytes) -> bytes | None:
        """The answer to `line`, newline and all; empty when there is nothing to say; None leaves it to the SDK."""
        refused = guard.refusal(line)
        if refused is not None:
            return refused
        message = guard.parse(line)
        if message is None or message.get("jsonrpc") != "2.0":
            return None
        method, params = message.get("method"), message.get("params", {})
        if not isinstance(params, dict):
            return None
        if "id" not in message:
            return self._take_notification(line, method)
        result = self._result(line, method, params, message["id"]) if guard.is_id(message["id"]) else None
        if result is None:
            return None
        return json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}).encode() + b"\n"

    def _result(self, line: bytes, method: object, params: dict[str, Any], request_id: int | str) -> Any:
        if method == "ping":
            return {}
        is_new = self.initialize_id is None
        if method == "initialize" and is_new and _is_complete(params):
            self.initialize_id = request_id
            self._handshake.append(line)
            return tools.welcome(self._seat, params["protocolVersion"])
        if method == "tools/list" and not is_new and "cursor" not in params:
            # The events that this lets pass go the same way as the answer, behind it. [CHAN-1]
            self._gate.listed()
            return tools.listing()
        return None

    def _take_notification(self, line: bytes, method: object) -> bytes | None:
        if method != "notifications/initialized" or self.initialize_id is None:
            return None
        self._handshake.append(line)
        self._gate.initialized()
        return b""

    def hand_over(self) -> list[bytes]:
        """The lines of the handshake, which bring the SDK to where the client believes it is. [DESK-2]"""
        return self._handshake


def _is_complete(params: dict[str, Any]) -> bool:
    """Whether the SDK would take these for an initialization; what it refuses is its to answer."""
    client = params.get("clientInfo")
    return (
        isinstance(params.get("protocolVersion"), str)
        and isinstance(params.get("capabilities"), dict)
        and isinstance(client, dict)
        and isinstance(client.get("name"), str)
        and isinstance(client.get("version"), str)
    )
