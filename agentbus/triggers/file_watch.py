"""The file-watch trigger: each peer has a wake file, and a nudge touches it.

For places where no unix socket can be bound. The listener watches its file with `watchfiles` in a thread. It also holds
a lock on the file for as long as it lives, so a sender sees at once that a listener is dead. Nothing is ever written
into the file. This trigger knows nothing about the mailbox. Implements [WAKE-1], [WAKE-2], [WAKE-7].
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from agentbus.core.config import Settings, prepare_folder
from agentbus.core.errors import BrokenSetup
from agentbus.core.eventloop import caller_from_threads
from agentbus.core.ports import Wake

if TYPE_CHECKING:
    from watchfiles._rust_notify import RustNotify

__all__ = ["FileWatchTrigger", "make"]

_SUFFIX = ".wake"
# What the file of a session is called.
_OURS = re.compile(r"[0-9a-f]{8,12}\.wake")
# watchfiles sleeps this long between two looks at the events from inotify. It reports a change when a second look finds
# no more, so a wake takes 1.5 steps. Measured on 2 slow cores; for each step: CPU of an idle listener, its wake-ups per
# second, median latency of a wake. 1 ms: 2.7 %, 910, 1.8 ms; 5 ms: 1.1 %, 194, 7.7 ms; 10 ms: 0.8 %, 98, 17 ms;
# 20 ms: 0.5 %, 50, 31 ms; 50 ms: 0.2 %, 20, 74 ms. Every session pays for the CPU all day; no agent notices latency.
_STEP_MS = 20
# watchfiles groups changes for at most this long. All changes are nudges, and one nudge is as good as many.
_DEBOUNCE_MS = 1
# The step while arming: a task waits for the listener to be armed, so the thread looks more often.
_PROOF_STEP_MS = 1
# 1.8 ms is usual. A session that waited longer than this for its fallback would seem slow to start.
_PROOF_MS = 2_000
# A sender holds its lock for 10 us. If a lock is held for longer than this, its sender was stopped.
_LOCK_PATIENCE_S = 1.0
_LOCK_POLL_S = 0.001

# O_NONBLOCK: if somebody put a fifo there, open() does not wait for its other end, and the fifo is refused.
_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_ENDED = "the watching thread has ended"
_INSTEAD = "AGENTBUS_TRIGGER=poll"


def make(settings: Settings) -> FileWatchTrigger:
    """The trigger of the bus with these settings."""
    return FileWatchTrigger(settings.home)


class _WakeFile:
    """An open wake file. It knows whether it is still the file that senders find."""

    def __init__(self, path: Path, flags: int) -> None:
        """Raises OSError when there is no file at `path`, or it is not a regular file."""
        self.path = path
        self._fd: int | None = os.open(path, flags, 0o600)
        facts = os.fstat(self._fd)
        self._identity = (facts.st_dev, facts.st_ino)
        if not stat.S_ISREG(facts.st_mode):
            self.close()
            raise FileExistsError(errno.EEXIST, "not a regular file")

    def lock(self, operation: int) -> bool | None:
        """Whether the lock could be taken at once; None where the file system does not support locks."""
        assert self._fd is not None
        try:
            fcntl.flock(self._fd, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True

    def make_private(self) -> None:
        """Set mode 0600: the umask or an earlier process can have given the file another mode. Raises OSError."""
        assert self._fd is not None
        os.fchmod(self._fd, 0o600)

    def touch(self) -> None:
        """Set the times of the file. That is reported even if the times stay the same. Raises OSError."""
        # The times and not the content: content can need space, and the disk might be full.
        assert self._fd is not None
        os.utime(self._fd)

    def is_in_place(self) -> bool:
        """Whether the file is open and is still the one that senders look for."""
        try:
            facts = os.lstat(self.path)
        except OSError:
            return False
        return self._fd is not None and (facts.st_dev, facts.st_ino) == self._identity

    def remove(self) -> None:
        """Remove the file, unless another one has taken its place, and close it."""
        # Remove it before unlocking: otherwise a successor could lock it in between, and would lose it.
        if self.is_in_place():
            with suppress(OSError):  # another process has just removed it
                self.path.unlink()
        self.close()

    def close(self) -> None:
        """Close the file, which also unlocks it, even if it was moved. A second call does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _claim(path: Path) -> _WakeFile | None:
    """The file at `path`, locked, and created if needed; None when the caller must try again.

    Raises BrokenSetup when a live listener has it, and OSError.
    """
    file = _WakeFile(path, _CREATE)
    try:
        is_ours = file.lock(fcntl.LOCK_EX) is not False
        # Only a listener takes an exclusive lock; senders take a shared one.
        if not is_ours and file.lock(fcntl.LOCK_SH) is False:
            raise BrokenSetup(f"{path} is in use by a live process")
        # A process that cleared up after a dead peer might have removed the file since it was opened.
        if is_ours and file.is_in_place():
            file.make_private()
            return file
    except BaseException:
        file.close()
        raise
    file.close()
    return None


