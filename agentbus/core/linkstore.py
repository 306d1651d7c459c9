"""The mailboxes as the link sees them: what leaves for other machines, what comes in from them, what became of both.

Only the process of the link uses it. Knows nothing about the wire or the server. Instants are milliseconds since 1970
UTC, by the clock of this machine. A method commits all of its changes or none, and raises what those of Store raise.
Implements [LINK-2] to [LINK-5], [RCPT-1], [RCPT-2].
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from agentbus.core.a2a import message_id
from agentbus.core.machines import Machine
from agentbus.core.model import Envelope, Peer
from agentbus.core.names import EVERYBODY_THERE, LINK_NAME
from agentbus.core.process import one_look
from agentbus.core.queries import MESSAGE, THREAD
from agentbus.core.store import Question, Store

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import Any

__all__ = [
    "ARRIVED",
    "DELIVERED",
    "READ",
    "REFUSED",
    "UNKNOWN",
    "Incoming",
    "LinkStore",
    "Outgoing",
    "Report",
    "digest",
]

# What a receipt can say. [RCPT-1]
UNKNOWN, ARRIVED, DELIVERED, READ, REFUSED = range(5)
# From this schema on a program knows that the link is no peer like the others.
_SCHEMA_OF_LINKS = 11
# For so long a copy of what was taken in can still come: 30 days. [LINK-3]
_IMPORTS_KEPT_MS = 30 * 86_400_000
_PRUNE_ROWS = 1_000
# A message of this home, as the machine names it that confirms or refuses it.
_OURS = "host = ? AND bus = ? AND id = ?"
_SET = "INSERT INTO link (key, value) VALUES (?1, ?2) ON CONFLICT (key) DO UPDATE SET value = ?2"
_UNREPORTED = (
    "origin IS NOT NULL AND reported < 1 + (delivered_at IS NOT NULL) + (read_at IS NOT NULL)"  # as in 0011_link.sql
)


@dataclass(frozen=True, slots=True)
class Outgoing(Envelope):
    """A message for another machine. `bus`: its name in the world begins so. `answers`: the name of what it answers."""

    bus: str = ""
    answers: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """A message from `machine`, which has proven that it is that machine. `to` is `*` for all who are present here.

    `answers` is the bus and the id of what it answers, wherever that was sent. Of two messages under one name, the same
    `digest` says that one is a copy of the other.
    """

    machine: str
    bus: str
    id: int
    sender: str
    to: str
    text: str
    sent_at: int
    answers: tuple[str, int] | None
    digest: str
    answer_by: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a message: one of the five words above, and by which delivery, or why, in a few words.

    `digest` says which message it is, of those that had that name.
    """

    bus: str
    id: int
    state: int
    digest: str
    note: str = ""


def digest(sender: str, recipient: str, text: str, sent_at: int) -> str:
    """What tells a copy of a message from another message under the same name: 64 bits of it, in hex. [LINK-5]

    `sender` is a name on the machine that sends, `recipient` the address on the other. Of what never changes: not of
    the message that it answers, which can be pruned before it leaves again.
    """
    content = json.dumps((sender, recipient, text, sent_at))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


