"""Opens the database: file modes, pragmas, busy policy, migrations. Explains SQLite's errors to people.

Knows the numbered files in migrations/, but no queries. Implements [STORE-1] to [STORE-5].
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import apsw

from agentbus.core import files
from agentbus.core.config import unwritable
from agentbus.core.errors import AgentbusError, BrokenSetup, Busy, TryAgain

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Database", "Transaction", "checkpoint", "connect", "explain", "explained", "latest_version", "migrations"]

_MIGRATIONS = Path(__file__).with_name("migrations")
# From this many pages (4 KiB each) in the WAL on, a checkpoint is due: SQLite's own default.
CHECKPOINT_PAGES = 1_000
# How long opening waits for other processes that open, migrate or recover the same file.
_OPEN_PATIENCE_S = 10.0


def migrations() -> list[tuple[int, str]]:
    """The numbered migrations of this package, in ascending order, each with its SQL."""
    found = []
    for path in sorted(_MIGRATIONS.glob("[0-9]*.sql")):
        found.append((int(path.name.split("_", 1)[0]), path.read_text(encoding="utf-8")))
    return found


def latest_version() -> int:
    """The schema version of this package, without reading the files."""
    return max(int(name.split("_", 1)[0]) for name in os.listdir(_MIGRATIONS) if name.endswith(".sql"))


def connect(
    path: Path,
    *,
    busy_ms: int,
    sync: str = "normal",
    on_wal: Callable[[int], None] | None = None,
) -> apsw.Connection:
    """Open the mailbox at `path`, creating and migrating it as needed. [STORE-1]

    `busy_ms` is how long a statement waits inline for another writer, 0 to 60,000. `sync` is "normal" (a commit
    survives the death of any process) or "full" (it also survives a power cut). `on_wal` is called after each commit
    with the number of pages in the WAL. If `on_wal` is given, the caller does the checkpoints.

    Raises BrokenSetup when the file is not an agentbus mailbox, is newer than this package, or cannot be opened.
    Raises TryAgain when other processes keep it locked for 10 s.
    """
    with explained(path):
        files.settle(path, lambda fresh: _build(fresh, sync))
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            _prepare(connection, path, sync)
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


def checkpoint(path: Path) -> None:
    """Move the WAL into the database, as far as other connections allow. Blocks: call it in a thread."""
    if not files.is_settled(path):
        return  # it was replaced just now: the session that follows it asks again
    with explained(path), suppress(apsw.BusyError):  # another process does it now: the next commit asks again
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            # Read first: a connection that has read nothing does not know about the WAL yet, and merges nothing.
            connection.pragma("user_version")
            connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        finally:
            connection.close()


def _build(path: Path, sync: str) -> None:
    """Make a whole new database at `path`, with nothing beside it: its WAL is merged when it is closed."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        _prepare(connection, path, sync)
    finally:
        connection.close()


def _prepare(connection: apsw.Connection, path: Path, sync: str) -> None:
    give_up_at = time.monotonic() + _OPEN_PATIENCE_S
    connection.set_busy_timeout(1_000)
    while True:
        try:
            # If another process switches to WAL at the same time, this fails at once, even with a timeout. SQLite
            # works that way, https://sqlite.org/wal.html (activating WAL), so this loop tries again.
            if connection.pragma("journal_mode") != "wal":
                connection.pragma("journal_mode", "wal")
            connection.pragma("synchronous", sync)
            connection.pragma("foreign_keys", 1)
            # A checkpoint costs 11 ms, a send 0.1 ms, so a session does checkpoints off the send path. A command
            # ends too soon for that: closing its connection does the checkpoint.
            connection.pragma("wal_autocheckpoint", 0)
            _migrate(connection, path)
            return
        except apsw.BusyError:
            if time.monotonic() > give_up_at:
                raise
            # Jitter. Not from the random module: importing it would cost `agentbus send` 6 ms.
            time.sleep(0.001 + os.urandom(1)[0] / 255 * 0.02)


