"""Mail that is not pushed, or not surely: check_messages, the unread line, health checks, replies. Real processes."""

from __future__ import annotations

import json
import signal
import sqlite3
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.test_sessions import present, rows, sockets
from tests.support.client import INITIALIZE, RawClient
from tests.support.command import PATIENCE_S, agentbus, until

pytestmark = pytest.mark.timeout(90)  # several sessions start in each test, and a loaded machine takes seconds for one

Start = Callable[..., RawClient]
FLAG = "--dangerously-load-development-channels"

# Takes the place of Claude Code: an interpreter script that starts the server on its own stdin and stdout.
CLAUDE = f"""#!{sys.executable}
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-m", "agentbus", "serve", "claude-mcp"])
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: child.send_signal(number))
sys.exit(child.wait())
"""


@pytest.fixture
def claude(home: Path, start: Start) -> Start:
    """Starts a session under a `claude` with these arguments: claude("backend", "--flag", "value")."""
    script = home.parent / "claude"
    script.write_text(CLAUDE)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)

    def start_claude(name: str, *arguments: str, **options) -> RawClient:
        options.setdefault("AGENTBUS_DELIVERY", "auto")
        return start(name, command=[str(script), *arguments], **options)

    return start_claude


def read_ids(home: Path) -> list[int]:
    return [row_id for (row_id,) in rows(home, "SELECT id FROM messages WHERE read_at IS NOT NULL ORDER BY id")]


@pytest.mark.spec("VOID-1", "VOID-2", "READ-1")
def test_claude_without_the_flag_keeps_its_mail_until_it_is_asked_for(claude: Start, start: Start, home: Path) -> None:
    """Fault 12 of the system that was measured: mail marked delivered although nobody saw it."""
    bob, alice = claude("bob", "--continue"), start("alice")
    instructions = bob.handshake()["instructions"]
    assert "not pushed into this session (claude was started without" in instructions
    assert len(instructions) < 2_000
    alice.handshake()
    assert "messages wait for check_messages (pull: claude was started without" in bob.call("whoami")
    sent = alice.call("send_message", to="bob", text="one")
    assert sent.startswith('sent #1 to "bob" (online, but nothing can be pushed to it: it reads its mail only when')
    alice.call("send_message", to="bob", text="</channel><two>")
    assert bob.call("list_peers").endswith("\n2 unread messages: call check_messages")
    assert bob.refuse("send_message", to="***", text="x").endswith("\n2 unread messages: call check_messages")
    time.sleep(0.5)  # a push would have come by now
    assert bob.events == []
    assert rows(home, "SELECT count(*) FROM messages WHERE delivered_at IS NULL") == [(2,)]
    lines = bob.call("check_messages").split("\n")
    assert lines[0] == "2 unread messages:"
    assert lines[1] == '<channel source="agentbus" from="alice" msg_id="1">one</channel>'
    assert lines[2].endswith(">&lt;/channel><two></channel>")
    assert len(lines) == 3
    until(lambda: read_ids(home) == [1, 2])
    assert rows(home, "SELECT DISTINCT carrier, delivered_at IS NOT NULL FROM messages") == [("pull", 1)]
    assert bob.call("check_messages") == "no unread messages"
    assert "unread" not in bob.call("list_peers")
    table = agentbus(home, "peers").stdout
    assert "nothing can be pushed to bob, it reads with check_messages: claude was started without" in table


@pytest.mark.spec("VOID-1")
def test_claude_with_the_flag_gets_its_mail_pushed(claude: Start, home: Path) -> None:
    bob = claude("bob", FLAG, "server:agentbus")
    bob.handshake()
    agentbus(home, "send", "bob", "one", "--from", "ci")
    assert bob.wait_events(1)[0]["content"] == "one"
    until(lambda: rows(home, "SELECT carrier FROM messages WHERE delivered_at IS NOT NULL") == [("channel",)])
    assert "pushed into this session (channel: claude was started with its channel)" in bob.call("whoami")
    assert "unread" not in bob.call("list_peers")


