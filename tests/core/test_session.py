"""The life of a session in this process: heartbeats, coming back, fallback, a busy database."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import anyio
import apsw
import pytest

from agentbus.core import database, process, upkeep
from agentbus.core.bus import Bus, Sent, retry_while_busy
from agentbus.core.config import RETENTION, prepare_home
from agentbus.core.drain import Pace
from agentbus.core.errors import BrokenSetup, Busy
from agentbus.core.model import Peer
from agentbus.core.peers import MOST_LOOKED_AFTER
from agentbus.core.ports import Wake
from agentbus.core.process import Process
from agentbus.core.resting import RestingLoop
from agentbus.core.session import Checkpoints, Session
from agentbus.core.store import Question, Store
from agentbus.triggers.file_watch import FileWatchTrigger
from agentbus.triggers.poll import PollTrigger
from agentbus.triggers.socket import SocketTrigger
from tests.support.fakes import FakeClock, FakeDelivery, FakeTrigger, arrival

pytestmark = pytest.mark.anyio

HOUR_MS = 3_600_000
# Holds the lock of a command that waits for an answer.
HOLD = (
    "import sys, time; from agentbus.core.presence import Presence; held = Presence(sys.argv[1]).hold('0' * 8);"
    " print(flush=True); time.sleep(100)"
)


class World:
    """A bus on a real file, with our own clock and trigger. Its sessions live in this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = FakeClock()
        self.trigger = FakeTrigger()
        self.triggers = {"fake": self.trigger, "poll": PollTrigger(poll_ms=10)}
        self.checkpoints = Checkpoints(path)
        self.store = Store(path, busy_ms=0, on_wal=self.checkpoints)
        self.bus = Bus(self.store, self.triggers, max_bytes=1_000, clock=self.clock)
        self.said: list[str] = []

    def session(self, name: str, delivery: FakeDelivery, **options) -> Session:
        return Session(
            self.bus,
            options.pop("arrival", None) or arrival(name),
            triggers=options.pop("triggers", [self.trigger]),
            delivery=delivery,
            checkpoints=self.checkpoints,
            say=self.said.append,
            retention_hours=options.pop("retention_hours", 0),
            member_days=options.pop("member_days", 0),
            conversation=options.pop("conversation", str),
            groups=options.pop("groups", ()),
            # The safety poll is so slow that no test passes because of it.
            pace=Pace(safety_s=options.pop("safety_s", 600.0)),
            heartbeat_s=options.pop("heartbeat_s", 0.01),
        )

    @asynccontextmanager
    async def running(self, name: str, **options) -> AsyncIterator[tuple[Session, FakeDelivery]]:
        delivery = options.pop("delivery", None) or FakeDelivery()
        session = self.session(name, delivery, **options)
        await session.claim()
        async with anyio.create_task_group() as tasks:
            await tasks.start(session.run)
            yield session, delivery
            await session.stop()
        session.close()


