"""The promises of ports.Trigger, tested for every trigger. A new one is one more parameter."""

from __future__ import annotations

import gc
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from agentbus import registry
from agentbus.core import config
from agentbus.core.config import Settings, prepare_home
from agentbus.core.errors import BrokenSetup
from agentbus.core.ports import Trigger, Wake
from agentbus.triggers.file_watch import FileWatchTrigger
from agentbus.triggers.socket import SocketTrigger
from tests.support.command import PATIENCE_S, until
from tests.support.fakes import FakeTrigger

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def long_home(home: Path) -> Path:
    deep = home
    while len(str(deep)) < 150:
        deep = deep / "a-folder-with-a-long-name"
    return deep


def make_socket(home: Path) -> Trigger:
    prepare_home(home)
    return SocketTrigger(home)


def make_long_socket(home: Path) -> Trigger:
    deep = long_home(home)
    prepare_home(deep)
    return SocketTrigger(deep)


def make_symlinked_socket(home: Path) -> Trigger:
    """As on a system where open descriptors are not paths."""
    deep = long_home(home)
    prepare_home(deep)
    return SocketTrigger(deep, fd_folder=None)


def make_file_watch(home: Path) -> Trigger:
    """A trigger that looks so often that a thousand wakes do not take minutes."""
    prepare_home(home)
    return FileWatchTrigger(home, step_ms=1)


def settings(home: Path) -> Settings:
    """The settings of a bus that is polled so often that a thousand wakes do not take minutes."""
    return replace(config.load(home=home), poll_ms=10)


def shipped(name: str) -> Callable[[Path], Trigger]:
    """The trigger that the table in registry has under `name`."""

    def make_one(home: Path) -> Trigger:
        prepare_home(home)
        return registry.Triggers(settings(home))[name]

    return make_one


# Every trigger of the table, and variants of some. A new trigger in the table is tested here too.
TRIGGERS: dict[str, Callable[[Path], Trigger]] = {
    **{name: shipped(name) for name in registry.TRIGGERS},
    "socket, long home": make_long_socket,
    "socket, long home, no /proc": make_symlinked_socket,
    "file-watch": make_file_watch,
    "fake": lambda home: FakeTrigger(),
}
SOCKETS = {name: make for name, make in TRIGGERS.items() if name.startswith("socket")}
# The triggers that leave something in a file system: senders can tell a dead listener, and a second one is refused.
LISTENERS = {
    **SOCKETS,
    **{name: TRIGGERS[name] for name, one in registry.Triggers(settings(Path("/nowhere"))).items() if one.folder},
}


@pytest.fixture(params=TRIGGERS)
def trigger(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trigger]:
    made = make(request.param, home, monkeypatch)
    yield made
    made.close()


@pytest.fixture(params=SOCKETS)
def sockets(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trigger]:
    made = make(request.param, home, monkeypatch)
    yield made
    made.close()


@pytest.fixture(params=LISTENERS)
def listeners(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trigger]:
    made = make(request.param, home, monkeypatch)
    yield made
    made.close()


@pytest.fixture
def plain(home: Path) -> Iterator[Trigger]:
    """The default trigger in a home of ordinary length."""
    made = make_socket(home)
    yield made
    made.close()


