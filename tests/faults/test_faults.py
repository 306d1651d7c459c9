"""Faults, injected for real: killed processes, blocked pipes, full disks. The table in SPEC.md names these tests."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agentbus.core.bus import Bus
from agentbus.core.config import prepare_home
from agentbus.core.pump import BATCH
from agentbus.core.store import Store
from agentbus.triggers.socket import SocketTrigger
from tests.e2e.test_sessions import present, rows, sockets
from tests.support.client import INITIALIZE, RawClient
from tests.support.command import PATIENCE_S, agentbus, clean_env, until

pytestmark = pytest.mark.timeout(300)  # most of these repeat a fault many times

Start = Callable[..., RawClient]
SEEDS = 50


class Sender:
    """Sends in this process, as fast as the mailbox takes it."""

    def __init__(self, home: Path) -> None:
        self.store = Store(prepare_home(home), busy_ms=10_000)
        self.trigger = SocketTrigger(home)
        self.bus = Bus(self.store, {"socket": self.trigger}, max_bytes=65_536)

    def send(self, count: int, size: int = 0) -> list[int]:
        return [self.bus.send("alice", "bob", f"{n}:" + "x" * size).id for n in range(count)]

    def close(self) -> None:
        self.store.close()
        self.trigger.close()


@pytest.fixture
def sender(home: Path) -> Iterator[Sender]:
    made = Sender(home)
    yield made
    made.close()


def send_into(sender: Sender, count: int, ids: list[int]) -> None:
    ids += sender.send(count)


class Receiver:
    """A receiver process. This process is the client that reads its stdout."""

    def __init__(self, home: Path, step: str = "never", count: int = 0, *, by_socket: bool = False) -> None:
        if by_socket:
            ours, theirs = socket.socketpair()
            self._fd, out = ours.detach(), theirs.detach()
        else:
            self._fd, out = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.receiver", "bob", step, str(count)],
            env=clean_env(home),
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=out,
        )
        os.close(out)
        self._data = b""

    def read(self, most: int = 65_536) -> bool:
        """Read once; False at the end."""
        data = os.read(self._fd, most)
        self._data += data
        return bool(data)

    @property
    def ids(self) -> list[int]:
        """The ids of the messages that were read as whole lines, in the order of their arrival."""
        lines = self._data.split(b"\n")[:-1]
        return [int(json.loads(line)["params"]["meta"]["msg_id"]) for line in lines]

    def read_to_the_end(self, flood: threading.Thread) -> list[int]:
        """Read until the receiver has killed itself. If its time never comes, because it had less to do, kill it."""
        while True:
            if select.select([self._fd], [], [], 0.5)[0]:
                if not self.read():
                    break
            elif not flood.is_alive():
                self.process.kill()
        self.process.wait(PATIENCE_S)
        return self.ids

    def read_until(self, condition: Callable[[list[int]], bool]) -> list[int]:
        while not condition(self.ids):
            assert self.read(), "it ended too early"
        return self.ids

    def read_until_delivered(self, home: Path) -> list[int]:
        """Read on, duplicates too, until nothing is pending."""
        while rows(home, "SELECT count(*) FROM messages WHERE delivered_at IS NULL") != [(0,)]:
            if select.select([self._fd], [], [], 0.01)[0]:
                assert self.read(), "it ended too early"
        return self.ids

    def end(self) -> None:
        assert self.process.stdin is not None
        if self.process.poll() is None:
            self.process.stdin.close()
            self.process.wait(PATIENCE_S)
        else:
            self.process.stdin.close()
        os.close(self._fd)


@contextmanager
def receiver(*arguments, **options) -> Iterator[Receiver]:
    made = Receiver(*arguments, **options)
    try:
        yield made
    finally:
        made.end()


def all_are_delivered(home: Path) -> None:
    until(lambda: rows(home, "SELECT count(*) FROM messages WHERE delivered_at IS NULL") == [(0,)])


def empty(home: Path) -> None:
    rows(home, "DELETE FROM messages")


# -- killed processes ------------------------------------------------------------------------------------------


@pytest.mark.spec("STATE-3", "DRAIN-2", "DRAIN-4")
@pytest.mark.parametrize("step", ["read", "write", "mark"])
def test_a_receiver_killed_at_any_step_loses_nothing_and_doubles_one_batch_at_most(
    home: Path, sender: Sender, step: str
) -> None:
    for seed in range(SEEDS):
        chance = random.Random(f"{step}{seed}")
        early = chance.randrange(0, 500)
        ids = sender.send(early)
        with receiver(home, step, chance.randint(1, 4)) as killed:
            other = Sender(home)
            flood = threading.Thread(target=send_into, args=(other, 500 - early, ids))
            flood.start()
            first = killed.read_to_the_end(flood)
            flood.join()
            other.close()
            assert killed.process.returncode == -signal.SIGKILL
        with receiver(home) as again:
            wanted = set(ids) - set(first)
            again.read_until(lambda got, wanted=wanted: wanted <= set(got))
            second = again.read_until_delivered(home)
        assert set(first) | set(second) == set(ids), f"seed {seed}: lost {set(ids) - set(first) - set(second)}"
        assert first == sorted(set(first))
        assert second == sorted(set(second))
        assert len(set(first) & set(second)) <= 2 * BATCH, f"seed {seed}"
        empty(home)


@pytest.mark.spec("STATE-3", "CHAN-3")
@pytest.mark.parametrize("by_socket", [False, True], ids=["pipe", "socketpair"])
def test_client_and_server_that_die_together_lose_nothing(home: Path, sender: Sender, by_socket: bool) -> None:
    """Fault 8 of the system that was measured: a quarter lost to bytes that nobody had read."""
    for seed in range(SEEDS // 2):
        chance = random.Random(seed)
        ids = sender.send(300, size=chance.choice([0, 200, 2_000]))
        with receiver(home, by_socket=by_socket) as slow:
            for _ in range(chance.randint(0, 30)):
                if select.select([slow._fd], [], [], 0.05)[0]:
                    slow.read(chance.randint(1, 8_192))
            slow.process.kill()  # nobody will ever read the rest of the bytes
            slow.process.wait()
            first = slow.ids
        with receiver(home) as again:
            wanted = set(ids) - set(first)
            second = again.read_until(lambda got, wanted=wanted: wanted <= set(got))
        assert set(first) | set(second) == set(ids), f"seed {seed}"
        empty(home)


@pytest.mark.spec("STATE-3", "DELIV-3", "SEND-2")
def test_a_client_that_stops_reading_is_waited_for_and_then_gets_all_once(start: Start, home: Path) -> None:
    alice, deaf = start("alice"), start("bob", read=False)
    alice.handshake()
    deaf.post("initialize", INITIALIZE)
    deaf.notify("notifications/initialized")
    deaf.post("tools/list")
    requests = [alice.post_call("send_message", to="bob", text=f"{n}:" + "x" * 400) for n in range(1_000)]
    for request in requests:
        alice.result(request)
    time.sleep(1)  # the pipe has been full for a long time
    assert rows(home, "SELECT count(*) FROM messages WHERE delivered_at IS NOT NULL") == [(0,)]
    deaf.post_call("send_message", to="alice", text="I can still talk")
    assert alice.wait_events(1)[0]["content"] == "I can still talk"
    deaf.start_reading()
    events = deaf.wait_events(1_000)
    all_are_delivered(home)
    assert [int(event["content"].split(":")[0]) for event in events] == list(range(1_000))
    assert len(deaf.events) == 1_000


@pytest.mark.spec("LIFE-1", "LIFE-2", "STATE-3")
@pytest.mark.parametrize("how", ["end of stdin", "SIGINT"])
def test_a_push_that_waits_for_its_client_keeps_no_server_from_ending(
    start: Start, home: Path, sender: Sender, how: str
) -> None:
    sender.send(200, size=2_000)
    deaf = start("bob", read=False)
    deaf.post("initialize", INITIALIZE)
    deaf.notify("notifications/initialized")
    deaf.post("tools/list")
    time.sleep(2)  # the gate is open and the pipe is full
    deaf.close_stdin() if how == "end of stdin" else deaf.process.send_signal(signal.SIGINT)
    assert deaf.process.wait(PATIENCE_S) == 0
    assert (present(home), sockets(home)) == ([], [])
    assert rows(home, "SELECT count(*) FROM messages WHERE delivered_at IS NULL") == [(200,)]


@pytest.mark.spec("SEND-1")
def test_what_a_killed_sender_was_told_is_sent_is_there_and_whole(home: Path) -> None:
    code = (
        "import sys; from agentbus import registry; from agentbus.core import config\n"
        "bus, _ = registry.open_bus(config.load(), busy_ms=10000)\n"
        "body = 'x' * 3000 + '!'\n"
        "while True: print(bus.send('alice', 'bob', body).id, flush=True)\n"
    )
    answered = 0
    for seed in range(20):
        child = subprocess.Popen([sys.executable, "-c", code], env=clean_env(home), stdout=subprocess.PIPE)
        assert child.stdout is not None
        said = [child.stdout.readline() for _ in range(random.Random(seed).randint(1, 60))]
        child.kill()
        said += child.stdout.read().splitlines(keepends=True)
        child.stdout.close()
        child.wait()
        ids = [int(line) for line in said if line.endswith(b"\n")]
        found = dict(rows(home, "SELECT id, text FROM messages LEFT JOIN bodies USING (id)"))
        assert set(ids) <= set(found)
        assert set(found.values()) == {"x" * 3_000 + "!"}
        assert len(found) - answered - len(ids) in (0, 1), "one may be committed and not answered"
        answered = len(found)


@pytest.mark.spec("STORE-1", "PRES-2")
def test_a_start_killed_at_any_moment_hinders_no_later_one(home: Path) -> None:
    """Fault 6 of the system that was measured: a lock file that a killed start left behind."""
    for seed in range(25):
        with receiver(home) as killed:
            time.sleep(random.Random(seed).uniform(0, 0.25))
            killed.process.kill()
            killed.process.wait()
    assert agentbus(home, "send", "bob", "x", "--from", "ci").returncode == 0
    with receiver(home) as started:
        assert started.read_until(lambda ids: len(ids) == 1)
    assert not [file for file in home.rglob("*") if "lock" in file.name]
    assert (present(home), sockets(home)) == ([], [])


# -- races -----------------------------------------------------------------------------------------------------


@pytest.mark.spec("NAME-4", "STORE-1")
def test_20_sessions_that_start_at_once_on_a_fresh_home_with_one_name(start: Start, home: Path) -> None:
    """Fault 4 of the system that was measured: two sessions with one name."""
    everybody = [start("web") for _ in range(20)]
    shakes = [threading.Thread(target=client.handshake) for client in everybody]
    for shake in shakes:
        shake.start()
    for shake in shakes:
        shake.join()
    assert sorted(present(home)) == sorted(["web", *(f"web-{n}" for n in range(2, 21))])
    assert everybody[0].call("broadcast", text="all there?").startswith("sent to 19: ")
    for client in everybody[1:]:
        assert client.wait_events(1)[0]["content"] == "all there?"
    assert everybody[0].events == []


@pytest.mark.spec("NAME-5", "NAME-6", "STATE-3")
def test_renames_under_way_lose_and_double_nothing(start: Start, home: Path, sender: Sender) -> None:
    """Fault 3 of the system that was measured: 22 of 815 messages lost to a rename."""
    bob = start("bob")
    bob.handshake()
    ids: list[int] = []
    other = Sender(home)
    flood = threading.Thread(target=send_into, args=(other, 1_000, ids))
    flood.start()
    for number in range(10):
        bob.call("set_name", name=f"robert-{number}")
    flood.join()
    other.close()
    events = bob.wait_events(1_000)
    all_are_delivered(home)
    assert [int(event["meta"]["msg_id"]) for event in events] == ids
    assert len(bob.events) == 1_000


@pytest.mark.spec("NAME-7", "STATE-3")
def test_a_reconnect_keeps_the_name_and_loses_nothing(start: Start, home: Path, sender: Sender) -> None:
    """As Claude Code does it: SIGINT for the old server, the new one 0.1 s later, mail all the while."""
    server = start("bob")
    server.handshake()
    server.call("set_name", name="shop")
    ids: list[int] = []
    seen: list[int] = []
    for _ in range(5):
        ids += sender.send(50)
        server.process.send_signal(signal.SIGINT)
        ids += sender.send(50)
        successor = start("bob")
        ids += sender.send(50)
        successor.handshake()
        assert successor.call("whoami").startswith('you are "shop"')
        server.process.wait(PATIENCE_S)
        server.end()
        seen += [int(event["meta"]["msg_id"]) for _, event in server.events]
        server = successor
    server.wait(lambda: {int(event["meta"]["msg_id"]) for _, event in server.events} | set(seen) >= set(ids))
    all_are_delivered(home)
    assert present(home) == ["shop"]


@pytest.mark.spec("STORE-4", "SEND-1")
def test_a_database_locked_for_five_seconds_delays_and_breaks_nothing(start: Start, home: Path) -> None:
    """Fault 5 of the system that was measured: the receiver dies, the sender's server answers nothing."""
    alice, bob = start("alice"), start("bob")
    alice.handshake()
    bob.handshake()
    locker = sqlite3.connect(home / "bus.db", isolation_level=None)
    locker.execute("BEGIN IMMEDIATE")
    sends = [alice.post_call("send_message", to="bob", text=f"{n}") for n in range(10)]
    until_s = time.monotonic() + 5
    while time.monotonic() < until_s:
        assert alice.call("whoami").startswith('you are "alice"')  # everything else goes on
        time.sleep(0.05)
    assert bob.events == []
    locker.execute("ROLLBACK")
    locker.close()
    for request in sends:
        text, is_error = alice.result(request)
        assert not is_error, text
    assert [event["content"] for event in bob.wait_events(10)] == [f"{n}" for n in range(10)]


