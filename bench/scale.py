"""Does a message cost more with a long history, many peers, or a full mailbox? And what do 100 sessions take?

There are three sizes: delivered rows in the database, peers that are present, and pending messages in a mailbox
that nobody empties. Each size has its own bus. The buses take turns, so other load on the machine affects all equally.
Beside the time of a message, the benchmark measures what `send` and `peers` cost, as a call in this process and as a
whole command. At last a hundred sessions start at once, get broadcasts, and are left alone.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import apsw
import typer

from agentbus import registry
from agentbus.core import config
from agentbus.core.bus import Bus, now_ms
from agentbus.core.store import MAX_PENDING
from bench.crowd import BROADCASTS, crowd, tell_crowd
from bench.member import Crew
from bench.report import AgainstOption, Failed, JsonOption, PlotOption, Report, main, median, progress
from bench.sessions import EVENTS, Client, Contender, Field, contenders, fault, rivals
from tests.support.command import clean_env

BATCH_ROWS = 50_000
# Old rows are younger than the retention. Otherwise the first heartbeat would begin to prune them.
_OLD_MS = 12 * 3_600_000
_SESSIONS = 200

_OLD_ROWS = """
WITH RECURSIVE n (i) AS (SELECT ?1 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?2)
INSERT INTO messages (sender, recipient, body, sent_at, delivered_at, carrier, delivered_to)
SELECT 'old-' || i % ?3, 'old-' || (i + 7) % ?3, 'a message of some time ago, of the length that many have: ' || i,
    ?4 + i % ?5, ?4 + i % ?5 + 1, 'channel', 'old-session-' || (i + 7) % ?3 FROM n
"""
_PENDING_ROWS = """
WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < ?1)
INSERT INTO messages (sender, recipient, body, sent_at) SELECT 'program', ?2, '~0.' || i || '~ waits', ?3 FROM n
"""

MESSAGE = "tool call -> event"
SEND = "send, a call"
PEERS = "peers, a call"
BROADCAST = "broadcast, a call"
SEND_COMMAND = "agentbus send"
PEERS_COMMAND = "agentbus peers"


@dataclass
class Bench:
    """One bus of one size, and its measurements, in turn with the others. Times are in milliseconds."""

    size: int
    home: Path
    bus: Bus
    pair: tuple[Client, Client] | None
    samples: dict[str, list[float]] = field(default_factory=dict)

    def note(self, what: str, took_ms: float) -> None:
        self.samples.setdefault(what, []).append(took_ms)

    def message(self) -> None:
        """Measure a spaced message from session to session."""
        assert self.pair is not None
        self.note(MESSAGE, one_message(*self.pair))

    def send(self, to: str) -> int:
        """Measure a send by a call of the bus. Returns the id of the message."""
        began = time.perf_counter()
        sent = self.bus.send("program", to, "one round")
        self.note(SEND, (time.perf_counter() - began) * 1_000)
        return sent.id

    def peers(self) -> None:
        """Measure listing the peers by a call of the bus."""
        began = time.perf_counter()
        self.bus.peers()
        self.note(PEERS, (time.perf_counter() - began) * 1_000)

    def broadcast(self) -> None:
        """Measure a broadcast by a call of the bus: the rows and the wakes, not what the peers do with them."""
        began = time.perf_counter()
        self.bus.broadcast("program", "to all")
        self.note(BROADCAST, (time.perf_counter() - began) * 1_000)

    def command(self, what: str, *words: str) -> None:
        """Measure a whole command."""
        self.note(what, command_ms(self.home, *words))


def command_ms(home: Path, *words: str, stderr: int | None = None) -> float:
    """Run `agentbus` with these words, as a whole process. Returns how long it took, in milliseconds."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "agentbus", *words],
        env=clean_env(home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        check=True,
    )
    return (time.perf_counter() - began) * 1_000


def one_message(sender: Client, receiver: Client) -> float:
    """Send one message. Returns how long from the call to the event, in milliseconds."""
    seen = len(receiver.events)
    request, line = sender.prepare_call("send_message", to="receiver", text="one round")
    began = time.perf_counter()
    sender.send_line(line)
    receiver.wait_events(seen + 1)
    took_ms = (receiver.events[seen][0] - began) * 1_000
    sender.sent(request)
    return took_ms


