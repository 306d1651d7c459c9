"""Fakes for the two ports, a clock, and values to test with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio

from agentbus.adapters.claude_mcp.server import PROFILE
from agentbus.adapters.mcp.hosts import Choice, Mode
from agentbus.adapters.mcp.rate_limit import RateLimit
from agentbus.adapters.mcp.toolkit import ToolContext
from agentbus.core import process
from agentbus.core.errors import DeliveryClosed, DeliveryFailed
from agentbus.core.model import Arrival, Envelope
from agentbus.core.ports import Receipt, Settled, Wake


def arrival(name: str = "alice", **changes: Any) -> Arrival:
    """An arrival that wants to be a peer: this very process, unless `changes` say otherwise."""
    here = process.current()
    fields: dict[str, Any] = {
        "host": here,
        "launch_name": name,
        "process": here,
        "runtime": "test",
        "cwd": "/somewhere",
        "delivery": "fake",
        "trigger": "fake",
        "domain": process.domain(),
        **changes,
    }
    return Arrival(**fields)


def tool_context(session: Any = None, *, limit: int = 0) -> ToolContext:
    """The context of the tools in a session whose mail is pushed. By default there is no session."""
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
    """A clock in milliseconds that moves only when a test says so."""

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

    def release(self) -> None:
        self.event.set()


class FakeTrigger:
    """A trigger in memory, for one event loop. Endpoints in `dead` were left by a process that died."""

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
