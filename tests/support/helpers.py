"""What several test modules and the benchmarks need: a raw MCP client, fakes for the two ports, a clock."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio

from agentbus.adapters.claude_mcp.server import PROFILE
from agentbus.adapters.mcp.hosts import Choice, Mode
from agentbus.adapters.mcp.rate_limit import RateLimit
from agentbus.adapters.mcp.tools import ToolContext
from agentbus.core import process
from agentbus.core.errors import DeliveryClosed, DeliveryFailed
from agentbus.core.model import Arrival, Envelope
from agentbus.core.ports import Receipt, Settled, Wake

# Reached only when something is broken; a loaded machine needs a fraction of it.
PATIENCE_S = 40.0

EVENT = "notifications/claude/channel"
INITIALIZE = {
    "protocolVersion": "2025-11-25",
    "capabilities": {},
    "clientInfo": {"name": "claude-code", "version": "2.1.330"},
}
DISCOVER_META = {"_meta": {"io.modelcontextprotocol/protocolVersion": "2026-07-28"}}


def clean_env(home: Path, **variables: str) -> dict[str, str]:
    """The environment of a child: ours without what steers agentbus or comes from an agent."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("AGENTBUS_", "CLAUDE"))}
    return {**kept, "AGENTBUS_HOME": str(home), **variables}


def until(condition: Callable[[], Any], what: str = "the condition") -> Any:
    """Wait until `condition()` is true and return it."""
    give_up_at = time.monotonic() + PATIENCE_S
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < give_up_at, f"{what} did not come true in {PATIENCE_S} s"
        time.sleep(0.002)


def agentbus(
    home: Path, *arguments: str, stdin: str | bytes = b"", cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "agentbus", *arguments],
        env=clean_env(home, **variables),
        cwd=cwd,
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode(errors="replace")
    )


@dataclass
class ClaudeOnPath:
    """A `claude` on a PATH of its own, with a home folder of its own: the stand-in, or the real one."""

    home: Path
    folder: Path
    variables: dict[str, str]

    @property
    def state(self) -> dict[str, Any]:
        """What its file says."""
        path = Path(self.variables.get("CLAUDE_CONFIG_DIR", self.home)) / ".claude.json"
        return dict(json.loads(path.read_text()))

    def entry(self) -> dict[str, Any] | None:
        """Its entry for agentbus, at user scope."""
        return self.state.get("mcpServers", {}).get("agentbus")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        env = {**clean_env(self.home), **self.variables}
        return subprocess.run(
            ["claude", *arguments], env=env, cwd=self.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )

    def calls(self) -> list[list[str]]:
        """The arguments of every call of the stand-in."""
        log = Path(self.variables["STAND_IN_LOG"])
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def claude_on_path(root: Path, real: str | None = None) -> ClaudeOnPath:
    """Put the stand-in, or the real `claude` at the path `real`, on a PATH of its own in `root`."""
    for name in ("bin", "home", "work"):
        root.joinpath(name).mkdir(parents=True)
    claude = root / "bin" / "claude"
    if real is None:
        stand_in = Path(__file__).with_name("claude_stand_in.py")
        claude.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S '{stand_in}' \"$@\"\n")
        claude.chmod(0o755)
    else:
        claude.symlink_to(os.path.realpath(real))
    variables = {
        "PATH": f"{root / 'bin'}:/usr/bin:/bin",
        "HOME": str(root / "home"),
        "STAND_IN_LOG": str(root / "calls"),
    }
    return ClaudeOnPath(root / "home", root / "work", variables)


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
        # Who runs the tests is no Claude Code: what it shows is said here, unless a test is about just that.
        variables.setdefault("AGENTBUS_DELIVERY", "channel")
        # And tests send in bursts, but for the one about just that.
        variables.setdefault("AGENTBUS_BURST", "0")
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
        """Send a request without waiting for its answer; its id."""
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
        """Call a tool that must fail; the sentence."""
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
        """End the server by the end of stdin, by force if need be, and let go of everything."""
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


