"""A stand-in for the app server that Codex's sessions share, as measured with 0.169: its control socket and threads.

It is a WebSocket on a unix socket. `start` gives it a thread, whose MCP server is reached by `on_call`. A turn answers
at once, unless `is_busy`: then a tool runs, and what is pushed waits until `end_tool`, or is dropped by `interrupt`.
`is_streaming`: an answer is being written, and each push discards it. `requests` are those of the model, each with what
was new in it.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from websockets.exceptions import WebSocketException
from websockets.sync.server import ServerConnection, unix_serve

from tests.support.inbox_stand_in import now

MAX_CHARS = 1_048_576
_PIECE_BYTES = 4_000


class StandInThread:
    """One thread, and its rollout file at `path`."""

    def __init__(self, thread_id: str, path: Path, cwd: str, origin: str, parent: str | None, name: str | None) -> None:
        self.about: dict[str, Any] = {
            "id": thread_id,
            "sessionId": parent or thread_id,
            "parentThreadId": parent,
            "ephemeral": False,
            "cwd": cwd,
            "name": name,
            "path": str(path),
        }
        self.origin = origin
        self.items: list[dict[str, Any]] = []
        self.waiting: list[dict[str, Any]] = []
        self.requests: list[list[str]] = []
        self.lines: list[str] = []
        self.discarded = 0
        self.is_busy = self.is_streaming = False
        self.answers = True
        self.on_call: Callable[[dict[str, Any]], None] = lambda _params: None
        self._contexts: dict[str, str] = {}

    @property
    def is_active(self) -> bool:
        return self.is_busy or self.is_streaming

    def status(self) -> dict[str, Any]:
        return {"type": "active", "activeFlags": []} if self.is_active else {"type": "idle"}

    def take(self, params: dict[str, Any]) -> None:
        """A turn/start."""
        if self.is_busy:
            self.waiting.append(params)
            return
        self.discarded += self.is_streaming
        self.give([params])

    def give(self, pushed: Sequence[dict[str, Any]]) -> None:
        """Put what was pushed into the model's context, and let the model answer."""
        fresh: list[str] = []
        rows: list[dict[str, Any]] = []
        for params in pushed:
            context = {key: one["value"] for key, one in params.get("additionalContext", {}).items()}
            for key, value in sorted(context.items()):
                # What was given before, under the same key, is left out. What is too long loses its middle.
                if self._contexts.get(key) == value:
                    continue
                cut = value if len(value.encode()) <= _PIECE_BYTES else value[:1900] + " ... " + value[-1900:]
                fresh.append(cut)
                rows.append({"type": "function_call_output", "name": "agentbus", "namespace": "agent", "output": cut})
            self._contexts = context
            text = params["input"][0]["text"]
            fresh.append(text)
            self.lines.append(text)
            self.items.append({"type": "userMessage", "clientId": params["clientUserMessageId"]})
            rows.append({"type": "message", "role": "user", "content": text})
        self.requests.append(fresh)
        if self.answers:
            rows.append({"type": "message", "role": "assistant", "content": "ok"})
        with Path(self.about["path"]).open("a") as file:
            for row in rows:
                file.write(json.dumps({"timestamp": now(), "type": "response_item", "payload": row}) + "\n")


class AppServerStandIn:
    """Listens at `path` until closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.threads: dict[str, StandInThread] = {}
        self.asked: list[str] = []
        # Methods that it refuses, or whose request it takes and whose answer is lost with the connection.
        self.refused: dict[str, str] = {}
        self.breaks: set[str] = set()
        self._links: set[ServerConnection] = set()
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(16)
        self._server = unix_serve(self._speak, sock=listener, compression=None, max_size=None)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def start(
        self,
        thread_id: str,
        cwd: str = "/",
        *,
        origin: str = "",
        parent: str | None = None,
        name: str | None = None,
    ) -> StandInThread:
        """A new thread; every client is told."""
        rollout = self.path.parent / f"rollout-{thread_id}.jsonl"
        thread = self.threads[thread_id] = StandInThread(thread_id, rollout, cwd, origin, parent, name)
        self.tell("thread/started", thread=thread.about)
        return thread

    def tell(self, method: str, **params: Any) -> None:
        """Send a notification to every client."""
        for link in list(self._links):
            with suppress(WebSocketException):
                link.send(json.dumps({"method": method, "params": params}))

    def tell_status(self, thread: StandInThread) -> None:
        self.tell("thread/status/changed", threadId=thread.about["id"], status=thread.status())

    def set(self, thread: StandInThread, *, busy: bool = False, streaming: bool = False) -> None:
        """A tool begins to run, or an answer to be written, or the turn is over."""
        thread.is_busy, thread.is_streaming = busy, streaming
        self.tell_status(thread)

    def end_tool(self, thread: StandInThread) -> None:
        """The tool ends: what has waited goes to the model with its result."""
        waiting, thread.waiting = thread.waiting, []
        if waiting:
            thread.give(waiting)
        self.set(thread)

    def interrupt(self, thread: StandInThread) -> None:
        """The person presses Esc: what has waited is gone."""
        thread.waiting.clear()
        self.set(thread)

    def drop_links(self) -> None:
        """Close every connection."""
        for link in list(self._links):
            with suppress(OSError):  # it has gone by itself
                link.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.drop_links()
        self._server.shutdown()
        self._thread.join(10)
        self.path.unlink(missing_ok=True)

    def _speak(self, link: ServerConnection) -> None:
        self._links.add(link)
        try:
            for frame in link:
                message = json.loads(frame)
                if "id" in message:
                    self._answer(link, message)
        except (OSError, WebSocketException):
            pass  # the client is gone
        finally:
            self._links.discard(link)

    def _answer(self, link: ServerConnection, message: dict[str, Any]) -> None:
        method, params = message["method"], message.get("params", {})
        with self._lock:
            self.asked.append(method)
            try:
                if method in self.refused:
                    raise ValueError(self.refused[method])
                answer = {"result": self._result(method, params)}
            except (ValueError, KeyError) as error:
                answer = {"error": {"code": -32600, "message": str(error)}}
        if method in self.breaks:
            self.breaks.discard(method)
            link.socket.shutdown(socket.SHUT_RDWR)
            return
        link.send(json.dumps({"id": message["id"], **answer}))

    def _result(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        if method == "initialize":
            return {"userAgent": "stand-in"}
        if method == "thread/loaded/list":
            return {"data": list(self.threads), "nextCursor": None}
        thread = self.threads.get(params.get("threadId", ""))
        if thread is None:
            raise ValueError(f"thread not found: {params.get('threadId')}")
        if method == "thread/read":
            return {"thread": {**thread.about, "status": thread.status()}}
        if method == "thread/items/list":
            return {"data": [{"item": item} for item in reversed(thread.items)][: params["limit"]]}
        if method == "mcpServerStatus/list":
            return {"data": [{"name": "codex_tui", "httpOrigin": thread.origin}] if thread.origin else []}
        if method == "mcpServer/tool/call":
            thread.on_call({**params, "_meta": {**params["_meta"], "threadId": params["threadId"]}})
            return {"content": []}
        if method == "turn/start":
            if sum(len(one["text"]) for one in params["input"]) > MAX_CHARS:
                raise ValueError("input_too_large")
            thread.take(params)
            return {"turn": {"id": "1", "status": "inProgress"}}
        raise ValueError(f"unknown method {method}")
