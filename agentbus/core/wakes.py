"""Wakes of which more than one hears, and whose trigger can be armed anew under whoever waits. Knows no session.

Implements [WAKE-6].
"""

from __future__ import annotations

import anyio

from agentbus.core.ports import Wakes

__all__ = ["SharedWakes"]


class SharedWakes:
    """The wakes of a trigger, of which whoever waits for mail hears too, and whose trigger can be armed anew."""

    def __init__(self, wakes: Wakes) -> None:
        self._wakes = wakes
        self._woken: anyio.Event | None = None

    async def wait(self, timeout_s: float | None = None) -> bool:
        was_nudged = await self._wakes.wait(timeout_s)
        if was_nudged and self._woken is not None:
            self._woken.set()
            self._woken = None
        return was_nudged

    @property
    def woken(self) -> anyio.Event:
        """Set by the next wake."""
        if self._woken is None:
            self._woken = anyio.Event()
        return self._woken

    def replace(self, wakes: Wakes) -> None:
        """Wait for these from here on; who waits for the old ones is woken when they are disarmed."""
        self._wakes = wakes

    def is_reachable(self) -> bool:
        return self._wakes.is_reachable()

    async def listen(self) -> None:
        """Keep hearing, where no pump does."""
        while True:
            await self.wait()
