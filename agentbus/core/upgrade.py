"""The steps of migrations that SQL cannot do. A shipped step is never edited again, like the SQL beside it.

Runs inside the transaction of the migration. Implements [NAME-14].
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from agentbus.core.names import MAX_NAME_CHARS, folder_wish, numbered_name

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import Any

__all__ = ["STEPS"]

_OTHER_CHARACTERS = re.compile(r"[^a-z0-9_-]")


def _folder_name_5(folder: str) -> str:
    """The name of a session in `folder` up to schema 5: every character but `a-z 0-9 _ -` was a dash."""
    base = os.path.basename(os.path.normpath(folder))
    name = _OTHER_CHARACTERS.sub("-", base.strip().lower()[: 4 * MAX_NAME_CHARS]).strip("-")
    return name[:MAX_NAME_CHARS].strip("-") or "agent"


def _present_name(name: str, before: str, after: str) -> str | None:
    """What `name` is now, if it is `before` or a number of that, and `before` is `after` now; None for another name."""
    if name == before:
        return after
    number = name.rpartition("-")[2]
    is_numbered = number.isascii() and number.isdecimal() and name == numbered_name(before, int(number))
    return numbered_name(after, int(number)) if is_numbered else None


def bring_names_forward(execute: Callable[..., Any]) -> None:
    """Give the sessions of folders whose names were folded the names that such a session has now. [NAME-14]

    A mailbox goes with the session that had its name last: `m-ller` may have been two folders. A name that was folded
    and asked for stays, since nobody knows any more what was asked for.
    """
    moved: dict[str, tuple[str, str]] = {}
    # Those that are there come last, and so decide.
    rows = execute(
        "SELECT session, name, launch_name, CASE folder WHEN '' THEN cwd ELSE folder END, conversation, left_at IS NULL"
        " FROM peers ORDER BY left_at IS NULL, left_at"
    ).fetchall()
    for session, name, launch_name, folder, conversation, is_present in rows:
        before, after = _folder_name_5(folder), folder_wish(folder)
        if launch_name != before or before == after or after.isascii():
            moved.pop(name, None)
            continue
        execute("UPDATE peers SET launch_name = ? WHERE session = ?", (after, session))
        execute(
            "UPDATE conversations SET launch_name = ? WHERE conversation = ? AND launch_name = ?",
            (after, conversation, before),
        )
        now = _present_name(name, before, after)
        taken = "SELECT 1 FROM peers WHERE name = ? AND left_at IS NULL"
        if now is None or (is_present and execute(taken, (now,)).fetchone()):
            moved.pop(name, None)
            continue
        execute("UPDATE peers SET name = ? WHERE session = ?", (now, session))
        execute("UPDATE conversations SET name = ? WHERE conversation = ? AND name = ?", (now, conversation, name))
        moved[name] = now, session
    for name, (now, session) in moved.items():
        execute("UPDATE messages SET recipient = ? WHERE recipient = ? AND delivered_at IS NULL", (now, name))
        # Others know it by the old name. This ends with the session, as after a rename. [NAME-6]
        execute("INSERT OR REPLACE INTO aliases (alias, session) VALUES (?, ?)", (name, session))


# By the version of the schema that they lead to.
STEPS: dict[int, Callable[[Callable[..., Any]], None]] = {6: bring_names_forward}
