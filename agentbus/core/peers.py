"""The peers of a bus: which sessions are present, under which names, and which have ended.

Synchronous. A method commits all of its changes or none. Instants are milliseconds since 1970 UTC. Every method raises
Busy when another process holds the database for longer than the connection waits, and BrokenSetup or TryAgain as in
`database.explain`. Implements [NAME-4] to [NAME-9], [NAME-11] to [NAME-13], [PRES-2] to [PRES-4].
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from agentbus.core import brakes, database, groups
from agentbus.core.config import UNKNOWN_FOLDER, unwritable
from agentbus.core.errors import BrokenSetup, Refused
from agentbus.core.model import Arrival, Peer, Renamed, storable
from agentbus.core.names import LINK_NAME, is_kept, numbered_name
from agentbus.core.presence import BEAT, LOCK, Held, Presence
from agentbus.core.process import IS_SLOW, Life, Process, domain, one_look
from agentbus.core.process import life as process_life
from agentbus.core.queries import Queries
from agentbus.core.text import one_line

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any, Literal

    from agentbus.core.machines import Machines

__all__ = [
    "LEFT_AT",
    "MOST_LOOKED_AFTER",
    "PEER",
    "SESSIONS_KEPT_MS",
    "Peers",
    "judge",
    "peer_of",
    "peer_rows",
    "remember",
]

# How long a session that has left is remembered: 30 days. Who a sender was can be asked for as long. [LEDGER-3]
SESSIONS_KEPT_MS = 30 * 86_400_000

# After how many others a session looks with each heartbeat: those that follow it by name. If each looked after all, a
# hundred idle sessions would take 3 % of a core for that. One would do, as all that have ended are reaped together.
MOST_LOOKED_AFTER = 8

PEER = (
    "session, name, host_pid, host_started, launch_name, pid, pid_started,"
    " runtime, cwd, delivery, trigger, endpoint, started_at, last_seen, delivery_reason, presence, domain,"
    " status, status_at"
)
LEFT_AT = 19  # the column after these, where a query adds left_at
_PRESENT = f"SELECT {PEER} FROM peers WHERE left_at IS NULL ORDER BY name"
# Whether there is a session to forget.
_FORGOTTEN = "SELECT 1 FROM peers WHERE left_at < ? LIMIT 1"
# Note the name that a session had until now, and after which message it had another. [NAME-13]
_NOTE_NAME = (
    "INSERT INTO renames (session, was, newest_id)"
    " SELECT session, name, (SELECT coalesce(max(id), 0) FROM messages) FROM peers WHERE session = ? AND name <> ?"
)
# The conversation that a session is now. [NAME-8]
_OF_SESSION = " WHERE conversation = (SELECT conversation FROM peers WHERE session = ?)"


def _base(name: str, launch_name: str) -> str:
    """`launch_name`, if `name` is that with a number behind it, else `name`."""
    number = name.rpartition("-")[2]
    is_numbered = number.isdecimal() and name == numbered_name(launch_name, int(number))
    return launch_name if is_numbered else name


def remember(execute: Callable[..., Any], conversation: str, name: str, launch_name: str, now: int) -> None:
    """Note with which name a conversation is here. [NAME-8]"""
    if conversation:
        execute(
            "INSERT INTO conversations (conversation, name, launch_name, seen_at) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (conversation) DO UPDATE SET name = excluded.name, launch_name = excluded.launch_name,"
            " seen_at = excluded.seen_at",
            (conversation, name, launch_name, now),
        )


def peer_of(row: Sequence[Any]) -> Peer:
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
        status=row[17],
        status_at=row[18],
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
    return [peer_of(row) for row in read(_PRESENT)]


class Peers:
    """The peers of one bus, over one connection, used from one thread.

    `life` judges a peer, `host_life` an agent process of a pid domain; by default as SPEC says.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        busy_ms: int,
        sync: str = "normal",
        on_wal: Callable[[int], None] | None = None,
        life: Callable[[Peer], Life] | None = None,
        host_life: Callable[[Process, str], Life] | None = None,
    ) -> None:
        self._database = database.Database(path, busy_ms=busy_ms, sync=sync, on_wal=on_wal)
        self._read = self._database.read
        self._writing = self._database.writing
        self.mark = self._database.mark
        self.queries = Queries(self._read)
        self.presence = Presence(os.path.dirname(path))
        self._life = life or self._judge
        self._host_life = host_life or self._judge_host
        # The pid domain of this process; read when it is first needed, which a send never does.
        self._here: str | None = None
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

    @contextmanager
    def _judging(self) -> Iterator[Callable[..., Any]]:
        """A transaction that judges the peers. Where that takes a `ps`, it has run before the transaction begins."""
        with one_look():
            if IS_SLOW:
                self.live()
            with self._writing() as execute:
                yield execute

    def life(self, peer: Peer) -> Life:
        """What can be told about `peer`. Changes nothing. [PRES-1]"""
        return self._life(peer)

    @property
    def path(self) -> Path:
        """The database file."""
        from pathlib import Path

        return Path(self._database.path)

    def is_replaced(self) -> bool:
        """Whether the opened file is no longer the one at `path`: it was deleted or replaced."""
        return self._database.is_replaced()

    def reopen(self) -> None:
        """Open the file that is at `path` now, creating it as needed. Raises what the first opening raises."""
        self._database.reopen()

    def close(self) -> None:
        """Close the connection. Closing the last one merges the WAL into the database."""
        self._database.close()

    def identity(self) -> str:
        """Which bus this is: 16 hex digits, in the database since it was made. [STORE-7]"""
        return str(self._read("SELECT id FROM bus")[0][0])

    @property
    def generation(self) -> int:
        """How often another file was turned to. It tells a session that it has to join again. [STORE-6]"""
        return self._database.generation

    def forget_conversations(self, before: int) -> None:
        """Forget the conversations that were last here before the instant `before`. [NAME-8]"""
        past = (
            " FROM conversations WHERE seen_at < ? AND conversation NOT IN"
            " (SELECT conversation FROM peers WHERE left_at IS NULL)"
        )
        # Reading is cheap, writing is not, and most of the time there is nothing to forget.
        if self._read(f"SELECT 1{past} LIMIT 1", before):
            with self._writing() as execute:
                execute(f"DELETE{past}", (before,))

    def claim(
        self,
        arrival: Arrival,
        *,
        now: int,
        endpoint: Callable[[str], str],
        join_crowd: bool,
        again: Peer | None = None,
        held: Held | None = None,
    ) -> tuple[Peer, Peer | None, Held | None, str] | None:
        """Make `arrival` a present peer, in one transaction. [NAME-4]

        Returns the new peer, the peer that holds the wished-for name (None if that name was free), the lock of the
        session (None where there are no locks), and a note on the name for its reader, or "". If a session with the
        same host and launch name has ended, the arrival takes over this session, with its name and its aliases. If it
        still lives, nothing changes and the result is None, unless `join_crowd` is true: then the arrival becomes one
        more session. `endpoint` gives the wake address of a session. `again` is for a session that was here before, and
        `held` is its lock: it comes back as that session, unless another live process is that session by now.

        Raises BrokenSetup when no lock file can be made.
        """
        taken_lock: Held | None = None
        try:
            with self._judging() as execute:
                self._end_ended(execute, now)
                known, is_there = (again, False) if again is not None else self._predecessor(execute, arrival)
                if is_there and not join_crowd:
                    return None
                session, lock = self._hold(execute, known, arrival, held)
                taken_lock = lock if lock is not held else None
                # What it took before such names were kept is not its own any more. [NAME-11]
                is_back = known is not None and not is_kept(known.name)
                wished, former, note = (known.name, "", "") if known and is_back else self._wish(execute, arrival)
                # A row of this very session is its own, also in a file that was restored.
                taken = {peer.name: peer for peer in self._present(execute) if peer.session != session}
                # A name that is its own, or was asked for, is taken with the mail that waits there. [NAME-9]
                name, number, is_its = wished, 1, is_back or arrival.is_asked or wished == former
                where = "" if is_its or name in taken else self._waits_for(execute, name, arrival)
                if where:
                    note = (
                        f'mail waits under "{name}" for a session of {one_line(where)}; '
                        f"a start with AGENTBUS_NAME={name} takes both, if they are yours"
                    )
                while name in taken or where or (number > 1 and is_kept(name)):
                    number += 1
                    name = numbered_name(_base(wished, arrival.launch_name), number)
                    where = "" if known or name == former else self._waits_for(execute, name, arrival)
                if wished == former and former in taken:
                    there = one_line(taken[former].cwd)
                    note = f'this conversation was "{former}" before, as the session in {there} is now'
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
                    status=known.status if known else "",
                    status_at=known.status_at if known else None,
                )
                self._seat(execute, peer)
                self._converse(execute, peer, arrival)
        except BaseException:
            if taken_lock is not None:
                taken_lock.release()
            raise
        return peer, taken.get(wished), lock, note

    @staticmethod
    def _wish(execute: Callable[..., Any], arrival: Arrival) -> tuple[str, str, str]:
        """The name that a newcomer wishes for, the name that its conversation had before or "", and a note. [NAME-8]"""
        row = execute(
            "SELECT name, launch_name FROM conversations WHERE conversation = ?", (arrival.conversation,)
        ).fetchone()
        if not row or not arrival.conversation:
            return arrival.launch_name, "", ""
        former, launched = map(str, row)
        if is_kept(former):
            return arrival.launch_name, "", ""
        if arrival.is_asked and arrival.launch_name not in (launched, former):
            # It is asked for under another name than the last time: that is what is wanted now.
            return (
                arrival.launch_name,
                former,
                f'this conversation was "{former}" before; set_name takes that name back',
            )
        return former, former, ""

    @staticmethod
    def _waits_for(execute: Callable[..., Any], name: str, arrival: Arrival) -> str:
        """The other folder whose session the mail under `name` waits for; "" if there is none. [NAME-9]"""
        if not execute("SELECT 1 FROM messages WHERE recipient = ? AND delivered_at IS NULL", (name,)).fetchone():
            return ""
        row = execute(
            "SELECT CASE folder WHEN '' THEN cwd ELSE folder END FROM peers WHERE name = ?1 AND left_at IS NOT NULL"
            # It does not wait for a session that it is kept from. [NAME-12]
            " AND session NOT IN (SELECT kept_from FROM messages WHERE kept_from IS NOT NULL AND recipient = ?1)"
            " ORDER BY left_at DESC LIMIT 1",
            (name,),
        ).fetchone()
        own = arrival.folder or arrival.cwd
        # Mail for a name that no session had waits for whoever comes first. Two folders that cannot be told are two.
        return str(row[0]) if row and (row[0] != own or own == UNKNOWN_FOLDER) else ""

    @staticmethod
    def _converse(execute: Callable[..., Any], peer: Peer, arrival: Arrival) -> None:
        execute(
            "UPDATE peers SET conversation = ?, folder = ? WHERE session = ?",
            (arrival.conversation, arrival.folder, peer.session),
        )
        if arrival.conversation and not (arrival.is_asked and arrival.launch_name == peer.name):
            # What was kept from this conversation is kept from it still, unless the name was asked for. [NAME-12]
            execute(
                "UPDATE messages SET kept_from = ?1 WHERE kept_from IN"
                " (SELECT session FROM peers WHERE conversation = ?2 AND session <> ?1)",
                (peer.session, arrival.conversation),
            )
        remember(execute, arrival.conversation, peer.name, arrival.launch_name, peer.last_seen)

    def turn_to(self, session: str, pid: int, conversation: str, *, now: int) -> None:
        """Record that `session` is another conversation now. It keeps its name, and so does the former one. [NAME-8]"""
        with self._writing() as execute:
            row = execute(
                "SELECT name, launch_name, conversation FROM peers WHERE session = ? AND pid = ? AND left_at IS NULL",
                (session, pid),
            ).fetchone()
            if row:
                execute("UPDATE conversations SET seen_at = ? WHERE conversation = ?", (now, row[2]))
                execute("UPDATE peers SET conversation = ? WHERE session = ?", (conversation, session))
                # One that is remembered keeps its own name: `claude -p --continue` says only late which it is.
                if not execute("SELECT 1 FROM conversations WHERE conversation = ?", (conversation,)).fetchone():
                    remember(execute, conversation, row[0], row[1], now)

    def _predecessor(self, execute: Callable[..., Any], arrival: Arrival) -> tuple[Peer | None, bool]:
        """The ended session that `arrival` takes over, or None; and, if None, whether one of its host still lives."""
        # Where the agent process cannot be seen, nobody knows whose predecessor a session is. [NAME-7]
        if arrival.host.pid <= 0:
            return None, False
        rows = execute(
            f"SELECT {PEER}, left_at FROM peers WHERE host_pid = ? AND host_started = ? AND launch_name = ?"
            # Its own conversation first: under a supervisor, several sessions have one agent process. [NAME-8]
            " AND domain = ? ORDER BY conversation = '' OR conversation <> ?, started_at, session",
            (arrival.host.pid, arrival.host.started, arrival.launch_name, arrival.domain, arrival.conversation),
        ).fetchall()
        left = [peer_of(row) for row in rows if row[LEFT_AT] is not None]
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
            is_short = error.errno in (errno.EMFILE, errno.ENFILE)
            path = self.presence.folder / session
            raise BrokenSetup(
                f"no lock file can be made in {self.presence.folder} ({error.strerror})",
                hint="see how many files may be open: ulimit -n" if is_short else unwritable(path, error),
            ) from error

    @staticmethod
    def _seat(execute: Callable[..., Any], peer: Peer) -> None:
        # A claimed name is no longer an alias of another session. [NAME-6]
        execute("DELETE FROM aliases WHERE alias = ?", (peer.name,))
        execute(_NOTE_NAME, (peer.session, peer.name))
        execute(
            f"INSERT INTO peers ({PEER}) VALUES ({', '.join('?' * LEFT_AT)})"
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
                *(peer.presence, peer.domain, peer.status, peer.status_at),
            ),
        )

    def rename(self, session: str, pid: int, name: str) -> Renamed:
        """Give `session` another name and move its pending messages to it. [NAME-5]

        Mail that waits under `name` already is left alone, unless it is of this conversation. [NAME-12]

        Raises Refused when a present peer holds `name`, or when `session` is not present in process `pid`.
        """
        with self._writing() as execute:
            row = execute(
                "SELECT name, conversation FROM peers WHERE session = ? AND pid = ? AND left_at IS NULL", (session, pid)
            ).fetchone()
            if not row:
                raise Refused("this session is not on the bus just now", hint="try again in 15 seconds")
            old, conversation = map(str, row)
            if old == name:
                return Renamed(name, old)
            row = execute(f"SELECT {PEER} FROM peers WHERE name = ? AND left_at IS NULL", (name,)).fetchone()
            if row:
                raise Refused(
                    f'the name "{name}" is held by the session in {one_line(str(row[8]))} (process {row[5]})',
                    hint="choose another, list_peers shows those in use",
                )
            kept = self._keep(execute, session, conversation, name)
            execute(
                "UPDATE messages SET recipient = ? WHERE recipient = ? AND delivered_at IS NULL AND kept_from IS NOT ?",
                (name, old, session),
            )
            execute(_NOTE_NAME, (session, name))
            execute("DELETE FROM aliases WHERE alias = ?", (name,))
            execute("INSERT OR REPLACE INTO aliases (alias, session) VALUES (?, ?)", (old, session))
            execute("UPDATE peers SET name = ? WHERE session = ?", (name, session))
            execute(f"UPDATE conversations SET name = ?{_OF_SESSION}", (name, session))
            groups.carry(execute, old, name)
            brakes.carry(execute, old, name)
        return Renamed(name, old, kept)

    @staticmethod
    def _keep(execute: Callable[..., Any], session: str, conversation: str, name: str) -> int:
        """Keep what waits under `name` from `session`, and what an earlier session of it took and may not have read.

        Not if this conversation had that name last. Returns how many messages wait that are kept. [NAME-12]
        """
        last = execute(
            "SELECT conversation FROM peers WHERE name = ? AND left_at IS NOT NULL ORDER BY left_at DESC LIMIT 1",
            (name,),
        ).fetchone()
        if not conversation or last != (conversation,):
            execute(
                "UPDATE messages SET kept_from = ?1 WHERE (recipient = ?2 AND delivered_at IS NULL)"
                " OR (delivered_at IS NOT NULL AND read_at IS NULL AND delivered_to IN"
                " (SELECT session FROM peers WHERE name = ?2 AND left_at IS NOT NULL AND session <> ?1))",
                (session, name),
            )
        counted = "SELECT count(*) FROM messages WHERE recipient = ? AND delivered_at IS NULL AND kept_from = ?"
        return int(execute(counted, (name, session)).fetchone()[0])

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

    def set_status(self, session: str, status: str, at: int | None) -> None:
        """Record what `session` says that it is doing, and since when; empty and None if it says nothing. [STATUS-1]"""
        with self._writing() as execute:
            execute("UPDATE peers SET status = ?, status_at = ? WHERE session = ?", (status, at, session))

    def set_delivery(self, session: str, delivery: str, reason: str) -> None:
        """Record how `session` receives messages from now on, and why."""
        with self._writing() as execute:
            execute(
                "UPDATE peers SET delivery = ?, delivery_reason = ? WHERE session = ?",
                (delivery, storable(reason), session),
            )

    def leave(self, session: str, pid: int, *, now: int) -> None:
        """End the presence of `session` in process `pid`. The next server of its host gets the name back."""
        with self._writing() as execute:
            execute(
                "UPDATE peers SET left_at = ? WHERE session = ? AND pid = ? AND left_at IS NULL",
                (now, session, pid),
            )
            execute(f"UPDATE conversations SET seen_at = ?{_OF_SESSION}", (now, session))
            groups.note_seen(execute, session, now)

    def present(self) -> list[Peer]:
        """The peers that are present according to their rows, sorted by name: also those that have ended unseen."""
        return peer_rows(self._read)

    def seated(self, column: Literal["session", "name"], value: str) -> Peer | None:
        """The peer that is present according to its row, and has that session or name."""
        rows = self._read(f"SELECT {PEER} FROM peers WHERE {column} = ? AND left_at IS NULL", value)
        return peer_of(rows[0]) if rows else None

    def of_conversation(self, conversation: str) -> list[Peer]:
        """The peers that are present according to their rows, and are this conversation of a client. [NAME-8]"""
        rows = self._read(f"SELECT {PEER} FROM peers WHERE left_at IS NULL AND conversation = ?", conversation)
        return [peer_of(row) for row in rows] if conversation else []

    def live(self) -> list[Peer]:
        """The peers that are present and have not ended, as far as can be told. Writes nothing. [PRES-4]

        Without the link, which receives nothing that is for itself.
        """
        with one_look():
            return [peer for peer in self.present() if peer.name != LINK_NAME and self._life(peer) is not Life.ENDED]

    def link(self) -> Peer | None:
        """The link of this home, if it runs. [LINK-1]"""
        found = self.seated("name", LINK_NAME)
        return None if found is None or self._life(found) is Life.ENDED else found

    def machine(self) -> str:
        """What this machine is called on the others; "" if this home has no link. [ADDR-1]"""
        rows = self._read("SELECT value FROM link WHERE key = 'machine'")
        return str(rows[0][0]) if rows else ""

    @property
    def machines(self) -> Machines:
        """What is known about other machines."""
        from agentbus.core.machines import Machines  # with json, which only an address with a machine needs

        return Machines(self._read)

    @staticmethod
    def _present(execute: Callable[..., Any]) -> list[Peer]:
        return [peer_of(row) for row in execute(_PRESENT).fetchall()]

    def following(self, name: str) -> list[Peer]:
        """The few peers that follow `name`, after the last the first: looked after by it. [PRES-2]"""
        rows = self._read(
            f"SELECT {PEER} FROM peers WHERE left_at IS NULL AND name <> ?1 ORDER BY name < ?1, name LIMIT ?2",
            *(name, MOST_LOOKED_AFTER),
        )
        return [peer_of(row) for row in rows]

    def doubtful(self, peers: Iterable[Peer]) -> list[Peer]:
        """Those of `peers` that are not known to live. [PRES-1]"""
        with one_look():
            return [peer for peer in peers if self._life(peer) is not Life.LIVES]

    def reap(self, *, now: int, silent: Collection[str] = (), among: Sequence[Peer] | None = None) -> list[Peer]:
        """End the presence of peers that have ended, forget aliases and sessions of the past. [PRES-2]

        `silent` are the sessions that this process has watched stay silent: they are ended too, unless more can be told
        about them. If none of `among` has ended, nobody else is looked at; by default all are. Returns the peers whose
        presence ended.
        """
        with one_look():
            # Reading is cheap, writing is not, and most of the time there is nobody to reap.
            looked_at = self.present() if among is None else among
            is_due = any(self._has_ended(peer, silent) for peer in looked_at)
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
        with self._judging() as execute:
            return any(one.session == peer.session for one in self._end_ended(execute, now))

    def _has_ended(self, peer: Peer, silent: Collection[str] = ()) -> bool:
        life = self._life(peer)
        return life is Life.ENDED or (life is Life.UNKNOWN and peer.session in silent)

    def _end_ended(self, execute: Callable[..., Any], now: int, silent: Collection[str] = ()) -> list[Peer]:
        """End them, and remove what they left. In a transaction: meanwhile nobody can claim such a session."""
        ended = [peer for peer in self._present(execute) if self._has_ended(peer, silent)]
        for peer in ended:
            execute("UPDATE peers SET left_at = ? WHERE session = ? AND left_at IS NULL", (now, peer.session))
            execute(f"UPDATE conversations SET seen_at = ?{_OF_SESSION}", (now, peer.session))
            groups.note_seen(execute, peer.session, now)
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
