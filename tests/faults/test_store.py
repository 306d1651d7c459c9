"""Faults of the store, for real: a WAL that nobody merges, an upgrade below running sessions, a disk that fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw
import pytest

from agentbus.core import database
from agentbus.core.store import Store
from tests.e2e.test_sessions import rows
from tests.support.client import RawClient
from tests.support.command import PATIENCE_S, agentbus, clean_env, until

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
UPGRADED = "agentbus was upgraded while this session ran: restart it (/mcp reconnect)"
LARGE = {"AGENTBUS_MAX_BYTES": "1048576"}


def wal_bytes(home: Path) -> int:
    return (home / "bus.db-wal").stat().st_size


@contextmanager
def watching(home: Path) -> Iterator[None]:
    """`agentbus watch`, which keeps the database open and writes nothing."""
    command = [sys.executable, "-m", "agentbus", "watch", "--json"]
    watch = subprocess.Popen(command, env=clean_env(home), stdout=subprocess.DEVNULL)
    try:
        until(lambda: list((home / "watch").glob("*.sock")), "the socket of watch")
        yield
    finally:
        watch.terminate()
        watch.wait(PATIENCE_S)


@pytest.mark.spec("STORE-5")
def test_scripts_that_send_beside_a_watch_keep_the_wal_small(home: Path) -> None:
    text = "x" * 1_000_000
    with watching(home):
        for _ in range(24):
            assert agentbus(home, "send", "bob", "-", stdin=text, **LARGE).returncode == 0
        # Unmerged, it would be 24 MB. It is merged with the 17th message, and used from its beginning again.
        assert wal_bytes(home) < 18_000_000
        assert (home / "bus.db").stat().st_size > 16_000_000


@pytest.mark.spec("STORE-5")
def test_a_wal_that_was_large_once_is_merged_and_cut_by_the_next_sends(home: Path) -> None:
    agentbus(home, "send", "bob", "first")
    with watching(home):
        # A program that has merged nothing, and was killed.
        code = (
            "import os; from pathlib import Path; from agentbus.core.store import Store\n"
            "store = Store(Path(os.environ['AGENTBUS_HOME']) / 'bus.db', busy_ms=1000)\n"
            "for _ in range(40): store.send('a', 'carol', 'x' * 1_000_000, now=1)\n"
            "os._exit(0)"
        )
        subprocess.run([sys.executable, "-c", code], env=clean_env(home), check=True)
        assert wal_bytes(home) > 40_000_000
        for _ in range(2):  # the first finds it large and merges it, the second begins it anew
            assert agentbus(home, "send", "bob", "hi").returncode == 0
        assert wal_bytes(home) <= database._WAL_LIMIT_BYTES


@pytest.mark.spec("STORE-5")
def test_programs_that_send_without_a_pause_do_not_outrun_the_checkpoints(home: Path) -> None:
    """A checkpoint that lets writers go on never reaches the end of the WAL, and no writer begins it anew."""
    home.mkdir(mode=0o700)
    told: list[int] = []
    begun_anew = threading.Event()

    def note(pages: int) -> None:
        if told and pages < told[-1] / 2:
            begun_anew.set()
        told.append(pages)

    stores = [Store(home / "bus.db", busy_ms=10_000, on_wal=note) for _ in range(2)]
    give_up_at = time.monotonic() + PATIENCE_S

    def send(store: Store) -> None:
        while not begun_anew.is_set() and time.monotonic() < give_up_at:
            # Many mailboxes: one would be full too soon.
            store.send("a", f"b{len(told) // 5_000}", "x" * 20_000, now=1)

    senders = [threading.Thread(target=send, args=(store,)) for store in stores]
    for sender in senders:
        sender.start()
    while any(sender.is_alive() for sender in senders):
        database.checkpoint(home / "bus.db")
    for sender in senders:
        sender.join()
    assert begun_anew.is_set(), f"{max(told):,} pages"
    for store in stores:
        store.close()


# -- an upgrade ------------------------------------------------------------------------------------------------


class Installation:
    """A copy of agentbus in a folder of its own, as an installation is, that can be upgraded in place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "agentbus", folder / "agentbus", ignore=shutil.ignore_patterns("__pycache__"))
        self.variables = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}

    def upgrade(self, sql: str) -> None:
        """Put the next version there, whose schema is one higher."""
        package = self.folder / "agentbus" / "core"
        new = database.SCHEMA + 1
        (package / "migrations" / f"{new:04d}_next.sql").write_text(sql)
        source = (package / "database.py").read_text()
        assert f"\nSCHEMA = {database.SCHEMA}\n" in source
        (package / "database.py").write_text(source.replace(f"\nSCHEMA = {database.SCHEMA}\n", f"\nSCHEMA = {new}\n"))

    def run(self, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return agentbus(home, *arguments, cwd=self.folder, **self.variables)


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return Installation(tmp_path / "site")


def version(home: Path) -> int:
    return int(rows(home, "PRAGMA user_version")[0][0])


@pytest.mark.spec("STORE-9")
@pytest.mark.parametrize(
    "change",
    ["ALTER TABLE messages RENAME COLUMN sender TO author", "CREATE TABLE more (id INTEGER) STRICT"],
    ids=["its SQL would fail", "its SQL would do the wrong thing"],
)
def test_a_session_that_an_upgrade_left_behind_says_so_and_writes_nothing(
    home: Path, installation: Installation, start: Callable[..., RawClient], change: str
) -> None:
    session = start("web", cwd=installation.folder, **installation.variables)
    session.handshake()
    session.call("send_message", to="bob", text="before")
    installation.upgrade(f"{change}; UPDATE bus SET oldest = {database.SCHEMA + 1}")
    installation.run(home, "peers")  # whose own statements may fail: it brings the file forward when it opens it
    assert version(home) == database.SCHEMA + 1
    for tool, arguments in (
        ("send_message", {"to": "bob", "text": "x"}),
        ("broadcast", {"text": "x"}),
        ("check_messages", {}),
        ("list_peers", {}),
        ("set_name", {"name": "api"}),
    ):
        assert session.refuse(tool, **arguments) == UPGRADED
    assert rows(home, "SELECT count(*) FROM messages") == [(1,)]


@pytest.mark.spec("STORE-9")
def test_a_session_goes_on_after_a_migration_that_says_it_can(
    home: Path, installation: Installation, start: Callable[..., RawClient]
) -> None:
    session = start("web", cwd=installation.folder, **installation.variables)
    session.handshake()
    installation.upgrade(f"CREATE TABLE more (id INTEGER) STRICT; UPDATE bus SET oldest = {database.SCHEMA}")
    assert installation.run(home, "send", "web", "from the new one").returncode == 0
    assert version(home) == database.SCHEMA + 1
    assert session.wait_events(1)[0]["content"] == "from the new one"
    assert session.call("send_message", to="web", text="from the old one").startswith("sent")
    # And so does an old program that is only started now.
    assert agentbus(home, "send", "web", "x").returncode == 0
    assert agentbus(home, "doctor", PATH="/nowhere").stdout.count("can go on with it") == 1


@pytest.mark.spec("STORE-9", "STORE-6")
def test_a_session_that_opens_anew_does_not_migrate_by_the_files_of_the_new_program(
    home: Path, installation: Installation, start: Callable[..., RawClient]
) -> None:
    session = start("web", cwd=installation.folder, **installation.variables)
    session.handshake()
    installation.upgrade(f"CREATE TABLE more (id INTEGER) STRICT; UPDATE bus SET oldest = {database.SCHEMA + 1}")
    for name in os.listdir(home):
        if name.startswith("bus.db"):
            os.unlink(home / name)
    assert session.call("send_message", to="bob", text="into a new file").startswith("queued")
    assert version(home) == database.SCHEMA


@pytest.mark.spec("STORE-9")
def test_a_database_put_back_in_an_older_state_is_said_and_brought_forward(
    home: Path, start: Callable[..., RawClient]
) -> None:
    session = start("web")
    session.handshake()
    old = apsw.Connection(str(home / "old.db"))
    for number, sql in database.migrations():
        if number < database.SCHEMA:
            old.execute(sql)
            old.execute(f"PRAGMA user_version = {number}")
    with apsw.Connection(str(home / "bus.db")) as there, there.backup("main", old, "main") as backup:
        backup.step()  # into the same file, as `sqlite3 bus.db .restore` does
    there.close()
    old.close()
    assert "was put back in an older state, schema" in session.refuse("send_message", to="bob", text="x")
    agentbus(home, "peers")
    assert session.call("send_message", to="bob", text="x").startswith("queued")


# -- a disk that fails ---------------------------------------------------------------------------------------------


@pytest.mark.spec("ERR-2", "READ-1")
@pytest.mark.skipif(shutil.which("prlimit") is None, reason="nothing here can make the writes of a process fail")
def test_marks_that_meet_an_io_error_are_sentences(home: Path, start: Callable[..., RawClient]) -> None:
    session = start("bob", AGENTBUS_DELIVERY="pull")
    session.handshake()
    assert agentbus(home, "send", "bob", "hello").returncode == 0
    # From here on, its writes into files fail: SQLite calls that an I/O error.
    subprocess.run(["prlimit", "--pid", str(session.process.pid), "--fsize=1000:"], check=True)
    assert "hello" in session.call("check_messages")
    until(lambda: "messages could not be marked as read: " in session.stderr)
    assert "disk I/O error" in session.refuse("send_message", to="x", text="y")
    assert "hello" in session.call("check_messages"), "it is unread, and comes again"
    session.end()
    assert "Traceback" not in session.stderr
    assert all(line.startswith("agentbus: ") for line in session.stderr.splitlines())
    assert rows(home, "SELECT read_at FROM messages") == [(None,)]
