"""The values that travel: bodies, envelopes, peers. Names are in names.py.

Knows nothing about SQL, sockets or MCP. Implements [BODY-1], [BODY-2] and the terms of SPEC.md section 2.
"""

from __future__ import annotations

import time
from enum import Enum

from agentbus.core.errors import InvalidRequest
from agentbus.core.names import machine_of
from agentbus.core.process import Process
from agentbus.core.text import MAX_REASON_CHARS, age, one_line, word
from agentbus.core.values import dataclass

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = [
    "COLUMNS",
    "MAX_STATUS_CHARS",
    "Address",
    "Arrival",
    "Ended",
    "Envelope",
    "MessageState",
    "Pause",
    "Peer",
    "Renamed",
    "Status",
    "Unread",
    "check_body",
    "check_status",
    "storable",
    "timestamp",
]


# What a peer is doing is one line in a list. [STATUS-1]
MAX_STATUS_CHARS = 120


class MessageState(Enum):
    """Where a message is in its life. [STATE-1]"""

    PENDING = "pending"
    DELIVERED = "delivered"
    READ = "read"


# The columns of a message, in the order that `Envelope.from_row` and `Status.from_row` take. Every query that returns
# messages selects these.
COLUMNS = (
    *("id", "sender", "recipient", "body", "sent_at", "reply_to", "thread", "answer_by", "to_group"),
    *("delivered_at", "carrier", "read_at", "sender_session", "read_by", "returned_at"),
    *("relayed_at", "arrived_at", "refused"),
)


@dataclass(frozen=True, slots=True)
class Envelope:
    """One message as it travels. `id` grows with every send. Instants are in milliseconds since 1970 UTC.

    `thread` is the message that began its thread; None if it began one itself. [THREAD-1] `answer_by` is until when its
    sender waits for an answer; None if it does not. [ASK-1] `to_group` is the group that it was sent to; None if it was
    sent to `recipient` alone. [GROUP-3]
    """

    id: int
    sender: str
    recipient: str
    text: str
    sent_at: int
    reply_to: int | None = None
    thread: int | None = None
    answer_by: int | None = None
    to_group: str | None = None

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Envelope:
        """The envelope in a row of COLUMNS; further columns are ignored."""
        return Envelope(*row[:9])

    @property
    def root(self) -> int:
        """The message that began its thread: itself, if it answers nothing. [THREAD-1]"""
        return self.id if self.thread is None else self.thread


@dataclass(frozen=True, slots=True)
class Unread:
    """An envelope that is not known to be read. `was_pushed`: it was handed over to its recipient before.

    `was_earlier`: that was an earlier session of the recipient's name, which has ended.
    """

    envelope: Envelope
    was_pushed: bool
    # When a check handed it out before; None if none did. It is offered once more. [READ-6]
    shown_at: int | None = None
    was_earlier: bool = False


@dataclass(frozen=True, slots=True)
class Status(Envelope):
    """A message and its state. Instants are in milliseconds since 1970 UTC; None means that it has not happened."""

    delivered_at: int | None = None
    carrier: str | None = None
    read_at: int | None = None
    sender_session: str | None = None
    read_by: str | None = None
    # When it was last pending again, after a session took it and ended. [STATE-6]
    returned_at: int | None = None
    # Of a message for another machine: when it left, when it was committed there, by whom and why it was refused.
    relayed_at: int | None = None
    arrived_at: int | None = None
    refused: str | None = None

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Status:
        """The message in a row of COLUMNS."""
        return Status(*row[: len(COLUMNS)])

    @property
    def state(self) -> MessageState:
        """The state, worked out from the instants. [STATE-1]"""
        if self.read_at is not None:
            return MessageState.READ
        return MessageState.PENDING if self.delivered_at is None else MessageState.DELIVERED

    def answered(self, answer: Envelope | None) -> str:
        """What to say about the `answer` to this question; None if there is none."""
        return (
            f"not answered, asked until {timestamp(self.answer_by or 0)}"
            if answer is None
            else f"answered by #{answer.id}"
        )

    def __str__(self) -> str:
        group = f" (by {self.to_group})" if self.to_group is not None else ""
        who = f'#{self.id} from "{self.sender}" to "{self.recipient}"{group} is'
        if self.refused is not None:
            return f"{who} refused {one_line(self.refused, MAX_REASON_CHARS)}"
        line = f"{who} {self.state.value}: sent {timestamp(self.sent_at)}"
        if self.relayed_at is not None:
            line += f", on the way since {timestamp(self.relayed_at)}"
        if self.arrived_at is not None:
            line += f", arrived at {machine_of(self.recipient)} {timestamp(self.arrived_at)}"
        if self.delivered_at is not None:
            line += f", delivered {timestamp(self.delivered_at)} by {word(self.carrier)}"
        if self.read_at is not None:
            line += f", read {timestamp(self.read_at)}"
        elif self.state is MessageState.DELIVERED:
            line += "; whether it was read is not known"
        return line


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A session that has a name. `started_at` and `last_seen` are in milliseconds since 1970 UTC.

    `session` outlives a restart of `process` under the same `host`; `endpoint` is where `trigger` wakes it. `presence`
    is how it shows that it lives: by a "lock" or a "beat". The pids mean something in `domain` only. `status` is what
    it says that it is doing, empty if nothing, and `status_at` when it said so.
    """

    session: str
    name: str
    host: Process
    launch_name: str
    process: Process
    runtime: str
    cwd: str
    delivery: str
    trigger: str
    endpoint: str
    started_at: int
    last_seen: int
    delivery_reason: str = ""
    presence: str = "lock"
    domain: str = ""
    status: str = ""
    status_at: int | None = None

    def doing(self, now: int) -> str:
        """What it says that it is doing, and how long ago it said so, as it is shown to a person or a model; or "".

        [STATUS-2], [TRUST-5]
        """
        if not self.status or self.status_at is None:
            return ""
        return f"{one_line(self.status, 2 * MAX_STATUS_CHARS)} ({age(self.status_at, now)} ago)"

    @property
    def receives(self) -> str:
        """How it receives and why, as it is shown to a person or a model. [VOID-2], [TRUST-5]"""
        return f"{word(self.delivery)}: {one_line(self.delivery_reason, MAX_REASON_CHARS)}"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a name leads: the mailbox, its peer if one is present, and whether a peer ever had the name.

    For a mailbox on another machine, the peer is the link. `is_awaited`: a command waits for the message that was sent
    there, because it answers its question. [ASK-5]
    """

    mailbox: str
    peer: Peer | None
    is_known: bool
    is_awaited: bool = False
    pause: Pause | None = None

    @property
    def session(self) -> str:
        """The session of the peer that is there; empty if none is."""
        return "" if self.peer is None else self.peer.session

    @property
    def delivery(self) -> str:
        """How the peer that is there receives; empty if none is."""
        return "" if self.peer is None else self.peer.delivery


