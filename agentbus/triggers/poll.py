"""The poll trigger: senders nudge nobody, and each peer reads its mailbox at a fixed interval.

It works in every place where the database works. It knows nothing about the mailbox: a wake means that the time has
passed. Implements [WAKE-4].
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from agentbus.core.config import Settings
from agentbus.core.ports import Wake

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    import anyio

__all__ = ["PollTrigger", "make"]


def make(settings: Settings) -> PollTrigger:
    """The trigger of the bus with these settings."""
    return PollTrigger(poll_ms=settings.poll_ms)


class _Ticks:
    def __init__(self, poll_s: float) -> None:
        self._poll_s = poll_s
        self._released: anyio.Event | None = None

    async def wait(self, timeout_s: float | None = None) -> bool:
        import anyio

        is_due = timeout_s is None or timeout_s >= self._poll_s
        released = self._released = anyio.Event()
        with anyio.move_on_after(self._poll_s if is_due else timeout_s):
            await released.wait()
        return is_due

    def is_reachable(self) -> bool:
        return True

    def release(self) -> None:
        if self._released is not None:
            self._released.set()


class PollTrigger:
    """Wakes its peer every `poll_ms` milliseconds, whether there is mail or not."""

    name = "poll"
    folder = None

    def __init__(self, *, poll_ms: int) -> None:
        self._poll_s = poll_ms / 1000

    def endpoint(self, session: str) -> str:
        """The session id itself: the trigger needs no address."""
        return session

    @asynccontextmanager
    async def arm(self, endpoint: str) -> AsyncIterator[_Ticks]:
        """Start the clock."""
        yield _Ticks(self._poll_s)

    def notify(self, endpoint: str) -> Wake:
        """Return PENDING: the peer looks by itself, if it lives."""
        return Wake.PENDING

    def clear(self, endpoint: str) -> None:
        """Does nothing: a peer never leaves anything behind."""

    def leftovers(self) -> Iterator[str]:
        """Yield nothing: a peer never leaves anything behind."""
        yield from ()

    def close(self) -> None:
        """Does nothing: nothing is kept open."""
