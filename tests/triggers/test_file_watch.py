"""The special parts of the file-watch trigger: locks, leftovers, and a thread that may fail."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import pytest
import watchfiles._rust_notify as backend

from agentbus.core.config import prepare_home
from agentbus.core.errors import BrokenSetup
from agentbus.core.ports import Wake
from agentbus.triggers import file_watch
from agentbus.triggers.file_watch import FileWatchTrigger
from tests.support.command import clean_env, until

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def trigger(home: Path) -> FileWatchTrigger:
    prepare_home(home)
    return FileWatchTrigger(home, step_ms=1)


ENDPOINT = FileWatchTrigger(Path()).endpoint("a")


@pytest.fixture
def file(home: Path) -> Path:
    """Where the wake file is, once there is one."""
    return home / "wake" / ENDPOINT


async def is_woken(wakes) -> bool:
    with anyio.fail_after(10):
        await wakes.wait()
    return True


async def refused(trigger: FileWatchTrigger) -> str:
    """The sentence with which arming is refused."""
    with pytest.raises(BrokenSetup) as caught:
        async with trigger.arm(ENDPOINT):
            pass
    return str(caught.value)


def watching() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("agentbus ")]


LISTENER = """
import sys, anyio
from pathlib import Path
from agentbus.triggers.file_watch import FileWatchTrigger

async def main():
    async with FileWatchTrigger(Path(sys.argv[1])).arm(sys.argv[2]):
        print(flush=True)
        await anyio.sleep(60)

