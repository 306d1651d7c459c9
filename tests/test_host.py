"""Who the host is and how its session receives, from command lines as they are met."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from agentbus.adapters.mcp.hosts import Way, find_host, judge
from agentbus.core import process
from agentbus.core.process import Process
from tests.helpers import until

FLAG = "--dangerously-load-development-channels"


@pytest.mark.spec("VOID-1")
@pytest.mark.parametrize(
    ("command", "way"),
    [
        (f"claude {FLAG} server:agentbus", Way.CHANNEL),
        (f"/usr/bin/claude {FLAG}=server:agentbus", Way.CHANNEL),
        ("claude --channels server:agentbus", Way.CHANNEL),
        ("claude --channels server:other server:agentbus --model opus", Way.CHANNEL),
        ("claude --channels plugin:agentbus@market", Way.CHANNEL),
        (f"claude.exe -c {FLAG} server:agentbus", Way.CHANNEL),
        (f"node /opt/bin/claude {FLAG} server:agentbus", Way.CHANNEL),
        (f"node --max-old-space-size=4096 /x/@anthropic-ai/claude-code/cli.js {FLAG} server:agentbus", Way.CHANNEL),
        (f"/bin/sh /home/me/bin/claude {FLAG} server:agentbus", Way.CHANNEL),
        ("claude", Way.PULL),
        ("claude -p hello", Way.PULL),
        ("claude --resume", Way.PULL),
        (f"claude {FLAG} server:other", Way.PULL),
        (f"claude {FLAG}", Way.PULL),
        (f"claude --model server:agentbus {FLAG} server:other", Way.PULL),
        ("claude server:agentbus", Way.PULL),
        ("claude --channels server:agentbusx", Way.PULL),
        ("node /opt/bin/claude", Way.PULL),
        ("claude mcp list", Way.HEALTH_CHECK),
        ("claude mcp get agentbus", Way.HEALTH_CHECK),
        ("claude --debug mcp list", Way.HEALTH_CHECK),
        ("node /opt/bin/claude mcp list", Way.HEALTH_CHECK),
        ("claude mcp serve", Way.PULL),
    ],
)
def test_claude_is_judged_by_its_arguments(command: str, way: Way) -> None:
    judged = judge(command.split())
    assert judged is not None
    assert judged[0] is way
    assert 0 < len(judged[1]) < 120


@pytest.mark.spec("VOID-1")
def test_a_prompt_is_no_subcommand() -> None:
    judged = judge(["claude", "mcp list"])
    assert judged is not None
    assert judged[0] is Way.PULL


@pytest.mark.parametrize(
    "command",
    ["", "zed", "python -m pytest claude", "node server.js claude", "vim claude", "bash -c claude", "claudette"],
)
def test_others_are_not_claude(command: str) -> None:
    assert judge(command.split()) is None


def chain(*commands: str) -> tuple[list[Process], dict[Process, Sequence[str]]]:
    lines = {Process(number, "x"): command.split() for number, command in enumerate(commands, 1)}
    return list(lines), lines


@pytest.mark.spec("VOID-1")
@pytest.mark.parametrize(
    ("commands", "host", "way"),
    [
        (["claude", "bash"], 1, Way.PULL),
        (["uv run agentbus serve claude-mcp", f"claude {FLAG} server:agentbus", "bash"], 2, Way.CHANNEL),
        (["sh -c agentbus", "env X=1 y", "node /x/claude", "zsh"], 3, Way.PULL),
        (["zed", "claude"], 1, Way.UNSURE),
        (["python x.py", "bash", "claude"], 1, Way.UNSURE),
        (["-bash", "tmux", "claude"], 2, Way.UNSURE),
        (["", "claude"], 1, Way.UNSURE),
        (["bash"], 1, Way.UNSURE),
        (["uv run agentbus", "claude mcp list"], 2, Way.HEALTH_CHECK),
    ],
)
def test_wrappers_are_seen_through_and_nothing_else_is(commands: list[str], host: int, way: Way) -> None:
    above, lines = chain(*commands)
    found = find_host("auto", chain=above, arguments=lambda one: lines[one])
    assert (found.process.pid, found.way) == (host, way)
    assert found.reason


@pytest.mark.spec("VOID-1")
def test_the_variable_stands_above_the_host_but_not_above_a_health_check() -> None:
    above, lines = chain("claude")
    found = find_host("channel", chain=above, arguments=lambda one: lines[one])
    assert (found.process, found.way, found.reason) == (above[0], Way.CHANNEL, "AGENTBUS_DELIVERY is channel")
    assert find_host("pull", chain=above, arguments=lambda one: ["zed"]).way is Way.PULL
    assert find_host("channel", chain=above, arguments=lambda one: ["claude", "mcp", "list"]).way is Way.HEALTH_CHECK


def test_the_arguments_of_a_process_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()", "two words", "ü", ""], stdin=subprocess.PIPE)
    try:
        found = process.look_up(child.pid)
        assert found is not None
        until(lambda: process.arguments(found), "exec")  # for a moment of it a process has no arguments
        assert process.arguments(found) == [sys.executable, "-c", "input()", "two words", "ü", ""]
        monkeypatch.setattr(process, "_HAS_PROC", False)
        assert process.arguments(found)[:3] == [sys.executable, "-c", "input()"]
        assert process.arguments(Process(2**22 + 1, "x")) == []
        monkeypatch.undo()
        assert process.arguments(Process(2**22 + 1, "x")) == []
        assert find_host("auto").process.pid == os.getppid() or find_host("auto").way is not Way.HEALTH_CHECK
    finally:
        child.communicate(b"\n")
