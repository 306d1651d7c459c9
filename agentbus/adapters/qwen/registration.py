"""The adapter's registration with Qwen Code: an extension of ours, a folder with one file.

Not by `qwen mcp add`: what that writes, `qwen mcp remove` does not take away whole. Knows Qwen Code's folders and
settings as documented, but not the bus. Implements [REG-7], [DOCTOR-8].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agentbus.adapters.mcp.extension_folder import ExtensionFolder, describing
from agentbus.adapters.mcp.registration import Unreadable, read_object
from agentbus.adapters.qwen.records import config_folder
from agentbus.core.adapter import Manifest, Registration, own_command
from agentbus.core.errors import BrokenSetup
from agentbus.core.findings import Finding, Level

__all__ = ["QwenRegistration", "registration"]

_MAIN = "qwen-extension.json"


def registration(manifest: Manifest) -> Registration:
    """The registration of the adapter that `manifest` describes."""
    return QwenRegistration(manifest)


class QwenRegistration(ExtensionFolder):
    """See Registration. `own` is the command that is registered."""

    def __init__(self, manifest: Manifest, *, own: Callable[[], list[str]] = own_command) -> None:
        def make(command: Sequence[str]) -> dict[str, str]:
            return {_MAIN: describing(manifest.server_name, command)}

        super().__init__(
            manifest,
            where=lambda: config_folder() / "extensions",
            main=_MAIN,
            make=make,
            tried=(0, 24),
            update="qwen update",
            own=own,
        )

    def unattended(self) -> str:
        """See Registration. [MOD-4]"""
        return (
            "unattended, a session of Qwen Code waits in the permission dialog of its own reply: allow its tools with "
            f'"mcp__{self._manifest.server_name}" under permissions.allow in settings.json'
        )

    def traps(self) -> list[Finding]:
        """What the user's settings say about messages from outside; a project's own are not looked at. [DOCTOR-8]"""
        try:
            settings = config_folder() / "settings.json"
            agents = read_object(settings).get("agents")
        except (Unreadable, BrokenSetup):
            return []  # a file with comments, for example: the client reads it, and the session says how it receives
        agents = agents if isinstance(agents, dict) else {}
        found = []
        if agents.get("crossSessionMessaging") is False:
            seen = (
                f"{settings} has agents.crossSessionMessaging off: its sessions get no messages but by check_messages"
            )
            found.append(Finding("plugin", Level.WRONG, seen, "set it to true, and start the sessions again"))
        inbound = agents.get("crossSessionInbound")
        if inbound in ("hold", "refuse"):
            seen = f"{settings} has agents.crossSessionInbound {inbound}: "
            seen += "each message waits for its user in /peers" if inbound == "hold" else "messages are turned away"
            found.append(Finding("plugin", Level.WRONG, seen, 'remove it, or set it to "accept"'))
        return found
