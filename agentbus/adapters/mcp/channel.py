"""The channel delivery: an envelope becomes a notification on the client's stream.

Knows the transport only as something that writes bytes and tells how many were read. Implements [CHAN-2], [CHAN-3],
[MCP-2], [TRUST-4].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from agentbus.adapters.mcp.element import CHANNEL, Frames, attributes
from agentbus.adapters.mcp.gate import ReadyGate
from agentbus.adapters.mcp.hosts import Link, Wire
from agentbus.core.model import Envelope
from agentbus.core.ports import Receipt

__all__ = ["CAPABILITY", "METHOD", "ChannelDelivery", "channel_event", "make"]

# The names in the protocol. A client looks for the capability before it takes events from a server; then it takes
# notifications with this method.
CAPABILITY: dict[str, dict[str, str]] = {"claude/channel": {}}
METHOD = "notifications/claude/channel"
# Only the text needs to be encoded, see `attributes`. One encoder for all messages costs a third of `json.dumps`, which
# makes a new encoder on each call, unless it is called with its defaults.
_EVENT = f'{{"jsonrpc": "2.0", "method": "{METHOD}", "params": {{"content": '
_encode = json.JSONEncoder(ensure_ascii=False).encode


def channel_event(envelope: Envelope, frames: Frames = CHANNEL) -> bytes:
    """The line, with its newline, that pushes `envelope` into the session. [CHAN-2]"""
    meta = "".join(f', "{key}": "{value}"' for key, value in attributes(envelope).items())[2:]
    return f'{_EVENT}{_encode(frames.defused(envelope.text))}, "meta": {{{meta}}}}}}}\n'.encode()


@dataclass(frozen=True, slots=True)
class _Posted:
    """The receipt of events that end at `position`."""

    wire: Wire
    count: int
    position: int

    def taken(self) -> bool:
        return self.wire.read_by_client() >= self.position


class ChannelDelivery:
    """Pushes channel events. Handed over: our write has returned. Taken: the client has read the bytes. [CHAN-3]"""

    carrier = "channel"
    trouble = ""

    def __init__(self, wire: Wire, gate: ReadyGate, frames: Frames = CHANNEL) -> None:
        self._wire = wire
        self._gate = gate
        self._frames = frames

    async def ready(self) -> None:
        """Wait for the gate."""
        await self._gate.wait()

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """Write the whole batch in one piece. Raises DeliveryClosed."""
        position = await self._wire.write(b"".join([channel_event(envelope, self._frames) for envelope in batch]))
        return _Posted(self._wire, len(batch), position)


def make(link: Link) -> ChannelDelivery:
    """The channel delivery for the session of `link`."""
    return ChannelDelivery(link.wire, link.gate, link.frames)
