"""How to tell that OpenCode is the agent process, and how its sessions receive.

OpenCode says its pid (OPENCODE_PID), and our plugin says where it listens. Both are inherited by all that runs below,
so they count only if OpenCode is the agent process. Reads processes, and connects to the plugin. Implements [VOID-1],
[VOID-3] and [HOST-3].
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from agentbus.adapters.mcp.hosts import Choice, Host, Mode, find_host
from agentbus.adapters.mcp.inbox import Address
from agentbus.adapters.opencode.door import Door, PluginDelivery, Requests
from agentbus.core import process
from agentbus.core.bus import PULL
from agentbus.core.config import other_program
from agentbus.core.errors import DeliveryFailed
from agentbus.core.process import Process

__all__ = ["OpenCode"]

_PROGRAM = re.compile(r"\.?opencode(\.exe)?")


def _is_named(words: Sequence[str]) -> bool:
    return bool(words) and _PROGRAM.fullmatch(os.path.basename(words[0])) is not None


class OpenCode:
    """The OpenCode process that has started this server, and the plugin in it.

    `chain` and `arguments` are passed to `find_host`.
    """

    def __init__(
        self,
        chain: Sequence[Process] | None = None,
        arguments: Callable[[Process], Sequence[str]] = process.arguments,
    ) -> None:
        self.host: Host = find_host(_is_named, chain=chain, arguments=arguments)
        self._is_opencode = self.host.is_client or other_program("OPENCODE_PID") == str(self.host.process.pid)
        path, token = other_program("AGENTBUS_OPENCODE_DOOR"), other_program("AGENTBUS_OPENCODE_TOKEN")
        self.door = Door(Address(Path(path), token), self.host.process) if path and token else None

    def choose(self, asked: str) -> Choice:
        """How a session receives. `asked` is AGENTBUS_DELIVERY. [VOID-1]"""
        host = self.host.process
        words = [word for word in self.host.arguments[1:] if not word.startswith("-")]
        if self._is_opencode and words[:2] in (["mcp", "list"], ["mcp", "ls"]):
            reason = f"opencode mcp {words[1]} only asks whether the server starts"
            return Choice(host=host, mode=Mode.HEALTH_CHECK, delivery="none", reason=reason)
        if asked == PULL:
            return self._pull("AGENTBUS_DELIVERY is pull")
        if self.door is None:
            trouble = other_program("AGENTBUS_OPENCODE_TROUBLE")
            return self._pull(f"our plugin has no socket: {trouble}" if trouble else "not started by our plugin")
        try:
            self.door.open()
        except DeliveryFailed as error:
            return self._pull(f"our plugin cannot be used: {error}")
        door = self.door
        return Choice(
            host=host,
            mode=Mode.PUSHED,
            delivery=PluginDelivery.carrier,
            reason="our plugin puts what comes into the session",
            make=lambda link: PluginDelivery(door, link.gate, link.report, link.frames),
            held=self._held,
            record=Requests(door),
        )

    def _pull(self, reason: str) -> Choice:
        return Choice(host=self.host.process, mode=Mode.PULL, delivery=PULL, reason=reason)

    def _held(self) -> str:
        assert self.door is not None
        self.door.poll()
        return self.door.held

    def conversation(self, _host: Process) -> str:
        """The session that the plugin posts to; "" if there is none yet. [NAME-8]"""
        if self.door is None:
            return ""
        self.door.poll()
        return self.door.session
