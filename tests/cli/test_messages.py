"""The commands that people read: inbox, history, status, and what the ledger says about every message."""

from __future__ import annotations

import json
import os
import pty
import select
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from agentbus.cli import output
from agentbus.cli.messages import parse_since
from agentbus.core.a2a import from_a2a
from agentbus.core.errors import InvalidRequest
from agentbus.core.model import MessageState
from agentbus.core.store import Store
from tests.support.command import PATIENCE_S, agentbus, clean_env
from tests.support.fakes import FakeClock

pytestmark = pytest.mark.timeout(90)  # a loaded machine takes seconds for one process

# A text as a hostile peer would send it: it clears the screen, renames the window and turns the text around.
HOSTILE = "\x1b[2J\x1b]0;owned\x07\u202ereversed\r\nsecond line"


def fill(store: Store, *, count: int = 6) -> list[int]:
    """Messages a -> b, every second one to c, 1 s apart; the first is read, the second delivered."""
    clock = FakeClock()
    ids = []
    for number in range(count):
        row_id, _ = store.send("a", "b" if number % 2 == 0 else "c", f"text {number}", now=clock())
        ids.append(row_id)
        clock.now += 1_000
    store.mark_read(ids[:1], session="s1", now=clock())
    store.mark_delivered(ids[1:2], session="s1", carrier="channel", now=clock())
    return ids


def test_the_ledger_tells_states_counts_and_ages(store: Store) -> None:
    ids = fill(store)
    ledger = store.queries
    assert [ledger.status(one).state for one in ids[:3]] == [
        MessageState.READ,
        MessageState.DELIVERED,
        MessageState.PENDING,
    ]
    b, c = ledger.counts()
    assert (b.mailbox, b.pending, b.delivered, b.read) == ("b", 2, 0, 1)
    assert (c.mailbox, c.pending, c.delivered, c.read) == ("c", 2, 1, 0)
    assert b.oldest_pending_at == ledger.status(ids[2]).sent_at
    assert ledger.waiting() == {"b": 2, "c": 2}
    assert ledger.last_delivered("s1") == ledger.status(ids[1]).delivered_at
    assert ledger.last_delivered("nobody") is None
    assert [one.id for one in ledger.unsettled(3)] == ids[3:]
    assert [one.id for one in ledger.after(ids[1], 2)] == ids[2:4]
    assert [one.id for one in ledger.among([ids[4], ids[0], 999])] == [ids[0], ids[4]]
    assert ledger.newest_id() == ids[-1]


@pytest.mark.spec("LEDGER-2")
def test_history_goes_back_page_by_page(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentbus.core.queries._PAGE", 2)
    ids = fill(store)
    assert [one.id for one in store.queries.newest_first()] == ids[::-1]
    assert [one.id for one in store.queries.newest_first(peer="c")] == ids[::-1][::2]
    assert [one.id for one in store.queries.newest_first(peer="a")] == ids[::-1]
    since = store.queries.status(ids[3]).sent_at
    assert [one.id for one in store.queries.newest_first(since=since)] == ids[:2:-1]


@pytest.mark.spec("LEDGER-1")
def test_inbox_shows_what_is_unread_and_takes_nothing(home: Path, store: Store) -> None:
    ids = fill(store, count=8)
    before = store.queries.unsettled(100)
    done = agentbus(home, "inbox", "B", "--limit", "2")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"#{ids[2]} from a, ")
    assert lines[0].endswith(" d ago, pending")
    assert lines[1] == "    text 2"
    assert lines[-1] == "there is more: agentbus inbox b --limit 20"
    rows = [json.loads(line) for line in agentbus(home, "inbox", "c", "--json").stdout.splitlines()]
    assert [(row["id"], row["state"]) for row in rows] == [
        (ids[1], "delivered"),
        *((one, "pending") for one in ids[3::2]),
    ]
    assert store.queries.unsettled(100) == before
    # By default, inbox shows the mailbox of the caller.
    assert agentbus(home, "inbox", AGENTBUS_NAME="c").stdout.startswith(f"#{ids[1]} from a, ")
    assert agentbus(home, "inbox", "nobody").stdout == 'nothing unread in the mailbox of "nobody"\n'


