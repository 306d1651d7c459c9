"""What a session does beside its own mail: raise settings of the bus, join groups, clean up at a heartbeat.

Waits for a busy database with `retry_while_busy`, so nothing here blocks the event loop. `say` takes one line for
people. Each that waits raises Busy, and the errors of `database.explain`. Implements [CONF-5], [STATE-4], [OLD-4],
[GROUP-5], [GROUP-6].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import anyio.lowlevel

from agentbus.core.bus import Bus, retry_while_busy
from agentbus.core.config import RETENTION, Shared
from agentbus.core.errors import Refused
from agentbus.core.queries import Old
from agentbus.core.store import PRUNE_ROWS

__all__ = ["about_old", "clean_up", "join_groups", "lengthen"]


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


async def clean_up(bus: Bus, say: Callable[[str], None]) -> None:
    """Remove what is not kept any longer: messages, conversations, pauses, and members that are away. [STATE-4]"""
    store = bus.store
    before = bus.clock() - store.queries.setting(RETENTION) * 3_600_000
    while await retry_while_busy(lambda: store.prune(before, PRUNE_ROWS)) == PRUNE_ROWS:
        await anyio.lowlevel.checkpoint()
    await retry_while_busy(lambda: store.forget_conversations(before))
    await retry_while_busy(lambda: store.forget_pauses(bus.clock()))
    for line in await retry_while_busy(bus.drop_absent):
        say(line)
