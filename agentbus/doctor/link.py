"""What doctor finds about the link to other machines: whether it runs, reaches its server, and what waits for whom.

These checks change nothing, here or on the server. Where a home has no link, there is nothing to find. Implements
[DOCTOR-10].
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentbus import registry
from agentbus.core import eventloop, process
from agentbus.core.bus import now_ms
from agentbus.core.config import LINK_FILES
from agentbus.core.errors import AgentbusError, RelayRefused
from agentbus.core.findings import Finding, Level, from_error
from agentbus.core.model import Peer
from agentbus.core.names import machine_of
from agentbus.core.peers import judge
from agentbus.core.presence import Presence
from agentbus.core.process import Life
from agentbus.core.text import age, one_line, span, word
from agentbus.doctor.readonly import ReadOnlyDatabase

__all__ = ["check_far", "check_link"]

# A clock that is so far off is worth a remark: what is shown of a message is by the clock of its machine.
_SKEW_MS = 60_000
# What is not confirmed for so long, by a machine that is there, should have been.
_WAITING_MS = 600_000
_RUN = "agentbus link run, or agentbus link service for one that starts by itself"


def check_link(home: Path) -> Iterator[Finding]:
    """Check the link of `home`, if it has one."""
    if not (home / LINK_FILES[0]).exists():
        return
    try:
        settings = registry.link("settings:load")(home)
    except AgentbusError as error:
        yield from_error("link", error)
        return
    if (home / "bus.db").exists():
        with ReadOnlyDatabase(home / "bus.db") as readonly:
            link = _link(home, readonly)
            yield _running(link, readonly)
            yield from _waiting(readonly, is_linked=link is not None)
            yield from _clocks(readonly)
    else:
        yield Finding("link", Level.WRONG, "the link is not running", _RUN)
    yield from eventloop.run(_server, settings)


def _link(home: Path, readonly: ReadOnlyDatabase) -> Peer | None:
    found = readonly.link()
    return None if found is None or judge(found, Presence(home), process.domain()) is Life.ENDED else found


def _running(peer: Peer | None, readonly: ReadOnlyDatabase) -> Finding:
    facts = readonly.machines.facts()
    if peer is None:
        return Finding("link", Level.WRONG, "the link is not running: mail for other machines waits", _RUN)
    if "since" not in facts:
        seen = f"the link (process {peer.process.pid}) is not connected: {one_line(facts.get('trouble') or 'not yet')}"
        return Finding("link", Level.WRONG, seen, "see link-server and link-key; it tries again by itself")
    since = age(int(facts["since"]), now_ms())
    machines = sum(one.is_there for one in readonly.machines.all())
    seen = f'the link (process {peer.process.pid}) of "{facts.get("machine", "?")}" is connected for {since}'
    others = "1 other machine is" if machines == 1 else f"{machines} other machines are"
    return Finding("link", Level.OK, f"{seen}, {others} there")


def _waiting(readonly: ReadOnlyDatabase, *, is_linked: bool) -> Iterator[Finding]:
    there = {one.name for one in readonly.machines.all(is_linked=is_linked) if one.is_there}
    late = readonly.machines.late(now_ms() - _WAITING_MS)
    for machine, count in late.items():
        if machine in there:
            what, have = ("1 message", "has") if count == 1 else (f"{count:,} messages", "have")
            seen = f"{what} to {machine}, which is there, {have} not arrived for 10 minutes or more"
            yield Finding("link-waiting", Level.WRONG, seen, f"see what the link says, here and on {machine}")
    for mailbox, count in readonly.machines.refused().items():
        what = "1 message" if count == 1 else f"{count:,} messages"
        seen = f'{what} to "{mailbox}" {"is" if count == 1 else "are"} refused'
        remedy = f"agentbus inbox {mailbox} shows them, agentbus status ID says why; --discard removes them"
        yield Finding("link-refused", Level.NOTE, seen, remedy)


def _clocks(readonly: ReadOnlyDatabase) -> Iterator[Finding]:
    for one in readonly.machines.all():
        if abs(one.skew_ms) > _SKEW_MS:
            which = "ahead of" if one.skew_ms > 0 else "behind"
            seen = f"the clock of {one.name} is {span(abs(one.skew_ms))} {which} the one here"
            yield Finding("link-clock", Level.NOTE, seen, "let both machines keep time (NTP); no mail depends on it")


async def _server(settings: Any) -> list[Finding]:
    """What the server answers to the key of this machine. Nothing is sent to others, nothing is taken."""
    try:
        found = await registry.link("nats:probe")(settings)
    except RelayRefused as error:
        return [from_error("link-key", error)]
    except AgentbusError as error:
        return [from_error("link-server", error)]
    how = "by TLS" if found.is_encrypted else "in plain text, on this machine or as link.toml allows"
    seen = f"{', '.join(settings.servers)} answers, version {word(found.version)}, {how}"
    server = Finding("link-server", Level.OK, seen)
    if found.reads_others:
        seen = f'the key of "{settings.machine}" may read the mail of other machines'
        remedy = "for whoever runs the server: see the permissions in machines.conf"
        return [server, Finding("link-key", Level.WRONG, seen, remedy)]
    seen = f'the key of "{settings.machine}" is taken, and may read its own mail alone'
    return [server, Finding("link-key", Level.OK, seen)]


def check_far(home: Path, address: str) -> Iterator[Finding]:
    """Why a message to `address`, on another machine, would not reach its model, as far as is known here."""
    if not (home / LINK_FILES[0]).exists():
        yield Finding("link", Level.WRONG, "this home has no link to other machines", "agentbus link join FILE.invite")
        return
    yield from check_link(home)
    if not (home / "bus.db").exists():
        return
    with ReadOnlyDatabase(home / "bus.db") as readonly:
        is_linked = _link(home, readonly) is not None
        is_online, said = readonly.machines.whereabouts(address, is_linked=is_linked, now=now_ms())
        level = Level.OK if is_online else Level.WRONG
        yield Finding("running", level, f'"{address}": {said}', "" if is_online else "the message waits until then")
        name, machine = address.partition("@")[0], machine_of(address)
        for one in readonly.machines.all():
            for peer in one.peers if one.name == machine and is_online else ():
                if peer.name == name:
                    seen = f'"{address}" receives by {word(peer.delivery)}; agentbus doctor {name} there says more'
                    yield Finding("delivery", Level.OK, seen)
