"""A stand-in for the inbox that Claude Code gives each session, as recorded with 2.1.331.

It takes connections on a unix stream socket. From each it takes an `auth` line with the right token, then `user` lines.
It never answers. It silently drops posts beyond 30 at once and one per 2 s after that, and a text that it already had
within the window. A line of more than 1,048,576 characters, or one that is not JSON, is dropped together with its
connection.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

BURST = 30
REFILL_S = 2.0
WINDOW_S = 10.0
MAX_LINE_CHARS = 1_048_576
TOKEN = "s3cret-of-the-session"


class InboxStandIn:
    """Listens at `path` until closed. `texts` are those that the session got, `dropped` the others, with the reason."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic, reads: bool = True) -> None:
        self.path = path
        self.texts: list[str] = []
        self.dropped: list[tuple[str, str]] = []
        self.is_reading = threading.Event()
        if reads:
            self.is_reading.set()
        self._clock = clock
        self._left = float(BURST)
        self._filled_at = clock()
        self._had: dict[str, float] = {}
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self, *, unlink: bool = True) -> None:
        """Stop listening; `unlink` removes the socket, as an orderly end does."""
        if unlink:
            self.path.unlink(missing_ok=True)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.is_reading.set()
        self._thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self.is_reading.wait()
                self._take(connection)

    def _take(self, connection: socket.socket) -> None:
        is_known = False
        # Only complete lines count: nothing is taken from a line that is cut off.
        for line in connection.makefile("r", encoding="utf-8", newline="\n"):
            if not line.endswith("\n") or len(line) > MAX_LINE_CHARS:
                self.dropped.append(("line", line[:100]))
                return
            try:
                message = json.loads(line)
            except ValueError:
                self.dropped.append(("json", line[:100]))
                return
            if message.get("type") == "auth":
                is_known = message.get("token") == TOKEN
            elif not is_known:
                self.dropped.append(("auth", line[:100]))
            elif message.get("type") == "user":
                self._give(message["message"]["content"])

    def _give(self, text: str) -> None:
        now = self._clock()
        self._left = min(float(BURST), self._left + (now - self._filled_at) / REFILL_S)
        self._filled_at = now
        if self._left < 1:
            self.dropped.append(("rate", text[:100]))
        elif now - self._had.get(text, -WINDOW_S) < WINDOW_S:
            self.dropped.append(("same", text[:100]))
        else:
            self._left -= 1
            self._had[text] = now
            self.texts.append(text)


def main() -> None:
    """Act as `claude`: bind an inbox, start the server on our own stdin and stdout, log all texts to INBOX_LOG."""
    import signal
    import subprocess

    inbox = InboxStandIn(Path(os.environ["INBOX_PATH"]))
    env = {**os.environ, "CLAUDE_CODE_MESSAGING_SOCKET": str(inbox.path), "CLAUDE_CODE_MESSAGING_TOKEN": TOKEN}
    child = subprocess.Popen([sys.executable, "-m", "agentbus", "serve", "claude-mcp"], env=env)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: child.send_signal(number))
    log = Path(os.environ["INBOX_LOG"])
    written = 0
    while child.poll() is None:
        found = len(inbox.texts) + len(inbox.dropped)
        if found != written:
            beside = log.with_suffix(".new")
            beside.write_text(json.dumps({"texts": inbox.texts, "dropped": inbox.dropped}))
            beside.replace(log)
            written = found
        time.sleep(0.01)
    sys.exit(child.returncode)


if __name__ == "__main__":
    main()
