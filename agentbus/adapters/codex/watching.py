"""Which terminal program watches a thread of a Codex app server.

An app server keeps a thread for a minute after its terminal has gone, or has turned to another conversation, and a
message would start a turn that nobody sees. A terminal gives each of its threads a server of its own, `codex_tui`, at
an address that is no other terminal's: so it is known which threads are of one terminal, and, where the system tells
who listens there, which process that is. Measured with 0.169; where there is no such address, nothing is concluded.
Only reads. Implements [CODEX-3].
"""

from __future__ import annotations

import os
import re
from contextlib import suppress

from agentbus.adapters.codex.app_server import AppServer
from agentbus.core import process
from agentbus.core.errors import DeliveryFailed
from agentbus.core.process import Process

__all__ = ["origin", "terminal"]

_SERVER = "codex_tui"
_ORIGIN = re.compile(r"http://127\.0\.0\.1:(\d{1,5})")
_LISTENS = "0A"  # the state of a listening socket in /proc/net/tcp, proc(5)


async def origin(server: AppServer, thread_id: str) -> str:
    """The address of the terminal that the thread is of; "" if it has none, or that cannot be told."""
    asked = {"threadId": thread_id, "serverName": _SERVER, "detail": "toolsAndAuthOnly"}
    try:
        rows = (await server.ask("mcpServerStatus/list", asked)).get("data")
    except DeliveryFailed:
        return ""
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and row.get("name") == _SERVER and isinstance(row.get("httpOrigin"), str):
            return str(row["httpOrigin"])
    return ""


def terminal(at: str) -> Process | None:
    """The process that listens at the address `at`; None if that cannot be told."""
    found = _ORIGIN.fullmatch(at)
    if found is None:
        return None
    with suppress(OSError, ValueError):
        inode = _listening(int(found[1]))
        return None if inode is None else _owner(inode)
    return None


def _listening(port: int) -> str | None:
    """The inode of the socket that listens on this port of 127.0.0.1. Raises OSError, ValueError."""
    with open("/proc/net/tcp", encoding="ascii") as file:
        for line in file.readlines()[1:]:
            _, local, _, state, *rest = line.split()
            address, _, hexadecimal = local.partition(":")
            # The address is in the byte order of the machine.
            if state == _LISTENS and int(hexadecimal, 16) == port and address in ("0100007F", "7F000001"):
                return rest[5]
    return None


def _owner(inode: str) -> Process | None:
    """The process that holds this socket. Raises OSError."""
    wanted = f"socket:[{inode}]"
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):  # it has ended meanwhile, or is another user's
            for fd in os.scandir(f"/proc/{pid}/fd"):
                if os.readlink(fd.path) == wanted:
                    return process.look_up(int(pid))
    return None
