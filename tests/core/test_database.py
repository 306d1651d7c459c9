from __future__ import annotations

import stat
import subprocess
import sys
import threading
from pathlib import Path

import apsw
import pytest

from agentbus.core import database
from agentbus.core.config import prepare_home
from agentbus.core.errors import BrokenSetup, Busy, TryAgain
from agentbus.core.store import Store
from tests.support.command import clean_env


@pytest.fixture
def path(home: Path) -> Path:
    return Path(prepare_home(home))


def schema(connection: apsw.Connection) -> list[str]:
    return sorted(sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL"))


@pytest.mark.spec("STORE-1")
def test_a_new_database_is_strict_wal_and_at_the_latest_version(path: Path) -> None:
    connection = database.connect(path, busy_ms=0)
    assert connection.pragma("journal_mode") == "wal"
    assert connection.pragma("user_version") == database.SCHEMA == database.migrations()[-1][0]
    tables = [sql for sql in schema(connection) if sql.startswith("CREATE TABLE") and "sqlite_sequence" not in sql]
    assert tables
    assert all(sql.endswith("STRICT") for sql in tables)
    connection.close()


@pytest.mark.spec("STORE-1")
@pytest.mark.parametrize("version", [0, *[number for number, _ in database.migrations()]])
def test_every_old_version_becomes_the_same_schema(path: Path, home: Path, version: int) -> None:
    old = apsw.Connection(str(path))
    for number, sql in database.migrations():
        if number <= version:
            old.execute(sql)
            old.execute(f"PRAGMA user_version = {number}")
    old.close()
    migrated = database.connect(path, busy_ms=0)
    fresh = database.connect(home / "fresh.db", busy_ms=0)
    assert schema(migrated) == schema(fresh)
    migrated.close()
    fresh.close()


@pytest.mark.spec("STORE-9")
def test_a_status_shuts_out_no_older_program(path: Path) -> None:
    connection = apsw.Connection(str(path))
    before = None
    for number, sql in database.migrations():
        if "status_at" in sql:
            before = number, connection.execute("SELECT oldest FROM bus").get
        connection.execute(sql)
        if before is not None and before[0] == number:
            assert connection.execute("SELECT oldest FROM bus").get == before[1]
    connection.close()
    assert before is not None


@pytest.mark.spec("STORE-1")
def test_a_newer_database_is_refused_and_left_alone(path: Path) -> None:
    newer = apsw.Connection(str(path))
    newer.execute("PRAGMA user_version = 999")
    newer.close()
    with pytest.raises(BrokenSetup, match=r"has schema 999, this agentbus knows up to .*: upgrade agentbus"):
        database.connect(path, busy_ms=0)
    again = apsw.Connection(str(path))
    assert again.pragma("user_version") == 999
    again.close()


@pytest.mark.spec("STORE-1")
def test_another_programs_database_is_refused_and_left_alone(path: Path) -> None:
    other = apsw.Connection(str(path))
    other.execute("CREATE TABLE cookies (id)")
    other.close()
    with pytest.raises(BrokenSetup, match="is a database of another program"):
        database.connect(path, busy_ms=0)
    again = apsw.Connection(str(path))
    assert schema(again) == ["CREATE TABLE cookies (id)"]
    again.close()


@pytest.mark.spec("ERR-1")
def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    path.write_bytes(b"not a database, but somebody's notes " * 200)
    before = path.read_bytes()
    with pytest.raises(BrokenSetup, match="is left as it is: agentbus doctor --set-aside "):
        database.connect(path, busy_ms=0)
    assert path.read_bytes() == before


@pytest.mark.spec("TRUST-1")
def test_the_files_are_ours_alone(path: Path) -> None:
    store = Store(path, busy_ms=0)
    store.send("alice", "bob", "x", now=0)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.glob("bus.db*")}
    assert modes == dict.fromkeys(("bus.db", "bus.db-wal", "bus.db-shm", "bus.db-owner"), 0o600)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    store.close()


