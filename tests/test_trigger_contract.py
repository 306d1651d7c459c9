"""What ports.Trigger promises, of every trigger. A new one is one more parameter."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest

from agentbus.config import prepare_home
from agentbus.errors import BrokenSetup
from agentbus.ports import Trigger, Wake
from agentbus.triggers.poll import PollTrigger
from agentbus.triggers.socket import SocketTrigger
from tests.helpers import FakeTrigger, until

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
    """As on a system where open descriptors are no paths."""
    deep = long_home(home)
    prepare_home(deep)
    return SocketTrigger(deep, fd_folder=None)


TRIGGERS: dict[str, Callable[[Path], Trigger]] = {
    "socket": make_socket,
    "socket, long home": make_long_socket,
    "socket, long home, no /proc": make_symlinked_socket,
    "poll": lambda home: PollTrigger(home, poll_ms=10),
    "fake": lambda home: FakeTrigger(),
}
SOCKETS = {name: make for name, make in TRIGGERS.items() if name.startswith("socket")}


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
        with anyio.fail_after(10):
            results = {trigger.notify(endpoint) for _ in range(10_000)}
        assert results <= {Wake.WOKEN, Wake.FULL, Wake.PENDING}
        assert await is_woken(wakes)
        assert await is_quiet(trigger, wakes)


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


async def test_arming_a_thousand_times_leaks_no_descriptor(trigger: Trigger) -> None:
    endpoint = trigger.endpoint("a")

    async def once() -> None:
        async with trigger.arm(endpoint) as wakes:
            trigger.notify(endpoint)
            await is_woken(wakes) if trigger.name != "poll" else None

    await once()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(1_000):
        await once()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_arming_beside_a_live_listener_is_refused(sockets: Trigger) -> None:
    endpoint = sockets.endpoint("a")
    async with sockets.arm(endpoint) as wakes:
        with pytest.raises(BrokenSetup, match="is in use by a live process"):
            async with sockets.arm(endpoint):
                pass
        sockets.notify(endpoint)
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
    # The path is reached while still root: the modes of the folders would keep another user out before that.
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


async def test_a_listener_knows_whether_it_is_reachable(trigger: Trigger, home: Path) -> None:
    endpoint = trigger.endpoint("a")
    async with trigger.arm(endpoint) as wakes:
        assert wakes.is_reachable()
        for file in home.rglob("*.sock"):
            file.unlink()
            assert not wakes.is_reachable()
