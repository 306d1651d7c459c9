"""The mailboxes and the presence of peers: one method for each thing that a session does with them.

Queries for people are in queries.py. Synchronous. A method commits all of its changes or none. Knows nothing about
triggers, deliveries or MCP. Instants are milliseconds since 1970 UTC. Every method raises Busy when another process
holds the database for longer than the connection waits, and BrokenSetup or TryAgain as in `database.explain`.
Implements [SEND-1] to [SEND-4], [STATE-2], [NAME-4] to [NAME-7], [PRES-2] to [PRES-4].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from agentbus.core import database
from agentbus.core.errors import MailboxFull, Refused
from agentbus.core.model import COLUMNS, Address, Arrival, Envelope, Peer, Unread, numbered_name
from agentbus.core.process import Process, is_alive
from agentbus.core.queries import Queries

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import Any

__all__ = ["MAX_PENDING", "SILENT_MS", "Store", "peer_rows"]

# A mailbox that nobody empties must not fill the disk. At 64 KiB for each message, this is 640 MiB.
MAX_PENDING = 10_000
# Three missed heartbeats of 15 s. [PRES-3]
SILENT_MS = 45_000

_PEER = (
    "session, name, host_pid, host_started, launch_name, pid, pid_started,"
    " runtime, cwd, delivery, trigger, endpoint, started_at, last_seen, delivery_reason"
)
# The columns that `Envelope.from_row` takes, for a query that calls the table m.
_MESSAGE = ", ".join(f"m.{column}" for column in COLUMNS)
_PRESENT = f"SELECT {_PEER} FROM peers WHERE left_at IS NULL ORDER BY name"
# A message that is still pending becomes delivered too: by the pull, or by the reply to it.
_MARK_READ = (
    "UPDATE messages SET read_at = ?, delivered_at = coalesce(delivered_at, ?), carrier = coalesce(carrier, ?),"
    " delivered_to = coalesce(delivered_to, ?) WHERE id = ? AND read_at IS NULL"
)
# The unread messages of a present session: pending under its name, or pushed to it and not known to be read.
_UNREAD = (
    " FROM (SELECT name, session FROM peers WHERE session = ?1 AND pid = ?2 AND left_at IS NULL) p"
    " JOIN messages m ON m.id IN ("
    "   SELECT id FROM messages WHERE recipient = p.name AND delivered_at IS NULL"
    "   UNION ALL"
    "   SELECT id FROM messages WHERE delivered_to = p.session AND delivered_at IS NOT NULL AND read_at IS NULL)"
)


def _peer(row: Sequence[Any]) -> Peer:
    return Peer(
        session=row[0],
        name=row[1],
        host=Process(row[2], row[3]),
        launch_name=row[4],
        process=Process(row[5], row[6]),
        runtime=row[7],
        cwd=row[8],
        delivery=row[9],
        trigger=row[10],
        endpoint=row[11],
        started_at=row[12],
        last_seen=row[13],
        delivery_reason=row[14],
    )


def peer_rows(read: Callable[..., list[Any]]) -> list[Peer]:
    """The peers that are present according to their rows, sorted by name. `read` runs a query."""
    return [_peer(row) for row in read(_PRESENT)]


class Store:
    """The mailboxes and the peers of one bus, over one connection, used from one thread.

    `alive` tells whether a process is running. `max_pending` is the limit of a mailbox, in messages.
    """

    def __init__(
        self,
        path: Path,
        *,
        busy_ms: int,
        sync: str = "normal",
        on_wal: Callable[[int], None] | None = None,
        alive: Callable[[Process], bool] = is_alive,
        max_pending: int = MAX_PENDING,
    ) -> None:
        self._database = database.Database(path, busy_ms=busy_ms, sync=sync, on_wal=on_wal)
        self._read = self._database.read
        self._writing = self._database.writing
        self.queries = Queries(self._read)
        self._alive = alive
        self._max_pending = max_pending
        # The last id for which a mailbox has room. Too high after a rename that moved another mailbox's messages in.
        self._room_until: dict[str, int] = {}

    @property
    def path(self) -> Path:
        """The database file."""
        return self._database.path

    def is_replaced(self) -> bool:
        """Whether the opened file is no longer the one at `path`: it was deleted or replaced."""
        return self._database.is_replaced()

    def reopen(self) -> None:
        """Open the file that is at `path` now, creating it as needed. Raises what the first opening raises."""
        self._database.reopen()
        self._room_until.clear()

    def close(self) -> None:
        """Close the connection. Closing the last one merges the WAL into the database."""
        self._database.close()

    # -- messages ------------------------------------------------------------------------------------------

    def send(
        self,
        sender: str,
        to: str,
        body: str,
        *,
        now: int,
        reply_to: int | None = None,
        sender_session: str | None = None,
    ) -> tuple[int, Address]:
        """Commit one message for the mailbox that `to` leads to; return its id and the address. [SEND-1]

        A reply shows that the message was read. So the message `reply_to` is marked as read, if it went to `sender`
        or was delivered to `sender_session`. [READ-2]

        Raises MailboxFull.
        """
        with self._writing() as execute:
            address = self._resolve(execute, to)
            row_id = self._insert(execute, sender, address.mailbox, body, reply_to, now)
            if reply_to is not None:
                execute(
                    f"{_MARK_READ} AND (recipient = ? OR delivered_to = ?)",
                    (now, now, "reply", sender_session, reply_to, sender, sender_session),
                )
        return row_id, address

    def broadcast(self, sender: str, body: str, *, now: int) -> list[tuple[int, Peer]]:
        """Commit one message for each present peer but `sender`, in one transaction. [SEND-4]

        Raises MailboxFull; then nothing was sent to anybody.
        """
        with self._writing() as execute:
            peers = [peer for peer in self._present(execute) if peer.name != sender]
            return [(self._insert(execute, sender, peer.name, body, None, now), peer) for peer in peers]

    def _insert(
        self, execute: Callable[..., Any], sender: str, recipient: str, body: str, reply_to: int | None, now: int
    ) -> int:
        row = execute(
            "INSERT INTO messages (sender, recipient, body, reply_to, sent_at) VALUES (?, ?, ?, ?, ?) RETURNING id",
            (sender, recipient, body, reply_to, now),
        ).fetchone()
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
                hint=f'start a session named "{mailbox}", which takes them, then send again',
            )

    def _resolve(self, execute: Callable[..., Any], to: str) -> Address:
        row = execute(f"SELECT {_PEER} FROM peers WHERE name = ? AND left_at IS NULL", (to,)).fetchone()
        if row:
            return Address(to, _peer(row), is_known=True)
        row = execute(
            f"SELECT {_PEER}, left_at FROM peers JOIN aliases USING (session) WHERE alias = ?", (to,)
        ).fetchone()
        # An alias lives as long as its session, and a session lives as long as its host process. [NAME-6]
        if row and (row[15] is None or self._alive(Process(row[2], row[3]))):
            return Address(row[1], _peer(row) if row[15] is None else None, is_known=True)
        known = execute("SELECT 1 FROM peers WHERE name = ? LIMIT 1", (to,)).fetchone()
        return Address(to, None, is_known=bool(known))

    def pending(self, session: str, pid: int, limit: int) -> list[Envelope]:
        """The oldest `limit` pending messages for the name that `session` has now, ascending. [DRAIN-1]

        Empty if `session` is not present in process `pid`: a session that was taken for dead no longer drains.
        """
        rows = self._read(
            f"SELECT {_MESSAGE} FROM peers p JOIN messages m ON m.recipient = p.name"
            " WHERE p.session = ? AND p.pid = ? AND p.left_at IS NULL AND m.delivered_at IS NULL"
            " ORDER BY m.id LIMIT ?",
            session,
            pid,
            limit,
        )
        return [Envelope.from_row(row) for row in rows]

    def mark_delivered(self, ids: Iterable[int], *, session: str, carrier: str, now: int) -> None:
        """Stamp pending messages as delivered to `session` by `carrier`, in one transaction. [STATE-2]"""
        with self._writing():
            self._database.executemany(
                "UPDATE messages SET delivered_at = ?, carrier = ?, delivered_to = ?"
                " WHERE id = ? AND delivered_at IS NULL",
                [(now, carrier, session, row_id) for row_id in ids],
            )

    def unread(self, session: str, pid: int, limit: int) -> list[Unread]:
        """The oldest `limit` unread messages of `session`, if it is present in process `pid`, ascending. [READ-1]"""
        rows = self._read(
            f"SELECT {_MESSAGE}, m.delivered_at IS NOT NULL{_UNREAD} ORDER BY m.id LIMIT ?3",
            session,
            pid,
            limit,
        )
        return [Unread(Envelope.from_row(row), was_pushed=bool(row[-1])) for row in rows]

    def count_unread(self, session: str, pid: int, limit: int) -> int:
        """How many messages `session` has not read; counting stops at `limit`."""
        return int(self._read(f"SELECT count(*) FROM (SELECT 1{_UNREAD} LIMIT ?3)", session, pid, limit)[0][0])

    def mark_read(self, ids: Iterable[int], *, session: str, now: int) -> None:
        """Stamp messages as read by `session`, in one transaction; pending ones count as pulled. [READ-1]"""
        with self._writing():
            self._database.executemany(_MARK_READ, [(now, now, "pull", session, row_id) for row_id in ids])

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

    # -- presence ------------------------------------------------------------------------------------------

    def claim(
        self,
        arrival: Arrival,
        *,
        now: int,
        endpoint: Callable[[str], str],
        join_crowd: bool,
        again: Peer | None = None,
    ) -> tuple[Peer, Peer | None] | None:
        """Make `arrival` a present peer, in one transaction. [NAME-4]

        Returns the new peer, and the peer that holds the wished-for name, or None if that name was free. If there is
        a session with the same host and launch name whose process is gone, the arrival takes over this session, with
        its name and its aliases. If that process still runs, nothing changes and the result is None, unless
        `join_crowd` is true: then the arrival becomes one more session. `endpoint` gives the wake address of a
        session. `again` is for a peer that was taken for dead: it is the peer as it was before, and the arrival comes
        back as that session and no other.
        """
        with self._writing() as execute:
            self._reap(execute, now)
            rows = execute(
                f"SELECT {_PEER}, left_at FROM peers WHERE host_pid = ? AND host_started = ? AND launch_name = ?"
                " ORDER BY started_at, session",
                (arrival.host.pid, arrival.host.started, arrival.launch_name),
            ).fetchall()
            left = [_peer(row) for row in rows if row[15] is not None]
            own = next((peer for peer in left if again is None or peer.session == again.session), None)
            if own is None and rows and not join_crowd:
                return None
            known = own or again
            session = known.session if known else os.urandom(6).hex()
            wished = known.name if known else arrival.launch_name
            taken = {peer.name: peer for peer in self._present(execute)}
            name, number = wished, 1
            while name in taken:
                number += 1
                name = numbered_name(wished, number)
            peer = Peer(
                session=session,
                name=name,
                host=arrival.host,
                launch_name=arrival.launch_name,
                process=arrival.process,
                runtime=arrival.runtime,
                cwd=arrival.cwd,
                delivery=arrival.delivery,
                trigger=arrival.trigger,
                endpoint=endpoint(session),
                started_at=now,
                last_seen=now,
                delivery_reason=arrival.delivery_reason,
            )
            self._seat(execute, peer)
        return peer, taken.get(wished)

    @staticmethod
    def _seat(execute: Callable[..., Any], peer: Peer) -> None:
        # A claimed name is no longer an alias of another session. [NAME-6]
        execute("DELETE FROM aliases WHERE alias = ?", (peer.name,))
        execute(
            f"INSERT INTO peers ({_PEER}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (session) DO UPDATE SET name = excluded.name, pid = excluded.pid,"
            " pid_started = excluded.pid_started, runtime = excluded.runtime, cwd = excluded.cwd,"
            " delivery = excluded.delivery, trigger = excluded.trigger, endpoint = excluded.endpoint,"
            " started_at = excluded.started_at, last_seen = excluded.last_seen,"
            " delivery_reason = excluded.delivery_reason, left_at = NULL",
            (
                *(peer.session, peer.name, peer.host.pid, peer.host.started, peer.launch_name),
                *(peer.process.pid, peer.process.started, peer.runtime, peer.cwd, peer.delivery),
                *(peer.trigger, peer.endpoint, peer.started_at, peer.last_seen, peer.delivery_reason),
            ),
        )

    def rename(self, session: str, pid: int, name: str) -> str:
        """Give `session` another name and move its pending messages to it; return the old name. [NAME-5]

        Raises Refused when a present peer holds `name`, or when `session` is not present in process `pid`.
        """
        with self._writing() as execute:
            row = execute(
                "SELECT name FROM peers WHERE session = ? AND pid = ? AND left_at IS NULL", (session, pid)
            ).fetchone()
            if not row:
                raise Refused("this session is not on the bus just now", hint="try again in 15 seconds")
            old = str(row[0])
            if old == name:
                return old
            row = execute(f"SELECT {_PEER} FROM peers WHERE name = ? AND left_at IS NULL", (name,)).fetchone()
            if row:
                raise Refused(
                    f'the name "{name}" is held by the session in {row[8]} (process {row[5]})',
                    hint="choose another, list_peers shows those in use",
                )
            execute("UPDATE messages SET recipient = ? WHERE recipient = ? AND delivered_at IS NULL", (name, old))
            execute("DELETE FROM aliases WHERE alias = ?", (name,))
            execute("INSERT OR REPLACE INTO aliases (alias, session) VALUES (?, ?)", (old, session))
            execute("UPDATE peers SET name = ? WHERE session = ?", (name, session))
        return old

    def heartbeat(self, session: str, pid: int, *, now: int) -> bool:
        """Record that `session` is alive in process `pid`. False if it was taken for dead meanwhile. [PRES-3]"""
        with self._writing() as execute:
            execute(
                "UPDATE peers SET last_seen = ? WHERE session = ? AND pid = ? AND left_at IS NULL",
                (now, session, pid),
            )
            return self._database.changes() > 0

    def set_trigger(self, session: str, trigger: str, endpoint: str) -> None:
        """Record which trigger wakes `session`, and at which endpoint."""
        with self._writing() as execute:
            execute("UPDATE peers SET trigger = ?, endpoint = ? WHERE session = ?", (trigger, endpoint, session))

    def set_delivery(self, session: str, delivery: str, reason: str) -> None:
        """Record how `session` receives messages from now on, and why."""
        with self._writing() as execute:
            execute("UPDATE peers SET delivery = ?, delivery_reason = ? WHERE session = ?", (delivery, reason, session))

    def leave(self, session: str, pid: int, *, now: int) -> None:
        """End the presence of `session` in process `pid`. The next server of its host gets the name back."""
        with self._writing() as execute:
            execute(
                "UPDATE peers SET left_at = ? WHERE session = ? AND pid = ? AND left_at IS NULL",
                (now, session, pid),
            )

    def present(self) -> list[Peer]:
        """The peers that are present according to their rows, sorted by name. To leave out dead ones, `reap` first."""
        return peer_rows(self._read)

    @staticmethod
    def _present(execute: Callable[..., Any]) -> list[Peer]:
        return [_peer(row) for row in execute(_PRESENT).fetchall()]

    def reap(self, *, now: int) -> list[Peer]:
        """End the presence of peers that are dead or silent, and forget sessions whose host is gone. [PRES-2]

        Returns the peers whose presence ended, so that their endpoints can be cleared.
        """
        # Reading is cheap, writing is not, and most of the time there is nobody to reap.
        if not any(self._is_gone(peer, now) for peer in self.present()) and not self._ended_hosts():
            return []
        with self._writing() as execute:
            return self._reap(execute, now)

    def _is_gone(self, peer: Peer, now: int) -> bool:
        return now - peer.last_seen > SILENT_MS or not self._alive(peer.process)

    def _ended_hosts(self) -> list[Process]:
        rows = self._read("SELECT DISTINCT host_pid, host_started FROM peers WHERE left_at IS NOT NULL")
        return [host for host in (Process(*row) for row in rows) if not self._alive(host)]

    def _reap(self, execute: Callable[..., Any], now: int) -> list[Peer]:
        gone = [peer for peer in self._present(execute) if self._is_gone(peer, now)]
        for peer in gone:
            execute("UPDATE peers SET left_at = ? WHERE session = ? AND left_at IS NULL", (now, peer.session))
        for host in self._ended_hosts():
            # Deleting the row deletes its aliases too. [NAME-6]
            execute(
                "DELETE FROM peers WHERE left_at IS NOT NULL AND host_pid = ? AND host_started = ?",
                (host.pid, host.started),
            )
        return gone
