"""The command line as a process: what it prints, what it exits with, what it loads."""

from __future__ import annotations

import json
import os
import pty
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

import agentbus as package
from agentbus.cli import app, common
from agentbus.core import process
from agentbus.core.errors import BrokenSetup
from agentbus.core.store import Store
from tests.support.client import RawClient
from tests.support.command import PATIENCE_S, agentbus, clean_env, until
from tests.support.fakes import arrival

pytestmark = pytest.mark.timeout(90)  # a loaded machine takes seconds for one process

COMMANDS = tuple(command.name or command.callback.__name__ for command in app.app.registered_commands)


def bodies(home: Path) -> list[tuple[str, str]]:
    connection = sqlite3.connect(home / "bus.db")
    try:
        return connection.execute("SELECT sender, body FROM messages ORDER BY id").fetchall()
    finally:
        connection.close()


@pytest.mark.spec("CLI-4", "SEND-5")
def test_the_strangers_walk(home: Path) -> None:
    assert agentbus(home, "peers").stdout == "nobody is online\n"
    sent = agentbus(home, "send", "nobody", "hi")
    assert (sent.returncode, sent.stderr) == (0, "")
    assert sent.stdout == 'queued #1 for "nobody": no such peer yet, it is delivered when one starts\n'
    assert agentbus(home, "peers").stdout == 'nobody is online\n1 message waits for "nobody" (offline)\n'
    assert agentbus(home, "--version").stdout == f"agentbus {package.__version__}\n"


@pytest.mark.spec("SEND-5")
def test_a_name_that_was_there_is_offline_and_no_stranger(home: Path) -> None:
    agentbus(home, "send", "backend", "hi", "--from", "web")
    assert agentbus(home, "wait", "--name", "backend").stdout == "hi\n"
    agentbus(home, "peers")  # forgets peers whose host process is gone, but not their messages
    for name in ("backend", "web"):
        done = agentbus(home, "send", name, "again")
        assert f'for "{name}": offline, it is delivered when that peer is back' in done.stdout
    assert 'for "backnd": no such peer yet' in agentbus(home, "send", "backnd", "x").stdout


@pytest.mark.spec("CLI-1")
@pytest.mark.parametrize("is_online", [True, False])
def test_send_loads_nothing_that_is_slow(home: Path, store: Store, is_online: bool) -> None:
    if is_online:
        store.claim(arrival("bob"), now=1, endpoint=lambda _session: "", join_crowd=False)
    code = (
        # `send` ends without taking the interpreter apart; here something is printed after it.
        "import os, sys; sys.argv = ['agentbus', 'send', 'bob', 'hi']; os._exit = sys.exit\n"
        "from agentbus.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: print({'typer', 'click', 'pydantic', 'mcp', 'anyio', 'asyncio', 'rich', 'random',"
        " 'tempfile', 'subprocess', 'difflib', 'watchfiles', 'json', 're', 'pathlib', 'dataclasses'}"
        " & set(sys.modules))"
    )
    # For a name that nobody has, it also looks for a session of a client that is called so: none runs here. [REACH-2]
    env = clean_env(home, CLAUDE_CONFIG_DIR=str(home))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "set()"


# How many modules a command that must be instant may load beyond those of `import apsw`. Each costs 0.1 to 5 ms; `re`,
# `pathlib` and `dataclasses` bring 25 with them, which took as long as half of a send; an event loop brings 100.
MOST_MODULES = {"send": 55, "ask": 60}


