"""Bytes in, whole lines out. The time is linear in the bytes, and the memory is bounded by one line. Pure.

Implements [MCP-3].
"""

from __future__ import annotations

__all__ = ["MAX_LINE_BYTES", "LineBuffer"]

# Room for the largest message (1 MiB) with every byte escaped as \u00XX, and a little more. A longer line is refused.
MAX_LINE_BYTES = 8 * 1_048_576


class LineBuffer:
    """Cuts a stream of bytes into lines."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> list[bytes | None]:
        """The lines that `data` completes, without their newline; None for a line of more than MAX_LINE_BYTES."""
        if not self._size and data.find(b"\n") == len(data) - 1 < MAX_LINE_BYTES:
            return [data[:-1]] if data else []  # one whole line, as a client that waits for each answer sends them
        *whole, rest = data.split(b"\n")
        found = []
        for piece in whole:
            self._add(piece)
            found.append(b"".join(self._parts) if self._size <= MAX_LINE_BYTES else None)
            self._parts, self._size = [], 0
        self._add(rest)
        return found

    def _add(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size <= MAX_LINE_BYTES:
            self._parts.append(piece)
        else:
            self._parts = []  # only its length is remembered, until its newline comes
