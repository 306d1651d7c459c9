"""The promises of ports.Delivery, tested for every delivery. A new one is one more parameter."""

from __future__ import annotations

import json
import os
import re
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from agentbus.adapters.claude_mcp.door import Door as ModDoor
from agentbus.adapters.claude_mcp.inbox import inbox as claude_inbox
from agentbus.adapters.claude_mcp.mod import ModDelivery
from agentbus.adapters.codex.app_server import AppServer
from agentbus.adapters.codex.delivery import AppServerDelivery
from agentbus.adapters.codex.thread import Thread
from agentbus.adapters.gemini.delivery import HookDelivery
from agentbus.adapters.gemini.hooks import Hooks
from agentbus.adapters.gemini.records import Chat
from agentbus.adapters.mcp.channel import ChannelDelivery
from agentbus.adapters.mcp.gate import ReadyGate
from agentbus.adapters.mcp.inbox import Address, InboxDelivery, PostBudget
from agentbus.adapters.mcp.transport import Stdio
from agentbus.adapters.opencode.door import Door, PluginDelivery
from agentbus.adapters.qwen.inbox import QwenInbox
from agentbus.core.errors import DeliveryClosed, DeliveryFailed
from agentbus.core.model import Envelope
from agentbus.core.ports import Delivery, Receipt
from agentbus.core.process import current, parent
from agentbus.member import _HandOver
from tests.support.app_server_stand_in import AppServerStandIn
from tests.support.command import PATIENCE_S
from tests.support.door_stand_in import TOKEN as DOOR_TOKEN
from tests.support.door_stand_in import DoorStandIn
from tests.support.fakes import FakeDelivery, envelope
from tests.support.gemini_stand_in import GeminiStandIn, ask_socket
from tests.support.inbox_stand_in import TOKEN, InboxStandIn
from tests.support.mod_stand_in import ModStandIn
from tests.support.qwen_stand_in import SESSION, QwenStandIn
from tests.support.transcript import TranscriptFile

pytestmark = pytest.mark.anyio


class FarEnd:
    """A delivery with its far end: `take` lets that end take all that is there, and returns the ids, as text."""

    def __init__(self, delivery: Delivery, take: Callable[[], list[str]], close: Callable[[], None] | None) -> None:
        self.delivery = delivery
        self.take = take
        self.close = close
        self.took: list[str] = []

    async def until_took(self, ids: list[str]) -> None:
        with anyio.fail_after(PATIENCE_S):
            while self.took != ids:
                self.took += self.take()
                await anyio.sleep(0.001)


@asynccontextmanager
async def fake() -> AsyncIterator[FarEnd]:
    delivery = FakeDelivery(most=3, holds=True)
    seen = 0

    def take() -> list[str]:
        nonlocal seen
        delivery.take()
        new, seen = delivery.handed[seen:], len(delivery.handed)
        return [str(one.id) for one in new]

    yield FarEnd(delivery, take, delivery.close)


@asynccontextmanager
async def hand_over() -> AsyncIterator[FarEnd]:
    delivery = _HandOver()

    def take() -> list[str]:
        try:
            return [str(delivery.receive.receive_nowait().id)]
        except anyio.WouldBlock:
            return []

    yield FarEnd(delivery, take, None)
    delivery.close()


@asynccontextmanager
async def channel(make_pair: Callable[[], tuple[int, int]]) -> AsyncIterator[FarEnd]:
    theirs, ours = make_pair()
    null = os.open(os.devnull, os.O_RDONLY)
    stdio = Stdio(null, ours, lambda line: None)
    gate = ReadyGate(settle_s=0)
    gate.initialized()
    gate.listed()
    os.set_blocking(theirs, False)
    rest = b""

    def take() -> list[str]:
        nonlocal rest
        with suppress(BlockingIOError):
            rest += os.read(theirs, 1_048_576)
        *lines, rest = rest.split(b"\n")
        return [json.loads(line)["params"]["meta"]["msg_id"] for line in lines]

    def close() -> None:
        os.dup2(null, theirs)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stdio._write_rest)
        yield FarEnd(ChannelDelivery(stdio, gate), take, close)
        tasks.cancel_scope.cancel()
    for fd in (theirs, ours, null):
        os.close(fd)


@asynccontextmanager
async def inbox(kind: type[InboxStandIn] = InboxStandIn) -> AsyncIterator[FarEnd]:
    seen = 0
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder:
        far = kind(Path(folder, "in", "1.sock"), clock=iter(range(0, 10**9, 10)).__next__, reads=False)
        home = Path(folder, "bus")
        home.mkdir(mode=0o700)
        gate = ReadyGate(settle_s=0)
        gate.initialized()
        gate.listed()

        async def report(_trouble: str) -> None:
            pass

        def take() -> list[str]:
            nonlocal seen
            far.is_reading.set()
            new, seen = far.texts[seen:], len(far.texts)
            assert not far.dropped
            return re.findall(r'msg_id="(\d+)"', "".join(new))

        ours = current()
        bucket = PostBudget(home, ours, burst=10_000)
        at = Address(far.path, TOKEN)
        to = claude_inbox(at, ours) if kind is InboxStandIn else QwenInbox(at, ours, lambda: SESSION)
        if isinstance(to, QwenInbox):
            to.listen(home, bucket)
        yield FarEnd(InboxDelivery(to, bucket, gate, report), take, None)
        far.close()


