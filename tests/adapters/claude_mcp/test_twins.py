"""What one Claude Code process starts, whatever it is called: real sessions under a stand-in."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentbus.adapters.claude_mcp import twins
from agentbus.adapters.claude_mcp.host import choose, own_wish
from agentbus.core import config
from agentbus.core.process import current, look_up
from tests.adapters.claude_mcp.test_inbox import Plain, _peers, folder, plain  # noqa: F401 - fixtures
from tests.adapters.claude_mcp.test_records import ID, write
from tests.support.client import RawClient
from tests.support.command import agentbus, until
from tests.support.inbox_stand_in import TOKEN, InboxStandIn

pytestmark = pytest.mark.timeout(120)
BYPASS = "bypassPermissions"


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[InboxStandIn]:
    made = InboxStandIn(Path(f"/tmp/ab-{os.getpid()}") / "1.sock")
    yield made
    made.close()
    made.path.parent.rmdir()


@pytest.mark.spec("HOST-1")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who listens")
def test_a_claude_of_another_name_is_recognised_by_its_inbox(
    inbox: InboxStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> str:
        return choose("auto", chain=[current()], arguments=lambda _one: ["/x/versions/2.1.332"]).delivery

    monkeypatch.setenv("CLAUDE_CODE_MESSAGING_SOCKET", str(inbox.path))
    monkeypatch.setenv("CLAUDE_CODE_MESSAGING_TOKEN", TOKEN)
    assert found() == "channel?", "nothing says that it is Claude Code"
    monkeypatch.setenv("CLAUDECODE", "1")
    assert found() == "inbox"


@pytest.mark.spec("HOST-1", "HOST-2")
def test_a_registry_entry_makes_it_claude_and_names_a_background_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path))
    (tmp_path / "sessions").mkdir()

    def named(word: str = "node", **changes: str) -> str:
        write(tmp_path, **changes)
        asked = config.load({"AGENTBUS_NAME": "somebody"}, home=tmp_path)
        return own_wish(asked, "/home/me/folder", chain=[current()], arguments=lambda _one: [word]).name

    bg = {"kind": "background"}
    assert named(**bg) == "somebody", "not Claude Code"
    monkeypatch.setenv("CLAUDECODE", "1")
    assert choose("auto", chain=[current()], arguments=lambda _one: ["x"]).delivery == "pull"
    assert named() == "somebody"
    assert named(**bg) == named("claude bg-spare") == "my-project"
    assert named(**bg, name="Tester", nameSource="user") == "tester"
    assert named(kind="bg", name="my task", nameSource="peer") == "my-task"
    assert named(kind="bg", name="ok 4", nameSource="auto") == "my-project"
    later = threading.Timer(0.05, write, [tmp_path], {"kind": "bg", "name": "my task", "nameSource": "peer"})
    later.start()
    assert named(kind="bg", name="my task", nameSource=None, status="idle") == "my-task", "said a moment later"
    later.join()
    assert named(kind="bg", name="my task", nameSource=None, status="busy") == "my-project", "nobody named it"
    (tmp_path / "sessions" / f"{current().pid}.json").unlink()
    monkeypatch.setenv("CLAUDE_JOB_DIR", "/jobs/1")
    later = threading.Timer(0.05, write, [tmp_path], {"kind": "bg", "name": "my task", "nameSource": "peer"})
    later.start()
    asked = config.load({"AGENTBUS_NAME": "somebody"}, home=tmp_path)
    assert own_wish(asked, "", chain=[current()], arguments=lambda _one: ["claude"]).name == "my-task", "no entry yet"
    later.join()
    assert named(kind="interactive") == "somebody", "one that was started in the shell of such a session"
    write(tmp_path, kind="bg", name="Tester", nameSource="user")
    unasked = own_wish(config.load({}, home=tmp_path), "", chain=[current()], arguments=lambda _one: ["node"])
    assert (unasked.name, unasked.name_note, unasked.name_was_asked) == ("tester", "", False)


@pytest.mark.spec("TWIN-2", "TWIN-1")
def test_an_entry_and_a_plugin_are_named_with_what_removes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path))
    entry = {"mcpServers": {"agentbus": {"command": "agentbus", "args": ["serve", "claude-mcp"]}}}
    for path, content in {
        ".claude.json": entry,
        "settings.json": {"enabledPlugins": {"agentbus@market": True, "x@y": True, "off@y": False}},
        "plugins/installed_plugins.json": {"plugins": {"agentbus@market": [{"installPath": str(tmp_path / "p")}]}},
        "p/.mcp.json": entry,
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(json.dumps(content))
    assert [one.remove for one in twins.started_by(tmp_path)] == [
        "claude mcp remove -s user agentbus",
        "claude plugin uninstall agentbus@market",
    ]
    assert "the plugin agentbus@market, which `claude plugin uninstall" in twins.twin(tmp_path)
    monkeypatch.setenv("CLAUDE_PLUGIN_ROOT", "/p")
    assert "which `claude mcp remove -s user agentbus` removes" in twins.twin(tmp_path)
    # The name of a folder is only a name.
    here = tmp_path / "{x}{0}\n\x1b[2J"
    here.mkdir()
    (here / ".mcp.json").write_text(json.dumps({"mcpServers": {"our\nbus": entry["mcpServers"]["agentbus"]}}))
    said = twins.twin(here)
    assert said.isprintable()
    assert "{x}{0}\\n\\x1b[2J/.mcp.json, which `claude mcp remove -s project 'our\\nbus'` removes" in said


@pytest.mark.spec("BYPASS-2")
def test_a_session_whose_mode_changes_holds_its_mail_and_says_so_both_ways(
    home: Path,
    tmp_path: Path,
    plain: Callable[..., Plain],  # noqa: F811 - a fixture
) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"permissions": {"defaultMode": BYPASS}}))
    session = plain(CLAUDE_CONFIG_DIR=str(tmp_path))
    agentbus(home, "send", "web", "one")
    assert _peers(home)[0]["delivery"] == "pull"
    assert "settings.json), see AGENTBUS_BYPASS" in session.client.call("whoami")
    assert session.messages() == []
    host = session.client.process.pid
    seen = look_up(host)
    assert seen is not None
    (tmp_path / "sessions").mkdir(exist_ok=True)
    write(tmp_path, startedAt=int(time.time() * 1_000))
    written = tmp_path / "sessions" / f"{os.getpid()}.json"
    fields = {**json.loads(written.read_text()), "pid": host, "procStart": seen.started}
    (tmp_path / "sessions" / f"{host}.json").write_text(json.dumps(fields))
    path = tmp_path / "projects" / "-home-me-my-project" / f"{ID}.jsonl"
    path.parent.mkdir(parents=True)
    line = {"type": "user", "timestamp": "2099-01-01T00:00:00.000Z"}
    path.write_text(json.dumps({**line, "permissionMode": "default"}) + "\n")
    until(session.messages, "the message")
    until(lambda: _peers(home)[0]["delivery"] == "inbox")
    with path.open("a") as file:
        file.write(json.dumps({**line, "permissionMode": BYPASS}) + "\n")
    until(lambda: _peers(home)[0]["delivery"] == "pull")


@pytest.mark.spec("TWIN-1")
def test_a_second_server_stands_aside_and_takes_over(home: Path, tmp_path: Path) -> None:
    # A stand-in that starts two servers: the first on pipes that nobody uses, the second on its own stdin and stdout.
    script = tmp_path / "claude"
    serve = '[sys.executable, "-m", "agentbus", "serve", "claude-mcp"]'
    script.write_text(
        f"#!{sys.executable}\nimport subprocess, sys, time, pathlib\n"
        f"first = subprocess.Popen({serve}, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)\n"
        f"db = pathlib.Path({str(home / 'live')!r})\n"
        "while not (db.is_dir() and list(db.iterdir())): time.sleep(0.01)\n"
        f"sys.exit(subprocess.call({serve}))\n"
    )
    script.chmod(0o755)
    client = RawClient(home, "web", command=[str(script)], AGENTBUS_DELIVERY="pull")
    try:
        client.handshake()
        (first,) = _peers(home)
        said = client.refuse("list_peers")
        assert f'process {first["pid"]} is the peer "web" of this very session' in said
        assert "claude mcp list" in said
        assert client.refuse("send_message", to="x", text="y") == said
        agentbus(home, "send", "web", "waits")
        os.kill(first["pid"], signal.SIGKILL)
        until(lambda: "waits" in client.result(client.post_call("check_messages"))[0], "that it takes over")
        (second,) = _peers(home)
        assert (second["name"], second["pid"] != first["pid"]) == ("web", True)
    finally:
        client.end()
