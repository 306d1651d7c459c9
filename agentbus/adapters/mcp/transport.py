"""The line transport on this process's stdin and stdout: non-blocking, no threads, cancellable at any point.

Knows bytes and lines, but not MCP; runs under asyncio. The SDK's own stdio transport reads in a thread, hangs after a
signal until stdin ends, and hides a broken pipe. Here the bytes are written when a write has returned, and the end of
stdin is seen at once.
Implements [CHAN-3], [LIFE-2], [LIFE-4].
"""

from __future__ import annotations

import array
import fcntl
import os
import stat
import sys
import termios
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from agentbus.adapters.mcp.lines import LineBuffer
from agentbus.core.errors import Busy, DeliveryClosed
from agentbus.core.eventloop import asyncio_loop

if TYPE_CHECKING:
    import asyncio

__all__ = ["Stdio", "unread_bytes", "unread_ioctl"]

_READ_BYTES = 65_536
# The number of lines that wait for `next_line`. If there are more, reading pauses: a client cannot fill the memory.
_MAX_WAITING_LINES = 1_000
# The same for bytes that the client does not read: answers to refused requests pile up, and no task waits for them.
_MAX_UNSENT_BYTES = 1_048_576
# How many requests are started in one turn of the event loop. Each takes about 0.2 ms. Their answers leave in one
# write.
_MAX_LINES_IN_A_ROW = 16
# If the line handler raises Busy, call it again on each of the next 50 loop turns (about 1 ms), then every 0.5 ms. With
# pauses of 2 ms, eight senders to one were a fifth slower.
_BUSY_TURNS = 50
_BUSY_PAUSE_S = 0.000_5
# SIOCOUTQ, unix(7): TIOCOUTQ has the same number on Linux.
_OUTQ = termios.TIOCOUTQ


def _private_copy(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


def unread_ioctl(fd: int) -> int | None:
    """The ioctl that tells how many bytes written to `fd` are unread; None if the system cannot tell. [CHAN-3]"""
    if not sys.platform.startswith("linux"):
        return None
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode):
        return termios.FIONREAD
    if stat.S_ISSOCK(mode):
        return _OUTQ
    return None


def unread_bytes(fd: int, ioctl: int) -> int:
    """How many bytes written to `fd` are unread, by `unread_ioctl`. Raises OSError.

    A socket counts its own bookkeeping too, so this number is too high until everything is read. Then it is 0.
    """
    unread = array.array("i", [0])
    fcntl.ioctl(fd, ioctl, unread)
    return unread[0]


async def _until_writable(fd: int) -> None:
    try:
        await anyio.wait_writable(fd)
    except PermissionError:
        # epoll_ctl(2) EPERM: a file or /dev/null cannot be waited for, it is always ready.
        await anyio.lowlevel.checkpoint()


def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio_loop()
    assert loop is not None, "server.py chooses the event loop"
    return loop


