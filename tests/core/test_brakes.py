"""The brakes: what a paused session cannot do, what ends a pause, and how much a session sends in an hour."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from agentbus.adapters.mcp import tools
from agentbus.adapters.mcp.rate_limit import HourlyLimit
from agentbus.adapters.mcp.reading import check_messages
from agentbus.core.config import prepare_home
from agentbus.core.errors import InvalidRequest, Refused
from agentbus.core.model import PERSON
from agentbus.core.names import BUS_NAME
from agentbus.core.pump import BATCH
from agentbus.core.session import Session
from agentbus.core.store import Store
from agentbus.member import join
from tests.core.test_groups import Town, town
from tests.core.test_session import World, until, world
from tests.support.fakes import FakeDelivery, tool_context

__all__ = ["town", "world"]

HOUR_MS = 3_600_000


def sends(town: Town, name: str) -> list[Callable[[], object]]:
    """Every way to send as the session of that name."""
    (peer,) = [one for one in town.store.present() if one.name == name]
    return [
        lambda: town.bus.send(name, "bob", "x", sender_session=peer.session),
        lambda: town.bus.send("a former name", "bob", "x", sender_session=peer.session),
        lambda: town.bus.send_group(name, "@review", "x", sender_session=peer.session),
        lambda: town.bus.broadcast(name, "x", sender_session=peer.session),
    ]


@pytest.mark.spec("BRAKE-1", "BRAKE-2", "ERR-1")
def test_a_paused_session_sends_nothing_by_no_way_and_a_person_can(town: Town) -> None:
    town.claim("alice")
    town.claim("bob")
    town.bus.join_group("bob", "@review")
    (pause,) = town.bus.pause("Alice", by="root", for_ms=60_000)
    assert str(pause) == 'paused by "root" until 2023-11-14T22:14:20.000Z'
    for send in sends(town, "alice"):
        with pytest.raises(Refused) as caught:
            send()
        assert str(caught.value) == (
            'this session is paused by "root" until 2023-11-14T22:14:20.000Z, so nothing was sent: '
            "only your user can change that, with agentbus resume alice"
        )
    assert town.count() == 0
    town.bus.send("alice", "bob", "a person, who says that this is alice")
    town.bus.send(BUS_NAME, "alice", "from the bus itself")
    assert str(town.bus.send("bob", "alice", "x")) == (
        'queued #3 for "alice": it is paused by "root" until 2023-11-14T22:14:20.000Z, and gets its mail then'
    )
    town.bus.join_group("alice", "@review")
    assert str(town.bus.send_group("carol", "@review", "x")) == "sent to @review: alice (#4, paused), bob (#5)"
    assert town.bus.resume("alice", by="root") == (["alice"], ["alice"])
    for send in sends(town, "alice"):
        send()


@pytest.mark.spec("BRAKE-2")
def test_a_pause_ends_by_itself_or_by_a_person_and_a_new_one_replaces_it(town: Town) -> None:
    alice = town.claim("alice")
    town.bus.pause("alice", by="root", for_ms=1_000)
    town.clock.now += 999
    assert town.bus.pause_of(alice) is not None
    town.clock.now += 1
    assert town.bus.pause_of(alice) is None
    assert town.store.queries.pauses(town.clock.now) == {}
    town.bus.pause("alice", by="root", for_ms=1_000)
    town.bus.pause("alice", by="eve")
    town.clock.now += 10 * HOUR_MS
    town.store.forget_pauses(town.clock.now)
    assert str(town.bus.pause_of(alice)) == 'paused by "eve" until it is resumed'
    assert town.bus.resume(None, by="root") == (["alice"], ["alice"])
    assert town.bus.resume(None, by="root") == ([], [])
    assert town.bus.resume("alice", by="root") == (["alice"], [])
    town.clock.now += HOUR_MS + 1
    town.store.forget_pauses(town.clock.now)
    assert town.store._read("SELECT count(*) FROM pauses") == [(0,)]


@pytest.mark.spec("BRAKE-2")
def test_all_that_are_online_are_paused_one_by_one(town: Town) -> None:
    town.claim("alice")
    town.kill(town.claim("dead"))
    town.claim("bob")
    assert [one.name for one in town.bus.pause(None, by="root")] == ["alice", "bob"]
    town.bus.resume("bob", by="root")
    assert list(town.store.queries.pauses(town.clock.now)) == ["alice"]


@pytest.mark.spec("BRAKE-2")
def test_a_person_is_not_paused_by_name_nor_with_all(town: Town) -> None:
    town.claim("ann", runtime=PERSON)
    with pytest.raises(Refused, match='"ann" is a person, and a person is not paused'):
        town.bus.pause("ann", by="root")
    with pytest.raises(Refused, match="nobody is online"):
        town.bus.pause(None, by="root")
    town.claim("alice")
    assert [one.name for one in town.bus.pause(None, by="root")] == ["alice"]


@pytest.mark.spec("BRAKE-2", "ERR-1")
def test_pausing_or_resuming_nobody_is_one_sentence_and_changes_nothing(town: Town) -> None:
    town.bus.send("root", "mailbox-alone", "x")
    for who in ("ghost", "mailbox-alone", "root"):
        with pytest.raises(Refused, match=f'no session has or had the name "{who}", nobody was paused: agentbus peers'):
            town.bus.pause(who, by="root")
        with pytest.raises(Refused, match=f'no session has or had the name "{who}", nobody was resumed'):
            town.bus.resume(who, by="root")
    with pytest.raises(Refused, match="nobody is online, and nobody was paused"):
        town.bus.pause(None, by="root")
    for bad in ("@review", "a,b", "", "all"):
        with pytest.raises(InvalidRequest):
            town.bus.pause(bad, by="root")
    assert town.store._read("SELECT count(*) FROM pauses") == [(0,)]


@pytest.mark.spec("BRAKE-2")
def test_a_pause_is_of_the_session_whatever_name_it_takes_and_outlives_it(town: Town) -> None:
    alice = town.claim("alice")
    town.bus.pause("alice", by="root")
    town.bus.rename(alice, "anna")
    assert list(town.store.queries.pauses(town.clock.now)) == ["anna"]
    town.bus.leave(alice)
    town.held.pop(alice.session).release()
    back = town.claim("alice")  # the next server of this agent process is the same session
    assert (back.session, back.name) == (alice.session, "anna")
    assert town.bus.pause_of(back) is not None
    # By the name that it had, as mail reaches it.
    assert town.bus.resume("alice", by="root") == (["anna"], ["anna"])


@pytest.mark.spec("BRAKE-2")
@pytest.mark.parametrize(("its", "there", "after"), [(None, 60_000, None), (60_000, None, None), (5, 9, 9), (9, 5, 9)])
def test_of_two_pauses_that_meet_in_a_name_the_longer_holds(
    town: Town, its: int | None, there: int | None, after: int | None
) -> None:
    bob = town.claim("bob")
    town.bus.pause("bob", by="root", for_ms=there)
    town.bus.leave(bob)
    alice = town.claim("alice")
    town.bus.pause("alice", by="root", for_ms=its)
    town.bus.rename(alice, "bob")
    pause = town.bus.pause_of(alice)
    assert pause is not None
    assert pause.until == (None if after is None else town.clock.now + after)


@pytest.mark.anyio
@pytest.mark.spec("BRAKE-1", "BRAKE-2")
async def test_nothing_is_pushed_to_a_paused_session_and_all_comes_at_once_when_it_is_resumed(world: World) -> None:
    async with world.running("web") as (session, delivery):
        world.bus.pause("web", by="root")
        for number in range(BATCH + 5):
            world.bus.send("alice", "web", f"{number}")
        session._wake_itself()
        await until(lambda: not world.trigger.armed[session.peer.endpoint].event.is_set())
        assert delivery.handed == []
        assert session.count_unread(1_000) == 0
        assert world.store.queries.waiting() == {"web": BATCH + 5}
        world.bus.resume("web", by="root")
        # The safety poll is 600 s away.
        await until(lambda: len(delivery.handed) == BATCH + 5)


@pytest.mark.anyio
@pytest.mark.spec("BRAKE-1")
async def test_the_line_about_old_mail_waits_with_it(world: World) -> None:
    for _ in range(30):
        world.bus.send("alice", "web", "old")
    world.clock.now += 48 * HOUR_MS
    delivery = FakeDelivery()
    session = world.session("web", delivery)
    session._holds_old = True
    await session.claim()
    world.bus.pause("web", by="root")
    assert session._first is not None
    assert session._read(100) == []
    world.bus.resume("web", by="root")
    assert [one.sender for one in session._read(100)] == [BUS_NAME]
    session.close()


@pytest.mark.anyio
@pytest.mark.spec("BRAKE-1")
async def test_the_tools_of_a_paused_session_say_so_and_the_others_work(world: World) -> None:
    async with world.running("web") as (session, _), world.running("api"):
        context = tool_context(session)
        world.bus.pause("web", by="root")
        world.bus.send("alice", "web", "hello")
        said = 'paused by "root" until it is resumed'
        for name, arguments in (("send_message", {"to": "api", "text": "x"}), ("broadcast", {"text": "x"})):
            refused = await tools.call(context, name, arguments)
            now = tools.call_now(context, name, arguments)
            assert now is not None
            assert refused.is_error
            assert (
                refused.text
                == now.text
                == (
                    f"this session is {said}, so nothing was sent: only your user can change that, "
                    "with agentbus resume web"
                )
            )
        held = f"this session is {said}: 1 unread message for it, to be had then"
        assert (await check_messages(context, session, {"wait_s": 100})).text == held
        # Paused while it waits: there are unread messages, and it is not said that there are none.
        world.bus.resume("web", by="root")
        await until(lambda: not world.store.queries.waiting())
        async with anyio.create_task_group() as tasks:

            async def wait() -> None:
                assert (await check_messages(context, session, {"wait_s": 1})).text == held

            world.store.mark_read([1], session=session.peer.session, now=0)
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            world.bus.pause("web", by="root")
            world.bus.send("alice", "web", "and this")
        assert (await tools.call(context, "whoami", {})).text.endswith(f"; {said}: nothing comes or goes before that")
        assert (
            f"web (you): test in /somewhere, woken by fake; {said}"
            in (await tools.call(context, "list_peers", {})).text
        )
        joined = await tools.call(context, "join_group", {"group": "review"})
        assert joined.text == "you are in @review now, with nobody else yet"
        assert (
            "web (you): test in /somewhere, woken by fake, in @review"
            in (await tools.call(context, "list_peers", {})).text
        )
        assert (await tools.call(context, "leave_group", {"group": "review"})).text == "you have left @review"
        assert (await tools.call(context, "set_name", {"name": "web2"})).text.startswith('you are "web2" now')
        assert (await tools.call(context, "send_message", {"to": "api", "text": "x"})).is_error
        assert world.store.queries.waiting() == {"web2": 1}


@pytest.mark.anyio
@pytest.mark.spec("BRAKE-3", "SEND-4", "GROUP-3")
async def test_who_sends_to_several_is_told_which_of_them_are_paused(world: World) -> None:
    async with world.running("alice") as (alice, _), world.running("bob"), world.running("carol"):
        context = tool_context(alice)
        for name in ("alice", "bob"):
            world.bus.join_group(name, "@review")
        world.bus.pause("bob", by="root")
        said = await tools.call(context, "broadcast", {"text": "x"})
        assert said.text == "sent to 2: bob (#1, paused), carol (#2)"
        said = await tools.call(context, "send_message", {"to": "@review", "text": "x"})
        assert said.text == "sent to @review: bob (#3, paused)"
        first, _ = world.bus.broadcast("alice", "x")
        assert str(first) == 'queued #4 for "bob": it is paused by "root" until it is resumed, and gets its mail then'


@pytest.mark.anyio
@pytest.mark.spec("BRAKE-1")
async def test_a_check_that_waits_hands_out_nothing_once_its_session_is_paused(world: World) -> None:
    session = world.session("web", FakeDelivery())
    await session.claim()
    world.bus.pause("web", by="root")
    world.bus.send("alice", "web", "hello")
    assert await session.check(0.05, 10) == []
    world.bus.resume("web", by="root")
    assert [one.envelope.text for one in await session.check(0, 10)] == ["hello"]
    session.close()


@pytest.mark.anyio
@pytest.mark.spec("GROUP-2", "LATE-2")
async def test_a_subagent_changes_no_group_of_its_main_agent(world: World) -> None:
    async with world.running("web") as (session, _):
        session.is_guest = True
        for name in ("join_group", "leave_group"):
            done = await tools.call(tool_context(session), name, {"group": "review"})
            assert done.text == (
                "its groups belong to the main agent of this session, and you are a subagent of it: leave it as it is"
            )
        session.is_guest = False
    assert world.store.queries.groups() == {}


@pytest.mark.anyio
@pytest.mark.spec("BRAKE-1", "LIB-3")
async def test_a_program_that_is_paused_sends_and_receives_nothing(home: Path) -> None:
    async with join("alice", home=home) as alice, join("bob", home=home) as bob:
        bus = alice._session.bus
        bus.pause("alice", by="root")
        with pytest.raises(Refused, match='paused by "root"'):
            await alice.send("bob", "x")
        await bob.send("alice", "waits")
        bus.resume("alice", by="root")
        assert (await alice.receive()).text == "waits"


# -- the slow guard ------------------------------------------------------------------------------------------


def slow(world: World, session: Session, limit: int):
    context = tool_context(session)
    context.hourly_limit = HourlyLimit(limit)

    def send(to: str = "bob", tool: str = "send_message") -> str:
        arguments = {"text": "x"} if tool == "broadcast" else {"to": to, "text": "x"}
        done = tools.call_now(context, tool, arguments)
        assert done is not None
        world.clock.now += 1_000
        return done.text if done.is_error else ""

    return send


@pytest.mark.anyio
@pytest.mark.spec("BRAKE-4", "ERR-1")
async def test_so_many_to_one_name_in_an_hour_and_then_the_user_is_asked(world: World) -> None:
    async with world.running("web") as (session, _), world.running("bob"):
        send = slow(world, session, 5)
        began = world.clock.now
        assert [send() for _ in range(5)] == [""] * 5
        assert send() == (
            'you sent 5 messages to "bob" since 2023-11-14T22:13:20.000Z, the limit is 5 in an hour: ask your user, or '
            "agentbus resume web, which only your user can type"
        )
        assert send("carol") == ""
        # Counted by the bus: a new server of the session knows it, and an old name of the recipient leads to the same.
        assert slow(world, session, 5)() != ""
        assert "the limit is 5" in send()
        world.clock.now = began + HOUR_MS
        assert send() == ""
        assert send() == ""
    assert world.store.queries.newest_id() == 8


@pytest.mark.anyio
@pytest.mark.spec("BRAKE-4")
async def test_a_resume_begins_the_count_anew(world: World) -> None:
    async with world.running("web") as (session, _):
        send = slow(world, session, 3)
        assert [bool(send()) for _ in range(4)] == [False, False, False, True]
        assert world.bus.resume("web", by="root") == (["web"], [])
        assert [bool(send()) for _ in range(4)] == [False, False, False, True]


@pytest.mark.anyio
@pytest.mark.spec("BRAKE-4")
async def test_what_goes_by_a_group_a_broadcast_or_another_process_counts_too(world: World) -> None:
    async with world.running("web") as (session, _), world.running("bob"):
        for name in ("bob", "carol", "web"):
            world.bus.join_group(name, "@review")
        send = slow(world, session, 6)
        assert [send(), send("@review"), send(tool="broadcast"), send("@review")] == [""] * 4
        assert [send(tool="broadcast"), send()] == [""] * 2
        # A shell command of the session, say: it is not refused, and it is counted.
        world.bus.send(session.peer.name, "bob", "x", sender_session=session.peer.session)
        for refused in (send(), send("@review"), send(tool="broadcast")):
            assert refused.startswith('you sent 7 messages to "bob" since ')
        assert send("carol") == ""
        # What others send is not counted.
        other = world.store.present()[0]
        assert other.name == "bob"
        assert world.bus.sent_lately(other, "web") is None


@pytest.mark.spec("BRAKE-4")
def test_the_bus_is_asked_seldom_and_zero_is_no_limit() -> None:
    asked = []

    def count() -> tuple[str, int, int] | None:
        asked.append(1)
        return ("bob", sent, 0) if sent else None

    guard = HourlyLimit(100)
    for sent in range(100):  # noqa: B007 - what the bus counts
        guard.check("bob", str, count)
    assert len(asked) == 1
    sent = 100
    for _ in range(3):
        with pytest.raises(Refused):
            guard.check("bob", str, count)
    assert len(asked) == 4
    for _ in range(1_000):
        HourlyLimit(0).check("bob", str, count)
    assert len(asked) == 4


@pytest.mark.spec("BRAKE-4")
def test_a_clock_that_went_back_counts_nothing_that_is_still_to_come(town: Town) -> None:
    alice = town.claim("alice")
    town.bus.send("alice", "bob", "x", sender_session=alice.session)
    assert town.bus.sent_lately(alice, "bob") == ("bob", 1, town.clock.now)
    town.clock.now -= 24 * HOUR_MS
    assert town.bus.sent_lately(alice, "bob") is None


@pytest.mark.spec("BRAKE-4")
def test_what_is_delivered_and_what_is_pending_is_counted_once_each_by_an_index(town: Town) -> None:
    alice, bob = town.claim("alice"), town.claim("bob")
    for _ in range(4):
        town.bus.send("alice", "bob", "x", sender_session=alice.session)
    town.bus.mark(bob, [1, 2], "fake")
    town.bus.rename(bob, "rob")
    assert town.bus.sent_lately(alice, "bob") == ("bob", 2, town.clock.now)
    town.clock.now += 1
    town.bus.mark(bob, [3, 4], "fake")
    assert town.bus.sent_lately(alice, "rob") == ("rob", 2, town.clock.now - 1)


@pytest.mark.spec("BRAKE-3")
def test_an_old_database_has_no_pauses(home: Path) -> None:
    store = Store(prepare_home(home), busy_ms=0)
    assert (store.queries.pauses(0), store.queries.groups()) == ({}, {})
    store.close()
