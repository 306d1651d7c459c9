"""The command of our hooks, `python -m agentbus.adapters.gemini.hook`: a process for each event of a session.

It asks the server of its session what the model is to be given, and prints the answer, which is the server's alone. It
imports little, because the session waits for it, and it never disturbs the session: where there is no server, or it
gives no answer, nothing is printed. Implements [GEMINI-1].
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress

from agentbus.core import config, process
from agentbus.core.errors import AgentbusError

__all__ = ["FOLDER", "main"]

# Where servers listen, in the home. A socket is called after the agent process, and has digits that no other has.
FOLDER = "hooks"
# How long a server may take for an answer: some ms, unless the machine is very busy.
_PATIENCE_S = 3.0
_READ_BYTES = 65_536
# What a server needs to know of an event, and how much of it. The result of a tool, which can be large, is not needed.
_FIELDS = ("hook_event_name", "session_id", "transcript_path", "tool_name", "prompt")
_MAX_CHARS = 4_096


def main() -> None:
    """Do what the module says, and end the process with 0."""
    # A home that cannot be used, say: the session's server has said so, and this is no place to repeat it.
    with suppress(OSError, ValueError, AttributeError, AgentbusError):
        _ask(sys.stdin.buffer.read())
    # A normal exit costs some ms more, and the session waits.
    os._exit(0)


def _ask(event: bytes) -> None:
    said = json.loads(event)
    asked = {name: str(said.get(name, ""))[:_MAX_CHARS] for name in _FIELDS}
    line = json.dumps(asked).encode() + b"\n"
    for connection in _servers():
        with connection:
            answer = _answer(connection, line)
            if answer is None:
                continue  # not the server of this session, or it is just ending
            if answer.strip():
                _print(answer)
                connection.sendall(b"\n")  # it has been handed over
            return


def _servers() -> Iterator[socket.socket]:
    """Connections to the servers of the agent processes above this one, the nearest first."""
    folder = config.load().home / FOLDER
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    for one in process.ancestors() if names else ():
        for name in names:
            if name.startswith(f"{one.pid}-"):
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.settimeout(_PATIENCE_S)
                try:
                    connection.connect(str(folder / name))
                except OSError:
                    connection.close()  # left by a server that was killed
                else:
                    yield connection


def _answer(connection: socket.socket, line: bytes) -> bytes | None:
    """One line, empty if there is nothing for the model; None if the server says nothing."""
    found = b""
    try:
        connection.sendall(line)
        while not found.endswith(b"\n"):
            data = connection.recv(_READ_BYTES)
            if not data:
                return None
            found += data
    except OSError:
        return None
    return found


def _print(answer: bytes) -> None:
    left = memoryview(answer)
    while left:
        left = left[os.write(1, left) :]


if __name__ == "__main__":
    main()
