"""The permission mode: from flags, settings and transcripts as Claude Code 2.1.332 writes them, and what is held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentbus.adapters.claude_mcp import mode
from agentbus.adapters.claude_mcp.mode import PermissionMode, settings_of, stated
from agentbus.adapters.mcp.hold import HeldDelivery
from agentbus.core.errors import DeliveryFailed
from agentbus.core.process import current
from tests.adapters.claude_mcp.test_records import ID, write
from tests.support.fakes import envelope

BYPASS = "bypassPermissions"
SETTINGS = json.dumps({"permissions": {"defaultMode": BYPASS}})
STARTED = 1_764_100_000_000
BEFORE, AFTER = "2020-01-01T00:00:00.000Z", "2030-01-01T00:00:00.000Z"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path / "config"))
    (tmp_path / "config" / "sessions").mkdir(parents=True)
    return tmp_path


@pytest.mark.spec("BYPASS-1")
def test_flags_and_settings_say_the_mode(folder: Path) -> None:
    def asked(*words: str) -> str:
        return stated(["claude", *words], str(folder), folder / "managed")[0]

    assert asked() == ""
    assert asked("say bypassPermissions", "--permission-mode", "plan") == "plan"
    for words in (["--dangerously-skip-permissions"], ["--permission-mode", BYPASS], [f"--permission-mode={BYPASS}"]):
        assert asked(*words) == BYPASS
    (folder / "more.json").write_text(SETTINGS)
    for said in (SETTINGS, "more.json", str(folder / "more.json")):
        assert asked("--settings", said) == asked(f"--settings={said}") == BYPASS
    assert asked("--settings", "nowhere.json") == asked("--settings", "{") == asked("--settings", "[1]") == ""
    for path in (folder / "config" / "settings.json", folder / "managed" / "managed-settings.json"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(SETTINGS)
        assert asked() == BYPASS
        assert asked("--permission-mode", "default") == "default"
        path.unlink()


def transcript(folder: Path, *lines: dict[str, Any]) -> None:
    path = folder / "config" / "projects" / "-home-me-my-project" / f"{ID}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def turn(said: str, at: str = AFTER, **more: Any) -> dict[str, Any]:
    return {"type": "user", "permissionMode": said, "timestamp": at, "isSidechain": False, **more}


@pytest.mark.spec("BYPASS-1")
def test_the_newest_line_of_the_transcript_stands_above_the_start(folder: Path) -> None:
    write(folder / "config", startedAt=STARTED)
    plain = PermissionMode(current(), ["claude"], "", folder)
    bypass = PermissionMode(current(), ["claude", "--dangerously-skip-permissions"], "", folder)
    assert (plain.bypass(), bypass.bypass()) == ("", "--dangerously-skip-permissions")
    # What an earlier process has recorded: it can add bypass, and take none away.
    transcript(folder, turn("default", BEFORE))
    assert (plain.bypass(), bypass.bypass()) == ("", "--dangerously-skip-permissions")
    transcript(folder, turn(BYPASS, BEFORE))
    assert plain.bypass() == "its transcript"
    transcript(folder, turn("default"), turn(BYPASS, isSidechain=True), {"type": "assistant", "permissionMode": BYPASS})
    assert (plain.bypass(), bypass.bypass()) == ("", "")
    transcript(folder, {"type": "permission-mode", "permissionMode": BYPASS})
    assert plain.bypass() == bypass.bypass() == "its transcript"
    transcript(folder, {"type": "user", "message": "x" * mode._TAIL_BYTES})
    assert plain.bypass() == "its transcript", "it is remembered"


@pytest.mark.anyio
@pytest.mark.spec("BYPASS-2")
async def test_what_is_held_is_reported_both_ways_and_goes_out_later() -> None:
    why, reports, handed = [""], [], []

    class Inner:
        carrier, trouble = "inbox", ""

        async def ready(self) -> None: ...

        async def deliver(self, batch: Any) -> Any:
            handed.extend(batch)

    async def report(trouble: str) -> None:
        reports.append(trouble)

    held = HeldDelivery(Inner(), lambda: why[0], report)
    assert HeldDelivery(Inner(), lambda: "bypass", report).trouble == "bypass", "known from the start"
    why[0] = "bypass"
    for _ in range(2):
        with pytest.raises(DeliveryFailed):
            await held.deliver([envelope(1)])
    assert (held.trouble, handed) == ("bypass", [])
    why[0] = ""
    await held.deliver([envelope(1)])
    assert (held.trouble, reports, len(handed)) == ("", ["bypass", ""], 1)


@pytest.mark.spec("BYPASS-1")
def test_an_agent_process_whose_arguments_cannot_be_read_has_its_settings(tmp_path: Path) -> None:
    assert stated((), str(tmp_path), tmp_path / "managed")[0] == ""
    (tmp_path / ".claude").mkdir()
    local = tmp_path / ".claude" / "settings.json"
    local.write_text('{"permissions": {"defaultMode": "bypassPermissions"}}')
    assert stated((), str(tmp_path), tmp_path / "managed") == ("bypassPermissions", str(local))
    assert str(local) in [where for found, where in settings_of((), str(tmp_path), tmp_path / "managed") if found]