@pytest.mark.spec("LEDGER-2", "CLI-3")
def test_history_finds_what_is_asked_for(home: Path) -> None:
    for to, text in (("bob", "the API listens on 8080"), ("eve", "lunch?"), ("bob", "日本 (API)")):
        agentbus(home, "send", to, text, "--from", "alice")

    def texts(*arguments: str) -> list[str]:
        done = agentbus(home, "history", "--json", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        return [json.loads(line)["text"] for line in done.stdout.splitlines()]

    assert texts() == ["the API listens on 8080", "lunch?", "日本 (API)"]
    assert texts("--limit", "1") == ["日本 (API)"]
    assert texts("--peer", "Eve") == ["lunch?"]
    assert texts("--grep", "api") == ["the API listens on 8080", "日本 (API)"]
    assert texts("--grep", r"\d{4}$", "--peer", "bob", "--since", "1h") == ["the API listens on 8080"]
    assert texts("--since", "2099-01-01") == []
    shown = agentbus(home, "history").stdout.splitlines()
    assert len(shown) == 3
    assert shown[1].endswith("pending    alice -> eve  lunch?")
    (row,) = [json.loads(line) for line in agentbus(home, "status", "#2", "--json").stdout.splitlines()]
    assert set(row) == {
        *("id", "state", "from", "to", "text", "reply_to", "sent_at", "delivered_at", "carrier", "read_at", "read_by"),
        *("sender_session", "sender_was", "thread", "answer_by", "answered_by", "to_group"),
    }
    assert (row["id"], row["state"], row["delivered_at"]) == (2, "pending", None)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["history", "--since", "yesterday"], "--since is 'yesterday': use an age (90s, 10m, 2h, 3d) or a time"),
        (["history", "--grep", "("], "--grep is '(', which is not a regular expression"),
        (["history", "--peer", "!!"], '"!!" is not a name'),
        (["history", "--limit", "0"], "--limit is '0': use a whole number, 1 or more"),
        (["status", "9" * 30], "the id is '999"),
        (["status", "x"], "the id is 'x': use a whole number, 1 or more"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(home: Path, arguments: list[str], sentence: str) -> None:
    done = agentbus(home, *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert sentence in done.stderr


@pytest.mark.spec("LEDGER-3")
def test_status_of_what_is_not_there(home: Path) -> None:
    agentbus(home, "send", "bob", "hi", "--from", "ci")
    assert agentbus(home, "status", "1").stdout.startswith('#1 from "ci" to "bob" is pending: sent 20')
    done = agentbus(home, "status", "7")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "agentbus: there is no message #7: it was never sent, or it has been pruned\n"


def test_since_is_a_span_or_an_instant(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_700_000_000_000
    for text, ago_s in (("90s", 90), ("10m", 600), ("10 min", 600), ("2h", 7_200), ("3D", 259_200)):
        assert parse_since(text, now) == now - ago_s * 1_000
    monkeypatch.setenv("TZ", "UTC-2")
    time.tzset()
    try:
        assert parse_since("2026-01-31T12:00", now) == 1_769_853_600_000
        assert parse_since("2026-01-31T12:00Z", now) == 1_769_860_800_000
    finally:
        monkeypatch.undo()
        time.tzset()
    for text in ("", "10", "m", "-5m", "9999999d", "2026-13-01"):
        with pytest.raises(InvalidRequest, match="--since is"):
            parse_since(text, now)


# -- how it looks ------------------------------------------------------------------------------------------


def at_a_terminal(home: Path, *arguments: str, **variables: str) -> bytes:
    """What a command shows on a terminal."""
    ours, theirs = pty.openpty()
    env = clean_env(home, TERM="xterm-256color", COLUMNS="100", LINES="30", **variables)
    with subprocess.Popen([sys.executable, "-m", "agentbus", *arguments], env=env, stdout=theirs) as child:
        os.close(theirs)
        shown = b""
        give_up_at = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up_at and select.select([ours], [], [], PATIENCE_S)[0]:
            try:
                part = os.read(ours, 65_536)
            except OSError:  # Linux: the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert child.returncode == 0
    return shown


@pytest.mark.spec("CLI-6")
def test_colours_are_for_terminals_and_for_who_wants_them(home: Path) -> None:
    agentbus(home, "send", "bob", "hi", "--from", "ci")
    assert b"\x1b[" in at_a_terminal(home, "history")
    assert b"\x1b[" not in at_a_terminal(home, "history", NO_COLOR="1").replace(b"\x1b[1m", b"").replace(
        b"\x1b[0m", b""
    )
    assert "\x1b" not in agentbus(home, "history").stdout
    assert "\x1b" not in agentbus(home, "--help").stdout


@pytest.mark.spec("CLI-7")
def test_a_message_cannot_steer_the_readers_terminal(home: Path) -> None:
    agentbus(home, "send", "bob", HOSTILE, "--from", "eve")
    for arguments in (("inbox", "bob"), ("history",), ("status", "1")):
        shown = at_a_terminal(home, *arguments, NO_COLOR="1")
        for steering in (b"\x1b[2J", b"\x1b]0;", b"\x07", "\u202e".encode()):
            assert steering not in shown, arguments
        assert b"\\x1b[2J" in shown
        assert "\x1b[2J" not in agentbus(home, *arguments).stdout, "nor from a file that is shown later"
    # JSON carries all of it, escaped by its own rules.
    assert json.loads(agentbus(home, "history", "--json").stdout)["text"] == HOSTILE


def test_spans_and_instants_read_well() -> None:
    shown = [output.span(ms) for ms in (0, 12, 999, 1_000, 59_000, 60_000, 7_200_000, 200_000_000)]
    assert shown == ["0 ms", "12 ms", "999 ms", "1 s", "59 s", "1 min", "2 h", "2 d"]
    assert output.age(5_000, 4_000) == "1 s", "a clock that went back"


def test_history_of_a_locale_that_knows_no_japanese(home: Path) -> None:
    agentbus(home, "send", "bob", "日本", "--from", "ci")
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = agentbus(home, "history", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u65e5\\u672c" in done.stdout
    assert json.loads(agentbus(home, "history", "--json", **variables).stdout)["text"] == "日本"


def test_looking_reads_only(home: Path) -> None:
    agentbus(home, "send", "bob", "hi")
    connection = sqlite3.connect(home / "bus.db")
    before = connection.execute("PRAGMA data_version").fetchone()
    for arguments in (("inbox", "bob"), ("history",), ("status", "1")):
        assert agentbus(home, *arguments).returncode == 0
    assert connection.execute("PRAGMA data_version").fetchone() == before
    connection.close()


@pytest.mark.spec("ENV-1", "ENV-3")
def test_history_in_the_form_of_a2a(home: Path) -> None:
    agentbus(home, "send", "bob", "which port?", "--from", "alice")
    store = Store(home / "bus.db", busy_ms=1_000)
    store.send("bob", "alice", "8080", now=1_700_000_000_000, reply_to=1)
    store.send("alice", "bob", "thanks", now=1_700_000_000_001, reply_to=2)
    store.send("carol", "carol", "mine", now=1_700_000_000_002)
    store.close()
    with closing(sqlite3.connect(home / "bus.db")) as before, before:
        # As before schema 8, where a message could even answer itself.
        before.execute("UPDATE messages SET thread = NULL WHERE id = 3")
        before.execute("UPDATE messages SET reply_to = 4 WHERE id = 4")
    done = agentbus(home, "history", "--a2a")
    assert (done.returncode, done.stderr) == (0, "")
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["messageId"] for one in messages] == ["1", "2", "3", "4"]
    assert [one["contextId"] for one in messages] == ["1", "1", "1", "4"]
    assert [one.get("referenceTaskIds") for one in messages] == [None, ["1"], ["2"], ["4"]]
    kept = [json.loads(line) for line in agentbus(home, "history", "--json").stdout.splitlines()]
    envelopes = [from_a2a(one, max_bytes=65_536) for one in messages]
    assert [(one.id, one.sender, one.recipient, one.text, one.reply_to, one.root) for one in envelopes] == [
        (row["id"], row["from"], row["to"], row["text"], row["reply_to"], row["thread"]) for row in kept
    ]
    both = agentbus(home, "history", "--a2a", "--json")
    assert (both.returncode, both.stdout) == (2, "")


@pytest.mark.spec("OLD-2", "STATE-5")
def test_a_mailbox_is_emptied_and_says_what_it_held(home: Path, store: Store) -> None:
    ids = fill(store, count=8)
    refused = agentbus(home, "inbox", "b", "--discard")
    assert (refused.returncode, refused.stderr) == (
        2,
        "agentbus: nobody can be asked here, nothing was removed: add --yes\n",
    )
    assert agentbus(home, "inbox", "b", "--yes").returncode == 2
    new, _ = store.send("ci", "b", "new", now=time.time_ns() // 1_000_000)
    done = agentbus(home, "inbox", "B", "--discard", "--before", "1h", "--yes")
    assert done.returncode == 0
    assert done.stdout.startswith(
        'removed 3 messages from the mailbox of "b" (3 pending, 0 delivered): from a 3; sent '
    )
    left = [json.loads(line)["id"] for line in agentbus(home, "inbox", "b", "--json").stdout.splitlines()]
    assert left == [new]
    rows = agentbus(home, "inbox", "c", "--discard", "--yes", "--json").stdout.splitlines()
    assert [json.loads(row)["id"] for row in rows] == ids[1::2]
    assert agentbus(home, "inbox", "c", "--discard", "--yes").stdout == 'nothing to remove in the mailbox of "c"\n'
    assert store.queries.status(ids[0]).read_at is not None, "what was read is history"


@pytest.mark.spec("OLD-2")
@pytest.mark.parametrize(("answer", "left"), [("n", 1), ("", 1), ("y", 0)])
def test_a_person_is_asked_before_a_mailbox_is_emptied(home: Path, store: Store, answer: str, left: int) -> None:
    store.send("a", "b", "text", now=1)
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    command = [sys.executable, "-m", "agentbus", "inbox", "b", "--discard"]
    done = subprocess.run(
        command, stdin=theirs, env=clean_env(home), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    os.close(ours)
    os.close(theirs)
    assert done.stderr.startswith('remove the unread messages of "b" for good? [y/N] ')
    assert done.returncode == left
    assert len(store.queries.inbox("b", 9)) == left


@pytest.mark.spec("OLD-3", "STATE-5")
def test_what_is_pending_can_be_taken_back_and_nothing_else(home: Path, store: Store) -> None:
    ids = fill(store)
    done = agentbus(home, "cancel", f"#{ids[2]}")
    assert done.stdout.startswith(f'took back #{ids[2]} from "a" to "b", ')
    assert agentbus(home, "cancel", str(ids[2])).returncode == 2
    for one in ids[:2]:
        refused = agentbus(home, "cancel", str(one))
        assert refused.returncode == 1
        assert "is not pending any more, nothing was taken back" in refused.stderr
    assert [one.id for one in store.queries.unsettled(9)] == [ids[1], *ids[3:]]
