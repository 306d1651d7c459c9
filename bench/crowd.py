"""What so many sessions take together: their start, a broadcast, idling, memory. A part of bench.scale."""

from __future__ import annotations

import time
from dataclasses import dataclass

from agentbus.core.session import HEARTBEAT_S
from bench.processes import cpu_ms, memory
from bench.report import Report, median, progress
from bench.sessions import Contender, contenders
from bench.throughput import one_broadcast

__all__ = ["BROADCASTS", "Crowd", "crowd", "tell_crowd"]

BROADCASTS = 20


@dataclass
class Crowd:
    """What so many sessions take. None where the system does not tell."""

    up_s: float
    broadcasts_ms: list[float]
    idle_percent: float | None
    memory_mb: float | None


def crowd(count: int, idle_s: float) -> Crowd:
    """Start so many sessions at once, leave them alone, then let one broadcast to the others.

    Each is up when it has answered its client's first call.
    """
    with contenders(Contender(f"{count} sessions")) as (one,):
        began = time.perf_counter()
        started = one.start(*(f"session{number}" for number in range(count)), shake=False)
        one.shake(started, gate_s=0)
        up_s = time.perf_counter() - began
        # Until all have passed the ready gate, have looked for their client's inbox, and have had the first heartbeat,
        # which reads what the later ones need not.
        time.sleep(HEARTBEAT_S + 3.0)
        pids = [client.process.pid for client in started]
        before = [cpu_ms(pid) for pid in pids]
        time.sleep(idle_s)
        spent = [a - b for a, b in zip(map(cpu_ms, pids), before, strict=True) if a is not None and b is not None]
        took_ms = [
            one_broadcast(started[0], started[1:], tool="broadcast")
            for _ in progress(range(BROADCASTS + 1), "broadcasts")
        ]
        shares = [found.share_mb for found in map(memory, pids) if found is not None]
        return Crowd(
            up_s,
            took_ms[1:],  # the first one is cold
            sum(spent) / idle_s / 10 if len(spent) == count and idle_s else None,
            sum(shares) if len(shares) == count else None,
        )


def tell_crowd(report: Report, count: int, found: Crowd) -> None:
    """Add the table of many sessions, and its targets."""
    told = {
        "all up, s": round(found.up_s, 1),
        "broadcast to the others, p50, ms": round(median(found.broadcasts_ms), 1),
        "idle, % of a core": None if found.idle_percent is None else round(found.idle_percent, 2),
        "memory, MB": None if found.memory_mb is None else round(found.memory_mb),
    }
    known = {what: value for what, value in told.items() if value is not None}
    report.add(f"{count} sessions", "all together", **known)
    report.samples.setdefault(f"{count} sessions", {})["broadcast, ms"] = found.broadcasts_ms
    if count == 100:
        for (what, value), most in zip(told.items(), (15, 80, 1, 2_500), strict=True):
            if value is not None:
                name, _, unit = what.rpartition(", ")
                report.target(f"100 sessions: {name}", value, unit, most=most)
