"""The three ports: how a peer is woken, how a message enters a live session, what carries it to another machine.

The docstrings here are the whole contract: an implementation is right when it keeps them. Every implementation,
including the fakes of the tests, runs through tests/triggers/test_contract.py or
tests/adapters/test_delivery_contract.py or tests/link/test_relay_contract.py. Knows no implementation. Implements
[WAKE-1] to [WAKE-7], [DELIV-1] to [DELIV-3], [RELAY-1] to [RELAY-4].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from enum import Enum

from agentbus.core.model import Envelope
from agentbus.core.values import dataclass

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import Protocol
else:
    Protocol = object

__all__ = [
    "Delivery",
    "Line",
    "ListeningTrigger",
    "Nudges",
    "Parcel",
    "Receipt",
    "Record",
    "Relay",
    "Settled",
    "Shown",
    "Stored",
    "Trigger",
    "Wake",
    "Wakes",
]


class Wake(Enum):
    """What became of one nudge."""

    WOKEN = "woken"  # the peer listens, and got the nudge
    FULL = "full"  # the peer listens, and enough nudges are waiting for it
    PENDING = "pending"  # the peer will look by itself, if it is alive
    ABSENT = "absent"  # nobody listens, and no listener has left a trace
    STALE = "stale"  # a listener died without clearing up


class Wakes(Protocol):
    """The wakes of one armed endpoint."""

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Return True once a nudge has arrived since the last True, or False after `timeout_s` seconds.

        Any number of nudges makes one return. Spurious returns are allowed. Earlier nudges are forgotten *before* the
        call returns. So a caller that reads the mailbox afterwards misses nothing: a nudge that comes later makes the
        next call return. Cancelling loses no nudge. Disarming makes the call return too, sooner or later.
        """

    def is_reachable(self) -> bool:
        """Whether senders still find this listener: False once the thing they look for has been removed."""

    def release(self) -> None:
        """Make the `wait` that is under way return, if there is one."""


class Trigger(Protocol):
    """How a peer is woken. A wake is a hint: it may be lost, repeated or spurious, and carries no data."""

    @property
    def name(self) -> str:
        """Its name in `AGENTBUS_TRIGGER` and in the `trigger` column."""

    @property
    def folder(self) -> str | None:
        """The folder in the home with the files that its listeners listen on; None if there are no such files."""

    def endpoint(self, session: str) -> str:
        """The address under which `session` will listen. The same session always has the same address."""

    def arm(self, endpoint: str) -> AbstractAsyncContextManager[Wakes]:
        """Listen on `endpoint` until the context ends, then leave no trace of it.

        A leftover of a dead process is replaced; arming beside a live listener raises.

        Raises BrokenSetup when it is not possible to listen there.
        """

    def notify(self, endpoint: str) -> Wake:
        """Nudge the listener on `endpoint`.

        Never blocks. Never raises for an absent, dead or overfull peer. Touches nothing that belongs to the peer.
        """

    def clear(self, endpoint: str) -> None:
        """Remove what a dead peer has left at `endpoint`. It is not an error if nothing is there."""

    def leftovers(self) -> Iterator[str]:
        """Every endpoint for which this trigger has something in `folder`: those of live and of dead listeners.

        `notify` tells the two apart. Things that somebody else has put there are not included.
        """

    def close(self) -> None:
        """Release what `notify` keeps open. Armed endpoints stay armed, and the trigger can be used again."""


class Nudges(Protocol):
    """The wakes of one armed endpoint, for a program without an event loop."""

    def fileno(self) -> int:
        """The descriptor that is readable once a nudge has arrived."""

    def empty(self) -> bool:
        """Forget the nudges that have arrived, and return whether there were any. Never blocks."""


class ListeningTrigger(Trigger, Protocol):
    """A trigger that can also wake a program without an event loop."""

    def listen(self, endpoint: str) -> AbstractContextManager[Nudges]:
        """Listen on `endpoint` as `arm` does, and raise what it raises."""


class Receipt(Protocol):
    """What a delivery says about the envelopes that it handed over in one call."""

    @property
    def count(self) -> int:
        """How many of the batch were handed over: the first `count`, at least 1."""

    def taken(self) -> bool:
        """Whether the far end has taken all of them. Never blocks; once true, it stays true.

        A delivery that cannot know returns True.
        """