def arrival(name: str = "alice", **changes: Any) -> Arrival:
    """Somebody who wants to be a peer: this very process, unless told otherwise."""
    here = process.current()
    fields: dict[str, Any] = {
        "host": here,
        "launch_name": name,
        "process": here,
        "runtime": "test",
        "cwd": "/somewhere",
        "delivery": "fake",
        "trigger": "fake",
        **changes,
    }
    return Arrival(**fields)


def tool_context(session: Any = None, *, limit: int = 0) -> ToolContext:
    """What the tools of a session whose mail is pushed act for; no session by default."""
    choice = Choice(host=process.current(), mode=Mode.PUSHED, delivery="channel", reason="a test")
    return ToolContext(
        runtime="claude-mcp",
        server_name="agentbus",
        profile=PROFILE,
        choice=choice,
        session=session,
        rate_limit=RateLimit(limit),
    )


def envelope(number: int, text: str = "hello", **changes: Any) -> Envelope:
    fields: dict[str, Any] = {
        "id": number,
        "sender": "alice",
        "recipient": "bob",
        "text": text,
        "sent_at": 1_700_000_000_123,
        **changes,
    }
    return Envelope(**fields)


class FakeClock:
    """Milliseconds that pass when told to."""

    def __init__(self, now: int = 1_700_000_000_000) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


class FakeWakes:
    def __init__(self) -> None:
        self.event = anyio.Event()

    async def wait(self, timeout_s: float | None = None) -> bool:
        with anyio.move_on_after(timeout_s):
            await self.event.wait()
        if not self.event.is_set():
            return False
        self.event = anyio.Event()
        return True

    def is_reachable(self) -> bool:
        return True


class FakeTrigger:
    """A trigger in memory, for one event loop. Endpoints in `dead` have been left by a process that died."""

    name = "fake"
    folder = None

    def __init__(self) -> None:
        self.armed: dict[str, FakeWakes] = {}
        self.dead: set[str] = set()

    def endpoint(self, session: str) -> str:
        return session

    @asynccontextmanager
    async def arm(self, endpoint: str) -> AsyncIterator[FakeWakes]:
        from agentbus.core.errors import BrokenSetup

        if endpoint in self.armed:
            raise BrokenSetup(f"{endpoint} is in use")
        self.dead.discard(endpoint)
        wakes = self.armed[endpoint] = FakeWakes()
        try:
            yield wakes
        finally:
            del self.armed[endpoint]

    def notify(self, endpoint: str) -> Wake:
        if endpoint in self.dead:
            return Wake.STALE
        if endpoint not in self.armed:
            return Wake.ABSENT
        self.armed[endpoint].event.set()
        return Wake.WOKEN

    def clear(self, endpoint: str) -> None:
        self.dead.discard(endpoint)

    def leftovers(self) -> Iterator[str]:
        yield from sorted({*self.armed, *self.dead})

    def close(self) -> None:
        pass


class FakeReceipt:
    def __init__(self, delivery: FakeDelivery, count: int, position: int) -> None:
        self._delivery = delivery
        self._position = position
        self.count = count

    def taken(self) -> bool:
        return self._delivery.taken_count >= self._position


class FakeDelivery:
    """Keeps what it is handed. `take` says that the far end has taken everything so far; `holds` that it does not."""

    carrier = "fake"
    trouble = ""

    def __init__(self, *, most: int = 1_000, holds: bool = False) -> None:
        self.handed: list[Envelope] = []
        self.taken_count = 0
        self.failures: list[Exception] = []
        self.is_ready = anyio.Event()
        self.is_ready.set()
        self._most = most
        self._holds = holds

    async def ready(self) -> None:
        await self.is_ready.wait()

    def take(self) -> None:
        self.taken_count = len(self.handed)

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        assert batch
        await anyio.lowlevel.checkpoint()
        if self.failures:
            raise self.failures.pop(0)
        now = list(batch[: self._most])
        self.handed += now
        return FakeReceipt(self, len(now), len(self.handed)) if self._holds else Settled(len(now))

    def fail_once(self) -> None:
        self.failures.append(DeliveryFailed())

    def close(self) -> None:
        self.failures.append(DeliveryClosed())
