"""What is known about other machines: which there are, who is on them, and how the link to them is. Reads only.

Knows nothing about the wire or the server. Instants are milliseconds since 1970 UTC, by the clock of this machine.
Every method raises what `Database.read` raises. Implements [ADDR-2], [MACH-1].
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agentbus.core.names import EVERYBODY_THERE, similar
from agentbus.core.text import MAX_REASON_CHARS, age, one_line

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import Any

__all__ = ["WIRE_VERSION", "FarPeer", "Machine", "Machines"]

# The version of the form in which machines write to one another. [WIRE-1]
WIRE_VERSION = 1
_NOT_RUNNING = "the link is not running: agentbus link run"


@dataclass(frozen=True, slots=True)
class FarPeer:
    """A peer of another machine, as that machine describes it. `cwd` is empty unless it shares its folders."""

    name: str
    runtime: str = ""
    delivery: str = ""
    cwd: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Another machine, as it was last heard of. `gone_at` is None while it is there. `skew_ms`: its clock is ahead."""

    name: str
    bus: str
    version: int
    seen_at: int
    gone_at: int | None
    skew_ms: int
    peers: tuple[FarPeer, ...]

    @property
    def is_there(self) -> bool:
        """Whether it was heard of within the last 45 s."""
        return self.gone_at is None


class Machines:
    """The other machines of one bus. `read` runs a query and returns all its rows."""

    def __init__(self, read: Callable[..., list[Any]]) -> None:
        self._read = read

    def facts(self) -> Mapping[str, str]:
        """What is known about the link itself, by key.

        machine: its own name. bus: under which new messages for others are named. server: where it connects to. since:
        when it was connected; missing while it is not. trouble: why it is not. limit: what the server takes at most, in
        bytes. sequence: the highest number that the server has given to a message of ours.
        """
        return {str(key): str(value) for key, value in self._read("SELECT key, value FROM link")}

    def all(self, *, is_linked: bool = True) -> list[Machine]:
        """Every machine that was heard of, by name.

        `is_linked`: the link runs. Without it nobody is there: one that was killed has not written down who was.
        """
        rows = self._read("SELECT name, bus, version, seen_at, gone_at, skew_ms, peers FROM machines ORDER BY name")
        return [
            Machine(
                name=row[0],
                bus=row[1],
                version=row[2],
                seen_at=row[3],
                gone_at=row[4] if is_linked or row[4] is not None else row[3],
                skew_ms=row[5],
                peers=tuple(FarPeer(*one) for one in json.loads(row[6])),
            )
            for row in rows
        ]

    def waiting(self) -> dict[str, int]:
        """How many messages have not arrived yet, by machine."""
        rows = self._read(
            "SELECT host, count(*) FROM messages WHERE host IS NOT NULL AND arrived_at IS NULL AND refused IS NULL"
            " GROUP BY host ORDER BY host"
        )
        return {str(name): int(count) for name, count in rows}

    def late(self, before: int) -> dict[str, int]:
        """How many messages left before an instant and are not known to have arrived, by machine."""
        rows = self._read(
            "SELECT host, count(*) FROM messages WHERE host IS NOT NULL AND arrived_at IS NULL AND refused IS NULL"
            " AND relayed_at < ? GROUP BY host ORDER BY host",
            before,
        )
        return {str(name): int(count) for name, count in rows}

    def refused(self) -> dict[str, int]:
        """How many messages for other machines were refused, by mailbox."""
        rows = self._read(
            "SELECT recipient, count(*) FROM messages WHERE host IS NOT NULL AND arrived_at IS NULL"
            " AND refused IS NOT NULL GROUP BY recipient ORDER BY recipient"
        )
        return {str(mailbox): int(count) for mailbox, count in rows}

    @staticmethod
    def similar(name: str, machines: list[Machine]) -> tuple[str, ...]:
        """The addresses of that name on those of `machines` that are there, if there is exactly one. [ADDR-2]"""
        found = [f"{name}@{one.name}" for one in machines if one.is_there and name in {peer.name for peer in one.peers}]
        return tuple(found) if len(found) == 1 else ()

    def whereabouts(self, mailbox: str, *, is_linked: bool, now: int) -> tuple[bool, str]:
        """Whether the peer of `mailbox`, an address with a machine, is online; and what to say about it. [ADDR-2]

        `is_linked`: the link runs.
        """
        name, _, machine = mailbox.partition("@")
        if not is_linked:
            return False, _NOT_RUNNING
        known = {one.name: one for one in self.all()}
        facts = self.facts()
        meant = "" if machine in known else _similar(machine, [*known, facts.get("machine", "")])
        # Without a connection it cannot be told whether there is such a machine.
        if machine not in known and (meant or "since" in facts):
            return False, f"no machine of that name was ever heard of{meant}"
        if "since" not in facts:
            return False, f"this machine is not connected ({one_line(facts.get('trouble') or 'yet', MAX_REASON_CHARS)})"
        there = known[machine]
        if not there.is_there:
            last = f"{machine} was last heard of {age(there.seen_at, now)} ago"
            return False, f"{last}; it is delivered when that machine is back"
        if there.version > WIRE_VERSION:
            return False, f"{machine} has a newer agentbus, which may refuse it: upgrade this one"
        if name == EVERYBODY_THERE or name in {peer.name for peer in there.peers}:
            return True, "online there"
        meant = _similar(name, [peer.name for peer in there.peers], f"@{machine}")
        return False, f"{machine} is there, and says of no peer of that name{meant}"


def _similar(asked: str, names: list[str], end: str = "") -> str:
    meant = " or ".join(f'"{name}{end}"' for name in similar(asked, names))
    return f". Did you mean {meant}?" if meant else ""
