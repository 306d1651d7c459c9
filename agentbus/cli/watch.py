"""`agentbus watch`: shows live which peers are online, and each message as it becomes pending, delivered and read.

It is woken by a socket, as sessions are. It reads and changes nothing. core/changes finds out what has happened, and a
display shows it. Implements [WATCH-1] to [WATCH-4].
"""

from __future__ import annotations

import select
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import anyio
import anyio.abc
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agentbus import registry
from agentbus.cli import common, output
from agentbus.core import config, eventloop
from agentbus.core.bus import HOOK, PULL, now_ms
from agentbus.core.changes import SAFETY_S, Changes, Event, MessageEvent, NameEvent, PeerEvent, watching
from agentbus.core.model import MessageState, Peer, timestamp
from agentbus.core.store import Store
from agentbus.core.text import escaped, one_line, word

__all__ = ["watch"]

# The pause between two looks: a burst of messages takes one look, and a person sees no difference.
_PAUSE_S = 0.02
# -- how it is shown ---------------------------------------------------------------------------------------


class _Display(Protocol):
    def show(self, events: list[Event]) -> None:
        """Show what has happened."""

    def refresh(self, changes: Changes, waiting: dict[str, int]) -> None:
        """Show the peers that are online, and how many messages wait."""

    def say(self, line: str) -> None:
        """Show a sentence to the person who watches."""


def _event_line(event: Event) -> Text:
    text = Text(output.clock(event.at) + "  ")
    if isinstance(event, PeerEvent):
        peer = event.peer
        text.append(f"{event.what:<9}", "magenta")
        text.append(f"  {peer.name}", "bold")
        if event.what == "renamed":
            text.append(f", was {event.was}")
        elif event.what == "status":
            text.append(f"  {one_line(peer.status)}" if peer.status else "  cleared")
        elif event.what == "online":
            runtime, delivery, trigger = map(word, (peer.runtime, peer.delivery, peer.trigger))
            text.append(f"  ({runtime}, {delivery}, woken by {trigger}, process {peer.process.pid})", "dim")
        return text
    if isinstance(event, NameEvent):
        text.append(f"{event.what:<9}", "magenta")
        text.append(f"  {event.name}", "bold")
        detail = event.group or (f"({event.pause})" if event.what == "paused" else "")
        return text.append(f"  {detail}" if detail else "", "dim")
    message = event.message
    text.append(f"{event.state.value:<9}", output.STYLES[event.state])
    text.append(f"  #{message.id:<5} {message.sender} -> {output.to(message)}", "bold")
    if event.state is MessageState.PENDING:
        text.append(output.contents(message))
    else:
        how = f"by {word(message.carrier)}, " if event.state is MessageState.DELIVERED else ""
        text.append(f"  {how}{output.span(max(0, event.at - message.sent_at))} after it was sent", "dim")
    return text


class _Lines:
    """One line for each event, as plain text: for a pipe or a file."""

    def __init__(self) -> None:
        self._out = output.console()

    def show(self, events: list[Event]) -> None:
        for event in events:
            output.line(self._out, _event_line(event))
        sys.stdout.flush()

    def refresh(self, changes: Changes, waiting: dict[str, int]) -> None:
        """Does nothing: a pipe has no place for a table that changes."""

    def say(self, line: str) -> None:
        output.say(line)


class _Objects(_Lines):
    """One JSON object for each event. [CLI-3]"""

    def show(self, events: list[Event]) -> None:
        for event in events:
            output.json_line(_event_row(event))


def _event_row(event: Event) -> dict[str, Any]:
    if isinstance(event, MessageEvent):
        row = output.status_row(event.message)
        return {"event": event.state.value, "at": timestamp(event.at), **row}
    if isinstance(event, NameEvent):
        more = {"group": event.group} if event.group else {"pause": event.pause and output.pause_row(event.pause)}
        return {"event": event.what, "at": timestamp(event.at), "name": event.name, **more}
    peer = event.peer
    return {
        "event": event.what,
        "at": timestamp(event.at),
        "name": peer.name,
        "was": event.was or None,
        "runtime": peer.runtime,
        "delivery": peer.delivery,
        "trigger": peer.trigger,
        "pid": peer.process.pid,
        "cwd": peer.cwd,
        "status": peer.status or None,
        "status_at": output.instant(peer.status_at),
    }


class _Screen:
    """For a terminal: the events scroll by, and the table below them shows which peers are online now."""

    def __init__(self, activity: Callable[[Peer], str]) -> None:
        self._activity = activity
        self._out = output.console()
        self._out.soft_wrap = False
        # rich must not start a thread for this: the table is drawn when it has changed.
        self.live = Live(console=self._out, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)

    def show(self, events: list[Event]) -> None:
        for event in events:
            output.line(self._out, _event_line(event))

    def refresh(self, changes: Changes, waiting: dict[str, int]) -> None:
        peers = list(changes.peers.values())
        self.live.update(_standing(peers, waiting, self._activity, changes.groups, changes.pauses), refresh=True)

    def say(self, line: str) -> None:
        output.line(self._out, Text(f"agentbus: {escaped(line)}", "yellow"))


