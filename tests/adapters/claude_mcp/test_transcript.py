"""Read by the model, or only taken by the client: what the transcript proves, and what is returned without proof."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agentbus.adapters.claude_mcp import transcript
from agentbus.adapters.mcp.element import element
from agentbus.adapters.mcp.inbox import compose
from agentbus.cli import output
from agentbus.core.model import Peer, timestamp
from agentbus.core.store import Store
from tests.support.client import RawClient
from tests.support.command import agentbus, until
from tests.support.fakes import envelope

pytestmark = pytest.mark.timeout(300)

ONE = envelope(7, "hello")
AT = ONE.sent_at + 250
SAID = {(7, AT)}
TEXT = f"Another Claude session sent a message:\n{element(ONE)}\n\nThis came ..."


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "user", "message": {"role": "user", "content": content}, "timestamp": timestamp(AT), **more}


def queued(prompt: Any, **more: Any) -> dict[str, Any]:
    attachment = {"type": "queued_command", "prompt": prompt}
    return {"type": "attachment", "attachment": attachment, "timestamp": timestamp(AT), **more}


def noted(content: Any, held: Any = None) -> dict[str, Any]:
    attachment = {"type": "plugin_note", "plugin": "agentbus", "content": content, "heldContent": held or []}
    return {"type": "attachment", "attachment": attachment, "timestamp": timestamp(AT)}


@pytest.mark.spec("PROOF-2")
@pytest.mark.parametrize(
    ("row", "is_given"),
    [
        (noted([TEXT]), True),
        (noted([], [TEXT]), False),
        (user(TEXT, isSidechain=False), True),
        (user([{"type": "text", "text": TEXT}]), True),
        (queued(TEXT), True),
        (queued([{"type": "text", "text": TEXT}]), True),
        (user('<channel source="plugin:x" from="a" msg_id="7">hello</channel>'), True),
        ({"type": "queue-operation", "operation": "enqueue", "content": TEXT}, False),
        (user(TEXT, isSidechain=True), False),
        (user([{"type": "tool_result", "content": TEXT}]), False),
        ({"type": "assistant", "message": {"role": "assistant", "content": TEXT}}, False),
        (user(compose([envelope(7, "\x01" * 300_000)], "m")[0]), False),
        (user('msg_id <channel msg_id="x7">no id</channel>'), False),
        (user(7, msg_id=1), False),
        ([TEXT], False),
    ],
)
def test_what_a_line_shows_as_given_to_the_model(row: Any, is_given: bool) -> None:
    assert transcript.given(json.dumps(row).encode()) == (SAID if is_given else set())
    assert transcript.given(json.dumps(row).encode()[:-3]) == set()


@pytest.mark.spec("PROOF-2")
@pytest.mark.parametrize(
    ("recorded", "at"), [(None, 0), (7, 0), ("yesterday", 0), (timestamp(AT), AT), ("2023-11-14T22:13:20Z", AT - 373)]
)
def test_a_line_without_an_instant_shows_a_message_at_no_time(recorded: Any, at: int) -> None:
    assert transcript.given(json.dumps(user(TEXT, timestamp=recorded)).encode()) == {(7, at)}


@pytest.mark.spec("PROOF-2", "PROOF-3")
def test_a_transcript_is_read_on_from_an_offset_by_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentbus.core.process import current

    monkeypatch.setattr("agentbus.adapters.mcp.transcript._PIECE_BYTES", 10)
    path = tmp_path / "p" / "s.jsonl"
    follower = transcript.Transcript(current())
    assert follower.look(str(path), 0) == (set(), 0)
    assert transcript.shown(str(path)) is None
    path.parent.mkdir()
    line = json.dumps(user(TEXT)) + "\n"
    path.write_text("{}\n" + line[:50])
    assert follower.look(str(path), 0) == (set(), 3)
    assert follower.look(str(path), 3) == (set(), 3)
    path.write_text("{}\n" + line)
    assert follower.look(str(path), 3) == (SAID, 3 + len(line))
    assert follower.end(str(path)) == 3 + len(line)
    assert transcript.shown(str(path)) == SAID
    # In another folder beside it: how Claude Code writes a folder's name is only known for common ones.
    assert transcript.shown(str(tmp_path / "q" / "s.jsonl")) == SAID


# -- whole sessions ----------------------------------------------------------------------------------------


class Sessions:
    """Starts sessions under a `claude` that keeps records, one after the other, with one name."""

    def __init__(self, home: Path, folder: Path) -> None:
        self.home, self.folder = home, folder
        self.config = folder / "config"
        self.script = folder / "bin" / "claude"
        self.script.parent.mkdir()
        root = Path(__file__).parents[3]
        self.script.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(root)!r})\n"
            "from tests.support.inbox_stand_in import main\nmain()\n"
        )
        self.script.chmod(0o755)
        self.started: list[RawClient] = []
        self.instructions = ""

    def start(self, **variables: str) -> RawClient:
        number = len(self.started)
        variables = {
            "AGENTBUS_DELIVERY": "auto",
            "INBOX_PATH": str(self.folder / "in" / f"{number}.sock"),
            "INBOX_LOG": str(self.folder / f"{number}.json"),
            "CLAUDE_CONFIG_DIR": str(self.config),
            **variables,
        }
        client = RawClient(self.home, "web", command=[str(self.script)], **variables)
        self.started.append(client)
        self.instructions = str(client.handshake()["instructions"])
        return client

    def kill(self, client: RawClient) -> None:
        """Kill the client, and wait until its server is gone too."""
        client.process.kill()
        client.end()
        until(lambda: not self.live(), "the end of the session")

    def live(self) -> list[Peer]:
        """The sessions that live."""
        with closing(Store(self.home / "bus.db", busy_ms=1_000)) as store:
            return store.live()

    def send(self, text: str) -> int:
        return int(agentbus(self.home, "send", "web", text, "--from", "ci").stdout.split("#")[1].split()[0])

    def row(self, number: int) -> dict[str, Any]:
        """The message, as `status --json` shows it, without a process for each look."""
        with closing(Store(self.home / "bus.db", busy_ms=1_000)) as store:
            return output.status_row(store.queries.status(number))

    def given(self) -> Counter[int]:
        """How often the model had each message, over all the transcripts."""
        lines = [one for path in self.config.glob("projects/*/*.jsonl") for one in path.read_bytes().splitlines()]
        return Counter(row_id for line in lines for row_id, _ in transcript.given(line))


@pytest.fixture
def sessions(home: Path) -> Iterator[Sessions]:
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as made:
        sessions = Sessions(home, Path(made))
        yield sessions
        for client in sessions.started:
            client.end()


@pytest.mark.spec("PROOF-2", "PROOF-3", "READ-8")
@pytest.mark.parametrize(
    "variables", [{}, {"RECORDS_BUSY": "1"}, {"RECORDS_CLEAR": "1"}], ids=["idle", "busy", "clear"]
)
def test_what_the_transcript_shows_is_read(sessions: Sessions, variables: dict[str, str]) -> None:
    client = sessions.start(**variables)
    for number in (1, 2):
        assert sessions.send("hi") == number
        until(lambda number=number: sessions.row(number)["state"] == "read")
        assert {key: sessions.row(number)[key] for key in ("read_by", "carrier")} == {
            "read_by": "transcript",
            "carrier": "inbox",
        }
    assert client.call("check_messages") == "no unread messages"
    assert agentbus(sessions.home, "send", "web", "x", "--wait-read", "30").returncode == 0
    finding = agentbus(sessions.home, "doctor", "web").stdout
    assert "proof" in finding
    assert ".jsonl" in finding


@pytest.mark.spec("STATE-6")
def test_what_the_model_never_had_is_pending_again_when_its_session_has_ended(sessions: Sessions) -> None:
    client = sessions.start(RECORDS_BUSY="never")
    number = sessions.send("lost?")
    until(lambda: sessions.row(number)["state"] == "delivered")
    # The server alone ends, and the client lives: it can still give its model what it took.
    client.close_stdin()
    until(lambda: not sessions.live())
    agentbus(sessions.home, "send", "other", "x")
    assert sessions.row(number)["state"] == "delivered"
    sessions.kill(client)
    sessions.start()
    until(lambda: sessions.row(number)["state"] == "read")
    assert sessions.given() == {number: 1}


@pytest.mark.spec("STATE-7")
def test_without_a_record_it_is_offered_to_the_next_session_once(sessions: Sessions) -> None:
    client = sessions.start(RECORDS_NONE="1")
    number = sessions.send("lost?")
    until(lambda: sessions.row(number)["state"] == "delivered")
    sessions.kill(client)
    following = sessions.start(RECORDS_NONE="1")
    assert "A message that was pushed to an earlier session of this name, which ended" in sessions.instructions
    answer = following.call("check_messages")
    assert "(pushed to an earlier session, which ended)\n<channel" in answer
    until(lambda: sessions.row(number)["read_by"] == "check")
    assert following.call("check_messages") == "no unread messages"


@pytest.mark.spec("STATE-6")
def test_50_kills_between_the_bytes_and_the_transcript_lose_nothing(sessions: Sessions) -> None:
    chance = random.Random(15)  # a seed, so that a failure can be repeated
    points = ["read", "enqueue", "dequeue", "half", "given"]
    sent: list[int] = []
    may_come_twice: set[int] = set()

    def taken_or_dead(client: RawClient) -> bool:
        return client.process.poll() is not None or sessions.row(sent[-1])["state"] != "pending"

    for _ in range(50):
        busy = {"RECORDS_BUSY": "1"} if chance.random() < 0.5 else {}
        client = sessions.start(RECORDS_DIE=f"{chance.choice(points)} {chance.choice([1, 2])}", **busy)
        while client.process.poll() is None:
            sent.append(sessions.send(f"n{len(sent)}"))
            until(partial(taken_or_dead, client))
        sessions.kill(client)
        # What was given, but not marked yet when both died, comes again: nothing could store the proof. [STATE-3]
        may_come_twice |= {one for one in sessions.given() if sessions.row(one)["state"] == "pending"}
    sessions.start()
    until(lambda: all(sessions.row(one)["state"] == "read" for one in sent), "all of them")
    given = sessions.given()
    assert set(given) == set(sent)
    assert {one for one, times in given.items() if times > 1} <= may_come_twice
