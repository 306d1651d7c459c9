"""Presence is held, not believed: a live session holds a lock on a file of its own, `live/SESSION` in the home.

The lock is a POSIX record lock, fcntl(2). A forked child does not inherit it, and the kernel drops it at any death. So
it tells the truth across pid namespaces and containers of one kernel, and through suspends, stops and jumps of the
clock. Asking costs a reader no write.

"Cannot tell" is a state of its own. Only a lock that was asked for and found free says that a session has ended.

A process loses such a lock when it closes *any* descriptor of that file. So this module alone opens these files, and it
never opens one whose lock its own process holds. Knows nothing of SQL. Implements [PRES-1] to [PRES-3].
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress

from agentbus.core.config import prepare_folder
from agentbus.core.process import Life

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["BEAT", "FOLDER", "LOCK", "SILENT_S", "Held", "Presence", "Silence"]

# The folder of the lock files in the home.
FOLDER = "live"
# How a session shows that it lives: by its lock, or, where the file system cannot lock, by a beat in its row. [PRES-1]
LOCK = "lock"
BEAT = "beat"
# How long a watcher must itself have seen no beat, or no lock file, before it takes a session for ended: three beats of
# 15 s. By the watcher's own monotonic clock, so a command that looks once ends nobody. [PRES-3]
SILENT_S = 45.0
# A watcher that has not looked for this long has not watched: two beats.
_LONGEST_GAP_S = 30.0
# The file systems that cannot lock answer with one of these: some network and FUSE mounts.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
# struct flock: type, whence, start, length, pid on Linux; start, length, pid, type, whence on macOS and the BSDs.
_IS_LINUX = sys.platform == "linux"
_FLOCK = struct.Struct("hhqqi4x" if _IS_LINUX else "qqihh")
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

# What a lock file is called: a session, or a probe for one moment.
_SESSION = r"(probe-)?[0-9a-f]{8,12}"

# The lock files that this process holds, by path, with the pid that took them: a forked child holds none of them.
_held: dict[str, int] = {}


class Held:
    """The lock of one session, until `release`."""

    def __init__(self, path: str, fd: int) -> None:
        self._path = path
        self._fd: int | None = fd
        _held[path] = os.getpid()

    def is_in_place(self) -> bool:
        """Whether readers still find this lock: False once its file, or the folder, was removed."""
        return self._fd is not None and _is_same(self._fd, self._path)

    def release(self) -> None:
        """Remove the file, then let go of the lock. A second call does nothing."""
        if self._fd is None:
            return
        # Removed before it is unlocked: a successor could lock it in between, and would lose its file.
        if self.is_in_place():
            with suppress(OSError):  # somebody has removed it just now
                os.unlink(self._path)
        self._close()

    def _close(self) -> None:
        if self._fd is not None:
            _held.pop(self._path, None)
            os.close(self._fd)
            self._fd = None


def _is_same(fd: int, path: str) -> bool:
    try:
        there, ours = os.stat(path, follow_symlinks=False), os.fstat(fd)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


class Presence:
    """The lock files of one home."""

    def __init__(self, home: str | Path) -> None:
        # Text: it is asked for with each send, and a Path costs more than the lock.
        self._prefix = f"{home}/{FOLDER}/"

    @property
    def folder(self) -> Path:
        """The folder of the lock files."""
        from pathlib import Path

        return Path(self._prefix)

    def hold(self, session: str) -> Held | None:
        """Take the lock of `session`, and its file; None where the file system cannot lock.

        Raises BlockingIOError when a live process holds it, BrokenSetup when the folder is not fit for us alone, and
        OSError when the file cannot be opened.
        """
        prepare_folder(self._prefix[:-1])
        path = self._prefix + session
        if self._is_ours(path):
            raise BlockingIOError(f"{path} is held by this very process")
        while True:
            fd = os.open(path, _OPEN | os.O_CREAT, 0o600)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(fd)
                if error.errno in _NO_LOCKS:
                    return None
                raise BlockingIOError(f"{path} is held by a live process") from error
            # Somebody that cleared up after a dead session may have removed the file since it was opened.
            if _is_same(fd, path):
                return Held(path, fd)
            os.close(fd)

    def life(self, session: str) -> Life:
        """Whether the lock of `session` is held. Never blocks, never raises, changes nothing."""
        path = self._prefix + session
        if self._is_ours(path):
            return Life.LIVES
        try:
            fd = os.open(path, _OPEN)
        except OSError:
            # No file, no descriptor left, no permission: nobody was asked.
            return Life.UNKNOWN
        try:
            found = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, _whole(fcntl.F_WRLCK)))
        except OSError:
            return Life.UNKNOWN
        finally:
            os.close(fd)
        return Life.ENDED if found[0 if _IS_LINUX else 3] == fcntl.F_UNLCK else Life.LIVES

    def is_missing(self, session: str) -> bool:
        """Whether there surely is no lock file of `session`: somebody removed it. Needs no descriptor."""
        try:
            os.stat(self._prefix + session, follow_symlinks=False)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return False

    def clear(self, session: str) -> None:
        """Remove the lock file of a session that has ended. To be called where nobody can claim it meanwhile."""
        if self.life(session) is Life.ENDED:
            with suppress(OSError):  # somebody has removed it just now
                os.unlink(self._prefix + session)

    def leftovers(self) -> list[str]:
        """The lock files that sessions have left, named as ours are: nobody holds them."""
        import re  # takes 2 ms, and a send does not need it

        try:
            names = os.listdir(self.folder)
        except OSError:
            return []  # no folder, or none that can be looked into: nothing there can be told
        return sorted(one for one in names if re.fullmatch(_SESSION, one) and self.life(one) is not Life.LIVES)

    def can_lock(self) -> bool:
        """Whether the file system of the home can lock. Makes the folder and a file in it for a moment.

        Raises what `hold` raises.
        """
        held = self.hold(f"probe-{os.urandom(4).hex()}")
        if held is None:
            return False
        held.release()
        return True

    @staticmethod
    def _is_ours(path: str) -> bool:
        return _held.get(path) == os.getpid()


def _whole(kind: int) -> bytes:
    """A request for a lock of the whole file."""
    values = (kind, os.SEEK_SET, 0, 0, 0) if _IS_LINUX else (0, 0, 0, kind, os.SEEK_SET)
    return _FLOCK.pack(*values)


class Silence:
    """Which sessions one process has itself watched stay silent for SILENT_S, by its own monotonic clock. [PRES-3]"""

    def __init__(self) -> None:
        # By session: its last beat, and when this process saw that beat first.
        self._seen: dict[str, tuple[int, float]] = {}
        self._looked_s = 0.0

    def watch(self, beats: Mapping[str, int], now_s: float) -> set[str]:
        """The silent ones among the sessions in `beats`, each with the instant of its last beat.

        `now_s` is the monotonic clock. To be called every now and then, with all sessions that cannot be judged
        otherwise; the others are forgotten.
        """
        # A process that was stopped or slept has watched nobody meanwhile.
        if now_s - self._looked_s > _LONGEST_GAP_S:
            self._seen = {}
        self._looked_s = now_s
        self._seen = {
            session: self._seen[session] if self._seen.get(session, (None,))[0] == beat else (beat, now_s)
            for session, beat in beats.items()
        }
        return {session for session, (_, since_s) in self._seen.items() if now_s - since_s > SILENT_S}
