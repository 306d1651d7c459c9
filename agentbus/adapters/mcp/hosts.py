"""What the processes above this one tell: which of them is the host, and how its session can receive.

Claude Code drops channel events without a word in a session that was not started with the channel flag, so its
arguments decide whether anything is pushed. Reads processes, nothing else. Implements [VOID-1] to [VOID-3].
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from agentbus.core import process
from agentbus.core.process import Process

__all__ = ["Host", "Way", "find_host", "judge"]

# What `claude mcp add` and the launch flag call this server. [VOID-1]
SERVER_NAME = "agentbus"

_CHANNEL_FLAGS = ("--channels", "--dangerously-load-development-channels")
_CLAUDE = re.compile(r"claude(\.exe)?")
_INTERPRETER = re.compile(r"(node|bun|deno|(ba|da|z|k)?sh|python[\d.]*)(\.exe)?")
# The script of Claude Code's npm package, where that is run by an interpreter.
_CLAUDE_SCRIPT = re.compile(r"(^|/)claude$|/claude-code/[^/]+\.[cm]?js$")
# Programs that only start another one, and stay between the host and us.
_WRAPPER = re.compile(r"-?((ba|da|z|k|fi)?sh|uvx?|pipx|env|nice|timeout|npx|npm|mise|direnv)")


class Way(Enum):
    """How a session receives. [VOID-1]"""

    CHANNEL = "channel"  # pushed: the host shows channel events
    UNSURE = "channel?"  # pushed, and offered by check_messages too: nobody knows what the host does with an event
    INBOX = "inbox"  # pushed, through the inbox that Claude Code gives each session
    PULL = "pull"  # kept until check_messages asks
    HEALTH_CHECK = "none"  # not a session at all


@dataclass(frozen=True, slots=True)
class Host:
    """The host process, how its session receives, and why, in a few words."""

    process: Process
    way: Way
    reason: str
    # Claude Code, started without the channel flag: its inbox may do. [VOID-1]
    may_use_inbox: bool = False


def bypasses_permissions(arguments: Sequence[str]) -> bool:
    """Whether Claude Code was started in the mode that asks for no permissions."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    return any(
        word in ("--dangerously-skip-permissions", "--permission-mode=bypassPermissions")
        or (word, after) == ("--permission-mode", "bypassPermissions")
        for word, after in pairs
    )


def judge(arguments: Sequence[str]) -> tuple[Way, str] | None:
    """How a session of the process with these arguments receives; None when that is not Claude Code."""
    rest = _claude_arguments(arguments)
    if rest is None:
        return None
    words = [word for word in rest if not word.startswith("-")]
    if words[:2] in (["mcp", "list"], ["mcp", "get"]):
        return Way.HEALTH_CHECK, f"claude mcp {words[1]} only asks whether the server starts"
    if SERVER_NAME in _channels(rest):
        return Way.CHANNEL, "claude was started with its channel"
    return Way.PULL, f"claude was started without {_CHANNEL_FLAGS[1]} server:{SERVER_NAME}"


def _claude_arguments(arguments: Sequence[str]) -> list[str] | None:
    if not arguments:
        return None
    if _CLAUDE.fullmatch(os.path.basename(arguments[0])):
        return list(arguments[1:])
    if _INTERPRETER.fullmatch(os.path.basename(arguments[0])):
        for number, word in enumerate(arguments[1:], 1):
            if word == "-c":
                return None  # a command for a shell, which starts it as a process of its own
            if not word.startswith("-"):
                return list(arguments[number + 1 :]) if _CLAUDE_SCRIPT.search(word) else None
    return None


def _channels(arguments: Sequence[str]) -> set[str]:
    """The servers and plugins whose channels are loaded: a flag takes one or more values, to the next option."""
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


def find_host(
    asked: str,
    *,
    chain: Sequence[Process] | None = None,
    arguments: Callable[[Process], Sequence[str]] = process.arguments,
) -> Host:
    """The host above this process. `asked` is AGENTBUS_DELIVERY: auto, or the way itself, which then decides.

    `chain` is the processes above, nearest first; `arguments` reads those of one, empty where it cannot.
    """
    above = list(process.ancestors() if chain is None else chain)
    found = _find(above, arguments)
    if found.way is not Way.HEALTH_CHECK and asked != "auto":
        return Host(found.process, Way(asked), f"AGENTBUS_DELIVERY is {asked}")
    return found


def _find(above: Sequence[Process], arguments: Callable[[Process], Sequence[str]]) -> Host:
    for one in above:
        words = arguments(one)
        judged = judge(words)
        if judged is not None:
            way, reason = judged
            if way is Way.PULL and bypasses_permissions(words):
                # There Claude Code holds what other processes post for the user's approval, and would not hold ours.
                return Host(one, way, f"{reason}, and asks for no permissions, so that its inbox is not used")
            return Host(one, way, reason, may_use_inbox=way is Way.PULL)
        if not words:
            return Host(one, Way.UNSURE, "the arguments of the host cannot be read")
        name = os.path.basename(words[0])
        if not _WRAPPER.fullmatch(name):
            return Host(one, Way.UNSURE, f"{name[:32]} is not known to show channel events, nor not to")
    return Host(above[-1] if above else process.parent(), Way.UNSURE, "the host cannot be told")
