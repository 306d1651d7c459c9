"""Queries for people: what is in the mailboxes, and what became of each message. Reads, and changes nothing.

Knows nothing about triggers, deliveries, MCP or printing. Instants are milliseconds since 1970 UTC. Every method
raises what `Database.read` raises. Implements [LEDGER-1] to [LEDGER-3], [WATCH-2].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from agentbus.core.brakes import PAUSES
from agentbus.core.config import Shared
from agentbus.core.errors import InvalidRequest
from agentbus.core.model import COLUMNS, Pause, Status, timestamp
from agentbus.core.values import dataclass

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import Any

__all__ = ["ELSEWHERE", "MESSAGE", "OLD_MS", "TEXT", "Counts", "Old", "Queries", "listed"]

# What stands in `body` when the text is in the table `bodies`: see 0007_settings.sql. A message can have these words.
ELSEWHERE = (
    "(a long message, its text is in the table bodies; a session that shows this line was started before agentbus was"
    " upgraded: restart it)"
)
# The text of a message, wherever it is, in a query that calls the table m.
TEXT = (
    f"CASE m.body WHEN '{ELSEWHERE}' THEN coalesce((SELECT text FROM bodies WHERE bodies.id = m.id), m.body)"
    " ELSE m.body END"
)
# The thread of the message m; NULL if it began one. That of a reply from before schema 8 is the first in the chain of
# answered messages, as far as these are kept. UNION, not UNION ALL: a message that answers a later one, or itself, must
# end the chain and not this process. min: what is answered is older. [THREAD-1]
THREAD = (
    "coalesce(m.thread, CASE WHEN m.reply_to IS NOT NULL THEN (WITH RECURSIVE up(id) AS (VALUES (m.reply_to) UNION"
    " SELECT coalesce(o.thread, o.reply_to) FROM up JOIN messages o USING (id) WHERE o.reply_to IS NOT NULL)"
    " SELECT min(id) FROM up) END)"
)
_WRITTEN = {"body": TEXT, "thread": THREAD}
# COLUMNS, for such a query.
MESSAGE = ", ".join(_WRITTEN.get(column, f"m.{column}") for column in COLUMNS)
# Rows per read of a long history: enough that the reads do not count, few enough for any machine's memory.
_PAGE = 500
# Mail that waits for longer is old: who starts after a day away does not want it as if it were new. [OLD-1]
OLD_MS = 86_400_000
# What is said about it names so many senders.
_MOST_SENDERS = 5
# `was_peer` looks at the senders and recipients of this many messages.
_LATELY = 10_000


@dataclass(frozen=True, slots=True)
class Counts:
    """What one mailbox holds. `delivered`: not known to be read. `oldest_pending_at`: None if none is pending."""

    mailbox: str
    pending: int
    delivered: int
    read: int
    oldest_pending_at: int | None


@dataclass(frozen=True, slots=True)
class Old:
    """Old mail of one mailbox: how many messages from whom, the most first; since when, and the highest id."""

    senders: dict[str, int]
    since: int | None
    newest_id: int

    @property
    def count(self) -> int:
        """How many messages there are."""
        return sum(self.senders.values())

    @property
    def origin(self) -> str:
        """From whom they are, and since when, in a clause."""
        shown = [f"{name} ({count:,})" for name, count in self.senders.items()][:_MOST_SENDERS]
        more = f" and {len(self.senders) - len(shown)} others" if len(self.senders) > len(shown) else ""
        return f"from {', '.join(shown)}{more}, since {timestamp(self.since or 0)}"


def listed(ids: Iterable[int]) -> str:
    """`ids` as one value of a query: `id IN (SELECT value FROM json_each(?))`."""
    return f"[{','.join(map(str, ids))}]"


class Queries:
    """The messages of one bus. `read` runs a query and returns all its rows."""

    def __init__(self, read: Callable[..., list[Any]]) -> None:
        self._read = read

    def setting(self, of: Shared) -> int:
        """What holds for everybody on the bus. [CONF-5]"""
        rows = self._read("SELECT value FROM settings WHERE key = ?", of.key)
        # Whatever was written there by hand: a retention of 0 would remove all history.
        return min(max(int(rows[0][0]), of.low), of.high) if rows else of.default

    def status(self, row_id: int) -> Status:
        """A message. Raises InvalidRequest if its id was never used, or if it has been pruned. [LEDGER-3]"""
        found = self.find(row_id)
        if found is None:
            raise InvalidRequest(f"there is no message #{row_id}", hint="it was never sent, or it has been pruned")
        return found

    def find(self, row_id: int) -> Status | None:
        """A message; None if there is no message with that id."""
        rows = self._read(f"SELECT {MESSAGE} FROM messages m WHERE id = ?", row_id)
        return Status.from_row(rows[0]) if rows else None

    def session(self, session: str) -> tuple[str, str, str] | None:
        """The last name, the runtime and the folder of a session; None once it is forgotten. [LEDGER-3]"""
        rows = self._read("SELECT name, runtime, cwd FROM peers WHERE session = ?", session)
        return tuple(map(str, rows[0])) if rows else None  # type: ignore[return-value]

    def waiting(self) -> dict[str, int]:
        """How many messages are pending, by mailbox; mailboxes with none are left out."""
        rows = self._read(
            "SELECT recipient, count(*) FROM messages WHERE delivered_at IS NULL GROUP BY recipient ORDER BY recipient"
        )
        return {str(name): int(count) for name, count in rows}

    def inbox(self, mailbox: str, limit: int) -> list[Status]:
        """The oldest `limit` messages to `mailbox` that are not known to be read, ascending. [LEDGER-1]"""
        rows = self._read(
            f"SELECT {MESSAGE} FROM messages m WHERE recipient = ? AND read_at IS NULL ORDER BY id LIMIT ?",
            mailbox,
            limit,
        )
        return [Status.from_row(row) for row in rows]

    def alias(self, name: str) -> str | None:
        """The present name of the session that was called `name` before; None if no such session is present."""
        rows = self._read(
            "SELECT p.name FROM aliases a JOIN peers p USING (session) WHERE a.alias = ? AND p.left_at IS NULL", name
        )
        return str(rows[0][0]) if rows else None

    def groups(self) -> dict[str, list[str]]:
        """The members of each group, by name."""
        found: dict[str, list[str]] = {}
        for group, member in self._read("SELECT group_name, member FROM group_members ORDER BY group_name, member"):
            found.setdefault(str(group), []).append(str(member))
        return found

    def groups_of(self) -> dict[str, list[str]]:
        """The groups of each member, by name."""
        found: dict[str, list[str]] = {}
        for group, members in self.groups().items():
            for member in members:
                found.setdefault(member, []).append(group)
        return found

    def pauses(self, now: int) -> dict[str, Pause]:
        """The pauses that hold at the instant `now`, by the name of the session. [BRAKE-3]"""
        return {str(row[0]): Pause(*row) for row in self._read(f"{PAUSES} ORDER BY name", now)}

    def newest_first(self, *, peer: str | None = None, since: int = 0, thread: int | None = None) -> Iterator[Status]:
        """Every message sent at or after `since`, to or from `peer`, a name or a group, newest first. [LEDGER-2]

        With a `thread`, only those in the thread of the message of that id. [THREAD-3]
        """
        if thread is not None:
            found = self.find(thread)
            for one in self.thread(thread if found is None else found.root):
                if one.sent_at >= since and peer in (None, one.sender, one.recipient, one.to_group):
                    yield one
            return
        below = 2**63 - 1
        while True:
            rows = self._read(
                f"SELECT {MESSAGE} FROM messages m WHERE id < ?1 AND sent_at >= ?2"
                " AND (?3 IS NULL OR sender = ?3 OR recipient = ?3 OR to_group = ?3) ORDER BY id DESC LIMIT ?4",
                *(below, since, peer, _PAGE),
            )
            yield from (Status.from_row(row) for row in rows)
            if len(rows) < _PAGE:
                return
            below = rows[-1][0]

    def thread(self, root: int, limit: int = -1) -> Iterator[Status]:
        """The messages of the thread that the message `root` began, newest first; `root` itself can be pruned.

        No more than `limit` of them, if that is not negative.
        """
        # The replies from before schema 8 are in no index: reading the ids of all rows takes 0.1 s for 1,000,000.
        rows = self._read(
            f"SELECT {MESSAGE} FROM messages m WHERE m.id = ?1 OR m.thread = ?1 OR m.id IN"
            " (WITH RECURSIVE old(id, reply_to) AS MATERIALIZED (SELECT id, reply_to FROM messages"
            " WHERE thread IS NULL AND reply_to IS NOT NULL), down(id) AS (VALUES (?1) UNION"
            " SELECT old.id FROM down JOIN old ON old.reply_to = down.id) SELECT id FROM down)"
            " ORDER BY m.id DESC LIMIT ?2",
            *(root, limit),
        )
        return (Status.from_row(row) for row in rows)

    def answer(self, question: int) -> Status | None:
        """The first message in the thread that `question` began which is for whom asked it: its answer. [ASK-1]"""
        asker = self._read(
            "SELECT sender, (SELECT name FROM peers WHERE session = q.sender_session), sender_session"
            " FROM messages q WHERE id = ?",
            question,
        )
        if not asker:
            return None
        # Under the name that it asked by, or that its session has now, or had when it took the answer. A program of
        # schema 7 stores no thread: its answer is found while it is pending.
        rows = self._read(
            "SELECT min(id) FROM (SELECT id FROM messages WHERE thread = ?1"
            " AND (recipient IN (?2, ?3) OR delivered_to = ?4) UNION ALL SELECT id FROM messages"
            " WHERE recipient IN (?2, ?3) AND delivered_at IS NULL AND id > ?1 AND reply_to = ?1)",
            *(question, *asker[0]),
        )
        return None if rows[0][0] is None else self.find(int(rows[0][0]))

    def prunable(self, *, above: int, before: int, peer: str | None, with_pending: bool, limit: int) -> list[int]:
        """The lowest `limit` ids above `above` of messages that were delivered before the instant `before`. [KEEP-1]

        Only those to or from `peer`, a name or a group, if it is given. `with_pending`: also those that are pending,
        sent before it.
        """
        rows = self._read(
            "SELECT id FROM messages WHERE id > ?1 AND coalesce(delivered_at, sent_at) < ?2"
            " AND (delivered_at IS NOT NULL OR ?3) AND (?4 IS NULL OR ?4 IN (sender, recipient, to_group))"
            " ORDER BY id LIMIT ?5",
            *(above, before, with_pending, peer, limit),
        )
        return [int(row[0]) for row in rows]

    def counts(self) -> list[Counts]:
        """What each mailbox holds, by name. Reads every row: 0.1 s for some 100,000."""
        rows = self._read(
            "SELECT recipient, count(*) FILTER (WHERE delivered_at IS NULL),"
            " count(*) FILTER (WHERE delivered_at IS NOT NULL AND read_at IS NULL), count(read_at),"
            " min(sent_at) FILTER (WHERE delivered_at IS NULL)"
            " FROM messages GROUP BY recipient ORDER BY recipient"
        )
        return [Counts(*row) for row in rows]

    def old(self, mailbox: str, before: int, session: str = "") -> Old:
        """The messages pending in `mailbox` that were sent before the instant `before`. [OLD-1]

        Without those that are kept from `session`. [NAME-12]
        """
        rows = self._read(
            "SELECT sender, count(*), min(sent_at), max(id) FROM messages WHERE recipient = ? AND delivered_at IS NULL"
            " AND sent_at < ? AND kept_from IS NOT ? GROUP BY sender ORDER BY count(*) DESC, sender",
            mailbox,
            before,
            session,
        )
        return Old(
            senders={str(row[0]): int(row[1]) for row in rows},
            since=min((int(row[2]) for row in rows), default=None),
            newest_id=max((int(row[3]) for row in rows), default=0),
        )

    def oldest_pending(self, mailbox: str, above: int, session: str) -> int | None:
        """When the oldest pending message for `session` in `mailbox`, with an id above `above`, was sent; or None."""
        rows = self._read(
            "SELECT min(sent_at) FROM messages WHERE recipient = ? AND delivered_at IS NULL AND id > ?"
            " AND kept_from IS NOT ?",
            *(mailbox, above, session),
        )
        return None if rows[0][0] is None else int(rows[0][0])

    def kept(self, mailbox: str, session: str) -> int:
        """How many messages wait in `mailbox` that are kept from `session`, which has that name. [NAME-12]"""
        rows = self._read(
            "SELECT count(*) FROM messages WHERE recipient = ? AND delivered_at IS NULL AND kept_from = ?",
            *(mailbox, session),
        )
        return int(rows[0][0])

    def earlier_names(self, messages: Collection[Status]) -> dict[int, list[str]]:
        """What the senders of `messages` were called before they sent these, by id; only those that had other names.

        [NAME-13]
        """
        sessions = {one.sender_session for one in messages if one.sender_session is not None}
        rows = self._read(
            "SELECT session, was, newest_id FROM renames WHERE session IN (SELECT value FROM json_each(?))"
            " ORDER BY rowid",
            "[" + ",".join(f'"{one}"' for one in sessions) + "]",
        )
        found: dict[int, list[str]] = {}
        for one in messages:
            # Each name once, in the order of their first use.
            was = dict.fromkeys(
                str(name)
                for session, name, newest_id in rows
                if session == one.sender_session and newest_id < one.id and name != one.sender
            )
            if was:
                found[one.id] = list(was)
        return found

    def last_delivered(self, session: str) -> int | None:
        """When a message was last delivered to `session`; None if there was none, or if it has been pruned."""
        rows = self._read("SELECT max(delivered_at) FROM messages WHERE delivered_to = ?", session)
        return None if rows[0][0] is None else int(rows[0][0])

    def was_peer(self, name: str) -> bool:
        """Whether `name` has sent or got a message lately: one of the newest 10,000."""
        # Not worth an index: this is only asked about names that nobody has, and takes 1 ms at most.
        rows = self._read(
            "SELECT 1 FROM messages WHERE id > (SELECT coalesce(max(id), 0) FROM messages) - ?1"
            " AND (sender = ?2 OR (recipient = ?2 AND delivered_at IS NOT NULL)) LIMIT 1",
            *(_LATELY, name),
        )
        return bool(rows)

    # -- what has changed ----------------------------------------------------------------------------------

    def version(self) -> int:
        """A number that changes when another connection has committed (SQLite's data_version)."""
        return int(self._read("PRAGMA data_version")[0][0])

    def newest_id(self) -> int:
        """The highest id in use; 0 when there is no message."""
        return int(self._read("SELECT coalesce(max(id), 0) FROM messages")[0][0])

    def unsettled(self, limit: int) -> list[Status]:
        """The newest `limit` messages that are not known to be read, ascending. [WATCH-2]"""
        rows = self._read(
            f"SELECT {MESSAGE} FROM messages m WHERE read_at IS NULL ORDER BY id DESC LIMIT ?",
            limit,
        )
        return [Status.from_row(row) for row in reversed(rows)]

    def after(self, row_id: int, limit: int) -> list[Status]:
        """The oldest `limit` messages with a higher id than `row_id`, ascending. [WATCH-2]"""
        rows = self._read(f"SELECT {MESSAGE} FROM messages m WHERE id > ? ORDER BY id LIMIT ?", row_id, limit)
        return [Status.from_row(row) for row in rows]

    def among(self, ids: Collection[int], condition: str = "1", *values: str) -> list[Status]:
        """The messages with these ids that still exist, ascending. [WATCH-2]

        `condition` is one on the row m, as in `page`.
        """
        rows = self._read(
            f"SELECT {MESSAGE} FROM messages m WHERE id IN (SELECT value FROM json_each(?)) AND {condition}"
            " ORDER BY id",
            *(listed(ids), *values),
        )
        return [Status.from_row(row) for row in rows]

    # -- a page of the history -------------------------------------------------------------------------------

    def page(
        self, below: int, limit: int, span: int, condition: str = "1", *values: str
    ) -> tuple[list[Status], int | None]:
        """The newest `limit` messages with ids below `below`, ascending, and below which id to go on; None at the end.

        `condition` is one on the row m, with a `?` for each of `values`. At most `span` ids are looked at, so that the
        time of a call is bounded, however few messages meet it: perhaps none is returned, and there are more.
        """
        floor = max(0, below - span)
        rows = self._read(
            f"SELECT {MESSAGE} FROM messages m WHERE id < ? AND id >= ? AND {condition} ORDER BY id DESC LIMIT ?",
            *(below, floor, *values, limit),
        )
        found = [Status.from_row(row) for row in reversed(rows)]
        if len(found) == limit:
            return found, found[0].id
        oldest = self._read("SELECT min(id) FROM messages")[0][0]
        return found, None if oldest is None or floor <= oldest else floor

    def newest_of(self, root: int, limit: int) -> list[Status]:
        """The newest `limit` messages of the thread that `root` began, ascending, by the index alone. [THREAD-1]"""
        rows = self._read(
            f"SELECT {MESSAGE} FROM messages m WHERE m.id = ?1 OR m.thread = ?1 ORDER BY m.id DESC LIMIT ?2",
            root,
            limit,
        )
        return [Status.from_row(row) for row in reversed(rows)]

    def unopened(self, mailbox: str, limit: int, *, above: int = 0) -> list[int]:
        """The ids of the oldest `limit` messages to `mailbox`, above this id, that are not known to be read, ascending.

        By the indexes: those that are pending, and those that a session of that name took.
        """
        rows = self._read(
            "SELECT id FROM messages WHERE recipient = ?1 AND delivered_at IS NULL AND id > ?3 UNION ALL"
            " SELECT id FROM messages WHERE delivered_to IN (SELECT session FROM peers WHERE name = ?1)"
            " AND delivered_at IS NOT NULL AND read_at IS NULL AND recipient = ?1 AND id > ?3 ORDER BY 1 LIMIT ?2",
            *(mailbox, limit, above),
        )
        return [int(row[0]) for row in rows]
