"""The life of one MCP server of agentbus: mailbox, name and socket first, then MCP, then a quick end.

Implements [LIFE-1] to [LIFE-4], [VOID-1] to [VOID-3], [TWIN-1].
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, NoReturn, Protocol

import anyio
import anyio.abc
import anyio.to_thread

from agentbus.adapters.mcp import jsonrpc
from agentbus.adapters.mcp.fast_path import FastPath
from agentbus.adapters.mcp.gate import ReadyGate
from agentbus.adapters.mcp.hold import HeldDelivery
from agentbus.adapters.mcp.hosts import Choice, Link, Mode, Newcomer
from agentbus.adapters.mcp.profile import Profile
from agentbus.adapters.mcp.rate_limit import HourlyLimit, RateLimit
from agentbus.adapters.mcp.toolkit import ToolContext
from agentbus.adapters.mcp.transport import Stdio
from agentbus.core import eventloop, process
from agentbus.core.adapter import Manifest
from agentbus.core.bus import PULL, Bus
from agentbus.core.config import Settings
from agentbus.core.errors import AgentbusError, TryAgain
from agentbus.core.model import Arrival, Peer
from agentbus.core.ports import Trigger
from agentbus.core.process import Process
from agentbus.core.session import Checkpoints, Session
from agentbus.core.shadows import explain, unexpected
from agentbus.core.stderr import say
from agentbus.core.text import one_line

__all__ = ["serve"]

# Our part of the 100 ms between a client's SIGINT and its SIGTERM; the rest is for the system. [LIFE-1]
_STOP_S = 0.05
_CLOSE_PATIENCE_S = 0.03
# How often a server that stands aside looks whether the other one has ended. A look is one read, without a write.
_ASIDE_LOOK_S = 1.0
# How long the fast path and the pump wait for their turn while a thread imports the SDK. With the interpreter's own
# value of 5 ms and its garbage collector on, the event loop stood still for up to 20-40 ms at a time. With this value
# and no collector, it stood still for 4 ms. The import did not take longer.
_IMPORT_SWITCH_S = 0.001
# Of the method that the SDK is imported for, stderr shows this much.
_MAX_TOLD_CHARS = 64


class Triggers(Protocol):
    """The triggers of the bus, as registry opens them."""

    usual: str

    def preferred(self) -> list[Trigger]:
        """The triggers that a session tries, in order."""


def serve(
    manifest: Manifest,
    settings: Settings,
    open_bus: Callable[..., tuple[Bus, Triggers]],
    *,
    profile: Profile,
    choose: Callable[[str], Choice],
    conversation: Callable[[Process], str] = lambda _host: "",
    is_main_agent: Callable[[Process, Mapping[str, Any]], Awaitable[bool | None]] | None = None,
    newcomer: Newcomer | None = None,
) -> NoReturn:
    """Be a peer for the client on stdin and stdout until it is gone, then end the process. Does not return.

    `choose` comes from the adapter: it gets AGENTBUS_DELIVERY and says how this session receives. `conversation` says
    what the client calls the conversation of this agent process just now; "" if that is not known. [NAME-8]
    `is_main_agent` says whether its main agent made the call with this `_meta`; None if that cannot be told. [READ-7]
    With a `newcomer`, what `choose` returns holds until that has arrived. [LATE-1]

    Raises AgentbusError, before anything is served, if the home, the database or the settings cannot be used.
    """
    context = ToolContext(
        runtime=manifest.id,
        server_name=manifest.server_name,
        profile=profile,
        choice=choose(manifest.word("AGENTBUS_DELIVERY")),
        name_note=settings.name_note,
        rate_limit=RateLimit(manifest.number("AGENTBUS_BURST")),
        hourly_limit=HourlyLimit(manifest.number("AGENTBUS_HOURLY")),
    )
    if is_main_agent is not None:
        context = replace(context, is_main_agent=partial(is_main_agent, context.choice.host))
    if context.choice.mode is Mode.HEALTH_CHECK:
        # The client only asks whether the server starts: no home, no database, no name, no socket. [VOID-3]
        stdio = Stdio.claim(jsonrpc.refusal)
        _run(stdio, _serve_nobody, context, stdio)
    if newcomer is not None:
        context.arrival = newcomer
        stdio = Stdio.claim(jsonrpc.refusal)
        _run(stdio, _serve_late, context, settings, open_bus, stdio, newcomer)
    opened = _Opened(settings, open_bus)
    context.usual_trigger = opened.usual
    stdio = Stdio.claim(jsonrpc.refusal)
    _run(stdio, _serve, context, opened, stdio, conversation)


def _run(stdio: Stdio, main: Callable[..., Awaitable[int]], *arguments: Any) -> NoReturn:
    """Run `main` in an event loop, then end the process."""
    code = 1
    try:
        code = eventloop.run(main, *arguments)
    except KeyboardInterrupt:
        code = 0  # a SIGINT came before the loop could take it: a later claim reaps everything that is left
    except Exception as error:  # noqa: BLE001 - the last line of defence: one sentence, never a traceback
        code = _report(error)
    stdio.restore()
    # With the SDK loaded, the interpreter needs 0.25 s to shut down, and SIGTERM would come first. [LIFE-1]
    os._exit(code)


def _report(error: BaseException) -> int:
    """Report in one line what went wrong. Returns the exit code for it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, AgentbusError):
        say(str(error))
        return error.exit_code
    say(unexpected(error))
    return 1


