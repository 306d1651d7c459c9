"""The inbox delivery: writes pending messages, as one text, into the socket that a client gives each session.

Such an inbox acknowledges nothing on that connection, and it drops posts that are too many. So this delivery limits its
own rate, with a margin, also over restarts. Knows neither the client, which says how a post is framed, nor MCP.
Implements [INBOX-1] to [INBOX-7].
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio

from agentbus.adapters.mcp import peer_socket
from agentbus.adapters.mcp.element import CHANNEL, Frames, element
from agentbus.adapters.mcp.gate import ReadyGate
from agentbus.adapters.mcp.transport import unread_bytes, unread_ioctl
from agentbus.core.config import prepare_folder
from agentbus.core.errors import AgentbusError, DeliveryFailed
from agentbus.core.model import Envelope
from agentbus.core.ports import Receipt
from agentbus.core.process import Process

__all__ = [
    "NOT_HERE",
    "Address",
    "Inbox",
    "InboxDelivery",
    "PostBudget",
    "Trouble",
    "compose",
    "file_name",
    "leftovers",
    "mark",
]

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


@dataclass(frozen=True, slots=True)
class Address:
    """Where the inbox is. The token is a secret: it is not shown, not even by repr."""

    path: Path
    token: str = field(repr=False)


class Inbox:
    """The inbox of the session whose agent process is `host`. `frame` makes the lines of a post from its text."""

    def __init__(self, at: Address, host: Process, frame: Callable[[str], bytes]) -> None:
        self._at = at
        self._host = host
        self._path = at.path
        self.frame = frame

    def connect(self) -> socket.socket:
        """Connect to the inbox of our agent process, and to no other. [INBOX-5]

        Raises DeliveryFailed, with the reason.
        """
        try:
            return peer_socket.connect(self._path, self._host)
        except FileNotFoundError:
            pass
        # The session has bound another socket. It is in the same folder, and the same process listens on it.
        for sibling in self._siblings():
            with suppress(DeliveryFailed, FileNotFoundError):
                found = peer_socket.connect(sibling, self._host)
                self._path = sibling
                return found
        raise DeliveryFailed(f"{self._path} is gone, and the session has no other inbox in that folder")

    async def settled(self, failing: Trouble) -> None:
        """Wait until the session has said that it took the last post: this inbox says nothing, so there is no wait.

        Raises DeliveryFailed when it says that it did not.
        """

    def _siblings(self) -> Iterator[Path]:
        with suppress(OSError):
            yield from sorted(self._at.path.parent.iterdir())[:_MAX_SIBLINGS]


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
        self._path = self._folder / file_name(host)
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


def file_name(host: Process) -> str:
    """What a file of ours about an agent process is called: its pid and its start."""
    return f"{host.pid}-{re.sub(r'[^A-Za-z0-9]+', '_', host.started)}"


def mark() -> str:
    """What makes a post unlike the one before, when the same messages go out again. [INBOX-2]

    The strictest client drops a text that equals the last one within 30 s (measured). Three digits of base 36 count the
    milliseconds of 46 s.
    """
    left, found = time.time_ns() // 1_000_000, ""
    for _ in range(3):
        left, digit = divmod(left, 36)
        found = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + found
    return found


def compose(
    batch: Sequence[Envelope],
    stamp: str,
    frames: Frames = CHANNEL,
    max_line_chars: int = _MAX_LINE_CHARS,
    max_bytes: int = _MAX_TEXT_BYTES,
    how: str = "",
) -> tuple[str, int]:
    """One text for the first envelopes of `batch`, and their number: at least one, up to `max_bytes`. [INBOX-2]

    `stamp` makes each text different, where the inbox drops a text that it has just received; it can be empty. A
    message of more than `max_line_chars` as JSON is only announced. `how` says how to answer, to a
    session that has no instructions of ours.
    """
    elements: list[str] = []
    size = 0
    for envelope in batch:
        shown = element(envelope, frames)
        if len(json.dumps(shown, ensure_ascii=False)) > max_line_chars:
            # The inbox would drop the whole message. This note is pushed instead; check_messages returns all of it.
            note = f"a message of {len(envelope.text):,} characters, {NOT_HERE}"
            shown = element(replace(envelope, text=note), frames)
        size += len(shown.encode()) + 1
        if elements and size > max_bytes:
            break
        elements.append(shown)
    # How to answer stands in the instructions, once.
    head = f"agentbus {stamp}, not your user" if stamp else "agentbus, not your user"
    head += f". {how}" if how else ":"
    return "\n".join([head, *elements]), len(elements)


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


class Trouble:
    """Whether posting has failed for long. Says so to `report`, and "" when it works again. [INBOX-6]"""

    def __init__(self, report: Callable[[str], Awaitable[None]]) -> None:
        self._report = report
        self._since: float | None = None
        self.said = ""

    async def failed(self, reason: str) -> None:
        """A try has failed."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        if not self.said and now - self._since >= _TROUBLE_S:
            self.said = reason
            await self._report(reason)

    async def ended(self) -> None:
        """A try has succeeded."""
        self._since = None
        if self.said:
            self.said = ""
            await self._report("")


class InboxDelivery:
    """Posts pending messages into the session's inbox.

    Calls `report` with the reason when posting has failed for long, and with an empty reason when it works again.
    [INBOX-6]
    """

    carrier = "inbox"

    def __init__(
        self,
        inbox: Inbox,
        budget: PostBudget,
        gate: ReadyGate,
        report: Callable[[str], Awaitable[None]],
        frames: Frames = CHANNEL,
    ) -> None:
        self._inbox = inbox
        self._budget = budget
        self._gate = gate
        self._frames = frames
        self._failing = Trouble(report)

    @property
    def trouble(self) -> str:
        """Why posting has failed for long; empty if it works."""
        return self._failing.said

    async def ready(self) -> None:
        """Wait until the session has the tools to answer with."""
        await self._gate.wait()

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """Post the first envelopes of `batch` as one text. Raises as `post` does."""
        text, count = compose(batch, mark(), self._frames)
        return _Posted(await self.post(text), count)

    async def post(self, text: str) -> socket.socket:
        """Post `text`. Returns the connection, which holds what the session has not read yet.

        Raises DeliveryFailed when nothing was posted, or when no post is allowed yet.
        """
        try:
            connection = self._inbox.connect()
        except DeliveryFailed as error:
            await self._failing.failed(str(error))
            raise
        try:
            if not self._budget.take():
                raise DeliveryFailed("no post is allowed yet, pending messages go with the next one")
            await self._write(connection, self._inbox.frame(text))
            await self._inbox.settled(self._failing)
        except BaseException:
            connection.close()
            raise
        await self._failing.ended()
        return connection

    async def _write(self, connection: socket.socket, frame: bytes) -> None:
        try:
            with anyio.fail_after(_PATIENCE_S):
                await peer_socket.write(connection, frame)
            connection.shutdown(socket.SHUT_WR)
        except (OSError, TimeoutError) as error:
            # The session takes nothing from a post that is cut off, because its line has no end.
            reason = f"the inbox accepts nothing ({getattr(error, 'strerror', None) or 'no room within 5 s'})"
            await self._failing.failed(reason)
            raise DeliveryFailed(reason) from error
