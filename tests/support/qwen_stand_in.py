"""A stand-in for the inbox of Qwen Code, as its "Cross-Session Protocol" describes it: limits, and receipts.

`policy` is what becomes of a post: `delivered`, `silent` (delivered, but the receipt is lost), or any other status.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.inbox_stand_in import TOKEN, InboxStandIn, now

SESSION = "5f1d0c9e-3b2a-4e8f-9c7d-1a2b3c4d5e6f"


class QwenStandIn(InboxStandIn):
    """Listens at `path` until closed. `settled` are the ids of posts, with what became of each."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic, reads: bool = True) -> None:
        self.policy: list[str] = ["delivered"]  # the last one stays
        self.session = SESSION
        self.settled: dict[str, str] = {}
        self.posts: list[dict[str, Any]] = []
        super().__init__(path, clock=clock, reads=reads)

    def _take(self, connection: socket.socket) -> None:
        auth, *posts = [json.loads(line) for line in connection.makefile("r", encoding="utf-8")] or [{}]
        if auth.get("token") != TOKEN:
            return
        for post in posts:
            self.posts.append(post)
            self.answer(post, self._judge(post))

    def _judge(self, post: dict[str, Any]) -> str:
        if post["msgId"] in self.settled:
            return self.settled[post["msgId"]]
        if post["toSessionId"] != self.session:
            return "misaddressed"
        policy = self.policy.pop(0) if len(self.policy) > 1 else self.policy[0]
        if policy not in ("delivered", "silent"):
            return policy
        before = len(self.texts)
        self._give(post["message"]["content"])
        if len(self.texts) == before:
            return "dropped"
        self.settled[post["msgId"]] = "delivered"
        return policy

    def answer(self, post: dict[str, Any], status: str) -> None:
        """Send a receipt, as Qwen Code does, unless it is lost."""
        if status == "silent" or "from" not in post:
            return
        receipt = {
            "msgV": 1,
            "msgId": os.urandom(8).hex(),
            "type": "control",
            "action": "delivery_status",
            "status": status,
            "origMsgId": post["msgId"],
        }
        auth = {"msgV": 1, "type": "auth", "token": post["replyToken"]}
        # A sender that has gone is no news to it.
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as back:
            back.connect(post["from"])
            back.sendall("".join(json.dumps(line) + "\n" for line in (auth, receipt)).encode())


def main() -> None:
    """Act as `qwen`: bind an inbox, start the server on our own stdin and stdout, keep a record and a transcript."""
    import signal

    from agentbus.core.process import current

    home = Path(os.environ["QWEN_HOME"])
    far = QwenStandIn(Path(os.environ["INBOX_PATH"]))
    chats = home / "projects" / "p" / "chats"
    for folder in (home / "sessions", chats):
        folder.mkdir(parents=True)
    here = current()
    record = {"schemaVersion": 1, "pid": here.pid, "procStart": f"boot:{here.started}", "sessionId": SESSION}
    (home / "sessions" / f"{here.pid}.json").write_text(json.dumps(record))

    def on_text(text: str) -> None:
        shown = re.sub(r"<(?=/?\w)", "&lt;", text)
        parts = [{"text": f'<cross_session_message from="own process">\n{shown}\n</cross_session_message>'}]
        row = {
            "type": "user",
            "subtype": "notification",
            "timestamp": now(),
            "message": {"role": "user", "parts": parts},
        }
        with (chats / f"{SESSION}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    far.on_text = on_text
    env = {
        **os.environ,
        "QWEN_CODE_MESSAGING_SOCKET": str(far.path),
        "QWEN_CODE_MESSAGING_TOKEN": TOKEN,
        "QWEN_CODE_SESSION_ID": SESSION,
        "QWEN_CODE_PROJECT_DIR": str(chats.parent),
    }
    child = subprocess.Popen([sys.executable, "-m", "agentbus", "serve", "qwen"], env=env)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: child.send_signal(number))
    sys.exit(child.wait())


if __name__ == "__main__":
    main()
