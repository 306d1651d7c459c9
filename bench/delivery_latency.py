"""How long from a tool call to the channel event in the other client, with nothing else going on?

Two real `agentbus serve claude-mcp` processes over pipes, one round after the other: the clock starts when the call is
written, and stops when the other client has read the event. The rounds of different pauses take turns, because the
longer a machine has been idle the colder its caches are: that, more than agentbus, decides what one message costs.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from tests.helpers import RawClient, clients


def percentile(sorted_ms: list[float], share: float) -> float:
    """The value below which `share` of a sorted list lies, by nearest rank."""
    return sorted_ms[min(len(sorted_ms) - 1, int(share * len(sorted_ms)))]


def one_round(sender: RawClient, receiver: RawClient, number: int) -> float:
    """The delivery time of message `number`, in milliseconds."""
    request, line = sender.prepare_call("send_message", to="backend", text=f"round {number}")
    called_at = time.perf_counter()
    sender.send_line(line)
    receiver.wait_events(number + 1)
    took_ms = (receiver.events[number][0] - called_at) * 1_000
    sender.result(request)
    return took_ms


def measure(home: Path, rounds: int, pauses_ms: list[float]) -> dict[float, list[float]]:
    """The delivery times of `rounds` messages after each of the pauses, in milliseconds."""
    times: dict[float, list[float]] = {pause_ms: [] for pause_ms in pauses_ms}
    with clients() as start:
        frontend, backend = start(home, "frontend"), start(home, "backend")
        frontend.handshake()
        backend.handshake()
        time.sleep(0.5)  # the ready gate
        number = 0
        for _ in range(rounds):
            for pause_ms in pauses_ms:
                time.sleep(pause_ms / 1_000)
                times[pause_ms].append(one_round(frontend, backend, number))
                number += 1
    return times


def main(
    rounds: Annotated[int, typer.Option(help="How many messages after each pause.", min=1)] = 300,
    pause_ms: Annotated[
        list[float] | None, typer.Option(help="A pause in milliseconds; repeatable. [default: 1, 5 and 20]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line instead of a table.")] = False,
) -> None:
    """Measure the delivery time of spaced messages between two sessions.

    Example: python -m bench.delivery_latency --rounds 300 --pause-ms 5
    """
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder:
        times = measure(Path(folder, "bus"), rounds, pause_ms or [1.0, 5.0, 20.0])
    if not as_json:
        print("pause ms   p50 ms   p90 ms   p99 ms   max ms")
    for pause, taken in times.items():
        ordered = sorted(taken)
        figures = [round(percentile(ordered, share), 3) for share in (0.5, 0.9, 0.99)] + [round(ordered[-1], 3)]
        if as_json:
            print(json.dumps({"pause_ms": pause, **dict(zip(("p50", "p90", "p99", "max"), figures, strict=True))}))
        else:
            print(f"{pause:8g}" + "".join(f"{figure:9.2f}" for figure in figures))


if __name__ == "__main__":
    typer.run(main)
