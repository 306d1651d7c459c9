"""install, list, launch, uninstall as a person types them. See also adapters/claude_mcp/test_registration."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from agentbus import registry
from agentbus.cli import setup
from tests.support.client import RawClient
from tests.support.command import ClaudeOnPath, agentbus, claude_on_path

pytestmark = pytest.mark.timeout(90)  # a loaded machine takes seconds for one process


@pytest.fixture
def claude(tmp_path: Path) -> ClaudeOnPath:
    return claude_on_path(tmp_path / "claude")


def run(home: Path, claude: ClaudeOnPath, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return agentbus(home, *arguments, cwd=claude.folder, **{**claude.variables, **variables})


@pytest.mark.spec("MOD-3", "MOD-4")
def test_install_registers_and_says_what_to_run_next(home: Path, claude: ClaudeOnPath) -> None:
    done = run(home, claude, "install")
    assert (done.returncode, done.stderr) == (0, "")
    assert claude.entry() is not None
    for name in ("frontend", "backend"):
        assert f"  AGENTBUS_NAME={name} claude\n" in done.stdout
    launched = run(home, claude, "launch", "claude-mcp", "backend")
    for said in (done.stdout, launched.stderr):
        assert "nattended, a session waits in the permission dialog of its own reply" in said
        assert "--allowedTools mcp__agentbus" in said
        assert "It may then send to every name without being asked" in said
    assert launched.stderr.count("\n") == 1
    assert launched.stdout == ("AGENTBUS_NAME=backend claude --dangerously-load-development-channels server:agentbus\n")
    assert not home.exists(), "installing makes no bus; the first message does"
    again = run(home, claude, "install")
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith("agentbus is already registered with Claude Code, nothing was changed\n")
    assert len([call for call in claude.calls() if call[:2] == ["mcp", "add-json"]]) == 1


@pytest.mark.spec("MOD-3")
def test_launch_prints_a_command_and_says_what_is_missing_beside_it(home: Path, claude: ClaudeOnPath) -> None:
    done = run(home, claude, "launch", "claude-mcp", "Night Build")
    assert done.returncode == 0
    assert done.stdout.startswith("AGENTBUS_NAME=night-build claude ")
    assert "claude-mcp is not enabled: " in done.stderr
    assert "(agentbus enable claude-mcp)" in done.stderr
    plain = run(home, claude, "launch", "claude-mcp", PATH="/nowhere")
    assert plain.stdout == "claude --dangerously-load-development-channels server:agentbus\n"
    assert "agentbus: claude is not on PATH\n" in plain.stderr
    bad = run(home, claude, "launch", "claude-mcp", "!!")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert '"!!" is not a name' in bad.stderr


@pytest.mark.parametrize("verb", ["enable", "disable", "launch", "serve"])
def test_a_module_that_is_none_is_exit_2(home: Path, claude: ClaudeOnPath, verb: str) -> None:
    done = run(home, claude, verb, "carrier-pigeon")
    assert (done.returncode, done.stdout) == (2, "")
    known = "claude-mcp or codex or gemini or mcp or opencode or qwen"
    assert done.stderr == f"agentbus: there is no module 'carrier-pigeon': use {known}\n"
    assert claude.calls() == []


@pytest.mark.spec("MOD-2")
def test_list_says_how_each_stands(home: Path, claude: ClaudeOnPath) -> None:
    shown = run(home, claude, "list")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.splitlines() == [
        "claude-mcp  Claude Code: not enabled",
        "  An MCP server over stdio: tools to send, channel events to receive.",
        f"  not registered in {claude.home / '.claude.json'}",
        "  fix it: agentbus enable claude-mcp",
        "codex  Codex: not enabled",
        "  An MCP server over stdio: tools to send, Codex's own app server to receive.",
        f"  not registered in {claude.home / '.codex' / 'config.toml'}",
        "  fix it: agentbus enable codex",
        "gemini  Gemini CLI: not enabled",
        "  An MCP server over stdio, and hooks that bring what comes while the session works.",
        f"  there is no {claude.home / '.gemini' / 'extensions' / 'agentbus'}",
        "  fix it: agentbus enable gemini",
        "mcp  any MCP client: unknown",
        "  An MCP server over stdio for any client: tools to send, check_messages to receive.",
        "  agentbus cannot see which clients start it",
        "  fix it: agentbus enable mcp prints what to paste into its configuration",
        "opencode  OpenCode: not enabled",
        "  An MCP server over stdio, and a plugin that puts messages into the session.",
        f"  there is no {claude.home / '.config' / 'opencode' / 'plugin' / 'agentbus.js'}",
        "  fix it: agentbus enable opencode",
        "qwen  Qwen Code: not enabled",
        "  An MCP server over stdio, and the session's own inbox for what comes.",
        f"  there is no {claude.home / '.qwen' / 'extensions' / 'agentbus'}",
        "  fix it: agentbus enable qwen",
    ]
    run(home, claude, "install")
    assert "claude-mcp  Claude Code: enabled\n" in run(home, claude, "list").stdout
    assert claude.calls()[1:] == [], "listing reads Claude's file and starts no claude"


@pytest.mark.spec("MOD-1")
def test_a_broken_manifest_is_a_finding_and_the_others_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    adapters = tmp_path / "adapters"
    for name, text in (
        ("a-broken", "{"),
        ("b-whole", Path(registry._ADAPTERS, "claude_mcp", "module.json").read_text()),
        ("c-missing", json.dumps({**_manifest(), "id": "c", "registration": "agentbus.nowhere:made"})),
        ("d-broken", json.dumps({**_manifest(), "id": "d", "registration": "agentbus.registry"})),
    ):
        adapters.joinpath(name).mkdir(parents=True)
        adapters.joinpath(name, "module.json").write_text(text)
    monkeypatch.setattr(registry, "_ADAPTERS", adapters)
    assert setup.show(as_json=True) == 1
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(row["id"], row["standing"]) for row in rows] == [
        ("claude-mcp", "not enabled"),
        ("?", "broken"),
        ("?", "broken"),
        ("c", "broken"),
    ]
    assert str(adapters / "a-broken" / "module.json") in rows[1]["seen"]
    assert "the module c cannot be loaded" in rows[3]["seen"]
    assert setup.show(as_json=False) == 1
    assert "c: broken\n" in capfd.readouterr().out


def _manifest() -> dict[str, object]:
    found: dict[str, object] = json.loads(Path(registry._ADAPTERS, "claude_mcp", "module.json").read_text())
    return found


# -- uninstall ---------------------------------------------------------------------------------------------


@pytest.mark.spec("UNINST-1", "UNINST-2")
def test_uninstall_removes_what_is_ours_and_says_what(
    home: Path, claude: ClaudeOnPath, start: Callable[..., RawClient]
) -> None:
    run(home, claude, "install")
    run(home, claude, "send", "nobody", "hi")
    session = start("web")
    session.handshake()

    refused = run(home, claude, "uninstall")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        "agentbus: 1 session is online (web), nothing was removed: end them first, or use --force\n"
    )
    assert claude.entry() is not None
    session.end()

    # The leftovers of a killed session are ours too; a file that somebody else put there is not.
    (home / "sock" / "notes.txt").write_text("mine")
    done = run(home, claude, "uninstall")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith("removed agentbus from Claude Code")
    assert f"removed {home / 'bus.db'} (1 message waited in it)" in done.stdout.splitlines()
    assert f"kept {home}: it holds files that are not from agentbus (sock/notes.txt)" in done.stdout.splitlines()
    assert claude.entry() is None
    assert sorted(path.name for path in home.rglob("*")) == ["notes.txt", "sock"]

    (home / "sock" / "notes.txt").unlink()
    done = run(home, claude, "uninstall")
    assert done.returncode == 0
    assert f"removed {home}" in done.stdout.splitlines()
    assert not home.exists()
    again = run(home, claude, "uninstall")
    assert again.returncode == 0
    assert f"nothing to remove in {home}" in again.stdout


@pytest.mark.spec("UNINST-1")
def test_mail_can_be_kept(home: Path, claude: ClaudeOnPath) -> None:
    run(home, claude, "send", "bob", "keep me")
    done = run(home, claude, "uninstall", "--keep-mail")
    assert done.returncode == 0
    assert f"kept {home / 'bus.db'}: mailboxes and history" in done.stdout
    assert "keep me" in run(home, claude, "inbox", "bob").stdout


@pytest.mark.spec("UNINST-1")
def test_forced_it_goes_on_beside_a_live_session(
    home: Path, claude: ClaudeOnPath, start: Callable[..., RawClient]
) -> None:
    start("web").handshake()
    done = run(home, claude, "uninstall", "--force")
    assert (done.returncode, done.stderr) == (0, "")
    assert "sessions are still running" in done.stdout
    assert f"removed {home / 'bus.db'}" in done.stdout


@pytest.mark.spec("UNINST-1")
def test_a_registration_that_cannot_be_removed_leaves_the_mail(home: Path, claude: ClaudeOnPath) -> None:
    run(home, claude, "install")
    run(home, claude, "send", "bob", "hi")
    done = run(home, claude, "uninstall", STAND_IN_FAIL="remove")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert (home / "bus.db").exists()
    gone = run(home, claude, "uninstall", PATH="/nowhere")
    assert gone.returncode == 1
    sentence = (
        "claude is not on PATH, nothing was changed: run this where it is on PATH: claude mcp remove -s user agentbus\n"
    )
    assert gone.stderr == "agentbus: " + sentence
    assert (home / "bus.db").exists()


@pytest.mark.spec("UNINST-2")
def test_what_is_not_ours_is_not_touched(home: Path, claude: ClaudeOnPath, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.wake").write_text("")
    home.mkdir(mode=0o700)
    (home / "wake").symlink_to(elsewhere)
    (home / "bus.db").write_bytes(b"somebody's notes" * 100)
    done = run(home, claude, "uninstall", "--keep-mail")
    assert done.returncode == 0
    assert "agentbus cannot tell which sessions are online" in done.stderr
    assert (elsewhere / "x.wake").exists()
    linked = home.with_name("linked")
    linked.symlink_to(home)
    done = agentbus(linked, "uninstall", **claude.variables)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{linked} is a symlink" in done.stderr
    assert os.path.exists(home / "bus.db")


@pytest.mark.spec("UNINST-2")
def test_what_others_put_into_our_folders_is_left_and_named(home: Path, claude: ClaudeOnPath) -> None:
    run(home, claude, "send", "nobody", "hi")
    count = f"{1:12.6f} {2:20.6f}\n"
    ours = {
        "wake/0123456789ab.wake": "",
        "rate/4711-8282": count,
        "rate/4711-Fri_Nov_27_10_36_42_2026": count,
        "bus.db-owner.new-4711": "",
        "bus.db.new-4711-wal": "",
    }
    theirs = {
        "wake/calendar.ics": "BEGIN:VCALENDAR",
        "wake/thesis.wake": "chapter 1",
        "rate/thesis.txt": "chapter 1",
        "rate/2026-11": "the bills of November",
        "rate/2026-calendar": "a month",
        "bus.db.new-year.txt": "plans",
    }
    for name, text in {**ours, **theirs}.items():
        (home / name).parent.mkdir(exist_ok=True, mode=0o700)
        (home / name).write_text(text)
    (home / "rate" / "4712-1").mkdir()
    done = run(home, claude, "uninstall")
    assert (done.returncode, done.stderr) == (0, "")
    assert {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()} == set(theirs)
    named = sorted([*theirs, "rate/4712-1"])
    assert f"it holds files that are not from agentbus ({', '.join(named)})" in done.stdout
    kept = run(home, claude, "uninstall", "--keep-mail")
    assert f"({', '.join(named)})" in kept.stdout
