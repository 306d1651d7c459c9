"""What doctor finds about peers and mailboxes: which peers can be woken or pushed to, and which messages wait for whom.

These checks read through a ReadOnlyDatabase and change nothing. Implements [DOCTOR-5], [DOCTOR-6].
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from agentbus import registry
from agentbus.cli import output
from agentbus.core import process
from agentbus.core.adapter import Registration
from agentbus.core.bus import HOOK, PULL, now_ms
from agentbus.core.config import Settings
from agentbus.core.errors import AgentbusError
from agentbus.core.findings import Finding, Level
from agentbus.core.model import Pause, Peer
from agentbus.core.names import is_kept, similar
from agentbus.core.peers import judge
from agentbus.core.ports import Wake
from agentbus.core.presence import BEAT, SILENT_S, Presence
from agentbus.core.process import Life
from agentbus.core.queries import OLD_MS, Counts
from agentbus.core.session import MOST_OLD
from agentbus.core.store import MAX_PENDING
from agentbus.core.text import MAX_REASON_CHARS, one_line, word
from agentbus.doctor.readonly import ReadOnlyDatabase
from agentbus.registry import Triggers

__all__ = ["check_mailboxes", "check_one", "check_peers"]

# If a message for a peer with push is pending longer than this, it does not get through: opening the gate takes 2 s.
_STUCK_MS = 10_000
_MAX_MAILBOXES = 20
_CLEARED = "the next session, broadcast or message to it clears that away"


def check_peers(here: Settings) -> Iterator[Finding]:
    """Check every peer whose row says that it is present, and look for what dead peers have left."""
    path = here.home / "bus.db"
    if not path.exists():
        return
    triggers = Triggers(here)
    try:
        with ReadOnlyDatabase(path) as readonly:
            peers = readonly.present()
            counts = {one.mailbox: one for one in readonly.queries.counts()}
            pauses = readonly.queries.pauses(now_ms())
            if not peers:
                yield Finding("peer", Level.OK, "nobody is online")
            for peer in peers:
                last = readonly.queries.last_delivered(peer.session)
                due = _due(readonly, peer, counts)
                yield from _check_peer(here.home, peer, due, last, triggers, is_paused=peer.name in pauses)
                yield from _check_kept(readonly, peer)
                yield from _check_proof(peer, readonly.proof(peer.session))
            yield from (_paused(one, Level.NOTE) for one in pauses.values())
            yield from _check_groups(readonly, {one.name for one in peers if not _has_ended(here.home, one)})
            link = readonly.link()
            endpoints = {peer.endpoint for peer in ([*peers, link] if link else peers)}
        for trigger in triggers.values():
            for endpoint in trigger.leftovers():
                if endpoint not in endpoints and trigger.notify(endpoint) is Wake.STALE:
                    path = here.home / (trigger.folder or "") / endpoint
                    seen = f"{path} was left behind by a process that is dead"
                    yield Finding("orphan", Level.NOTE, seen, f"rm '{path}'")
    finally:
        triggers.close()


def _check_peer(
    home: Path, peer: Peer, counts: Counts | None, last: int | None, triggers: Triggers, *, is_paused: bool
) -> Iterator[Finding]:
    """What doctor reports about one peer: first what keeps a message from it, or that nothing does. [DOCTOR-5]"""
    whom = f'"{peer.name}" (process {peer.process.pid}, {word(peer.runtime)}, {one_line(peer.cwd)})'
    life = judge(peer, Presence(home), process.domain())
    if life is Life.ENDED:
        yield Finding("peer", Level.NOTE, f"{whom} has ended without leaving; its mail is safe", _CLEARED)
        return
    if peer.domain == process.domain() and process.is_stopped(peer.process):
        yield Finding("peer", Level.WRONG, f"{whom} is suspended", f"kill -CONT {peer.process.pid}")
        return
    now = now_ms()
    if peer.presence == BEAT and now - peer.last_seen > SILENT_S * 1_000:
        seen = f"{whom} was last seen {output.age(peer.last_seen, now)} ago, although its process runs"
        yield Finding("peer", Level.WRONG, seen, "end that session and start it again")
        return
    yield from _check_wake(peer, triggers)
    yield _check_delivery(peer)
    heard = "it has received nothing yet" if last is None else f"it last received a message {output.age(last, now)} ago"
    if counts is not None and counts.oldest_pending_at is not None:
        waited = now - counts.oldest_pending_at
        is_stuck = waited > _STUCK_MS and peer.delivery not in (PULL, HOOK) and not is_paused
        since = output.age(counts.oldest_pending_at, now)
        seen = f'"{peer.name}": {counts.pending:,} pending, the oldest for {since}; {heard}'
        remedy = "end that session and start it again; its messages are kept" if is_stuck else ""
        yield Finding("pending", Level.WRONG if is_stuck else Level.OK, seen, remedy)
    else:
        yield Finding("peer", Level.OK, f"{whom}: nothing is pending; {heard}")


def _paused(pause: Pause, level: Level) -> Finding:
    """That a person has paused a session: meant, so no fault by itself. [BRAKE-3]"""
    seen = f'"{pause.name}" is {pause}: it sends nothing, and its mail waits'
    return Finding("paused", level, seen, f"agentbus resume {pause.name}")


def _check_groups(readonly: ReadOnlyDatabase, online: Collection[str]) -> Iterator[Finding]:
    for group, members in readonly.queries.groups().items():
        count = f"{len(members):,} {'member' if len(members) == 1 else 'members'}"
        there = sum(name in online for name in members)
        yield Finding("group", Level.OK, f'"{group}": {count}, {there:,} of them online')


def _due(readonly: ReadOnlyDatabase, peer: Peer, counts: Mapping[str, Counts]) -> Counts | None:
    """What the mailbox of `peer` holds, without what its session does not push. [OLD-4], [NAME-12]"""
    found = counts.get(peer.name)
    if found is None or not found.pending:
        return found
    kept = readonly.queries.kept(peer.name, peer.session)
    old = readonly.queries.old(peer.name, peer.started_at - OLD_MS, peer.session)
    held, above = (old.count, old.newest_id) if old.count > MOST_OLD else (0, 0)
    if not kept and not held:
        return found
    oldest = readonly.queries.oldest_pending(peer.name, above, peer.session)
    return replace(found, pending=found.pending - held - kept, oldest_pending_at=oldest)


def _check_wake(peer: Peer, triggers: Triggers) -> Iterator[Finding]:
    trigger = triggers.get(peer.trigger)
    wake = trigger.notify(peer.endpoint) if trigger is not None else Wake.ABSENT
    match wake:
        case Wake.WOKEN:
            yield Finding("wake", Level.OK, f'"{peer.name}" is woken by {word(peer.trigger)}')
        case Wake.PENDING:
            yield Finding("wake", Level.OK, f'"{peer.name}" is not woken, it checks by itself ({word(peer.trigger)})')
        case Wake.FULL:
            seen = f'"{peer.name}" does not read its wakes: it is busy, or it hangs'
            yield Finding("wake", Level.NOTE, seen, f"if this goes on: kill {peer.process.pid}, and start it again")
        case _:
            its = f"its {word(peer.trigger)} is {wake.value}"
            seen = f'"{peer.name}" cannot be woken: {its}; it checks every 3 s by itself'
            yield Finding("wake", Level.WRONG, seen, "wait 15 s: a live session listens again by then")
    if peer.trigger != triggers.usual:
        remedy = "if you did not choose that: agentbus doctor says under `trigger` why it cannot use a socket"
        yield Finding(
            "trigger", Level.NOTE, f'"{peer.name}" has fallen back to {word(peer.trigger)}, which is slower', remedy
        )


def _check_delivery(peer: Peer) -> Finding:
    """Whether messages are pushed to a peer, according to its adapter. [VOID-1]"""
    adapter = _adapter(peer.runtime)
    if adapter is not None:
        return adapter.delivery(peer)
    return Finding("delivery", Level.OK, f'"{peer.name}" receives by {peer.receives}')


def _check_kept(readonly: ReadOnlyDatabase, peer: Peer) -> Iterator[Finding]:
    """The mail that waited under the name of a peer before it took that name by a rename. [NAME-12]"""
    kept = readonly.queries.kept(peer.name, peer.session)
    if kept:
        seen = f'"{peer.name}": {kept:,} pending from before its session took that name; it does not get them'
        yield Finding("mailbox", Level.NOTE, seen, f"agentbus inbox {peer.name} shows them")


def _check_proof(peer: Peer, proof: str | None) -> Iterator[Finding]:
    """What tells whether the model of a peer has read what is pushed to it. [PROOF-2]"""
    if proof:
        places = " and ".join(one_line(place, MAX_REASON_CHARS) for place in proof.splitlines())
        yield Finding("proof", Level.OK, f'what the model of "{peer.name}" was given is seen in {places}')
    elif proof is not None:
        seen = f'what the model of "{peer.name}" has read is not known until it replies or checks: no record to be had'
        yield Finding(
            "proof", Level.NOTE, seen, "nothing to do: its next session is offered by check_messages what is open"
        )


def _adapter(runtime: str) -> Registration | None:
    """The adapter of a runtime. None for a program, a shell, or an adapter that cannot be loaded."""
    try:
        return registry.registration(registry.manifest(runtime))
    except AgentbusError:
        return None


def _has_ended(home: Path, peer: Peer) -> bool:
    return judge(peer, Presence(home), process.domain()) is Life.ENDED


def _launch(module: str, name: str, *, flags: bool = True) -> str:
    try:
        return registry.registration(registry.manifest(module)).launch(name, flags=flags)
    except AgentbusError:
        return f"agentbus launch {module} {name}"  # that command reports what is wrong with the adapter


def check_mailboxes(home: Path) -> Iterator[Finding]:
    """Report what each mailbox holds, the fullest first."""
    if not (home / "bus.db").exists():
        return
    with ReadOnlyDatabase(home / "bus.db") as readonly:
        found = sorted(readonly.queries.counts(), key=lambda one: -one.pending)
        online = {peer.name for peer in readonly.present() if not _has_ended(home, peer)}
        for counts in found[:_MAX_MAILBOXES]:
            # Called for few mailboxes: each `was_peer` reads the newest messages.
            may_be_misspelt = (
                counts.pending and counts.mailbox not in online and not readonly.queries.was_peer(counts.mailbox)
            )
            old = readonly.queries.old(counts.mailbox, now_ms() - OLD_MS).count if counts.pending else 0
            yield _mailbox(counts, _similar(counts.mailbox, online) if may_be_misspelt else "", old)
    if len(found) > _MAX_MAILBOXES:
        yield Finding("mailbox", Level.OK, f"and {len(found) - _MAX_MAILBOXES:,} mailboxes with less pending mail")


def _similar(name: str, online: Iterable[str]) -> str:
    """Suggest similar names for a name that no peer has; empty if no name is similar."""
    found = similar(name, online)
    return f"did you mean {' or '.join(found)}?" if found else ""


def _mailbox(counts: Counts, meant: str = "", old: int = 0) -> Finding:
    since = ""
    if counts.oldest_pending_at is not None:
        since = f" (the oldest for {output.age(counts.oldest_pending_at, now_ms())})"
    seen = (
        f'"{counts.mailbox}": {counts.pending:,} pending{since}, {counts.delivered:,} delivered, {counts.read:,} read'
    )
    if counts.pending >= MAX_PENDING:
        remedy = f'start a session named "{counts.mailbox}" to receive them'
        return Finding("mailbox", Level.WRONG, f"{seen}: it is full, and refuses new messages", remedy)
    if old:
        seen += f"; {old:,} of them {'waits' if old == 1 else 'wait'} for more than a day"
        remedy = f"agentbus inbox {counts.mailbox} shows them; --discard --before 1d removes them"
        return Finding("mailbox", Level.NOTE, seen, f"{meant} {remedy}".strip())
    if meant:
        return Finding("mailbox", Level.NOTE, f"{seen}; no peer ever had this name", meant)
    return Finding("mailbox", Level.OK, seen)


def check_one(here: Settings, name: str) -> Iterator[Finding]:
    """Why a message to `name` would not reach its model, as far as the peer is the cause. [DOCTOR-6]"""
    path = here.home / "bus.db"
    if not path.exists():
        yield _absent(name, None, "", was_there=False)
        return
    with ReadOnlyDatabase(path) as readonly:
        asked, name = name, readonly.queries.alias(name) or name
        peers = {peer.name: peer for peer in readonly.present()}
        counts = {one.mailbox: one for one in readonly.queries.counts()}.get(name)
        if asked != name:
            yield Finding("name", Level.OK, f'"{asked}" is called "{name}" now')
        peer = peers.get(name)
        pause = readonly.queries.pauses(now_ms()).get(name)
        if pause is not None:
            yield _paused(pause, Level.WRONG)
        if peer is None or _has_ended(here.home, peer):
            others = [one.name for one in peers.values() if not _has_ended(here.home, one)]
            was_there = peer is not None or readonly.queries.was_peer(name)
            yield _absent(name, counts, _similar(name, others), was_there=was_there)
        else:
            triggers = Triggers(here)
            try:
                due = _due(readonly, peer, {name: counts} if counts is not None else {})
                last = readonly.queries.last_delivered(peer.session)
                yield from _check_peer(here.home, peer, due, last, triggers, is_paused=pause is not None)
            finally:
                triggers.close()
            yield from _check_kept(readonly, peer)
            yield from _check_proof(peer, readonly.proof(peer.session))
            adapter = _adapter(peer.runtime)
            delivered, read = (counts.delivered, counts.read) if counts is not None else (0, 0)
            gate = adapter.gate(peer, delivered=delivered, read=read) if adapter is not None else None
            if gate is not None:
                yield gate
        if counts is not None:
            yield _mailbox(counts)


def _absent(name: str, counts: Counts | None, similar: str, *, was_there: bool) -> Finding:
    waiting = counts.pending if counts is not None else 0
    seen = f'"{name}" is not running{"" if was_there else " and was not seen recently"}'
    seen += f"; {waiting:,} {'message waits' if waiting == 1 else 'messages wait'} for it" if waiting else ""
    if similar:
        return Finding("running", Level.WRONG, seen, similar)
    if is_kept(name):
        return Finding("running", Level.WRONG, f"{seen}; no session can have that name", f"agentbus inbox {name}")
    starts = [_launch(one.id, name, flags=False) for one in registry.manifests()[0] if one.client]
    return Finding("running", Level.WRONG, seen, " or ".join(starts))
