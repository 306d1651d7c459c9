"""How long does an answer take, without the one who answers?

Two real `agentbus serve claude-mcp` sessions over pipes. By turns: one message from the first to the second, and one
`ask` of the first, which the second answers as soon as its client holds the question. What the answering client itself
needs, from the event to the call, is not counted. Beside that, `agentbus ask` and `agentbus send` as whole processes.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from bench.delivery_latency import Pair
from bench.report import Failed, JsonOption, PlotOption, Report, main, median, progress
from bench.scale import command_ms
from bench.sessions import Client, Contender, contenders

CALL = "tool call written -> event or result held by the client, ms"
PROCESS = "whole processes, ms"
# The bound of an ask: there and back, and half of a message for the call that waits.
_MOST = 2.5


def answered(backend: Client, to: str, seen: int) -> float:
    """Wait for the event number `seen`, a question, and answer it; return what that took here, in milliseconds."""
    backend.wait_events(seen + 1)
    held, event = backend.events[seen]
    request, line = backend.prepare_call("send_message", to=to, text="8080", reply_to=event["meta"]["msg_id"])
    written = time.perf_counter()
    backend.send_line(line)
    backend.sent(request)
    return (written - held) * 1_000


def round_trip(web: Client, backend: Client) -> float:
    """Ask, answer at once, and return how long the asking client waits, without the answering one, in milliseconds."""
    seen = len(backend.events)
    request, line = web.prepare_call("ask", to="backend", text="which port?")
    written = time.perf_counter()
    web.send_line(line)
    here_ms = answered(backend, "web", seen)
    answer = web.answer(request)
    if "8080</channel>" not in answer["result"]["content"][0]["text"]:
        raise Failed(f"an ask was not answered: {answer}")
    return (web.arrived[-1][0] - written) * 1_000 - here_ms


def asked_from_a_shell(home: Path, backend: Client) -> float:
    """How long `agentbus ask` takes, without the one who answers, in milliseconds."""
    took: list[float] = []
    seen = len(backend.events)
    answering = threading.Thread(target=lambda: took.append(answered(backend, "ci", seen)))
    answering.start()
    whole_ms = command_ms(home, "ask", "backend", "which port?", "--from", "ci")
    answering.join()
    return whole_ms - took[0]


def command(
    rounds: Annotated[int, typer.Option(help="How many messages and asks between two sessions.", min=1)] = 300,
    commands: Annotated[int, typer.Option(help="How many of each command.", min=1)] = 20,
    json_to: JsonOption = None,
    plot_to: PlotOption = None,
) -> None:
    """How long does an answer take, without the one who answers?

    Example: python -m bench.asking --rounds 100 --commands 5
    """
    report = Report("How long does an answer take, without the one who answers?")
    with contenders(Contender("agentbus")) as (field,):
        web, backend = field.start("web", "backend")
        pair = Pair(web, backend)
        messages: list[float] = []
        asks: list[float] = []
        for _ in progress(range(rounds), "rounds"):
            messages.append(pair.call("backend", 0.0))
            asks.append(round_trip(web, backend))
        processes: dict[str, list[float]] = {"agentbus send": [], "agentbus ask": []}
        for number in progress(range(commands), "commands"):
            processes["agentbus send"].append(command_ms(field.home, "send", "backend", "hello", "--from", "ci"))
            backend.wait_events(2 * rounds + 2 * number + 1)
            processes["agentbus ask"].append(asked_from_a_shell(field.home, backend))
    report.add_samples(CALL, {"a message, one way": messages, "an ask, there and back": asks})
    report.add_ratio(CALL, "an ask / a message", "an ask, there and back", "a message, one way", "p50", "p90")
    report.add_samples(PROCESS, processes)
    report.draw_histogram(CALL.removesuffix(", ms"), "ms", {"a message, one way": messages, "an ask": asks})
    report.target("an ask / a message, p50", median(asks) / median(messages), "x", most=_MOST)
    report.target("agentbus ask, p50", median(processes["agentbus ask"]), "ms", most=200)
    report.finish(json_to, plot_to)


if __name__ == "__main__":
    main(command)