def _migrate(connection: apsw.Connection, path: Path) -> None:
    latest = latest_version()
    if _version(connection, path, latest) == latest:
        return
    from agentbus.core.upgrade import STEPS  # only a database that is brought forward needs it

    connection.execute("BEGIN IMMEDIATE")
    try:
        # Read again: another process can have migrated while we waited for the lock.
        version = _version(connection, path, latest)
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
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _version(connection: apsw.Connection, path: Path, latest: int) -> int:
    version = int(str(connection.pragma("user_version")))
    if version > latest:
        raise BrokenSetup(
            f"{path} has schema {version}, this agentbus knows up to {latest}",
            hint="upgrade agentbus, or set AGENTBUS_HOME to another folder",
        )
    return version


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an SQLite error at `path` into an error that tells people what to do. [ERR-1]"""
    try:
        yield
    except apsw.Error as error:
        raise explain(error, path) from error


def explain(error: apsw.Error, path: Path) -> AgentbusError:
    """The agentbus error that explains the SQLite `error` at `path` to people."""
    match error:
        case apsw.BusyError() | apsw.LockedError():
            return Busy(f"{path} is being written by another process", hint="try again in a moment")
        case apsw.FullError():
            return TryAgain(f"the disk of {path} is full, nothing was changed", hint="free some space, then repeat")
        case apsw.ReadOnlyError():
            return BrokenSetup(f"{path} is read-only", hint=unwritable(path))
        case apsw.NotADBError() | apsw.CorruptError():
            return BrokenSetup(
                f"{path} is not a healthy SQLite database, and is left as it is",
                hint="agentbus doctor --set-aside keeps it for a rescue, and the next command starts an empty one",
            )
        case apsw.CantOpenError():
            return BrokenSetup(f"{path} cannot be opened", hint=unwritable(path))
        case _:
            return BrokenSetup(f"{path}: SQLite says {type(error).__name__}: {error}")


class Transaction:
    """BEGIN IMMEDIATE to COMMIT, or ROLLBACK. Entering it returns the `execute` of its connection.

    Why IMMEDIATE: a deferred transaction that reads first and writes later fails at once if another process has
    written in between. With two writers, this happens in half of the cases. [STORE-3]
    """

    # A class, not @contextmanager: it is twice as fast, and every message enters it.
    __slots__ = ("_connection", "_path")

    def __init__(self, connection: apsw.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    def __enter__(self) -> Callable[..., Any]:
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except apsw.Error as error:
            raise explain(error, self._path) from error
        return self._connection.execute

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._connection.execute("COMMIT")
                return
        except apsw.Error as failure:
            error = failure
            raise explain(failure, self._path) from failure
        finally:
            if error is not None and self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        if isinstance(error, apsw.Error):
            raise explain(error, self._path) from error


class Database:
    """One connection to the mailbox file at `path`. Explains SQLite's errors. Used from one thread.

    Takes the arguments of `connect`, and raises the same errors.
    """

    def __init__(self, path: Path, *, busy_ms: int, sync: str, on_wal: Callable[[int], None] | None) -> None:
        self.path = path
        self._name = str(path)  # checked before each send; a Path would be converted to text each time
        self._busy_ms = busy_ms
        self._sync = sync
        self._on_wal = on_wal
        self.generation = 0
        self._connection = self._connect()

    def _connect(self) -> apsw.Connection:
        connection = connect(self.path, busy_ms=self._busy_ms, sync=self._sync, on_wal=self._on_wal)
        self._file = files.file_at(self._name)
        return connection

    def is_replaced(self) -> bool:
        """Whether the opened file is no longer the one at `path`: it was deleted or replaced."""
        return files.file_at(self._name) != self._file

    def reopen(self) -> None:
        """Open the file that is at `path` now, creating it as needed, and close the old one."""
        old, self._connection = self._connection, self._connect()
        self.generation += 1
        old.close()

    def close(self) -> None:
        """Close the connection. Closing the last one merges the WAL into the database."""
        self._connection.close()

    def read(self, sql: str, *values: Any) -> list[Any]:
        """All rows of a query."""
        try:
            return self._connection.execute(sql, values).fetchall()
        except apsw.Error as error:
            raise explain(error, self.path) from error

    def writing(self) -> Transaction:
        """A new transaction, to be used in a `with` statement."""
        return Transaction(self._connection, self.path)

    def executemany(self, sql: str, values: list[tuple[Any, ...]]) -> None:
        """Run one statement for many rows, inside a transaction that was entered."""
        self._connection.executemany(sql, values)

    def changes(self) -> int:
        """How many rows the last statement changed."""
        return self._connection.changes()
