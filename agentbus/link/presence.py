"""Who is on the other machines, and what they are told about this one.

A short beat every 15 s, the list of peers when it has changed or somebody asks. A machine is there for 45 s of our own
monotonic clock after its last beat. Nothing is stored on the server. Implements [MACH-1] to [MACH-3], [LINK-4].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace

import anyio

from agentbus.core.errors import InvalidRequest
from agentbus.core.machines import WIRE_VERSION, FarPeer, Machine
from agentbus.core.names import machine_name
from agentbus.core.ports import Line
from agentbus.link.carrier import LinkBus, Patience
from agentbus.link.settings import LinkSettings
from agentbus.link.wire import MAX_PEERS, Beat, read_beat, write_beat

__all__ = ["Presence"]

BEAT_S = 15.0
# Three beats: two may be lost.
GONE_S = 45.0
# How often what is only seen is written down.
_NOTE_S = 60.0
# A message that left so long ago and is not confirmed leaves again, when its machine says that nothing waits for it
# there. Each time the pause doubles.
RESEND_S, _LONGEST_RESEND_S = 30.0, 3_600.0
# A list is not sent more often than that, and not asked for more often either.
_LIST_PAUSE_S, _ASK_PAUSE_S = 1.0, 5.0


class _Far:
    """One other machine: as it is written down, when it was heard last, and when mail for it may leave again."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.etag = ""
        self.heard_at = 0.0
        self.noted_at = 0.0
        self.resend_s = RESEND_S
        self.resend_at = 0.0


