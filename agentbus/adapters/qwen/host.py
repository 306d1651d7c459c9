"""How to tell that Qwen Code is the agent process, and how its sessions receive.

Its process listens on the inbox whose address we have; names and arguments count where there is none. Reads processes,
and checks whether the inbox answers. Implements [VOID-1], [VOID-3] and [HOST-4].
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from agentbus.adapters.mcp import peer_socket
from agentbus.adapters.mcp.hosts import Choice, Link, Mode, find_host
from agentbus.adapters.mcp.inbox import InboxDelivery, PostBudget
from agentbus.adapters.qwen.inbox import QwenInbox, address
from agentbus.adapters.qwen.records import Chat, session_id
from agentbus.core import process
from agentbus.core.bus import PULL
from agentbus.core.errors import DeliveryFailed
from agentbus.core.process import Process

__all__ = ["choose"]

_INTERPRETER = re.compile(r"(node|bun)(\.exe)?")
# The program, or the script of its package.
_SCRIPT = re.compile(r"(^|/)qwen$|/qwen-code/[^/]+\.[cm]?js$")
# A list starts every server, to see whether it starts.
_CHECKS = (["mcp", "list"], ["mcp", "reconnect"])


def _words(arguments: Sequence[str]) -> list[str] | None:
    """What Qwen Code was started with, without options; None if that process is not Qwen Code."""
    if arguments and _INTERPRETER.fullmatch(os.path.basename(arguments[0])):
        arguments = [word for word in arguments[1:] if not word.startswith("-")]
    if not arguments or not _SCRIPT.search(arguments[0]):
        return None
    return [word for word in arguments[1:] if not word.startswith("-")]


def _host(chain: Sequence[Process], arguments: Callable[[Process], Sequence[str]]) -> tuple[Process, list[str] | None]:
    at = address()
    pid = peer_socket.listener(at.path) if at is not None else None
    for one in chain:
        if one.pid == pid:
            return one, _words(arguments(one)) or []
    found = find_host(lambda words: _words(words) is not None, chain=chain, arguments=arguments)
    return found.process, _words(found.arguments)


def choose(
    asked: str,
    *,
    chain: Sequence[Process] | None = None,
    arguments: Callable[[Process], Sequence[str]] = process.arguments,
) -> Choice:
    """How a session of the agent process above this one receives. `asked` is AGENTBUS_DELIVERY. [VOID-1]"""
    host, words = _host(list(process.ancestors() if chain is None else chain), arguments)
    if words is not None and words[:2] in _CHECKS:
        reason = f"qwen {' '.join(words[:2])} only asks whether the server starts"
        return Choice(host=host, mode=Mode.HEALTH_CHECK, delivery="none", reason=reason)
    if asked == PULL:
        return _pull(host, "AGENTBUS_DELIVERY is pull")
    at = address()
    if at is None:
        return _pull(host, "qwen gave it no inbox: it is headless, or agents.crossSessionMessaging is off")
    inbox = QwenInbox(at, host, lambda: session_id(host))
    try:
        inbox.connect().close()
    except DeliveryFailed as error:
        if asked != InboxDelivery.carrier:
            return _pull(host, f"its inbox cannot be used: {error}")

    def make(link: Link) -> InboxDelivery:
        budget = PostBudget(link.home, host)
        inbox.listen(link.home, budget)
        return InboxDelivery(inbox, budget, link.gate, link.report, link.frames)

    return Choice(
        host=host,
        mode=Mode.PUSHED,
        delivery=InboxDelivery.carrier,
        reason="what comes goes into its inbox",
        make=make,
        record=Chat(host),
    )


def _pull(host: Process, reason: str) -> Choice:
    return Choice(host=host, mode=Mode.PULL, delivery=PULL, reason=reason)
