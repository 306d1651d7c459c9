"""What a session is doing: how it says so, where it is shown, and what the client itself tells."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import agentbus
from agentbus import registry
from agentbus.adapters.mcp import tools
from agentbus.cli import common
from agentbus.cli.watch import _event_line, _event_row, _standing
from agentbus.core import config, process
from agentbus.core.changes import Changes, PeerEvent
from agentbus.core.errors import InvalidRequest
from agentbus.core.model import Peer, check_status
from agentbus.core.session import Session
from agentbus.core.store import Store
from tests.support.fakes import tool_context

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def joined(home: Path, name: str = "web") -> AsyncIterator[Session]:
    async with agentbus.join(name, home=home) as member:
        yield member._session


async def call(session: Session, tool: str, **arguments: Any) -> str:
    result = await tools.call(tool_context(session), tool, arguments)
    assert not result.is_error, result.text
    return result.text


async def refused(session: Session, tool: str, **arguments: Any) -> str:
    result = await tools.call(tool_context(session), tool, arguments)
    assert result.is_error, result.text
    return result.text


@pytest.mark.spec("STATUS-1", "STATUS-2", "TOOL-1")
async def test_a_session_says_what_it_is_doing_and_others_see_it(home: Path) -> None:
    async with joined(home) as web, joined(home, "api") as api:
        assert await call(web, "set_status", text="  writing tests ") == "others see the status: writing tests"
        (line,) = [one for one in (await call(api, "list_peers")).splitlines() if one.startswith("web")]
        assert line.endswith("; writing tests (1 s ago)")
        said = await call(web, "set_name", name="shop", status="deploying")
        assert said.startswith('you are "shop" now')
        assert said.endswith("; others see the status: deploying")
        assert "shop: python in" in await call(api, "list_peers")
        assert "; deploying (1 s ago)" in await call(api, "list_peers")
        # A rename alone leaves it.
        await call(web, "set_name", name="web")
        assert "; deploying (1 s ago)" in await call(api, "list_peers")
        assert await call(web, "set_status", text="") == "the status is cleared"
        assert "ago)" not in await call(api, "list_peers")


@pytest.mark.spec("STATUS-1", "LIB-3")
async def test_a_program_says_what_it_is_doing(home: Path) -> None:
    async with agentbus.join("worker", home=home) as worker:
        await worker.set_status("building")
        (peer,) = await worker.peers()
        assert (peer.status, peer.status_at is not None) == ("building", True)
        with pytest.raises(InvalidRequest):
            await worker.set_status("x" * 121)


@pytest.mark.spec("STATUS-1", "ERR-1")
async def test_what_is_no_status_is_refused_and_changes_nothing(home: Path) -> None:
    async with joined(home) as web:
        await call(web, "set_status", text="x" * 120)
        long = "the status has 121 characters, the limit is 120: say it in a few words; details belong in a message"
        assert await refused(web, "set_status", text="x" * 121) == long
        assert await refused(web, "set_name", name="shop", status="x" * 121) == long
        for text in ("a\nb", "a\u2028b", "a\0b", "a\ud800b"):
            assert await refused(web, "set_status", text=text) == (
                "the status is not one line of text: leave out line breaks and NUL"
            )
        assert "'text' is text, not int" in await refused(web, "set_status", text=1)
        assert "needs the argument 'text'" in await refused(web, "set_status")
        (peer,) = await web.peers()
        assert (peer.name, peer.status) == ("web", "x" * 120)
        web.is_guest = True
        assert "belongs to the main agent" in await refused(web, "set_status", text="mine")
        web.is_guest = False
    with pytest.raises(InvalidRequest, match="a status is text, not int"):
        check_status(1)


@pytest.mark.spec("STATUS-1")
async def test_it_ends_with_the_session_and_not_with_its_server(home: Path) -> None:
    async with joined(home) as web:
        await call(web, "set_status", text="writing tests")
        store, arrival = web.bus.store, web._arrival
        peer = web.peer
    store = Store(home / "bus.db", busy_ms=1_000)
    # The next server of the same agent process and launch name is the same session. [NAME-7]
    claimed = store.claim(arrival, now=9_000, endpoint=str, join_crowd=True)
    assert claimed is not None
    assert claimed[2] is not None
    assert (claimed[0].session, claimed[0].status) == (peer.session, "writing tests")
    assert [one.status for one in store.present()] == ["writing tests"]
    store.leave(peer.session, arrival.process.pid, now=9_500)
    claimed[2].release()
    other = store.claim(replace(arrival, host=process.Process(1, "1")), now=9_900, endpoint=str, join_crowd=True)
    assert other is not None
    assert other[2] is not None
    assert [(one.name, one.status) for one in store.present()] == [("web", "")]
    other[2].release()
    store.close()


@pytest.mark.spec("STATUS-2", "TRUST-5")
async def test_peers_and_watch_show_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AGENTBUS_HOME", str(home))

    def peers(**options: bool) -> str:
        common.peers(as_json=options.get("as_json", False))
        return capfd.readouterr().out

    async with joined(home) as web:
        assert "STATUS" not in peers()
        changes = Changes(web.bus.store)
        changes.look(thoroughly=True)
        await call(web, "set_status", text="evil \x1b[2J")
        head, row = peers().splitlines()[:2]
        assert head.endswith("  STATUS")
        assert row.endswith("  evil \\x1b[2J (1 s ago)")
        shown = json.loads(peers(as_json=True))
        assert (shown["status"], shown["activity"]) == ("evil \x1b[2J", None)
        assert shown["status_at"].endswith("Z")
        (event,) = changes.look(thoroughly=True)
        assert isinstance(event, PeerEvent)
        assert _event_line(event).plain.endswith("status     web  evil \\x1b[2J")
        assert _event_row(event)["event"] == "status"
        assert _event_row(event)["status"] == "evil \x1b[2J"
        table = Console(width=400, no_color=True)
        table.print(_standing(list(changes.peers.values()), {}, lambda _peer: "busy"))
        printed = capfd.readouterr().out
        assert "IS    STATUS" in printed
        assert "busy  evil \\x1b[2J (" in printed
        await call(web, "set_status", text="")
        (event,) = changes.look(thoroughly=True)
        assert isinstance(event, PeerEvent)
        assert _event_line(event).plain.endswith("status     web  cleared")
        assert _event_row(event)["status"] is None
        assert changes.look(thoroughly=True) == []


@pytest.mark.spec("STATUS-3")
async def test_busy_or_idle_is_shown_where_the_client_tells_and_nowhere_else(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("AGENTBUS_HOME", str(home))
    (tmp_path / "sessions").mkdir()
    here = process.current()

    def tell(**fields: Any) -> None:
        entry = {"pid": here.pid, "procStart": here.started, "sessionId": "567b90cf-6c2d", **fields}
        (tmp_path / "sessions" / f"{here.pid}.json").write_text(json.dumps(entry))

    bus, triggers = registry.open_bus(config.load(home=home), busy_ms=1_000)
    async with joined(home) as web:
        (own,) = bus.peers()
        peer = replace(own, runtime="claude-mcp")  # whose agent process this process is
        tell(status="busy")
        assert bus.activity(peer) == "busy"
        tell(status="idle")
        assert bus.activity(peer) == "idle"
        for nothing in ({}, {"status": "thinking"}, {"status": 1}, {"status": "busy", "procStart": "1"}):
            tell(**nothing)
            assert bus.activity(peer) == ""
        tell(status="busy")
        # Its pid means another process there, and a program or another client does not tell.
        assert bus.activity(replace(peer, domain="elsewhere")) == bus.activity(replace(peer, domain="")) == ""
        assert {bus.activity(replace(peer, runtime=one)) for one in ("python", "codex", "qwen", "mcp", "../x")} == {""}
        _be(web, "claude-mcp")
        assert "; busy" in await call(web, "list_peers")
        common.peers(as_json=False)
        head, row = capfd.readouterr().out.splitlines()[:2]
        assert (head.split()[-1], row.split()[-1]) == ("IS", "busy")
        common.peers(as_json=True)
        assert json.loads(capfd.readouterr().out)["activity"] == "busy"
    bus.store.close()
    triggers.close()


def _be(session: Session, runtime: str) -> None:
    """Let others take a session for one of another runtime."""
    with session.bus.store._writing() as execute:
        execute("UPDATE peers SET runtime = ? WHERE session = ?", (runtime, session.peer.session))


@pytest.mark.spec("STATUS-2")
def test_the_age_of_a_status_is_shown_in_the_unit_that_suits_it() -> None:
    here = process.current()
    peer = Peer(
        session="s",
        name="web",
        host=here,
        launch_name="web",
        process=here,
        runtime="r",
        cwd="/",
        delivery="d",
        trigger="t",
        endpoint="e",
        started_at=0,
        last_seen=0,
    )
    assert peer.doing(5) == ""
    said = replace(peer, status="\U0001f600" * 120, status_at=1_000)
    assert said.doing(301_000) == "\U0001f600" * 120 + " (5 min ago)"
    assert said.doing(0).endswith(" (1 s ago)"), "the clock was set back"
