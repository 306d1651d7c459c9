"""The mailboxes of a bus: what happens to a message between its sender and the model that reads it.

Queries for people are in queries.py. Synchronous. A method commits all of its changes or none. Knows nothing about
triggers, deliveries or MCP. Instants are milliseconds since 1970 UTC. Every method raises Busy when another process
holds the database for longer than the connection waits, and BrokenSetup or TryAgain as in `database.explain`.
Implements [SEND-1] to [SEND-4], [GROUP-3], [STATE-2], [STATE-6], [STATE-7], [READ-6], [THREAD-1], [THREAD-2], [ASK-5].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext

from agentbus.core import brakes, groups
from agentbus.core.config import Shared
from agentbus.core.errors import AgentbusError, InvalidRequest, MailboxFull
from agentbus.core.memberships import Memberships
from agentbus.core.model import Address, Ended, Envelope, Peer, Status, Unread, storable
from agentbus.core.names import EVERYBODY_THERE, LINK_NAME, machine_of
from agentbus.core.peers import LEFT_AT, PEER, remember
from agentbus.core.presence import BEAT
from agentbus.core.process import IS_SLOW, Life, Process, one_look
from agentbus.core.queries import ELSEWHERE, MESSAGE, OLD_MS, THREAD, listed
from agentbus.core.values import dataclass

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from agentbus.core.adapter import Reachable
    from agentbus.core.search import SearchIndex

__all__ = ["AGAIN_MS", "MAX_PENDING", "PRUNE_ROWS", "Question", "Store"]

# A mailbox that nobody empties must not fill the disk. At 64 KiB for each message, this is 640 MiB.
MAX_PENDING = 10_000
# How long after a check a message can be handed out once more: 1 minute. A check right after another finds nothing, and
# a subagent that took the messages has mostly ended by then. [READ-6]
AGAIN_MS = 60_000

# An error names so many members of a group; the others would bury the sentence.
_MOST_NAMED = 5
# The carrier of what is posted into a session that has not joined. [REACH-2]
INBOX = "inbox"
# Rows deleted in one transaction: this takes a few milliseconds, so that pruning does not hold up anybody.
PRUNE_ROWS = 1_000
# A text of more bytes has a row of its own. With all that can stand beside it, a shorter one fits into a page of 4,096.
_LARGE_BYTES = 3_000
# A command that waits for an answer is done this long after the instant until which it waits, in ms, or hangs. For
# where its lock cannot tell.
_ASK_GRACE_MS = 60_000
# A message that is still pending becomes delivered too: by the pull, or by the reply to it.
_MARK_READ = (
    "UPDATE messages SET read_at = ?1, delivered_at = coalesce(delivered_at, ?1), read_by = ?2,"
    " carrier = coalesce(carrier, ?3), delivered_to = coalesce(delivered_to, ?4) WHERE id = ?5 AND read_at IS NULL"
)
_MARK_DELIVERED = (
    "UPDATE messages SET delivered_at = ?, carrier = ?, delivered_to = ? WHERE id = ? AND delivered_at IS NULL"
)
# A message is on its way to the model: its client took it, and nothing shows that the model has it.
_OPEN = "delivered_at IS NOT NULL AND read_at IS NULL"
# The mark of a message for another machine, and its name in the world. [ADDR-1]
_TO_MACHINE = "UPDATE messages SET host = ?, bus = (SELECT value FROM link WHERE key = 'bus') WHERE id = ?"
# The unread messages of a present session: pending under its name, pushed to it, or pushed to the sessions in the list
# ?4; and not known to be read. In parts, so that each stops at its limit, however many there are: an index has them in
# the order of their ids.
_SEAT = "FROM peers WHERE session = ?1 AND pid = ?2 AND left_at IS NULL"
# A command waits for an answer: the peer of its name leaves that to it. [ASK-5]
_NOT_AWAITED = "(reply_to IS NULL OR coalesce(thread, reply_to) NOT IN (SELECT question FROM asks))"
# The oldest ?4 pending messages for a present session; whether it is paused at the instant ?5; for `read_checked`.
_PENDING = (
    f"SELECT {MESSAGE}, EXISTS ({brakes.PAUSED}), (SELECT oldest FROM bus)"
    " FROM peers p JOIN messages m ON m.recipient = p.name"
    " WHERE p.session = ?1 AND p.pid = ?2 AND p.left_at IS NULL AND m.delivered_at IS NULL AND m.id > ?3"
    f" AND m.kept_from IS NOT p.session AND {_NOT_AWAITED} ORDER BY m.id LIMIT ?4"
)
_UNREAD = (
    f"recipient = (SELECT name {_SEAT}) AND delivered_at IS NULL AND kept_from IS NOT ?1"  # [NAME-12]
    f" AND {_NOT_AWAITED}",
    f"delivered_to = (SELECT session {_SEAT}) AND {_OPEN}",
    f"delivered_to IN (SELECT value FROM json_each(?4)) AND {_OPEN} AND kept_from IS NOT ?1",
)
_COUNT_UNREAD = "SELECT count(*) FROM ({} LIMIT ?3)".format(
    " UNION ALL ".join(f"SELECT * FROM (SELECT 1 FROM messages WHERE {part} LIMIT ?3)" for part in _UNREAD)
)


# The oldest ?3 of each part, of those with an id above ?5 and of the others.
_UNREAD_IDS = " UNION ALL ".join(
    f"SELECT * FROM (SELECT id FROM messages WHERE {part} AND id {bound} ?5 ORDER BY id LIMIT ?3)"
    for part in _UNREAD
    for bound in (">", "<=")
)
# The message that a reply names, if its sender sent or received it: by its name, as its session, or as another session
# of the same conversation. NULL as a session is equal to none. [THREAD-2]
_ITS_SESSIONS = (
    "(SELECT ?3 UNION SELECT p.session FROM peers p JOIN peers s USING (conversation)"
    " WHERE s.session = ?3 AND conversation != '')"
)
_ANSWERED = (
    f"SELECT coalesce({THREAD}, m.id), ?2 IN (m.sender, m.recipient) OR m.sender_session IN {_ITS_SESSIONS}"
    f" OR m.delivered_to IN {_ITS_SESSIONS} FROM messages m WHERE m.id = ?1"
)


@dataclass(frozen=True, slots=True)
class Question:
    """What a send says if it is a question: until when its sender waits, in ms since 1970 UTC, and how. [ASK-1]

    `waiter` is the name of the lock file that a command holds while it waits (empty where nothing can be locked), and
    None for a peer: its own session knows what it waits for. [ASK-5]
    """

    answer_by: int
    waiter: str | None = None


class Store(Memberships):
    """The mailboxes and the peers of one bus. `max_pending` is the limit of a mailbox, in messages."""

    def __init__(
        self,
        path: str | Path,
        *,
        busy_ms: int,
        sync: str = "normal",
        on_wal: Callable[[int], None] | None = None,
        life: Callable[[Peer], Life] | None = None,
        host_life: Callable[[Process, str], Life] | None = None,
        max_pending: int = MAX_PENDING,
    ) -> None:
        super().__init__(path, busy_ms=busy_ms, sync=sync, on_wal=on_wal, life=life, host_life=host_life)
        self._max_pending = max_pending
        # The last id for which a mailbox has room. Too high after a rename that moved another mailbox's messages in.
        self._room_until: dict[str, int] = {}

    def reopen(self) -> None:
        """Open the file that is at `path` now, creating it as needed. Raises what the first opening raises."""
        super().reopen()
        self._room_until.clear()

    def send(
        self,
        sender: str,
        to: str,
        body: str,
        *,
        now: int,
        reply_to: int | None = None,
        sender_session: str | None = None,
        question: Question | None = None,
    ) -> tuple[int, Address]:
        """Commit one message for the mailbox that `to` leads to; return its id and the address. [SEND-1]

        A reply shows that the message was read. So the message `reply_to` is marked as read, if it went to `sender`
        or was delivered to `sender_session`. [READ-2]

        Raises MailboxFull, InvalidRequest for a question to oneself and for a reply to what its sender neither sent nor
        received, or what is not there, and Refused when `sender_session` is paused. [BRAKE-1] Then nothing was sent.
        """
        while True:
            with self._looking_for(to) if IS_SLOW else nullcontext():
                row_id, address = self._send(sender, to, body, now, reply_to, sender_session, question)
            # The file can be replaced while the row is written. Then that row is in no bus, so it is sent to the one
            # that is there now.
            if not self.is_replaced():
                return row_id, address
            self.reopen()

    def _send(
        self,
        sender: str,
        to: str,
        body: str,
        now: int,
        reply_to: int | None,
        sender_session: str | None,
        question: Question | None,
    ) -> tuple[int, Address]:
        with self._writing() as execute:
            pauses = brakes.check(execute, sender_session, now)
            address = self._resolve(execute, to)
            thread = self._thread(execute, reply_to, sender, sender_session)
            if question is not None and address.mailbox == sender:
                raise InvalidRequest(f'"{to}" is you, and nobody else would answer', hint="ask another peer")
            row_id = self._insert(
                execute, sender, address.mailbox, body, reply_to, now, sender_session, thread, question
            )
            asked = "SELECT 1 FROM asks WHERE question = ?"
            is_awaited = thread is not None and bool(execute(asked, (thread,)).fetchone())
            self._mark_answered(execute, sender, reply_to, now, sender_session)
        pause = pauses.get(address.mailbox)
        return row_id, Address(address.mailbox, address.peer, address.is_known, is_awaited=is_awaited, pause=pause)

    def _mark_answered(
        self, execute: Callable[..., Any], sender: str, reply_to: int | None, now: int, sender_session: str | None
    ) -> None:
        if reply_to is None:
            return
        execute(
            # What is kept from a session is not read by its answer. [NAME-12] Without a session, ?4 is NULL.
            f"{_MARK_READ} AND (delivered_to = ?4 OR recipient = ?6 AND (kept_from IS NULL OR kept_from IS NOT ?4))",
            (now, "reply", "reply", sender_session, reply_to, sender),
        )
        # What was answered has reached whom it was for, and is not handed out again. [READ-6]
        execute(
            "UPDATE messages SET shown_at = NULL WHERE id = ? AND shown_at IS NOT NULL"
            " AND (recipient = ? OR delivered_to = ?)",
            (reply_to, sender, sender_session),
        )

    def send_group(
        self,
        sender: str,
        group: str,
        body: str,
        *,
        now: int,
        reply_to: int | None = None,
        sender_session: str | None = None,
    ) -> tuple[list[tuple[int, Address]], list[str]]:
        """Commit one message for each member of `group` but `sender`, in one transaction. [GROUP-3]

        Returns the ids, each with its address, and the members whose mailbox is full.

        Raises InvalidRequest when there is no member but the sender, and for `reply_to` as `send`, MailboxFull when all
        are full, and Refused when `sender_session` is paused; then nothing was sent to anybody.
        """
        while True:
            with self._writing() as execute:
                pauses = brakes.check(execute, sender_session, now)
                members = groups.members(execute, group)
                thread = self._thread(execute, reply_to, sender, sender_session)
                present = {peer.name: peer for peer in self._present(execute)}
                sent: list[tuple[int, Address]] = []
                full: list[str] = []
                for name in members:
                    if name == sender:
                        continue
                    try:
                        row_id = self._insert(
                            execute, sender, name, body, reply_to, now, sender_session, thread, to_group=group
                        )
                    except MailboxFull:
                        execute("DELETE FROM messages WHERE id = last_insert_rowid()")
                        full.append(name)
                        continue
                    # The copies are one thread: what the members answer to theirs belongs together. [THREAD-1]
                    thread = row_id if thread is None else thread
                    sent.append((row_id, Address(name, present.get(name), is_known=True, pause=pauses.get(name))))
                if not sent:
                    raise self._nobody_in(group, members, full)
                self._mark_answered(execute, sender, reply_to, now, sender_session)
            if not self.is_replaced():
                return sent, full
            self.reopen()

    def _nobody_in(self, group: str, members: list[str], full: list[str]) -> AgentbusError:
        """Why nothing was sent to `group`."""
        if full:
            return MailboxFull(
                f'the mailbox of each other member of "{group}" is full ({", ".join(full[:_MOST_NAMED])}), '
                "nothing was sent",
                hint="they have to read their messages first",
            )
        if members:
            return InvalidRequest(f'"{group}" has no member but you, nothing was sent', hint="others have to join it")
        return InvalidRequest(
            f'"{group}" has no members, nothing was sent',
            hint=f'join_group, or agentbus join, makes one; to send to a peer, write "{group[1:]}"',
        )

    @staticmethod
    def _thread(
        execute: Callable[..., Any], reply_to: int | None, sender: str, sender_session: str | None
    ) -> int | None:
        """The thread that a reply to the message `reply_to` belongs to; None for no reply. [THREAD-1], [THREAD-2]"""
        if reply_to is None:
            return None
        row = execute(_ANSWERED, (reply_to, sender, sender_session)).fetchone()
        if not row:
            raise InvalidRequest(
                f"there is no message #{reply_to} to answer, it was never sent, or it has been pruned",
                hint="leave reply_to out",
            )
        if not row[1]:
            raise InvalidRequest(
                f'"{sender}" neither sent nor received #{reply_to}, so this cannot answer it',
                hint="use the msg_id of the message that this answers, or leave reply_to out",
            )
        return int(row[0])

    def broadcast(
        self, sender: str, body: str, *, now: int, sender_session: str | None = None, machines: Iterable[str] = ()
    ) -> list[tuple[int, Address]]:
        """Commit one message for each peer that is there but `sender`, and for each of `machines`. [SEND-4], [ADDR-6]

        In one transaction. Returns the ids, and where each is.

        Raises MailboxFull, and Refused when `sender_session` is paused; then nothing was sent to anybody.
        """
        with self._judging() as execute:
            pauses = brakes.check(execute, sender_session, now)
            self._end_ended(execute, now)
            peers = {peer.name: peer for peer in self._present(execute)}
            link = peers.pop(LINK_NAME, None)
            rooms = [
                Address(name, peer, is_known=True, pause=pauses.get(name))
                for name, peer in peers.items()
                if name != sender
            ]
            rooms += [Address(f"{EVERYBODY_THERE}@{machine}", link, is_known=True) for machine in machines]
            return [(self._insert(execute, sender, to.mailbox, body, None, now, sender_session), to) for to in rooms]

    def _insert(
        self,
        execute: Callable[..., Any],
        sender: str,
        recipient: str,
        body: str,
        reply_to: int | None,
        now: int,
        sender_session: str | None,
        thread: int | None = None,
        question: Question | None = None,
        to_group: str | None = None,
    ) -> int:
        is_large = len(body.encode()) > _LARGE_BYTES
        answer_by = None if question is None else question.answer_by
        row = execute(
            "INSERT INTO messages"
            " (sender, recipient, body, reply_to, sent_at, sender_session, thread, answer_by, to_group)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
            (
                *(sender, recipient, ELSEWHERE if is_large else body, reply_to, now, sender_session),
                *(thread, answer_by, to_group),
            ),
        ).fetchone()
        if is_large:
            execute("INSERT INTO bodies (id, text) VALUES (?, ?)", (row[0], body))
        if question is not None and question.waiter is not None:
            execute("INSERT INTO asks (question, waiter) VALUES (?, ?)", (row[0], question.waiter))
        if machine := machine_of(recipient):
            execute(_TO_MACHINE, (machine, row[0]))
        self._check_room(execute, recipient, row[0])
        return int(row[0])

    def _check_room(self, execute: Callable[..., Any], mailbox: str, row_id: int) -> None:
        """Refuse the message `row_id`, which was just inserted, if its mailbox is full. [SEND-3]"""
        # Ids are global and never reused. If this mailbox had room for N messages at id I, it cannot be full before
        # I + N: do not count until then.
        if row_id <= self._room_until.get(mailbox, 0):
            return
        counted = "SELECT count(*) FROM messages WHERE recipient = ? AND delivered_at IS NULL"
        room = self._max_pending - execute(counted, (mailbox,)).fetchone()[0]
        self._room_until[mailbox] = row_id + room
        if room < 0:
            raise MailboxFull(
                f'mailbox "{mailbox}" is full, {self._max_pending:,} messages are pending',
                hint=f'start a session named "{mailbox}", to receive them, then send again',
            )

    def pending(self, session: str, pid: int, limit: int, above: int = 0) -> list[Envelope]:
        """The oldest `limit` pending messages for the name that `session` has now, ascending. [DRAIN-1]

        Only those with an id above `above`: the others are held back. [OLD-4] And none that are kept from it. [NAME-12]

        Empty if `session` is not present in process `pid`: a session that was taken for dead no longer drains.
        """
        rows = self._database.read_checked(_PENDING, session, pid, above, limit, 0)
        return [Envelope.from_row(row) for row in rows]

    def due(self, session: str, pid: int, limit: int, above: int, *, now: int) -> list[Envelope] | None:
        """The same; None if there are some, and `session` is paused at the instant `now`. [BRAKE-1]"""
        rows = self._database.read_checked(_PENDING, session, pid, above, limit, now)
        return None if rows and rows[0][-2] else [Envelope.from_row(row) for row in rows]

    def mark_delivered(self, ids: Iterable[int], *, session: str, carrier: str, now: int) -> None:
        """Stamp pending messages as delivered to `session` by `carrier`, in one transaction. [STATE-2]"""
        with self._writing():
            self._database.executemany(_MARK_DELIVERED, [(now, carrier, session, row_id) for row_id in ids])

    def post(self, to: Reachable, limit: int, *, now: int) -> list[int]:
        """Post what waits for a session that has not joined, in one transaction with the mark. [REACH-2]

        The session gets a row that has left already: what it does not read is returned by that, as of any other.
        Returns the ids that were posted, none if somebody has joined meanwhile.

        Raises DeliveryFailed; then all is as before.
        """
        host = (to.host.pid, to.host.started)
        with self._writing() as execute:
            if execute(
                "SELECT 1 FROM peers WHERE left_at IS NULL AND (name = ? OR host_pid = ? AND host_started = ?)",
                (to.name, *host),
            ).fetchone():
                return []
            rows = execute(
                f"SELECT {MESSAGE} FROM messages m WHERE m.recipient = ? AND m.delivered_at IS NULL"
                " AND m.sent_at > ? AND m.kept_from IS NOT ?"
                f" AND {_NOT_AWAITED} ORDER BY m.id LIMIT ?",
                (to.name, now - OLD_MS, to.session, limit),
            ).fetchall()
            batch = [Envelope.from_row(row) for row in rows]
            ids = [one.id for one in batch[: to.post(batch)]] if batch else []
            execute(
                f"INSERT INTO peers ({PEER}, left_at, proof, conversation) VALUES ({', '.join('?' * (LEFT_AT + 3))})"
                " ON CONFLICT (session) DO UPDATE SET name = excluded.name, host_pid = excluded.host_pid,"
                " host_started = excluded.host_started, domain = excluded.domain, last_seen = excluded.last_seen,"
                " left_at = excluded.left_at, proof = excluded.proof",
                (
                    *(to.session, to.name, *host, "", *host, to.runtime, storable(to.cwd), INBOX, "", "", now, now),
                    *("it has not joined", BEAT, self.here, "", None, now, to.place, to.session),
                ),
            )
            # Once it joins, it is called as it was called here, and has what waits there. [NAME-8]
            if not execute("SELECT 1 FROM conversations WHERE conversation = ?", (to.session,)).fetchone():
                remember(execute, to.session, to.name, to.name, now)
            self._database.executemany(_MARK_DELIVERED, [(now, INBOX, to.session, row_id) for row_id in ids])
        return ids

    def unread(self, session: str, pid: int, limit: int, held: int = 0) -> list[Unread]:
        """The oldest `limit` unread messages of `session`, if it is present in process `pid`, ascending. [READ-1]

        Those with an id up to `held` come last: old mail does not block what is new. [OLD-4]
        """
        rows = self._read(
            f"SELECT {MESSAGE}, m.delivered_at IS NOT NULL, coalesce(m.delivered_to, ?1) != ?1 FROM messages m"
            f" WHERE m.id IN ({_UNREAD_IDS}) ORDER BY m.id <= ?5, m.id LIMIT ?3",
            *(session, pid, limit, self._earlier(session, pid), held),
        )
        return [Unread(Envelope.from_row(row), was_pushed=bool(row[-2]), was_earlier=bool(row[-1])) for row in rows]

    def count_unread(self, session: str, pid: int, limit: int) -> int:
        """How many messages `session` has not read; counting stops at `limit`."""
        return int(self._read(_COUNT_UNREAD, session, pid, limit, self._earlier(session, pid))[0][0])

    def shown(self, session: str, pid: int, limit: int, *, now: int) -> list[Unread]:
        """The oldest `limit` messages that were handed out to `session`, and are due once more, ascending. [READ-6]"""
        rows = self._read(
            f"SELECT {MESSAGE}, m.shown_at FROM peers p JOIN messages m ON m.delivered_to = p.session"
            " WHERE p.session = ? AND p.pid = ? AND p.left_at IS NULL AND m.shown_at IS NOT NULL AND m.shown_at <= ?"
            " ORDER BY m.id LIMIT ?",
            session,
            pid,
            now - AGAIN_MS,
            limit,
        )
        return [Unread(Envelope.from_row(row), was_pushed=False, shown_at=int(row[-1])) for row in rows]

    def mark_read(
        self,
        ids: Iterable[int],
        *,
        session: str,
        now: int,
        read_by: str = "check",
        carrier: str = "pull",
        is_certain: bool = True,
    ) -> None:
        """Stamp messages as read by `session`, in one transaction; `read_by` says how that is known. [READ-8]

        Those that were pending count as delivered by `carrier`. Unless it is certain that they reached whom they are
        for, they can be handed out once more. [READ-6]
        """
        ids = list(ids)
        shown_at = None if is_certain else now
        with self._writing():
            self._database.executemany(_MARK_READ, [(now, read_by, carrier, session, row_id) for row_id in ids])
            self._database.executemany(
                # A row that this does not change is not written.
                "UPDATE messages SET shown_at = CASE WHEN shown_at IS NULL THEN ?1 END"
                " WHERE id = ?2 AND (shown_at IS NOT NULL OR ?1 IS NOT NULL)",
                [(shown_at, row_id) for row_id in ids],
            )

    # -- questions whose answers a command waits for: see 0008_asking.sql. [ASK-5] ---------------------------

    @contextmanager
    def waiting(self) -> Iterator[str]:
        """Hold a lock file while a command waits for an answer. Yields its name, "" where nothing can be locked."""
        name = os.urandom(6).hex()
        held = self._lock(name)
        try:
            yield "" if held is None else name
        finally:
            if held is not None:
                held.release()

    def end_ask(self, question: int, answer: int | None = None, *, now: int = 0) -> None:
        """The command does not wait for the answer to `question` any longer. If it has the `answer`, that is read."""
        with self._writing() as execute:
            if answer is not None:
                execute(_MARK_READ, (now, "check", "ask", None, answer))
            execute("DELETE FROM asks WHERE question = ?", (question,))

    def forget_asks(self, *, now: int) -> bool:
        """End the asks of commands that have ended without saying so; whether there were any."""
        rows = self._read(
            "SELECT question, waiter, coalesce(answer_by, 0) FROM asks LEFT JOIN messages ON id = question"
        )
        past = [
            (question, waiter)
            for question, waiter, answer_by in rows
            if now - answer_by > _ASK_GRACE_MS or (waiter and self.presence.life(waiter) is Life.ENDED)
        ]
        for question, waiter in past:
            self.end_ask(question)
            if waiter:
                self.presence.clear(waiter)
        return bool(past)

    def waits_for_an_end(self) -> bool:
        """Whether there is something to do here once a process ends that is no peer. Nobody writes that down.

        The command behind an ask, and the agent process of a session that has ended and can still give its model mail.
        """
        rows = self._read(
            "SELECT EXISTS (SELECT 1 FROM asks)"
            # Of a process of another domain, as before a restart of the machine, nothing is ever seen from here.
            " OR EXISTS (SELECT 1 FROM peers WHERE left_at IS NOT NULL AND proof IS NOT NULL AND proof != ''"
            " AND domain = ? AND domain != '')",
            self.here,
        )
        return bool(rows[0][0])

    # -- what a session took and is not known to have read ---------------------------------------------------

    def proof(self, session: str) -> str | None:
        """Where the client records what `session` was given; "" if no record is to be had. See 0004_proof.sql."""
        rows = self._read("SELECT proof FROM peers WHERE session = ?", session)
        return rows[0][0] if rows else None

    def set_proof(self, session: str, proof: str) -> None:
        """Record where the client records what `session` was given. [PROOF-2]"""
        with self._writing() as execute:
            execute("UPDATE peers SET proof = ? WHERE session = ?", (proof, session))

    def unproven(self, session: str) -> list[tuple[int, int]]:
        """What was delivered to `session` and is not known to be read: ids, each with `sent_at`, ascending."""
        rows = self._read(f"SELECT id, sent_at FROM messages WHERE delivered_to = ? AND {_OPEN} ORDER BY id", session)
        return [(int(row_id), int(sent_at)) for row_id, sent_at in rows]

    def unsettled(self) -> list[Ended]:
        """The sessions that have ended, with their agent processes, and whose records were not looked through yet.

        Not those whose agent process still lives, or cannot be told: it can still give its model what it took.
        """
        rows = self._read(
            "SELECT session, runtime, proof, host_pid, host_started, domain FROM peers"
            " WHERE left_at IS NOT NULL AND proof IS NOT NULL AND proof != ''"
        )
        with one_look():
            return [
                Ended(session, runtime, proof)
                for session, runtime, proof, pid, started, of in rows
                if self._host_life(Process(pid, started), of) is Life.ENDED
            ]

    def settle(self, ended: Ended, shown: Collection[int], *, is_whole: bool, now: int) -> tuple[str, list[int]]:
        """Close the account of a session that has ended, in one transaction. [STATE-6], [STATE-7]

        Of what it took, `shown` was read. If `is_whole`, its record could be read, so the rest is pending again, under
        the name that the session had last. Else the rest stays delivered, and is offered to the next session of that
        name. Returns the name, and the ids that are pending again.
        """
        with self._writing() as execute:
            row = execute(
                "SELECT name FROM peers WHERE session = ? AND left_at IS NOT NULL AND proof = ?",
                (ended.session, ended.proof),
            ).fetchone()
            if not row:
                return "", []  # it has come back, or another process was first
            for row_id in shown:
                execute(_MARK_READ, (now, "transcript", "channel", ended.session, row_id))
            execute("UPDATE peers SET proof = ? WHERE session = ?", (None if is_whole else "", ended.session))
            if not is_whole:
                return row[0], []
            returned = execute(
                "UPDATE messages SET delivered_at = NULL, carrier = NULL, delivered_to = NULL, recipient = ?,"
                " returned_at = ?"
                f" WHERE delivered_to = ? AND {_OPEN} RETURNING id",
                (row[0], now, ended.session),
            ).fetchall()
            return row[0], sorted(int(one[0]) for one in returned)

    def count_earlier(self, session: str, pid: int) -> int:
        """How many messages are offered to `session` that an earlier session of its name took. [STATE-7]"""
        earlier = self._earlier(session, pid)
        counted = (
            f"SELECT count(*) FROM messages WHERE delivered_to IN (SELECT value FROM json_each(?)) AND {_OPEN}"
            " AND kept_from IS NOT ?"
        )
        return int(self._read(counted, earlier, session)[0][0]) if earlier != "[]" else 0

    def _earlier(self, session: str, pid: int) -> str:
        """The earlier sessions of the name, whose mail is offered because nothing can tell about it; a JSON list."""
        rows = self._read(
            "SELECT e.session, e.proof, e.host_pid, e.host_started, e.domain FROM peers p JOIN peers e USING (name)"
            " WHERE p.session = ? AND p.pid = ? AND p.left_at IS NULL"
            " AND e.left_at IS NOT NULL AND e.proof IS NOT NULL AND e.session != p.session"
            f" AND EXISTS (SELECT 1 FROM messages WHERE delivered_to = e.session AND {_OPEN})",
            *(session, pid),
        )
        # A session whose agent process lives can still be given its mail. One whose record can be read is settled
        # first, unless nobody can tell whether it has ended.
        with one_look():
            lives = [self._host_life(Process(host, started), of) for _, _, host, started, of in rows]
        offered = [
            f'"{row[0]}"'
            for row, life in zip(rows, lives, strict=True)
            if life is Life.UNKNOWN or (life is Life.ENDED and not row[1])
        ]
        return f"[{','.join(offered)}]"

    def set_setting(self, of: Shared, value: int, *, may_lower: bool) -> None:
        """Set what holds for everybody on the bus. Unless `may_lower`, it is only ever raised. [CONF-5]"""
        with self._writing() as execute:
            execute(
                "INSERT INTO settings (key, value) VALUES (?1, ?2) ON CONFLICT (key)"
                " DO UPDATE SET value = CASE WHEN ?3 THEN ?2 ELSE max(value, ?2) END",
                (of.key, value, may_lower),
            )

    def prune(self, before: int, limit: int) -> int:
        """Delete at most `limit` messages delivered before the instant `before`; return how many. [STATE-4]"""
        if not self._read("SELECT 1 FROM messages WHERE delivered_at < ? LIMIT 1", before):
            return 0
        with self._writing() as execute:
            execute(
                "DELETE FROM messages WHERE id IN"
                " (SELECT id FROM messages WHERE delivered_at < ? ORDER BY delivered_at LIMIT ?)",
                (before, limit),
            )
            return self._database.changes()

    def remove(self, ids: Collection[int], *, with_pending: bool) -> list[bool]:
        """Delete these messages; return for each that was deleted whether it was pending. [KEEP-1]

        Unless `with_pending`, one that is pending is left: since it was looked up, it can have been returned.
        """
        with self._writing() as execute:
            rows = execute(
                "DELETE FROM messages WHERE id IN (SELECT value FROM json_each(?)) AND (delivered_at IS NOT NULL OR ?)"
                " RETURNING delivered_at IS NULL",
                (listed(ids), with_pending),
            ).fetchall()
        self._database.merge_if_due()
        return [bool(row[0]) for row in rows]

    def search_index(self) -> SearchIndex:
        """The index over the texts of the messages. [SEARCH-1]"""
        from agentbus.core.search import SearchIndex  # a send must not wait for it

        return SearchIndex(self._database)

    def discard(self, mailbox: str, before: int) -> list[Status]:
        """Delete what is not known to be read in `mailbox` and was sent before the instant; return it. [OLD-2]"""
        with self._writing() as execute:
            found = "FROM messages AS m WHERE recipient = ? AND read_at IS NULL AND sent_at < ?"
            rows = execute(f"SELECT {MESSAGE} {found} ORDER BY id", (mailbox, before)).fetchall()
            execute(f"DELETE {found}", (mailbox, before))
        return [Status.from_row(row) for row in rows]

    def cancel(self, row_id: int) -> bool:
        """Delete a message that is still pending; whether it was. [OLD-3]"""
        with self._writing() as execute:
            # What is on the way to another machine can be delivered there at any moment.
            execute(
                "DELETE FROM messages WHERE id = ? AND delivered_at IS NULL"
                " AND (relayed_at IS NULL OR refused IS NOT NULL)",
                (row_id,),
            )
            return bool(self._database.changes())
