"""Our module under Node, in a stand-in for Claude Code, with the real server below it and the command line beside."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentbus.adapters.claude_mcp import plugin
from tests.support.command import PATIENCE_S, agentbus, clean_env, until
from tests.support.node import NODE, Stand

STAND_IN = Path(__file__).parents[2] / "support" / "claude_module_stand_in.mjs"
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(NODE is None, reason="node is not on PATH"),
    pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the stand-in says when it started, from /proc"),
]
HOOKS = "hooks/mod.js"
Start = Callable[..., Stand]


@pytest.fixture
def claude(home: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts the stand-in as the session `backend`, with our module unless `module` is False."""
    started: list[Stand] = []
    settings = home.parent / "claude"

    def start(*, module: bool = True, **variables: str) -> Stand:
        folder = settings / "skills" / "agentbus"
        for name, text in plugin.files().items() if module else ():
            folder.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
            folder.joinpath(name).write_text(text)
        loaded = tmp_path / "mod.mjs"  # by this name, Node takes it for a module
        loaded.write_text(plugin.files()[HOOKS])
        words = [str(STAND_IN), str(loaded) if module else "none", *serve()]
        variables = {"AGENTBUS_NAME": "backend", "CLAUDE_CONFIG_DIR": str(settings), **variables}
        started.append(Stand(home, tmp_path, words, **variables))
        until(lambda: started[-1].all("ready"), "the handshake")
        return started[-1]

    yield start
    for one in started:
        one.end()
    shutil.rmtree(settings, ignore_errors=True)


def serve() -> list[str]:
    return [sys.executable, "-m", "agentbus", "serve", "claude-mcp"]


def peer(home: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in agentbus(home, "peers", "--json").stdout.splitlines()]
    return next((row for row in rows if row["online"]), {})


def until_by(home: Path, delivery: str) -> dict[str, Any]:
    until(lambda: peer(home).get("delivery") == delivery, f"the delivery {delivery}")
    return peer(home)


def history(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in agentbus(home, "history", "--json", "--limit", "300").stdout.splitlines()]


def states(home: Path) -> list[str]:
    return [row["state"] for row in history(home)]


def given(claude: Stand) -> list[int]:
    """The ids of the messages in all requests, in order."""
    texts = "".join(text for one in claude.all("request") for text in one["request"])
    return [int(number) for number in re.findall(r'msg_id="(\d+)"', texts)]


@pytest.mark.spec("MOD-5", "MOD-8", "VOID-2", "READ-8")
def test_a_message_begins_a_turn_of_an_idle_session_and_is_read(claude: Start, home: Path) -> None:
    one = claude()
    assert until_by(home, "mod")["delivery_reason"] == "its agentbus module asks for what comes"
    agentbus(home, "send", "backend", "which port? ü 日本", AGENTBUS_NAME="frontend")
    until(lambda: given(one) == [1])
    assert "which port? ü 日本</channel>" in one.all("request")[-1]["request"][-1]
    until(lambda: states(home) == ["read"])
    (row,) = history(home)
    assert (row["carrier"], row["read_by"]) == ("mod", "transcript")
    assert "mod" in [path.name for path in home.iterdir()]
    one.end()
    assert list((home / "mod").iterdir()) == []


@pytest.mark.spec("MOD-9", "STATE-1")
def test_a_busy_session_gets_notes_with_its_next_request_each_once_in_order(claude: Start, home: Path) -> None:
    one = claude()
    until_by(home, "mod")
    one.order("subagent")  # its turn is not the session's
    one.order("say", text="work", long=True)
    for number in range(5):
        agentbus(home, "send", "backend", f"<{number}>")
    until(lambda: "<4>" in "".join(said["noted"] for said in one.all("noted")))
    assert set(states(home)) == {"pending"}
    one.order("tool")
    until(lambda: set(states(home)) == {"read"})
    one.order("end")
    assert given(one) == [1, 2, 3, 4, 5]


BURST = """
import anyio, agentbus
async def main():
    async with agentbus.join("many") as me:
        for number in range(30):
            await me.send("backend", f"<{number}>")
            await anyio.sleep(0.003)
anyio.run(main)
"""


