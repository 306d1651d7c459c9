"""How to tell that Gemini CLI is the agent process, and how its sessions receive.

Gemini CLI gives its servers GEMINI_CLI, which all that runs below inherits: so the nearest process above has to be it.
It is a script of Node or Bun; the outer one of two is a launcher. Reads processes. Implements [VOID-1], [VOID-3] and
[HOST-5].
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agentbus.adapters.gemini.delivery import HookDelivery
from agentbus.adapters.gemini.hooks import Hooks
from agentbus.adapters.gemini.records import Chat
from agentbus.adapters.mcp.hosts import Choice, Host, Link, Mode, find_host
from agentbus.core import process
from agentbus.core.bus import PULL
from agentbus.core.config import other_program
from agentbus.core.process import Process

__all__ = ["GeminiCli"]

_INTERPRETER = re.compile(r"(node|bun)(\.exe)?")
_SCRIPT = re.compile(r"(^|/)gemini(\.[cm]?js)?$")


def _words(arguments: Sequence[str]) -> list[str] | None:
    """What Gemini CLI was started with, without options; None if that process is not Gemini CLI."""
    if not arguments or not _INTERPRETER.fullmatch(os.path.basename(arguments[0])):
        return None
    words = [word for word in arguments[1:] if not word.startswith("-")]
    return words[1:] if words and _SCRIPT.search(words[0]) else None


class GeminiCli:
    """The Gemini CLI process that has started this server, and its hooks.

    `chain` and `arguments` are passed to `find_host`.
    """

    def __init__(
        self,
        chain: Sequence[Process] | None = None,
        arguments: Callable[[Process], Sequence[str]] = process.arguments,
    ) -> None:
        self.host: Host = find_host(lambda words: _words(words) is not None, chain=chain, arguments=arguments)
        self._hooks: Hooks | None = None
        self._chat = Chat()

    def choose(self, asked: str) -> Choice:
        """How a session receives. `asked` is AGENTBUS_DELIVERY. [VOID-1]"""
        host = self.host.process
        if (_words(self.host.arguments) or [])[:2] == ["mcp", "list"]:
            reason = "gemini mcp list only asks whether the server starts"
            return Choice(host=host, mode=Mode.HEALTH_CHECK, delivery="none", reason=reason)
        if asked == PULL:
            return self._pull("AGENTBUS_DELIVERY is pull")
        if not self.host.is_client and not other_program("GEMINI_CLI") and asked != HookDelivery.carrier:
            return self._pull("not started by Gemini CLI")
        return Choice(
            host=host,
            mode=Mode.PUSHED,
            delivery=HookDelivery.carrier,
            reason="hooks bring what comes while it works; idle, it gets that with its user's next prompt",
            make=self._make,
            # `gemini --acp` starts its servers twice.
            twin=lambda: "Gemini CLI has started it a second time, or there is an entry of the user's own",
            end=self._close,
            record=self._chat,
        )

    def _pull(self, reason: str) -> Choice:
        return Choice(host=self.host.process, mode=Mode.PULL, delivery=PULL, reason=reason)

    def _make(self, link: Link) -> HookDelivery:
        delivery = HookDelivery(self._chat, link.frames)
        self._hooks = Hooks(self.host.process, link.home, self._chat, delivery, link.gate, link.report)
        link.beside(self._hooks.run)
        return delivery

    def _close(self) -> None:
        if self._hooks is not None:
            self._hooks.close()

    def conversation(self, _host: Process) -> str:
        """What Gemini CLI calls the session; "" before its first prompt. [NAME-8]"""
        return self._hooks.session if self._hooks is not None else ""

    async def is_main_agent(self, _host: Process, _meta: Mapping[str, Any]) -> bool | None:
        """Whether the main agent makes the call that comes now; None if that cannot be told. [READ-7]"""
        return self._hooks.is_main_agent if self._hooks is not None else None
