"""The socket on which the hooks of a session ask its server, and what the server learns by that about the session.

Only a process below our own agent process is answered. While a subagent works, nothing is given: the hooks of its tools
cannot be told from those of the main agent. Knows the lines of hook.py, but not MCP. Implements [GEMINI-1], [GEMINI-5].
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio

from agentbus.adapters.gemini.delivery import AFTER_AGENT, AFTER_TOOL, BEFORE_AGENT, HookDelivery
from agentbus.adapters.gemini.hook import FOLDER
from agentbus.adapters.gemini.records import Chat
from agentbus.adapters.mcp import peer_socket
from agentbus.adapters.mcp.gate import ReadyGate
from agentbus.core import process
from agentbus.core.config import prepare_folder
from agentbus.core.errors import AgentbusError
from agentbus.core.process import Process

__all__ = ["BEFORE_TOOL", "SUBAGENT_TOOL", "Hooks", "leftovers"]

BEFORE_TOOL = "BeforeTool"
# The tool with which Gemini CLI starts a subagent, and waits for its end.
SUBAGENT_TOOL = "invoke_agent"
# How often to look whether the socket is still in its place.
_LOOK_S = 3.0
# How long a hook can take to say its line, and to print its answer; how long that line can be.
_LINE_S = 3.0
_MAX_LINE_BYTES = 131_072
# How a socket of ours is called: the agent process, and digits that no other has.
_SOCKET = re.compile(r"\d+-[0-9a-f]{8}\.sock")
# What Gemini CLI calls a session.
_SESSION_ID = re.compile(r"[0-9a-zA-Z-]{8,64}")


def leftovers(folder: Path) -> list[str]:
    """The names in `folder` of the home that are sockets of ours. [UNINST-2]"""
    return peer_socket.leftovers(folder, _SOCKET)


class Hooks:
    """Listens for the hooks of the session whose agent process is `host`. `run` answers them, by `delivery`.

    `report` is called with the reason when no hook can reach this server, and with "" when one can again.
    """

    def __init__(
        self,
        host: Process,
        home: Path,
        chat: Chat,
        delivery: HookDelivery,
        gate: ReadyGate,
        report: Callable[[str], Awaitable[None]],
    ) -> None:
        self._host = host
        self._gate = gate
        self._folder = home / FOLDER
        self._path = self._folder / f"{host.pid}-{secrets.token_hex(4)}.sock"
        self._chat = chat
        self._delivery = delivery
        self._report = report
        self._listener: socket.socket | None = None
        self._no_socket = ""
        self._subagents = 0
        # Whether a hook has asked, and whether a tool of ours was called before that: then none will.
        self._is_heard = False
        self._is_called = False
        # What Gemini CLI calls the session; "" before the first hook.
        self.session = ""
        delivery.troubled = self.trouble
        peer_socket.clear_dead(self._folder, _SOCKET)

    @property
    def is_main_agent(self) -> bool | None:
        """Whether the main agent makes the tool calls that come now; None if that cannot be told. [READ-7]"""
        return not self._subagents if self._is_heard else None

    def trouble(self) -> str:
        """Why no hook asks; empty if nothing is known to be wrong. Asked for each result of a tool."""
        # The hook of the user's prompt comes before every call of a tool, if hooks come at all.
        self._is_called = self._is_called or self._gate.is_listed
        return self._said()

    def _said(self) -> str:
        if self._no_socket:
            return f"no socket for its hooks is to be had ({self._no_socket})"
        return "its hooks do not run: agentbus doctor says why" if self._is_called and not self._is_heard else ""

    def _listen(self) -> None:
        try:
            prepare_folder(self._folder)
            self._listener = peer_socket.listen(self._path)
            self._no_socket = ""
        except (OSError, AgentbusError) as error:
            self._no_socket = str(error)

    def close(self) -> None:
        """Remove the socket."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            with suppress(OSError):
                self._path.unlink()

    async def run(self) -> None:
        """Answer hooks until cancelled. A server that stands aside does not, and has no socket. [TWIN-1]"""
        told = ""
        try:
            async with anyio.create_task_group() as tasks:
                while True:
                    if self._listener is None or not self._path.exists():
                        self.close()
                        self._listen()
                    if (said := self._said()) != told:
                        await self._report(said)
                        told = said
                    if self._listener is None:
                        await anyio.sleep(_LOOK_S)
                        continue
                    with anyio.move_on_after(_LOOK_S):
                        await anyio.wait_readable(self._listener)
                        try:
                            tasks.start_soon(self._hear, self._listener.accept()[0])
                        except BlockingIOError:
                            pass  # the hook has ended
                        except OSError:
                            await anyio.sleep(_LOOK_S)  # no descriptor is left, say: it would be asked without a pause
        finally:
            self.close()

    async def _hear(self, connection: socket.socket) -> None:
        with connection:
            connection.setblocking(False)
            if not self._is_below(connection):
                return
            with suppress(OSError, ValueError, AttributeError, RecursionError):
                said = json.loads(await _line(connection))
                event = str(said.get("hook_event_name"))
                if self._note(event, said):
                    await self._delivery.give(event, str(said.get("prompt")), lambda output: _hand(connection, output))
                # Where something was handed over, nobody reads this any more.
                await _write(connection, b"\n")

    def _is_below(self, connection: socket.socket) -> bool:
        """Whether the other end is a process below our agent process. Where the system does not tell: any of ours."""
        if sys.platform != "linux":
            return True
        try:
            pid, uid = peer_socket.other_end(connection)
        except OSError:
            return False
        return uid == os.geteuid() and self._host in process.ancestors(pid)

    def _note(self, event: str, said: Mapping[str, Any]) -> bool:
        """Learn from an event. Returns whether it is one at which the main agent can be given something."""
        self._is_heard = True
        session = str(said.get("session_id"))
        self.session = session if _SESSION_ID.fullmatch(session) else ""
        self._chat.turn_to(str(said.get("transcript_path")))
        is_subagents = said.get("tool_name") == SUBAGENT_TOOL
        if event in (BEFORE_AGENT, AFTER_AGENT):
            self._subagents = 0
        elif event == BEFORE_TOOL and is_subagents:
            self._subagents += 1
        elif event == AFTER_TOOL and is_subagents:
            self._subagents = max(0, self._subagents - 1)
        return event in (BEFORE_AGENT, AFTER_AGENT, AFTER_TOOL) and not self._subagents


async def _hand(connection: socket.socket, output: Mapping[str, Any]) -> bool:
    """Let a hook print `output`. Returns whether it says that it has."""
    with suppress(OSError), anyio.move_on_after(_LINE_S):
        await _write(connection, json.dumps(output).encode() + b"\n")
        return await _line(connection) == b""
    return False


async def _line(connection: socket.socket) -> bytes:
    """The next line, without its end. Raises OSError when there is none."""
    found = bytearray()
    with anyio.fail_after(_LINE_S):
        while not found.endswith(b"\n"):
            await anyio.wait_readable(connection)
            data = connection.recv(65_536)
            if not data or len(found) > _MAX_LINE_BYTES:
                raise OSError("the hook has ended")
            found += data
    return bytes(found[:-1])


async def _write(connection: socket.socket, data: bytes) -> None:
    with anyio.fail_after(_LINE_S):
        await peer_socket.write(connection, data)