@dataclass(frozen=True, slots=True)
class Settled:
    """The receipt of a delivery whose envelopes count as taken once they are handed over."""

    count: int

    def taken(self) -> bool:
        """True: there is nothing to wait for."""
        return True


class Delivery(Protocol):
    """How a message enters a live session. One pump uses it, from one task."""

    @property
    def carrier(self) -> str:
        """Its name in the `carrier` column."""

    @property
    def trouble(self) -> str:
        """Why nothing can be handed over just now, in a sentence without a full stop; empty when delivery works."""

    async def ready(self) -> None:
        """Return once the far end can take messages. Nothing is handed over before that."""

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """Hand over the first envelopes of `batch` (never empty), in order.

        Can wait as long as the far end takes nothing. If the call is cancelled, the envelope in progress may have been
        handed over already: the next process delivers it again under the same id.

        Raises DeliveryFailed when nothing was handed over but a later try can succeed, DeliveryWaited when it can
        succeed at once, with what is pending by now, and DeliveryClosed when the far end is gone for good.
        """


# What a record shows as given to a model: the id of a message, and when, in ms since 1970 UTC. It proves the message of
# that id that was sent no later: an earlier line with the same id is about a message of another bus. [PROOF-2]
Shown = tuple[int, int]


class Record(Protocol):
    """What a client itself records of what the model of one session was given. It is private to the client.

    A *place* is one line of text that says where a record is. It means something to its adapter alone, also to a later
    process of it. No method raises, and none writes.
    """

    def place(self) -> str:
        """Where the record of the session is now; it can change while the session lives. "" if there is none."""

    def end(self, place: str) -> int:
        """The offset behind all that is recorded at `place` now; 0 if nothing is."""

    def look(self, place: str, offset: int) -> tuple[set[Shown], int]:
        """The messages that `place` shows as given to the model from `offset` on, and the offset to go on from.

        Returns the same `offset` when there is nothing new. A long record is returned in several pieces.
        """


@dataclass(frozen=True, slots=True)
class Parcel:
    """What goes from one machine to another. Its body means nothing to a relay.

    `machine` is the one that it goes to; of one that has come, the one that sent it, which the relay has proven. `kind`
    and `name` are for the receiver; an empty `kind`: it could not be read. Of two with one `key`, sent within minutes,
    the second may be left out. `mark` is the relay's own, on one that has come.
    """

    machine: str
    kind: str
    name: str
    body: bytes
    key: str = ""
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Stored:
    """How many of the first parcels are stored, and the highest number that one got; `trouble`: why not all are."""

    count: int
    sequence: int = 0
    trouble: str = ""


class Line(Protocol):
    """One connection of this machine to what carries parcels. Every method raises RelayDown once it is lost."""

    @property
    def limit(self) -> int:
        """The longest body, in bytes."""

    @property
    def sequence(self) -> int:
        """The highest number that was given to a parcel of anybody when this line was made. It never falls, unless what
        was stored is lost."""

    @property
    def waiting(self) -> int:
        """How many parcels for this machine are stored and not acknowledged, as far as is known."""

    async def publish(self, parcels: Sequence[Parcel]) -> Stored:
        """Store parcels for other machines, in order. What is stored outlives this process. [RELAY-1]

        Of parcels that are not reported as stored, any can be stored all the same. If nothing fails, all are.
        """

    async def take(self) -> list[Parcel]:
        """Wait for parcels for this machine; return some of them, oldest first, each once on this line. [RELAY-2]

        A new line begins with the oldest that was not acknowledged.
        """

    async def ack(self, parcels: Sequence[Parcel]) -> None:
        """Let parcels that were taken be forgotten. If that is lost, they come again, on a later line. [RELAY-2]"""

    async def announce(self, body: bytes) -> None:
        """Tell `body` to all machines that have a line now. Nothing is stored. [RELAY-3]"""

    async def ask(self) -> None:
        """Ask all machines that have a line now to announce themselves."""

    async def hear(self) -> tuple[str, bytes]:
        """Wait for what a machine announces, proven to be that machine; or for a question, with an empty name."""


class Relay(Protocol):
    """What carries parcels between machines. A hint of nothing: a parcel that is stored can still be lost. [RELAY-4]"""

    @property
    def place(self) -> str:
        """Where it is, for people."""

    def connect(self) -> AbstractAsyncContextManager[Line]:
        """Be this machine, until the context ends. Two lines of one machine are never used at once by one home.

        Raises RelayDown if a later try can succeed without anybody doing anything, and RelayRefused if not.
        """
