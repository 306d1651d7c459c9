"""What leaves this home: the bus as the link sees it, and the delivery that puts its messages on the line.

The link is a session like others: woken, drained and kept alive by the same code. Its mailbox is all messages for other
machines, and its delivery is the line. Implements [LINK-1], [LINK-2], [LINK-4], [ADDR-4].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import anyio

from agentbus.core.bus import Bus, Claimed, retry_while_busy
from agentbus.core.errors import AgentbusError, BrokenSetup, DeliveryFailed, RelayDown
from agentbus.core.linkstore import LinkStore, Outgoing
from agentbus.core.model import Envelope, Peer
from agentbus.core.names import EVERYBODY_THERE, LINK_NAME
from agentbus.core.ports import Line, Parcel, Receipt, Settled
from agentbus.core.session import Session
from agentbus.link.wire import key_of, write_message

__all__ = ["Gate", "LinkBus", "LinkDelivery", "LinkSession", "Patience"]

_T = TypeVar("_T")

# Bodies that are on the way to the server at once. One that is longer goes alone.
_MOST_BYTES = 8 << 20
# How long a database that is broken is tried again, in seconds. Then the link ends, for a person to see.
_BROKEN_S = 30.0
_BROKEN_PAUSE_S = 1.0


class Patience:
    """Repeats what the database does not let happen now: a link that ends for a busy disk helps nobody."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    async def __call__(self, call: Callable[[], _T]) -> _T:
        """The result of `call()`, repeated until it succeeds. Raises BrokenSetup once that has lasted for 30 s."""
        give_up_at = anyio.current_time() + _BROKEN_S
        said = ""
        while True:
            try:
                return await retry_while_busy(call)
            except BrokenSetup as error:
                if anyio.current_time() > give_up_at:
                    raise
                problem = str(error)
            except AgentbusError as error:
                problem = str(error)
            if problem != said:
                self._say(problem)
            said = problem
            await anyio.sleep(_BROKEN_PAUSE_S)


class Gate:
    """The line on which messages may leave now, if there is one."""

    def __init__(self) -> None:
        self._line: Line | None = None
        self._opened = anyio.Event()
        # The highest number that the server gave to a message of ours. It falls when the server has lost some. [LINK-4]
        self.sequence = 0

    @property
    def line(self) -> Line | None:
        """The line; None while nothing may leave."""
        return self._line

    def open(self, line: Line) -> None:
        """Let messages leave on `line`."""
        self._line = line
        self._opened.set()

    def close(self) -> None:
        """Let no more messages leave."""
        self._line = None
        # One that is not set stays: somebody can wait for it, over several lines that were lost before they opened.
        if self._opened.is_set():
            self._opened = anyio.Event()

    async def wait(self) -> None:
        """Wait until messages may leave."""
        await self._opened.wait()


class LinkBus(Bus):
    """The bus of the link. What is pending for it is what has to leave; what it marks has left."""

    def __init__(self, store: LinkStore, *arguments: Any, machine: str, gate: Gate, **options: Any) -> None:
        super().__init__(store, *arguments, **options)
        self.links = store
        self.gate = gate
        self._machine = machine

    def claim(self, *arguments: Any, **options: Any) -> Claimed | None:
        """See Bus. In each database that it joins, the link says what this machine is called. [LINK-1]"""
        claimed = super().claim(*arguments, **options)
        if claimed is not None and claimed.peer.name == LINK_NAME:
            self.links.begin(self._machine)
        return claimed

    def due(self, _peer: Peer, limit: int, _above: int) -> list[Envelope] | None:
        """The oldest `limit` messages that have to leave."""
        return list(self.links.outbound(limit))

    def mark(self, _peer: Peer, ids: Iterable[int], _carrier: str) -> None:
        """Note that messages have left."""
        self.links.mark_relayed(ids, sequence=self.gate.sequence, now=self.clock())
        self._tell()

    def wake_all(self, peers: Iterable[Peer]) -> None:
        """Wake peers whose mail was taken in, and tell the watchers."""
        for peer in peers:
            self._wake(peer)
        self._tell()


class LinkSession(Session):
    """The session of the link. It ends when another process has its name."""

    async def follow_database(self) -> None:
        """Join the database that is there now, if it was replaced. Raises what `claim` raises. [LINK-5]"""
        async with self._turn:
            await self._reopen_if_replaced()

    def read_again(self) -> None:
        """Look for messages that can leave now, and could not before."""
        self._wake_itself()

    async def _tell_new_name(self, before: str, after: str) -> None:
        self._say(f"another process is the link of this home now ({before} became {after}), and this one ends")
        self._scope.cancel()


class LinkDelivery:
    """Puts messages on the line: all of a batch at once. They have left when the server has stored them."""

    carrier = "link"
    trouble = ""

    def __init__(self, gate: Gate, machine: str, say: Callable[[str], None]) -> None:
        self._gate = gate
        self._machine = machine
        self._say = say
        self._said = ""
        self._patiently = Patience(say)
        # Set by what opens the bus.
        self.store: LinkStore | None = None

    async def ready(self) -> None:
        """See Delivery: there is a line for the first time."""
        await self._gate.wait()

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """See Delivery."""
        line = self._gate.line
        if line is None:
            await self._gate.wait()
            # What was read before may be confirmed since, or have another name.
            raise DeliveryFailed("the line is new")
        parcels, too_long = self._parcels(batch, line.limit)
        if not parcels:
            await self._refuse(batch[0].id, too_long, line.limit)
            return Settled(1)
        try:
            stored = await line.publish(parcels)
        except RelayDown as error:
            raise DeliveryFailed(str(error)) from error
        await self._note(stored.sequence)
        if stored.trouble and stored.trouble != self._said:
            self._say(f"the server does not take everything ({stored.trouble}): mail waits here")
        self._said = stored.trouble
        if not stored.count:
            raise DeliveryFailed(stored.trouble)
        return Settled(stored.count)

    async def leave_again(self) -> None:
        """The server has lost what it had stored: what is not confirmed leaves again. [LINK-4]"""
        count = await self._patiently(lambda: self._links.relay_anew(None, 2**62))
        self._say(f"the server has lost what it had stored: {count:,} messages leave again")

    def _parcels(self, batch: Sequence[Envelope], limit: int) -> tuple[list[Parcel], int]:
        """The first of `batch` as parcels. None if not even the first fits; then also how many bytes it has."""
        parcels: list[Parcel] = []
        room = max(_MOST_BYTES, limit)
        for envelope in batch:
            assert isinstance(envelope, Outgoing)
            body = write_message(envelope, self._machine)
            room -= len(body)
            if len(body) > limit or room < 0:
                return parcels, len(body)
            name, _, machine = envelope.recipient.partition("@")
            kind, name = ("b", "") if name == EVERYBODY_THERE else ("m", name)
            parcels.append(Parcel(machine, kind, name, body, key=key_of(envelope)))
        return parcels, 0

    async def _refuse(self, row_id: int, size: int, limit: int) -> None:
        reason = (
            f"by the server: message is {size:,} bytes as it is sent, the limit is {limit:,}; put the bulk in a file "
            "and send its path"
        )
        self._say(f"#{row_id} is refused {reason}")
        await self._patiently(lambda: self._links.refuse(row_id, reason))

    @property
    def _links(self) -> LinkStore:
        assert self.store is not None, "the bus is open before anything is delivered"
        return self.store

    async def _note(self, sequence: int) -> None:
        if not sequence:
            return  # only copies, or nothing
        if sequence <= self._gate.sequence:
            await self.leave_again()
        self._gate.sequence = sequence
