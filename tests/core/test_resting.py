"""A loop that looks at something while it waits: when it looks, and that everything else works as in any loop."""

from __future__ import annotations

import time

import anyio
import pytest

from agentbus.core import eventloop
from agentbus.core.resting import RestingLoop

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, object]]:
    return "asyncio", {"loop_factory": RestingLoop}


@pytest.mark.spec("DRAIN-5")
async def test_it_looks_while_it_waits_and_goes_on_when_there_is_something() -> None:
    looks, found = 0, anyio.Event()

    def look() -> bool:
        nonlocal looks
        looks += 1
        if looks == 5:
            found.set()
        return looks == 5

    with eventloop.looking(look, 0.01) as is_looking:
        assert is_looking
        with anyio.fail_after(10):
            await found.wait()
        assert looks == 5
    await anyio.sleep(0.05)
    assert looks == 5, "nor when nobody wants it any longer"


async def test_it_looks_though_others_are_busy_and_keeps_their_time() -> None:
    looks: list[float] = []
    with eventloop.looking(lambda: bool(looks.append(time.monotonic())), 0.01):
        give_up_at = time.monotonic() + 10
        while len(looks) < 3 and time.monotonic() < give_up_at:
            await anyio.lowlevel.checkpoint()
        assert len(looks) >= 3
        began = time.monotonic()
        await anyio.sleep(0.1)
        assert time.monotonic() - began >= 0.099, "a look ended the wait of somebody else"
        looks.clear()
        await anyio.sleep(0.1)
        assert looks
    with anyio.fail_after(10):
        assert await anyio.to_thread.run_sync(lambda: 7) == 7


async def test_it_looks_for_one_at_a_time() -> None:
    with eventloop.looking(lambda: False, 1.0) as first, eventloop.looking(lambda: False, 1.0) as second:
        assert (first, second) == (True, False)
    with eventloop.looking(lambda: False, 1.0) as third:
        assert third


def test_a_loop_of_another_making_does_not_look() -> None:
    async def main() -> bool:
        with eventloop.looking(lambda: False, 1.0) as is_looking:
            return is_looking

    assert anyio.run(main) is False
    assert eventloop.run(main) is True