class LinkStore(Store):
    """The mailboxes of one bus, for its link."""

    def begin(self, machine: str) -> None:
        """Be the link of a home that is called `machine`. What was connected before is not any more. [LINK-1]"""
        with self._writing() as execute:
            execute(_SET, ("machine", machine))
            execute("INSERT OR IGNORE INTO link (key, value) SELECT 'bus', id FROM bus")
            # A program of before would count the link among those who get a broadcast.
            execute("UPDATE bus SET oldest = max(oldest, ?)", (_SCHEMA_OF_LINKS,))
            self._disconnected(execute, "")

    def leave_mesh(self) -> None:
        """Have no link any more: addresses with a machine are no names again. What waits for others stays."""
        with self._writing() as execute:
            execute("DELETE FROM link")
            execute("DELETE FROM machines")

    def connected(self, facts: Mapping[str, str]) -> None:
        """Note that the link is connected, and to what."""
        with self._writing() as execute:
            execute("DELETE FROM link WHERE key = 'trouble'")
            for key, value in facts.items():
                execute(_SET, (key, value))

    def disconnected(self, trouble: str) -> None:
        """Note that it is not, and why: who is on other machines is not known then."""
        with self._writing() as execute:
            self._disconnected(execute, trouble)

    @staticmethod
    def _disconnected(execute: Callable[..., Any], trouble: str) -> None:
        execute("DELETE FROM link WHERE key = 'since'")
        execute(_SET, ("trouble", trouble))
        execute("UPDATE machines SET gone_at = seen_at WHERE gone_at IS NULL")

    def _check_room(self, execute: Callable[..., Any], mailbox: str, row_id: int) -> None:
        """What comes in was counted where it was sent. [ADDR-4]"""

    # -- what leaves ---------------------------------------------------------------------------------------

    def outbound(self, limit: int) -> list[Outgoing]:
        """The oldest `limit` messages that have to leave for a machine that was heard of, ascending. [LINK-2]"""
        rows = self._read(
            f"SELECT {MESSAGE}, m.bus, a.bus, substr(a.origin, instr(a.origin, '.') + 1), a.origin_id, a.id"
            " FROM messages m LEFT JOIN messages a ON a.id = m.reply_to"
            " WHERE m.host IS NOT NULL AND m.relayed_at IS NULL AND m.refused IS NULL"
            " AND m.host IN (SELECT name FROM machines) ORDER BY m.id LIMIT ?",
            limit,
        )
        return [
            Outgoing(
                *(row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7]),
                bus=row[-5] or "",
                answers=_answers(*row[-4:]),
            )
            for row in rows
        ]

    def mark_relayed(self, ids: Iterable[int], *, sequence: int, now: int) -> None:
        """Note that messages are stored at the server, under numbers up to `sequence`. [LINK-2]"""
        with self._writing() as execute:
            self._database.executemany(
                "UPDATE messages SET relayed_at = coalesce(relayed_at, ?) WHERE id = ? AND refused IS NULL",
                [(now, row_id) for row_id in ids],
            )
            execute(_SET, ("sequence", str(sequence)))

    def refuse(self, row_id: int, reason: str) -> None:
        """Note that a message cannot leave, and why: `by ...: ...`. [ADDR-4]"""
        with self._writing() as execute:
            execute("UPDATE messages SET refused = ? WHERE id = ? AND arrived_at IS NULL", (reason, row_id))

    def unconfirmed(self, machine: str, before: int) -> int:
        """How many messages left for `machine` before an instant, and have not arrived there as far as is known."""
        rows = self._read(
            "SELECT count(*) FROM messages WHERE host = ? AND arrived_at IS NULL AND refused IS NULL"
            " AND relayed_at < ?",
            *(machine, before),
        )
        return int(rows[0][0])

    def relay_anew(self, machine: str | None, before: int) -> int:
        """Let everything leave again that left before an instant and is not confirmed. Returns how many. [LINK-4]

        For `machine`, or for all machines if that is None.
        """
        with self._writing() as execute:
            execute(
                "UPDATE messages SET relayed_at = NULL WHERE host IS NOT NULL AND arrived_at IS NULL"
                " AND refused IS NULL AND relayed_at < ?1 AND (?2 IS NULL OR host = ?2)",
                (before, machine),
            )
            return self._database.changes()

    # -- what became of it ---------------------------------------------------------------------------------

    def confirm(self, machine: str, reports: Iterable[Report], *, now: int) -> int:
        """Note what `machine` says about messages that are for it; other reports count for nothing. [RCPT-1]

        Returns how many messages have to leave again, under another name: their ids were given out twice. [LINK-5]
        """
        again = 0
        with self._writing() as execute:
            for report in reports:
                ours = (machine, report.bus, report.id)
                if not self._is_about(execute, ours, report.digest):
                    continue
                if report.state == UNKNOWN:
                    again += self._rename(execute, ours)
                elif report.state == REFUSED:
                    execute(
                        f"UPDATE messages SET refused = ? WHERE {_OURS} AND arrived_at IS NULL",
                        (f"by {machine}: {report.note}", *ours),
                    )
                else:
                    self._confirm(execute, ours, report, now)
        return again

    @staticmethod
    def _is_about(execute: Callable[..., Any], ours: tuple[str, str, int], said: str) -> bool:
        """Whether a report is about the message that has that name here. It is not, if this home was put back from a
        backup: what was sent before that is still being read there."""
        row = execute(f"SELECT {MESSAGE} FROM messages m WHERE {_OURS}", ours).fetchone()
        if not row:
            return False
        one = Envelope.from_row(row)
        return digest(one.sender, one.recipient, one.text, one.sent_at) == said

    @staticmethod
    def _confirm(execute: Callable[..., Any], ours: tuple[str, str, int], report: Report, now: int) -> None:
        execute(
            "UPDATE messages SET arrived_at = ?1, relayed_at = coalesce(relayed_at, ?1), refused = NULL"
            " WHERE host = ?2 AND bus = ?3 AND id = ?4 AND arrived_at IS NULL",
            (now, *ours),
        )
        if report.state >= DELIVERED:
            execute(
                f"UPDATE messages SET delivered_at = ?, carrier = ? WHERE {_OURS} AND delivered_at IS NULL",
                (now, f"{report.note}@{ours[0]}", *ours),
            )
        if report.state == READ:
            execute(
                f"UPDATE messages SET read_at = ?, read_by = 'receipt' WHERE {_OURS} AND read_at IS NULL", (now, *ours)
            )

    @staticmethod
    def _rename(execute: Callable[..., Any], ours: tuple[str, str, int]) -> int:
        row = execute(f"SELECT 1 FROM messages WHERE {_OURS} AND arrived_at IS NULL", ours).fetchone()
        if not row:
            return 0
        # This home was restored from a backup, so its next ids have been used too. A new name for every message that is
        # not confirmed would double those that others have.
        if execute("SELECT value FROM link WHERE key = 'bus'").fetchone() == (ours[1],):
            execute(_SET, ("bus", os.urandom(8).hex()))
        execute(
            f"UPDATE messages SET relayed_at = NULL, bus = (SELECT value FROM link WHERE key = 'bus') WHERE {_OURS}",
            ours,
        )
        return 1

    # -- what comes in -------------------------------------------------------------------------------------

    def take_in(self, incoming: Sequence[Incoming], *, now: int) -> tuple[list[Peer], list[tuple[str, Report]]]:
        """Commit messages from other machines, each once, in one transaction. [LINK-3]

        Returns the peers to wake, and what to report at once, and to which machine. What becomes of the messages is in
        `unreported`.
        """
        wake: dict[str, Peer] = {}
        reports: list[tuple[str, Report]] = []
        with one_look(), self._writing() as execute:
            for one in incoming:
                known = execute(
                    "SELECT digest, row_id FROM imports WHERE origin = ? AND origin_id = ?", _origin(one)
                ).fetchone()
                if known is None:
                    for peer in self._import(execute, one, now, reports):
                        wake[peer.session] = peer
                else:
                    report = self._again(execute, one, *known)
                    if report is not None:
                        reports.append((one.machine, report))
        return list(wake.values()), reports

    def _import(
        self, execute: Callable[..., Any], one: Incoming, now: int, reports: list[tuple[str, Report]]
    ) -> list[Peer]:
        sender, answered = f"{one.sender}@{one.machine}", self._answered(execute, one)
        thread = None if answered is None else self._thread_of(execute, answered)
        question = None if one.answer_by is None else Question(one.answer_by)
        # No clock decides anything: what comes from the future was sent now.
        sent_at = min(one.sent_at, now)
        is_for_all = one.to == EVERYBODY_THERE
        if is_for_all:
            there = [peer for peer in self._present(execute) if peer.name != LINK_NAME and not self._has_ended(peer)]
            rooms: list[tuple[str, Peer | None]] = [(peer.name, peer) for peer in there]
        else:
            found = self._resolve(execute, one.to)
            rooms = [(found.mailbox, found.peer)]
        ids = []
        for mailbox, _ in rooms:
            row_id = self._insert(execute, sender, mailbox, one.text, answered, sent_at, None, thread, question)
            # What became of a broadcast is one answer, and no receipt for each peer.
            state = READ if is_for_all else UNKNOWN
            execute(
                "UPDATE messages SET origin = ?, origin_id = ?, reported = ? WHERE id = ?",
                (*_origin(one), state, row_id),
            )
            ids.append(row_id)
        count = len(rooms)
        if is_for_all:
            note = f"{count} peer{'s' * (count != 1)}"
            reports.append((one.machine, Report(one.bus, one.id, DELIVERED, one.digest, note)))
        execute(
            "INSERT INTO imports (origin, origin_id, row_id, digest, at) VALUES (?, ?, ?, ?, ?)",
            (*_origin(one), ids[0] if ids else 0, one.digest, now),
        )
        return [peer for _, peer in rooms if peer is not None]

    def _answered(self, execute: Callable[..., Any], one: Incoming) -> int | None:
        """Our own id of the message that `one` answers: one that we sent, or one that came from there."""
        if one.answers is None:
            return None
        bus, number = one.answers
        row = execute(
            "SELECT id FROM messages WHERE id = ?2 AND bus = ?1 AND host = ?4"
            " UNION ALL SELECT row_id FROM imports WHERE origin = ?3 AND origin_id = ?2 LIMIT 1",
            (bus, number, f"{one.machine}.{bus}", one.machine),
        ).fetchone()
        return int(row[0]) if row and row[0] else None

    @staticmethod
    def _thread_of(execute: Callable[..., Any], answered: int) -> int:
        """The thread of a message that is answered. [THREAD-1]"""
        row = execute(f"SELECT coalesce({THREAD}, m.id) FROM messages m WHERE m.id = ?", (answered,)).fetchone()
        return int(row[0]) if row else answered

    @staticmethod
    def _again(execute: Callable[..., Any], one: Incoming, known: str, row_id: int) -> Report | None:
        """What to say about a message whose name is known: a copy, or an id that was given out twice. [LINK-5]"""
        if known != one.digest:
            return Report(one.bus, one.id, UNKNOWN, one.digest)
        if one.to == EVERYBODY_THERE:
            return Report(one.bus, one.id, DELIVERED, one.digest, "its peers")
        # Its receipt was lost, or is on its way.
        row = execute(
            "UPDATE messages SET reported = 0 WHERE id = ? AND origin = ? RETURNING id", (row_id, _origin(one)[0])
        ).fetchone()
        return None if row else Report(one.bus, one.id, ARRIVED, one.digest)  # pruned or discarded since

    def unreported(self, limit: int) -> list[tuple[int, str, Report]]:
        """The oldest `limit` messages from others of whose fate they were not told: our id, the machine, the report.

        [RCPT-2]
        """
        rows = self._read(
            "SELECT id, origin, origin_id, 1 + (delivered_at IS NOT NULL) + (read_at IS NOT NULL), carrier, digest"
            f" FROM messages JOIN imports USING (origin, origin_id) WHERE {_UNREPORTED} ORDER BY id LIMIT ?",
            limit,
        )
        found = []
        for row_id, origin, origin_id, state, carrier, known in rows:
            machine, _, bus = str(origin).partition(".")
            found.append((int(row_id), machine, Report(bus, origin_id, state, known, carrier or "")))
        return found

    def mark_reported(self, reported: Iterable[tuple[int, int]]) -> None:
        """Note that others were told what became of messages: our ids, each with its state."""
        with self._writing():
            self._database.executemany(
                "UPDATE messages SET reported = ?2 WHERE id = ?1 AND reported < ?2", list(reported)
            )

    def forget_imports(self, now: int) -> int:
        """Forget some of what was taken in more than 30 days ago; return how many."""
        before = now - _IMPORTS_KEPT_MS
        # What is not read yet has to be reported once more.
        past = (
            "SELECT origin, origin_id FROM imports WHERE at < ?"
            f" AND NOT EXISTS (SELECT 1 FROM messages WHERE id = row_id AND reported < {READ}) LIMIT ?"
        )
        if not self._read(past, before, 1):
            return 0
        with self._writing() as execute:
            execute(f"DELETE FROM imports WHERE (origin, origin_id) IN ({past})", (before, _PRUNE_ROWS))
            return self._database.changes()

    # -- who is there --------------------------------------------------------------------------------------

    def note_machines(self, machines: Collection[Machine]) -> None:
        """Record what is known about other machines. [MACH-1]"""
        with self._writing():
            self._database.executemany(
                "INSERT INTO machines (name, bus, version, seen_at, gone_at, skew_ms, peers)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (name) DO UPDATE SET bus = excluded.bus, version = excluded.version,"
                " seen_at = excluded.seen_at, gone_at = excluded.gone_at, skew_ms = excluded.skew_ms,"
                " peers = excluded.peers",
                [
                    (
                        *(one.name, one.bus, one.version, one.seen_at, one.gone_at, one.skew_ms),
                        json.dumps([(peer.name, peer.runtime, peer.delivery, peer.cwd) for peer in one.peers]),
                    )
                    for one in machines
                ],
            )


def _origin(one: Incoming) -> tuple[str, int]:
    return f"{one.machine}.{one.bus}", one.id


def _answers(bus: str | None, origin_bus: str | None, origin_id: int | None, row_id: int | None) -> str | None:
    """The name in the world of the message that another answers; None if it has none."""
    if origin_bus and origin_id:
        return message_id(origin_id, origin_bus)
    return message_id(row_id, bus) if bus and row_id else None
