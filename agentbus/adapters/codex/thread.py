"""One thread of a Codex app server: whether it is busy, what is pushed into it, and whether that has arrived.

`turn/start` begins a turn, or adds to the one that runs. Its answer does not say that the model gets the text: an
interrupted turn drops what it was given, and an app server that dies does too. The thread's items say it: the text
stands there when it has entered the model's context. Measured with Codex 0.158 and 0.169. Knows texts, but neither
envelopes nor MCP. Implements [CODEX-4], [CODEX-5].
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import anyio

from agentbus.adapters.codex.app_server import AppServer, Refusal
from agentbus.core.errors import DeliveryFailed

__all__ = ["Push", "Thread"]

# How far apart two pushes into a running turn are. A push makes Codex throw away the answer that is being written, and
# ask again; each further push into the same turn waits twice as long, so that an answer of any length can be finished.
GAP_S = 5.0
_LONGEST_GAP_S = 80.0
# Text that is not there after this time waits for a tool to end. Until then no answer is being written that a further
# push could discard.
_AT_A_TOOL_S = 0.5
_TOOL_GAP_S = 1.0
# How long a dropped push waits after the person has pressed Esc, unless a turn begins before.
QUIET_S = 10.0
# A turn that was just begun can look idle for some ms.
_BEGINS_S = 0.3
# Pauses between two looks at the items. Usually the text is there after 20 to 50 ms.
_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.5
# So many of the newest items are looked at. A push is among the last ones when it arrives.
_ITEMS = 40


@dataclass(slots=True)
class Push:
    """One text for the person and its context for the model. `is_taken` once it stands among the thread's items."""

    text: str
    context: Sequence[str]
    mark: str = field(default_factory=lambda: f"agentbus-{uuid.uuid4().hex}")
    at: float = 0.0
    is_taken: bool = False
    # When it was seen to be dropped; None while it can still arrive.
    dropped_at: float | None = None


