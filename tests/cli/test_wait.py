"""`agentbus wait` and `agentbus send --wait-read`, as scripts use them."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.client import RawClient
from tests.support.command import PATIENCE_S, agentbus, clean_env, until

pytestmark = pytest.mark.timeout(90)  # a loaded machine takes seconds for one process


def begin(home: Path, *arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-m", "agentbus", *arguments],
        **{
            "env": clean_env(home),
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            **options,
        },
    )


def is_online(home: Path, name: str) -> bool:
    rows = [json.loads(line) for line in agentbus(home, "peers", "--json").stdout.splitlines()]
    return any(row["name"] == name and row["online"] for row in rows)


def state(home: Path, row_id: int) -> str:
    found: str = json.loads(agentbus(home, "status", str(row_id), "--json").stdout)["state"]
    return found


@pytest.mark.spec("WAIT-1", "WAIT-2")
def test_a_shell_joins_prints_one_message_and_leaves(home: Path) -> None:
    with begin(home, "wait", "--name", "CI") as waiting:
        until(lambda: is_online(home, "ci"), "the shell's presence")
        sent = agentbus(home, "send", "ci", "two\nlines ", "--from", "web")
        assert sent.stdout == 'sent #1 to "ci" (online)\n'
        out, err = waiting.communicate(timeout=PATIENCE_S)
    assert (waiting.returncode, out, err) == (0, "two\nlines \n", "#1 from web\n")
    assert json.loads(agentbus(home, "status", "1", "--json").stdout)["carrier"] == "shell"
    assert not is_online(home, "ci")
    assert list((home / "sock").iterdir()) == []


@pytest.mark.spec("WAIT-1", "WAIT-2", "CLI-3")
def test_what_waited_comes_first_and_one_at_a_time(home: Path) -> None:
    for text in ("one", "two", "三"):
        agentbus(home, "send", "ci", text, "--from", "web")
    assert agentbus(home, "wait", "--name", "ci").stdout == "one\n"
    assert (state(home, 1), state(home, 2)) == ("delivered", "pending")
    # A message that is already there is printed even when the time is up.
    assert agentbus(home, "wait", "--name", "ci", "--timeout", "0").stdout == "two\n"
    done = agentbus(home, "wait", "--json", AGENTBUS_NAME="ci")
    assert done.stderr == ""
    row = json.loads(done.stdout)
    assert (row["id"], row["from"], row["to"], row["text"], row["reply_to"]) == (3, "web", "ci", "三", None)


@pytest.mark.spec("WAIT-3", "CLI-4")
def test_nothing_within_the_time_is_exit_75(home: Path) -> None:
    done = agentbus(home, "wait", "--name", "ci", "--timeout", "0.2")
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr == 'agentbus: no message for "ci" within 0.2 s: wait longer, or try again later\n'
    assert list((home / "sock").iterdir()) == []


@pytest.mark.spec("WAIT-1")
def test_the_name_of_a_live_session_is_refused(home: Path, start: Callable[..., RawClient]) -> None:
    start("web").handshake()
    done = agentbus(home, "wait", "--name", "web")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith('agentbus: the name "web" is held by the session in ')
    assert done.stderr.count("\n") == 1
    rows = agentbus(home, "peers", "--json").stdout.splitlines()
    assert len(rows) == 1, "nobody else has joined"


@pytest.mark.spec("WAIT-3")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_wait_cleanly(home: Path, number: int) -> None:
    with begin(home, "wait", "--name", "ci") as waiting:
        until(lambda: is_online(home, "ci"))
        waiting.send_signal(number)
        out, err = waiting.communicate(timeout=PATIENCE_S)
    assert (waiting.returncode, out, err) == (128 + number, "", "")
    assert list((home / "sock").iterdir()) == []
    connection = sqlite3.connect(home / "bus.db")
    assert connection.execute("SELECT count(*) FROM peers WHERE left_at IS NULL").fetchone() == (0,)
    connection.close()


@pytest.mark.spec("WAIT-2")
def test_a_message_that_cannot_be_printed_stays_pending(home: Path) -> None:
    agentbus(home, "send", "ci", "precious")
    ours, theirs = os.pipe()
    os.close(ours)
    with begin(home, "wait", "--name", "ci", stdout=theirs) as waiting:
        os.close(theirs)
        _, err = waiting.communicate(timeout=PATIENCE_S)
    assert waiting.returncode == 1
    assert err.splitlines()[-1] == (
        "agentbus: the output cannot be written (Broken pipe): the message is still pending"
    )
    assert "Traceback" not in err
    assert state(home, 1) == "pending"
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full, begin(home, "wait", "--name", "ci", stdout=full) as waiting:
            _, err = waiting.communicate(timeout=PATIENCE_S)
        assert waiting.returncode == 1
        assert "(No space left on device): the message is still pending" in err
        assert state(home, 1) == "pending"


@pytest.mark.parametrize("raw", ["x", "-1", "86401", "nan", "inf", ""])
def test_seconds_that_are_none(home: Path, raw: str) -> None:
    for arguments in (("wait", "--timeout", raw), ("send", "bob", "hi", f"--wait-read={raw}")):
        done = agentbus(home, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.endswith(f" is {raw!r}: use a number of seconds from 0 to 86,400\n")
    assert not (home / "bus.db").exists(), "nothing was sent"


@pytest.mark.spec("WAIT-4")
def test_a_send_can_wait_until_it_is_read(home: Path, start: Callable[..., RawClient]) -> None:
    backend = start("backend", AGENTBUS_DELIVERY="pull")
    backend.handshake()
    with begin(home, "send", "backend", "ready?", "--from", "ci", "--wait-read", "60") as sending:
        assert sending.stdout is not None
        assert sending.stdout.readline().startswith('sent #1 to "backend" (online, but')
        until(lambda: list((home / "watch").glob("*")), "its socket")
        assert "ready?" in backend.call("check_messages")
        out, err = sending.communicate(timeout=PATIENCE_S)
    assert (sending.returncode, err) == (0, "")
    assert out.startswith('#1 was read by "backend" within ')
    assert list((home / "watch").iterdir()) == []


@pytest.mark.spec("WAIT-4", "CLI-4")
def test_what_is_not_read_in_time_is_exit_75_and_is_sent(home: Path, start: Callable[..., RawClient]) -> None:
    done = agentbus(home, "send", "nobody", "hi", "--wait-read", "0.1")
    assert done.returncode == 75
    assert done.stdout.startswith('queued #1 for "nobody"')
    assert done.stderr == (
        'agentbus: #1 for "nobody" is pending after 0.1 s: '
        "agentbus doctor nobody says why, agentbus status 1 shows its state\n"
    )
    web = start("web")
    web.handshake()
    web.wait(lambda: True)
    agentbus(home, "send", "web", "seen?")
    web.wait_events(1)
    done = agentbus(home, "send", "web", "and this?", "--wait-read=0.2")
    assert done.returncode == 75
    assert '#3 for "web" is ' in done.stderr
    assert state(home, 1) == "pending"
