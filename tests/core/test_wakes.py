"""Wakes for the drain and for tasks beside it: whoever waits for the trigger, nobody misses one."""

from __future__ import annotations

import anyio
import pytest

from agentbus.core.wakes import SharedWakes
from tests.support.fakes import FakeWakes

pytestmark = pytest.mark.anyio


@pytest.mark.spec("WAKE-1")
async def test_a_wake_that_a_task_beside_has_got_is_due_for_the_drain() -> None:
    wakes = FakeWakes()
    shared = SharedWakes(wakes)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(shared.beside, 600)  # while the drain hands something over
            await anyio.wait_all_tasks_blocked()
            wakes.event.set()
        assert await shared.wait(600)
        assert not await shared.wait(0.001), "once"


@pytest.mark.spec("WAKE-1", "ASK-1")
async def test_whoever_waits_for_the_trigger_wakes_the_others() -> None:
    wakes = FakeWakes()
    shared = SharedWakes(wakes)
    woken: list[str] = []

    async def drain() -> None:
        assert await shared.wait(600)
        woken.append("drain")

    async def beside(name: str) -> None:
        await shared.beside(600)
        woken.append(name)

    for first, second in ((drain, beside), (beside, drain)):
        woken.clear()
        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                for one in (first, second):
                    tasks.start_soon(one, *(("beside",) if one is beside else ()))
                    await anyio.wait_all_tasks_blocked()
                tasks.start_soon(beside, "another")
                await anyio.wait_all_tasks_blocked()
                wakes.event.set()
        assert sorted(woken) == ["another", "beside", "drain"]


@pytest.mark.spec("WAKE-1")
async def test_a_waiter_that_is_cancelled_leaves_the_trigger_to_another() -> None:
    wakes = FakeWakes()
    shared = SharedWakes(wakes)
    scope = anyio.CancelScope()

    async def beside() -> None:
        with scope:
            await shared.beside(600)

    async def drain() -> None:
        while not await shared.wait(600):
            pass

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(beside)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(drain)
            await anyio.wait_all_tasks_blocked()
            scope.cancel()
            await anyio.wait_all_tasks_blocked()
            wakes.event.set()
