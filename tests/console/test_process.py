"""The console as a process, on a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agentbus.core.store import Store
from tests.support.command import PATIENCE_S, agentbus, clean_env, until

pytestmark = pytest.mark.timeout(120)  # it imports Textual, on a loaded machine


class Terminal:
    """`agentbus console` on a pseudo terminal of 80x24."""

    def __init__(self, home: Path, *arguments: str, **variables: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "agentbus", "console", *arguments],
            env=clean_env(home, TERM="xterm-256color", **variables),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.output = b""

    def read(self) -> bool:
        """Read what it has written; False at its end."""
        ready, _, _ = select.select([self._master], [], [], 0.05)
        try:
            data = os.read(self._master, 65_536) if ready else b""
        except OSError:  # Linux says so when the other end is closed
            return False
        self.output += data
        return True

    def until(self, text: str) -> None:
        give_up_at = time.monotonic() + PATIENCE_S
        while text.encode() not in self.output:
            assert self.read(), self.output
            assert time.monotonic() < give_up_at, self.output

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def ended(self) -> int:
        give_up_at = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            self.read()
            assert time.monotonic() < give_up_at, self.output
        return int(self.process.returncode)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@contextmanager
def terminal(home: Path, *arguments: str, **variables: str) -> Iterator[Terminal]:
    opened = Terminal(home, *arguments, **variables)
    try:
        yield opened
    finally:
        opened.close()


@pytest.mark.spec("CONSOLE-1", "CONSOLE-9")
@pytest.mark.parametrize("how", ["q", "Ctrl-C", "SIGTERM", "SIGHUP"])
def test_it_ends_cleanly_and_leaves_no_socket(home: Path, store: Store, how: str) -> None:
    store.send("backend", "ann", "may I?", now=1)
    with terminal(home, "--as", "ann") as opened:
        opened.until("1 unread for you")
        until(lambda: any(peer.name == "ann" for peer in store.live()))
        if how in ("q", "Ctrl-C"):
            opened.press(b"q" if how == "q" else b"\x03")
        else:
            opened.process.send_signal(getattr(signal, how))
        assert opened.ended() == 0, opened.output
    assert [path for folder in ("sock", "watch", "live") for path in (home / folder).glob("*")] == []
    assert "may I?" in agentbus(home, "inbox", "ann").stdout


@pytest.mark.spec("CONSOLE-6")
def test_without_colours_no_colour_is_written(home: Path, store: Store) -> None:
    store.send("backend", "ann", "may I?", now=1)
    with terminal(home, "--as", "ann", NO_COLOR="1") as opened:
        opened.until("1 unread for you")
        opened.press(b"q")
        assert opened.ended() == 0
    codes = {
        int(code) for found in re.findall(rb"\x1b\[([0-9;]*)m", opened.output) for code in found.split(b";") if code
    }
    assert codes & {7}, "the signs and the reversed parts are there"
    assert not codes & {*range(30, 38), 38, 48, *range(40, 48), *range(90, 108)}


@pytest.mark.spec("CONSOLE-1")
def test_without_a_terminal_or_textual_one_sentence_says_so(home: Path, tmp_path: Path) -> None:
    done = agentbus(home, "console")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("agentbus: the console needs a terminal: agentbus watch")
    tmp_path.joinpath("textual.py").write_text("raise ImportError('not here')\n")
    with terminal(home, PYTHONPATH=str(tmp_path)) as opened:
        assert opened.ended() == 1
        opened.read()
    assert b"pip install 'agentbus-local[console]'" in opened.output
    assert b"Traceback" not in opened.output
