"""The brakes: which sessions a person has paused, and how much a session has sent lately.

Runs inside the transactions of its callers. Nothing here is for a session to use: it only meets the result. Implements
[BRAKE-1] to [BRAKE-5].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agentbus.core.errors import Refused
from agentbus.core.model import Pause

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import Any

__all__ = ["HOUR_MS", "PAUSED", "PAUSES", "carry", "check", "forget", "pause", "resume", "sent_lately"]

# The time for which the slow guard counts. [BRAKE-4]
HOUR_MS = 3_600_000
# The pauses that hold at an instant. There are few rows, mostly none: no index is worth its writes.
PAUSES = "SELECT name, paused_by, paused_at, until FROM pauses WHERE (until IS NULL OR until > ?)"
# The same for the session of a peer p, at the instant ?5.
PAUSED = "SELECT 1 FROM pauses WHERE pauses.name = p.name AND (until IS NULL OR until > ?5)"
# So many of the messages that were delivered last are looked at to count what a session has sent: 10 ms. A bus with
# more than that in an hour has no loop of two models as its problem.
_MOST_COUNTED = 20_000


def check(execute: Callable[..., Any], session: str | None, now: int) -> dict[str, Pause]:
    """The pauses that hold now, by name. Raises Refused if `session` is paused; a person or a script has none.

    [BRAKE-1]
    """
    rows = execute(PAUSES, (now,)).fetchall()
    if not rows:
        return {}
    pauses = {str(row[0]): Pause(*row) for row in rows}
    # By the name that it has now: who acts for it can know an older one.
    row = None if session is None else execute("SELECT name FROM peers WHERE session = ?", (session,)).fetchone()
    if row and row[0] in pauses:
        raise Refused(
            f"this session is {pauses[row[0]]}, so nothing was sent",
            hint=f"only your user can change that, with agentbus resume {row[0]}",
        )
    return pauses


def pause(execute: Callable[..., Any], names: Sequence[str], by: str, now: int, until: int | None) -> None:
    """Pause `names`. A pause that they have already is replaced. [BRAKE-2]"""
    for name in names:
        execute("INSERT OR REPLACE INTO pauses VALUES (?, ?, ?, ?)", (name, by, now, until))


def resume(execute: Callable[..., Any], names: Sequence[str], by: str, now: int) -> None:
    """End the pauses of `names`, and let the slow guard count them from now on. [BRAKE-2], [BRAKE-4]"""
    for name in names:
        execute(
            "INSERT INTO pauses VALUES (?1, ?2, ?3, ?3) ON CONFLICT (name) DO UPDATE SET until = ?3", (name, by, now)
        )


def carry(execute: Callable[..., Any], old: str, new: str) -> None:
    """Let a pause follow a rename: no name that a session takes is a way out of it. Of two, the longer holds."""
    execute(
        "INSERT INTO pauses SELECT ?1, paused_by, paused_at, until FROM pauses WHERE name = ?2"
        " ON CONFLICT (name) DO UPDATE SET paused_by = excluded.paused_by, paused_at = excluded.paused_at,"
        " until = excluded.until"
        " WHERE pauses.until IS NOT NULL AND (excluded.until IS NULL OR excluded.until > pauses.until)",
        (new, old),
    )
    execute("DELETE FROM pauses WHERE name = ?", (old,))


def forget(execute: Callable[..., Any], now: int) -> None:
    """Forget the pauses that ended so long ago that nothing is counted from there any more."""
    execute("DELETE FROM pauses WHERE until < ?", (now - HOUR_MS,))


def sent_lately(
    read: Callable[..., list[Any]], session: str, names: Sequence[str], now: int
) -> tuple[str, int, int] | None:
    """To which of `names` the session has sent most within the hour, how many messages, and since which instant.

    Counted from the end of its last pause on, if that is later. None if it has sent nothing to them. [BRAKE-4]
    """
    rows = read(
        # What was sent within the hour is pending still, or was delivered since: there is an index for both.
        "SELECT recipient, count(*), min(sent_at) FROM messages WHERE id IN"
        " (SELECT id FROM messages WHERE delivered_at IS NULL AND recipient IN (SELECT value FROM json_each(?1))"
        " UNION ALL SELECT * FROM"
        " (SELECT id FROM messages WHERE delivered_at > ?2 ORDER BY delivered_at DESC LIMIT ?5))"
        " AND sender_session = ?3 AND recipient IN (SELECT value FROM json_each(?1)) AND sent_at <= ?4"
        # An end that is still to come is a pause, and ends nothing yet.
        " AND sent_at > ?2 AND sent_at >= coalesce((SELECT until FROM pauses JOIN peers USING (name)"
        " WHERE session = ?3 AND until <= ?4), 0)"
        " GROUP BY recipient ORDER BY count(*) DESC, recipient LIMIT 1",
        *("[" + ",".join(f'"{name}"' for name in names) + "]", now - HOUR_MS, session, now, _MOST_COUNTED),
    )
    return (str(rows[0][0]), int(rows[0][1]), int(rows[0][2])) if rows else None
