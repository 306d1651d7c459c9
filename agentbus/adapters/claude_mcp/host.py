"""How to tell that Claude Code is the agent process, and which delivery its session has.

In a session that was not started with the channel flag, Claude Code silently drops channel events. So its arguments
decide whether anything is pushed. Reads processes, and checks whether the inbox answers. Implements [VOID-1] to
[VOID-3].
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from agentbus.adapters.claude_mcp.inbox import Inbox, InboxDelivery, PostBudget, address
from agentbus.adapters.mcp import channel
from agentbus.adapters.mcp.hosts import Choice, Mode, find_host
from agentbus.core import process
from agentbus.core.bus import PULL
from agentbus.core.errors import DeliveryFailed
from agentbus.core.process import Process

__all__ = ["bypasses_permissions", "choose", "judge"]

# The name of this server in `claude mcp add` and in the launch flag. [VOID-1]
SERVER_NAME = "agentbus"

_CHANNEL_FLAGS = ("--channels", "--dangerously-load-development-channels")
_CLAUDE = re.compile(r"claude(\.exe)?")
_INTERPRETER = re.compile(r"(node|bun|deno|(ba|da|z|k)?sh|python[\d.]*)(\.exe)?")
# The script of Claude Code's npm package, if an interpreter runs it.
_CLAUDE_SCRIPT = re.compile(r"(^|/)claude$|/claude-code/[^/]+\.[cm]?js$")


def bypasses_permissions(arguments: Sequence[str]) -> bool:
    """Whether Claude Code was started in the mode that asks for no permissions."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    return any(
        word in ("--dangerously-skip-permissions", "--permission-mode=bypassPermissions")
        or (word, after) == ("--permission-mode", "bypassPermissions")
        for word, after in pairs
    )


def judge(arguments: Sequence[str]) -> tuple[Mode, str] | None:
    """How a session of a process with these arguments receives; None if the process is not Claude Code."""
    rest = _claude_arguments(arguments)
    if rest is None:
        return None
    words = [word for word in rest if not word.startswith("-")]
    if words[:2] in (["mcp", "list"], ["mcp", "get"]):
        return Mode.HEALTH_CHECK, f"claude mcp {words[1]} only asks whether the server starts"
    if SERVER_NAME in _channels(rest):
        return Mode.PUSHED, "claude was started with its channel"
    return Mode.PULL, f"claude was started without {_CHANNEL_FLAGS[1]} server:{SERVER_NAME}"


def _claude_arguments(arguments: Sequence[str]) -> list[str] | None:
    if not arguments:
        return None
    if _CLAUDE.fullmatch(os.path.basename(arguments[0])):
        return list(arguments[1:])
    if _INTERPRETER.fullmatch(os.path.basename(arguments[0])):
        for number, word in enumerate(arguments[1:], 1):
            if word == "-c":
                return None  # a shell command: the shell starts it as a separate process
            if not word.startswith("-"):
                return list(arguments[number + 1 :]) if _CLAUDE_SCRIPT.search(word) else None
    return None


def _channels(arguments: Sequence[str]) -> set[str]:
    """The servers and plugins whose channels are loaded. A flag takes one or more values, up to the next option."""
    found: set[str] = set()
    is_value = False
    for word in arguments:
        flag, _, value = word.partition("=")
        if word.startswith("-"):
            is_value = flag in _CHANNEL_FLAGS
        elif is_value:
            value = word
        if is_value and value:
            kind, _, name = value.partition(":")
            if kind in ("server", "plugin"):
                found.add(name.partition("@")[0])
    return found


def choose(
    asked: str,
    *,
    chain: Sequence[Process] | None = None,
    arguments: Callable[[Process], Sequence[str]] = process.arguments,
) -> Choice:
    """How a session of the agent process above this one receives. [VOID-1]

    `asked` is AGENTBUS_DELIVERY: auto, or the name of the delivery to use. `chain` and `arguments` are passed to
    `find_host`.
    """
    host = find_host(lambda words: judge(words) is not None, chain=chain, arguments=arguments)
    judged = judge(host.arguments)
    mode, reason = judged or (Mode.UNSURE, host.unknown)
    if mode is Mode.HEALTH_CHECK:
        return Choice(host=host.process, mode=mode, delivery="none", reason=reason)
    if asked != "auto":
        return _asked(host.process, asked, f"AGENTBUS_DELIVERY is {asked}")
    if mode is Mode.PULL:
        if bypasses_permissions(host.arguments):
            # In this mode Claude Code holds other processes' posts for the user's approval, but would not hold ours.
            return _pull(host.process, f"{reason}, and asks for no permissions, so that its inbox is not used")
        return _inbox(host.process, reason)
    return _channel(host.process, mode, reason)


def _asked(host: Process, asked: str, reason: str) -> Choice:
    if asked == "inbox":
        return _inbox(host, reason, is_asked=True)
    return _pull(host, reason) if asked == PULL else _channel(host, Mode.PUSHED, reason)


def _channel(host: Process, mode: Mode, reason: str) -> Choice:
    name = "channel" if mode is Mode.PUSHED else "channel?"
    return Choice(
        host=host,
        mode=mode,
        delivery=name,
        reason=reason,
        make=channel.make,
    )


def _pull(host: Process, reason: str) -> Choice:
    return Choice(host=host, mode=Mode.PULL, delivery=PULL, reason=reason)


def _inbox(host: Process, reason: str, *, is_asked: bool = False) -> Choice:
    """The session's inbox if it answers, otherwise pull. An inbox that the user asked for is used even if it fails."""
    at = address()
    if at is None:
        return _pull(host, f"{reason}, and there is no CLAUDE_CODE_MESSAGING_SOCKET")
    inbox = Inbox(at, host)
    if not is_asked:
        try:
            inbox.connect().close()
        except DeliveryFailed as error:
            return _pull(host, f"{reason}, and its inbox cannot be used: {error}")
        reason = f"{reason}; what comes goes into its inbox"
    return Choice(
        host=host,
        mode=Mode.PUSHED,
        delivery=InboxDelivery.carrier,
        reason=reason,
        make=lambda link: InboxDelivery(inbox, PostBudget(link.home, host), link.gate, link.report),
    )
