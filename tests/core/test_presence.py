"""The locks by which sessions show that they live."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentbus.core.errors import BrokenSetup
from agentbus.core.presence import SILENT_S, Presence, Silence
from agentbus.core.process import Life

OTHER = (
    "import sys; from pathlib import Path; from agentbus.core.presence import Presence\n"
    "presence = Presence(Path(sys.argv[1]))\n"
    "held = presence.hold(sys.argv[2]) if len(sys.argv) > 2 else None\n"
    "print('ready', flush=True)\n"
    "for line in sys.stdin: print(presence.life(line.strip()).value, flush=True)\n"
)


class Other:
    """Another process with an eye on the locks, and a lock of its own if `session` is given."""

    def __init__(self, home: Path, *session: str) -> None:
        command = [sys.executable, "-c", OTHER, str(home), *session]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        assert self._stdout.readline() == "ready\n"

    def life(self, session: str) -> str:
        self._stdin.write(f"{session}\n")
        self._stdin.flush()
        return self._stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._stdin.close()
        self._stdout.close()


@pytest.fixture
def presence(home: Path) -> Presence:
    home.mkdir(mode=0o700)
    return Presence(home)


@pytest.fixture
def other(home: Path, presence: Presence) -> Iterator[Other]:
    made = Other(home)
    yield made
    made.kill()


@pytest.mark.spec("PRES-1")
def test_a_lock_is_seen_by_its_own_and_by_another_process(presence: Presence, other: Other) -> None:
    held = presence.hold("web")
    assert held is not None
    for _ in range(2):  # looking at it must not lose it: closing any descriptor of the file would
        assert (presence.life("web"), other.life("web")) == (Life.LIVES, "lives")
    held.release()
    held.release()
    assert (presence.life("web"), other.life("web")) == (Life.UNKNOWN, "unknown")
    assert list(presence.folder.iterdir()) == []


@pytest.mark.spec("PRES-1", "PRES-2")
def test_the_lock_of_a_killed_process_is_free_and_can_be_taken(home: Path, presence: Presence) -> None:
    dead = Other(home, "web")
    assert presence.life("web") is Life.LIVES
    with pytest.raises(BlockingIOError):
        presence.hold("web")
    presence.clear("web")
    assert presence.life("web") is Life.LIVES, "what a lock holder owns is removed by nobody"
    dead.kill()
    assert presence.life("web") is Life.ENDED
    held = presence.hold("web")
    assert held is not None
    assert presence.life("web") is Life.LIVES
    held.release()


@pytest.mark.spec("PRES-1")
def test_a_forked_child_holds_nothing_and_lets_go_of_nothing(presence: Presence, other: Other) -> None:
    held = presence.hold("web")
    assert held is not None
    child = os.fork()
    if child == 0:
        held._close()  # whatever it closes, the lock is its parent's
        os._exit(0 if presence.life("web") is Life.LIVES else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert other.life("web") == "lives"
    held.release()


@pytest.mark.spec("PRES-1")
def test_who_cannot_ask_does_not_know(presence: Presence, monkeypatch: pytest.MonkeyPatch) -> None:
    held = presence.hold("web")
    assert held is not None
    held._close()
    assert presence.life("web") is Life.ENDED

    def none_left(*_arguments: object, **_options: object) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", none_left)
        assert presence.life("web") is Life.UNKNOWN
    assert not presence.is_missing("web"), "which needs no descriptor"
    assert presence.is_missing("nobody")


@pytest.mark.spec("PRES-2")
def test_a_removed_file_is_noticed(presence: Presence) -> None:
    held = presence.hold("web")
    assert held is not None
    assert held.is_in_place()
    (presence.folder / "web").unlink()
    assert not held.is_in_place()
    held.release()
    again = presence.hold("web")
    assert again is not None
    again.release()


@pytest.mark.spec("TRUST-1")
def test_lock_files_are_ours_alone(presence: Presence) -> None:
    held = presence.hold("web")
    assert held is not None
    assert stat.S_IMODE(presence.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((presence.folder / "web").stat().st_mode) == 0o600
    presence.folder.chmod(0o777)
    with pytest.raises(BrokenSetup, match="can be written by other users"):
        presence.hold("api")
    held.release()


@pytest.mark.spec("UNINST-2")
def test_what_is_left_is_told_from_what_is_held_and_what_is_others(presence: Presence) -> None:
    held = presence.hold("0123456789ab")
    dead = presence.hold("ba9876543210")
    assert held is not None
    assert dead is not None
    dead._close()
    (presence.folder / "notes.txt").write_text("mine")
    assert presence.leftovers() == ["ba9876543210"]
    held.release()


def test_whether_the_file_system_can_lock_leaves_nothing(presence: Presence) -> None:
    assert presence.can_lock()
    assert list(presence.folder.iterdir()) == []


@pytest.mark.spec("PRES-3")
def test_silence_is_only_what_one_has_watched_itself() -> None:
    silence = Silence()
    now = 1_000.0
    assert silence.watch({"a": 1, "b": 1}, now) == set()
    while now < 1_000 + SILENT_S:
        now += 15
        assert silence.watch({"a": 1, "b": int(now)}, now) == set()
    assert silence.watch({"a": 1, "b": int(now)}, now + 1) == {"a"}
    # Stopped for ten minutes, and it begins to watch again.
    assert silence.watch({"a": 1, "b": 5}, now + 600) == set()
    # A session that was not there in between is a new one.
    assert silence.watch({"b": 5}, now + 615) == set()
    assert silence.watch({"a": 1, "b": 5}, now + 630) == set()


@pytest.mark.spec("PRES-1")
def test_asking_keeps_no_descriptor(presence: Presence) -> None:
    dead = presence.hold("web")
    assert dead is not None
    dead._close()
    before = len(os.listdir("/dev/fd"))
    for _ in range(200):
        assert presence.life("web") is Life.ENDED
        assert presence.life("nobody") is Life.UNKNOWN
    assert len(os.listdir("/dev/fd")) == before
