"""A Python program as a peer: join, send, iterate over the messages that arrive.

A program has the same mailbox, the same wakes and the same promises as an agent's session. Knows no MCP. Implements
[LIB-1] to [LIB-3].
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.lowlevel

from agentbus import registry
from agentbus.core import config, process
from agentbus.core.asking import CARRIER, DEFAULT_S, NoAnswer
from agentbus.core.bus import Bus, GroupSent, Sent, retry_while_busy
from agentbus.core.errors import AgentbusError, Refused
from agentbus.core.model import Arrival, Envelope, Peer
from agentbus.core.names import group_name, session_name
from agentbus.core.ports import Delivery, Receipt, Settled
from agentbus.core.session import Checkpoints, Session
from agentbus.core.store import Store
from agentbus.core.text import one_line

__all__ = ["Member", "join", "peer_session"]

RUNTIME = "python"
_REASON = "the program asks for each message"
# How long leaving waits for a busy database. A program that ends should not hang because of it.
_CLOSE_PATIENCE_S = 1.0
# How long sends in a row can hold the event loop before the program's own drain and heartbeat get a turn. A turn of the
# loop costs 20 us, a fifth of a send.
_LONGEST_TURN_S = 0.001
_log = logging.getLogger("agentbus")


class _HandOver:
    """The delivery of a program: one envelope at a time, when the program asks for it."""

    carrier = "python"
    trouble = ""

    def __init__(self) -> None:
        # No buffer: an envelope leaves the mailbox only when the program takes it.
        self._send, self.receive = anyio.create_memory_object_stream[Envelope](0)

    async def ready(self) -> None:
        """A program is ready when it has joined."""

    async def deliver(self, batch: Sequence[Envelope]) -> Receipt:
        """Wait until the program takes the first of `batch`."""
        await self._send.send(batch[0])
        return Settled(1)

    def close(self) -> None:
        """Close both ends."""
        self._send.close()
        self.receive.close()


class Member:
    """A program that has joined the bus. Iterate over it to get the messages that arrive, oldest first, each once.

    A message is delivered when `receive` (or the loop) has returned it. If the program dies at that moment, it gets the
    message again, with the same id, when it joins again under its name.
    """

    def __init__(self, session: Session, hand_over: _HandOver) -> None:
        self._session = session
        self._hand_over = hand_over
        self._yielded_at = 0.0

    @property
    def name(self) -> str:
        """The name under which others reach this program: the requested name, or `name-2` if that was in use."""
        return self._session.peer.name

    async def send(self, to: str, text: str, *, reply_to: int | None = None) -> Sent:
        """Send `text` to the peer or the offline mailbox `to`; `reply_to` is the id of the message it answers.

        When this returns, the message is committed and survives the death of any process.

        Raises InvalidRequest for a bad name, text or id, Refused when a person has paused this program, MailboxFull and
        TryAgain; then nothing was sent.
        """
        sent = await self._session.send(self._session.bus.address(to), text, reply_to=reply_to)
        assert isinstance(sent, Sent), "a name is no group"
        await self._yield_turn()
        return sent

    async def send_group(self, group: str, text: str, *, reply_to: int | None = None) -> GroupSent:
        """Send `text` to each other member of `group`, online or not. Members without room do not fail the others.

        Raises InvalidRequest for a bad name, text or id and for a group of nobody else, Refused when a person has
        paused this program, MailboxFull when no member has room, TryAgain; then nothing was sent.
        """
        sent = await self._session.send(group_name(group), text, reply_to=reply_to)
        assert isinstance(sent, GroupSent), "a group is no name"
        await self._yield_turn()
        return sent

    async def _yield_turn(self) -> None:
        if time.monotonic() - self._yielded_at > _LONGEST_TURN_S:
            await anyio.lowlevel.cancel_shielded_checkpoint()  # the message is sent: too late to cancel
            self._yielded_at = time.monotonic()

    async def join_group(self, group: str) -> list[str]:
        """Be a member of `group`, until `leave_group`, also while this program does not run; return all its members.

        Raises InvalidRequest for a bad name, Refused when the group is full, TryAgain.
        """
        _, members, _ = await retry_while_busy(lambda: self._session.bus.join_group(self.name, group))
        return members

    async def leave_group(self, group: str) -> None:
        """End the membership in `group`. Raises InvalidRequest, Refused when this is no member, TryAgain."""
        await retry_while_busy(lambda: self._session.bus.leave_group(self.name, group))

    async def ask(self, to: str, text: str, *, timeout_s: float = DEFAULT_S) -> Envelope:
        """Ask `to`, and return its answer, which is read then. Waits for `timeout_s` seconds at most, 0 to 86,400.

        It is safe to cancel this: the question stays sent, and the answer comes as every message does.

        Raises NoAnswer when none came in time, or the asked peer is offline, ends or is paused; and what `send` raises.
        """
        asked = await self._session.answer(await self._session.ask(to, text, timeout_s), timeout_s)
        if asked.answer is None:
            raise NoAnswer(asked)
        await self._session.checked([asked.answer.id], reached=True, carrier=CARRIER)
        return asked.answer

    async def broadcast(self, text: str, *, everywhere: bool = False) -> list[Sent]:
        """Send `text` to every other online peer: to all, or (with an error) to none. Raises as `send` does.

        With `everywhere` also to those on the other machines that are there.
        """
        return await self._session.broadcast(text, everywhere=everywhere)

    async def peers(self) -> list[Peer]:
        """The online peers, this program included."""
        return await self._session.peers()

    async def rename(self, name: str) -> str:
        """Take another name; return it in its one form. Pending messages come along. The old name leads here too.

        Mail that waits under the new name already is left there; the log says so.

        Raises InvalidRequest for a bad name and for one that no session can have, Refused when another peer has it,
        TryAgain.
        """
        return (await self._session.rename(name)).name

    async def set_status(self, text: str) -> None:
        """Say what this program is doing, in 0 to 120 characters on one line; others see it. Empty clears it.

        Raises InvalidRequest for another text, TryAgain.
        """
        await self._session.set_status(text)

    async def receive(self) -> Envelope:
        """Wait for the next message. It is safe to cancel this, for example for a timeout: no message is lost."""
        return await self._hand_over.receive.receive()

    def __aiter__(self) -> AsyncIterator[Envelope]:
        return self

    async def __anext__(self) -> Envelope:
        return await self.receive()


@asynccontextmanager
async def join(name: str | None = None, *, home: str | os.PathLike[str] | None = None) -> AsyncIterator[Member]:
    """Be on the bus as `name` (by default AGENTBUS_NAME, or the working folder's) until the block ends.

    `home` overrides AGENTBUS_HOME. The other AGENTBUS_* variables work as in a session. Joining blocks the event loop
    while the database is opened: a few milliseconds.

    Raises InvalidRequest for a bad name or setting, BrokenSetup when the home is not usable, TryAgain when it is busy.
    """
    settings = config.load(home=None if home is None else Path(home))
    if name is not None:
        settings = replace(settings, name=session_name(name), name_note="", name_was_asked=True)
    hand_over = _HandOver()
    try:
        async with peer_session(settings, hand_over, runtime=RUNTIME, reason=_REASON, say=_log.warning) as session:
            yield Member(session, hand_over)
    finally:
        hand_over.close()


@asynccontextmanager
async def peer_session(
    settings: config.Settings,
    delivery: Delivery,
    *,
    runtime: str,
    reason: str,
    say: Callable[[str], None],
    other_name: bool = True,
    make_store: Callable[..., Store] = Store,
    make_bus: Callable[..., Bus] = Bus,
    make_session: Callable[..., Session] = Session,
) -> AsyncIterator[Session]:
    """Be a peer whose mail goes into `delivery`, until the block ends. This process is its own host.

    `runtime` and `reason` are shown to others. If `other_name` is false, only the exact name in `settings` is accepted.
    The link has a session of its own kind.

    Raises what `join` raises. If `other_name` is false and the name is in use, raises Refused.
    """
    checkpoints = Checkpoints(settings.home / "bus.db")
    bus, triggers = registry.open_bus(settings, busy_ms=0, on_wal=checkpoints, make_store=make_store, make_bus=make_bus)
    try:
        preferred = triggers.preferred()
        here = process.current()
        arrival = Arrival(
            # The program is its own host. Started again, it is another host, and takes its name if that is free.
            host=here,
            launch_name=settings.name,
            process=here,
            runtime=runtime,
            cwd=settings.cwd,
            domain=process.domain(),
            delivery=delivery.carrier,
            delivery_reason=reason,
            trigger=preferred[0].name,
            is_asked=settings.name_was_asked or not other_name,
            folder=settings.folder,
        )
        session = make_session(
            bus,
            arrival,
            triggers=preferred,
            delivery=delivery,
            checkpoints=checkpoints,
            say=say,
            retention_hours=settings.retention_hours,
            member_days=settings.member_days,
            groups=settings.groups,
        )
        try:
            await session.claim()
            if settings.name_note:
                say(settings.name_note)
            holder = session.wished_holder
            if holder is not None and not other_name:
                there = f"{one_line(holder.cwd)} (process {holder.process.pid})"
                raise Refused(
                    f'the name "{holder.name}" is held by the session in {there}',
                    hint="choose another, agentbus peers shows those in use",
                )
            async with anyio.create_task_group() as tasks:
                await tasks.start(session.run)
                yield session
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # The task group is an inner detail: callers get the error that the block raised, not a group.
            if len(group.exceptions) == 1:
                raise group.exceptions[0] from None
            raise
        finally:
            await _close(session, say)
    finally:
        bus.store.close()
        triggers.close()


async def _close(session: Session, say: Callable[[str], None]) -> None:
    # Shielded: a block that is cancelled must leave the bus too.
    with anyio.CancelScope(shield=True):
        try:
            await retry_while_busy(session.close, patience_s=_CLOSE_PATIENCE_S)
        except AgentbusError as error:
            # What the block has done is done, so this is no failure of it. The messages that were not marked are
            # delivered again. The row is reaped when this process is gone.
            say(f"could not leave cleanly: {error}")
