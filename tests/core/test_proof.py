"""The search for proof: how often it looks. What it finds is tested with the records of the clients."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest

from agentbus.core.model import Envelope
from agentbus.core.proof import Proofs


class Nothing:
    """A record at `at` that shows nothing; `looks` counts how often it was asked for."""

    def __init__(self, at: str) -> None:
        self.at = at
        self.looks = 0
        self.looked = anyio.Event()

    def place(self) -> str:
        self.looks += 1
        if self.looks >= 10:
            self.looked.set()
        return self.at

    def end(self, _place: str) -> int:
        return 0

    def look(self, _place: str, offset: int) -> tuple[set[tuple[int, str]], int]:
        return set(), offset


async def ignore(_what: Sequence[object]) -> None:
    pass


@pytest.mark.anyio
@pytest.mark.spec("PROOF-3")
async def test_a_record_that_does_not_exist_is_looked_for_less_often_than_one_is_read() -> None:
    there, nowhere = Nothing("here"), Nothing("")
    async with anyio.create_task_group() as tasks:
        for record in (there, nowhere):
            proofs = Proofs(record, mark=ignore, note=ignore)
            proofs.begin((), ())
            tasks.start_soon(proofs.run)
            proofs.expect([Envelope(1, "web", "ci", "hi", 0)])
        await there.looked.wait()
        assert nowhere.looks <= 5
        nowhere.at = "here after all"
        await nowhere.looked.wait()
        tasks.cancel_scope.cancel()