@pytest.mark.spec("MOD-8", "MOD-9")
def test_what_comes_while_a_turn_begins_arrives_once_and_in_order(claude: Start, home: Path) -> None:
    """A note that the session accepts before it has recorded the prompt would stand before that in the request."""
    one = claude()
    until_by(home, "mod")
    one.order("turns", long=True)
    subprocess.run([sys.executable, "-c", BURST], env=clean_env(home), check=True, timeout=PATIENCE_S)
    until(lambda: "<29>" in "".join(said["noted"] for said in one.all("noted")))
    one.order("tool")
    until(lambda: set(states(home)) == {"read"})
    assert given(one) == list(range(1, 31))


@pytest.mark.spec("MOD-9", "STATE-3")
def test_what_a_killed_client_held_in_notes_is_pending_and_comes_again(claude: Start, home: Path) -> None:
    one = claude()
    until_by(home, "mod")
    one.order("say", text="work", long=True)
    for number in range(10):
        agentbus(home, "send", "backend", f"<{number}>")
    until(lambda: "<9>" in "".join(said["noted"] for said in one.all("noted")))
    one.process.kill()
    until(lambda: peer(home) == {})
    assert states(home) == ["pending"] * 10
    assert given(one) == []
    other = claude()
    until(lambda: given(other) == list(range(1, 11)))
    until(lambda: set(states(home)) == {"read"})


@pytest.mark.spec("MOD-5", "MOD-9")
def test_a_stopped_session_is_woken_by_its_inbox(claude: Start, home: Path) -> None:
    one = claude()
    until_by(home, "mod")
    one.order("say", text="work", long=True)
    agentbus(home, "send", "backend", "before")
    until(lambda: one.all("noted"))
    one.order("escape")
    until(lambda: given(one) == [1])
    one.order("escape")
    agentbus(home, "send", "backend", "after")
    until(lambda: given(one) == [1, 2])
    until(lambda: [row["carrier"] for row in history(home)] == ["mod", "inbox"])


@pytest.mark.spec("MOD-5", "BYPASS-2")
def test_a_session_that_asks_for_no_permissions_is_held_alike(claude: Start, home: Path) -> None:
    settings = home.parent / "claude"
    settings.mkdir()
    (settings / "settings.json").write_text(json.dumps({"permissions": {"defaultMode": "bypassPermissions"}}))
    one = claude()
    agentbus(home, "send", "backend", "rm -rf")
    until(lambda: "cannot be used: the session asks for no permissions" in peer(home)["delivery_reason"])
    one.order("say", text="hello")
    assert (given(one), states(home)) == ([], ["pending"])
    # The settings are read at the start; what the session records stands above them.
    one.order("mode", mode="default")
    until(lambda: given(one) == [1])


@pytest.mark.spec("MOD-5")
def test_without_a_module_all_is_as_before_and_the_reason_is_said(claude: Start, home: Path) -> None:
    one = claude(module=False)
    found = until_by(home, "inbox")
    until(lambda: "its agentbus module is not installed (agentbus enable claude-mcp)" in peer(home)["delivery_reason"])
    assert "what comes goes into its inbox" in found["delivery_reason"]
    agentbus(home, "send", "backend", "hello")
    until(lambda: given(one) == [1])


@pytest.mark.spec("MOD-7")
def test_the_module_finds_a_server_that_was_started_again(claude: Start, home: Path) -> None:
    one = claude()
    until_by(home, "mod")
    one.order("restart")
    until(lambda: len(one.all("ready")) == 2)
    until_by(home, "mod")
    agentbus(home, "send", "backend", "again")
    until(lambda: given(one) == [1])


def test_the_module_uses_only_what_it_spells_out() -> None:
    """Claude Code reads from the source what a module may do, and refuses one that hands `$` on."""
    source = re.sub(r"//.*", "", plugin.files()[HOOKS])
    assert not re.findall(r"\$(?!\.[a-z]+\.[a-zA-Z]+\(|, event, next\)|\{|\)/)", source)
    assert "import" not in source
    assert "require" not in source
