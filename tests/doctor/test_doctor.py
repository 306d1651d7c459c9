"""`agentbus doctor` on things broken on purpose: does it name the fault, and does the suggested command cure it?"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

from agentbus import doctor, registry
from agentbus.core import config, database
from agentbus.core.config import prepare_home
from agentbus.core.findings import Finding, Level
from agentbus.core.store import Store
from agentbus.doctor import database as doctor_database
from agentbus.doctor import environment
from agentbus.doctor.database import check_database
from tests.e2e.test_reading import CLAUDE
from tests.support.client import RawClient
from tests.support.command import ClaudeOnPath, agentbus, claude_on_path, clean_env, until

pytestmark = pytest.mark.timeout(120)  # a loaded machine takes seconds for one process


@pytest.fixture
def claude(tmp_path: Path) -> ClaudeOnPath:
    return claude_on_path(tmp_path / "claude")


class Report:
    """A report of doctor."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        assert done.stderr == ""
        self.code = done.returncode
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]

    def wrong(self) -> dict[str, dict[str, Any]]:
        return {row["code"]: row for row in self.rows if row["level"] == "wrong"}

    def one(self, code: str) -> dict[str, Any]:
        (found,) = [row for row in self.rows if row["code"] == code]
        return found


def examine(home: Path, claude: ClaudeOnPath, *arguments: str, **variables: str) -> Report:
    variables = {**claude.variables, **variables}
    return Report(agentbus(home, "doctor", "--json", *arguments, cwd=claude.folder, **variables))


def type_in(command: str, home: Path, claude: ClaudeOnPath) -> None:
    """Type a suggested command into a shell, with agentbus on PATH."""
    folder = Path(sys.executable).parent
    variables = {**claude.variables, "PATH": f"{claude.variables['PATH']}:{folder}"}
    subprocess.run(
        ["/bin/sh", "-c", command], env=clean_env(home, **variables), check=True, capture_output=True, cwd=claude.folder
    )


def everything(home: Path) -> dict[str, bytes]:
    """Each file of the home with its content, except the one that readers share."""
    paths = [path for path in home.rglob("*") if not path.name.endswith("-shm")]
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths}


# -- a healthy bus -----------------------------------------------------------------------------------------


@pytest.mark.spec("DOCTOR-1", "DOCTOR-2", "DOCTOR-4", "DOCTOR-5")
def test_a_healthy_bus_is_looked_at_and_left_as_it_is(
    home: Path, claude: ClaudeOnPath, start: Callable[..., RawClient]
) -> None:
    report = examine(home, claude, PATH="/nowhere")
    assert (report.code, report.wrong()) == (0, {})
    assert not home.exists()
    agentbus(home, "enable", "claude-mcp", cwd=claude.folder, **claude.variables)
    session = start("web")
    session.handshake()
    agentbus(home, "send", "web", "hi")
    agentbus(home, "send", "later", "hi")
    session.wait_events(1)
    until(lambda: json.loads(agentbus(home, "status", "1", "--json").stdout)["state"] == "delivered")
    before = everything(home)
    report = examine(home, claude)
    assert report.wrong() == {}
    assert report.code == 0
    assert everything(home) == before
    codes = [row["code"] for row in report.rows]
    assert codes == [
        *("python", "packages", "sqlite", "settings", "home", "path", "file-system", "disk", "presence"),
        *("database", "schema", "wal", "lock", "settings", "settings", "trigger", "client", "claude", "registration"),
        *("permission", "command", "plugin", "client", "client", "client", "client"),
        *("wake", "delivery", "peer", "proof", "mailbox", "mailbox"),
    ]
    assert "a wake takes" in report.one("trigger")["seen"]
    assert '"web" is woken by socket' in report.one("wake")["seen"]
    assert "receives by channel: AGENTBUS_DELIVERY is channel" in report.one("delivery")["seen"]
    assert "nothing is pending; it last received a message" in report.one("peer")["seen"]
    mailboxes = [row["seen"] for row in report.rows if row["code"] == "mailbox"]
    assert mailboxes[0].startswith('"later": 1 pending (the oldest for ')
    assert mailboxes[1] == '"web": 0 pending, 1 delivered, 0 read'
    shown = agentbus(home, "doctor", cwd=claude.folder, **claude.variables)
    assert shown.returncode == 0
    assert shown.stdout.splitlines()[-1] == "nothing is wrong"


