"""A server that learns only after the handshake which session it belongs to, as a real process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.client import RawClient
from tests.support.command import agentbus, until

pytestmark = pytest.mark.timeout(90)

# Arrives with the first call that says where; leaves with the first that says so.
NEWCOMER = """
import anyio
from agentbus import registry
from agentbus.adapters.mcp import server
from agentbus.adapters.mcp.hosts import Choice, Mode, find_host
from agentbus.adapters.mcp_generic.server import PROFILE, choose
from agentbus.core import config


class Newcomer:
    def __init__(self):
        self.over, self.meta, self.gone = anyio.Event(), None, False

    def greeted(self, params):
        pass

    def called(self, meta):
        self.meta = meta if "where" in meta else self.meta
        self.gone = self.gone or "gone" in meta

    async def arrive(self, tasks):
        while self.meta is None:
            await anyio.sleep(0.001)
        mode = Mode.HEALTH_CHECK if self.meta["where"] == "nowhere" else Mode.PULL
        return Choice(
            host=find_host(lambda _words: False).process, mode=mode, delivery="pull", reason="it is a test",
            conversation=self.meta["where"], guest_of=self.meta.get("of", ""),
        )

    async def attend(self, session):
        while not self.gone:
            await anyio.sleep(0.001)
        return "the session is over"


server.serve(
    registry.manifest("mcp"), config.load(), registry.open_bus, profile=PROFILE, choose=choose, newcomer=Newcomer()
)
"""


@pytest.fixture
def late(start: Callable[..., RawClient]) -> RawClient:
    client = start("late", command=[sys.executable, "-c", NEWCOMER], AGENTBUS_DELIVERY="auto")
    client.handshake()
    return client


def call(client: RawClient, tool: str, meta: dict[str, str], **arguments: str) -> tuple[str, bool]:
    return client.result(client.post("tools/call", {"name": tool, "arguments": arguments, "_meta": meta}))


@pytest.mark.spec("LATE-1")
def test_it_is_no_peer_before_it_is_known_which_and_none_after_that_has_ended(home: Path, late: RawClient) -> None:
    waiting = late.post_call("whoami")
    late.request("ping")
    assert not home.exists()
    assert call(late, "list_peers", {"where": "here"})[0].startswith("late (you)")
    assert late.result(waiting)[0].startswith('you are "late"')
    assert "late" in agentbus(home, "peers").stdout
    assert call(late, "whoami", {"gone": "yes"}) is not None
    until(lambda: "late" not in agentbus(home, "peers").stdout)
    assert late.refuse("whoami") == "this is no session: the session is over"
    assert late.process.poll() is None


@pytest.mark.spec("LATE-1", "VOID-3")
def test_a_health_check_leaves_no_trace(home: Path, late: RawClient) -> None:
    assert call(late, "whoami", {"where": "nowhere"}) == ("this is no session: it is a test", True)
    assert not home.exists()


@pytest.mark.spec("LATE-1")
def test_a_home_that_cannot_be_used_is_what_the_tools_say(home: Path, late: RawClient) -> None:
    home.write_text("in the way")
    text, is_error = call(late, "whoami", {"where": "here"})
    assert is_error
    assert "is not a folder" in text


@pytest.mark.spec("LATE-2")
def test_a_subagent_acts_for_its_main_agent(home: Path, start: Callable[..., RawClient], late: RawClient) -> None:
    call(late, "whoami", {"where": "root"})
    guest = start("guest", command=[sys.executable, "-c", NEWCOMER], AGENTBUS_DELIVERY="auto")
    guest.handshake()
    meta = {"where": "branch", "of": "root"}
    assert call(guest, "whoami", meta)[0].startswith('you are "late"')
    assert call(guest, "set_name", meta, name="mine")[1]
    assert not call(guest, "send_message", meta, to="bob", text="from below")[1]
    assert json.loads(agentbus(home, "history", "--json").stdout.splitlines()[-1])["from"] == "late"
    guest.end()
    assert "late" in agentbus(home, "peers").stdout