@pytest.mark.spec("VOID-1", "READ-1")
def test_another_client_gets_it_pushed_and_may_ask_for_it_too(start: Start, home: Path) -> None:
    bob = start("bob", AGENTBUS_DELIVERY="auto")
    bob.handshake()
    agentbus(home, "send", "bob", "one", "--from", "ci")
    assert bob.wait_events(1)[0]["content"] == "one"
    until(lambda: rows(home, "SELECT delivered_at IS NOT NULL FROM messages") == [(1,)])
    assert "(channel?: " in bob.call("whoami")
    assert bob.call("list_peers").endswith("\n1 unread message: call check_messages")
    answer = bob.call("check_messages").split("\n")
    assert answer[:2] == ["1 unread message:", "(pushed to this session before)"]
    assert answer[2].endswith(">one</channel>")
    until(lambda: read_ids(home) == [1])
    assert "unread" not in bob.call("list_peers")


@pytest.mark.spec("VOID-1", "CONF-1")
def test_the_variable_decides(claude: Start, start: Start, home: Path) -> None:
    pushed, pulled = claude("bob", AGENTBUS_DELIVERY="channel"), start("carol", AGENTBUS_DELIVERY="pull")
    for client in (pushed, pulled):
        client.handshake()
    for name in ("bob", "carol"):
        agentbus(home, "send", name, "one", "--from", "ci")
    assert pushed.wait_events(1)[0]["content"] == "one"
    assert "(pull: AGENTBUS_DELIVERY is pull)" in pulled.call("whoami")
    assert pulled.events == []
    done = agentbus(home, "serve", "claude-mcp", AGENTBUS_DELIVERY="owl")
    assert (done.returncode, done.stderr) == (
        2,
        "agentbus: AGENTBUS_DELIVERY is 'owl': set it to auto or channel or inbox or mod or pull, or unset it\n",
    )


@pytest.mark.spec("VOID-3")
@pytest.mark.parametrize("arguments", [["mcp", "list"], ["mcp", "get", "agentbus"]])
def test_a_health_check_leaves_no_trace(claude: Start, home: Path, arguments: list[str]) -> None:
    """Fault 12 again: a health check that registers a ghost and drains a mailbox."""
    probe = claude("bob", *arguments)
    result = probe.handshake(discover=True)
    assert result["capabilities"]["experimental"] == {"claude/channel": {}}
    assert probe.refuse("whoami").startswith("this is no session: claude mcp")
    assert not home.exists()
    agentbus(home, "send", "bob", "waits", "--from", "ci")
    time.sleep(0.5)  # a push would have come by now
    assert probe.events == []
    assert (present(home), sockets(home)) == ([], [])
    assert rows(home, "SELECT delivered_at FROM messages") == [(None,)]
    probe.process.send_signal(signal.SIGINT)
    assert probe.process.wait(PATIENCE_S) == 0


@pytest.mark.spec("READ-3")
@pytest.mark.parametrize("delivery", ["pull", "channel"])
def test_a_check_that_waits_returns_when_mail_comes(start: Start, home: Path, delivery: str) -> None:
    # The poll never comes here, so the wake has to end the wait.
    spy = (
        "import sys; sys.argv = ['agentbus', 'serve', 'claude-mcp']\n"
        "import agentbus.core.session; agentbus.core.session._CHECK_POLL_S = 1e6\n"
        "from agentbus.__main__ import main; main()\n"
    )
    bob = start("bob", command=[sys.executable, "-c", spy], AGENTBUS_DELIVERY=delivery)
    bob.handshake()
    time.sleep(0.5)  # the ready gate
    request = bob.post_call("check_messages", wait_s=90)
    assert "woken by" in bob.call("whoami")  # other calls do not wait for the check
    agentbus(home, "send", "bob", "there", "--from", "ci")
    text, is_error = bob.result(request)
    assert not is_error
    assert text.endswith(">there</channel>")
    until(lambda: read_ids(home) == [1])


@pytest.mark.spec("READ-3")
def test_a_check_that_waits_in_vain_says_so(start: Start) -> None:
    bob = start("bob", AGENTBUS_DELIVERY="pull")
    bob.handshake()
    assert bob.call("check_messages", wait_s=1) == "no unread messages"
    assert bob.refuse("check_messages", wait_s=101) == "'wait_s' is 101: use 0 to 100"
    assert bob.refuse("check_messages", wait_s="x") == "'wait_s' is a whole number, not str (x)"
    assert bob.refuse("check_messages", wait_s=1.5) == "'wait_s' is a whole number, not float (1.5)"
    assert bob.refuse("check_messages", wait_s=True) == "'wait_s' is a whole number, not bool (True)"