@pytest.mark.spec("DOCTOR-2")
def test_a_bus_that_nobody_has_open_is_left_as_it_is(home: Path, claude: ClaudeOnPath) -> None:
    agentbus(home, "send", "bob", "hi")
    before = everything(home)
    examine(home, claude)
    examine(home, claude, "bob")
    assert everything(home) == before
    assert sorted(path.name for path in home.iterdir()) == ["bus.db", "bus.db-owner"]


@pytest.mark.spec("DOCTOR-2")
def test_the_wal_of_a_killed_session_is_read_and_left(
    home: Path, claude: ClaudeOnPath, start: Callable[..., RawClient]
) -> None:
    session = start("web")
    session.handshake()
    session.call("send_message", to="bob", text="only in the WAL")
    session.process.kill()
    session.process.wait()
    before = everything(home)
    assert before[str(home / "bus.db-wal")], "nobody is left to merge it but whoever looks"
    report = examine(home, claude, PATH="/nowhere")
    assert '"bob": 1 pending' in report.one("mailbox")["seen"]
    assert everything(home) == before


def test_it_loads_nothing_that_is_slow(home: Path) -> None:
    code = (
        "import sys; sys.argv = ['agentbus', 'doctor']\n"
        "from agentbus.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: print({'mcp', 'mcp_types', 'watchfiles'} & set(sys.modules))"
    )
    env = clean_env(home, PATH="/nowhere", HOME=str(home.parent))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


# -- five things broken on purpose, and more ---------------------------------------------------------------


@pytest.fixture
def unflagged(home: Path, tmp_path: Path) -> Iterator[RawClient]:
    """A session under a `claude` that was started without the channel flag."""
    script = tmp_path / "bin" / "claude"
    script.parent.mkdir()
    script.write_text(CLAUDE)
    script.chmod(0o755)
    client = RawClient(home, "web", command=[str(script)], AGENTBUS_DELIVERY="auto")
    client.handshake()
    yield client
    client.end()


@pytest.mark.spec("DOCTOR-5", "DOCTOR-6")
def test_1_the_flag_is_missing(home: Path, claude: ClaudeOnPath, unflagged: RawClient) -> None:
    agentbus(home, "send", "web", "hi")
    for arguments in ((), ("web",)):
        report = examine(home, claude, *arguments, PATH="/nowhere")
        assert report.code == 1
        found = report.wrong()["delivery"]
        assert "claude was started without --dangerously-load-development-channels server:agentbus" in found["seen"]
        assert found["remedy"] == (
            "end that session, and start it with: "
            "AGENTBUS_NAME=web claude --dangerously-load-development-channels server:agentbus"
        )
    assert report.rows[0]["code"] == "verdict"
    assert report.rows[0]["seen"] == 'a message to "web" does not reach its model now: see delivery'
    assert '"web": 1 pending, the oldest for ' in report.one("pending")["seen"]


@pytest.mark.spec("DOCTOR-4")
def test_2_the_registration_is_stale(home: Path, claude: ClaudeOnPath) -> None:
    gone = json.dumps({"type": "stdio", "command": "/old/agentbus", "args": ["serve", "claude-mcp"], "env": {}})
    claude.run("mcp", "add-json", "-s", "user", "agentbus", gone)
    report = examine(home, claude)
    assert report.code == 1
    found = report.wrong()["registration"]
    assert "registered as /old/agentbus serve claude-mcp, which does not exist or cannot be run" in found["seen"]
    type_in(found["remedy"], home, claude)
    assert examine(home, claude).code == 0


def test_2b_the_registered_command_does_not_run(home: Path, claude: ClaudeOnPath) -> None:
    broken = claude.folder / "agentbus"
    broken.write_text("#!/bin/sh\necho ModuleNotFoundError >&2; exit 1\n")
    broken.chmod(0o755)
    entry = {"type": "stdio", "command": str(broken), "args": ["serve", "claude-mcp"], "env": {}}
    claude.run("mcp", "add-json", "-s", "user", "agentbus", json.dumps(entry))
    assert "registration" in examine(home, claude).wrong()


def test_3_the_home_is_world_writable(home: Path, claude: ClaudeOnPath) -> None:
    agentbus(home, "send", "bob", "hi")
    home.chmod(0o777)
    for arguments in ((), ("bob",)):
        report = examine(home, claude, *arguments, PATH="/nowhere")
        assert report.code == 1
        found = report.wrong()["home"]
        assert found["seen"] == f"{home} can be written by other users (mode 0777)"
    type_in(found["remedy"], home, claude)
    assert examine(home, claude, PATH="/nowhere").code == 0


