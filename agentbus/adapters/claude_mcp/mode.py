"""In which permission mode a session of Claude Code is: whether it asks its user before it runs something.

Read from what started the session, and from what its transcript says since. Private formats, as recorded with 2.1.332:
what is missing, or looks different, is as if it were not there. Where two sources disagree and it is not known which is
newer, bypass counts: a message that is held back waits, and a command that ran unasked cannot be taken back. Reads, and
changes nothing. Implements [BYPASS-1].
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from agentbus.adapters.claude_mcp import records
from agentbus.adapters.mcp.transcript import instant
from agentbus.core.errors import BrokenSetup
from agentbus.core.process import Process

__all__ = ["HOLD", "REFUSE", "PermissionMode", "inbound", "settings_of", "stated"]

BYPASS = "bypassPermissions"
# What settings can do with the posts of other sessions and programs.
REFUSE, HOLD = "refuse", "hold"

# Of a transcript only the end is read: the lines of a turn with some large answers of tools.
_TAIL_BYTES = 262_144
# Where the settings of an organisation are (the client's documentation).
_MANAGED = Path("/Library/Application Support/ClaudeCode" if sys.platform == "darwin" else "/etc/claude-code")


def stated(arguments: Sequence[str], cwd: str = "", managed: Path = _MANAGED) -> tuple[str, str]:
    """The mode that a session starts in, and where that is said; empty if nothing is said.

    `arguments` are those of Claude Code. A flag stands above all settings. Among the settings, bypass counts wherever
    it stands.
    """
    if "--dangerously-skip-permissions" in arguments:
        return BYPASS, "--dangerously-skip-permissions"
    flag = _option(arguments, "--permission-mode")
    if flag:
        return flag, f"--permission-mode {flag[:40]}"
    said = [(mode, where) for found, where in settings_of(arguments, cwd, managed) if (mode := _default_mode(found))]
    return next((one for one in said if one[0] == BYPASS), said[0] if said else ("", ""))


def inbound(arguments: Sequence[str], cwd: str = "", managed: Path = _MANAGED) -> tuple[str, str]:
    """What the settings do with the posts of others, `refuse` or `hold`, and where that is said; else empty.

    The strictest counts wherever it stands, and what the client does not know as a value is held, as the client does.
    """
    found = [
        (REFUSE if said == REFUSE else HOLD, where)
        for settings, where in settings_of(arguments, cwd, managed)
        if isinstance(settings, dict) and (said := settings.get("crossSessionInbound", "accept")) != "accept"
    ]
    return next((one for one in found if one[0] == REFUSE), found[0] if found else ("", ""))


def _option(arguments: Sequence[str], flag: str) -> str:
    """The value of the last `flag`; "" if it is not there."""
    found = ""
    for word, after in zip(arguments, [*arguments[1:], ""], strict=False):
        name, is_pair, value = word.partition("=")
        if name == flag:
            found = value if is_pair else after
    return found


def settings_of(arguments: Sequence[str], cwd: str = "", managed: Path = _MANAGED) -> list[tuple[Any, str]]:
    """The settings that hold for a session that was started with these arguments, each with where it stands."""
    folder = Path(cwd) / ".claude" if cwd else None
    files = [managed / "managed-settings.json"]
    files += _listed(managed / "managed-settings.d")
    files += [folder / "settings.local.json", folder / "settings.json"] if folder is not None else []
    with suppress(BrokenSetup):  # where the user's settings are is not known
        files.append(records.config_folder() / "settings.json")
    flag = (_settings(_option(arguments, "--settings"), cwd), "--settings")
    return [flag, *((_read(path), str(path)) for path in files)]


def _settings(said: str, cwd: str) -> Any:
    """What `--settings` says: JSON, or the file of it."""
    if said.lstrip().startswith("{"):
        return _parse(said)
    return _read(Path(cwd, os.path.expanduser(said))) if said else None


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.glob("*.json"))
    except OSError:
        return []


def _read(path: Path) -> Any:
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _parse(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _default_mode(settings: Any) -> str:
    permissions = settings.get("permissions") if isinstance(settings, dict) else None
    mode = permissions.get("defaultMode") if isinstance(permissions, dict) else None
    return mode if isinstance(mode, str) else ""


class PermissionMode:
    """The mode of the session of `host`, whose arguments and working folder these are. Looks anew with each call."""

    def __init__(self, host: Process, arguments: Sequence[str], cwd: str, managed: Path = _MANAGED) -> None:
        self._host = host
        self._stated = stated(arguments, cwd, managed)
        # The newest mode that this very process is known to have recorded. It outlives /clear, as the mode does.
        self._known = ""
        # One that an earlier process may have recorded in the same transcript.
        self._doubtful = ""
        self._seen: tuple[Path, int, int] | None = None

    def bypass(self) -> str:
        """Where it is said that the session asks for no permissions now; empty if it asks. [BYPASS-1]"""
        self._look()
        if self._known:
            return "its transcript" if self._known == BYPASS else ""
        if self._stated[0] == BYPASS:
            return self._stated[1]
        return "its transcript" if self._doubtful == BYPASS else ""

    def _look(self) -> None:
        try:
            entry = records.entry(self._host)
            if entry is None:
                return
            path = records.transcript(entry)
            facts = path.stat()
            seen = (path, facts.st_size, facts.st_mtime_ns)
            if seen == self._seen:
                return
            lines = records.tail(path, _TAIL_BYTES)
        except (OSError, BrokenSetup):
            return
        self._seen = seen
        # A mode of a transcript that this one does not continue says nothing any more.
        self._doubtful = ""
        for mode, said_at in _modes(lines):
            if entry.started_at and said_at >= entry.started_at:
                self._known = mode
            else:
                self._doubtful = mode


def _modes(lines: Iterable[bytes]) -> Iterator[tuple[str, int]]:
    """The modes in the end of a transcript, oldest first, each with its instant in ms since 1970; 0 if not known.

    A `permission-mode` line has no instant. It counts as old as the line before it.
    """
    said_at = 0
    for line in lines:
        found = _parse(line)
        if not isinstance(found, dict):
            continue  # the first line may be cut off, and the last one is just being written
        said_at = instant(found.get("timestamp")) or said_at
        mode = found.get("permissionMode")
        # A subagent, in a side chain, has a mode of its own.
        is_main = found.get("type") in ("permission-mode", "user") and not found.get("isSidechain")
        if is_main and isinstance(mode, str) and mode:
            yield mode, said_at
