"""The watchers of a home: each binds a socket in `watch/`, and every process that commits a change nudges all of them.

Knows no trigger by name: it is given one. Loaded by every send, so it imports no event loop: a watcher that has one
uses `changes.watching`. Implements [WATCH-1].
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from agentbus.core.errors import BrokenSetup
from agentbus.core.ports import ListeningTrigger, Wake

__all__ = ["Watchers"]


class Watchers:
    """The watchers whose endpoints are in `folder`. `make` makes the trigger that wakes them, when it is needed."""

    def __init__(self, folder: str, make: Callable[[], ListeningTrigger]) -> None:
        self._folder = folder
        self._make = make
        self._made: ListeningTrigger | None = None
        # Whether the last watcher could not be woken by a socket, and that was said.
        self.is_unwoken = False

    def trigger(self) -> ListeningTrigger:
        """The trigger that wakes them."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def endpoint(self) -> str:
        """The endpoint of one more watcher."""
        # Random, not our pid: a watcher that was killed leaves its socket behind, and its pid can be used again.
        return self.trigger().endpoint(os.urandom(6).hex())

    @contextmanager
    def listening(self, *, poll_ms: int, say: Callable[[str], None]) -> Iterator[Callable[[float], None]]:
        """What `changes.watching` is with an event loop: yields a function that waits for the next change. [WATCH-1]

        It returns after so many seconds at the latest, and can return sooner for no reason.
        """
        with ExitStack() as stack:
            stack.callback(self.close)
            poller = select.poll()
            nudges = None
            try:
                nudges = stack.enter_context(self.trigger().listen(self.endpoint()))
                poller.register(nudges, select.POLLIN)
            except BrokenSetup as error:
                say(self.unwoken(poll_ms, error))

            def wait(timeout_s: float) -> None:
                if nudges is None:
                    time.sleep(min(timeout_s, poll_ms / 1_000))
                else:
                    poller.poll(int(timeout_s * 1_000) + 1)  # rounded up: the last ms is not spent on looks
                    nudges.empty()

            yield wait

    @staticmethod
    def unwoken(poll_ms: int, error: BrokenSetup) -> str:
        """What to say where no socket can be bound."""
        return f"nothing can wake this command, so it checks every {poll_ms} ms ({error})"

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
