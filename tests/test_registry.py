from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from agentbus import registry
from agentbus.core.errors import BrokenSetup

README = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")


def test_the_manifest_says_what_there_is() -> None:
    found, broken = registry.manifests()
    assert not broken
    assert {"claude-mcp", "mcp"} <= {one.id for one in found}
    for manifest in found:
        for part in (manifest.entry, manifest.registration):
            module, function = part.split(":")
            assert callable(getattr(import_module(module), function))
        assert f"agentbus serve {manifest.id}" in README
        if manifest.launch_flags:
            assert f"{manifest.client} {' '.join(manifest.launch_flags)}" in README


def test_reading_manifests_imports_no_adapter() -> None:
    code = "import sys; from agentbus import registry; registry.manifests(); print('agentbus.adapters' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"id": "x"}', '{"launch_flags": []}', '"x"'])
def test_a_broken_manifest_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    tmp_path.joinpath("x").mkdir()
    tmp_path.joinpath("x", "module.json").write_text(text)
    monkeypatch.setattr(registry, "_ADAPTERS", tmp_path)
    found, (broken,) = registry.manifests()
    assert found == []
    sentence = r".*/x/module\.json is not a valid module manifest \(.*\): reinstall agentbus, or remove that folder"
    assert re.fullmatch(sentence, str(broken))
    with pytest.raises(BrokenSetup, match="is not a valid module manifest"):
        registry.manifest("claude-mcp")