def open_bus(home: Path, stack: ExitStack) -> Bus:
    """Open the bus at `home`. It is created if needed, and closed with the stack."""
    bus, triggers = registry.open_bus(config.load(home=home), busy_ms=10_000)
    stack.callback(triggers.close)
    stack.callback(bus.store.close)
    return bus


def execute(bus: Bus, sql: str, *values: object) -> None:
    """Run SQL for which the store has no method: create old rows, undo a send."""
    connection = apsw.Connection(str(bus.store.path))
    try:
        connection.set_busy_timeout(10_000)
        connection.execute(sql, values)
    finally:
        connection.close()


def add_old_rows(bus: Bus, count: int) -> None:
    """Put `count` delivered messages into the mailbox, like those left by earlier sessions."""
    since = now_ms() - _OLD_MS
    batches = range(0, count, BATCH_ROWS)
    for start in progress(batches, f"{count:,} old rows") if len(batches) > 1 else batches:
        execute(bus, _OLD_ROWS, start, min(start + BATCH_ROWS, count), _SESSIONS, since, _OLD_MS - 3_600_000)
    execute(bus, "PRAGMA wal_checkpoint(TRUNCATE)")


def add_pending(bus: Bus, mailbox: str, count: int) -> None:
    """Make `count` messages wait for `mailbox`."""
    execute(bus, "DELETE FROM messages WHERE recipient = ? AND delivered_at IS NULL", mailbox)
    if count:
        execute(bus, _PENDING_ROWS, count, mailbox, now_ms())


