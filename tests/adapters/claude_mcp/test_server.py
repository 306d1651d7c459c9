"""Which conversation a session is at its start, where Claude Code says that a moment late."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from agentbus.adapters.claude_mcp import records, server
from agentbus.core.process import Process, current
from tests.adapters.claude_mcp.test_records import ID, folder, write

__all__ = ["folder"]

OTHER = "00000000-0000-4000-8000-000000000000"


def started_with(*words: str) -> str:
    """The conversation that a session with these arguments comes as."""

    def arguments(_host: Process) -> list[str]:
        return ["claude", *words]

    server.wait_until_resumed(current(), arguments)
    return server.conversation(current())


@pytest.mark.spec("NAME-8")
@pytest.mark.parametrize("words", [("-p", "--continue"), ("-c",), ("--resume", ID), (f"--resume={ID}", "-p")])
def test_a_session_that_goes_on_says_with_what_a_moment_later(folder: Path, words: tuple[str, ...]) -> None:
    write(folder, sessionId=OTHER, status=None)
    later = threading.Timer(0.05, write, [folder], {"status": "busy"})
    later.start()
    try:
        assert started_with(*words) == ID
    finally:
        later.join()


@pytest.mark.spec("NAME-8")
def test_nobody_else_waits_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slept(_seconds: float) -> None:
        raise AssertionError("it waits")

    monkeypatch.setattr(records.time, "sleep", slept)
    write(folder, sessionId=OTHER, status=None)
    assert started_with("-p", "say --continue") == OTHER
    write(folder)
    assert started_with("--continue") == ID
    (folder / "sessions" / f"{current().pid}.json").unlink()
    assert started_with("--continue") == ""


@pytest.mark.spec("NAME-8")
def test_a_client_without_a_status_is_waited_for_only_so_long(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(records.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(records.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    write(folder, status=None)
    assert started_with("--continue") == ID
    assert now[0] <= 0.31
