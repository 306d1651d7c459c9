"""The contract of a relay, over the fake and over each nats-server that is there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import pytest

from agentbus.core.errors import RelayDown
from agentbus.core.ports import Line, Parcel, Relay
from agentbus.link import admin, settings
from agentbus.link.nats import NatsRelay
from tests.support.fake_relay import FakeRelay, Hub
from tests.support.machine import WINDOW_S
from tests.support.nats import binaries, binary, server

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]  # a loaded machine takes seconds for a server


@pytest.fixture(scope="module", params=["fake", *(binaries() or ["none"])])
def world(request: pytest.FixtureRequest) -> Iterator[tuple[Callable[[str], Relay], Callable[[], None]]]:
    """What makes the relay of a machine, and what cuts all lines."""
    if request.param == "fake":
        hub = Hub()
        yield lambda name: FakeRelay(hub, name), hub.cut
        return
    root = Path(tempfile.mkdtemp(prefix="abc-", dir="/tmp"))
    with server(root / "team", binary(None if request.param == "none" else request.param)) as nats:

        def relay(name: str) -> Relay:
            home = root / name
            if not home.exists():
                home.mkdir(mode=0o700)
                admin.join(home, nats.invite(name))
            return NatsRelay(settings.load(home), window_s=WINDOW_S)

        def cut() -> None:
            nats.kill()
            nats.start()

        yield relay, cut
    shutil.rmtree(root)


@pytest.fixture
async def lines(world: tuple[Callable[[str], Relay], Callable[[], None]]) -> AsyncIterator[tuple[Line, Line]]:
    """Two machines, of which nothing is stored."""
    make, _ = world
    async with AsyncExitStack() as stack:
        alpha = await stack.enter_async_context(make("alpha").connect())
        beta = await stack.enter_async_context(make("beta").connect())
        for line in (alpha, beta):
            while line.waiting:
                await line.ack(await line.take())
        yield alpha, beta


def parcels(count: int, prefix: str = "") -> list[Parcel]:
    return [Parcel("beta", "m", "bäck.end", f"{prefix}{number}".encode()) for number in range(count)]


async def take(line: Line, count: int) -> list[Parcel]:
    found: list[Parcel] = []
    with anyio.fail_after(10):
        while len(found) < count:
            found += await line.take()
    return found


@pytest.mark.spec("RELAY-1", "RELAY-2")
async def test_parcels_arrive_in_order_each_once_from_whom_they_are(lines: tuple[Line, Line]) -> None:
    alpha, beta = lines
    sent = parcels(300)
    for start in range(0, 300, 100):
        stored = await alpha.publish(sent[start : start + 100])
        assert (stored.count, stored.trouble) == (100, "")
    found = await take(beta, 300)
    assert [one.body for one in found] == [one.body for one in sent]
    assert {(one.machine, one.kind, one.name) for one in found} == {("alpha", "m", "bäck.end")}
    await beta.ack(found)
    with anyio.move_on_after(0.2):
        assert await beta.take() == []
    assert beta.waiting == 0


@pytest.mark.spec("RELAY-2")
async def test_a_new_line_begins_with_the_oldest_that_was_not_acknowledged(
    world: tuple[Callable[[str], Relay], Callable[[], None]], lines: tuple[Line, Line]
) -> None:
    make, _ = world
    async with make("gamma").connect() as gamma:
        while gamma.waiting:
            await gamma.ack(await gamma.take())
        await lines[0].publish([Parcel("gamma", "m", "x", f"{number}".encode()) for number in range(10)])
        found = await take(gamma, 10)
        await gamma.ack(found[:4])
    await lines[0].publish([Parcel("gamma", "m", "x", b"10")])
    async with make("gamma").connect() as gamma:
        again = await take(gamma, 7)
        assert [one.body for one in again] == [f"{number}".encode() for number in range(4, 11)]
        await gamma.ack(again)


@pytest.mark.spec("RELAY-1")
async def test_a_copy_that_is_sent_soon_is_stored_once_and_counts_as_stored(lines: tuple[Line, Line]) -> None:
    alpha, beta = lines
    one = Parcel("beta", "r", "", b"once", key="k1")
    first = await alpha.publish([one])
    second = await alpha.publish([one, Parcel("beta", "r", "", b"other", key="k2")])
    assert (first.count, second.count) == (1, 2)
    assert second.sequence > first.sequence
    found = await take(beta, 2)
    assert [one.body for one in found] == [b"once", b"other"]
    await beta.ack(found)


@pytest.mark.spec("RELAY-3")
async def test_what_is_announced_reaches_the_others_with_its_machine(lines: tuple[Line, Line]) -> None:
    alpha, beta = lines
    await alpha.announce(b"here I am")
    await alpha.ask()
    with anyio.fail_after(5):
        assert [await beta.hear(), await beta.hear()] == [("alpha", b"here I am"), ("", b"")]


@pytest.mark.spec("RELAY-4")
async def test_a_line_that_is_lost_raises_in_every_call(
    world: tuple[Callable[[str], Relay], Callable[[], None]],
) -> None:
    make, cut = world
    async with make("gamma").connect() as line:
        caught: list[RelayDown] = []

        async def wait_in(call: Callable[[], object]) -> None:
            try:
                await call()  # type: ignore[misc]
            except RelayDown as error:
                caught.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait_in, line.take)
            tasks.start_soon(wait_in, line.hear)
            await anyio.sleep(0.05)
            cut()
        assert len(caught) == 2
        for call in (
            lambda: line.publish(parcels(1)),
            lambda: line.ack([]),
            lambda: line.announce(b"x"),
            line.ask,
            line.take,
            line.hear,
        ):
            with anyio.fail_after(5), pytest.raises(RelayDown):
                await call()
