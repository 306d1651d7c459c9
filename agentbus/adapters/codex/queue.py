"""The queue delivery: where a Codex session has no app server, a line in its queue says that mail waits.

`codex queue` brings words of the user, and nothing else. A peer's words must not be these, so the line is ours alone,
and the model reads the messages with check_messages. The session looks into its queue every 10 s, and after each turn
(measured with 0.169). Implements [CODEX-11].
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import anyio

from agentbus.adapters.codex.delivery import line
from agentbus.core import process
from agentbus.core.errors import DeliveryFailed
from agentbus.core.model import Envelope
from agentbus.core.ports import Receipt
from agentbus.core.process import Process

__all__ = ["CARRIER", "QueueDelivery", "own_thread"]

CARRIER = "queue"
# A session holds the lock of its thread, and starts our server 0.1 s after the thread was made. With it go the bits of
# a UUID of version 7 that say when that was.
_LOCK = re.compile(r".*/thread-writer-locks/([0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12})\.lock")
_BEFORE_MS = 3_000
# How often it is looked whether there is more to announce, while mail waits. The session looks every 10 s itself.
_LOOK_S = 5.0
# `codex queue` takes 0.1 s.
_PATIENCE_S = 15.0


def own_thread(host: Process, started_ms: int) -> str:
    """The thread of `host` that was made just before `started_ms` (since 1970); "" if that cannot be told."""
    found = set()
    with suppress(OSError):
        for fd in os.scandir(f"/proc/{host.pid}/fd"):
            with suppress(OSError):
                held = _LOCK.fullmatch(os.readlink(fd.path))
                if held and 0 <= started_ms - int(held[1].replace("-", "")[:12], 16) <= _BEFORE_MS:
                    found.add(held[1])
    return found.pop() if len(found) == 1 else ""


class QueueDelivery:
    """Announces messages to `thread` of `host`. Hands none over: they stay pending until they are read."""

    carrier = CARRIER
    trouble = ""

    def __init__(self, host: Process, thread_id: str) -> None:
        self._host = host
        self._thread_id = thread_id
        self._announced = 0

    async def ready(self) -> None:
        """Return at once: `codex queue` says itself what it cannot take yet."""

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """Announce what of `batch` was not announced before. Raises DeliveryFailed, always: nothing is handed over."""
        new = [one for one in batch if one.id > self._announced]
        if new:
            await self._announce(f"{line(new)}. To read, call check_messages of agentbus")
            self._announced = new[-1].id
        await anyio.sleep(_LOOK_S)
        raise DeliveryFailed("the session knows that mail waits, and reads it with check_messages")

    async def _announce(self, text: str) -> None:
        program = Path(f"/proc/{self._host.pid}/exe")
        command = [str(program), "queue", "--thread", self._thread_id, "--message", text]
        try:
            with anyio.fail_after(_PATIENCE_S):
                done = await anyio.run_process(
                    command,
                    stdin=subprocess.DEVNULL,
                    stderr=subprocess.STDOUT,
                    check=False,
                    env=_environment(process.environment(self._host)),
                )
        except (OSError, TimeoutError) as error:
            await anyio.sleep(_LOOK_S)
            raise DeliveryFailed(f"codex queue cannot be run ({error})") from error
        if done.returncode:
            # A thread can be queued to from its first turn on.
            await anyio.sleep(_LOOK_S)
            raise DeliveryFailed(f"codex queue failed ({done.stdout.decode(errors='replace').strip()[-200:]})")


def _environment(of: Mapping[str, str]) -> dict[str, str]:
    """What `codex queue` needs to find the session's settings."""
    return {name: value for name, value in of.items() if name in ("CODEX_HOME", "HOME", "PATH")}
