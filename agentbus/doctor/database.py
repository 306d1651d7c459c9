"""What doctor finds about the database: whether it is intact, ours, merged and not locked.

These checks read and change nothing. Implements [DOCTOR-2], [DOCTOR-3].
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from agentbus.core import config, database, process
from agentbus.core.errors import InvalidRequest
from agentbus.core.findings import Finding, Level
from agentbus.doctor.checks import safely
from agentbus.doctor.readonly import ReadOnlyDatabase

__all__ = ["check_database"]

# So many pages that are not merged, 64 MiB, mean that something keeps them from being merged: others have tried.
_UNMERGED_PAGES = 4 * database.LARGE_WAL_PAGES
_PAGE_KIB = 4


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
        yield from safely("settings", lambda: _check_shared(readonly))


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
    if readonly.is_foreign():
        remedy = "set AGENTBUS_HOME to a folder of its own"
        yield Finding("schema", Level.WRONG, f"{readonly.path} is a database of another program", remedy)
        return
    version, latest = readonly.schema(), database.SCHEMA
    if version > latest:
        seen = f"schema {version} is newer than this agentbus, which knows up to {latest} and can go on with it"
        yield Finding("schema", Level.NOTE, seen, "upgrade agentbus when you can")
    elif version < latest:
        seen = f"schema {version}, the next message or session upgrades it to {latest}"
        yield Finding("schema", Level.NOTE, seen, "agentbus peers upgrades it too")
    else:
        yield Finding("schema", Level.OK, f"schema {version}, the same as this agentbus")


def _check_wal(readonly: ReadOnlyDatabase) -> Iterator[Finding]:
    size = readonly.wal_bytes()
    pages, merged = readonly.wal_pages()
    left_kib = (pages - merged) * _PAGE_KIB
    if pages - merged > _UNMERGED_PAGES:
        seen = f"{left_kib / 1_024:,.0f} MiB in the WAL are not merged: a program keeps an old state open"
        remedy = f"find that program with lsof '{readonly.path}', and end it; the next message merges the WAL"
        yield Finding("wal", Level.WRONG, seen, remedy)
    elif not readonly.is_settled and size:
        seen = "the WAL beside the database belongs to another bus.db: it is not read"
        yield Finding("wal", Level.NOTE, seen, "agentbus peers moves it aside")
    elif readonly.unmerged():
        seen = "no process has the database open, and its WAL is not merged: the findings below leave it out"
        yield Finding("wal", Level.NOTE, seen, "agentbus peers merges it")
    else:
        left = f"{left_kib:,} KiB of it wait to be merged" if left_kib else "all of it is merged"
        yield Finding("wal", Level.OK, f"the WAL has {size / 1024:,.0f} KiB, {left}" if size else "the WAL is empty")


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


def _check_shared(readonly: ReadOnlyDatabase) -> Iterator[Finding]:
    """What holds for everybody on the bus, and what the environment says about the same. [CONF-5]"""
    if readonly.schema() < database.SCHEMA:
        return  # nothing is set there yet
    for one in config.SHARED.values():
        now = readonly.queries.setting(one)
        said = config.other_program(one.variable)
        seen = f"{one.key} is {now:,} on this bus"
        if not said:
            yield Finding("settings", Level.OK, seen)
            continue
        try:
            here = one.check(said)
        except InvalidRequest:
            continue  # reported with the other variables
        if here < now:
            seen += f", and {one.variable} is {here:,} here: it does not cut that short"
            yield Finding("settings", Level.NOTE, seen, f"agentbus config {one.key} {here} does, for everybody")
        elif here > now:
            seen += f", and {one.variable} is {here:,} here: a session that starts with it raises that for everybody"
            yield Finding("settings", Level.NOTE, seen, f"agentbus config {one.key} {here} does so now")
        else:
            yield Finding("settings", Level.OK, f"{seen}, and {one.variable} says the same")
