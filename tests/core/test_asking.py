"""A question ends in exactly one known way, in this process: real database, our own clock and trigger."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentbus.core import asking
from agentbus.core.asking import Asked, Attention, question
from agentbus.core.bus import PULL
from agentbus.core.config import prepare_home
from agentbus.core.errors import InvalidRequest, Refused
from agentbus.core.model import MessageState
from agentbus.core.session import Session
from agentbus.core.store import Question
from tests.core.test_session import World, until, world
from tests.support.fakes import FakeDelivery

__all__ = ["world"]

pytestmark = pytest.mark.anyio


class Call:
    """An ask that runs as a task, as a tool call does."""

    def __init__(self) -> None:
        self.sent = anyio.Event()
        self.asked: Asked | None = None
        self.scope = anyio.CancelScope()

    async def run(self, session: Session, to: str, wait_s: float, text: str = "well?") -> None:
        with self.scope:
            sent = await session.ask(to, text, wait_s)
            self.sent.set()
            self.asked = await session.answer(sent, wait_s)


async def checked(session: Session) -> list[int]:
    """What a check hands out that does not reach its reader."""
    ids = [one.envelope.id for one in await session.check(0, 10)]
    await session.checked(ids, reached=False)
    return ids


@asynccontextmanager
async def asking_two(world: World) -> AsyncIterator[tuple[Session, FakeDelivery, Session, FakeDelivery]]:
    async with world.running("web") as (web, to_web), world.running("api") as (api, to_api):
        with anyio.fail_after(10):
            yield web, to_web, api, to_api


@pytest.mark.spec("ASK-1")
async def test_the_answer_is_returned_and_not_pushed_as_well(world: World) -> None:
    async with asking_two(world) as (web, to_web, api, to_api), anyio.create_task_group() as tasks:
        call = Call()
        tasks.start_soon(call.run, web, "api", 60)
        await until(lambda: to_api.handed)
        asked = to_api.handed[0]
        assert asked.answer_by == world.clock.now + 60_000
        await api.send("web", "meanwhile")
        await until(lambda: to_web.handed)
        assert not call.asked, "another message is no answer"
        sent = await api.send("web", "8080", reply_to=asked.id)
        await until(lambda: call.asked)
        assert call.asked
        assert call.asked.answer
        answer = call.asked.answer
        assert (answer.id, answer.text, answer.root) == (sent.id, "8080", asked.id)
        # Until the result is written nobody else gets it, and it is as unread as it was.
        assert sent.id not in await checked(web)
        assert world.store.queries.status(sent.id).state is MessageState.PENDING
        await web.checked([answer.id], reached=True, carrier="ask")
        found = world.store.queries.status(sent.id)
        assert (found.state, found.carrier) == (MessageState.READ, "ask")
        assert [one.text for one in to_web.handed] == ["meanwhile"]
        # The rest of the thread is pushed as usual.
        await api.send("web", "no, 8081", reply_to=asked.id)
        await until(lambda: len(to_web.handed) == 2)


@pytest.mark.spec("ASK-1")
async def test_an_answer_that_does_not_reach_the_asker_is_pushed(world: World) -> None:
    async with asking_two(world) as (web, to_web, api, to_api), anyio.create_task_group() as tasks:
        call = Call()
        tasks.start_soon(call.run, web, "api", 60)
        await until(lambda: to_api.handed)
        sent = await api.send("web", "8080", reply_to=to_api.handed[0].id)
        await until(lambda: call.asked)
        await web.checked([sent.id], reached=False, carrier="ask")
        await until(lambda: [one.id for one in to_web.handed] == [sent.id])


@pytest.mark.spec("ASK-4")
async def test_a_cancelled_ask_leaves_the_question_and_its_answer_is_pushed(world: World) -> None:
    async with asking_two(world) as (web, to_web, api, to_api), anyio.create_task_group() as tasks:
        call = Call()
        tasks.start_soon(call.run, web, "api", 60)
        await until(lambda: to_api.handed)
        call.scope.cancel()
        sent = await api.send("web", "8080", reply_to=to_api.handed[0].id)
        await until(lambda: [one.id for one in to_web.handed] == [sent.id])
        assert call.asked is None
        assert world.store.queries.status(sent.id).state is not MessageState.READ


@pytest.mark.spec("ASK-2")
async def test_no_answer_in_time_says_where_the_question_is(world: World) -> None:
    async with asking_two(world) as (web, to_web, api, to_api):
        asked = await web.answer(await web.ask("api", "well?", 0.05), 0.05)
        assert asked.answer is None
        assert not asked.has_ended
        assert f'no answer to #{asked.sent.id} from "api" within 0.05 s: the question ' in str(asked)
        await until(lambda: world.store.queries.status(asked.sent.id).state is MessageState.DELIVERED)
        # A later answer arrives by itself.
        await api.send("web", "8080", reply_to=to_api.handed[0].id)
        await until(lambda: to_web.handed)


@pytest.mark.spec("ASK-3")
async def test_a_peer_that_is_offline_is_said_at_once(world: World) -> None:
    async with world.running("web") as (web, _):
        with anyio.fail_after(10):
            asked = await web.answer(await web.ask("nobody", "well?", 80_000), 80_000)
        assert asked.has_ended
        assert str(asked) == (
            f'nobody answers now: queued #{asked.sent.id} for "nobody": no such peer yet, '
            "it is delivered when one starts"
        )
        assert world.store.queries.status(asked.sent.id).state is MessageState.PENDING


@pytest.mark.spec("ASK-3")
async def test_a_peer_that_leaves_is_said_and_not_waited_for(world: World) -> None:
    async with world.running("web") as (web, _), anyio.create_task_group() as tasks:
        call = Call()
        async with world.running("api") as (_, to_api):
            tasks.start_soon(call.run, web, "api", 80_000)
            await until(lambda: to_api.handed)
        await until(lambda: call.asked)
        assert call.asked
        assert call.asked.has_ended
        assert str(call.asked).startswith(f'"api" has ended without an answer to #{call.asked.sent.id}: the question')


@pytest.mark.spec("ASK-3", "BRAKE-3")
async def test_a_peer_that_is_paused_for_longer_is_said_and_not_waited_for(world: World) -> None:
    async with asking_two(world) as (web, _, api, to_api), anyio.create_task_group() as tasks:
        world.bus.pause("api", by="root")
        asked = await web.answer(await web.ask("api", "well?", 80_000), 80_000)
        assert str(asked) == (
            'no answer to #1 from "api", which is paused by "root" until it is resumed: the question is pending'
        )
        assert not asked.has_ended
        # A pause that ends before the wait does is waited for, and one that begins in it is said.
        world.bus.pause("api", by="root", for_ms=59_000)
        call = Call()
        tasks.start_soon(call.run, web, "api", 60)
        await call.sent.wait()
        question = world.store.queries.newest_id()
        attention = Attention(world.bus, replace(asked.sent, id=question), 60)
        assert not attention.is_lost()
        world.bus.pause("api", by="root", for_ms=60_000)
        await until(lambda: call.asked)
        assert call.asked
        assert call.asked.pause
        world.bus.resume("api", by="root")
        assert not attention.is_lost()
        await until(lambda: [one.id for one in to_api.handed] == [1, question])
        assert api.peer.name == "api"


@pytest.mark.spec("ASK-3", "OLD-3", "KEEP-1", "THREAD-2")
@pytest.mark.parametrize("how", ["cancel", "prune"])
async def test_a_question_that_is_removed_is_said_and_not_waited_for(world: World, how: str) -> None:
    delivery = FakeDelivery()
    if how == "cancel":
        delivery.is_ready = anyio.Event()  # the question stays pending
    async with (
        world.running("web") as (web, _),
        world.running("api", delivery=delivery) as (api, _),
        anyio.create_task_group() as tasks,
    ):
        call = Call()
        tasks.start_soon(call.run, web, "api", 80_000)
        await call.sent.wait()
        if how == "cancel":
            world.bus.cancel(1)
        else:
            await until(lambda: world.store.queries.status(1).state is MessageState.DELIVERED)
            world.bus.prune(2**62)
        await until(lambda: call.asked)
        assert str(call.asked) == 'no answer to #1 from "api": the question was removed, so nobody can answer it'
        with pytest.raises(InvalidRequest, match="there is no message #1 to answer"):
            await api.send("web", "8080", reply_to=1)


@pytest.mark.spec("ASK-1", "GROUP-3", "THREAD-1", "THREAD-2")
async def test_an_answer_by_a_group_is_the_answer_and_the_others_get_it_too(world: World) -> None:
    async with asking_two(world) as (web, to_web, api, to_api), world.running("ops") as (ops, to_ops):
        for name in ("web", "api", "ops"):
            world.bus.join_group(name, "@review")
        async with anyio.create_task_group() as tasks:
            call = Call()
            tasks.start_soon(call.run, web, "api", 60)
            await until(lambda: to_api.handed)
            await api.send("@review", "8080, for all of you", reply_to=to_api.handed[0].id)
            await until(lambda: call.asked)
            assert call.asked
            assert call.asked.answer
            answer = call.asked.answer
            assert (answer.to_group, answer.recipient, answer.root) == ("@review", "web", to_api.handed[0].id)
        await web.checked([answer.id], reached=True, carrier="ask")
        await until(lambda: to_ops.handed)
        theirs = to_ops.handed[0]
        assert (theirs.text, theirs.root, theirs.reply_to) == (answer.text, answer.root, answer.root)
        # Each member answers its own copy, and not the message that it never had.
        with pytest.raises(InvalidRequest, match='"ops" neither sent nor received #1, so this cannot answer it'):
            await ops.send("@review", "thanks", reply_to=theirs.reply_to)
        await ops.send("@review", "thanks", reply_to=theirs.id)
        await until(lambda: to_web.handed)
        assert [(one.text, one.root) for one in to_web.handed] == [("thanks", answer.root)]
        thread = [one.recipient for one in world.store.queries.thread(answer.root)]
        assert sorted(thread) == ["api", "api", "ops", "web", "web"]


@pytest.mark.spec("ASK-3")
async def test_a_peer_that_is_back_at_once_or_replaced_has_not_ended(world: World) -> None:
    now = 0.0
    delivery = FakeDelivery()
    delivery.is_ready = anyio.Event()  # nothing is taken from the mailbox
    async with world.running("web") as (web, _):
        async with world.running("api", delivery=delivery):
            sent = web._send_question("api", "well?", 60)
            attention = Attention(world.bus, sent, 60, lambda: now)
            assert not attention.is_lost()
        assert not attention.is_lost(), "a restart takes a moment"
        async with world.running("api"):
            now += 100
            assert not attention.is_lost(), "the same session, or another that has the question"
        assert not attention.is_lost()
        now += 2 * asking._GONE_S
        assert attention.is_lost()


@pytest.mark.spec("ASK-1", "NAME-6", "THREAD-1")
async def test_a_renamed_asker_and_another_in_the_thread_are_found(world: World) -> None:
    async with asking_two(world) as (web, to_web, api, to_api), world.running("db") as (db, to_db):
        for answerer, name in ((api, "web"), (db, "front")):
            async with anyio.create_task_group() as tasks:
                call = Call()
                tasks.start_soon(call.run, web, "api", 60)
                await call.sent.wait()
                question_id = max(one.id for one in world.store.queries.newest_first() if one.answer_by)
                await until(lambda asked=question_id: [one for one in to_api.handed if one.id == asked])
                await web.rename("front" if name == "web" else "web-again")
                passed = await api.send("db", "you know that", reply_to=question_id)
                await until(lambda row=passed.id: [one for one in to_db.handed if one.id == row])
                assert not call.asked, "what goes to another is no answer"
                answers = question_id if answerer is api else passed.id
                sent = await answerer.send(name, "8080", reply_to=answers)
                await until(lambda one=call: one.asked)
                assert call.asked
                assert call.asked.answer
                assert call.asked.answer.id == sent.id
                await web.checked([sent.id], reached=True, carrier="ask")
        assert to_web.handed == []


@pytest.mark.spec("ASK-1", "STORE-9")
async def test_the_answer_of_a_program_from_before_is_found(world: World) -> None:
    """A session of schema 7 goes on, and stores no thread."""
    async with asking_two(world) as (web, to_web, _, to_api), anyio.create_task_group() as tasks:
        call = Call()
        tasks.start_soon(call.run, web, "api", 60)
        await until(lambda: to_api.handed)
        with world.store._writing() as execute:
            execute(
                "INSERT INTO messages (sender, recipient, body, reply_to, sent_at) VALUES ('api', 'web', '8080', ?, 1)",
                (to_api.handed[0].id,),
            )
        world.trigger.notify(web.peer.endpoint)
        await until(lambda: call.asked)
        assert call.asked
        assert call.asked.answer
        assert call.asked.answer.text == "8080"
        assert to_web.handed == []


@pytest.mark.spec("ASK-1")
async def test_an_ask_is_woken_while_a_push_is_stuck(world: World) -> None:
    class Stuck(FakeDelivery):
        async def deliver(self, batch):
            self.handed += batch
            await anyio.sleep_forever()

    async with world.running("api") as (api, to_api), world.running("web", delivery=(stuck := Stuck())) as (web, _):
        await api.send("web", "a program that does not take this")
        await until(lambda: stuck.handed)
        async with anyio.create_task_group() as tasks:
            call = Call()
            tasks.start_soon(call.run, web, "api", 60)
            await until(lambda: to_api.handed)
            beside = web._wakes.beside  # type: ignore[union-attr]
            woken = 0

            async def counted(timeout_s: float) -> None:
                nonlocal woken
                await beside(600)  # so that no look of its own finds the answer
                woken += 1

            web._next_wake = counted  # type: ignore[method-assign]
            await until(lambda: web._wakes._is_waited_for)  # type: ignore[union-attr]
            await api.send("web", "8080", reply_to=to_api.handed[0].id)
            await until(lambda: call.asked)
            assert call.asked
            assert call.asked.answer


@pytest.mark.spec("ASK-6")
async def test_what_cannot_be_asked_is_refused_and_sends_nothing(world: World) -> None:
    async with world.running("web") as (web, _):
        await web.rename("front")
        for to, wait_s, named in (
            ("front", 60, '"front" is you'),
            ("web", 60, '"web" is you'),
            ("@review", 60, "'@review' is a group, and a question goes to one peer"),
            ("api", -1, "cannot be waited for during -1 s: use 0 to 86,400 s"),
            ("api", 86_401, "during 86401 s"),
            ("api", float("nan"), "during nan s"),
        ):
            with pytest.raises(InvalidRequest, match=named):
                await web.ask(to, "well?", wait_s)
        web.is_guest = True
        with pytest.raises(Refused, match="you are a subagent of it"):
            await web.ask("api", "well?", 60)
        web.is_guest = False
        assert list(world.store.queries.newest_first()) == []
        assert web._asking == set()


@pytest.mark.spec("ASK-5")
async def test_what_a_command_waits_for_is_left_to_it_for_as_long_as_it_lives(world: World) -> None:
    async with world.running("web") as (web, to_web), world.running("api") as (api, to_api):
        lock = world.store.presence.hold("0123456789ab")
        assert lock is not None
        asked = world.bus.send(
            "web", "api", "well?", question=Question(world.clock.now + 60_000, "0123456789ab"),
            sender_session=web.peer.session,
        )  # fmt: skip
        await until(lambda: to_api.handed)
        sent = await api.send("web", "8080", reply_to=asked.id)
        assert str(sent) == f'sent #{sent.id} to "web", which waits for this answer'
        await api.send("web", "by the way")
        await until(lambda: to_web.handed)
        assert sent.id not in await checked(web)
        answer = world.store.queries.answer(asked.id)
        assert answer
        assert answer.id == sent.id
        lock.release()
        (world.store.presence.folder / "0123456789ab").touch()  # as a killed process leaves it
        await until(lambda: len(to_web.handed) == 2)
        assert [one.text for one in to_web.handed] == ["by the way", "8080"]
        assert not (world.store.presence.folder / "0123456789ab").exists()
        # Where nothing can be locked, time tells.
        asked = world.bus.send("web", "api", "and?", question=Question(world.clock.now + 1_000, ""))
        await api.send("web", "9090", reply_to=asked.id)
        world.clock.now += 70_000
        await until(lambda: len(to_web.handed) == 3)


STEPS = st.sampled_from(
    ["answer", "other", "third", "rename", "cancel", "check", "leave", "late", "fail the result", "second ask"]
)


@pytest.mark.spec("ASK-1", "ASK-2", "ASK-3", "ASK-4")
@given(st.lists(STEPS, min_size=1, max_size=6))
@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=40, derandomize=True)
def test_every_ask_ends_in_exactly_one_way(steps: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder:
        world = World(prepare_home(Path(folder, "bus")))
        try:
            anyio.run(_live_through, world, steps)
        finally:
            world.store.close()


async def _live_through(world: World, steps: list[str]) -> None:
    ended: dict[int, list[str]] = {}
    read: set[int] = set()
    fails = False

    async def ask(web: Session) -> None:
        wait_s = 0.05 if "late" in steps else 60
        question = await web.ask("api", "well?", wait_s)
        ended[question.id] = []
        sent.set()
        try:
            asked = await web.answer(question, wait_s)
        except anyio.get_cancelled_exc_class():
            ended[question.id].append("cancelled")
            raise
        ended[question.id].append("answer" if asked.answer else "gone" if asked.has_ended else "late")
        if asked.answer:
            await web.checked([asked.answer.id], reached=not fails, carrier="ask")
            if not fails:
                read.add(asked.answer.id)

    async with world.running("web") as (web, to_web), anyio.create_task_group() as tasks:
        with anyio.fail_after(20):
            async with world.running("api") as (api, _), world.running("db") as (db, _):
                for step in ["second ask", *steps]:
                    asked_ids = sorted(ended)
                    match step:
                        case "second ask":
                            sent = anyio.Event()
                            tasks.start_soon(ask, web)
                            await sent.wait()
                        case "answer":
                            await api.send("web", "8080", reply_to=asked_ids[0])
                        case "third":
                            passed = await api.send("db", "you?", reply_to=asked_ids[-1])
                            await db.send("web", "8081", reply_to=passed.id)
                        case "other":
                            await api.send("web", "hello")
                        case "rename":
                            await web.rename("front" if web.peer.name == "web" else "web")
                        case "cancel":
                            tasks.cancel_scope.cancel()
                            with anyio.CancelScope(shield=True):
                                await until(lambda: all(ended.values()))
                        case "check":
                            checked = await web.check(0, 10)
                            await web.checked([one.envelope.id for one in checked], reached=True)
                            read |= {one.envelope.id for one in checked}
                        case "fail the result":
                            fails = True
                    if tasks.cancel_scope.cancel_called:
                        break
                with anyio.CancelScope(shield=True):
                    if "leave" not in steps and "late" not in steps:
                        for asked_id in sorted(ended):
                            await api.send("web", "at last", reply_to=asked_id)
                        await until(lambda: all(ended.values()))
            with anyio.CancelScope(shield=True):
                # The peer has left by now: no ask goes on.
                await until(lambda: all(ended.values()))
                assert all(len(ways) == 1 for ways in ended.values()), ended
                assert web._asking == set()
                # And no message to the asker is lost: each was read by a result, or pushed.
                mine = {one.id for one in world.store.queries.newest_first() if one.recipient in ("web", "front")}
                await until(lambda: mine <= read | {one.id for one in to_web.handed})
                pushed = [one.id for one in to_web.handed]
                assert len(pushed) == len(set(pushed))


@pytest.mark.spec("ASK-2")
def test_what_is_said_without_an_answer(world: World) -> None:
    sent = world.bus.send("web", "api", "well?")
    online = replace(sent, is_online=True, delivery=PULL)
    assert str(Asked(online, 60, state=MessageState.PENDING)) == (
        'no answer to #1 from "api" within 60 s: the question is pending; "api" reads its mail only when it calls '
        "check_messages"
    )
    read = Asked(replace(online, delivery="channel"), 1.5, has_ended=True, state=MessageState.READ)
    assert str(read) == '"api" has ended without an answer to #1: the question was read'
    assert question("api", 1.5, 7) == Question(1_507)
