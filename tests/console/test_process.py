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

from agentbus import registry
from agentbus.core.store import Store
from tests.support.command import PATIENCE_S, agentbus, clean_env, until

pytestmark = pytest.mark.timeout(120)  # it imports Textual, on a loaded machine


class Terminal:
    """`agentbus console` on a pseudo terminal of 80x24."""

    def __init__(self, home: Path, *arguments: str, stderr: Path | None = None, **variables: str) -> None:
        self._master, slave = pty.openpty()
        error = slave if stderr is None else os.open(stderr, os.O_WRONLY | os.O_CREAT)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "agentbus", "console", *arguments],
            env=clean_env(home, TERM="xterm-256color", **variables),
            stdin=slave,
            stdout=slave,
            stderr=error,
            start_new_session=True,
        )
        for fd in {slave, error}:
            os.close(fd)
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

    def hang_up(self) -> None:
        """Close the window: nothing can be read or written any more."""
        os.close(self._master)
        self._master = -1

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self._master != -1:
            os.close(self._master)


@contextmanager
def terminal(home: Path, *arguments: str, stderr: Path | None = None, **variables: str) -> Iterator[Terminal]:
    opened = Terminal(home, *arguments, stderr=stderr, **variables)
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
    with terminal(home, stderr=tmp_path / "log") as opened:
        assert opened.ended() == 2
    assert (tmp_path / "log").read_text().startswith("agentbus: the console needs a terminal")
    tmp_path.joinpath("textual.py").write_text("raise ImportError('not here')\n")
    with terminal(home, PYTHONPATH=str(tmp_path)) as opened:
        assert opened.ended() == 1
        opened.read()
    assert b"pip install 'agentbus-local[console]'" in opened.output
    assert b"Traceback" not in opened.output


@pytest.mark.spec("CONSOLE-9", "ERR-2")
def test_a_failure_within_ends_it_with_one_sentence(home: Path, tmp_path: Path) -> None:
    # As a fault of ours, or of Textual, would: in a task that nobody awaits.
    tmp_path.joinpath("sitecustomize.py").write_text(
        "from agentbus.console.desk import Desk\n"
        "def look(self, *, thoroughly=False):\n"
        "    if self.session is not None: raise ValueError('a fault within')\n"
        "    return found(self, thoroughly=thoroughly)\n"
        "found, Desk.look = Desk.look, look\n"
    )
    # Before the code under test, which this interpreter may know by this variable alone.
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with terminal(home, PYTHONPATH=path) as opened:
        assert opened.ended() == 1
        opened.read()
    assert b"agentbus: internal error" in opened.output
    assert b"a fault within" in opened.output
    assert b"Traceback" not in opened.output
    assert list((home / "sock").glob("*")) == []


@pytest.mark.spec("CONSOLE-1", "BRAKE-5")
def test_an_agent_cannot_open_it_and_pose_as_the_person(home: Path) -> None:
    with terminal(home, **{registry.CONVERSATIONS[0]: "of-an-agent"}) as opened:
        assert opened.ended() == 1
        opened.read()
    assert b"this shell belongs to an agent, and only a person can open the console" in opened.output


@pytest.mark.spec("CONSOLE-9")
@pytest.mark.parametrize("signals", [[], ["SIGHUP", "SIGCONT"]], ids=["alone", "as the kernel tells it"])
def test_it_ends_with_its_terminal(home: Path, store: Store, signals: list[str]) -> None:
    with terminal(home, "--as", "ann") as opened:
        until(lambda: any(peer.name == "ann" for peer in store.live()) or not opened.read())
        opened.hang_up()
        for name in signals:
            opened.process.send_signal(getattr(signal, name))
        # Something to draw: before, a terminal that is gone is not missed.
        agentbus(home, "send", "ann", "are you there?")
        assert opened.process.wait(PATIENCE_S) is not None
    assert [path for folder in ("sock", "watch", "live") for path in (home / folder).glob("*")] == []
