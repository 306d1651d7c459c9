"""The registration with Gemini CLI: one folder of ours, in and out, and everything else byte for byte as it was."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from agentbus import registry
from agentbus.adapters.gemini.registration import GeminiRegistration
from agentbus.core import process
from agentbus.core.adapter import Standing
from agentbus.core.findings import Level
from agentbus.core.model import Peer
from tests.support.command import agentbus, program_on_path, succeeds, tree

pytestmark = pytest.mark.timeout(90)

OURS = {f"extensions/agentbus/{name}" for name in ("gemini-extension.json", "hooks/hooks.json", "GEMINI.md")}
OWN = ["/opt/py", "-E", "-P", "-m", "agentbus"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of Gemini CLI, with a file of the user's, and a `gemini` on PATH."""
    made = tmp_path / ".gemini"
    made.mkdir()
    monkeypatch.setenv("GEMINI_CLI_HOME", str(tmp_path))
    (made / "settings.json").write_text('{\n  // mine\n  "mcpServers": {},\n}')
    program_on_path(tmp_path / "bin" / "gemini", "0.61.0", monkeypatch)
    return made


def made() -> GeminiRegistration:
    return GeminiRegistration(registry.manifest("gemini"), own=lambda: OWN)


@pytest.mark.spec("REG-8")
def test_in_and_out_and_every_file_as_it_was(folder: Path, home: Path) -> None:
    before = tree(folder)

    assert "AGENTBUS_NAME=frontend gemini" in succeeds(home, "install")
    after = tree(folder)
    assert set(after) - set(before) == OURS
    assert "nothing was changed" in succeeds(home, "enable", "gemini")
    assert tree(folder) == after
    rows = [json.loads(line) for line in succeeds(home, "list", "--json").splitlines()]
    assert {row["id"]: row["standing"] for row in rows}["gemini"] == "enabled"
    launched = agentbus(home, "launch", "gemini", "backend")
    assert launched.stdout == "AGENTBUS_NAME=backend gemini\n"
    assert "[[rule]]" in launched.stderr
    assert "removed" in succeeds(home, "disable", "gemini")
    assert tree(folder) == before
    assert not (folder / "extensions").exists()
    succeeds(home, "enable", "gemini")
    succeeds(home, "uninstall")
    assert tree(folder) == before


@pytest.mark.spec("REG-8", "ISO-1")
def test_the_hooks_run_our_command_by_the_interpreter_that_is_registered(folder: Path) -> None:
    made().enable()
    said = json.loads((folder / "extensions/agentbus/hooks/hooks.json").read_text())["hooks"]
    assert said.keys() == {"BeforeAgent", "AfterTool", "AfterAgent", "BeforeTool"}
    commands = {hook["command"] for event in said.values() for one in event for hook in one["hooks"]}
    (command,) = map(shlex.split, commands)
    assert command[:-1] == OWN[:-1]
    done = subprocess.run([sys.executable, "-m", command[-1]], input=b"{}", capture_output=True, check=True, timeout=30)
    assert done.stdout + done.stderr == b""
    assert said["BeforeTool"][0]["matcher"] == "^invoke_agent$"


@pytest.mark.spec("REG-8")
def test_a_hook_of_another_agentbus_is_stale_and_is_replaced(folder: Path) -> None:
    made().enable()
    hooks = folder / "extensions/agentbus/hooks/hooks.json"
    hooks.write_text(hooks.read_text().replace("/opt/py", "/old/py"))
    assert made().registered().standing is Standing.STALE
    assert "replaced" in made().enable()[0]
    assert made().registered().standing is Standing.ENABLED


@pytest.mark.spec("DOCTOR-9", "DOCTOR-4")
def test_doctor_says_what_the_settings_do_to_hooks(folder: Path) -> None:
    made().enable()

    def traps(settings: str) -> list[tuple[str, Level]]:
        (folder / "settings.json").write_text(settings)
        return [(one.code, one.level) for one in made().traps()]

    found = {(one.code, one.level): one.seen for one in made().findings()}
    assert "0.61.0" in found["client", Level.OK]
    assert traps("{}") == traps("// a comment") == traps('{"hooksConfig": {"enabled": true, "disabled": ["x"]}}') == []
    assert traps('{"hooksConfig": {"enabled": false}}') == [("plugin", Level.WRONG)]
    assert traps('{"hooksConfig": {"disabled": ["agentbus"]}}') == [("plugin", Level.WRONG)]
    assert traps('{"mcpServers": {"agentbus": {}}}') == [("registration", Level.NOTE)]
    switches = folder / "extensions" / "extension-enablement.json"
    switches.write_text('{"agentbus": {"overrides": ["!/home/me/*"]}}')
    assert traps("{}") == [("plugin", Level.NOTE)]


@pytest.mark.spec("DOCTOR-9")
@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell what a process has as its terminal")
def test_a_session_that_has_lost_its_terminal_is_wrong(folder: Path) -> None:
    def finding(fd: int) -> tuple[Level, str]:
        child = subprocess.Popen(["sleep", "60"], stdin=fd)
        try:
            host = process.look_up(child.pid)
            assert host is not None
            peer = Peer(
                session="s",
                name="backend",
                host=host,
                launch_name="backend",
                process=host,
                runtime="gemini",
                cwd="/x",
                delivery="hook",
                trigger="socket",
                endpoint="",
                started_at=0,
                last_seen=0,
                delivery_reason="idle, it waits",
            )
            found = made().delivery(peer)
            return found.level, found.seen
        finally:
            child.kill()
            child.wait()

    ours, terminal = os.openpty()
    assert finding(terminal) == (Level.NOTE, '"backend" receives by hook: idle, it waits')
    gone = folder / "gone"
    with gone.open("w") as file:
        gone.unlink()
        assert finding(file.fileno())[0] is Level.WRONG
    os.close(ours)
    os.close(terminal)
