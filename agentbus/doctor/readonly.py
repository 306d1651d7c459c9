"""Reads the database for doctor, and leaves every file as it was. Opens no bus.

If other processes share a WAL, it is read together with them. If there is none, the file is read as if it could not
change. Implements [DOCTOR-2], [DOCTOR-3].
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import apsw

from agentbus.core import database, files
from agentbus.core.errors import BrokenSetup
from agentbus.core.machines import Machines
from agentbus.core.model import Peer
from agentbus.core.names import LINK_NAME
from agentbus.core.peers import peer_rows
from agentbus.core.queries import Queries

__all__ = ["ReadOnlyDatabase", "sqlite_version"]

# quick_check reads the whole file: 0.1 s for about 100 MB here. If it takes longer than this, it is reported as not
# finished.
_CHECK_S = 0.4
# Steps of SQLite's virtual machine between two looks at the clock: about 10 us.
_STEPS = 1_000
# A send or a mark holds the lock for 0.1 ms. A process that holds it for this long is in the way.
_LOCK_MS = 250
# WAL_WRITE_LOCK: the byte of the -shm file that a writer locks, https://sqlite.org/walformat.html (WAL locks).
_WRITE_LOCK_BYTE = 120


def sqlite_version() -> str:
    """The version of the SQLite library in use."""
    return apsw.sqlite_lib_version()


class ReadOnlyDatabase:
    """The database at `path`, opened to be read only. Use it as a context manager; the file must exist.

    Opening it and every method raise what `database.explain` names.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._wal = path.with_name(path.name + "-wal")
        self._shm = path.with_name(path.name + "-shm")
        # A WAL of another life of bus.db is not read with it.
        self.is_settled = files.is_settled(path)
        self.is_shared = self.is_settled and self._shm.exists()
        # With mode=ro alone, SQLite would still create the two files that a WAL needs, and leave them behind.
        how = "mode=ro" if self.is_shared else "immutable=1"
        with database.explained(path):
            self._connection = apsw.Connection(
                f"file:{quote(str(path))}?{how}", flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
            )
            # Otherwise closing the last connection would checkpoint and delete the WAL.
            self._connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            self._connection.set_busy_timeout(_LOCK_MS)
        self.queries = Queries(self._read)

    def __enter__(self) -> ReadOnlyDatabase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def _read(self, sql: str, *values: apsw.SQLiteValue) -> list[tuple[apsw.SQLiteValue, ...]]:
        with database.explained(self.path):
            try:
                return self._connection.execute(sql, values).fetchall()
            except apsw.SQLError as error:
                version = database.check_version(self._connection, self.path)
                if version >= database.SCHEMA:
                    raise
                raise BrokenSetup(
                    f"{self.path} has schema {version}, and this cannot be looked up in it",
                    hint="agentbus peers brings it forward",
                ) from error

    def schema(self) -> int:
        """The version of the schema. It can be newer than this program's. Raises as `database.check_version`."""
        with database.explained(self.path):
            return database.check_version(self._connection, self.path)

    def is_foreign(self) -> bool:
        """Whether the database has tables, but not ours."""
        names = {str(row[0]) for row in self._read("SELECT name FROM sqlite_master WHERE type = 'table'")}
        return bool(names) and not {"peers", "messages"} <= names

    def wal_bytes(self) -> int:
        """The size of the WAL; 0 when there is none."""
        try:
            return self._wal.stat().st_size
        except OSError:
            return 0

    def wal_pages(self) -> tuple[int, int]:
        """How many pages are in the WAL, and how many of these are in the database too. Asks SQLite, merges nothing.

        Not what the size of the file says: SQLite writes into it again from its beginning once all of it is merged.
        """
        if not self.is_shared:
            return 0, 0
        with database.explained(self.path), self._writer() as connection:
            connection.pragma("user_version")  # a connection that has read nothing does not know about the WAL yet
            return connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)

    @contextmanager
    def _writer(self) -> Iterator[apsw.Connection]:
        """A connection that could write, for what SQLite tells no other. It writes nothing, and merges nothing."""
        connection = apsw.Connection(str(self.path), flags=apsw.SQLITE_OPEN_READWRITE)
        try:
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            connection.set_busy_timeout(_LOCK_MS)
            yield connection
        finally:
            connection.close()

    def unmerged(self) -> bool:
        """Whether there is a WAL that is not read here, because no process has the database open."""
        return not self.is_shared and self.wal_bytes() > 0

    def integrity(self) -> list[str]:
        """The errors that PRAGMA quick_check finds; none if all is well. Raises TimeoutError when it takes too long."""
        give_up_at = time.monotonic() + _CHECK_S
        self._connection.set_progress_handler(lambda: time.monotonic() > give_up_at, _STEPS)
        try:
            rows = self._connection.execute("PRAGMA quick_check(5)").fetchall()
        except apsw.InterruptError:
            raise TimeoutError from None
        except apsw.Error as error:
            raise database.explain(error, self.path) from error
        finally:
            self._connection.set_progress_handler(None)
        return [str(row[0]) for row in rows if row[0] != "ok"]

    @property
    def machines(self) -> Machines:
        """What is known about other machines."""
        return Machines(self._read)

    def present(self) -> list[Peer]:
        """The peers whose rows say that they are present, by name. Without the link, which receives nothing itself."""
        return [peer for peer in peer_rows(self._read) if peer.name != LINK_NAME]

    def link(self) -> Peer | None:
        """The link, if its row says that it is present."""
        return next((peer for peer in peer_rows(self._read) if peer.name == LINK_NAME), None)

    def proof(self, session: str) -> str | None:
        """Where the record of what a session was given is: see Store.proof."""
        rows = self._read("SELECT proof FROM peers WHERE session = ?", session)
        return None if not rows or rows[0][0] is None else str(rows[0][0])

    def is_locked(self) -> bool:
        """Whether another process prevents all writes. Takes the lock for an instant, and writes nothing."""
        if not self.is_shared:
            return False
        with database.explained(self.path), self._writer() as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
            except apsw.BusyError:
                return True
        return False

    def lock_holder(self) -> int | None:
        """The pid of the process that holds the write lock, on systems that report it: proc_locks(5)."""
        try:
            inode = self._shm.stat().st_ino
            lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
        except OSError:
            return None
        for line in lines:
            # 1: POSIX  ADVISORY  WRITE 1234 00:1a:5678 120 120
            words = line.split()
            if len(words) == 8 and words[3] == "WRITE" and words[5].rsplit(":", 1)[-1] == str(inode):
                first, last = int(words[6]), _WRITE_LOCK_BYTE if words[7] == "EOF" else int(words[7])
                if first <= _WRITE_LOCK_BYTE <= last and int(words[4]) not in (-1, os.getpid()):
                    return int(words[4])
        return None
