"""A trigger is one file and one line, an adapter is one folder: everything else follows from that.

The tests add a trigger and an adapter that nothing else knows, and ask the parts that loop over all of them.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentbus import registry
from agentbus.cli import setup
from agentbus.core import config
from agentbus.core.errors import InvalidRequest
from agentbus.doctor.environment import check_home, check_settings
from agentbus.doctor.peers import check_peers

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "agentbus"
# The whole file of a new trigger: the contract suite holds it to the rest of the port.
BEACON = """
from agentbus.triggers.socket import SocketTrigger


class BeaconTrigger(SocketTrigger):
    name = "beacon"


def make(settings):
    return BeaconTrigger(settings.home, folder="beacon")
"""


@pytest.fixture
def beacon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tmp_path.joinpath("beacon_trigger.py").write_text(BEACON)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(registry.TRIGGERS, "beacon", "beacon_trigger:make")
    yield
    sys.modules.pop("beacon_trigger", None)


@pytest.fixture
def zed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders of all adapters, and one more."""
    adapters = tmp_path / "adapters"
    for path in PACKAGE.joinpath("adapters").glob("*/module.json"):
        adapters.joinpath(path.parent.name).mkdir(parents=True)
        adapters.joinpath(path.parent.name, "module.json").write_text(path.read_text())
    stated = json.loads(PACKAGE.joinpath("adapters", "mcp_generic", "module.json").read_text())
    variables = {**stated["variables"], "AGENTBUS_ZED": {"choices": ["calm", "loud"]}}
    adapters.joinpath("zed").mkdir()
    adapters.joinpath("zed", "module.json").write_text(
        json.dumps({**stated, "id": "zed", "title": "Zed", "folder": "zed", "variables": variables})
    )
    monkeypatch.setattr(registry, "_ADAPTERS", adapters)
    return adapters


def dead_socket(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as left_behind:
        left_behind.bind(str(path))


@pytest.mark.spec("WAKE-5")
def test_a_new_trigger_can_be_chosen(home: Path, beacon: None) -> None:
    (chosen,) = registry.Triggers(config.load({"AGENTBUS_TRIGGER": "beacon"}, home=home)).preferred()
    assert chosen.name == "beacon"
    with pytest.raises(InvalidRequest, match="or beacon"):
        registry.Triggers(config.load({"AGENTBUS_TRIGGER": "owl"}, home=home)).preferred()


@pytest.mark.usefixtures("beacon")
def test_the_folder_of_a_new_trigger_is_checked_looked_into_and_removed(home: Path) -> None:
    settings = config.load({}, home=home)
    bus, triggers = registry.open_bus(settings, busy_ms=1_000)
    bus.store.close()
    triggers.close()
    dead_socket(home / "beacon" / "x.sock")
    (orphan,) = (one for one in check_peers(settings) if one.code == "orphan")
    assert str(home / "beacon" / "x.sock") in orphan.seen
    (home / "beacon").chmod(0o777)
    (unsafe,) = (one for one in check_home(settings) if one.code == "home")
    assert str(home / "beacon") in unsafe.seen
    (home / "beacon").chmod(0o700)
    removed = list(setup._remove(settings, keep_mail=True))
    assert home / "beacon" / "x.sock" in removed
    assert home / "beacon" in removed


@pytest.mark.spec("MOD-1")
@pytest.mark.usefixtures("zed")
def test_a_new_adapter_is_found_with_its_variables_and_its_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = ["claude-mcp", "codex", "gemini", "mcp", "opencode", "qwen", "zed"]
    assert [one.id for one in registry.manifests()[0]] == known
    assert "AGENTBUS_ZED" in registry.variables()
    assert "zed" in registry.folders(config.load({}, home=home))
    with pytest.raises(InvalidRequest, match=f"use {' or '.join(known)}"):
        registry.serve("owl")
    monkeypatch.setenv("AGENTBUS_ZED", "shrill")
    found = [one for one in check_settings() if "AGENTBUS_ZED" in one.seen]
    assert [one.remedy for one in found] == ["set it to calm or loud, or unset it"]
    monkeypatch.setenv("AGENTBUS_ZED", "loud")
    assert registry.manifest("zed").word("AGENTBUS_ZED") == "loud"


def test_no_trigger_is_named_but_in_its_own_file_and_in_the_table() -> None:
    named = re.compile(rf"[\"'=](?:{'|'.join(registry.TRIGGERS)})\b[\"' ]")
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.parts[0] != "triggers" and relative.name != "registry.py":
            assert not named.findall(path.read_text(encoding="utf-8")), relative


def test_no_adapter_is_named_but_in_its_own_folder() -> None:
    """Exceptions are the examples of the help, and the demo, which plays the part of a client."""
    ids = re.compile(rf"(?<![\w-])(?:{'|'.join(one.id for one in registry.manifests()[0] if one.client)})(?![\w-])")
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.parts[0] == "adapters" or str(relative) in ("cli/app.py", "cli/demo.py"):
            continue
        assert not ids.findall(path.read_text(encoding="utf-8")), relative


def test_contributing_says_it_in_twenty_lines_and_names_every_module() -> None:
    text = ROOT.joinpath("CONTRIBUTING.md").read_text(encoding="utf-8")
    for title in ("## A new trigger", "## A new adapter"):
        section = text.split(title)[1].split("\n## ")[0]
        assert len(section.strip().splitlines()) <= 20, title
        files = set(re.findall(r"`(agentbus/[\w/]+\.(?:py|json))`", section))
        assert 1 <= len(files) <= 5, f"{title}: {files}"
        assert all((ROOT / name).exists() for name in files), files
    tree = text.split("```text")[1].split("```")[0]
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__init__.py" or path.parent in (PACKAGE, PACKAGE / "doctor"):
            word = path.stem if path.name != "__init__.py" else "__init__"
            assert re.search(rf"(?<![\w.]){word}(?![\w])", tree), path.relative_to(ROOT)
    assert os.path.getsize(ROOT / "CONTRIBUTING.md") < 10_000, "one page"
