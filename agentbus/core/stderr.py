"""One line to stderr that never stops a session: not by a full pipe, a closed reader, or no stderr at all.

A client that starts a server often reads its stderr late or never. Implements [LIFE-5], [TRUST-5].
"""

from __future__ import annotations

import os
import select

from agentbus.core.text import escaped

__all__ = ["Stderr", "line", "say"]

# A pipe takes this much at once or nothing of it, pipe(7): so a line of at most this many bytes never blocks once the
# pipe has said that it has room. Linux has 4,096; POSIX promises 512.
_MOST_BYTES = select.PIPE_BUF
_CUT = b"...\n"


class Stderr:
    """Lines to the descriptor `fd`. Those that nobody could take are counted, and the next line says how many."""

    def __init__(self, fd: int = 2) -> None:
        self._fd = fd
        self._lost = 0

    def say(self, sentence: str) -> None:
        """Write `agentbus: SENTENCE`. See `line`."""
        self.line(f"agentbus: {sentence}")

    def line(self, text: str) -> None:
        """Write one line. Never blocks, never raises; what nobody can take is dropped."""
        if self._lost:
            lines = "line was" if self._lost == 1 else "lines were"
            if not self._write(f"agentbus: {self._lost:,} {lines} not shown here, stderr was full"):
                self._lost += 1
                return
            self._lost = 0
        if not self._write(text):
            self._lost += 1

    def _write(self, line: str) -> bool:
        # Line breaks and what is not text come from others: a line stays one line, steers no terminal, and is written
        # in any locale.
        data = escaped(" ".join(line.splitlines())).encode() + b"\n"
        if len(data) > _MOST_BYTES:
            data = data[: _MOST_BYTES - len(_CUT)] + _CUT
        try:
            poller = select.poll()
            poller.register(self._fd, select.POLLOUT)
            events = poller.poll(0)
            # A closed reader is writable as poll has it, and an error for the write: that reader wants no more lines.
            return bool(events) and os.write(self._fd, data) == len(data)
        except OSError:
            return False


_stderr = Stderr()
say, line = _stderr.say, _stderr.line
