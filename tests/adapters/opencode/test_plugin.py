"""Our plugin under Node, in a stand-in for OpenCode, with the real server below it and the real command line beside."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentbus import registry
from agentbus.adapters.opencode.registration import OpenCodeRegistration
from tests.support.command import agentbus, until
from tests.support.node import NODE, Stand

STAND_IN = Path(__file__).parents[2] / "support" / "opencode_stand_in.mjs"
pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(NODE is None, reason="node is not on PATH")]


class OpenCode(Stand):
    """The stand-in for OpenCode."""

    def __init__(self, home: Path, folder: Path, *words: str, **variables: str) -> None:
        plugin = folder / "agentbus.mjs"
        manifest = registry.manifest("opencode")
        own = [sys.executable, "-m", "agentbus"]
        plugin.write_text(OpenCodeRegistration(manifest, own=lambda: own)._wanted())
        variables.setdefault("AGENTBUS_NAME", "backend")
        super().__init__(home, folder, [str(STAND_IN), str(plugin), *words], **variables)

    def ready(self) -> OpenCode:
        until(lambda: self.all("ready"), "the handshake")
        return self

    def texts(self, session: str) -> list[str]:
        """What the model was given last in that session."""
        found = [one["texts"] for one in self.all("request") if one["request"] == session]
        return found[-1] if found else []

    def has(self, text: str, session: str) -> bool:
        return any(text in one for one in self.texts(session))


Start = Callable[..., OpenCode]
ONE = json.dumps([{"id": "ses_1"}])


@pytest.fixture
def opencode(home: Path, tmp_path: Path) -> Iterator[Start]:
    started: list[OpenCode] = []

    def start(*words: str, **variables: str) -> OpenCode:
        started.append(OpenCode(home, tmp_path, *words, **variables))
        return started[-1]

    yield start
    for one in started:
        one.end()


def states(home: Path) -> list[str]:
    return [json.loads(line)["state"] for line in agentbus(home, "history", "--json").stdout.splitlines()]


def peer(home: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in agentbus(home, "peers", "--json").stdout.splitlines()]
    return next((row for row in rows if row["online"]), {})


def begun(opencode: Start, **variables: str) -> OpenCode:
    """An OpenCode in whose session `ses_1` the user has written."""
    one = opencode(STAND_IN_SESSIONS=ONE, **variables).ready()
    one.order("say", session="ses_1", text="hello")
    return one


@pytest.mark.spec("PLUG-1", "PLUG-3", "READ-8")
def test_a_message_goes_into_the_session_and_is_read_with_the_request(opencode: Start, home: Path) -> None:
    one = begun(opencode)
    assert peer(home)["delivery"] == "plugin"
    agentbus(home, "send", "backend", "which port? ü 日本", AGENTBUS_NAME="frontend")
    until(lambda: one.has("which port? ü 日本</channel>", "ses_1"))
    head, element = one.texts("ses_1")[-1].split("\n")
    assert head == "agentbus, not your user:"
    assert element.startswith('<channel source="agentbus" from="frontend" msg_id="1">')
    until(lambda: states(home) == ["read"])
    (row,) = [json.loads(line) for line in agentbus(home, "history", "--json").stdout.splitlines()]
    assert (row["carrier"], row["read_by"]) == ("plugin", "transcript")


@pytest.mark.spec("PLUG-2")
def test_the_socket_is_ours_alone_and_is_gone_at_the_end(opencode: Start, home: Path) -> None:
    one = begun(opencode)
    (entry,) = [said["entry"] for said in one.all("entry")]
    path = Path(entry["environment"]["AGENTBUS_OPENCODE_DOOR"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert entry["timeout"] == 120_000
    token = entry["environment"]["AGENTBUS_OPENCODE_TOKEN"]
    for command in (["doctor"], ["peers", "--json"]):
        assert token not in agentbus(home, *command).stdout
    one.end()
    assert not path.exists()
    assert peer(home) == {}


@pytest.mark.spec("PLUG-4")
def test_a_plan_stays_a_plan(opencode: Start, home: Path) -> None:
    one = opencode(STAND_IN_SESSIONS=ONE).ready()
    one.order("say", session="ses_1", text="think", agent="plan")
    agentbus(home, "send", "backend", "go on")
    until(lambda: one.has("go on", "ses_1"))
    assert [said["agent"] for said in one.all("posted")] == ["plan"]
    assert one.all("request")[-1]["agent"] == "plan"


@pytest.mark.spec("PLUG-5", "VOID-2")
def test_mail_is_held_while_an_undo_is_open(opencode: Start, home: Path) -> None:
    one = begun(opencode)
    one.order("undo", session="ses_1", **{"is": True})
    until(lambda: peer(home)["delivery"] == "pull")
    assert "an undo is open in its session" in peer(home)["delivery_reason"]
    assert "nothing can be pushed to it" in agentbus(home, "send", "backend", "wait").stdout
    assert one.all("posted") == []
    assert states(home) == ["pending"]
    one.order("undo", session="ses_1", **{"is": False})
    until(lambda: one.has("wait", "ses_1"))
    until(lambda: peer(home)["delivery"] == "plugin")


@pytest.mark.spec("PLUG-3", "STATE-1")
def test_a_busy_session_gets_it_with_its_next_request_and_not_before(opencode: Start, home: Path) -> None:
    one = begun(opencode)
    one.order("long", session="ses_1", **{"is": True})
    one.order("say", session="ses_1", text="work")
    for number in range(30):
        agentbus(home, "send", "backend", f"<{number}>")
    until(lambda: one.all("posted"))
    assert set(states(home)) == {"pending"}
    one.order("long", session="ses_1", **{"is": False})
    until(lambda: one.has("<29>", "ses_1"))
    until(lambda: set(states(home)) == {"read"})
    given = "".join(one.texts("ses_1"))
    assert [given.count(f"<{number}>") for number in range(30)] == [1] * 30
    assert sorted(range(30), key=lambda number: given.index(f"<{number}>")) == list(range(30))


@pytest.mark.spec("PLUG-6")
def test_a_wake_that_was_lost_is_made_up_for_under_the_same_id(opencode: Start, home: Path) -> None:
    one = begun(opencode)
    one.order("fault", lose=1)
    agentbus(home, "send", "backend", "lost?")
    until(lambda: one.has("lost?", "ses_1"))
    first, again = one.all("posted")
    assert (first["message"], first["again"], again["message"], again["again"]) == (
        *(first["message"], False),
        *(first["message"], True),
    )
    assert "".join(one.texts("ses_1")).count("lost?") == 1
    until(lambda: states(home) == ["read"])


@pytest.mark.spec("PLUG-6")
def test_a_post_that_fails_is_tried_again(opencode: Start, home: Path) -> None:
    one = begun(opencode)
    one.order("fault", refuse=1)
    agentbus(home, "send", "backend", "refused?")
    until(lambda: one.has("refused?", "ses_1"))
    until(lambda: states(home) == ["read"])


@pytest.mark.spec("PLUG-6")
def test_what_a_deleted_session_was_not_given_goes_to_another_under_a_new_id(opencode: Start, home: Path) -> None:
    one = begun(opencode)
    one.order("long", session="ses_1", **{"is": True})
    one.order("say", session="ses_1", text="work")
    agentbus(home, "send", "backend", "homeless")
    until(lambda: one.all("posted"))
    one.order("delete", session="ses_1")
    until(lambda: len(one.all("posted")) == 2)
    first, other = one.all("posted")
    assert other["posted"] != "ses_1"
    assert other["message"] != first["message"]
    until(lambda: one.has("homeless", other["posted"]))
    until(lambda: states(home) == ["read"])


@pytest.mark.spec("PLUG-7")
def test_on_the_home_screen_a_session_is_made_and_shown(opencode: Start, home: Path) -> None:
    one = opencode().ready()
    agentbus(home, "send", "backend", "anybody?")
    until(lambda: one.all("shown"))
    (shown,) = one.all("shown")
    until(lambda: one.has("anybody?", shown["shown"]))


@pytest.mark.spec("PLUG-7")
def test_without_a_screen_the_first_prompt_is_waited_for(opencode: Start, home: Path) -> None:
    one = opencode("run", STAND_IN_SESSIONS=ONE).ready()
    agentbus(home, "send", "backend", "early")
    until(lambda: peer(home)["delivery"] == "pull")
    assert "no session has begun in it yet" in peer(home)["delivery_reason"]
    assert one.all("posted") == []
    one.order("say", session="ses_1", text="hello")
    until(lambda: one.has("early", "ses_1"))


@pytest.mark.spec("PLUG-7", "NAME-8")
@pytest.mark.parametrize(("words", "session"), [(("-c",), "ses_new"), (("-s", "ses_old"), "ses_old")])
def test_the_session_that_was_asked_for_is_the_one(
    opencode: Start, home: Path, words: tuple[str, ...], session: str
) -> None:
    there = [{"id": "ses_old"}, {"id": "ses_new"}, {"id": "ses_child", "parentID": "ses_new"}]
    one = opencode(*words, STAND_IN_SESSIONS=json.dumps(there)).ready()
    one.order("call", name="set_name", args={"name": "anton"})
    agentbus(home, "send", "anton", "welcome back")
    until(lambda: one.has("welcome back", session))
    one.end()
    again = opencode(*words, STAND_IN_SESSIONS=json.dumps(there)).ready()
    assert '"anton"' in again.all("ready")[0]["ready"]


@pytest.mark.spec("PLUG-7", "READ-7")
def test_a_subagent_gets_no_mail_and_takes_none(opencode: Start, home: Path) -> None:
    one = begun(opencode)
    one.order("create", id="ses_child", parentID="ses_1")
    one.order("say", session="ses_child", text="search")
    agentbus(home, "send", "backend", "for the main agent")
    until(lambda: one.has("for the main agent", "ses_1"))
    assert not one.has("for the main agent", "ses_child")
    one.order("tool", session="ses_child", tool="agentbus_check_messages")
    one.order("tool", session="ses_1", tool="agentbus_check_messages")
    one.order("tool", session="ses_child", tool="agentbus_send_message")
    refused, *others = [said["tool"] for said in one.all("tool")]
    assert "for its main agent" in refused
    assert others == ["runs", "runs"]


@pytest.mark.spec("PLUG-7")
def test_the_session_that_the_user_wrote_to_last_is_the_one(opencode: Start, home: Path) -> None:
    one = begun(opencode)
    one.order("create", id="ses_2")
    one.order("say", session="ses_2", text="hello")
    agentbus(home, "send", "backend", "here")
    until(lambda: one.has("here", "ses_2"))
    assert not one.has("here", "ses_1")


@pytest.mark.spec("VOID-3", "PLUG-2")
@pytest.mark.parametrize("words", ["mcp list", "models"])
def test_a_command_without_a_session_leaves_no_trace(opencode: Start, home: Path, words: str) -> None:
    one = opencode(*words.split())
    until(lambda: one.all("entry"))
    assert "AGENTBUS_OPENCODE_DOOR" not in one.all("entry")[0]["entry"]["environment"]
    if words == "mcp list":
        # The stand-in is no process named opencode: only then does the server know a health check.
        one.process.kill()
    assert not (home / "door").exists()


@pytest.mark.spec("PLUG-1")
def test_an_entry_of_the_users_own_stands(opencode: Start) -> None:
    own = {"type": "local", "command": [sys.executable, "-c", "pass"]}
    one = opencode(STAND_IN_MCP=json.dumps({"agentbus": own}))
    until(lambda: one.all("server"))
    assert one.all("entry")[0]["entry"] == own


def test_loaded_twice_it_is_one(opencode: Start, home: Path) -> None:
    one = begun(opencode, STAND_IN_TWICE="1")
    agentbus(home, "send", "backend", "once")
    until(lambda: one.has("once", "ses_1"))
    assert len(list((home / "door").iterdir())) == 1
    assert len(one.all("posted")) == 1


@pytest.mark.spec("PLUG-2", "VOID-2")
def test_a_home_that_is_not_ours_alone_is_said(opencode: Start, home: Path) -> None:
    home.mkdir(mode=0o700)
    (home / "door").mkdir()
    (home / "door").chmod(0o777)
    opencode(STAND_IN_SESSIONS=ONE).ready()
    assert peer(home)["delivery"] == "pull"
    assert f"{home / 'door'} is not a folder that only you can write to" in peer(home)["delivery_reason"]


@pytest.mark.spec("PLUG-2")
def test_the_socket_of_a_killed_process_is_cleared_away_and_its_mail_comes_again(opencode: Start, home: Path) -> None:
    one = begun(opencode)
    one.order("long", session="ses_1", **{"is": True})
    one.order("say", session="ses_1", text="work")
    agentbus(home, "send", "backend", "in the middle")
    until(lambda: one.all("posted"))
    os.kill(one.process.pid, signal.SIGKILL)
    one.process.wait()
    until(lambda: peer(home) == {})
    assert states(home) == ["pending"]
    other = begun(opencode)
    until(lambda: other.has("in the middle", "ses_1"))
    until(lambda: len(list((home / "door").iterdir())) == 1)


def test_a_server_that_is_started_again_brings_what_the_model_was_not_given(opencode: Start, home: Path) -> None:
    one = begun(opencode)
    one.order("undo", session="ses_1", **{"is": True})
    agentbus(home, "send", "backend", "kept")
    os.kill(one.all("ready")[0]["server"], signal.SIGKILL)
    until(lambda: one.all("server"))
    assert states(home) == ["pending"]