anyio.run(main)
"""


@contextmanager
def listening(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that listens; it ends with the block at the latest."""
    code = [sys.executable, "-c", LISTENER, str(home), ENDPOINT]
    with subprocess.Popen(code, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == b"\n"
            yield child
        finally:
            child.send_signal(signal.SIGKILL)


@pytest.mark.spec("WAKE-7")
async def test_the_file_of_a_killed_process_is_stale_can_be_cleared_and_replaced(
    trigger: FileWatchTrigger, home: Path, file: Path
) -> None:
    with listening(home) as child:
        assert trigger.notify(ENDPOINT) is Wake.WOKEN
        assert await refused(trigger) == f"{file} is in use by a live process"
        trigger.clear(ENDPOINT)
        assert file.exists(), "a live peer's file is not ours to remove"
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert trigger.notify(ENDPOINT) is Wake.STALE
    async with trigger.arm(ENDPOINT) as wakes:
        assert trigger.notify(ENDPOINT) is Wake.WOKEN
        assert await is_woken(wakes)
    assert not file.exists()
    with listening(home):
        pass
    assert trigger.notify(ENDPOINT) is Wake.STALE
    trigger.clear(ENDPOINT)
    assert trigger.notify(ENDPOINT) is Wake.ABSENT


@pytest.mark.spec("WAKE-7")
async def test_a_wake_file_is_private_stays_empty_and_is_gone_at_the_end(trigger: FileWatchTrigger, file: Path) -> None:
    file.parent.mkdir(mode=0o700)
    file.touch()
    file.chmod(0o666)  # a leftover
    async with trigger.arm(ENDPOINT) as wakes:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        trigger.notify(ENDPOINT)
        assert await is_woken(wakes)
        assert file.stat().st_size == 0, "a full disk would be in the way of a nudge"
    assert list(file.parent.iterdir()) == []


@pytest.mark.spec("TRUST-1")
async def test_a_wake_folder_that_is_not_ours_alone_is_refused(
    trigger: FileWatchTrigger, file: Path, tmp_path: Path
) -> None:
    file.parent.mkdir()
    file.parent.chmod(0o777)
    assert "can be written by other users (mode 0777): chmod go-rwx" in await refused(trigger)
    file.parent.rmdir()
    file.parent.symlink_to(tmp_path)
    assert "is a symlink" in await refused(trigger)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.spec("WAKE-2", "WAKE-7")
@pytest.mark.parametrize("obstacle", ["folder", "symlink", "fifo", "socket", "no wake folder", "a file for a folder"])
async def test_whatever_is_in_the_way_nothing_but_arming_raises(
    trigger: FileWatchTrigger, file: Path, tmp_path: Path, obstacle: str
) -> None:
    target = tmp_path / "target"
    target.touch()
    if obstacle == "a file for a folder":
        file.parent.touch(mode=0o600)
    elif obstacle != "no wake folder":
        file.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        if obstacle == "folder":
            file.mkdir()
        elif obstacle == "symlink":
            file.symlink_to(target)
        elif obstacle == "fifo":
            os.mkfifo(file)
        elif obstacle == "socket":
            bound.bind(str(file))
        with anyio.fail_after(10):
            assert trigger.notify(ENDPOINT) is Wake.ABSENT
            trigger.clear(ENDPOINT)
            if obstacle != "no wake folder":
                sentence = await refused(trigger)
                what = (
                    f"{file.parent} is not a folder"
                    if file.parent.is_file()
                    else f"{file} cannot be used as a wake file"
                )
                assert sentence.startswith(what)
    assert os.path.lexists(file) == (obstacle not in ("no wake folder", "a file for a folder"))
    assert target.exists()


@pytest.mark.parametrize("endpoint", ["../bus.db", "../x.wake", "bus.db", ""])
async def test_nothing_but_a_wake_file_is_touched_or_removed(
    trigger: FileWatchTrigger, home: Path, file: Path, endpoint: str
) -> None:
    file.parent.mkdir(mode=0o700)
    others = [home / "bus.db", home / "x.wake", file.parent / "bus.db"]
    for other in others:
        other.touch()
    assert trigger.notify(endpoint) is Wake.ABSENT
    trigger.clear(endpoint)
    assert all(other.exists() for other in others)


async def test_a_sender_that_looks_does_not_keep_a_listener_from_arming(trigger: FileWatchTrigger, file: Path) -> None:
    file.parent.mkdir(mode=0o700)
    file.touch()
    sender = os.open(file, os.O_RDONLY)
    fcntl.flock(sender, fcntl.LOCK_SH)
    armed = anyio.Event()

    async def arm() -> None:
        async with trigger.arm(ENDPOINT) as wakes:
            armed.set()
            trigger.notify(ENDPOINT)
            await is_woken(wakes)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(arm)
        for _ in range(10):
            await anyio.sleep(0.001)  # the event loop goes on
        assert not armed.is_set()
        os.close(sender)


async def test_a_sender_that_was_stopped_is_not_waited_for_for_ever(
    trigger: FileWatchTrigger, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_watch, "_LOCK_PATIENCE_S", 0.01)
    file.parent.mkdir(mode=0o700)
    with file.open("w") as sender:
        fcntl.flock(sender, fcntl.LOCK_SH)
        sentence = await refused(trigger)
    assert sentence == f"{file} is held by a suspended process: remove the file, or set AGENTBUS_TRIGGER=poll"


async def test_a_file_that_is_removed_while_it_is_being_locked_is_made_anew(
    trigger: FileWatchTrigger, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process finds a dead peer, and clears its file at the very moment at which a successor arms."""
    flock, removed = fcntl.flock, []

    def remove_first(fd: int, operation: int) -> None:
        if not removed:
            removed.append(file.stat().st_ino)
            file.unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    async with trigger.arm(ENDPOINT) as wakes:
        assert removed
        assert wakes.is_reachable()
        assert trigger.notify(ENDPOINT) is Wake.WOKEN


@pytest.mark.spec("WAKE-7")
async def test_where_nothing_can_be_locked_a_nudge_is_pending_and_wakes(
    trigger: FileWatchTrigger, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_fd: int, _operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    async with trigger.arm(ENDPOINT) as wakes:
        assert trigger.notify(ENDPOINT) is Wake.PENDING
        assert await is_woken(wakes)
    file.touch()
    assert trigger.notify(ENDPOINT) is Wake.PENDING  # and the bus checks whether the process lives
    trigger.clear(ENDPOINT)
    assert not file.exists()


async def test_a_listener_that_cannot_be_touched_will_look_by_itself(
    trigger: FileWatchTrigger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(30, "Read-only file system")

    async with trigger.arm(ENDPOINT):
        monkeypatch.setattr(os, "utime", fail)
        assert trigger.notify(ENDPOINT) is Wake.PENDING
        monkeypatch.undo()


async def test_a_home_that_is_not_utf_8_is_refused_and_not_a_traceback(home: Path) -> None:
    odd = home / os.fsdecode(b"caf\xe9")
    odd.mkdir(parents=True, mode=0o700)
    assert "cannot be watched" in await refused(FileWatchTrigger(odd))


@pytest.mark.spec("WAKE-7")
async def test_where_no_change_is_reported_arming_is_refused(
    trigger: FileWatchTrigger, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_watch, "_PROOF_MS", 20)
    monkeypatch.setattr(os, "utime", lambda *_arguments, **_options: None)
    sentence = await refused(trigger)
    assert f"{file} cannot be watched (a change was not reported within 0.02 s)" in sentence
    assert sentence.endswith(": set AGENTBUS_TRIGGER=poll")
    assert not file.exists()


@pytest.mark.spec("WAKE-7")
async def test_a_limit_of_the_system_is_a_refusal_with_a_hint(trigger: FileWatchTrigger, file: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    held = [os.open(os.devnull, os.O_RDONLY)]
    # Every number up to `highest` is in use, so the limit leaves room for the file, but none to watch it.
    while held[-1] < highest:
        held.append(os.open(os.devnull, os.O_RDONLY))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 2, hard))
        sentence = await refused(trigger)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
    assert "Too many open files" in sentence
    assert "raise fs.inotify.max_user_instances or max_user_watches if they are used up, or set" in sentence
    assert not file.exists()


@pytest.mark.spec("WAKE-7")
async def test_watchfiles_that_cannot_be_imported_is_a_refusal_with_a_hint(
    trigger: FileWatchTrigger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles._rust_notify", None)
    assert (await refused(trigger)).endswith(": pip install watchfiles, or set AGENTBUS_TRIGGER=poll")


async def test_no_thread_to_be_had_is_a_refusal(trigger: FileWatchTrigger, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert "cannot be started" in await refused(trigger)


class Watch:
    """The watcher of watchfiles. A test can make it slow to start, or make it fail."""

    go_on = threading.Event()
    failure: list[BaseException]

    def __init__(self, *arguments: object) -> None:
        self.go_on.wait(10)
        self._watch = backend.RustNotify(*arguments)  # type: ignore[arg-type]

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.close()

    def watch(self, *arguments: object) -> object:
        changes = self._watch.watch(*arguments)  # type: ignore[arg-type]
        if self.failure and changes != "stop":
            raise self.failure.pop()
        return changes


@pytest.fixture
def controlled(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Watch]]:
    module = type(sys)("watchfiles._rust_notify")
    module.RustNotify = Watch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "watchfiles._rust_notify", module)
    Watch.failure = []
    Watch.go_on.clear()
    yield Watch
    Watch.go_on.set()


async def test_whatever_is_slow_to_load_does_not_hold_up_the_event_loop(
    trigger: FileWatchTrigger, controlled: type[Watch]
) -> None:
    @asynccontextmanager
    async def released_later():
        async with anyio.create_task_group() as tasks:

            async def release() -> None:
                for _ in range(10):
                    await anyio.sleep(0.001)
                controlled.go_on.set()

            tasks.start_soon(release)
            yield

    with anyio.fail_after(10):
        async with released_later(), trigger.arm(ENDPOINT) as wakes:
            assert controlled.go_on.is_set()
            trigger.notify(ENDPOINT)
            assert await is_woken(wakes)


async def test_arming_can_be_given_up_and_leaves_nothing(
    trigger: FileWatchTrigger, file: Path, controlled: type[Watch]
) -> None:
    with anyio.move_on_after(0.01) as scope:
        async with trigger.arm(ENDPOINT):
            pass
    assert scope.cancelled_caught
    assert not file.exists()
    controlled.go_on.set()
    until(lambda: not watching(), "the end of the thread")


@pytest.mark.spec("WAKE-6")
async def test_a_watch_that_fails_is_said_wakes_and_can_be_armed_anew(
    trigger: FileWatchTrigger, file: Path, controlled: type[Watch], caplog: pytest.LogCaptureFixture
) -> None:
    controlled.go_on.set()
    old, new = AsyncExitStack(), AsyncExitStack()
    wakes = await old.enter_async_context(trigger.arm(ENDPOINT))
    controlled.failure.append(backend.WatchfilesRustInternalError("the disk was pulled"))
    trigger.notify(ENDPOINT)
    assert await is_woken(wakes)
    assert not wakes.is_reachable()
    assert trigger.notify(ENDPOINT) is Wake.ABSENT, "nobody hears it"
    assert f"{file} is no longer watched: the disk was pulled" in caplog.text
    again = await new.enter_async_context(trigger.arm(ENDPOINT))
    assert not wakes.is_reachable(), "the new file may well have the number of the old one"
    await old.aclose()
    assert again.is_reachable()
    assert trigger.notify(ENDPOINT) is Wake.WOKEN
    assert await is_woken(again)
    await new.aclose()
    assert not file.exists()


def test_an_event_loop_that_nobody_closed_keeps_no_program_from_ending(home: Path) -> None:
    code = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from agentbus.triggers.file_watch import FileWatchTrigger\n"
        "loop = asyncio.new_event_loop()\n"
        "arming = FileWatchTrigger(Path(sys.argv[1])).arm('a.wake')\n"
        "loop.run_until_complete(arming.__aenter__())\n"
        "print('armed')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(home)], capture_output=True, timeout=15, check=False)
    assert (done.returncode, done.stdout) == (0, b"armed\n"), done.stderr.decode()


def test_senders_and_who_does_not_arm_it_load_nothing_of_it(home: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from agentbus.triggers.file_watch import FileWatchTrigger\n"
        "trigger = FileWatchTrigger(Path(sys.argv[1]))\n"
        "trigger.notify('a.wake'); trigger.clear('a.wake'); trigger.close()\n"
        "print({'watchfiles', 'anyio', 'asyncio', 'logging', 'trio'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(home)], capture_output=True, check=True)
    assert done.stdout == b"set()\n"


@pytest.mark.parametrize("chosen", ["socket", "file-watch", "poll"])
def test_who_listens_otherwise_does_not_load_what_watches(home: Path, chosen: str) -> None:
    """This is about a program. In an agent's server the MCP SDK loads watchfiles itself, where it is installed."""
    code = (
        "import anyio, sys, agentbus\n"
        "async def main():\n"
        "    async with agentbus.join('me') as me:\n"
        "        await me.send('me', 'x')\n"
        "        await me.receive()\n"
        "anyio.run(main)\n"
        "print('watchfiles' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=clean_env(home, AGENTBUS_TRIGGER=chosen), capture_output=True, check=True)
    assert done.stdout.decode() == f"{chosen == 'file-watch'}\n"
