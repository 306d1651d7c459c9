"""Mail between machines, with a real server and real links."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import pytest

import agentbus
from agentbus.core.model import MessageState
from tests.support.machine import Machine, until

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]  # a loaded machine takes seconds for a server


@pytest.mark.spec("ADDR-3", "ADDR-5", "RCPT-2")
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
    assert (alpha.said, beta.said) == (["connected to 127.0.0.1"], ["connected to 127.0.0.1"])


@pytest.mark.spec("ADDR-3", "ASK-1")
async def test_a_question_is_asked_and_answered_across_machines(machine: Callable[[str], Machine]) -> None:
    alpha, beta = machine("alpha"), machine("beta")
    async with alpha.linked(), beta.linked():
        await alpha.sees("beta")
        await beta.sees("alpha")
        async with (
            agentbus.join("asker", home=alpha.home) as asker,
            agentbus.join("expert", home=beta.home) as expert,
            anyio.create_task_group() as tasks,
        ):
            await until(lambda: "expert@beta" in far(alpha))

            async def answer() -> None:
                question = await expert.receive()
                assert question.answer_by is not None
                await expert.send(question.sender, "8080", reply_to=question.id)

            tasks.start_soon(answer)
            # As the tool does it.
            session = asker._session
            asked = await session.answer(await session.ask("expert@beta", "which port?", 30), 30)
            assert asked.answer is not None
            assert (asked.answer.text, asked.answer.sender) == ("8080", "expert@beta")


def far(of: Machine) -> set[str]:
    """The addresses that a machine knows."""
    return {f"{peer.name}@{one.name}" for one in of.bus.store.machines.all() for peer in one.peers}


@pytest.mark.spec("ADDR-6", "MACH-1")
async def test_a_broadcast_everywhere_reaches_the_peers_of_all_machines(machine: Callable[[str], Machine]) -> None:
    alpha, beta, gamma = machine("alpha"), machine("beta"), machine("gamma")
    async with alpha.linked(), beta.linked(), gamma.linked():
        await alpha.sees("beta", "gamma")
        async with (
            agentbus.join("here", home=alpha.home) as here,
            agentbus.join("b1", home=beta.home) as b1,
            agentbus.join("b2", home=beta.home) as b2,
        ):
            sent = await here.broadcast("hello all", everywhere=True)
            assert [one.recipient for one in sent] == ["*@beta", "*@gamma"]
            with anyio.fail_after(20):
                found = [await b1.receive(), await b2.receive()]
            assert [(one.sender, one.text) for one in found] == [("here@alpha", "hello all")] * 2
            await until(lambda: alpha.count("delivered_at IS NOT NULL") == 2)
            said = [alpha.bus.store.queries.status(one.id).carrier for one in sent]
            assert said == ["2 peers@beta", "0 peers@gamma"]