def take_turns(benches: list[Bench], rounds: int, commands: int, what: str) -> None:
    """Measure messages, calls and commands on each bench in turn."""
    every = max(1, rounds // commands) if commands else 0
    for number in progress(range(rounds + 1), what):
        # Each bench is first as often as last: the step before it (say, a command of another bus) affects its caches.
        first = number % len(benches)
        for bench in benches[first:] + benches[:first]:
            steps: list[Callable[[], object]] = [bench.message, partial(bench.send, "receiver"), bench.peers]
            if every and number and number % every == 0:
                steps.append(partial(bench.command, SEND_COMMAND, "send", "receiver", "one round"))
                steps.append(partial(bench.command, PEERS_COMMAND, "peers"))
            for step in steps:
                time.sleep(0.001)
                step()
                assert bench.pair is not None
                settle(bench.pair[1], bench.bus)
            if number == 0:
                bench.samples.clear()  # in the first round everything is cold


def settle(receiver: Client, bus: Bus) -> None:
    """Wait until the session has marked its messages delivered: the marking must not be part of the next figure."""
    while bus.store.queries.waiting().get("receiver"):
        time.sleep(0.000_5)
    assert receiver.process.poll() is None


def old_rows(sizes: list[int], rounds: int, commands: int, against: str | None) -> tuple[list[Bench], list[float]]:
    """Measure with so many delivered messages in the database. Also measures a message of the other server."""
    ours = [Contender(f"{size:,}") for size in sizes]
    with ExitStack() as stack, contenders(*ours, *rivals(against)) as fields:
        benches = []
        for size, one in zip(sizes, fields, strict=False):
            bus = open_bus(one.home, stack)
            add_old_rows(bus, size)
            sender, receiver = one.start("sender", "receiver", shake=False)
            benches.append(Bench(size, one.home, bus, (sender, receiver)))
        Field.shake([client for one in fields for client in one.started])
        theirs: list[float] = []
        if against is not None:
            pair = fields[-1].start("sender", "receiver")
            theirs = [one_message(pair[0], pair[1]) for _ in range(min(rounds, 20) + 1)][1:]
        take_turns(benches, rounds, commands, "old rows")
    return benches, theirs


def live_peers(sizes: list[int], rounds: int, commands: int, idle_s: float) -> tuple[list[Bench], int]:
    """Measure with so many peers present: two sessions, and programs that have joined. Also counts idle commits."""
    with ExitStack() as stack, contenders(*(Contender(f"{size}") for size in sizes)) as fields:
        benches = []
        crews: list[Crew] = []
        for size, one in zip(sizes, fields, strict=True):
            bus = open_bus(one.home, stack)
            # If there is only one peer, it sends to itself.
            started = one.start("receiver", *(["sender"] if size > 1 else []), shake=False)
            crew = [f"peer{number}" for number in range(size - len(started))]
            if crew:
                crews.append(Crew(one.home, *crew))
                stack.callback(crews[-1].close)
            benches.append(Bench(size, one.home, bus, (started[-1], started[0])))
        Field.shake([client for one in fields for client in one.started])
        for programs in crews:
            programs.joined()
        for bench in benches:
            if len(bench.bus.peers()) != bench.size:
                raise Failed(f"of {bench.size} peers {len(bench.bus.peers())} are present")
        take_turns(benches, rounds, commands, "live peers")
        for _ in progress(range(BROADCASTS + 1), "broadcasts"):
            for bench in benches:
                bench.broadcast()
                time.sleep(0.02)
        for bench in benches:
            del bench.samples[BROADCAST][0]  # the first one is cold
        idle = idle_commits(benches, idle_s)
    return benches, idle


def idle_commits(benches: list[Bench], seconds: float) -> int:
    """How many commits the peers of all benches make together in so many seconds in which nothing happens."""
    time.sleep(min(3.0, seconds))  # until the broadcasts are taken and marked
    versions = [bench.bus.store.queries.version() for bench in benches]
    commits = 0
    for _ in progress(range(int(seconds / 0.05)), "idle"):
        time.sleep(0.05)
        for number, bench in enumerate(benches):
            version = bench.bus.store.queries.version()
            commits += version != versions[number]
            versions[number] = version
    return commits


def pending(sizes: list[int], rounds: int, drains: int) -> list[Bench]:
    """Measure a send to a mailbox with so many pending messages, and how long a session takes to drain it."""
    with ExitStack() as stack, contenders(*(Contender(f"{size:,}") for size in sizes)) as fields:
        benches = [
            Bench(size, one.home, open_bus(one.home, stack), None) for size, one in zip(sizes, fields, strict=True)
        ]
        for bench in benches:
            add_pending(bench.bus, "receiver", bench.size - 1)
        for number in progress(range(rounds + 1), "pending"):
            for bench in benches:
                time.sleep(0.001)
                row_id = bench.send("receiver")
                bench.peers()
                # The mailbox has the same number of messages before each send.
                execute(bench.bus, "DELETE FROM messages WHERE id = ?", row_id)
                if number == 0:
                    bench.samples.clear()
        for _ in progress(range(drains), "drains"):
            for bench, one in zip(benches, fields, strict=True):
                drain(bench, one)
    return benches


def drain(bench: Bench, one: Field) -> None:
    """Start a session for the mailbox, and measure how long until its client has everything."""
    add_pending(bench.bus, "receiver", bench.size)
    (receiver,) = one.start("receiver", shake=False)
    receiver.initialize()
    tape = receiver.record(EVENTS, bench.size)
    receiver.post("tools/list")
    began = time.perf_counter()
    ended = receiver.wait_for_tape(tape, f"event {bench.size:,}")
    wrong = fault(tape.text(), 1, bench.size)
    if wrong:
        raise Failed(f"of {bench.size:,} pending messages {wrong}")
    bench.note("drained after tools/list was asked for", (ended - began) * 1_000)
    one.end()


def tell(report: Report, title: str, benches: list[Bench], axis: str) -> None:
    """Add the table of one question: p50 in milliseconds for each size, and the ratio of the last to the first."""
    for what in dict.fromkeys(what for bench in benches for what in bench.samples):
        p50 = {f"{bench.size:,}": round(median(bench.samples[what]), 3) for bench in benches}
        first, *_, last = [*p50.values(), 0.0] if len(p50) == 1 else p50.values()
        ratio = {"last / first": round(last / first, 2)} if len(p50) > 1 and first else {}
        report.add(f"{title}: p50, ms", what, **p50, **ratio, n=len(benches[0].samples[what]))
        report.samples.setdefault(title, {}).update({f"{what}, {each.size:,}": each.samples[what] for each in benches})
    for part, kinds in (("calls", (MESSAGE, SEND, PEERS)), ("whole commands", (SEND_COMMAND, PEERS_COMMAND))):
        lines = {
            what: {float(bench.size): median(bench.samples[what]) for bench in benches}
            for what in kinds
            if what in benches[0].samples
        }
        if lines:
            report.draw_lines(f"{title}: {part}", axis, "ms, p50", lines)


def tell_old_rows(report: Report, benches: list[Bench], theirs: list[float]) -> None:
    """Add the table, the targets for its ratios, and the other server's message."""
    tell(report, "old rows", benches, "delivered messages in the database")
    if theirs:
        p50 = median(theirs)
        ratios = {f"{bench.size:,}": round(p50 / median(bench.samples[MESSAGE]), 2) for bench in benches}
        report.add("old rows: p50, ms", "theirs, none", **{f"{benches[0].size:,}": round(p50, 3)}, n=len(theirs))
        report.add("old rows: p50, ms", "theirs, none / tool call -> event", **ratios)
    by_size = {bench.size: bench.samples for bench in benches}
    for size in sorted(by_size):
        if 0 in by_size and size == max(by_size) and size:
            for what in (MESSAGE, SEND):
                ratio = median(by_size[size][what]) / median(by_size[0][what])
                report.target(f"{what}: {size:,} old rows / none", ratio, "x", most=1.1)


def sizes_of(given: list[int] | None, default: list[int]) -> list[int]:
    """The sizes to compare, ascending."""
    return sorted(set(given or default))


def command(
    rounds: Annotated[int, typer.Option(help="Messages, and calls of each kind, for each size.", min=1)] = 200,
    commands: Annotated[int, typer.Option(help="Whole commands of each kind for each size.", min=0)] = 10,
    drains: Annotated[int, typer.Option(help="How often each pending mailbox is drained.", min=0)] = 3,
    old: Annotated[
        list[int] | None,
        typer.Option("--old-rows", help="Old rows; repeatable. [default: 0, 1000, 100000 and 1000000]", min=0),
    ] = None,
    peers: Annotated[
        list[int] | None, typer.Option(help="Live peers; repeatable. [default: 1, 10 and 100]", min=1, max=500)
    ] = None,
    waiting: Annotated[
        list[int] | None,
        typer.Option(
            "--pending", help="Pending messages; repeatable. [default: 1, 100 and 10000]", min=1, max=MAX_PENDING
        ),
    ] = None,
    idle: Annotated[float, typer.Option(help="Watch idle peers for so many seconds.", min=0)] = 20.0,
    sessions: Annotated[int, typer.Option(help="Sessions that start at once; 0 for none.", min=0, max=500)] = 100,
    against: AgainstOption = None,
    json_to: JsonOption = None,
    plot_to: PlotOption = None,
) -> None:
    """Does a message cost more with a long history, many peers, or a full mailbox? And what do 100 sessions take?

    Example: python -m bench.scale --old-rows 0 --old-rows 100000 --rounds 100 --plot scale.svg
    """
    report = Report("Does a message cost more with a long history, many peers, or a full mailbox?")
    benches, theirs = old_rows(sizes_of(old, [0, 1_000, 100_000, 1_000_000]), rounds, commands, against)
    tell_old_rows(report, benches, theirs)
    present, commits = live_peers(sizes_of(peers, [1, 10, 100]), rounds, commands, idle)
    tell(report, "live peers", present, "present peers")
    report.target(f"commits of all peers in {idle:g} s of silence", commits, "", most=0)
    tell(report, "pending in the mailbox", pending(sizes_of(waiting, [1, 100, 10_000]), rounds, drains), "pending")
    if sessions > 1:
        tell_crowd(report, sessions, crowd(sessions, idle))
    report.finish(json_to, plot_to)


if __name__ == "__main__":
    main(command)