# -- the setup breaks ------------------------------------------------------------------------------------------

FAST_HEART = (
    "import sys; sys.argv = ['agentbus', 'serve', 'claude-mcp']\n"
    "from agentbus.core import upkeep\n"
    "from agentbus.core.session import Session\n"
    "Session.__init__.__kwdefaults__['heartbeat_s'] = 0.1\n"
    "upkeep.MOST_QUIET = 1_000_000\n"
    "from agentbus.__main__ import main; main()\n"
)


@pytest.fixture
def start_fast(start: Start) -> Start:
    """Starts servers with ten heartbeats a second, so that a test does not have to wait for one."""
    return lambda name, **options: start(name, command=[sys.executable, "-c", FAST_HEART], **options)


@pytest.mark.spec("STORE-6", "WAKE-6")
def test_a_home_deleted_under_running_sessions_is_there_again_and_they_meet_in_it(
    start_fast: Start, home: Path
) -> None:
    """Faults 9 and 11 of the system that was measured."""
    import shutil

    alice, bob = start_fast("alice"), start_fast("bob")
    alice.handshake()
    bob.handshake()
    shutil.rmtree(home)
    until(lambda: home.exists() and len(sockets(home)) == 2 and present(home) == ["alice", "bob"])
    until(lambda: "is another bus now: joined it" in bob.stderr)
    assert alice.call("send_message", to="bob", text="here again") == 'sent #1 to "bob" (online)'
    assert bob.wait_events(1)[0]["content"] == "here again"


