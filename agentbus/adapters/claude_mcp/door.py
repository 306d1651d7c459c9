"""The socket on which our code inside Claude Code, mod.js, asks for what is to be said to its session.

The client gives such code HTTP over a unix socket, and nothing else that could be woken. So a request waits here until
there is something to say. Only the agent process itself is answered. Knows the requests, but no message. Implements
[MOD-6], [MOD-7].
"""

from __future__ import annotations

import json
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from agentbus.adapters.mcp import inbox, peer_socket
from agentbus.core.config import prepare_folder
from agentbus.core.errors import AgentbusError, DeliveryFailed
from agentbus.core.process import Process

__all__ = ["FOLDER", "Door", "Unanswered", "leftovers"]

# The folder in the home that holds the sockets.
FOLDER = "mod"
_SOCKET = re.compile(r"[0-9]{1,10}-[A-Za-z0-9_]*\.sock")
# A request is answered with nothing after this time. The client gives one up after 30 s (measured with 2.1.332).
_POLL_S = 25.0
# A module that waits for nothing for this long is gone: between two of its requests are some milliseconds.
_SILENCE_S = 3.0
# How long a request can take to arrive, and how long it can be. Ours have 200 bytes.
_REQUEST_S = 2.0
_MAX_REQUEST_BYTES = 65_536
# How often it is looked whether the socket is still there: as often as a heartbeat. [WAKE-6]
_LOOK_S = 15.0
_LENGTH = re.compile(rb"^content-length:[ \t]*([0-9]{1,7})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)


def leftovers(folder: Path) -> list[str]:
    """The names in one of our folders of the home that are ours: counts of posts, or such sockets. [UNINST-2]"""
    return peer_socket.leftovers(folder, _SOCKET) if folder.name == FOLDER else inbox.leftovers(folder)


class Unanswered(Exception):
    """A text was given to the module, and it cannot be told what became of it."""


@dataclass(slots=True)
class _Post:
    """One text on its way. `module` is the instance that it was given to; `said` is what that has answered."""

    key: str
    text: str
    may_be_note: bool
    module: str = ""
    said: dict[str, Any] = field(default_factory=dict)


class Door:
    """The socket of the session whose agent process is `host`. `run` has to run for as long as it is to be open."""

    def __init__(self, home: Path, host: Process) -> None:
        self._folder = home / FOLDER
        self._host = host
        self.path = self._folder / f"{inbox.file_name(host)}.sock"
        # Why nobody can ask; empty while somebody could.
        self.gone = "its socket is not open yet"
        # The instance of the module that asks, how many of its requests wait, and when the last one ended.
        self._module = ""
        self._waiting = 0
        self._left_at = float("-inf")
        self._post: _Post | None = None
        self._count = 0
        self._turn = anyio.Lock()
        # Set, and made anew, when any of this has changed.
        self._changed = anyio.Event()

    # -- the module ------------------------------------------------------------------------------------------

    @property
    def is_asking(self) -> bool:
        """Whether the module waits for something to say, or did a moment ago. [MOD-7]"""
        return self._waiting > 0 or time.monotonic() - self._left_at < _SILENCE_S

    async def until_asking(self) -> None:
        """Return once the module asks."""
        while not self.is_asking:
            await self._changed.wait()

    async def until_silent(self) -> None:
        """Return once it has not asked for some seconds."""
        while self.is_asking:
            if self._waiting:
                await self._changed.wait()
            else:
                await anyio.sleep(_SILENCE_S / 10)

    async def give(self, text: str, *, may_be_note: bool) -> str:
        """Give `text` to the module. Returns what it did: "submitted", or "noted" where `may_be_note` allows that.

        Waits as long as the session takes nothing. Raises DeliveryFailed when the session has not got the text, and
        Unanswered when that cannot be told.
        """
        async with self._turn:
            self._count += 1
            post = self._post = _Post(str(self._count), text, may_be_note)
            self._tell()
            try:
                while not post.said:
                    if not self.is_asking or post.module not in ("", self._module):
                        if post.module:
                            raise Unanswered
                        raise DeliveryFailed("its agentbus module does not ask any more")
                    changed = self._changed
                    with anyio.move_on_after(_SILENCE_S):
                        await changed.wait()
            finally:
                self._post = None
        for outcome in ("submitted", "noted"):
            if post.said.get(outcome) is True:
                return outcome
        raise DeliveryFailed(f"the session did not take it: {post.said.get('dropped')}")

    def _tell(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    # -- the socket ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Listen until cancelled. Where no socket is to be had, `gone` says why, and nobody asks."""
        while True:
            try:
                prepare_folder(self._folder)
                peer_socket.clear_dead(self._folder, _SOCKET)
                listener = peer_socket.listen(self.path)
                made = self.path.lstat().st_ino
            except (OSError, AgentbusError) as error:
                self.gone = f"its module has no socket to ask on ({getattr(error, 'strerror', None) or error})"
                await anyio.sleep(_LOOK_S)
                continue
            self.gone = ""
            try:
                await self._accept(listener, made)
            finally:
                listener.close()
                with suppress(OSError):
                    self.path.unlink()

    async def _accept(self, listener: socket.socket, made: int) -> None:
        """Answer who connects, for as long as the socket is where it was made, with that inode."""
        async with anyio.create_task_group() as tasks:
            while True:
                is_due = True
                with anyio.move_on_after(_LOOK_S):
                    await anyio.wait_readable(listener)
                    is_due = False
                if not is_due:
                    with suppress(OSError):  # it has left again, or no descriptor is left
                        connection, _ = listener.accept()
                        connection.setblocking(False)
                        tasks.start_soon(self._talk, connection)
                        continue
                    await anyio.sleep(0.01)
                elif not self._is_there(made):
                    tasks.cancel_scope.cancel()
                    return

    def _is_there(self, made: int) -> bool:
        try:
            return self.path.lstat().st_ino == made
        except OSError:
            return False

    async def _talk(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, TimeoutError, ValueError):
            if peer_socket.caller(connection) not in (None, self._host.pid):
                return
            with anyio.fail_after(_REQUEST_S):
                said = await _request(connection)
            if "post" in said:
                self._hear(said)
                await _answer(connection, {})
            else:
                await self._wait(connection, str(said["module"]))

    def _hear(self, said: dict[str, Any]) -> None:
        post = self._post
        # An answer about an earlier post comes too late: it has been decided without it.
        if post is not None and (said["post"], said.get("module")) == (post.key, post.module):
            post.said = said
            self._tell()

    async def _wait(self, connection: socket.socket, module: str) -> None:
        """Answer a request for what is to be said, when there is something, or after a while."""
        if module != self._module and self.is_asking:
            # Two modules in one client, ours by two ways, or one that was just replaced: it asks again later.
            return
        self._module = module
        self._waiting += 1
        self._tell()
        post = None
        try:
            with anyio.move_on_after(_POLL_S):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_until_hung_up, connection, tasks.cancel_scope)
                    while self._post is None or self._post.module:
                        await self._changed.wait()
                    post = self._post
                    post.module = module
                    tasks.cancel_scope.cancel()
            if post is None:
                await _answer(connection, {})
            else:
                await _answer(connection, {"post": post.key, "text": post.text, "note": post.may_be_note})
        finally:
            self._waiting -= 1
            self._left_at = time.monotonic()
            self._tell()


async def _until_hung_up(connection: socket.socket, scope: anyio.CancelScope) -> None:
    await anyio.wait_readable(connection)
    scope.cancel()


async def _request(connection: socket.socket) -> dict[str, Any]:
    """The JSON object in the body of the request. Raises OSError, and ValueError for anything else."""
    data = b""
    while len(data) < _MAX_REQUEST_BYTES:
        await anyio.wait_readable(connection)
        piece = connection.recv(_MAX_REQUEST_BYTES)
        if not piece:
            break
        data += piece
        head, ended, body = data.partition(b"\r\n\r\n")
        length = _LENGTH.search(head) if ended else None
        if length is not None and len(body) >= int(length[1]):
            said = json.loads(body[: int(length[1])])
            if isinstance(said, dict) and "module" in said:
                return said
            break
    raise ValueError("not a request of the module")


async def _answer(connection: socket.socket, said: dict[str, Any]) -> None:
    body = json.dumps(said, ensure_ascii=False).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
    await peer_socket.write(connection, b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body))
