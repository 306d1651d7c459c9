"""Proof that the model of a live session was given a message: the record that its client keeps is followed.

Only while something that was handed over is unproven; nothing runs otherwise. Knows no client: the record is a port.
Implements [PROOF-2], [PROOF-3].
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

import anyio
import anyio.lowlevel

from agentbus.core.errors import AgentbusError
from agentbus.core.model import Envelope
from agentbus.core.ports import Delivery, Receipt, Record

__all__ = ["Followed", "Proofs"]

# How long to sleep between two looks at the record. A look at a file that has not changed costs 20 to 60 us. Watching
# it by inotify would need a thread that wakes as often: see triggers/file_watch.py. A client writes some 15 ms after
# it was given a message while its model is idle. While the model is busy it can take hours, and nobody needs it to the
# millisecond then: so the pause grows with the time since the last message, to the longest.
_FIRST_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 1.0
_PAUSE_PER_S = 0.1
# Where the client has no record yet, there is nothing that could show a message: only whether there is one by now. A
# broadcast to a hundred such sessions would otherwise keep two cores busy for half a second.
_NO_PLACE_PAUSE_S = 0.25


class Proofs:
    """Which of the messages that were handed over to a session are not proven, and the task that looks for proof.

    `mark(ids)` stores that messages are read. `note(places)` stores where the record is, when that has changed. Both
    can raise AgentbusError, and are called again then.
    """

    def __init__(
        self,
        record: Record,
        *,
        mark: Callable[[Sequence[int]], Awaitable[None]],
        note: Callable[[Sequence[str]], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._record = record
        self._mark = mark
        self._note = note
        self._clock = clock
        # By id, when it was sent: an id alone can be that of another bus, in an old part of the record.
        self._unproven: dict[int, int] = {}
        self._proven: list[int] = []
        # Up to where each place was read. Every place stays: what was handed over before /clear shows in the old one.
        self._places: dict[str, int] = {}
        self._since = 0.0
        self._due = anyio.Event()

    def begin(self, places: Iterable[str], unproven: Iterable[tuple[int, int]]) -> tuple[str, ...]:
        """Start with what is known from before: places, and ids with their `sent_at`. Returns all the places."""
        for row_id, sent_at in unproven:
            self._unproven[row_id] = sent_at
        for place in (*places, self._record.place()):
            if place:
                # A long record from before this session shows nothing that is looked for.
                self._places.setdefault(place, 0 if self._unproven else self._record.end(place))
        self._wake()
        return tuple(self._places)

    def expect(self, envelopes: Iterable[Envelope]) -> None:
        """Look for these from now on. To be called before they are handed over."""
        for one in envelopes:
            self._unproven[one.id] = one.sent_at
        self._wake()

    def drop(self, ids: Iterable[int]) -> None:
        """Do not look for these any longer: they were not handed over, or are known to be read."""
        for row_id in ids:
            self._unproven.pop(row_id, None)

    def forget(self) -> None:
        """Forget every id: they mean other messages now."""
        self._unproven.clear()
        self._proven.clear()
        self._places = dict.fromkeys(self._places, 0)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to look for, so that nothing runs."""
        return not self._unproven and not self._proven

    def _wake(self) -> None:
        if self._unproven:
            self._since = self._clock()
            self._due.set()

    async def run(self) -> None:
        """Look for proof until cancelled. [PROOF-3]"""
        while True:
            await self._due.wait()
            self._due = anyio.Event()
            while not self.is_idle:
                await self._look()
                first_s = _FIRST_PAUSE_S if self._places else _NO_PLACE_PAUSE_S
                pause_s = min(max(first_s, (self._clock() - self._since) * _PAUSE_PER_S), _LONGEST_PAUSE_S)
                with anyio.move_on_after(pause_s):
                    await self._due.wait()
                    # Something was handed over just now: the proof of it is not there yet.
                    self._due = anyio.Event()
                    await anyio.sleep(first_s)

    async def _look(self) -> None:
        place = self._record.place()
        try:
            if place and place not in self._places:
                await self._note((*self._places, place))
                self._places[place] = 0
            for one in list(self._places):
                await self._read(one)
            if self._proven:
                proven, self._proven = self._proven, []
                try:
                    await self._mark(proven)
                except BaseException:
                    self._proven = proven + self._proven
                    raise
        except AgentbusError:
            pass  # the next look tries again; the heartbeat and the pump say what is wrong with the database

    async def _read(self, place: str) -> None:
        while self._unproven:
            shown, offset = self._record.look(place, self._places[place])
            if offset == self._places[place]:
                return
            self._places[place] = offset
            for row_id, at in sorted(shown):
                sent_at = self._unproven.get(row_id)
                if sent_at is not None and sent_at <= at:
                    del self._unproven[row_id]
                    self._proven.append(row_id)
            # A long record is read in pieces; pushes and tool calls run in between.
            await anyio.lowlevel.checkpoint()


class Followed:
    """A delivery whose messages are looked for in the record of the client."""

    def __init__(self, delivery: Delivery, proofs: Proofs) -> None:
        self._delivery = delivery
        self._proofs = proofs

    @property
    def carrier(self) -> str:
        """That of the delivery."""
        return self._delivery.carrier

    @property
    def trouble(self) -> str:
        """That of the delivery."""
        return self._delivery.trouble

    async def ready(self) -> None:
        """Wait for the delivery."""
        await self._delivery.ready()

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """Hand over, and look for what was handed over. Raises what the delivery raises."""
        # Before, not after: the record can show a message as soon as the client has it.
        self._proofs.expect(batch)
        count = 0
        try:
            receipt = await self._delivery.deliver(batch)
            count = receipt.count
        finally:
            self._proofs.drop([one.id for one in batch[count:]])
        return receipt
