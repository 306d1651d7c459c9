"""Wakes for more than one waiting task, with a trigger that can be armed again during a wait. Knows no session.

Implements [WAKE-6].
"""

from __future__ import annotations

import anyio

from agentbus.core.ports import Wakes

__all__ = ["SharedWakes"]


class SharedWakes:
    """Wraps a trigger's `Wakes`, on which one task at a time can wait.

    `wait` is for the drain, `beside` for any other task: whoever comes first waits for the trigger, and wakes the
    others. So a task beside is woken also while the drain hands something over, which can take long. The wrapped
    `Wakes` can be swapped after re-arming.
    """

    def __init__(self, wakes: Wakes) -> None:
        self._wakes = wakes
        self._is_waited_for = False
        self._returned: anyio.Event | None = None
        # Whether a task beside got a wake that the drain has not seen.
        self._is_due = False

    async def wait(self, timeout_s: float | None = None) -> bool:
        if self._is_waited_for:
            await self._wait_for_the_other(timeout_s)
        elif not self._is_due:
            return await self._wait(timeout_s)
        was_nudged, self._is_due = self._is_due, False
        return was_nudged

    async def beside(self, timeout_s: float) -> None:
        """Return after the next wake, or after `timeout_s` seconds; sometimes before."""
        if self._is_waited_for:
            await self._wait_for_the_other(timeout_s)
        elif await self._wait(timeout_s):
            self._is_due = True

    async def _wait(self, timeout_s: float | None) -> bool:
        self._is_waited_for = True
        try:
            return await self._wakes.wait(timeout_s)
        finally:
            self._is_waited_for = False
            # Also without a wake: one of the others has to wait for the trigger now.
            if self._returned is not None:
                self._returned.set()
                self._returned = None

    async def _wait_for_the_other(self, timeout_s: float | None) -> None:
        if self._returned is None:
            self._returned = anyio.Event()
        returned = self._returned
        with anyio.move_on_after(timeout_s):
            await returned.wait()

    def replace(self, wakes: Wakes) -> None:
        """Wait for `wakes` from now on. A task that waits for the old ones is woken when they are disarmed."""
        self._wakes = wakes

    def is_reachable(self) -> bool:
        return self._wakes.is_reachable()

    def release(self) -> None:
        """Make the task that waits for the trigger return from that."""
        self._wakes.release()

    async def listen(self) -> None:
        """Keep waiting for wakes, for a session in which no pump does so."""
        while True:
            await self.wait()
