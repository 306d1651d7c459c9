"""By what Claude Code can start agentbus: an entry of the user, of a folder, or a plugin. Two of them are one too many.

Reads Claude Code's own files, as recorded with 2.1.332, and changes none. What looks different is as if it were not
there. Implements [TWIN-1] and [TWIN-2].
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentbus.adapters.claude_mcp.records import config_folder, state_file
from agentbus.adapters.mcp.registration import Unreadable, command_of, read_object, servers
from agentbus.core.config import other_program, working_folder
from agentbus.core.errors import BrokenSetup
from agentbus.core.text import MAX_REASON_CHARS, one_line

__all__ = ["Started", "plugins", "started_by", "twin"]

# The words with which our server is started, whatever the entry or the command is called.
_SERVE = ["serve", "claude-mcp"]


@dataclass(frozen=True, slots=True)
class Started:
    """One registration, and the command that removes it."""

    by: str
    remove: str
    is_plugin: bool = False


def plugins() -> list[Started]:
    """The plugins that are switched on and start our server."""
    try:
        switched = _read(config_folder() / "settings.json").get("enabledPlugins")
        installed = _read(config_folder() / "plugins" / "installed_plugins.json").get("plugins")
    except BrokenSetup:
        return []
    if not isinstance(switched, dict):
        return []
    places = installed if isinstance(installed, dict) else {}
    return [
        Started(f"the plugin {name}", f"claude plugin uninstall {shlex.quote(name)}", is_plugin=True)
        for name, is_on in sorted(switched.items())
        if is_on is True and any(_starts_us(folder) for folder in _folders(places.get(name)))
    ]


def _folders(installed: Any) -> Iterator[Path]:
    for one in installed if isinstance(installed, list) else [installed]:
        path = one.get("installPath") if isinstance(one, dict) else None
        if isinstance(path, str):
            yield Path(path)


def _starts_us(plugin: Path) -> bool:
    described = _read(plugin / ".claude-plugin" / "plugin.json")
    there = _read(plugin / ".mcp.json")
    # A plugin's .mcp.json may hold the entries without `mcpServers` around them.
    bare = {"mcpServers": there} if "mcpServers" not in there else there
    return any(_is_ours(entry) for of in (described, bare) for entry in servers(of).values())


def _is_ours(entry: dict[str, Any]) -> bool:
    return command_of(entry)[-2:] == _SERVE


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except Unreadable:
        return {}


def started_by(cwd: Path | None) -> list[Started]:
    """All registrations of our server that hold in the folder `cwd`; None if it cannot be told."""
    try:
        state = _read(state_file())
    except BrokenSetup:
        state = {}
    places = [(state, "the entry {} of the user", "user")]
    if cwd is not None:
        projects = state.get("projects")
        project = projects.get(str(cwd)) if isinstance(projects, dict) else None
        places += [(project if isinstance(project, dict) else {}, f"the entry {{}} for {cwd}", "local")]
        places += [(_read(cwd / ".mcp.json"), f"the entry {{}} in {cwd / '.mcp.json'}", "project")]
    found = {
        name: Started(said.replace("{}", name, 1), f"claude mcp remove -s {scope} {shlex.quote(name)}")
        for of, said, scope in places
        for name, entry in servers(of).items()
        if _is_ours(entry)
    }
    return [*found.values(), *plugins()]


def twin(cwd: Path | None = None) -> str:
    """What can have started the other server of this session, and what removes it: the end of a sentence. [TWIN-1]"""
    is_plugin = bool(other_program("CLAUDE_PLUGIN_ROOT"))
    here = working_folder()
    others = [one for one in started_by(cwd or (Path(here) if here else None)) if one.is_plugin is not is_plugin]
    return said(others) or "agentbus is registered twice with Claude Code; `claude mcp list` shows by what"


def said(others: Sequence[Started]) -> str:
    """These registrations, each with the command that removes it; empty if there are none."""
    pairs = [(one_line(one.by, MAX_REASON_CHARS), one_line(one.remove, MAX_REASON_CHARS)) for one in others]
    return " and ".join(f"it was started by {by}, which `{remove}` removes" for by, remove in pairs)
