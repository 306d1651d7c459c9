"""What a session does beside its own mail: raise settings of the bus, join groups, clean up at a heartbeat.

Waits for a busy database with `retry_while_busy`, so nothing here blocks the event loop. `say` takes one line for
people. Each that waits raises Busy, and the errors of `database.explain`. Implements [CONF-5], [STATE-4], [OLD-4],
[GROUP-5], [GROUP-6], [PRES-6].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import anyio
import anyio.lowlevel
import anyio.to_thread

from agentbus.core.bus import Bus, retry_while_busy
from agentbus.core.config import RETENTION, Shared
from agentbus.core.errors import Refused
from agentbus.core.model import Peer
from agentbus.core.presence import BEAT, Silence
from agentbus.core.process import Life, one_look
from agentbus.core.queries import Old
from agentbus.core.store import PRUNE_ROWS

__all__ = ["MOST_QUIET", "Upkeep", "about_old", "join_groups", "lengthen", "settle_ended"]

# What only the clock brings about, the end of a retention or of an alias, is found this many heartbeats later at most.
MOST_QUIET = 20


def about_old(old: Old, name: str) -> str:
    """What a session that is called `name` is told of the old mail that is held back from it. [OLD-4]"""
    return (
        f"{old.count:,} messages for you are older than a day, {old.origin}: they are not pushed. check_messages "
        "returns them, after what is new; to discard them, your user types: "
        f"agentbus inbox {name} --discard --before 1d"
    )


async def lengthen(bus: Bus, values: Mapping[Shared, int], say: Callable[[str], None]) -> None:
    """Raise the settings of the bus to `values`, where these are more. [CONF-5]"""
    for of, value in values.items():
        if value > bus.store.queries.setting(of):
            await retry_while_busy(partial(bus.store.set_setting, of, value, may_lower=False))
            say(f"{of.variable}: {of.key} is {value:,} from now on, for everybody on this bus")


async def join_groups(bus: Bus, name: str, groups: Iterable[str], say: Callable[[str], None]) -> None:
    """Make `name` a member of `groups`. What has no room for it is said, and stops nothing. [GROUP-6]"""
    for group in groups:
        try:
            await retry_while_busy(partial(bus.join_group, name, group))
        except Refused as error:
            say(str(error))


async def settle_ended(bus: Bus, say: Callable[[str], None]) -> None:
    """Look through the records of sessions that have ended; what they do not show is pending again. [STATE-6]"""
    for ended in bus.store.unsettled():
        # A record can be long, and this session has to answer its client meanwhile.
        shown, is_whole = await anyio.to_thread.run_sync(bus.look_through, ended)
        returned = await retry_while_busy(partial(bus.settle, ended, shown, is_whole=is_whole))
        if returned:
            count = f"{len(returned)} message{'s' if len(returned) > 1 else ''}"
            say(f"{count} that an ended session took and its model never had: pending again")


class Upkeep:
    """What a session does for all others with its heartbeats. `wake_itself` is called when it has let go of mail.

    Where nobody has written since the last heartbeat, it asks for a few locks and reads nothing: a hundred idle
    sessions that all read what all know took half a percent of a core.
    """

    def __init__(self, bus: Bus, say: Callable[[str], None], wake_itself: Callable[[], None]) -> None:
        self._bus = bus
        self._say = say
        self._wake_itself = wake_itself
        self._silence = Silence()
        self._following: list[Peer] = []
        # As of which state of the database all was done, and how many heartbeats have read nothing since.
        self._mark: tuple[int, int, int] | None = None
        self._quiet = 0

    def is_quiet(self) -> bool:
        """Whether nothing has happened that asks for `look_after`. Raises what `Database.mark` raises."""
        store = self._bus.store
        self._quiet += 1
        return self._quiet <= MOST_QUIET and store.mark() == self._mark and not store.doubtful(self._following)

    async def look_after(self, name: str) -> None:
        """Do all there is to do, as the session called `name`. [PRES-2], [STATE-4], [STATE-6], [ASK-5]"""
        store = self._bus.store
        # What is written from here on is seen the next time.
        mark, self._mark, self._quiet = store.mark(), None, 0
        self._following = store.following(name)
        doubtful = store.doubtful(self._following)
        silent = self._silent(doubtful)
        await retry_while_busy(lambda: self._bus.reap(silent, doubtful))
        await settle_ended(self._bus, self._say)
        if await retry_while_busy(lambda: store.forget_asks(now=self._bus.clock())):
            self._wake_itself()
        await self._clean_up()
        if not store.waits_for_an_end():
            self._mark = mark

    def _silent(self, doubtful: Sequence[Peer]) -> set[str]:
        """Those that this session has watched stay silent for too long, where no lock can tell. [PRES-3]"""
        store = self._bus.store
        beats = {}
        with one_look():
            unknown = [peer for peer in doubtful if store.life(peer) is Life.UNKNOWN]
        for peer in unknown:
            if peer.presence == BEAT:
                beats[peer.session] = peer.last_seen
            elif store.presence.is_missing(peer.session):
                # A live session makes its lock file again with its next beat.
                beats[peer.session] = 0
        return self._silence.watch(beats, anyio.current_time())

    async def _clean_up(self) -> None:
        """Remove what is not kept any longer: messages, conversations, pauses, and members that are away. [STATE-4]"""
        bus, store = self._bus, self._bus.store
        before = bus.clock() - store.queries.setting(RETENTION) * 3_600_000
        while await retry_while_busy(lambda: store.prune(before, PRUNE_ROWS)) == PRUNE_ROWS:
            await anyio.lowlevel.checkpoint()
        await retry_while_busy(lambda: store.forget_conversations(before))
        await retry_while_busy(lambda: store.forget_pauses(bus.clock()))
        for line in await retry_while_busy(bus.drop_absent):
            self._say(line)