class Stdio:
    """Lines in from `fd_in`, bytes out to `fd_out`; both become non-blocking. One reader task, any number of writers.

    `refuse` sees each line first. If it returns bytes, they are written as the answer, and nobody else sees the line.
    If it returns None, the line is left to the caller of `next_line`. If it raises Busy, it is called again soon.
    """

    def __init__(self, fd_in: int, fd_out: int, refuse: Callable[[bytes], bytes | None]) -> None:
        self._in = fd_in
        self._out = fd_out
        self._refuse = refuse
        self._was_blocking = [fd for fd in (fd_in, fd_out) if os.get_blocking(fd)]
        os.set_blocking(fd_in, False)
        os.set_blocking(fd_out, False)
        self._unread_ioctl = unread_ioctl(fd_out)
        self._buffer = LineBuffer()
        # Lines that were read: first those that are not sorted yet, then those that wait for `next_line`.
        self._fresh: deque[bytes | None] = deque()
        self._lines: deque[bytes | None] = deque()
        self._sort_due = False
        self._busy_turns = 0
        self._taken_in_a_row = 0
        self._has_ended = False
        self._failure: Exception | None = None
        self._reading_paused = anyio.Event()
        self._line_came = anyio.Event()
        self._room_came = anyio.Event()
        self._unsent = bytearray()
        self._queued = 0
        self._flush_due = False
        self._flushed = 0
        self._read = 0
        self._flush_wanted = anyio.Event()
        self._progress = anyio.Event()
        self.closed = anyio.Event()
        self._is_broken = False

    @classmethod
    def claim(cls, refuse: Callable[[bytes], bytes | None]) -> Stdio:
        """Take over fds 0 and 1. Then fd 0 is /dev/null and fd 1 is stderr, so that no stray print breaks a line."""
        fd_in, fd_out = _private_copy(0), _private_copy(1)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        os.dup2(2, 1)
        return cls(fd_in, fd_out, refuse)

    def restore(self) -> None:
        """Write what is posted, and make the descriptors blocking again: others can share them, for example a shell."""
        self._flush()
        for fd in self._was_blocking:
            os.set_blocking(fd, True)

    async def run(self) -> None:
        """Read and write until stdin ends or stdout is closed. Then `closed` is set."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._write_rest)
                await self._read_all()
                tasks.cancel_scope.cancel()
        finally:
            self.closed.set()

    # -- in ------------------------------------------------------------------------------------------------

    async def next_line(self) -> bytes | None:
        """The next line, without its newline; None for a line of more than MAX_LINE_BYTES.

        Raises EndOfStream when stdin has ended.
        """
        while not self._lines:
            if self.closed.is_set():
                raise anyio.EndOfStream
            self._taken_in_a_row = 0
            self._line_came = anyio.Event()
            await self._line_came.wait()
        self._taken_in_a_row += 1
        if self._taken_in_a_row >= _MAX_LINES_IN_A_ROW:
            # Otherwise, if a client sends a thousand calls at once, all would start before anything else has its turn.
            self._taken_in_a_row = 0
            await anyio.lowlevel.checkpoint()
        self._room_came.set()
        return self._lines.popleft()

    def _is_full(self) -> bool:
        return len(self._lines) > _MAX_WAITING_LINES or len(self._unsent) > _MAX_UNSENT_BYTES

    async def _read_all(self) -> None:
        while not self._has_ended and not self._is_broken:
            await self._read_until_full()
            if self._failure is not None:
                raise self._failure
            while self._is_full() and not self._is_broken:
                self._room_came = anyio.Event()
                await self._room_came.wait()
        self._close()

    async def _read_until_full(self) -> None:
        """Read until `_reading_paused` says that reading has to pause or to stop."""
        self._reading_paused = anyio.Event()
        if self._fresh:
            self._sort_soon()
        loop = _loop()
        try:
            loop.add_reader(self._in, self._on_readable)
        except PermissionError:
            # epoll_ctl(2) EPERM: a file or /dev/null cannot be waited for, it is always ready.
            while not self._reading_paused.is_set():
                self._on_readable()
                await anyio.lowlevel.checkpoint()
            return
        try:
            await self._reading_paused.wait()
        finally:
            loop.remove_reader(self._in)

    def _on_readable(self) -> None:
        if not self._fresh:  # otherwise sort these first
            self._guarded(self._read_some, self._sort_some)

    def _guarded(self, *steps: Callable[[], None]) -> None:
        try:
            for step in steps:
                step()
        except Exception as error:  # noqa: BLE001 - an event loop would log it and go on; `run` raises it
            self._failure = error
            self._reading_paused.set()

    def _read_some(self) -> None:
        try:
            data = os.read(self._in, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            # The terminal has hung up, or the socket was reset. This counts as an end of file. [LIFE-2]
            data = b""
        if not data:
            self._has_ended = True
        self._fresh.extend(self._buffer.feed(data))

    def _sort_some(self) -> None:
        """Sort a few lines now and the others in the next turns of the event loop. Nothing is read before that."""
        is_busy = False
        try:
            for _ in range(min(len(self._fresh), _MAX_LINES_IN_A_ROW)):
                self._sort(self._fresh[0])
                self._fresh.popleft()
                self._busy_turns = 0
        except Busy:
            is_busy = True
        if self._has_ended or self._is_full():
            self._reading_paused.set()
        elif self._fresh and not self._reading_paused.is_set():
            self._busy_turns += is_busy
            self._sort_soon(_BUSY_PAUSE_S if self._busy_turns > _BUSY_TURNS else 0.0)

    def _sort_soon(self, pause_s: float = 0.0) -> None:
        if not self._sort_due:
            self._sort_due = True
            _loop().call_later(pause_s, self._sort_more)

    def _sort_more(self) -> None:
        self._sort_due = False
        self._guarded(self._sort_some)

    def _sort(self, line: bytes | None) -> None:
        answer = None if line is None else self._refuse(line)
        if answer is not None:
            self.post(answer)
        elif line is None or line.strip():
            self._lines.append(line)
            self._line_came.set()

    def sift(self, refuse: Callable[[bytes], bytes | None]) -> None:
        """Show every line from now on to `refuse`, first the lines that wait for `next_line`."""
        self._refuse = refuse
        waiting, self._lines = self._lines, deque()
        # Before the lines that are not sorted yet, in the order in which they came.
        self._fresh.extendleft(reversed(waiting))
        self._sort_soon()
        self._room_came.set()

    def _close(self) -> None:
        """Tell every task that waits for the client that it is gone."""
        self.closed.set()
        self._line_came.set()
        self._room_came.set()
        self._reading_paused.set()

    # -- out -----------------------------------------------------------------------------------------------

    async def write(self, data: bytes) -> int:
        """Write all of `data`. Returns the position after it, in bytes since the start.

        Writes of several tasks never mix. A cancelled write is still written whole, as long as the process lives.

        Raises DeliveryClosed when stdout is closed.
        """
        position = self._queue(data)
        self._flush_queue()
        while self._flushed < position:
            if self._is_broken:
                raise DeliveryClosed("the client has closed its end")
            await self._progress.wait()
        return position

    def post(self, data: bytes) -> bool:
        """Write `data` in the next turn of the event loop, in one piece with everything else that is posted until then.

        Returns False if so much is unsent that a caller with more data should wait for `write`, or if stdout is closed.
        """
        self._queue(data)
        if not self._flush_due:
            self._flush_due = True
            _loop().call_soon(self._flush_posted)
        return len(self._unsent) <= _MAX_UNSENT_BYTES and not self._is_broken

    def _flush_posted(self) -> None:
        self._flush_due = False
        self._flush_queue()

    def _queue(self, data: bytes) -> int:
        """Keep `data` to be written. Returns the position after it."""
        self._unsent += data
        self._queued += len(data)
        return self._queued

    def _flush_queue(self) -> None:
        """Write as much as there is room for now, and the rest when there is room."""
        self._flush()
        if self._unsent:
            self._flush_wanted.set()

    def read_by_client(self) -> int:
        """The position up to which the client has surely read. If the system cannot tell: up to which was written."""
        if self._unread_ioctl is None:
            return self._flushed
        try:
            unread = unread_bytes(self._out, self._unread_ioctl)
        except OSError:
            return self._flushed
        # Bytes that were known to be read stay read.
        self._read = max(self._read, self._flushed - unread)
        return self._read

    def _flush(self) -> None:
        try:
            while self._unsent and not self._is_broken:
                count = os.write(self._out, self._unsent)
                del self._unsent[:count]
                self._flushed += count
        except BlockingIOError:
            return
        except OSError:
            # A writer learns about this from `write`; the session ends with `closed`. [LIFE-2]
            self._is_broken = True
            self._unsent.clear()
            self._close()

    async def _write_rest(self) -> None:
        """Write what did not fit into the pipe, when it has room again."""
        while True:
            await self._flush_wanted.wait()
            while self._unsent and not self._is_broken:
                await _until_writable(self._out)
                self._flush()
                self._room_came.set()
                told, self._progress = self._progress, anyio.Event()
                told.set()
            self._flush_wanted = anyio.Event()
            told, self._progress = self._progress, anyio.Event()
            told.set()
