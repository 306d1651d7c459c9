"""How many messages a second, at what CPU time each, and when has a broadcast reached the last of many?

The sessions are real `agentbus serve claude-mcp` processes over pipes; AGENTBUS_SYNC normal and full take turns. The
calls of a round are prepared before its clock starts, and written in large pieces. The clients only take bytes, count
and stamp, so the benchmark measures the servers. The clock stops when the recipient's client has the last event. After
that, the benchmark checks that each message came once, in the order of its sender.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import typer

from bench.member import Crew
from bench.processes import cpu_ms
from bench.report import AgainstOption, Failed, JsonOption, PlotOption, Report, main, median, progress
from bench.sessions import ANSWERS, EVENTS, Client, Contender, Field, contenders, fault, rivals

# While the clock runs, a sender's client only writes, in pieces of this size.
_PIECE_BYTES = 65_536

RATE = "messages a second, and CPU time of all sessions for each"
BROADCAST = "broadcast: call written -> event held by the last client, ms"
GROUP = "to a group of the same sessions, ms"


@dataclass
class Rates:
    """The rounds of one row: messages a second, CPU milliseconds for each, and what was wrong.

    `per_s` counts the messages that arrived; `sent_per_s` counts those that a program had sent.
    """

    is_ours: bool
    per_s: list[float] = field(default_factory=list)
    sent_per_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    faults: set[str] = field(default_factory=set)


def write(client: Client, data: bytes) -> None:
    """Write in pieces, as fast as the server takes them."""
    with suppress(OSError):  # the server has ended; waiting for its answers reports that
        for start in range(0, len(data), _PIECE_BYTES):
            client._stdin.write(data[start : start + _PIECE_BYTES])
            client._stdin.flush()


def spent_ms(pids: Iterable[int]) -> float | None:
    """The CPU time of the processes so far, in milliseconds; None if it cannot be read."""
    times = [cpu_ms(pid) for pid in pids]
    return None if None in times else sum(time for time in times if time is not None)


def tools_round(senders: list[Client], receiver: Client, count: int, rates: Rates) -> None:
    """Send `count` messages in total, as tool calls of all senders at once."""
    each = count // len(senders)
    lines = []
    for position, sender in enumerate(senders):
        calls = [
            sender.prepare_call("send_message", to="receiver", text=f"~{position}.{number}~ one of many messages")[1]
            for number in range(each)
        ]
        lines.append(b"\n".join(calls) + b"\n")
    answers = [sender.record(ANSWERS, each) for sender in senders]
    events = receiver.record(EVENTS, each * len(senders))
    pids = [client.process.pid for client in (*senders, receiver)]
    before_ms = spent_ms(pids)
    writers = [threading.Thread(target=write, args=pair, daemon=True) for pair in zip(senders, lines, strict=True)]
    began = time.perf_counter()
    for writer in writers:
        writer.start()
    ended = receiver.wait_for_tape(events, f"event {each * len(senders):,}")
    for sender, tape in zip(senders, answers, strict=True):
        sender.wait_for_tape(tape, f"answer {each:,}")
    after_ms = spent_ms(pids)
    for client in (*senders, receiver):
        client.reading()
    note(rates, each * len(senders), ended - began, before_ms, after_ms, fault(events.text(), len(senders), each))


def note(
    rates: Rates, count: int, took_s: float, before_ms: float | None, after_ms: float | None, wrong: str = ""
) -> None:
    """Record one round of `count` messages."""
    if wrong and rates.is_ours:
        raise Failed(f"of {count:,} messages {wrong}: no figure of this run is worth anything")
    if wrong:
        rates.faults.add(wrong)
    rates.per_s.append(count / took_s)
    if before_ms is not None and after_ms is not None:
        rates.cpu_ms.append((after_ms - before_ms) / count)


def program_round(crew: Crew, receiver: Client | Crew, count: int, rates: Rates) -> None:
    """Send `count` messages from a Python program, each awaited, to a session or to another program."""
    tape = receiver.record(EVENTS, count) if isinstance(receiver, Client) else None
    pids = [crew.pid, receiver.process.pid if isinstance(receiver, Client) else receiver.pid]
    before_ms = spent_ms(pids)
    if isinstance(receiver, Crew):
        receiver.ask(take=count)
    crew.ask(send=["receiver" if tape else "taker", count])
    began, sent = crew.answer()
    wrong = ""
    if isinstance(receiver, Client) and tape is not None:
        ended = receiver.wait_for_tape(tape, f"event {count:,}")
        receiver.reading()
        wrong = fault(tape.text(), 1, count)
    else:
        ended = receiver.answer()
    rates.sent_per_s.append(count / (sent - began))
    note(rates, count, max(sent, ended) - began, before_ms, spent_ms(pids), wrong)


def measure_rates(which: list[Contender], count: int, senders: int, rounds: int) -> dict[str, Rates]:
    """Measure the rates of each row: tools from one and from `senders`, programs to a session and to a program."""
    rows: dict[str, Rates] = {}
    turns: list[Callable[[], None]] = []
    crews: list[Crew] = []

    def add(label: str, one: Field, turn: Callable[[Rates], None]) -> None:
        rows[f"{label}, {one.label}"] = rates = Rates(one.is_ours)
        turns.append(lambda: turn(rates))

    with contenders(*which) as fields:
        try:
            names = ["receiver", *(f"sender{number}" for number in range(senders))]
            for one in fields:
                one.start(*names, shake=False)
                if one.is_ours:
                    crews += [Crew(one.home, name, **one.contender.variables) for name in ("program", "taker")]
            Field.shake([client for one in fields for client in one.started])
            for crew in crews:
                crew.joined()
            pairs = iter(zip(crews[::2], crews[1::2], strict=True))
            for one in fields:
                receiver, *many = one.started
                add("tools, 1 -> 1", one, partial(tools_round, many[:1], receiver, count))
                add(f"tools, {senders} -> 1", one, partial(tools_round, many, receiver, count))
                if one.is_ours:
                    program, taker = next(pairs)
                    add("Python API -> session", one, partial(program_round, program, receiver, count))
                    add("Python API -> Python API", one, partial(program_round, program, taker, count))
            for _ in progress(range(rounds), "rates"):
                for turn in turns:
                    turn()
        finally:
            for crew in crews:
                crew.close()
    return rows


def measure_broadcasts(sizes: list[int], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Measure how long until the last of so many peers has a broadcast, in milliseconds, by row.

    The second value is the same for messages to a group of all of them; the two take turns. There is one bus with two
    senders, because AGENTBUS_SYNC is a setting of the sender. For each sender, the other is one of the recipients.
    """
    samples: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})
    ways: tuple[dict[str, str], ...] = ({"tool": "broadcast"}, {"tool": "send_message", "to": "@everyone-here"})
    with contenders(Contender("normal"), Contender("full", variables={"AGENTBUS_SYNC": "full"})) as (normal, full):
        full.home = normal.home
        senders = {"sync normal": normal.start("one", shake=False)[0], "sync full": full.start("two", shake=False)[0]}
        normal.shake(list(senders.values()))
        everybody = list(senders.values())
        for size in sorted(sizes):
            names = [f"peer{number}" for number in range(len(everybody), size + 1)]
            everybody += normal.start(*names)
            for client in everybody:
                client.call("join_group", group="@everyone-here")
            for number in progress(range(rounds + 1), f"broadcast to {size}"):
                for label, sender in senders.items():
                    others = [client for client in everybody if client is not sender]
                    for way, found in zip(ways, samples, strict=True):
                        took_ms = one_broadcast(sender, others, **way)
                        if number:  # in the first round everything is cold, and some are starting
                            found.setdefault(f"1 -> {size}, {label}", []).append(took_ms)
    return samples


