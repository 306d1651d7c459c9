"""A stand-in for our plugin in OpenCode: takes posts on a unix socket, and says which of them a model was given."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

TOKEN = "s3cret-of-the-door"


class DoorStandIn:
    """Listens at `path` until closed. `posts` are those that came, by key, in order, each once.

    Each is given to the model by `give`, or at once if `gives`.
    """

    def __init__(self, path: Path, *, gives: bool = True, held: str = "", session: str = "ses_1") -> None:
        self.path = path
        self.posts: dict[str, str] = {}
        self.given: set[str] = set()
        self.gives = gives
        self.connections = 0
        self._state = {"session": session, "held": held}
        self._peer: socket.socket | None = None
        self._lock = threading.Lock()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._listen()

    def _listen(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer, peer.makefile("r", encoding="utf-8", newline="\n") as lines, suppress(OSError):
                self._talk(peer, lines)

    def _talk(self, peer: socket.socket, lines: TextIO) -> None:
        first = lines.readline()
        if not first or json.loads(first).get("token") != TOKEN:
            return
        self.connections += 1
        self._peer = peer
        self.tell({"state": self._state})
        for line in lines:
            if not line.endswith("\n"):
                return
            said = json.loads(line)
            if said["post"] in self.given:
                self.tell({"taken": said["post"]})
                continue
            self.posts[said["post"]] = said["text"]
            if self.gives:
                self.give(said["post"])

    def tell(self, said: dict[str, Any]) -> None:
        with self._lock:
            if self._peer is not None:
                self._peer.sendall(json.dumps(said).encode() + b"\n")

    def state(self, **fields: str) -> None:
        self._state.update(fields)
        self.tell({"state": self._state})

    def give(self, *keys: str) -> None:
        """Say that the model was given these posts, or all that came."""
        for key in keys or [one for one in self.posts if one not in self.given]:
            self.given.add(key)
            self.tell({"taken": key})

    def hang_up(self) -> None:
        """Close the connection, and go on listening."""
        if self._peer is not None:
            with suppress(OSError):
                self._peer.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening, and hang up."""
        self.path.unlink(missing_ok=True)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()
        self._thread.join(10)

    def come_back(self) -> None:
        """Listen again after `close`."""
        self._listen()
