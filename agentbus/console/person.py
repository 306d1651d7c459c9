"""The person as a peer: the console takes the mail that is for them, and it stays unread until they open it.

Implements [CONSOLE-1], [CONSOLE-2].
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from html import escape

import anyio

from agentbus.console.desk import CARRIER
from agentbus.core.config import Settings
from agentbus.core.model import Envelope
from agentbus.core.ports import Delivery, Receipt, Settled
from agentbus.core.session import Session
from agentbus.member import peer_session

__all__ = ["RUNTIME", "joined", "show_on_desktop"]

RUNTIME = "person"
_REASON = "a person reads it in agentbus console"
# What the desktop shows of a message.
_SHOWN_CHARS = 200
# A desktop that does not answer keeps nothing waiting.
_PATIENCE_S = 5.0


class _Shown:
    """The delivery of a person: what the console has on its screen is delivered. Whether it is read, Enter tells."""

    carrier = CARRIER
    trouble = ""

    async def ready(self) -> None:
        """A console is ready when it has joined."""

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """The console draws from the database, where the messages stay."""
        return Settled(len(batch))


@asynccontextmanager
async def joined(settings: Settings, name: str, say: Callable[[str], None]) -> AsyncIterator[Session]:
    """Be on the bus as the person `name` until the block ends.

    Raises Refused when another process is that peer, and what `join` raises.
    """
    delivery: Delivery = _Shown()
    settings = replace(settings, name=name, name_note="")
    async with peer_session(settings, delivery, runtime=RUNTIME, reason=_REASON, say=say, other_name=False) as session:
        yield session


def desktop_command(title: str, text: str) -> list[str] | None:
    """What shows a line on this desktop; None where nothing does. The texts are arguments, and no program."""
    if shutil.which("notify-send"):
        # The desktop takes the text for markup.
        return ["notify-send", "--app-name=agentbus", "--", title, escape(text, quote=False)]
    if shutil.which("osascript"):
        script = "on run argv\ndisplay notification (item 2 of argv) with title (item 1 of argv)\nend run"
        return ["osascript", "-e", script, title, text]
    return None


async def show_on_desktop(title: str, text: str) -> bool:
    """Show a line on the desktop; False where nothing can."""
    command = desktop_command(title, text[:_SHOWN_CHARS])
    if command is None:
        return False
    try:
        with anyio.move_on_after(_PATIENCE_S):
            done = await anyio.run_process(command, stdin=subprocess.DEVNULL, check=False)
            return done.returncode == 0
    except OSError:
        pass  # it went away since it was looked for
    return False
