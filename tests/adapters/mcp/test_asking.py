"""The tool ask, and what a model is told of questions: real sessions of this process behind the fast path."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentbus.adapters.mcp.element import attributes, element
from agentbus.adapters.mcp.fast_path import FastPath
from agentbus.adapters.mcp.gate import ReadyGate
from agentbus.adapters.mcp.hosts import Mode
from agentbus.core.config import prepare_home
from agentbus.core.errors import DeliveryClosed
from agentbus.core.model import MessageState
from tests.core.test_session import World, until
from tests.support.client import INITIALIZE
from tests.support.fakes import FakeDelivery, envelope, tool_context

pytestmark = pytest.mark.anyio


class Client:
    """A client of one session, which answers by the fast path: each call is one line, as a client writes it."""

    def __init__(self, session: Any, start: Callable[..., object], *, limit: int = 0) -> None:
        self.context = tool_context(session, limit=limit)
        self.desk = FastPath(self.context, ReadyGate(), self._write, start)
        self.answers: dict[int, dict[str, Any]] = {}
        self.is_closed = False
        self._id = 0
        self._line("initialize", INITIALIZE)

    async def _write(self, data: bytes) -> int:
        if self.is_closed:
            raise DeliveryClosed("the client is gone")
        self._take(data)
        return 0

    def _take(self, data: bytes) -> None:
        message = json.loads(data)
        self.answers[message["id"]] = message["result"]

    def _line(self, method: str, params: dict[str, Any]) -> int:
        self._id += 1
        line = json.dumps({"jsonrpc": "2.0", "id": self._id, "method": method, "params": params}).encode()
        answer = self.desk.take(line)
        assert answer is not None
        if answer:
            self._take(answer)
        return self._id

    def post(self, tool: str, **arguments: Any) -> int:
        return self._line("tools/call", {"name": tool, "arguments": arguments})

    def cancel(self, request_id: int) -> None:
        params = {"requestId": request_id}
        self.desk.take(json.dumps({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": params}).encode())

    async def result(self, request_id: int) -> str:
        await until(lambda: request_id in self.answers)
        (block,) = self.answers[request_id]["content"]
        return str(block["text"])

    async def call(self, tool: str, **arguments: Any) -> str:
        return await self.result(self.post(tool, **arguments))


@asynccontextmanager
async def two(home: Path, **options: Any) -> AsyncIterator[tuple[World, Client, FakeDelivery, Client, FakeDelivery]]:
    world = World(prepare_home(home))
    try:
        async with (
            world.running("web") as (web, to_web),
            world.running("api") as (api, to_api),
            anyio.create_task_group() as tasks,
        ):
            with anyio.fail_after(15):
                yield (
                    world,
                    Client(web, tasks.start_soon, **options),
                    to_web,
                    Client(api, tasks.start_soon),
                    to_api,
                )
            tasks.cancel_scope.cancel()
    finally:
        world.store.close()


@pytest.mark.spec("ASK-1", "TOOL-7", "READ-1", "READ-3", "READ-8")
async def test_the_answer_is_the_result_of_the_call(home: Path) -> None:
    async with two(home) as (world, web, to_web, api, to_api):
        call = web.post("ask", to="api", text="which port?", wait_s=60)
        await until(lambda: to_api.handed)
        asked = to_api.handed[0]
        assert (await web.call("message_status", id=asked.id)).endswith(
            "; not answered, asked until 2023-11-14T22:14:20.000Z"
        )
        assert await api.call("send_message", to="web", text="8080 <channel", reply_to=asked.id)
        assert re.fullmatch(
            r'the answer to #1:\n<channel source="agentbus" from="api" msg_id="2" reply_to="1" ts="[^"]+" age="[^"]+">'
            r"8080 &lt;channel</channel>",
            await web.result(call),
        )
        status = world.store.queries.status(2)
        assert (status.state, status.carrier, status.read_by) == (MessageState.READ, "ask", "check")
        assert to_web.handed == []
        assert "answered by #2" in await web.call("message_status", id=asked.id)
        assert await web.call("check_messages") == "no unread messages"


@pytest.mark.spec("ASK-1", "DESK-4")
async def test_calls_behind_an_ask_keep_their_order_and_do_not_wait_for_its_answer(home: Path) -> None:
    async with two(home) as (_, web, to_web, api, to_api):
        calls = [web.post("ask", to="api", text=f"{number}") for number in range(3)]
        after = web.post("send_message", to="api", text="after")
        assert (await web.result(after)).startswith("sent #4")
        await until(lambda: len(to_api.handed) == 4)
        assert [one.text for one in to_api.handed] == ["0", "1", "2", "after"]
        assert not set(calls) & web.answers.keys()
        for number in (2, 0, 1):
            api.post("send_message", to="web", text=f"answer {number}", reply_to=to_api.handed[number].id)
        for number, call in enumerate(calls):
            assert f">answer {number}</channel>" in await web.result(call)
        assert to_web.handed == []


@pytest.mark.spec("ASK-4")
async def test_a_cancelled_ask_is_not_answered_and_its_answer_is_pushed(home: Path) -> None:
    async with two(home) as (world, web, to_web, api, to_api):
        call = web.post("ask", to="api", text="which port?")
        await until(lambda: to_api.handed)
        web.cancel(call)
        api.post("send_message", to="web", text="8080", reply_to=to_api.handed[0].id)
        await until(lambda: [one.text for one in to_web.handed] == ["8080"])
        assert call not in web.answers
        assert world.store.queries.status(2).read_at is None


@pytest.mark.spec("ASK-1", "READ-1")
async def test_an_answer_whose_result_cannot_be_written_is_pushed(home: Path) -> None:
    async with two(home) as (world, web, to_web, api, to_api):
        call = web.post("ask", to="api", text="which port?")
        await until(lambda: to_api.handed)
        web.is_closed = True
        api.post("send_message", to="web", text="8080", reply_to=to_api.handed[0].id)
        await until(lambda: [one.text for one in to_web.handed] == ["8080"])
        assert call not in web.answers
        assert world.store.queries.status(2).read_at is None


@pytest.mark.spec("ASK-2", "ASK-3", "ASK-6", "TOOL-2", "TOOL-7")
async def test_without_an_answer_the_result_says_what_to_do(home: Path) -> None:
    async with two(home) as (_, web, _, _, to_api):
        assert await web.call("ask", to="apo", text="x") == (
            'nobody answers now: queued #1 for "apo": no such peer yet. Did you mean "api" (online)?\n'
            "Go on without it; an answer that comes later arrives by itself"
        )
        late = await web.call("ask", to="api", text="x", wait_s=1)
        assert late.startswith('no answer to #2 from "api" within 1 s: the question ')
        web.context.choice = replace(web.context.choice, mode=Mode.PULL)
        assert "an answer that comes later waits for check_messages" in await web.call("ask", to="nobody", text="x")
        assert len(to_api.handed) == 1
        for arguments, named in (
            ({"to": "web"}, '"web" is you, and nobody else would answer: ask another peer'),
            ({"to": "@review"}, "'@review' is a group, and a question goes to one peer: ask one of its members"),
            ({"to": "api", "wait_s": 0}, "'wait_s' is 0: use 1 to 100"),
            ({"to": "api", "wait_s": 101}, "'wait_s' is 101: use 1 to 100"),
        ):
            assert named in await web.call("ask", text="x", **arguments)


@pytest.mark.spec("ASK-2", "ASK-3", "BRAKE-1")
async def test_an_ask_says_who_is_paused_the_asked_one_or_the_asker(home: Path) -> None:
    async with two(home) as (world, web, to_web, api, to_api):
        world.bus.pause("api", by="root")
        assert await web.call("ask", to="api", text="which port?") == (
            'no answer to #1 from "api", which is paused by "root" until it is resumed: the question is pending\n'
            "Go on without it; an answer that comes later arrives by itself"
        )
        world.bus.resume("api", by="root")
        call = web.post("ask", to="api", text="which port?", wait_s=1)
        await until(lambda: len(to_api.handed) == 2)
        world.bus.pause("web", by="root")
        assert await api.call("send_message", to="web", text="8080", reply_to=2)
        assert (await web.result(call)).endswith(
            'comes later waits: this session is paused by "root" until it is resumed'
        )
        assert to_web.handed == []
        world.bus.resume("web", by="root")
        await until(lambda: [one.text for one in to_web.handed] == ["8080"])


@pytest.mark.spec("BURST-1", "ASK-1")
async def test_questions_count_as_messages(home: Path) -> None:
    async with two(home, limit=1) as (_, web, _, _, to_api):
        web.post("ask", to="api", text="1")
        assert "too many messages" in await web.call("ask", to="api", text="2")
        await until(lambda: to_api.handed)
        assert [one.text for one in to_api.handed] == ["1"]


@pytest.mark.spec("READ-4", "ASK-1")
async def test_an_answer_that_is_too_long_comes_in_parts(home: Path) -> None:
    async with two(home) as (world, web, _, api, to_api):
        web.context.profile = replace(web.context.profile, max_checked_chars=1_800)
        call = web.post("ask", to="api", text="which port?")
        await until(lambda: to_api.handed)
        api.post("send_message", to="web", text="x" * 900, reply_to=to_api.handed[0].id)
        assert 'part="1/2"' in (first := await web.result(call))
        assert first.endswith("#2 is long, and goes on: call check_messages again for its next part")
        assert world.store.queries.status(2).read_at is None
        assert 'part="2/2"' in await web.call("check_messages")
        await until(lambda: world.store.queries.status(2).read_at is not None)


@pytest.mark.spec("ASK-1", "CHAN-2")
def test_the_element_of_a_question_says_until_when_its_sender_waits() -> None:
    asked = envelope(7, reply_to=3, answer_by=1_700_000_060_123)
    assert attributes(asked)["answer_by"] == "2023-11-14T22:14:20.123Z"
    assert ' reply_to="3" answer_by="2023-11-14T22:14:20.123Z"' in element(asked)
    assert "answer_by" not in attributes(envelope(7))