class _Opened:
    """The bus of `settings`, and what keeps its file small. Raises what `open_bus` raises."""

    def __init__(self, settings: Settings, open_bus: Callable[..., tuple[Bus, Triggers]]) -> None:
        self.settings = settings
        self.checkpoints = Checkpoints(settings.home / "bus.db")
        self.bus, triggers = open_bus(settings, busy_ms=0, on_wal=self.checkpoints)
        self.triggers = triggers.preferred()
        self.usual = triggers.usual


def _make_session(
    context: ToolContext, opened: _Opened, stdio: Stdio, gate: ReadyGate, conversation: Callable[[Process], str]
) -> tuple[Session, HeldDelivery | None]:
    """The session that `context.choice` describes, not claimed yet, and its delivery if that can be held back."""
    choice, settings = context.choice, opened.settings
    usual = choice.delivery, choice.reason

    async def report(trouble: str) -> None:
        """Report that the delivery takes nothing, or that it works again: here, in `peers`, to senders. [INBOX-6]"""
        say(_unusable(usual[0], trouble) if trouble else f"the {usual[0]} can be used again")
        await show(trouble)

    async def turned(carrier: str, reason: str) -> None:
        """Another carrier brings the messages from now on: show it, unless nothing is pushed anyhow. [MOD-5]"""
        nonlocal usual
        usual = carrier, reason
        await show(delivery.trouble if delivery is not None else "")

    async def show(trouble: str) -> None:
        try:
            await session.set_delivery(*((PULL, _unusable(usual[0], trouble)) if trouble else usual))
        except AgentbusError as error:
            say(str(error))

    beside: list[Callable[[], Coroutine[Any, Any, None]]] = []
    link = Link(stdio, gate, settings.home, report, turned, beside.append, context.profile.frames)
    delivery = choice.make(link) if choice.make is not None else None
    watched = None
    if delivery is not None and choice.held is not None:
        delivery = watched = HeldDelivery(delivery, choice.held, report)
        beside.append(watched.watch)
    held = watched.trouble if watched is not None else ""
    arrival = Arrival(
        host=choice.host,
        launch_name=settings.name,
        process=process.current(),
        runtime=context.runtime,
        cwd=settings.cwd,
        domain=process.domain(),
        delivery=PULL if held else choice.delivery,
        trigger=opened.triggers[0].name,
        delivery_reason=_unusable(choice.delivery, held) if held else choice.reason,
        conversation=conversation(choice.host),
        is_asked=settings.name_was_asked,
        folder=settings.folder,
    )
    session = Session(
        opened.bus,
        arrival,
        triggers=opened.triggers,
        delivery=delivery,
        record=choice.record,
        is_proof_wanted=delivery is not None,
        checkpoints=opened.checkpoints,
        say=say,
        retention_hours=settings.retention_hours,
        member_days=settings.member_days,
        groups=settings.groups,
        holds_old=True,
        conversation=lambda: conversation(choice.host),
        beside=beside,
    )
    if delivery is not None:
        context.trouble = lambda: delivery.trouble
    return session, watched


