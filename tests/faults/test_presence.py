"""Nobody else ends a session: other pid namespaces, clocks, stops, shortages, and files that are moved under it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.test_sessions import present, rows, sockets
from tests.support.client import RawClient
from tests.support.command import PATIENCE_S, agentbus, clean_env, until

pytestmark = pytest.mark.timeout(120)

Start = Callable[..., RawClient]
ROOT = Path(__file__).parents[2]
# Ten heartbeats a second: what goes wrong with a heartbeat goes wrong within the second that a test waits.
FAST = (
    "import sys; sys.argv = ['agentbus', 'serve', 'claude-mcp']\n"
    "from agentbus.core import upkeep\n"
    "from agentbus.core.session import Session\n"
    "Session.__init__.__kwdefaults__['heartbeat_s'] = 0.1\n"
    "upkeep.MOST_QUIET = 1_000_000\n"
)
RUN = "from agentbus.__main__ import main; main()\n"
BEATS_S = 1.0


@pytest.fixture
def fast(start: Start) -> Start:
    """Starts servers with ten heartbeats a second; `before` is run first, `under` starts it (`unshare ...`)."""

    def start_fast(name: str, *, before: str = "", under: tuple[str, ...] = (), **options) -> RawClient:
        client = start(name, command=[*under, sys.executable, "-c", FAST + before + RUN], **options)
        client.handshake()
        return client

    return start_fast


def can_unshare(*flags: str) -> bool:
    unshare = shutil.which("unshare")
    return unshare is not None and subprocess.run([unshare, *flags, "true"], capture_output=True).returncode == 0


namespaces = pytest.mark.skipif(
    not can_unshare("--pid", "--fork", "--mount-proc"), reason="no pid namespaces can be made here (unshare)"
)


def names(home: Path, **variables: str) -> list[str]:
    """The peers that are online, as the command line says."""
    rows_of = map(json.loads, agentbus(home, "peers", "--json", **variables).stdout.splitlines())
    return [row["name"] for row in rows_of if row["online"]]


# -- other pid namespaces ------------------------------------------------------------------------------------


@namespaces
@pytest.mark.spec("PRES-1", "PRES-4")
def test_a_look_from_another_pid_namespace_ends_nobody(home: Path, fast: Start) -> None:
    session = fast("web")
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m", "agentbus", "peers", "--json"]
    for _ in range(3):
        seen = subprocess.run(command, env=clean_env(home), capture_output=True, text=True, timeout=PATIENCE_S)
        assert json.loads(seen.stdout)["name"] == "web", seen.stderr
    agentbus(home, "send", "web", "still there?")
    assert session.wait_events(1)[0]["content"] == "still there?"
    assert (names(home), len(sockets(home))) == (["web"], 1)


@namespaces
@pytest.mark.spec("PRES-1", "PRES-2")
def test_sessions_in_two_pid_namespaces_live_side_by_side(home: Path, fast: Start) -> None:
    outside = fast("outside")
    inside = fast("inside", under=("unshare", "--pid", "--fork", "--mount-proc"))
    for number in range(5):
        time.sleep(BEATS_S / 3)  # several heartbeats of each
        assert names(home) == ["inside", "outside"]
        outside.call("send_message", to="inside", text=f"in {number}")
        inside.call("send_message", to="outside", text=f"out {number}")
    inside.wait_events(5)
    outside.wait_events(5)
    assert inside.texts() == [f"in {number}" for number in range(5)]
    assert (outside.stderr, inside.stderr) == ("", "")


@namespaces
@pytest.mark.spec("LIFE-2", "NAME-7")
def test_a_server_whose_parent_cannot_be_seen_lives_until_stdin_ends(home: Path, fast: Start) -> None:
    """As with `docker run -i`: its parent has the pid 0."""
    session = fast("web", before="import os; assert os.getppid() == 0\n", under=("unshare", "--pid", "--fork"))
    time.sleep(BEATS_S)
    assert session.process.poll() is None
    assert names(home) == ["web"]
    session.close_stdin()
    assert session.process.wait(PATIENCE_S) == 0
    assert names(home) == []


# -- clocks and stops ----------------------------------------------------------------------------------------


@pytest.fixture
def shim(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A file that shifts the wall clock of every process with these variables, by the seconds in it."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler to build the clock shim with, or no LD_PRELOAD")
    library, offset = tmp_path / "shim.so", tmp_path / "offset"
    source = ROOT / "tests" / "support" / "clock_shim.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    offset.write_text("0")
    return offset, {"LD_PRELOAD": str(library), "SHIM_FILE": str(offset)}


@pytest.mark.spec("PRES-1")
@pytest.mark.parametrize("seconds", [60, 86_400 * 400, -86_400])
def test_a_jump_of_the_clock_ends_nobody(
    home: Path, fast: Start, shim: tuple[Path, dict[str, str]], seconds: int
) -> None:
    offset, variables = shim
    web = fast("web", **variables)
    api = fast("api", **variables)
    offset.write_text(str(seconds))  # the machine slept, and wakes
    assert "sent to 1: web" in api.call("broadcast", text="awake?")
    assert [
        json.loads(line)["name"] for line in agentbus(home, "peers", "--json", **variables).stdout.splitlines()
    ] == [
        "api",
        "web",
    ]
    newcomer = fast("web", **variables)
    assert newcomer.call("whoami").startswith('you are "web-2"')
    time.sleep(BEATS_S / 2)
    assert web.call("whoami").startswith('you are "web"')
    assert web.wait_events(1)[0]["content"] == "awake?"
    assert (web.stderr, api.stderr) == ("", "")


@pytest.mark.spec("PRES-1")
def test_a_stopped_session_keeps_its_name_and_gets_its_mail_when_it_goes_on(home: Path, fast: Start) -> None:
    web, api = fast("web"), fast("api")
    os.kill(web.process.pid, signal.SIGSTOP)
    try:
        time.sleep(BEATS_S)
        assert names(home) == ["api", "web"]
        assert api.call("send_message", to="web", text="sleep well").endswith("(online)")
        newcomer = fast("web")
        assert newcomer.call("whoami").startswith('you are "web-2"')
    finally:
        os.kill(web.process.pid, signal.SIGCONT)
    assert web.wait_events(1)[0]["content"] == "sleep well"
    assert web.call("whoami").startswith('you are "web"')


@pytest.mark.spec("PRES-1")
def test_a_database_that_was_locked_for_long_ends_nobody(home: Path, fast: Start) -> None:
    import apsw

    web = fast("web")
    locker = apsw.Connection(str(home / "bus.db"))
    locker.execute("BEGIN IMMEDIATE")
    time.sleep(BEATS_S)
    locker.execute("ROLLBACK")
    locker.close()
    assert names(home) == ["web"]
    assert web.stderr == ""


NO_LOCKS = (
    "from agentbus.core import presence\npresence.Presence.hold = lambda self, session: None\npresence.SILENT_S = 0.5\n"
)


@pytest.mark.spec("PRES-3", "STORE-7")
def test_where_nothing_can_be_locked_two_processes_of_one_session_live_side_by_side(home: Path, fast: Start) -> None:
    """One was silent and its successor has its session; then it comes back."""
    fast("watcher", before=NO_LOCKS)
    first = fast("web", before=NO_LOCKS)
    os.kill(first.process.pid, signal.SIGSTOP)
    try:
        until(lambda: names(home) == ["watcher"], "the silent one is taken for ended")
        second = fast("web", before=NO_LOCKS)
        assert second.call("whoami").startswith('you are "web"')
        ((session,),) = rows(home, "SELECT session FROM peers WHERE name = 'web' AND left_at IS NULL")
    finally:
        os.kill(first.process.pid, signal.SIGCONT)
    until(lambda: names(home) == ["watcher", "web", "web-2"], "it comes back")
    time.sleep(BEATS_S)
    assert names(home) == ["watcher", "web", "web-2"]
    assert second.call("whoami").startswith('you are "web"')
    assert rows(home, "SELECT pid FROM peers WHERE session = ?", session) == [(second.process.pid,)]
    told = 'your name on the bus is "web-2" now: "web" was taken by another session meanwhile'
    assert first.call("whoami").endswith(told)
    until(lambda: [event["content"] for _, event in first.events] == [told])
    agentbus(home, "send", "web", "for the second")
    assert second.wait_events(1)[0]["content"] == "for the second"


# -- shortages, and what a process leaves --------------------------------------------------------------------

LEAKY = """
import anyio, agentbus, os, resource
async def main():
    async with agentbus.join("leaky") as me:
        print(sorted(peer.name for peer in await me.peers()), flush=True)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        descriptors = []
        try:
            while True:
                descriptors.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        print(sorted(peer.name for peer in await me.peers()), flush=True)
        await me.broadcast("from one without descriptors")
        for one in descriptors:
            os.close(one)
        print(sorted(peer.name for peer in await me.peers()), flush=True)
