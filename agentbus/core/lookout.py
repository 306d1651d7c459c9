"""When an idle session has to do something: its heartbeat has work, or its mailbox can have something new.

Both are asked from below the event loop where that is possible, and by timers elsewhere. What is asked for costs a few
calls of the system; only what has a reason wakes the session itself. Implements [DRAIN-5], [PRES-6].
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio

from agentbus.core.errors import AgentbusError
from agentbus.core.eventloop import looking

__all__ = ["Lookout"]


class Lookout:
    """Looks out for one session, with a heartbeat every `heartbeat_s` seconds and a look at its mail every `safety_s`.

    `mark` is the state of the database, `Database.mark`. `is_quiet`: a heartbeat would find nothing to do. `is_idle`:
    the pump waits for mail. `is_held_back`: mail that was there was not handed out, and can be later, though nobody
    writes. `release` ends the wait of the pump.
    """

    def __init__(
        self,
        mark: Callable[[], tuple[int, int, int]],
        *,
        heartbeat_s: float,
        safety_s: float,
        is_quiet: Callable[[], bool],
        is_idle: Callable[[], bool],
        is_held_back: Callable[[], bool],
        release: Callable[[], None],
    ) -> None:
        self._mark = mark
        self._heartbeat_s = heartbeat_s
        self._safety_s = safety_s
        self._is_quiet = is_quiet
        self._is_idle = is_idle
        self._is_held_back = is_held_back
        self._release = release
        # Whether it looks from below the loop. If not, the waits of the session have to end by themselves.
        self.is_watching = False
        # When the next heartbeat and the next look at the mail are due, by time.monotonic().
        self._beat_at = self._mail_at = 0.0
        self._beat_is_due = anyio.Event()
        # The state of the database at the last look.
        self._looked_at: tuple[int, int, int] | None = None

    @contextmanager
    def watching(self) -> Iterator[Lookout]:
        """Look from below the loop for as long as this lasts, if that is possible here."""
        now = time.monotonic()
        self._beat_at, self._mail_at = now + self._heartbeat_s, now + self._safety_s
        with looking(self._look, min(self._safety_s, self._heartbeat_s)) as self.is_watching:
            yield self

    async def beat(self) -> None:
        """Return when a heartbeat is due that has something to do."""
        while not self.is_watching:
            await anyio.sleep(self._heartbeat_s)
            if self._has_work():
                return
        await self._beat_is_due.wait()
        self._beat_is_due = anyio.Event()

    def _look(self) -> bool:
        now = time.monotonic()
        is_left = False
        if now >= self._beat_at:
            self._beat_at = now + self._heartbeat_s
            if self._has_work():
                self._beat_is_due.set()
                is_left = True
        if now >= self._mail_at:
            self._mail_at = now + self._safety_s
            if self._is_idle() and self._can_be_new():
                self._release()
                is_left = True
        return is_left

    def _has_work(self) -> bool:
        try:
            return not self._is_quiet()
        except AgentbusError:
            return True  # the heartbeat meets the same, and says so

    def _can_be_new(self) -> bool:
        before = self._looked_at
        try:
            self._looked_at = self._mark()
        except AgentbusError:
            self._looked_at = None  # the read of the pump meets the same, and says so
        return self._looked_at is None or self._looked_at != before or self._is_held_back()
