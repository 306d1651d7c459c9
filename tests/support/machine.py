"""A machine of a mesh for tests: a home with a database, and its link in this process or in one of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from agentbus import member, registry
from agentbus.core import config
from agentbus.core.bus import Sent
from agentbus.core.ports import Relay
from agentbus.link import admin, settings
from agentbus.link.nats import NatsRelay
from agentbus.link.run import run
from tests.support.command import PATIENCE_S, clean_env

WINDOW_S = 1.0


class Machine:
    """A home that has joined the mesh as `name`. Its store is a connection of the test's own."""

    def __init__(self, home: Path, name: str, invite: Path) -> None:
        self.home, self.name = home, name
        home.mkdir(mode=0o700, exist_ok=True)
        if not (home / "link.toml").exists():
            admin.join(home, invite)
        self.said: list[str] = []
        self.process: subprocess.Popen[str] | None = None
        self.open()
        self.bus.store.machines  # noqa: B018 - loaded before the clock runs

    def open(self) -> None:
        self.bus, self._triggers = registry.open_bus(config.load(home=self.home), busy_ms=5_000)

    def shut(self) -> None:
        self.bus.store.close()
        self._triggers.close()

    def close(self) -> None:
        self.kill()
        self.shut()

    @property
    def settings(self) -> settings.LinkSettings:
        return settings.load(self.home)

    def set(self, **values: Any) -> None:
        """Change link.toml."""
        path = self.home / "link.toml"
        text = path.read_text()
        for key, value in values.items():
            text = re.sub(rf"(?m)^{key} = .*\n", "", text) + f"{key} = {json.dumps(value)}\n"
        path.write_text(text)

    # -- the link in this process

    @asynccontextmanager
    async def linked(self, relay: Relay | None = None, *, resend_s: float = 30.0) -> AsyncIterator[None]:
        """The link of this home runs, in this process."""
        stopped = anyio.Event()
        link = self.settings
        relay = relay or NatsRelay(link, window_s=WINDOW_S)

        async def carry() -> None:
            await run(
                config.load(home=self.home),
                link,
                relay,
                join=member.peer_session,
                say=self.said.append,
                stopped=stopped,
                resend_s=resend_s,
            )

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(carry)
            yield
            stopped.set()

    async def connected(self) -> None:
        await until(lambda: "since" in self.bus.store.machines.facts())

    async def sees(self, *names: str) -> None:
        await until(lambda: {one.name for one in self.bus.store.machines.all() if one.is_there} >= set(names))

    # -- the link in a process of its own

    def start(self, code: str = "") -> None:
        """Start `agentbus link run`; `code` is run in it before."""
        program = (
            "import functools, sys\n"
            "from agentbus.link import nats\n"
            f"nats.NatsRelay = functools.partial(nats.NatsRelay, window_s={WINDOW_S})\n"
            f"{code}\n"
            "from agentbus.__main__ import main\n"
            "sys.argv = ['agentbus', 'link', 'run']\n"
            "main()\n"
        )
        with (self.home / "said").open("a") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program], env=clean_env(self.home), stderr=said, text=True
            )

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None

    def wait(self) -> int:
        assert self.process is not None
        code = self.process.wait(10)
        self.process = None
        return code

    # -- mail

    def send(self, to: str, text: str, *, sender: str = "ci", reply_to: int | None = None) -> Sent:
        return self.bus.send(sender, to, text, reply_to=reply_to)

    def texts(self, name: str) -> list[str]:
        """What is in a mailbox, in the order in which it came."""
        rows = self.bus.store._read("SELECT body FROM messages WHERE recipient = ? ORDER BY id", name)
        return [str(row[0]) for row in rows]

    def count(self, where: str) -> int:
        return int(self.bus.store._read(f"SELECT count(*) FROM messages WHERE {where}")[0][0])

    def read(self, *ids: int) -> None:
        """Mark messages as read, as a session does."""
        self.bus.store.mark_read(ids, session="x", now=self.bus.clock())
        self.bus._tell()


async def until(is_so: Callable[[], object], within_s: float = PATIENCE_S) -> None:
    """Wait until something holds."""
    with anyio.fail_after(within_s):
        while not is_so():
            await anyio.sleep(0.01)


def wait_until(is_so: Callable[[], object], within_s: float = PATIENCE_S) -> None:
    """The same, without an event loop."""
    give_up_at = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)
