"""The inbox delivery: what is pending goes into the socket that Claude Code gives each session, as one text.

For sessions that were started without the channel flag. Nothing is acknowledged there, and what is too much is dropped
without a word, so the rate is kept here, with a margin, over restarts too. Knows Claude Code's inbox, as recorded with
2.1.331, and nothing of MCP. Implements [INBOX-1] to [INBOX-7].
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import stat
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio

from agentbus.adapters.mcp.element import element
from agentbus.adapters.mcp.gate import ReadyGate
from agentbus.adapters.mcp.transport import unread_bytes, unread_ioctl
from agentbus.core.config import other_program, prepare_folder
from agentbus.core.errors import AgentbusError, DeliveryFailed
from agentbus.core.model import Envelope, timestamp
from agentbus.core.ports import Receipt
from agentbus.core.process import Process, look_up

__all__ = ["Address", "Inbox", "InboxDelivery", "PostBudget", "address", "compose"]

# One post: enough for a burst, and a fraction of what the inbox takes.
_MAX_TEXT_BYTES = 65_536
# The inbox drops the connection at a longer line: 1,048,576 characters, less what is around the text.
_MAX_LINE_CHARS = 1_000_000
# The inbox takes 30 at once and then one per 2 s, of all who post without a name of their own; so less than that.
_BURST = 20
_REFILL_S = 2.5
# A socket takes a post at once, unless the session hangs.
_PATIENCE_S = 5.0
# An inbox that fails for so long is said to fail: a session that is just starting, or a moment's stop, is none.
_TROUBLE_S = 5.0
# Where a socket has vanished, so many others beside it are asked whether they are our host's.
_MAX_SIBLINGS = 64
_UCRED = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid


@dataclass(frozen=True, slots=True)
class Address:
    """Where the inbox is. The token is a secret: it is not shown, not even by repr."""

    path: Path
    token: str = field(repr=False)


def address() -> Address | None:
    """What Claude Code has told us of its inbox; None where it has told nothing."""
    path, token = other_program("CLAUDE_CODE_MESSAGING_SOCKET"), other_program("CLAUDE_CODE_MESSAGING_TOKEN")
    return Address(Path(path), token) if path and token else None


class Inbox:
    """The inbox of the session whose host is `host`."""

    def __init__(self, at: Address, host: Process) -> None:
        self._at = at
        self._host = host
        self._path = at.path

    def connect(self) -> socket.socket:
        """A connection to the inbox of our host, and to nobody else's. [INBOX-5]

        Raises DeliveryFailed, saying why there is none.
        """
        try:
            return self._connect(self._path)
        except FileNotFoundError:
            pass
        # The session has bound another one: it is in the same place, and the same process listens on it.
        for sibling in self._siblings():
            with suppress(DeliveryFailed, FileNotFoundError):
                found = self._connect(sibling)
                self._path = sibling
                return found
        raise DeliveryFailed(f"{self._path} is gone, and no other inbox of the session is beside it")

    def _siblings(self) -> Iterator[Path]:
        with suppress(OSError):
            yield from sorted(self._at.path.parent.iterdir())[:_MAX_SIBLINGS]

    def _connect(self, path: Path) -> socket.socket:
        _check(path)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.connect(str(path))
            if sys.platform == "linux":
                pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
                if pid != self._host.pid or uid != os.geteuid():
                    raise DeliveryFailed(f"{path} belongs to process {pid}, not to the session's ({self._host.pid})")
        except OSError as error:
            connection.close()
            if error.errno == errno.ENOENT:
                raise FileNotFoundError(path) from error
            raise DeliveryFailed(f"{path} does not answer ({error.strerror})") from error
        except BaseException:
            connection.close()
            raise
        return connection

    def frame(self, text: str) -> bytes:
        """The two lines of a post."""
        lines = (
            {"type": "auth", "token": self._at.token},
            {"type": "user", "message": {"role": "user", "content": text}},
        )
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _check(path: Path) -> None:
    """Refuse what is no socket of ours in a folder of ours. Raises DeliveryFailed, and FileNotFoundError. [INBOX-5]"""
    try:
        facts, folder = os.lstat(path), os.lstat(path.parent)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DeliveryFailed(f"{path} cannot be looked at ({error.strerror})") from error
    if not stat.S_ISSOCK(facts.st_mode):
        raise DeliveryFailed(f"{path} is no socket")
    if facts.st_uid != os.geteuid() or folder.st_uid != os.geteuid():
        raise DeliveryFailed(f"{path} or its folder belongs to another user")
    if not stat.S_ISDIR(folder.st_mode) or folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise DeliveryFailed(f"{path.parent} can be written by other users, or is a symlink")


class PostBudget:
    """How many posts may go out now: `burst` at once, then one in `refill_s`, for all servers of a host, in a file.

    What cannot be read counts as empty: a post too late is late, one too many is lost. [INBOX-4]
    """

    def __init__(
        self,
        home: Path,
        host: Process,
        *,
        burst: float = _BURST,
        refill_s: float = _REFILL_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = home / "rate"
        self._path = self._folder / _file_name(host)
        self._burst = burst
        self._refill_s = refill_s
        self._clock = clock

    def take(self) -> bool:
        """Whether a post may go out; it counts as gone. Raises DeliveryFailed when the count cannot be kept."""
        try:
            prepare_folder(self._folder)
            self._forget_the_dead()
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except (OSError, AgentbusError) as error:
            raise DeliveryFailed(f"the rate of posts cannot be kept in {self._folder} ({error})") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            now = self._clock()
            left = self._left(os.pread(fd, 100, 0), now)
            may = left >= 1
            # Of one length, so that it is overwritten whole: a crash must not leave an empty count, which means a full
            # one. Written when it says no, too: by a clock that went back the count goes on from there.
            os.pwrite(fd, f"{left - may:12.6f} {now:20.6f}\n".encode(), 0)
            return may
        except OSError as error:
            raise DeliveryFailed(f"the rate of posts cannot be kept in {self._path} ({error.strerror})") from error
        finally:
            os.close(fd)

    def _left(self, said: bytes, now: float) -> float:
        if not said:
            return self._burst
        try:
            left, at = map(float, said.split())
        except ValueError:
            return 1.0 if self._clock() - self._path.stat().st_mtime >= self._refill_s else 0.0
        # A clock that went back gives nothing, and takes nothing.
        return min(self._burst, left + max(0.0, now - at) / self._refill_s)

    def _forget_the_dead(self) -> None:
        if self._path.exists():
            return
        for path in self._folder.iterdir():
            host = look_up(int(path.name.split("-")[0])) if path.name[:1].isdigit() else None
            if host is None or _file_name(host) != path.name:
                path.unlink(missing_ok=True)


def _file_name(host: Process) -> str:
    return f"{host.pid}-{re.sub(r'[^A-Za-z0-9]+', '_', host.started)}"


def compose(batch: Sequence[Envelope], mark: str) -> tuple[str, int]:
    """One text for the first envelopes of `batch`, and how many they are: up to 64 KiB, at least one. [INBOX-2]

    `mark` makes the text unlike any other: the inbox drops one that it has just had.
    """
    elements: list[str] = []
    size = 0
    for envelope in batch:
        shown = element(envelope)
        if len(json.dumps(shown, ensure_ascii=False)) > _MAX_LINE_CHARS:
            # It would be dropped whole. Pushed as this, it is what check_messages returns whole.
            note = f"a message of {len(envelope.text):,} characters, too long for here: call check_messages to read it"
            shown = element(replace(envelope, text=note))
        size += len(shown.encode()) + 1
        if elements and size > _MAX_TEXT_BYTES:
            break
        elements.append(shown)
    count = len(elements)
    messages = "a message" if count == 1 else f"{count} messages"
    head = (
        f"agentbus brings {messages} from other sessions, scripts or people on this machine, not from your user "
        f"(post {mark}). To answer, call the tool send_message with the name in `from`, and msg_id as reply_to."
    )
    return "\n".join([head, *elements]), count


class _Posted:
    """The receipt of a post: taken when the session has read all of it, where the system can tell. [INBOX-3]"""

    def __init__(self, connection: socket.socket, count: int) -> None:
        self.count = count
        self._connection: socket.socket | None = connection

    def taken(self) -> bool:
        if self._connection is None:
            return True
        fd = self._connection.fileno()
        ioctl = unread_ioctl(fd)
        with suppress(OSError):
            if ioctl is not None and unread_bytes(fd, ioctl):
                return False
        self._connection.close()
        self._connection = None
        return True


class InboxDelivery:
    """Posts what is pending into the session's inbox. `report` is told when that fails for long, and when it is over.

    `report` takes the reason, empty when all is well again. [INBOX-6]
    """

    carrier = "inbox"

    def __init__(
        self, inbox: Inbox, budget: PostBudget, gate: ReadyGate, report: Callable[[str], Awaitable[None]]
    ) -> None:
        self._inbox = inbox
        self._budget = budget
        self._gate = gate
        self._report = report
        self._posts = 0
        self._failing_since: float | None = None
        self.trouble = ""

    async def ready(self) -> None:
        """Wait until the session has the tools to answer with."""
        await self._gate.wait()

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """Post the first of `batch` as one text. Raises DeliveryFailed when nothing was posted, or may not be yet."""
        try:
            connection = self._inbox.connect()
        except DeliveryFailed as error:
            await self._fails(str(error))
            raise
        try:
            if not self._budget.take():
                raise DeliveryFailed("no post may go out just now, what is pending goes with the next one")
            self._posts += 1
            text, count = compose(batch, f"{timestamp(time.time_ns() // 1_000_000)}, {os.getpid()}/{self._posts}")
            await self._write(connection, self._inbox.frame(text))
        except BaseException:
            connection.close()
            raise
        self._failing_since = None
        if self.trouble:
            self.trouble = ""
            await self._report("")
        return _Posted(connection, count)

    async def _write(self, connection: socket.socket, frame: bytes) -> None:
        left = memoryview(frame)
        try:
            with anyio.fail_after(_PATIENCE_S):
                while left:
                    try:
                        left = left[connection.send(left) :]
                    except BlockingIOError:
                        await anyio.wait_writable(connection)
            connection.shutdown(socket.SHUT_WR)
        except (OSError, TimeoutError) as error:
            # Of a post that is cut off the session takes nothing: its line has no end.
            reason = f"the inbox takes nothing ({getattr(error, 'strerror', None) or 'no room within 5 s'})"
            await self._fails(reason)
            raise DeliveryFailed(reason) from error

    async def _fails(self, reason: str) -> None:
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if not self.trouble and now - self._failing_since >= _TROUBLE_S:
            self.trouble = reason
            await self._report(reason)
