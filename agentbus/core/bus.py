"""The operations of the bus, for peers and people: send, broadcast, claim, rename, list the peers, groups, brakes.

A send has succeeded when its row is committed. The wake that follows is only a hint. Knows no trigger by name and
nothing about MCP. Synchronous: in an event loop, wrap a call that writes in `retry_while_busy`. Implements [SEND-1] to
[SEND-5], [GROUP-2] to [GROUP-5], [BRAKE-1] to [BRAKE-4], [NAME-4], [PRES-2].
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress

from agentbus.core.config import MEMBER_DAYS
from agentbus.core.errors import AgentbusError, Busy, InvalidRequest, Refused
from agentbus.core.model import (
    Address,
    Arrival,
    Ended,
    Envelope,
    MessageState,
    Pause,
    Peer,
    Renamed,
    Status,
    Unread,
    check_body,
    check_status,
)
from agentbus.core.names import address, group_name, is_group, is_kept, machine_of, session_name, similar, split_address
from agentbus.core.ports import Shown, Trigger, Wake
from agentbus.core.presence import LOCK, Held
from agentbus.core.process import Life, Process
from agentbus.core.store import PRUNE_ROWS, Question, Store
from agentbus.core.values import dataclass

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import TypeVar

    from agentbus.core.adapter import Reachable
    from agentbus.core.machines import Machine

    _T = TypeVar("_T")

__all__ = ["HOOK", "PULL", "Bus", "Claimed", "GroupSent", "Sent", "now_ms", "retry_while_busy"]

# The `delivery` of a peer that gets no pushes. [VOID-1]
PULL = "pull"
# The `delivery` of a peer that is given messages while it works: one that is idle gets them with its next prompt.
HOOK = "hook"

# How long a session waits for a busy database in total. The command line waits as long, inline. [STORE-4]
BUSY_PATIENCE_S = 10.0
# So many messages go into a session that has not joined, with one post.
_MOST_POSTED = 20
# A send or a mark holds the lock for 0.1 ms. If it is held for longer, the pauses between two tries grow.
_SPIN_S = 0.000_5
_FIRST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.012
# The pause between two batches of a long work, so that who waits for the database gets a turn.
_TURN_S = 0.002


def now_ms() -> int:
    """The wall clock, in milliseconds since 1970 UTC."""
    return time.time_ns() // 1_000_000


# What a sender is told of a peer that a message does not reach at once: why, and when it does. [VOID-2]
_WAITS = {
    PULL: ("nothing can be pushed to it", "reads its mail only when it calls check_messages"),
    HOOK: ("idle it is not reached", "gets its mail while it works, or with its user's next prompt"),
}


@dataclass(frozen=True, slots=True)
class Sent:
    """A committed message. `asked` is the name that it was sent to, `recipient` is the mailbox that it is in.

    `far` says, for a mailbox on another machine, what is known about it there.
    """

    id: int
    asked: str
    recipient: str
    is_online: bool
    is_known: bool
    similar: tuple[str, ...] = ()
    delivery: str = ""
    # A command waits for this message: it answers the question of that command. [ASK-5]
    is_awaited: bool = False
    # The session that has the mailbox; empty if none has.
    session: str = ""
    # The recipient's pause, if a person has paused it. [BRAKE-3]
    pause: Pause | None = None
    # What is to be said where a session of that name runs and has not joined; empty if none does. [REACH-2]
    reached: str = ""
    far: str = ""

    @property
    def waits(self) -> str:
        """When the recipient gets it, in a clause without a subject, if that is not at once; else empty."""
        return _WAITS.get(self.delivery, ("", ""))[1]

    @property
    def brief(self) -> str:
        """What became of it, as one of several messages."""
        return f"{self.recipient} (#{self.id}{', paused' if self.pause else '' if self.is_online else ', offline'})"

    def __str__(self) -> str:
        if self.far:
            there = f'"{self.recipient}" ({self.far})' if self.is_online else f'"{self.recipient}": {self.far}'
            return f"{'sent' if self.is_online else 'queued'} #{self.id} {'to' if self.is_online else 'for'} {there}"
        moved = "" if self.recipient == self.asked else f', as "{self.asked}" is called now'
        if self.is_awaited:
            return f'sent #{self.id} to "{self.recipient}"{moved}, which waits for this answer'
        if self.pause is not None:
            return f'queued #{self.id} for "{self.recipient}"{moved}: it is {self.pause}, and gets its mail then'
        if self.is_online:
            why = f", but {_WAITS[self.delivery][0]}: it {self.waits}" if self.waits else ""
            return f'sent #{self.id} to "{self.recipient}"{moved} (online{why})'
        if self.reached:
            return self.reached
        if is_kept(self.recipient):
            how = f"agentbus inbox {self.recipient}, or agentbus console --as {self.recipient}"
            return f'queued #{self.id} for "{self.recipient}": a person reads it with {how}'
        if self.is_known:
            return f'queued #{self.id} for "{self.recipient}"{moved}: offline, it is delivered when that peer is back'
        if not self.similar:
            return f'queued #{self.id} for "{self.recipient}": no such peer yet, it is delivered when one starts'
        meant = " or ".join(f'"{name}" (online)' for name in self.similar)
        where = "here" if any(map(machine_of, self.similar)) else "yet"
        return f'queued #{self.id} for "{self.recipient}": no such peer {where}. Did you mean {meant}?'


@dataclass(frozen=True, slots=True)
class GroupSent:
    """What was sent to `group`: one message for each member but the sender, and but those whose mailbox is `full`."""

    group: str
    sent: tuple[Sent, ...]
    full: tuple[str, ...] = ()

    def __str__(self) -> str:
        missed = f"; not to {', '.join(self.full)}: the mailbox is full" if self.full else ""
        return f"sent to {self.group}: {', '.join(one.brief for one in self.sent)}{missed}"


@dataclass(frozen=True, slots=True)
class Claimed:
    """The result of a claim. `wished_holder` is the peer that holds the wished-for name, None if it was free.

    `note` says, in a clause, why the name is not the one that was expected; empty if there is nothing to say.
    """

    peer: Peer
    wished_holder: Peer | None
    held: Held | None = None
    note: str = ""


def _check_reply(reply_to: object) -> int | None:
    if reply_to is None:
        return None
    if isinstance(reply_to, bool) or not isinstance(reply_to, int) or reply_to < 1:
        raise InvalidRequest(f"{str(reply_to)[:40]!r} is not a message id", hint="use the number after msg_id")
    return reply_to


class Bus:
    """One bus, as seen by one process. `triggers` are looked up by the name in a peer's row.

    `clock` gives milliseconds since 1970 UTC. `max_bytes` is the limit of a message, in bytes of UTF-8. `tell` is
    called after each change that this process commits, to nudge the watchers. It never blocks and never raises.
    [WATCH-1]
    """

    def __init__(
        self,
        store: Store,
        triggers: Mapping[str, Trigger],
        *,
        max_bytes: int,
        clock: Callable[[], int] = now_ms,
        tell: Callable[[], None] = lambda: None,
    ) -> None:
        self.store = store
        self.clock = clock
        self._tell = tell
        self._triggers = triggers
        self._max_bytes = max_bytes
        # What the record of a runtime at a place shows as given to a model; None if it cannot be read. Set by what
        # opens the bus, which knows the adapters.
        self.recorded: Callable[[str, str], set[Shown] | None] = lambda _runtime, _place: None
        # The sessions that the clients of this machine run, all or those of a name. Set by what opens the bus, which
        # knows the adapters.
        self.running: Callable[[str | None], list[Reachable]] = lambda _name: []
        # Whether the client of a peer is "busy" or "idle" just now; "" where it does not tell. Set in the same way.
        self.activity: Callable[[Peer], str] = lambda _peer: ""
        store.refuses = self._refuses
        store.on_ended = self._clear

    def _refuses(self, peer: Peer) -> bool:
        trigger = self._triggers.get(peer.trigger)
        return trigger is not None and trigger.notify(peer.endpoint) is Wake.STALE

    def _clear(self, peer: Peer) -> None:
        trigger = self._triggers.get(peer.trigger)
        if trigger is not None:
            trigger.clear(peer.endpoint)

    def send(
        self,
        sender: str,
        to: object,
        text: object,
        *,
        reply_to: int | None = None,
        sender_session: str | None = None,
        question: Question | None = None,
    ) -> Sent:
        """Commit `text` for `to` and wake it. The message `reply_to` counts as read by the sender. [SEND-1]

        Raises InvalidRequest for a bad name, text or `reply_to`, MailboxFull, Refused when `sender_session` is paused,
        Busy; then nothing was sent.
        """
        asked = self.address(to)
        body = check_body(text, self._max_bytes)
        answered = _check_reply(reply_to)
        row_id, found = self.store.send(
            sender,
            asked,
            body,
            now=self.clock(),
            reply_to=answered,
            sender_session=sender_session,
            question=question,
        )
        is_online = found.peer is not None and self._wake(found.peer)
        self._tell()
        if machine_of(asked):
            return self._sent_far(row_id, found, is_linked=is_online)
        is_done = is_online or found.is_awaited or found.pause  # [BRAKE-1]
        reached = "" if is_done else self._reach(row_id, found.mailbox)
        is_known, similar = (True, ()) if found.is_known else self._look_up(asked, sender)
        return Sent(
            row_id,
            asked,
            found.mailbox,
            is_online,
            is_known,
            similar,
            delivery=found.delivery,
            is_awaited=found.is_awaited,
            session=found.session,
            pause=found.pause,
            reached=reached,
        )

    def address(self, to: object) -> str:
        """The one form of what a message goes to: `NAME`, or `NAME@MACHINE` for another machine. [ADDR-1]

        Where this home has no link, `@` stands in no name. Raises InvalidRequest, and what `Database.read` raises.
        """
        if isinstance(to, str) and "@" in to.strip()[1:] and (own := self.store.machine()):
            name, machine = split_address(to)
            return name if machine == own else f"{name}@{machine}"
        return address(to)

    def recipient(self, to: object) -> str:
        """The same for a message that can go to a group too. [GROUP-3]"""
        return group_name(to) if is_group(to) else self.address(to)

    def _sent_far(self, row_id: int, to: Address, *, is_linked: bool) -> Sent:
        is_online, far = False, "what is known there cannot be read now"
        with suppress(AgentbusError):  # the message is committed, as in _look_up
            is_online, far = self.store.machines.whereabouts(to.mailbox, is_linked=is_linked, now=self.clock())
        return Sent(row_id, to.mailbox, to.mailbox, is_online, is_known=True, session=to.session, far=far)

    def _reach(self, row_id: int, name: str) -> str:
        """Post what waits for `name` to the one session that runs under it and has not joined. [REACH-2], [REACH-3]

        Returns what to say of the message `row_id`; "" if there is no such session. Never raises: the message is
        committed, and waits. [SEND-6]
        """
        try:
            found = self.reachable(name)
            if not found:
                return ""
            why = f"{len(found)} running sessions are called so" if len(found) > 1 else found[0].held()
            if not why and row_id in self.store.post(found[0], _MOST_POSTED, now=self.clock()):
                self._tell()
                return f'sent #{row_id} to "{name}" (reachable, not joined: posted once into its session)'
        except AgentbusError as error:
            why = str(error)
        why = why or "others wait before it"
        return f'queued #{row_id} for "{name}" (reachable, not joined): {why}, so it waits for a session of that name'

    def reachable(self, name: str | None = None) -> list[Reachable]:
        """The running sessions of clients that have not joined this bus, sorted by name; those called `name`. [REACH-1]

        Raises what the adapters raise for a broken installation.
        """
        found = self.running(name)
        joined = {peer.host for peer in self.store.live()} if found else set()
        return sorted((one for one in found if one.host not in joined), key=lambda one: one.name)

    def send_group(
        self,
        sender: str,
        group: object,
        text: object,
        *,
        reply_to: int | None = None,
        sender_session: str | None = None,
    ) -> GroupSent:
        """Commit `text` for each member of `group` but `sender`, in one transaction, then wake them. [GROUP-3]

        A member whose mailbox is full does not fail the others. The message `reply_to` counts as read by the sender.

        Raises InvalidRequest for a bad name, text or `reply_to` and for a group of nobody else, MailboxFull when no
        member has room, Refused, Busy; then nothing was sent.
        """
        wanted = group_name(group)
        body = check_body(text, self._max_bytes)
        answered = _check_reply(reply_to)
        rows, full = self.store.send_group(
            sender, wanted, body, now=self.clock(), reply_to=answered, sender_session=sender_session
        )
        sent = [self._sent_to(row_id, found) for row_id, found in rows]
        self._tell()
        return GroupSent(wanted, tuple(sent), tuple(full))

    def _sent_to(self, row_id: int, to: Address) -> Sent:
        """Wake the peer of a mailbox; return what there is to say about the message `row_id` in it."""
        is_online = to.peer is not None and self._wake(to.peer)
        if machine_of(to.mailbox):
            return self._sent_far(row_id, to, is_linked=is_online)
        return Sent(row_id, to.mailbox, to.mailbox, is_online, is_known=True, delivery=to.delivery, pause=to.pause)

    def broadcast(
        self, sender: str, text: object, *, sender_session: str | None = None, everywhere: bool = False
    ) -> list[Sent]:
        """Commit `text` for every present peer except `sender`, for all or for none, then wake them. [SEND-4]

        With `everywhere` also for each machine that is there; its link hands it to the peers there. [ADDR-6]

        Raises InvalidRequest for a bad text, MailboxFull, Refused when `sender_session` is paused, Busy; then nothing
        was sent.
        """
        body = check_body(text, self._max_bytes)
        far = [one.name for one in self.machines() if one.is_there] if everywhere else []
        rows = self.store.broadcast(sender, body, now=self.clock(), sender_session=sender_session, machines=far)
        sent = [self._sent_to(row_id, to) for row_id, to in rows]
        self._tell()
        return sent

    def _look_up(self, asked: str, sender: str) -> tuple[bool, tuple[str, ...]]:
        """For a name that nobody has now: whether a peer had it lately; if not, similar names. [SEND-5]"""
        try:
            if self.store.queries.was_peer(asked):
                return True, ()
            far = self.store.machines.similar(asked, self.machines()) if self.store.machine() else ()
            return False, far or similar(asked, [peer.name for peer in self.store.live() if peer.name != sender])
        except AgentbusError:
            # The message is committed. A sender that sees an error would send it again.
            return False, ()

    def _wake(self, peer: Peer) -> bool:
        """Nudge `peer` and return whether it is there. If it has ended, end its presence. Never raises. [SEND-5]"""
        trigger = self._triggers.get(peer.trigger)
        if trigger is not None:
            trigger.notify(peer.endpoint)
        # Not by the nudge: the socket of a dead process answers for as long as a child of it lives.
        if self.store.life(peer) is not Life.ENDED:
            return True
        # The message is committed, and that is what counts. The next session that heartbeats reaps the row.
        with suppress(AgentbusError):
            self.store.end(peer, now=self.clock())
        return False

    def machines(self) -> list[Machine]:
        """The other machines that were heard of; none if this home has no link. [MACH-2]"""
        return self.store.machines.all(is_linked=self.store.link() is not None) if self.store.machine() else []

    def reap(self, silent: Collection[str] = (), among: Sequence[Peer] | None = None) -> list[Peer]:
        """End the presence of peers that have ended, and of the `silent` sessions. See Store.reap. Raises Busy."""
        ended = self.store.reap(now=self.clock(), silent=silent, among=among)
        if ended:
            self._tell()
        return ended

    def peers(self) -> list[Peer]:
        """The present peers, sorted by name, without those that have ended. Writes nothing. [PRES-4]"""
        from dataclasses import replace  # takes 5 ms, and a send does not need it

        now = self.clock()
        # A lock that is held says more than the instant in the row: the session lives now.
        return [replace(peer, last_seen=now) if peer.presence == LOCK else peer for peer in self.store.live()]

    def claim(
        self,
        arrival: Arrival,
        endpoint: Callable[[str], str],
        *,
        join_crowd: bool,
        again: Peer | None = None,
        held: Held | None = None,
    ) -> Claimed | None:
        """Become a peer. None while a predecessor with that host and launch name lives. See Store.claim. [NAME-4]

        Raises Busy and BrokenSetup.
        """
        now = self.clock()
        claimed = self.store.claim(arrival, now=now, endpoint=endpoint, join_crowd=join_crowd, again=again, held=held)
        if claimed is None:
            return None
        self._tell()
        return Claimed(*claimed)

    def rename(self, peer: Peer, name: object) -> Renamed:
        """Give `peer` another name. [NAME-5]

        Raises InvalidRequest for a bad name and for one that no session can have, Refused when a present peer has it,
        Busy.
        """
        renamed = self.store.rename(peer.session, peer.process.pid, session_name(name))
        self._tell()
        return renamed

    def set_status(self, peer: Peer, text: object) -> Peer:
        """Record what `peer` says that it is doing; empty clears it. Returns the peer with that status. [STATUS-1]

        Raises InvalidRequest for a bad text, and Busy.
        """
        status = check_status(text)
        at = self.clock() if status else None
        self.store.set_status(peer.session, status, at)
        self._tell()
        from dataclasses import replace  # takes 5 ms, and a send does not need it

        return replace(peer, status=status, status_at=at)

    def pending(self, peer: Peer, limit: int, above: int = 0) -> list[Envelope]:
        """The oldest `limit` pending messages for `peer`, ascending. Empty if it was taken for dead. [DRAIN-1]"""
        return self.store.pending(peer.session, peer.process.pid, limit, above)

    def due(self, peer: Peer, limit: int, above: int) -> list[Envelope] | None:
        """The same; None if there are some, and `peer` is paused. [BRAKE-1]"""
        return self.store.due(peer.session, peer.process.pid, limit, above, now=self.clock())

    def mark(self, peer: Peer, ids: Iterable[int], carrier: str) -> None:
        """Stamp messages as delivered to `peer` by `carrier`, all or none. [STATE-2]

        Raises Busy.
        """
        self.store.mark_delivered(ids, session=peer.session, carrier=carrier, now=self.clock())
        self._tell()

    def unread(self, peer: Peer, limit: int, held: int = 0) -> list[Unread]:
        """The oldest `limit` messages that `peer` is not known to have read, ascending. [READ-1]"""
        return self.store.unread(peer.session, peer.process.pid, limit, held)

    def count_unread(self, peer: Peer, limit: int) -> int:
        """How many messages `peer` is not known to have read; counting stops at `limit`."""
        return self.store.count_unread(peer.session, peer.process.pid, limit)

    def shown(self, peer: Peer, limit: int) -> list[Unread]:
        """The oldest `limit` messages that a check of `peer` may hand out once more, ascending. [READ-6]"""
        return self.store.shown(peer.session, peer.process.pid, limit, now=self.clock())

    def discard(self, mailbox: str, before: int) -> list[Status]:
        """Delete the unread messages of `mailbox` sent before an instant; return them. Raises Busy. [OLD-2]"""
        removed = self.store.discard(mailbox, before)
        if removed:
            self._tell()
        return removed

    def prune(self, before: int, *, peer: str | None = None, with_pending: bool = False) -> list[bool]:
        """Delete what was delivered before an instant; return for each message whether it was pending. [KEEP-1]

        Only messages to or from `peer`, a name or a group, if it is given. `with_pending`: also what is pending and was
        sent before the instant. In batches: others write in between. Raises Busy; what was deleted then stays so.
        """
        removed: list[bool] = []
        above = 0
        while ids := self.store.queries.prunable(
            above=above, before=before, peer=peer, with_pending=with_pending, limit=PRUNE_ROWS
        ):
            removed += self.store.remove(ids, with_pending=with_pending)
            above = ids[-1]
            time.sleep(_TURN_S)
        if removed:
            self._tell()
        return removed

    def cancel(self, row_id: int) -> Status:
        """Take back a message that is still pending; return it. [OLD-3]

        Raises InvalidRequest if there is no such message, Refused if it is not pending any more, Busy.
        """
        found = self.store.queries.status(row_id)
        if not self.store.cancel(row_id):
            if found.relayed_at is not None and found.state is MessageState.PENDING:
                raise Refused(
                    f'#{row_id} to "{found.recipient}" has left this machine, nothing was taken back',
                    hint=f"agentbus status {row_id} shows where it is",
                )
            raise Refused(
                f'#{row_id} to "{found.recipient}" is not pending any more, nothing was taken back',
                hint=f"agentbus status {row_id} shows where it is",
            )
        self._tell()
        return found

    def mark_read(
        self,
        peer: Peer,
        ids: Iterable[int],
        *,
        read_by: str = "check",
        carrier: str = PULL,
        is_certain: bool = True,
    ) -> None:
        """Stamp messages as read by `peer`, all or none; `read_by` says how that is known. See Store.mark_read.

        Raises Busy.
        """
        self.store.mark_read(
            ids, session=peer.session, now=self.clock(), read_by=read_by, carrier=carrier, is_certain=is_certain
        )
        self._tell()

    def end_ask(self, question: int, answer: Envelope | None) -> None:
        """A command has its answer, or gives up: what comes then is for the peer of its name. Raises Busy. [ASK-5]"""
        self.store.end_ask(question, None if answer is None else answer.id, now=self.clock())
        self._tell()
        late = self.store.queries.answer(question) if answer is None else None
        peer = None if late is None else self.store.seated("name", late.recipient)
        if peer is not None:
            self._wake(peer)

    def look_through(self, ended: Ended) -> tuple[set[Shown], bool]:
        """Look for the last time through the record of a session that has ended. It can take long: use a thread.

        Returns the messages that it shows as read, and whether all of it could be read. Never raises.
        """
        shown: set[Shown] = set()
        is_whole = True
        for place in ended.proof.splitlines():
            found = self.recorded(ended.runtime, place)
            is_whole = is_whole and found is not None
            shown |= found or set()
        return shown, is_whole

    def settle(self, ended: Ended, shown: Collection[Shown], *, is_whole: bool) -> list[int]:
        """Close the account of a session that has ended; return what is pending again. [STATE-6] Raises Busy."""
        last = dict(sorted(shown))  # by id, when it was shown last
        ids = [row_id for row_id, sent_at in self.store.unproven(ended.session) if last.get(row_id, -1) >= sent_at]
        name, returned = self.store.settle(ended, ids, is_whole=is_whole, now=self.clock())
        self._tell()
        if returned:
            for peer in self.store.present():
                if peer.name == name:
                    self._wake(peer)
        return returned

    # -- groups and brakes -----------------------------------------------------------------------------------

    def join_group(self, name: object, group: object) -> tuple[str, list[str], bool]:
        """Make `name` a member of `group`. Returns the group, its members, and whether `name` was none. [GROUP-2]

        Raises InvalidRequest for a bad name, Refused when the group is full, Busy.
        """
        wanted = group_name(group)
        members, is_new = self.store.join_group(wanted, address(name), now=self.clock())
        self._tell()
        return wanted, members, is_new

    def leave_group(self, name: object, group: object) -> str:
        """End the membership of `name` in `group`; return the group. Raises InvalidRequest, Refused, Busy. [GROUP-2]"""
        wanted = group_name(group)
        member, was_in = self.store.leave_group(wanted, address(name))
        if not was_in:
            raise Refused(f'"{member}" is not in "{wanted}"', hint="agentbus groups shows who is")
        self._tell()
        return wanted

    def drop_absent(self) -> list[str]:
        """End the memberships of names that were away for too long; one line for each. Raises Busy. [GROUP-5]"""
        days = self.store.queries.setting(MEMBER_DAYS)
        dropped = self.store.drop_absent(self.clock() - days * 86_400_000)
        if dropped:
            self._tell()
        return [f'"{name}" dropped out of "{group}": it was not there for {days:,} days' for group, name in dropped]

    def pause(self, name: object, *, by: str, for_ms: int | None = None) -> list[Pause]:
        """Pause a session, or all that are there if `name` is None, for so long or until a person resumes it.

        Raises InvalidRequest for a bad name, Refused when there is nobody to pause, Busy. [BRAKE-2]
        """
        now = self.clock()
        until = None if for_ms is None else now + for_ms
        names = self.store.pause(None if name is None else address(name), by=by, now=now, until=until)
        self._tell()
        return [Pause(one, by, now, until) for one in names]

    def resume(self, name: object, *, by: str) -> tuple[list[str], list[str]]:
        """End the pause of a session, or all pauses if `name` is None, and wake whom that lets go on. [BRAKE-2]

        Returns the names that are meant, and those that were paused. Raises InvalidRequest for a bad name, Refused when
        no session has or had it, Busy.
        """
        names, resumed = self.store.resume(None if name is None else address(name), by=by, now=self.clock())
        self._tell()
        # What has waited is due now, not at the next safety poll. It is resumed, whatever fails from here on.
        with suppress(AgentbusError):
            for peer in self.store.present():
                if peer.name in resumed:
                    self._wake(peer)
            for one in resumed:
                self._reach(0, one)  # for a session that has not joined, of no message in particular [REACH-2]
        return names, resumed

    def pause_of(self, peer: Peer) -> Pause | None:
        """The pause of `peer`; None if it is not paused. Writes nothing. [BRAKE-1]"""
        return self.store.pause_of(peer.session, self.clock())

    def sent_lately(self, peer: Peer, to: str | None) -> tuple[str, int, int] | None:
        """To whom of `to`, a name, a group or (None) everybody who is there, `peer` has sent most within the hour.

        Returns that name, how many messages, and since when; None if it has sent none. [BRAKE-4]
        """
        if to is None:
            names = [one.name for one in self.store.present()]
        elif is_group(to):
            names = self.store.queries.groups().get(to, [])
        else:
            names = [to, *filter(None, [self.store.queries.alias(to)])]
        return self.store.sent_lately(peer.session, names, self.clock())

    def leave(self, peer: Peer) -> None:
        """End the presence of `peer`. Raises Busy."""
        self.store.leave(peer.session, peer.process.pid, now=self.clock())
        self._tell()

    def sender_among(self, hosts: Sequence[Process]) -> Peer | None:
        """The one session of the first host in `hosts` (nearest first) that has sessions.

        None if that host has several sessions, or if no host has any.
        """
        present = [peer for peer in self.store.live() if peer.domain == self.store.here]
        for host in hosts:
            found = [peer for peer in present if peer.host == host]
            if found:
                return found[0] if len(found) == 1 else None
        return None

    def of_conversation(self, conversation: str) -> Peer | None:
        """The one live peer that is the `conversation` of a client; None if there is none, or more than one."""
        found = [peer for peer in self.store.of_conversation(conversation) if self.store.life(peer) is not Life.ENDED]
        return found[0] if len(found) == 1 else None


async def retry_while_busy(call: Callable[[], _T], *, patience_s: float = BUSY_PATIENCE_S) -> _T:
    """Repeat `call()` while the database is busy, without blocking the event loop; return its result. [STORE-4]

    Raises Busy when the database is busy for longer than `patience_s`, and every other error that `call` raises.
    """
    try:
        return call()
    except Busy:
        pass
    # Imported here because the command line has no event loop and does not need to pay for it.
    import anyio
    import anyio.lowlevel

    began_at = time.monotonic()
    give_up_at = began_at + patience_s
    # Most locks are released in less time than an event loop can sleep: its timers have a resolution of 1 ms.
    while time.monotonic() < began_at + _SPIN_S:
        await anyio.lowlevel.checkpoint()
        with suppress(Busy):
            return call()
    pause_s = _FIRST_PAUSE_S
    while True:
        # With jitter, sessions that met at a lock do not meet there again.
        await anyio.sleep(pause_s * (0.5 + os.urandom(1)[0] / 255))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        try:
            return call()
        except Busy:
            if time.monotonic() >= give_up_at:
                raise
