"""The tools, as plain data and one function each. Arguments are checked here, and every failure is one sentence.

Knows the session, but not the MCP SDK: fast_path.py runs the tools, and sdk.py does so for the calls that it leaves.
Implements [TOOL-1] to [TOOL-5], [ARG-1], [BURST-1], [WAKE-5].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentbus.adapters.mcp.asking import ask, status_line
from agentbus.adapters.mcp.hosts import Mode
from agentbus.adapters.mcp.profile import Profile
from agentbus.adapters.mcp.reading import check_messages
from agentbus.adapters.mcp.toolkit import (
    ASIDE_CHARS,
    CALL_META,
    MAX_QUOTED_CHARS,
    Argument,
    Tool,
    ToolContext,
    ToolResult,
    name_note,
    told,
    unread_line,
)
from agentbus.core.asking import DEFAULT_S
from agentbus.core.bus import Sent
from agentbus.core.errors import AgentbusError, Busy, InvalidRequest, Refused
from agentbus.core.model import Peer
from agentbus.core.session import Session
from agentbus.core.stderr import say
from agentbus.core.text import MAX_REASON_CHARS, one_line, word

__all__ = ["TOOLS", "call", "call_now", "listing"]

# The list of peers names so many on other machines. There can be thousands.
_MAX_FAR_NAMES = 50


async def _send_message(context: ToolContext, session: Session, arguments: Mapping[str, Any]) -> str:
    with context.rate_limit.one(session.bus.address(arguments["to"])):
        return str(await session.send(arguments["to"], arguments["text"], reply_to=arguments.get("reply_to")))


def _send_message_now(context: ToolContext, session: Session, arguments: Mapping[str, Any]) -> str:
    with context.rate_limit.one(session.bus.address(arguments["to"])):
        return str(session.send_now(arguments["to"], arguments["text"], reply_to=arguments.get("reply_to")))


async def _broadcast(context: ToolContext, session: Session, arguments: Mapping[str, Any]) -> str:
    with context.rate_limit.one("everybody"):
        sent = await session.broadcast(arguments["text"], everywhere=arguments.get("everywhere", False))
        return _sent_line(sent)


def _broadcast_now(context: ToolContext, session: Session, arguments: Mapping[str, Any]) -> str:
    with context.rate_limit.one("everybody"):
        return _sent_line(session.broadcast_now(arguments["text"], everywhere=arguments.get("everywhere", False)))


def _sent_line(sent: Sequence[Sent]) -> str:
    if not sent:
        return "nobody else is online; nothing was sent"
    return f"sent to {len(sent)}: " + ", ".join(f"{one.recipient} (#{one.id})" for one in sent)


def _line(peer: Peer, own: Peer, usual_trigger: str) -> str:
    you = " (you)" if peer.session == own.session else ""
    how = "" if peer.trigger == usual_trigger else f", woken by {word(peer.trigger)}"
    return f"{peer.name}{you}: {word(peer.runtime)} in {one_line(peer.cwd)}{how}"


async def _list_peers(context: ToolContext, session: Session, _arguments: Mapping[str, Any]) -> str:
    own = session.peer
    peers = await session.peers()
    lines = [_line(peer, own, context.usual_trigger) for peer in peers]
    if all(peer.session == own.session for peer in peers):
        lines.append("nobody else is online; a message to any name waits until a session of that name starts")
    return "\n".join([*lines, *_far_lines(session)])


def _far_lines(session: Session) -> list[str]:
    """The other machines, one a line. [MACH-2]"""
    room, lines, now = _MAX_FAR_NAMES, [], session.bus.clock()
    for machine in session.bus.machines():
        if not machine.is_there:
            lines.append(f"machine {machine.name}: last heard of {_ago(now - machine.seen_at)} ago")
            continue
        names = [f"{peer.name}@{machine.name}" for peer in machine.peers]
        shown = names[:room]
        room -= len(shown)
        more = [f"{len(names) - len(shown)} more"] if len(names) > len(shown) else []
        lines.append(f"machine {machine.name}: {', '.join([*shown, *more]) or 'nobody, as far as it says'}")
    return lines


def _ago(ms: int) -> str:
    from agentbus.core.machines import ago  # only a session with a link needs it

    return ago(ms)


async def _whoami(context: ToolContext, session: Session, _arguments: Mapping[str, Any]) -> str:
    peer = session.peer
    waits = context.choice.mode is Mode.PULL or context.trouble()
    how = "messages wait for check_messages" if waits else "messages are pushed into this session"
    return (
        f'you are "{peer.name}", woken by {word(peer.trigger)}, in {one_line(peer.cwd)}{name_note(session)}; '
        f"{how} ({peer.receives})"
    )


async def _set_name(_context: ToolContext, session: Session, arguments: Mapping[str, Any]) -> str:
    if session.is_guest:
        raise Refused(
            "the name belongs to the main agent of this session, and you are a subagent of it", hint="leave it as it is"
        )
    before = session.peer.name
    renamed = await session.rename(arguments["name"])
    after = renamed.name
    if after == before:
        return f'you are "{after}" already'
    said = f'you are "{after}" now; messages to "{before}" still reach you while this session lives'
    return f"{said}; {renamed.kept_note}" if renamed.kept else said


async def _message_status(_context: ToolContext, session: Session, arguments: Mapping[str, Any]) -> str:
    return status_line(session, arguments["id"])


_TEXT = Argument("Up to 64 KiB; for more, send the path of a file.")


def _highest_id(_profile: Profile) -> int:
    return 2**53 - 1  # the largest whole number that every JSON parser keeps


TOOLS: tuple[Tool, ...] = (
    Tool(
        "send_message",
        "Send a message to a peer: another agent session, not a subagent of yours. If it is offline, it waits.",
        _send_message,
        {
            "to": Argument("The peer's name."),
            "text": _TEXT,
            "reply_to": Argument("The msg_id that this answers.", False, 1, _highest_id),
        },
        _send_message_now,
        is_loaded=True,
    ),
    Tool(
        "ask",
        "Send a question to a peer and wait for its answer, which is the result. If none comes in time, or the peer is "
        "offline or ends, the result says so, and a later answer arrives as every message does.",
        ask,
        {
            "to": Argument("The peer's name."),
            "text": _TEXT,
            "wait_s": Argument(
                f"Seconds to wait, by default {DEFAULT_S}.", False, 1, lambda profile: profile.max_wait_s
            ),
        },
    ),
    Tool(
        "broadcast",
        "Send a message to every peer that is online.",
        _broadcast,
        {"text": _TEXT, "everywhere": Argument("Also on other machines.", False, is_flag=True)},
        _broadcast_now,
    ),
    Tool(
        "list_peers",
        "The peers that are online: name, kind and folder of each.",
        _list_peers,
        only_reads=True,
    ),
    Tool(
        "whoami",
        "Your name on agentbus, and how messages reach you.",
        _whoami,
        only_reads=True,
    ),
    Tool(
        "set_name",
        "Change your name on agentbus. Pending messages come along, and the old name still reaches you.",
        _set_name,
        {"name": Argument("1 to 32 letters and digits, with _ - . between them.")},
    ),
    Tool(
        "check_messages",
        "Your unread messages, oldest first, each once. A subagent leaves them to the main agent.",
        check_messages,
        {
            "wait_s": Argument(
                "Seconds to wait for one.",
                False,
                0,
                lambda profile: profile.max_wait_s,
            )
        },
        is_loaded=True,
    ),
    Tool(
        "message_status",
        "Whether a message is pending, delivered or read.",
        _message_status,
        {"id": Argument("The number after # that send_message gave.", True, 1, _highest_id)},
        only_reads=True,
    ),
)


def listing(profile: Profile) -> dict[str, Any]:
    """The result of `tools/list`."""
    return {"tools": [tool.listed(profile) for tool in TOOLS]}


_BY_NAME = {tool.name: tool for tool in TOOLS}


def _checked(tool: Tool, arguments: Mapping[str, Any], profile: Profile) -> dict[str, Any]:
    for name in arguments:
        if name not in tool.arguments and name not in profile.ignored_arguments:
            takes = ", ".join(tool.arguments) or "no arguments"
            raise InvalidRequest(f"{tool.name} has no argument {name[:MAX_QUOTED_CHARS]!r}", hint=f"it takes {takes}")
    checked: dict[str, Any] = {}
    for name, argument in tool.arguments.items():
        if arguments.get(name) is not None:  # null is what some clients send for nothing [ARG-1]
            checked[name] = argument.check(name, arguments[name], profile)
        elif argument.is_required:
            raise InvalidRequest(f"{tool.name} needs the argument {name!r}", hint=argument.description)
    return checked


async def call(
    context: ToolContext,
    name: str,
    arguments: Mapping[str, Any] | None,
    meta: Mapping[str, Any] | None = None,
) -> ToolResult:
    """Run a tool. `meta` is the `_meta` of the call. [TOOL-2]"""
    CALL_META.set(meta or {})
    if context.arrival is not None:
        await context.arrival.over.wait()
    tool = _BY_NAME.get(name)
    session = context.session
    if session is None:
        reason = told(context, context.choice.reason, MAX_REASON_CHARS)
        return ToolResult(f"this is no session: {reason}", is_error=True)
    if context.aside():
        return ToolResult(told(context, context.aside(), ASIDE_CHARS), is_error=True)
    try:
        if tool is None:
            known = ", ".join(_BY_NAME)
            result = ToolResult(f"there is no tool {name[:MAX_QUOTED_CHARS]!r}: use {known}", is_error=True)
        else:
            try:
                done = await tool.run(context, session, _checked(tool, arguments or {}, context.profile))
                result = ToolResult(done) if isinstance(done, str) else done
            except AgentbusError as error:
                result = ToolResult(str(error), is_error=True)
        return _finished(context, session, result)
    except Exception as error:  # noqa: BLE001 - see _fault
        return _fault(name, error)


def call_now(context: ToolContext, name: str, arguments: Mapping[str, Any] | None) -> ToolResult | None:
    """Run a tool, with the same result as `call`. If the tool could have to wait for long, do nothing and return None.

    Raises Busy, with nothing done, if the tool has to wait for another process or for an earlier call.
    """
    tool, session = _BY_NAME.get(name), context.session
    if tool is None or tool.run_now is None or session is None or context.aside():
        return None
    try:
        try:
            result = ToolResult(tool.run_now(context, session, _checked(tool, arguments or {}, context.profile)))
        except Busy:
            raise
        except AgentbusError as error:
            result = ToolResult(str(error), is_error=True)
        return _finished(context, session, result)
    except Busy:
        raise
    except Exception as error:  # noqa: BLE001 - see _fault
        return _fault(name, error)


def _fault(name: str, error: Exception) -> ToolResult:
    """The result of a call that met a fault of ours: only this call fails, and stderr says so. [ERR-2]"""
    fault = f"internal error, {type(error).__name__}: {error}"
    say(f"{name}: {fault}")
    return ToolResult(fault, is_error=True)


def _finished(context: ToolContext, session: Session, result: ToolResult) -> ToolResult:
    notice = session.take_notice()
    if notice:
        result = replace(result, text=f"{result.text}\n{notice}")
    if result.settle is None:
        # No message stands in it, but a folder can have a tag of the client in its name. [TRUST-5]
        result = replace(result, text=context.profile.frames.defused(result.text))
    if context.is_pushed or result.settle is not None:
        return result
    return ToolResult(result.text + unread_line(session), result.is_error)