def one_broadcast(sender: Client, others: list[Client], *, tool: str, **more: str) -> float:
    """Send one message to all of them. Returns how long until the last of the others has it, in milliseconds."""
    time.sleep(0.1)  # until the messages of the broadcast before are marked
    request, line = sender.prepare_call(tool, text="~0.0~ to all", **more)
    tapes = [other.record(EVENTS, 1) for other in others]
    began = time.perf_counter()
    sender.send_line(line)
    ended = [other.wait_for_tape(tape, "the broadcast") for other, tape in zip(others, tapes, strict=True)]
    sender.sent(request)
    for other, tape in zip(others, tapes, strict=True):
        other.reading()
        wrong = fault(tape.text(), 1, 1)
        if wrong:
            raise Failed(f"of a broadcast {wrong}")
    return (max(ended) - began) * 1_000


def tell(
    report: Report, rows: dict[str, Rates], samples: dict[str, list[float]], to_group: dict[str, list[float]]
) -> None:
    """Add the tables."""
    for what, rates in rows.items():
        cost = {"CPU ms each": round(median(rates.cpu_ms), 3)} if rates.cpu_ms else {}
        per_s = {"median": round(median(rates.per_s)), "lowest": round(min(rates.per_s))}
        # A program has sent everything when its last await returned. Its messages can arrive later.
        sent = {"sent": round(median(rates.sent_per_s))} if rates.sent_per_s else {}
        order = ", ".join(sorted(rates.faults)) or "kept"
        report.add(RATE, what, **per_s, **sent, **cost, order=order, n=len(rates.per_s))
        report.samples.setdefault(RATE, {})[what] = rates.per_s
    for what in [row.removesuffix(", theirs") for row in rows if row.endswith(", theirs")]:
        for sync in ("sync normal", "sync full"):
            ours = f"{what}, {sync}"
            report.add_ratio(RATE, f"theirs / ours: {ours}", f"{what}, theirs", ours, "median", "lowest", "CPU ms each")
    report.draw_bars("messages a second", "messages/s, median", {what: median(row.per_s) for what, row in rows.items()})
    report.add_samples(BROADCAST, samples)
    report.add_samples(GROUP, to_group)
    if samples:
        report.draw_bars(BROADCAST, "ms, p50", {what: median(values) for what, values in samples.items()})
    # The targets hold for these sizes and for the default setting.
    report.target("one sender through the tools", median(rows["tools, 1 -> 1, sync normal"].per_s), "/s", least=4_000)
    for road in ("session", "Python API"):
        what = f"Python API -> {road}"
        report.target(what, median(rows[f"{what}, sync normal"].per_s), "/s", least=10_000)
    if "1 -> 50, sync normal" in samples:
        broadcast_ms = median(samples["1 -> 50, sync normal"])
        report.target("broadcast to 50, p50", broadcast_ms, "ms", most=30)
        times = median(to_group["1 -> 50, sync normal"]) / broadcast_ms
        # The two take turns: what is above 1 is the noise of the machine.
        report.target("to a group of 50 / broadcast to 50, p50", times, "times", most=1.1)


