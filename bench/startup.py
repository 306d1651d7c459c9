"""How soon is a session there, what does it take, and what does it do while nothing happens?

Times count from before the process is created, until `initialize`, `tools/list` and the first tool call are answered. A
session starts alone, and with as many others at once as you like. Then the benchmark measures the memory and the CPU
time of a session that has sent 20 messages, with and without the MCP SDK, and for each trigger what a session does
during a time of silence. It also measures `agentbus send` and `agentbus ask` as whole processes, as a hook pays for
them; a Python program answers the questions at once. A bare server on the same SDK (bare_server.py) and a bare `import
apsw` show which part of the cost is not ours.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from agentbus import registry
from agentbus.core import config
from agentbus.core.session import HEARTBEAT_S
from bench.member import Crew
from bench.processes import cpu_ms, cpu_ticks, memory, wakeups
from bench.report import AgainstOption, JsonOption, PlotOption, Report, main, median, progress
from bench.sessions import Client, Contender, Field, contenders, rivals, together
from tests.support.client import INITIALIZE
from tests.support.command import clean_env

PHASES = ("initialize answered", "tools/list answered", "first tool call answered", "a call through the SDK answered")
# The silence is measured in slices of this length, short enough to tell a heartbeat from the rest.
_SLICE_S = 1.0
BARE = "a bare SDK server"
OURS = "agentbus"
WITH_SDK = "agentbus, with the SDK"
# How many messages a session has sent when its memory and CPU time are taken.
_SENT = 20
SEND = "agentbus send"
ASK = "agentbus ask"
APSW = "python -c 'import apsw'"


@dataclass
class Starts:
    """The start times of one contender by phase, in milliseconds since exec: alone, and the last of many."""

    alone: dict[str, list[float]] = field(default_factory=dict)
    last: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Taken:
    """What the sessions of one contender had taken in all, a value for each."""

    rss_mb: list[float] = field(default_factory=list)
    private_mb: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Idle:
    """What one session did in `seconds` of silence. `between_ms` is its CPU time without the seconds of heartbeats."""

    seconds: float
    cpu_ms: float
    between_ms: float
    cpu_ticks: int
    wakeups: int


def command_of(one: Field) -> Sequence[str]:
    """The command that starts a session, if it is not the contender's own command; else empty."""
    return (sys.executable, "-m", "bench.bare_server") if one.label == BARE else ()


def phases(one: Field, name: str) -> dict[str, float]:
    """Start one session, as Claude Code would. Returns how long until each phase is reached, in milliseconds."""
    began = time.perf_counter()
    (client,) = one.start(name, shake=False, command=command_of(one))
    reached = [answered_at(client, client.post("initialize", INITIALIZE))]
    client.notify("notifications/initialized")
    reached.append(answered_at(client, client.post("tools/list")))
    # The recipient is nobody: this measures the answer, not a delivery.
    reached.append(answered_at(client, client.post_call("send_message", to="nobody", text="hello")))
    reached.append(answered_at(client, post_to_sdk(client)))
    return {phase: (at - began) * 1_000 for phase, at in zip(PHASES, reached, strict=True)}


def post_to_sdk(client: Client) -> int:
    """Call a tool with a field that is not in the protocol, so that ours leaves it to the SDK. Returns its id."""
    request_id: int = client.post("tools/call", {"name": "whoami", "arguments": {}, "unknown": 1})
    return request_id


def answered_at(client: Client, request_id: int) -> float:
    """When the answer came."""
    client.answer(request_id)
    return client._by_id[request_id][0]


def measure_starts(fields: list[Field], rounds: int, at_once: int) -> dict[str, Starts]:
    """Start each contender alone and several at once, in turn. Returns the results by label."""
    found = {one.label: Starts() for one in fields}
    for number in progress(range(rounds + 1), "starts"):
        for one in fields:
            starts = found[one.label]
            alone = phases(one, "first")
            one.end()
            if number == 0:
                continue  # the first start reads its files from the disk
            for phase, took_ms in alone.items():
                starts.alone.setdefault(phase, []).append(took_ms)
            if at_once > 1:
                many = together([lambda one=one, n=n: phases(one, f"session{n}") for n in range(at_once)])
                one.end()
                for phase in PHASES:
                    starts.last.setdefault(phase, []).append(max(each[phase] for each in many))
    return found


def measure_taken(fields: list[Field], rounds: int) -> dict[str, Taken]:
    """Measure what a session that has sent 20 messages has taken, in turn. Returns the results by label."""
    found: dict[str, Taken] = {}
    for _ in progress(range(rounds), "memory and CPU time"):
        for one in fields:
            (client,) = one.start("one", shake=False, command=command_of(one))
            client.handshake()
            for _ in range(_SENT):
                client.answer(client.post_call("send_message", to="nobody", text="hello"))
            take(found, one.label, client.process.pid)
            if one.label == OURS:
                client.answer(post_to_sdk(client))
                take(found, WITH_SDK, client.process.pid)
            one.end()
    return found


