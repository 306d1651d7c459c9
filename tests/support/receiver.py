"""A session without the MCP SDK. It starts in a tenth of the time.

`python -m tests.support.receiver NAME STEP COUNT`

It has the real mailbox, wake, pump and channel delivery, on its stdout. It kills itself with SIGKILL when it comes to
STEP for the COUNT-th time. STEP is read (before the push), write (in the middle of it), mark (between push and mark),
or never.
"""

from __future__ import annotations

import os
import signal
import sys

import anyio

from agentbus import registry
from agentbus.adapters.mcp.channel import ChannelDelivery
from agentbus.adapters.mcp.gate import ReadyGate
from agentbus.adapters.mcp.transport import Stdio
from agentbus.core import config, process
from agentbus.core.model import Arrival
from agentbus.core.session import Checkpoints, Session


class Fate:
    """Kills this process at its time."""

    def __init__(self, step: str, count: int) -> None:
        self._step = step
        self._left = count

    def strike(self, step: str) -> bool:
        """Whether the time has come to kill this process, at `step`."""
        if step == self._step:
            self._left -= 1
        return self._left == 0 and step == self._step

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def cursed(stdio: Stdio, session: Session, fate: Fate) -> None:
    """Make each step ask the fate first."""
    write, read, mark = stdio.write, session._read, session._mark

    async def fated_write(data: bytes) -> int:
        if fate.strike("write"):
            os.set_blocking(stdio._out, True)
            os.write(stdio._out, data[: len(data) // 2])
            fate.kill()
        return await write(data)

    def fated_read(limit: int):
        found = read(limit)
        if found and fate.strike("read"):
            fate.kill()
        return found

    def fated_mark(ids, carrier) -> None:
        if fate.strike("mark"):
            fate.kill()
        mark(ids, carrier)

    stdio.write = fated_write  # type: ignore[method-assign]
    session._read = fated_read  # type: ignore[method-assign]
    session._mark = fated_mark  # type: ignore[method-assign]


async def main(name: str, fate: Fate) -> None:
    settings = config.load()
    checkpoints = Checkpoints(settings.home / "bus.db")
    bus, triggers = registry.open_bus(settings, busy_ms=0, on_wal=checkpoints)
    stdio = Stdio.claim(lambda line: None)
    gate = ReadyGate(settle_s=0)
    gate.initialized()
    gate.listed()
    arrival = Arrival(
        host=process.parent(),
        launch_name=name,
        process=process.current(),
        runtime="test",
        cwd="/",
        delivery="channel",
        trigger="socket",
    )
    session = Session(
        bus,
        arrival,
        triggers=triggers.preferred(),
        delivery=ChannelDelivery(stdio, gate),
        checkpoints=checkpoints,
        say=lambda line: print(line, file=sys.stderr),
        retention_hours=0,
    )
    cursed(stdio, session, fate)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stdio.run)
        await session.claim()
        await tasks.start(session.run)
        await stdio.closed.wait()
        await session.stop()
        session.close()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], Fate(sys.argv[2], int(sys.argv[3])))
