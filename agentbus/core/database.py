"""Opens the database: file modes, pragmas, busy policy, migrations. Explains SQLite's errors to people.

Knows the numbered files in migrations/, but no queries. Implements [STORE-1] to [STORE-5].
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import apsw

from agentbus.core import files
from agentbus.core.config import unwritable
from agentbus.core.errors import AgentbusError, BrokenSetup, Busy, DamagedIndex, InvalidRequest, TryAgain

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

__all__ = [
    "SCHEMA",
    "Database",
    "Transaction",
    "check_version",
    "checkpoint",
    "connect",
    "explain",
    "explained",
    "migrations",
]

# The schema that this program knows. A constant, and not what the folder holds: an upgrade replaces the files below a
# program that runs, and that program still knows only this one.
SCHEMA = 12
_MIGRATIONS = os.path.join(os.path.dirname(__file__), "migrations")
# From this many pages (4 KiB each) in the WAL on, a session does a checkpoint: SQLite's own default.
CHECKPOINT_PAGES = 1_000
# From this many pages on, 16 MiB, the sessions do not manage it, or there is none: then a command does a checkpoint
# too, and writers wait for it for some milliseconds.
LARGE_WAL_PAGES = 4_000
# A file that was larger once is cut to this with the next commit after a whole checkpoint.
_WAL_LIMIT_BYTES = LARGE_WAL_PAGES * 4_096
# How long a checkpoint waits for readers and writers. They need far less; a program that reads for longer, or was
# stopped while it read, is not waited for.
_MERGE_PATIENCE_MS = 100
# How long opening waits for other processes that open, migrate or recover the same file.
_OPEN_PATIENCE_S = 10.0


def migrations() -> list[tuple[int, str]]:
    """The numbered migrations of this package, in ascending order, each with its SQL."""
    from pathlib import Path  # takes 4 ms, and a send to a database that is there migrates nothing

    found = []
    for path in sorted(Path(_MIGRATIONS).glob("[0-9]*.sql")):
        number = int(path.name.split("_", 1)[0])
        # An upgrade can have put newer files there since this program was started.
        if number <= SCHEMA:
            found.append((number, path.read_text(encoding="utf-8")))
    if not found or found[-1][0] != SCHEMA:
        raise BrokenSetup(f"the files of schema {SCHEMA} are no longer in {_MIGRATIONS}", hint="start this again")
    return found


def connect(
    path: str | Path,
    *,
    busy_ms: int,
    sync: str = "normal",
    on_wal: Callable[[int], None] | None = None,
    is_running: bool = False,
) -> apsw.Connection:
    """Open the mailbox at `path`, creating and migrating it as needed. [STORE-1]

    `busy_ms` is how long a statement waits inline for another writer, 0 to 60,000. `sync` is "normal" (a commit
    survives the death of any process) or "full" (it also survives a power cut). `on_wal` is called after each commit
    with the number of pages in the WAL. The caller does the checkpoints. `is_running`: this program has had the mailbox
    open before, and the error for a newer file says what that means.

    Raises BrokenSetup when the file is not an agentbus mailbox, is newer than this package, or cannot be opened.
    Raises TryAgain when other processes keep it locked for 10 s.
    """
    with explained(path):
        files.settle(path, lambda fresh: _build(fresh, sync))
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            _prepare(connection, path, sync, is_running=is_running)
            connection.set_busy_timeout(busy_ms)
            if on_wal is not None:
                callback = on_wal

                def told(_connection: apsw.Connection, _schema: str, pages: int) -> int:
                    callback(pages)
                    return apsw.SQLITE_OK

                connection.set_wal_hook(told)
        except BaseException:
            connection.close()
            raise
        return connection


def checkpoint(path: str | Path) -> None:
    """Move the WAL into the database, as far as other connections allow. Blocks: call it in a thread."""
    if not files.is_settled(path):
        return  # it was replaced just now: the session that follows it asks again
    with explained(path), suppress(apsw.BusyError):  # another process does it now: the next commit asks again
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            # Read first: a connection that has read nothing does not know about the WAL yet, and merges nothing.
            connection.pragma("user_version")
            _merge(connection)
        finally:
            connection.close()


def _merge(connection: apsw.Connection) -> None:
    """Move the WAL into the database. Raises BusyError when another process does so, or does not let it happen."""
    frames, _ = connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
    if frames >= LARGE_WAL_PAGES:
        # Others write so much that a passive checkpoint never ends as the last one: the WAL would grow for as long as
        # they do. So what is left of it, which is little now, is moved while they wait.
        connection.set_busy_timeout(_MERGE_PATIENCE_MS)
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)


def _build(path: str | Path, sync: str) -> None:
    """Make a whole new database at `path`, with nothing beside it: its WAL is merged when it is closed."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        _prepare(connection, path, sync)
    finally:
        connection.close()


