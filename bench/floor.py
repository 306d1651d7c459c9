"""What the machine itself charges for a message: a row, a wake between two Python processes, a pipe.

`python -m bench.floor FOLDER` is the far end. It waits as a session does: an asyncio reader on a datagram socket. The
near end reads the pipe as a client does: a thread that blocks in read. Both ends stamp with time.perf_counter_ns,
which is CLOCK_MONOTONIC, one clock for all processes.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import apsw

from bench.report import Failed

__all__ = ["Floor"]

# The far end writes when it was woken and when it wrote this, both in nanoseconds.
_STAMPS = struct.Struct("<qq")
# A request to the far end: answer after so many microseconds; 0 means at once.
_REQUEST = struct.Struct("<q")
_NS_PER_MS = 1_000_000
_SCHEMA = """
CREATE TABLE messages (id INTEGER PRIMARY KEY AUTOINCREMENT, sender TEXT NOT NULL, recipient TEXT NOT NULL,
    body TEXT NOT NULL, sent_at INTEGER NOT NULL, delivered_at INTEGER) STRICT;
CREATE INDEX pending ON messages (recipient, id) WHERE delivered_at IS NULL;
"""


class Floor:
    """The near end. Times are in milliseconds; `folder` is on the disk of the buses that are measured."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        # The same settings as a mailbox: WAL, synchronous=NORMAL, no checkpoint on this path.
        self._database = apsw.Connection(str(folder / "floor.db"))
        for name, value in (("journal_mode", "wal"), ("synchronous", "normal"), ("wal_autocheckpoint", 0)):
            self._database.pragma(name, value)
        self._database.execute(_SCHEMA)
        self._path = str(folder / "far.sock")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        command = [sys.executable, "-m", "bench.floor", self._path]
        self._far = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._far.stdout is not None
        self._fd = self._far.stdout.fileno()
        self._stamps()  # the far end listens now

    def close(self) -> None:
        """End the far end."""
        assert self._far.stdin is not None
        assert self._far.stdout is not None
        self._far.stdin.close()
        self._far.wait()
        self._far.stdout.close()
        self._socket.close()
        self._database.close()

    def _stamps(self) -> tuple[int, int]:
        data = os.read(self._fd, _STAMPS.size)
        if len(data) < _STAMPS.size:
            raise Failed("the far end of the floor has ended")
        woken, wrote = _STAMPS.unpack(data)
        return woken, wrote

    def _insert(self) -> None:
        self._database.execute(
            "INSERT INTO messages (sender, recipient, body, sent_at) VALUES ('a', 'b', 'one round', 1) RETURNING id"
        ).fetchone()

    def insert(self, _pause_ms: float) -> float:
        """Time a bare INSERT, committed."""
        began = time.perf_counter_ns()
        self._insert()
        return (time.perf_counter_ns() - began) / _NS_PER_MS

    def datagram(self, _pause_ms: float) -> float:
        """Time one datagram, from before it is sent until the far end's reader is called."""
        began = time.perf_counter_ns()
        self._socket.sendto(_REQUEST.pack(0), self._path)
        return (self._stamps()[0] - began) / _NS_PER_MS

    def pipe(self, pause_ms: float) -> float:
        """Time one line through a pipe: from before its write, after `pause_ms` of silence, until it is read here."""
        self._socket.sendto(_REQUEST.pack(int(pause_ms * 1_000)), self._path)
        _, wrote = self._stamps()
        return (time.perf_counter_ns() - wrote) / _NS_PER_MS

    def chain(self, _pause_ms: float) -> float:
        """Time all three in a row, as for one message."""
        began = time.perf_counter_ns()
        self._insert()
        self._socket.sendto(_REQUEST.pack(0), self._path)
        self._stamps()
        return (time.perf_counter_ns() - began) / _NS_PER_MS


async def _far_end(path: str) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def write(woken: int) -> None:
        os.write(1, _STAMPS.pack(woken, time.perf_counter_ns()))

    def on_datagram() -> None:
        data = listener.recv(_REQUEST.size)
        woken = time.perf_counter_ns()
        (pause_us,) = _REQUEST.unpack(data)
        if pause_us:
            loop.call_later(pause_us / 1e6, write, woken)
        else:
            write(woken)

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        loop.add_reader(listener, on_datagram)
        loop.add_reader(0, ended.set)  # when stdin ends, the benchmark has ended
        write(0)
        await ended.wait()


if __name__ == "__main__":
    asyncio.run(_far_end(sys.argv[1]))
