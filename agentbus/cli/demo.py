"""`agentbus demo`: real sessions, driven by the SDK's own client, on their own bus, which is removed afterwards.

The demo shows what a person cannot see in two terminals at once, and measures it. Each step either happens or raises.
Implements [CLI-5].
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
from mcp import Client, StdioServerParameters
from mcp.client.extension import ClientExtension, NotificationBinding
from pydantic import BaseModel

from agentbus.core import eventloop
from agentbus.core.stdout import ReaderGone
from agentbus.core.text import escaped

__all__ = ["run"]

# The client of the demo listens to this notification, as Claude Code does. [CHAN-2]
METHOD = "notifications/claude/channel"
# The ready gate opens 0.25 s after the tools were listed; twice that is safe. [CHAN-1]
_GATE_S = 0.5
# Far more than a busy machine needs, so it is reached only when something is broken.
_PATIENCE_S = 30.0


class _Event(BaseModel):
    content: str
    meta: dict[str, str]


class _StepFailed(Exception):
    """A step did not happen as it should."""


class _Channel(ClientExtension):
    """Collects the channel events that a client receives, each with the instant of its arrival."""

    identifier = "io.github.agentbus/demo"

    def __init__(self) -> None:
        self._send, self._receive = anyio.create_memory_object_stream[tuple[float, _Event]](100)

    def notifications(self) -> list[NotificationBinding[Any]]:
        return [NotificationBinding(method=METHOD, params_type=_Event, handler=self._arrived)]

    async def _arrived(self, event: _Event) -> None:
        await self._send.send((time.perf_counter(), event))

    async def next(self) -> tuple[float, _Event]:
        with anyio.move_on_after(_PATIENCE_S):
            return await self._receive.receive()
        raise _StepFailed(f"no event in {_PATIENCE_S:.0f} s")

    def close(self) -> None:
        self._send.close()
        self._receive.close()


class _Seat:
    """One session: a client and the server that the client has started."""

    def __init__(self, name: str, client: Client, channel: _Channel) -> None:
        self.name = name
        self.channel = channel
        self._client = client

    async def call(self, tool: str, **arguments: str) -> str:
        result = await self._client.call_tool(tool, arguments, read_timeout_seconds=_PATIENCE_S)
        text = "\n".join(getattr(block, "text", "") for block in result.content)
        if result.is_error:
            raise _StepFailed(f"{tool} of {self.name}: {text}")
        return text

    async def list_tools(self) -> int:
        return len((await self._client.list_tools()).tools)


@asynccontextmanager
async def _start(home: str, name: str) -> AsyncIterator[_Seat]:
    folder = Path(home, "projects", name)
    folder.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240 - nobody else is waiting
    # The SDK passes on almost nothing of our environment. With these two, Python finds agentbus.
    kept = {key: os.environ[key] for key in ("PYTHONPATH", "VIRTUAL_ENV") if key in os.environ}
    channel = _Channel()
    server = StdioServerParameters(
        command=sys.executable,
        args=["-m", "agentbus", "serve", "claude-mcp"],
        # A session of the user that is called like one of ours is not to be reached: its records are not there.
        env={
            **kept,
            "AGENTBUS_HOME": str(Path(home, "bus")),
            "AGENTBUS_NAME": name,
            "AGENTBUS_DELIVERY": "channel",
            "CLAUDE_CONFIG_DIR": home,
        },
        cwd=folder,
    )
    try:
        async with Client(server, extensions=[channel]) as client:
            yield _Seat(name, client, channel)
    finally:
        channel.close()


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise _StepFailed(what)


class _Show:
    """Prints what happens, numbers the steps, and keeps the delivery times."""

    def __init__(self) -> None:
        self.step_count = 0
        self.times_ms: list[float] = []

    def step(self, title: str) -> None:
        self.step_count += 1
        print(f"\n{self.step_count}. {title}")

    @staticmethod
    def line(text: str) -> None:
        print("   " + text.replace("\n", "\n   "), flush=True)

    async def deliver(self, sender: _Seat, receiver: _Seat, to: str, text: str) -> None:
        """Send, wait for the event in the other session's client, then check and show it."""
        called_at = time.perf_counter()
        answer = await sender.call("send_message", to=to, text=text)
        self.line(f"{sender.name} calls send_message: {answer}")
        arrived_at, event = await receiver.channel.next()
        took_ms = (arrived_at - called_at) * 1000
        self._show_event(receiver.name, event, text)
        self.times_ms.append(took_ms)
        self.line(f"delivered in {took_ms:.2f} ms, from the tool call to the event in the other client")

    async def drain(self, receiver: _Seat, text: str, started_at: float) -> None:
        """Wait for the event of a message that was sent before its receiver started, then check and show it."""
        arrived_at, event = await receiver.channel.next()
        self._show_event(receiver.name, event, text)
        self.line(f"delivered {arrived_at - started_at:.1f} s after {receiver.name} was started, start-up included")

    def _show_event(self, receiver: str, event: _Event, text: str) -> None:
        _check(event.content == text, f"{receiver} received {event.content!r}, not {text!r}")
        meta = " ".join(f'{key}="{value}"' for key, value in event.meta.items())
        self.line(f'{receiver} receives: <channel source="agentbus" {meta}>{event.content}</channel>')


