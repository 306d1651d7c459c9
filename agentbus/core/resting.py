"""An asyncio loop that can look at something from below, at a fraction of what a timer costs.

An idle session looks at its mailbox every few seconds, in case a wake was lost. By a timer, such a look went through
the loop, the task and the pump, all of them cold: 0.36 ms of CPU time, of which the question to the database is the
smallest part. From the selector, where the loop waits anyway, it takes a third of that.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["RestingLoop"]


class _Selector(selectors.DefaultSelector):
    """A selector that calls `look` every `every_s` seconds while it waits, and stops waiting when that says True."""

    def __init__(self) -> None:
        super().__init__()
        self.look: Callable[[], bool] | None = None
        self.every_s = 0.0
        self.due_at = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self.look is None:
            return super().select(timeout)
        now = time.monotonic()
        give_up_at = None if timeout is None else now + max(0.0, timeout)
        while True:
            until = self.due_at if give_up_at is None else min(self.due_at, give_up_at)
            found = super().select(max(0.0, until - now))
            now = time.monotonic()
            if now >= self.due_at:
                is_left = self.look()
                now = time.monotonic()  # a look takes time, and what it measures with its own clock must be over then
                self.due_at = now + self.every_s
                if is_left:
                    return found
            if found or (give_up_at is not None and now >= give_up_at):
                return found


class RestingLoop(asyncio.SelectorEventLoop):
    """The event loop of the processes of agentbus: sessions, and commands that wait."""

    def __init__(self) -> None:
        self._resting = _Selector()
        super().__init__(self._resting)

    @contextmanager
    def looking(self, look: Callable[[], bool], every_s: float) -> Iterator[bool]:
        """Call `look` every `every_s` seconds, also while the loop has nothing to do. For one at a time.

        `look` has to be quick, and must not raise. It returns True when it has left something for the loop to do, by
        `call_soon` or by a future. Yields False, and calls nothing, when the loop looks for another already.
        """
        selector = self._resting
        if selector.look is not None:
            yield False
            return
        selector.look, selector.every_s, selector.due_at = look, every_s, time.monotonic() + every_s
        try:
            yield True
        finally:
            selector.look = None
