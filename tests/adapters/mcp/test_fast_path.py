"""The fast path answers like the SDK, before the SDK is loaded, and then hands over without a gap."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from agentbus.adapters.mcp import jsonrpc, tools
from agentbus.adapters.mcp.fast_path import FastPath
from agentbus.adapters.mcp.gate import ReadyGate
from agentbus.adapters.mcp.profile import Profile
from agentbus.adapters.mcp.sdk import _Settling, serve_mcp
from agentbus.adapters.mcp.toolkit import ToolContext, ToolResult
from agentbus.adapters.mcp.transport import Stdio
from agentbus.adapters.mcp_generic import server as generic_server
from agentbus.core.errors import Busy, DeliveryClosed
from tests.support.client import INITIALIZE, RawClient
from tests.support.command import agentbus, until
from tests.support.fakes import tool_context

pytestmark = pytest.mark.timeout(90)  # a loaded machine takes seconds for one process

RECORDED = Path(__file__).with_name("recorded")
VERSIONS = [*jsonrpc.HANDSHAKE_VERSIONS, "1999-01-01", "2026-07-28", ""]


def line(method: str, params: dict[str, Any] | None = None, **more: Any) -> bytes:
    message: dict[str, Any] = {"jsonrpc": "2.0", "method": method, **more}
    if params is not None:
        message["params"] = params
    return json.dumps(message).encode()


def conversation(version: str) -> list[bytes]:
    """The requests that the fast path answers alone, in the order of Claude Code."""
    return [
        line("server/discover", {}, id="server-discover-probe-1"),
        line("ping", id=0),
        line("initialize", {**INITIALIZE, "protocolVersion": version}, id=1),
        line("ping", {}, id="ping-2"),
        line("notifications/initialized"),
        line("tools/list", id=2),
        line("tools/list", {"_meta": {"progressToken": 7}}, id="three"),
    ]


def start_nothing(*_call: object) -> None:
    raise AssertionError("nothing is to be started here")


def front_desk(context: ToolContext | None = None, start: Callable[..., None] = start_nothing) -> FastPath:
    """A fast path in no event loop: it answers at once, or starts a task that never runs."""

    async def write(_data: bytes) -> int:
        raise AssertionError("nothing runs as a task here")

    return FastPath(context or tool_context(), ReadyGate(), write, start)


class Speaker:
    """A client of the SDK's server, on a socket pair, with no process between."""

    def __init__(self, far: socket.socket) -> None:
        self._far = far

    async def ask(self, request: bytes) -> Any:
        await anyio.wait_writable(self._far)
        self._far.sendall(request + b"\n")
        if b'"id"' not in request:
            return None
        received = b""
        while not received.endswith(b"\n"):
            await anyio.wait_readable(self._far)
            received += self._far.recv(1_048_576)
        return json.loads(received)


@pytest.mark.anyio
@pytest.mark.spec("DESK-1", "MCP-2")
@pytest.mark.parametrize("version", VERSIONS)
async def test_desk_and_sdk_answer_alike(version: str) -> None:
    context = tool_context()
    desk = front_desk(context)
    ours, far = socket.socketpair()
    with ours, far:
        stdio = Stdio(ours.fileno(), os.dup(ours.fileno()), jsonrpc.refusal)
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(stdio.run)
                # This fast path was asked nothing, so it has nothing to hand over: the SDK answers all requests.
                tasks.start_soon(serve_mcp, context, stdio, ReadyGate(), front_desk(context))
                speaker = Speaker(far)
                for request in conversation(version):
                    answer = desk.take(request)
                    assert answer is not None
                    assert await speaker.ask(request) == (json.loads(answer) if answer else None), request
                tasks.cancel_scope.cancel()


