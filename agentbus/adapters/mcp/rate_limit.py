"""A guard against two models that answer each other forever: a limited number of messages to one peer, then a pause.

Only for the tools of a session; scripts send what they are meant to send. Does not know the bus. Implements [BURST-1].
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from agentbus.core.errors import TryAgain

__all__ = ["RateLimit"]

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