@pytest.mark.spec("CLI-1")
@pytest.mark.skipif(process.IS_SLOW, reason="it takes subprocess, to run ps")
@pytest.mark.parametrize("command", MOST_MODULES)
def test_an_instant_command_loads_few_modules(home: Path, command: str) -> None:
    def loaded(code: str) -> set[str]:
        code = f"import os, sys; os._exit = sys.exit\n{code}\nfinally: print(*sys.modules)"
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, env=clean_env(home), capture_output=True, text=True, check=True)
        return set(done.stdout.splitlines()[-1].split())

    async def to_a_live_peer() -> set[str]:
        async with package.join("bob", home=home) as bob, anyio.create_task_group() as tasks:

            async def answer() -> None:
                async for message in bob:
                    await bob.send(message.sender, "well", reply_to=message.id)

            tasks.start_soon(answer)
            words = ["agentbus", command, "bob", "hi", "--from", "ci"]
            found = await anyio.to_thread.run_sync(
                loaded, f"sys.argv = {words}\ntry:\n from agentbus.__main__ import main\n main()"
            )
            tasks.cancel_scope.cancel()
        return found

    more = anyio.run(to_a_live_peer) - loaded("try: import apsw")
    assert "agentbus.triggers.socket" in more
    assert not {"typer", "rich", "pydantic", "anyio", "asyncio", "mcp", "json", "re", "pathlib"} & more
    assert len(more) <= MOST_MODULES[command], sorted(more)


@pytest.mark.parametrize(
    ("stdin", "text"),
    [("piped\n", "piped"), ("two\nlines\n\n", "two\nlines\n"), (" as it is ", " as it is "), ("日本\n", "日本")],
)
def test_text_comes_from_stdin_too(home: Path, stdin: str, text: str) -> None:
    assert agentbus(home, "send", "bob", stdin=stdin).returncode == 0
    assert agentbus(home, "send", "bob", "-", stdin=stdin).returncode == 0
    assert [body for _, body in bodies(home)] == [text, text]


def test_words_that_look_like_options(home: Path) -> None:
    assert agentbus(home, "send", "bob", "--", "--from").returncode == 0
    assert agentbus(home, "send", "--from=ci", "--", "bob", "-x").returncode == 0
    assert [body for _, body in bodies(home)] == ["--from", "-x"]


@pytest.mark.spec("CLI-2")
def test_as_whom_a_shell_sends(home: Path, start: Callable[..., RawClient]) -> None:
    import pwd

    login = pwd.getpwuid(os.getuid()).pw_name
    agentbus(home, "send", "bob", "1", "--from", "Night Build")
    agentbus(home, "send", "bob", "2", AGENTBUS_NAME="From Env")
    agentbus(home, "send", "bob", "3")
    # This very process is the host process of the session that now starts, and an ancestor of the commands.
    session = start("web")
    session.handshake()
    agentbus(home, "send", "bob", "4", AGENTBUS_NAME="ignored")
    session.call("set_name", name="shop")
    agentbus(home, "send", "bob", "5")
    agentbus(home, "send", "bob", "6", "--from", "ci")
    other = start("api")
    other.handshake()
    agentbus(home, "send", "bob", "7", AGENTBUS_NAME="which one")
    assert [sender for sender, _ in bodies(home)] == [
        "night-build",
        "from-env",
        login,
        "web",
        "shop",
        "ci",
        "which-one",
    ]


