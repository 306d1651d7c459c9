"""The files of the database, and that those of one life never meet those of another.

SQLite ties `bus.db-wal` and `bus.db-shm` to `bus.db` by their names alone. If somebody removes, moves or puts back
`bus.db` and leaves the two, the next program would read the changes of one database into another. So a small file
beside them says which `bus.db` they belong to. A new database is built aside and linked into place whole. Files from
another life are set aside, with all that belongs together. Opens no database. Implements [STORE-6] to [STORE-8].
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from agentbus.core.config import unwritable
from agentbus.core.errors import BrokenSetup, TryAgain

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ASIDE", "OWNER", "file_at", "is_settled", "leftovers", "set_aside", "settle"]

# Beside `bus.db`: to which file, by its inode, the WAL and the shared memory belong. It names its own inode too: where
# that is another, the whole folder was copied or restored, and this file says nothing. No device: its number can change
# with each start of the machine.
OWNER = "-owner"
# What is set aside is called like the database, then this and the time: bus.db.aside-20260131T120000, ...-wal.
ASIDE = ".aside-"
_FRESH = ".new-"
_PARTS = ("-wal", "-shm")
# How long to wait for another process that builds a database, which takes some 20 ms.
_PATIENCE_S = 10.0


def file_at(path: str) -> tuple[int, int] | None:
    """The device and the inode of the file at `path`; None if there is none."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def is_settled(path: str | Path) -> bool:
    """Whether there is a database at `path`, and its WAL and shared memory, if any, belong to it."""
    there = file_at(str(path))
    return there is not None and _owner(path) in (None, there[1])


def settle(path: str | Path, build: Callable[[Path], None]) -> None:
    """See to it that there is a database at `path`, and beside it no file of another life.

    `build` makes a new database at the path that it is given. Two processes that do so at once agree on one file.

    Raises BrokenSetup when the folder cannot be written, TryAgain when another process builds for 10 s, and whatever
    `build` raises.
    """
    there = file_at(str(path))
    if there is not None and _owner(path) == there[1]:
        return
    from pathlib import Path  # takes 4 ms, and the usual case is done with

    path = Path(path)
    try:
        with _folder_lock(path.parent):
            there = file_at(str(path))
            if there is None:
                _set_aside_parts(path)
                _place_new(path, build)
                there = file_at(str(path))
            elif _owner(path) not in (None, there[1]):
                _set_aside_parts(path)
            if there is not None:
                _write_owner(path, there[1])
    except OSError as error:
        raise BrokenSetup(f"{path} cannot be created ({error.strerror})", hint=unwritable(path, error)) from error


def set_aside(path: Path) -> list[Path]:
    """Move the database at `path` away, with everything that belongs to it; the new paths. [STORE-8]

    Raises TryAgain and OSError as `settle` does.
    """
    with _folder_lock(path.parent):
        moved = _move([path, *(path.with_name(path.name + part) for part in _PARTS)], path)
        path.with_name(path.name + OWNER).unlink(missing_ok=True)
    return moved


def leftovers(path: Path) -> list[Path]:
    """What a killed process has left of a database that it was building. Nobody else knows these files."""
    import re  # takes 2 ms, and a send does not need it

    ours = re.compile(f"{re.escape(path.name)}({re.escape(OWNER)})?{re.escape(_FRESH)}[0-9]+(-wal|-shm|-journal)?")
    try:
        names = os.listdir(path.parent)
    except OSError:
        return []  # no folder, or it cannot be read: nothing there can be told
    return sorted(path.with_name(name) for name in names if ours.fullmatch(name))


def _owner(path: str | Path) -> int | None:
    """The inode that the file beside `path` names. None where it says nothing: an earlier version, or a copy."""
    try:
        with open(f"{path}{OWNER}", encoding="ascii") as file:
            inode, own = map(int, file.read().split())
            return inode if os.fstat(file.fileno()).st_ino == own else None
    except (OSError, ValueError):
        return None


def _write_owner(path: Path, inode: int) -> None:
    # Written aside and renamed: a reader sees the old one or the new one, whole.
    fresh = f"{path}{OWNER}{_FRESH}{os.getpid()}"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, f"{inode} {os.fstat(fd).st_ino}\n".encode())
    finally:
        os.close(fd)
    os.replace(fresh, f"{path}{OWNER}")


def _place_new(path: Path, build: Callable[[Path], None]) -> None:
    # We hold the lock of the folder, so what others have begun and not finished is theirs no more.
    for old in leftovers(path):
        old.unlink(missing_ok=True)
    fresh = path.with_name(f"{path.name}{_FRESH}{os.getpid()}")
    # Made here and not by SQLite, which would use mode 0644. The WAL and shm files get the mode of this file.
    os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    try:
        build(fresh)
        with suppress(FileExistsError):  # an older agentbus, which knows no lock, was faster: its file is as good
            _link(fresh, path)
    finally:
        for part in ("", *_PARTS):
            fresh.with_name(fresh.name + part).unlink(missing_ok=True)


def _link(fresh: Path, path: Path) -> None:
    try:
        os.link(fresh, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without hard links. Under the lock nobody else makes this file.
        if not path.exists():
            os.rename(fresh, path)


def _set_aside_parts(path: Path) -> None:
    _move([path.with_name(path.name + part) for part in _PARTS], path)


def _move(found: list[Path], path: Path) -> list[Path]:
    """Move those of the files that are there to names that SQLite takes for one database; the new paths."""
    stamp, number = time.strftime("%Y%m%dT%H%M%S", time.gmtime()), 1
    aside = f"{path.name}{ASIDE}{stamp}"
    while any(path.with_name(aside + part).exists() for part in ("", *_PARTS)):
        number += 1
        aside = f"{path.name}{ASIDE}{stamp}-{number}"
    moved = []
    for one in found:
        new = path.with_name(aside + one.name.removeprefix(path.name))
        with suppress(FileNotFoundError):
            os.rename(one, new)
            moved.append(new)
    return moved


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """The lock of the folder, for as long as the block runs; the kernel drops it at any death. Raises TryAgain."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        give_up_at = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= give_up_at:
                    raise TryAgain(
                        f"another process has been making a database in {folder} for {_PATIENCE_S:g} s",
                        hint="try again in a moment",
                    ) from None
                time.sleep(0.002)
            except OSError:
                break  # a file system without locks: the link decides who made the file
        yield
    finally:
        os.close(fd)
