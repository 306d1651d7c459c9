"""Two guards against models that answer each other forever: so many messages to one peer in 10 s, so many in an hour.

Only for the tools of a session; scripts send what they are meant to send. Does not know the bus. Implements [BURST-1]
and [BRAKE-4].
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from agentbus.core.errors import Refused, TryAgain
from agentbus.core.model import timestamp

__all__ = ["HourlyLimit", "RateLimit"]

# At work, people and models rarely send more than one message in ten seconds; a loop sends hundreds.
WINDOW_S = 10.0


class RateLimit:
    """Lets `limit` messages through to one name within WINDOW_S seconds; 0 lets everything through."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._sent: defaultdict[str, deque[float]] = defaultdict(deque)

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        """Count the message that the block sends to `name`, unless the block raises.

        Raises TryAgain, before the block, if that message is one too many. Then nothing was sent.
        """
        if not self._limit:
            yield
            return
        now = self._clock()
        sent = self._sent[name]
        while sent and sent[0] <= now - WINDOW_S:
            sent.popleft()
        if len(sent) >= self._limit:
            wait_s = math.ceil(sent[0] + WINDOW_S - now)
            raise TryAgain(
                f'too many messages to "{name}" just now', hint=f"put what remains into one message or wait {wait_s}s"
            )
        # Count it before it is sent, so that calls that come at the same time are counted too.
        sent.append(now)
        try:
            yield
        except BaseException:
            sent.remove(now)
            raise


class HourlyLimit:
    """Lets `limit` messages through to one name within an hour, as the bus counts them; 0 lets everything through."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._calls = 0
        # Up to which call a name cannot have got too many: no call sends more than one message to one name. So the bus
        # is asked seldom, and not for each message.
        self._room_until: dict[str, int] = {}

    def check(self, to: str, own_name: Callable[[], str], count: Callable[[], tuple[str, int, int] | None]) -> None:
        """Refuse one more message to `to`, a name or a group, if that is one too many. [BRAKE-4]

        `count` says to whom of them most was sent within the hour, how many messages, and since which instant in ms.

        Raises Refused; then nothing was sent.
        """
        if not self._limit:
            return
        self._calls += 1
        if self._calls <= self._room_until.get(to, 0):
            return
        name, sent, since = count() or (to, 0, 0)
        if sent >= self._limit:
            raise Refused(
                f'you sent {sent:,} messages to "{name}" since {timestamp(since)}, the limit is '
                f"{self._limit:,} in an hour",
                hint=f"ask your user, or agentbus resume {own_name()}, which only your user can type",
            )
        self._room_until[to] = self._calls + self._limit - sent - 1
