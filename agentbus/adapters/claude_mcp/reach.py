"""The sessions of Claude Code that run already, and how one without a server of ours is posted to.

Any process of the same user may post to the inbox of a session. The client holds such a post for its user, or refuses
it, where the session's settings or its permission mode say so; then nothing is posted. Private formats, as recorded
with 2.1.332. To list them imports little, because `agentbus send` to a name that nobody has waits for it. Implements
[REACH-1] to [REACH-3].
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path

from agentbus.adapters.claude_mcp import records
from agentbus.core import process
from agentbus.core.adapter import Reachable, own_command
from agentbus.core.errors import BrokenSetup, DeliveryFailed
from agentbus.core.model import Envelope
from agentbus.core.names import session_wish
from agentbus.core.process import Process

__all__ = ["sessions"]

# A message that is longer is not posted: the session has no tool with which it could read it otherwise.
_MOST_CHARS = 200_000
_PID = re.compile(r"[0-9]{1,10}")


def sessions(runtime: str, home: Path) -> list[Reachable]:
    """The live sessions that have a name and an inbox, whoever has started them. `home` is that of the bus. [REACH-1]

    `runtime` is the id of this adapter. Without the client's records there are none.
    """
    try:
        names = os.listdir(records.config_folder() / "sessions")
    except (OSError, BrokenSetup):
        return []
    pids = [
        int(pid) for pid, _, kind in (name.partition(".") for name in names) if kind == "json" and _PID.fullmatch(pid)
    ]
    with process.one_look():
        hosts = [host for pid in sorted(pids) if (host := process.look_up(pid)) is not None]
    return [found for host in hosts if (found := _session(runtime, home, host)) is not None]


def _session(runtime: str, home: Path, host: Process) -> Reachable | None:
    entry = records.entry(host)
    name = session_wish(entry.name) if entry is not None else None
    if entry is None or name is None or not entry.inbox:
        return None
    place = str(records.transcript(entry))
    return Reachable(
        name=name,
        host=host,
        session=entry.session_id,
        runtime=runtime,
        cwd=entry.cwd,
        # Places are kept one a line, and in a database that takes text only.
        place=place if place.isprintable() else "",
        held=partial(_held, host, entry.cwd),
        post=partial(_post, host, Path(entry.inbox), name, home),
    )


def _held(host: Process, cwd: str) -> str:
    """Why the session would not give a post of ours to its model; "" if it would. [REACH-3]"""
    from agentbus.adapters.claude_mcp import mode

    arguments = tuple(process.arguments(host))
    if not arguments:
        return "how it was started cannot be read"
    said, where = mode.inbound(arguments, cwd)
    if said == mode.REFUSE:
        return f"it refuses messages of others (crossSessionInbound in {where})"
    if said:
        return f"its client would hold it for its user (crossSessionInbound in {where})"
    bypass = mode.PermissionMode(host, arguments, cwd).bypass()
    return f"its client would hold it for its user (bypassPermissions, by {bypass})" if bypass else ""


def _post(host: Process, path: Path, name: str, home: Path, batch: Sequence[Envelope]) -> int:
    """Post the first of `batch` as one text; how many they are. Raises DeliveryFailed; then nothing was posted.

    It does not wait: what the session's socket does not take at once is not posted. [REACH-2]
    """
    from agentbus.adapters.claude_mcp.frames import FRAMES
    from agentbus.adapters.claude_mcp.inbox import frame
    from agentbus.adapters.mcp.inbox import Address, Inbox, PostBudget, compose, mark

    fitting = list(takewhile(lambda one: len(one.text) <= _MOST_CHARS, batch))
    if not fitting:
        raise DeliveryFailed("it is too long for its inbox")
    with Inbox(Address(path, ""), host, lambda text: frame(text, "")).connect() as connection:
        if not PostBudget(home, host).take():
            raise DeliveryFailed("too many messages went into its inbox just now")
        how = f"To answer, run: {_command(home)} send NAME 'TEXT' --from {name} --reply-to MSG_ID"
        text, count = compose(fitting, mark(), FRAMES, how=how)
        line = frame(text, "")
        try:
            # A line without its end is dropped by the session.
            if connection.send(line) == len(line):
                connection.shutdown(socket.SHUT_WR)
                return count
        except OSError as error:
            raise DeliveryFailed(f"its inbox accepts nothing ({error.strerror})") from error
    raise DeliveryFailed("its inbox has no room just now")


def _command(home: Path) -> str:
    """What the session's shell has to type for this agentbus on this bus."""
    program = "agentbus" if shutil.which("agentbus") else shlex.join(own_command())
    is_usual = str(home) == os.path.expanduser("~/.agentbus")
    return program if is_usual else f"AGENTBUS_HOME={shlex.quote(str(home))} {program}"
