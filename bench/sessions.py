"""Starts the sessions that a benchmark measures: ours, with any settings, or another MCP server's.

If a session ends or falls silent, the error is one line, with its command and the last line that it wrote to stderr.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from bench.report import Failed
from tests.support.client import EVENT, RawClient
from tests.support.command import PATIENCE_S

__all__ = [
    "ANSWERS",
    "EVENTS",
    "TRACED",
    "Client",
    "Contender",
    "Field",
    "Tape",
    "contenders",
    "fault",
    "rivals",
    "temporary",
    "together",
]

_T = TypeVar("_T")

# The ready gate is 0.25 s; a loaded machine needs longer.
_GATE_S = 0.6
# Smaller than the size at which malloc asks the system for fresh memory: a read must not pay for that.
_READ_BYTES = 65_536
# How long a server is given to end by itself after its stdin has ended.
_END_S = 5.0

# What a recording client counts in the bytes that it gets: pushed events, or the answers to calls.
EVENTS = EVENT.encode()
ANSWERS = b"\n"
# This identifies a message in a text: its sender and its number.
_TOKEN = re.compile(rb"~(\d+)\.(\d+)~")
# The command of one of our sessions that stamps each step: see traced.py.
TRACED = (sys.executable, "-m", "bench.traced")


def together(calls: Sequence[Callable[[], _T]]) -> list[_T]:
    """Make all calls at once, each in a thread. Returns their results. Raises the first error, if any."""
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def call(number: int) -> None:
        try:
            results[number] = calls[number]()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    # Daemons: a thread that waits for a silent server must not keep an interrupted benchmark alive.
    threads = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


class Tape:
    """The output of a server while its client records: the pieces, and when the `goal`-th `marker` arrived."""

    def __init__(self, marker: bytes, goal: int) -> None:
        self._marker = marker
        self._goal = goal
        self._pieces: list[bytes] = []
        self._seam = b""
        self._count = 0
        self.reached_at = 0.0
        self.done = threading.Event()

    def add(self, now: float, data: bytes) -> None:
        """Add a piece that was read at `now`."""
        self._pieces.append(data)
        # A marker can lie across two pieces, but the seam is too short to contain a whole one.
        self._count += (self._seam + data).count(self._marker)
        self._seam = data[-(len(self._marker) - 1) :] if len(self._marker) > 1 else b""
        if self._count >= self._goal and not self.done.is_set():
            self.reached_at = now
            self.done.set()

    def text(self) -> bytes:
        """All pieces, joined."""
        return b"".join(self._pieces)


def fault(received: bytes, senders: int, each: int) -> str:
    """Describe what is wrong with the order or the number of messages in `received`; empty if nothing is wrong.

    Each of the `senders` has sent `each`, marked ~SENDER.NUMBER~.
    """
    by_sender: list[list[int]] = [[] for _ in range(senders)]
    for sender, number in _TOKEN.findall(received):
        by_sender[int(sender)].append(int(number))
    if by_sender == [list(range(each))] * senders:
        return ""
    if [sorted(numbers) for numbers in by_sender] == [list(range(each))] * senders:
        return "out of order"
    distinct = sum(len(set(numbers)) for numbers in by_sender)
    return f"{senders * each - distinct} lost, {sum(map(len, by_sender)) - distinct} doubled"


class Client(RawClient):
    """A raw client that gives up as soon as its server is gone, and that can record instead of reading.

    A recording client costs almost nothing, so the benchmark measures the servers and not the client.
    """

    def __init__(self, home: Path, name: str, *, command: Sequence[str] = (), **variables: str) -> None:
        self._has_ended = False
        self._tape: Tape | None = None
        self.command = shlex.join(command) or "agentbus serve claude-mcp"
        self._is_ours = not command or tuple(command) == TRACED
        try:
            super().__init__(home, name, command=command, **variables)
        except OSError as error:
            raise Failed(f"{self.command} cannot be started: {error.strerror}") from None

    def _read(self) -> None:
        rest = b""
        while True:
            try:
                data = os.read(self.stdout_fd, _READ_BYTES)
            except OSError:
                data = b""
            now = time.perf_counter()
            if not data:
                break
            if self._tape is not None:
                self._tape.add(now, data)
                continue
            *lines, rest = (rest + data).split(b"\n")
            with self._changed:
                for line in lines:
                    with suppress(ValueError):  # a stray print of another server
                        self._take(now, json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()
        if self._tape is not None:
            self._tape.done.set()

    def handshake(self, *, discover: bool = False) -> dict[str, Any]:
        """See RawClient. Raises Failed when the server refuses."""
        try:
            return super().handshake(discover=discover)
        except KeyError:
            raise Failed(f"{self.command} refused the handshake: {json.dumps(self.arrived[-1][1])[:300]}") from None

    def settle(self) -> None:
        """Do the handshake, and wait for the rest of the start: a session answers before it has imported the SDK."""
        self.handshake()
        if self._is_ours:
            self.sent(self.post_call("whoami"))
        else:
            self.answer(self.post("ping"))

    def record(self, marker: bytes, goal: int) -> Tape:
        """From now on only keep and count what arrives, until `reading` is called."""
        self._tape = Tape(marker, goal)
        return self._tape

    def reading(self) -> None:
        """Read again. Call it only when the server is between two lines."""
        self._tape = None

    def wait(self, condition: Callable[[], Any], what: str = "the message") -> Any:
        """Wait until `condition()` is true. Raises Failed when the server ends first, or is silent for 40 s."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_ended or condition(), PATIENCE_S)
            found = condition()
        if not found:
            raise self.failure(what)
        return found

    def wait_for_tape(self, tape: Tape, what: str) -> float:
        """Return when `tape` reached its goal. Raises Failed like `wait`."""
        tape.done.wait(PATIENCE_S)
        if not tape.reached_at:
            raise self.failure(what)
        return tape.reached_at

    def failure(self, what: str) -> Failed:
        """The error that says why `what` did not come, as far as that is known."""
        if self._has_ended:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
            self._stderr_reader.join(1)
        how = "ended" if self._has_ended else f"was silent for {PATIENCE_S:g} s"
        said = self.stderr.strip().splitlines()
        return Failed(f"{self.command} {how} before {what} came; its last line: {said[-1] if said else '(none)'}")

    def send_line(self, line: bytes) -> None:
        try:
            super().send_line(line)
        except OSError:  # the server has closed its end
            self._has_ended = True
            raise self.failure("the answer") from None

    def sent(self, request_id: int) -> None:
        """Wait for the answer to a call that must succeed. Raises Failed if it did not."""
        answer = self.answer(request_id)
        if "error" in answer or answer["result"].get("isError"):
            raise Failed(f"{self.command} refused a message: {json.dumps(answer)[:300]}")

    def end(self) -> None:
        """End the server by closing its stdin, and by force if that is not enough."""
        with suppress(OSError):
            self._stdin.close()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
        self.process.kill()
        self.process.wait()
        self._stderr_reader.join(1)
        self._reader.join(1)
        for file in (self.process.stdout, self.process.stderr):
            # A child that inherited the other end can keep our reader blocked; closing would wait for that reader.
            if file is not None and not self._reader.is_alive() and not self._stderr_reader.is_alive():
                file.close()