@pytest.mark.spec("CLI-4", "ERR-1", "ERR-2")
@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "sentence"),
    [
        (["send"], "", 2, "send needs a name: agentbus send backend 'the text, in quotes'"),
        (["send", "a", "b", "c"], "", 2, "send takes a name and one text, not 3 words"),
        (["send", "a", "--verbose"], "", 2, "send has no option '--verbose'"),
        (["send", "a", "b", "--from"], "", 2, "--from needs a name"),
        (["send", "***", "b"], "", 2, '"***" is not a name: use 1 to 32 letters and digits'),
        (["send", "a", ""], "", 2, "the message is empty"),
        (["send", "a"], "", 2, "the message is empty"),
        (["send", "a"], b"\xff\xfe", 2, "stdin is not UTF-8 (byte 1): put binary data in a file"),
        (["send", "a", "x" * 65_537], "", 2, "message is 65,537 bytes, the limit is 65,536: put the bulk in a file"),
        (["send", "a", "b", "--from", "!!"], "", 2, '"!!" is not a name'),
        (
            ["serve", "carrier-pigeon"],
            "",
            2,
            "there is no module 'carrier-pigeon': use claude-mcp or codex or gemini or mcp or opencode or qwen",
        ),
        (["serve"], "", 2, "Missing argument"),
        (["frobnicate"], "", 2, "No such command 'frobnicate': see agentbus --help"),
        (["peers", "--frobnicate"], "", 2, "No such option: --frobnicate: see agentbus peers --help"),
        (["broadcast", "a", "b"], "", 2, "unexpected extra argument"),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_exit_2(
    home: Path, arguments: list[str], stdin: str | bytes, code: int, sentence: str
) -> None:
    done = agentbus(home, *arguments, stdin=stdin)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("agentbus: ")
    assert done.stderr.count("\n") == 1
    assert sentence in done.stderr


@pytest.mark.spec("BODY-1")
def test_an_argument_that_is_not_utf_8_is_refused(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agentbus", "send", "bob", b"\xff"],
        env=clean_env(home),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert b"lone surrogate at character 1" in done.stderr


@pytest.mark.spec("CLI-4", "STORE-1", "TRUST-1")
def test_a_broken_setup_is_one_line_and_exit_1(home: Path) -> None:
    home.mkdir(mode=0o700)
    home.joinpath("bus.db").write_bytes(b"somebody's notes" * 1_000)
    done = agentbus(home, "peers")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    home.chmod(0o777)
    done = agentbus(home, "send", "bob", "hi")
    assert (done.returncode, done.stderr) == (
        1,
        f"agentbus: {home} can be written by other users (mode 0777): chmod go-rwx '{home}'\n",
    )


@pytest.mark.spec("CLI-4", "SEND-3")
def test_a_full_mailbox_is_exit_75(home: Path) -> None:
    agentbus(home, "send", "bob", "first")
    connection = sqlite3.connect(home / "bus.db")
    connection.executemany(
        "INSERT INTO messages (sender, recipient, body, sent_at) VALUES ('a', 'bob', 'x', ?)",
        [(n,) for n in range(9_999)],
    )
    connection.commit()
    connection.close()
    done = agentbus(home, "send", "bob", "one more")
    assert (done.returncode, done.stdout) == (75, "")
    assert done.stderr.startswith('agentbus: mailbox "bob" is full, 10,000 messages are pending: ')
    assert agentbus(home, "send", "carol", "x").returncode == 0


@pytest.mark.spec("CLI-3", "PRES-4")
def test_peers_and_broadcast(home: Path, start: Callable[..., RawClient]) -> None:
    assert agentbus(home, "broadcast", "x").stdout == "nobody is online; nothing was sent\n"
    for name in ("web", "api"):
        start(name).handshake()
    agentbus(home, "send", "später", "x", "--from", "ci")
    table = agentbus(home, "peers").stdout.splitlines()
    assert table[0].split() == ["NAME", "RUNTIME", "DELIVERY", "TRIGGER", "PENDING", "PID", "FOLDER"]
    assert [line.split()[:4] for line in table[1:3]] == [
        ["api", "claude-mcp", "channel", "socket"],
        ["web", "claude-mcp", "channel", "socket"],
    ]
    assert table[3] == '1 message waits for "später" (offline)'
    rows = [json.loads(line) for line in agentbus(home, "peers", "--json").stdout.splitlines()]
    assert [(row["name"], row["online"], row["pending"]) for row in rows] == [
        ("api", True, 0),
        ("web", True, 0),
        ("später", False, 1),
    ]
    assert set(rows[0]) == {
        *(
            "activity",
            "status",
            "status_at",
            "name",
            "online",
            "pending",
            "runtime",
            "delivery",
            "delivery_reason",
            "trigger",
            "pid",
            "cwd",
            "started_at",
            "last_seen",
            "groups",
            "paused",
        )
    }
    assert agentbus(home, "broadcast", "--from", "ci", "y").stdout == (
        'sent #2 to "api" (online)\nsent #3 to "web" (online)\n'
    )


def test_a_reader_that_has_had_enough_is_no_error(home: Path) -> None:
    agentbus(home, "send", "bob", "x")
    shell = f"{sys.executable} -m agentbus peers --json | true"
    done = subprocess.run(["/bin/sh", "-c", shell], env=clean_env(home), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_send_without_text_at_a_terminal_says_what_to_do(home: Path) -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "agentbus", "send", "bob"],
        env=clean_env(home),
        stdin=theirs,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 2
    assert done.stderr == 'agentbus: no text: give it as an argument, agentbus send NAME "TEXT", or pipe it in\n'


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_a_line_in_the_spec(home: Path, command: str) -> None:
    done = agentbus(home, command, "--help", COLUMNS="200")
    assert done.returncode == 0
    assert "Example: " in done.stdout
    assert f"| `agentbus {command}" in Path(__file__).parents[2].joinpath("SPEC.md").read_text(encoding="utf-8")
    assert not home.exists(), "asking for help creates nothing"


def test_without_arguments_it_is_help(home: Path) -> None:
    done = agentbus(home, COLUMNS="200")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == agentbus(home, "--help", COLUMNS="200").stdout


def test_help_names_the_variable_and_the_exit_codes(home: Path) -> None:
    done = agentbus(home, "--help", COLUMNS="200")
    assert "AGENTBUS_HOME" in done.stdout
    assert "75 try again later" in done.stdout
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.spec("CLI-5")
def test_the_demo_happens_and_leaves_nothing_behind(home: Path) -> None:
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "agentbus", "demo"],
        env=clean_env(home, TMPDIR=str(home)),
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "All 6 steps happened. 5 live deliveries" in done.stdout
    assert done.stdout.count("delivered in ") == 5
    assert done.stdout.count("s after database was started") == 1
    assert list(home.iterdir()) == []
    until(lambda: str(home) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout)


@pytest.mark.spec("CLI-5")
def test_a_demo_that_cannot_happen_says_why(home: Path) -> None:
    home.mkdir()
    broken = (
        "import sys; sys.executable = '/bin/false'; sys.argv = ['agentbus', 'demo']\n"
        "from agentbus.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", broken],
        env=clean_env(home, TMPDIR=str(home)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "agentbus demo: step 1 FAILED: " in done.stderr
    assert "Traceback" not in done.stderr
    assert list(home.iterdir()) == []


@pytest.mark.spec("CONF-5", "CLI-4", "ERR-1")
def test_a_setting_of_the_bus_is_shown_and_set(home: Path) -> None:
    assert agentbus(home, "config").stdout.startswith("retention-hours  720  how long delivered messages are kept")
    assert agentbus(home, "config", "retention-hours").stdout == "720\n"
    done = agentbus(home, "config", "retention-hours", "8760")
    assert (done.returncode, done.stdout) == (0, "retention-hours is 8,760 now, it was 720\n")
    cut = agentbus(home, "config", "retention-hours", "48", AGENTBUS_RETENTION_HOURS="1")
    assert cut.stdout.endswith("it was 8,760; what is older is removed by the next heartbeat of a session\n")
    shown = agentbus(home, "config", "--json", AGENTBUS_RETENTION_HOURS="1")
    assert json.loads(shown.stdout.splitlines()[0]) == {
        "key": "retention-hours",
        "value": 48,
        "default": 720,
        "low": 1,
        "high": 8_760,
        "variable": "AGENTBUS_RETENTION_HOURS",
        "variable_value": "1",
    }
    for arguments, sentence in (
        (["retention-hours", "0"], "the value of retention-hours is '0': use a whole number from 1 to 8,760"),
        (["retention-hours", "long"], "the value of retention-hours is 'long': use a whole number from 1 to 8,760"),
        (["colour"], "there is no setting 'colour': use retention-hours or member-days"),
        (["colour", "red"], "there is no setting 'colour': use retention-hours or member-days"),
    ):
        done = agentbus(home, "config", *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"agentbus: {sentence}\n")
    assert agentbus(home, "config", "retention-hours").stdout == "48\n"


@pytest.mark.spec("CLI-8")
def test_in_a_sandboxed_shell_of_an_agent_the_tools_are_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTBUS_HOME", str(home))
    monkeypatch.setattr("agentbus.cli.common.os.access", lambda *_: False)

    def fail() -> None:
        with common.bus_and_settings():
            raise BrokenSetup("bus.db is read-only", hint="chmod u+w")

    with pytest.raises(BrokenSetup, match="chmod"):
        fail()
    monkeypatch.setenv("CODEX_THREAD_ID", "t1")
    with pytest.raises(BrokenSetup, match=r"in a sandbox that may not write .*: use the tools of agentbus instead"):
        fail()
