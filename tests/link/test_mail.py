from __future__ import annotations

from collections.abc import Callable

import pytest

from agentbus.core.model import MessageState
from tests.support.machine import Machine, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]  # a loaded machine takes seconds for a server


async def test_a_message_and_its_answer_cross_and_both_are_known_to_be_read(machine: Callable[[str], Machine]) -> None:
    alpha, beta = machine("alpha"), machine("beta")
    async with alpha.linked(), beta.linked():
        await alpha.sees("beta")
        await beta.sees("alpha")
        sent = alpha.send("backend@beta", "which port?", sender="frontend")
        await until(lambda: beta.texts("backend") == ["which port?"])
        asked = beta.bus.store.queries.inbox("backend", 1)[0]
        assert asked.sender == "frontend@alpha"
        beta.send(asked.sender, "8080", sender="backend", reply_to=asked.id)
        await until(lambda: alpha.texts("frontend") == ["8080"])
        answer = alpha.bus.store.queries.inbox("frontend", 1)[0]
        assert (answer.sender, answer.reply_to) == ("backend@beta", sent.id)
        await until(lambda: alpha.bus.store.queries.status(sent.id).state is MessageState.READ)
        print(alpha.bus.store.queries.status(sent.id))
    print(alpha.said, beta.said)
