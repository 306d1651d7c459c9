"""The terminal that the console draws on, which can go away at any moment. Implements [CONSOLE-9].

Textual writes to it in a thread. Where the terminal is gone, that thread would end, and who waits for it would hang.
"""

from __future__ import annotations

import os
import signal
from typing import IO, Any

from textual.drivers.linux_driver import LinuxDriver

__all__ = ["Terminal"]


class _Lasting:
    """A file that never fails: when what is behind it is gone, this process hangs up, as the kernel would have it."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._is_gone = False

    def fileno(self) -> int:
        """The descriptor of the terminal."""
        return self._file.fileno()

    def write(self, text: str) -> None:
        """Write, if there is still a terminal."""
        try:
            self._file.write(text)
        except OSError:
            self._hang_up()

    def flush(self) -> None:
        """Write what is left."""
        try:
            self._file.flush()
        except OSError:
            self._hang_up()

    def _hang_up(self) -> None:
        if not self._is_gone:
            self._is_gone = True
            os.kill(os.getpid(), signal.SIGHUP)


class Terminal(LinuxDriver):
    """Textual's own driver, on a file that lasts."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._file = _Lasting(self._file)  # type: ignore[assignment, arg-type]
