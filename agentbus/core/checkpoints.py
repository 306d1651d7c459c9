"""Keeps the WAL of a session's database small, off the path of a send. Implements [STORE-5]."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.to_thread

from agentbus.core import database
from agentbus.core.errors import AgentbusError

__all__ = ["Checkpoints"]

# A reader that never stops keeps a checkpoint from finishing. Trying again at once would only burn a core.
_CHECKPOINT_PAUSE_S = 0.2


class Checkpoints:
    """Keeps the WAL small without making a send wait: when it is large, a thread merges it. [STORE-5]"""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._due = anyio.Event()

    def __call__(self, pages: int) -> None:
        """Note that the WAL has `pages` pages. Call it after each commit."""
        if pages >= database.CHECKPOINT_PAGES:
            self._due.set()

    async def run(self, say: Callable[[str], None]) -> None:
        """Merge the WAL each time it is due, until cancelled. Failures are reported to `say`."""
        while True:
            await self._due.wait()
            self._due = anyio.Event()
            try:
                await anyio.to_thread.run_sync(database.checkpoint, self._path, abandon_on_cancel=True)
            except AgentbusError as error:
                # Messages are safe in the WAL; it only grows meanwhile. The next commit asks again.
                say(f"the WAL was not merged: {error}")
            await anyio.sleep(_CHECKPOINT_PAUSE_S)
