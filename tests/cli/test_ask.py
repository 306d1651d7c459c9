"""`agentbus ask`, as scripts use it, and `history --thread`."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.cli.test_wait import begin
from tests.support.client import RawClient
from tests.support.command import PATIENCE_S, agentbus, clean_env

pytestmark = pytest.mark.timeout(90)  # a loaded machine takes seconds for one process

Start = Callable[..., RawClient]


def question_of(client: RawClient) -> dict[str, str]:
    client.wait(lambda: [event for _, event in client.events if "answer_by" in event["meta"]], "the question")
    found: dict[str, str] = client.events[-1][1]["meta"]
    return found


def left(home: Path) -> list[str]:
    """What a command has left in the home: locks that nobody holds, watching sockets, asks."""
    watch = home / "watch"
    with closing(sqlite3.connect(home / "bus.db")) as connection:
        asks = [str(row) for row in connection.execute("SELECT * FROM asks")]
        sessions = {session for (session,) in connection.execute("SELECT session FROM peers")}
    return [*asks, *(os.listdir(watch) if watch.is_dir() else ()), *(set(os.listdir(home / "live")) - sessions)]


@pytest.mark.spec("ASK-5", "ASK-7", "ASK-1")
def test_a_command_that_asks_as_a_live_session_gets_the_answer_alone(home: Path, start: Start) -> None:
    backend, web = start("backend"), start("web")
    backend.handshake()
    web.handshake()
    for as_json in ((), ("--json",)):
        with begin(home, "ask", "backend", "--from", "web", *as_json, stdin=subprocess.PIPE) as asking:
            assert asking.stdin is not None
            asking.stdin.write("which\nport?\n")
            asking.stdin.close()
            asking.stdin = None
            asked = question_of(backend)
            assert backend.events[-1][1]["content"] == "which\nport?"
            said = backend.call("send_message", to="web", text="8080\n<ok>", reply_to=asked["msg_id"])
            assert said.endswith(' to "web", which waits for this answer')
            out, err = asking.communicate(timeout=PATIENCE_S)
        assert (asking.returncode, err) == (0, "")
        answer_id = int(said.split("#")[1].split()[0])
        if as_json:
            row = json.loads(out)
            assert (row["id"], row["text"], row["thread"]) == (answer_id, "8080\n<ok>", int(asked["msg_id"]))
        else:
            assert out == "8080\n<ok>\n"
        status = json.loads(agentbus(home, "status", str(answer_id), "--json").stdout)
        assert (status["state"], status["carrier"], status["read_by"]) == ("read", "ask", "check")
        asked_status = json.loads(agentbus(home, "status", asked["msg_id"], "--json").stdout)
        assert asked_status["answered_by"] == answer_id
        backend.events.clear()
    assert left(home) == []
    # Nothing of it was for the session, and what comes later in the thread is.
    backend.call("send_message", to="web", text="or 8081", reply_to=asked["msg_id"])
    assert [event["content"] for event in web.wait_events(1)] == ["or 8081"]


@pytest.mark.spec("ASK-7", "ASK-3", "THREAD-3")
def test_offline_is_said_at_once_and_waited_for_if_a_time_was_given(home: Path) -> None:
    done = agentbus(home, "ask", "bob", "well?", "--from", "ci")
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr == (
        'agentbus: nobody answers now: queued #1 for "bob": no such peer yet, it is delivered when one starts\n'
    )
    late = agentbus(home, "ask", "bob", "well?", "--from=ci", "--timeout=0.1")
    assert late.returncode == 75
    assert late.stderr.endswith(
        'agentbus: nobody answers now: queued #2 for "bob": no such peer yet, it is delivered when one starts\n'
    )
    with begin(home, "ask", "bob", "well?", "--from", "ci", "--timeout", "60") as asking:
        assert asking.stderr is not None
        assert asking.stderr.readline().endswith("; waiting all the same, for 60 s in all\n")
        assert agentbus(home, "send", "ci", "yes", "--from", "bob", "--reply-to", "#3").returncode == 0
        out, _ = asking.communicate(timeout=PATIENCE_S)
    assert (asking.returncode, out) == (0, "yes\n")
    assert left(home) == []
    shown = agentbus(home, "history", "--thread", "#4").stdout.splitlines()
    assert [line.split("  ")[-1] for line in shown] == ["well?", "yes"]
    assert "answered by #4" in agentbus(home, "status", "3").stdout
    assert "not answered, asked until 20" in agentbus(home, "status", "2").stdout
    assert agentbus(home, "history", "--thread", "99").stdout == "no such message\n"


@pytest.mark.spec("ASK-7", "ASK-4")
def test_a_signal_ends_an_ask_and_its_answer_is_for_the_session(home: Path, start: Start) -> None:
    backend, web = start("backend"), start("web")
    backend.handshake()
    web.handshake()
    with begin(home, "ask", "backend", "well?", env=clean_env(home, AGENTBUS_NAME="web")) as asking:
        asked = question_of(backend)
        asking.send_signal(signal.SIGTERM)
        out, err = asking.communicate(timeout=PATIENCE_S)
    assert (asking.returncode, out, err) == (128 + signal.SIGTERM, "", "")
    assert left(home) == []
    backend.call("send_message", to="web", text="yes", reply_to=asked["msg_id"])
    assert web.wait_events(1)[0]["content"] == "yes"


@pytest.mark.spec("ASK-7", "WATCH-1")
@pytest.mark.parametrize("is_woken", [True, False], ids=["socket", "poll"])
def test_every_signal_and_an_answer_end_a_wait_also_without_a_socket(home: Path, is_woken: bool) -> None:
    assert agentbus(home, "send", "ci", "hello", "--from", "bob").returncode == 0
    variables = {}
    if not is_woken:
        (home / "watch").write_text("no folder")
        variables["AGENTBUS_POLL_MS"] = "60000"

    def wait() -> subprocess.Popen[str]:
        words = ("ask", "bob", "well?", "--from", "ci", "--timeout", "120")
        asking = begin(home, *words, env=clean_env(home, **variables))
        assert asking.stderr is not None
        if not is_woken:
            assert "so it checks every 60000 ms" in asking.stderr.readline()
        assert asking.stderr.readline().endswith("; waiting all the same, for 120 s in all\n")
        return asking

    for number in (signal.SIGINT, signal.SIGHUP):
        with wait() as asking:
            asking.send_signal(number)
            out, err = asking.communicate(timeout=PATIENCE_S)
        assert (asking.returncode, out, err) == (128 + number, "", "")
    with wait() as asking:
        assert agentbus(home, "send", "ci", "yes", "--from", "bob", "--reply-to", "4").returncode == 0
        out, _ = asking.communicate(timeout=PATIENCE_S)
    assert (asking.returncode, out) == (0, "yes\n")
    assert left(home) == []


@pytest.mark.spec("ASK-7")
def test_an_answer_that_cannot_be_printed_stays_pending(home: Path, start: Start) -> None:
    backend = start("backend")
    backend.handshake()
    ours, theirs = os.pipe()
    os.close(ours)
    with begin(home, "ask", "backend", "well?", "--from", "ci", stdout=theirs) as asking:
        os.close(theirs)
        backend.call("send_message", to="ci", text="yes", reply_to=question_of(backend)["msg_id"])
        _, err = asking.communicate(timeout=PATIENCE_S)
    assert asking.returncode == 1
    assert err == "agentbus: the output cannot be written (Broken pipe): the answer is still pending\n"
    assert json.loads(agentbus(home, "status", "2", "--json").stdout)["state"] == "pending"
    assert left(home) == []


@pytest.mark.spec("ASK-3", "ASK-7")
def test_the_asked_one_is_killed_while_it_is_asked(home: Path, start: Start) -> None:
    backend, web = start("backend"), start("web")
    backend.handshake()
    web.handshake()
    call = web.post_call("ask", to="backend", text="well?", wait_s=90)
    with begin(home, "ask", "backend", "and?", "--from", "ci") as asking:
        backend.wait_events(2)
        killed_at = time.perf_counter()
        backend.process.kill()
        text, is_error = web.result(call)
        took_s = time.perf_counter() - killed_at
        out, err = asking.communicate(timeout=PATIENCE_S)
    assert not is_error
    assert text.startswith('"backend" has ended without an answer to #1: the question ')
    assert (asking.returncode, out) == (75, "")
    assert err.startswith('agentbus: "backend" has ended without an answer to #2: the question ')
    assert took_s < PATIENCE_S, "long before the time was up"


@pytest.mark.spec("ASK-6", "CLI-4", "ERR-1")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "ask needs a name: agentbus ask backend 'the text, in quotes'"),
        (("a", "b", "c"), "ask takes a name and one text, not 3 words"),
        (("bob", "x", "--wait-read", "1"), "ask has no option '--wait-read'"),
        (("bob", "x", "--timeout", "soon"), "--timeout is 'soon': use a number of seconds from 0 to 86,400"),
        (("bob", "x", "--timeout=-1"), "--timeout is '-1': use a number of seconds from 0 to 86,400"),
        (("ci", "x"), '"ci" is you, and nobody else would answer'),
        (("@review", "x"), "'@review' is a group, and a question goes to one peer: ask one of its members"),
        (("bob", ""), "the message is empty"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(home: Path, arguments: tuple[str, ...], said: str) -> None:
    done = agentbus(home, "ask", *arguments, "--from", "ci")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr
    assert not (home / "bus.db").exists() or "no message" in agentbus(home, "history").stdout
