"""How a command hears of what happens: on the bus by a socket of its own, from its user by signals.

Looks and never writes. Knows nothing of what is looked for. Implements [WATCH-1].
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol

import anyio
import anyio.abc

from agentbus.core.config import Settings
from agentbus.core.errors import BrokenSetup
from agentbus.registry import Watchers

__all__ = ["SAFETY_S", "Glances", "looking", "when_signalled"]

# What a lost wake costs at most; as long as the safety poll of a drain. [DRAIN-5]
SAFETY_S = 3.0


class Glances(Protocol):
    """When to look again."""

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Return True once something may have changed, False after `timeout_s`; see Wakes."""

    def is_reachable(self) -> bool:
        """Whether who changes something still finds us; see Wakes."""


class _Polled:
    """Where no socket can be had: look every now and then."""

    def __init__(self, poll_s: float) -> None:
        self._poll_s = poll_s

    async def wait(self, timeout_s: float | None = None) -> bool:
        await anyio.sleep(self._poll_s if timeout_s is None else min(timeout_s, self._poll_s))
        return False

    def is_reachable(self) -> bool:
        return True


async def when_signalled(
    act: Callable[[int], None], *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    """Call `act` with the number of each SIGINT, SIGTERM and SIGHUP, until cancelled."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            act(number)


@asynccontextmanager
async def looking(settings: Settings, say: Callable[[str], None]) -> AsyncIterator[Glances]:
    """Be told of every change, until the block ends. Look once after entering: what came before is not told. [WATCH-1]

    Where no socket can be bound, `say` is told, and the wait is a poll.
    """
    watchers = Watchers(settings.home)
    trigger = watchers.trigger()
    async with AsyncExitStack() as stack:
        stack.callback(watchers.close)
        glances: Glances
        try:
            # Random, not our pid: a watcher that was killed leaves its socket, and its pid may be used again.
            glances = await stack.enter_async_context(trigger.arm(trigger.endpoint(os.urandom(6).hex())))
        except BrokenSetup as error:
            say(f"looking every {settings.poll_ms} ms, as nothing can wake this command ({error})")
            glances = _Polled(settings.poll_ms / 1_000)
        yield glances
