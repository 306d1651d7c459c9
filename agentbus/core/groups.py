"""Groups: which names are members of which `@name`. Runs inside the transactions of its callers.

Knows nothing about sessions, messages or their delivery. Implements [GROUP-2] to [GROUP-5].
"""

from __future__ import annotations

from collections.abc import Callable

from agentbus.core.errors import Refused

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import Any

__all__ = ["MAX_MEMBERS", "carry", "drop_absent", "has_absent", "join", "leave", "members", "note_seen"]

# A message to a group is one row for each member, in one transaction: 256 rows take some 10 ms, and others wait for it.
MAX_MEMBERS = 256
# The members that are not there, and were not since an instant.
_ABSENT = (
    " FROM group_members WHERE seen_at < ? AND NOT EXISTS (SELECT 1 FROM peers WHERE name = member AND left_at IS NULL)"
)


def members(execute: Callable[..., Any], group: str) -> list[str]:
    """The members of `group`, by name. A group without members is none."""
    rows = execute("SELECT member FROM group_members WHERE group_name = ? ORDER BY member", (group,)).fetchall()
    return [str(name) for (name,) in rows]


def join(execute: Callable[..., Any], group: str, name: str, now: int) -> bool:
    """Make `name` a member; whether it was none before. Raises Refused when the group is full. [GROUP-2]"""
    execute(
        "INSERT OR IGNORE INTO group_members (group_name, member, seen_at)"
        " SELECT ?1, ?2, ?3 WHERE (SELECT count(*) FROM group_members WHERE group_name = ?1) < ?4",
        (group, name, now, MAX_MEMBERS),
    )
    if execute("SELECT changes()").fetchone()[0]:
        return True
    if name in members(execute, group):
        return False
    raise Refused(
        f'"{group}" has {MAX_MEMBERS} members, which is the limit: "{name}" did not join',
        hint="join another group, or let a member leave first",
    )


def leave(execute: Callable[..., Any], group: str, name: str) -> bool:
    """End the membership of `name`; whether it was a member."""
    row = execute("DELETE FROM group_members WHERE group_name = ? AND member = ? RETURNING 1", (group, name)).fetchone()
    return row is not None


def carry(execute: Callable[..., Any], old: str, new: str) -> None:
    """Let the memberships follow a rename. [GROUP-4]"""
    execute("UPDATE OR REPLACE group_members SET member = ? WHERE member = ?", (new, old))


def note_seen(execute: Callable[..., Any], session: str, now: int) -> None:
    """Note that `session` was there until now, with the name that it has. [GROUP-5]"""
    execute(
        "UPDATE group_members SET seen_at = ? WHERE member = (SELECT name FROM peers WHERE session = ?)",
        (now, session),
    )


def has_absent(read: Callable[..., list[Any]], before: int) -> bool:
    """Whether `drop_absent` has something to do: reading is cheap, writing is not."""
    return bool(read(f"SELECT 1{_ABSENT} LIMIT 1", before))


def drop_absent(execute: Callable[..., Any], before: int) -> list[tuple[str, str]]:
    """End the memberships of names that nobody had since the instant `before`; return group and name. [GROUP-5]"""
    rows = execute(f"DELETE{_ABSENT} RETURNING group_name, member", (before,)).fetchall()
    return sorted((str(group), str(name)) for group, name in rows)
