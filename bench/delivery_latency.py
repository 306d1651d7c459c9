"""How long from a call to the channel event in the other client, with nothing else going on, and where does it go?

The contenders are real `agentbus serve claude-mcp` sessions over pipes, a pair for each trigger, and beside them what
the machine itself charges (floor.py). They take turns. A turn is two messages, each after the pause. The first is not
counted: it only makes the second one "N ms after the one before" for every contender. The longer the silence, the
colder the caches. The caches, more than agentbus, decide what one message costs.

It measures three ways to send: `send_message` called by an MCP client, `send` of a Python program that has joined (this
process), and the first way again between traced sessions. Their stamps (traced.py) say how long each step takes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import anyio
import anyio.lowlevel
import typer

import agentbus
from agentbus import registry
from agentbus.core import config
from bench.floor import Floor
from bench.report import AgainstOption, JsonOption, PlotOption, Report, main, median, percentile, progress
from bench.sessions import TRACED, Client, Contender, Field, contenders, rivals, temporary
from bench.traced import STEPS, Trace, steps

# A pair that takes longer than this waits for a clock, for example a poll's. Rounds that follow each other would all
# meet the clock at the same point. So they come at random moments instead, and there is no row for each pause.
_CLOCK_MS = 10
_TRIALS = 5
_TRIAL_PAUSE_S = 0.03
AT_RANDOM = 0.0
# For a clock as slow as this, hundreds of rounds are not needed: a tenth is enough, but at least so many.
_SLOW_CLOCK_MS = 200
_SLOW_SHARE = 10
_SLOW_LEAST = 5

CALL = "tool call written -> event held by the other client, ms"
PROGRAM = "in-process send (Python API) -> event held by the client of a session, ms"
FLOOR = "floor of this machine, ms"


@dataclass
class Racer:
    """One contender in the turns. `one(pause_ms)` sends a message and returns how long it took, in milliseconds.

    `clock_ms` is the period of the clock that its messages wait for; 0 if they wait for none.
    """

    table: str
    label: str
    one: Callable[[float], float]
    clock_ms: float = 0.0
    samples: dict[float, list[float]] = field(default_factory=dict)


class Pair:
    """Two sessions; messages go from the first to the second."""

    def __init__(self, sender: Client, receiver: Client) -> None:
        self.sender = sender
        self.receiver = receiver
        # For each call: when it was written and when its event arrived, in nanoseconds, on the clock of the traces.
        self.instants: list[tuple[int, int]] = []

    def call(self, to: str, _pause_ms: float) -> float:
        """Call `send_message` once, to the session `to`. Returns how long it took, in milliseconds."""
        seen = len(self.receiver.events)
        request, line = self.sender.prepare_call("send_message", to=to, text="one round")
        written = time.perf_counter()
        self.sender.send_line(line)
        self.receiver.wait_events(seen + 1)
        held = self.receiver.events[seen][0]
        self.sender.sent(request)
        self.instants.append((round(written * 1e9), round(held * 1e9)))
        return (held - written) * 1_000


async def program_send(member: agentbus.Member, receiver: Client, to: str) -> float:
    """Call `send` once in this process. Returns how long until the client of session `to` has it, in milliseconds."""
    seen = len(receiver.events)
    began = time.perf_counter()
    await member.send(to, "one round")
    receiver.wait_events(seen + 1)
    return (receiver.events[seen][0] - began) * 1_000


class Race:
    """All racers of one run."""

    def __init__(self, folder: Path, fields: list[Field], stack: AsyncExitStack) -> None:
        self._folder = folder
        self._fields = fields
        self._stack = stack
        self.racers: list[Racer] = []
        self.traced: dict[str, Pair] = {}
        self._members: dict[str, tuple[agentbus.Member, Client]] = {}

    async def prepare(self) -> None:
        """Start all sessions."""
        for one in self._fields:
            one.start("frontend", "backend", shake=False)
            if one.is_ours:
                one.start("traced-one", "traced-two", shake=False, command=TRACED)
        Field.shake([client for one in self._fields for client in one.started])
        for one in self._fields:
            pair = Pair(*one.started[:2])
            clock_ms = self._clock_ms(pair)
            self.racers.append(Racer(CALL, one.label, partial(pair.call, "backend"), clock_ms))
            if not one.is_ours:
                continue
            traced = self.traced[one.label] = Pair(*one.started[2:])
            self.racers.append(Racer("traced", one.label, partial(traced.call, "traced-two"), clock_ms))
            member = await self._stack.enter_async_context(agentbus.join("program", home=one.home))
            self._members[one.label] = member, pair.receiver
            self.racers.append(Racer(PROGRAM, one.label, lambda _pause_ms: 0.0, clock_ms))
        floor = Floor(self._folder / "floor")
        self._stack.callback(floor.close)
        for label, one_ms in (
            ("a bare INSERT", floor.insert),
            ("a bare datagram, one way, asyncio reader", floor.datagram),
            ("a pipe, one way, blocking read", floor.pipe),
            ("all three in a row", floor.chain),
        ):
            self.racers.append(Racer(FLOOR, label, one_ms))

    def _clock_ms(self, pair: Pair) -> float:
        """The period of the clock that messages of this pair wait for; 0 if they wait for none."""
        times = []
        for _ in range(_TRIALS):
            # Long enough that no session is still busy with the message before. For a clock: it has just ticked.
            time.sleep(_TRIAL_PAUSE_S)
            times.append(pair.call("backend", 0))
        return median(times) if median(times) > _CLOCK_MS else 0.0

    async def _message(self, racer: Racer, pause_ms: float) -> float:
        # Not the event loop's sleep, which is late by up to a millisecond. The checkpoint lets the joined members run.
        await anyio.lowlevel.checkpoint()
        time.sleep(pause_ms / 1_000)
        if racer.table == PROGRAM:
            member, receiver = self._members[racer.label]
            return await program_send(member, receiver, "backend")
        return racer.one(pause_ms)

    async def run(self, rounds: int, pauses_ms: list[float]) -> None:
        """Run `rounds` turns for each racer and pause, fewer for a racer that waits for a slow clock."""
        every = max(1, rounds // max(_SLOW_LEAST, rounds // _SLOW_SHARE))
        clocked = [racer for racer in self.racers if racer.clock_ms]
        fast = [racer for racer in self.racers if not racer.clock_ms]
        for number in progress(range(rounds), "rounds"):
            for racer in clocked:
                if racer.clock_ms < _SLOW_CLOCK_MS or number % every == 0:
                    await anyio.sleep(random.uniform(0, racer.clock_ms / 1_000))
                    racer.samples.setdefault(AT_RANDOM, []).append(await self._message(racer, 0))
            for pause_ms in pauses_ms:
                for racer in fast:
                    await self._message(racer, pause_ms)
                    racer.samples.setdefault(pause_ms, []).append(await self._message(racer, pause_ms))


async def measure(
    folder: Path, fields: list[Field], rounds: int, pauses_ms: list[float]
) -> tuple[list[Racer], dict[str, list[dict[str, float]]]]:
    """Return the racers with their samples, and the steps of each traced message by trigger, in milliseconds."""
    async with AsyncExitStack() as stack:
        race = Race(folder, fields, stack)
        await race.prepare()
        await race.run(rounds, pauses_ms)
        broken_down = {}
        homes = {one.label: one.home for one in fields}
        for label, pair in race.traced.items():
            sender, receiver = (Trace(homes[label], client.process.pid) for client in (pair.sender, pair.receiver))
            # Only the second of a turn's two messages counts. A racer that waits for a clock has only one message.
            is_clocked = any(racer.clock_ms for racer in race.racers if racer.label == label)
            counted = pair.instants if is_clocked else pair.instants[1::2]
            broken_down[label] = [steps(sender, receiver, *instants) for instants in counted]
        return race.racers, broken_down


def after(label: str, pause_ms: float) -> str:
    """The name of a row."""
    return f"{label}, at random moments" if pause_ms == AT_RANDOM else f"{label}, after {pause_ms:g} ms"


def tell(
    report: Report, racers: list[Racer], pauses_ms: list[float]
) -> dict[tuple[str, str], dict[float, list[float]]]:
    """Add the tables of all samples. Returns the samples by table and label."""
    found = {(racer.table, racer.label): racer.samples for racer in racers}
    labels = list(dict.fromkeys(racer.label for racer in racers if racer.table == CALL))
    for label in labels:
        for table in (CALL, PROGRAM):
            by_pause = found.get((table, label))
            if by_pause is None:
                continue
            lines = {after(label, pause_ms): values for pause_ms, values in by_pause.items()}
            report.add_samples(table, lines)
            if table == CALL or AT_RANDOM not in by_pause:  # for a clock, one picture is enough
                report.draw_histogram(f"{label}: {table.removesuffix(', ms')}", "ms", lines)
    for pause_ms in pauses_ms:
        theirs = after("theirs", pause_ms if pause_ms in found.get((CALL, "theirs"), {}) else AT_RANDOM)
        for label in labels:
            if label != "theirs":
                ours = after(label, pause_ms)
                report.add_ratio(CALL, f"theirs / {ours}", theirs, ours, "p50", "p90", "p99", "max")
    for (table, label), by_pause in found.items():
        if table == FLOOR:
            report.add_samples(FLOOR, {after(label, pause_ms): by_pause[pause_ms] for pause_ms in pauses_ms})
    return found


def tell_steps(
    report: Report,
    found: dict[tuple[str, str], dict[float, list[float]]],
    broken_down: dict[str, list[dict[str, float]]],
) -> None:
    """Add the tables of the steps, beside the totals with and without tracing."""
    for label, messages in broken_down.items():
        pauses = list(found["traced", label])
        for position, pause_ms in enumerate(pauses):
            # A round goes through all pauses in turn, so the messages do too.
            mine = messages[position :: len(pauses)]
            title = f"where it goes: {after(label, pause_ms)} (traced), ms"
            by_step = {step: [message[step] for message in mine] for step in STEPS}
            report.add_samples(title, by_step)
            report.add_samples(title, {"total, traced": found["traced", label][pause_ms]})
            report.add_samples(title, {"total, not traced": found[CALL, label][pause_ms]})
            if pause_ms != AT_RANDOM:
                report.draw_bars(title, "ms, p50", {step: median(values) for step, values in by_step.items()})


def tell_targets(
    report: Report, found: dict[tuple[str, str], dict[float, list[float]]], pauses_ms: list[float]
) -> None:
    """Add the targets, for the socket trigger."""
    for pause_ms in pauses_ms:
        calls, sends = found.get((CALL, "socket"), {}), found.get((PROGRAM, "socket"), {})
        if pause_ms not in calls:
            return
        report.target(f"tool call -> event, after {pause_ms:g} ms, p50", median(calls[pause_ms]), "ms", most=1.0)
        report.target(
            f"tool call -> event, after {pause_ms:g} ms, p99", percentile(calls[pause_ms], 0.99), "ms", most=4
        )
        sent = median(sends[pause_ms])
        floor = [median(samples[pause_ms]) for (table, _), samples in found.items() if table == FLOOR]
        report.target(f"in-process send -> event, after {pause_ms:g} ms, p50", sent, "ms", most=0.6)
        parts = sum(floor[:3])
        report.target(f"  the same / (INSERT + datagram + pipe, {parts:.3g} ms)", sent / parts, "x", most=3)


def command(
    rounds: Annotated[
        int, typer.Option(help="How many counted messages after each pause; by poll a tenth.", min=1)
    ] = 200,
    pause_ms: Annotated[
        list[float] | None, typer.Option(help="A pause in milliseconds; repeatable. [default: 1, 5 and 20]", min=0.1)
    ] = None,
    trigger: Annotated[
        list[str] | None, typer.Option(help="A trigger to be measured; repeatable. [default: all]")
    ] = None,
    against: AgainstOption = None,
    json_to: JsonOption = None,
    plot_to: PlotOption = None,
) -> None:
    """How long does a spaced message take, by which trigger, and in which step?

    Example: python -m bench.delivery_latency --rounds 100 --pause-ms 5 --trigger socket --plot latency.svg
    """
    pauses_ms = list(dict.fromkeys(pause_ms or [1.0, 5.0, 20.0]))
    known = list(registry.Triggers(config.load()))
    for name in trigger or []:
        if name not in known:
            raise typer.BadParameter(f"there is no trigger {name!r}: use {' or '.join(known)}")
    ours = [Contender(name, variables={"AGENTBUS_TRIGGER": name}) for name in dict.fromkeys(trigger or known)]
    report = Report("How long does a spaced message take, by which trigger, and in which step?")
    with temporary() as folder, contenders(*ours, *rivals(against)) as fields:
        racers, broken_down = anyio.run(measure, folder, fields, rounds, pauses_ms)
    found = tell(report, racers, pauses_ms)
    tell_steps(report, found, broken_down)
    tell_targets(report, found, pauses_ms)
    report.finish(json_to, plot_to)


if __name__ == "__main__":
    main(command)
