"""How long does a search take in a long history, the first time and later, and what does it cost those who send?

Two buses have the same messages. One of them is searched, the other never, so that a send can be compared. The texts
have 4 to 30 words from a vocabulary of 50,000, which are as unevenly frequent as the words of a language: the first
stands in three of four messages, the last in one of 100,000.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import accumulate, islice
from pathlib import Path
from typing import Annotated

import apsw
import typer

from agentbus.core.bus import Bus, now_ms
from bench.report import Failed, JsonOption, PlotOption, Report, main, median, progress
from bench.scale import BATCH_ROWS, command_ms, execute, open_bus
from bench.sessions import Contender, contenders
from tests.support.command import clean_env

_WORDS = 50_000
_INSERT = (
    "INSERT INTO messages (sender, recipient, body, sent_at, delivered_at, carrier) VALUES (?, ?, ?, ?, ?, 'channel')"
)
# Which words of the vocabulary are searched for, by how frequent they are.
_KINDS = {
    "a word of 3 in 4 messages": "{0}",
    "a word of 1 in 8": "{10}",
    "a word of 1 in 70": "{100}",
    "a word of 1 in 700": "{1000}",
    "a word of 1 in 14,000": "{20000}",
    "a word that is nowhere": "nowhere",
    "two frequent words": "{0} {10}",
    "two frequent words, one of them, or the other": "{10} OR {11}",
    "a frequent phrase": '"{0} {10}"',
    "a beginning of three letters": "{prefix}*",
}
_PEER = "a word of 1 in 8, of one peer"
FIRST, LATER = "the first search", "a later search, a call: ms"
SENDS, PRUNES = "send, a call: ms", "prune 1,000 messages: ms"


def vocabulary() -> list[str]:
    """Words that are no words, the same in each run."""
    chance = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(chance.choices(letters, k=chance.randint(3, 10))) for _ in range(_WORDS)]


def messages(count: int, words: list[str]) -> Iterator[tuple[str, str, str, int, int]]:
    """The rows of `count` messages between 200 peers."""
    chance = random.Random(2)
    weights = list(accumulate(1 / (number + 1) for number in range(len(words))))
    now = now_ms() - count
    for number in range(count):
        text = " ".join(chance.choices(words, cum_weights=weights, k=chance.randint(4, 30)))
        yield f"peer-{number % 200}", f"peer-{(number + 7) % 200}", text, now + number, now + number


def fill(bus: Bus, count: int, words: list[str]) -> None:
    """Put `count` delivered messages into the mailboxes."""
    rows = messages(count, words)
    connection = apsw.Connection(str(bus.store.path))
    try:
        for _ in progress(range(0, count, BATCH_ROWS), f"{count:,} messages"):
            with connection:
                connection.executemany(_INSERT, islice(rows, BATCH_ROWS))
    finally:
        connection.close()
    execute(bus, "PRAGMA wal_checkpoint(TRUNCATE)")


def first_search(report: Report, bus: Bus, home: Path, word: str) -> None:
    """Run the command for the first time, and send meanwhile."""
    before = bus.store.path.stat().st_size
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "agentbus", "search", word],
        env=clean_env(home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    sends: list[float] = []
    usage = None
    while usage is None:
        sends += timed_sends(bus, 1)
        time.sleep(0.005)
        pid, status, found = os.wait4(child.pid, os.WNOHANG)
        if pid:
            usage = found
            child.returncode = os.waitstatus_to_exitcode(status)
    took_s = time.perf_counter() - began
    assert child.stderr is not None
    lines = child.stderr.read().decode().splitlines()
    child.stderr.close()
    if child.returncode:
        raise Failed(f"agentbus search: {lines}")
    execute(bus, "PRAGMA wal_checkpoint(TRUNCATE)")
    memory = usage.ru_maxrss / (1 << 10 if sys.platform == "linux" else 1 << 20)
    report.add(FIRST, "the whole command, s", value=round(took_s, 2))
    report.add(FIRST, "its CPU time, s", value=round(usage.ru_utime + usage.ru_stime, 2))
    report.add(FIRST, "its memory at most (RSS), MB", value=round(memory, 1))
    report.add(FIRST, "the database before, MB", value=round(before / 1e6, 1))
    report.add(FIRST, "the index, MB", value=round((bus.store.path.stat().st_size - before) / 1e6, 1))
    report.add(FIRST, "lines of progress on stderr", value=len(lines))
    report.target("the first search", took_s, "s", most=30)
    report.add_samples(SENDS, {"while the index is made": sends})


def timed_sends(bus: Bus, count: int) -> list[float]:
    """Send messages to a mailbox that nobody empties; how long each took, in milliseconds.

    Without looking for names like it, which `Bus.send` does for one that nobody has.
    """
    took = []
    for _ in range(count):
        began = time.perf_counter()
        bus.store.send("program", "offline", "one round", now=now_ms())
        took.append((time.perf_counter() - began) * 1_000)
    return took


def later_searches(report: Report, bus: Bus, words: list[str], rounds: int) -> None:
    """Search for each kind of words, by a call of all that the command does."""
    index = bus.store.search_index()
    samples: dict[str, list[float]] = {}
    for _ in progress(range(rounds), "searches"):
        for kind, pattern in {**_KINDS, _PEER: "{10}"}.items():
            said = pattern.replace("{prefix}", words[1_000][:3])
            for number in (0, 10, 11, 100, 1_000, 20_000):
                said = said.replace(f"{{{number}}}", words[number])
            began = time.perf_counter()
            index.search(said, limit=20, peer="peer-7" if kind == _PEER else None)
            samples.setdefault(kind, []).append((time.perf_counter() - began) * 1_000)
    report.add_samples(LATER, samples)
    report.draw_histogram(LATER, "ms", samples)
    slowest = max(samples, key=lambda kind: median(samples[kind]))
    report.target(f"a later search, p50 of the slowest kind ({slowest})", median(samples[slowest]), "ms", most=50)


def compare(report: Report, searched: Bus, plain: Bus, rounds: int) -> None:
    """Send on both buses in turn, then prune on both in turn."""
    sends: dict[str, list[float]] = {"never searched": [], "searched": []}
    prunes: dict[str, list[float]] = {"never searched": [], "searched": []}
    for bus in (searched, plain):
        execute(bus, "PRAGMA wal_checkpoint(TRUNCATE)")
    for number in progress(range(rounds), "sends"):
        order = [("never searched", plain), ("searched", searched)]
        for what, bus in order if number % 2 else order[::-1]:
            sends[what] += timed_sends(bus, 10)[1:]  # the first one after the other bus finds cold caches
    for _ in progress(range(rounds // 10 + 1), "prunes"):
        for what, bus in (("never searched", plain), ("searched", searched)):
            began = time.perf_counter()
            bus.store.prune(now_ms(), 1_000)
            prunes[what].append((time.perf_counter() - began) * 1_000)
    report.add_samples(SENDS, sends)
    report.add_samples(PRUNES, prunes)
    ratio = median(sends["searched"]) / median(sends["never searched"])
    report.target("send: searched / never searched", ratio, "x", most=1.03)


def command(
    count: Annotated[int, typer.Option("--messages", help="Messages in the history.", min=1)] = 1_000_000,
    rounds: Annotated[int, typer.Option(help="Searches of each kind, and tens of sends on each bus.", min=1)] = 100,
    commands: Annotated[int, typer.Option(help="Whole commands.", min=1)] = 10,
    json_to: JsonOption = None,
    plot_to: PlotOption = None,
) -> None:
    """How long does a search take in a long history, the first time and later, and what does it cost those who send?

    Example: python -m bench.search --messages 100000 --rounds 20
    """
    report = Report("How long does a search take in a long history?")
    words = vocabulary()
    with ExitStack() as stack, contenders(Contender("plain"), Contender("searched")) as (plain, searched):
        with ExitStack() as filling:
            fill(open_bus(plain.home, filling), count, words)
        searched.home.mkdir(mode=0o700, exist_ok=True)
        shutil.copy(plain.home / "bus.db", searched.home / "bus.db")
        buses = {one.label: open_bus(one.home, stack) for one in (plain, searched)}
        first_search(report, buses["searched"], searched.home, words[1_000])
        later_searches(report, buses["searched"], words, rounds)
        compare(report, buses["searched"], buses["plain"], rounds)
        took = [
            command_ms(searched.home, "search", words[1_000], stderr=subprocess.DEVNULL)
            for _ in progress(range(commands), "commands")
        ]
        report.add_samples("a later search, the whole command: ms", {"a word of 1 in 700": took})
    report.finish(json_to, plot_to)


if __name__ == "__main__":
    main(command)
