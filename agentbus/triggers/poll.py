"""The poll trigger: nobody is told anything, everybody looks every so often.

Works wherever the database does. Knows nothing of the mailbox: a wake is the passing of time. Implements [WAKE-4].
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from agentbus.core.config import Settings
from agentbus.core.ports import Wake

__all__ = ["PollTrigger", "make"]


def make(settings: Settings) -> PollTrigger:
    """The trigger of the bus with these settings."""
    return PollTrigger(poll_ms=settings.poll_ms)


class _Ticks:
    def __init__(self, poll_s: float) -> None:
        self._poll_s = poll_s

    async def wait(self, timeout_s: float | None = None) -> bool:
        import anyio

        is_due = timeout_s is None or timeout_s >= self._poll_s
        await anyio.sleep(self._poll_s if is_due or timeout_s is None else timeout_s)
        return is_due

    def is_reachable(self) -> bool:
        return True


class PollTrigger:
    """Wakes its peer every `poll_ms` milliseconds, whether there is anything or not."""

    name = "poll"
    folder = None

    def __init__(self, *, poll_ms: int) -> None:
        self._poll_s = poll_ms / 1000

    def endpoint(self, session: str) -> str:
        """The session itself: there is nothing to address."""
        return session

    @asynccontextmanager
    async def arm(self, endpoint: str) -> AsyncIterator[_Ticks]:
        """Start the clock."""
        yield _Ticks(self._poll_s)

    def notify(self, endpoint: str) -> Wake:
        """PENDING: the peer looks by itself, if it lives."""
        return Wake.PENDING

    def clear(self, endpoint: str) -> None:
        """Nothing is ever left behind."""

    def leftovers(self) -> Iterator[str]:
        """Nothing is ever left behind."""
        yield from ()

    def close(self) -> None:
        """Nothing is kept open."""