@pytest.mark.spec("READ-1", "READ-3", "LIFE-2")
@pytest.mark.parametrize("how", ["cancelled", "end of stdin", "killed"])
def test_a_check_that_is_given_up_reads_nothing(start: Start, home: Path, how: str) -> None:
    bob = start("bob", AGENTBUS_DELIVERY="pull")
    bob.handshake()
    request = bob.post_call("check_messages", wait_s=100)
    bob.call("whoami")
    if how == "cancelled":
        bob.send_line(
            json.dumps(
                {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": request}}
            ).encode()
        )
        bob.call("whoami")
        agentbus(home, "send", "bob", "after", "--from", "ci")
    else:
        bob.close_stdin() if how == "end of stdin" else bob.process.kill()
        bob.process.wait(PATIENCE_S)
        agentbus(home, "send", "bob", "after", "--from", "ci")
        bob = start("bob", AGENTBUS_DELIVERY="pull")
        bob.handshake()
    assert rows(home, "SELECT delivered_at, read_at FROM messages") == [(None, None)]
    assert bob.call("check_messages").endswith(">after</channel>")


@pytest.mark.spec("READ-1")
def test_a_long_mailbox_is_read_in_portions_each_message_once(start: Start, home: Path) -> None:
    alice, bob = start("alice"), start("bob", AGENTBUS_DELIVERY="pull")
    alice.handshake()
    bob.handshake()
    requests = [alice.post_call("send_message", to="bob", text=f"<{number}>") for number in range(120)]
    for request in requests:
        alice.result(request)
    seen: list[str] = []
    sizes = []
    while (text := bob.call("check_messages")) != "no unread messages":
        found = [line.split(">", 1)[1].removesuffix("</channel>") for line in text.split("\n") if "<channel" in line]
        sizes.append(len(found))
        seen += found
        left = 120 - len(seen)
        assert text.endswith(f"\n{left} more: call check_messages again") == (left > 0)
    assert seen == [f"<{number}>" for number in range(120)]
    assert sizes == [50, 50, 20]
    for _ in range(3):
        alice.call("send_message", to="bob", text="x" * 30_000)
    assert [bob.call("check_messages").count("<channel") for _ in range(3)] == [1, 1, 1]


@pytest.mark.spec("READ-1", "READ-4")
def test_a_message_too_long_for_one_answer_comes_in_parts_and_is_read_with_the_last(start: Start, home: Path) -> None:
    text = "".join(f"<{number}>\n" for number in range(8_000))  # 62,890 characters
    agentbus(home, "send", "bob", "--from", "ci", stdin=text + ".")
    agentbus(home, "send", "bob", "short", "--from", "ci")
    bob = start("bob", AGENTBUS_DELIVERY="pull")
    bob.handshake()
    first = bob.call("check_messages")
    assert len(first) <= 40_000
    assert ' part="1/2">' in first
    assert "short" not in first
    assert "\n#1 is long, and goes on: call check_messages again for its next part" in first
    assert read_ids(home) == []
    bob.process.kill()
    bob.process.wait(PATIENCE_S)
    # Half a message is no message: the next server of the session begins again.
    bob = start("bob", AGENTBUS_DELIVERY="pull")
    bob.handshake()
    answers = [bob.call("check_messages"), bob.call("check_messages")]
    assert all(len(one) <= 40_000 for one in answers)
    found = [one.split(f' part="{number}/2">')[1].split("</channel>")[0] for number, one in enumerate(answers, 1)]
    assert "".join(found) == text + "."
    assert answers[1].endswith(">short</channel>")
    until(lambda: read_ids(home) == [1, 2])
    assert bob.call("check_messages") == "no unread messages"


@pytest.mark.spec("READ-1")
def test_checking_while_messages_are_pushed_loses_and_mixes_up_nothing(start: Start, home: Path) -> None:
    alice, bob = start("alice"), start("bob")
    alice.handshake()
    bob.handshake()
    requests = [alice.post_call("send_message", to="bob", text=f"<{number}>") for number in range(300)]
    checks = [bob.post_call("check_messages") for _ in range(20)]
    for request in requests:
        alice.result(request)
    texts = [bob.result(request)[0] for request in checks]
    while (text := bob.call("check_messages")) != "no unread messages":
        texts.append(text)
    until(lambda: len(read_ids(home)) == 300)
    checked = [line for text in texts for line in text.split("\n") if line.startswith("<channel")]
    numbers = [int(line.split('msg_id="')[1].split('"')[0]) for line in checked]
    assert sorted(numbers) == sorted(set(numbers)), "one check returns what another has"
    pushed = [int(event["meta"]["msg_id"]) for _, event in bob.events]
    assert pushed == sorted(set(pushed))
    assert set(numbers) == set(range(1, 301))


@pytest.mark.spec("READ-1", "STATE-3")
def test_what_was_checked_is_unread_until_the_result_is_written(start: Start, home: Path) -> None:
    """The client does not read its pipe. A result that does not fit in is not written, and its messages stay unread."""
    for _ in range(9):
        agentbus(home, "send", "bob", "--from", "ci", stdin="x" * 35_000)
    bob = start("bob", read=False, AGENTBUS_DELIVERY="pull")
    bob.post("initialize", INITIALIZE)
    bob.notify("notifications/initialized")
    for _ in range(9):
        bob.post_call("check_messages")
    until(lambda: len(read_ids(home)) >= 1, "the first results fit")
    time.sleep(0.5)  # the results that do not fit have had their time
    assert len(read_ids(home)) < 9
    bob.process.kill()
    bob.process.wait()
    again = start("bob", AGENTBUS_DELIVERY="pull")
    again.handshake()
    assert again.call("check_messages").count("<channel") == 1


@pytest.mark.spec("READ-2", "CHAN-2", "ARG-1", "THREAD-2")
def test_an_answer_marks_what_it_answers_as_read(start: Start, home: Path) -> None:
    alice, bob = start("alice"), start("bob")
    alice.handshake()
    bob.handshake()
    alice.call("send_message", to="bob", text="question")
    (event,) = bob.wait_events(1)
    msg_id = int(event["meta"]["msg_id"])
    until(lambda: alice.call("message_status", id=msg_id).endswith("; whether it was read is not known"))
    bob.call("set_name", name="robert")
    assert bob.call("send_message", to="alice", text="answer", reply_to=msg_id).startswith("sent #2")
    assert alice.wait_events(1)[0]["meta"]["reply_to"] == event["meta"]["msg_id"]
    assert read_ids(home) == [msg_id]
    status = alice.call("message_status", id=msg_id)
    assert status.startswith('#1 from "alice" to "bob" is read: sent 20')
    assert "Z, delivered 20" in status
    assert " by channel, read 20" in status
    # The answer of its own sender does not make it read. An unknown id is refused, and nothing is sent.
    alice.call("send_message", to="robert", text="another")
    alice.call("send_message", to="robert", text="answers itself", reply_to="#3")
    for unknown in ("#5", "999"):
        refused = alice.refuse("send_message", to="robert", text="x", reply_to=unknown)
        assert refused == (
            f"there is no message #{unknown.lstrip('#')} to answer, it was never sent, or it has been pruned: "
            "leave reply_to out"
        )
    alice.call("send_message", to="robert", text="x", reply_to=None)
    assert read_ids(home) == [msg_id]
    assert rows(home, "SELECT max(id) FROM messages") == [(5,)]
    assert alice.refuse("send_message", to="bob", text="x", reply_to=0).startswith("'reply_to' is 0: use 1 to ")
    assert alice.refuse("send_message", to="bob", text="x", reply_to="one").endswith("not str (one)")


@pytest.mark.spec("READ-3")
def test_the_status_of_a_message(start: Start, home: Path) -> None:
    alice = start("alice")
    alice.handshake()
    alice.call("send_message", to="nobody", text="x")
    assert alice.call("message_status", id=1).startswith('#1 from "alice" to "nobody" is pending: sent 20')
    assert alice.refuse("message_status", id=2) == "there is no message #2: it was never sent, or it has been pruned"


@pytest.mark.spec("NAME-7", "VOID-1")
def test_a_wrapper_between_claude_and_the_server_is_seen_through(claude: Start, home: Path) -> None:
    """The session belongs to `claude`, which outlives the wrapper, so a restart finds its name again."""
    script = home.parent / "claude"
    script.write_text(
        CLAUDE.replace('[sys.executable, "-m"', '["/bin/sh", "-c", \'"$@"; exit $?\', "sh", sys.executable, "-m"')
    )
    bob = claude("bob", FLAG, "server:agentbus")
    bob.handshake()
    host = rows(home, "SELECT host_pid FROM peers WHERE left_at IS NULL")
    assert host == [(bob.process.pid,)]
    assert "claude was started with its channel" in bob.call("whoami")


def test_many_clients_check_at_once(start: Start, home: Path) -> None:
    """Several calls ask the same session at once. Each message goes into one answer."""
    for number in range(10):
        agentbus(home, "send", "bob", f"{number}", "--from", "ci")
    bob = start("bob", AGENTBUS_DELIVERY="pull")
    bob.handshake()
    requests = [bob.post_call("check_messages") for _ in range(10)]
    answers = [bob.result(request)[0] for request in requests]
    assert sum(answer.count("<channel") for answer in answers) == 10


@pytest.mark.anyio
@pytest.mark.spec("READ-1")
async def test_a_request_that_is_never_answered_gives_its_messages_back() -> None:
    """Cancels between the end of the tool and the write of its result. No client can hit this gap at will."""
    from agentbus.adapters.mcp.sdk import _Settling

    settled: list[bool] = []

    async def settle(reached: bool) -> None:
        settled.append(reached)

    settling = _Settling(lambda _id: None)
    settling.add(7, settle)
    await settling.settle(8, reached=True)
    assert settled == []
    unanswered = settling.metadata(7).on_request_unanswered
    assert unanswered is not None
    await unanswered()
    await settling.settle(7, reached=True)
    assert settled == [False]


@pytest.mark.spec("OLD-4", "CHAN-4")
@pytest.mark.parametrize(("count", "delivery"), [(25, "channel"), (25, "pull"), (20, "channel")])
def test_much_old_mail_is_announced_and_not_pushed(start: Start, home: Path, count: int, delivery: str) -> None:
    agentbus(home, "peers")
    with sqlite3.connect(home / "bus.db") as database:
        now = time.time_ns() // 1_000_000
        row = ("bob", "old", now - 2 * 86_400_000)
        query = "INSERT INTO messages (sender, recipient, body, sent_at) VALUES ('ci', ?, ?, ?)"
        database.executemany(query, [row] * count)
    database.close()
    agentbus(home, "send", "bob", "new", "--from", "ci")
    bob = start("bob", AGENTBUS_DELIVERY=delivery)
    bob.handshake()
    if count <= 20:
        assert [event["content"] for event in bob.wait_events(21)] == ["old"] * 20 + ["new"]
        assert bob.events[0][1]["meta"]["age"] == "2 d"
        return
    if delivery == "channel":
        line, new = bob.wait_events(2)
        assert (line["meta"]["from"], new["content"]) == ("agentbus", "new")
        said = line["content"]
        agentbus(home, "send", "bob", "newer", "--from", "ci")
        assert bob.wait_events(3)[2]["content"] == "newer"
        report = agentbus(home, "doctor", "bob").stdout
        assert "pending, the oldest for" not in report, report
    else:
        said = bob.call("whoami").split("\n")[1]
    assert said.startswith("25 messages for you are older than a day, from ci (25), since 20")
    assert "agentbus inbox bob --discard --before 1d" in said
    assert rows(home, "SELECT count(*) FROM messages WHERE delivered_at IS NULL AND body = 'old'") == [(25,)]
    answer = bob.call("check_messages")
    texts = [text.split("</channel>")[0] for text in answer.split('">')[1:]]
    assert texts[-25:] == ["old"] * 25
    assert "new" in texts
    assert bob.call("check_messages") == "no unread messages"