class Presence:
    """What is known about the others. `read_again` is called when mail can leave that could not before."""

    def __init__(
        self,
        bus: LinkBus,
        settings: LinkSettings,
        *,
        say: Callable[[str], None],
        read_again: Callable[[], None],
        resend_s: float = RESEND_S,
    ) -> None:
        self._bus = bus
        self._settings = settings
        self._say = say
        self._read_again = read_again
        self._resend_s = resend_s
        self._patiently = Patience(say)
        self._far: dict[str, _Far] = {}
        self._etag = ""
        self._peers: tuple[FarPeer, ...] = ()
        self._version = -1
        self._beat_at = self._list_at = self._asked_at = 0.0
        self._is_list_due = False

    def forget(self) -> None:
        """The database is another one: what is known has to be written down again. [LINK-5]"""
        self._far.clear()
        self._version = -1

    async def begin(self, line: Line) -> None:
        """Announce this machine on a new line, and ask who else is there. Raises RelayDown."""
        for row in await self._patiently(self._bus.store.machines.all):
            known = self._far.setdefault(row.name, _Far(row))
            known.machine, known.etag, known.resend_s = row, "", self._resend_s
        await self._look_at_peers()
        await self._announce(line, with_peers=True)
        await line.ask()
        self._asked_at = anyio.current_time()

    async def leave(self, line: Line) -> None:
        """Say that this machine goes. Raises RelayDown."""
        await line.announce(write_beat(replace(self._beat(line), has_left=True)))

    # -- what others are told ------------------------------------------------------------------------------

    def _beat(self, line: Line) -> Beat:
        facts = self._bus.store.machines.facts()
        return Beat(
            bus=facts.get("bus", "0" * 16),
            at=self._bus.clock(),
            waiting=line.waiting,
            etag=self._etag,
        )

    async def _announce(self, line: Line, *, with_peers: bool) -> None:
        beat = await self._patiently(lambda: self._beat(line))
        await line.announce(write_beat(replace(beat, peers=self._peers) if with_peers else beat))
        self._beat_at = anyio.current_time()
        if with_peers:
            self._list_at, self._is_list_due = self._beat_at, False

    async def _look_at_peers(self) -> None:
        version = await self._patiently(self._bus.store.queries.version)
        if version == self._version:
            return
        self._version = version
        shared = await self._patiently(self._shared)
        etag = hashlib.sha256(json.dumps([(one.name, one.runtime, one.delivery, one.cwd) for one in shared]).encode())
        if etag.hexdigest()[:16] != self._etag:
            self._peers, self._etag = shared, etag.hexdigest()[:16]
            self._is_list_due = True

    def _shared(self) -> tuple[FarPeer, ...]:
        """What others are told about the peers here. [MACH-3]"""
        if self._settings.share == "none":
            return ()
        return tuple(
            FarPeer(peer.name, peer.runtime, peer.delivery, peer.cwd if self._settings.share == "folders" else "")
            for peer in self._bus.peers()[:MAX_PEERS]
        )

    async def tick(self, line: Line) -> None:
        """What is due once a second: tell others, and note who is gone. Raises RelayDown and BrokenSetup."""
        await self._look_at_peers()
        now = anyio.current_time()
        if self._is_list_due and now - self._list_at >= _LIST_PAUSE_S:
            await self._announce(line, with_peers=True)
        elif now - self._beat_at >= BEAT_S:
            await self._announce(line, with_peers=False)
        gone = [
            replace(one.machine, gone_at=self._bus.clock())
            for one in self._far.values()
            if one.machine.is_there and now - one.heard_at >= GONE_S
        ]
        await self._write(gone)

    # -- what they say -------------------------------------------------------------------------------------

    async def listen(self, line: Line) -> None:
        """Note what others say about themselves, until cancelled. Raises RelayDown and BrokenSetup. [MACH-1]"""
        while True:
            machine, body = await line.hear()
            if not machine:
                self._is_list_due = True
                continue
            try:
                beat = read_beat(body)
                if machine_name(machine) != machine:
                    continue
            except InvalidRequest:
                continue  # it is of no use, and comes again; a later form is told apart by its version
            if machine != self._settings.machine:
                await self._note(line, machine, beat)

    async def _note(self, line: Line, name: str, beat: Beat) -> None:
        now, at = anyio.current_time(), self._bus.clock()
        known = self._far.get(name) or _Far(
            Machine(name=name, bus="", version=0, seen_at=0, gone_at=at, skew_ms=0, peers=())
        )
        was = known.machine
        known.heard_at = now
        seen = replace(
            was,
            bus=beat.bus,
            version=beat.version,
            seen_at=at,
            gone_at=at if beat.has_left else None,
            skew_ms=beat.at - at,
            peers=was.peers if beat.peers is None else beat.peers,
        )
        if beat.peers is not None:
            known.etag = beat.etag
        elif beat.etag != known.etag and now - self._asked_at >= _ASK_PAUSE_S:
            self._asked_at = now
            await line.ask()
        is_news = name not in self._far or replace(seen, seen_at=was.seen_at, skew_ms=was.skew_ms) != was
        self._far[name] = known
        known.machine = seen
        if is_news or now - known.noted_at >= _NOTE_S:
            await self._write([seen])
        if was.gone_at is not None and seen.is_there:
            self._read_again()
        if beat.waiting == 0 and seen.is_there:
            await self._resend(known, now, at)

    async def hear_of(self, name: str, bus: str) -> None:
        """Note a machine that has sent mail: from then on it can be answered. Raises BrokenSetup."""
        if name not in self._far:
            at = self._bus.clock()
            machine = Machine(name=name, bus=bus, version=WIRE_VERSION, seen_at=at, gone_at=None, skew_ms=0, peers=())
            self._far[name] = _Far(machine)
            self._far[name].heard_at = anyio.current_time()
            await self._write([machine])
            self._read_again()

    async def _write(self, machines: list[Machine]) -> None:
        if not machines:
            return
        await self._patiently(lambda: self._bus.links.note_machines(machines))
        for one in machines:
            self._far[one.name].machine = one
            self._far[one.name].noted_at = anyio.current_time()

    async def _resend(self, known: _Far, now: float, at: int) -> None:
        """Let leave again what has left, is not confirmed, and does not wait at the server. [LINK-4]"""
        name, before = known.machine.name, at - int(self._resend_s * 1_000)
        links = self._bus.links
        if not await self._patiently(lambda: links.unconfirmed(name, before)):
            known.resend_s = self._resend_s
            return
        if now < known.resend_at:
            return
        count = await self._patiently(lambda: links.relay_anew(name, before))
        known.resend_at, known.resend_s = now + known.resend_s, min(2 * known.resend_s, _LONGEST_RESEND_S)
        self._say(f"{count:,} messages to {name} were not confirmed, and do not wait for it: they leave again")
        self._read_again()
