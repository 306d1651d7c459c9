"""The watchers of a home: each binds a socket in `watch/`, and every process that commits a change nudges all of them.

Knows no trigger by name: it is given one. Loaded by every send, so it imports no event loop: a watcher that has one
uses `changes.watching`. Implements [WATCH-1].
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from agentbus.core.errors import BrokenSetup
from agentbus.core.ports import ListeningTrigger, Nudges, Wake

__all__ = ["ChangeWait", "Watchers"]


class ChangeWait:
    """Waits for the next change. Without `nudges`, it looks every `poll_s` seconds."""

    def __init__(self, nudges: Nudges | None, poll_s: float) -> None:
        self._nudges = nudges
        self._poll_s = poll_s

    def __call__(self, timeout_s: float, fd: int) -> None:
        """Return when something has changed, when `fd` is readable, or after `timeout_s` seconds. It can be sooner."""
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        if self._nudges is None:
            timeout_s = min(timeout_s, self._poll_s)
        else:
            poller.register(self._nudges, select.POLLIN)
        poller.poll(int(timeout_s * 1_000) + 1)
        if self._nudges is not None:
            self._nudges.empty()


class Watchers:
    """The watchers whose endpoints are in `folder`. `make` makes the trigger that wakes them, when it is needed."""

    def __init__(self, folder: str, make: Callable[[], ListeningTrigger]) -> None:
        self._folder = folder
        self._make = make
        self._made: ListeningTrigger | None = None

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
    def listening(self, *, poll_ms: int, say: Callable[[str], None]) -> Iterator[ChangeWait]:
        """What `changes.watching` is with an event loop: yields a function that waits for the next change. [WATCH-1]"""
        with ExitStack() as stack:
            stack.callback(self.close)
            nudges = None
            try:
                nudges = stack.enter_context(self.trigger().listen(self.endpoint()))
            except BrokenSetup as error:
                say(self.unwoken(poll_ms, error))
            yield ChangeWait(nudges, poll_ms / 1_000)

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
