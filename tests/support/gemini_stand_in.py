"""What Gemini CLI does with the hooks of an extension, and what it records: as seen with 0.61.0.

It runs the hook of a prompt, of the result of a tool, and of the end of a turn; what they bring stands in the next
request to the model. Every `<` and `>` is escaped, except in the prompt of a turn that a hook has begun.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from agentbus.core.model import timestamp
from tests.support.command import clean_env

SESSION = "1d3e7ed6-b721-401b-a910-97516dfe3c5c"
# Runs a hook: gets what it is told, returns what it prints.
Run = Callable[[dict[str, Any]], str]


def run_process(home: Path) -> Run:
    """Run the real command."""

    def run(said: dict[str, Any]) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "agentbus.adapters.gemini.hook"],
            env=clean_env(home),
            input=json.dumps(said),
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert done.stderr == ""
        return done.stdout

    return run


def ask_socket(folder: Path, *, prints: bool = True) -> Run:
    """Do what the command does, in this process: ask at the socket in `folder`. Without `prints`, be killed then."""

    def run(said: dict[str, Any]) -> str:
        (path,) = folder.glob("*.sock")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(path))
            try:
                connection.sendall(json.dumps(said).encode() + b"\n")
                with connection.makefile("rb") as lines:
                    answer = lines.readline().decode()
            except OSError:
                return ""  # it does not answer everybody
            if answer.strip() and prints:
                connection.sendall(b"\n")
        return answer if prints else ""

    return run


class GeminiStandIn:
    """A session. `requests` are what its model was given, each the texts since the last answer."""

    def __init__(self, folder: Path, run: Run, session: str = SESSION) -> None:
        self.run = run
        self.session = session
        self.chats = folder / "chats"
        self.chats.mkdir(parents=True, exist_ok=True)
        self.requests: list[list[str]] = []
        self._history: list[dict[str, Any]] = []
        self._number = 0
        self._is_dirty = False
        self._note({"sessionId": session, "kind": "main"})

    @property
    def transcript(self) -> Path:
        return self.chats / f"session-2026-11-27T13-19-{self.session[:8]}.jsonl"

    def _note(self, row: dict[str, Any]) -> None:
        with self.transcript.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, separators=(",", ":")) + "\n")

    def hook(self, event: str, **more: str) -> dict[str, Any]:
        said = {"session_id": self.session, "transcript_path": str(self.transcript), "hook_event_name": event, **more}
        answer = self.run(said)
        return dict(json.loads(answer)) if answer.strip() else {}

    @staticmethod
    def _brought(answer: dict[str, Any]) -> str:
        context = answer.get("hookSpecificOutput", {}).get("additionalContext", "")
        escaped = context.replace("<", "&lt;").replace(">", "&gt;")
        return f"<hook_context>{escaped}</hook_context>" if context else ""

    def _ask_model(self, content: list[dict[str, Any]], texts: list[str], *, is_cancelled: bool) -> None:
        self._number += 1
        now = timestamp(time.time_ns() // 1_000_000)
        row = {"id": f"u{self._number}", "timestamp": now, "type": "user", "content": content}
        self._note(row)
        self._note({"$set": {"lastUpdated": "2026-11-27T13:19:23.499Z"}})
        self.requests.append(texts)
        if is_cancelled:
            self._note({"id": f"i{self._number}", "type": "info", "content": "Request cancelled."})
            self._is_dirty = True
            return
        self._history.append(row)
        self._note({"id": f"g{self._number}", "type": "gemini", "content": "ok"})

    def prompt(self, text: str = "go on", *, is_cancelled: bool = False) -> None:
        """The user's prompt, up to the model's answer, or to Esc."""
        brought = self._brought(self.hook("BeforeAgent", prompt=text))
        if self._is_dirty:
            # What was cancelled has left the history.
            self._note({"$set": {"messages": self._history}})
            self._is_dirty = False
        texts = [text, *([brought] if brought else [])]
        self._ask_model([{"text": one} for one in texts], texts, is_cancelled=is_cancelled)

    def tool(self, output: str = "hi", name: str = "run_shell_command", *, is_subagents: bool = False) -> None:
        """The end of a tool, up to the model's answer."""
        brought = self._brought(self.hook("AfterTool", tool_name=name))
        if is_subagents:
            assert not brought
            return
        text = f"<untrusted_context>\n{output}\n</untrusted_context>" + (f"\n\n{brought}" if brought else "")
        # The line of the answer that has called the tool is written again.
        self._note({"id": f"g{self._number}", "type": "gemini", "content": "", "toolCalls": [{"result": text}]})
        response = {"functionResponse": {"name": name, "response": {"output": text}}}
        self._ask_model([response], [text], is_cancelled=False)

    def end(self) -> int:
        """The end of the turn, and of those that hooks begin. Returns how many they were."""
        count = 0
        while (answer := self.hook("AfterAgent", prompt_response="ok")).get("decision") == "deny":
            count += 1
            self.prompt(answer["reason"])
        return count

    def clear(self, session: str) -> None:
        """/clear: another session, with another record."""
        self.session = session
        self._history = []
        self._is_dirty = False
        with suppress(FileNotFoundError):
            self.transcript.unlink()
        self._note({"sessionId": session, "kind": "main"})