async def _play(home: str, show: _Show) -> None:
    async with AsyncExitStack() as stack:
        show.step("Two sessions start, each a process of its own, as Claude Code would start them")
        began = time.perf_counter()
        frontend = await stack.enter_async_context(_start(home, "frontend"))
        backend = await stack.enter_async_context(_start(home, "backend"))
        for seat in (frontend, backend):
            _check(await seat.list_tools() > 0, f"{seat.name} has no tools")
        show.line(f"both are up after {time.perf_counter() - began:.1f} s")
        # The ready gate: nothing is pushed before a client has had time to register its handler.
        await anyio.sleep(_GATE_S)

        show.step("frontend asks who is there")
        peers = await frontend.call("list_peers")
        _check("frontend (you)" in peers and "backend" in peers, f"list_peers said {peers!r}")
        show.line(peers)

        show.step("frontend asks, backend answers")
        await show.deliver(frontend, backend, "backend", "Which port does the API listen on?")
        await show.deliver(backend, frontend, "frontend", "8080, and /health says ok.")

        show.step("A message for a session that is not running waits in its mailbox")
        question = "Is migration 12 applied?"
        queued = await frontend.call("send_message", to="database", text=question)
        _check(queued.startswith("queued"), f"send_message said {queued!r}")
        show.line(f"frontend calls send_message: {queued}")
        show.line("database starts")
        started_at = time.perf_counter()
        database = await stack.enter_async_context(_start(home, "database"))
        await database.list_tools()
        await show.drain(database, question, started_at)
        await show.deliver(database, frontend, "frontend", "Yes, since Monday.")

        show.step("frontend is renamed while it runs; its old name still leads to it")
        show.line(await frontend.call("set_name", name="web"))
        frontend.name = "web"
        await show.deliver(backend, frontend, "frontend", "Still there?")
        await show.deliver(backend, frontend, "web", "And under the new name?")

        show.step("The sessions end and leave nothing behind")
    left = sorted(Path(home, "bus", "sock").iterdir())  # noqa: ASYNC240 - nobody else is waiting
    _check(not left, f"sockets were left behind: {left}")
    show.line("no socket, no process, no daemon")


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def run() -> int:
    """Play the demo. Return 0 if all steps happened, else 1."""
    show = _Show()
    print("agentbus demo: real processes, real sockets, a database of its own, removed at the end")
    try:
        with tempfile.TemporaryDirectory(prefix="agentbus-") as home:
            eventloop.run(_play, home, show)
    except ReaderGone:
        raise
    except Exception as error:  # noqa: BLE001 - after any error the demo has failed, and says why in one line
        reason = _innermost(error)
        name = "" if isinstance(reason, _StepFailed) else f"{type(reason).__name__}: "
        print(f"\nagentbus demo: step {show.step_count} FAILED: {name}{escaped(str(reason))}", file=sys.stderr)
        return 1
    times = sorted(show.times_ms)
    print(
        f"\nAll {show.step_count} steps happened. {len(times)} live deliveries, both SDK clients included: "
        f"fastest {times[0]:.2f} ms, median {times[len(times) // 2]:.2f} ms, slowest {times[-1]:.2f} ms."
    )
    print("Next: `agentbus install` registers it with Claude Code and says what to run; README.md has the rest.")
    return 0
