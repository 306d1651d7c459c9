"""How long from a tool call to the channel event in the other client, with nothing else going on?

Two real `agentbus serve claude-mcp` processes over pipes, one spaced round after the other: the clock starts before the
call is written, and stops when the other client has read the event.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from tests.helpers import clients


def percentile(sorted_ms: list[float], share: float) -> float:
    """The value below which `share` of a sorted list lies, by nearest rank."""
    return sorted_ms[min(len(sorted_ms) - 1, int(share * len(sorted_ms)))]


def measure(home: Path, rounds: int, pause_ms: float) -> list[float]:
    """The delivery times of `rounds` messages, in milliseconds, in order."""
    times: list[float] = []
    with clients() as start:
        frontend, backend = start(home, "frontend"), start(home, "backend")
        frontend.handshake()
        backend.handshake()
        time.sleep(0.5)  # the ready gate
        for number in range(rounds):
            time.sleep(pause_ms / 1_000)
            called_at = time.perf_counter()
            request = frontend.post_call("send_message", to="backend", text=f"round {number}")
            backend.wait_events(number + 1)
            times.append((backend.events[number][0] - called_at) * 1_000)
            frontend.result(request)
    return times


def main(
    rounds: Annotated[int, typer.Option(help="How many messages.", min=1)] = 300,
    pause_ms: Annotated[float, typer.Option(help="Pause before each, in milliseconds.", min=0)] = 20.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a line.")] = False,
) -> None:
    """Measure the delivery time of spaced messages between two sessions.

    Example: python -m bench.delivery_latency --rounds 300
    """
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder:
        times = sorted(measure(Path(folder, "bus"), rounds, pause_ms))
    result = {
        "rounds": rounds,
        **{name: round(percentile(times, share), 3) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))},
        "max": round(times[-1], 3),
    }
    print(json.dumps(result) if as_json else f"delivery, ms: {result}")


if __name__ == "__main__":
    typer.run(main)
