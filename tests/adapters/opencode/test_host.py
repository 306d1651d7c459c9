"""When OpenCode is the agent process, and how its sessions receive."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from agentbus.adapters.mcp.hosts import Mode
from agentbus.adapters.opencode.host import OpenCode
from agentbus.core.process import Process

CHAIN = [Process(30, "3"), Process(20, "2"), Process(10, "1")]


def found(*commands: str) -> OpenCode:
    words = {one: command.split() for one, command in zip(CHAIN, commands, strict=False)}

    def arguments(of: Process) -> Sequence[str]:
        return words.get(of, [])

    return OpenCode(CHAIN[: len(commands)], arguments)


@pytest.mark.spec("VOID-3", "HOST-3")
@pytest.mark.parametrize("words", ["mcp list", "mcp ls", "--print-logs mcp list"])
def test_a_health_check_is_seen(words: str) -> None:
    choice = found(f"/usr/bin/opencode {words}").choose("auto")
    assert choice.mode is Mode.HEALTH_CHECK


@pytest.mark.spec("HOST-3")
def test_it_is_known_by_its_pid_whatever_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCODE_PID", "20")
    assert found("sh -c x", "bun src/index.ts mcp list").host.process.pid == 20
    assert found("sh -c x", "elsewhere mcp list").choose("auto").mode is Mode.HEALTH_CHECK
    # What runs below an OpenCode inherits its variables; it is another agent process.
    assert found("other mcp list", "opencode").choose("auto").mode is Mode.PULL


@pytest.mark.spec("VOID-1", "HOST-3")
def test_without_the_plugin_it_pulls_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = found("opencode").choose("auto")
    assert (choice.mode, choice.reason) == (Mode.PULL, "not started by our plugin")
    monkeypatch.setenv("AGENTBUS_OPENCODE_TROUBLE", "/x is not a folder")
    assert "/x is not a folder" in found("opencode").choose("auto").reason
    monkeypatch.setenv("AGENTBUS_OPENCODE_DOOR", "/nowhere/1.sock")
    monkeypatch.setenv("AGENTBUS_OPENCODE_TOKEN", "t")
    choice = found("opencode").choose("plugin")
    assert choice.mode is Mode.PULL
    assert "/nowhere/1.sock is gone" in choice.reason
    assert found("opencode").choose("pull").reason == "AGENTBUS_DELIVERY is pull"