class Thread:
    """The thread `id` at `server`. `run` follows what was pushed."""

    def __init__(self, server: AppServer, thread_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.id = thread_id
        self._server = server
        self._clock = clock
        self._is_active = False
        self._connection = 0
        self._out: list[Push] = []
        self._pushed_at = -_LONGEST_GAP_S
        # How long after the last push the next one may come while a turn runs.
        self._gap_s = 0.0
        self._changed = anyio.Event()

    def heard(self, method: str, params: Mapping[str, Any]) -> None:
        """Take a notification of the app server."""
        if params.get("threadId") == self.id and method == "thread/status/changed":
            self._set_active(_is_active(params.get("status")))

    def _set_active(self, is_active: bool) -> None:
        self._is_active = is_active
        if not is_active:
            self._gap_s = 0.0
        self._nudge()

    def _nudge(self) -> None:
        told, self._changed = self._changed, anyio.Event()
        told.set()

    async def settle(self, patience_s: float) -> None:
        """Wait up to `patience_s` seconds until all that was pushed is known to be taken."""
        with anyio.move_on_after(patience_s):
            while self._out:
                await self._changed.wait()

    def _wait_s(self) -> float:
        """How long no push is allowed, in seconds; 0 if it is allowed now. [CODEX-5]"""
        now = self._clock()
        if any(one.dropped_at is not None for one in self._out):
            return QUIET_S  # these come first
        since_s = now - self._pushed_at
        if self._out:
            # Either it arrives in a moment, or a tool runs.
            at_a_tool_s = _AT_A_TOOL_S - (now - self._out[0].at)
            return max(at_a_tool_s, _TOOL_GAP_S - since_s, 0.0)
        return max(self._gap_s - since_s, 0.0) if self._is_active else 0.0

    async def wait(self) -> bool:
        """Wait until a push is allowed. Returns whether it had to wait."""
        has_waited = False
        while (wait_s := self._wait_s()) > 0:
            has_waited = True
            with anyio.move_on_after(wait_s):
                await self._changed.wait()
        return has_waited

    async def push(self, text: str, context: Sequence[str]) -> Push:
        """Hand over `text` and its `context`. Raises Refusal when the app server does not take it."""
        push = Push(text, context)
        self._out.append(push)
        try:
            await self._start(push)
        except Refusal:
            self._out.remove(push)
            raise
        except DeliveryFailed:
            pass  # it can have been carried out all the same: the items will tell
        self._nudge()
        return push

    async def _start(self, push: Push) -> None:
        push.at = self._pushed_at = self._clock()
        push.dropped_at = None
        self._gap_s = min(2 * self._gap_s, _LONGEST_GAP_S) or GAP_S
        # Under another key each time: a context that was given before, under the same key, is left out.
        key = uuid.uuid4().hex[:8]
        await self._server.ask(
            "turn/start",
            {
                "threadId": self.id,
                "clientUserMessageId": push.mark,
                "input": [{"type": "text", "text": push.text, "text_elements": []}],
                "additionalContext": {
                    f"agentbus-{key}-{number:04}": {"value": part, "kind": "untrusted", "name": "agentbus"}
                    for number, part in enumerate(push.context)
                },
            },
        )

    async def _marks(self) -> set[str]:
        """The marks of the newest items. Raises DeliveryFailed."""
        asked = {"threadId": self.id, "limit": _ITEMS, "sortDirection": "desc"}
        rows = (await self._server.ask("thread/items/list", asked)).get("data")
        items = [row.get("item") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        return {str(item["clientId"]) for item in items if isinstance(item, dict) and item.get("clientId")}

    async def read(self) -> dict[str, Any]:
        """What the app server says about the thread. Raises DeliveryFailed."""
        found = (await self._server.ask("thread/read", {"threadId": self.id})).get("thread")
        return found if isinstance(found, dict) else {}

    async def run(self) -> None:
        """Follow what was pushed until it is taken. Runs until cancelled. [CODEX-4]"""
        pause_s = _FIRST_PAUSE_S
        while True:
            changed = self._changed
            with suppress(DeliveryFailed):  # the connection is made anew, and `trouble` says why there is none
                await self._follow()
            if not self._out and self._connection == self._server.connections:
                pause_s = _FIRST_PAUSE_S
                # With the connection everything has to be asked anew.
                async with anyio.create_task_group() as tasks:
                    for event in (changed, self._server.changed):
                        tasks.start_soon(_cancel_after, event, tasks.cancel_scope)
                continue
            with anyio.move_on_after(pause_s):
                await changed.wait()
                pause_s = _FIRST_PAUSE_S / 2
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _follow(self) -> None:
        if self._server.trouble:
            raise DeliveryFailed(self._server.trouble)
        if self._connection != self._server.connections:
            connection = self._server.connections
            self._set_active(_is_active((await self.read()).get("status")))
            self._connection = connection
        if not self._out:
            return
        marks = await self._marks()
        arrived = [push for push in self._out if push.mark in marks]
        for push in arrived:
            push.is_taken = True
            self._out.remove(push)
        if self._out and not self._is_active:
            await self._note_dropped()
        if arrived:
            self._nudge()
        await self._push_again()

    async def _note_dropped(self) -> None:
        """Note which pushes the turn that they were for has left out: it has ended, and they are not there."""
        now = self._clock()
        late = [push for push in self._out if push.dropped_at is None and now - push.at > _BEGINS_S]
        if not late or _is_active((await self.read()).get("status")):
            return
        marks = await self._marks()
        for push in late:
            if push.mark not in marks:
                push.dropped_at = now

    async def _push_again(self) -> None:
        """Push what was dropped, with the next turn or after some quiet: not at once after the person's Esc."""
        dropped = [push for push in self._out if push.dropped_at is not None]
        quiet_s = self._clock() - max((push.dropped_at or 0.0 for push in dropped), default=0.0)
        if dropped and (self._is_active or quiet_s > QUIET_S):
            for push in dropped:
                await self._start(push)
            self._nudge()


def _is_active(status: object) -> bool:
    return isinstance(status, dict) and status.get("type") == "active"


async def _cancel_after(event: anyio.Event, scope: anyio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
