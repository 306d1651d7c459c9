"""A process that changes groups and pauses at random, and says what it was told is done: `HOME NAME SEED STEPS`."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from agentbus.core.bus import Bus
from agentbus.core.errors import InvalidRequest, Refused
from agentbus.core.store import Store
from tests.support.fakes import FakeTrigger, arrival

GROUPS = ("@a", "@b", "@c")


class Changer:
    """One session, what it did, and what has to be so after that: nobody else changes its groups, name and pause."""

    def __init__(self, home: Path, name: str) -> None:
        self.store = Store(home / "bus.db", busy_ms=10_000)
        self.bus = Bus(self.store, {"fake": FakeTrigger()}, max_bytes=1_000)
        claimed = self.bus.claim(arrival(name), str, join_crowd=True)
        assert claimed is not None
        self.peer, self.held = claimed.peer, claimed.held
        self.name = name
        self._names = [f"{name}{number}" for number in range(3)]
        self.groups: set[str] = set()
        self.is_paused = False
        self.ids: list[int] = []

    def step(self, what: str, which: int) -> None:
        group = GROUPS[which % 3]
        if what == "join":
            assert self.bus.join_group(self.name, group)[2] is (group not in self.groups)
            self.groups.add(group)
        elif what == "leave" and group in self.groups:
            self.bus.leave_group(self.name, group)
            self.groups.remove(group)
        elif what == "rename":
            self.name = self.bus.rename(self.peer, self._names[which % 3]).name
        elif what == "pause":
            self.bus.pause(self.name, by="root")
            self.is_paused = True
        elif what == "resume":
            assert self.bus.resume(self.name, by="root")[1] == ([self.name] if self.is_paused else [])
            self.is_paused = False
        elif what == "send":
            self._send(group)

    def _send(self, group: str) -> None:
        try:
            sent = self.bus.send_group(self.name, group, "x", sender_session=self.peer.session)
        except Refused:
            assert self.is_paused
        except InvalidRequest:
            assert not self.is_paused  # the group has no other member just now
        else:
            assert not self.is_paused
            names = [one.recipient for one in sent.sent]
            assert len(set(names)) == len(names)
            assert self.name not in names
            self.ids += [one.id for one in sent.sent]

    def state(self) -> dict[str, object]:
        return {"name": self.name, "groups": sorted(self.groups), "is_paused": self.is_paused, "ids": self.ids}

    def close(self) -> None:
        if self.held is not None:
            self.held.release()
        self.store.close()


def main(home: str, name: str, seed: str, steps: str) -> None:
    chance = random.Random(int(seed))
    changer = Changer(Path(home), name)
    for _ in range(int(steps)):
        changer.step(chance.choice(["join", "join", "leave", "rename", "pause", "resume", "send"]), chance.randrange(9))
    print(json.dumps(changer.state()))
    changer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
