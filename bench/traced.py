"""`agentbus serve claude-mcp` with a stamp at each step of a message: `python -m bench.traced`. Started by benchmarks.

The methods are wrapped from outside, so the measured code is the code that ships. A stamp is one short write to
`traces/PID` in the home, because a session ends by os._exit, which flushes nothing. It costs one or two microseconds.
"""

from __future__ import annotations

import os
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from agentbus import registry
from agentbus.adapters.mcp.channel import ChannelDelivery
from agentbus.core import config
from agentbus.core.store import Store
from bench.report import Failed

__all__ = ["STEPS", "Trace", "steps"]

# From when the sender's client writes the call until the recipient's client has the event.
STEPS = ("request", "send", "wake", "read", "push", "client")
_FOLDER = "traces"


class _Stamps:
    """Writes the stamps of this process, one per line: a word and nanoseconds of CLOCK_MONOTONIC."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(folder / str(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def __call__(self, what: bytes) -> None:
        os.write(self._fd, b"%s %d\n" % (what, time.perf_counter_ns()))


def _around(owner: type, method: str, before: bytes | None, after: bytes, stamp: _Stamps) -> None:
    """Stamp before and after each call of a synchronous method."""
    original: Callable[..., Any] = _found(owner, method)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        if before is not None:
            stamp(before)
        result = original(*arguments, **options)
        stamp(after)
        return result

    setattr(owner, method, wrapped)


def _found(owner: type, method: str) -> Any:
    try:
        return getattr(owner, method)
    except AttributeError:
        sys.exit(f"{owner.__name__}.{method} is gone, which bench/traced.py measures: tell it what took its place")


class _TracedWakes:
    """The wakes of a trigger, stamped."""

    def __init__(self, wakes: Any, stamp: _Stamps) -> None:
        self._wakes = wakes
        self._stamp = stamp

    async def wait(self, timeout_s: float | None = None) -> bool:
        was_nudged: bool = await self._wakes.wait(timeout_s)
        if was_nudged:
            self._stamp(b"woken")
        return was_nudged

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wakes, name)


def _trace_trigger(trigger: type, stamp: _Stamps) -> None:
    arm = _found(trigger, "arm")

    @asynccontextmanager
    async def traced_arm(*arguments: Any, **options: Any) -> AsyncIterator[_TracedWakes]:
        async with arm(*arguments, **options) as wakes:
            yield _TracedWakes(wakes, stamp)

    trigger.arm = traced_arm  # type: ignore[attr-defined]
    _around(trigger, "notify", None, b"nudged", stamp)


def _trace_delivery(stamp: _Stamps) -> None:
    deliver = _found(ChannelDelivery, "deliver")

    async def traced_deliver(*arguments: Any, **options: Any) -> Any:
        receipt = await deliver(*arguments, **options)
        stamp(b"pushed")
        return receipt

    ChannelDelivery.deliver = traced_deliver  # type: ignore[method-assign]


def main() -> None:
    """Serve, traced. Does not return."""
    settings = config.load()
    stamp = _Stamps(settings.home / _FOLDER)
    triggers = registry.Triggers(settings)
    for trigger in triggers.preferred():
        _trace_trigger(type(trigger), stamp)
    triggers.close()
    _around(Store, "send", b"called", b"committed", stamp)
    _around(Store, "due", None, b"found", stamp)
    _trace_delivery(stamp)
    registry.serve("claude-mcp")


class Trace:
    """The stamps of one traced session, in nanoseconds by step."""

    def __init__(self, home: Path, pid: int) -> None:
        self._path = home / _FOLDER / str(pid)
        self._stamps: dict[str, list[int]] = {}
        for line in self._path.read_text().splitlines():
            what, at = line.split()
            self._stamps.setdefault(what, []).append(int(at))

    def first(self, what: str, since: int) -> int:
        """The first `what` at or after an instant. Raises Failed when there is none."""
        stamps = self._stamps.get(what, [])
        position = bisect_left(stamps, since)
        if position == len(stamps):
            raise Failed(f"no {what!r} was stamped: bench/traced.py wraps a method that is not called any more")
        return stamps[position]

    def last(self, what: str, until: int) -> int | None:
        """The last `what` at or before an instant."""
        stamps = self._stamps.get(what, [])
        position = bisect_right(stamps, until)
        return stamps[position - 1] if position else None

    def delivery(self, since: int) -> tuple[int, int]:
        """When the first message that came after an instant was found, and when it was pushed."""
        pushed = self.first("pushed", since)
        # A process can be delayed between pushing the message before and stamping that push.
        while (found := self.last("found", pushed) or 0) < since:
            pushed = self.first("pushed", pushed + 1)
        return found, pushed


def steps(sender: Trace, receiver: Trace, written: int, held: int) -> dict[str, float]:
    """How long each of STEPS took for one message, in milliseconds.

    `written` is when its call was written, `held` when the recipient's client had the event, both in nanoseconds.
    """
    called = sender.first("called", written)
    committed = sender.first("committed", called)
    found, pushed = receiver.delivery(called)
    # A recipient that reads its mailbox anyway can find a row before the sender's write returns, and without a wake.
    committed = min(committed, found)
    woken = receiver.last("woken", found) or 0
    woken = woken if woken > called else committed
    instants = (written, called, committed, woken, found, pushed, held)
    return {step: (after - before) / 1e6 for step, before, after in zip(STEPS, instants, instants[1:], strict=False)}


if __name__ == "__main__":
    main()
