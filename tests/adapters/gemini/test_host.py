"""When Gemini CLI is the agent process, and how its sessions receive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from agentbus.adapters.gemini.host import GeminiCli
from agentbus.adapters.mcp.hosts import Mode
from agentbus.core.process import Process
from tests.support.client import RawClient
from tests.support.command import until

CHAIN = [Process(30, "3"), Process(20, "2"), Process(10, "1")]


def found(*commands: str) -> GeminiCli:
    words = {one: command.split() for one, command in zip(CHAIN, commands, strict=False)}

    def arguments(of: Process) -> Sequence[str]:
        return words.get(of, [])

    return GeminiCli(CHAIN[: len(commands)], arguments)


@pytest.fixture(autouse=True)
def no_gemini(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GEMINI_CLI", raising=False)


@pytest.mark.spec("HOST-5", "VOID-1")
@pytest.mark.parametrize("script", ["/usr/bin/gemini", "gemini", "/x/gemini-cli/bundle/gemini.js"])
def test_the_inner_one_of_two_processes_is_the_agent_process(script: str) -> None:
    inner = f"/usr/bin/node --max-old-space-size=12052 {script} --approval-mode yolo"
    gemini = found("sh -c x", inner, f"node {script}")
    assert (gemini.host.process.pid, gemini.host.is_client) == (20, True)
    choice = gemini.choose("auto")
    assert (choice.mode, choice.delivery) == (Mode.PUSHED, "hook")
    assert "idle" in choice.reason


@pytest.mark.spec("VOID-3", "HOST-5")
def test_a_health_check_is_seen() -> None:
    assert found("node /usr/bin/gemini mcp list").choose("auto").mode is Mode.HEALTH_CHECK
    assert found("node /usr/bin/gemini -d mcp list").choose("pull").mode is Mode.HEALTH_CHECK
    assert found("node /usr/bin/gemini explain mcp list").choose("auto").mode is Mode.PUSHED


@pytest.mark.spec("HOST-5", "VOID-1")
def test_by_another_name_it_is_known_by_what_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("node /x/server.js").choose("auto").reason == "not started by Gemini CLI"
    assert found("node /x/server.js").choose("hook").delivery == "hook"
    monkeypatch.setenv("GEMINI_CLI", "1")
    assert found("node /x/server.js").choose("auto").delivery == "hook"
    assert found("node /x/server.js").choose("pull").reason == "AGENTBUS_DELIVERY is pull"


@pytest.mark.spec("TWIN-1")
def test_started_twice_it_is_one_peer_and_its_socket_goes_with_it(home: Path, start: Callable[..., RawClient]) -> None:
    first = start("backend", adapter="gemini", AGENTBUS_DELIVERY="auto", GEMINI_CLI="1")
    first.handshake()
    second = start("backend", adapter="gemini", AGENTBUS_DELIVERY="auto", GEMINI_CLI="1")
    second.handshake()
    assert "stands aside" in second.refuse("whoami")
    (path,) = (home / "hooks").iterdir()
    first.end()
    (other,) = until(lambda: [one for one in (home / "hooks").iterdir() if one != path])
    assert not path.exists()
    second.end()
    assert not other.exists()
