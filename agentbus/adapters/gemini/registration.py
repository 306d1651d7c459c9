"""The adapter's registration with Gemini CLI: an extension of ours, a folder with the server, the hooks and a context.

Knows Gemini CLI's folders and settings as documented, and as recorded with 0.61.0, but not the bus. Implements [REG-8],
[DOCTOR-9].
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from agentbus.adapters.gemini.delivery import AFTER_AGENT, AFTER_TOOL, BEFORE_AGENT
from agentbus.adapters.gemini.hooks import BEFORE_TOOL, SUBAGENT_TOOL
from agentbus.adapters.mcp.extension_folder import ExtensionFolder, describing
from agentbus.adapters.mcp.registration import Unreadable, read_object
from agentbus.core.adapter import Manifest, Registration, own_command
from agentbus.core.config import expanded, other_program
from agentbus.core.errors import BrokenSetup
from agentbus.core.findings import Finding, Level
from agentbus.core.model import Peer

__all__ = ["GeminiRegistration", "registration"]

_MAIN = "gemini-extension.json"
_MODULE = "agentbus.adapters.gemini.hook"
# A hook takes some 50 ms; the session waits so long for one that hangs.
_HOOK_MS = 5_000
# What the server's instructions cannot know: where a hook's words stand. Each request has it, so it is short.
_CONTEXT = """\
# agentbus

A message of agentbus stands in a hook context, with `&lt;` for `<`, or is a prompt that begins with `agentbus`.
"""


def registration(manifest: Manifest) -> Registration:
    """The registration of the adapter that `manifest` describes."""
    return GeminiRegistration(manifest)


def _folder() -> Path:
    """The folder of Gemini CLI's settings. Raises BrokenSetup as `expanded` does."""
    return Path(expanded(other_program("GEMINI_CLI_HOME") or "~", "GEMINI_CLI_HOME"), ".gemini")


class GeminiRegistration(ExtensionFolder):
    """See Registration. `own` is the command that is registered."""

    def __init__(self, manifest: Manifest, *, own: Callable[[], list[str]] = own_command) -> None:
        def make(command: Sequence[str]) -> dict[str, str]:
            name = manifest.server_name
            # The same interpreter, with the module that does nothing else: see hook.py.
            run = shlex.join([*command[: -len(manifest.serve) - 1], _MODULE])
            hook = {"type": "command", "name": name, "command": run, "timeout": _HOOK_MS}
            hooks: dict[str, list[dict[str, Any]]] = {
                event: [{"hooks": [hook]}] for event in (BEFORE_AGENT, AFTER_TOOL, AFTER_AGENT)
            }
            hooks[BEFORE_TOOL] = [{"matcher": f"^{SUBAGENT_TOOL}$", "hooks": [hook]}]
            return {
                _MAIN: describing(name, command),
                "hooks/hooks.json": json.dumps({"hooks": hooks}, indent=2) + "\n",
                "GEMINI.md": _CONTEXT,
            }

        super().__init__(
            manifest,
            where=lambda: _folder() / "extensions",
            main=_MAIN,
            make=make,
            tried=(0, 61),
            update="npm install -g @google/gemini-cli",
            own=own,
        )

    def unattended(self) -> str:
        """See Registration. [MOD-4]"""
        return (
            "Gemini CLI asks before each call of a tool, and headless it does not offer the tools at all: to allow "
            f'them, put a [[rule]] with mcpName = "{self._manifest.server_name}", toolName = "*", decision = "allow" '
            "and priority = 100 into a file ~/.gemini/policies/agentbus.toml"
        )

    def traps(self) -> list[Finding]:
        """What the user's settings say about hooks and about our server; a project's are not looked at. [DOCTOR-9]"""
        try:
            folder = _folder()
            settings = folder / "settings.json"
            said = read_object(settings)
        except (Unreadable, BrokenSetup):
            return []  # a file with comments, for example: the client reads it, and the session says how it receives
        found = []
        name = self._manifest.server_name
        hooks = said.get("hooksConfig")
        hooks = hooks if isinstance(hooks, dict) else {}
        off = hooks.get("disabled")
        if hooks.get("enabled") is False or (isinstance(off, list) and name in off):
            seen = f"{settings} switches our hooks off: its sessions get messages by check_messages alone"
            remedy = "look at hooksConfig there, and start the sessions again"
            found.append(Finding("plugin", Level.WRONG, seen, remedy))
        own = said.get("mcpServers")
        if isinstance(own, dict) and name in own:
            seen = f"{settings} has an entry {name} of the user's own, which stands above the extension's"
            found.append(Finding("registration", Level.NOTE, seen, f"gemini mcp remove -s user {name}"))
        with suppress(Unreadable):
            switched = read_object(folder / "extensions" / "extension-enablement.json").get(name)
            rules = switched.get("overrides") if isinstance(switched, dict) else None
            if isinstance(rules, list) and any(str(rule).startswith("!") for rule in rules):
                seen = f"the extension {name} is switched off in some folders"
                found.append(Finding("plugin", Level.NOTE, seen, f"gemini extensions enable {name}"))
        return found

    def delivery(self, peer: Peer) -> Finding:
        """See Registration. A session whose terminal is gone goes on for ever, and nobody is there. [DOCTOR-9]"""
        terminal = ""
        with suppress(OSError):
            terminal = os.readlink(f"/proc/{peer.host.pid}/fd/0") if sys.platform == "linux" else ""
        if terminal.endswith("(deleted)"):
            seen = f'"{peer.name}" has lost its terminal, and Gemini CLI goes on without it: nobody prompts it any more'
            return Finding("delivery", Level.WRONG, seen, f"kill -KILL {peer.host.pid}")
        return super().delivery(peer)
