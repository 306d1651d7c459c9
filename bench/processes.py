"""What the system reports about a process: its CPU time, how often it went to sleep, its memory.

Linux only, from proc(5). On other systems every answer is None, and the tables leave out the columns that need it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Memory", "cpu_ms", "cpu_ticks", "memory", "wakeups"]


@dataclass(frozen=True, slots=True)
class Memory:
    """In MB of 10^6 bytes. `private_mb`: its private pages, clean and dirty, which would become free if it ended.

    `share_mb`: these, and its share of the pages that it has in common with others.
    """

    rss_mb: float
    private_mb: float
    share_mb: float


def _of_threads(pid: int, file: str) -> list[str]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):  # the thread has ended meanwhile
            found.append((task / file).read_text())
    return found


def cpu_ms(pid: int) -> float | None:
    """The CPU time of all running threads in milliseconds, exact to the nanosecond if the kernel reports it."""
    times = [text.split()[0] for text in _of_threads(pid, "schedstat")]
    return sum(int(time) for time in times) / 1e6 if times else None


def cpu_ticks(pid: int) -> int | None:
    """The CPU time as the system counts it, in ticks (mostly of 10 ms)."""
    try:
        # The command name stands in parentheses, and can itself contain spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[11]) + int(fields[12])


def wakeups(pid: int) -> int | None:
    """How often its threads went to sleep by themselves and were woken."""
    lines = [line for text in _of_threads(pid, "status") for line in text.splitlines()]
    counts = [int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches")]
    return sum(counts) if counts else None


def memory(pid: int) -> Memory | None:
    """How much memory the process uses; None if it cannot be read."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    private = kib["Private_Clean"] + kib["Private_Dirty"]
    return Memory(kib["Rss"] * 1.024e-3, private * 1.024e-3, kib["Pss"] * 1.024e-3)
