"""What doctor finds about the database: whether it is intact, ours, merged and not locked.

These checks read and change nothing. Implements [DOCTOR-2], [DOCTOR-3].
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from agentbus.core import database, process
from agentbus.core.findings import Finding, Level
from agentbus.doctor.checks import safely
from agentbus.doctor.readonly import ReadOnlyDatabase

__all__ = ["check_database"]

# A WAL that gets merged has 4 MiB. A WAL of this size is no longer merged.
_LARGE_WAL_BYTES = 64 << 20


def check_database(home: Path) -> Iterator[Finding]:
    path = home / "bus.db"
    if not path.exists():
        yield Finding("database", Level.NOTE, f"{path} does not exist yet", "the first message or session creates it")
        return
    with ReadOnlyDatabase(path) as readonly:
        yield from safely("database", lambda: _check_integrity(readonly))
        yield from safely("schema", lambda: _check_schema(readonly))
        yield from safely("wal", lambda: _check_wal(readonly))
        yield from safely("lock", lambda: _check_lock(readonly))


def _check_integrity(readonly: ReadOnlyDatabase) -> Iterator[Finding]:
    size = readonly.path.stat().st_size / (1 << 20)
    try:
        complaints = readonly.integrity()
    except TimeoutError:
        seen = f"{readonly.path}, {size:,.1f} MiB, is too large to be checked here"
        yield Finding("database", Level.NOTE, seen, f"sqlite3 '{readonly.path}' 'PRAGMA quick_check'")
        return
    if complaints:
        remedy = "agentbus doctor --set-aside"
        yield Finding("database", Level.WRONG, f"{readonly.path} is damaged: {complaints[0]}", remedy)
    else:
        yield Finding("database", Level.OK, f"{readonly.path}, {size:,.1f} MiB, passes quick_check")


def _check_schema(readonly: ReadOnlyDatabase) -> Iterator[Finding]:
    version, latest = readonly.schema(), database.latest_version()
    if readonly.is_foreign():
        remedy = "set AGENTBUS_HOME to a folder of its own"
        yield Finding("schema", Level.WRONG, f"{readonly.path} is a database of another program", remedy)
    elif version > latest:
        remedy = "upgrade agentbus, or set AGENTBUS_HOME to another folder"
        yield Finding("schema", Level.WRONG, f"schema {version}, this agentbus knows up to {latest}", remedy)
    elif version < latest:
        seen = f"schema {version}, the next message or session upgrades it to {latest}"
        yield Finding("schema", Level.NOTE, seen, "agentbus peers upgrades it too")
    else:
        yield Finding("schema", Level.OK, f"schema {version}, the same as this agentbus")


def _check_wal(readonly: ReadOnlyDatabase) -> Iterator[Finding]:
    size = readonly.wal_bytes()
    if size > _LARGE_WAL_BYTES:
        seen = f"the WAL has {size / (1 << 20):,.0f} MiB and is not merged: a program keeps an old state open"
        yield Finding("wal", Level.WRONG, seen, f"find that program with lsof '{readonly.path}', and end it")
    elif not readonly.is_settled and size:
        seen = "the WAL beside the database belongs to another bus.db: it is not read"
        yield Finding("wal", Level.NOTE, seen, "agentbus peers moves it aside")
    elif readonly.unmerged():
        seen = "no process has the database open, and its WAL is not merged: the findings below leave it out"
        yield Finding("wal", Level.NOTE, seen, "agentbus peers merges it")
    else:
        yield Finding("wal", Level.OK, f"the WAL has {size / 1024:,.0f} KiB")


def _check_lock(readonly: ReadOnlyDatabase) -> Iterator[Finding]:
    if not readonly.is_locked():
        yield Finding("lock", Level.OK, "no process keeps the database locked")
        return
    holder = readonly.lock_holder()
    seen = f"{readonly.path} is locked: nothing can be sent, and senders have to wait"
    if holder is None:
        yield Finding(
            "lock", Level.WRONG, seen, f"find the process that holds it with lsof '{readonly.path}', and end it"
        )
        return
    started = process.look_up(holder)
    words = " ".join(process.arguments(started))[:80] if started is not None else ""
    yield Finding(
        "lock", Level.WRONG, f"{seen}; process {holder} holds it ({words})", f"let it finish, or kill {holder}"
    )
