"""Draw the terminal pictures of the README: python examples/record.py [demo] [watch] [console]

It runs `agentbus demo`, `agentbus watch` and `agentbus console` in a real pseudo-terminal, on separate buses. It reads
what a terminal would show and draws it as examples/*.svg. Everything in the pictures really happened, times included.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import queue
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pyte
from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
PATIENCE_S = 60.0
# rich's pictures load a font from the network. A picture in a repository should not do that.
FONT = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


class Terminal:
    """A command in a pseudo-terminal, and the screen that it has drawn so far."""

    def __init__(self, command: list[str], *, columns: int, lines: int, env: dict[str, str], cwd: Path) -> None:
        self.columns = columns
        self.screen = pyte.HistoryScreen(columns, lines, history=1_000)
        self._stream = pyte.ByteStream(self.screen)
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env={**env, "TERM": "xterm-256color"}, cwd=cwd
        )
        os.close(theirs)

    def read(self, seconds: float) -> bool:
        """Draw the output that arrives within `seconds`. Returns False once no more output can come."""
        give_up_at = time.monotonic() + seconds
        while (left_s := give_up_at - time.monotonic()) > 0:
            if not select.select([self._ours], [], [], left_s)[0]:
                break
            try:
                drawn = os.read(self._ours, 65_536)
            except OSError:
                return False
            if not drawn:
                return False
            self._stream.feed(drawn)
        return True

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())
        self.read(0.7)

    def until(self, text: str) -> None:
        give_up_at = time.monotonic() + PATIENCE_S
        while not any(text in line for line in self.screen.display):
            if time.monotonic() > give_up_at:
                raise SystemExit(f"record.py: {text!r} was not seen:\n" + "\n".join(self.screen.display))
            self.read(0.1)

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        while self.read(1.0) and self.process.poll() is None:
            pass
        self.process.wait(PATIENCE_S)
        os.close(self._ours)

    def draw(self, typed: str, path: Path) -> None:
        """Write a picture: the command that was typed, and below it what the screen shows."""
        rows = [_text(row, self.columns) for row in self.screen.history.top]
        rows += [_text(self.screen.buffer[number], self.columns) for number in range(self.screen.lines)]
        while rows and not rows[-1].plain.strip():
            rows.pop()
        with open(os.devnull, "w") as nowhere:
            console = Console(record=True, width=self.columns, file=nowhere, force_terminal=True)
            console.print(Text.assemble(("$ ", "dim"), (typed, "bold")))
            for row in rows:
                console.print(row, no_wrap=True, overflow="crop")
            svg = console.export_svg(title=typed, unique_id=path.stem)
        svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
        svg = re.sub(r"font-family: (Fira Code|arial)[^;]*;", f"font-family: {FONT};", svg)
        svg = svg.replace("<!-- Generated with Rich https://www.textualize.io -->\n", "")
        path.write_text(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE), encoding="utf-8")
        print(f"{path}: {len(rows)} lines")


def _text(row: Any, columns: int) -> Text:
    text = Text()
    for column in range(columns):
        cell = row[column]
        style = " ".join(
            ["bold"] * cell.bold
            + ["italic"] * cell.italics
            + ["underline"] * cell.underscore
            + ["reverse"] * cell.reverse
            + ([_colour(cell.fg)] if cell.fg != "default" else [])
            + ([f"on {_colour(cell.bg)}"] if cell.bg != "default" else [])
        )
        text.append(cell.data, style or None)
    text.rstrip()
    return text


def _colour(name: str) -> str:
    """What rich calls a colour of pyte: a name, or six hex digits."""
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    return re.sub(r"^bright(?=[a-z])", "bright_", name.replace("brown", "yellow"))


class Session:
    """An agent's session: the server, and a minimal client that calls its tools."""

    def __init__(self, name: str, env: dict[str, str], cwd: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "agentbus", "serve", "claude-mcp"],
            env={**env, "AGENTBUS_NAME": name, "AGENTBUS_DELIVERY": "channel"},
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._next_id = 0
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        # Reads all the time, because an event that nobody reads is not delivered.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        client = {"name": "record.py", "version": "1"}
        self.ask("initialize", {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": client})
        self._write({"method": "notifications/initialized"})
        self.ask("tools/list", {})

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        self._process.stdin.flush()

    def ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._next_id += 1
        self._write({"id": self._next_id, "method": method, "params": params})
        found = self._answers.get(timeout=PATIENCE_S)
        assert found["id"] == self._next_id, found
        return found

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "id" in message:
                self._answers.put(message)

    def call(self, tool: str, **arguments: Any) -> None:
        found = self.ask("tools/call", {"name": tool, "arguments": arguments})
        assert not found["result"].get("isError"), found

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)


def record_demo(env: dict[str, str], cwd: Path) -> None:
    terminal = Terminal(
        [sys.executable, "-m", "agentbus", "demo"], columns=118, lines=60, env={**env, "HOME": str(cwd)}, cwd=cwd
    )
    while terminal.read(PATIENCE_S):
        pass
    if terminal.process.wait(PATIENCE_S):
        raise SystemExit("record.py: the demo has failed:\n" + "\n".join(terminal.screen.display))
    terminal.draw("agentbus demo", HERE / "demo.svg")


def record_watch(env: dict[str, str], cwd: Path) -> None:
    folders = {name: cwd / name for name in ("frontend", "backend")}
    for folder in folders.values():
        folder.mkdir()
    terminal = Terminal([sys.executable, "-m", "agentbus", "watch"], columns=118, lines=26, env=env, cwd=cwd)
    terminal.until("Ctrl-C ends this")
    sessions = {name: Session(name, env, folder) for name, folder in folders.items()}
    terminal.read(1.0)
    sessions["frontend"].call("send_message", to="backend", text="Which port does the API listen on?")
    terminal.read(0.7)
    sessions["backend"].call("send_message", to="frontend", text="8080, and /health says ok.", reply_to=1)
    terminal.read(0.7)
    command = [sys.executable, "-m", "agentbus", "send", "--from", "ci", "database", "migration 12 is on main"]
    subprocess.run(command, env=env, cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    sessions["frontend"].call("check_messages")
    terminal.until("#3")
    terminal.read(0.7)
    terminal.draw("agentbus watch", HERE / "watch.svg")
    for session in sessions.values():
        session.end()
    terminal.end()


def record_console(env: dict[str, str], cwd: Path) -> None:
    folders = {name: cwd / "work" / name for name in ("frontend", "backend", "tests", "docs")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    sessions = {name: Session(name, env, folder) for name, folder in folders.items()}
    doing = {"frontend": "builds the login page", "backend": "moves the users to schema 12", "tests": "waits for CI"}
    for name, status in doing.items():
        sessions[name].call("set_status", text=status)
    for name in ("backend", "tests"):
        sessions[name].call("join_group", group="@review")
    sessions["frontend"].call("send_message", to="backend", text="Which port does the API listen on?")
    sessions["backend"].call("send_message", to="frontend", text="8080, and /health says ok.", reply_to=1)
    sessions["frontend"].call("send_message", to="@review", text="The login page is on branch login: please look.")
    command = [sys.executable, "-m", "agentbus", "send", "--from", "ci", "database", "migration 12 is on main"]
    subprocess.run(command, env=env, cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    command = [sys.executable, "-m", "agentbus", "console", "--as", "ann"]
    terminal = Terminal(command, columns=118, lines=26, env=env, cwd=cwd)
    terminal.until("you are ann")
    terminal.until("migration 12")
    sessions["docs"].call("set_status", text="writes the changelog")
    question = "May I drop the table users_old? Nothing reads it any more, and the copy of last night is whole."
    asking = threading.Thread(target=sessions["backend"].call, args=["ask"], kwargs={"to": "ann", "text": question})
    asking.start()
    terminal.until("May I drop")
    terminal.press("r")
    terminal.press("Yes, drop it. Tell @review when it is done.")
    terminal.draw("agentbus console --as ann", HERE / "console.svg")
    terminal.press("\r")
    asking.join(PATIENCE_S)
    terminal.until("answered")
    terminal.press("\t")
    terminal.press("\x1b[B")
    terminal.press("\x1b[B")
    terminal.press("p")
    terminal.draw("agentbus console --as ann", HERE / "console-pause.svg")
    terminal.press("n")
    terminal.end()
    for session in sessions.values():
        session.end()


def main() -> None:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("AGENTBUS_", "CLAUDE", "NO_COLOR"))}
    with tempfile.TemporaryDirectory(prefix="agentbus-", dir="/tmp") as folder:
        wanted = {"demo": record_demo, "watch": record_watch, "console": record_console}
        for name in sys.argv[1:] or wanted:
            wanted[name]({**kept, "AGENTBUS_HOME": f"{folder}/{name}-bus"}, Path(folder))


if __name__ == "__main__":
    main()
