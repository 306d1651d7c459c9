"""Answers some requests before the MCP SDK sees them, so that the connection can still carry channels.

If the first request is of protocol revision 2026-07-28, it locks the SDK's server to that revision. Clients do not take
channel events from such a server. Pure: a line in, an answer or nothing out. Implements [MCP-1] to [MCP-3].
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

__all__ = ["HANDSHAKE_VERSIONS", "error_line", "is_id", "parse", "refusal", "refuse", "salvage"]

# Codes of JSON-RPC 2.0, section 5.1, and of MCP revision 2026-07-28 (unsupported protocol version).
PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INTERNAL_ERROR = -32603
UNSUPPORTED_PROTOCOL_VERSION = -32022

_VERSION_KEY = "io.modelcontextprotocol/protocolVersion"
# The revisions that begin with `initialize`, oldest first.
HANDSHAKE_VERSIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
_DISCOVER = "server/discover"


_scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]


def error_line(request_id: object, code: int, message: str, data: dict[str, Any] | None = None) -> bytes:
    """A JSON-RPC error response, with its newline. ASCII, so that no text can break it."""
    error: dict[str, Any] = {"code": code, "message": message}
    if data is not None:
        error["data"] = data
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "error": error}).encode() + b"\n"


def parse(line: bytes) -> dict[str, Any] | None:
    """The JSON object in `line`; None if there is none, or if its content cannot be encoded as text."""
    try:
        text = line.decode()
        try:
            # What json.loads ends in, without the 13 calls before that.
            message, end = _scan(text, 0)
        except StopIteration:
            end = -1
        if end != len(text):  # spaces around it, or an error
            message = json.loads(line)
        if b"\\u" in line:
            json.dumps(message, ensure_ascii=False).encode()  # a lone surrogate is not text: the SDK refuses it
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def is_id(value: object) -> bool:
    """Whether JSON-RPC accepts `value` as the id of a request."""
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def refusal(line: bytes) -> bytes | None:
    """The answer to a request that the SDK must not see; None for every other line. [MCP-1]"""
    # Search the bytes first: parsing every line twice would cost each tool call 10 us. A line that spells the words
    # with escapes passes this check; `refuse` checks it again when it has been parsed.
    if b"server" not in line and b"protocolVersion" not in line:
        return None
    message = parse(line)
    if message is None or not isinstance(message.get("method"), str) or not is_id(message.get("id")):
        return None
    return refuse(message["id"], message["method"], message.get("params"))


def refuse(request_id: object, method: str, params: object) -> bytes | None:
    """The same for a request that has been parsed."""
    if method == _DISCOVER:
        return error_line(request_id, METHOD_NOT_FOUND, "Method not found")
    meta = params.get("_meta") if isinstance(params, dict) else None
    if method != "initialize" and isinstance(meta, dict) and _VERSION_KEY in meta:
        data = {"supported": list(HANDSHAKE_VERSIONS), "requested": str(meta[_VERSION_KEY])}
        return error_line(request_id, UNSUPPORTED_PROTOCOL_VERSION, "this server begins with initialize", data)
    return None


def salvage(line: bytes, problem: str) -> bytes:
    """The answer to a line that is not a JSON-RPC message. [MCP-3]

    The answer has the line's id, if there is one, so that nobody waits.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return error_line(None, PARSE_ERROR, f"not a line of JSON: {problem}")
    request_id = message.get("id") if isinstance(message, dict) else None
    return error_line(request_id if is_id(request_id) else None, INVALID_REQUEST, f"not a request: {problem}")
