"""The channel delivery: an envelope becomes a `notifications/claude/channel` line on the client's stream.

Knows the transport only as something that writes bytes and tells how many were read. Implements [CHAN-1] to
[CHAN-3], [TRUST-2].
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import anyio

from agentbus.core.model import Envelope, timestamp
from agentbus.core.ports import Receipt

__all__ = ["ChannelDelivery", "ReadyGate", "Wire", "channel_element", "channel_event", "defused"]

METHOD = "notifications/claude/channel"
# Between `initialized` + `tools/list` and the registration of Claude Code's own handler 55 ms were measured; the
# gap cannot be observed from here, and an event that comes too early is dropped without a word. [CHAN-1]
SETTLE_S = 0.25
# A client that has not listed tools by now never will: it has no use for tools, maybe for events.
UNLISTED_S = 2.0

# Only the text needs to be encoded, see `_meta`; one encoder for all costs a third of `json.dumps`, which makes a new
# one each time for anything but its defaults.
_EVENT = f'{{"jsonrpc": "2.0", "method": "{METHOD}", "params": {{"content": '
_encode = json.JSONEncoder(ensure_ascii=False).encode

# An opening or closing channel tag, however it is spaced or cased.
_TAG = re.compile(r"<(?=\s*/?\s*channel)", re.IGNORECASE)


def defused(text: str) -> str:
    """`text` with each `<channel` and `</channel` made harmless, everything else unchanged. [TRUST-2]"""
    return _TAG.sub("&lt;", text) if "<" in text else text


def _meta(envelope: Envelope) -> dict[str, str]:
    # No value needs escaping: names are of a-z 0-9 _ -, the rest are numbers and a timestamp.
    meta = {"from": envelope.sender, "msg_id": str(envelope.id), "ts": timestamp(envelope.sent_at)}
    if envelope.reply_to is not None:
        meta["reply_to"] = str(envelope.reply_to)
    return meta


def channel_element(envelope: Envelope) -> str:
    """`envelope` as the element that Claude Code makes of its event. [READ-1]"""
    attributes = "".join(f' {key}="{value}"' for key, value in _meta(envelope).items())
    return f'<channel source="agentbus"{attributes}>{defused(envelope.text)}</channel>'


def channel_event(envelope: Envelope) -> bytes:
    """The line, newline and all, that pushes `envelope` into the session. [CHAN-2]"""
    meta = "".join(f', "{key}": "{value}"' for key, value in _meta(envelope).items())[2:]
    return f'{_EVENT}{_encode(defused(envelope.text))}, "meta": {{{meta}}}}}}}\n'.encode()


class ReadyGate:
    """Opens when the client can take events: initialized, tools listed, settled. [CHAN-1]"""

    def __init__(self, *, settle_s: float = SETTLE_S, unlisted_s: float = UNLISTED_S) -> None:
        self._settle_s = settle_s
        self._unlisted_s = unlisted_s
        self._initialized = anyio.Event()
        self._listed = anyio.Event()

    def initialized(self) -> None:
        """`notifications/initialized` has arrived."""
        self._initialized.set()

    def listed(self) -> None:
        """A `tools/list` was answered."""
        self._listed.set()

    async def wait(self) -> None:
        """Return once the gate is open."""
        await self._initialized.wait()
        with anyio.move_on_after(self._unlisted_s):
            await self._listed.wait()
        if self._listed.is_set():
            await anyio.sleep(self._settle_s)


class Wire(Protocol):
    """The stream to the client. Positions count bytes since it was opened."""

    async def write(self, data: bytes) -> int:
        """Write all of `data`; the position after it. Raises DeliveryClosed."""

    def read_by_client(self) -> int:
        """The position up to which the client has surely read; what was written, where nobody can tell."""


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

    def __init__(self, wire: Wire, gate: ReadyGate) -> None:
        self._wire = wire
        self._gate = gate

    async def ready(self) -> None:
        """Wait for the gate."""
        await self._gate.wait()

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """Write the whole batch in one piece. Raises DeliveryClosed."""
        position = await self._wire.write(b"".join([channel_event(envelope) for envelope in batch]))
        return _Posted(self._wire, len(batch), position)
