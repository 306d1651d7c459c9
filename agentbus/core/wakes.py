"""Wakes for more than one waiting task, with a trigger that can be armed again during a wait. Knows no session.

Implements [WAKE-6].
"""

from __future__ import annotations

import anyio

from agentbus.core.ports import Wakes

__all__ = ["SharedWakes"]


class SharedWakes:
    """Wraps a trigger's `Wakes`.

    Other tasks can wait for the next wake, and the wrapped `Wakes` can be swapped after re-arming.
    """

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
        """Wait for `wakes` from now on. A task that waits for the old ones is woken when they are disarmed."""
        self._wakes = wakes

    def is_reachable(self) -> bool:
        return self._wakes.is_reachable()

    async def listen(self) -> None:
        """Keep waiting for wakes, for a session in which no pump does so."""
        while True:
            await self.wait()