anyio.run(main)
"""


@pytest.mark.spec("PRES-1")
def test_a_program_without_descriptors_ends_nobody(home: Path, fast: Start) -> None:
    web = fast("web")
    done = subprocess.run(
        [sys.executable, "-c", LEAKY], env=clean_env(home), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.stdout.splitlines() == ["['leaky', 'web']"] * 3, done.stderr
    assert web.wait_events(1)[0]["content"] == "from one without descriptors"
    assert names(home) == ["web"]


FORKED = """
import anyio, agentbus, os, time
async def main():
    async with agentbus.join("worker") as me:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        print("forked", flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""


@pytest.mark.spec("PRES-1")
def test_a_dead_program_is_offline_though_a_child_of_it_lives(home: Path) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", FORKED], env=clean_env(home), stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"forked\n"
        assert names(home) == ["worker"]
        worker.kill()
        worker.wait()
        assert names(home) == []
        assert agentbus(home, "send", "worker", "x").stdout.startswith('queued #1 for "worker": offline')
        assert (present(home), sockets(home)) == ([], [])
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.stdout.close()


# -- the database is moved, removed, put back ----------------------------------------------------------------


@pytest.mark.spec("STORE-6", "STORE-8")
@pytest.mark.parametrize("how", ["removed", "moved"])
def test_bus_db_alone_goes_under_busy_sessions_and_no_accepted_message_is_lost(
    home: Path, fast: Start, how: str
) -> None:
    count = 4
    sessions = [fast(f"s{number}") for number in range(count)]
    accepted: list[tuple[float, int, str]] = []
    refused: list[str] = []
    stop = threading.Event()

    def keep_sending(number: int) -> None:
        sent = 0
        while not stop.is_set():
            text = f"{number}:{sent}"
            call = sessions[number].post_call("send_message", to=f"s{(number + 1) % count}", text=text)
            answer, is_error = sessions[number].result(call)
            if is_error:
                refused.append(answer)
            else:
                accepted.append((time.monotonic(), number, text))
            sent += 1
            time.sleep(0.01)

    threads = [threading.Thread(target=keep_sending, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    if how == "removed":
        (home / "bus.db").unlink()
    else:
        (home / "bus.db").rename(home / "bus.db.old")
    gone_at = time.monotonic()
    shell = [agentbus(home, "send", "later", f"x{number}") for number in range(3)]
    time.sleep(2)
    stop.set()
    for thread in threads:
        thread.join()
    assert refused == []
    assert [done.returncode for done in shell] == [0, 0, 0]
    assert all(session.process.poll() is None for session in sessions)
    # What was accepted after the file was gone has arrived; what was in the old one is the old one's.
    after = [(number, text) for at, number, text in accepted if at > gone_at + 0.05]
    assert len(after) > 100
    for number, text in after:
        session = sessions[(number + 1) % count]
        until(lambda session=session, text=text: text in session.texts(), f"{text} of {number}")
        assert session.texts().count(text) == 1
    assert rows(home, "PRAGMA integrity_check") == [("ok",)]
    assert present(home) == [f"s{number}" for number in range(count)]
    until(lambda: all("is another bus now: joined it" in session.stderr for session in sessions))


@pytest.mark.spec("STORE-6", "STORE-7", "STORE-8")
def test_a_backup_that_is_put_back_is_the_same_bus_and_renames_nobody(home: Path, fast: Start) -> None:
    alice, bob = fast("alice"), fast("bob")
    for number in range(5):
        alice.call("send_message", to="bob", text=f"old {number}")
    bob.wait_events(5)
    until(lambda: rows(home, "SELECT count(*) FROM messages WHERE delivered_at IS NULL") == [(0,)])
    backup = home.parent / "backup.db"
    agentbus(home, "send", "nobody", "x")
    import apsw

    source, target = apsw.Connection(str(home / "bus.db")), apsw.Connection(str(backup))
    with target.backup("main", source, "main") as copying:
        copying.step()
    source.close()
    target.close()
    alice.call("send_message", to="bob", text="after the backup")
    bob.wait_events(6)
    backup.replace(home / "bus.db")
    until(lambda: "was put back: this is the same bus" in alice.stderr and "was put back" in bob.stderr)
    assert alice.call("whoami").startswith('you are "alice"')
    assert bob.call("whoami").startswith('you are "bob"')
    assert alice.call("send_message", to="bob", text="and on it goes").endswith("(online)")
    until(lambda: "and on it goes" in bob.texts())
    assert rows(home, "PRAGMA integrity_check") == [("ok",)]
    assert present(home) == ["alice", "bob"]


# -- after the commit ----------------------------------------------------------------------------------------

BUSY_ONCE = (
    "import agentbus.core.store as st\n"
    "from agentbus.core.errors import Busy, BrokenSetup\n"
    "real, left = st.Store.count_unread, [%d]\n"
    "def count_unread(self, *a):\n"
    "    left[0] -= 1\n"
    "    if left[0] >= 0: raise %s\n"
    "    return real(self, *a)\n"
    "st.Store.count_unread = count_unread\n"
)


@pytest.mark.spec("SEND-6")
@pytest.mark.parametrize("error", ["Busy()", "BrokenSetup('disk I/O error')"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_read_that_fails_after_the_commit_makes_no_second_row(
    home: Path, fast: Start, error: str, times: int
) -> None:
    session = fast("web", before=BUSY_ONCE % (times, error), AGENTBUS_DELIVERY="pull")
    assert session.call("send_message", to="later", text="pay the bill once").startswith("queued #1")
    assert session.call("whoami").startswith('you are "web"')
    assert rows(home, "SELECT count(*) FROM messages") == [(1,)]


@pytest.mark.spec("SEND-6")
def test_a_reaping_that_fails_after_the_commit_changes_no_answer(home: Path, fast: Start) -> None:
    broken = (
        "import agentbus.core.store as st\n"
        "from agentbus.core.errors import TryAgain\n"
        "def end(self, peer, *, now): raise TryAgain('the disk is full')\n"
        "st.Store.end = end\n"
    )
    alice = fast("alice", before=broken)
    bob = fast("bob")
    bob.process.kill()
    bob.process.wait()
    assert alice.call("send_message", to="bob", text="once").startswith('queued #1 for "bob": offline')
    assert rows(home, "SELECT count(*) FROM messages") == [(1,)]


JOB = """
import anyio, agentbus
async def main():
    async with agentbus.join("job") as me:
        await me.send("bob", "done")
anyio.run(main)
"""


@pytest.mark.spec("SEND-7", "LEDGER-3")
def test_who_a_sender_was_can_be_asked(home: Path) -> None:
    """Two programs had one name in turn."""
    for _ in range(2):
        subprocess.run([sys.executable, "-c", JOB], env=clean_env(home), check=True, timeout=PATIENCE_S)
    agentbus(home, "send", "bob", "from a shell", "--from", "job")
    kept = [json.loads(line) for line in agentbus(home, "history", "--json").stdout.splitlines()]
    assert [row["from"] for row in kept] == ["job"] * 3
    first, second, shell = (row["sender_session"] for row in kept)
    assert first != second
    assert shell is None
    assert f"sent by session {first} (python in {Path.cwd()})" in agentbus(home, "status", "1").stdout
    assert "sent by session" not in agentbus(home, "status", "3").stdout


# -- stderr --------------------------------------------------------------------------------------------------

NOISY = (
    "import agentbus.core.session as se\n"
    "real = se.Session._beat\n"
    "async def beat(self):\n"
    "    for _ in range(50): self._say('x' * 1000)\n"
    "    await real(self)\n"
    "se.Session._beat = beat\n"
)


@pytest.mark.spec("LIFE-5")
@pytest.mark.parametrize("stderr", ["a full pipe", "a closed reader", "no descriptor"])
def test_stderr_stops_no_session(home: Path, stderr: str) -> None:
    reader, writer = os.pipe()
    code = FAST + NOISY + RUN
    command = [sys.executable, "-c", code]
    if stderr == "no descriptor":
        command = ["/bin/sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    env = clean_env(home, AGENTBUS_NAME="web", AGENTBUS_DELIVERY="channel")
    server = subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=writer, text=True, bufsize=1
    )
    os.close(writer)
    if stderr == "a closed reader":
        os.close(reader)
    try:
        assert server.stdin is not None
        assert server.stdout is not None
        until(lambda: names(home) == ["web"])
        time.sleep(BEATS_S)  # 500 kB by now
        server.stdin.write('{"jsonrpc": "2.0", "id": 1, "method": "ping"}\n')
        assert json.loads(server.stdout.readline()) == {"jsonrpc": "2.0", "id": 1, "result": {}}
        assert names(home) == ["web"]
        assert rows(home, "PRAGMA integrity_check") == [("ok",)]
    finally:
        server.stdin.close()
        assert server.wait(PATIENCE_S) == 0
        server.stdout.close()
        if stderr != "a closed reader":
            os.close(reader)
