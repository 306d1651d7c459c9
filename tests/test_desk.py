"""The front desk answers like the SDK, before the SDK is there, and hands over without a seam."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentbus.adapters.claude_mcp import guard
from agentbus.adapters.claude_mcp.channel import ReadyGate
from agentbus.adapters.claude_mcp.desk import Desk
from agentbus.adapters.claude_mcp.host import Way
from agentbus.adapters.claude_mcp.protocol import serve_mcp
from agentbus.adapters.claude_mcp.stdio import Stdio
from agentbus.adapters.claude_mcp.tools import Seat
from tests.helpers import INITIALIZE, RawClient, agentbus

pytestmark = pytest.mark.timeout(90)  # a loaded machine takes seconds for one process

VERSIONS = [*guard.HANDSHAKE_VERSIONS, "1999-01-01", "2026-07-28", ""]


def line(method: str, params: dict[str, Any] | None = None, **more: Any) -> bytes:
    message: dict[str, Any] = {"jsonrpc": "2.0", "method": method, **more}
    if params is not None:
        message["params"] = params
    return json.dumps(message).encode()


def conversation(version: str) -> list[bytes]:
    """What the desk answers alone, in the order of Claude Code."""
    return [
        line("server/discover", {}, id="server-discover-probe-1"),
        line("ping", id=0),
        line("initialize", {**INITIALIZE, "protocolVersion": version}, id=1),
        line("ping", {}, id="ping-2"),
        line("notifications/initialized"),
        line("tools/list", id=2),
        line("tools/list", {"_meta": {"progressToken": 7}}, id="three"),
    ]


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
    seat = Seat(None, Way.CHANNEL, "a test")
    desk = Desk(seat, ReadyGate())
    ours, far = socket.socketpair()
    with ours, far:
        stdio = Stdio(ours.fileno(), os.dup(ours.fileno()), guard.refusal)
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(stdio.run)
                # A desk that nobody has asked has nothing to hand over: the SDK answers all of it.
                tasks.start_soon(serve_mcp, seat, stdio, ReadyGate(), Desk(seat, ReadyGate()))
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
        line("tools/call", {"name": "whoami", "arguments": {}}, id=5),
        line("tools/list", {"cursor": "next"}, id=5),
        line("tools/list", [], id=5),  # type: ignore[arg-type]
        line("tools/list", id=True),
        line("ping", id=None),
        line("ping", id=1.5),
        line("initialize", INITIALIZE, id=5),
        line("notifications/cancelled", {"requestId": 5}),
        line("resources/list", id=5),
        b'{"jsonrpc": "1.0", "id": 5, "method": "ping"}',
        b'{"id": 5, "method": "ping"}',
        b'{"jsonrpc": "2.0", "id": 5, "result": {}}',
        b"[]",
        b"no json",
        b"\xff",
    ],
)
def test_what_is_not_the_desks_to_answer_is_left_to_the_sdk(request_line: bytes) -> None:
    desk = Desk(Seat(None, Way.CHANNEL, "a test"), ReadyGate())
    for one in conversation("2025-11-25"):
        assert desk.take(one) is not None
    handshake = list(desk.hand_over())
    assert desk.take(request_line) is None
    assert desk.hand_over() == handshake


@pytest.mark.spec("DESK-1")
@pytest.mark.parametrize("missing", ["protocolVersion", "capabilities", "clientInfo"])
def test_an_incomplete_handshake_is_left_to_the_sdk(missing: str) -> None:
    desk = Desk(Seat(None, Way.CHANNEL, "a test"), ReadyGate())
    params = {key: value for key, value in INITIALIZE.items() if key != missing}
    assert desk.take(line("initialize", params, id=1)) is None
    assert desk.take(line("notifications/initialized")) is None
    assert desk.take(line("tools/list", id=2)) is None
    assert desk.hand_over() == []
    assert desk.take(line("initialize", {**INITIALIZE, "clientInfo": {"name": "x"}}, id=3)) is None


@pytest.fixture
def slow_sdk(home: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder for PYTHONPATH with which the SDK's import waits until it is let go."""
    folder = home.parent / "slow"
    folder.mkdir()
    gate = folder / "gate"
    os.mkfifo(gate)
    folder.joinpath("sitecustomize.py").write_text(
        # In the loader and not in the finder, which holds the lock of all imports.
        "import sys\n"
        "from importlib.machinery import PathFinder, SourceFileLoader\n"
        "class Slow(SourceFileLoader):\n"
        "    def exec_module(self, module):\n"
        f"        open({str(gate)!r}, 'rb').read()\n"
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
    # Held open from the start: who opens a fifo waits for the other end.
    keeper = os.open(gate, os.O_RDWR)
    is_open = [True]

    def let_go() -> None:
        if is_open:
            is_open.clear()
            os.close(keeper)

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
    # What the desk cannot answer waits, in order.
    first = client.post_call("send_message", to="bob", text="first")
    second = client.post_call("send_message", to="bob", text="second")
    assert client.request("ping")["result"] == {}
    answered = [message.get("id") for _, message in client.arrived]
    assert not {first, second} & set(answered)
    let_go()
    assert client.result(first) == ('sent #2 to "bob" (online)', False)
    assert client.result(second) == ('sent #3 to "bob" (online)', False)
    assert client.texts()[:1] == ["early"]
    client.wait_events(3)
    assert client.texts() == ["early", "first", "second"]
    assert client.request("tools/list")["result"]["tools"]
    ids = [message["id"] for _, message in client.arrived if "id" in message]
    assert len(ids) == len(set(ids)), "a request was answered twice"
    assert client.stderr == ""


@pytest.mark.spec("LIFE-1", "LIFE-2")
@pytest.mark.parametrize("end", ["stdin", "SIGINT", "SIGTERM"])
def test_a_session_ends_while_the_sdk_is_being_imported(
    home: Path, start: Callable[..., RawClient], slow_sdk: tuple[Path, Callable[[], None]], end: str
) -> None:
    folder, _let_go = slow_sdk
    client = start("bob", PYTHONPATH=str(folder))
    client.handshake()
    if end == "stdin":
        client.close_stdin()
    else:
        client.process.send_signal(signal.Signals[end])
    assert client.process.wait(40) == 0
    assert list((home / "sock").iterdir()) == []
    assert agentbus(home, "peers").stdout == "nobody is online\n"


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
    client.wait(lambda: "result" in client.request("ping"))
    assert "error" in client.request("tools/call", {"name": "whoami", "arguments": {}})
    assert "the handshake was refused late" in client.stderr


@pytest.mark.spec("DESK-1")
def test_the_desk_imports_no_sdk() -> None:
    code = (
        "import sys, agentbus.adapters.claude_mcp.server, agentbus.adapters.claude_mcp.desk\n"
        "print(sorted({'mcp', 'mcp_types', 'pydantic', 'typer'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