def take(found: dict[str, Taken], label: str, pid: int) -> None:
    """Add what the process has taken so far, where the system tells."""
    sizes, cpu = memory(pid), cpu_ms(pid)
    if sizes is not None and cpu is not None:
        taken = found.setdefault(label, Taken())
        taken.rss_mb.append(sizes.rss_mb)
        taken.private_mb.append(sizes.private_mb)
        taken.cpu_ms.append(cpu)


def measure_idle(fields: list[Field], seconds: float) -> dict[str, Idle]:
    """Measure what a session of each contender does while nothing happens, all at once. Returns them by label."""
    clients = {one.label: one.start("idle", shake=False, command=command_of(one))[0] for one in fields}
    together([client.handshake for client in clients.values()])
    together(
        [lambda c=client: c.answer(c.post_call("send_message", to="nobody", text="x")) for client in clients.values()]
    )
    # Time for the ready gate, the first drain and the rest of the start.
    time.sleep(min(3.0, seconds))
    samples = {label: [counters(client.process.pid)] for label, client in clients.items()}
    slices = max(1, round(seconds / _SLICE_S))
    for _ in progress(range(slices), "silence"):
        time.sleep(seconds / slices)
        for label, client in clients.items():
            samples[label].append(counters(client.process.pid))
    found = {label: idle for label, taken in samples.items() if (idle := summed_up(taken, seconds)) is not None}
    for one in fields:
        one.end()
    return found


def summed_up(taken: Sequence[tuple[float, float, float] | None], seconds: float) -> Idle | None:
    """What a session did, from its counters at the ends of equal slices of time; None if they cannot be read."""
    known = [counted for counted in taken if counted is not None]
    if len(known) < len(taken):
        return None
    cpu, ticks, woken = (known[-1][place] - known[0][place] for place in range(3))
    by_slice = sorted(after[0] - before[0] for before, after in pairwise(known))
    # We cannot see which slices had a heartbeat, so we take those that cost most.
    beats = min(len(by_slice) - 1, math.ceil(seconds / HEARTBEAT_S))
    return Idle(seconds, cpu, sum(by_slice[: len(by_slice) - beats]), round(ticks), round(woken))


def counters(pid: int) -> tuple[float, float, float] | None:
    """CPU time in milliseconds and in ticks, and wake-ups, so far."""
    cpu, ticks, woken = cpu_ms(pid), cpu_ticks(pid), wakeups(pid)
    return None if cpu is None or ticks is None or woken is None else (cpu, ticks, woken)


def measure_commands(runs: int) -> dict[str, list[float]]:
    """Time whole processes, in milliseconds: `agentbus send` and `ask`, and those they are compared with, in turn."""
    script = Path(sys.executable).with_name("agentbus")
    ours = [str(script)] if script.exists() else [sys.executable, "-m", "agentbus"]
    with contenders(Contender("live"), Contender("quiet")) as (live, quiet):
        live.start("receiver")
        answering = Crew(live.home, "oracle")
        answering.joined()
        answering.ask(reply=runs + 1)
        commands = {
            SEND: (live.home, [*ours, "send", "receiver", "hello"]),
            # The last process to close a database merges its WAL. If nobody is online, the sender pays for that.
            f"{SEND}, nobody online": (quiet.home, [*ours, "send", "nobody", "hello"]),
            ASK: (live.home, [*ours, "ask", "oracle", "which port?"]),
            APSW: (quiet.home, [sys.executable, "-c", "import apsw"]),
            "python -c pass": (quiet.home, [sys.executable, "-c", "pass"]),
        }
        samples: dict[str, list[float]] = {what: [] for what in commands}
        for number in progress(range(runs + 1), "commands"):
            for what, (home, words) in commands.items():
                began = time.perf_counter()
                subprocess.run(words, env=clean_env(home), stdout=subprocess.DEVNULL, check=True)
                if number:
                    samples[what].append((time.perf_counter() - began) * 1_000)
        answering.close()
    return samples


def tell_starts(report: Report, found: dict[str, Starts], at_once: int) -> None:
    """Add the tables of times and of memory."""
    for title, pick in (("alone", "alone"), (f"the last of {at_once} at once", "last")):
        table = f"exec -> ..., {title}, ms"
        for label, starts in found.items():
            report.add_samples(table, {f"{label}: {phase}": times for phase, times in getattr(starts, pick).items()})
        for phase in PHASES:
            report.add_ratio(table, f"theirs / {OURS}: {phase}", f"theirs: {phase}", f"{OURS}: {phase}", "p50", "max")
        bars = {str(row[""]): row["p50"] for row in report.tables.get(table, []) if "n" in row}
        if bars:
            report.draw_bars(table, "ms, p50", bars)


