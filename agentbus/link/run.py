"""The process of the link: connect, take in what waits, then carry both ways, until it is stopped.

A line that is lost is made again, after a pause. Nothing that the server does ends the process. It ends at a signal,
when another process is the link, or when the database stays broken. Implements [LINK-1], [LINK-6], [LINK-8].
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from typing import Any

import anyio
import anyio.lowlevel

from agentbus.core.bus import Bus
from agentbus.core.config import Settings
from agentbus.core.errors import AgentbusError, Refused, RelayDown, RelayRefused
from agentbus.core.linkstore import LinkStore
from agentbus.core.names import LINK_NAME
from agentbus.core.ports import Line, Relay
from agentbus.core.session import Session
from agentbus.link.carrier import Gate, LinkBus, LinkDelivery, LinkSession, Patience
from agentbus.link.inbound import Inbound
from agentbus.link.presence import RESEND_S, Presence
from agentbus.link.settings import LinkSettings

__all__ = ["RUNTIME", "run"]

RUNTIME = "link"
# Pauses between two attempts to connect, in seconds. They double, up to the second.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 3.0
# After a refusal: a person has to do something first.
_REFUSED_PAUSE_S = 5.0
# What waits is taken in before anything leaves, unless that takes longer.
_FIRST_S = 10.0
_TICK_S = 1.0
_LAST_S = 5.0
_FORGET_S = 3_600.0


async def run(
    settings: Settings,
    link: LinkSettings,
    relay: Relay,
    *,
    join: Callable[..., AbstractAsyncContextManager[Session]],
    say: Callable[[str], None],
    stopped: anyio.Event,
    resend_s: float = RESEND_S,
) -> None:
    """Be the link of `settings.home` until `stopped` is set. `join` makes a session, as `member.peer_session` does.

    Raises Refused if another process is the link, and what opening the bus raises.
    """
    gate = Gate()
    delivery = LinkDelivery(gate, link.machine, say)
    named = replace(settings, name=LINK_NAME, name_note="", name_was_asked=True)

    def make_bus(*arguments: Any, **options: Any) -> Bus:
        return LinkBus(*arguments, machine=link.machine, gate=gate, **options)

    try:
        async with join(
            named,
            delivery,
            runtime=RUNTIME,
            reason=f"for other machines, by {relay.place}",
            say=say,
            other_name=False,
            make_store=LinkStore,
            make_bus=make_bus,
            make_session=LinkSession,
        ) as session:
            assert isinstance(session, LinkSession)
            await _Link(session, link, relay, gate, delivery, say, resend_s).carry(stopped)
    except Refused as error:
        if LINK_NAME in str(error):
            raise Refused(f"this home has a link that runs: {error.args[0]}") from error
        raise


class _Link:
    def __init__(
        self,
        session: LinkSession,
        link: LinkSettings,
        relay: Relay,
        gate: Gate,
        delivery: LinkDelivery,
        say: Callable[[str], None],
        resend_s: float,
    ) -> None:
        assert isinstance(session.bus, LinkBus)
        self._session = session
        self._bus = session.bus
        self._relay = relay
        self._gate = gate
        self._say = say
        self._patiently = Patience(say)
        self._stopped = anyio.Event()
        self._delivery = delivery
        delivery.store = self._bus.links
        self._presence = Presence(self._bus, link, say=say, read_again=session.read_again, resend_s=resend_s)
        self._inbound = Inbound(self._bus, link, say=say, heard=self._presence.hear_of, read_again=session.read_again)
        self._generation = self._bus.store.generation

    async def carry(self, stopped: anyio.Event) -> None:
        """Carry until `stopped` is set. Raises what ends the link."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._connect_for_ever)
            tasks.start_soon(self._end_with_session)
            await stopped.wait()
            self._stopped.set()
            tasks.cancel_scope.cancel()
        # A database that stays busy must not keep a link that was told to end.
        with anyio.move_on_after(_LAST_S, shield=True):
            await self._patiently(lambda: self._bus.links.disconnected("the link is not running"))

    async def _end_with_session(self) -> None:
        await self._session.ended.wait()
        raise Refused("the session of the link has ended", hint="agentbus link run starts it again")

    async def _connect_for_ever(self) -> None:
        pause_s, said = _FIRST_PAUSE_S, ""
        while True:
            try:
                async with self._relay.connect() as line:
                    pause_s = _FIRST_PAUSE_S
                    await self._serve(line)
                    continue
            except* (RelayDown, RelayRefused) as group:
                errors = _leaves(group)
            if self._stopped.is_set():
                return  # we have ended the line ourselves
            problem = str(errors[0])
            is_refused = any(isinstance(error, RelayRefused) for error in errors)
            if problem != said:
                self._say(problem)
            said = problem
            await self._patiently(lambda text=problem: self._bus.links.disconnected(text))  # type: ignore[misc]
            wait_s = _REFUSED_PAUSE_S if is_refused else pause_s
            await anyio.sleep(wait_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _serve(self, line: Line) -> None:
        """Carry on one line until it is lost, or the database is another one. Raises RelayDown."""
        await self._meet(line)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._receive, line)
                tasks.start_soon(self._open_late, line)
                tasks.start_soon(self._inbound.report, line)
                tasks.start_soon(self._presence.listen, line)
                await self._tick(line)
                tasks.cancel_scope.cancel()
        finally:
            self._gate.close()
            if self._stopped.is_set():
                with anyio.move_on_after(1, shield=True), suppress(AgentbusError):
                    await self._presence.leave(line)

    async def _meet(self, line: Line) -> None:
        """Note what there is to know about a new line, and announce this machine on it."""
        links = self._bus.links
        facts = await self._patiently(links.machines.facts)
        self._gate.sequence = int(facts.get("sequence", 0))
        if line.sequence < self._gate.sequence:
            await self._delivery.leave_again()  # its disk was wiped, or put back
            self._gate.sequence = line.sequence
        noted = {"server": self._relay.place, "since": str(self._bus.clock()), "limit": str(line.limit)}
        await self._patiently(lambda: links.connected(noted))
        self._say(f"connected to {self._relay.place}")
        await self._presence.begin(line)

    async def _receive(self, line: Line) -> None:
        first = line.waiting
        while True:
            if first <= 0 and self._gate.line is None:
                self._gate.open(line)
                self._session.read_again()
            first -= await self._inbound.receive(line)

    async def _open_late(self, line: Line) -> None:
        """Let mail leave after 10 s in any case: what comes in may never end."""
        await anyio.sleep(_FIRST_S)
        self._gate.open(line)

    async def _tick(self, line: Line) -> None:
        """What is due once a second, until the database is another one."""
        forget_at = anyio.current_time()
        while True:
            await anyio.sleep(_TICK_S)
            if self._bus.store.is_replaced() or self._bus.store.generation != self._generation:
                try:
                    await self._session.follow_database()
                except AgentbusError as error:
                    self._say(f"the database that is there now cannot be joined yet: {error}")
                    continue
                self._generation = self._bus.store.generation
                self._presence.forget()
                return
            await self._presence.tick(line)
            if anyio.current_time() >= forget_at:
                forget_at += _FORGET_S
                while await self._patiently(lambda: self._bus.links.forget_imports(self._bus.clock())):
                    await anyio.lowlevel.checkpoint()


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    """The errors in a group, and in the groups in it."""
    found: list[BaseException] = []
    for one in group.exceptions:
        found += _leaves(one) if isinstance(one, BaseExceptionGroup) else [one]
    return found