def _standing(
    peers: list[Peer],
    waiting: dict[str, int],
    activity: Callable[[Peer], str],
    groups: Mapping[str, Sequence[str]] = MappingProxyType({}),
    pauses: Collection[str] = (),
) -> Group:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("NAME", "RUNTIME", "DELIVERY", "TRIGGER"):
        table.add_column(heading, no_wrap=True)
    table.add_column("PENDING", justify="right")
    table.add_column("GROUPS" if groups else "", no_wrap=True, overflow="ellipsis")
    table.add_column("FOLDER", no_wrap=True, overflow="ellipsis")
    shown = sorted(peers, key=lambda one: one.name)
    now = now_ms()
    # Many clients do not tell, and many sessions say nothing: then there is no column for it.
    columns = (("IS", [activity(peer) for peer in shown]), ("STATUS", [peer.doing(now) for peer in shown]))
    told = {heading: cells for heading, cells in columns if any(cells)}
    for heading in told:
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    for number, peer in enumerate(shown):
        pending = waiting.get(peer.name, 0)
        is_paused = peer.name in pauses
        style = "yellow" if is_paused or peer.delivery in (PULL, HOOK) else "green"
        runtime, delivery, trigger = map(word, (peer.runtime, peer.delivery, peer.trigger))
        cells = (Text(peer.name, "bold"), runtime, Text("paused" if is_paused else delivery, style), trigger)
        its = one_line(" ".join(groups.get(peer.name, ())))
        doing = [Text(cells_of[number]) for cells_of in told.values()]
        table.add_row(*cells, Text(str(pending), "yellow" if pending else "dim"), its, one_line(peer.cwd), *doing)
    names = {peer.name for peer in peers}
    for name, count in waiting.items():
        if name not in names:
            its = one_line(" ".join(groups.get(name, ())))
            how = "paused" if name in pauses else "offline"
            table.add_row(Text(name, "dim"), "", Text(how, "dim"), "", Text(str(count), "yellow"), its, "")
    rule = Text("-" * 12 + " Ctrl-C ends this ", "dim")
    return Group(rule, table if table.row_count else Text("nobody is online", "dim"))


# -- the command -------------------------------------------------------------------------------------------


def watch(*, as_json: bool) -> None:
    """Show what happens, until a signal comes or the reader of the output ends. Raises what opening the bus raises."""
    with common.bus_and_settings() as (bus, settings):
        if not as_json and output.console().is_terminal:
            screen = _Screen(bus.activity)
            with screen.live:
                eventloop.run(_watch, bus.store, settings, screen)
        else:
            eventloop.run(_watch, bus.store, settings, _Objects() if as_json else _Lines())


async def _watch(store: Store, settings: config.Settings, display: _Display) -> None:
    try:
        async with anyio.create_task_group() as tasks:
            await tasks.start(common.when_signalled, lambda _number: tasks.cancel_scope.cancel())
            await _follow(store, settings, display)
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # The task group is an internal detail: callers get the error of the bus as it was raised.
        raise group.exceptions[0] from None


async def _follow(store: Store, settings: config.Settings, display: _Display) -> None:
    changes = Changes(store)
    watchers = registry.watchers(settings)
    while True:
        if store.is_replaced():
            config.prepare_home(settings.home)  # there is nothing to bind a socket in, if the whole home was removed
        async with watching(watchers, poll_ms=settings.poll_ms, say=display.say) as wakes:
            thoroughly = True
            # If the socket was removed while we listened, the outer loop arms it again. [WAKE-6]
            while wakes.is_reachable():
                if store.is_replaced():
                    config.prepare_home(settings.home)
                    store.reopen()
                    changes.start_anew()
                    display.say(f"{store.path} was deleted or replaced: watching the new one")
                    thoroughly = True
                events = changes.look(thoroughly=thoroughly)
                display.show(events)
                if events or thoroughly:
                    display.refresh(changes, store.queries.waiting())
                if _is_unread():
                    return
                await anyio.sleep(_PAUSE_S)
                thoroughly = not await wakes.wait(SAFETY_S)
        await anyio.sleep(_PAUSE_S)


def _is_unread() -> bool:
    """Whether the reader of our output is gone. A pipe shows that before anything is written into it. [WATCH-4]"""
    poller = select.poll()
    try:
        poller.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False  # no descriptor at all: then there is no reader to lose
    return any(events & (select.POLLERR | select.POLLNVAL) for _, events in poller.poll(0))