def tell_taken(report: Report, found: dict[str, Taken]) -> None:
    """Add the table of memory and CPU time."""
    table = f"memory and CPU time of a session after {_SENT} messages"
    for label, taken in found.items():
        report.add(
            table,
            label,
            **{
                "RSS MB": round(median(taken.rss_mb), 1),
                "private MB": round(median(taken.private_mb), 1),
                "CPU ms": round(median(taken.cpu_ms)),
            },
        )
    report.add_ratio(table, f"theirs / {OURS}", "theirs", OURS, "RSS MB", "private MB", "CPU ms")


def tell_idle(report: Report, found: dict[str, Idle]) -> None:
    """Add the table of what a session does while nothing happens."""
    for label, idle in found.items():
        report.add(
            f"idle for {idle.seconds:g} s",
            label,
            **{
                "CPU ms": round(idle.cpu_ms, 2),
                "between heartbeats": round(idle.between_ms, 2),
                "CPU ticks": idle.cpu_ticks,
                "wake-ups a second": round(idle.wakeups / idle.seconds, 2),
                "heartbeats": f"{idle.seconds / HEARTBEAT_S:.1f}" if label.startswith("trigger") else "",
            },
        )


def tell_targets(
    report: Report,
    found: dict[str, Starts],
    taken: dict[str, Taken],
    at_once: int,
    idle: dict[str, Idle],
    commands: dict[str, list[float]],
) -> None:
    """Add the targets."""
    ours = found[OURS]
    _, listed, called, _ = PHASES
    report.target("exec -> tools/list answered, alone, p50", median(ours.alone[listed]), "ms", most=200)
    report.target("exec -> first tool call answered, alone, p50", median(ours.alone[called]), "ms", most=200)
    if at_once == 8:
        report.target("exec -> tools/list answered, last of 8, p50", median(ours.last[listed]), "ms", most=1_000)
        report.target("exec -> first tool call answered, last of 8, p50", median(ours.last[called]), "ms", most=1_000)
    if taken:
        mine, bare = taken[OURS], taken[BARE]
        for what in ("rss_mb", "private_mb", "cpu_ms"):
            ratio = median(getattr(mine, what)) / median(getattr(bare, what))
            report.target(f"{what.split('_')[0]} of a session / of {BARE}", ratio, "x", most=0.5)
    socket = idle.get("trigger socket")
    if socket is not None:
        tick_ms = 1_000 / os.sysconf("SC_CLK_TCK")
        report.target("idle: CPU between heartbeats", math.floor(socket.between_ms / tick_ms), "ticks", most=0)
        report.target("idle: wake-ups", socket.wakeups / socket.seconds, "/s", most=1)
    imported = median(commands[APSW])
    for what, most_ms, most in ((SEND, 35, 2), (f"{SEND}, nobody online", 35, 2), (ASK, 35, 2)):
        report.target(f"{what}, p50", median(commands[what]), "ms", most=most_ms)
        report.target(
            f"  the same / import apsw ({imported:.3g} ms)", median(commands[what]) / imported, "x", most=most
        )


def command(
    rounds: Annotated[int, typer.Option(help="Starts of each kind.", min=1)] = 7,
    at_once: Annotated[int, typer.Option(help="How many start at the same time; 1 for none.", min=1)] = 8,
    idle: Annotated[float, typer.Option(help="Seconds of silence; 0 for none.", min=0)] = 30.0,
    runs: Annotated[int, typer.Option(help="Runs of each whole command.", min=1)] = 20,
    against: AgainstOption = None,
    json_to: JsonOption = None,
    plot_to: PlotOption = None,
) -> None:
    """How soon is a session there, what does it take, and what does it do while nothing happens?

    Example: python -m bench.startup --rounds 3 --at-once 8 --idle 30 --json startup.json
    """
    report = Report("How soon is a session there, what does it take, and what does it do while nothing happens?")
    others = [Contender(BARE), *rivals(against)]
    with contenders(Contender(OURS), *others) as fields:
        found = measure_starts(fields, rounds, at_once)
        taken = measure_taken(fields, rounds)
    quiet: dict[str, Idle] = {}
    if idle:
        triggers = list(registry.Triggers(config.load()))
        ours = [Contender(f"trigger {name}", variables={"AGENTBUS_TRIGGER": name}) for name in triggers]
        with contenders(*ours, *others) as fields:
            quiet = measure_idle(fields, idle)
    commands = measure_commands(runs)
    tell_starts(report, found, at_once)
    tell_taken(report, taken)
    tell_idle(report, quiet)
    report.add_samples("whole processes, ms", commands)
    report.draw_bars("whole processes", "ms, p50", {what: median(times) for what, times in commands.items()})
    tell_targets(report, found, taken, at_once, quiet, commands)
    report.finish(json_to, plot_to)


if __name__ == "__main__":
    main(command)
