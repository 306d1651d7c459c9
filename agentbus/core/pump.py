"""The only loop: it does what the drain machine says, and reports the result to the machine.

Knows the ports, but not their implementations. Does not know where the mailbox is: it is given two functions, `read`
and `mark`. The listener is armed before the pump starts, so that the first read misses nothing. Implements [DRAIN-1] to
[DRAIN-7].
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import anyio
import anyio.lowlevel

from agentbus.core.drain import Action, Drain, Fact, Pace, State, Step
from agentbus.core.errors import DeliveryClosed, DeliveryFailed, DeliveryWaited, TryAgain
from agentbus.core.model import Envelope
from agentbus.core.ports import Delivery, Receipt, Wakes

__all__ = ["Pump"]

# Envelopes that are read and handed over at once. Enough to share the cost of a write, and few enough that a crash in
# between delivers only a few twice.
BATCH = 100
# So many envelopes can be out at most, handed over and not marked: what a crash can double.
MOST_OUT = 2 * BATCH
# After this many non-empty reads in a row, each within `_STREAM_GAP_S` of the last, the mailbox is a *stream*: poll it
# every 1 to 2 ms instead of on each wake. This delays a message of the stream by as much, and saves a wake, a read and
# a write for each message. One message every millisecond is not a stream yet.
_STREAM_LENGTH = 8
_STREAM_GAP_S = 0.000_7


@dataclass(frozen=True, slots=True)
class _Out:
    """Envelopes that were handed over but are not marked yet."""

    ids: tuple[int, ...]
    receipt: Receipt
    at: float


class Pump:
    """Drains one mailbox into one delivery until the far end is gone.

    `read(limit)` returns the oldest pending envelopes, ascending, at most `limit`. `mark(ids)` stamps them as
    delivered. Both can raise TryAgain: then the pump tries again. Any other error, theirs or the delivery's, ends the
    pump. With `is_watched`, somebody else looks whether anything is new while it is idle, and ends its wait then.
    [DRAIN-5]
    """

    def __init__(
        self,
        *,
        read: Callable[[int], list[Envelope]],
        mark: Callable[[Iterable[int]], None],
        delivery: Delivery,
        wakes: Wakes,
        pace: Pace | None = None,
        is_watched: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._mark = mark
        self._delivery = delivery
        self._wakes = wakes
        self._clock = clock
        self._is_watched = is_watched
        self._pace = pace or Pace()
        self._drain = Drain(self._pace)
        self._batch = self._room = BATCH
        self._streak = 0
        self._handed_at = 0.0
        self._read_at = 0.0
        # Whether the delivery took only a part of the batch, and whether there can be more behind a full batch.
        self._is_left = False
        self._is_more = False
        self._found: list[Envelope] = []
        self._out: deque[_Out] = deque()
        self._out_ids: set[int] = set()
        self._taken: list[int] = []
        self._taken_since = 0.0
        self._generation = 0

    async def run(self) -> None:
        """Pump until the delivery is closed. Cancel it to stop earlier, then call `settle`."""
        step = Step(Action.AWAIT_READY)
        while step.action is not Action.STOP:
            fact = await self._perform(step)
            step = self._drain.advance(fact, self._clock())

    def settle(self) -> None:
        """Mark the messages that the far end has taken by now. Call it after `run`, and again after TryAgain.

        The other messages stay pending. They are delivered again, to the next peer with this name. [DRAIN-4]

        Raises TryAgain; if no later call succeeds, all of them are delivered again.
        """
        self._collect()
        if self._taken:
            self._mark(self._taken)
            self._taken = []

    def forget(self) -> None:
        """Forget every id. To be called when the database was replaced: the same ids mean other messages now."""
        self._generation += 1
        self._found = []
        self._out.clear()
        self._out_ids.clear()
        self._taken = []

    @property
    def is_idle(self) -> bool:
        """Whether everything is delivered and marked, as far as it was read."""
        return self._drain.state is State.IDLE

    def is_out(self, envelope_id: int) -> bool:
        """Whether an envelope was handed over but is not marked yet."""
        return envelope_id in self._out_ids

    async def _perform(self, step: Step) -> Fact:
        match step.action:
            case Action.AWAIT_READY:
                return await self._await_ready()
            case Action.READ:
                return self._read_mailbox()
            case Action.DELIVER:
                return await self._deliver()
            case Action.CHECK:
                return self._check()
            case Action.MARK:
                return self._mark_taken()
            case _:
                return await self._sleep(step)

    async def _await_ready(self) -> Fact:
        try:
            await self._delivery.ready()
        except DeliveryClosed:
            return Fact.GONE
        return Fact.READY

    def _read_mailbox(self) -> Fact:
        out = self._out_ids
        self._read_at = self._clock()
        self._is_left = self._is_more = False
        # However it came to this read: no more than two batches are ever out, so a crash doubles no more. [DRAIN-8]
        room = self._room = min(self._batch, MOST_OUT - len(out))
        if room <= 0:
            self._is_more = True
            return Fact.EMPTY
        try:
            pending = self._read(room + len(out))
        except TryAgain:
            return Fact.BUSY
        self._found = [envelope for envelope in pending if envelope.id not in out][:room]
        return Fact.FOUND if self._found else Fact.EMPTY

    async def _deliver(self) -> Fact:
        found, generation = self._found, self._generation
        try:
            receipt = await self._delivery.deliver(found)
        except DeliveryWaited:
            return Fact.WAITED
        except DeliveryFailed:
            # Mark what was taken before: the pause can be long, and a crash in it would deliver that twice.
            self._collect()
            if self._taken:
                self._mark_taken()
            return Fact.FAILED
        except DeliveryClosed:
            return Fact.GONE
        if generation == self._generation:
            ids = tuple(envelope.id for envelope in found[: receipt.count])
            self._is_left = len(ids) < len(found)
            self._is_more = len(found) >= self._room
            # If the delivery takes one envelope at a time, reading a hundred each time gains nothing.
            self._batch = BATCH if len(ids) == len(found) else min(BATCH, 2 * len(ids))
            now = self._clock()
            is_soon = len(found) > 1 or now - self._handed_at < _STREAM_GAP_S
            # If the delivery left something over, there is no pause.
            self._streak = self._streak + 1 if is_soon and len(ids) == len(found) < BATCH else 0
            self._handed_at = now
            self._found = []
            self._out.append(_Out(ids, receipt, now))
            self._out_ids.update(ids)
        # A full mailbox would drain without a pause: let heartbeats and tool calls run in between.
        await anyio.lowlevel.checkpoint()
        return Fact.HANDED

    def _collect(self) -> None:
        # In order: the far end takes messages in the order in which they were handed over.
        while self._out and self._out[0].receipt.taken():
            out = self._out.popleft()
            if not self._taken:
                self._taken_since = out.at
            self._taken.extend(out.ids)

    def _check(self) -> Fact:
        self._collect()
        if self._taken and (len(self._taken) >= BATCH or self._clock() - self._taken_since >= self._pace.mark_s):
            return Fact.TAKEN
        if self._is_left:
            return Fact.MORE
        if not self._taken and not self._out:
            # A full batch is marked before the next one is read, so a crash delivers at most two batches twice.
            return Fact.MORE if self._is_more else Fact.CLEAR
        if self._streak >= _STREAM_LENGTH:
            return Fact.STREAMING
        return Fact.RECENT if self._taken else Fact.UNTAKEN

    def _mark_taken(self) -> Fact:
        try:
            self._mark(self._taken)
        except TryAgain:
            return Fact.BUSY
        self._out_ids.difference_update(self._taken)
        self._taken = []
        return Fact.MARKED

    async def _sleep(self, step: Step) -> Fact:
        assert step.until is not None
        sleep_s = max(0.0, step.until - self._clock())
        if step.action is Action.PAUSE:
            # With jitter, sessions that met at a lock do not meet there again.
            await anyio.sleep(sleep_s * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, not a secret
        else:
            was_nudged = await self._wakes.wait(None if self._is_watched and self.is_idle else sleep_s)
            is_read = not self._is_more and self._clock() - self._read_at < self._pace.safety_s
            if is_read and not was_nudged and self._drain.state is State.HOLDING:
                return Fact.DUE
        return Fact.LOOK
