"""`agentbus watch`: what it finds out, how it is woken, how it ends. Real processes, and a real terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import queue
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agentbus.cli.watch import _standing
from agentbus.core import changes as module
from agentbus.core.changes import Changes, MessageEvent, PeerEvent
from agentbus.core.model import Arrival
from agentbus.core.process import Process, current
from agentbus.core.store import Store
from agentbus.core.watchers import Watchers
from tests.support.client import RawClient
from tests.support.command import PATIENCE_S, agentbus, clean_env, until

pytestmark = pytest.mark.timeout(90)  # a loaded machine takes seconds for one process


class Watch:
    """A running `agentbus watch` whose output is read line by line, each with the instant of its arrival."""

    def __init__(self, home: Path, *arguments: str, **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "agentbus", "watch", *arguments],
            env=clean_env(home, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[tuple[float, str]] = queue.Queue()
        self.errors: list[str] = []
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()
        folder = home / "watch"
        if variables.get("AGENTBUS_HOME_IS_BAD") is None:
            until(lambda: folder.is_dir() and list(folder.iterdir()), "the watcher's socket")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put((time.monotonic(), line.rstrip("\n")))

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join(PATIENCE_S)
        for file in (self.process.stdout, self.process.stderr):
            assert file is not None
            file.close()

    def next(self) -> str:
        return self._lines.get(timeout=PATIENCE_S)[1]

    def object(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.next())
        return found

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@contextmanager
def watch(home: Path, *arguments: str, **variables: str) -> Iterator[Watch]:
    watcher = Watch(home, *arguments, **variables)
    try:
        yield watcher
    finally:
        watcher.close()


def arrival(name: str, process: Process | None = None) -> Arrival:
    here = process or current()
    return Arrival(
        host=here,
        launch_name=name,
        process=here,
        runtime="test",
        cwd="/tmp",
        delivery="channel",
        trigger="socket",
    )


# -- what it finds out -------------------------------------------------------------------------------------


def steps(found: list[MessageEvent | PeerEvent]) -> list[tuple[int, str]]:
    return [(one.message.id, one.state.value) for one in found if isinstance(one, MessageEvent)]


@pytest.mark.spec("WATCH-2")
def test_each_step_of_a_message_is_found_once_and_in_its_order(store: Store) -> None:
    old, _ = store.send("a", "b", "before", now=1_000)
    read, _ = store.send("a", "b", "read long ago", now=1_000)
    store.mark_read([read], session="s", now=1_500)
    other = Store(store.path, busy_ms=1_000)
    changes = Changes(store)
    assert changes.look(thoroughly=True) == [], "what is older is no news"
    assert changes.look() == []
    one, _ = other.send("a", "b", "one", now=2_000)
    two, _ = other.send("a", "c", "two", now=2_010)
    other.mark_delivered([one, old], session="s", carrier="channel", now=2_005)
    assert steps(changes.look()) == [(one, "pending"), (old, "delivered"), (one, "delivered"), (two, "pending")]
    other.mark_read([one, two], session="s", now=2_020)
    assert steps(changes.look()) == [(one, "read"), (two, "delivered"), (two, "read")]
    assert changes.look() == []
    assert changes.look(thoroughly=True) == []
    other.prune(9_000, 10)
    assert changes.look() == []
    other.close()


@pytest.mark.spec("WATCH-2")
def test_of_too_many_messages_the_newest_are_followed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_FOLLOWED", 3)
    monkeypatch.setattr(module, "_PAGE", 2)
    changes = Changes(store)
    ids = [store.send("a", "b", "x", now=1_000 + n)[0] for n in range(7)]
    assert steps(changes.look(thoroughly=True)) == [(one, "pending") for one in ids]
    store.mark_delivered(ids, session="s", carrier="channel", now=2_000)
    assert steps(changes.look(thoroughly=True)) == [(one, "delivered") for one in ids[-3:]]


@pytest.mark.spec("WATCH-2")
def test_who_comes_goes_and_is_renamed_is_found(store: Store) -> None:
    changes = Changes(store)
    claimed = store.claim(arrival("web"), now=1_000, endpoint=str, join_crowd=True)
    # A row whose process is gone does not count as a peer, even if it was not reaped yet.
    ghost = store.claim(arrival("ghost"), now=1_000, endpoint=str, join_crowd=True)
    assert ghost is not None
    assert ghost[2] is not None
    ghost[2]._close()  # as the kernel does when its process dies
    assert claimed is not None
    peer = claimed[0]

    def events() -> list[tuple[str, str, str]]:
        found = changes.look(thoroughly=True)
        return [(one.what, one.peer.name, one.was) for one in found if isinstance(one, PeerEvent)]

    assert events() == [("online", "web", "")]
    store.rename(peer.session, peer.process.pid, "shop")
    assert events() == [("renamed", "shop", "web")]
    store.leave(peer.session, peer.process.pid, now=2_000)
    assert events() == [("offline", "shop", "")]


# -- as a process ------------------------------------------------------------------------------------------


@pytest.mark.spec("WATCH-1", "WATCH-2", "CLI-3")
def test_it_shows_the_life_of_a_message_in_a_pipe(home: Path, start: Callable[..., RawClient]) -> None:
    agentbus(home, "peers")
    with watch(home, "--json") as watcher:
        backend = start("backend")
        online = watcher.object()
        assert [online[key] for key in ("event", "name", "delivery")] == ["online", "backend", "channel"]
        backend.handshake()
        agentbus(home, "send", "backend", "hi", "--from", "ci")
        pending, delivered = watcher.object(), watcher.object()
        assert (pending["event"], pending["id"], pending["from"], pending["to"], pending["text"]) == (
            *("pending", 1, "ci", "backend", "hi"),
        )
        assert (delivered["event"], delivered["carrier"], delivered["at"]) == (
            *("delivered", "channel", delivered["delivered_at"]),
        )
        backend.call("check_messages")
        assert watcher.object()["event"] == "read"
        backend.call("set_name", name="api")
        renamed = watcher.object()
        assert (renamed["event"], renamed["name"], renamed["was"]) == ("renamed", "api", "backend")
        backend.end()
        assert (gone := watcher.object())["event"] == "offline", gone
        assert watcher.end() == 0
        assert watcher.errors == []
    assert list((home / "watch").iterdir()) == []


@pytest.mark.spec("WATCH-1")
def test_every_change_is_told_and_not_found_by_polling(
    home: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The safety poll must not be what finds the change. A test must not measure time, so it counts the nudges.
    from agentbus import registry
    from agentbus.core import config

    told: list[str] = []
    monkeypatch.setattr(Watchers, "tell", lambda self: told.append("told"))
    bus, triggers = registry.open_bus(config.load(home=home), busy_ms=1_000)
    claimed = bus.claim(arrival("web"), str, join_crowd=True)
    assert claimed is not None
    peer = claimed.peer
    for change in (
        lambda: bus.send("ci", "web", "one"),
        lambda: bus.broadcast("ci", "all"),
        lambda: bus.mark(peer, [1], "channel"),
        lambda: bus.mark_read(peer, [1]),
        lambda: bus.rename(peer, "shop"),
        lambda: bus.leave(peer),
    ):
        told.clear()
        change()
        assert told == ["told"]
    told.clear()
    bus.peers()
    bus.pending(peer, 10)
    assert told == [], "who only looks tells nobody"
    bus.store.close()
    triggers.close()


@pytest.mark.spec("WATCH-1")
def test_a_watcher_that_was_killed_is_cleared_away(home: Path) -> None:
    with watch(home) as watcher:
        watcher.process.kill()
        watcher.process.wait()
    assert len(list((home / "watch").iterdir())) == 1
    assert agentbus(home, "send", "bob", "hi").returncode == 0
    assert list((home / "watch").iterdir()) == []


@pytest.mark.spec("WATCH-1", "WATCH-3")
def test_without_a_socket_it_polls_and_says_so(home: Path) -> None:
    home.mkdir(mode=0o700)
    (home / "watch").write_text("in the way")
    with watch(home, AGENTBUS_HOME_IS_BAD="1", AGENTBUS_POLL_MS="20") as watcher:
        until(lambda: watcher.errors, "what is said")
        assert "nothing can wake this command, so it checks every 20 ms" in watcher.errors[0]
        agentbus(home, "send", "bob", "hi")
        assert " -> bob  hi" in watcher.next()
        # It tries again, and says nothing about that, until there is a socket.
        time.sleep(1.1 * module.SAFETY_S)
        (home / "watch").unlink()
        until(lambda: (home / "watch").is_dir() and list((home / "watch").iterdir()), "the socket")
        agentbus(home, "send", "bob", "again")
        assert " -> bob  again" in watcher.next()
        assert watcher.end() == 0
        assert len(watcher.errors) == 1


@pytest.mark.spec("WATCH-4")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_cleanly(home: Path, number: int) -> None:
    with watch(home) as watcher:
        assert watcher.end(number) == 0
        assert watcher.errors == []
    assert list((home / "watch").iterdir()) == []


@pytest.mark.spec("WATCH-4")
def test_a_reader_that_goes_ends_it(home: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "agentbus", "watch"],
        env=clean_env(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        until(lambda: (home / "watch").is_dir() and list((home / "watch").iterdir()))
        agentbus(home, "send", "bob", "hi")
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline().endswith(" -> bob  hi\n")
        child.stdout.close()
        # Nothing more is sent, so watch has to notice by itself.
        assert child.wait(PATIENCE_S) == 0
        assert child.stderr.read() == ""
    assert list((home / "watch").iterdir()) == []


@pytest.mark.spec("WATCH-3")
def test_a_home_that_is_deleted_under_it_is_followed(home: Path) -> None:
    agentbus(home, "send", "bob", "old")
    with watch(home) as watcher:
        first = set((home / "watch").iterdir())
        shutil.rmtree(home)
        agentbus(home, "send", "bob", "new")
        # It can have met the moment at which there was no home to bind a socket in, and says so then.
        until(lambda: any("replaced: watching the new one" in line for line in watcher.errors), "what is said")
        until(lambda: (home / "watch").is_dir() and list((home / "watch").iterdir()), "the socket, again")
        assert set((home / "watch").iterdir()) != first
        agentbus(home, "send", "bob", "newer")
        # "new" can have come just before watch joined, or just after.
        until(lambda: watcher.next().endswith(" -> bob  newer"))
        assert watcher.end() == 0


@pytest.mark.spec("WATCH-2")
def test_it_changes_nothing(home: Path, start: Callable[..., RawClient]) -> None:
    start("web").handshake()
    agentbus(home, "send", "bob", "hi")
    connection = sqlite3.connect(home / "bus.db")
    with watch(home) as watcher:
        assert "online     web" in watcher.next()
        before = connection.execute("SELECT * FROM messages").fetchall()
        seen = connection.execute("SELECT session, left_at FROM peers").fetchall()
        assert watcher.end() == 0
    assert connection.execute("SELECT * FROM messages").fetchall() == before
    assert connection.execute("SELECT session, left_at FROM peers").fetchall() == seen
    connection.close()


@pytest.mark.spec("TRUST-5")
def test_no_value_of_a_peer_steers_the_table_or_is_long(store: Store) -> None:
    evil = "\x1b[2J\n\u202e" * 1_000
    asked = replace(arrival("web"), runtime=evil, cwd=evil, delivery=evil, trigger=evil)
    claimed = store.claim(asked, now=0, endpoint=str, join_crowd=True)
    assert claimed is not None
    shown = io.StringIO()
    Console(file=shown, width=1_000).print(_standing([claimed[0]], {}, lambda _peer: ""))
    lines = shown.getvalue().splitlines()
    assert len(lines) == 3
    assert all(line.isprintable() and len(line.rstrip()) < 400 for line in lines)


@pytest.mark.spec("CLI-6", "CLI-7")
def test_on_a_terminal_the_peers_stand_below_the_stream(home: Path, start: Callable[..., RawClient]) -> None:
    start("web").handshake()
    ours, theirs = pty.openpty()
    env = clean_env(home, TERM="xterm-256color", COLUMNS="120", LINES="30")
    with subprocess.Popen([sys.executable, "-m", "agentbus", "watch"], env=env, stdout=theirs, stderr=theirs) as child:
        os.close(theirs)
        shown = bytearray()

        def see(text: bytes) -> None:
            give_up_at = time.monotonic() + PATIENCE_S
            while text not in re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", bytes(shown)):
                assert time.monotonic() < give_up_at, bytes(shown)
                if select.select([ours], [], [], 0.1)[0]:
                    shown.extend(os.read(ours, 65_536))

        see(b"Ctrl-C ends this")
        see(b"NAME  RUNTIME")
        agentbus(home, "send", "nobody", "clear \x1b[2J the screen", "--from", "eve")
        see(b"eve -> nobody  clear \\x1b[2J the screen")
        see(b"nobody")
        assert b"\x1b[2J" not in shown
        child.send_signal(signal.SIGINT)
        while True:
            try:
                if not os.read(ours, 65_536):
                    break
            except OSError:
                break
        assert child.wait(PATIENCE_S) == 0
    os.close(ours)
    # The cursor that was hidden is shown again.
    assert list((home / "watch").iterdir()) == []
