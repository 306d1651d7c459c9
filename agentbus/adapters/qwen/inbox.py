"""The inbox that Qwen Code gives each session: how a post is framed, and the receipts that come back.

As its documentation says ("Cross-Session Protocol", version 1 of the frames), tried with 0.24.4. A receipt comes to a
socket of ours. A post that gets none is made again under the same id, which Qwen Code knows: it is taken once. The rest
of the delivery is in `adapters/mcp/inbox.py`. Implements [QWEN-1] to [QWEN-3].
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio

from agentbus.adapters.mcp import peer_socket
from agentbus.adapters.mcp.inbox import Address, Inbox, PostBudget, Trouble
from agentbus.core.config import other_program, prepare_folder
from agentbus.core.errors import AgentbusError, DeliveryFailed
from agentbus.core.process import Process

__all__ = ["QwenInbox", "address", "leftovers"]

_VERSION = 1
# A receipt comes within some ms. After this time without one the post is made again.
_RECEIPT_S = 3.0
# How long a connection with a receipt can take to say it, and how long it can be.
_LINE_S = 2.0
_MAX_RECEIPT_BYTES = 65_536
# How a socket for receipts is called: the process of the server, and digits that no other has.
_SOCKET = re.compile(r"\d+-[0-9a-f]{8}\.sock")
# What is said for good: nothing more is pushed to this session.
_FINAL = {
    "denied": "its user has declined a message: no more is pushed",
    "refused": "its setting agents.crossSessionInbound refuses messages",
}
# What is said of one post: a later one can succeed.
_NOT_NOW = {
    "dropped": "its inbox dropped a post, because too many came",
    "expired": "nobody released a message that was held for its user",
    "misaddressed": "it has become another session just now",
}


def address() -> Address | None:
    """Where Qwen Code says that its inbox is; None if it says nothing."""
    path, token = other_program("QWEN_CODE_MESSAGING_SOCKET"), other_program("QWEN_CODE_MESSAGING_TOKEN")
    return Address(Path(path), token) if path and token else None


def leftovers(folder: Path) -> list[str]:
    """The names in `folder` of the home that are sockets for receipts. [UNINST-2]"""
    return peer_socket.leftovers(folder, _SOCKET)


class _Receipts:
    """A socket of ours on which the session says what became of one post."""

    def __init__(self, folder: Path) -> None:
        """Listen. Raises OSError and AgentbusError."""
        prepare_folder(folder)
        self.token = secrets.token_hex(32)
        self.path = folder / f"{os.getpid()}-{secrets.token_hex(4)}.sock"
        self._listener = peer_socket.listen(self.path)

    def close(self) -> None:
        """Remove the socket."""
        self._listener.close()
        with suppress(OSError):
            self.path.unlink()

    async def next(self) -> list[dict[str, Any]]:
        """What the next connection says; empty if it is not the session's."""
        await anyio.wait_readable(self._listener)
        said = bytearray()
        with suppress(OSError), anyio.move_on_after(_LINE_S):
            connection, _ = self._listener.accept()
            with connection:
                connection.setblocking(False)
                while len(said) < _MAX_RECEIPT_BYTES:
                    await anyio.wait_readable(connection)
                    if not (data := connection.recv(_MAX_RECEIPT_BYTES)):
                        break
                    said += data
        lines = []
        for line in said.splitlines():
            with suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    lines.append(found)
        is_ours = bool(lines) and lines[0].get("type") == "auth" and lines[0].get("token") == self.token
        return lines[1:] if is_ours else []


class QwenInbox(Inbox):
    """The inbox at that address, of the session whose agent process is `host`. `session` says which one it has now."""

    def __init__(self, at: Address, host: Process, session: Callable[[], str]) -> None:
        super().__init__(at, host, self._framed)
        self._token = at.token
        self._session = session
        self._folder: Path | None = None
        self._budget: PostBudget | None = None
        self._receipts: _Receipts | None = None
        self._id = ""
        self._last = b""
        # Why nothing more can be posted to this session; empty if it can.
        self._over = ""

    def listen(self, home: Path, budget: PostBudget) -> None:
        """Listen for receipts from now on. Where that cannot be (a home with a long path), what was read is taken."""
        self._budget, self._folder = budget, home / "receipts"
        peer_socket.clear_dead(self._folder, _SOCKET)

    def connect(self) -> socket.socket:
        """See Inbox. Raises DeliveryFailed also when the session takes nothing any more. [QWEN-3]"""
        if self._over:
            raise DeliveryFailed(self._over)
        return super().connect()

    def _framed(self, text: str) -> bytes:
        self._id = secrets.token_hex(16)
        self._close()
        with suppress(OSError, AgentbusError):
            self._receipts = _Receipts(self._folder) if self._folder is not None else None
        post: dict[str, Any] = {
            "msgV": _VERSION,
            "msgId": self._id,
            "type": "user",
            "fromName": "agentbus",
            "toSessionId": self._session(),
            "message": {"role": "user", "content": text},
        }
        if self._receipts is not None:
            post |= {"from": str(self._receipts.path), "replyToken": self._receipts.token}
        lines = ({"msgV": _VERSION, "type": "auth", "token": self._token}, post)
        self._last = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        return self._last

    async def settled(self, failing: Trouble) -> None:
        """Wait until the session has queued the post for its model. Raises DeliveryFailed when it does not. [QWEN-2]"""
        if self._receipts is None:
            return
        try:
            await self._until_settled(self._receipts, failing)
        finally:
            self._close()

    def _close(self) -> None:
        if self._receipts is not None:
            self._receipts.close()
            self._receipts = None

    async def _until_settled(self, receipts: _Receipts, failing: Trouble) -> None:
        is_held = is_again = False
        while True:
            status = ""
            with anyio.move_on_after(_RECEIPT_S):
                while not status:
                    status = self._status(await receipts.next())
            if status == "delivered":
                return
            if status == "held":
                is_held = True
            elif status in _FINAL:
                self._over = _FINAL[status]
                await failing.failed(self._over)
                raise DeliveryFailed(self._over)
            elif status in _NOT_NOW and not (is_again and status == "dropped"):
                # What was posted again is another matter: the first one can have been taken.
                await failing.failed(_NOT_NOW[status])
                raise DeliveryFailed(_NOT_NOW[status])
            if is_held:
                await failing.failed("a message is held for its user, who can release it with /peers")
                continue
            await failing.failed("its inbox does not say what became of a post")
            is_again = True
            self._post_again()

    def _post_again(self) -> None:
        """Make the last post once more, under the same id."""
        if self._budget is None or not self._budget.take():
            return
        # In one write; where it does not fit now, the line has no end, and the session takes nothing from it.
        with self.connect() as connection, suppress(OSError):
            connection.sendall(self._last)

    def _status(self, lines: list[dict[str, Any]]) -> str:
        """What they say about the last post; "" if nothing that is known."""
        for line in lines:
            others = line.get("droppedMsgIds")
            about = {line.get("origMsgId"), *(others if isinstance(others, list) else ())}
            if line.get("action") == "delivery_status" and self._id in about:
                status = line.get("status")
                if status in {"delivered", "held", *_FINAL, *_NOT_NOW}:
                    return str(status)
        return ""
