"""The ready gate: nothing is pushed before the client can take it. Implements [CHAN-1]."""

from __future__ import annotations

import anyio

__all__ = ["ReadyGate"]

# After `initialized` and `tools/list`, it took a client 55 ms (measured) to register its handler for events. agentbus
# cannot observe that moment, and the client silently drops an event that comes too early.
SETTLE_S = 0.25
# A client that has not listed tools after this time never will: it does not use tools, but maybe events.
UNLISTED_S = 2.0


class ReadyGate:
    """Opens when the client can take events: initialized, tools listed, settled. [CHAN-1]"""

    def __init__(self, *, settle_s: float = SETTLE_S, unlisted_s: float = UNLISTED_S) -> None:
        self._settle_s = settle_s
        self._unlisted_s = unlisted_s
        self._initialized = anyio.Event()
        self._listed = anyio.Event()

    def initialized(self) -> None:
        """`notifications/initialized` has arrived."""
        self._initialized.set()

    def listed(self) -> None:
        """A `tools/list` was answered."""
        self._listed.set()

    @property
    def is_listed(self) -> bool:
        """Whether the client has the tools."""
        return self._listed.is_set()

    async def wait(self) -> None:
        """Return once the gate is open."""
        await self._initialized.wait()
        with anyio.move_on_after(self._unlisted_s):
            await self._listed.wait()
        if self._listed.is_set():
            await anyio.sleep(self._settle_s)
