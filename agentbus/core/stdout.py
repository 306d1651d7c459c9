"""Standard output, written in one place, so that one place knows whether somebody could take it.

What a command prints is either what it was asked for, and then somebody has to take it. Or it is the report of a deed
that is done, and then nobody has to. Implements [OUT-1] to [OUT-3].
"""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from agentbus.core.errors import AgentbusError
from agentbus.core.stderr import say

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import Any

__all__ = ["OutputFailed", "ReaderGone", "claim", "reported"]

_FD = 1


class OutputFailed(AgentbusError):
    """The output cannot be written."""


class ReaderGone(OutputFailed):
    """The reader of the output has closed it: it has had enough, which is no error. [OUT-2]"""

    exit_code = 0


class _Output(io.FileIO):
    # Not an OSError: the command line's library takes EPIPE for itself, and exits with 1.
    def write(self, data: Any) -> int:
        """Write some of `data`, and wait for room where the descriptor is non-blocking. Raises OutputFailed."""
        try:
            while True:
                count = super().write(data)
                if count is not None:
                    return count
                poller = select.poll()
                poller.register(_FD, select.POLLOUT)
                poller.poll()
        except OSError as error:
            # What is still in the buffers must not fail once more when the interpreter ends.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, _FD)
            os.close(null)
            is_gone = isinstance(error, (BrokenPipeError, ConnectionResetError))
            kind = ReaderGone if is_gone else OutputFailed
            raise kind(f"the output cannot be written ({error.strerror})") from error


def claim() -> None:
    """Make sys.stdout raise OutputFailed, and take every text: what the locale does not have is escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    output = io.BufferedWriter(_Output(_FD, "w", closefd=False))
    sys.stdout = io.TextIOWrapper(output, encoding=encoding, errors="backslashreplace", line_buffering=output.isatty())


@contextmanager
def reported() -> Iterator[None]:
    """For what is printed about a deed that is done: it stays done if nobody can be told, and so does the exit code.

    stderr gets a line instead, unless the reader has closed the output. [OUT-1]
    """
    try:
        yield
        sys.stdout.flush()
    except ReaderGone:
        pass  # as agreed above: nobody wants to know
    except OutputFailed as error:
        say(f"it is done, but {error}")
