"""A relay in memory: parcels and beats between lines of one process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import anyio

from agentbus.core.errors import RelayDown
from agentbus.core.ports import Line, Parcel, Stored


@dataclass
class Hub:
    """What stands between the machines."""

    stored: dict[str, dict[int, Parcel]] = field(default_factory=dict)
    keys: dict[str, int] = field(default_factory=dict)
    sequence: int = 0
    lines: list[FakeLine] = field(default_factory=list)

    def cut(self) -> None:
        for line in list(self.lines):
            line.lose()


class FakeRelay:
    place = "a fake"

    def __init__(self, hub: Hub, machine: str) -> None:
        self._hub, self._machine = hub, machine

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Line]:
        line = FakeLine(self._hub, self._machine)
        self._hub.lines.append(line)
        try:
            yield line
        finally:
            line.lose()


class FakeLine:
    limit = 1_000_000

    def __init__(self, hub: Hub, machine: str) -> None:
        self._hub, self._machine = hub, machine
        self._given: set[int] = set()
        self._changed = anyio.Event()
        self._heard: list[tuple[str, bytes]] = []
        self._is_lost = False
        self.sequence = hub.sequence

    @property
    def waiting(self) -> int:
        return len(self._hub.stored.get(self._machine, {}))

    def lose(self) -> None:
        self._is_lost = True
        if self in self._hub.lines:
            self._hub.lines.remove(self)
        self.nudge()

    def nudge(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _check(self) -> None:
        if self._is_lost:
            raise RelayDown("the line is lost")

    async def publish(self, parcels: Sequence[Parcel]) -> Stored:
        self._check()
        highest = 0
        for parcel in parcels:
            if parcel.key and parcel.key in self._hub.keys:
                continue
            self._hub.sequence = highest = self._hub.sequence + 1
            self._hub.keys[parcel.key] = highest
            stored = replace(parcel, machine=self._machine, key="", mark=f"{highest}")
            self._hub.stored.setdefault(parcel.machine, {})[highest] = stored
        for line in self._hub.lines:
            line.nudge()
        await anyio.sleep(0)
        return Stored(len(parcels), highest)

    async def take(self) -> list[Parcel]:
        while True:
            self._check()
            mine = self._hub.stored.get(self._machine, {})
            found = [number for number in sorted(mine) if number not in self._given]
            if found:
                self._given.update(found)
                return [mine[number] for number in found]
            await self._changed.wait()

    async def ack(self, parcels: Sequence[Parcel]) -> None:
        self._check()
        for parcel in parcels:
            self._hub.stored[self._machine].pop(int(parcel.mark), None)

    async def announce(self, body: bytes) -> None:
        self._tell((self._machine, body))

    async def ask(self) -> None:
        self._tell(("", b""))

    def _tell(self, what: tuple[str, bytes]) -> None:
        self._check()
        for line in self._hub.lines:
            if line is not self:
                line._heard.append(what)
                line.nudge()

    async def hear(self) -> tuple[str, bytes]:
        while True:
            self._check()
            if self._heard:
                return self._heard.pop(0)
            await self._changed.wait()