@dataclass(frozen=True, slots=True)
class Pause:
    """A session that a person has paused, by its name. Instants are in milliseconds since 1970 UTC. [BRAKE-2]

    `until` is when the pause ends by itself; None if a person has to end it.
    """

    name: str
    by: str
    since: int
    until: int | None

    def __str__(self) -> str:
        return f'paused by "{self.by}" until {"it is resumed" if self.until is None else timestamp(self.until)}'


@dataclass(frozen=True, slots=True)
class Renamed:
    """A session that has another name now. `kept`: so many messages wait under `name`, and are not for this session."""

    name: str
    was: str
    kept: int = 0

    @property
    def kept_note(self) -> str:
        """What to say about the mail that was left where it is; empty if there is none. [NAME-12]"""
        if not self.kept:
            return ""
        what = "1 message that waited" if self.kept == 1 else f"{self.kept:,} messages that waited"
        return (
            f'{what} under "{self.name}" before {"was" if self.kept == 1 else "were"} not for this session, and '
            f"{'stays' if self.kept == 1 else 'stay'} there (agentbus inbox {self.name} shows it to your user)"
        )


@dataclass(frozen=True, slots=True)
class Ended:
    """A session that has ended, and where its client recorded what its model was given: one place a line."""

    session: str
    runtime: str
    proof: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A session that wants to become a peer. The claim decides its `session` and `name`.

    `conversation` is what the client calls its conversation; empty if it does not say. `is_asked`: somebody asked for
    the name; if not, it is the name of `folder` (the working folder if that is empty).
    """

    host: Process
    launch_name: str
    process: Process
    runtime: str
    cwd: str
    delivery: str
    trigger: str
    delivery_reason: str = ""
    domain: str = ""
    conversation: str = ""
    is_asked: bool = True
    folder: str = ""

    def __post_init__(self) -> None:
        for field in ("runtime", "cwd", "delivery_reason", "folder"):
            object.__setattr__(self, field, storable(getattr(self, field)))


def storable(text: str) -> str:
    """`text` as the database takes it. What is not UTF-8, in a folder's name, say, is escaped: it is only shown."""
    return text.encode(errors="backslashreplace").decode()


def check_body(text: object, max_bytes: int) -> str:
    """`text` unchanged, if it can be a message. [BODY-1]

    Raises InvalidRequest unless it is 1 to `max_bytes` bytes of UTF-8 with no NUL and no lone surrogate.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"a message is text, not {type(text).__name__}")
    if not text:
        raise InvalidRequest("the message is empty", hint="say something")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the message has a lone surrogate at character {error.start + 1}", hint="send valid Unicode text"
        ) from None
    if size > max_bytes:
        raise InvalidRequest(
            f"message is {size:,} bytes, the limit is {max_bytes:,}",
            hint="put the bulk in a file and send its path",
        )
    nul = text.find("\0")
    if nul >= 0:
        raise InvalidRequest(
            f"the message has a NUL at character {nul + 1}",
            hint="put binary data in a file and send its path",
        )
    return text


def check_status(text: object) -> str:
    """`text` without spaces around it, if it can be a status. [STATUS-1]

    Raises InvalidRequest unless it is text of at most 120 characters, on one line, that the database takes.
    """
    if not isinstance(text, str):
        raise InvalidRequest(f"a status is text, not {type(text).__name__}")
    status = text.strip()
    if len(status) > MAX_STATUS_CHARS:
        raise InvalidRequest(
            f"the status has {len(status):,} characters, the limit is {MAX_STATUS_CHARS}",
            hint="say it in a few words; details belong in a message",
        )
    if "\0" in status or len(status.splitlines()) > 1 or storable(status) != status:
        raise InvalidRequest("the status is not one line of text", hint="leave out line breaks and NUL")
    return status


def timestamp(at_ms: int) -> str:
    """ISO 8601, UTC, to the millisecond, from milliseconds since 1970 UTC."""
    # Without datetime: importing it would cost `agentbus send` 2 ms.
    seconds, ms = divmod(at_ms, 1_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{ms:03d}Z"