@pytest.mark.spec("LIFE-2")
def test_a_server_whose_host_dies_with_both_ends_open_ends(home: Path) -> None:
    """Fault 7 of the system that was measured: orphans that take messages which nobody sees."""
    fd_in, keep_in = os.pipe()
    keep_out, fd_out = os.pipe()
    host = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]]);"
            " print(p.pid, file=sys.stderr, flush=True); p.wait()",
            FAST_HEART,
        ],
        env=clean_env(home, AGENTBUS_NAME="bob"),
        stdin=fd_in,
        stdout=fd_out,
        stderr=subprocess.PIPE,
    )
    assert host.stderr is not None
    server_pid = int(host.stderr.readline())
    until(lambda: len(sockets(home)) == 1)
    host.kill()
    host.wait()
    until(lambda: present(home) == [] and sockets(home) == [])
    until(lambda: not Path(f"/proc/{server_pid}/stat").exists() or is_zombie(server_pid))
    host.stderr.close()
    for fd in (fd_in, keep_in, keep_out, fd_out):
        os.close(fd)


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.fixture
def small_disk(home: Path) -> Iterator[Path]:
    """A home on a disk of 1 MiB."""
    home.mkdir(mode=0o700)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "none", str(home)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield home
    subprocess.run(["umount", "-l", str(home)], check=True)