async def _serve(context: ToolContext, opened: _Opened, stdio: Stdio, conversation: Callable[[Process], str]) -> int:
    gate, choice = ReadyGate(), context.choice
    session, watched = _make_session(context, opened, stdio, gate, conversation)
    aside = _Aside()
    context.session, context.aside = session, lambda: aside.said

    async def be_there() -> None:
        """Be the peer, from the claim on."""
        _announce(session, opened.settings)
        if watched is not None and watched.trouble:
            say(session.peer.delivery_reason)
        await tasks.start(session.run)

    try:
        async with anyio.create_task_group() as tasks:
            await tasks.start(_watch_for_end, context, stdio)
            tasks.start_soon(stdio.run)
            if await session.claim(alone=choice.twin is not None) is None:
                tasks.start_soon(_stand_aside, session, choice, aside, be_there)
                await aside.is_known.wait()
            else:
                await be_there()
            await _speak(context, stdio, gate)
    finally:
        _close(session)
    return 1


async def _serve_late(
    context: ToolContext,
    settings: Settings,
    open_bus: Callable[..., tuple[Bus, Triggers]],
    stdio: Stdio,
    newcomer: Newcomer,
) -> int:
    """Speak first, and be a peer once it is known which session this is. [LATE-1]"""
    gate = ReadyGate()
    async with anyio.create_task_group() as tasks:
        await tasks.start(_watch_for_end, context, stdio)
        tasks.start_soon(stdio.run)
        tasks.start_soon(_arrive, context, settings, open_bus, stdio, gate, newcomer, tasks)
        await _speak(context, stdio, gate)
    return 1


async def _arrive(
    context: ToolContext,
    settings: Settings,
    open_bus: Callable[..., tuple[Bus, Triggers]],
    stdio: Stdio,
    gate: ReadyGate,
    newcomer: Newcomer,
    beside: anyio.abc.TaskGroup,
) -> None:
    """Be the peer that `newcomer` finds, until it has left. What fails is what every tool then answers. [LATE-1]"""
    try:
        choice = context.choice = await newcomer.arrive(beside)
        if choice.mode is Mode.HEALTH_CHECK:
            return
        opened = _Opened(choice.settings or settings, open_bus)
        context.usual_trigger, context.name_note = opened.usual, opened.settings.name_note
        session, _ = _make_session(context, opened, stdio, gate, lambda _host: choice.conversation)
        if choice.guest_of:
            await session.be_guest_of(choice.guest_of)
            context.session = session
            return
        await session.claim()
        _announce(session, opened.settings)
        async with anyio.create_task_group() as tasks:
            # From here on the end of this process ends the peer.
            context.session = session
            await tasks.start(session.run)
            newcomer.over.set()
            reason = await newcomer.attend(session)
            say(reason)
            context.session, context.choice = None, replace(choice, mode=Mode.HEALTH_CHECK, reason=reason)
            await session.stop()
            tasks.cancel_scope.cancel()
        _close(session)
    except AgentbusError as error:
        say(str(error))
        context.session, context.choice = None, replace(context.choice, mode=Mode.HEALTH_CHECK, reason=str(error))
    finally:
        newcomer.over.set()


def _unusable(delivery: str, trouble: str) -> str:
    return f"its {delivery} cannot be used: {trouble}"


class _Aside:
    """What a server says for as long as it stands aside; nothing once it is a peer. [TWIN-1]"""

    def __init__(self) -> None:
        self.said = ""
        self.is_known = anyio.Event()


async def _stand_aside(
    session: Session, choice: Choice, aside: _Aside, be_there: Callable[[], Awaitable[None]]
) -> None:
    """Be no peer while another server of this agent process is that peer; take over when it has ended. [TWIN-1]"""
    twin = _twin(session)
    while True:
        if twin is None:
            with suppress(TryAgain):
                if await session.claim(alone=True) is not None:
                    break
        elif choice.twin is not None:
            said = (
                f'this server stands aside, because process {twin.process.pid} is the peer "{twin.name}" of this very '
                f"session: {choice.twin()}"
            )
            if not aside.said:
                say(said)
            aside.said = said
            aside.is_known.set()
        await anyio.sleep(_ASIDE_LOOK_S)
        if process.life(choice.host) is process.Life.ENDED:
            session.orphaned.set()
        twin = _twin(session)
    say("the other server has ended, and this one takes over")
    aside.said = ""
    await be_there()
    aside.is_known.set()


def _twin(session: Session) -> Peer | None:
    try:
        return session.twin()
    except AgentbusError:
        return None  # then the claim says what is wrong


async def _serve_nobody(context: ToolContext, stdio: Stdio) -> int:
    """Do the handshake and nothing else. [VOID-3]"""
    async with anyio.create_task_group() as tasks:
        await tasks.start(_watch_for_end, context, stdio)
        tasks.start_soon(stdio.run)
        await _speak(context, stdio, ReadyGate())
    return 1