@pytest.mark.spec("DESK-1")
@pytest.mark.parametrize(
    "request_line",
    [
        line("tools/call", {"name": "whoami", "arguments": {}, "somethingNew": 1}, id=5),
        line("tools/call", {"name": 7, "arguments": {}}, id=5),
        line("tools/call", {"name": "whoami", "arguments": []}, id=5),
        line("tools/call", {"name": "whoami", "_meta": 7}, id=5),
        line("tools/call", {"name": "whoami", "_meta": {"progressToken": 1.5}}, id=5),
        line("tools/call", id=5),
        line("ping", {"_meta": {"progressToken": True}}, id=5),
        line("tools/list", {"cursor": "next"}, id=5),
        line("tools/list", [], id=5),
        line("tools/list", id=True),
        line("ping", id=None),
        line("ping", id=1.5),
        line("initialize", INITIALIZE, id=5),
        line("resources/list", id=5),
        b'{"jsonrpc": "1.0", "id": 5, "method": "ping"}',
        b'{"id": 5, "method": "ping"}',
        b'{"jsonrpc": "2.0", "id": 5, "result": {}}',
        b'{"jsonrpc": "2.0", "id": 5, "method": "ping", "params": {"x": "\\ud800"}}',
        b"[]",
        b"no json",
        b"\xff",
    ],
)
def test_what_is_not_the_desks_to_answer_is_left_to_the_sdk(request_line: bytes) -> None:
    desk = front_desk()
    for one in conversation("2025-11-25"):
        assert desk.take(one) is not None
    handshake = list(desk.hand_over())
    assert desk.take(request_line) is None
    # It could be meant for what the SDK has now.
    assert desk.take(line("notifications/cancelled", {"requestId": 5})) is None
    assert desk.hand_over() == handshake


@pytest.mark.spec("DESK-1")
def test_a_notification_about_nothing_wakes_nobody() -> None:
    desk = front_desk()
    for one in conversation("2025-11-25"):
        desk.take(one)
    for method in ("notifications/cancelled", "notifications/progress", "notifications/roots/list_changed", "custom"):
        assert desk.take(line(method, {"requestId": 5})) == b""


@pytest.mark.spec("DESK-1")
@pytest.mark.parametrize("missing", ["protocolVersion", "capabilities", "clientInfo"])
def test_an_incomplete_handshake_is_left_to_the_sdk(missing: str) -> None:
    desk = front_desk()
    params = {key: value for key, value in INITIALIZE.items() if key != missing}
    assert desk.take(line("initialize", params, id=1)) is None
    assert desk.take(line("notifications/initialized")) is None
    assert desk.take(line("tools/list", id=2)) is None
    assert desk.hand_over() == []
    assert desk.take(line("initialize", {**INITIALIZE, "clientInfo": {"name": "x"}}, id=3)) is None


