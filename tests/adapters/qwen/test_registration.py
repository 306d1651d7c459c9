"""The registration with Qwen Code: one folder of ours, in and out, and everything else byte for byte as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentbus import registry
from agentbus.adapters.qwen.registration import QwenRegistration
from agentbus.core.adapter import Standing
from agentbus.core.errors import BrokenSetup
from agentbus.core.findings import Level
from tests.support.command import agentbus, program_on_path, succeeds, tree

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of Qwen Code, with a file of the user's, and a `qwen` on PATH."""
    made = tmp_path / "qwen"
    made.mkdir()
    monkeypatch.setenv("QWEN_HOME", str(made))
    (made / "settings.json").write_text('{\n  // mine\n  "mcpServers": {},\n}')
    program_on_path(tmp_path / "bin" / "qwen", "0.24.4", monkeypatch)
    return made


def made(command: str = "/opt/agentbus") -> QwenRegistration:
    return QwenRegistration(registry.manifest("qwen"), own=lambda: [command])


@pytest.mark.spec("REG-7")
def test_in_and_out_and_every_file_as_it_was(folder: Path, home: Path) -> None:
    before = tree(folder)

    assert "AGENTBUS_NAME=frontend qwen" in succeeds(home, "install")
    after = tree(folder)
    assert set(after) - set(before) == {"extensions/agentbus/qwen-extension.json"}
    assert "nothing was changed" in succeeds(home, "enable", "qwen")
    assert tree(folder) == after
    rows = [json.loads(line) for line in succeeds(home, "list", "--json").splitlines()]
    assert {row["id"]: row["standing"] for row in rows}["qwen"] == "enabled"
    assert agentbus(home, "launch", "qwen", "backend").stdout == "AGENTBUS_NAME=backend qwen\n"
    assert "removed" in succeeds(home, "disable", "qwen")
    assert tree(folder) == before
    assert not (folder / "extensions").exists()
    assert "nothing to do" in succeeds(home, "disable", "qwen")
    succeeds(home, "enable", "qwen")
    succeeds(home, "uninstall")
    assert tree(folder) == before


@pytest.mark.spec("REG-7")
def test_what_is_not_ours_is_left_alone(folder: Path) -> None:
    theirs = folder / "extensions" / "agentbus" / "qwen-extension.json"
    theirs.parent.mkdir(parents=True)
    for text in ('{"name": "agentbus", "description": "mine"}', "{"):
        theirs.write_text(text)
        assert made().registered().standing is Standing.UNKNOWN
        for change in (made().enable, made().disable):
            with pytest.raises(BrokenSetup):
                change()
        assert theirs.read_text() == text
    theirs.unlink()
    theirs.parent.rmdir()
    made().enable()
    beside = theirs.with_name("notes.txt")
    beside.write_text("mine")
    assert "stays" in made().disable()[1]
    assert tree(folder).keys() == {"settings.json", "extensions/agentbus/notes.txt"}


@pytest.mark.spec("REG-7")
def test_what_another_agentbus_has_written_is_stale_and_is_replaced(folder: Path) -> None:
    made("/old/agentbus").enable()
    assert made().registered().standing is Standing.STALE
    assert "replaced" in made().enable()[0]
    assert made().registered().standing is Standing.ENABLED
    assert "/opt/agentbus" in made().registered().seen


@pytest.mark.spec("DOCTOR-8", "DOCTOR-4")
def test_doctor_says_what_the_settings_do_to_messages(folder: Path) -> None:
    made().enable()

    def plugin(settings: str) -> list[str]:
        (folder / "settings.json").write_text(settings)
        return [one.seen for one in made().findings() if one.code == "plugin"]

    found = {(one.code, one.level): one.seen for one in made().findings()}
    assert "0.24.4" in found["client", Level.OK]
    assert plugin("{}") == plugin("// a comment") == plugin('{"agents": {"crossSessionInbound": "accept"}}') == []
    assert "crossSessionMessaging off" in plugin('{"agents": {"crossSessionMessaging": false}}')[0]
    assert "/peers" in plugin('{"agents": {"crossSessionInbound": "hold"}}')[0]
    assert "turned away" in plugin('{"agents": {"crossSessionInbound": "refuse"}}')[0]
