"""Our plugin folder for Claude Code, which holds mod.js: its files, its place, and what keeps it from being loaded.

As measured with Claude Code 2.1.332, see MOD.md. Writes nothing itself. Implements [MOD-5], [MOD-11].
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from agentbus import __version__
from agentbus.adapters.claude_mcp.mode import settings_of
from agentbus.adapters.claude_mcp.records import config_folder
from agentbus.adapters.mcp.extension_folder import OURS
from agentbus.core.config import other_program
from agentbus.core.errors import BrokenSetup

__all__ = ["LEAST_VERSION", "MAIN", "files", "folder", "why_not"]

# The first Claude Code that loads code from a plugin.
LEAST_VERSION = (2, 1, 287)
# The file without which the folder is no plugin.
MAIN = ".claude-plugin/plugin.json"
_HOOKS = "hooks/hooks.json"
_SOURCE = Path(__file__).with_name("mod.js")
# With these, Claude Code loads no code of a plugin.
_FLAGS = ("--bare", "--safe-mode")
_SWITCH = "disableAllHooks"


def folder() -> Path:
    """Our folder among those that Claude Code loads as plugins of the user. Raises BrokenSetup as `config_folder`."""
    return config_folder() / "skills" / "agentbus"


def files(_command: Sequence[str] = ()) -> Mapping[str, str]:
    """What our folder holds, by name. The server is registered with `claude mcp`, so no command stands in it."""
    described = {
        "name": "agentbus",
        "version": __version__,
        "description": f"{OURS}puts messages into this session; `agentbus disable claude-mcp` removes it",
        "license": "MIT",
    }
    return {
        MAIN: json.dumps(described, indent=2) + "\n",
        _HOOKS: json.dumps({"modules": [f"./{_SOURCE.name}"]}) + "\n",
        f"hooks/{_SOURCE.name}": _SOURCE.read_text(encoding="utf-8"),
    }


def why_not(arguments: Sequence[str], version: str, cwd: str) -> str:
    """Why a session with these arguments has not loaded our module; "" if nothing is known that keeps it from that.

    `version` is that of Claude Code; empty if it is not known.
    """
    if not _is_installed():
        return "its agentbus module is not installed (agentbus enable claude-mcp)"
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if numbers is not None and tuple(map(int, numbers.groups())) < LEAST_VERSION:
        return f"Claude Code {numbers[0]} loads no modules, {'.'.join(map(str, LEAST_VERSION))} does"
    for flag in _FLAGS:
        if flag in arguments:
            return f"with {flag}, Claude Code loads no modules"
    for settings, where in settings_of(arguments, cwd):
        if isinstance(settings, dict) and settings.get(_SWITCH) is True:
            return f"{_SWITCH} in {where} keeps its agentbus module away"
    return ""


def _is_installed() -> bool:
    """Whether our module is where Claude Code looks for it: in the plugin that has started us, or in our own folder."""
    places = [Path(one) for one in (other_program("CLAUDE_PLUGIN_ROOT"),) if one]
    with suppress(BrokenSetup):  # where the user's folder is is not known
        places.append(folder())
    return any((place / _HOOKS).is_file() for place in places)
