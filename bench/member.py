"""Python programs on the bus, for benchmarks to drive: `python -m bench.member HOME NAME...` joins under each name.

It reads one JSON command per line from stdin and answers each with one line. With {"send": [TO, COUNT]} the first name
sends COUNT messages one after the other, with {"take": COUNT} it receives COUNT messages, and with {"reply": COUNT} it
also answers each at once. It ends when its stdin ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

import agentbus
from bench.report import Failed

__all__ = ["Crew"]


class Crew:
    """The near end: starts a process in which each of `names` joins the bus at `home`. Call `joined` first."""

    def __init__(self, home: Path, *names: str, **variables: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.member", str(home), *names],
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def joined(self) -> None:
        """Wait until all names have joined."""
        self.answer()

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def ask(self, **command: Any) -> None:
        """Send one command to the process."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Wait until the command is done. Returns its result."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Failed("a Python program on the bus has ended; what it said is above")
        return json.loads(line)

    def close(self) -> None:
        """Make the process leave the bus and end."""
        for file in (self._process.stdin, self._process.stdout):
            assert file is not None
            file.close()
        try:
            self._process.wait(5)
        finally:
            self._process.kill()
            self._process.wait()


async def _send(member: agentbus.Member, to: str, count: int) -> list[float]:
    began = time.perf_counter()
    for number in range(count):
        await member.send(to, f"~0.{number}~ one of many messages")
    return [began, time.perf_counter()]


async def _take(member: agentbus.Member, count: int) -> float:
    took = [(await member.receive()).text.split("~")[1] for _ in range(count)]
    ended = time.perf_counter()
    if took != [f"0.{number}" for number in range(count)]:
        sys.exit("messages were lost, doubled or out of order")
    return ended


async def _reply(member: agentbus.Member, count: int) -> None:
    for _ in range(count):
        question = await member.receive()
        await member.send(question.sender, "8080", reply_to=question.id)


async def _main(home: str, names: list[str]) -> None:
    async with AsyncExitStack() as stack:
        members = [await stack.enter_async_context(agentbus.join(name, home=home)) for name in names]
        print(json.dumps(len(members)), flush=True)
        while True:
            line = await anyio.to_thread.run_sync(sys.stdin.readline)
            if not line:
                return
            command = json.loads(line)
            answer: Any = None
            if "send" in command:
                answer = await _send(members[0], *command["send"])
            elif "take" in command:
                answer = await _take(members[0], command["take"])
            elif "reply" in command:
                await _reply(members[0], command["reply"])
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    try:
        anyio.run(_main, sys.argv[1], sys.argv[2:])
    except KeyboardInterrupt:
        sys.exit(130)
