"""The work of the command line, apart from parsing: open the bus, act, print.

The fast path in __main__.py and the typer commands in app.py share this module. It imports neither typer nor an event
loop, and waits inline for a busy database. Implements [CLI-1] to [CLI-5], [WAKE-5].
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from agentbus import registry
from agentbus.core import config, process
from agentbus.core.bus import HOOK, PULL, Bus, GroupSent, Sent, now_ms
from agentbus.core.errors import BrokenSetup, InvalidRequest, Refused
from agentbus.core.model import Peer, timestamp
from agentbus.core.names import address, folded, is_group, is_kept, login_name, machine_of
from agentbus.core.stderr import say
from agentbus.core.stdout import reported
from agentbus.core.store import Store
from agentbus.core.text import MAX_REASON_CHARS, age, one_line, word

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from typing import Any

    from anyio.abc import TaskStatus

    from agentbus.core.adapter import Reachable
    from agentbus.core.machines import Machine

__all__ = [
    "SIGNALLED",
    "broadcast",
    "bus_and_settings",
    "known_names",
    "link_line",
    "own",
    "own_name",
    "parse_seconds",
    "parse_whole",
    "peers",
    "person_here",
    "send",
    "sending_as",
    "serve",
    "session_here",
    "text_or_stdin",
    "when_signalled",
]

# A session waits for the same time. [STORE-4]
_BUSY_MS = 10_000
# One day. To wait for ever, leave the option out.
_LONGEST_S = 86_400.0
_MOST_DIGITS = 15  # SQLite's integers have 18; Python would accept thousands
# Shells report death by a signal as this number plus the signal's number.
SIGNALLED = 128


@contextmanager
def bus_and_settings(
    make_store: Callable[..., Store] = Store, *, busy_ms: int = _BUSY_MS
) -> Iterator[tuple[Bus, config.Settings]]:
    """The bus of AGENTBUS_HOME, open until the block ends. A busy database is waited for as long as `busy_ms`.

    Raises what `config.load` and `registry.open_bus` raise.
    """
    settings = config.load(is_person=True)
    try:
        bus, triggers = registry.open_bus(settings, busy_ms=busy_ms, make_store=make_store)
        try:
            yield bus, settings
        finally:
            bus.store.close()
            triggers.close()
    except BrokenSetup as error:
        raise _in_sandbox(settings) or error from error


def _in_sandbox(settings: config.Settings) -> BrokenSetup | None:
    """What to say in a shell of an agent that may not write the home; None in any other shell. [CLI-8]"""
    is_agents = any(config.other_program(variable) for variable in registry.CONVERSATIONS)
    if not is_agents or os.access(settings.home if settings.home.exists() else settings.home.parent, os.W_OK):
        return None
    return BrokenSetup(
        f"this shell of an agent is in a sandbox that may not write {settings.home}, and nothing was done",
        hint="use the tools of agentbus instead: send_message, check_messages, list_peers; no sandbox holds them",
    )


def session_here(bus: Bus) -> Peer | None:
    """The session that runs this shell; None if none does, or if it cannot be told which. [CLI-2]"""
    said = [config.other_program(variable) for variable in registry.CONVERSATIONS]
    peer = next(filter(None, map(bus.of_conversation, filter(None, said))), None)
    # A client that names the conversation can have many sessions in one process: who its ancestor is says nothing then.
    if peer is None and not any(said):
        peer = bus.sender_among(process.ancestors())
    return peer


def own_name(bus: Bus, settings: config.Settings, asked: str | None) -> str:
    """The name of a shell: the one asked for, else the session it runs in, AGENTBUS_NAME, the login name. [CLI-2]

    Raises InvalidRequest for a bad name, and Refused for one that no session can have, in a shell of a session.
    """
    return own(bus, settings, asked)[0]


def own(bus: Bus, settings: config.Settings, asked: str | None) -> tuple[str, str | None]:
    """The name of a shell, and the session that it runs in and sends as; None if it sends as somebody else."""
    name = None if asked is None else address(asked)
    if name is not None and not is_kept(name):
        return name, None
    peer = session_here(bus)
    if name is not None and peer is not None:
        raise Refused(
            f'this shell belongs to the session "{peer.name}", and no session can have the name "{name}"',
            hint="leave the name out",
        )
    if peer is not None:
        return peer.name, peer.session
    return name or (settings.name if settings.name_was_asked else login_name()), None


def sending_as(bus: Bus, settings: config.Settings, asked: str | None) -> tuple[str, str | None]:
    """The name that a shell sends under, and its session, as `own`. Raises Refused if its session is paused.

    Whatever name it asks for: the pause is one of the session that runs this shell. [BRAKE-1]
    """
    pauses = bus.store.queries.pauses(bus.clock())
    if pauses and (peer := session_here(bus)) is not None and peer.name in pauses:
        raise Refused(
            f'this shell belongs to the session "{peer.name}", which is {pauses[peer.name]}, so nothing was sent',
            hint="only your user can change that, outside of this session",
        )
    return own(bus, settings, asked)


def person_here(bus: Bus, settings: config.Settings, what: str) -> str:
    """The name of the person at this shell. Raises Refused in a shell that an agent runs. [BRAKE-5]"""
    peer = session_here(bus)
    if peer is not None or any(map(config.other_program, registry.CONVERSATIONS)):
        whose = "an agent" if peer is None else f'the session "{peer.name}"'
        raise Refused(
            f"this shell belongs to {whose}, and only a person can {what}", hint="your user does that outside of it"
        )
    return own(bus, settings, None)[0]


def known_names(start: str) -> list[str]:
    """The names for a shell to complete: they begin with `start`, and are online or have mail waiting.

    Raises what opening the bus raises. If there is no bus yet, none is created.
    """
    if not (config.load().home / "bus.db").exists():
        return []
    with bus_and_settings() as (bus, _settings):
        queries = bus.store.queries
        names = {peer.name for peer in bus.store.live()} | set(queries.waiting()) | set(queries.groups())
    return sorted(name for name in names if name.startswith(folded(start)))


def parse_seconds(option: str, raw: str) -> float:
    """The number of seconds that an option gives: 0 to 86,400. Raises InvalidRequest."""
    try:
        seconds = float(raw)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _LONGEST_S:
        raise InvalidRequest(f"{option} is {raw[:40]!r}", hint=f"use a number of seconds from 0 to {_LONGEST_S:,.0f}")
    return seconds


def parse_whole(what: str, raw: str) -> int:
    """The whole number in `raw`, at least 1. `what` is its name in the error. Raises InvalidRequest."""
    if not (raw.isascii() and raw.isdigit() and int(raw[:_MOST_DIGITS]) > 0 and len(raw) <= _MOST_DIGITS):
        raise InvalidRequest(f"{what} is {raw[:40]!r}", hint="use a whole number, 1 or more")
    return int(raw)


def text_or_stdin(text: str | None) -> str:
    """`text`, or the text from stdin without its last newline. [CLI-1]

    Raises InvalidRequest when there is neither, or when stdin is not UTF-8.
    """
    if text is not None and text != "-":
        return text
    if text is None and sys.stdin.isatty():
        raise InvalidRequest("no text", hint='give it as an argument, agentbus send NAME "TEXT", or pipe it in')
    try:
        piped = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"stdin is not UTF-8 (byte {error.start + 1})", hint="put binary data in a file and send its path"
        ) from None
    return piped.removesuffix("\n")


def send(
    to: str,
    text: str | None,
    *,
    sender: str | None,
    reply_to: str | None = None,
    then: Callable[[Bus, config.Settings, Sent], None] = lambda _bus, _settings, _sent: None,
) -> None:
    """Send one message and print what became of it. Then call `then` with the result, while the bus is still open."""
    answered = None if reply_to is None else parse_whole("--reply-to", reply_to.removeprefix("#"))
    body = text_or_stdin(text)
    with bus_and_settings() as (bus, settings):
        name, session = sending_as(bus, settings, sender)
        if is_group(to):
            done: Sent | GroupSent = bus.send_group(name, to, body, reply_to=answered, sender_session=session)
        else:
            done = bus.send(name, to, body, reply_to=answered, sender_session=session)
        with reported():
            print(done)
        if isinstance(done, Sent):
            then(bus, settings, done)


def broadcast(text: str | None, *, sender: str | None, everywhere: bool = False) -> None:
    """Send one message to every peer that is online, here or on every machine, and print to which."""
    body = text_or_stdin(text)
    with bus_and_settings() as (bus, settings):
        name, session = sending_as(bus, settings, sender)
        sent = bus.broadcast(name, body, sender_session=session, everywhere=everywhere)
    with reported():
        if not sent:
            print("nobody is online; nothing was sent")
        for one in sent:
            print(one)


def peers(*, as_json: bool) -> None:
    """Show which peers are online, and for which names messages wait."""
    with bus_and_settings() as (bus, _settings):
        present = bus.peers()
        queries, now = bus.store.queries, bus.clock()
        waiting, groups, pauses = queries.waiting(), queries.groups_of(), queries.pauses(now)
        reachable = bus.reachable()
        activity = {peer.session: bus.activity(peer) for peer in present}
        far = bus.machines()
        link = _Link(bus) if bus.store.machine() else None
    there = [one for one in far if one.is_there]
    offline = {name: count for name, count in waiting.items() if name not in {peer.name for peer in present}}
    if as_json:
        from agentbus.cli import output  # with rich, which a send must not wait for

        for row in _json_rows(present, waiting, offline, reachable, activity):
            pause = pauses.get(row["name"])
            output.json_line(
                {**row, "groups": groups.get(row["name"], []), "paused": pause and output.pause_row(pause)}
            )
        for row in far_rows(there):
            output.json_line(row)
        return
    if present or any(one.peers for one in there):
        _print_table(present, waiting, groups, activity, there)
    else:
        print("nobody is online")
    for name, pause in pauses.items():
        print(f"{name} is {pause}: agentbus resume {name}")
    for one in reachable:
        held = one.held()
        why = f", and not posted to: {one_line(held, MAX_REASON_CHARS)}" if held else ""
        print(f"{one.name}: {word(one.runtime)} in {one_line(one.cwd)}, reachable, not joined{why}")
    for name, count in offline.items():
        if link is None or not machine_of(name):  # what waits for other machines is in the line of the link
            print(f'{count:,} {"message waits" if count == 1 else "messages wait"} for "{name}" (offline)')
    if link is not None:
        print(link_line(link.facts, far, link.waiting, now, is_running=link.is_running))


def far_rows(machines: Sequence[Machine]) -> Iterator[dict[str, Any]]:
    """The peers of other machines, as JSON."""
    for machine in machines:
        for peer in machine.peers:
            yield {
                "name": f"{peer.name}@{machine.name}",
                "online": True,
                "machine": machine.name,
                "runtime": peer.runtime,
                "delivery": peer.delivery,
                "cwd": peer.cwd or None,
                "last_seen": timestamp(machine.seen_at),
            }


class _Link:
    """What is known about the link of a bus at one moment."""

    def __init__(self, bus: Bus) -> None:
        self.facts, self.waiting = bus.store.machines.facts(), bus.store.machines.waiting()
        self.is_running = bus.store.link() is not None


def link_line(
    facts: Mapping[str, str], machines: Sequence[Machine], waiting: Mapping[str, int], now: int, *, is_running: bool
) -> str:
    """The link and the other machines, on one line for people. [MACH-2]"""
    own = facts.get("machine", "?")
    if not is_running:
        how = f"{own}: the link is not running: agentbus link run"
    elif "since" in facts:
        how = f"{own} -> {facts.get('server', '?')} connected {age(int(facts['since']), now)}"
    else:
        how = f"{own}: not connected ({facts.get('trouble') or 'not yet'})"
    parts = []
    for one in machines:
        count = waiting.get(one.name, 0)
        state = f"{len(one.peers)} online" if one.is_there else f"last heard of {age(one.seen_at, now)} ago"
        waits = f", {count:,} {'message waits' if count == 1 else 'messages wait'} for it" if count else ""
        parts.append(f"{one.name}: {state}{waits}")
    return "; ".join([how, *parts])


def _json_rows(
    present: list[Peer],
    waiting: dict[str, int],
    offline: dict[str, int],
    reachable: list[Reachable],
    activity: dict[str, str],
) -> Iterator[dict[str, Any]]:
    for peer in present:
        yield {
            "name": peer.name,
            "online": True,
            "pending": waiting.get(peer.name, 0),
            "runtime": peer.runtime,
            "delivery": peer.delivery,
            "delivery_reason": peer.delivery_reason,
            "trigger": peer.trigger,
            "pid": peer.process.pid,
            "cwd": peer.cwd,
            "started_at": timestamp(peer.started_at),
            "last_seen": timestamp(peer.last_seen),
            "activity": activity[peer.session] or None,
            "status": peer.status or None,
            "status_at": None if peer.status_at is None else timestamp(peer.status_at),
        }
    for one in reachable:
        yield {
            "name": one.name,
            "online": False,
            "pending": offline.pop(one.name, 0),
            "reachable": True,
            "held": one.held() or None,
            "runtime": one.runtime,
            "pid": one.host.pid,
            "cwd": one.cwd,
        }
    for name, count in offline.items():
        yield {"name": name, "online": False, "pending": count}


def _print_table(
    present: list[Peer],
    waiting: dict[str, int],
    groups: dict[str, list[str]],
    activity: dict[str, str],
    machines: Sequence[Machine],
) -> None:
    rows = [("NAME", "RUNTIME", "DELIVERY", "TRIGGER", "PENDING", "PID", "FOLDER", "GROUPS", "IS", "STATUS")]
    now = now_ms()
    for peer in present:
        pending = str(waiting.get(peer.name, 0))
        runtime, delivery, trigger = map(word, (peer.runtime, peer.delivery, peer.trigger))
        process_and_folder = (str(peer.process.pid), one_line(peer.cwd))
        its = one_line(" ".join(groups.get(peer.name, ())))
        doing = (activity[peer.session], peer.doing(now))
        rows.append((peer.name, runtime, delivery, trigger, pending, *process_and_folder, its, *doing))
    for machine in machines:
        for far in machine.peers:
            seen = f"{one_line(far.cwd)} " if far.cwd else ""
            name, how = f"{far.name}@{machine.name}", f"{seen}seen {age(machine.seen_at, now)} ago"
            rows.append((name, far.runtime, far.delivery, "", str(waiting.get(name, 0)), "", how, "", "", ""))
    from rich.cells import cell_len, set_cell_size  # takes 5 ms, which a send must not pay for

    # A column that says nothing is left out: many clients do not tell, and many sessions say nothing.
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(cell_len(cell) for cell in column) for column in columns]
    for row in zip(*columns, strict=True):
        cells = [set_cell_size(cell, width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())
    for peer in present:
        if peer.delivery == PULL:
            why = one_line(peer.delivery_reason, MAX_REASON_CHARS)
            print(f"nothing can be pushed to {peer.name}, it reads with check_messages: {why}")
        elif peer.delivery == HOOK:
            print(f"idle, {peer.name} is not reached before its user's next prompt")


async def when_signalled(act: Callable[[int], None], *, task_status: TaskStatus[None]) -> None:
    """Call `act` with the number of each SIGINT, SIGTERM and SIGHUP, until cancelled. Start it in a task group."""
    import signal

    import anyio

    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            act(number)


def serve(name: str) -> None:
    """Be a peer for the agent runtime that started this process. Does not return."""
    if sys.stdin.isatty():
        say("waiting for an MCP client on stdin; Ctrl-D ends it")
    registry.serve(name)
