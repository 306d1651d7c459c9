"""The connection to our plugin, against a stand-in for the plugin: late, never, gone, and back again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from agentbus.adapters.mcp.gate import ReadyGate
from agentbus.adapters.mcp.inbox import Address
from agentbus.adapters.opencode import door as door_module
from agentbus.adapters.opencode.door import Door, PluginDelivery, Requests, leftovers
from agentbus.core.errors import DeliveryFailed
from agentbus.core.process import Process, current
from tests.support.door_stand_in import TOKEN, DoorStandIn
from tests.support.fakes import envelope

pytestmark = pytest.mark.anyio


@pytest.fixture
def far() -> Iterator[DoorStandIn]:
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder:
        made = DoorStandIn(Path(folder, "door", "1.sock"), gives=False)
        yield made
        made.close()


doors: list[Door] = []


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(door_module, "_AGAIN_S", 0.001)
    yield
    while doors:
        doors.pop().close()


def opened(far: DoorStandIn, token: str = TOKEN) -> Door:
    door = Door(Address(far.path, token), current())
    doors.append(door)
    door.open()
    return door


def delivery_of(door: Door, said: list[str] | None = None) -> PluginDelivery:
    async def report(trouble: str) -> None:
        if said is not None:
            said.append(trouble)

    return PluginDelivery(door, ReadyGate(), report)


async def come(far: DoorStandIn, count: int) -> None:
    with anyio.fail_after(10):
        while len(far.posts) < count:
            await anyio.sleep(0.001)


@pytest.mark.spec("PLUG-2")
def test_a_wrong_token_or_another_process_gets_nothing(far: DoorStandIn) -> None:
    with pytest.raises(DeliveryFailed, match="closed its socket"):
        opened(far, "wrong")
    assert far.connections == 0
    other = Door(Address(far.path, TOKEN), Process(current().pid + 1, "0"))
    with pytest.raises(DeliveryFailed, match="belongs to process"):
        other.open()


def test_what_it_says_first_is_known_after_the_opening(far: DoorStandIn) -> None:
    far.state(session="ses_7", held="an undo is open")
    door = opened(far)
    assert (door.session, door.held) == ("ses_7", "an undo is open")


@pytest.mark.spec("PLUG-3", "DELIV-2")
async def test_taken_and_read_are_said_when_the_model_has_it_and_not_before(far: DoorStandIn) -> None:
    door = opened(far)
    record = Requests(door)
    receipt = await delivery_of(door).deliver([envelope(1), envelope(2)])
    await come(far, 1)
    assert not receipt.taken()
    assert record.look(record.place(), 0) == (set(), 0)
    far.give()
    with anyio.fail_after(10):
        while not receipt.taken():
            await anyio.sleep(0.001)
    at = envelope(1).sent_at
    assert record.look(record.place(), 0) == ({(1, at), (2, at)}, 1)
    assert record.look(record.place(), 1) == (set(), 1)
    assert record.look("another's", 0) == (set(), 0)


@pytest.mark.spec("PLUG-3")
async def test_a_connection_that_was_lost_is_made_again_and_nothing_is_posted_twice(far: DoorStandIn) -> None:
    door = opened(far)
    delivery = delivery_of(door)
    first, second = await delivery.deliver([envelope(1)]), await delivery.deliver([envelope(2)])
    await come(far, 2)
    far.given.add(next(iter(far.posts)))  # and the line that says so is lost
    far.hang_up()
    with anyio.fail_after(10):
        while not first.taken():
            await anyio.sleep(0.001)
    assert not second.taken()
    assert len(far.posts) == 2
    assert far.connections == 2


async def test_a_plugin_that_is_gone_for_long_is_said_and_used_again(
    far: DoorStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentbus.adapters.mcp.inbox._TROUBLE_S", 0.0)
    said: list[str] = []
    door = opened(far)
    delivery = delivery_of(door, said)
    far.close()
    with anyio.fail_after(10):
        while not said:
            with pytest.raises(DeliveryFailed):
                await delivery.deliver([envelope(1)])
            await anyio.sleep(0.001)
    assert delivery.trouble
    far.come_back()
    with anyio.fail_after(10):
        while delivery.trouble:
            try:
                await delivery.deliver([envelope(1)])
            except DeliveryFailed:
                await anyio.sleep(0.001)
    assert said[-1] == ""
    await come(far, 1)


async def test_a_line_that_is_no_line_of_ours_ends_the_connection(far: DoorStandIn) -> None:
    door = opened(far)
    far.tell({"state": 5})
    with anyio.fail_after(10):
        while far.connections < 2:
            door.poll()
            await anyio.sleep(0.001)


@pytest.mark.spec("UNINST-2")
def test_only_its_sockets_are_its_own(tmp_path: Path) -> None:
    for name in ("12-0a1b2c.sock", "notes.txt", "12-0a1b2c.sock.txt"):
        (tmp_path / name).touch()
    assert leftovers(tmp_path) == ["12-0a1b2c.sock"]
    assert leftovers(tmp_path / "none") == []