@pytest.mark.spec("SEND-1", "ERR-1", "CLI-4", "DRAIN-6")
def test_a_full_disk_refuses_in_a_sentence_and_is_outlived(small_disk: Path, start: Start) -> None:
    alice = start("alice")
    alice.handshake()
    accepted = 0
    while True:
        text, is_error = alice.result(alice.post_call("send_message", to="nobody", text="x" * 20_000))
        if is_error:
            break
        accepted += 1
    assert "is full, nothing was changed: free some space, then repeat" in text
    done = agentbus(small_disk, "send", "nobody", "x" * 20_000)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (75, "", 1)
    assert rows(small_disk, "SELECT count(*) FROM messages") == [(accepted,)]
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert alice.call("send_message", to="nobody", text="x" * 20_000).startswith("queued")
    assert alice.call("send_message", to="alice", text="x").startswith("sent")
    assert alice.wait_events(1)


@pytest.mark.spec("ERR-1", "ERR-2", "STORE-1")
def test_a_database_that_breaks_while_in_use_is_named_and_not_overwritten(start_fast: Start, home: Path) -> None:
    alice = start_fast("alice")
    alice.handshake()
    for file in home.glob("bus.db-*"):
        file.unlink()
    home.joinpath("bus.db").unlink()
    home.joinpath("bus.db").write_bytes(b"somebody's notes" * 500)
    home.joinpath("bus.db").chmod(0o600)
    before = home.joinpath("bus.db").read_bytes()
    refusal = alice.refuse("send_message", to="bob", text="x")
    assert "is not a healthy SQLite database, and is left as it is: agentbus doctor --set-aside keeps it" in refusal
    assert home.joinpath("bus.db").read_bytes() == before
    home.joinpath("bus.db").rename(home / "bus.db.broken")
    assert alice.call("send_message", to="alice", text="mended").startswith("sent #1")
    assert alice.wait_events(1)[0]["content"] == "mended"
    assert "Traceback" not in alice.stderr


