"""Sessions of Claude Code that run and have not joined: what is posted to them, what is held, and what is returned."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentbus import registry
from agentbus.adapters.claude_mcp import mode
from agentbus.cli import common
from agentbus.core import config, process
from agentbus.core.asking import question
from agentbus.core.bus import Bus
from agentbus.core.model import MessageState, timestamp
from agentbus.core.process import Process, current
from tests.adapters.claude_mcp.test_records import ID
from tests.support.command import agentbus, claude_on_path, until
from tests.support.fakes import arrival
from tests.support.inbox_stand_in import InboxStandIn

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a registry entry is known by the start in /proc")


class Running:
    """A session that runs: this very process, or another one that does nothing, with an inbox of ours."""

    def __init__(self, folder: Path, host: Process, inbox: Path) -> None:
        self.folder, self.host, self.inbox = folder, host, inbox
        self.transcript = folder / "projects" / "-work" / f"{ID}.jsonl"
        (folder / "sessions").mkdir(exist_ok=True)
        self.transcript.parent.mkdir(parents=True, exist_ok=True)
        self.transcript.write_text("")
        self.write()

    def write(self, **changes: Any) -> None:
        fields = {
            "pid": self.host.pid,
            "procStart": self.host.started,
            "sessionId": ID,
            "cwd": "/work",
            "name": "My Task",
            "messagingSocketPath": str(self.inbox),
            **changes,
        }
        (self.folder / "sessions" / f"{self.host.pid}.json").write_text(json.dumps(fields))


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as made:
        monkeypatch.setenv("CLAUDE_CONFIG_DIR", made)
        yield Path(made)


@pytest.fixture
def far(folder: Path) -> Iterator[InboxStandIn]:
    stand_in = InboxStandIn(folder / "in" / "1.sock")
    stand_in.needs_token = False
    yield stand_in
    stand_in.close()


@pytest.fixture
def session(folder: Path, far: InboxStandIn) -> Running:
    return Running(folder, current(), far.path)


@pytest.fixture
def bus(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bus]:
    monkeypatch.setenv("AGENTBUS_HOME", str(home))
    with common.bus_and_settings() as (opened, _settings):
        yield opened


def arrive(bus: Bus, name: str, host: Process, conversation: str = "") -> str:
    """A peer of that name under `host`, present until the test ends; its session."""
    arrived = arrival(name, host=host, domain=process.domain(), conversation=conversation, is_asked=False)
    claimed = bus.store.claim(arrived, now=bus.clock(), endpoint=lambda _session: "", join_crowd=True)
    assert claimed is not None
    return claimed[0].session


@pytest.mark.spec("REACH-1", "REACH-2")
def test_a_message_to_a_running_session_is_posted_once_and_said(bus: Bus, session: Running, far: InboxStandIn) -> None:
    sent = bus.send("frontend", "my-task", "which port?")
    assert str(sent) == 'sent #1 to "my-task" (reachable, not joined: posted once into its session)'
    until(lambda: far.texts)
    head, element = far.texts[0].split("\n")
    assert re.fullmatch(
        r"agentbus [0-9a-z]{3}, not your user\. To answer, run: .* send NAME 'TEXT' --from my-task --reply-to MSG_ID",
        head,
    )
    assert element == '<channel source="agentbus" from="frontend" msg_id="1">which port?</channel>'
    status = bus.store.queries.status(1)
    assert (status.state, status.carrier) == (MessageState.DELIVERED, "inbox")
    bus.send("frontend", "my-task", "and which host?")
    until(lambda: len(far.texts) == 2)
    assert "which port?" not in far.texts[1]
    assert far.dropped == []


@pytest.mark.spec("REACH-2", "BRAKE-1", "BRAKE-2")
def test_nothing_is_posted_to_such_a_session_while_it_is_paused(bus: Bus, session: Running, far: InboxStandIn) -> None:
    bus.send("frontend", "my-task", "hello")
    until(lambda: far.texts)
    bus.pause("my-task", by="root")
    assert str(bus.send("frontend", "my-task", "which port?")) == (
        'queued #2 for "my-task": it is paused by "root" until it is resumed, and gets its mail then'
    )
    assert bus.store.queries.status(2).state is MessageState.PENDING
    bus.resume("my-task", by="root")
    until(lambda: len(far.texts) == 2)
    assert "which port?" in far.texts[1]
    assert bus.store.queries.status(2).carrier == "inbox"


@pytest.mark.spec("REACH-2", "ASK-1", "THREAD-2")
def test_such_a_session_is_asked_and_its_answer_is_the_answer(bus: Bus, session: Running, far: InboxStandIn) -> None:
    sent = bus.send("frontend", "my-task", "which port?", question=question("my-task", 60, bus.clock(), ""))
    until(lambda: far.texts)
    assert f' answer_by="{timestamp(bus.store.queries.status(sent.id).answer_by or 0)}"' in far.texts[0]
    # As its shell does, by the command that the text names.
    answer = bus.send("my-task", "frontend", "8080", reply_to=sent.id)
    found = bus.store.queries.answer(sent.id)
    assert found is not None
    assert found.id == answer.id
    assert bus.store.queries.status(sent.id).state is MessageState.READ


@pytest.mark.spec("REACH-1")
@pytest.mark.parametrize(
    "changes",
    [
        {"name": "another"},
        {"name": ""},
        {"name": "all"},
        {"messagingSocketPath": ""},
        {"procStart": "1"},
        {"sessionId": "../../x"},
    ],
)
def test_what_is_no_session_of_that_name_is_not_posted_to(
    bus: Bus, session: Running, far: InboxStandIn, changes: dict[str, str]
) -> None:
    session.write(**changes)
    assert str(bus.send("frontend", "my-task", "hello")).startswith('queued #1 for "my-task": no such peer yet')
    assert (far.texts, bus.store.queries.status(1).state) == ([], MessageState.PENDING)


@pytest.mark.spec("REACH-1", "INBOX-5")
def test_a_socket_on_which_another_process_listens_is_not_posted_to(bus: Bus, folder: Path, far: InboxStandIn) -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        host = process.look_up(sleeper.pid)
        assert host is not None
        Running(folder, host, far.path)
        said = str(bus.send("frontend", "my-task", "hello"))
        sleeper.kill()
    assert said.startswith('queued #1 for "my-task" (reachable, not joined): ')
    assert "not to the session's process" in said
    assert said.endswith("so it waits for a session of that name")
    assert (far.texts, bus.store.queries.status(1).state) == ([], MessageState.PENDING)


@pytest.mark.spec("REACH-3")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"crossSessionInbound": "refuse"}, "it refuses messages of others (crossSessionInbound in "),
        ({"crossSessionInbound": "hold"}, "its client would hold it for its user (crossSessionInbound in "),
        ({"crossSessionInbound": 7}, "its client would hold it for its user (crossSessionInbound in "),
        ({"permissions": {"defaultMode": "bypassPermissions"}}, "for its user (bypassPermissions, by "),
        ({"crossSessionInbound": "accept"}, ""),
    ],
)
def test_what_its_client_would_hold_is_not_posted_and_the_sender_is_told(
    bus: Bus, session: Running, far: InboxStandIn, settings: dict[str, Any], said: str
) -> None:
    (session.folder / "settings.json").write_text(json.dumps(settings))
    sent = str(bus.send("frontend", "my-task", "hello"))
    assert said in sent
    assert sent.startswith("queued" if said else "sent")
    assert bus.store.queries.status(1).state is (MessageState.PENDING if said else MessageState.DELIVERED)


@pytest.mark.spec("REACH-3")
def test_where_the_start_of_a_session_cannot_be_read_nothing_is_posted(
    bus: Bus, session: Running, far: InboxStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "arguments", lambda _of: [])
    assert "how it was started cannot be read" in str(bus.send("frontend", "my-task", "hello"))
    assert far.texts == []


@pytest.mark.spec("REACH-3")
def test_the_strictest_setting_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path))
    (tmp_path / "settings.json").write_text('{"crossSessionInbound": "refuse"}')
    arguments = ["claude", "--settings", '{"crossSessionInbound": "hold"}']
    assert mode.inbound(arguments, "", tmp_path / "none") == (mode.REFUSE, str(tmp_path / "settings.json"))
    (tmp_path / "settings.json").write_text("[")
    assert mode.inbound(arguments, "", tmp_path / "none") == (mode.HOLD, "--settings")
    assert mode.inbound(["claude"], "", tmp_path / "none") == ("", "")


@pytest.mark.spec("REACH-2")
def test_two_sessions_of_one_name_get_nothing(bus: Bus, session: Running, folder: Path, far: InboxStandIn) -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        host = process.look_up(sleeper.pid)
        assert host is not None
        Running(folder, host, far.path)
        said = str(bus.send("frontend", "my-task", "hello"))
        sleeper.kill()
    assert "2 running sessions are called so" in said
    assert far.texts == []


@pytest.mark.spec("REACH-2")
def test_a_session_that_has_joined_is_not_posted_to(bus: Bus, session: Running, far: InboxStandIn) -> None:
    arrive(bus, "web", session.host)
    assert "no such peer yet" in str(bus.send("frontend", "my-task", "hello"))
    assert bus.reachable() == []
    assert far.texts == []


@pytest.mark.spec("REACH-2", "NAME-8")
def test_what_was_posted_does_not_come_again_when_it_joins(bus: Bus, session: Running, far: InboxStandIn) -> None:
    bus.send("frontend", "my-task", "hello")
    mine = arrive(bus, "work", session.host, ID)
    (peer,) = bus.peers()
    assert peer.name == "my-task"
    assert bus.store.pending(mine, current().pid, 10) == []
    assert bus.store.unread(mine, current().pid, 10) == []


@pytest.mark.spec("REACH-2", "STATE-6")
@pytest.mark.parametrize("is_shown", [True, False])
def test_what_such_a_session_took_is_read_if_its_record_shows_it_else_pending_again(
    bus: Bus, session: Running, far: InboxStandIn, is_shown: bool
) -> None:
    bus.send("frontend", "my-task", "hello")
    until(lambda: far.texts)
    if is_shown:
        row = {"type": "user", "message": {"content": far.texts[0]}, "timestamp": timestamp(bus.clock())}
        session.transcript.write_text(json.dumps(row) + "\n")
    assert bus.store.unsettled() == []  # its process lives
    bus.store._host_life = lambda _host, _of: process.Life.ENDED
    (ended,) = bus.store.unsettled()
    shown, is_whole = bus.look_through(ended)
    returned = bus.settle(ended, shown, is_whole=is_whole)
    assert returned == ([] if is_shown else [1])
    assert bus.store.queries.status(1).state is (MessageState.READ if is_shown else MessageState.PENDING)


@pytest.mark.spec("REACH-2", "SEND-2", "OLD-4")
def test_what_waited_goes_first_and_what_is_old_does_not_go(bus: Bus, session: Running, far: InboxStandIn) -> None:
    session.write(name="other")
    day = 86_400_000
    clock, bus.clock = bus.clock, lambda: clock() - 2 * day
    bus.send("frontend", "my-task", "old")
    bus.clock = clock
    bus.send("frontend", "my-task", "first")
    session.write()
    assert str(bus.send("frontend", "my-task", "second")).startswith("sent #3")
    until(lambda: far.texts)
    assert re.findall(r'msg_id="(\d)"', far.texts[0]) == ["2", "3"]
    assert bus.store.queries.status(1).state is MessageState.PENDING


@pytest.mark.spec("REACH-2", "SEND-6")
def test_a_post_that_fails_leaves_everything_pending(
    bus: Bus, session: Running, far: InboxStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentbus.adapters.claude_mcp import reach

    with monkeypatch.context() as patch:
        patch.setattr(reach, "_MOST_CHARS", 10)
        assert "too long for its inbox" in str(bus.send("frontend", "my-task", "x" * 11))
    session.write(messagingSocketPath=str(session.folder / "gone" / "1.sock"))
    assert " is gone, and the session has no other inbox" in str(bus.send("frontend", "my-task", "hello"))
    assert [bus.store.queries.status(one).state for one in (1, 2)] == [MessageState.PENDING] * 2


@pytest.mark.spec("REACH-4")
def test_peers_shows_who_is_reachable_and_not_joined(home: Path, session: Running, far: InboxStandIn) -> None:
    variables = {"CLAUDE_CONFIG_DIR": str(session.folder)}
    shown = agentbus(home, "peers", **variables).stdout
    assert shown == "nobody is online\nmy-task: claude-mcp in /work, reachable, not joined\n"
    (row,) = map(json.loads, agentbus(home, "peers", "--json", **variables).stdout.splitlines())
    assert row == {
        "name": "my-task",
        "online": False,
        "pending": 0,
        "reachable": True,
        "held": None,
        "runtime": "claude-mcp",
        "pid": session.host.pid,
        "cwd": "/work",
        "groups": [],
        "paused": None,
    }
    assert agentbus(home, "send", "my-task", "hi", **variables).stdout.startswith('sent #1 to "my-task" (reachable')
    until(lambda: far.texts)


@pytest.mark.spec("REACH-4")
def test_install_names_the_running_sessions_that_receive_without_a_restart(
    home: Path, tmp_path: Path, far: InboxStandIn
) -> None:
    claude = claude_on_path(tmp_path / "c")
    (claude.home / ".claude").mkdir()
    session = Running(claude.home / ".claude", current(), far.path)
    started = 'The running session "my-task" in /work '
    done = agentbus(home, "install", **claude.variables)
    assert f"{started}receives without a restart; to have the tools it has to be restarted.\n" in done.stdout
    (session.folder / "settings.json").write_text('{"crossSessionInbound": "refuse"}')
    done = agentbus(home, "install", **claude.variables)
    assert f"{started}is not posted to (it refuses messages of others (crossSessionInbound in " in done.stdout


@pytest.mark.spec("REACH-1", "CLI-1")
def test_without_an_adapter_that_knows_its_sessions_nobody_is_reachable(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTBUS_HOME", str(home))
    monkeypatch.setenv("HOME", "relative")
    assert registry.running(config.load()) == []
