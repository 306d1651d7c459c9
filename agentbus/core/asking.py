"""Asking: how the wait for the answer to a question ends, in exactly one known way.

For a session, which has an event loop, and for a command, which has none: each says how it looks for the answer, and
waits in its own way between two looks. Knows no trigger, no delivery and no MCP. Implements [ASK-1] to [ASK-4].
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from agentbus.core.bus import Bus, Sent
from agentbus.core.errors import AgentbusError, InvalidRequest, TryAgain
from agentbus.core.model import Envelope, MessageState, Pause, Status
from agentbus.core.names import is_group
from agentbus.core.process import Life
from agentbus.core.store import Question
from agentbus.core.values import dataclass

__all__ = ["CARRIER", "DEFAULT_S", "AnswerWait", "Asked", "Attention", "NoAnswer", "question"]

# The `carrier` of an answer that was waited for.
CARRIER = "ask"
# How long an answer is waited for, in seconds, if nothing else is said: a model needs some for a turn.
DEFAULT_S = 60
_LONGEST_S = 86_400
# How often to look whether the asked peer still lives, in seconds: the kernel tells nobody that a lock was dropped. A
# look costs 20 us. A server that is restarted under its client needs about 0.2 s, and has not ended: so a peer has
# ended that is gone for two looks. Both together are well below the second in which it has to be said. [ASK-3]
_LOOK_S = 0.25
_GONE_S = 0.35


@dataclass(frozen=True, slots=True)
class Asked:
    """How a question ended: with its `answer`, or without.

    `has_ended`: the asked peer is offline, or has ended. `pause`: its pause, which lasts longer than the wait.
    `is_removed`: a person has removed the question. With none of these the time was up. `state` is that of the
    question; None if it cannot be told.
    """

    sent: Sent
    wait_s: float
    answer: Envelope | None = None
    has_ended: bool = False
    state: MessageState | None = None
    pause: Pause | None = None
    is_removed: bool = False

    def __str__(self) -> str:
        """Why there is no answer, in a sentence for a model, a program or a person. [ASK-2], [ASK-3]"""
        if not self.sent.is_online:
            return f"nobody answers now: {self.sent}"
        to = f'"{self.sent.recipient}"'
        if self.is_removed:
            return f"no answer to #{self.sent.id} from {to}: the question was removed, so nobody can answer it"
        where = {
            MessageState.PENDING: "the question is pending",
            MessageState.DELIVERED: "the question is delivered, and whether it was read is not known",
            MessageState.READ: "the question was read",
            None: "the question cannot be found",
        }[self.state]
        if self.has_ended:
            left = "" if self.state is MessageState.READ else ", and waits for the next session of that name"
            return f"{to} has ended without an answer to #{self.sent.id}: {where}{left}"
        if self.pause is not None:
            return f"no answer to #{self.sent.id} from {to}, which is {self.pause}: {where}"
        waits = f"; {to} {self.sent.waits}" if self.sent.waits else ""
        return f"no answer to #{self.sent.id} from {to} within {self.wait_s:g} s: {where}{waits}"


class NoAnswer(TryAgain):
    """A question has no answer: none came in time, or the asked peer is offline, has ended or is paused.

    The question is sent, and a later answer arrives as every message does. `id` is that of the question, `state` its
    state; None if it cannot be told.
    """

    def __init__(self, asked: Asked) -> None:
        super().__init__(str(asked))
        self.id = asked.sent.id
        self.state = asked.state


def question(to: object, wait_s: float, now: int, waiter: str | None = None) -> Question:
    """What makes a message to `to` a question. `now` is in ms since 1970 UTC. Raises InvalidRequest."""
    if is_group(to):
        raise InvalidRequest(
            f"{str(to).strip()[:40]!r} is a group, and a question goes to one peer", hint="ask one of its members"
        )
    if not 0 <= wait_s <= _LONGEST_S:
        raise InvalidRequest(f"an answer cannot be waited for during {wait_s:g} s", hint=f"use 0 to {_LONGEST_S:,} s")
    return Question(now + round(wait_s * 1_000), waiter)


class Attention:
    """Whether somebody is there who may still answer a question within `wait_s` seconds from now. [ASK-3]"""

    def __init__(self, bus: Bus, sent: Sent, wait_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._bus = bus
        self._sent = sent
        self._until = bus.clock() + round(wait_s * 1_000)
        self._clock = clock
        self._session = sent.session
        self._gone_since: float | None = None
        # What keeps the asked peer, which is there, from answering.
        self.is_removed = False
        self.pause: Pause | None = None

    def is_lost(self) -> bool:
        """Whether the asked peer has surely ended, and no other session has the question, or it is paused for longer.

        Also if the question was removed: a reply to it would be refused. [THREAD-2] Raises AgentbusError.
        """
        if not self._sent.is_online:
            return True
        asked = self._bus.store.queries.find(self._sent.id)
        if asked is None:
            self.is_removed = True
            return True
        if self._is_there(asked):
            self._gone_since = None
            pause = self._bus.store.pause_of(self._session, self._bus.clock())
            self.pause = pause if pause is not None and (pause.until or self._until) >= self._until else None
            return self.pause is not None
        now = self._clock()
        if self._gone_since is None:
            self._gone_since = now
        return now - self._gone_since >= _GONE_S

    def _is_there(self, asked: Status) -> bool:
        store = self._bus.store
        peer = store.seated("session", self._session)
        if peer is None or store.life(peer) is Life.ENDED:
            # A question that is still pending is for whoever has its mailbox now.
            peer = store.seated("name", asked.recipient) if asked.state is MessageState.PENDING else None
            if peer is None or store.life(peer) is Life.ENDED:
                return False
            self._session = peer.session
        return True


class AnswerWait:
    """The wait for the answer to the question `sent`, for `wait_s` seconds at most.

    `look` returns the answer if it is there, and takes it. `stays` is called once when the asked peer is offline, has
    ended or is paused: whether to wait all the same.
    """

    def __init__(
        self,
        bus: Bus,
        sent: Sent,
        wait_s: float,
        *,
        look: Callable[[], Envelope | None],
        stays: Callable[[Asked], bool] = lambda _asked: False,
    ) -> None:
        self._bus = bus
        self._sent = sent
        self._wait_s = wait_s
        self._look = look
        self._stays = stays
        now = time.monotonic()
        self._give_up_at = now + wait_s
        self._attention: Attention | None = Attention(bus, sent, wait_s)
        is_free = sent.is_online and sent.pause is None
        self._judged_from = now + _LOOK_S if is_free else now

    def step(self) -> Asked | float:
        """How the question ended; otherwise call it again when something has changed, after so many seconds at most.

        Never raises an AgentbusError.
        """
        bus, sent, attention = self._bus, self._sent, self._attention
        try:
            answer = self._look()
            if answer is not None:
                return Asked(sent, self._wait_s, answer)
            if attention is not None and time.monotonic() >= self._judged_from and attention.is_lost():
                ended = _ended(bus, sent, self._wait_s, attention)
                if ended.is_removed or not self._stays(ended):
                    return ended
                self._attention = None
        except AgentbusError:
            pass  # the question is sent [SEND-6]; a database that fails now may not fail with the next look
        left_s = self._give_up_at - time.monotonic()
        if left_s <= 0:
            return Asked(sent, self._wait_s, state=_state(bus, sent))
        return min(left_s, _LOOK_S)

    async def ended(self, woken: Callable[[float], Awaitable[object]]) -> Asked:
        """How the question ended, for an event loop. `woken(timeout_s)` returns when it is worth looking again."""
        while not isinstance(asked := self.step(), Asked):
            await woken(asked)
        return asked


def _ended(bus: Bus, sent: Sent, wait_s: float, attention: Attention) -> Asked:
    pause, is_removed = attention.pause, attention.is_removed
    has_ended = pause is None and not is_removed
    return Asked(sent, wait_s, has_ended=has_ended, state=_state(bus, sent), pause=pause, is_removed=is_removed)


def _state(bus: Bus, sent: Sent) -> MessageState | None:
    with suppress(AgentbusError):
        found = bus.store.queries.find(sent.id)
        return None if found is None else found.state
    return None
