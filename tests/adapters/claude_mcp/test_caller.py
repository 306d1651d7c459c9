"""Who called a tool, by transcripts as recorded with 2.1.332. A real server whose agent process is this one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from agentbus.adapters.claude_mcp import caller
from agentbus.core.process import current
from tests.support.client import RawClient
from tests.support.command import agentbus

Start = Callable[..., RawClient]
ID = "567b90cf-6c2d-4d61-8422-60d298e9f523"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the transcripts of a session whose process is this one."""
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path))
    here = current()
    (tmp_path / "sessions").mkdir()
    entry = {"pid": here.pid, "procStart": here.started, "sessionId": ID, "cwd": "/src/web"}
    (tmp_path / "sessions" / f"{here.pid}.json").write_text(json.dumps(entry))
    project = tmp_path / "projects" / "-src-web"
    (project / ID / "subagents").mkdir(parents=True)
    (project / f"{ID}.jsonl").write_text("")
    return project


def use(path: Path, tool_use: str, *, is_sidechain: bool) -> None:
    content = [{"type": "tool_use", "id": tool_use, "name": "mcp__agentbus__check_messages", "input": {}}]
    line = {"type": "assistant", "isSidechain": is_sidechain, "message": {"role": "assistant", "content": content}}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.mark.anyio
@pytest.mark.spec("READ-7")
async def test_who_called_is_told_by_the_transcript_that_has_the_tool_use(project: Path) -> None:
    main = project / f"{ID}.jsonl"
    use(main, "toolu_1", is_sidechain=False)
    use(project / ID / "subagents" / "agent-1.jsonl", "toolu_2", is_sidechain=True)
    use(main, "toolu_3", is_sidechain=True)
    with main.open("a") as file:
        file.write('{"type":"user","message":{"content":"toolu_1 toolu_4"}}\n{"type":"assistant","toolu_4"')
    metas = [{"claudecode/toolUseId": f"toolu_{number}"} for number in (1, 2, 3, 4)]
    assert [await caller.is_main_agent(current(), meta) for meta in metas] == [True, False, False, None]
    assert await caller.is_main_agent(current(), {"claudecode/toolUseId": 7}) is None
    assert await caller.is_main_agent(current(), {}) is None


@pytest.mark.spec("READ-7")
def test_a_subagent_takes_no_mail(project: Path, start: Start, home: Path) -> None:
    for number in range(3):
        agentbus(home, "send", "bob", f"m{number}", "--from", "ci")
    bob = start("bob", AGENTBUS_DELIVERY="pull", CLAUDE_CONFIG_DIR=str(project.parents[1]))
    bob.handshake()
    use(project / ID / "subagents" / "agent-1.jsonl", "toolu_sub", is_sidechain=True)
    use(project / f"{ID}.jsonl", "toolu_main", is_sidechain=False)

    def check(tool_use: str) -> str:
        call = {"name": "check_messages", "arguments": {}, "_meta": {"claudecode/toolUseId": tool_use}}
        return bob.result(bob.post("tools/call", call))[0]

    assert check("toolu_sub").endswith("nothing was taken, 3 unread messages left for it to read itself")
    assert check("toolu_main").count("<channel") == 3
    assert check("toolu_main") == "no unread messages"
