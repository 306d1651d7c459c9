"""Does anything get lost when sessions send, rename, join groups, die and come back at random, and are paused?

It runs real `agentbus serve claude-mcp` processes over pipes. The same seed makes the same decisions, but their timing
depends on the machine. At the end the audit checks every accepted message: in the database it must be delivered or
pending, and if it is delivered, a client must have read it. No session may be renamed that did not ask for it, and no
message may be received twice unless a session that had it was killed.

With `--unseen` every other session runs in a pid namespace of its own, with `--stop` sessions are stopped for so long,
and with `--clock` the wall clock of all of them jumps. With `--link` it is about two machines instead: link_soak.py.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, NoReturn

import apsw
import typer

from tests.support.client import INITIALIZE, RawClient
from tests.support.command import agentbus

ACCEPTED = re.compile(r"#(\d+)")
# How the result of an ask begins, each with the question's id, by the way in which it ended.
ENDS = {
    "answered": re.compile(r"the answer to #(\d+):"),
    "late": re.compile(r"no answer to #(\d+) "),
    "offline": re.compile(r"nobody answers now: (?:sent|queued) #(\d+) "),
    "ended": re.compile(r'"[^"]+" has ended without an answer to #(\d+)'),
}
RETURNED = re.compile(r' msg_id="(\d+)"')
RENAMED = "was taken by another session meanwhile"
SHIM = Path(__file__).parents[1] / "tests" / "support" / "clock_shim.c"
UNSEEN = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
# How often in a second a session is stopped, and the clock jumps.
STOPS_A_SECOND = 0.1
JUMPS_A_SECOND = 0.2
# How often in a second a person pauses a session, for a second.
PAUSES_A_SECOND = 0.3


class Soak:
    """The sessions of one run, and what they accepted and received."""

    def __init__(self, home: Path, sessions: int, seed: int, *, unseen: bool, stop_s: float, clock: bool) -> None:
        self._home = home
        self._unseen = unseen
        self._stop_s = stop_s
        self._offset = home.parent / "offset" if clock else None
        self._variables = _clock_variables(home.parent) if clock else {}
        # Stopped servers, each with the instant at which it goes on.
        self._stopped: dict[str, float] = {}
        self._next_stop_at = self._next_jump_at = self._next_pause_at = time.monotonic()
        self._of_killed: set[int] = set()
        self.renamed: list[str] = []
        self._chance = random.Random(seed)
        self._names = [f"s{number}" for number in range(sessions)]
        self._aliases = [f"a{number}" for number in range(2 * sessions)]
        self._groups = ["@odd", "@even"]
        self._live: dict[str, RawClient] = {}
        self.accepted: set[int] = set()
        self.received: Counter[int] = Counter()
        # Up to which of its events a client has answered the questions.
        self._answered: dict[RawClient, int] = {}
        self._asks: dict[RawClient, set[int]] = {}
        self.unended: list[str] = []
        self.counts: Counter[str] = Counter()

    def start(self, name: str) -> None:
        unseen = UNSEEN if self._unseen and self._names.index(name) % 2 else ()
        command = [*unseen, sys.executable, "-m", "agentbus", "serve", "claude-mcp"]
        client = RawClient(self._home, name, command=command, **self._variables)
        client.post("initialize", INITIALIZE)
        client.notify("notifications/initialized")
        client.post("tools/list")
        self._live[name] = client
        self.counts["starts"] += 1

    def collect(self, client: RawClient) -> None:
        """End a client, and record the messages that its session accepted and received."""
        client.end()
        self.renamed += [line for line in client.stderr.splitlines() if RENAMED in line]
        for _, text, _ in results(client):
            if text.startswith(("sent ", "queued ")):
                self.accepted.update(int(row_id) for row_id in ACCEPTED.findall(text))
        self._collect_asks(client)
        self.received.update(int(event["meta"]["msg_id"]) for _, event in client.events)

    def _collect_asks(self, client: RawClient) -> None:
        """Record how each ask of a client ended, and the answers, which came in results."""
        asks = self._asks.pop(client, set())
        for request_id, text, is_error in results(client):
            if request_id not in asks:
                continue
            asks.discard(request_id)
            if is_error:
                self.counts["asks: refused"] += 1
                continue
            ways = {way: found for way, form in ENDS.items() if (found := form.match(text))}
            if len(ways) != 1:
                self.unended.append(text)
                continue
            ((way, found),) = ways.items()
            self.counts[f"asks: {way}"] += 1
            self.accepted.add(int(found[1]))
            if way == "answered":
                self.received.update(int(row_id) for row_id in RETURNED.findall(text)[:1])
        self.counts["asks: their session ended"] += len(asks)

    def one_step(self) -> None:
        self._disturb()
        name = self._chance.choice(self._names)
        client = self._live.get(name)
        if name in self._stopped:
            # Others send to it, and it answers nothing.
            time.sleep(0.001)
            return
        if client is None:
            self.start(name)
            return
        self._answer(client)
        dice = self._chance.random()
        if dice < 0.9:
            to = self._chance.choice(self._names + self._aliases + self._groups)
            self._call(client, "send_message", to=to, text="x" * self._chance.choice([1, 100, 5_000]))
        elif dice < 0.92:
            asks = self._asks.setdefault(client, set())
            to = self._chance.choice(self._names + self._aliases)
            asks.add(client.post_call("ask", to=to, text="well?", wait_s=self._chance.choice([1, 2, 5])))
            self.counts["ask"] += 1
        elif dice < 0.95:
            self._call(client, "set_name", name=self._chance.choice([name, *self._aliases]))
        elif dice < 0.963:
            self._call(client, "join_group", group=self._chance.choice(self._groups))
        elif dice < 0.97:
            self._call(client, "leave_group", group=self._chance.choice(self._groups))
        elif dice < 0.975:
            self._call(client, "broadcast", text="to all")
        elif dice < 0.985:
            self._end(name, client, signal.SIGKILL)
        elif dice < 0.99:
            self._end(name, client, signal.SIGINT)
        time.sleep(self._chance.random() * 0.02)

    def _answer(self, client: RawClient) -> None:
        """Answer most of the questions that have come since."""
        first = self._answered.get(client, 0)
        self._answered[client] = len(client.events)
        for _, event in client.events[first : self._answered[client]]:
            if "answer_by" in event["meta"] and self._chance.random() < 0.8:
                meta = event["meta"]
                self._call(client, "send_message", to=meta["from"], text="so", reply_to=meta["msg_id"])

    def _disturb(self) -> None:
        """Stop a session, let one go on, make the clock jump, pause a session, when it is time."""
        now = time.monotonic()
        if now >= self._next_pause_at:
            self._next_pause_at = now + self._chance.random() * 2 / PAUSES_A_SECOND
            # A name that no session has had yet is refused.
            if agentbus(self._home, "pause", self._chance.choice(self._names), "--for", "1s").returncode == 0:
                self.counts["pause"] += 1
        for name, until in list(self._stopped.items()):
            if now >= until:
                self._go_on(name)
        if self._stop_s and now >= self._next_stop_at:
            self._next_stop_at = now + self._chance.random() * 2 / STOPS_A_SECOND
            running = [name for name in self._live if name not in self._stopped]
            if len(running) > 2:
                name = self._chance.choice(running)
                _signal(self._live[name], signal.SIGSTOP)
                self._stopped[name] = now + self._stop_s
                self.counts["SIGSTOP"] += 1
        if self._offset is not None and now >= self._next_jump_at:
            self._next_jump_at = now + self._chance.random() * 2 / JUMPS_A_SECOND
            self._offset.write_text(str(self._chance.choice([0, 60, 600, 3_600, 86_400, -3_600])))
            self.counts["jumps of the clock"] += 1

    def _go_on(self, name: str) -> None:
        del self._stopped[name]
        _signal(self._live[name], signal.SIGCONT)

    def _call(self, client: RawClient, tool: str, **arguments: str) -> None:
        self.counts[tool] += 1
        client.post_call(tool, **arguments)

    def _end(self, name: str, client: RawClient, how: signal.Signals) -> None:
        self.counts[how.name] += 1
        if name in self._stopped:
            self._go_on(name)
        _signal(client, how)
        try:
            client.process.wait(5)
        except subprocess.TimeoutExpired:
            # The first process of a pid namespace is not signalled before it has said how it takes a signal.
            client.close_stdin()
            client.process.wait()
        del self._live[name]
        self.collect(client)
        if how is signal.SIGKILL:
            self._of_killed |= {int(event["meta"]["msg_id"]) for _, event in client.events}
            self._of_killed |= {int(row_id) for _, text, _ in results(client) for row_id in RETURNED.findall(text)}

    def finish(self, patience_s: float) -> None:
        """Let all sessions receive their pending messages, then end them all."""
        for name in list(self._stopped):
            self._go_on(name)
        for name in self._names:
            if name not in self._live:
                self.start(name)
        agentbus(self._home, "resume", "--all")  # a clock that was set back would let a pause go on
        give_up_at = time.monotonic() + patience_s
        while time.monotonic() < give_up_at and self._pending_for_the_living():
            time.sleep(0.2)
        for name, client in list(self._live.items()):
            self._end(name, client, signal.SIGINT)

    def _rows(self, sql: str) -> list[tuple[int, ...]]:
        connection = apsw.Connection(str(self._home / "bus.db"))
        try:
            return list(connection.execute(sql))
        finally:
            connection.close()

    def _pending_for_the_living(self) -> int:
        sql = (
            "SELECT count(*) FROM messages WHERE delivered_at IS NULL"
            " AND recipient IN (SELECT name FROM peers WHERE left_at IS NULL)"
        )
        return self._rows(sql)[0][0]

    def audit(self) -> list[str]:
        """Describe what is wrong, one sentence each; empty if nothing is wrong."""
        states = {row[0]: row[1] for row in self._rows("SELECT id, delivered_at IS NOT NULL FROM messages")}
        delivered = {row_id for row_id, is_delivered in states.items() if is_delivered}
        self.counts["accepted"] = len(self.accepted)
        self.counts["committed, answer lost with the sender"] = len(set(states) - self.accepted)
        self.counts["delivered"] = len(delivered)
        self.counts["pending"] = len(states) - len(delivered)
        self.counts["received twice or more"] = sum(1 for count in self.received.values() if count > 1)
        wrong = []
        if self.accepted - set(states):
            wrong.append(f"accepted and not in the database: {sorted(self.accepted - set(states))[:20]}")
        if delivered - set(self.received):
            wrong.append(f"delivered and read by nobody: {sorted(delivered - set(self.received))[:20]}")
        doubled = {row_id for row_id, count in self.received.items() if count > 1} - self._of_killed
        if doubled:
            wrong.append(f"received twice, though no session that had it was killed: {sorted(doubled)[:20]}")
        if self.unended:
            wrong.append(f"an ask that ended in no known way: {self.unended[:5]}")
        if self.renamed:
            wrong.append(f"renamed without having asked for it: {self.renamed[:5]}")
        if set(self.received) - set(states):
            wrong.append(f"received and not in the database: {sorted(set(self.received) - set(states))[:20]}")
        return wrong


def results(client: RawClient) -> list[tuple[object, str, bool]]:
    """The results that a client got: the id of each request, the text, and whether it is an error."""
    return [
        (message.get("id"), block["text"], bool(message["result"].get("isError")))
        for _, message in client.arrived
        for block in message.get("result", {}).get("content", [])
    ]


def _signal(client: RawClient, number: signal.Signals) -> None:
    """Signal the server itself: under `unshare` it is the one child of the process that we started."""
    children = Path(f"/proc/{client.process.pid}/task/{client.process.pid}/children")
    started = client.process.args
    is_unseen = isinstance(started, list) and started[0] == UNSEEN[0]
    pid = int(children.read_text().split()[0]) if is_unseen else client.process.pid
    os.kill(pid, number)


def _clock_variables(folder: Path) -> dict[str, str]:
    """Build the clock shim, and say what makes a process use it."""
    library, offset = folder / "shim.so", folder / "offset"
    subprocess.run([shutil.which("cc") or "cc", "-shared", "-fPIC", "-o", library, SHIM, "-ldl"], check=True)
    offset.write_text("0")
    # A clock that is a day ahead would prune what the audit has to find.
    return {"LD_PRELOAD": str(library), "SHIM_FILE": str(offset), "AGENTBUS_RETENTION_HOURS": "8760"}


def main(
    seconds: Annotated[float, typer.Option(help="How long to go on.", min=1)] = 60.0,
    sessions: Annotated[int, typer.Option(help="How many sessions.", min=2)] = 8,
    seed: Annotated[int, typer.Option(help="Decides what happens.")] = 1,
    unseen: Annotated[
        bool, typer.Option("--unseen", help="Every other session in a pid namespace of its own.")
    ] = False,
    stop: Annotated[float, typer.Option(help="Stop sessions for so many seconds; 0: none.", min=0)] = 0.0,
    clock: Annotated[bool, typer.Option("--clock", help="Make the wall clock jump.")] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Two machines instead, whose links, server and cables fail at random.")
    ] = False,
) -> None:
    """Send, ask, rename, join groups, pause, kill and restart at random, then audit every message.

    Example: python -m bench.soak --seconds 600 --seed 7
    """
    with tempfile.TemporaryDirectory(prefix="ab-", dir="/tmp") as folder:
        if link:
            from bench import link_soak  # it needs the extra of the link

            _tell(*link_soak.soak(Path(folder), seconds, seed), "every message arrived, once and in order")
        soak = Soak(Path(folder, "bus"), sessions, seed, unseen=unseen, stop_s=stop, clock=clock)
        end_at = time.monotonic() + seconds
        try:
            while time.monotonic() < end_at:
                soak.one_step()
        finally:
            soak.finish(patience_s=60)
        wrong = soak.audit()
    _tell(soak.counts, wrong, "accepted = delivered + pending, for every message; what is delivered was read")


def _tell(counts: Counter[str], wrong: list[str], well: str) -> NoReturn:
    for what, count in counts.items():
        print(f"{count:9,}  {what}")
    print("\n".join(wrong) or f"audit: {well}")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
