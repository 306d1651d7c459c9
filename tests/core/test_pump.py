"""The pump over a real store: races, faults at the ports, order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from agentbus.core.config import prepare_home
from agentbus.core.drain import Pace
from agentbus.core.errors import Busy
from agentbus.core.model import Envelope
from agentbus.core.pump import BATCH, MOST_OUT, Pump
from agentbus.core.store import Store
from tests.support.fakes import FakeDelivery, FakeWakes, arrival

pytestmark = pytest.mark.anyio

# The safety poll is so slow that no test passes because of it.
NO_POLL = Pace(safety_s=600.0, settle_s=(0.001, 0.002), retry_s=(0.001, 0.002))


class Mailbox:
    """A real mailbox of "bob", with faults on demand."""

    def __init__(self, store: Store) -> None:
        self.store = store
        claimed = store.claim(arrival("bob"), now=0, endpoint=str, join_crowd=True)
        assert claimed is not None
        self.peer = claimed[0]
        self.busy_reads = 0
        self.busy_marks = 0
        self.marked: list[int] = []
        self.marks = 0
        self.reads = 0
        self.largest_read = 0

    def send(self, text: str = "hello") -> int:
        return self.store.send("alice", "bob", text, now=0)[0]

    def read(self, limit: int) -> list[Envelope]:
        if self.busy_reads:
            self.busy_reads -= 1
            raise Busy
        self.reads += 1
        self.largest_read = max(self.largest_read, limit)
        return self.store.pending(self.peer.session, self.peer.process.pid, limit)

    def mark(self, ids) -> None:
        if self.busy_marks:
            self.busy_marks -= 1
            raise Busy
        ids = list(ids)
        self.store.mark_delivered(ids, session=self.peer.session, carrier="fake", now=1)
        self.marked += ids
        self.marks += 1

    def pending(self) -> list[int]:
        return [envelope.id for envelope in self.store.pending(self.peer.session, self.peer.process.pid, 10_000)]


@pytest.fixture
def mailbox(home: Path) -> Iterator[Mailbox]:
    store = Store(prepare_home(home), busy_ms=1_000)
    yield Mailbox(store)
    store.close()


class Running:
    def __init__(self, mailbox: Mailbox, delivery: FakeDelivery, pace: Pace = NO_POLL) -> None:
        self.mailbox, self.delivery, self.wakes = mailbox, delivery, FakeWakes()
        self.pump = Pump(read=mailbox.read, mark=mailbox.mark, delivery=delivery, wakes=self.wakes, pace=pace)

    def send(self, text: str = "hello") -> int:
        row_id = self.mailbox.send(text)
        self.wakes.event.set()
        return row_id

    async def until(self, condition) -> None:
        with anyio.fail_after(10):
            while not condition():
                await anyio.sleep(0.001)

    async def until_marked(self, ids: list[int]) -> None:
        await self.until(lambda: self.mailbox.marked == ids)


@pytest.mark.spec("DRAIN-2", "SEND-2")
async def test_everything_arrives_once_and_in_order(mailbox: Mailbox) -> None:
    before = [mailbox.send() for _ in range(3 * BATCH + 7)]
    run = Running(mailbox, FakeDelivery())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.pump.run)
        await run.until(lambda: len(run.delivery.handed) == len(before))
        live = [run.send() for _ in range(20)]
        await run.until_marked(before + live)
        tasks.cancel_scope.cancel()
    assert [envelope.id for envelope in run.delivery.handed] == before + live
    assert mailbox.pending() == []


@pytest.mark.spec("DRAIN-3", "DRAIN-6")
async def test_what_was_taken_is_marked_while_a_delivery_fails(mailbox: Mailbox) -> None:
    run = Running(mailbox, FakeDelivery(most=1, holds=True))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.pump.run)
        first = run.send()
        await run.until(lambda: run.delivery.handed)
        for _ in range(10_000):
            run.delivery.fail_once()
        second = run.send()
        await run.until(lambda: len(run.delivery.failures) < 9_990)
        run.delivery.take()
        await run.until_marked([first])
        assert run.delivery.failures, "it fails all the while"
        tasks.cancel_scope.cancel()
    assert mailbox.pending() == [second]


@pytest.mark.spec("DRAIN-1")
async def test_nothing_is_read_before_the_delivery_is_ready(mailbox: Mailbox) -> None:
    row_id = mailbox.send()
    run = Running(mailbox, FakeDelivery())
    run.delivery.is_ready = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.pump.run)
        await anyio.wait_all_tasks_blocked()
        assert run.delivery.handed == []
        run.delivery.is_ready.set()
        await run.until_marked([row_id])
        tasks.cancel_scope.cancel()


@pytest.mark.spec("DRAIN-3")
async def test_a_reader_that_holds_back_delays_the_mark_and_not_the_next_envelope(mailbox: Mailbox) -> None:
    run = Running(mailbox, FakeDelivery(holds=True))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.pump.run)
        ids = []
        for count in range(1, 6):
            ids.append(run.send())
            await run.until(lambda count=count: len(run.delivery.handed) == count)
        await anyio.sleep(0.02)  # many settle periods, in which nothing is handed over twice or marked
        assert [envelope.id for envelope in run.delivery.handed] == ids
        assert mailbox.marked == []
        assert mailbox.pending() == ids
        run.delivery.take()
        await run.until_marked(ids)
        tasks.cancel_scope.cancel()


@pytest.mark.spec("DRAIN-4", "STATE-3")
async def test_at_the_end_only_what_was_taken_is_marked(mailbox: Mailbox) -> None:
    run = Running(mailbox, FakeDelivery(holds=True), Pace(safety_s=600, settle_s=(600, 600)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.pump.run)
        first = run.send()
        await run.until(lambda: len(run.delivery.handed) == 1)
        run.delivery.take()
        second = run.send()
        await run.until(lambda: len(run.delivery.handed) == 2)
        tasks.cancel_scope.cancel()
    run.pump.settle()
    assert mailbox.marked == [first]
    assert mailbox.pending() == [second]
    again = Running(mailbox, FakeDelivery())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(again.pump.run)
        await again.until_marked([first, second])
        tasks.cancel_scope.cancel()
    assert [envelope.id for envelope in again.delivery.handed] == [second]


@pytest.mark.spec("DRAIN-6")
async def test_a_busy_database_and_a_failing_delivery_cost_time_and_nothing_else(mailbox: Mailbox) -> None:
    ids = [mailbox.send() for _ in range(10)]
    mailbox.busy_reads, mailbox.busy_marks = 3, 3
    run = Running(mailbox, FakeDelivery(most=3))
    run.delivery.fail_once()
    run.delivery.fail_once()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.pump.run)
        await run.until_marked(ids)
        tasks.cancel_scope.cancel()
    assert [envelope.id for envelope in run.delivery.handed] == ids


async def test_a_closed_delivery_ends_the_pump_and_keeps_the_mail(mailbox: Mailbox) -> None:
    row_id = mailbox.send()
    run = Running(mailbox, FakeDelivery())
    run.delivery.close()
    with anyio.fail_after(5):
        await run.pump.run()
    run.pump.settle()
    assert mailbox.pending() == [row_id]


@pytest.mark.spec("DRAIN-5", "WAKE-1")
async def test_a_lost_wake_costs_one_safety_poll(mailbox: Mailbox) -> None:
    run = Running(mailbox, FakeDelivery(), Pace(safety_s=0.01))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.pump.run)
        await anyio.wait_all_tasks_blocked()
        row_id = mailbox.send()  # without a wake
        await run.until_marked([row_id])
        tasks.cancel_scope.cancel()


@pytest.mark.spec("WAKE-1")
async def test_spurious_wakes_deliver_nothing(mailbox: Mailbox) -> None:
    run = Running(mailbox, FakeDelivery())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.pump.run)
        for _ in range(20):
            run.wakes.event.set()
            await anyio.wait_all_tasks_blocked()
        assert run.delivery.handed == []
        tasks.cancel_scope.cancel()


@pytest.mark.spec("DRAIN-7")
async def test_a_stream_is_read_together_marked_together_and_over_when_it_ends(mailbox: Mailbox) -> None:
    run = Running(mailbox, FakeDelivery())
    # The clock is a thousand times too slow, so the sends below are a stream even on the slowest machine.
    run.pump = Pump(
        read=mailbox.read,
        mark=mailbox.mark,
        delivery=run.delivery,
        wakes=run.wakes,
        pace=replace(NO_POLL, mark_s=0.05),
        clock=lambda: anyio.current_time() / 1_000,
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.pump.run)
        ids = []
        for _ in range(20):
            ids.append(run.send())
            await run.until(lambda: len(run.delivery.handed) == len(ids))
        # The messages were handed over one by one, as they came, and from the ninth on after a pause.
        assert mailbox.marks == 0
        reads = mailbox.reads
        for _ in range(50):
            ids.append(run.send())
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
        await run.until(lambda: len(run.delivery.handed) == len(ids))
        assert mailbox.reads - reads < 25, "one after each wake"
        ids += [run.send() for _ in range(BATCH - len(ids))]
        await run.until_marked(ids)
        assert mailbox.marks == 1
        tasks.cancel_scope.cancel()
    assert [envelope.id for envelope in run.delivery.handed] == ids


@pytest.mark.spec("DRAIN-5")
async def test_a_message_costs_one_read_and_one_mark(mailbox: Mailbox) -> None:
    run = Running(mailbox, FakeDelivery(holds=True))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.pump.run)
        await run.until(lambda: mailbox.reads == 1)
        for _ in range(3):
            run.send()
            await run.until(lambda: len(run.delivery.handed) > len(mailbox.marked))
            run.delivery.take()
            await run.until(lambda: len(run.delivery.handed) == len(mailbox.marked))
            await anyio.wait_all_tasks_blocked()
        assert (mailbox.marks, mailbox.reads) == (3, 1 + 3)
        tasks.cancel_scope.cancel()


@pytest.mark.spec("DRAIN-5")
async def test_a_far_end_that_takes_nothing_does_not_stop_the_safety_poll(mailbox: Mailbox) -> None:
    run = Running(mailbox, FakeDelivery(holds=True), Pace(safety_s=0.05, settle_s=(0.001, 0.002)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.pump.run)
        first = run.send()
        await run.until(lambda: len(run.delivery.handed) == 1)
        second = mailbox.send()  # and its wake is lost
        await run.until(lambda: len(run.delivery.handed) == 2)
        assert [envelope.id for envelope in run.delivery.handed] == [first, second]
        assert mailbox.marked == []
        tasks.cancel_scope.cancel()


@pytest.mark.spec("DRAIN-3", "DRAIN-6")
async def test_a_mark_that_has_to_wait_holds_up_no_message(mailbox: Mailbox) -> None:
    run = Running(mailbox, FakeDelivery(), Pace(safety_s=600.0, retry_s=(600.0, 600.0)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.pump.run)
        ids = [run.send()]
        mailbox.busy_marks = 1
        await run.until(lambda: mailbox.busy_marks == 0)
        ids.append(run.send())
        await run.until_marked(ids)
        tasks.cancel_scope.cancel()
    assert [envelope.id for envelope in run.delivery.handed] == ids


async def test_a_delivery_that_takes_one_at_a_time_is_neither_paused_nor_read_a_hundred(mailbox: Mailbox) -> None:
    ids = [mailbox.send() for _ in range(200)]
    run = Running(mailbox, FakeDelivery(most=1), Pace(safety_s=600.0, mark_s=600.0))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.pump.run)
        await run.until(lambda: len(run.delivery.handed) >= 150)
        # No mark, wake or poll can have moved the pump on. It reads the messages that are out and two more.
        assert mailbox.largest_read <= BATCH + 2
        assert run.delivery.handed[0].id == ids[0]
        tasks.cancel_scope.cancel()
    assert [envelope.id for envelope in run.delivery.handed] == ids[: len(run.delivery.handed)]


@pytest.mark.parametrize("seed", range(25))
async def test_sends_at_any_moment_are_delivered_without_a_poll(mailbox: Mailbox, seed: int) -> None:
    """No wake is lost, neither between "queue emptied" and "mailbox read" nor at any other moment."""
    chance = random.Random(seed)
    run = Running(mailbox, FakeDelivery(most=chance.randint(1, 3), holds=chance.random() < 0.5))
    ids: list[int] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run.pump.run)
        for _ in range(40):
            for _ in range(chance.randint(0, 3)):
                ids.append(run.send())
            for _ in range(chance.randint(0, 4)):
                await anyio.lowlevel.checkpoint()
            if chance.random() < 0.3:
                run.delivery.fail_once()
            if chance.random() < 0.3:
                mailbox.busy_marks = mailbox.busy_reads = chance.randint(0, 2)
            run.delivery.take()
        run.delivery.failures.clear()

        def is_done() -> bool:
            run.delivery.take()
            return mailbox.marked == ids

        await run.until(is_done)
        tasks.cancel_scope.cancel()
    assert [envelope.id for envelope in run.delivery.handed] == ids


@pytest.mark.spec("DRAIN-8")
async def test_no_more_than_two_batches_are_ever_out(mailbox: Mailbox) -> None:
    """A crash doubles what is out. Wakes that come while marks have to wait must not let it grow."""
    delivery = FakeDelivery(holds=True)
    most = 0
    running = Running(mailbox, delivery)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(running.pump.run)
        for _ in range(10):
            for _ in range(60):
                mailbox.send()
            running.wakes.event.set()
            await anyio.sleep(0.005)
            most = max(most, len(delivery.handed) - len(mailbox.marked))
        assert most == MOST_OUT
        while len(mailbox.marked) < 600:
            delivery.take()
            running.wakes.event.set()
            await anyio.sleep(0.002)
            assert len(delivery.handed) - len(mailbox.marked) <= MOST_OUT
        tasks.cancel_scope.cancel()
    assert [one.id for one in delivery.handed] == mailbox.marked


@pytest.mark.spec("DRAIN-4")
async def test_what_is_taken_after_the_pump_has_stopped_is_marked_too(mailbox: Mailbox) -> None:
    running = Running(mailbox, FakeDelivery(holds=True))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(running.pump.run)
        row_id = running.send()
        await running.until(lambda: len(running.delivery.handed) == 1)
        tasks.cancel_scope.cancel()
    running.delivery.take()
    assert mailbox.marked == []
    running.pump.settle()
    assert mailbox.marked == [row_id]
