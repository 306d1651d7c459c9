"""The registration with OpenCode: one file of ours, in and out, and everything else byte for byte as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentbus import registry
from agentbus.adapters.opencode.registration import OpenCodeRegistration
from agentbus.core.adapter import Standing
from agentbus.core.errors import BrokenSetup
from agentbus.core.findings import Level
from tests.support.command import agentbus, program_on_path, succeeds, tree

pytestmark = pytest.mark.timeout(90)

CONFIG = (
    '{\n  // the user\'s own\n  "mcp": {"other": {"command": ["x"]}, /* "agentbus" */ },\n  "url": "https://a//b",\n}\n'
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of OpenCode's configuration, with a file of the user's, and an `opencode` on PATH."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("OPENCODE_PURE", raising=False)
    made = tmp_path / "config" / "opencode"
    made.mkdir(parents=True)
    (made / "opencode.jsonc").write_text(CONFIG)
    program_on_path(tmp_path / "bin" / "opencode", "1.18.33", monkeypatch)
    return made


def made(command: str = "/opt/agentbus") -> OpenCodeRegistration:
    return OpenCodeRegistration(registry.manifest("opencode"), own=lambda: [command])


@pytest.mark.spec("REG-6")
def test_in_and_out_and_every_file_as_it_was(folder: Path, home: Path) -> None:
    before = tree(folder)

    assert "wrote" in succeeds(home, "enable", "opencode")
    after = tree(folder)
    assert set(after) - set(before) == {"plugin/agentbus.js"}
    assert "nothing was changed" in succeeds(home, "enable", "opencode")
    assert tree(folder) == after
    rows = [json.loads(line) for line in succeeds(home, "list", "--json").splitlines()]
    assert {row["id"]: row["standing"] for row in rows}["opencode"] == "enabled"
    assert succeeds(home, "launch", "opencode", "backend") == "AGENTBUS_NAME=backend opencode\n"
    assert "removed" in succeeds(home, "disable", "opencode")
    assert tree(folder) == before
    assert not (folder / "plugin").exists()
    assert "nothing to do" in succeeds(home, "disable", "opencode")
    succeeds(home, "enable", "opencode")
    succeeds(home, "uninstall")
    assert tree(folder) == before
    assert not home.exists()


@pytest.mark.spec("MOD-3")
def test_install_offers_it_where_it_is(folder: Path, home: Path) -> None:
    done = agentbus(home, "install")
    assert (done.returncode, done.stderr) == (0, "")
    assert "AGENTBUS_NAME=frontend opencode" in done.stdout
    assert (folder / "plugin" / "agentbus.js").exists()


@pytest.mark.spec("REG-6")
def test_a_file_that_is_not_ours_is_left_alone(folder: Path) -> None:
    theirs = folder / "plugin" / "agentbus.js"
    theirs.parent.mkdir()
    theirs.write_text("export const Mine = 1\n")
    assert made().registered().standing is Standing.UNKNOWN
    for change in (made().enable, made().disable):
        with pytest.raises(BrokenSetup, match="is not from agentbus"):
            change()
    assert theirs.read_text() == "export const Mine = 1\n"


@pytest.mark.spec("REG-6")
def test_what_another_agentbus_has_written_is_stale_and_is_replaced(folder: Path) -> None:
    made("/old/agentbus").enable()
    assert made().registered().standing is Standing.STALE
    other = folder / "plugin" / "other.js"
    other.write_text("")
    assert "replaced" in made().enable()[0]
    assert made().registered().standing is Standing.ENABLED
    made().disable()
    assert tree(folder).keys() == {"opencode.jsonc", "plugin/other.js"}


@pytest.mark.spec("DOCTOR-7", "DOCTOR-4")
def test_doctor_names_the_traps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made().enable()
    found = {(one.code, one.level): one.seen for one in made().findings()}
    assert "1.18.33" in found["client", Level.OK]
    assert "waits at its start" in found["plugin", Level.NOTE]
    assert ("plugin", Level.WRONG) not in found
    assert ("registration", Level.NOTE) not in found
    (folder / "node_modules" / "@opencode-ai" / "plugin").mkdir(parents=True)
    monkeypatch.setenv("OPENCODE_PURE", "1")
    (folder / "opencode.json").write_text(
        '{"mcp": {"agentbus": {"type": "local", "command": ["agentbus", "serve", "mcp"],},}}'
    )
    found = {(one.code, one.level): one.seen for one in made().findings()}
    assert ("plugin", Level.NOTE) not in found
    assert "OPENCODE_PURE" in found["plugin", Level.WRONG]
    assert "(agentbus serve mcp)" in found["registration", Level.NOTE]