@pytest.fixture
def slow_sdk(home: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder for PYTHONPATH that makes the import of the SDK wait until it is let go."""
    folder = home.parent / "slow"
    folder.mkdir()
    gate = folder / "gate"
    gate.touch()
    folder.joinpath("sitecustomize.py").write_text(
        # The wait is in the loader and not in the finder, because the finder holds the lock of all imports.
        "import os, sys, time\n"
        "from importlib.machinery import PathFinder, SourceFileLoader\n"
        "class Slow(SourceFileLoader):\n"
        "    def exec_module(self, module):\n"
        f"        while os.path.exists({str(gate)!r}):\n"
        "            time.sleep(0.01)\n"
        "        super().exec_module(module)\n"
        "class Finder(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        if name == 'mcp':\n"
        "            spec = super().find_spec(name, path, target)\n"
        "            spec.loader = Slow(spec.loader.name, spec.loader.path)\n"
        "            return spec\n"
        "sys.meta_path.insert(0, Finder)\n"
    )

    def let_go() -> None:
        gate.unlink(missing_ok=True)

    yield folder, let_go
    let_go()


@pytest.mark.spec("DESK-1", "DESK-2", "DESK-3", "LIFE-3")
def test_the_handshake_and_the_mail_do_not_wait_for_the_sdk(
    home: Path, start: Callable[..., RawClient], slow_sdk: tuple[Path, Callable[[], None]]
) -> None:
    folder, let_go = slow_sdk
    client = start("bob", PYTHONPATH=str(folder))
    client.handshake(discover=True)
    assert client.request("ping")["result"] == {}
    assert '"bob" (online)' in agentbus(home, "send", "--from", "alice", "bob", "early").stdout
    assert [event["content"] for event in client.wait_events(1)] == ["early"]
    assert client.call("send_message", to="bob", text="first") == 'sent #2 to "bob" (online)'
    # A call that the fast path cannot answer waits, in order. Later ones that it could answer wait too.
    params = {"name": "set_name", "arguments": {"name": "robert"}, "somethingNew": 1}
    first = client.post("tools/call", params)
    second = client.post_call("send_message", to="robert", text="second")
    assert client.request("ping")["result"] == {}
    answered = [message.get("id") for _, message in client.arrived]
    assert not {first, second} & set(answered)
    let_go()
    assert client.result(first)[0].startswith('you are "robert" now')
    assert client.result(second) == ('sent #3 to "robert" (online)', False)
    assert client.texts()[:1] == ["early"]
    client.wait_events(3)
    assert client.texts() == ["early", "first", "second"]
    assert client.events[2][1]["meta"]["from"] == "robert"
    assert client.request("tools/list")["result"]["tools"]
    ids = [message["id"] for _, message in client.arrived if "id" in message]
    assert len(ids) == len(set(ids)), "a request was answered twice"
    assert client.stderr == "agentbus: the MCP SDK is imported now, for a request that needs it: 'tools/call'\n"


@pytest.mark.spec("LIFE-1", "LIFE-2")
@pytest.mark.parametrize("end", ["stdin", "SIGINT", "SIGTERM"])
def test_a_session_ends_while_the_sdk_is_being_imported(
    home: Path, start: Callable[..., RawClient], slow_sdk: tuple[Path, Callable[[], None]], end: str
) -> None:
    folder, _let_go = slow_sdk
    client = start("bob", PYTHONPATH=str(folder))
    client.handshake()
    client.post("resources/list")
    until(lambda: "the MCP SDK is imported now" in client.stderr)  # another thread reads stderr
    if end == "stdin":
        client.close_stdin()
    else:
        client.process.send_signal(signal.Signals[end])
    assert client.process.wait(40) == 0
    assert list((home / "sock").iterdir()) == []
    assert agentbus(home, "peers").stdout == "nobody is online\n"


@pytest.mark.spec("DESK-5")
def test_a_session_goes_on_without_an_sdk_that_cannot_be_imported(home: Path, start: Callable[..., RawClient]) -> None:
    broken = home.parent / "broken"
    broken.mkdir()
    broken.joinpath("mcp.py").write_text("raise ImportError('half of it is gone')")
    client = start("bob", PYTHONPATH=str(broken))
    client.handshake()
    params = {"name": "send_message", "arguments": {"to": "bob", "text": "x"}, "somethingNew": 1}
    for refused in (client.request("resources/list"), client.request("tools/call", params)):
        assert refused["error"]["code"] == -32603
        assert "ImportError: half of it is gone" in refused["error"]["message"]
    client.send_line(b"no json")
    client.notify("notifications/unknown")
    assert client.call("send_message", to="bob", text="on") == 'sent #1 to "bob" (online)'
    assert client.answer(None)["error"]["code"] == -32603
    assert client.stderr.count("\n") == 2


@pytest.mark.spec("DESK-2")
def test_everything_at_once_before_the_server_is_up_is_answered_once_and_in_order(
    start: Callable[..., RawClient],
) -> None:
    client = start("bob")
    requests = [client.post("tools/list"), client.post("initialize", INITIALIZE)]
    client.notify("notifications/initialized")
    calls = [client.post_call("send_message", to="later", text=str(number)) for number in range(20)]
    assert "result" in client.answer(requests[1])
    client.answer(requests[0])
    answers = [client.result(call)[0] for call in calls]
    assert [answer.split()[1] for answer in answers] == [f"#{number}" for number in range(1, 21)]
    ids = [message["id"] for _, message in client.arrived if "id" in message]
    assert len(ids) == len(set(ids))


@pytest.mark.spec("DESK-2")
def test_a_handshake_that_only_the_sdk_sees_through_is_said(start: Callable[..., RawClient]) -> None:
    client = start("bob")
    client.request("initialize", {**INITIALIZE, "capabilities": {"roots": 5}})
    assert "result" in client.request("tools/call", {"name": "whoami", "arguments": {}})
    assert "error" in client.request("tools/call", {"name": "whoami", "arguments": {}, "somethingNew": 1})
    until(lambda: "the handshake was refused late" in client.stderr)  # another thread reads stderr


CALLS: list[tuple[str, dict[str, Any]]] = [
    ("send_message", {"to": "bob", "text": "hi"}),
    ("send_message", {"to": "Nobody There", "text": "ü"}),
    ("send_message", {"to": "bob", "text": "hi", "reply_to": 1.0}),
    ("send_message", {"to": "bob", "text": "hi", "reply_to": 0}),
    ("send_message", {"to": "bob", "text": "hi", "reply_to": float("nan")}),
    ("send_message", {"to": "bob", "text": "hi", "reply_to": float("inf")}),
    ("send_message", {"to": "bob", "text": "hi", "reply_to": 1.5}),
    ("send_message", {"to": "bob", "text": "hi", "reply_to": 10**30}),
    ("send_message", {"to": "bob", "text": ""}),
    ("send_message", {"to": "", "text": "hi"}),
    ("send_message", {"to": "bob"}),
    ("send_message", {"to": "bob", "text": "hi", "urgent": True}),
    ("send_message", {"to": 7, "text": "hi"}),
    ("send_message", {"to": "bob", "text": "x" * 70_000}),
    ("send_message", {"to": "bob", "text": "a\0b"}),
    ("broadcast", {"text": "hi"}),
    ("broadcast", {}),
    ("list_peers", {}),
    ("list_peers", None),
    ("list_peers", {"of": "all"}),
    ("whoami", {}),
    ("set_name", {"name": "bobby"}),
    ("set_name", {"name": "eve"}),
    ("set_name", {"name": "no name"}),
    ("set_name", {}),
    ("set_name", {"name": "bobby", "status": "x" * 121}),
    ("set_status", {"text": "testing"}),
    ("set_status", {"text": "two\nlines"}),
    ("set_status", {}),
    ("check_messages", {}),
    ("check_messages", {"wait_s": 100}),
    ("check_messages", {"wait_s": 101}),
    ("check_messages", {"wait_s": None}),
    ("message_status", {"id": 1}),
    ("message_status", {"id": "#1"}),
    ("message_status", {"id": 10**9}),
    ("message_status", {}),
    ("no_such_tool", {}),
    ("", {}),
]


@pytest.mark.spec("DESK-1", "DESK-4", "TOOL-2")
@pytest.mark.parametrize("version", jsonrpc.HANDSHAKE_VERSIONS)
@pytest.mark.parametrize("way", ["channel", "pull"])
def test_a_call_is_answered_alike_by_desk_and_sdk(start: Callable[..., RawClient], way: str, version: str) -> None:
    bob, eve = start("bob", AGENTBUS_DELIVERY=way), start("eve")
    bob.request("initialize", {**INITIALIZE, "protocolVersion": version})
    bob.notify("notifications/initialized")
    bob.request("tools/list")
    eve.handshake()

    def answer(tool: str, arguments: dict[str, Any] | None, **more: Any) -> Any:
        bob.call("set_name", name="bob")
        if tool == "check_messages":
            bob.call("check_messages")
            eve.call("send_message", to="bob", text="a question")
        params = {"name": tool, "arguments": arguments, "_meta": {"progressToken": 3}, **more}
        text = json.dumps(bob.request("tools/call", params)["result"], sort_keys=True)
        for pattern in (r"\d[\d,]* unread messages?", r"#\d+", r'msg_id=."\d+', r"20\d\d-\S+Z", r"\(pushed [^)]*\)"):
            text = re.sub(pattern, "N", text)
        # The one before is marked as read after its answer has been written, so it can still be counted.
        return text.replace("\\n1 more: call check_messages again", "")

    for tool, arguments in CALLS:
        mine = answer(tool, arguments)
        # An argument that the fast path does not know is left to the SDK, which ignores it.
        assert mine == answer(tool, arguments, somethingNew=1), (tool, arguments)
    assert bob.stderr.count("the MCP SDK is imported now") == 1
    # Each message that reached the others was sent twice: once by the fast path, once by the SDK.
    eve.wait_events(2)
    assert eve.texts() == ["hi", "hi"]


@pytest.mark.spec("DESK-4", "SEND-2")
def test_no_message_overtakes_another_between_desk_and_sdk(home: Path, start: Callable[..., RawClient]) -> None:
    client = start("bob")
    client.handshake()
    lines = []
    for number in range(300):
        params = {"name": "send_message", "arguments": {"to": "later", "text": str(number)}}
        if number % 7 == 3:
            params["somethingNew"] = 1
        lines.append(line("tools/call", params, id=f"n{number}"))
    client.send_line(b"\n".join(lines))
    answers = [client.result(f"n{number}")[0].split()[1] for number in range(300)]
    assert answers == [f"#{number}" for number in range(1, 301)]
    ids = [message["id"] for _, message in client.arrived if "id" in message]
    assert len(ids) == len(set(ids))


@pytest.mark.anyio
@pytest.mark.spec("DESK-4")
async def test_the_desk_sends_nothing_while_an_earlier_call_is_with_the_sdk() -> None:
    sent: list[object] = []

    class Taker:
        bus = SimpleNamespace(recipient=str)

        def send_now(self, to: object, text: object, *, reply_to: int | None = None) -> object:
            sent.append(text)
            return "sent"

    desk = front_desk(tool_context(Taker()))
    settling = _Settling(desk.settled)

    async def settle(request_id: object) -> None:
        await settling.settle(request_id, reached=True)

    def call(request_id: object, tool: str = "send_message", **more: Any) -> bytes | None:
        arguments = {"to": "bob", "text": str(request_id)} if tool == "send_message" else {}
        return desk.take(line("tools/call", {"name": tool, "arguments": arguments, **more}, id=request_id))

    assert call(1) is None, "before the handshake"
    await settle(1)
    desk.initialize_id = 0
    assert call(2) is not None
    assert call(3, "check_messages", somethingNew=1) is None
    assert call(4) is not None, "a check that waits is in nobody's way"
    assert call(5, "set_name", somethingNew=1) is None
    assert call(6) is None
    await settle("5")
    await settle(5)
    assert call(7) is None, "6 is before it"
    await settle(6)
    await settle(7)
    assert call(8) is not None
    assert call(9, _meta=7) is None
    assert call(True) is None
    assert sent == ["2", "4", "8"]


@pytest.mark.spec("ERR-2")
def test_a_fault_of_ours_fails_one_call_and_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    class Faulty:
        bus = SimpleNamespace(recipient=str)

        def send_now(self, to: object, text: object, *, reply_to: int | None = None) -> object:
            raise ZeroDivisionError("nobody saw this coming")

        def take_notice(self) -> str:
            return ""

    desk = front_desk(tool_context(Faulty()))
    desk.initialize_id = 0
    call = line("tools/call", {"name": "send_message", "arguments": {"to": "bob", "text": "x"}}, id=1)
    answer = json.loads(desk.take(call) or b"{}")
    assert answer["result"]["isError"]
    assert "ZeroDivisionError: nobody saw this coming" in answer["result"]["content"][0]["text"]
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.anyio
@pytest.mark.spec("DESK-4")
async def test_a_send_that_has_to_wait_is_tried_again_and_then_waits_as_a_task() -> None:
    class Taker:
        is_busy = True
        bus = SimpleNamespace(recipient=str)

        def send_now(self, to: object, text: object, *, reply_to: int | None = None) -> object:
            if self.is_busy:
                raise Busy
            return "sent"

        def take_notice(self) -> str:
            return ""

    taker = Taker()
    started: list[object] = []
    desk = front_desk(tool_context(taker, limit=1), lambda *call: started.append(call[2]))
    desk.initialize_id = 0

    def take(request_id: int) -> bytes | None:
        params = {"name": "send_message", "arguments": {"to": "bob", "text": "x"}}
        return desk.take(line("tools/call", params, id=request_id))

    def is_started() -> bool:
        try:
            return take(1) == b""
        except Busy:
            return False

    with pytest.raises(Busy):
        take(1)
    until(is_started)
    taker.is_busy = False
    assert take(2) == b"", "1 is before it"
    assert started == [1, 2]
    other = front_desk(tool_context(taker, limit=1))
    other.initialize_id = 0
    other._context.rate_limit = desk._context.rate_limit
    call = line("tools/call", {"name": "send_message", "arguments": {"to": "bob", "text": "x"}}, id=3)
    assert b'isError": false' in (other.take(call) or b""), "what was tried in vain counts for no burst"


@pytest.mark.spec("DESK-4", "STORE-4")
def test_calls_that_wait_for_a_busy_database_keep_their_order(home: Path, start: Callable[..., RawClient]) -> None:
    client = start("bob", AGENTBUS_DELIVERY="pull")
    client.handshake()
    with closing(sqlite3.connect(home / "bus.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        calls = [client.post_call("send_message", to="later", text=str(number)) for number in range(5)]
        calls.append(client.post_call("set_name", name="robert"))
        calls.append(client.post_call("send_message", to="later", text="as robert"))
        assert client.call("check_messages") == "no unread messages"
        # It has waited its 50 ms, or the check would not have been answered: it waits as a task now.
        client.send_line(line("notifications/cancelled", {"requestId": str(calls[2]), "reason": "of no interest"}))
        assert client.call("check_messages") == "no unread messages"
        assert not {message.get("id") for _, message in client.arrived} & set(calls)
        other.execute("COMMIT")
    answers = [client.result(call)[0].split()[:2] for call in calls if call != calls[2]]
    assert answers[:4] == [["queued", f"#{number}"] for number in range(1, 5)]
    assert answers[4] == ["you", "are"]
    history = [json.loads(one) for one in agentbus(home, "history", "--json").stdout.splitlines()]
    assert [(one["from"], one["text"]) for one in history] == [
        *[("bob", text) for text in "0134"],
        ("robert", "as robert"),
    ]
    assert calls[2] not in {message.get("id") for _, message in client.arrived}
    assert client.call("send_message", to="later", text="and on").startswith("queued #6")
    assert client.stderr == ""


@pytest.mark.spec("READ-1", "READ-3")
@pytest.mark.parametrize("named_as", [int, str])
def test_a_check_that_is_cancelled_takes_nothing(
    home: Path, start: Callable[..., RawClient], named_as: Callable[[int], object]
) -> None:
    client = start("bob", AGENTBUS_DELIVERY="pull")
    client.handshake()
    check = client.post_call("check_messages", wait_s=100)
    assert client.call("whoami").startswith('you are "bob"'), "nothing waits for it"
    client.send_line(line("notifications/cancelled", {"requestId": named_as(check)}))
    agentbus(home, "send", "--from", "alice", "bob", "hello")
    assert client.call("whoami").endswith("1 unread message: call check_messages")
    # A cancellation that comes too late, as one client sends it after each answer, is about nothing.
    client.send_line(line("notifications/cancelled", {"requestId": named_as(check)}))
    assert "hello" in client.call("check_messages", wait_s=100)
    assert check not in {message.get("id") for _, message in client.arrived}
    assert client.stderr == ""


@pytest.mark.anyio
@pytest.mark.spec("READ-1")
@pytest.mark.parametrize("end", ["written", "cancelled", "closed"])
async def test_a_result_is_settled_by_whether_it_was_written(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    settled: list[bool] = []
    written: list[bytes] = []

    async def settle(reached: bool) -> None:
        settled.append(reached)

    async def call(*_call: object) -> ToolResult:
        return ToolResult("one message", settle=settle)

    async def write(data: bytes) -> int:
        if end == "closed":
            raise DeliveryClosed
        written.append(data)
        return len(data)

    monkeypatch.setattr(tools, "call", call)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            desk = FastPath(tool_context(), ReadyGate(), write, tasks.start_soon)
            desk.initialize_id = 0
            assert desk.take(line("tools/call", {"name": "check_messages"}, id=7)) == b""
            if end == "cancelled":
                # It comes when the tool is done and its task has not gone on yet, or before the task begins.
                assert desk.take(line("notifications/cancelled", {"requestId": 7})) == b""
    assert settled == [end == "written"]
    assert len(written) == (end == "written")


# Tools that there were not when the clients were recorded: they are called in the same form.
SINCE_RECORDED = {"ask", "join_group", "leave_group"}


@pytest.mark.spec("DESK-1")
@pytest.mark.parametrize("client_name", ["claude-code", "codex", "gemini", "opencode"])
def test_a_known_client_never_wakes_the_sdk(home: Path, start: Callable[..., RawClient], client_name: str) -> None:
    """The lines that a real client has sent: two sessions, with all tools, an error and a cancellation."""
    text = RECORDED.joinpath(f"{client_name}.jsonl").read_text(encoding="utf-8")
    messages = [json.loads(one) for one in text.splitlines()]
    begins = [place for place, one in enumerate(messages) if one.get("method") == "initialize"]
    probes = [place for place, one in enumerate(messages) if one.get("method") == "server/discover"]
    sessions = [messages[a:b] for a, b in pairwise([*(probes or begins), len(messages)])]
    called = {one["params"]["name"] for one in messages if one["method"] == "tools/call"}
    # Tools that came after the recording are not in it. Their calls have the same form.
    assert called <= {tool.name for tool in tools.TOOLS}
    for session in sessions:
        client = start("bob", AGENTBUS_DELIVERY="pull", adapter="mcp")
        cancelled = {one["params"]["requestId"] for one in session if one["method"] == "notifications/cancelled"}
        for one in session:
            is_waiting = one["method"] == "tools/call" and one["params"]["arguments"].get("wait_s")
            if is_waiting:
                # A longer wait is refused by this adapter, at once if its cancellation does not come with it.
                one["params"]["arguments"]["wait_s"] = generic_server.PROFILE.max_wait_s
            client.send_line(json.dumps(one).encode())
            if "id" in one and not is_waiting:
                client.answer(one["id"])
                cancelled.discard(one["id"])
            if one["method"] == "tools/call" and one["params"]["name"] == "send_message":
                arguments = {**one["params"]["arguments"], "to": "nobody", "text": "well?"}
                arguments.pop("reply_to", None)
                asks = {**one["params"], "name": "ask", "arguments": arguments}
                assert (
                    "nobody answers now"
                    in client.request("tools/call", asks, f"ask {one['id']}")["result"]["content"][0]["text"]
                )
        assert client.request("ping", request_id="last")["result"] == {}
        assert [message for _, message in client.arrived if message.get("id") in cancelled] == []
        assert client.stderr == ""
        if sys.platform.startswith("linux"):
            assert "pydantic" not in Path(f"/proc/{client.process.pid}/maps").read_text()
        client.end()


@pytest.mark.spec("DESK-1")
def test_the_desk_imports_no_sdk() -> None:
    code = (
        "import sys, agentbus.adapters.claude_mcp.server, agentbus.adapters.mcp.fast_path\n"
        "print(sorted({'mcp', 'mcp_types', 'pydantic', 'typer'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.spec("TOOL-5")
def test_each_tool_says_truthfully_what_it_does() -> None:
    hints = {tool["name"]: tool["annotations"] for tool in tools.listing(Profile())["tools"]}
    assert {name for name, hint in hints.items() if hint["readOnlyHint"]} == {"list_peers", "whoami", "message_status"}
    assert all(not hint["destructiveHint"] and not hint["openWorldHint"] for hint in hints.values())
