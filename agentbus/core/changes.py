"""Changes on a bus: wakes a reader that should look again, and reports what has happened since it last looked.

Reads and never writes. Knows no trigger by name, and nothing about how changes are shown. Implements [WATCH-1],
[WATCH-2].
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import anyio

from agentbus.core.bus import now_ms
from agentbus.core.errors import BrokenSetup
from agentbus.core.model import MessageState, Pause, Peer, Status
from agentbus.core.ports import Wakes
from agentbus.core.store import Store
from agentbus.core.watchers import Watchers

__all__ = ["SAFETY_S", "Changes", "Event", "MessageEvent", "NameEvent", "PeerEvent", "watching"]

# A lost nudge costs this many seconds, as many as the safety poll of a drain. [DRAIN-5]
SAFETY_S = 3.0
# How many messages are followed until their next step. If there are more, the oldest are no longer followed: a mailbox
# that nobody reads must not make each look slower and slower.
_MAX_FOLLOWED = 5_000
_PAGE = 1_000
_STAGES = (MessageState.PENDING, MessageState.DELIVERED, MessageState.READ)


class _Polled:
    """The wakes of a reader that no socket can wake: it looks every `poll_s` seconds.

    What kept the socket from it can be over at any moment, as a home that somebody has just removed. So it is worth
    arming again every SAFETY_S seconds. [WATCH-3]
    """

    def __init__(self, poll_s: float) -> None:
        self._poll_s = poll_s
        self._until = time.monotonic() + SAFETY_S

    async def wait(self, timeout_s: float | None = None) -> bool:
        await anyio.sleep(self._poll_s if timeout_s is None else min(timeout_s, self._poll_s))
        return False

    def is_reachable(self) -> bool:
        return time.monotonic() < self._until

    def release(self) -> None:
        """Does nothing: it looks by itself, before long."""


@asynccontextmanager
async def watching(watchers: Watchers, *, poll_ms: int, say: Callable[[str], None]) -> AsyncIterator[Wakes]:
    """Yields a `Wakes` that fires on every change. Earlier changes are not reported, so read the database once first.

    Where no socket can be bound, it polls every `poll_ms` milliseconds, and `say` gets the reason, once for the same
    `watchers` until one can be bound. Arm again when it is not reachable any longer. [WATCH-1], [WATCH-3]
    """
    async with AsyncExitStack() as stack:
        stack.callback(watchers.close)
        wakes: Wakes
        try:
            wakes = await stack.enter_async_context(watchers.trigger().arm(watchers.endpoint()))
            watchers.is_unwoken = False
        except BrokenSetup as error:
            if not watchers.is_unwoken:
                say(watchers.unwoken(poll_ms, error))
            watchers.is_unwoken = True
            wakes = _Polled(poll_ms / 1_000)
        yield wakes


@dataclass(frozen=True, slots=True)
class MessageEvent:
    """A message that has become `state`, at an instant in ms since 1970 UTC."""

    at: int
    state: MessageState
    message: Status


@dataclass(frozen=True, slots=True)
class PeerEvent:
    """A peer that came (`online`), went (`offline`), has a new name instead of `was` (`renamed`), or a new `status`."""

    at: int
    what: str
    peer: Peer
    was: str = ""


@dataclass(frozen=True, slots=True)
class NameEvent:
    """A name that `joined` or `left` a `group`, or that a person has `paused` or `resumed`. Its peer may be offline.

    `pause` is the one that began or ended; a pause that ends by itself is `resumed`, too.
    """

    at: int
    what: str
    name: str
    group: str = ""
    pause: Pause | None = None


Event = MessageEvent | PeerEvent | NameEvent


def _instant(message: Status, state: MessageState) -> int | None:
    return {
        MessageState.PENDING: message.sent_at,
        MessageState.DELIVERED: message.delivered_at,
        MessageState.READ: message.read_at,
    }[state]


class Changes:
    """Reports what has happened on a bus since the last look. It reads `store` and never writes. [WATCH-2]"""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._version = -1
        self._newest = 0
        self._followed: dict[int, MessageState] = {}
        self.peers: dict[str, Peer] = {}
        self.pauses: dict[str, Pause] = {}
        self.groups: dict[str, list[str]] = {}
        self.start_anew()

    def start_anew(self) -> None:
        """Follow what is there now. Earlier changes are not reported."""
        queries = self._store.queries
        self._version = queries.version()
        self._newest = queries.newest_id()
        self._followed = {one.id: one.state for one in queries.unsettled(_MAX_FOLLOWED)}
        self.peers, self.pauses, self.groups = {}, {}, queries.groups_of()

    def look(self, *, thoroughly: bool = False) -> list[Event]:
        """What has happened, in order of time. Unless `thoroughly`, it reads nothing when nobody has written."""
        version = self._store.queries.version()
        if version == self._version and not thoroughly:
            return []
        self._version = version
        peers = list(self._peers())
        called = {event.was: event.peer.name for event in peers if event.was}
        found: list[Event] = [*peers, *self._names(called), *self._steps(), *self._arrived()]
        return sorted(found, key=lambda event: event.at)

    def _names(self, called: dict[str, str]) -> Iterator[NameEvent]:
        """The groups and the pauses that have changed. `called`: the present names of the peers that were renamed."""
        queries, now = self._store.queries, now_ms()
        pauses, groups = queries.pauses(now), queries.groups_of()
        for name, pause in self.pauses.items():
            if called.get(name, name) not in pauses:
                yield NameEvent(now, "resumed", called.get(name, name), pause=pause)
        known = {called.get(name, name): (pause.since, pause.until) for name, pause in self.pauses.items()}
        for name, pause in pauses.items():
            if known.get(name) != (pause.since, pause.until):
                yield NameEvent(pause.since, "paused", name, pause=pause)
        before = {(called.get(name, name), group) for name, its in self.groups.items() for group in its}
        after = {(name, group) for name, its in groups.items() for group in its}
        for name, group in sorted(before - after):
            yield NameEvent(now, "left", name, group=group)
        for name, group in sorted(after - before):
            yield NameEvent(now, "joined", name, group=group)
        self.pauses, self.groups = pauses, groups

    def _peers(self) -> Iterator[PeerEvent]:
        # [PRES-4] A row can outlive its process, and a reader that only looks reaps nobody.
        present = {peer.session: peer for peer in self._store.live()}
        for session, before in self.peers.items():
            if session not in present:
                yield PeerEvent(now_ms(), "offline", before)
        for session, peer in present.items():
            known = self.peers.get(session)
            if known is None:
                yield PeerEvent(peer.started_at, "online", peer)
            elif known.name != peer.name:
                yield PeerEvent(now_ms(), "renamed", peer, was=known.name)
            if known is not None and (known.status, known.status_at) != (peer.status, peer.status_at):
                yield PeerEvent(peer.status_at or now_ms(), "status", peer)
        self.peers = present

    def _steps(self) -> Iterator[MessageEvent]:
        ids = list(self._followed)
        there: set[int] = set()
        for start in range(0, len(ids), _PAGE):
            for message in self._store.queries.among(ids[start : start + _PAGE]):
                there.add(message.id)
                yield from self._steps_of(message, self._followed[message.id])
        for pruned in set(ids) - there:
            self._followed.pop(pruned, None)

    def _arrived(self) -> Iterator[MessageEvent]:
        while True:
            messages = self._store.queries.after(self._newest, _PAGE)
            for message in messages:
                self._newest = message.id
                yield MessageEvent(message.sent_at, MessageState.PENDING, message)
                yield from self._steps_of(message, MessageState.PENDING)
            if len(messages) < _PAGE:
                break
        while len(self._followed) > _MAX_FOLLOWED:
            del self._followed[next(iter(self._followed))]

    def _steps_of(self, message: Status, known: MessageState) -> Iterator[MessageEvent]:
        for state in _STAGES[_STAGES.index(known) + 1 : _STAGES.index(message.state) + 1]:
            at = _instant(message, state)
            if at is not None:
                yield MessageEvent(at, state, message)
        if message.state is MessageState.READ:
            self._followed.pop(message.id, None)
        else:
            self._followed[message.id] = message.state
