"""The inbox delivery: writes pending messages, as one text, into the socket that Claude Code gives each session.

For sessions that were started without the channel flag. The inbox acknowledges nothing, and it silently drops posts
that are too many. So this delivery limits its own rate, with a margin, also over restarts. Knows Claude Code's inbox,
as recorded with 2.1.331, but not MCP. Implements [INBOX-1] to [INBOX-7].
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

from agentbus.adapters.claude_mcp.frames import FRAMES
from agentbus.adapters.mcp.element import element
from agentbus.adapters.mcp.gate import ReadyGate
from agentbus.adapters.mcp.transport import unread_bytes, unread_ioctl
from agentbus.core.config import other_program, prepare_folder
from agentbus.core.errors import AgentbusError, DeliveryFailed
from agentbus.core.model import Envelope, timestamp
from agentbus.core.ports import Receipt
from agentbus.core.process import Process

__all__ = ["NOT_HERE", "Address", "Inbox", "InboxDelivery", "PostBudget", "address", "compose", "leftovers"]

# The size of one post: enough for a burst, and only a fraction of what the inbox takes.
_MAX_TEXT_BYTES = 65_536
# The inbox drops the connection if a line is longer: 1,048,576 characters, minus the JSON around the text.
_MAX_LINE_CHARS = 1_000_000
# The end of the note that goes out in the place of such a message. A session that was given the note has not read it.
NOT_HERE = "too long for here: call check_messages to read it"
# The inbox takes 30 posts at once and then one per 2 s, counted over all senders that post without a name of their own.
# So this delivery sends fewer.
_BURST = 20
_REFILL_S = 2.5
# A socket takes a post at once, unless the session hangs.
_PATIENCE_S = 5.0
# An inbox that fails for this long is reported. A session that is just starting, or a short stop, is not a failure.
_TROUBLE_S = 5.0
# If the socket has vanished, up to this many others beside it are tried: one of them can belong to our agent process.
_MAX_SIBLINGS = 64
# A count that was not changed for this long is removed. It is full after 50 s already.
_FORGET_S = 3_600.0
# What a count is called: a pid and a start time, as a number or as `ps` says it. And how long it is: see `_record`.
_COUNT = re.compile(r"[0-9]{1,10}-([0-9]*|[A-Z][a-z]{2}_[A-Z][a-z]{2}_[0-9]{1,2}_[0-9]{2}_[0-9]{2}_[0-9]{2}_[0-9]{4})")
_UCRED = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid


@dataclass(frozen=True, slots=True)
class Address:
    """Where the inbox is. The token is a secret: it is not shown, not even by repr."""

    path: Path
    token: str = field(repr=False)


def address() -> Address | None:
    """Where Claude Code says that its inbox is; None if it says nothing."""
    path, token = other_program("CLAUDE_CODE_MESSAGING_SOCKET"), other_program("CLAUDE_CODE_MESSAGING_TOKEN")
    return Address(Path(path), token) if path and token else None


class Inbox:
    """The inbox of the session whose agent process is `host`."""

    def __init__(self, at: Address, host: Process) -> None:
        self._at = at
        self._host = host
        self._path = at.path

    def connect(self) -> socket.socket:
        """Connect to the inbox of our agent process, and to no other. [INBOX-5]

        Raises DeliveryFailed, with the reason.
        """
        try:
            return self._connect(self._path)
        except FileNotFoundError:
            pass
        # The session has bound another socket. It is in the same folder, and the same process listens on it.
        for sibling in self._siblings():
            with suppress(DeliveryFailed, FileNotFoundError):
                found = self._connect(sibling)
                self._path = sibling
                return found
        raise DeliveryFailed(f"{self._path} is gone, and the session has no other inbox in that folder")

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
                    raise DeliveryFailed(
                        f"{path} belongs to process {pid}, not to the session's process {self._host.pid}"
                    )
        except OSError as error:
            connection.close()
            if error.errno == errno.ENOENT:
                raise FileNotFoundError(path) from error
            raise DeliveryFailed(f"{path} does not answer ({error.strerror})") from error
        except BaseException:
            connection.close()
            raise
        return connection

    def listener(self) -> int | None:
        """The process that listens on the inbox, if it is ours and the system tells; else None."""
        if sys.platform != "linux":
            return None
        with suppress(OSError, DeliveryFailed), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            _check(self._path)
            asking.setblocking(False)
            asking.connect(str(self._path))
            pid, uid, _ = _UCRED.unpack(asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            return pid if uid == os.geteuid() else None
        return None

    def frame(self, text: str) -> bytes:
        """The two lines of a post."""
        lines = (
            {"type": "auth", "token": self._at.token},
            {"type": "user", "message": {"role": "user", "content": text}},
        )
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _check(path: Path) -> None:
    """Refuse a path that is not our own socket in our own folder. [INBOX-5]

    Raises DeliveryFailed, and FileNotFoundError.
    """
    try:
        facts, folder = os.lstat(path), os.lstat(path.parent)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DeliveryFailed(f"{path} cannot be accessed ({error.strerror})") from error
    if not stat.S_ISSOCK(facts.st_mode):
        raise DeliveryFailed(f"{path} is not a socket")
    if facts.st_uid != os.geteuid() or folder.st_uid != os.geteuid():
        raise DeliveryFailed(f"{path} or its folder belongs to another user")
    if not stat.S_ISDIR(folder.st_mode) or folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise DeliveryFailed(f"{path.parent} can be written by other users, or is a symlink")


class PostBudget:
    """How many posts can go out now: `burst` at once, then one per `refill_s` seconds.

    All servers of one agent process share the count, in a file. If the file cannot be read, no posts are left: a post
    that goes out too late is only late, but one post too many is lost. [INBOX-4]
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
        """Whether a post can go out now. If so, it is counted. Raises DeliveryFailed when the count cannot be kept."""
        try:
            prepare_folder(self._folder)
            self._forget_the_full()
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except (OSError, AgentbusError) as error:
            raise DeliveryFailed(f"the count of posts cannot be saved in {self._folder} ({error})") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            now = self._clock()
            left = self._left(os.pread(fd, 100, 0), now)
            may = left >= 1
            # A fixed-width record, so one pwrite replaces all of it: a crash must never leave an empty file, because
            # empty means a full bucket. Also written if no post can go out: if the clock went back, the count
            # continues from the new time.
            os.pwrite(fd, _record(left - may, now), 0)
            return may
        except OSError as error:
            raise DeliveryFailed(f"the count of posts cannot be saved in {self._path} ({error.strerror})") from error
        finally:
            os.close(fd)

    def _left(self, said: bytes, now: float) -> float:
        if not said:
            return self._burst
        try:
            left, at = map(float, said.split())
        except ValueError:
            return 1.0 if self._clock() - self._path.stat().st_mtime >= self._refill_s else 0.0
        # If the clock went back, no posts are added and none are taken away.
        return min(self._burst, left + max(0.0, now - at) / self._refill_s)

    def _forget_the_full(self) -> None:
        """Remove counts that nobody has changed for so long that they are full: as good as none."""
        # Not by whether a process lives: in another pid namespace, or short of descriptors, nobody can tell.
        if self._path.exists():
            return
        for name in leftovers(self._folder):
            path = self._folder / name
            with suppress(OSError):  # removed by somebody else just now
                if time.time() - path.stat().st_mtime > _FORGET_S:
                    path.unlink()


