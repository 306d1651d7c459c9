"""The control socket of a Codex app server: requests, answers and notifications over one connection.

WebSocket over a unix socket, one JSON object a text frame, as measured with Codex 0.158 and 0.169. Only the app server
that started this very process is spoken to. The API is marked experimental: what is missing or different is an error of
one request. Knows nothing about messages. Implements [CODEX-1].
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from agentbus import __version__
from agentbus.core.config import expanded
from agentbus.core.errors import DeliveryFailed
from agentbus.core.process import Process

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

__all__ = ["AppServer", "Refusal", "codex_home", "control_socket"]

# An app server answers in 5 ms. It is asked again after this time, on a connection that is made anew.
_PATIENCE_S = 10.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_UCRED = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid
_SOL_LOCAL, _LOCAL_PEERPID = 0, 2  # unix(4) of macOS
# The longest path that a unix socket address holds, without the NUL (unix(7), unix(4)).
_LONGEST_PATH = 103 if sys.platform == "darwin" else 107


class Refusal(DeliveryFailed):
    """The app server answered a request with an error."""


def codex_home(environment: Mapping[str, str]) -> Path:
    """The folder of Codex's settings for a process with this environment. Raises BrokenSetup as `expanded` does."""
    asked, home = environment.get("CODEX_HOME", ""), environment.get("HOME", "")
    if asked:
        return Path(asked)
    return Path(home, ".codex") if home else Path(expanded("~/.codex", "CODEX_HOME"))


def control_socket(home: Path) -> Path:
    """Where the app server of this folder of settings listens: a link to a path that is short enough."""
    return Path(os.path.realpath(home / "app-server-control" / "app-server-control.sock"))


class AppServer:
    """The app server `owner` at the socket `path`. `heard` is called with each notification: method, parameters."""

    def __init__(self, path: Path, owner: Process, heard: Callable[[str, dict[str, Any]], None]) -> None:
        self.path = path
        self._owner = owner
        self._heard = heard
        self._link: ClientConnection | None = None
        self._last = 0
        self._waiting: dict[int, tuple[anyio.Event, list[dict[str, Any]]]] = {}
        # Why no request can be made just now; "" while the connection stands.
        self.trouble = "its app server has not answered yet"
        # How often a connection was made: what was known over an earlier one has to be asked anew.
        self.connections = 0
        self.changed = anyio.Event()

    def connect(self) -> socket.socket:
        """A connection to the socket, if `owner` listens there. Raises DeliveryFailed, with the reason. [CODEX-1]"""
        if len(os.fsencode(self.path)) > _LONGEST_PATH:
            raise DeliveryFailed(f"the path of its control socket is too long ({self.path})")
        found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            found.setblocking(False)
            found.connect(str(self.path))
            pid = _peer(found)
            if pid is not None and pid != self._owner.pid:
                raise DeliveryFailed(
                    f"process {pid} listens on {self.path}, not process {self._owner.pid}, which started this server"
                )
        except OSError as error:
            found.close()
            raise DeliveryFailed(f"{self.path} does not answer ({error.strerror})") from error
        except BaseException:
            found.close()
            raise
        return found

    async def run(self) -> None:
        """Keep a connection until cancelled."""
        from websockets.exceptions import WebSocketException

        pause_s = _FIRST_PAUSE_S
        while True:
            before = self.connections
            try:
                await self._converse()
                reason = "it has closed the connection"
            except (OSError, WebSocketException, TimeoutError) as error:
                reason = f"{type(error).__name__}: {error}"
            except DeliveryFailed as error:
                reason = str(error)
            self._link = None
            self._set_trouble(f"its app server cannot be reached: {reason}")
            for is_answered, _ in self._waiting.values():
                is_answered.set()
            pause_s = _FIRST_PAUSE_S if self.connections > before else min(2 * pause_s, _LONGEST_PAUSE_S)
            await anyio.sleep(pause_s)

    def _set_trouble(self, trouble: str) -> None:
        self.trouble = trouble
        told, self.changed = self.changed, anyio.Event()
        told.set()

    async def _converse(self) -> None:
        from websockets.asyncio.client import unix_connect

        link = await unix_connect(
            None,
            uri="ws://localhost/",
            sock=self.connect(),
            compression=None,
            max_size=None,
            ping_interval=None,
            open_timeout=_PATIENCE_S,
        )
        self._link = link
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._greet)
                async for frame in link:
                    self._take(frame)
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
        finally:
            link.transport.abort()

    async def _greet(self) -> None:
        about = {"name": "agentbus", "title": "agentbus", "version": __version__}
        await self.ask("initialize", {"clientInfo": about, "capabilities": {"experimentalApi": True}})
        await self._write({"method": "initialized", "params": {}})
        self.connections += 1
        self._set_trouble("")

    def _take(self, frame: str | bytes) -> None:
        try:
            message: Any = json.loads(frame)
        except ValueError:
            return
        if not isinstance(message, dict):
            return
        method, params = message.get("method"), message.get("params")
        if isinstance(method, str):
            # A request to us (an approval, say) is for the session's own client to answer.
            if "id" not in message:
                self._heard(method, params if isinstance(params, dict) else {})
            return
        waiting = self._waiting.get(message.get("id", 0))
        if waiting is not None:
            waiting[1].append(message)
            waiting[0].set()

    async def _write(self, message: dict[str, Any]) -> None:
        from websockets.exceptions import WebSocketException

        if self._link is None:
            raise DeliveryFailed(self.trouble)
        try:
            await self._link.send(json.dumps(message, ensure_ascii=False))
        except (OSError, WebSocketException) as error:
            raise DeliveryFailed(f"its app server takes nothing ({error})") from error

    async def ask(self, method: str, params: dict[str, Any], *, patience_s: float = _PATIENCE_S) -> dict[str, Any]:
        """The result of one request.

        Raises Refusal for an error, and DeliveryFailed when there is no connection or no answer: then it is not known
        whether the request was carried out.
        """
        self._last += 1
        number = self._last
        is_answered, answers = self._waiting[number] = (anyio.Event(), list[dict[str, Any]]())
        try:
            await self._write({"id": number, "method": method, "params": params})
            with anyio.move_on_after(patience_s):
                await is_answered.wait()
        finally:
            del self._waiting[number]
        if not answers:
            raise DeliveryFailed(self.trouble or f"its app server did not answer {method}")
        error = answers[0].get("error")
        if error is not None:
            said = error.get("message") if isinstance(error, dict) else error
            raise Refusal(f"its app server refuses {method} ({str(said)[:200]})")
        result = answers[0].get("result")
        return result if isinstance(result, dict) else {}

    async def send(self, method: str, params: dict[str, Any]) -> None:
        """Make a request without waiting for its answer. Raises DeliveryFailed."""
        self._last += 1
        await self._write({"id": self._last, "method": method, "params": params})


def _peer(connection: socket.socket) -> int | None:
    """The process that listens at the other end; None where the system does not tell."""
    if sys.platform == "linux":
        pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return int(pid) if uid == os.geteuid() else -1
    try:
        return int(connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID))
    except OSError:
        return None