async def _patiently_claim(path: Path) -> _WakeFile:
    import anyio

    give_up_at = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            file = _claim(path)
        except OSError as error:
            raise BrokenSetup(
                f"{path} cannot be used as a wake file ({error.strerror})",
                hint=f"set AGENTBUS_HOME to a folder on a local disk, or {_INSTEAD}",
            ) from error
        if file is not None:
            return file
        if time.monotonic() >= give_up_at:
            raise BrokenSetup(f"{path} is held by a suspended process", hint=f"remove the file, or set {_INSTEAD}")
        await anyio.sleep(_LOCK_POLL_S)


class _Stop:
    """Tells a watching thread, which asks after each step, whether to end."""

    def __init__(self) -> None:
        self._armed_by = threading.current_thread()
        self.is_asked_for = False

    def is_set(self) -> bool:
        """True also when the thread that armed has ended: an event loop left open must not keep a program alive."""
        return self.is_asked_for or not self._armed_by.is_alive()


class _Nudges:
    """The wakes of a file. A thread watches the file, and sets an event in the event loop that armed it."""

    def __init__(self, file: _WakeFile, step_ms: int) -> None:
        import anyio

        self._make_event = anyio.Event
        self._file = file
        self._step_ms = step_ms
        self._call_soon = caller_from_threads()
        self._stop = _Stop()
        self._armed = anyio.Event()
        self._nudged = anyio.Event()
        self._is_watching = False
        self._trouble: Exception | None = None

    async def start(self) -> None:
        """Watch, and return once a change has been seen. Raises BrokenSetup."""
        try:
            # Not a daemon thread: if it is inside watchfiles when the interpreter ends, the process crashes.
            threading.Thread(target=self._run, name=f"agentbus {self._file.path.name}").start()
        except RuntimeError as error:
            raise BrokenSetup(
                f"the thread that watches {self._file.path} cannot be started ({error})", hint=f"set {_INSTEAD}"
            ) from error
        import anyio

        # Step by step: in a sandbox that refuses sendto(2), a thread cannot wake the event loop. A program that has
        # joined has a loop of its own making, and is woken by its timers then.
        while not self._armed.is_set():
            with anyio.move_on_after(_STEP_MS / 1_000):
                await self._armed.wait()
        if self._is_watching:
            return
        reason = self._trouble or _ENDED
        hint = f"set {_INSTEAD}"
        if isinstance(self._trouble, ImportError):
            hint = f"pip install watchfiles, or set {_INSTEAD}"
        elif isinstance(self._trouble, RuntimeError):  # watchfiles raises it for every limit that is reached
            hint = f"raise fs.inotify.max_user_instances or max_user_watches if they are used up, or set {_INSTEAD}"
        raise BrokenSetup(f"{self._file.path} cannot be watched ({reason})", hint=hint) from self._trouble

    async def wait(self, timeout_s: float | None = None) -> bool:
        import anyio

        with anyio.move_on_after(timeout_s):
            await self._nudged.wait()
        if not self._nudged.is_set():
            return False
        # No other code runs between these two lines, so a later nudge sets the new event.
        self._nudged = self._make_event()
        return True

    def is_reachable(self) -> bool:
        # If the watch failed, the file has been closed.
        return self._file.is_in_place()

    def release(self) -> None:
        self._nudged.set()

    def stop(self) -> None:
        """Wake the waiting task. The thread ends within one step and closes the watch; nothing waits for the thread."""
        self._stop.is_asked_for = True
        self._nudged.set()

    # -- in the thread

    def _run(self) -> None:
        try:
            # Imported here because that takes 50 ms and no other trigger needs it.
            from watchfiles._rust_notify import RustNotify

            with RustNotify([str(self._file.path)], False, False, 0, False, False) as watch:
                self._prove(watch)
                self._call_soon(self._on_armed)
                while watch.watch(_DEBOUNCE_MS, self._step_ms, 0, self._stop) != "stop":
                    self._call_soon(self._on_nudge)
        # ValueError: the path is not UTF-8. RuntimeError: any failure of watchfiles, or the event loop is closed.
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            self._trouble = error
        finally:
            with suppress(RuntimeError):  # the event loop is closed, and its tasks are gone
                self._call_soon(self._on_end)

    def _prove(self, watch: RustNotify) -> None:
        """Make one change and wait for its report: some file systems report none. Raises OSError. [WAKE-7]"""
        # By path: if arming was given up, the file is closed, and its descriptor can belong to another file by now.
        os.utime(self._file.path, follow_symlinks=False)
        if watch.watch(_DEBOUNCE_MS, _PROOF_STEP_MS, _PROOF_MS, self._stop) == "timeout":
            raise TimeoutError(f"a change was not reported within {_PROOF_MS / 1000:g} s")

    # -- in the event loop again

    def _on_armed(self) -> None:
        self._is_watching = True
        self._armed.set()

    def _on_nudge(self) -> None:
        self._nudged.set()

    def _on_end(self) -> None:
        was_watching, self._is_watching = self._is_watching, False
        self._armed.set()
        if not was_watching or self._stop.is_asked_for:
            return
        # Remove the file, so that senders do not believe that this listener hears them. The next heartbeat arms it
        # again. [WAKE-6]
        self._file.remove()
        self._nudged.set()
        import logging

        logging.getLogger("agentbus").warning("%s is no longer watched: %s", self._file.path, self._trouble or _ENDED)


