"""Which process is the host process, and how its session receives: read from command lines as they occur."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from agentbus.adapters.claude_mcp.host import choose, judge
from agentbus.adapters.mcp.hosts import Mode
from agentbus.core import process
from agentbus.core.process import Process
from tests.support.command import until

FLAG = "--dangerously-load-development-channels"


@pytest.mark.spec("VOID-1")
@pytest.mark.parametrize(
    ("command", "mode"),
    [
        (f"claude {FLAG} server:agentbus", Mode.PUSHED),
        (f"/usr/bin/claude {FLAG}=server:agentbus", Mode.PUSHED),
        ("claude --channels server:agentbus", Mode.PUSHED),
        ("claude --channels server:other server:agentbus --model opus", Mode.PUSHED),
        ("claude --channels plugin:agentbus@market", Mode.PUSHED),
        (f"claude.exe -c {FLAG} server:agentbus", Mode.PUSHED),
        (f"node /opt/bin/claude {FLAG} server:agentbus", Mode.PUSHED),
        (f"node --max-old-space-size=4096 /x/@anthropic-ai/claude-code/cli.js {FLAG} server:agentbus", Mode.PUSHED),
        (f"/bin/sh /home/me/bin/claude {FLAG} server:agentbus", Mode.PUSHED),
        ("claude", Mode.PULL),
        ("claude -p hello", Mode.PULL),
        ("claude --resume", Mode.PULL),
        (f"claude {FLAG} server:other", Mode.PULL),
        (f"claude {FLAG}", Mode.PULL),
        (f"claude --model server:agentbus {FLAG} server:other", Mode.PULL),
        ("claude server:agentbus", Mode.PULL),
        ("claude --channels server:agentbusx", Mode.PULL),
        ("node /opt/bin/claude", Mode.PULL),
        ("claude mcp list", Mode.HEALTH_CHECK),
        ("claude mcp get agentbus", Mode.HEALTH_CHECK),
        ("claude --debug mcp list", Mode.HEALTH_CHECK),
        ("node /opt/bin/claude mcp list", Mode.HEALTH_CHECK),
        ("claude mcp serve", Mode.PULL),
    ],
)
def test_claude_is_judged_by_its_arguments(command: str, mode: Mode) -> None:
    judged = judge(command.split())
    assert judged is not None
    assert judged[0] is mode
    assert 0 < len(judged[1]) < 120


@pytest.mark.spec("VOID-1")
def test_a_prompt_is_no_subcommand() -> None:
    judged = judge(["claude", "mcp list"])
    assert judged is not None
    assert judged[0] is Mode.PULL


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
    ("commands", "host", "delivery"),
    [
        (["claude", "bash"], 1, "pull"),
        (["uv run agentbus serve claude-mcp", f"claude {FLAG} server:agentbus", "bash"], 2, "channel"),
        (["sh -c agentbus", "env X=1 y", "node /x/claude", "zsh"], 3, "pull"),
        (["zed", "claude"], 1, "channel?"),
        (["python x.py", "bash", "claude"], 1, "channel?"),
        (["-bash", "tmux", "claude"], 2, "channel?"),
        (["", "claude"], 1, "channel?"),
        (["bash"], 1, "channel?"),
        (["uv run agentbus", "claude mcp list"], 2, "none"),
    ],
)
def test_wrappers_are_seen_through_and_nothing_else_is(commands: list[str], host: int, delivery: str) -> None:
    above, lines = chain(*commands)
    found = choose("auto", chain=above, arguments=lambda one: lines[one])
    assert (found.host.pid, found.delivery) == (host, delivery)
    assert found.reason


@pytest.mark.spec("VOID-1")
def test_the_variable_stands_above_the_host_but_not_above_a_health_check() -> None:
    above, lines = chain("claude")
    found = choose("channel", chain=above, arguments=lambda one: lines[one])
    assert (found.host, found.delivery, found.reason) == (above[0], "channel", "AGENTBUS_DELIVERY is channel")
    assert choose("mod", chain=above, arguments=lambda one: lines[one]).delivery == "pull", "and there is no inbox"
    assert choose("pull", chain=above, arguments=lambda one: ["zed"]).delivery == "pull"
    assert choose("channel", chain=above, arguments=lambda one: ["claude", "mcp", "list"]).delivery == "none"


def test_the_arguments_of_a_process_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()", "two words", "ü", ""], stdin=subprocess.PIPE)
    try:
        found = process.look_up(child.pid)
        assert found is not None
        until(lambda: process.arguments(found), "exec")  # during exec, a process has no arguments for a moment
        assert process.arguments(found) == [sys.executable, "-c", "input()", "two words", "ü", ""]
        monkeypatch.setattr(process, "_HAS_PROC", False)
        assert process.arguments(found)[:3] == [sys.executable, "-c", "input()"]
        assert process.arguments(Process(2**22 + 1, "x")) == []
        monkeypatch.undo()
        assert process.arguments(Process(2**22 + 1, "x")) == []
        assert choose("auto").host.pid == os.getppid() or choose("auto").delivery != "none"
    finally:
        child.communicate(b"\n")
