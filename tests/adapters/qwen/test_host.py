"""When Qwen Code is the agent process, which session it has, and how that receives."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from agentbus.adapters.mcp.hosts import Choice, Mode
from agentbus.adapters.qwen.host import choose
from agentbus.adapters.qwen.records import Chat, session_id
from agentbus.core.process import Process, current
from tests.support.inbox_stand_in import TOKEN
from tests.support.qwen_stand_in import SESSION, QwenStandIn

CHAIN = [Process(30, "3"), Process(20, "2"), Process(10, "1")]


def found(*commands: str, asked: str = "auto") -> Choice:
    words = {one: command.split() for one, command in zip(CHAIN, commands, strict=False)}

    def arguments(of: Process) -> Sequence[str]:
        return words.get(of, [])

    return choose(asked, chain=CHAIN[: len(commands)], arguments=arguments)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of Qwen Code's records; none of its variables is set."""
    for name in ("QWEN_CODE_MESSAGING_SOCKET", "QWEN_CODE_MESSAGING_TOKEN", "QWEN_CODE_SESSION_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("QWEN_HOME", str(tmp_path))
    (tmp_path / "sessions").mkdir()
    return tmp_path


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch, short: Path) -> Iterator[QwenStandIn]:
    made = QwenStandIn(short / "in" / "1.sock")
    monkeypatch.setenv("QWEN_CODE_MESSAGING_SOCKET", str(made.path))
    monkeypatch.setenv("QWEN_CODE_MESSAGING_TOKEN", TOKEN)
    yield made
    made.close()


@pytest.mark.spec("VOID-3", "HOST-4")
@pytest.mark.parametrize(
    "command", ["node /x/bin/qwen", "node --expose-gc /x/@qwen-code/qwen-code/cli.js", "/usr/bin/qwen"]
)
def test_a_health_check_is_no_session(command: str) -> None:
    for words in ("mcp list", "mcp --debug list"):
        choice = found("sh -c x", f"{command} {words}")
        assert (choice.mode, choice.delivery) == (Mode.HEALTH_CHECK, "none")
    assert found(command).mode is Mode.PULL
    assert found(f"{command} -p mcp").mode is Mode.PULL
    # What runs below it is another agent process.
    assert found("other mcp list", f"{command} mcp list").mode is Mode.PULL
    assert found("node /x/other.js mcp list").mode is Mode.PULL


@pytest.mark.spec("VOID-1", "VOID-2", "HOST-4")
def test_without_an_inbox_it_pulls_and_says_why() -> None:
    assert "agents.crossSessionMessaging" in found("node /x/qwen").reason
    assert found("node /x/qwen", asked="pull").reason == "AGENTBUS_DELIVERY is pull"


@pytest.mark.spec("HOST-4", "INBOX-5")
@pytest.mark.usefixtures("far")
def test_who_listens_on_the_inbox_is_the_host_whatever_it_is_called() -> None:
    ours = current()
    choice = choose("auto", chain=[CHAIN[0], ours], arguments=lambda _one: ["renamed"])
    assert (choice.host, choice.delivery) == (ours, "inbox")
    # An inbox that an outer Qwen Code has handed down is not the inbox of this one.
    inner = choose("auto", chain=[CHAIN[0]], arguments=lambda _one: ["node", "/x/qwen"])
    assert (inner.host, inner.delivery) == (CHAIN[0], "pull")
    assert "belongs to process" in inner.reason


@pytest.mark.spec("QWEN-1", "QWEN-4")
def test_the_session_is_that_of_the_record_and_changes_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = current()
    monkeypatch.setenv("QWEN_CODE_PROJECT_DIR", "/p")
    chat = Chat(host)
    assert session_id(host) == chat.place() == ""
    monkeypatch.setenv("QWEN_CODE_SESSION_ID", SESSION)
    assert session_id(host) == SESSION
    record = folder / "sessions" / f"{host.pid}.json"
    good = {"pid": host.pid, "procStart": f"boot:{host.started}", "sessionId": "another-session"}
    record.write_text(json.dumps(good))
    assert session_id(host) == "another-session"
    assert chat.place() == "/p/chats/another-session.jsonl"
    for bad in ({"pid": 1}, {"procStart": "boot:1"}, {"sessionId": "../../x"}, {"sessionId": 7}):
        record.write_text(json.dumps({**good, **bad}))
        assert session_id(host) == ""
    record.write_text("[")
    assert session_id(host) == ""
    # What cannot be told now does not take the place of what was told.
    assert chat.place() == "/p/chats/another-session.jsonl"
