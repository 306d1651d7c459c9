"""What Claude Code itself records about a session: its registry entry, and where its transcript is.

Private formats, as recorded with 2.1.332: every field is read defensively, and without them all goes on as before.
Reads, and changes nothing. `agentbus send` to a name that nobody has loads it, so it imports what is slow when it needs
it. Implements [PROOF-1].
"""

from __future__ import annotations

import time
from collections.abc import Callable

from agentbus.core.config import expanded, other_program
from agentbus.core.errors import BrokenSetup
from agentbus.core.process import Process
from agentbus.core.values import dataclass

TYPE_CHECKING = False  # true for a type checker; importing typing would cost `agentbus send` 6 ms
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

__all__ = ["Entry", "activity", "config_folder", "entry", "registry", "settled", "state_file", "tail", "transcript"]

# An entry is written in steps while our server starts: with 2.1.332 they took 70 to 120 ms. More, for a busy machine.
_PATIENCE_S = 0.3
_POLL_S = 0.005

_VARIABLE = "CLAUDE_CONFIG_DIR"
# A session id is a UUID. It becomes part of a path, so nothing else is taken for one.
_ID_CHARACTERS = frozenset("0123456789abcdefABCDEF-")
_ID_LENGTHS = range(8, 65)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The registry entry of a live session. A field that is missing, or is not what it should be, is empty."""

    session_id: str
    cwd: str = ""
    version: str = ""
    kind: str = ""
    # The name of the session, and who gave it: "derived" is Claude Code's own choice.
    name: str = ""
    name_source: str = ""
    # Where the inbox of the session listens.
    inbox: str = ""
    # "busy" or "idle".
    status: str = ""
    # When the process started, in milliseconds since 1970 UTC; 0 if it is not said.
    started_at: int = 0


def config_folder() -> Path:
    """The folder in which Claude Code keeps its records. Raises BrokenSetup as `config.expanded` does."""
    from pathlib import Path

    return Path(_claude_folder("~/.claude"))


def registry() -> str:
    """The folder in which Claude Code keeps an entry for each live session. Raises as `config_folder` does."""
    return f"{_claude_folder('~/.claude')}/sessions"


def state_file() -> Path:
    """The file in which Claude Code keeps the registrations of the user. Raises as `config_folder` does."""
    from pathlib import Path

    return Path(_claude_folder("~"), ".claude.json")


def _claude_folder(default: str) -> str:
    return expanded(other_program(_VARIABLE) or default, _VARIABLE)


def entry(host: Process) -> Entry | None:
    """The registry entry of the session whose process is `host`; None if there is none, or it is another's."""
    import json

    try:
        with open(f"{registry()}/{host.pid}.json", encoding="utf-8") as file:
            found: Any = json.load(file)
    except (OSError, ValueError, BrokenSetup):
        return None
    if not isinstance(found, dict) or found.get("pid") != host.pid:
        return None
    # A pid is used again: the entry of an earlier process says another start.
    if str(found.get("procStart", host.started)) != host.started:
        return None
    session_id = found.get("sessionId")
    if (
        not isinstance(session_id, str)
        or len(session_id) not in _ID_LENGTHS
        or not _ID_CHARACTERS.issuperset(session_id)
    ):
        return None
    fields = {
        name: value
        for name, key in (
            ("cwd", "cwd"),
            ("version", "version"),
            ("kind", "kind"),
            ("name", "name"),
            ("name_source", "nameSource"),
            ("inbox", "messagingSocketPath"),
            ("status", "status"),
        )
        if isinstance(value := found.get(key), str)
    }
    said = found.get("startedAt")
    started_at = said if isinstance(said, int) and not isinstance(said, bool) else 0
    return Entry(session_id=session_id, started_at=started_at, **fields)


def activity(host: Process) -> str:
    """Whether the session whose process is `host` is "busy" or "idle", as its entry says; "" if it does not say."""
    found = entry(host)
    return found.status if found is not None and found.status in ("busy", "idle") else ""


def settled(host: Process, is_settled: Callable[[Entry | None], bool]) -> Entry | None:
    """The entry as soon as `is_settled`, or as it is after 0.3 s. Blocks: for the start of a server."""
    give_up_at = time.monotonic() + _PATIENCE_S
    while True:
        found = entry(host)
        if is_settled(found) or time.monotonic() >= give_up_at:
            return found
        time.sleep(_POLL_S)


def transcript(of: Entry) -> Path:
    """Where the transcript of a session is. The file is made with its first turn."""
    projects = config_folder() / "projects"
    usual = projects / of.cwd.replace("/", "-").replace(".", "-") / f"{of.session_id}.jsonl"
    if usual.exists():
        return usual
    # Folders whose names hold other characters: how these are written is not recorded.
    return next(iter(sorted(projects.glob(f"*/{of.session_id}.jsonl"))), usual)


def tail(path: Path, size: int) -> list[bytes]:
    """The lines in the last `size` bytes of a transcript; the first and last can be parts of one. Raises OSError."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - size))
        return file.read(size).split(b"\n")
