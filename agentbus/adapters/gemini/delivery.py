"""The hook delivery: pending messages are given to the hooks of a session, when they ask.

A hook asks when the user's prompt, or the result of a tool, goes to the model, and when a turn ends. So an idle session
gets nothing before its next prompt. What was given is taken when the session's record shows that the model has it; what
a cancelled turn has dropped is given once more. Knows events of Gemini CLI, but neither sockets nor MCP. Implements
[GEMINI-2] to [GEMINI-4].
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio

from agentbus.adapters.gemini.records import Chat
from agentbus.adapters.mcp.element import CHANNEL, Frames
from agentbus.adapters.mcp.inbox import compose
from agentbus.core.bus import HOOK
from agentbus.core.errors import DeliveryFailed, DeliveryWaited
from agentbus.core.model import Envelope
from agentbus.core.ports import Receipt

__all__ = ["AFTER_AGENT", "AFTER_TOOL", "BEFORE_AGENT", "HookDelivery"]

# Gemini CLI's names for: the user's prompt goes to the model; a tool has ended; the turn has ended.
BEFORE_AGENT, AFTER_TOOL, AFTER_AGENT = "BeforeAgent", "AfterTool", "AfterAgent"
# A hook waits so long for the pump, if that has messages to hand over: it reads the mailbox anew, in 0.2 ms, or finds
# that they were read meanwhile. If it has none, a message can have been committed in this moment.
_PUMP_S = 0.05
_GRACE_S = 0.005
# Of the result of a tool with all that is appended, Gemini CLI keeps 40,000 characters, the last 32,000 for certain
# (0.61; a setting). What is longer than this waits for the end of the turn. A `<` becomes four characters there.
_TOOL_BYTES = 16_384
_POST_BYTES = 65_536
_MOST_TOOL_CHARS = 30_000
# What was given so often and is shown nowhere is given no more: the record may have another form than we know.
_MOST_TIMES = 2


@dataclass(slots=True)
class _Out:
    """A message that was given, and that the record does not show yet."""

    envelope: Envelope
    mark: str
    times: int = 1


@dataclass(slots=True, eq=False)
class _Ask:
    """A hook that asks. The pump adds a batch to what is given once more, and waits until it is `over`."""

    event: str
    again: list[Envelope]
    batch: Sequence[Envelope] = ()
    is_answered: anyio.Event = field(default_factory=anyio.Event)
    over: anyio.Event = field(default_factory=anyio.Event)
    # How many of the batch were handed over.
    count: int = 0


class _Given:
    """The receipt. Taken once the record shows the messages, or will never do so. [GEMINI-4]"""

    def __init__(self, delivery: HookDelivery, batch: Sequence[Envelope]) -> None:
        self.count = len(batch)
        self._delivery = delivery
        self._ids = [one.id for one in batch]

    def taken(self) -> bool:
        return self._delivery.is_shown(self._ids)


class HookDelivery:
    """Hands over what is pending when a hook asks. `chat` is the record of the session."""

    carrier = HOOK

    def __init__(self, chat: Chat, frames: Frames = CHANNEL) -> None:
        self._chat = chat
        self._frames = frames
        self._nonce = os.urandom(3).hex()
        self._count = 1
        self._out: dict[int, _Out] = {}
        self._ask: _Ask | None = None
        self._asked = anyio.Event()
        self._is_waiting = False
        # The hooks of tools that end together ask together.
        self._one_at_a_time = anyio.Lock()
        # Set by what listens to the hooks.
        self.troubled: Callable[[], str] = str

    @property
    def trouble(self) -> str:
        """Why no hook asks; empty if nothing is known to be wrong."""
        return self.troubled()

    @property
    def _mark(self) -> str:
        return f"{self._nonce}-{self._count}"

    async def ready(self) -> None:
        """Return at once: where a hook asks, the session is there."""

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """Wait until a hook asks, and let it have the first of `batch`.

        Raises DeliveryWaited when it had to wait, and DeliveryFailed when the hook has taken nothing.
        """
        has_waited = False
        while True:
            ask, self._ask = self._ask, None
            if ask is None:
                has_waited = self._is_waiting = True
                try:
                    await self._asked.wait()
                finally:
                    self._is_waiting = False
            elif ask.event == AFTER_TOOL and not _fits_a_tool(self._compose(batch[:1])[0]):
                ask.is_answered.set()  # it waits for the end of the turn
            elif has_waited:
                self._ask = ask
                raise DeliveryWaited("a hook asks now")
            else:
                break
        ask.batch = batch
        ask.is_answered.set()
        await ask.over.wait()
        if not ask.count:
            raise DeliveryFailed("the hook has handed over nothing")
        return _Given(self, batch[: ask.count])

    async def give(self, event: str, prompt: str, hand: Callable[[Mapping[str, Any]], Awaitable[bool]]) -> None:
        """Answer a hook: `hand` gets its output, once, if there is something for the model, and says if it got it."""
        async with self._one_at_a_time:
            again = self._dropped(prompt) if event == BEFORE_AGENT else []
            # After Esc the turn ends, too: then no new one is to begin.
            if event == AFTER_AGENT and not self._chat.is_answered():
                return
            ask = self._ask = _Ask(event, again)
            patience_s = _PUMP_S if self._is_waiting else _GRACE_S
            self._asked.set()
            self._asked = anyio.Event()
            try:
                with anyio.move_on_after(patience_s):
                    await ask.is_answered.wait()
                self._ask = None
                await self._hand(ask, hand)
            finally:
                self._ask = None
                ask.over.set()

    async def _hand(self, ask: _Ask, hand: Callable[[Mapping[str, Any]], Awaitable[bool]]) -> None:
        envelopes = [*ask.again, *ask.batch]
        if not envelopes:
            return
        text, count = self._compose(envelopes, _TOOL_BYTES if ask.event == AFTER_TOOL else _POST_BYTES)
        if ask.event == AFTER_TOOL and not _fits_a_tool(text):
            text, count = self._compose(envelopes[:1])
        if not await hand(_output(ask.event, text, count)):
            return
        given = envelopes[:count]
        for one in given if self._chat.place() else ():
            was = self._out.get(one.id)
            self._out[one.id] = _Out(one, self._mark, 1 if was is None else was.times + 1)
        self._count += 1
        ask.count = max(0, count - len(ask.again))

    def _compose(self, envelopes: Sequence[Envelope], max_bytes: int = _POST_BYTES) -> tuple[str, int]:
        """The next post, with a mark by which it is known as the prompt of a turn: see `compose`."""
        return compose(envelopes, self._mark, self._frames, max_bytes=max_bytes)

    def _dropped(self, prompt: str) -> list[Envelope]:
        """What was given for an earlier turn, and was dropped with it. `prompt` begins this turn, and can be ours."""
        self._look()
        late = [one for one in self._out.values() if one.mark not in prompt]
        for one in late:
            if one.times >= _MOST_TIMES:
                del self._out[one.envelope.id]
        return sorted((one.envelope for one in late if one.times < _MOST_TIMES), key=lambda one: one.id)

    def is_shown(self, ids: Sequence[int]) -> bool:
        """Whether nothing more is to be learned about these."""
        if self._out:
            self._look()
        return self._out.keys().isdisjoint(ids)

    def _look(self) -> None:
        for row_id, at in self._chat.read():
            one = self._out.get(row_id)
            if one is not None and one.envelope.sent_at <= at:
                del self._out[row_id]


def _fits_a_tool(text: str) -> bool:
    """Whether `text` can be appended to the result of a tool without being cut."""
    return len(text) + 3 * (text.count("<") + text.count(">")) <= _MOST_TOOL_CHARS


def _output(event: str, text: str, count: int) -> dict[str, Any]:
    """What a hook prints so that the model is given `text`."""
    if event != AFTER_AGENT:
        return {"hookSpecificOutput": {"hookEventName": event, "additionalContext": text}}
    # The user sees this, after "Agent execution blocked: ".
    said = f"agentbus brings {'a message' if count == 1 else f'{count} messages'}, and a new turn begins"
    return {"decision": "deny", "reason": text, "systemMessage": said}
