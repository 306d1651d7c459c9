"""`agentbus serve codex` as a real process under a stand-in of the app server: which session it is, and until when."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agentbus.adapters.codex.session import is_codex, judge
from tests.support.app_server_stand_in import AppServerStandIn, StandInThread
from tests.support.client import RawClient
from tests.support.command import agentbus, clean_env, until

pytestmark = pytest.mark.timeout(120)

# A terminal program: it listens where it says, and waits.
TERMINAL = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"


class Terminal:
    """A process in the place of Codex's terminal program."""

    def __init__(self, home: Path, **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", TERMINAL],
            env=clean_env(home, **variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        self.origin = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


class Codex:
    """The app server with its terminals, threads and servers, in this process."""

    def __init__(self, home: Path, start: Callable[..., RawClient]) -> None:
        self.home = home
        self.folder = home.parent / "codex"
        self.far = AppServerStandIn(self.folder / "app-server-control" / "app-server-control.sock")
        self._start = start
        self.terminals: list[Terminal] = []

    def terminal(self, **variables: str) -> Terminal:
        self.terminals.append(Terminal(self.home, **variables))
        return self.terminals[-1]

    def server(self, *, is_of_a_session: bool = True, name: str | None = None) -> RawClient:
        client = self._start(name, AGENTBUS_DELIVERY="auto", CODEX_HOME=str(self.folder))
        experimental = {"codex/auth-change": {}} if is_of_a_session else {}
        client.request(
            "initialize",
            {
                "protocolVersion": "2025-06-18",
                "capabilities": {"experimental": experimental},
                "clientInfo": {"name": "codex-mcp-client", "version": "0.169.0"},
            },
        )
        client.notify("notifications/initialized")
        client.request("tools/list")
        return client

    def session(
        self, thread_id: str, terminal: Terminal | None = None, **about: Any
    ) -> tuple[StandInThread, RawClient]:
        """A thread with its server, as a terminal begins it."""
        thread = self.far.start(thread_id, os.getcwd(), origin=terminal.origin if terminal else "", **about)
        clients: list[RawClient] = []

        def on_call(params: dict[str, Any]) -> None:
            for client in clients:
                asked = {"name": params["tool"], "arguments": params["arguments"], "_meta": params["_meta"]}
                with suppress(BrokenPipeError, ValueError):
                    client.post("tools/call", asked)

        thread.on_call = on_call
        clients.append(self.server())
        return thread, clients[0]

    def peers(self) -> list[str]:
        rows = [json.loads(line) for line in agentbus(self.home, "peers", "--json").stdout.splitlines()]
        return [row["name"] for row in rows if "delivery" in row]

    def until_peers(self, *names: str) -> None:
        until(lambda: self.peers() == sorted(names), f"{names} (but {self.peers()})")

    def close(self) -> None:
        for terminal in self.terminals:
            terminal.end()
        self.far.close()


@pytest.fixture
def adapter() -> str:
    return "codex"


@pytest.fixture
def codex(home: Path, start: Callable[..., RawClient]) -> Iterator[Codex]:
    made = Codex(home, start)
    yield made
    made.close()


HERE = os.path.basename(os.getcwd()).lower()


def state(home: Path, number: int) -> str:
    return agentbus(home, "status", str(number)).stdout.split(" is ")[1].split(":")[0]


@pytest.mark.spec("CODEX-2", "CODEX-4", "CODEX-8")
def test_a_message_goes_into_the_thread_before_any_prompt_and_is_known_to_be_read(home: Path, codex: Codex) -> None:
    other, _ = codex.session("t1", codex.terminal(AGENTBUS_NAME="other"))
    thread, client = codex.session("t2", codex.terminal(AGENTBUS_NAME="web"))
    codex.until_peers("other", "web")
    assert client.call("whoami").endswith("(app-server: what comes goes in through Codex's app server)")
    agentbus(home, "send", "web", "hello")
    until(lambda: state(home, 1) == "read")
    assert "hello</channel>" in thread.requests[0][0]
    assert other.requests == []
    assert client.events == []


@pytest.mark.spec("CODEX-1", "VOID-3")
def test_the_server_that_is_started_for_a_look_at_the_tools_is_none(home: Path, codex: Codex) -> None:
    codex.far.start("t1", os.getcwd())
    codex.server(is_of_a_session=False)
    assert "mcpServer/tool/call" not in codex.far.asked
    assert not home.exists()


@pytest.mark.spec("CODEX-2", "LATE-2")
def test_a_subagents_server_is_no_peer_and_takes_no_mail(home: Path, codex: Codex) -> None:
    codex.session("t1", codex.terminal(AGENTBUS_NAME="web"))
    codex.until_peers("web")
    codex.far.start("t2", os.getcwd(), parent="t1")
    client = codex.server()
    meta = {
        "threadId": "t2",
        "sessionId": "t1",
        "x-codex-turn-metadata": {"thread_source": "subagent", "session_id": "t1"},
    }
    check = client.post("tools/call", {"name": "check_messages", "arguments": {}, "_meta": meta})
    assert "you are a subagent" in client.result(check)[0]
    assert codex.peers() == ["web"]


@pytest.mark.spec("CODEX-3", "NAME-7")
def test_another_conversation_of_a_terminal_has_the_name_and_the_mail_and_the_former_one_is_no_peer(
    home: Path, codex: Codex
) -> None:
    terminal = codex.terminal(AGENTBUS_NAME="web")
    first, left = codex.session("t1", terminal)
    codex.until_peers("web")
    second, _ = codex.session("t2", terminal)
    until(lambda: "turned to another conversation" in left.refuse("whoami"))
    agentbus(home, "send", "web", "for the new one")
    until(lambda: second.requests)
    assert first.requests == []
    assert codex.peers() == ["web"]
    # /resume: the former thread again, with a new server.
    codex.far.threads.pop("t1")
    third, _ = codex.session("t1", terminal)
    until(lambda: codex.peers() == ["web"] and agentbus(home, "send", "web", "and back").returncode == 0)
    until(lambda: third.requests)


@pytest.mark.spec("CODEX-3")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_session_whose_terminal_has_ended_gets_nothing_more(home: Path, codex: Codex, end: signal.Signals) -> None:
    terminal = codex.terminal(AGENTBUS_NAME="web")
    thread, client = codex.session("t1", terminal)
    codex.until_peers("web")
    terminal.process.send_signal(end)
    terminal.process.wait()
    agentbus(home, "send", "web", "is anybody there?")
    codex.until_peers()
    assert "its terminal has ended" in client.refuse("whoami")
    assert thread.requests == []
    assert state(home, 1) == "pending"
    back, _ = codex.session("t1", codex.terminal())
    until(lambda: back.requests)  # the conversation has its name back, and its mail


@pytest.mark.spec("CODEX-3")
def test_where_no_terminal_can_be_told_nothing_is_concluded(home: Path, codex: Codex) -> None:
    first, _ = codex.session("t1")
    codex.until_peers(HERE)
    second, _ = codex.session("t2")
    codex.until_peers(HERE, f"{HERE}-2")
    agentbus(home, "broadcast", "hi all")
    until(lambda: first.requests and second.requests)


@pytest.mark.spec("CODEX-9")
def test_its_name_is_that_of_its_terminal_or_its_thread_and_follows_a_rename(home: Path, codex: Codex) -> None:
    codex.session("t1", codex.terminal(AGENTBUS_NAME="web"), name="thread-name")
    codex.session("t2", codex.terminal(), name="api")
    codex.session("t3", codex.terminal(), name="Fix the login of the shop")
    codex.until_peers("web", "api", HERE)
    codex.far.tell("thread/name/updated", threadId="t2", threadName="backend")
    codex.until_peers("web", "backend", HERE)
    codex.far.tell("thread/name/updated", threadId="t2", threadName="web")  # it is taken
    codex.far.tell("thread/name/updated", threadId="t3", threadName="front")
    codex.until_peers("web", "backend", "front")


@pytest.mark.spec("STATE-6", "CODEX-8")
def test_what_was_given_and_never_read_comes_again_in_the_next_session(home: Path, codex: Codex) -> None:
    terminal = codex.terminal(AGENTBUS_NAME="web")
    thread, client = codex.session("t1", terminal)
    codex.until_peers("web")
    thread.answers = False  # the request is made, and everything is killed before the model has said a word
    agentbus(home, "send", "web", "killed in the middle")
    until(lambda: state(home, 1) == "delivered")
    client.process.kill()
    terminal.end()
    again, _ = codex.session("t2", codex.terminal(AGENTBUS_NAME="web"))
    until(lambda: again.requests)
    until(lambda: state(home, 1) == "read")
    assert 'msg_id="1"' in again.requests[0][0]


@pytest.mark.spec("CLI-2")
def test_a_shell_of_a_session_sends_as_that_session(home: Path, codex: Codex) -> None:
    for number, name in enumerate(("one", "two"), 1):
        codex.session(f"t{number}", codex.terminal(AGENTBUS_NAME=name))
    codex.until_peers("one", "two")
    agentbus(home, "send", "bob", "from a shell", CODEX_THREAD_ID="t2", AGENTBUS_NAME="zed")
    agentbus(home, "send", "bob", "from a subagent's", CODEX_THREAD_ID="t9", CODEX_SESSION_ID="t1")
    agentbus(home, "send", "bob", "from nowhere", CODEX_THREAD_ID="t9", AGENTBUS_NAME="zed")
    assert re.findall(r'"from": "(\w+)"', agentbus(home, "history", "--json").stdout) == ["two", "one", "zed"]


@pytest.mark.spec("CODEX-9", "VOID-2")
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("codex exec --json do", "codex exec shows only what a tool returns"),
        ("codex --no-daemon", "codex was started with --no-daemon, and so without its app server"),
        ("/x/codex -c model=y", "codex was started with -c, and so without its app server"),
        ("codex app-server", "this app server has no control socket of its own"),
        ("codex", "codex runs without its app server"),
    ],
)
def test_without_a_control_socket_a_session_pulls_and_says_why(arguments: str, why: str) -> None:
    assert is_codex(arguments.split())
    assert judge(arguments.split()) == why


@pytest.mark.spec("VOID-1", "LATE-1")
def test_a_client_without_an_app_server_is_a_peer_that_pulls(home: Path, start: Callable[..., RawClient]) -> None:
    client = start(None, AGENTBUS_DELIVERY="auto", CODEX_HOME=str(home.parent / "none"))
    client.handshake()
    agentbus(home, "send", HERE, "hello")
    assert client.call("whoami").splitlines()[-1] == "1 unread message: call check_messages"
    assert "hello</channel>" in client.call("check_messages")


@pytest.mark.spec("TOOL-4")
def test_the_first_paragraph_of_the_instructions_says_what_matters(codex: Codex) -> None:
    client = codex.server()
    (said,) = [message["result"]["instructions"] for _, message in client.arrived if "instructions" in str(message)]
    lead = said.split("\n\n")[0]
    assert len(lead) <= 250
    assert "not your user" in lead
    assert len(said) < 2_000
