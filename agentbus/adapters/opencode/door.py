"""The plugin delivery: pending messages go, as one text, to our plugin in OpenCode, which puts them into a session.

The plugin says when OpenCode builds a request to its model with a message in it. That is both: taken, and read. A post
has a key, so that it can be repeated after the connection was lost: the plugin puts it into a session once. Knows the
lines that plugin.js speaks, but not MCP. Implements [PLUG-2] to [PLUG-4], [INBOX-1], [INBOX-2], [INBOX-5].
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio

from agentbus.adapters.mcp import peer_socket
from agentbus.adapters.mcp.element import CHANNEL, Frames
from agentbus.adapters.mcp.gate import ReadyGate
from agentbus.adapters.mcp.inbox import Address, Trouble, compose
from agentbus.core.errors import DeliveryFailed
from agentbus.core.model import Envelope
from agentbus.core.ports import Receipt, Shown
from agentbus.core.process import Process

__all__ = ["Door", "PluginDelivery", "Requests", "leftovers"]

# How long a start waits for the plugin's first line. It comes within some ms, unless OpenCode is busy starting itself.
_HELLO_S = 1.0
# How long to wait before a connection that was lost is made again.
_AGAIN_S = 1.0
_READ_BYTES = 65_536
# How plugin.js names its sockets: the process, and six digits that no other has.
_SOCKET = re.compile(r"\d+-[0-9a-f]{6}\.sock")
# OpenCode takes a text of any length (200 kB measured), so no message is only announced.
_ANY_LENGTH = 1 << 30
# The place where it is seen what a model was given; `doctor` shows it.
_PLACE = "the requests that OpenCode builds for its model"


def leftovers(folder: Path) -> list[str]:
    """The names in `folder` of the home that are sockets of our plugin. [UNINST-2]"""
    return peer_socket.leftovers(folder, _SOCKET)


class Door:
    """The connection to the plugin in the agent process `host`. Nothing in it blocks, except `open`."""

    def __init__(self, at: Address, host: Process) -> None:
        self._at = at
        self._host = host
        self._connection: socket.socket | None = None
        self._tried_at = -_AGAIN_S
        self._unsent = bytearray()
        self._unread = b""
        # A key is that of one post of one server: another one begins anew.
        self._nonce = os.urandom(4).hex()
        self._count = 0
        # What was handed over and not given to the model yet, in order: the line, and the messages in it.
        self._posts: dict[str, tuple[bytes, set[Shown]]] = {}
        self._has_said = False
        # What the plugin said last: the session that it posts to, and why messages have to be held back.
        self.session = ""
        self.held = ""
        # What the model was given, in that order.
        self.given: list[set[Shown]] = []
        # Why there is no connection; empty if there is one.
        self.gone = ""

    def open(self) -> None:
        """Connect, and wait a moment for what the plugin says first. Raises DeliveryFailed."""
        give_up_at = time.monotonic() + _HELLO_S
        self.poll()
        while self._connection is not None and not self._has_said and time.monotonic() < give_up_at:
            select.select([self._connection], [], [], max(0.0, give_up_at - time.monotonic()))
            self.poll()
        if self._connection is None:
            raise DeliveryFailed(self.gone)

    def poll(self) -> None:
        """Send and read what can be sent and read now. Connects anew, if the connection was lost."""
        if self._connection is None and time.monotonic() - self._tried_at >= _AGAIN_S:
            self._connect()
        if self._connection is None:
            return
        try:
            with suppress(BlockingIOError):
                while self._unsent:
                    del self._unsent[: self._connection.send(self._unsent)]
            with suppress(BlockingIOError):
                while data := self._connection.recv(_READ_BYTES):
                    *lines, self._unread = (self._unread + data).split(b"\n")
                    for line in lines:
                        self._take(json.loads(line))
                self._lose("the plugin has closed its socket")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._lose(f"the plugin cannot be understood ({error})")

    def _connect(self) -> None:
        self._tried_at = time.monotonic()
        try:
            self._connection = peer_socket.connect(self._at.path, self._host)
        except FileNotFoundError:
            self.gone = f"{self._at.path} is gone"
        except DeliveryFailed as error:
            self.gone = str(error)
        else:
            self.gone = ""
            # The plugin forgot what was not in a session yet, and knows the rest by its key.
            self._unsent[:] = _line({"token": self._at.token}) + b"".join(line for line, _ in self._posts.values())

    def close(self) -> None:
        """Let go of the connection. What was not given to the model yet is forgotten by both ends."""
        self._posts.clear()
        self._lose("it was closed")

    def _lose(self, why: str) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection, self._unread, self.gone = None, b"", why
        self._unsent.clear()

    def _take(self, said: dict[str, Any]) -> None:
        if "state" in said:
            self._has_said = True
            self.session, self.held = str(said["state"]["session"]), str(said["state"]["held"])
        elif "taken" in said:
            post = self._posts.pop(said["taken"], None)
            if post is not None:
                self.given.append(post[1])

    async def post(self, text: str, batch: Sequence[Envelope]) -> str:
        """Hand over `text`, which holds `batch`. Returns its key. Waits while the plugin reads nothing."""
        self._count += 1
        key = f"{self._nonce}-{self._count}"
        line = _line({"post": key, "text": text})
        self._posts[key] = (line, {(one.id, one.sent_at) for one in batch})
        if self._connection is not None:
            self._unsent += line
        self.poll()
        while self._unsent and self._connection is not None:
            await anyio.wait_writable(self._connection)
            self.poll()
        return key

    def is_given(self, key: str) -> bool:
        """Whether the model was given that post."""
        if key in self._posts:
            self.poll()
        return key not in self._posts


def _line(said: dict[str, str]) -> bytes:
    return json.dumps(said, ensure_ascii=False).encode() + b"\n"


class _Posted:
    """The receipt of a post: taken, once OpenCode has built a request with it. [PLUG-3]"""

    def __init__(self, door: Door, key: str, count: int) -> None:
        self.count = count
        self._door = door
        self._key = key

    def taken(self) -> bool:
        return self._door.is_given(self._key)


class PluginDelivery:
    """Hands pending messages to the plugin.

    Calls `report` with the reason when that has failed for long, and with an empty reason when it works again.
    """

    carrier = "plugin"

    def __init__(
        self, door: Door, gate: ReadyGate, report: Callable[[str], Awaitable[None]], frames: Frames = CHANNEL
    ) -> None:
        self._door = door
        self._gate = gate
        self._frames = frames
        self._failing = Trouble(report)

    @property
    def trouble(self) -> str:
        """Why nothing could be handed over for long; empty if it works."""
        return self._failing.said

    async def ready(self) -> None:
        """Wait until the session has the tools to answer with."""
        await self._gate.wait()

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """Hand over the first envelopes of `batch` as one text. Raises DeliveryFailed while there is no connection."""
        self._door.poll()
        if self._door.gone:
            await self._failing.failed(self._door.gone)
            raise DeliveryFailed(self._door.gone)
        text, count = compose(batch, "", self._frames, _ANY_LENGTH)
        receipt = _Posted(self._door, await self._door.post(text, batch[:count]), count)
        await self._failing.ended()
        return receipt


class Requests:
    """What the plugin saw in the requests to the model: see Record in the ports. Kept in memory alone. [PLUG-3]"""

    def __init__(self, door: Door) -> None:
        self._door = door

    def place(self) -> str:
        """Always the same: a connection has one record."""
        return _PLACE

    def end(self, place: str) -> int:
        """How many posts were given; 0 for the record of another adapter."""
        return len(self._door.given) if place == _PLACE else 0

    def look(self, place: str, offset: int) -> tuple[set[Shown], int]:
        """The next post that was given."""
        self._door.poll()
        if place != _PLACE or offset >= len(self._door.given):
            return set(), offset
        return self._door.given[offset], offset + 1
