"""A stand-in for our module inside Claude Code: asks on the socket of a session's server, and says what it did."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("agentbus", timeout=40)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self._path))


class ModStandIn:
    """Asks at `path` until closed. `posts` are the texts that it was given, in order, each with its key.

    Each is answered with `answer`, if that is set, or by `say`.
    """

    def __init__(self, path: Path, module: str = "m1", answer: dict[str, Any] | None = None) -> None:
        self.path = path
        self.module = module
        self.answer = answer
        self.posts: list[dict[str, Any]] = []
        self.refused = 0
        self._asking: _Connection | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        while not self._is_closed:
            try:
                said = self.request("next")
            except (OSError, http.client.HTTPException):
                self.refused += 1
                threading.Event().wait(0.005)
                continue
            if "post" in said and not self._is_closed:
                self.posts.append(said)
                if self.answer is not None:
                    with suppress(OSError, http.client.HTTPException):  # the server has ended meanwhile
                        self.say(said["post"], **self.answer)

    def request(self, what: str, **fields: Any) -> dict[str, Any]:
        """One request of the module. Raises OSError and HTTPException."""
        connection = _Connection(self.path)
        if what == "next":
            self._asking = connection
        try:
            connection.request("POST", f"/{what}", json.dumps({"module": self.module, **fields}))
            if what == "next" and self._is_closed:
                raise ConnectionAbortedError  # `hang_up` came before there was a connection to end
            return dict(json.loads(connection.getresponse().read()))
        finally:
            connection.close()

    def say(self, key: str, **outcome: Any) -> None:
        """Say what became of a text: `submitted=True`, `noted=True` or `dropped=WHY`."""
        self.request("said", post=key, **outcome)

    def say_beside(self, key: str, **outcome: Any) -> None:
        """The same, for a caller in whose event loop the server runs."""
        threading.Thread(target=self.say, args=(key,), kwargs=outcome, daemon=True).start()

    def hang_up(self) -> None:
        """Ask no more, as a module that is no longer there."""
        self._is_closed = True
        asking = self._asking
        if asking is not None and asking.sock is not None:
            with suppress(OSError):
                asking.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up, and wait until the thread has ended."""
        self.hang_up()
        self._thread.join(5)