def make(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Trigger:
    home.parent.joinpath("tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(home.parent / "tmp"))
    return TRIGGERS[name](home)


def resident_bytes() -> int:
    """The memory of this process, no matter which part of it asked for the memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def opened() -> tuple[int, int]:
    """The number of descriptors of this process, and of its threads, Python's and others."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def file_of(home: Path, trigger: Trigger) -> Path:
    """The file that the one armed listener of a home has put into the file system."""
    (file,) = home.rglob(f"{trigger.folder}/*")
    return file


async def is_woken(wakes) -> bool:
    with anyio.move_on_after(10):
        await wakes.wait()
        return True
    return False


async def is_quiet(trigger: Trigger, wakes) -> bool:
    """Whether nobody is woken; a poll wakes by itself and is never quiet."""
    if trigger.name == "poll":
        return True
    with anyio.move_on_after(0.02):
        await wakes.wait()
        return False
    return True


async def test_the_endpoint_of_a_session_is_stable_and_its_own(trigger: Trigger) -> None:
    assert trigger.endpoint("a") == trigger.endpoint("a") != trigger.endpoint("b")


async def test_a_nudge_wakes(trigger: Trigger) -> None:
    endpoint = trigger.endpoint("a")
    async with trigger.arm(endpoint) as wakes:
        for _ in range(3):
            assert trigger.notify(endpoint) in (Wake.WOKEN, Wake.FULL, Wake.PENDING)
            assert await is_woken(wakes)


async def test_a_nudge_while_waiting_wakes(trigger: Trigger) -> None:
    endpoint = trigger.endpoint("a")
    async with trigger.arm(endpoint) as wakes, anyio.create_task_group() as tasks:
        woken: list[bool] = []

        async def wait() -> None:
            woken.append(await is_woken(wakes))

        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        trigger.notify(endpoint)
    assert woken == [True]


@pytest.mark.spec("WAKE-2")
async def test_any_number_of_nudges_never_block_and_make_one_wake(trigger: Trigger) -> None:
    endpoint = trigger.endpoint("a")
    async with trigger.arm(endpoint) as wakes:
        with anyio.fail_after(PATIENCE_S):
            results = {trigger.notify(endpoint) for _ in range(10_000)}
        assert results <= {Wake.WOKEN, Wake.FULL, Wake.PENDING}
        assert await is_woken(wakes)
        # A file watcher can hear about the last nudges after it has returned for the first.
        returns = 1
        while not await is_quiet(trigger, wakes):
            returns += 1
        assert returns <= (100 if trigger.name == "file-watch" else 1)


async def test_a_nudge_between_the_return_and_the_next_wait_is_never_lost(trigger: Trigger) -> None:
    """The nudge comes between "the queue is empty" and "the mailbox is read", or later. Both are after the return."""
    endpoint = trigger.endpoint("a")
    async with trigger.arm(endpoint) as wakes:
        trigger.notify(endpoint)
        for number in range(50):
            assert await is_woken(wakes)
            if number % 2:
                await anyio.sleep(0)
            trigger.notify(endpoint)
        assert await is_woken(wakes)


@pytest.mark.spec("WAKE-2")
async def test_ten_thousand_nudges_that_nobody_waits_for_take_no_memory(trigger: Trigger) -> None:
    endpoint = trigger.endpoint("a")
    async with trigger.arm(endpoint) as wakes:

        async def nudge(times: int) -> None:
            for number in range(times):
                trigger.notify(endpoint)
                if number % 100 == 0:
                    await anyio.sleep(0)  # lets the loop take in wakes from another thread

        await nudge(1_000)
        gc.collect()
        # Not tracemalloc's bytes: they jump by megabytes when the interpreter's own tables happen to grow.
        blocks, resident = sys.getallocatedblocks(), resident_bytes()
        await nudge(10_000)
        gc.collect()
        assert sys.getallocatedblocks() - blocks < 1_000, "something is kept for each nudge"
        assert resident_bytes() - resident < 10_000_000
        assert await is_woken(wakes)


@pytest.mark.spec("WAKE-2")
async def test_a_full_queue_is_pending_and_still_wakes(sockets: Trigger) -> None:
    endpoint = sockets.endpoint("a")
    async with sockets.arm(endpoint) as wakes:
        results = [sockets.notify(endpoint) for _ in range(2_000)]
        assert results[0] is Wake.WOKEN
        assert results[-1] is Wake.FULL
        assert await is_woken(wakes)
        assert sockets.notify(endpoint) is Wake.WOKEN


async def test_a_nudge_that_nobody_waits_for_is_kept(trigger: Trigger) -> None:
    endpoint = trigger.endpoint("a")
    async with trigger.arm(endpoint) as wakes:
        with anyio.move_on_after(0):
            await wakes.wait()
        trigger.notify(endpoint)
        await anyio.sleep(0)
        assert await is_woken(wakes)


async def test_nudges_that_come_while_nobody_waits_leave_the_next_ones_heard(trigger: Trigger) -> None:
    endpoint = trigger.endpoint("a")
    async with trigger.arm(endpoint) as wakes:
        for _ in range(3):
            for _ in range(5):
                trigger.notify(endpoint)
                await anyio.sleep(0.001)
            assert await is_woken(wakes)
            while not await is_quiet(trigger, wakes):
                pass  # a file watcher hears about them one after another
        heard: list[bool] = []

        async def listen() -> None:
            heard.append(await is_woken(wakes))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen)
            await anyio.wait_all_tasks_blocked()
            trigger.notify(endpoint)
        assert heard == [True]


async def test_cancelling_a_wait_loses_no_nudge(trigger: Trigger) -> None:
    endpoint = trigger.endpoint("a")
    async with trigger.arm(endpoint) as wakes, anyio.create_task_group() as tasks:
        for _ in range(20):
            scope = anyio.CancelScope()
            woken: list[bool] = []

            async def wait(scope=scope, woken=woken) -> None:
                with scope:
                    woken.append(await is_woken(wakes))

            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            trigger.notify(endpoint)
            scope.cancel()
            await anyio.wait_all_tasks_blocked()
            assert woken or await is_woken(wakes)


async def test_a_wait_with_a_limit_says_whether_there_was_a_nudge(trigger: Trigger) -> None:
    endpoint = trigger.endpoint("a")
    async with trigger.arm(endpoint) as wakes:
        for _ in range(3):
            with anyio.fail_after(PATIENCE_S):
                assert await wakes.wait(0.001) is False
        trigger.notify(endpoint)
        with anyio.fail_after(PATIENCE_S):
            assert await wakes.wait(15) is True
            assert await wakes.wait(0) is False


async def test_only_the_one_that_was_nudged_wakes(trigger: Trigger) -> None:
    async with trigger.arm(trigger.endpoint("a")) as a, trigger.arm(trigger.endpoint("b")) as b:
        trigger.notify(trigger.endpoint("b"))
        assert await is_woken(b)
        assert await is_quiet(trigger, a)


@pytest.mark.spec("WAKE-2")
async def test_an_absent_peer_is_no_error(trigger: Trigger) -> None:
    expected = Wake.PENDING if trigger.name == "poll" else Wake.ABSENT
    assert trigger.notify(trigger.endpoint("nobody")) is expected
    async with trigger.arm(trigger.endpoint("a")):
        assert trigger.notify(trigger.endpoint("nobody")) is expected
    assert trigger.notify(trigger.endpoint("a")) is expected
    trigger.clear(trigger.endpoint("nobody"))


async def test_arming_a_thousand_times_leaks_no_descriptor_and_no_thread(trigger: Trigger) -> None:
    endpoint = trigger.endpoint("a")

    async def once(number: int) -> None:
        async with trigger.arm(endpoint) as wakes:
            trigger.notify(endpoint)
            # Some listeners are woken; the others are disarmed with a nudge on its way.
            if number % 4 == 0 and trigger.name != "poll":
                await is_woken(wakes)

    await once(0)  # opens what a sender keeps open
    descriptors, threads = opened()
    for number in range(1_000):
        await once(number)
    with anyio.fail_after(PATIENCE_S):
        # A thread that watched ends by itself within one of its steps; nobody waits for that.
        while opened()[0] > descriptors or opened()[1] > threads:
            await anyio.sleep(0.005)


async def test_disarming_lets_go_of_who_waits(listeners: Trigger) -> None:
    endpoint = listeners.endpoint("a")
    returned = anyio.Event()

    async def wait(wakes) -> None:
        await wakes.wait()
        returned.set()

    async with anyio.create_task_group() as tasks:
        async with listeners.arm(endpoint) as wakes:
            tasks.start_soon(wait, wakes)
            await anyio.wait_all_tasks_blocked()
            assert not returned.is_set()
        with anyio.fail_after(PATIENCE_S):
            await returned.wait()


async def test_who_is_cancelled_can_disarm(listeners: Trigger) -> None:
    """As in a session that is told to stop."""
    endpoint = listeners.endpoint("a")
    stack = AsyncExitStack()
    with anyio.CancelScope() as scope:
        await stack.enter_async_context(listeners.arm(endpoint))
        scope.cancel()
        await stack.aclose()
    assert listeners.notify(endpoint) is Wake.ABSENT


async def test_arming_anew_in_another_task_than_disarming_the_old(listeners: Trigger, home: Path) -> None:
    """As a session's heartbeat does when the file that senders look for was removed."""
    endpoint = listeners.endpoint("a")
    old, new = AsyncExitStack(), AsyncExitStack()
    first = await old.enter_async_context(listeners.arm(endpoint))
    found = []

    async def arm_anew() -> None:
        file_of(home, listeners).unlink()
        found.append(await new.enter_async_context(listeners.arm(endpoint)))
        await old.aclose()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(arm_anew)
    assert not first.is_reachable()
    assert found[0].is_reachable()
    assert listeners.notify(endpoint) is Wake.WOKEN
    assert await is_woken(found[0])
    await new.aclose()
    assert listeners.notify(endpoint) is Wake.ABSENT


async def test_arming_beside_a_live_listener_is_refused(listeners: Trigger) -> None:
    endpoint = listeners.endpoint("a")
    async with listeners.arm(endpoint) as wakes:
        with pytest.raises(BrokenSetup, match="is in use by a live process"):
            async with listeners.arm(endpoint):
                pass
        listeners.notify(endpoint)
        assert await is_woken(wakes)


@pytest.fixture
def dead_socket(home: Path) -> Path:
    """A socket whose owner was killed."""
    prepare_home(home)
    code = (
        "import socket, sys, time; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "s.bind(sys.argv[1]); print(flush=True); time.sleep(60)"
    )
    path = home / "sock" / SocketTrigger(home).endpoint("a")
    path.parent.mkdir(mode=0o700)
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    return path


@pytest.mark.spec("WAKE-2")
async def test_the_socket_of_a_killed_process_is_stale_can_be_cleared_and_replaced(
    plain: Trigger, dead_socket: Path
) -> None:
    trigger = plain
    endpoint = trigger.endpoint("a")
    until(lambda: trigger.notify(endpoint) is Wake.STALE)
    async with trigger.arm(endpoint) as wakes:
        assert trigger.notify(endpoint) is Wake.WOKEN
        assert await is_woken(wakes)
    dead_socket.touch()
    trigger.clear(endpoint)
    assert dead_socket.exists(), "what is no socket is not ours to remove"


async def test_a_socket_file_is_private_and_gone_at_the_end(home: Path, plain: Trigger) -> None:
    trigger = plain
    async with trigger.arm(trigger.endpoint("a")):
        (file,) = (home / "sock").iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert not file.exists()


async def test_a_successors_socket_is_not_removed(home: Path, plain: Trigger) -> None:
    trigger = plain
    async with trigger.arm(trigger.endpoint("a")):
        (file,) = (home / "sock").iterdir()
        file.unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as successor:
            successor.bind(str(file))
    assert file.exists()


@pytest.mark.spec("WAKE-2")
@pytest.mark.parametrize(
    "obstacle", ["file", "folder", "stream socket", "no socket folder", "a file for a socket folder"]
)
async def test_whatever_is_in_the_way_a_notify_does_not_raise(home: Path, plain: Trigger, obstacle: str) -> None:
    trigger = plain
    path = home / "sock" / trigger.endpoint("a")
    if obstacle == "a file for a socket folder":
        path.parent.touch()
    elif obstacle != "no socket folder":
        path.parent.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        if obstacle == "file":
            path.touch()
        elif obstacle == "folder":
            path.mkdir()
        elif obstacle == "stream socket":
            stream.bind(str(path))
        assert trigger.notify(trigger.endpoint("a")) in (Wake.ABSENT, Wake.STALE)
        trigger.clear("../bus.db")


async def test_a_socket_folder_made_anew_is_found_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trigger = make("socket, long home", home, monkeypatch)
    endpoint = trigger.endpoint("a")
    async with trigger.arm(endpoint):
        assert trigger.notify(endpoint) is Wake.WOKEN
    (long_home(home) / "sock").rmdir()
    assert trigger.notify(endpoint) is Wake.ABSENT
    async with trigger.arm(endpoint):
        assert trigger.notify(endpoint) is Wake.WOKEN
    trigger.close()


@pytest.mark.spec("WAKE-3")
async def test_a_long_home_is_longer_than_a_socket_path_can_be(home: Path) -> None:
    prepare_home(long_home(home))
    (long_home(home) / "sock").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as plain, pytest.raises(OSError, match="too long"):
        plain.bind(str(long_home(home) / "sock" / "a.sock"))


@pytest.mark.spec("TRUST-1")
async def test_a_socket_folder_that_others_can_write_is_refused(home: Path, plain: Trigger) -> None:
    trigger = plain
    (home / "sock").mkdir()
    (home / "sock").chmod(0o777)
    with pytest.raises(BrokenSetup, match=r"can be written by other users \(mode 0777\): chmod go-rwx"):
        async with trigger.arm(trigger.endpoint("a")):
            pass


@pytest.mark.spec("TRUST-3")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_users_datagram_wakes_nobody(plain: Trigger, home: Path) -> None:
    endpoint = plain.endpoint("a")
    # Connects while still root: otherwise the modes of the folders would already keep another user out.
    code = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.connect(sys.argv[1])\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534); s.send(b'x')\n"
    )
    async with plain.arm(endpoint) as wakes:
        done = subprocess.run([sys.executable, "-c", code, str(home / "sock" / endpoint)], check=False)
        assert done.returncode == 0
        assert await is_quiet(plain, wakes)
        assert plain.notify(endpoint) is Wake.WOKEN
        assert await is_woken(wakes)


