"""The two ports: how a peer is woken, and how a message enters a live session.

The docstrings here are the whole contract: an implementation is right when it keeps them, and every
implementation, the fakes of the tests included, runs through tests/triggers/test_contract.py or
tests/adapters/test_delivery_contract.py. Knows no implementation. Implements [WAKE-1] to [WAKE-7], [DELIV-1] to
[DELIV-3].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import Enum

from agentbus.core.model import Envelope

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import Protocol
else:
    Protocol = object

__all__ = ["Delivery", "Receipt", "Settled", "Trigger", "Wake", "Wakes"]


class Wake(Enum):
    """What became of one nudge."""

    WOKEN = "woken"  # the peer listens, and has been told
    FULL = "full"  # the peer listens, and has nudges enough waiting
    PENDING = "pending"  # the peer will look by itself, if it lives
    ABSENT = "absent"  # nobody listens, nor has left a trace
    STALE = "stale"  # somebody listened and died without clearing up


class Wakes(Protocol):
    """The wakes of one armed endpoint."""

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Return True once at least one nudge has arrived since that was last returned, or False after `timeout_s`.

        Any number of nudges makes one return. Spurious returns are allowed. Whatever was nudged before the
        return is forgotten *before* it, so who reads the mailbox afterwards misses nothing: a nudge that
        comes later makes the next call return. Cancelling loses no nudge. Disarming makes it return too, sooner or
        later.
        """

    def is_reachable(self) -> bool:
        """Whether senders still find this listener: False once what they look for was removed under it."""


class Trigger(Protocol):
    """How a peer is woken. A wake is a hint: it may be lost, repeated or spurious, and carries no data."""

    @property
    def name(self) -> str:
        """What `AGENTBUS_TRIGGER` and the `trigger` column call it."""

    @property
    def folder(self) -> str | None:
        """The folder in the home that holds what its listeners listen on; None where there is nothing to hold."""

    def endpoint(self, session: str) -> str:
        """The address under which `session` will listen. The same session always has the same one."""

    def arm(self, endpoint: str) -> AbstractAsyncContextManager[Wakes]:
        """Listen on `endpoint` until the context ends, then leave no trace of it.

        A leftover of a dead process is replaced; arming beside a live listener raises.

        Raises BrokenSetup when this place cannot be listened on.
        """

    def notify(self, endpoint: str) -> Wake:
        """Nudge whoever listens on `endpoint`.

        Never blocks, never raises for an absent, dead or overfull peer, and touches nothing of the peer's.
        """

    def clear(self, endpoint: str) -> None:
        """Remove what a dead peer has left at `endpoint`. Nothing there is no error."""

    def leftovers(self) -> Iterator[str]:
        """Every endpoint that has something of this trigger's in `folder`: of live listeners and of dead ones.

        `notify` tells the two apart. What somebody else has put there is not among them.
        """

    def close(self) -> None:
        """Give back what `notify` keeps open. What is armed stays armed, and the trigger can be used again."""


class Receipt(Protocol):
    """What a delivery says of the envelopes that it handed over in one call."""

    @property
    def count(self) -> int:
        """How many of the batch were handed over: the first `count`, at least 1."""

    def taken(self) -> bool:
        """Whether the far end has taken all of them. Never blocks; once true, it stays true.

        A delivery that cannot know says true.
        """


@dataclass(frozen=True, slots=True)
class Settled:
    """The receipt of a delivery for which handed over is taken."""

    count: int

    def taken(self) -> bool:
        """True: there is nothing to wait for."""
        return True


class Delivery(Protocol):
    """How a message enters a live session. One pump uses it, from one task."""

    @property
    def carrier(self) -> str:
        """What the `carrier` column calls it."""

    @property
    def trouble(self) -> str:
        """Why nothing can be handed over just now, in a sentence without a full stop; empty when it can."""

    async def ready(self) -> None:
        """Return once the far end can take messages; nothing is handed over before."""

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """Hand over the first envelopes of `batch` (never empty), in order.

        May wait as long as the far end does not take anything. A cancelled call may have handed over what
        it was at: the next process delivers that again under the same id.

        Raises DeliveryFailed when nothing was handed over but may be later, and DeliveryClosed when the far
        end is gone for good.
        """