class FileWatchTrigger:
    """Wakes peers by touching files in `home`/wake. A listener sleeps `step_ms` milliseconds between two looks."""

    name = "file-watch"
    folder = "wake"

    def __init__(self, home: Path, *, step_ms: int = _STEP_MS) -> None:
        self._folder = home / self.folder
        self._step_ms = step_ms

    def endpoint(self, session: str) -> str:
        """A file name in the wake folder; never a path, so that a home can be moved."""
        return session + _SUFFIX

    @asynccontextmanager
    async def arm(self, endpoint: str) -> AsyncIterator[_Nudges]:
        """Lock and watch the file of `endpoint`. A file left by a dead process is taken over.

        Raises BrokenSetup when the folder cannot be used, a live listener has the endpoint, the system cannot watch
        another file, or the system does not report changes of this one.
        """
        prepare_folder(self._folder)
        file = await _patiently_claim(self._folder / endpoint)
        try:
            nudges = _Nudges(file, self._step_ms)
            try:
                await nudges.start()
                yield nudges
            finally:
                nudges.stop()
        finally:
            file.remove()

    def notify(self, endpoint: str) -> Wake:
        """Touch the file of `endpoint` if a peer listens there. See Trigger."""
        file = self._look(endpoint)
        if file is None:
            # Also when something else is in the way: no peer can be nudged there, and a peer's poll finds the row.
            return Wake.ABSENT
        with closing(file):
            is_free = file.lock(fcntl.LOCK_SH)
            if is_free:
                return Wake.STALE
            try:
                file.touch()
            except OSError:
                return Wake.PENDING
        # Without locks, the file does not show whether the peer lives: the caller has to check its process.
        return Wake.PENDING if is_free is None else Wake.WOKEN

    def clear(self, endpoint: str) -> None:
        """Remove the wake file of a dead peer. Leave the file of a live peer, and anything that is not a file."""
        file = self._look(endpoint)
        if file is None:
            return
        # Hold the lock while removing the file: a listener that arms meanwhile checks that its file is still there.
        if file.lock(fcntl.LOCK_SH) is not False:
            file.remove()
        file.close()

    def leftovers(self) -> Iterator[str]:
        """The files in the folder that are called like those of sessions."""
        try:
            found = sorted(os.scandir(self._folder), key=lambda entry: entry.name)
        except OSError:
            return  # there is no folder, or it cannot be read: report nothing
        for entry in found:
            if _OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                yield entry.name

    def close(self) -> None:
        """Does nothing: no descriptor is kept open."""

    def _look(self, endpoint: str) -> _WakeFile | None:
        # Open only what can be a wake file: closing a descriptor of the database would release SQLite's locks on it.
        if os.sep in endpoint or not endpoint.endswith(_SUFFIX):
            return None
        try:
            return _WakeFile(self._folder / endpoint, _LOOK)
        except OSError:
            return None
