"""What proves that a message was read: its id in a line of the record that is no older than the message."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest

from agentbus.core.ports import Shown
from agentbus.core.proof import Proofs
from tests.support.fakes import envelope

pytestmark = pytest.mark.anyio


class RecordOf:
    """A record that shows these, all at once."""

    def __init__(self, *shown: Shown) -> None:
        self.shown = set(shown)

    def place(self) -> str:
        return "here"

    def end(self, _place: str) -> int:
        return 0

    def look(self, _place: str, offset: int) -> tuple[set[Shown], int]:
        return (self.shown, 1) if offset == 0 else (set(), 1)


@pytest.mark.spec("PROOF-2")
async def test_a_line_that_is_older_than_the_message_is_about_another_one() -> None:
    marked: list[int] = []

    async def mark(ids: Sequence[int]) -> None:
        marked.extend(ids)

    async def note(_places: Sequence[str]) -> None: ...

    sent_at = envelope(1).sent_at
    proofs = Proofs(RecordOf((1, sent_at - 1), (2, sent_at), (3, 0), (4, sent_at + 9)), mark=mark, note=note)
    proofs.expect([envelope(number) for number in (1, 2, 3)])
    proofs.begin((), [(4, sent_at)])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(proofs.run)
        with anyio.fail_after(10):
            while len(marked) < 2:
                await anyio.sleep(0.001)
        tasks.cancel_scope.cancel()
    assert sorted(marked) == [2, 4]
    assert not proofs.is_idle


class NoRecord(RecordOf):
    """A record that is not there while `at` is empty, and then shows nothing. Counts how often it was asked for."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at
        self.looks = 0
        self.looked = anyio.Event()

    def place(self) -> str:
        self.looks += 1
        if self.looks >= 10:
            self.looked.set()
        return self.at


@pytest.mark.spec("PROOF-3")
async def test_a_record_that_does_not_exist_is_looked_for_less_often_than_one_is_read() -> None:
    async def ignore(_what: Sequence[object]) -> None: ...

    there, nowhere = NoRecord("here"), NoRecord("")
    async with anyio.create_task_group() as tasks:
        for record in (there, nowhere):
            proofs = Proofs(record, mark=ignore, note=ignore)
            proofs.begin((), ())
            tasks.start_soon(proofs.run)
            proofs.expect([envelope(1)])
        await there.looked.wait()
        assert nowhere.looks <= 5
        nowhere.at = "here after all"
        await nowhere.looked.wait()
        tasks.cancel_scope.cancel()
