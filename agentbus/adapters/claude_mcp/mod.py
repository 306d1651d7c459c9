"""The mod delivery: pending messages go, as one text, to our code inside Claude Code, which puts them into the session.

An idle session gets the text as a prompt, and says when its turn has begun. A busy one gets it as a note, which goes
with its next request; that it did, the transcript shows. While the code does not ask, or the session takes nothing from
it, another delivery is used. What the client does is described in MOD.md. Implements [MOD-5], [MOD-8] to [MOD-10].
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

import anyio

from agentbus.adapters.claude_mcp.door import Door, Unanswered
from agentbus.adapters.mcp.element import CHANNEL, Frames
from agentbus.adapters.mcp.inbox import NOT_HERE, InboxDelivery, compose
from agentbus.core.errors import DeliveryFailed
from agentbus.core.model import Envelope
from agentbus.core.ports import Delivery, Receipt, Record, Settled

__all__ = ["NUDGE", "ModDelivery", "ModFirst"]

# Makes a session that has become idle take the notes that it was given too late for its last request.
NUDGE = "agentbus, not your user: messages came in the plugin's note beside this."
# How often the notes that no request has carried yet are looked for. The session writes a line of its transcript within
# some ms of the request.
_LOOK_S = 0.25
# Where the answer about a text was lost, the transcript shows it by now if the session took it.
_DOUBT_S = 3.0
# The prompt of a turn that has begun stands in the transcript after some ms. A note that came before would stand before
# it in the request, too. It is waited for so long at most, and looked for so often.
_PROMPT_S = 1.0
_PROMPT_LOOK_S = 0.01
# How long a session that starts waits for its module, which starts at the same time. It took 0.2 s longer, at most.
_GRACE_S = 2.0


class _Seen:
    """Whether the record shows some messages as given to the model, in what it records from now on."""

    def __init__(self, record: Record, batch: Sequence[Envelope]) -> None:
        self._record = record
        # By id, when it was sent. What is older is about another message of that id, see Proofs.
        self._left = {one.id: one.sent_at for one in batch}
        place = record.place()
        self.is_possible = bool(place)
        self._read = {place: record.end(place)} if place else {}

    async def within(self, seconds: float) -> bool:
        """Wait for it, `seconds` at most."""
        for _ in range(max(1, round(seconds / _PROMPT_LOOK_S))):
            if self():
                return True
            await anyio.sleep(_PROMPT_LOOK_S)
        return False

    def __call__(self) -> bool:
        place = self._record.place()
        if self._left and place:
            self._read.setdefault(place, 0)  # another one after /clear and /resume
        for place, offset in self._read.items():
            while self._left:
                shown, after = self._record.look(place, offset)
                if after == offset:
                    break
                self._read[place] = offset = after
                for row_id, at in shown:
                    if self._left.get(row_id, at + 1) <= at:
                        del self._left[row_id]
        return not self._left


class _Note:
    """The receipt of a note: taken, once the record shows it, or the session has taken its text as a prompt. [MOD-9]

    Nothing else proves a note. A prompt is acknowledged, so that a record that is not understood makes no loop.
    """

    def __init__(self, text: str, count: int, seen: _Seen) -> None:
        self.text = text
        self.count = count
        self.was_nudged = False
        self.is_prompt = False
        self._seen = seen

    def taken(self) -> bool:
        return self.is_prompt or self._seen()


class ModDelivery:
    """Hands pending messages to the module.

    `record` is what the client records of what its model was given. `is_idle` says whether the session surely does
    nothing just now, and may be woken.
    """

    carrier = "mod"
    trouble = ""

    def __init__(self, door: Door, record: Record, is_idle: Callable[[], bool], frames: Frames = CHANNEL) -> None:
        self._door = door
        self._record = record
        self._is_idle = is_idle
        self._frames = frames
        # What no request has carried yet, as far as is known.
        self._notes: list[_Note] = []
        self._noted = anyio.Event()

    async def ready(self) -> None:
        """Return at once: the module asks when the session has begun."""

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """Hand over the first envelopes of `batch` as one text. Raises DeliveryFailed when the session has none."""
        text, count = compose(batch, "", self._frames)
        seen = _Seen(self._record, batch[:count])
        try:
            # A message that is only announced is never proven, so that no note can hold it.
            outcome = await self._door.give(text, may_be_note=seen.is_possible and NOT_HERE not in text)
        except Unanswered:
            if await seen.within(_DOUBT_S):
                return Settled(count)
            raise DeliveryFailed("its agentbus module was gone before it said what became of a text") from None
        if outcome != "noted":
            if seen.is_possible:
                await seen.within(_PROMPT_S)
            return Settled(count)
        note = _Note(text, count, seen)
        self._notes.append(note)
        self._noted.set()
        return note

    async def watch(self, otherwise: Callable[[str], Awaitable[None]]) -> None:
        """See to it that every note reaches the model, until cancelled. [MOD-9]

        `otherwise` begins a turn with a text where the session takes none from its module. It can raise DeliveryFailed.
        """
        while True:
            await self._noted.wait()
            self._noted = anyio.Event()
            was_idle = False
            while self._notes:
                await anyio.sleep(_LOOK_S)
                is_idle = self._is_idle()
                self._notes = [note for note in self._notes if not note.taken()]
                # Idle at two looks: what went with the last request of the turn stands in the transcript by now.
                if self._notes and is_idle and was_idle:
                    await self._wake(otherwise)
                    is_idle = False
                was_idle = is_idle

    async def _wake(self, otherwise: Callable[[str], Awaitable[None]]) -> None:
        """Begin a turn, which carries the notes. A note that such a turn did not carry is given as a prompt."""
        note = self._notes[0]
        text = note.text if note.was_nudged else NUDGE
        try:
            try:
                await self._door.give(text, may_be_note=False)
            except DeliveryFailed:
                await otherwise(text)
        except (DeliveryFailed, Unanswered):
            return  # the next look tries again
        note.is_prompt = note.was_nudged
        for one in self._notes:
            one.was_nudged = True


class ModFirst:
    """Hands over through `mod` while its module asks, and through `other` what the session does not take so. [MOD-5]

    A session that its user has stopped takes nothing from a module until the user has typed something.

    `turned` is called with the carrier in use and the reason each time that it changes. `without` is why the session
    has `other`. `why_not` says why the module does not ask, in a few words, or "" if it should: then a session that
    starts waits for it for a moment.
    """

    def __init__(
        self,
        mod: ModDelivery,
        door: Door,
        other: Delivery,
        turned: Callable[[str, str], Awaitable[None]],
        without: str,
        why_not: Callable[[], str],
    ) -> None:
        self._mod = mod
        self._door = door
        self._other = other
        self._turned = turned
        # The one that was used last: what it hands over can be proven before it has returned.
        self._last: Delivery = other
        self._without = without
        self._why_not = why_not

    @property
    def carrier(self) -> str:
        """That of the delivery that was used last."""
        return self._last.carrier

    @property
    def trouble(self) -> str:
        """What troubles the other delivery, while that is in use."""
        return "" if self._door.is_asking else self._other.trouble

    async def ready(self) -> None:
        """Wait until the session has the tools to answer with, and a moment for the module."""
        await self._other.ready()
        if not self._why_not():
            with anyio.move_on_after(_GRACE_S):
                await self._door.until_asking()

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """Hand over the first of `batch`. Raises what the other delivery raises."""
        if self._door.is_asking:
            self._last = self._mod
            with suppress(DeliveryFailed):
                return await self._mod.deliver(batch)
        self._last = self._other
        return await self._other.deliver(batch)

    async def watch(self) -> None:
        """Keep the socket open, and report which delivery is in use. Runs until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._door.run)
            tasks.start_soon(self._mod.watch, self._begin)
            with anyio.move_on_after(_GRACE_S):
                await self._door.until_asking()
            while True:
                if not self._door.is_asking:
                    why = self._why_not() or self._door.gone or "its agentbus module does not ask"
                    await self._turned(self._other.carrier, f"{self._without}; {why}")
                    await self._door.until_asking()
                await self._turned(self._mod.carrier, "its agentbus module asks for what comes")
                await self._door.until_silent()

    async def _begin(self, text: str) -> None:
        if isinstance(self._other, InboxDelivery):
            (await self._other.post(text)).close()
