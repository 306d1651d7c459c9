"""A raw MCP client over real stdio."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.command import PATIENCE_S, clean_env

EVENT = "notifications/claude/channel"
INITIALIZE = {
    "protocolVersion": "2025-11-25",
    "capabilities": {},
    "clientInfo": {"name": "claude-code", "version": "2.1.330"},
}
DISCOVER_META = {"_meta": {"io.modelcontextprotocol/protocolVersion": "2026-07-28"}}


class RawClient:
    """An MCP client that speaks JSON-RPC lines to a real server process, and sees what arrives and when.

    `stdout` is "pipe" or "socketpair" (as Node gives its servers). A thread reads unless `read` is False.
    """

    def __init__(
        self,
        home: Path,
        name: str | None,
        *,
        cwd: Path | None = None,
        stdout: str = "pipe",
        read: bool = True,
        command: Sequence[str] = (),
        adapter: str = "claude-mcp",
        **variables: str,
    ) -> None:
        if name is not None:
            variables["AGENTBUS_NAME"] = name
        # The tests do not run under Claude Code, so the delivery is set here, unless a test is about just that.
        variables.setdefault("AGENTBUS_DELIVERY", "channel")
        # Tests also send in bursts, so these are set here too, unless a test is about just that.
        variables.setdefault("AGENTBUS_BURST", "0")
        variables.setdefault("AGENTBUS_HOURLY", "0")
        ours, theirs = socket.socketpair() if stdout == "socketpair" else (None, None)
        self.process = subprocess.Popen(
            list(command) or [sys.executable, "-m", "agentbus", "serve", adapter],
            env=clean_env(home, **variables),
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if theirs is None else theirs.fileno(),
            stderr=subprocess.PIPE,
        )
        self._socket = ours
        if theirs is not None:
            theirs.close()
        assert self.process.stdin is not None
        self._stdin = self.process.stdin
        self._next_id = 0
        self._changed = threading.Condition()
        self._lock = threading.Lock()
        self.arrived: list[tuple[float, dict[str, Any]]] = []
        self._by_id: dict[Any, tuple[float, dict[str, Any]]] = {}
        self.events: list[tuple[float, dict[str, Any]]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._errors: list[str] = []
        self._stderr_reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._stderr_reader.start()
        if read:
            self._reader.start()

    @property
    def stdout_fd(self) -> int:
        if self._socket is not None:
            return self._socket.fileno()
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    @property
    def stderr(self) -> str:
        return "".join(self._errors)

    def start_reading(self) -> None:
        self._reader.start()

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._errors.append(line.decode())

    def _read(self) -> None:
        rest = b""
        while True:
            try:
                data = os.read(self.stdout_fd, 1_048_576)
            except OSError:
                return
            now = time.perf_counter()
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            with self._changed:
                for line in lines:
                    self._take(now, json.loads(line))
                self._changed.notify_all()

    def _take(self, now: float, message: dict[str, Any]) -> None:
        self.arrived.append((now, message))
        if message.get("method") == EVENT:
            self.events.append((now, message["params"]))
        elif "id" in message:
            self._by_id[message["id"]] = (now, message)

    def wait(self, condition: Callable[[], Any], what: str = "the message") -> Any:
        """Wait until `condition()`, asked after each arrival, is true."""
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE_S), f"{what} did not come; stderr: {self.stderr}"
            return condition()

    def send_line(self, line: bytes) -> None:
        with self._lock:
            self._stdin.write(line + b"\n")
            self._stdin.flush()

    def post(self, method: str, params: dict[str, Any] | None = None, request_id: Any = None) -> Any:
        """Send a request without waiting for its answer. Returns its id."""
        if request_id is None:
            self._next_id += 1
            request_id = self._next_id
        message: dict[str, Any] = {"jsonrpc": "2.0", "id": request_id, "method": method}
        if params is not None:
            message["params"] = params
        self.send_line(json.dumps(message).encode())
        return request_id

    def notify(self, method: str) -> None:
        self.send_line(json.dumps({"jsonrpc": "2.0", "method": method}).encode())

    def answer(self, request_id: Any) -> dict[str, Any]:
        """The whole response to a request."""
        _, message = self.wait(lambda: self._by_id.get(request_id), f"the answer to {request_id!r}")
        return dict(message)

    def request(self, method: str, params: dict[str, Any] | None = None, request_id: Any = None) -> dict[str, Any]:
        return self.answer(self.post(method, params, request_id))

    def post_call(self, tool: str, **arguments: Any) -> Any:
        return self.post("tools/call", {"name": tool, "arguments": arguments})

    def prepare_call(self, tool: str, **arguments: Any) -> tuple[int, bytes]:
        """The id and the line of a call, to be written with `send_line`."""
        self._next_id += 1
        params = {"name": tool, "arguments": arguments}
        message = {"jsonrpc": "2.0", "id": self._next_id, "method": "tools/call", "params": params}
        return self._next_id, json.dumps(message).encode()

    def result(self, request_id: Any) -> tuple[str, bool]:
        """The text of a tool's result, and whether it is an error."""
        result = self.answer(request_id)["result"]
        assert [block["type"] for block in result["content"]] == ["text"]
        assert "structuredContent" not in result
        return result["content"][0]["text"], bool(result.get("isError"))

    def call(self, tool: str, **arguments: Any) -> str:
        """Call a tool that must succeed."""
        text, is_error = self.result(self.post_call(tool, **arguments))
        assert not is_error, text
        return text

    def refuse(self, tool: str, **arguments: Any) -> str:
        """Call a tool that must fail. Returns the sentence of the error."""
        text, is_error = self.result(self.post_call(tool, **arguments))
        assert is_error, text
        return text

    def initialize(self, *, discover: bool = False) -> dict[str, Any]:
        if discover:
            answer = self.request("server/discover", DISCOVER_META, "server-discover-probe-1")
            assert answer["error"]["code"] == -32601
        result: dict[str, Any] = self.request("initialize", INITIALIZE)["result"]
        self.notify("notifications/initialized")
        return result

    def handshake(self, *, discover: bool = False) -> dict[str, Any]:
        """Everything that Claude Code does before the first turn."""
        result = self.initialize(discover=discover)
        self.request("tools/list")
        return result

    def wait_events(self, count: int) -> list[dict[str, Any]]:
        """The first `count` channel events or more."""
        self.wait(lambda: len(self.events) >= count, f"event {count} (of which {len(self.events)} came)")
        return [event for _, event in self.events]

    def texts(self) -> list[str]:
        with self._changed:
            return [event["content"] for _, event in self.events]

    def close_stdin(self) -> None:
        with self._lock:
            self._stdin.close()

    def end(self) -> None:
        """End the server by closing its stdin, by force if necessary, and let go of everything."""
        if not self._stdin.closed:
            with suppress(BrokenPipeError):
                self._stdin.close()
        try:
            self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.wait()
            self._stderr_reader.join(PATIENCE_S)
            if self._reader.ident is not None:
                self._reader.join(PATIENCE_S)
            for file in (self.process.stdout, self.process.stderr, self._socket):
                if file is not None:
                    file.close()


@contextmanager
def clients() -> Iterator[Callable[..., RawClient]]:
    """Starts raw clients; at the end of the block all of them are gone."""
    started: list[RawClient] = []

    def start(*arguments: Any, **options: Any) -> RawClient:
        started.append(RawClient(*arguments, **options))
        return started[-1]

    try:
        yield start
    finally:
        for client in started:
            client.end()