def _prepare(connection: apsw.Connection, path: str | Path, sync: str, *, is_running: bool = False) -> None:
    give_up_at = time.monotonic() + _OPEN_PATIENCE_S
    connection.set_busy_timeout(1_000)
    # Otherwise SQLite compiles a statement anew each time that a value is bound which its plan could depend on: 0.15 ms
    # of each message. No plan of ours does, as nobody runs ANALYZE. https://sqlite.org/c3ref/c_dbconfig_defensive.html
    connection.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, 1)
    while True:
        try:
            # If another process switches to WAL at the same time, this fails at once, even with a timeout. SQLite
            # works that way, https://sqlite.org/wal.html (activating WAL), so this loop tries again.
            if connection.pragma("journal_mode") != "wal":
                connection.pragma("journal_mode", "wal")
            connection.pragma("synchronous", sync)
            connection.pragma("foreign_keys", 1)
            # A checkpoint costs 11 ms, a send 0.1 ms, so a session does checkpoints off the send path. A command
            # does one at its end, when its message is sent and said to be.
            connection.pragma("wal_autocheckpoint", 0)
            connection.pragma("journal_size_limit", _WAL_LIMIT_BYTES)
            _migrate(connection, path, is_running=is_running)
            return
        except apsw.BusyError:
            if time.monotonic() > give_up_at:
                raise
            # Jitter. Not from the random module: importing it would cost `agentbus send` 6 ms.
            time.sleep(0.001 + os.urandom(1)[0] / 255 * 0.02)


def _migrate(connection: apsw.Connection, path: str | Path, *, is_running: bool) -> None:
    if check_version(connection, path, is_running=is_running) >= SCHEMA:
        return
    from agentbus.core.upgrade import STEPS  # only a database that is brought forward needs it

    connection.execute("BEGIN IMMEDIATE")
    try:
        # Read again: another process can have migrated while we waited for the lock.
        version = check_version(connection, path, is_running=is_running)
        if version == 0 and connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
            raise BrokenSetup(
                f"{path} is a database of another program", hint="set AGENTBUS_HOME to a folder of its own"
            )
        for number, sql in migrations():
            if number > version:
                connection.execute(sql)
                if number in STEPS:
                    STEPS[number](connection.execute)
                connection.execute(f"PRAGMA user_version = {number:d}")
        connection.execute("COMMIT")
    except BaseException:
        _roll_back(connection)
        raise


def _roll_back(connection: apsw.Connection) -> None:
    # SQLite has often done so by itself. What fails here is what failed before, and that is reported.
    with suppress(apsw.Error):
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def check_version(connection: apsw.Connection, path: str | Path, *, is_running: bool = False) -> int:
    """The schema of the database, if this program can go on with it. See 0007_settings.sql. [STORE-9]

    Raises BrokenSetup when it is newer, and does not name this program's schema as one that can go on with it.
    `is_running`: this program could, before.
    """
    version = int(str(connection.pragma("user_version")))
    if version <= SCHEMA or _oldest(connection) <= SCHEMA:
        return version
    if is_running:
        raise BrokenSetup("agentbus was upgraded while this session ran", hint="restart it (/mcp reconnect)")
    raise BrokenSetup(
        f"{path} has schema {version}, this agentbus knows up to {SCHEMA}",
        hint="upgrade agentbus, or set AGENTBUS_HOME to another folder",
    )