class Retried:
    """A delivery that is asked again when it has handed over nothing, as a pump does."""

    trouble = ""

    def __init__(self, inner: Delivery) -> None:
        self._inner = inner
        self.carrier = inner.carrier

    async def ready(self) -> None:
        await self._inner.ready()

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        while True:
            with suppress(DeliveryFailed):
                return await self._inner.deliver(batch)
            await anyio.sleep(0.001)


@asynccontextmanager
async def app_server() -> AsyncIterator[FarEnd]:
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder:
        far = AppServerStandIn(Path(folder, "control.sock"))
        there = far.start("t1")
        there.is_busy = True
        server = AppServer(far.path, current(), lambda method, params: thread.heard(method, params))
        thread = Thread(server, "t1")
        seen = 0

        def take() -> list[str]:
            nonlocal seen
            if there.waiting:
                far.end_tool(there)
            new, seen = there.requests[seen:], len(there.requests)
            return re.findall(r'msg_id="(\d+)"', "".join(piece for request in new for piece in request))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.run)
            tasks.start_soon(thread.run)
            while server.trouble:
                await anyio.sleep(0.001)
            yield FarEnd(Retried(AppServerDelivery(server, thread)), take, None)
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def plugin() -> AsyncIterator[FarEnd]:
    seen = 0
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder:
        far = DoorStandIn(Path(folder, "door", "1.sock"), gives=False)
        door = Door(Address(far.path, DOOR_TOKEN), current())
        door.open()
        gate = ReadyGate(settle_s=0)
        gate.initialized()
        gate.listed()

        async def report(_trouble: str) -> None:
            pass

        def take() -> list[str]:
            nonlocal seen
            posts = list(far.posts.items())
            new, seen = posts[seen:], len(posts)
            far.give(*[key for key, _ in new]) if new else None
            door.poll()
            return re.findall(r'msg_id="(\d+)"', "".join(text for _, text in new))

        yield FarEnd(PluginDelivery(door, gate, report), take, None)
        door.close()
        far.close()


@asynccontextmanager
async def hook() -> AsyncIterator[FarEnd]:
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder:
        chat = Chat()
        delivery = HookDelivery(chat)
        home = Path(folder, "bus")
        home.mkdir(mode=0o700)

        async def report(_trouble: str) -> None:
            pass

        hooks = Hooks(parent(), home, chat, delivery, ReadyGate(), report)
        far = GeminiStandIn(Path(folder), ask_socket(home / "hooks"))
        is_over = threading.Event()
        seen = 0

        def work() -> None:
            while not is_over.is_set():
                far.prompt()

        worker = threading.Thread(target=work)

        def take() -> list[str]:
            nonlocal seen
            if worker.ident is None:
                worker.start()
            new, seen = far.requests[seen:], len(far.requests)
            return re.findall(r'msg_id="(\d+)"', "".join(text for texts in new for text in texts))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hooks.run)
            while not list(home.glob("hooks/*.sock")):
                await anyio.sleep(0.001)
            yield FarEnd(Retried(delivery), take, None)
            is_over.set()
            if worker.ident is not None:
                await anyio.to_thread.run_sync(worker.join)
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def mod(outcome: str) -> AsyncIterator[FarEnd]:
    seen = 0
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder:
        home = Path(folder, "bus")
        home.mkdir(mode=0o700)
        record = TranscriptFile(Path(folder, "transcript.jsonl"))
        door = ModDoor(home, current())
        delivery = ModDelivery(door, record, lambda: False)

        def take() -> list[str]:
            nonlocal seen
            new, seen = far.posts[seen:], len(far.posts)
            for post in new:
                if outcome == "noted":
                    record.note(post["text"])
                else:
                    record.prompt(post["text"])
                    far.say_beside(post["post"], submitted=True)
            return re.findall(r'msg_id="(\d+)"', "".join(post["text"] for post in new))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(door.run)
            while door.gone:
                await anyio.sleep(0.001)
            far = ModStandIn(door.path, answer={"noted": True} if outcome == "noted" else None)
            await door.until_asking()
            yield FarEnd(Retried(delivery) if outcome == "noted" else delivery, take, None)
            tasks.cancel_scope.cancel()
        far.close()


def socket_pair() -> tuple[int, int]:
    theirs, ours = socket.socketpair()
    return theirs.detach(), ours.detach()