@pytest.mark.spec("ERR-1", "STORE-1", "STORE-9")
def test_a_database_that_becomes_newer_while_in_use_is_refused(start: Start, home: Path) -> None:
    alice = start("alice")
    alice.handshake()
    for file in home.glob("bus.db*"):
        file.unlink()
    newer = sqlite3.connect(home / "bus.db")
    newer.execute("PRAGMA user_version = 999")
    newer.close()
    assert "agentbus was upgraded while this session ran" in alice.refuse("send_message", to="bob", text="x")


@pytest.mark.spec("WAKE-5", "TRUST-1")
def test_a_home_without_sockets_is_woken_by_file_watch_and_that_is_said(start: Start, home: Path) -> None:
    prepare_home(home)
    home.joinpath("sock").write_text("in the way")
    alice, bob = start("alice"), start("bob")
    alice.handshake()
    bob.handshake()
    assert "woken by file-watch" in bob.call("whoami")
    until(lambda: "trigger socket cannot be used" in bob.stderr and "; trying file-watch" in bob.stderr)
    assert "trying poll" not in bob.stderr
    alice.call("send_message", to="bob", text="slower and sure")
    assert bob.wait_events(1)[0]["content"] == "slower and sure"


@pytest.mark.spec("WAKE-5", "TRUST-1")
def test_a_home_without_sockets_and_wake_files_is_polled_and_each_step_is_said(start: Start, home: Path) -> None:
    prepare_home(home)
    home.joinpath("sock").write_text("in the way")
    home.joinpath("wake").symlink_to("/")
    alice, bob = start("alice", AGENTBUS_POLL_MS="20"), start("bob", AGENTBUS_POLL_MS="20")
    alice.handshake()
    bob.handshake()
    assert "woken by poll" in bob.call("whoami")
    until(lambda: "; trying poll" in bob.stderr)
    steps = [line for line in bob.stderr.splitlines() if "cannot be used" in line]
    assert "trigger socket cannot be used" in steps[0]
    assert steps[0].endswith("; trying file-watch")
    assert "trigger file-watch cannot be used" in steps[1]
    assert f"{home / 'wake'} is a symlink" in steps[1]
    assert "woken by poll" in alice.call("list_peers")
    alice.call("send_message", to="bob", text="slow and sure")
    assert bob.wait_events(1)[0]["content"] == "slow and sure"


@pytest.mark.spec("CLI-4", "ERR-1")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file that it cannot write itself")
def test_a_read_only_disk_is_a_sentence(small_disk: Path) -> None:
    agentbus(small_disk, "send", "bob", "first")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = agentbus(small_disk, "send", "bob", "second")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert agentbus(small_disk, "send", "bob", "third").returncode == 0