@pytest.mark.spec("DOCTOR-5")
def test_4_a_peer_is_dead(home: Path, claude: ClaudeOnPath, start: Callable[..., RawClient]) -> None:
    session = start("web")
    session.handshake()
    session.process.kill()
    session.process.wait()
    report = examine(home, claude, PATH="/nowhere")
    assert report.code == 0
    assert "has ended without leaving; its mail is safe" in report.one("peer")["seen"]
    assert report.one("peer")["remedy"] == "the next session, broadcast or message to it clears that away"
    asked = examine(home, claude, "web", PATH="/nowhere")
    assert asked.wrong()["running"]["seen"] == '"web" is not running'
    clients = ("claude", "codex", "gemini", "opencode", "qwen")
    assert asked.wrong()["running"]["remedy"] == " or ".join(f"AGENTBUS_NAME=web {one}" for one in clients)
    agentbus(home, "broadcast", "anybody there?")
    assert "nobody is online" in examine(home, claude, PATH="/nowhere").one("peer")["seen"]


@contextmanager
def locked(home: Path) -> Iterator[int]:
    """The database, locked by a process of its own."""
    code = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('BEGIN IMMEDIATE'); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(home / "bus.db")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"locked\n"
        try:
            yield child.pid
        finally:
            child.kill()


@pytest.mark.spec("DOCTOR-3")
def test_5_the_database_is_locked(home: Path, claude: ClaudeOnPath) -> None:
    agentbus(home, "send", "bob", "hi")
    with locked(home) as pid:
        for arguments in ((), ("bob",)):
            report = examine(home, claude, *arguments, PATH="/nowhere")
            assert report.code == 1
            found = report.wrong()["lock"]
            assert "is locked: nothing can be sent" in found["seen"]
            if Path("/proc/locks").exists():
                assert f"process {pid} holds it" in found["seen"]
                assert found["remedy"] == f"let it finish, or kill {pid}"
        os.kill(pid, signal.SIGKILL)
    assert examine(home, claude, PATH="/nowhere").code == 0


@pytest.mark.spec("DOCTOR-3")
@pytest.mark.parametrize(
    ("break_it", "code", "sentence"),
    [
        (lambda path: path.write_bytes(b"no database " * 1_000), "database", "is not a healthy SQLite database"),
        (
            lambda path: (_execute(path, "UPDATE bus SET oldest = 99"), _execute(path, "PRAGMA user_version = 99")),
            "schema",
            "schema 99, this agentbus knows up to",
        ),
        (lambda path: _execute(path, "DROP TABLE messages"), "schema", "is a database of another program"),
        (lambda path: path.chmod(0o666), "home", "can be written by other users (mode 0666)"),
    ],
)
def test_a_database_that_cannot_be_used_is_named(
    home: Path, claude: ClaudeOnPath, break_it: Callable[[Path], Any], code: str, sentence: str
) -> None:
    agentbus(home, "send", "bob", "hi")
    break_it(home / "bus.db")
    for arguments in ((), ("bob",)):
        report = examine(home, claude, *arguments, PATH="/nowhere")
        assert report.code == 1
        assert sentence in report.wrong()[code]["seen"]
        assert report.wrong()[code]["remedy"]


