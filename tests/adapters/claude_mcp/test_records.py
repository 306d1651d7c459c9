"""The records of Claude Code, as recorded with 2.1.332, and what is done where they look different."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentbus.adapters.claude_mcp import records
from agentbus.core.process import current

ID = "567b90cf-6c2d-4d61-8422-60d298e9f523"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path))
    (tmp_path / "sessions").mkdir()
    return tmp_path


def write(folder: Path, **changes: Any) -> None:
    here = current()
    fields = {
        "pid": here.pid,
        "sessionId": ID,
        "cwd": "/home/me/my.project",
        "procStart": here.started,
        "version": "2.1.332",
        "kind": "interactive",
        "messagingSocketPath": "/tmp/cc-socks/1.sock",
        "name": "project-ed",
        "nameSource": "derived",
        "status": "idle",
        **changes,
    }
    (folder / "sessions" / f"{here.pid}.json").write_text(json.dumps(fields))


@pytest.mark.spec("PROOF-1")
def test_the_entry_of_a_session_and_its_transcript(folder: Path) -> None:
    write(folder)
    found = records.entry(current())
    assert found is not None
    assert (found.session_id, found.name, found.name_source, found.status) == (ID, "project-ed", "derived", "idle")
    assert records.transcript(found) == folder / "projects" / "-home-me-my-project" / f"{ID}.jsonl"
    other = folder / "projects" / "-elsewhere"
    other.mkdir(parents=True)
    (other / f"{ID}.jsonl").write_text("")
    assert records.transcript(found) == other / f"{ID}.jsonl"


@pytest.mark.spec("PROOF-1")
@pytest.mark.parametrize(
    "changes",
    [{"procStart": "1"}, {"pid": 1}, {"sessionId": "../../etc/passwd"}, {"sessionId": 7}, {"sessionId": None}],
)
def test_an_entry_that_is_another_processs_or_looks_different_is_none(folder: Path, changes: dict[str, Any]) -> None:
    write(folder, **changes)
    assert records.entry(current()) is None


@pytest.mark.spec("PROOF-1")
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "\udcff".encode(errors="surrogateescape").decode("latin1")]
)
def test_a_file_that_is_no_entry_is_none(folder: Path, text: str) -> None:
    (folder / "sessions" / f"{current().pid}.json").write_text(text)
    assert records.entry(current()) is None


@pytest.mark.spec("PROOF-1")
def test_fields_that_are_missing_or_of_another_kind_are_empty(folder: Path) -> None:
    write(folder, name=None, status=3, cwd=["x"])
    found = records.entry(current())
    assert found is not None
    assert (found.name, found.status, found.cwd) == ("", "", "")