@pytest.mark.spec("STORE-2")
@pytest.mark.parametrize(("sync", "level"), [("normal", 1), ("full", 2)])
def test_sync_is_what_was_asked_for(path: Path, sync: str, level: int) -> None:
    connection = database.connect(path, busy_ms=0, sync=sync)
    assert connection.pragma("synchronous") == level
    connection.close()


@pytest.mark.spec("STORE-3")
def test_two_writers_wait_for_each_other(path: Path) -> None:
    """A deferred transaction that reads and then writes would fail with two writers; ours never does."""
    stores = [Store(path, busy_ms=10_000) for _ in range(2)]
    problems: list[Exception] = []

    def write(store: Store, name: str) -> None:
        try:
            for _ in range(200):
                store.send(name, "bob", "x", now=0)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=write, args=(store, f"s{n}")) for n, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert stores[0].queries.waiting() == {"bob": 400}
    for store in stores:
        store.close()


@pytest.mark.spec("STORE-4")
def test_a_locked_database_says_busy(path: Path) -> None:
    store = Store(path, busy_ms=0)
    locker = apsw.Connection(str(path))
    locker.execute("BEGIN IMMEDIATE")
    with pytest.raises(Busy, match="is being written by another process: try again"):
        store.send("alice", "bob", "x", now=0)
    locker.execute("ROLLBACK")
    store.send("alice", "bob", "x", now=0)
    locker.close()
    store.close()


def test_opening_a_locked_new_file_gives_up_with_a_sentence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_OPEN_PATIENCE_S", 0.0)
    locker = apsw.Connection(str(path))
    locker.execute("BEGIN EXCLUSIVE")
    with pytest.raises(TryAgain):
        database.connect(path, busy_ms=0)
    locker.close()


@pytest.mark.spec("STORE-1")
def test_ten_processes_open_a_fresh_home_at_once(home: Path) -> None:
    code = (
        "import sys; from agentbus import registry; from agentbus.core import config; sys.stdin.read()\n"
        "bus, _ = registry.open_bus(config.load(), busy_ms=10000); bus.send('x', 'y', 'z')"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=clean_env(home), stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(10)
    ]
    for child in children:  # all wait at the same line: the end of stdin is the starting gun
        assert child.stdin is not None
        child.stdin.close()
    for child in children:
        assert child.stderr is not None
        assert (child.wait(15), child.stderr.read()) == (0, b"")
        child.stderr.close()
    store = Store(home / "bus.db", busy_ms=0)
    assert store.queries.waiting() == {"y": 10}
    store.close()


@pytest.mark.spec("STORE-5")
def test_the_wal_is_reported_and_merged(path: Path) -> None:
    told: list[int] = []
    store = Store(path, busy_ms=0, on_wal=told.append)
    for _ in range(300):
        store.send("alice", "bob", "x" * 10_000, now=0)
    assert max(told) > database.CHECKPOINT_PAGES
    size = path.stat().st_size
    database.checkpoint(path)
    assert path.stat().st_size > size
    store.send("alice", "bob", "x", now=0)
    assert told[-1] < 100  # the WAL is used from its beginning again
    store.close()


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (apsw.FullError(), TryAgain, "the disk of /b/bus.db is full, nothing was changed: free some space"),
        (apsw.ReadOnlyError(), BrokenSetup, "/b/bus.db is read-only: if this is a sandbox, let it write to /"),
        (apsw.CorruptError(), BrokenSetup, "is not a healthy SQLite database"),
        (apsw.CantOpenError(), BrokenSetup, "/b/bus.db cannot be opened"),
        (apsw.IOError("disk"), BrokenSetup, "SQLite says IOError: disk"),
    ],
)
def test_what_sqlite_says_becomes_a_sentence(error: apsw.Error, kind: type, sentence: str) -> None:
    with pytest.raises(kind, match=sentence), database.explained(Path("/b/bus.db")):
        raise error