def _record(left: float, now: float) -> bytes:
    return f"{left:12.6f} {now:20.6f}\n".encode()


def leftovers(folder: Path) -> list[str]:
    """The names of the counts in `folder`. Everything else there is somebody else's."""
    try:
        with os.scandir(folder) as entries:
            return [one.name for one in entries if _COUNT.fullmatch(one.name) and _is_count(one)]
    except OSError:
        return []  # no folder, or it cannot be read: nothing there can be told


def _is_count(entry: os.DirEntry[str]) -> bool:
    try:
        # Empty: its server was killed before it wrote.
        return entry.is_file(follow_symlinks=False) and entry.stat().st_size in (0, len(_record(0, 0)))
    except OSError:
        return False  # removed just now


def _file_name(host: Process) -> str:
    return f"{host.pid}-{re.sub(r'[^A-Za-z0-9]+', '_', host.started)}"


def compose(batch: Sequence[Envelope], mark: str) -> tuple[str, int]:
    """One text for the first envelopes of `batch`, and their number: up to 64 KiB, at least one envelope. [INBOX-2]

    `mark` makes each text different: the inbox drops a text that it has just received.
    """
    elements: list[str] = []
    size = 0
    for envelope in batch:
        shown = element(envelope, FRAMES)
        if len(json.dumps(shown, ensure_ascii=False)) > _MAX_LINE_CHARS:
            # The inbox would drop the whole message. This note is pushed instead; check_messages returns all of it.
            note = f"a message of {len(envelope.text):,} characters, {NOT_HERE}"
            shown = element(replace(envelope, text=note), FRAMES)
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
    """The receipt of a post. It is taken when the session has read all of it, if the system can tell. [INBOX-3]"""

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
    """Posts pending messages into the session's inbox.

    Calls `report` with the reason when posting has failed for long, and with an empty reason when it works again.
    [INBOX-6]
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
        """Post the first envelopes of `batch` as one text.

        Raises DeliveryFailed when nothing was posted, or when no post is allowed yet.
        """
        try:
            connection = self._inbox.connect()
        except DeliveryFailed as error:
            await self._fails(str(error))
            raise
        try:
            if not self._budget.take():
                raise DeliveryFailed("no post is allowed yet, pending messages go with the next one")
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
            # The session takes nothing from a post that is cut off, because its line has no end.
            reason = f"the inbox accepts nothing ({getattr(error, 'strerror', None) or 'no room within 5 s'})"
            await self._fails(reason)
            raise DeliveryFailed(reason) from error

    async def _fails(self, reason: str) -> None:
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        if not self.trouble and now - self._failing_since >= _TROUBLE_S:
            self.trouble = reason
            await self._report(reason)
