"""A stand-in for the inbox that Claude Code gives each session, as recorded with 2.1.331.

It takes connections on a unix stream socket. From each it takes an `auth` line with the right token, then `user` lines.
It never answers. It silently drops posts beyond 30 at once and one per 2 s after that, and a text that equals the last
one within 30 s. A line of more than 1,048,576 characters, or one that is not JSON, is dropped together with its
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
from datetime import UTC, datetime
from pathlib import Path

BURST = 30
REFILL_S = 2.0
WINDOW_S = 30.0
MAX_LINE_CHARS = 1_048_576
TOKEN = "s3cret-of-the-session"


class InboxStandIn:
    """Listens at `path` until closed. `texts` are those that the session got, `dropped` the others, with the reason."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic, reads: bool = True) -> None:
        self.path = path
        self.texts: list[str] = []
        self.dropped: list[tuple[str, str]] = []
        # A session takes posts of any process of its user, if its settings let them in.
        self.needs_token = True
        self.is_reading = threading.Event()
        if reads:
            self.is_reading.set()
        # Called with each text that the session got, before the next one is taken.
        self.on_text: Callable[[str], None] = lambda _text: None
        self._clock = clock
        self._left = float(BURST)
        self._filled_at = clock()
        self._last = ("", 0.0)
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
        is_known = not self.needs_token
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
        elif text == self._last[0] and now - self._last[1] < WINDOW_S:
            self.dropped.append(("same", text[:100]))
        else:
            self._left -= 1
            self._last = (text, now)
            self.texts.append(text)
            self.on_text(text)


def now() -> str:
    """The instant as the clients record it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Records:
    """The registry entry and the transcript of a session, as recorded with 2.1.332.

    RECORDS_DIE is `POINT N`: with the Nth post, the process kills itself there. RECORDS_BUSY: a tool is running, so a
    post is queued and comes as an attachment; `never` leaves it in the queue. RECORDS_CLEAR: after the first post the
    session has another id. RECORDS_NONE: there is an entry, and no transcript is written.
    """

    def __init__(self, folder: Path, inbox: Path) -> None:
        self._folder = folder
        self._inbox = inbox
        point, _, number = os.environ.get("RECORDS_DIE", "").partition(" ")
        self._die = (point, int(number or 0))
        self._busy = os.environ.get("RECORDS_BUSY", "")
        self._posts = 0
        self._enter(f"{os.getpid():08x}-0000-4000-8000-000000000000")

    def _enter(self, session_id: str) -> None:
        """Write the entry of this process, and begin the transcript with a first turn."""
        from agentbus.core.process import current

        here, cwd = current(), os.getcwd()
        entry = {
            "pid": here.pid,
            "procStart": here.started,
            "sessionId": session_id,
            "cwd": cwd,
            "version": "2.1.332",
            "messagingSocketPath": str(self._inbox),
            "status": "idle",
        }
        sessions = self._folder / "sessions"
        sessions.mkdir(parents=True, exist_ok=True)
        beside = sessions / f"{here.pid}.new"
        beside.write_text(json.dumps(entry))
        beside.replace(sessions / f"{here.pid}.json")
        self._path = self._folder / "projects" / cwd.replace("/", "-").replace(".", "-") / f"{session_id}.jsonl"
        if "RECORDS_NONE" not in os.environ:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"type": "user", "message": {"role": "user", "content": "hello"}, "isSidechain": False})

    def _write(self, row: dict[str, object], *, half: str = "") -> None:
        line = json.dumps(row) + "\n"
        with self._path.open("a") as file:
            file.write(line[: len(line) // 2])
            file.flush()
            self._at(half)
            file.write(line[len(line) // 2 :])

    def _at(self, point: str) -> None:
        if point and self._die == (point, self._posts):
            os.kill(os.getpid(), 9)

    def take(self, text: str) -> None:
        """Record a post that was taken, as the client does on its way to the model."""
        self._posts += 1
        self._at("read")
        if "RECORDS_NONE" in os.environ:
            return
        self._write({"type": "queue-operation", "operation": "enqueue", "content": text})
        self._at("enqueue")
        if self._busy == "never":
            return
        time.sleep(0.015)  # measured
        self._write({"type": "queue-operation", "operation": "remove" if self._busy else "dequeue"})
        self._at("dequeue")
        if self._busy:
            attachment = {"type": "queued_command", "prompt": text}
            self._write({"type": "attachment", "attachment": attachment, "timestamp": now()}, half="half")
        else:
            said = f"Another Claude session sent a message:\n{text}\n\nThis came from another session."
            message = {"role": "user", "content": said}
            row = {"type": "user", "message": message, "isSidechain": False, "timestamp": now()}
            self._write(row, half="half")
        self._at("given")
        if "RECORDS_CLEAR" in os.environ and self._posts == 1:
            self._enter(f"{os.getpid():08x}-0000-4000-8000-000000000001")


def main() -> None:
    """Act as `claude`: bind an inbox, start the server on our own stdin and stdout, log all texts to INBOX_LOG."""
    import signal
    import subprocess

    inbox = InboxStandIn(Path(os.environ["INBOX_PATH"]))
    env = {**os.environ, "CLAUDE_CODE_MESSAGING_SOCKET": str(inbox.path), "CLAUDE_CODE_MESSAGING_TOKEN": TOKEN}
    child = subprocess.Popen([sys.executable, "-m", "agentbus", "serve", "claude-mcp"], env=env)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: child.send_signal(number))
    if "CLAUDE_CONFIG_DIR" in os.environ:
        records = Records(Path(os.environ["CLAUDE_CONFIG_DIR"]), inbox.path)
        inbox.on_text = records.take
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
