"""How to tell that Claude Code is the agent process, and which delivery its session has.

In a session that was not started with the channel flag, Claude Code silently drops channel events. So its arguments
decide whether anything is pushed. Reads processes, and checks whether the inbox answers. Implements [VOID-1] to
[VOID-3], [HOST-1], [HOST-2], [BYPASS-2] and [MOD-5].
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from agentbus.adapters.claude_mcp import plugin, records
from agentbus.adapters.claude_mcp.door import Door
from agentbus.adapters.claude_mcp.inbox import address, inbox
from agentbus.adapters.claude_mcp.mod import ModDelivery, ModFirst
from agentbus.adapters.claude_mcp.mode import PermissionMode
from agentbus.adapters.claude_mcp.transcript import Transcript
from agentbus.adapters.claude_mcp.twins import twin
from agentbus.adapters.mcp import channel, peer_socket
from agentbus.adapters.mcp.hosts import Choice, Host, Link, Mode, find_host
from agentbus.adapters.mcp.inbox import InboxDelivery, PostBudget
from agentbus.core import process
from agentbus.core.bus import PULL
from agentbus.core.config import Settings, other_program, working_folder
from agentbus.core.errors import DeliveryFailed
from agentbus.core.names import folder_wish, session_wish
from agentbus.core.process import Process

__all__ = ["choose", "judge", "own_wish"]

# The name of this server in `claude mcp add` and in the launch flag. [VOID-1]
SERVER_NAME = "agentbus"

_CHANNEL_FLAGS = ("--channels", "--dangerously-load-development-channels")
_CLAUDE = re.compile(r"claude(\.exe)?")
# A session in the background is called so, in one word; it is a child of a daemon that all of them share.
_BACKGROUND = re.compile(r"(.*/)?claude bg(-[a-z]+)?( .*)?")
_BACKGROUND_KINDS = ("bg", "background")
# Who named the session, where a person did: at its prompt, or by `claude --bg --name`. Claude Code's own names are
# "derived" and "auto".
_GIVEN = ("user", "peer")
_INTERPRETER = re.compile(r"(node|bun|deno|(ba|da|z|k)?sh|python[\d.]*)(\.exe)?")
# The script of Claude Code's npm package, if an interpreter runs it.
_CLAUDE_SCRIPT = re.compile(r"(^|/)claude$|/claude-code/[^/]+\.[cm]?js$")


def judge(arguments: Sequence[str], *, is_claude: bool = False) -> tuple[Mode, str] | None:
    """How a session of a process with these arguments receives; None if the process is not Claude Code.

    `is_claude`: it is, whatever it is called.
    """
    rest = _claude_arguments(arguments)
    if rest is None and is_claude:
        rest = list(arguments[1:])
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


def _recognised(above: Sequence[Process]) -> Process | None:
    """The nearest of our ancestors that is Claude Code by what it gives us, whatever it is called. [HOST-1]

    It says that it is (CLAUDECODE), and it listens on the inbox whose address we have, or it has a registry entry.
    """
    if not other_program("CLAUDECODE"):
        return None
    at = address()
    pid = peer_socket.listener(at.path) if at is not None else None
    return next((one for one in above if one.pid == pid or records.entry(one) is not None), None)


def _host(
    chain: Sequence[Process] | None, arguments: Callable[[Process], Sequence[str]]
) -> tuple[Host, tuple[Mode, str] | None]:
    """The agent process, and how it is judged; None if it is not Claude Code."""
    above = list(process.ancestors() if chain is None else chain)
    named = find_host(lambda words: judge(words) is not None, chain=above, arguments=arguments)
    found = _recognised(above)
    if found is not None and not (named.is_client and above.index(named.process) < above.index(found)):
        words = tuple(arguments(found))
        return Host(found, words, is_client=True), judge(words or ("claude",), is_claude=True)
    if not named.is_client and other_program("CLAUDECODE"):
        # A health check has neither an inbox nor a registry entry. [VOID-3]
        judged = judge(named.arguments, is_claude=True) if named.arguments else None
        if judged is not None and judged[0] is Mode.HEALTH_CHECK:
            return named, judged
    return named, judge(named.arguments)


def own_wish(
    settings: Settings,
    folder: str,
    *,
    chain: Sequence[Process] | None = None,
    arguments: Callable[[Process], Sequence[str]] = process.arguments,
) -> Settings:
    """The settings with the name that this very session wishes for. [HOST-2]

    Sessions in the background share the environment of whoever started their daemon: AGENTBUS_NAME there is the wish of
    somebody else. Such a session is called as its user called it, else after `folder`.
    """
    is_asked = settings.name_was_asked or bool(settings.name_note)
    host, judged = _host(chain, arguments)
    if judged is None:
        return settings
    entry = records.entry(host.process)
    # Its entry can come a moment after our start; the folder of its job is in the environment before.
    is_background = entry.kind in _BACKGROUND_KINDS if entry is not None else bool(other_program("CLAUDE_JOB_DIR"))
    if not is_background and not (host.arguments and _BACKGROUND.fullmatch(host.arguments[0])):
        return settings
    # Its prompt is its first name, also where it was given one. Who named it is said before it begins to work.
    entry = records.settled(host.process, lambda one: one is not None and bool(one.name_source or one.status == "busy"))
    given = entry.name if entry is not None and entry.name_source in _GIVEN else ""
    folder = (entry.cwd if entry is not None else "") or folder or settings.cwd
    # What the user typed as a title may be no name. It may be too long, for example: then the folder names the session.
    name = session_wish(given) or folder_wish(folder)
    note = "AGENTBUS_NAME is not used in a background session: it belongs to whoever started the daemon"
    return replace(settings, name=name, name_note=note if is_asked else "", name_was_asked=False)


def choose(
    asked: str,
    *,
    bypass: str = "",
    chain: Sequence[Process] | None = None,
    arguments: Callable[[Process], Sequence[str]] = process.arguments,
) -> Choice:
    """How a session of the agent process above this one receives. [VOID-1]

    `asked` is AGENTBUS_DELIVERY: auto, or the name of the delivery to use. `bypass` is AGENTBUS_BYPASS: hold, deliver,
    or nothing if it is not set. `chain` and `arguments` are passed to `find_host`.
    """
    host, judged = _host(chain, arguments)
    mode, reason = judged or (Mode.UNSURE, host.unknown)
    if mode is Mode.HEALTH_CHECK:
        return Choice(host=host.process, mode=mode, delivery="none", reason=reason)
    if asked != "auto":
        choice = _asked(host.process, asked, f"AGENTBUS_DELIVERY is {asked}")
    elif mode is Mode.PULL:
        choice = _inbox(host.process, reason)
    else:
        choice = _channel(host.process, mode, reason)
    if judged is None:
        return choice
    # A delivery that the user asked for is the user's word, unless there is a plainer one. [BYPASS-2]
    is_held = bypass == "hold" or (not bypass and asked == "auto")
    held = _holding(host) if choice.make is not None and is_held else None
    if asked in ("auto", ModDelivery.carrier):
        choice = _mod_first(choice, host, held)
    return replace(choice, held=held, twin=twin)


def _holding(host: Host) -> Callable[[], str]:
    mode = PermissionMode(host.process, host.arguments, working_folder())

    def held() -> str:
        where = mode.bypass()
        if not where:
            return ""
        return f"the session asks for no permissions (bypassPermissions, by {where}), see AGENTBUS_BYPASS"

    return held


def _mod_first(choice: Choice, host: Host, held: Callable[[], str] | None) -> Choice:
    """`choice`, with our code inside the session in its place for as long as that asks. [MOD-5]"""
    make, record = choice.make, choice.record
    if make is None or record is None:
        return choice

    def why_not() -> str:
        entry = records.entry(host.process)
        return plugin.why_not(host.arguments, entry.version if entry is not None else "", working_folder())

    def is_idle() -> bool:
        entry = records.entry(host.process)
        return entry is not None and entry.status == "idle" and not (held is not None and held())

    def make_both(link: Link) -> ModFirst:
        door = Door(link.home, host.process)
        mod = ModDelivery(door, record, is_idle, link.frames)
        both = ModFirst(mod, door, make(link), link.turned, choice.reason, why_not)
        link.beside(both.watch)
        return both

    return replace(choice, make=make_both)


def _asked(host: Process, asked: str, reason: str) -> Choice:
    if asked in ("inbox", ModDelivery.carrier):
        return _inbox(host, reason, is_asked=asked == "inbox")
    return _pull(host, reason) if asked == PULL else _channel(host, Mode.PUSHED, reason)


def _channel(host: Process, mode: Mode, reason: str) -> Choice:
    name = "channel" if mode is Mode.PUSHED else "channel?"
    return Choice(
        host=host,
        mode=mode,
        delivery=name,
        reason=reason,
        make=channel.make,
        record=Transcript(host),
    )


def _pull(host: Process, reason: str) -> Choice:
    return Choice(host=host, mode=Mode.PULL, delivery=PULL, reason=reason)


def _inbox(host: Process, reason: str, *, is_asked: bool = False) -> Choice:
    """The session's inbox if it answers, otherwise pull. An inbox that the user asked for is used even if it fails."""
    at = address()
    if at is None:
        return _pull(host, f"{reason}, and there is no CLAUDE_CODE_MESSAGING_SOCKET")
    own = inbox(at, host)
    if not is_asked:
        try:
            own.connect().close()
        except DeliveryFailed as error:
            return _pull(host, f"{reason}, and its inbox cannot be used: {error}")
        reason = f"{reason}; what comes goes into its inbox"
    return Choice(
        host=host,
        mode=Mode.PUSHED,
        delivery=InboxDelivery.carrier,
        reason=reason,
        make=lambda link: InboxDelivery(own, PostBudget(link.home, host), link.gate, link.report, link.frames),
        record=Transcript(host),
    )