async def _speak(context: ToolContext, stdio: Stdio, gate: ReadyGate) -> None:
    async with anyio.create_task_group() as tasks:
        fast_path = FastPath(context, gate, stdio.write, tasks.start_soon)
        stdio.sift(fast_path.take)
        # At the end of stdin the watcher ends the process.
        with suppress(anyio.EndOfStream):
            line = await stdio.next_line()
            say(f"the MCP SDK is imported now, for {_described(line)}")
            try:
                sdk = await _import_sdk()
            except Exception as error:  # noqa: BLE001 - whatever the code of others raises while it is imported
                why = explain(error) or f"the MCP SDK cannot be imported, {type(error).__name__}: {error}"
                await _refuse(stdio, fast_path, line, why)
            else:
                await sdk.serve_mcp(context, stdio, gate, fast_path, line)
        await anyio.sleep_forever()


def _described(line: bytes | None) -> str:
    """What a line that the fast path has left asks for, in a few words."""
    method = None if line is None else (jsonrpc.parse(line) or {}).get("method")
    return (
        f"a request that needs it: {method[:_MAX_TOLD_CHARS]!a}"
        if isinstance(method, str)
        else "a line that is no request"
    )


async def _refuse(stdio: Stdio, fast_path: FastPath, line: bytes | None, reason: str) -> NoReturn:
    """Refuse what the fast path leaves, beginning with `line`. Raises EndOfStream when stdin has ended. [DESK-5]"""
    say(reason)
    while True:
        message = (line is not None and jsonrpc.parse(line)) or {"id": None}
        if "id" in message and not message.keys() & {"result", "error"}:
            request_id = message["id"]
            fast_path.settled(request_id)
            known = request_id if jsonrpc.is_id(request_id) else None
            stdio.post(jsonrpc.error_line(known, jsonrpc.INTERNAL_ERROR, reason))
        line = await stdio.next_line()


async def _import_sdk() -> Any:
    """Import the SDK in a thread. It takes half a second and delays nobody: see _IMPORT_SWITCH_S."""
    before_s = sys.getswitchinterval()
    gc.disable()
    sys.setswitchinterval(_IMPORT_SWITCH_S)
    try:
        return await anyio.to_thread.run_sync(import_module, "agentbus.adapters.mcp.sdk", abandon_on_cancel=True)
    finally:
        sys.setswitchinterval(before_s)
        # The SDK's models stay for good: the collector does not have to walk through them again and again.
        gc.freeze()
        gc.enable()


def _announce(session: Session, settings: Settings) -> None:
    if settings.name_note:
        say(settings.name_note)
    if session.claim_note:
        say(f'this session is "{session.peer.name}": {session.claim_note}')
        return
    holder = session.wished_holder
    if holder is not None:
        say(f'"{holder.name}" is in use by the session in {one_line(holder.cwd)}; this one is "{session.peer.name}"')


async def _watch_for_end(
    context: ToolContext, stdio: Stdio, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    """End the process on a signal, or when the client has closed its end. [LIFE-1], [LIFE-2]"""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_after, stdio.closed.wait, tasks.cancel_scope)
            if context.session is not None:
                tasks.start_soon(_cancel_after, context.session.orphaned.wait, tasks.cancel_scope)
            async for _signal in signals:
                break
            tasks.cancel_scope.cancel()
    # Do not cancel the other tasks: the SDK would first answer the requests in flight. If the client does not read,
    # that takes a second.
    session = context.session
    try:
        if session is not None:
            with anyio.move_on_after(_STOP_S):
                await session.stop()
            _close(session)
        if context.choice.end is not None:
            context.choice.end()
    finally:
        stdio.restore()
        os._exit(0)


def _close(session: Session) -> None:
    """Leave the bus, and wait a moment for a busy database: there is nothing else to do, and no later time for it."""
    give_up_at = time.monotonic() + _CLOSE_PATIENCE_S
    while True:
        try:
            session.close()
            return
        except TryAgain as error:
            if time.monotonic() >= give_up_at:
                say(f"could not leave cleanly: {error}")
                return
        except AgentbusError as error:
            say(str(error))
            return
        time.sleep(0.001)


async def _cancel_after(wait: Callable[[], Any], scope: anyio.CancelScope) -> None:
    await wait()
    scope.cancel()
