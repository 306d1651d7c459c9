"""The mailboxes and the presence of peers: one method for each thing that a session does with them.

Queries for people are in queries.py. Synchronous. A method commits all of its changes or none. Knows nothing about
triggers, deliveries or MCP. Instants are milliseconds since 1970 UTC. Every method raises Busy when another process
holds the database for longer than the connection waits, and BrokenSetup or TryAgain as in `database.explain`.
Implements [SEND-1] to [SEND-4], [STATE-2], [NAME-4] to [NAME-7], [PRES-2] to [PRES-4].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from agentbus.core import database
from agentbus.core.errors import BrokenSetup, MailboxFull, Refused
from agentbus.core.model import COLUMNS, Address, Arrival, Envelope, Peer, Status, Unread, numbered_name
from agentbus.core.presence import BEAT, LOCK, Held, Presence
from agentbus.core.process import Life, Process, domain
from agentbus.core.process import life as process_life
from agentbus.core.queries import Queries

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import Any

__all__ = ["MAX_PENDING", "SESSIONS_KEPT_MS", "Store", "judge", "peer_rows"]

# A mailbox that nobody empties must not fill the disk. At 64 KiB for each message, this is 640 MiB.
MAX_PENDING = 10_000
# How long a session that has left is remembered: 30 days. Who a sender was can be asked for as long. [LEDGER-3]
SESSIONS_KEPT_MS = 30 * 86_400_000

_PEER = (
    "session, name, host_pid, host_started, launch_name, pid, pid_started,"
    " runtime, cwd, delivery, trigger, endpoint, started_at, last_seen, delivery_reason, presence, domain"
)
_LEFT_AT = 17  # the column after these, where a query adds left_at
_COLUMNS = ", ".join(COLUMNS)
# The columns that `Envelope.from_row` takes, for a query that calls the table m.
_MESSAGE = ", ".join(f"m.{column}" for column in COLUMNS)
_PRESENT = f"SELECT {_PEER} FROM peers WHERE left_at IS NULL ORDER BY name"
# Whether there is a session to forget.
_FORGOTTEN = "SELECT 1 FROM peers WHERE left_at < ? LIMIT 1"
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
        presence=row[15],
        domain=row[16],
    )


def judge(peer: Peer, presence: Presence, here: str) -> Life:
    """What can be told about `peer` in the pid domain `here`. Never blocks, never raises, changes nothing. [PRES-1]"""
    if peer.presence == LOCK:
        return presence.life(peer.session)
    # There is no lock to ask for. A process that was here and is gone has ended; about the others nobody can tell.
    is_gone = peer.domain == here != "" and process_life(peer.process) is Life.ENDED
    return Life.ENDED if is_gone else Life.UNKNOWN


def peer_rows(read: Callable[..., list[Any]]) -> list[Peer]:
    """The peers that are present according to their rows, sorted by name. `read` runs a query."""
    return [_peer(row) for row in read(_PRESENT)]


class Store:
    """The mailboxes and the peers of one bus, over one connection, used from one thread.

    `max_pending` is the limit of a mailbox, in messages. `life` judges a peer, `host_life` an agent process of a pid
    domain; by default as SPEC says.
    """

    def __init__(
        self,
        path: Path,
        *,
        busy_ms: int,
        sync: str = "normal",
        on_wal: Callable[[int], None] | None = None,
        life: Callable[[Peer], Life] | None = None,
        host_life: Callable[[Process, str], Life] | None = None,
        max_pending: int = MAX_PENDING,
    ) -> None:
        self._database = database.Database(path, busy_ms=busy_ms, sync=sync, on_wal=on_wal)
        self._read = self._database.read
        self._writing = self._database.writing
        self.queries = Queries(self._read)
        self.presence = Presence(path.parent)
        self._life = life or self._judge
        self._host_life = host_life or self._judge_host
        # The pid domain of this process; read when it is first needed, which a send never does.
        self._here: str | None = None
        self._max_pending = max_pending
        # The last id for which a mailbox has room. Too high after a rename that moved another mailbox's messages in.
        self._room_until: dict[str, int] = {}
        # Set by the bus, which knows the triggers: whether an endpoint refuses, and what removes what is left there.
        self.refuses: Callable[[Peer], bool] = lambda _peer: False
        self.on_ended: Callable[[Peer], None] = lambda _peer: None

    @property
    def here(self) -> str:
        """The pid domain of this process; "" if it is unknown."""
        if self._here is None:
            self._here = domain()
        return self._here

    def _judge(self, peer: Peer) -> Life:
        found = judge(peer, self.presence, "" if peer.presence == LOCK else self.here)
        # A socket that refuses has no owner any more. But a lock that is held says otherwise, and stands above it.
        return Life.ENDED if found is Life.UNKNOWN and peer.presence == BEAT and self.refuses(peer) else found

    def _judge_host(self, host: Process, of: str) -> Life:
        return process_life(host) if of == self.here != "" else Life.UNKNOWN

    def life(self, peer: Peer) -> Life:
        """What can be told about `peer`. Changes nothing. [PRES-1]"""
        return self._life(peer)

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

    def identity(self) -> str:
        """Which bus this is: 16 hex digits, in the database since it was made. [STORE-7]"""
        return str(self._read("SELECT id FROM bus")[0][0])

    @property
    def generation(self) -> int:
        """How often another file was turned to. It tells a session that it has to join again. [STORE-6]"""
        return self._database.generation

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
        while True:
            row_id, address = self._send(sender, to, body, now, reply_to, sender_session)
            # The file can be replaced while the row is written. Then that row is in no bus, so it is sent to the one
            # that is there now.
            if not self.is_replaced():
                return row_id, address
            self.reopen()

    def _send(
        self, sender: str, to: str, body: str, now: int, reply_to: int | None, sender_session: str | None
    ) -> tuple[int, Address]:
        with self._writing() as execute:
            address = self._resolve(execute, to)
            row_id = self._insert(execute, sender, address.mailbox, body, reply_to, now, sender_session)
            if reply_to is not None:
                execute(
                    f"{_MARK_READ} AND (recipient = ? OR delivered_to = ?)",
                    (now, now, "reply", sender_session, reply_to, sender, sender_session),
                )
        return row_id, address

    def broadcast(
        self, sender: str, body: str, *, now: int, sender_session: str | None = None
    ) -> list[tuple[int, Peer]]:
        """Commit one message for each peer that is there but `sender`, in one transaction. [SEND-4]

        Raises MailboxFull; then nothing was sent to anybody.
        """
        with self._writing() as execute:
            self._end_ended(execute, now)
            peers = [peer for peer in self._present(execute) if peer.name != sender]
            return [(self._insert(execute, sender, peer.name, body, None, now, sender_session), peer) for peer in peers]

    def _insert(
        self,
        execute: Callable[..., Any],
        sender: str,
        recipient: str,
        body: str,
        reply_to: int | None,
        now: int,
        sender_session: str | None,
    ) -> int:
        row = execute(
            "INSERT INTO messages (sender, recipient, body, reply_to, sent_at, sender_session)"
            " VALUES (?, ?, ?, ?, ?, ?) RETURNING id",
            (sender, recipient, body, reply_to, now, sender_session),
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
                hint=f'start a session named "{mailbox}", to receive them, then send again',
            )

    def _resolve(self, execute: Callable[..., Any], to: str) -> Address:
        row = execute(f"SELECT {_PEER} FROM peers WHERE name = ? AND left_at IS NULL", (to,)).fetchone()
        if row:
            return Address(to, _peer(row), is_known=True)
        row = execute(
            f"SELECT {_PEER}, left_at FROM peers JOIN aliases USING (session) WHERE alias = ?", (to,)
        ).fetchone()
        # An alias lives as long as its session, and a session lives as long as its host process. [NAME-6]
        if row and (row[_LEFT_AT] is None or self._host_life(Process(row[2], row[3]), row[16]) is not Life.ENDED):
            return Address(row[1], _peer(row) if row[_LEFT_AT] is None else None, is_known=True)
        known = execute("SELECT 1 FROM peers WHERE name = ? LIMIT 1", (to,)).fetchone()
        return Address(to, None, is_known=bool(known))

    def pending(self, session: str, pid: int, limit: int, above: int = 0) -> list[Envelope]:
        """The oldest `limit` pending messages for the name that `session` has now, ascending. [DRAIN-1]

        Only those with an id above `above`: the others are held back. [OLD-4]

        Empty if `session` is not present in process `pid`: a session that was taken for dead no longer drains.
        """
        rows = self._read(
            f"SELECT {_MESSAGE} FROM peers p JOIN messages m ON m.recipient = p.name"
            " WHERE p.session = ? AND p.pid = ? AND p.left_at IS NULL AND m.delivered_at IS NULL AND m.id > ?"
            " ORDER BY m.id LIMIT ?",
            session,
            pid,
            above,
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

    def unread(self, session: str, pid: int, limit: int, held: int = 0) -> list[Unread]:
        """The oldest `limit` unread messages of `session`, if it is present in process `pid`, ascending. [READ-1]

        Those with an id up to `held` come last: old mail does not block what is new. [OLD-4]
        """
        order = "m.id <= ?4, m.id" if held else "m.id"  # the first cannot use the index
        rows = self._read(
            f"SELECT {_MESSAGE}, m.delivered_at IS NOT NULL{_UNREAD} ORDER BY {order} LIMIT ?3",
            *(session, pid, limit, *((held,) if held else ())),
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

    def discard(self, mailbox: str, before: int) -> list[Status]:
        """Delete what is not known to be read in `mailbox` and was sent before the instant; return it. [OLD-2]"""
        with self._writing() as execute:
            rows = execute(
                f"DELETE FROM messages WHERE recipient = ? AND read_at IS NULL AND sent_at < ? RETURNING {_COLUMNS}",
                (mailbox, before),
            ).fetchall()
        return sorted((Status.from_row(row) for row in rows), key=lambda one: one.id)

    def cancel(self, row_id: int) -> bool:
        """Delete a message that is still pending; whether it was. [OLD-3]"""
        with self._writing() as execute:
            execute("DELETE FROM messages WHERE id = ? AND delivered_at IS NULL", (row_id,))
            return bool(self._database.changes())

    # -- presence ------------------------------------------------------------------------------------------

    def claim(
        self,
        arrival: Arrival,
        *,
        now: int,
        endpoint: Callable[[str], str],
        join_crowd: bool,
        again: Peer | None = None,
        held: Held | None = None,
    ) -> tuple[Peer, Peer | None, Held | None] | None:
        """Make `arrival` a present peer, in one transaction. [NAME-4]

        Returns the new peer, the peer that holds the wished-for name (None if that name was free), and the lock of the
        session (None where there are no locks). If a session with the same host and launch name has ended, the arrival
        takes over this session, with its name and its aliases. If it still lives, nothing changes and the result is
        None, unless `join_crowd` is true: then the arrival becomes one more session. `endpoint` gives the wake address
        of a session. `again` is for a session that was here before, and `held` is its lock: it comes back as that
        session, unless another live process is that session by now.

        Raises BrokenSetup when no lock file can be made.
        """
        taken_lock: Held | None = None
        try:
            with self._writing() as execute:
                self._end_ended(execute, now)
                known, is_there = (again, False) if again is not None else self._predecessor(execute, arrival)
                if is_there and not join_crowd:
                    return None
                session, lock = self._hold(execute, known, arrival, held)
                taken_lock = lock if lock is not held else None
                wished = known.name if known else arrival.launch_name
                # A row of this very session is its own, also in a file that was restored.
                taken = {peer.name: peer for peer in self._present(execute) if peer.session != session}
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
                    presence=BEAT if lock is None else LOCK,
                    domain=arrival.domain,
                )
                self._seat(execute, peer)
        except BaseException:
            if taken_lock is not None:
                taken_lock.release()
            raise
        return peer, taken.get(wished), lock

    def _predecessor(self, execute: Callable[..., Any], arrival: Arrival) -> tuple[Peer | None, bool]:
        """The ended session that `arrival` takes over, or None; and, if None, whether one of its host still lives."""
        # Where the agent process cannot be seen, nobody knows whose predecessor a session is. [NAME-7]
        if arrival.host.pid <= 0:
            return None, False
        rows = execute(
            f"SELECT {_PEER}, left_at FROM peers WHERE host_pid = ? AND host_started = ? AND launch_name = ?"
            " AND domain = ? ORDER BY started_at, session",
            (arrival.host.pid, arrival.host.started, arrival.launch_name, arrival.domain),
        ).fetchall()
        left = [_peer(row) for row in rows if row[_LEFT_AT] is not None]
        return (left[0], False) if left else (None, bool(rows))

    def _hold(
        self, execute: Callable[..., Any], known: Peer | None, arrival: Arrival, held: Held | None
    ) -> tuple[str, Held | None]:
        """The session that the arrival becomes, and its lock; None where the file system cannot lock."""
        if known is not None:
            if held is not None and held.is_in_place():
                return known.session, held
            if held is not None:
                held.release()
            if not self._is_another(execute, known, arrival):
                with suppress(BlockingIOError):  # two live processes of one session: the second is a session of its own
                    return known.session, self._lock(known.session)
        session = os.urandom(6).hex()
        return session, self._lock(session)

    @staticmethod
    def _is_another(execute: Callable[..., Any], known: Peer, arrival: Arrival) -> bool:
        """Whether the session is present in another process that holds no lock. For the others the lock decides."""
        row = execute(
            "SELECT pid, domain FROM peers WHERE session = ? AND left_at IS NULL AND presence = ?",
            (known.session, BEAT),
        ).fetchone()
        return row is not None and tuple(row) != (arrival.process.pid, arrival.domain)

    def _lock(self, session: str) -> Held | None:
        try:
            return self.presence.hold(session)
        except BlockingIOError:
            raise
        except OSError as error:
            raise BrokenSetup(
                f"no lock file can be made in {self.presence.folder} ({error.strerror})",
                hint="check that the folder is yours, and how many files may be open: ulimit -n",
            ) from error

    @staticmethod
    def _seat(execute: Callable[..., Any], peer: Peer) -> None:
        # A claimed name is no longer an alias of another session. [NAME-6]
        execute("DELETE FROM aliases WHERE alias = ?", (peer.name,))
        execute(
            f"INSERT INTO peers ({_PEER}) VALUES ({', '.join('?' * 17)})"
            " ON CONFLICT (session) DO UPDATE SET name = excluded.name, pid = excluded.pid,"
            " pid_started = excluded.pid_started, runtime = excluded.runtime, cwd = excluded.cwd,"
            " delivery = excluded.delivery, trigger = excluded.trigger, endpoint = excluded.endpoint,"
            " started_at = excluded.started_at, last_seen = excluded.last_seen,"
            " delivery_reason = excluded.delivery_reason, presence = excluded.presence, domain = excluded.domain,"
            " host_pid = excluded.host_pid, host_started = excluded.host_started, left_at = NULL",
            (
                *(peer.session, peer.name, peer.host.pid, peer.host.started, peer.launch_name),
                *(peer.process.pid, peer.process.started, peer.runtime, peer.cwd, peer.delivery),
                *(peer.trigger, peer.endpoint, peer.started_at, peer.last_seen, peer.delivery_reason),
                *(peer.presence, peer.domain),
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

    def is_present(self, session: str, pid: int) -> bool:
        """Whether `session` is present in process `pid` according to its row. Writes nothing."""
        return bool(self._read("SELECT 1 FROM peers WHERE session = ? AND pid = ? AND left_at IS NULL", session, pid))

    def beat(self, session: str, pid: int, *, now: int) -> None:
        """Record that `session` lives in process `pid`, where it cannot hold a lock. [PRES-3]"""
        with self._writing() as execute:
            execute(
                "UPDATE peers SET last_seen = ? WHERE session = ? AND pid = ? AND left_at IS NULL", (now, session, pid)
            )

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
        """The peers that are present according to their rows, sorted by name: also those that have ended unseen."""
        return peer_rows(self._read)

    def live(self) -> list[Peer]:
        """The peers that are present and have not ended, as far as can be told. Writes nothing. [PRES-4]"""
        return [peer for peer in self.present() if self._life(peer) is not Life.ENDED]

    @staticmethod
    def _present(execute: Callable[..., Any]) -> list[Peer]:
        return [_peer(row) for row in execute(_PRESENT).fetchall()]

    def reap(self, *, now: int, silent: Collection[str] = ()) -> list[Peer]:
        """End the presence of peers that have ended, forget aliases and sessions of the past. [PRES-2]

        `silent` are the sessions that this process has watched stay silent: they are ended too, unless more can be told
        about them. Returns the peers whose presence ended.
        """
        # Reading is cheap, writing is not, and most of the time there is nobody to reap.
        is_due = any(self._has_ended(peer, silent) for peer in self.present())
        if not is_due and not self._past_aliases() and not self._read(_FORGOTTEN, now - SESSIONS_KEPT_MS):
            return []
        with self._writing() as execute:
            ended = self._end_ended(execute, now, silent)
            for alias in self._past_aliases():
                execute("DELETE FROM aliases WHERE alias = ?", (alias,))
            # Deleting the row deletes its aliases too. [NAME-6]
            execute("DELETE FROM peers WHERE left_at < ?", (now - SESSIONS_KEPT_MS,))
            return ended

    def end(self, peer: Peer, *, now: int) -> bool:
        """End the presence of `peer`, if it has ended; whether that was so. [PRES-2]"""
        with self._writing() as execute:
            return any(one.session == peer.session for one in self._end_ended(execute, now))

    def _has_ended(self, peer: Peer, silent: Collection[str] = ()) -> bool:
        life = self._life(peer)
        return life is Life.ENDED or (life is Life.UNKNOWN and peer.session in silent)

    def _end_ended(self, execute: Callable[..., Any], now: int, silent: Collection[str] = ()) -> list[Peer]:
        """End them, and remove what they left. In a transaction: meanwhile nobody can claim such a session."""
        ended = [peer for peer in self._present(execute) if self._has_ended(peer, silent)]
        for peer in ended:
            execute("UPDATE peers SET left_at = ? WHERE session = ? AND left_at IS NULL", (now, peer.session))
            # A silent session can still come back: its socket and its lock file are its own.
            if self._life(peer) is Life.ENDED:
                self.on_ended(peer)
                self.presence.clear(peer.session)
        return ended

    def _past_aliases(self) -> list[str]:
        """The aliases of sessions that have left, and whose agent process has ended."""
        rows = self._read(
            "SELECT alias, host_pid, host_started, domain FROM aliases JOIN peers USING (session)"
            " WHERE left_at IS NOT NULL"
        )
        return [
            str(alias) for alias, pid, started, of in rows if self._host_life(Process(pid, started), of) is Life.ENDED
        ]
