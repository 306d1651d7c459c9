"""The watchers of a home: each binds a socket in `watch/`, and every process that commits a change nudges all of them.

Knows no trigger by name: it is given one. Loaded by every send, so it imports no event loop. Implements [WATCH-1].
"""

from __future__ import annotations

import os
from collections.abc import Callable

from agentbus.core.ports import Trigger, Wake

__all__ = ["Watchers"]


class Watchers:
    """The watchers whose endpoints are in `folder`. `make` makes the trigger that wakes them, when it is needed."""

    def __init__(self, folder: str, make: Callable[[], Trigger]) -> None:
        self._folder = folder
        self._make = make
        self._made: Trigger | None = None

    def trigger(self) -> Trigger:
        """The trigger that wakes them."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def tell(self) -> None:
        """Nudge every watcher. Never blocks, never raises; costs 2 us if there is none."""
        try:
            endpoints = os.listdir(self._folder)
        except OSError:
            return  # the usual case: nobody ever watched
        for endpoint in endpoints:
            if self.trigger().notify(endpoint) is Wake.STALE:
                self.trigger().clear(endpoint)

    def close(self) -> None:
        """Release what nudging keeps open."""
        if self._made is not None:
            self._made.close()