DELIVERIES: dict[str, Callable[[], AbstractAsyncContextManager[FarEnd]]] = {
    "fake": fake,
    "program": hand_over,
    "inbox": inbox,
    "app-server": app_server,
    "inbox, with receipts": lambda: inbox(QwenStandIn),
    "plugin": plugin,
    "hook": hook,
    "mod, prompts": lambda: mod("submitted"),
    "mod, notes": lambda: mod("noted"),
    "channel, pipe": lambda: channel(os.pipe),
    "channel, socketpair": lambda: channel(socket_pair),
}


@pytest.fixture(params=DELIVERIES)
async def far_end(request: pytest.FixtureRequest) -> AsyncIterator[FarEnd]:
    async with DELIVERIES[request.param]() as made:
        yield made


async def deliver_all(far_end: FarEnd, count: int) -> list[str]:
    """Deliver envelopes 1 to `count` as a pump does, while the far end takes. Returns what it took."""
    batch = [envelope(number) for number in range(1, count + 1)]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(far_end.until_took, [str(one.id) for one in batch])
        left = batch
        receipts: list[Receipt] = []
        while left:
            receipt = await far_end.delivery.deliver(left)
            receipts.append(receipt)
            assert 1 <= receipt.count <= len(left)
            left = left[receipt.count :]
    for receipt in receipts:
        await until_taken(receipt)
    return far_end.took


async def until_taken(receipt: Receipt) -> None:
    """Wait: a far end can say it a moment after it has it."""
    with anyio.fail_after(PATIENCE_S):
        while not receipt.taken():
            await anyio.sleep(0.002)


async def test_it_has_a_carrier(far_end: FarEnd) -> None:
    assert far_end.delivery.carrier


async def test_it_is_ready_at_last(far_end: FarEnd) -> None:
    with anyio.fail_after(PATIENCE_S):
        await far_end.delivery.ready()


@pytest.mark.spec("DELIV-1")
async def test_all_arrive_in_order_once(far_end: FarEnd) -> None:
    with anyio.fail_after(PATIENCE_S):
        assert await deliver_all(far_end, 250) == [str(number) for number in range(1, 251)]


@pytest.mark.spec("DELIV-2", "CHAN-3")
async def test_taken_is_said_when_it_was_taken_and_stays_true(far_end: FarEnd) -> None:
    async with anyio.create_task_group() as tasks:
        receipts = []

        async def deliver() -> None:
            receipts.append(await far_end.delivery.deliver([envelope(1)]))

        tasks.start_soon(deliver)
        await anyio.wait_all_tasks_blocked()
        assert not [receipt for receipt in receipts if receipt.taken()]
        await far_end.until_took(["1"])
    (receipt,) = receipts
    await until_taken(receipt)
    if not isinstance(far_end.delivery, _HandOver | ModDelivery):
        later = await far_end.delivery.deliver([envelope(2)])
        await far_end.until_took(["1", "2"])
        await until_taken(later)
    assert receipt.taken()


@pytest.mark.spec("DELIV-3")
async def test_a_far_end_that_takes_nothing_makes_only_the_delivery_wait(far_end: FarEnd) -> None:
    """It waits once the far end can hold no more. When it is cancelled, it lets go at once."""
    if isinstance(far_end.delivery, FakeDelivery | InboxDelivery | PluginDelivery | Retried):
        pytest.skip("holds any number")
    huge = [envelope(number, "x" * 65_536) for number in range(1, 101)]
    with anyio.fail_after(PATIENCE_S):
        async with anyio.create_task_group() as tasks:

            async def deliver() -> None:
                await far_end.delivery.deliver(huge)
                pytest.fail("6 MiB went where nobody takes anything")

            tasks.start_soon(deliver)
            for _ in range(20):  # any amount of other work goes on meanwhile
                await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()


async def test_a_closed_far_end_is_said(far_end: FarEnd) -> None:
    if far_end.close is None:
        pytest.skip("ends with the program that takes")
    far_end.close()
    with anyio.fail_after(PATIENCE_S), pytest.raises(DeliveryClosed):
        await far_end.delivery.deliver([envelope(1, "x" * 65_536)])


async def test_a_far_end_that_closes_while_it_waits_is_said(far_end: FarEnd) -> None:
    if far_end.close is None or isinstance(far_end.delivery, FakeDelivery):
        pytest.skip("never waits for a far end that can close")
    async with anyio.create_task_group() as tasks:
        raised: list[bool] = []

        async def deliver() -> None:
            try:
                while True:
                    await far_end.delivery.deliver([envelope(1, "x" * 65_536)])
            except DeliveryClosed:
                raised.append(True)

        tasks.start_soon(deliver)
        await anyio.wait_all_tasks_blocked()
        assert not raised
        far_end.close()
    assert raised