def _execute(path: Path, sql: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(sql)
    connection.commit()
    connection.close()


def test_a_damaged_page_is_found(home: Path, claude: ClaudeOnPath) -> None:
    agentbus(home, "send", "bob", "hi")
    connection = sqlite3.connect(home / "bus.db")
    connection.executemany(
        "INSERT INTO messages (sender, recipient, body, sent_at) VALUES ('a', 'bob', ?, 1)", [("y" * 3_000,)] * 200
    )
    connection.commit()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    with (home / "bus.db").open("r+b") as file:
        for page in range(80, 120):  # behind those that every look reads
            file.seek(page * 4_096)
            file.write(b"\xff" * 64)
    report = examine(home, claude, PATH="/nowhere")
    assert report.code == 1
    assert "database" in report.wrong()
    assert report.wrong()["database"]["remedy"] == "agentbus doctor --set-aside"
    type_in("agentbus doctor --set-aside", home, claude)
    assert examine(home, claude, PATH="/nowhere").code == 0
    assert len(list(home.glob("bus.db.aside-*"))) == 1


@pytest.mark.spec("DOCTOR-5")
def test_a_suspended_session_and_a_missing_socket_are_named(
    home: Path, claude: ClaudeOnPath, start: Callable[..., RawClient]
) -> None:
    session = start("web")
    session.handshake()
    shutil.rmtree(home / "sock")
    found = examine(home, claude, PATH="/nowhere").wrong()
    assert '"web" cannot be woken: its socket is absent' in found["wake"]["seen"]
    session.process.send_signal(signal.SIGSTOP)
    try:
        found = examine(home, claude, "web", PATH="/nowhere").wrong()
        assert "is suspended" in found["peer"]["seen"]
        assert found["peer"]["remedy"] == f"kill -CONT {session.process.pid}"
    finally:
        session.process.send_signal(signal.SIGCONT)


@pytest.mark.spec("DOCTOR-6", "WAKE-5")
def test_what_is_asked_about_one_peer(home: Path, claude: ClaudeOnPath, start: Callable[..., RawClient]) -> None:
    asked = examine(home, claude, "web", PATH="/nowhere")
    assert asked.code == 1
    assert asked.wrong()["running"]["seen"] == '"web" is not running and was not seen recently'
    session = start("backend", AGENTBUS_TRIGGER="poll")
    session.handshake()
    agentbus(home, "send", "web", "hi", "--from", "ci")
    assert examine(home, claude, "ci", PATH="/nowhere").wrong()["running"]["seen"] == '"ci" is not running'
    asked = examine(home, claude, "backnd", PATH="/nowhere")
    assert asked.wrong()["running"]["remedy"] == "did you mean backend?"
    asked = examine(home, claude, "Backend", PATH="/nowhere")
    sentence = 'a message to "backend" is pushed into its session, if its account has channels'
    assert (asked.code, asked.rows[0]["seen"]) == (0, sentence)
    assert "fallen back to poll" in asked.one("trigger")["seen"]
    assert "agentbus cannot see whether the account has channels" in asked.one("gate")["seen"]
    assert asked.one("gate")["remedy"].endswith("start it with: AGENTBUS_NAME=backend claude")
    start("asks", AGENTBUS_DELIVERY="pull").handshake()
    asked = examine(home, claude, "asks", PATH="/nowhere")
    sentence = 'a message to "asks" may wait until its model calls check_messages: see delivery'
    assert (asked.code, asked.rows[0]["level"], asked.rows[0]["seen"]) == (0, "note", sentence)
    session.call("set_name", name="api")
    asked = examine(home, claude, "backend", PATH="/nowhere")
    assert asked.one("name")["seen"] == '"backend" is called "api" now'
    done = agentbus(home, "doctor", "!!")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    _execute(
        home / "bus.db",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 10000)"
        " INSERT INTO messages (sender, recipient, body, sent_at) SELECT 'a', 'bob', 'x', 1 FROM n",
    )
    asked = examine(home, claude, "bob", PATH="/nowhere")
    assert "it is full, and refuses new messages" in asked.wrong()["mailbox"]["seen"]


@pytest.mark.spec("DOCTOR-5")
def test_a_misspelt_mailbox_and_what_the_dead_have_left_are_named(
    home: Path, claude: ClaudeOnPath, start: Callable[..., RawClient]
) -> None:
    start("backend").handshake()
    agentbus(home, "send", "backnd", "hi")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as left:
        left.bind(str(home / "sock" / "left.sock"))
    report = examine(home, claude, PATH="/nowhere")
    (row,) = [row for row in report.rows if row["code"] == "mailbox"]
    assert (row["level"], row["remedy"]) == ("note", "did you mean backend?")
    orphan = report.one("orphan")
    assert orphan["seen"] == f"{home / 'sock' / 'left.sock'} was left behind by a process that is dead"
    type_in(orphan["remedy"], home, claude)
    assert "orphan" not in {row["code"] for row in examine(home, claude, PATH="/nowhere").rows}