@dataclass(frozen=True)
class Contender:
    """A server to be measured. `command` is None for agentbus itself; then `variables` configure it."""

    label: str
    command: str | None = None
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.command is None

    def words(self, home: Path, name: str) -> list[str]:
        """The command line of one session; empty for ours."""
        if self.command is None:
            return []
        return [word.replace("{name}", name).replace("{home}", str(home)) for word in shlex.split(self.command)]


class Field:
    """The sessions of one contender, on their own bus."""

    def __init__(self, contender: Contender, home: Path) -> None:
        self.contender = contender
        self.home = home
        self.started: list[Client] = []

    @property
    def label(self) -> str:
        return self.contender.label

    @property
    def is_ours(self) -> bool:
        return self.contender.is_ours

    def start(self, *names: str, shake: bool = True, command: Sequence[str] = ()) -> list[Client]:
        """Start sessions with these names, all at once. With `shake` they are ready to receive.

        `command` starts another kind of our sessions.
        """
        started = []
        for name in names:
            words = command or self.contender.words(self.home, name)
            started.append(Client(self.home, name, command=words, **self.contender.variables))
            self.started.append(started[-1])
        if shake:
            self.shake(started)
        return started

    @staticmethod
    def shake(started: Sequence[Client], *, gate_s: float = _GATE_S) -> None:
        """Do the handshakes of all clients at once, then wait for the ready gate."""
        together([client.settle for client in started])
        time.sleep(gate_s)

    def end(self) -> None:
        """End all sessions that were started so far."""
        ended, self.started = self.started, []
        if ended:
            together([client.end for client in ended])


@contextmanager
def temporary() -> Iterator[Path]:
    """A temporary folder, with a path short enough for a socket."""
    folder = Path(tempfile.mkdtemp(prefix="ab-", dir="/tmp"))
    try:
        yield folder
    finally:
        # Another server can leave child processes behind that still write here.
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def contenders(*which: Contender) -> Iterator[list[Field]]:
    """A field for each contender, on fresh homes. All sessions are ended at the end."""
    with temporary() as folder:
        fields = []
        for number, contender in enumerate(which):
            home = Path(folder, str(number))
            if not contender.is_ours:
                home.mkdir()
            fields.append(Field(contender, home))
        try:
            yield fields
        finally:
            for one in fields:
                one.end()


def rivals(against: str | None) -> list[Contender]:
    """The other server as a contender, if there is one. It is tried first: raises Failed if it does not start."""
    if against is None:
        return []
    with contenders(Contender("theirs", against)) as (theirs,):
        Field.shake(theirs.start("probe", shake=False), gate_s=0)
    return [Contender("theirs", against)]