@pytest.fixture(params=[{}, {"loop_factory": RestingLoop}], ids=["any loop", "the loop of a session"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    return "asyncio", request.param


@pytest.fixture
def world(home: Path) -> Iterator[World]:
    world = World(Path(prepare_home(home)))
    yield world
    world.store.close()


async def until(condition) -> None:
    with anyio.fail_after(10):
        while not condition():
            await anyio.sleep(0.002)


def no_locks(world: World) -> None:
    """Be on a file system that cannot lock."""
    world.store.presence.hold = lambda _session: None  # type: ignore[method-assign]


@pytest.mark.spec("PRES-3")
async def test_a_heartbeat_says_that_the_peer_lives_where_no_lock_can(world: World) -> None:
    no_locks(world)
    async with world.running("web") as (session, _):
        world.clock.now += 40_000
        await until(lambda: world.store.present()[0].last_seen == world.clock.now)
        world.clock.now += 40_000
        await until(lambda: world.store.present()[0].last_seen == world.clock.now)
        assert session.peer.name == "web"
    assert world.store.present() == []


@pytest.mark.spec("PRES-2")
async def test_a_heartbeat_looks_after_a_few_and_together_they_miss_nobody(world: World) -> None:
    """Thirty sessions, of which one is an agent's: it looks at as many with each beat as beside ten."""
    held = []
    for number in range(29):
        claimed = world.bus.claim(arrival(f"peer{number:02}"), str, join_crowd=True)
        assert claimed is not None
        assert claimed.held is not None
        held.append(claimed.held)
    async with world.running("m", heartbeat_s=600.0) as (session, _):
        looked: list[str] = []
        judge = world.store._life

        def noted(peer: Peer) -> process.Life:
            looked.append(peer.name)
            return judge(peer)

        world.store._life = noted
        await session._beat()
        assert set(looked) == {f"peer{number:02}" for number in range(MOST_LOOKED_AFTER)}
        looked.clear()
        # The next one by name has ended, and so have those far away.
        for one in held[:20]:
            one._close()
        await session._beat()
        assert len(world.store.present()) == 10
    for one in held[20:]:
        one.release()


@pytest.mark.spec("PRES-1")
async def test_a_session_that_holds_its_lock_writes_nothing_while_it_is_idle(world: World) -> None:
    async with world.running("web"), world.running("api"):
        other = Store(world.path, busy_ms=0)
        before = other.queries.version()
        world.clock.now += 1_000_000_000
        await anyio.sleep(0.3)  # some thirty heartbeats
        assert other.queries.version() == before
        assert {peer.name for peer in world.bus.peers()} == {"web", "api"}
        assert {peer.last_seen for peer in world.bus.peers()} == {world.clock.now}
        other.close()


@pytest.mark.spec("PRES-2")
async def test_a_lock_file_that_was_removed_is_there_again(world: World) -> None:
    async with world.running("web") as (session, delivery):
        file = world.store.presence.folder / session.peer.session
        for folder_too in (False, True):
            file.unlink()
            if folder_too:
                file.parent.rmdir()
            assert [peer.name for peer in world.bus.peers()] == ["web"], "cannot tell is alive"
            await until(file.exists)
        await until(lambda: len(world.said) == 2)
        assert session.peer.name == "web"
        world.bus.send("alice", "web", "still there?")
        await until(lambda: len(delivery.handed) == 1)
    assert not file.exists()


@pytest.mark.spec("PRES-3")
async def test_a_session_that_was_taken_for_dead_comes_back_and_drains(world: World) -> None:
    no_locks(world)
    async with world.running("web", heartbeat_s=0.05) as (session, delivery):
        before = session.peer
        assert [peer.name for peer in world.store.reap(now=0, silent={before.session})] == ["web"]
        world.bus.send("alice", "web", "while away")
        await until(lambda: [one.text for one in delivery.handed] == ["while away"])
        assert (session.peer.session, session.peer.endpoint) == (before.session, before.endpoint)
        assert world.said == []


@pytest.mark.spec("PRES-3", "PRES-5", "NAME-4")
async def test_a_session_that_comes_back_to_a_taken_name_says_so(world: World) -> None:
    no_locks(world)
    async with world.running("web", heartbeat_s=0.2) as (session, delivery):
        world.store.reap(now=0, silent={session.peer.session})
        other = arrival("web", host=Process(1, "another"))
        assert world.bus.claim(other, str, join_crowd=True) is not None
        await until(lambda: session.peer.name == "web-2")
        sentence = 'your name on the bus is "web-2" now: "web" was taken by another session meanwhile'
        await until(lambda: world.said == [sentence])
        await until(lambda: [(one.sender, one.text) for one in delivery.handed] == [("agentbus", sentence)])
        assert session.take_notice() == sentence
        assert session.take_notice() == ""


@pytest.mark.spec("PRES-3")
async def test_a_session_ends_those_that_it_has_watched_stay_silent(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentbus.core.presence.SILENT_S", 0.2)
    no_locks(world)
    ghost = world.bus.claim(arrival("ghost", domain="elsewhere"), str, join_crowd=True)
    assert ghost is not None
    assert [peer.name for peer in world.bus.peers()] == ["ghost"]
    async with world.running("web"):
        await until(lambda: [peer.name for peer in world.bus.peers()] == ["web"])


@pytest.mark.spec("STATE-4")
async def test_heartbeats_prune_what_was_delivered_30_days_ago(world: World) -> None:
    async with world.running("web") as (_, delivery):
        world.bus.send("alice", "web", "old news")
        world.bus.send("alice", "nobody", "waits")
        await until(lambda: len(delivery.handed) == 1)
        await until(lambda: world.store.queries.waiting() == {"nobody": 1})
        count = "SELECT count(*) FROM messages"
        world.clock.now += 719 * HOUR_MS
        await anyio.sleep(0.1)  # some ten heartbeats
        assert world.store._read(count) == [(2,)]
        world.clock.now += 2 * HOUR_MS
        await until(lambda: world.store._read(count) == [(1,)])
        assert world.store.queries.waiting() == {"nobody": 1}


@pytest.mark.spec("CONF-5")
async def test_how_long_history_is_kept_holds_for_all_and_a_session_can_only_lengthen_it(world: World) -> None:
    world.store.set_setting(RETENTION, 48, may_lower=True)
    async with world.running("short", retention_hours=1), world.running("plain") as (_, _delivery):
        assert world.said == []
        world.bus.send("alice", "plain", "history")
        await until(lambda: world.store.queries.waiting() == {})
        world.clock.now += 47 * HOUR_MS
        await anyio.sleep(0.1)  # some ten heartbeats of each
        assert world.store.queries.newest_id() == 1
        async with world.running("long", retention_hours=100):
            assert world.said == [
                "AGENTBUS_RETENTION_HOURS: retention-hours is 100 from now on, for everybody on this bus"
            ]
            world.clock.now += 50 * HOUR_MS
            await anyio.sleep(0.1)
        await anyio.sleep(0.1)
        assert world.store.queries.newest_id() == 1, "nor after that session has left"
        world.clock.now += 5 * HOUR_MS
        await until(lambda: world.store.queries.newest_id() == 0)


def counted(owner: object, name: str) -> list[tuple[object, ...]]:
    """The calls of a method from here on."""
    calls: list[tuple[object, ...]] = []
    method = getattr(owner, name)

    def noted(*arguments: object) -> object:
        calls.append(arguments)
        return method(*arguments)

    setattr(owner, name, noted)
    return calls


def write_unseen(world: World, to: str) -> None:
    """Send as a program does that dies before it wakes anybody."""
    store = Store(world.path, busy_ms=10_000)
    store.send("alice", to, "x", now=world.clock())
    store.close()


@pytest.mark.spec("DRAIN-5")
async def test_mail_that_nobody_announced_is_found_whatever_the_loop(world: World) -> None:
    async with world.running("web", safety_s=0.02, heartbeat_s=600.0) as (session, delivery):
        for number in range(1, 4):
            write_unseen(world, "web")
            await until(lambda number=number: len(delivery.handed) == number)
        # Held back while it is paused. Nobody writes when a pause ends by itself.
        world.bus.pause("web", by="user", for_ms=60_000)
        write_unseen(world, "web")
        await anyio.sleep(0.2)
        assert len(delivery.handed) == 3
        world.clock.now += 60_001
        await until(lambda: len(delivery.handed) == 4)
        # And what the session itself has committed, without a wake.
        world.store.send("alice", "web", "x", now=world.clock())
        await until(lambda: len(delivery.handed) == 5)
        assert session.peer.name == "web"


@pytest.mark.spec("DRAIN-5", "PRES-6")
async def test_an_idle_session_reads_only_what_somebody_has_written(
    world: World, anyio_backend: tuple[str, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "MOST_QUIET", 1_000_000)
    zed = world.bus.claim(arrival("zed"), str, join_crowd=True)
    assert zed is not None
    assert zed.held is not None
    async with world.running("web", safety_s=0.01, heartbeat_s=0.01) as (session, _):
        reads, beats = counted(world.bus, "due"), counted(session, "_beat")
        await anyio.sleep(0.15)
        assert len(beats) <= 2
        assert len(reads) <= 3 or not anyio_backend[1], "only its own loop can look without reading"
        lock = world.store.presence.folder / session.peer.session
        for change in (
            lambda: write_unseen(world, "nobody"),
            lambda: world.store.send("alice", "nobody", "by the connection of the session", now=world.clock()),
            lock.unlink,
            lambda: monkeypatch.setattr(upkeep, "MOST_QUIET", 5),  # what only the clock brings about is found, too
            zed.held.release,
        ):
            monkeypatch.setattr(upkeep, "MOST_QUIET", 1_000_000)
            await anyio.sleep(0.05)
            seen = len(beats)
            change()
            await until(lambda seen=seen: len(beats) > seen)
        assert lock.exists()


async def until_quiet(beats: list[tuple[object, ...]]) -> None:
    """Wait until the heartbeats find nothing to do any more."""
    with anyio.fail_after(10):
        seen = -1
        while seen != len(beats):
            seen = len(beats)
            await anyio.sleep(0.1)


@pytest.mark.spec("PRES-6", "LIFE-2", "WAKE-6", "NAME-8", "STATE-6", "ASK-5", "STORE-6")
async def test_a_session_that_has_become_quiet_still_sees_to_all_that_a_heartbeat_is_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "MOST_QUIET", 1_000_000)
    world.bus.recorded = lambda _runtime, _place: set()
    root, here, conversation = world.path.parent, process.domain(), ["one"]
    with (
        closing(SocketTrigger(root)) as trigger,
        subprocess.Popen(["sleep", "100"]) as host,
        subprocess.Popen(["sleep", "100"]) as other,
    ):
        world.triggers["socket"] = trigger
        web = replace(arrival("web", conversation="one"), host=process.look_up(host.pid), domain=here)
        old = world.bus.claim(
            replace(arrival("old"), host=process.look_up(other.pid), domain=here), str, join_crowd=True
        )
        assert old is not None
        assert old.held is not None
        taken, _ = world.store.send("alice", "old", "never read", now=world.clock())
        world.bus.mark(old.peer, [taken], "channel")
        async with world.running(
            "web",
            arrival=web,
            triggers=[trigger],
            heartbeat_s=0.02,
            safety_s=0.02,
            conversation=lambda: conversation[0],
        ) as (session, delivery):
            beats = counted(session, "_beat")
            read = world.store._read
            await until_quiet(beats)
            conversation[0] = "two"
            await until(lambda: read("SELECT 1 FROM conversations WHERE conversation = 'two'"))
            for file in (root / "sock" / session.peer.endpoint, root / "live" / session.peer.session):
                await until_quiet(beats)
                file.unlink()
                await until(file.exists)
            # A session has ended that took a message, and its agent process ends later.
            world.store.set_proof(old.peer.session, "a record")
            world.bus.leave(old.peer)
            old.held.release()
            await anyio.sleep(0.1)
            other.kill()
            other.wait()
            await until(lambda: read("SELECT 1 FROM messages WHERE id = ? AND delivered_at IS NULL", taken))
            await until_quiet(beats)
            # A command that waits for an answer is killed.
            with subprocess.Popen([sys.executable, "-c", HOLD, str(root)], stdout=subprocess.PIPE) as command:
                assert command.stdout is not None
                command.stdout.readline()
                question = Question(world.clock() + 60_000, "0" * 8)
                asked, _ = world.store.send("web", "zed", "?", now=world.clock(), question=question)
                world.store.send("zed", "web", "late", now=world.clock(), reply_to=asked)
                await anyio.sleep(0.1)
                assert delivery.handed == []
                command.kill()
            await until(lambda: [one.text for one in delivery.handed] == ["late"])
            await until_quiet(beats)
            for file in root.glob("bus.db*"):  # no other file of the home tells of it
                file.unlink()
            await until(lambda: world.path.exists() and any("another bus" in line for line in world.said))
            await until_quiet(beats)
            host.kill()
            host.wait()
            with anyio.fail_after(10):
                await session.orphaned.wait()


@pytest.mark.spec("DRAIN-5", "READ-1")
async def test_what_a_check_gives_back_is_found_though_the_wake_for_it_is_lost(world: World) -> None:
    async with world.running("web", safety_s=0.02, heartbeat_s=600.0) as (session, delivery):
        write_unseen(world, "web")
        (unread,) = await session.check(0, 10)
        await anyio.sleep(0.1)
        assert delivery.handed == []
        world.trigger.notify = lambda _endpoint: Wake.ABSENT  # type: ignore[method-assign]
        await session.checked([unread.envelope.id], reached=False)
        await until(lambda: len(delivery.handed) == 1)


@pytest.mark.spec("DRAIN-5", "WAKE-4")
async def test_a_slow_poll_does_not_make_a_look_slow(world: World) -> None:
    slow = PollTrigger(poll_ms=60_000)
    world.triggers["poll"] = slow
    async with world.running("web", triggers=[slow], safety_s=0.02, heartbeat_s=600.0) as (_, delivery):
        await anyio.sleep(0.1)
        write_unseen(world, "web")
        await until(lambda: len(delivery.handed) == 1)


@pytest.mark.spec("DRAIN-5")
async def test_a_rename_takes_what_waits_under_the_new_name_at_once(world: World) -> None:
    """The safety poll of these sessions takes 600 s, and one conversation has both names."""
    async with world.running("api", arrival=arrival("api", conversation="one")):
        pass
    world.bus.send("alice", "api", "waits under the new name")
    async with world.running("web", arrival=arrival("web", conversation="one")) as (session, delivery):
        await session.rename("api")
        await until(lambda: [one.text for one in delivery.handed] == ["waits under the new name"])


@pytest.mark.spec("WAKE-5")
async def test_a_trigger_that_cannot_be_armed_is_replaced_and_that_is_said(world: World) -> None:
    class Broken(FakeTrigger):
        @asynccontextmanager
        async def arm(self, endpoint: str):
            raise BrokenSetup("no sockets here")
            yield

    async with world.running("web", triggers=[Broken(), world.triggers["poll"]]) as (session, delivery):
        assert world.said == ["trigger fake cannot be used (no sockets here); trying poll"]
        assert session.peer.trigger == world.store.present()[0].trigger == "poll"
        assert world.bus.send("alice", "web", "x").is_online
        await until(lambda: len(delivery.handed) == 1)
    alone = world.session("web", FakeDelivery(), triggers=[Broken()])
    await alone.claim()
    with pytest.raises(BrokenSetup, match="no sockets here"):
        await alone.run()


@pytest.mark.spec("STORE-4", "SEND-2")
async def test_a_locked_database_delays_sends_in_order_and_stalls_nothing(world: World) -> None:
    async with world.running("web", heartbeat_s=0.05) as (session, delivery):
        locked, free = threading.Event(), threading.Event()

        def lock() -> None:
            connection = apsw.Connection(str(world.path))
            connection.execute("BEGIN IMMEDIATE")
            locked.set()
            free.wait(10)
            connection.execute("ROLLBACK")
            connection.close()

        locker = threading.Thread(target=lock)
        locker.start()
        locked.wait(10)
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(session.send, "web", f"{number}")
            ticks = 0
            with anyio.move_on_after(0.3):
                while True:
                    await anyio.sleep(0.001)
                    ticks += 1
            assert ticks > 20, "the event loop stood still"
            assert delivery.handed == []
            free.set()
        locker.join()
        await until(lambda: [one.text for one in delivery.handed] == [f"{number}" for number in range(20)])


@pytest.mark.spec("STORE-4")
@pytest.mark.spec("SEND-2")
async def test_a_send_does_not_overtake_one_that_waits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    is_busy = True
    send = world.bus.send

    def busy_for_the_first(sender: str, to: object, text: object, **options) -> Sent:
        if text == "first" and is_busy:
            raise Busy
        return send(sender, to, text, **options)

    monkeypatch.setattr(world.bus, "send", busy_for_the_first)
    ids: dict[str, int] = {}
    async with world.running("alice") as (alice, _), anyio.create_task_group() as tasks:

        async def post(text: str) -> None:
            ids[text] = (await alice.send("later", text)).id

        tasks.start_soon(post, "first")
        await anyio.sleep(0.005)
        tasks.start_soon(post, "second")
        await anyio.sleep(0.005)
        with pytest.raises(Busy):
            alice.send_now("later", "third")
        with pytest.raises(Busy):
            alice.broadcast_now("third")
        assert ids == {}
        is_busy = False
        await until(lambda: len(ids) == 2)
    assert ids["first"] < ids["second"]


async def test_patience_ends() -> None:
    calls = 0

    def never() -> None:
        nonlocal calls
        calls += 1
        raise Busy

    with pytest.raises(Busy):
        await retry_while_busy(never, patience_s=0.05)
    assert calls > 2


@pytest.mark.spec("STORE-5")
async def test_a_session_merges_the_wal_by_itself(world: World) -> None:
    async with world.running("web"):
        empty = world.path.stat().st_size
        for _ in range(400):
            world.bus.send("alice", "nobody", "x" * 900)
        assert world.path.with_name("bus.db-wal").stat().st_size > database.CHECKPOINT_PAGES * 4_096
        await until(lambda: world.path.stat().st_size > empty)
        # The thread still has the file open, and the folder is removed when the test has ended.
        await until(lambda: anyio.to_thread.current_default_thread_limiter().borrowed_tokens == 0)


@pytest.mark.spec("NAME-7")
async def test_a_successor_waits_for_a_predecessor_that_is_leaving(world: World) -> None:
    old, new = world.session("web", FakeDelivery()), world.session("web", FakeDelivery())
    await old.claim()

    async def leave_soon() -> None:
        await anyio.sleep(0.05)
        old.close()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(leave_soon)
        await new.claim()
    assert (new.peer.session, new.peer.name) == (old.peer.session, "web")
    assert new.wished_holder is None


@pytest.mark.spec("NAME-7", "NAME-4")
async def test_a_predecessor_that_stays_is_a_neighbour(world: World) -> None:
    first, second = world.session("web", FakeDelivery()), world.session("web", FakeDelivery())
    await first.claim()
    await second.claim()
    assert (second.peer.name, second.wished_holder) == ("web-2", first.peer)
    assert second.peer.session != first.peer.session


@pytest.mark.spec("SEND-5", "PRES-2")
async def test_a_send_to_a_dead_peer_reaps_it_and_clears_what_it_left(world: World) -> None:
    claimed = world.store.claim(arrival("web"), now=world.clock.now, endpoint=str, join_crowd=True)
    assert claimed is not None
    assert claimed[2] is not None
    claimed[2]._close()  # as the kernel does when its process dies
    world.trigger.dead.add(claimed[0].endpoint)
    sent = world.bus.send("alice", "web", "x")
    assert (sent.is_online, sent.is_known) == (False, True)
    assert world.store.present() == []
    assert world.trigger.dead == set()


async def test_a_live_peer_that_cannot_be_woken_is_still_online(world: World) -> None:
    session = world.session("web", FakeDelivery())
    await session.claim()  # present but not armed yet: a sender can come between the two
    assert world.bus.send("alice", "web", "x").is_online
    assert [peer.name for peer in world.store.present()] == ["web"]


@pytest.mark.spec("WAKE-6", "WAKE-7")
@pytest.mark.parametrize("what", ["the file", "the folder"])
@pytest.mark.parametrize("make", [SocketTrigger, FileWatchTrigger])
async def test_what_senders_look_for_and_was_removed_is_there_again(world: World, make: type, what: str) -> None:
    trigger = make(world.path.parent)
    world.triggers[trigger.name] = trigger
    async with world.running("web", triggers=[trigger], arrival=arrival("web", trigger=trigger.name)) as (
        session,
        delivery,
    ):
        folder = world.path.parent / ("wake" if trigger.name == "file-watch" else "sock")
        for number in range(1, 4):
            (file,) = folder.iterdir()
            file.unlink()
            if what == "the folder":
                folder.rmdir()
            await until(lambda number=number: len(world.said) == number)
            assert list(folder.iterdir()) == [file]
            world.bus.send("alice", "web", f"{number}")
            await until(lambda number=number: len(delivery.handed) == number)
        assert set(world.said) == {"the socket or wake file of this session was removed; it has made a new one"}
        assert (session.peer.trigger, session.peer.endpoint) == (trigger.name, file.name)
    assert list(folder.iterdir()) == []
    trigger.close()


@pytest.mark.spec("STORE-6")
@pytest.mark.parametrize("what", ["deleted", "replaced", "the whole home"])
async def test_a_database_that_is_gone_is_noticed_and_the_new_one_joined(world: World, what: str) -> None:
    """Fault 9 of the system that was measured: two halves of a bus that never meet."""
    async with world.running("web") as (session, delivery), world.running("api") as (other, received):
        await session.rename("shop")
        await session.send("api", "before")
        await until(lambda: len(received.handed) == 1)
        if what == "the whole home":
            shutil.rmtree(world.path.parent)
        else:
            for file in world.path.parent.glob("bus.db*"):
                file.unlink()
        if what == "replaced":
            Store(world.path, busy_ms=1_000).close()
        await session.send("api", "after")  # not into the old file, which nobody sees any more
        await until(lambda: [one.text for one in received.handed] == ["before", "after"])
        await until(lambda: len(world.said) >= 1)
        assert "is another bus now: joined it; what was unread in the old one is not here" in world.said[0]
        assert {peer.name for peer in await other.peers()} == {"shop", "api"}
        assert delivery.handed == []


@pytest.mark.spec("STORE-6", "DRAIN-2")
async def test_nothing_is_marked_in_a_file_that_the_session_has_not_joined_yet(world: World) -> None:
    async with world.running("web") as (session, delivery):
        world.bus.send("alice", "web", "old 1")
        await until(lambda: len(delivery.handed) == 1)
        (checked,) = await session.check(0, 10)
        for file in world.path.parent.glob("bus.db*"):
            file.unlink()
        world.store.reopen()
        world.store.send("alice", "web", "new 1", now=0)  # it has the id that "old 1" had
        session._mark([checked.envelope.id], "fake")
        await session._mark_proven([checked.envelope.id])
        await session.checked([checked.envelope.id], reached=True)
        assert world.store._read("SELECT body, delivered_at, read_at FROM messages") == [("new 1", None, None)]


@pytest.mark.spec("STORE-6", "DRAIN-2")
async def test_ids_of_a_lost_database_are_not_taken_for_those_of_the_new_one(world: World) -> None:
    async with world.running("web", delivery=FakeDelivery(holds=True)) as (session, delivery):
        world.bus.send("alice", "web", "old 1")
        await until(lambda: len(delivery.handed) == 1)  # handed over, but not taken
        for file in world.path.parent.glob("bus.db*"):
            file.unlink()
        await session.send("web", "new 1")  # it gets the id that "old 1" had
        world.bus.send("alice", "web", "new 2")
        await until(lambda: len(delivery.handed) == 3)
        assert world.store.queries.waiting() == {"web": 2}
        delivery.take()
        await until(lambda: world.store.queries.waiting() == {})
        assert [one.text for one in delivery.handed] == ["old 1", "new 1", "new 2"]


@pytest.mark.spec("LIFE-2")
async def test_a_session_whose_host_is_gone_is_an_orphan(world: World) -> None:
    host = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    found = process.look_up(host.pid)
    assert found is not None
    async with world.running("web", arrival=arrival("web", host=found)) as (session, _):
        await anyio.sleep(0.05)
        assert not session.orphaned.is_set()
        host.communicate(b"\n")
        with anyio.fail_after(10):
            await session.orphaned.wait()


async def test_a_clock_that_goes_back_harms_nobody(world: World) -> None:
    async with world.running("web") as (_, delivery):
        world.clock.now -= 365 * 24 * HOUR_MS
        await anyio.sleep(0.05)  # some heartbeats
        world.bus.send("alice", "web", "earlier than before")
        await until(lambda: len(delivery.handed) == 1)
        assert world.store.reap(now=world.clock.now) == []


@pytest.mark.spec("DRAIN-6", "ERR-1")
async def test_trouble_with_the_database_is_said_once_and_outlived(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.running("web", heartbeat_s=600) as (_, delivery):

        def fail(*_arguments: object, **_options: object) -> None:
            raise BrokenSetup("the disk is on fire")

        monkeypatch.setattr(world.store, "mark_delivered", fail)
        world.bus.send("alice", "web", "x")
        await until(lambda: len(delivery.handed) == 1)
        await anyio.sleep(0.05)
        assert world.said == ["the disk is on fire"]
        monkeypatch.undo()
        await until(lambda: world.store.queries.waiting() == {})
        assert len(delivery.handed) == 1


@pytest.mark.spec("VOID-2")
async def test_how_a_session_receives_can_change_and_is_said_to_all(world: World) -> None:
    async with world.running("web") as (session, _):
        await session.set_delivery("pull", "its inbox is gone")
        assert (session.peer.delivery, session.peer.delivery_reason) == ("pull", "its inbox is gone")
        (peer,) = world.bus.peers()
        assert (peer.delivery, peer.delivery_reason) == ("pull", "its inbox is gone")


@pytest.mark.spec("READ-6")
async def test_what_was_shown_and_not_answered_is_shown_once_more(world: World) -> None:
    session = world.session("web", FakeDelivery())
    await session.claim()
    ids = [world.bus.send("alice", "web", text).id for text in ("answered", "not answered", "sure")]

    async def check(*, is_certain: bool = False) -> list[tuple[int, bool]]:
        found = await session.check(0, 50)
        await session.checked([one.envelope.id for one in found], reached=True, is_certain=is_certain)
        return [(one.envelope.id, one.shown_at is not None) for one in found]

    found = await session.check(0, 50)
    await session.checked(ids[:2], reached=True, is_certain=False)
    await session.checked(ids[2:], reached=True)
    assert len(found) == 3
    await session.send("alice", "yes", reply_to=ids[0])
    assert await check() == []
    world.clock.now += 60_000
    assert session.count_unread(10) == 0
    assert await check() == [(ids[1], True)]
    world.clock.now += 600_000
    assert await check() == []
    session.close()


@pytest.mark.spec("NAME-8")
async def test_a_heartbeat_records_the_conversation_that_the_client_has_turned_to(world: World) -> None:
    now = ["one"]
    session = Session(
        world.bus,
        arrival("web", conversation="one"),
        triggers=[world.trigger],
        delivery=None,
        checkpoints=world.checkpoints,
        say=world.said.append,
        retention_hours=0,
        heartbeat_s=0.01,
        conversation=lambda: now[0],
    )
    await session.claim()
    await session.rename("shop")
    async with anyio.create_task_group() as tasks:
        await tasks.start(session.run)
        now[0] = "cleared"
        known = "SELECT conversation, name FROM conversations ORDER BY conversation"
        await until(lambda: world.store._read(known) == [("cleared", "shop"), ("one", "shop")])
        await session.stop()
    session.close()
