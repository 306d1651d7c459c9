"""The surroundings as they are: folders that are gone, no HOME, sandboxes, outputs that nobody can take."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import agentbus as agentbus_package
from tests.support import sandbox
from tests.support.client import RawClient
from tests.support.command import PATIENCE_S, agentbus, clean_env, until

pytestmark = pytest.mark.timeout(300)  # each test starts many processes, one after the other

Start = Callable[..., RawClient]
PYTHON = [sys.executable, "-m", "agentbus"]

# Every command, with the exit code that it has on a new bus where "bob" gets a message first.
COMMANDS = {
    "send bob x": 0,
    "broadcast x": 0,
    "peers --json": 0,
    "inbox bob": 0,
    "history": 0,
    "status 1": 0,
    "cancel 1": 0,
    "wait --name bob --timeout 0": 75,
    "send bob x --wait-read 0": 75,
    "list": 0,
    "launch claude-mcp x": 0,
    "enable mcp": 0,
    "doctor --json": 0,
    "serve mcp": 0,
    "serve claude-mcp": 0,
    "uninstall": 0,
    "--help": 0,
}


def run(command: list[str], env: dict[str, str], cwd: Path | bytes | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with nothing on stdin."""
    done = subprocess.run(
        command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S, check=False
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def check_all(
    env: dict[str, str],
    around: Callable[[list[str]], list[str]] = lambda command: command,
    codes: Mapping[str, int] = COMMANDS,
    cwd: Path | bytes | None = None,
) -> None:
    """Run every command, started in the way that `around` says, and compare the exit codes."""
    for command, code in codes.items():
        done = run(around([*PYTHON, *command.split()]), env, cwd)
        assert "Traceback" not in done.stderr, (command, done.stderr)
        assert "internal error" not in done.stderr, (command, done.stderr)
        assert done.returncode == code, (command, done.stdout, done.stderr)


def in_a_removed_folder(folder: Path) -> Callable[[list[str]], list[str]]:
    """Starts a command in a folder that is gone when it starts."""

    def around(command: list[str]) -> list[str]:
        return ["/bin/sh", "-c", 'mkdir -p "$0" && cd "$0" && rmdir "$0" && exec "$@"', str(folder), *command]

    return around


@pytest.mark.spec("CONF-3", "ERR-2")
def test_a_working_folder_that_is_gone_stops_nothing(home: Path, tmp_path: Path, start: Start) -> None:
    around = in_a_removed_folder(tmp_path / "gone")
    check_all(clean_env(home), around)
    server = start(None, command=around([*PYTHON, "serve", "claude-mcp"]))
    server.handshake()
    assert '"agent"' in server.call("whoami")
    assert [json.loads(line)["cwd"] for line in agentbus(home, "peers", "--json").stdout.splitlines()] == ["?"]
    assert server.call("send_message", to="agent", text="x").startswith("sent")


@pytest.mark.spec("CONF-3", "ERR-2", "CLI-3")
def test_a_working_folder_that_is_not_utf_8_is_shown_escaped(home: Path, start: Start) -> None:
    folder = bytes(home.parent) + b"/shop\xff"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    check_all(clean_env(home), cwd=folder)
    server = start(None, cwd=Path(os.fsdecode(folder)))
    server.handshake()
    (peer,) = [json.loads(line) for line in agentbus(home, "peers", "--json").stdout.splitlines()]
    assert peer["cwd"] == f"{home.parent}/shop\\udcff"


@pytest.mark.spec("CONF-3", "ERR-2")
def test_an_empty_environment_stops_nothing(home: Path) -> None:
    # PYTHONPATH only says where the tree under test is.
    kept = {key: value for key, value in os.environ.items() if key == "PYTHONPATH"}
    check_all({**kept, "AGENTBUS_HOME": str(home)})


@pytest.mark.spec("CONF-4", "DOCTOR-3")
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_a_user_without_an_entry_and_without_a_home_is_told_so(tmp_path: Path) -> None:
    uid = 47_110
    with pytest.raises(KeyError):
        pwd.getpwuid(uid)
    kept = {key: value for key, value in os.environ.items() if key in ("PYTHONPATH", "PATH")}
    user = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    for command in COMMANDS:
        done = run([*user, *PYTHON, *command.split()], kept, tmp_path)
        assert "Traceback" not in done.stderr, (command, done.stderr)
        if command in ("list", "launch claude-mcp x", "enable mcp", "--help"):
            assert done.returncode == 0, (command, done.stderr)
            continue
        assert done.returncode == 1, (command, done.stdout)
        said = f"HOME is not set, and user {uid} has no home folder, so nothing says where ~/.agentbus is"
        assert said in done.stderr + done.stdout, command
    assert not list(tmp_path.iterdir())


@pytest.mark.spec("CONF-4", "DOCTOR-1")
@pytest.mark.parametrize("value", ["bus", "$HOME/bus", "~nobody-here/bus"])
def test_a_home_that_would_be_another_one_in_each_folder_is_refused(tmp_path: Path, value: str) -> None:
    env = {**clean_env(tmp_path), "AGENTBUS_HOME": value}
    for command in ("send bob x", "peers", "wait --timeout 0", "serve mcp", "uninstall"):
        done = run([*PYTHON, *command.split()], env, tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (command, done.stderr)
        assert f"AGENTBUS_HOME is '{value}'" in done.stderr
    done = run([*PYTHON, "doctor", "--json"], env, tmp_path)
    wrong = [row for row in map(json.loads, done.stdout.splitlines()) if row["level"] == "wrong"]
    assert (done.returncode, [row["code"] for row in wrong]) == (1, ["settings"])
    assert f"AGENTBUS_HOME is '{value}'" in wrong[0]["seen"]
    assert "begins with / or ~/" in wrong[0]["remedy"]
    assert not list(tmp_path.iterdir()), "nothing was made anywhere"


# -- outputs -----------------------------------------------------------------------------------------------

DEEDS = ["broadcast x", "cancel 1", "inbox bob --discard --yes", "enable mcp", "disable mcp", "doctor --set-aside"]
DEEDS += ["config retention-hours 800"]
LOOKS = ["--help", "send --help", "--version", "peers --json", "inbox bob", "history", "history --json", "status 1"]
LOOKS += ["list", "list --json", "doctor --json", "launch claude-mcp x", "--show-completion bash"]


def print_to(stdout: int, command: str, home: Path, **variables: str) -> tuple[int, str]:
    """Run a command with `stdout`; its exit code and what it says on stderr."""
    done = subprocess.run(
        [*PYTHON, *command.split()],
        # Otherwise --show-completion takes no shell, and looks for one among the processes above it.
        env=clean_env(home, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1", **variables),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.fixture
def full() -> Iterator[int]:
    """An output that takes nothing."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    fd = os.open("/dev/full", os.O_WRONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def left() -> Iterator[int]:
    """A pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.spec("OUT-1", "SEND-6", "ERR-2")
def test_what_is_done_stays_done_whatever_the_output_is(home: Path, full: int, left: int) -> None:
    for number in (1, 2, 3):
        assert agentbus(home, "send", "bob", "x").stdout.startswith(f"queued #{number}")
    said = "agentbus: it is done, but the output cannot be written (No space left on device)\n"
    assert print_to(full, "send bob y", home) == (0, said)
    assert print_to(left, "send bob y", home) == (0, "")
    closed = subprocess.run([*PYTHON, "send", "bob", "y"], env=clean_env(home), preexec_fn=lambda: os.closerange(0, 3))
    assert closed.returncode == 0
    # Whether it is read is still waited for, and the exit code says so.
    assert print_to(left, "send bob y --wait-read 0", home)[0] == 75
    texts = [json.loads(line)["text"] for line in agentbus(home, "inbox", "bob", "--json").stdout.splitlines()]
    assert texts == ["x"] * 3 + ["y"] * 4
    for command in DEEDS:
        assert print_to(full, command, home) == (0, said), command
    assert agentbus(home, "inbox", "bob").stdout == 'nothing unread in the mailbox of "bob"\n'
    for command in [*DEEDS[3:], "uninstall"]:
        assert print_to(left, command, home) == (0, ""), command


@pytest.mark.spec("OUT-2", "ERR-2")
def test_a_reader_that_has_had_enough_is_no_error(home: Path, left: int) -> None:
    agentbus(home, "send", "bob", "x")
    for command in LOOKS:
        code, said = print_to(left, command, home)
        assert (code, "Traceback" in said, "cannot be written" in said) == (0, False, False), (command, said)
    completion = {"_AGENTBUS_COMPLETE": "complete_bash", "COMP_WORDS": "agentbus send ", "COMP_CWORD": "2"}
    assert print_to(left, "", home, **completion) == (0, "")


@pytest.mark.spec("OUT-2", "ERR-2")
def test_an_output_that_nobody_can_take_is_a_sentence(home: Path, full: int) -> None:
    agentbus(home, "send", "bob", "x")
    for command in LOOKS:
        code, said = print_to(full, command, home)
        assert code == 1, command
        assert said.splitlines()[0] == "agentbus: the output cannot be written (No space left on device)", command
        assert said.count("\n") == 1, command


@pytest.mark.spec("OUT-3")
def test_a_full_pipe_that_does_not_block_is_waited_for(home: Path) -> None:
    for _ in range(4):
        agentbus(home, "send", "bob", "-", stdin="x" * 60_000)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    command = [*PYTHON, "history", "--json"]
    with subprocess.Popen(command, env=clean_env(home), stdout=writer, stderr=subprocess.PIPE, text=True) as child:
        os.close(writer)
        with os.fdopen(reader) as lines:
            assert [len(json.loads(line)["text"]) for line in lines] == [60_000] * 4
        assert child.communicate(timeout=PATIENCE_S)[1] == ""
    assert child.returncode == 0


@pytest.mark.spec("CLI-3")
def test_json_is_utf_8_in_every_locale(home: Path, start: Start) -> None:
    folder = home.parent / "Grüße"
    folder.mkdir()
    server = start("bob", cwd=folder)
    server.handshake()
    latin = {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    env = clean_env(home, **latin)
    for command in ("peers --json", "history --json", "doctor --json"):
        done = subprocess.run([*PYTHON, *command.split()], env=env, capture_output=True, timeout=PATIENCE_S, check=True)
        rows = [json.loads(line.decode()) for line in done.stdout.splitlines()]
        assert command != "peers --json" or rows[0]["cwd"] == str(folder)


@pytest.mark.spec("CLI-7", "CLI-3")
def test_json_steers_no_terminal_and_is_a_line_for_each_row(home: Path) -> None:
    text = "\x9b31m\u2028\u202e\x7f\U000e0001 Grüße"
    agentbus(home, "send", "bob", text)
    (line,) = agentbus(home, "inbox", "bob", "--json").stdout.splitlines()
    assert line.isprintable()
    assert "Grüße" in line
    assert json.loads(line)["text"] == text


# -- sandboxes ---------------------------------------------------------------------------------------------

SANDBOX = [sys.executable, "-S", str(Path(sandbox.__file__))]
# What a sandbox refuses, the error that it gives, and the trigger that is left.
SANDBOXES = [
    ("EPERM", "socket", "file-watch"),
    ("EAFNOSUPPORT", "socket", "file-watch"),
    ("EACCES", "bind,setsockopt,sendto", "file-watch"),
    ("EPERM", "socket,inotify_init1", "poll"),
]


def refusing(error: str, calls: str) -> list[str]:
    """The start of a command that runs without these system calls."""
    if subprocess.run([*SANDBOX, error, calls, "/bin/true"], check=False).returncode == sandbox.NOT_HERE:
        pytest.skip("no seccomp filter can be installed here")
    return [*SANDBOX, error, calls]


@pytest.mark.spec("WAKE-5", "WATCH-1", "WAIT-1", "WAIT-4", "ASK-7", "ERR-2")
@pytest.mark.parametrize(("error", "calls", "trigger"), SANDBOXES)
def test_in_a_sandbox_without_sockets_everything_that_waits_works(
    home: Path, start: Start, error: str, calls: str, trigger: str
) -> None:
    around = refusing(error, calls)
    # `doctor` calls it wrong that the socket cannot be used.
    check_all(clean_env(home), lambda command: [*around, *command], {**COMMANDS, "doctor --json": 1})
    bob = start("bob", command=[*around, *PYTHON, "serve", "claude-mcp"])
    bob.handshake()
    (peer,) = [json.loads(line) for line in agentbus(home, "peers", "--json").stdout.splitlines()]
    assert peer["trigger"] == trigger
    assert "trigger socket cannot be used (the system gives this process no unix socket (" in bob.stderr
    agentbus(home, "send", "bob", "from outside")
    assert run([*around, *PYTHON, "send", "bob", "from inside"], clean_env(home)).returncode == 0
    assert [event["content"] for event in bob.wait_events(2)] == ["from outside", "from inside"]
    assert '"bob"' in bob.call("whoami")
    command = [*around, *PYTHON, "ask", "bob", "well?", "--from", "ci"]
    with subprocess.Popen(command, env=clean_env(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ask:
        bob.call("send_message", to="ci", text="yes", reply_to=bob.wait_events(3)[2]["meta"]["msg_id"])
        answer, said = ask.communicate(timeout=PATIENCE_S)
    assert (ask.returncode, answer, said.count(b"\n")) == (0, b"yes\n", 1)
    assert b"nothing can wake this command, so it checks every 1000 ms" in said
    command = [*around, *PYTHON, "watch", "--json"]
    with subprocess.Popen(command, env=clean_env(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watch:
        assert watch.stdout is not None
        assert json.loads(watch.stdout.readline())["event"] == "online"
        agentbus(home, "send", "carol", "x")
        assert json.loads(watch.stdout.readline())["event"] == "pending"
        watch.terminate()
        _, said = watch.communicate(timeout=PATIENCE_S)
    assert watch.returncode == 0
    assert b"nothing can wake this command, so it checks every 1000 ms" in said


@pytest.mark.spec("WAKE-5", "SEND-6", "ERR-2")
def test_where_nothing_can_wait_that_is_a_sentence_and_a_send_is_sent(home: Path) -> None:
    around = refusing("EPERM", "socketpair")
    said = "nothing can wait here: the system gives this process no pair of sockets (Operation not permitted)"
    for command in ("wait --timeout 0", "watch", "serve mcp", "serve claude-mcp"):
        done = run([*around, *PYTHON, *command.split()], clean_env(home))
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), (command, done.stderr)
        assert said in done.stderr
    done = run([*around, *PYTHON, "send", "bob", "x", "--wait-read", "1"], clean_env(home))
    assert (done.returncode, done.stdout[:9], done.stderr.count("\n")) == (75, "queued #1", 1)
    assert f"#1 is sent, and whether it was read cannot be told: {said}" in done.stderr


@pytest.mark.spec("ERR-1", "TRUST-1", "DOCTOR-3")
@pytest.mark.parametrize("there", ["nothing", "a folder", "a bus"])
def test_a_read_only_home_looks_like_a_sandbox(home: Path, there: str) -> None:
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" || exit 125; exec "$@"'
    around = ["unshare", "-m" if os.geteuid() == 0 else "-rm", "/bin/sh", "-c", mount, str(home.parent)]
    if shutil.which("unshare") is None or run([*around, "/bin/true"], dict(os.environ)).returncode:
        pytest.skip("no mount namespace is to be had here")
    if there == "a folder":
        home.mkdir(mode=0o700)
    elif there == "a bus":
        agentbus(home, "send", "bob", "x")
    hint = "this looks like a sandbox, or a read-only disk: let it write to /"
    for command in ("send bob x", "broadcast x", "peers", "inbox bob", "wait --timeout 0", "watch", "serve mcp"):
        done = run([*around, *PYTHON, *command.split()], clean_env(home))
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), (command, done.stderr)
        assert hint in done.stderr, command
        assert "chmod" not in done.stderr
    done = run([*around, *PYTHON, "doctor", "--json"], clean_env(home))
    (wrong,) = [row for row in map(json.loads, done.stdout.splitlines()) if row["code"] == "home"]
    assert (done.returncode, wrong["level"]) == (1, "wrong")
    assert hint in wrong["remedy"]


# -- PYTHONPATH --------------------------------------------------------------------------------------------

# What shadows a module, and a command that needs it.
SHADOWS = [
    ("mcp/__init__.py", "x = 1", "demo"),
    ("types.py", "x = 1", "send bob x"),
    ("types.py", "raise SystemError('mine')", "peers"),
    ("select.py", "x =", "send bob x"),
    ("apsw/__init__.py", "x = 1", "send bob x"),
    ("apsw.py", "x = 1", "serve claude-mcp"),
    ("anyio.py", "x = 1", "wait --timeout 0"),
    ("typer.py", "x = 1", "--help"),
]


def shadowing(folder: Path, path: str, text: str) -> str:
    """A PYTHONPATH with one module in front of what is there."""
    file = folder / "shadow" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return os.pathsep.join([str(folder / "shadow"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(":")


@pytest.mark.spec("ISO-2", "ERR-2")
@pytest.mark.parametrize(("path", "text", "command"), SHADOWS)
def test_by_hand_one_sentence_says_what_shadows_what(
    home: Path, tmp_path: Path, path: str, text: str, command: str
) -> None:
    env = clean_env(home, PYTHONPATH=shadowing(tmp_path, path, text))
    script = tmp_path / "bin" / "agentbus"
    script.parent.mkdir()
    shutil.copy(Path(agentbus_package.__file__).with_name("command"), script)
    done = run([sys.executable, str(script), *command.split()], env)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    name = path.split("/")[0].removesuffix(".py")
    assert f"{tmp_path}/shadow/{name} shadows the module {name} that agentbus needs (" in done.stderr
    assert done.stderr.endswith(f"unset PYTHONPATH, leave that folder, or run {sys.executable} -E -P -m agentbus\n")


@pytest.mark.spec("ISO-2")
def test_a_server_by_hand_says_what_shadows_the_sdk(home: Path, tmp_path: Path, start: Start) -> None:
    server = start("bob", PYTHONPATH=shadowing(tmp_path, "mcp/__init__.py", "x = 1"))
    server.handshake()
    said = f"{tmp_path}/shadow/mcp shadows the module mcp that agentbus needs"
    # Only what needs the SDK fails, and says why. [DESK-5]
    assert said in server.answer(server.post("resources/list"))["error"]["message"]
    until(lambda: said in server.stderr)  # it comes by another pipe
    assert '"bob"' in server.call("whoami")


@pytest.mark.spec("ISO-1", "REG-1")
def test_what_is_registered_runs_isolated(home: Path, tmp_path: Path, start: Start) -> None:
    for path, text, _ in SHADOWS:
        shadowing(tmp_path, path, text)
    (tmp_path / "agentbus.py").write_text("x = 1")
    pasted = agentbus(home, "enable", "mcp").stdout.split("configuration:\n")[1]
    entry = json.loads(pasted)["mcpServers"]["agentbus"]
    shadow = str(tmp_path / "shadow")
    server = start("bob", command=[entry["command"], *entry["args"]], cwd=tmp_path, PYTHONPATH=shadow, PYTHONHOME="/x")
    server.handshake()
    assert '"bob"' in server.call("whoami")