@pytest.mark.parametrize("what", ["nothing", "the file", "the folder"])
async def test_a_listener_knows_whether_it_is_reachable(trigger: Trigger, home: Path, what: str) -> None:
    endpoint = trigger.endpoint("a")
    async with trigger.arm(endpoint) as wakes:
        assert wakes.is_reachable()
        if what == "nothing" or trigger.name in ("poll", "fake"):
            return
        file = file_of(home, trigger)
        file.unlink()
        if what == "the folder":
            file.parent.rmdir()
        assert not wakes.is_reachable()
        assert trigger.notify(endpoint) is Wake.ABSENT


async def test_a_file_of_the_same_name_is_not_the_listeners(listeners: Trigger, home: Path) -> None:
    endpoint = listeners.endpoint("a")
    async with listeners.arm(endpoint) as wakes:
        file = file_of(home, listeners)
        file.unlink()
        file.touch()
        assert not wakes.is_reachable()
        assert listeners.notify(endpoint) in (Wake.STALE, Wake.ABSENT)
    assert file.exists()


async def test_what_listens_is_in_its_folder_and_what_is_others_is_not(listeners: Trigger, home: Path) -> None:
    """Home checks, doctor and uninstall ask every trigger for its folder, and for its own files in that folder."""
    endpoint = listeners.endpoint("0123456789ab")
    assert list(listeners.leftovers()) == []
    async with listeners.arm(endpoint):
        assert list(listeners.leftovers()) == [endpoint]
        (folder,) = home.rglob(str(listeners.folder))
        for other in ("notes.txt", endpoint.replace("0123456789ab", "ba9876543210")):
            (folder / other).mkdir()
        assert list(listeners.leftovers()) == [endpoint]
        assert listeners.notify(endpoint) is Wake.WOKEN
    assert list(listeners.leftovers()) == []


def test_a_trigger_without_a_folder_has_left_nothing(home: Path) -> None:
    for trigger in registry.Triggers(settings(home)).values():
        if trigger.folder is None:
            assert list(trigger.leftovers()) == []


@pytest.mark.spec("WAKE-1")
async def test_who_nudges_again_and_again_keeps_no_other_task_waiting(trigger: Trigger) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with trigger.arm(trigger.endpoint("web")) as wakes, anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        for _ in range(20):
            trigger.notify(trigger.endpoint("web"))
            await wakes.wait(0.05)
        assert turns >= 10
        tasks.cancel_scope.cancel()
