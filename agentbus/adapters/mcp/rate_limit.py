"""A guard against two models that answer each other for ever: so many messages to one peer, and then a pause.

For a session's tools alone; scripts say what they mean to say. Knows no bus. Implements [BURST-1].
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from agentbus.core.errors import TryAgain

__all__ = ["RateLimit"]

# People and models that work seldom send more than one message in ten seconds; a loop sends hundreds.
WINDOW_S = 10.0


class RateLimit:
    """Lets `limit` messages through to one name within WINDOW_S seconds; 0 lets everything through."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._sent: defaultdict[str, deque[float]] = defaultdict(deque)

    @contextmanager
    def one(self, name: str) -> Iterator[None]:
        """Count what the block sends to `name`, unless it raises.

        Raises TryAgain, before the block, when that is one too many; nothing was sent then.
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
        # Counted before it is sent: calls that come at once are counted all the same.
        sent.append(now)
        try:
            yield
        except BaseException:
            sent.remove(now)
            raise