def _oldest(connection: apsw.Connection) -> int:
    """The oldest schema whose programs can go on with a newer database; one that nobody knows if it does not say."""
    try:
        return int(str(connection.execute("SELECT oldest FROM bus").get))
    except (apsw.SQLError, ValueError):
        return SCHEMA + 1


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turn an SQLite error at `path` into an error that tells people what to do. [ERR-1]"""
    try:
        yield
    except apsw.Error as error:
        raise explain(error, path) from error


def explain(error: apsw.Error, path: str | Path) -> AgentbusError:
    """The agentbus error that explains the SQLite `error` at `path` to people."""
    match error:
        case apsw.BusyError() | apsw.LockedError():
            return Busy(f"{path} is being written by another process", hint="try again in a moment")
        case apsw.FullError():
            return TryAgain(f"the disk of {path} is full, nothing was changed", hint="free some space, then repeat")
        case apsw.ReadOnlyError():
            return BrokenSetup(f"{path} is read-only", hint=unwritable(path))
        case apsw.CorruptError() if getattr(error, "extendedresult", 0) == apsw.SQLITE_CORRUPT_VTAB:
            # What FTS5 reports of its own tables. The mail is well.
            return DamagedIndex(f"the search index in {path} is damaged", hint="agentbus search makes it anew")
        case apsw.NotADBError() | apsw.CorruptError():
            return BrokenSetup(
                f"{path} is not a healthy SQLite database, and is left as it is",
                hint="agentbus doctor --set-aside keeps it for a rescue, and the next command starts an empty one",
            )
        case apsw.CantOpenError():
            return BrokenSetup(f"{path} cannot be opened", hint=unwritable(path))
        case apsw.SQLError() if str(error).startswith("fts5: "):
            problem = str(error).removeprefix("fts5: ").replace('near ""', "at its end")
            return InvalidRequest(
                f"the search is not understood: {problem}",
                hint='AND, OR and NOT stand between words, "a phrase" in quotes, and the beginning of a word before *',
            )
        case apsw.SQLError() if str(error) == "no such module: fts5":
            return BrokenSetup("this SQLite cannot search (no FTS5)", hint="pip install --force-reinstall apsw")
        case _:
            return BrokenSetup(f"{path}: SQLite says {type(error).__name__}: {error}")


class Transaction:
    """BEGIN IMMEDIATE to COMMIT, or ROLLBACK. Entering it returns the `execute` of its connection.

    Why IMMEDIATE: a deferred transaction that reads first and writes later fails at once if another process has
    written in between. With two writers, this happens in half of the cases. [STORE-3]
    """

    # A class, not @contextmanager: it is twice as fast, and every message enters it.
    __slots__ = ("_connection", "_database")

    def __init__(self, database: Database, connection: apsw.Connection) -> None:
        self._database = database
        self._connection = connection

    def __enter__(self) -> Callable[..., Any]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            # Behind the lock: from here to the end, no other process can migrate.
            self._database.check()
        except BaseException as error:
            _roll_back(self._connection)
            if isinstance(error, apsw.Error):
                raise self._database.explain(error) from error
            raise
        return self._connection.execute

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            try:
                self._connection.execute("COMMIT")
                return
            except apsw.Error as failure:
                error = failure
        _roll_back(self._connection)
        if isinstance(error, apsw.Error):
            raise self._database.explain(error) from error


class Database:
    """One connection to the mailbox file at `path`. Explains SQLite's errors. Used from one thread.

    Takes the arguments of `connect`, and raises the same errors.
    """

    def __init__(self, path: str | Path, *, busy_ms: int, sync: str, on_wal: Callable[[int], None] | None) -> None:
        self.path = str(path)  # checked before each send; a Path would be converted to text each time
        self._busy_ms = busy_ms
        self._sync = sync
        self._on_wal = on_wal
        self._pages = 0
        self.generation = 0
        self._connection = self._connect()

    def _connect(self, *, is_running: bool = False) -> apsw.Connection:
        connection = connect(
            self.path,
            busy_ms=self._busy_ms,
            sync=self._sync,
            on_wal=self._on_wal or self._note_pages,
            is_running=is_running,
        )
        self._file = files.file_at(self.path)
        self._version = SCHEMA
        return connection

    def _note_pages(self, pages: int) -> None:
        self._pages = pages

    def check(self) -> None:
        """See to it that this program still knows the schema, which another can have brought forward. [STORE-9]

        Raises BrokenSetup, and apsw.Error.
        """
        # Costs 1 us in a transaction, and 3 us without one. A look at each heartbeat would let an old program write
        # by the old rules until then.
        if self._connection.execute("PRAGMA user_version").get == self._version:
            return
        version = check_version(self._connection, self.path, is_running=True)
        if version < SCHEMA:
            raise BrokenSetup(
                f"{self.path} was put back in an older state, schema {version}",
                hint="agentbus peers brings it forward",
            )
        self._version = version

    def explain(self, error: apsw.Error) -> AgentbusError:
        """The agentbus error that explains an SQLite error of this database to people."""
        if isinstance(error, apsw.SQLError):
            try:
                self.check()  # what was read can have been brought forward between the check and the read
            except BrokenSetup as upgraded:
                return upgraded
            except apsw.Error:
                pass  # the first error says more
        return explain(error, self.path)

    def is_replaced(self) -> bool:
        """Whether the opened file is no longer the one at `path`: it was deleted or replaced."""
        return files.file_at(self.path) != self._file

    def reopen(self) -> None:
        """Open the file that is at `path` now, creating it as needed, and close the old one."""
        old, self._connection = self._connection, self._connect(is_running=True)
        self.generation += 1
        old.close()

    def close(self) -> None:
        """Close the connection. Closing the last one merges the WAL into the database.

        If nobody else was given the duty to merge it, and it is large, this merges it: others can have it open for
        long, and a command that only reads never learns how large it is. [STORE-5]
        """
        if self._pages >= LARGE_WAL_PAGES:
            with suppress(apsw.Error):  # what was done is committed, and the next command tries again
                _merge(self._connection)
        self._connection.close()

    def merge_if_due(self) -> None:
        """Merge the WAL between two parts of a long work, if nobody else was given the duty to, and it is large."""
        if self._pages >= CHECKPOINT_PAGES:
            with suppress(AgentbusError):  # what was done is committed, and the next commit asks again
                checkpoint(self.path)

    def read(self, sql: str, *values: Any) -> list[Any]:
        """All rows of a query."""
        try:
            self.check()
            return self._connection.execute(sql, values).fetchall()
        except apsw.Error as error:
            raise self.explain(error) from error

    def read_checked(self, sql: str, *values: Any) -> list[Any]:
        """The same, for a query whose last column is `oldest` of the table bus. It saves a query for each message."""
        try:
            rows: list[Any] = self._connection.execute(sql, values).fetchall()
            if rows and rows[0][-1] > SCHEMA:
                self.check()
        except apsw.Error as error:
            raise self.explain(error) from error
        return rows

    def mark(self) -> tuple[int, int, int]:
        """What is another value once anybody, this program included, has committed, or another file was opened.

        Raises what `read` raises.
        """
        try:
            found: int = self._connection.execute("PRAGMA data_version").get
        except apsw.Error as error:
            raise self.explain(error) from error
        return self.generation, found, self._connection.total_changes()

    def writing(self) -> Transaction:
        """A new transaction, to be used in a `with` statement."""
        return Transaction(self, self._connection)

    def executemany(self, sql: str, values: list[tuple[Any, ...]]) -> None:
        """Run one statement for many rows, inside a transaction that was entered."""
        self._connection.executemany(sql, values)

    def changes(self) -> int:
        """How many rows the last statement changed."""
        return self._connection.changes()