@pytest.mark.spec("MOD-1", "DOCTOR-3")
def test_a_broken_manifest_is_a_finding(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tmp_path.joinpath("x").mkdir()
    tmp_path.joinpath("x", "module.json").write_text("{")
    monkeypatch.setattr(registry, "_ADAPTERS", tmp_path)
    monkeypatch.setenv("AGENTBUS_HOME", str(home))
    assert doctor.run(None, as_json=True) == 1
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    (found,) = [row for row in rows if row["level"] == "wrong"]
    assert found["code"] == "module"
    assert "module.json is not a valid module manifest" in found["seen"]
    assert found["remedy"].startswith("reinstall agentbus")


def test_settings_that_cannot_be_used_and_misspelt_ones_are_named(home: Path, claude: ClaudeOnPath) -> None:
    report = examine(home, claude, PATH="/nowhere", AGENTBUS_POLL_MS="fast", AGENTBUS_DELIVRY="pull")
    assert report.code == 1
    assert report.wrong()["settings"]["seen"] == "AGENTBUS_POLL_MS is 'fast'"
    notes = [row["seen"] for row in report.rows if row["level"] == "note"]
    assert "AGENTBUS_DELIVRY is set, but agentbus does not know it" in notes
    report = examine(home, claude, PATH="/nowhere", AGENTBUS_TRIGGER="telepathy")
    assert report.wrong()["trigger"]["seen"] == "AGENTBUS_TRIGGER is 'telepathy'"
    report = examine(home, claude, PATH="/nowhere", AGENTBUS_TRIGGER="file-watch")
    assert report.one("trigger")["seen"].startswith("file-watch: a wake takes ")
    report = examine(home, claude, PATH="/nowhere", AGENTBUS_TRIGGER="poll")
    assert report.one("trigger")["seen"].startswith("poll: nothing wakes the sessions")


@pytest.mark.spec("DOCTOR-3")
def test_a_check_that_fails_hinders_no_other(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def fall(_home: Path) -> Iterator[Any]:
        raise RuntimeError("out of leeches")

    monkeypatch.setattr(doctor, "check_home", fall)
    monkeypatch.setenv("PATH", "/nowhere")
    found = list(doctor._examine(config.load(home=home)))
    (failed,) = [one for one in found if one.level is Level.WRONG]
    assert failed.code == "home"
    assert "RuntimeError: out of leeches" in failed.seen
    assert len(found) > 8


@pytest.mark.spec("DOCTOR-1")
def test_the_codes_are_those_of_the_spec() -> None:
    root = Path(__file__).parents[2]
    source = "".join(path.read_text(encoding="utf-8") for path in root.joinpath("agentbus").rglob("*.py"))
    used = set(re.findall(r'(?:Finding\(|safely\(|from_error\()\s*"([a-z-]+)"', source))
    clause = (root / "SPEC.md").read_text(encoding="utf-8").split("The codes are ")[1].split("\n- **")[0]
    assert set(re.findall(r"`([a-z-]+)`", clause)) == used


@pytest.mark.parametrize(
    ("version", "requirement", "fits"),
    [
        ("1.2.0", "x>=1.2", True),
        ("1.1.9", "x>=1.2", False),
        ("2.0", "x<2,>=1", False),
        ("1.9", "x<2,>=1", True),
        ("3.54.1.0", "apsw>=3.50", True),
        ("2.4", "x!=2.3", True),
    ],
)
def test_versions_against_what_is_asked_for(version: str, requirement: str, fits: bool) -> None:
    assert environment._fits(version, requirement) is fits


def test_a_network_file_system_and_a_full_disk_are_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "_file_system", lambda _path: "nfs4")
    monkeypatch.setattr(environment, "_LEAST_FREE_BYTES", 1 << 60)
    found = {one.code: one for one in environment.check_place(tmp_path)}
    assert found["file-system"].level is Level.WRONG
    assert "nfs4, which cannot share a WAL" in found["file-system"].seen
    assert found["disk"].level is Level.WRONG
    long = tmp_path.joinpath(*["x" * 50] * 3)
    assert {one.code: one for one in environment.check_place(long)}["path"].level is Level.NOTE


def test_the_time_it_takes_does_not_grow_with_the_history(home: Path, claude: ClaudeOnPath) -> None:
    agentbus(home, "send", "bob", "hi")
    connection = sqlite3.connect(home / "bus.db")
    connection.executemany(
        "INSERT INTO messages (sender, recipient, body, sent_at, delivered_at) VALUES ('a', 'bob', ?, 1, ?)",
        [("x" * 1_000, int(time.time() * 1_000))] * 100_000,
    )
    connection.commit()
    connection.close()
    report = examine(home, claude, PATH="/nowhere")
    # A check that would take long is reported as not finished; the rest of the report is there.
    assert report.one("database")["level"] in ("ok", "note")
    assert report.code == 0


@pytest.mark.spec("STORE-8", "DOCTOR-2")
def test_a_wal_of_another_life_is_named_and_not_read(home: Path, claude: ClaudeOnPath) -> None:
    agentbus(home, "send", "bob", "in the database")
    shutil.copy(home / "bus.db", home / "backup")
    code = (
        "import os; from agentbus import registry; from agentbus.core import config\n"
        "bus, _ = registry.open_bus(config.load(), busy_ms=1000); bus.send('a', 'carol', 'in the WAL'); os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code], env=clean_env(home), check=True)
    os.replace(home / "backup", home / "bus.db")
    before = everything(home)
    report = examine(home, claude, PATH="/nowhere")
    assert "belongs to another bus.db" in report.one("wal")["seen"]
    assert [row["seen"][:5] for row in report.rows if row["code"] == "mailbox"] == ['"bob"']
    assert everything(home) == before


@pytest.mark.spec("OLD-1")
def test_mail_that_waits_for_more_than_a_day_is_noted(home: Path, claude: ClaudeOnPath) -> None:
    agentbus(home, "send", "web", "old", "--from", "ci")
    agentbus(home, "send", "web", "new", "--from", "ci")
    with sqlite3.connect(home / "bus.db") as database:
        database.execute("UPDATE messages SET sent_at = sent_at - 86400001 WHERE id = 1")
    database.close()
    found = examine(home, claude).one("mailbox")
    assert found["level"] == "note"
    assert found["seen"].endswith("; 1 of them waits for more than a day")
    assert found["remedy"].endswith("agentbus inbox web shows them; --discard --before 1d removes them")


@pytest.mark.spec("MOD-4")
def test_the_permission_that_an_unattended_session_needs_is_named(home: Path, claude: ClaudeOnPath) -> None:
    agentbus(home, "enable", "claude-mcp", cwd=claude.folder, **claude.variables)
    found = examine(home, claude).one("permission")
    assert (found["level"], "mcp__agentbus" in found["remedy"]) == ("note", True)
    folder = Path(claude.variables.get("CLAUDE_CONFIG_DIR", claude.home / ".claude"))
    folder.mkdir(exist_ok=True)
    for settings, level in (("{}", "note"), ("[", "note"), ('{"permissions": {"allow": ["mcp__agentbus"]}}', "ok")):
        (folder / "settings.json").write_text(settings)
        assert examine(home, claude).one("permission")["level"] == level


@pytest.mark.spec("DOCTOR-1", "DOCTOR-2", "STORE-5")
def test_whether_the_wal_is_merged_is_asked_and_not_guessed_from_its_size(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(prepare_home(home), busy_ms=1_000, on_wal=lambda _pages: None)
    reader = apsw.Connection(str(home / "bus.db"))
    reader.execute("BEGIN; SELECT count(*) FROM messages").fetchall()
    for _ in range(3):
        store.send("a", "b", "x" * 1_000_000, now=1)

    def finding() -> Finding:
        (found,) = (one for one in check_database(home) if one.code == "wal")
        return found

    database.checkpoint(home / "bus.db")
    assert finding().level is Level.OK
    monkeypatch.setattr(doctor_database, "_UNMERGED_PAGES", 500)
    assert finding().level is Level.WRONG
    assert "3 MiB in the WAL are not merged" in finding().seen
    reader.execute("COMMIT")
    before = everything(home)
    assert "a program keeps an old state open" in finding().seen, "looking merges nothing"
    assert everything(home) == before
    database.checkpoint(home / "bus.db")
    assert (finding().level, finding().seen.endswith("KiB, all of it is merged")) == (Level.OK, True)
    assert (home / "bus.db-wal").stat().st_size > 3_000_000
    reader.close()
    store.close()


@pytest.mark.spec("CONF-5")
def test_how_long_history_is_kept_by_the_bus_and_by_the_environment(home: Path, claude: ClaudeOnPath) -> None:
    agentbus(home, "config", "retention-hours", "48")
    for said, level, seen in (
        ("", "ok", "retention-hours is 48 on this bus"),
        ("24", "note", "AGENTBUS_RETENTION_HOURS is 24 here: it does not cut that short"),
        (
            "100",
            "note",
            "AGENTBUS_RETENTION_HOURS is 100 here: a session that starts with it raises that for everybody",
        ),
    ):
        report = examine(home, claude, AGENTBUS_RETENTION_HOURS=said)
        (found,) = (row for row in report.rows if row["seen"].startswith("retention-hours"))
        assert (found["code"], found["level"]) == ("settings", level)
        assert found["seen"].endswith(seen)
