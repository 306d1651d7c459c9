"""How many messages a second from one session to another, and when has a broadcast reached the last of many?

Real `agentbus serve claude-mcp` processes over pipes. The messages are pipelined: all calls are written before the
first answer is looked at, and the clock stops when the other client has read the last event.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from tests.helpers import RawClient, clients


def one_to_one(home: Path, count: int) -> float:
    """Messages per second of `count` pipelined calls."""
    with clients() as start:
        sender, receiver = start(home, "frontend"), start(home, "backend")
        sender.handshake()
        receiver.handshake()
        time.sleep(0.5)  # the ready gate
        began = time.perf_counter()
        requests = [sender.post_call("send_message", to="backend", text=f"message {n}") for n in range(count)]
        receiver.wait_events(count)
        took_s = receiver.events[count - 1][0] - began
        for request in requests:
            sender.result(request)
        assert [event["content"] for _, event in receiver.events] == [f"message {n}" for n in range(count)]
    return count / took_s


def broadcast(home: Path, peers: int, rounds: int) -> list[float]:
    """When the last of `peers` has the event, in milliseconds after the call, for each round."""
    times: list[float] = []
    with clients() as start:
        everybody: list[RawClient] = [start(home, f"peer{n}") for n in range(peers + 1)]
        shakes = [threading.Thread(target=client.handshake) for client in everybody]
        for shake in shakes:
            shake.start()
        for shake in shakes:
            shake.join()
        time.sleep(1)  # the ready gate
        sender, *others = everybody
        for number in range(rounds):
            time.sleep(0.1)
            began = time.perf_counter()
            request = sender.post_call("broadcast", text=f"round {number}")
            for other in others:
                other.wait_events(number + 1)
            times.append((max(other.events[number][0] for other in others) - began) * 1_000)
            sender.result(request)
    return times


def main(
    count: Annotated[int, typer.Option(help="Pipelined messages, one sender, one receiver.", min=1)] = 2_000,
    peers: Annotated[int, typer.Option(help="Receivers of a broadcast.", min=1)] = 20,
    rounds: Annotated[int, typer.Option(help="Broadcasts.", min=1)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Measure pipelined messages per second, and the time to the last of many in a broadcast.

    Example: python -m bench.throughput --count 2000 --peers 20
    """
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder:
        per_second = one_to_one(Path(folder, "one"), count)
        times = sorted(broadcast(Path(folder, "all"), peers, rounds))
    result = {
        "count": count,
        "messages_per_second": round(per_second),
        "peers": peers,
        "broadcast_last_ms_median": round(statistics.median(times), 2),
        "broadcast_last_ms_max": round(times[-1], 2),
    }
    if as_json:
        print(json.dumps(result))
    else:
        print(f"one sender, {count:,} pipelined: {per_second:,.0f} messages/s")
        print(f"broadcast to {peers}, last one: median {result['broadcast_last_ms_median']} ms, max {times[-1]:.2f} ms")


if __name__ == "__main__":
    typer.run(main)
