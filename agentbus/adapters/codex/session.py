"""Finds out which Codex session this server belongs to, and when that session has ended.

One app server has all sessions of a folder of settings, and starts a server for each thread, for each subagent, and a
throw-away one for `/mcp`. Neither the environment nor the processes tell them apart. So this server calls its own tool
through the app server, in each loaded thread, with a number that nobody else knows: the thread whose call arrives here
is its own. Implements [CODEX-1] to [CODEX-3], [CODEX-9].
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import anyio
import anyio.abc

from agentbus.adapters.codex.app_server import AppServer, codex_home, control_socket
from agentbus.adapters.codex.delivery import CARRIER, AppServerDelivery
from agentbus.adapters.codex.queue import CARRIER as QUEUE
from agentbus.adapters.codex.queue import QueueDelivery, own_thread
from agentbus.adapters.codex.rollout import Rollout
from agentbus.adapters.codex.thread import Thread
from agentbus.adapters.codex.watching import origin, terminal
from agentbus.adapters.mcp.hosts import Choice, Host, Mode, find_host
from agentbus.core import config, process
from agentbus.core.bus import PULL
from agentbus.core.config import Settings
from agentbus.core.errors import AgentbusError, DeliveryFailed
from agentbus.core.names import session_wish
from agentbus.core.process import Life, Process
from agentbus.core.session import Session
from agentbus.core.stderr import say

__all__ = ["CodexSession", "is_codex", "judge"]

# In the capabilities of every server that belongs to a session; `/mcp` starts one without it.
_OF_A_SESSION = "codex/auth-change"
_NONCE = "agentbus/nonce"
# With this a new session tells the others of its terminal that they are left. The value is the terminal's address.
_LEFT = "agentbus/left"
_TURN = "x-codex-turn-metadata"
# How long the own thread is looked for; it takes 25 to 85 ms.
_FIND_S = 30.0
_FIND_PAUSE_S = 0.05
_TRIES_HERE = 20
# A subagent's server is started by its first call. A server without a call after this time belongs to no subagent.
_FIRST_CALL_S = 1.0
# How long a session that is left has to say that it has heard it.
_LEAVE_S = 2.0
# How long a session that is left waits for what was pushed and has not arrived: usually that takes 20 to 50 ms.
_SETTLE_S = 0.25
# How often the terminal is looked for, where its end is not told: one read of /proc.
_LOOK_S = 0.5


def is_codex(arguments: Sequence[str]) -> bool:
    """Whether these are the arguments of a Codex process."""
    return bool(arguments) and os.path.basename(arguments[0]).removesuffix(".exe") == "codex"


def judge(arguments: Sequence[str]) -> str:
    """Why a session of the Codex process with these arguments has no app server of its own to push through."""
    words = [word for word in arguments[1:] if not word.startswith("-")]
    if words[:1] and words[0] in ("exec", "e", "review"):
        return "codex exec shows only what a tool returns"
    if words[:1] == ["app-server"]:
        return "this app server has no control socket of its own"
    why = "--no-daemon" if "--no-daemon" in arguments else "-c" if _overrides(arguments) else ""
    return (
        f"codex was started with {why}, and so without its app server" if why else "codex runs without its app server"
    )


def _overrides(arguments: Sequence[str]) -> bool:
    return any(word in ("-c", "--config") or word.startswith("--config=") for word in arguments)


class CodexSession:
    """The session of this server: see Newcomer. `settings` are those of this process. `asked` is AGENTBUS_DELIVERY."""

    def __init__(self, settings: Settings, asked: str = "auto", host: Host | None = None) -> None:
        self.over = anyio.Event()
        self._settings = settings
        self._asked = asked
        self._host = host or find_host(is_codex)
        self._nonce = uuid.uuid4().hex
        self._started_ms = time.time_ns() // 1_000_000
        self._greeted = anyio.Event()
        self._first_call = anyio.Event()
        self._is_of_a_session = False
        self._own_thread = ""
        self._meta: Mapping[str, Any] = {}
        self._server: AppServer | None = None
        self._thread: Thread | None = None
        # The terminal of this session: its address, and its process.
        self._origin = ""
        self._terminal: Process | None = None
        # Threads that have begun since, perhaps in our terminal.
        self._begun: list[str] = []
        self._name = ""
        self._changed = anyio.Event()
        self._ended = ""

    # -- what the client says ------------------------------------------------------------------------------

    def greeted(self, params: Mapping[str, Any]) -> None:
        """See Newcomer."""
        capabilities = params.get("capabilities")
        experimental = capabilities.get("experimental") if isinstance(capabilities, dict) else None
        self._is_of_a_session = isinstance(experimental, dict) and _OF_A_SESSION in experimental
        self._greeted.set()

    def called(self, meta: Mapping[str, Any]) -> None:
        """See Newcomer."""
        if meta.get(_NONCE) == self._nonce:
            self._own_thread = str(meta.get("threadId") or "")
            self._nudge()
        elif self._origin and meta.get(_LEFT) == self._origin:
            self._end("its terminal has turned to another conversation")
        elif not meta.keys() & {_NONCE, _LEFT} and not self._first_call.is_set():
            self._meta = meta
            self._first_call.set()
            self._nudge()

    def is_main_agent(self, meta: Mapping[str, Any]) -> bool | None:
        """Whether the main agent made the call with this `_meta`; None if that cannot be told. [READ-7]"""
        source = _turn(meta).get("thread_source")
        return None if source is None else source != "subagent"

    def _nudge(self) -> None:
        told, self._changed = self._changed, anyio.Event()
        told.set()

    def _heard(self, method: str, params: Mapping[str, Any]) -> None:
        """Take a notification of the app server."""
        if self._thread is None:
            return
        self._thread.heard(method, params)
        if method == "thread/started":
            begun = params.get("thread")
            if isinstance(begun, dict) and not begun.get("ephemeral") and not begun.get("parentThreadId"):
                self._begun.append(str(begun.get("id")))
                self._nudge()
        elif params.get("threadId") == self._thread.id:
            if method == "thread/name/updated":
                self._name = _wish(params.get("threadName"))
                self._nudge()
            elif method == "thread/closed":
                self._end("Codex has closed the conversation")

    def _end(self, why: str) -> None:
        if not self._ended:
            self._ended = why
            self._nudge()

    # -- which session it is -------------------------------------------------------------------------------

    async def arrive(self, tasks: anyio.abc.TaskGroup) -> Choice:
        """See Newcomer."""
        await self._greeted.wait()
        # A tool is called in a session only, whatever was said in the handshake.
        while not self._is_of_a_session and not self._first_call.is_set():
            await self._first_call.wait()
        server = self._open()
        if isinstance(server, str):
            return await self._without_door(server)
        self._server = server
        tasks.start_soon(server.run)
        about = await self._find(server)
        if about is None:
            return await self._without_door(server.trouble or "its app server does not say which thread this is")
        thread = self._thread = Thread(server, self._own_thread)
        if about.get("parentThreadId"):
            return self._guest(str(about.get("sessionId") or about["parentThreadId"]))
        self._origin = await origin(server, self._own_thread)
        self._terminal = terminal(self._origin)
        await self._take_over(server)
        self._name = _wish(about.get("name"))
        tasks.start_soon(thread.run)
        choice = Choice(
            host=self._terminal or self._host.process,
            mode=Mode.PULL,
            delivery=PULL,
            reason="AGENTBUS_DELIVERY is pull",
            settings=self._settings_of(self._terminal),
            conversation=self._own_thread,
        )
        if self._asked == PULL:
            return choice
        return replace(
            choice,
            mode=Mode.PUSHED,
            delivery=CARRIER,
            reason="what comes goes in through Codex's app server",
            make=lambda link: AppServerDelivery(server, thread, link.frames, self._left),
            record=Rollout(str(about.get("path") or "")),
        )

    def _open(self) -> AppServer | str:
        """The app server that has started this process, or why there is none."""
        ours = {name: config.other_program(name) for name in ("CODEX_HOME", "HOME")}
        # Codex hands its environment to no server; what is set in ours, the entry has set.
        theirs = {} if ours["CODEX_HOME"] else process.environment(self._host.process)
        server = AppServer(control_socket(codex_home(theirs or ours)), self._host.process, self._heard)
        try:
            server.connect().close()
        except DeliveryFailed as error:
            if "app-server" in self._host.arguments:
                return str(error)
            is_named = self._host.is_client
            return judge(self._host.arguments) if is_named else "this server was not started by codex"
        return server

    async def _find(self, server: AppServer) -> dict[str, Any] | None:
        """What the app server says about our own thread; None if it cannot be found. [CODEX-2]"""
        with anyio.move_on_after(_FIND_S):
            tries = 0
            while not self._own_thread:
                changed = self._changed
                tries += 1
                if self._is_subagents():
                    return None
                with suppress(DeliveryFailed):
                    # Nearly always it is one of our folder; a thread that was resumed elsewhere can say another.
                    for thread_id in await _loaded(server, self._settings.cwd if tries <= _TRIES_HERE else ""):
                        await server.send("mcpServer/tool/call", _own_call(thread_id, {_NONCE: self._nonce}))
                with anyio.move_on_after(_FIND_PAUSE_S):
                    await changed.wait()
            while True:
                with suppress(DeliveryFailed):
                    return await Thread(server, self._own_thread).read()
                await anyio.sleep(_FIND_PAUSE_S)
        return None

    async def _take_over(self, server: AppServer) -> None:
        """Tell the sessions that our terminal had before that they are left. [CODEX-3]"""
        if not self._origin:
            return
        with suppress(DeliveryFailed):
            for thread_id in await _loaded(server):
                if thread_id != self._own_thread and await origin(server, thread_id) == self._origin:
                    call = _own_call(thread_id, {_LEFT: self._origin})
                    await server.ask("mcpServer/tool/call", call, patience_s=_LEAVE_S)

    def _is_subagents(self) -> bool:
        return _turn(self._meta).get("thread_source") == "subagent"

    async def _without_door(self, reason: str) -> Choice:
        """How a session receives whose app server cannot be used: by pull. [CODEX-9]"""
        with anyio.move_on_after(_FIRST_CALL_S):
            await self._first_call.wait()
        if self._is_subagents():
            return self._guest(str(_turn(self._meta).get("session_id") or self._meta.get("sessionId") or ""))
        thread_id = str(self._meta.get("threadId") or "")
        is_one = self._host.is_client and "app-server" not in self._host.arguments
        choice = Choice(
            host=self._host.process,
            mode=Mode.PULL,
            delivery=PULL,
            reason=reason,
            # A process with one session has the environment of that session.
            settings=self._settings_of(self._host.process) if is_one else None,
            conversation=thread_id,
        )
        if not self._is_terminal():
            return choice
        thread_id = thread_id or own_thread(self._host.process, self._started_ms)
        choice = replace(choice, conversation=thread_id)
        if not thread_id or self._asked == PULL:
            return choice
        return replace(
            choice,
            delivery=QUEUE,
            reason=f"{reason}; it is told within 10 s that mail waits",
            make=lambda _link: QueueDelivery(self._host.process, thread_id),
        )

    def _is_terminal(self) -> bool:
        """Whether the process that started this server is a terminal program itself: then it has one session."""
        words = [word for word in self._host.arguments[1:] if not word.startswith("-")]
        return self._host.is_client and words[:1] not in (["exec"], ["e"], ["review"], ["app-server"])

    def _guest(self, root: str) -> Choice:
        reason = "it is the server of a subagent"
        return Choice(host=self._host.process, mode=Mode.PULL, delivery=PULL, reason=reason, guest_of=root)

    def _settings_of(self, terminal: Process | None) -> Settings:
        """The settings of this session: what its terminal says, else the name of its thread, else our own. [CODEX-9]"""
        environment = process.environment(terminal) if terminal is not None else {}
        said = {name: value for name, value in environment.items() if name.startswith("AGENTBUS_")}
        home = said.get("AGENTBUS_HOME") or self._settings.home
        theirs = config.load(said, home=home, folder=self._settings.cwd)
        own = replace(self._settings, root=theirs.root, groups=theirs.groups or self._settings.groups)
        if "AGENTBUS_NAME" in said:
            return replace(own, name=theirs.name, name_note=theirs.name_note, name_was_asked=theirs.name_was_asked)
        if self._name and not own.name_was_asked:
            return replace(own, name=self._name, name_was_asked=True)
        return own

    # -- until it has ended --------------------------------------------------------------------------------

    async def attend(self, session: Session) -> str:
        """See Newcomer."""
        name = self._name
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch_terminal)
            if self._server is None and self._is_terminal():
                tasks.start_soon(self._watch_siblings, session)
            while not self._left():
                changed = self._changed
                if self._name and self._name != name:
                    name = self._name
                    try:
                        await session.rename(name)
                    except AgentbusError as error:
                        say(f'the conversation is called "{name}" now, but the peer is not: {error}')
                await self._look_at_begun()
                if not self._ended:
                    await changed.wait()
            # What the last turn was given still counts, and is not given to the next session again.
            if self._thread is not None:
                await self._thread.settle(_SETTLE_S)
            tasks.cancel_scope.cancel()
        return self._ended

    def _left(self) -> str:
        """Why nobody watches this session any more; "" as long as somebody does, or that cannot be told. [CODEX-3]"""
        if self._terminal is not None and process.life(self._terminal) is Life.ENDED:
            self._end("its terminal has ended")
        return self._ended

    async def _watch_terminal(self) -> None:
        if self._terminal is None:
            return
        with suppress(OSError, AttributeError):  # before Linux 5.3, or no descriptor left
            fd = os.pidfd_open(self._terminal.pid)
            try:
                await anyio.wait_readable(fd)
            finally:
                os.close(fd)
        while True:
            if self._left():
                return
            await anyio.sleep(_LOOK_S)

    async def _watch_siblings(self, session: Session) -> None:
        """Without an app server, the newest session of a terminal is the one that it shows. [CODEX-3]

        The former one leaves, and the newest has its name.
        """
        former = ""
        while True:
            own = session.peer
            with suppress(AgentbusError):
                others = [
                    peer for peer in await session.peers() if peer.host == own.host and peer.session != own.session
                ]
                if any(peer.started_at > own.started_at for peer in others):
                    self._end("its terminal has turned to another conversation")
                elif others:
                    former = others[0].name
                elif former:
                    await session.rename(former)
                    former = ""
            await anyio.sleep(_LOOK_S)

    async def _look_at_begun(self) -> None:
        while self._begun and self._server is not None and self._origin:
            if await origin(self._server, self._begun.pop()) == self._origin:
                self._end("its terminal has turned to another conversation")


async def _loaded(server: AppServer, cwd: str = "") -> list[str]:
    """The loaded threads of main agents, newest first; only those in `cwd`, if that is given. Raises DeliveryFailed."""
    rows = (await server.ask("thread/loaded/list", {})).get("data")
    found = []
    for thread_id in map(str, rows if isinstance(rows, list) else ()):
        about = await Thread(server, thread_id).read()
        is_here = not cwd or _is_same_folder(str(about.get("cwd")), cwd)
        # A title is asked for in a thread of its own. A subagent's servers are started by the first call.
        if not about.get("ephemeral") and not about.get("parentThreadId") and is_here:
            found.append(thread_id)
    return sorted(found, reverse=True)  # UUIDv7: in the order of time


def _is_same_folder(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _own_call(thread_id: str, meta: dict[str, str]) -> dict[str, Any]:
    """A call of our own tool in a thread; the server of that thread gets it, with this `_meta`."""
    return {"threadId": thread_id, "server": "agentbus", "tool": "whoami", "arguments": {}, "_meta": meta}


def _turn(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    found = meta.get(_TURN)
    return found if isinstance(found, dict) else {}


def _wish(name: object) -> str:
    """The peer's name for a thread of this name; "" for none. A title of several words is no name."""
    is_one_word = isinstance(name, str) and not any(map(str.isspace, name))
    return (session_wish(name) or "") if is_one_word and isinstance(name, str) else ""