def command(
    count: Annotated[int, typer.Option(help="Messages in a round, in all.", min=50, max=8_000)] = 2_000,
    rounds: Annotated[int, typer.Option(help="Rounds of each row; the median is shown.", min=1)] = 5,
    senders: Annotated[int, typer.Option(help="Sessions that send to one at the same time.", min=2, max=50)] = 8,
    peers: Annotated[
        list[int] | None, typer.Option(help="Recipients of a broadcast; repeatable. [default: 20 and 50]", min=2)
    ] = None,
    broadcasts: Annotated[int, typer.Option(help="Broadcasts of each kind.", min=0)] = 20,
    against: AgainstOption = None,
    json_to: JsonOption = None,
    plot_to: PlotOption = None,
) -> None:
    """How many messages a second, at what CPU time each, and when has a broadcast reached the last of many?

    Example: python -m bench.throughput --count 2000 --peers 20 --json throughput.json
    """
    ours = [Contender(f"sync {sync}", variables={"AGENTBUS_SYNC": sync}) for sync in ("normal", "full")]
    report = Report("How many messages a second, at what CPU time each, and how long does a broadcast take?")
    rows = measure_rates([*ours, *rivals(against)], count, senders, rounds)
    samples, to_group = measure_broadcasts(peers or [20, 50], broadcasts) if broadcasts else ({}, {})
    tell(report, rows, samples, to_group)
    report.finish(json_to, plot_to)


if __name__ == "__main__":
    main(command)
